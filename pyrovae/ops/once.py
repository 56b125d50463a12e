"""Gradients that are computed by hand and have no derivative of their own, said aloud instead of taken for zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def only_once(gradients: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
    """Gradients as they are, but a derivative of them (`create_graph=True`) raises.

    `torch.autograd.function.once_differentiable` alone would treat them as constants where the incoming gradient is one.

    Args:
        gradients: what a backward pass returns.
        sources: the tensors that they depend on.
    """
    return tuple(_Once.apply(g, *sources) for g in gradients) if torch.is_grad_enabled() else gradients


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *sources: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "expected a first derivative of an enumeration, got a second one, which it does not have; differentiate the "
            "moments numerically, or enumerate in plain torch operations"
        )
