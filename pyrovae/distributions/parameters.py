"""Parameters of the discrete families and their relaxations, checked, and the noise of their draws."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions.utils import probs_to_logits
from torch.nn.functional import softplus

from pyrovae.distributions.supports import simplex_tolerance

EXACT_SOFTPLUS = 40.0  # threshold; torch's default, 20, is off by 2e-9


def check_temperature(temperature: Any) -> None:
    """Refuse a temperature that is not positive and finite.

    Raises:
        ValueError: saying so.
    """
    if isinstance(temperature, Real):
        if not 0 < float(temperature) < math.inf:
            raise ValueError(f"expected a positive, finite temperature, got {temperature:g}; values from 0.1 to 1 are usual")
        return
    t = torch.as_tensor(temperature)
    if not bool(((t > 0) & torch.isfinite(t)).all()):
        got = f"{float(t):g}" if t.dim() == 0 else f"values from {float(t.min()):g} to {float(t.max()):g}"
        raise ValueError(f"expected a positive, finite temperature, got {got}; values from 0.1 to 1 are usual")


def as_temperature(temperature: float | Tensor, logits: Tensor, *, validate: bool) -> Tensor:
    """A temperature as a tensor of the dtype and device of `logits`; a number is always checked.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if isinstance(temperature, Tensor):
        if validate:
            check_temperature(temperature)
        return temperature.to(logits)
    if not isinstance(temperature, Real):
        raise ValueError(f"expected a temperature that is a number or a tensor, got {type(temperature).__name__}")
    check_temperature(temperature)
    return logits.new_tensor(float(temperature))


def as_logits(family: str, probs: Any, logits: Any, *, validate: bool, event_dim: int, hard: bool = False) -> Tensor:
    """The logits, as given or from the probabilities, as a floating tensor; impossible values are for `hard` families.

    Raises:
        ValueError: unless one of the two is given; where validated, for values that are infinite or NaN, and probabilities
            outside [0, 1] or (event dim 1) with another sum than 1.
    """
    if (probs is None) == (logits is None):
        raise ValueError(f"expected either probs or logits for {family}, got {'none' if probs is None else 'both'}")
    name = "probs" if logits is None else "logits"
    given = probs if logits is None else logits
    value = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.get_default_dtype())
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    if value.dim() < event_dim:
        raise ValueError(f"expected {name} of {family} with a last dim of categories, got a 0-d tensor")
    if validate and not bool((_possible(value, event_dim) if hard and logits is not None else torch.isfinite(value)).all()):
        raise ValueError(
            f"expected finite {name} for {family}, got {int((~torch.isfinite(value)).sum())} infinite or NaN of "
            f"{value.numel()}; a category that is all but impossible has a logit of -30 or so"
        )
    if name == "logits":
        return value
    if validate and not bool(((value >= 0) & (value <= 1 + 1e-6)).all()):
        raise ValueError(f"expected probs of {family} in [0, 1], got {float(value.min()):g} to {float(value.max()):g}")
    if not event_dim:
        return probs_to_logits(value, is_binary=True)
    total = value.sum(-1)
    if validate and not bool(((total - 1).abs() <= simplex_tolerance(value)).all()):
        raise ValueError(
            f"expected probs of {family} that sum to 1, got sums from {float(total.min()):g} to {float(total.max()):g}; "
            "normalise them, or pass their logarithms as logits"
        )
    return probs_to_logits(value / total.unsqueeze(-1))


def _possible(logits: Tensor, event_dim: int) -> Tensor:
    """Which logits a hard family takes: −∞ is a value that is never drawn, and ∞ a bit that is always 1."""
    return ~torch.isnan(logits) & (logits < torch.inf) if event_dim else ~torch.isnan(logits)


def bounded(logits: Tensor) -> Tensor:
    """Logits within ±√max of their dtype: times 0 they are 0, and products with other weights stay finite, too."""
    most = torch.finfo(logits.dtype).max ** 0.5
    return logits.clamp(-most, most)


def category_log_prob(value: Tensor, logits: Tensor) -> Tensor:
    """Σ_k v_k logits_k over the last dim, linear in the value: 0 · −∞ counts as 0, and an impossible category as −∞."""
    logits = bounded(logits)
    return _impossible((value * logits).sum(-1))


def bit_log_prob(value: Tensor, logits: Tensor) -> Tensor:
    """Likewise v · logits − softplus(logits)."""
    logits = bounded(logits)
    return _impossible(value * logits - softplus(logits, threshold=EXACT_SOFTPLUS))


def _impossible(log_prob: Tensor) -> Tensor:
    return log_prob.masked_fill(log_prob.detach() <= -(torch.finfo(log_prob.dtype).max ** 0.5), -torch.inf)


def open_uniform(shape: Size, like: Tensor) -> Tensor:
    """Uniform values in (0, 1), away from both ends."""
    eps = torch.finfo(like.dtype).eps
    return torch.rand(shape, dtype=like.dtype, device=like.device).clamp_(eps, 1 - eps)


def softmax(score: Tensor) -> Tensor:
    """The softmax in steps that vectorise over all dims: torch's is five times slower for a handful of categories."""
    e = (score - score.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
