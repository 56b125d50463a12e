"""What a guide says of one latent site: its divergence from the model, component by component, and its posterior means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae.handlers.structure import Latent, unmask
from pyrovae.inference.narrow import narrow


def analytic_kl(q: Any, p: Any, *, many: bool) -> Tensor | None:
    """KL(q || p) of each component of a site `[*batch, components]`, one component where they are not independent.

    None where no formula is registered for the pair. With `many` the first batch dim is that of particles.
    """
    (q, q_events), (p, p_events) = _base(q), _base(p)
    split = q.event_dim == p.event_dim and q_events == p_events
    if not split:
        q, p = q.to_event(q_events), p.to_event(p_events)
    q, p = narrow(q, p) if many else (q, p)
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)  # torch's formula of bits asks for equal shapes
    try:
        table: Tensor = kl_divergence(q.expand(shape), p.expand(shape))
    except NotImplementedError:
        return None
    return table.flatten(table.dim() - q_events) if split and q_events else table.unsqueeze(-1)


def sampled_kl(q: Any, p: Any, value: Tensor) -> Tensor:
    """Log q(z) − log p(z) of each component, `[*batch, components]`; one component where they are not independent."""
    (q, q_events), (p, p_events) = _base(q), _base(p)
    if q.event_dim != p.event_dim or q_events != p_events:
        return (q.to_event(q_events).log_prob(value) - p.to_event(p_events).log_prob(value)).unsqueeze(-1)
    table = q.log_prob(value) - p.log_prob(value)
    return table.flatten(table.dim() - q_events) if q_events else table.unsqueeze(-1)


def expected(latent: Latent, q: Any, value: Tensor, *, many: bool) -> Tensor:
    """What q expects of a site: probabilities `[*batch, components, cardinality]`, or means `[*batch, components]`.

    By the formula where the family has one, else the values drawn. With `many` the first batch dim is that of particles.
    """
    if not latent.finite:
        mean = _mean(q, value, many=many)
        return mean.reshape((*mean.shape[: mean.dim() - len(latent.event_shape)], latent.components))
    fn, events = _base(q)
    categorical = getattr(fn, "_categorical", fn)
    if isinstance(categorical, torch.distributions.Categorical):
        probs: Tensor = (narrow(fn)[0] if many else fn).probs
    elif isinstance(fn, torch.distributions.Bernoulli):
        p = (narrow(fn)[0] if many else fn).probs
        probs = torch.stack((1 - p, p), -1)
    else:
        codes = latent.encode(value)
        return torch.nn.functional.one_hot(codes, latent.cardinality).to(torch.get_default_dtype())
    lead = probs.shape[: probs.dim() - 1 - events]
    return probs.reshape((*lead, latent.components, probs.shape[-1]))


def active_units(latent: Latent, means: Tensor) -> Tensor:
    """Which components answer to the data, `[components]`, from :func:`expected` of every row `[rows, …]`.

    Burda et al.: the variance over the data of the posterior mean exceeds 0.01. Of a bit the mean is its probability; of a
    category the variances of its probabilities count together, by half, so that two categories are judged as one bit.
    """
    variance = means.var(0)
    return (variance.sum(-1) / 2 if latent.finite else variance) > 0.01


def code_usage(means: Tensor) -> Tensor:
    """The perplexity of each component's probabilities averaged over rows, `[rows, components, K]` to `[components]`."""
    average = means.mean(0)
    return torch.special.entr(average).sum(-1).exp()


def _mean(q: Any, value: Tensor, *, many: bool) -> Tensor:
    fn, _ = _base(q)
    try:
        mean: Tensor = (narrow(fn)[0] if many else fn).mean
    except (NotImplementedError, AttributeError):
        return value
    return mean if mean.dim() == fn.event_dim + len(fn.batch_shape) and not bool(torch.isnan(mean).any()) else value


def _base(fn: Any) -> tuple[Any, int]:
    """A distribution without masks and `.to_event`, and how many event dims the latter made."""
    fn, events = unmask(fn)[0], 0
    while isinstance(fn, torch.distributions.Independent):
        fn, events = fn.base_dist, events + fn.reinterpreted_batch_ndims
    return fn, events


def flat_rows(values: Tensor, batch_dims: int) -> Tensor:
    """`[*batch, …]` to `[rows, …]`."""
    return values.reshape((math.prod(values.shape[:batch_dims]), *values.shape[batch_dims:]))
