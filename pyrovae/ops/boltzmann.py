"""Exact log partition function, moments and independent draws of a Boltzmann machine, by enumeration in two halves.

p(x) ∝ exp(½ xᵀJx + bᵀx) over x = (u, w) ∈ {0, 1}^n. With J in four blocks, the exponents of all pairs of halves are
E(u) + E(w) + U J_uw Wᵀ: one matrix product, tile by tile, and one exponential a code. Where many biases b share one J, as the
hidden units of a machine do that is clamped to a batch of data, M = exp(U J_uw Wᵀ) is shared too, and
Z(b) = e^{E_b(u)}ᵀ M e^{E_b(w)} is one matrix product for the batch; a bias whose sum leaves the floating-point range is summed
in log space after all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyrovae.ops.inverse_cdf import draw_pairs
from pyrovae.ops.once import only_once
from pyrovae.ops.opaque import apply_whole, run_whole
from pyrovae.ops.partition import MAX_BITS, check_enumerable
from pyrovae.ops.states import index_to_codes
from pyrovae.ops.tracing import capturing


def boltzmann_log_partition(couplings: Tensor, biases: Tensor, *, max_bits: int = MAX_BITS) -> Tensor:
    """The log partition function of a Boltzmann machine, log Σ_x exp(½ xᵀJx + bᵀx).

    Exact, computed in float64. Differentiable once: the gradient in b is E[x], in J ½ E[x xᵀ] with zeros on its diagonal,
    which is no parameter. Cost: one bias 2^n (n multiply-adds and an exponential), n = 25 in about 0.1 s on two CPU cores; a
    batch 2^n multiply-adds for each bias, as one matrix product. Memory: tiles, and 2^{n/2} numbers for each bias.

    Args:
        couplings: J `[n, n]`, symmetric with a zero diagonal, float32 or float64.
        biases: b `[*batch, n]`.
        max_bits: the largest n that is enumerated.

    Returns:
        `[*batch]`, in the type of the couplings.

    Raises:
        ValueError: if shapes disagree, a value is not finite, J is not symmetric or has a diagonal, or n > `max_bits`.

    References:
        A learning algorithm for Boltzmann machines (Ackley, Hinton, Sejnowski, 1985)
        https://doi.org/10.1207/s15516709cog0901_7

    Example:
        >>> boltzmann_log_partition(torch.zeros(3, 3), torch.zeros(3))  # log 2^3
        tensor(2.0794)
    """
    _check(couplings, biases, max_bits, "an estimate with an interval, pyrovae.inference.AIS,")
    return apply_whole(_LogPartition, couplings, biases)


def boltzmann_moments(couplings: Tensor, biases: Tensor, *, max_bits: int = MAX_BITS) -> tuple[Tensor, Tensor]:
    """The first two moments of a Boltzmann machine's units. Exact, not differentiable.

    Args:
        couplings: J `[n, n]`, symmetric with a zero diagonal, float32 or float64.
        biases: b `[*batch, n]`.
        max_bits: the largest n that is enumerated.

    Returns:
        E[x xᵀ] `[*batch, n, n]`, with E[x] on its diagonals, and E[x] `[*batch, n]`.

    Raises:
        ValueError: as :func:`boltzmann_log_partition`.

    Example:
        >>> boltzmann_moments(torch.zeros(2, 2), torch.zeros(2))
        (tensor([[0.5000, 0.2500],
                [0.2500, 0.5000]]), tensor([0.5000, 0.5000]))
    """
    _check(couplings, biases, max_bits, "chains of Gibbs sweeps")
    with torch.no_grad():
        chunks = [_Halves(couplings, b).moments() for b in _chunks(biases)]
        second = torch.cat(chunks).reshape(*biases.shape, biases.shape[-1]).to(couplings.dtype)
        return second, second.diagonal(dim1=-2, dim2=-1).clone()


def sample_boltzmann(
    couplings: Tensor, biases: Tensor, n: int, generator: torch.Generator | None = None, *, max_bits: int = MAX_BITS
) -> Tensor:
    """Independent draws from a Boltzmann machine, exact: no chain, no burn-in.

    Cost: for each bias a pass over all codes, and a second one over the first halves that were drawn.

    Args:
        couplings: J `[units, units]`, symmetric with a zero diagonal, float32 or float64.
        biases: b `[*batch, units]`.
        n: number of draws.
        generator: of random numbers, on the device of the couplings; None for the global one.
        max_bits: the largest number of units that is enumerated.

    Returns:
        `[n, *batch, units]`, zeros and ones in the type of the couplings.

    Raises:
        ValueError: as :func:`boltzmann_log_partition`.
    """
    _check(couplings, biases, max_bits, "chains of Gibbs sweeps or pyrovae.inference.ParallelTempering")
    with torch.no_grad():
        (draws,) = run_whole(lambda J, b: (_sample(J, b, n, generator),), couplings, biases)
    return draws


def _sample(couplings: Tensor, biases: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    flat = biases.reshape(biases.shape[:-1].numel(), biases.shape[-1])
    draws = [_Halves(couplings, b[None]).sample(0, n, generator) for b in flat]
    out = torch.stack(draws, 1) if draws else couplings.new_empty(0)
    return out.reshape(n, *biases.shape).to(couplings.dtype)


_SIDE = 2**9  # rows and columns of a tile
_BATCH_BYTES = 2**26  # of the tables of a batch of biases, by which it is cut
_TINY = 1e-200  # a bilinear sum below this may have lost terms


class _Halves:
    """A machine for N biases, as the codes of both halves and what each half contributes by itself."""

    def __init__(self, couplings: Tensor, biases: Tensor) -> None:
        couplings, biases = couplings.detach().double(), biases.detach().double()
        split = biases.shape[1] // 2
        blocks = couplings[:split, :split], couplings[split:, split:]
        parts = biases[:, :split], biases[:, split:]
        self.codes = [_codes(part.shape[1], couplings) for part in parts]  # [S, bits]
        self.own = [((c @ j) * c).sum(1) / 2 + b @ c.T for c, j, b in zip(self.codes, blocks, parts, strict=True)]  # [N, S]
        self.across = self.codes[0] @ couplings[:split, split:]  # [rows, bits of the second half]
        self.row_top = self.across.clamp(min=0).sum(1)  # the largest of U J_uw Wᵀ in each row
        first, second = self.own[0] + self.row_top, self.own[1]
        tops = first.amax(1, keepdim=True), second.amax(1, keepdim=True)
        self.top = (tops[0] + tops[1])[:, 0]
        self.first, self.second = (first - tops[0]).exp_(), (second - tops[1]).exp_()  # [N, S], at most 1

    def log_partition(self) -> Tensor:
        """Log Z of every bias, `[N]`."""
        if len(self.top) == 1:
            return self._log_partition(0)[None]
        total = torch.zeros_like(self.top)
        for rows, columns in self._tiles():
            total += ((self.second[:, columns] @ self._shared(rows, columns).T) * self.first[:, rows]).sum(1)
        out = self.top + total.log()
        for k in (total < _TINY).nonzero()[:, 0].tolist():
            out[k] = self._log_partition(k)
        return out

    def gradient(self, log_partition: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """r_k E_k[x] `[N, n]` and Σ_k r_k E_k[x xᵀ] `[n, n]`, for weights r `[N]` of the biases."""
        scale, lost = self._scale(log_partition)
        weighted = self.first * (r * scale)[:, None]
        first, second = torch.zeros_like(self.first), torch.zeros_like(self.second)
        across = self.across.new_zeros(self.codes[0].shape[1], self.codes[1].shape[1])
        for rows, columns in self._tiles() if bool(scale.any()) else ():
            shared = self._shared(rows, columns)
            first[:, rows] += self.second[:, columns] @ shared.T
            second[:, columns] += weighted[:, rows] @ shared
            shared *= weighted[:, rows].T @ self.second[:, columns]
            across += self.codes[0][rows].T @ (shared @ self.codes[1][columns])
        first, second = first * weighted, second * self.second  # r_k p_k of each half's codes
        means = torch.cat([first @ self.codes[0], second @ self.codes[1]], 1)
        total = self._assemble(first.sum(0), second.sum(0), across)
        for k in lost:
            own = r[k] * self._moments(k, log_partition[k])
            means[k] = own.diagonal()
            total = total + own
        return means, total

    def moments(self) -> Tensor:
        """E_k[x xᵀ] of every bias, `[N, n, n]`."""
        log_partition = self.log_partition()
        scale, lost = self._scale(log_partition)
        first, second = torch.zeros_like(self.first), torch.zeros_like(self.second)
        across = self.across.new_zeros(len(scale), self.codes[0].shape[1], self.codes[1].shape[1])
        for rows, columns in self._tiles() if bool(scale.any()) else ():
            shared = self._shared(rows, columns)
            first[:, rows] += self.second[:, columns] @ shared.T
            second[:, columns] += self.first[:, rows] @ shared
            inner = shared @ (self.second[:, columns, None] * self.codes[1][columns])  # [N, rows, bits]
            across += (self.first[:, rows, None] * self.codes[0][rows]).mT @ inner
        first, second = first * self.first * scale[:, None], second * self.second * scale[:, None]
        out = self._assemble(first, second, across * scale[:, None, None])
        for k in lost:
            out[k] = self._moments(k, log_partition[k])
        return out

    def sample(self, k: int, n: int, generator: torch.Generator | None) -> Tensor:
        """Draws for the k-th bias, `[n, units]`."""
        everything = slice(0, len(self.codes[1]))
        marginal = torch.full_like(self.own[0][k], -torch.inf)
        for rows, columns in self._tiles():
            marginal[rows] = torch.logaddexp(marginal[rows], self._exponents(k, rows, columns).logsumexp(1))
        step = max(_BATCH_BYTES // (32 * everything.stop), 1)
        numbers = draw_pairs(marginal, lambda rows: self._exponents(k, rows, everything), step, n, generator)
        return torch.cat([codes[index] for codes, index in zip(self.codes, numbers, strict=True)], 1)

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        for row in range(0, len(self.codes[0]), _SIDE):
            for column in range(0, len(self.codes[1]), _SIDE):
                yield slice(row, row + _SIDE), slice(column, column + _SIDE)

    def _shared(self, rows: slice, columns: slice) -> Tensor:
        """exp(U J_uw Wᵀ) over its largest entry in each row, `[rows, columns]`."""
        return torch.addmm(-self.row_top[rows, None], self.across[rows], self.codes[1][columns].T).exp_()

    def _exponents(self, k: int, rows: slice | Tensor, columns: slice) -> Tensor:
        """½ xᵀJx + bᵀx of a tile for the k-th bias, `[rows, columns]`."""
        out = torch.addmm(self.own[1][k, columns], self.across[rows], self.codes[1][columns].T)
        return out.add_(self.own[0][k, rows][:, None])

    def _scale(self, log_partition: Tensor) -> tuple[Tensor, list[int]]:
        """One over the bilinear sums `[N]`, and the biases (there 0) that are to be summed in log space."""
        scale = (self.top - log_partition).exp()
        lost = scale > 1 / _TINY if len(scale) > 1 else torch.ones_like(scale, dtype=torch.bool)
        return scale.masked_fill(lost, 0.0), lost.nonzero()[:, 0].tolist()

    def _log_partition(self, k: int) -> Tensor:
        largest, total = self.top.new_full((), -torch.inf), self.top.new_zeros(())
        for rows, columns in self._tiles():
            exponents = self._exponents(k, rows, columns)
            higher = torch.maximum(largest, exponents.max())
            total = total * (largest - higher).exp() + exponents.sub_(higher).exp_().sum()
            largest = higher
        return largest + total.log()

    def _moments(self, k: int, log_partition: Tensor) -> Tensor:
        first, second = torch.zeros_like(self.first[k]), torch.zeros_like(self.second[k])
        across = self.across.new_zeros(self.codes[0].shape[1], self.codes[1].shape[1])
        for rows, columns in self._tiles():
            p = self._exponents(k, rows, columns).sub_(log_partition).exp_()
            first[rows] += p.sum(1)
            second[columns] += p.sum(0)
            across += self.codes[0][rows].T @ (p @ self.codes[1][columns])
        return self._assemble(first, second, across)

    def _assemble(self, first: Tensor, second: Tensor, across: Tensor) -> Tensor:
        """E[x xᵀ] `[…, n, n]` from the probabilities of each half's codes `[…, S]` and E[u wᵀ]."""
        within = [(c.T * p[..., None, :]) @ c for c, p in zip(self.codes, (first, second), strict=True)]
        return torch.cat([torch.cat([within[0], across], -1), torch.cat([across.mT, within[1]], -1)], -2)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, couplings: Tensor, biases: Tensor) -> Tensor:
        log_partition = torch.cat([_Halves(couplings, b).log_partition() for b in _chunks(biases)])
        ctx.save_for_backward(couplings, biases, log_partition)
        return log_partition.reshape(biases.shape[:-1]).to(couplings.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        couplings, biases, log_partition = ctx.saved_tensors
        r = grad.detach().reshape(-1).double()
        means, second, start = [], torch.zeros_like(couplings, dtype=torch.float64), 0
        with torch.no_grad():
            for b in _chunks(biases):
                part = slice(start, start + len(b))
                mean, moments = _Halves(couplings, b).gradient(log_partition[part], r[part])
                means.append(mean)
                second += moments
                start += len(b)
            second = second.fill_diagonal_(0.0).to(couplings.dtype) / 2
            mean = torch.cat(means).reshape(biases.shape).to(biases.dtype)
        gradient = only_once((second, mean), couplings, biases, grad)
        return gradient[0], gradient[1]


def _chunks(biases: Tensor) -> tuple[Tensor, ...]:
    """Biases `[*batch, n]` as parts `[N, n]` whose tables are of bounded size."""
    n = biases.shape[-1]
    step = max(_BATCH_BYTES // (8 * max(n, 1) * min(2 ** ((n + 1) // 2), _SIDE) + 16 * 2 ** ((n + 1) // 2)), 2)
    return biases.reshape(biases.shape[:-1].numel(), n).split(step)


def _codes(bits: int, like: Tensor) -> Tensor:
    return index_to_codes(torch.arange(2**bits, device=like.device), 2, bits).to(like)


def allowed_asymmetry(couplings: Tensor) -> float:
    """How far J and Jᵀ may be apart, by rounding: eps^¾ of the largest coupling, 6e-6 of it in float32, 2e-12 in float64."""
    return torch.finfo(couplings.dtype).eps ** 0.75 * float(couplings.detach().abs().max()) if couplings.numel() else 0.0


def _check(couplings: Tensor, biases: Tensor, max_bits: int, instead: str) -> None:
    n = couplings.shape[-1]
    if couplings.shape != (n, n) or couplings.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected a square matrix of couplings in float32 or float64, got shape {tuple(couplings.shape)} in "
            f"{couplings.dtype}; convert it"
        )
    if biases.ndim == 0 or biases.shape[-1] != n:
        raise ValueError(f"expected biases of shape (…, {n}) for {n} units, got {tuple(biases.shape)}; give one to each unit")
    couplings, biases = couplings.detach(), biases.detach()
    if not capturing():
        _check_values(couplings, biases)
    check_enumerable(n, 1, couplings.dtype, instead, max_bits=max_bits)


def _check_values(couplings: Tensor, biases: Tensor) -> None:
    for name, tensor in {"couplings": couplings, "biases": biases}.items():
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(f"expected finite {name}, got {count} values that are not; check what made them")
    asymmetry = float((couplings - couplings.T).abs().max()) if len(couplings) else 0.0
    if asymmetry > allowed_asymmetry(couplings):
        raise ValueError(f"expected symmetric couplings, got J and Jᵀ {asymmetry:.1e} apart; use (J + Jᵀ) / 2")
    if couplings.diagonal().any():
        raise ValueError("expected a zero diagonal of couplings, got another; x_i² = x_i: add half of it to the biases")
