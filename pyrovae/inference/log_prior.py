"""The prior that a model puts on its own parameters: what learning methods maximise beside log p(x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.handlers.declared import takes
from pyrovae.inference.fit import root_module
from pyrovae.ops import isolated_rng


def log_prior_of(program: Callable[..., Any]) -> Callable[[], Tensor] | None:
    """The `log_prior` method of a model, perhaps wrapped by `relax` and the like; None where it declares none.

    `log_prior() -> 0-d Tensor` is the log density of the model's parameters, up to a constant, differentiable in them. It
    stands for the whole data set, whatever the minibatch. A method of that name that takes arguments, or returns anything
    else, is the model's own business.

    Args:
        program: a Pyro program.
    """
    module = root_module(program)
    method = getattr(module, "log_prior", None) if isinstance(module, nn.Module) else None
    if not callable(method) or isinstance(method, nn.Module) or not takes(method):
        return None
    with torch.no_grad(), isolated_rng():
        value = method()
    return method if isinstance(value, Tensor) and value.dim() == 0 else None
