"""The prior that a model puts on its own parameters: what learning methods maximise beside log p(x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyrovae.inference.fit import root_module


def log_prior_of(program: Callable[..., Any]) -> Callable[[], Tensor] | None:
    """The `log_prior` method of a model, perhaps wrapped by `relax` and the like; None where it declares none.

    `log_prior() -> 0-d Tensor` is the log density of the model's parameters, up to a constant, differentiable in them. It
    stands for the whole data set, whatever the minibatch.

    Args:
        program: a Pyro program.
    """
    module = root_module(program)
    method = getattr(module, "log_prior", None) if isinstance(module, nn.Module) else None
    return method if callable(method) and not isinstance(method, nn.Module) else None
