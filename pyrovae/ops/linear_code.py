"""Distributions over all codes of a binary vector that are linear in the data, never listed row by code.

    p(h | n) ∝ exp(drive_n · h + table[h]),   h ∈ {0, 1}^H

is the posterior of a belief net's hidden layer: with v the layer below, drive = v Wᵀ and table[h] = log p(h) − A(h), where
A(h) = Σ_i softplus(bias_i + (h W)_i) does not depend on the data. Split h into halves (h_A, h_B). The sum over codes is then
bilinear, e_Aᵀ M e_B with M = exp(table) and e = exp(drive · half), so that N rows take a matrix product of 2^H multiplications
a row instead of 2^H exponentials, and 2^(H/2) numbers a row instead of 2^H.

All is computed in float64. The exponents are taken relative to a *tilt*, the mean drive of a group of rows; rows whose sum
would underflow under it get a tilt of their own, so that no drive is too large. Each such group costs 2^H exponentials more in
every pass over the rows. Up to moderate weights there is one; with very large weights there may be as many as rows that differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrovae.ops.opaque import apply_whole
from pyrovae.ops.states import index_to_codes

_SMALLEST = 1e-250  # sums below lose digits to underflow: 2^H terms of 1e-308 count 1e-50 of it
_MAX_ROWS = 512


def linear_code_logsumexp(drive: Tensor, table: Tensor, *, max_bytes: int = 2**28) -> Tensor:
    """Log Σ_h exp(drive_n · h + table[h]) over all codes h, exact.

    Costs 2^(H+1) floating point operations a row, and 2^H exponentials for each group of rows that share a tilt (see above);
    the gradient takes both twice more, recomputing chunks.

    Args:
        drive: `[N, H]`, finite.
        table: `[2^H]` in the order of :func:`pyrovae.ops.index_to_codes`, finite.
        max_bytes: memory for chunks of rows, beside four tables.

    Returns:
        `[N]`, differentiable in both.

    Example:
        >>> drive, table = torch.zeros(3, 2), torch.zeros(4)
        >>> linear_code_logsumexp(drive, table).exp().round().tolist()
        [4.0, 4.0, 4.0]
    """
    return apply_whole(_LogSumExp, drive, table, max_bytes)


class LinearCodes:
    """The distributions p(h | n) ∝ exp(drive_n · h + table[h]) of N rows, held implicitly; exact.

    Construction costs a matrix product of N x 2^H multiplications and `num_groups` x 2^H exponentials: a pass. Each further
    answer costs another pass, or what it says.

    Args:
        drive: `[N, H]`, finite; rows of a float64 copy.
        table: `[2^H]`, finite, likewise.
        max_bytes: memory for chunks of rows, beside three tables.

    Attributes:
        drive: `[N, H]` in float64.
        table: `[2^H]` in float64.
        log_sum: log Σ_h exp(drive_n · h + table[h]), `[N]`.

    Raises:
        ValueError: for shapes that do not agree, or numbers that are not finite.

    Example:
        >>> codes = LinearCodes(torch.tensor([[0.0, 1.0]]), torch.zeros(4))
        >>> [round(float(p), 4) for p in codes.mean[0]]
        [0.5, 0.7311]
    """

    def __init__(self, drive: Tensor, table: Tensor, *, max_bytes: int = 2**28) -> None:
        if drive.dim() != 2 or table.shape != (2 ** drive.shape[1],):
            raise ValueError(
                f"expected drive [N, H] and table [2^H], got {tuple(drive.shape)} and {tuple(table.shape)}; give a value a code"
            )
        self.drive, self.table, self.max_bytes = drive.detach().double(), table.detach().double(), max_bytes
        if not (bool(torch.isfinite(self.drive).all()) and bool(torch.isfinite(self.table).all())):
            raise ValueError("expected finite drive and table, got NaN or infinity; look for such weights, biases or data")
        bits = drive.shape[1]
        self.split = bits // 2
        self.bits_a = _bits(self.split, self.table)  # [2^a, a]
        self.bits_b = _bits(bits - self.split, self.table)  # [2^b, b]
        self.log_sum = self.table.new_empty(len(drive))
        self._mean_b = self.table.new_empty(len(drive), bits - self.split)
        self._mean: Tensor | None = None
        self._groups: list[tuple[Tensor, Tensor]] = []  # a tilt [H] and the rows whose sums it keeps from underflow
        self._solve()

    @property
    def num_groups(self) -> int:
        """Groups of rows that share a tilt: a pass takes 2^H exponentials for each."""
        return len(self._groups)

    @property
    def mean(self) -> Tensor:
        """E[h | n] = p(h_j = 1 | n), `[N, H]`."""
        if self._mean is None:
            mean_a = self.table.new_empty(len(self.drive), self.split)
            for matrix, rows, e_a, e_b, total in self._walk():
                mean_a[rows] = ((e_b @ matrix.T) * e_a) @ self.bits_a / total[:, None]
            self._mean = torch.cat([mean_a, self._mean_b], 1)
        return self._mean

    def aggregate(self, weights: Tensor | None = None) -> Tensor:
        """r(h) = Σ_n weights_n p(h | n), `[2^H]`; weights `[N]` default to 1."""
        return self._sums(weights, means=False)

    def statistics(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:attr:`mean` `[N, H]` and :meth:`aggregate` `[2^H]` in one pass over the rows."""
        total = self._sums(weights, means=self._mean is None)
        return self.mean, total

    def average(self, values: Tensor) -> Tensor:
        """Σ_h p(h | n) values[h], `[N, F]` from `[2^H, F]`, differentiable in `values`; F matrix products."""
        found: Tensor = _Average.apply(values, self)
        return found

    def entropy(self) -> Tensor:
        """The entropy of p(h | n) in nats, `[N]`."""
        return self.log_sum - (self.drive * self.mean).sum(1) - self.average(self.table[:, None])[:, 0]

    def log_prob(self, index: Tensor) -> Tensor:
        """Log p(h | n) `[S, N]` of codes by their numbers `[S]`."""
        bits = index_to_codes(index, 2, self.drive.shape[1]).to(self.drive)
        return self.table[index][:, None] + bits @ self.drive.T - self.log_sum

    def sample(self, n: int, rows: Tensor | None = None) -> Tensor:
        """`n` independent draws for each row, code numbers `[n, N]`: h_A from its marginal, then h_B given h_A.

        Args:
            n: draws a row.
            rows: rows `[K]` for which to draw, in any order; default all.
        """
        size = len(self.drive) if rows is None else len(rows)
        chosen = torch.empty((n, size), dtype=torch.long, device=self.table.device)
        for matrix, wanted, e_a, e_b in self._walk_rows(rows):
            a = _draw((e_b @ matrix.T).mul_(e_a), n).T  # [n, R]
            for some in torch.arange(n).split(max(1, self.max_bytes // (24 * e_b.numel()))):
                b = _draw(matrix[a[some]].mul_(e_b), 1)[..., 0]  # of [draws, R, 2^b]
                chosen[some[:, None], wanted] = a[some] * len(self.bits_b) + b
        return chosen

    # ---- passes over the rows ---------------------------------------------------------------------------------------

    def _solve(self) -> None:
        """The log sums and the means of h_B, and groups of rows that share a tilt."""
        left = torch.arange(len(self.drive), device=self.drive.device)
        tilt = self.drive.mean(0) if len(left) else None
        while len(left):
            assert tilt is not None
            matrix, offset = self._matrix(tilt)
            done, missed = [], []
            for rows in left.split(self._chunk()):
                e_a, e_b, shift = self._exponentials(rows, tilt)
                joint_b = (e_a @ matrix).mul_(e_b)  # [R, 2^b]
                total = joint_b.sum(1)
                kept = total > _SMALLEST
                self.log_sum[rows] = total.log() + (shift + offset)
                self._mean_b[rows] = joint_b @ self.bits_b / total[:, None]
                done.append(rows[kept])
                missed.append(rows[~kept])
            self._groups.append((tilt, torch.cat(done)))
            left = torch.cat(missed)
            tilt = self.drive[left[0]] if len(left) else None  # its own sum is then at least 1

    def _sums(self, weights: Tensor | None, *, means: bool) -> Tensor:
        total = self.table.new_zeros(len(self.bits_a), len(self.bits_b))
        mean_a = self.table.new_empty(len(self.drive), self.split)
        weights = None if weights is None else weights.detach().to(self.drive)
        product, last = torch.zeros_like(total), None
        for matrix, rows, e_a, e_b, z in self._walk():
            if means:
                mean_a[rows] = (e_b @ matrix.T).mul_(e_a) @ self.bits_a / z[:, None]
            if last is not None and last is not matrix:
                total.addcmul_(last, product)
                product.zero_()
            share = 1 / z if weights is None else weights[rows] / z
            product.addmm_(e_a.mul_(share[:, None]).T, e_b)
            last = matrix
        if last is not None:
            total.addcmul_(last, product)
        if means:
            self._mean = torch.cat([mean_a, self._mean_b], 1)
        return total.reshape(-1)

    def _walk(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Chunks of rows: M under their tilt, row numbers, e_A, e_B, and the sums Z of e_Aᵀ M e_B."""
        for tilt, members in self._groups:
            matrix, offset = self._matrix(tilt)
            for rows in members.split(self._chunk()):
                e_a, e_b, shift = self._exponentials(rows, tilt)
                yield matrix, rows, e_a, e_b, (self.log_sum[rows] - shift - offset).exp()

    def _walk_rows(self, rows: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The same for rows in any order and number: M, where they stand in `rows`, e_A and e_B."""
        size = max(1, min(self._chunk(), self.max_bytes // (24 * len(self.bits_b))))
        group = torch.empty(len(self.drive), dtype=torch.long, device=self.drive.device)
        for k, (_, members) in enumerate(self._groups):
            group[members] = k
        asked = torch.arange(len(self.drive), device=self.drive.device) if rows is None else rows
        for k, (tilt, _) in enumerate(self._groups):
            matrix = self._matrix(tilt)[0]
            for wanted in (group[asked] == k).nonzero()[:, 0].split(size):
                if not len(wanted):
                    continue
                e_a, e_b, _ = self._exponentials(asked[wanted], tilt)
                yield matrix, wanted, e_a, e_b

    def _matrix(self, tilt: Tensor) -> tuple[Tensor, float]:
        """M = exp(table + tilt · h − offset) `[2^a, 2^b]`, its largest entry 1."""
        tilted = self.table.reshape(len(self.bits_a), -1) + (self.bits_a @ tilt[: self.split])[:, None]
        tilted += self.bits_b @ tilt[self.split :]
        offset = float(tilted.max())
        return tilted.sub_(offset).exp_(), offset

    def _exponentials(self, rows: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e_A `[R, 2^a]` and e_B `[R, 2^b]`, the largest of each row 1, and what was taken off `[R]`."""
        excess = self.drive[rows] - tilt
        shift = excess.clamp(min=0)
        factors = torch.stack([-shift, excess - shift], 2).exp_()  # [R, H, 2]: each bit off, each bit on
        return _products(factors[:, : self.split]), _products(factors[:, self.split :]), shift.sum(1)

    def _chunk(self) -> int:
        """Rows at a time: e_A, e_B and two products of their size fit."""
        return max(1, min(_MAX_ROWS, self.max_bytes // (32 * (len(self.bits_a) + len(self.bits_b)))))


def linear_code_max(drive: Tensor, table: Tensor, *, max_bytes: int = 2**28) -> tuple[Tensor, Tensor]:
    """The largest of drive_n · h + table[h] over codes h and the number of the code, `[N]` each; the first of several.

    Costs 2^H additions and comparisons a row.

    Args:
        drive: `[N, H]`.
        table: `[2^H]`.
        max_bytes: memory for chunks.
    """
    drive, table = drive.detach().double(), table.detach().double()
    split = drive.shape[1] // 2
    bits_a, bits_b = _bits(split, table), _bits(drive.shape[1] - split, table)
    rows = max(1, max_bytes // (16 * len(table)))
    values, numbers = [], []
    for part in drive.split(rows):
        scores = (part[:, :split] @ bits_a.T)[:, :, None] + (part[:, split:] @ bits_b.T)[:, None, :]
        best = (scores.reshape(len(part), -1).add_(table)).max(1)
        values.append(best.values)
        numbers.append(best.indices)
    return torch.cat(values), torch.cat(numbers)


class _LogSumExp(torch.autograd.Function):
    """The gradient is E[h | n] for the drive and the aggregated posterior for the table."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor, table: Tensor, max_bytes: int) -> Tensor:
        ctx.codes = codes = LinearCodes(drive, table, max_bytes=max_bytes)
        ctx.dtypes = drive.dtype, table.dtype
        return codes.log_sum.to(torch.promote_types(*ctx.dtypes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, total = ctx.codes.statistics(grad)
        return (mean * grad[:, None]).to(ctx.dtypes[0]), total.to(ctx.dtypes[1]), None


class _Average(torch.autograd.Function):
    """Linear in the values: the gradient is the posterior aggregated with the incoming weights."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: LinearCodes) -> Tensor:
        ctx.codes, ctx.dtype = codes, values.dtype
        # Taken off and put back, so that a large constant costs no digits.
        centre = values.detach().double().mean(0)
        centred = (values.detach().double() - centre).T.reshape(-1, len(codes.bits_a), len(codes.bits_b))  # [F, 2^a, 2^b]
        found = codes.drive.new_empty(len(codes.drive), len(centred))
        for f, column in enumerate(centred):
            last: Tensor | None = None
            for matrix, rows, e_a, e_b, total in codes._walk():
                if last is not matrix:
                    last, product = matrix, matrix * column
                found[rows, f] = (e_a @ product).mul_(e_b).sum(1) / total
        return (found + centre).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = [ctx.codes.aggregate(column) for column in grad.T]
        return torch.stack(columns, 1).to(ctx.dtype), None


def _bits(components: int, like: Tensor) -> Tensor:
    return index_to_codes(torch.arange(2**components, device=like.device), 2, components).to(like)


def _products(factors: Tensor) -> Tensor:
    """Π_j factors[:, j, h_j] of all codes h: `[R, 2^n]` from `[R, n, 2]`."""
    bits = factors.shape[1]
    if bits < 2:
        return factors[:, 0] if bits else factors.new_ones(len(factors), 1)
    slow, fast = _products(factors[:, : bits // 2]), _products(factors[:, bits // 2 :])
    return (slow[:, :, None] * fast[:, None, :]).flatten(1)


def _draw(weights: Tensor, n: int) -> Tensor:
    """`n` indices `[*, n]` from unnormalised weights `[*, S]`, by the inverse of the cumulative distribution."""
    edges = weights.cumsum(-1)
    uniform = torch.rand((*weights.shape[:-1], n), dtype=weights.dtype, device=weights.device) * edges[..., -1:]
    found = torch.searchsorted(edges, uniform, right=True)
    # Rounding may leave a uniform on the last edge: it keeps the last state of positive weight.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1, keepdim=True)
    return torch.minimum(found, last)
