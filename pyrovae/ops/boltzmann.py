"""Exact log partition function, moments and draws of a fully visible Boltzmann machine, by enumeration in two halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrovae.ops.partition import draw_columns
from pyrovae.ops.states import index_to_codes


def boltzmann_log_partition(couplings: Tensor, biases: Tensor) -> Tensor:
    """Log Σ_x exp(½ xᵀJx + bᵀx); exact.

    Args:
        couplings: J `[n, n]`, symmetric with a zero diagonal.
        biases: b `[*batch, n]`.

    Returns:
        `[*batch]`, differentiable.
    """
    return _LogPartition.apply(couplings, biases)


def boltzmann_moments(couplings: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """The exact E[x xᵀ] `[*batch, n, n]` and E[x] `[*batch, n]`."""
    with torch.no_grad():
        x, logits = _logits(couplings, biases)
        p = logits.softmax(-1)
        return torch.einsum("...s,si,sj->...ij", p, x, x), p @ x


def sample_boltzmann(couplings: Tensor, biases: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Exact independent draws `[n, *batch, n]`."""
    with torch.no_grad():
        x, logits = _logits(couplings, biases)
        rows = [x[draw_columns(row[None], row.new_zeros(n).long(), generator)] for row in logits.reshape(-1, len(x))]
        return torch.stack(rows, 1).reshape(n, *biases.shape)


def _logits(couplings: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    n = couplings.shape[0]
    x = index_to_codes(torch.arange(2**n, device=couplings.device), 2, n).to(couplings)
    return x, ((x @ couplings) * x).sum(1) / 2 + biases @ x.T


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, couplings: Tensor, biases: Tensor) -> Tensor:
        ctx.save_for_backward(couplings, biases)
        return _logits(couplings, biases)[1].logsumexp(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        couplings, biases = ctx.saved_tensors
        second, first = boltzmann_moments(couplings, biases)
        weighted = grad[..., None, None] * second / 2
        return weighted.reshape(-1, *couplings.shape).sum(0), grad[..., None] * first
