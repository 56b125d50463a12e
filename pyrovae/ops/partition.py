"""Exact log partition function, moments and draws of a restricted Boltzmann machine, by enumeration of its smaller side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrovae.ops.states import index_to_codes

_CHUNK = 2**14


def check_enumerable(bits: int, units: int, dtype: torch.dtype, instead: str, *, max_bits: int = 30) -> None:
    """Refuse an enumeration of 2^bits codes that would not end in time.

    Args:
        bits: binary units that are enumerated.
        units: units summed out in closed form for every code.
        dtype: of the weights.
        instead: the method to use instead, named in the message.
        max_bits: the most bits allowed.

    Raises:
        ValueError: with the bytes and the seconds it would take.
    """
    if bits > max_bits:
        seconds = 2.0**bits * max(units, 1) * 1e-10 * (1 if dtype == torch.float32 else 2)
        size = 2.0**bits * torch.empty((), dtype=dtype).element_size()
        raise ValueError(
            f"expected at most {max_bits} bits to enumerate, got {bits}: 2^{bits} codes would take about {seconds:.1e} seconds, "
            f"and a table of them {size:.1e} bytes; use {instead} instead"
        )


def softplus_sums(weight: Tensor, bias: Tensor) -> Tensor:
    """A(h) = Σ_i softplus(bias_i + (h weight)_i) for all codes h, in the order of :mod:`pyrovae.ops.states`; exact.

    Args:
        weight: `[H, D]`.
        bias: `[D]`.

    Returns:
        `[2^H]`, differentiable; the backward pass recomputes.
    """
    return _SoftplusSums.apply(weight, bias)


def rbm_log_partition(weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor) -> Tensor:
    """log Σ_{v,h} exp(bᵀv + cᵀh + vᵀWh); exact, over the smaller side.

    Args:
        weight: W `[D, H]`.
        visible_bias: b `[D]`.
        hidden_bias: c `[H]`.

    Returns:
        0-d, differentiable.
    """
    return _LogPartition.apply(weight, visible_bias, hidden_bias)


def rbm_moments(weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact E[v hᵀ] `[D, H]`, E[v] `[D]` and E[h] `[H]`."""
    with torch.no_grad():
        if weight.shape[0] < weight.shape[1]:
            vh, h, v = rbm_moments(weight.T, hidden_bias, visible_bias)
            return vh.T, v, h
        logits = softplus_sums(weight.T, visible_bias) + _codes(weight) @ hidden_bias
        p = logits.softmax(0)
        mean_x, mean_xh = torch.zeros_like(visible_bias), torch.zeros_like(weight)
        for h, pc in zip(_codes(weight).split(_CHUNK), p.split(_CHUNK), strict=True):
            s = torch.sigmoid(visible_bias + h @ weight.T) * pc[:, None]
            mean_x += s.sum(0)
            mean_xh += s.T @ h
        return mean_xh, mean_x, p @ _codes(weight)


def sample_rbm(
    weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor, n: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Exact independent draws v `[n, D]`, h `[n, H]`."""
    with torch.no_grad():
        if weight.shape[0] < weight.shape[1]:
            h, v = sample_rbm(weight.T, hidden_bias, visible_bias, n, generator)
            return v, h
        logits = softplus_sums(weight.T, visible_bias) + _codes(weight) @ hidden_bias
        h = _codes(weight)[_draw(logits, n, generator)]
        logits = visible_bias + h @ weight.T
        return (torch.rand(logits.shape, generator=generator).to(logits) < torch.sigmoid(logits)).to(logits), h


def _draw(logits: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    total = logits.double().softmax(0).cumsum(0)
    u = torch.rand(n, generator=generator, dtype=torch.float64).to(total.device) * total[-1]
    return torch.searchsorted(total, u, right=True).clamp(max=len(total) - 1)


def _codes(weight: Tensor) -> Tensor:
    bits = weight.shape[1]
    return index_to_codes(torch.arange(2**bits, device=weight.device), 2, bits).to(weight.dtype)


class _SoftplusSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight, bias)
        chunks = _codes(weight.T).split(_CHUNK)
        return torch.cat([torch.nn.functional.softplus(h @ weight + bias, threshold=700).sum(1) for h in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = ctx.saved_tensors
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for h, g in zip(_codes(weight.T).split(_CHUNK), grad.split(_CHUNK), strict=True):
            s = torch.sigmoid(h @ weight + bias) * g[:, None]
            grad_bias += s.sum(0)
            grad_weight += h.T @ s
        return grad_weight, grad_bias


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(weight, b, c)
        if weight.shape[0] < weight.shape[1]:
            weight, b, c = weight.T, c, b
        return (softplus_sums(weight.T, b) + _codes(weight) @ c).logsumexp(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad * moment for moment in rbm_moments(*ctx.saved_tensors))
