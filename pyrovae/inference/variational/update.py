"""What moves parameters once their gradients are known: clipping, the optimizer, its schedule, an average."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro.optim
import torch
from torch import Tensor

from pyrovae.inference.capture.optimizer import OneOptimizer, names_in_store
from pyrovae.inference.variational.guard import Guard
from pyrovae.inference.variational.schedules import Average, make_optimizer, make_scheduler

if TYPE_CHECKING:
    from pyrovae.inference.variational.variational import Variational


class Update:
    """The optimizer of a run, and what goes with it.

    Args:
        method: the options.
        named: what is learned, by name.
        learn_model: whether schedule and average, which are those of `fit`, take part.
    """

    def __init__(self, method: Variational, named: Mapping[str, Tensor], *, learn_model: bool) -> None:
        self.named, self.leaves, self.clip_norm = named, list(named.values()), method.clip_norm
        self.is_pyro = isinstance(method.optim, pyro.optim.PyroOptim)
        self.optimizer: Any = copy.deepcopy(method.optim) if self.is_pyro else make_optimizer(method.optim, self.leaves)
        self.guard = Guard(self.optimizer, self.leaves[0].device)
        scheduler, average = (method.scheduler, method.average) if learn_model else (None, None)
        self.scheduler: Any = make_scheduler(scheduler, self.optimizer)
        self.average = None if average is None else Average(self.leaves, average)
        self._one: OneOptimizer | None = None

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Put gradients where the optimizer looks for them."""
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient

    def move(self, norm: Tensor) -> None:
        """Clip gradients by their norm, and step; tensor code alone, but for Pyro's optimizers."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.leaves, self.clip_norm, norm)
        if self._one is not None:
            self._one.step([leaf.grad for leaf in self.leaves])
        elif not self.is_pyro:
            self.optimizer.step()
        elif self.optimizer.optim_objs:
            self.optimizer(self.leaves)
        else:
            with names_in_store(self.named):
                self.optimizer(self.leaves)

    def moved(self) -> None:
        """After a step: the learning rate of the next one, the average."""
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update()

    def recordable(self) -> OneOptimizer | None:
        """The optimizer where a CUDA graph may hold its step: one that a flag on the device stops. It steps from then on."""
        if self._one is None and self.guard.deferred:
            self._one = OneOptimizer(lambda _: self.optimizer, self.named)
        return self._one
