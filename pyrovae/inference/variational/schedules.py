"""What moves while training: relaxation, KL weight, learning rate, averaged weights, the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import pyro
import pyro.optim
import torch
from torch import Tensor

from pyrovae.inference.capture.optimizer import check_steps

Optimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer] | Any  # or a pyro.optim.PyroOptim
Schedule: TypeAlias = float | Callable[[int], float]


class Dial:
    """A number that handlers read at every run: a 0-d tensor, changed in place by its schedule.

    Args:
        name: for errors.
        schedule: a float, or a function from the step to one.
        device: of the tensor, the data's, so that no step waits for a copy.
        zero: whether 0 is allowed.
    """

    def __init__(self, name: str, schedule: Schedule, device: torch.device | None = None, *, zero: bool = False) -> None:
        self.name, self.schedule, self.zero = name, schedule, zero
        self.value = self._at(0)
        self.tensor = torch.tensor(self.value, device=device)

    def turn(self, step: int) -> None:
        """Set the number for a step."""
        if callable(self.schedule):
            self.value = self._at(step)
            self.tensor.fill_(self.value)

    def _at(self, step: int) -> float:
        value = float(self.schedule(step) if callable(self.schedule) else self.schedule)
        if not math.isfinite(value) or value < 0 or (value == 0 and not self.zero):
            low = ">= 0" if self.zero else "> 0"
            raise ValueError(f"expected {self.name} {low}, got {value} at step {step}; mend the schedule")
        return value


class Average:
    """An exponential moving average of parameters.

    The weight of the past is min(decay, (1 + t) / (10 + t)) at step t, so that the start is soon forgotten.

    Args:
        leaves: the parameters, which start the average.
        decay: of the average, in (0, 1); 1 / (1 - decay) steps are remembered.
    """

    def __init__(self, leaves: list[Tensor], decay: float) -> None:
        self.leaves, self.decay, self.count = leaves, decay, 0
        self.values = [leaf.detach().clone() for leaf in leaves]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters in."""
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [leaf.detach() for leaf in self.leaves], weight)

    def swap(self) -> None:
        """Exchange parameters and averages; again to undo."""
        for k, leaf in enumerate(self.leaves):
            leaf.data, self.values[k] = self.values[k], leaf.data


def make_optimizer(optim: Optimizer, leaves: list[Tensor]) -> Any:
    """An optimizer as the user asked for it; torch's Adam and AdamW in their fused form where nothing was said of it.

    The fused form computes the same step in one pass over the parameters.

    Raises:
        ValueError: for one that needs a closure (LBFGS).
    """
    kind, said = (optim.func, set(optim.keywords)) if isinstance(optim, partial) else (optim, set())
    check_steps(kind)
    if kind in (torch.optim.Adam, torch.optim.AdamW) and not said & {"fused", "foreach", "capturable", "differentiable"}:
        try:
            made: Callable[..., Any] = optim
            return made(leaves, fused=True)
        except RuntimeError:  # parameters of a device or type without it
            pass
    other = optim(leaves)
    check_steps(type(other))
    return other


def make_scheduler(scheduler: Callable[[Any], Any] | None, optimizer: Any) -> Any:
    """The learning-rate schedule of an optimizer, stepped every gradient step.

    Raises:
        ValueError: for a Pyro optimizer, or a scheduler that waits for a metric.
    """
    if scheduler is None:
        return None
    if isinstance(optimizer, pyro.optim.PyroOptim):
        raise ValueError(
            "expected a torch optimizer with a scheduler, got a Pyro optimizer; pass optim=partial(torch.optim.Adam, lr=1e-3)"
        )
    made = scheduler(optimizer)
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau) or not hasattr(made, "step"):
        raise ValueError(
            f"expected a scheduler that steps every gradient step, got {type(made).__name__}; pass a function such as "
            "lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=1000)"
        )
    return made
