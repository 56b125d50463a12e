"""Which site or parameter made a loss or a gradient that is no number."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.handlers.structure import read_structure
from pyrovae.inference.posterior import Program
from pyrovae.ops import isolated_rng

if TYPE_CHECKING:
    from pyrovae.inference.variational.batches import Batch
    from pyrovae.inference.variational.guard import Fault
    from pyrovae.inference.variational.optimization import Optimization


@dataclass(frozen=True)
class Moment:
    """A step, its minibatch, and the states of the generators before it (None for those of now)."""

    step: int
    batch: Batch
    states: Mapping[str, Tensor] | None


def check_fault(run: Optimization, fault: Fault) -> None:
    """Refuse a step whose loss or gradients are not finite; a norm that overflows alone is none.

    Args:
        run: an optimisation; parameters are those of the step that failed, draws and rows where they are known.
        fault: what failed, and when.

    Raises:
        FloatingPointError: with the first parameter or site that is not finite, where one is found.
    """
    step = run.moment.step - fault.ago
    if not math.isfinite(fault.loss):
        found = _named_fault(run, run.moment)
        what = f"expected a finite loss, got {fault.loss} at step {step}"
        raise FloatingPointError(f"{what}{f': {found}' if found else ''}; {_REMEDY}")
    check_gradients(run.leaves, step)
    if run.update is not None and run.update.guard.deferred:
        raise FloatingPointError(f"expected finite gradients, got others at step {step}, with a finite loss; {_REMEDY}")


_NO_NUMBERS = ("invalid values", "inf`, `nan`", "within the support", "Expected p_in", "expects all elements of std")


@contextlib.contextmanager
def explained(run: Optimization, moment: Moment) -> Iterator[None]:
    """Tell numbers that are no longer finite, which Pyro's validation finds first, from other errors of the programs."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not any(words in str(error) for words in _NO_NUMBERS):
            raise
        fault = _named_fault(run, moment)
        if fault is None:
            read_structure(run.model, moment.batch.args, moment.batch.kwargs)  # says what to do about data outside the support
            raise
        raise FloatingPointError(f"expected finite numbers, got others at step {moment.step}: {fault}; {_REMEDY}") from error


def check_gradients(leaves: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Refuse gradients that are not finite.

    Raises:
        FloatingPointError: with the first parameter whose gradient is not.
    """
    for group, named in leaves.items():
        for name, leaf in named.items():
            if leaf.grad is not None and (found := not_finite(leaf.grad)) is not None:
                raise FloatingPointError(
                    f"expected finite gradients, got {found} in that of the parameter {name!r} of the {group} at step {step}, "
                    "with a finite loss; nothing has moved, look for a square root or logarithm at 0 in what it feeds, or "
                    "raise the temperature"
                )


_REMEDY = "nothing has moved, lower the learning rate, clip gradients with clip_norm, or raise the temperature"


def _named_fault(run: Optimization, moment: Moment) -> str | None:
    for group, leaves in run.leaves.items():
        for name, leaf in leaves.items():
            if (found := not_finite(leaf.detach())) is not None:
                return f"the parameter {name!r} of the {group} is {found}"
    states = generators(run.device) if moment.states is None else moment.states
    return first_fault(run.elbo, run.programs, moment.batch.args, moment.batch.kwargs, states, run.device)


def generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that a step draws from."""
    states = {"cpu": torch.default_generator.get_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put generators in given states, those of devices that are not in use here apart."""
    torch.default_generator.set_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def first_fault(
    elbo: Any,
    programs: tuple[Program, Program | None],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    states: Mapping[str, Tensor],
    device: torch.device,
) -> str | None:
    """Run an objective's programs once more with the same draws; the first site that is not finite, or None.

    Args:
        elbo: the objective.
        programs: model and guide, as fitted.
        args: of the step.
        kwargs: of the step.
        states: of :func:`generators` before the step.
        device: of the data.

    Returns:
        A phrase such as "the log probability of the model's site 'x' (Bernoulli) is nan".
    """
    watch = _Watch()
    model = watch.around(programs[0], "model")
    guide = None if programs[1] is None else watch.around(programs[1], "guide")
    with isolated_rng(), pyro.validation_enabled(is_validate=False), torch.no_grad():
        set_generators(states, device)
        try:
            _run(elbo, model, guide, args, kwargs)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            if watch.fault is None and watch.asked is not None:
                return f"{watch.asked} cannot be drawn ({str(error).splitlines()[0]})"
    return watch.fault


def _run(elbo: Any, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    traces = getattr(elbo, "_get_traces", None)
    try:
        if traces is None or guide is None:
            raise NotImplementedError
        for _ in traces(model, guide, args, dict(kwargs)):
            pass
    except (NotImplementedError, TypeError, AttributeError):
        # An objective of another kind: one plain run of both.
        with poutine.block():
            trace = None if guide is None else poutine.trace(guide).get_trace(*args, **kwargs)
            (model if trace is None else poutine.replay(model, trace=trace))(*args, **kwargs)


class _Watch(Messenger):
    """Looks at every sample site and remembers the first that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: str | None = None
        self.asked: str | None = None
        self.what = ""

    def around(self, program: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.what = what
            with self:
                return program(*args, **kwargs)

        return run

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.asked = f"the {self.what}'s site {msg['name']!r}"

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        site, self.asked = self.asked, None
        if self.fault is not None or type(msg["fn"]).__name__ == "_Subsample":
            return
        site = f"the {self.what}'s site {msg['name']!r} ({_family(msg['fn'])})"
        value = msg["value"]
        if isinstance(value, Tensor) and (found := not_finite(value)) is not None:
            self.fault = f"the value of {site} is {found}"
            return
        score = msg["fn"].log_prob(value)
        if isinstance(msg["mask"], Tensor):
            score = torch.where(msg["mask"], score, 0.0)
        if msg["mask"] is not False and (found := not_finite(score)) is not None:
            self.fault = f"the log probability of {site} is {found}"


def not_finite(value: Tensor) -> float | None:
    """The first element that is not finite, or None."""
    bad = ~torch.isfinite(value)
    return float(value[bad][0]) if bool(bad.any()) else None


def _family(fn: Any) -> str:
    while hasattr(fn, "base_dist") and not isinstance(fn, torch.distributions.TransformedDistribution):
        fn = fn.base_dist
    return type(fn).__name__
