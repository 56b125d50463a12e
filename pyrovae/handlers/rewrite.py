"""Programs that run with some of their distributions replaced."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, Protocol

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.distributions import GreyLevels, RelaxedBernoulli, RelaxedOneHotCategorical
from pyrovae.distributions.parameters import check_temperature
from pyrovae.ops.tracing import capturing

Values = Literal["soft", "hard"]
MARK = "pyrovae_values"  # in `infer`: whether a site draws soft or hard values


class Rule(Protocol):
    """How a program is rewritten: a new handler for every run."""

    def handler(self) -> Messenger:
        """The handler of one run."""


class RewrittenProgram:
    """A program whose latent sites are rewritten at every run; the original is in `program`."""

    def __init__(self, program: Callable[..., Any], rule: Rule) -> None:
        self.program = program
        self.rule = rule

    @property
    def temperature(self) -> Any:
        """The temperature of a relaxation (a 0-d tensor or a function) or of a surrogate; None of other rules."""
        return getattr(self.rule, "temperature", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, rewritten."""
        with self.rule.handler():
            return self.program(*args, **kwargs)


class Rewrite(Messenger):
    """Replaces the distribution of every latent site by `change(name, fn)`.

    With a mark ("soft" values have a density, "hard" ones a mass) the sites that it changes carry it in `infer`. A replay
    puts the guide's `infer` in place of the model's, so that a model tells how its guide was rewritten. Where the guide
    carries no mark, its values are looked at, on the CPU only: elsewhere that would wait for the device.
    """

    def __init__(self, change: Callable[[str, Any], Any], mark: Values | None = None) -> None:
        super().__init__()
        self.change, self.mark = change, mark
        self.marked: set[str] = set()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        # A replayed value is already there, but `fn` still scores it: no early return on msg["done"].
        if not is_latent(msg):
            return
        fn = msg["fn"]
        msg["fn"] = rewrap(fn, lambda fn: self.change(msg["name"], fn))
        if self.mark and msg["fn"] is not fn:
            self.marked.add(msg["name"])
            msg["infer"] = {**(msg["infer"] or {}), MARK: self.mark}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.marked or not is_latent(msg) or values_of(msg["fn"]) != self.mark:
            return  # the last: a handler outside has rewritten the site again
        found = (msg["infer"] or {}).get(MARK) or _kind(msg["fn"], msg["value"])
        if found is not None and found != self.mark:
            raise ValueError(
                f"expected values of one kind at site {msg['name']!r} in model and guide, got a model rewritten for "
                f"{self.mark} values and a guide for {found} ones: a density would meet a mass; wrap both alike, with the "
                "same straight_through"
            )


def values_of(fn: Any) -> Values | None:
    """The kind of values that a site draws, of the families that can be rewritten; None of others."""
    family = innermost(fn)
    if isinstance(family, (RelaxedBernoulli, RelaxedOneHotCategorical)):
        return "hard" if family.straight_through else "soft"
    discrete = (torch.distributions.Bernoulli, torch.distributions.OneHotCategorical)
    return "hard" if isinstance(family, discrete) else None


def _kind(fn: Any, value: Any) -> Values | None:
    """What values look like: soft ones of a Bernoulli or category are never all 0 or 1."""
    if capturing():
        return None
    if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.numel() or innermost(fn).event_shape == (1,):
        return None
    return "hard" if bool(((value == 0) | (value == 1)).all()) else "soft"


def is_latent(msg: dict[str, Any]) -> bool:
    """Whether a message is a sample statement that is not observed, and no plate's draw of its rows."""
    return not msg["is_observed"] and type(msg["fn"]).__name__ != "_Subsample"


def innermost(fn: Any) -> Any:
    """The distribution inside `.to_event`, `.mask` and `.expand`."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution, _EXPANDED)):
        fn = fn.base_dist
    return fn


def rewrap(fn: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the innermost distribution and put `.to_event`, `.mask` and `.expand` back around it."""
    if isinstance(fn, torch.distributions.Independent):
        base = rewrap(fn.base_dist, change)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        base = rewrap(fn.base_dist, change)
        return fn if base is fn.base_dist else base.mask(fn._mask)
    if isinstance(fn, _EXPANDED):
        base = rewrap(fn.base_dist, change)
        return fn if base is fn.base_dist else base.expand(fn.batch_shape)
    return change(fn)


def refuse_other_discrete(name: str, fn: Any, method: str) -> None:
    """Refuse a discrete latent that is neither Bernoulli nor OneHotCategorical; `GreyLevels` are pixels drawn without data.

    Raises:
        ValueError: with the rewrite of the site.
    """
    if not is_discrete(fn) or isinstance(fn, GreyLevels):
        return
    remedy = (
        "write the site as dist.OneHotCategorical and index with `z @ table` instead of `table[z]`"
        if isinstance(fn, torch.distributions.Categorical)
        else "use a score-function or exact method for this program"
    )
    raise ValueError(
        f"expected Bernoulli or OneHotCategorical latents for {method}, got the {type(fn).__name__} site {name!r}; {remedy}"
    )


def is_discrete(fn: Any) -> bool:
    """Whether a distribution is one of masses."""
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def as_temperature(temperature: Any) -> Any:
    """A number as a 0-d tensor; a 0-d tensor and a function as they are.

    Raises:
        ValueError: if the temperature is not positive and finite, or has dims.
    """
    if callable(temperature) and not isinstance(temperature, Tensor):
        return temperature
    if isinstance(temperature, Tensor):
        _check_scalar(temperature)
    elif not isinstance(temperature, Real):
        raise ValueError(f"expected a temperature that is a number, a 0-d tensor or a function, got {temperature!r}")
    check_temperature(temperature)
    return temperature if isinstance(temperature, Tensor) else torch.tensor(float(temperature))


def read_temperature(temperature: Any) -> Tensor:
    """The temperature of one run, as a 0-d tensor."""
    if isinstance(temperature, Tensor):
        return temperature
    value = temperature()
    if isinstance(value, Tensor):
        _check_scalar(value)
        return value
    check_temperature(value)
    return torch.tensor(float(value))


def _check_scalar(temperature: Tensor) -> None:
    if temperature.dim():
        raise ValueError(
            "expected a positive, finite temperature (a float, a 0-d tensor or a function that returns one), got a tensor of "
            f"shape {tuple(temperature.shape)}; for one temperature a site, write the sites relaxed"
        )


_EXPANDED = dist.torch_distribution.ExpandedDistribution
