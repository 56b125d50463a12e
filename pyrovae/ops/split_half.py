"""Σ_i softplus(bias_i + (h W)_i) for all 2^H codes h, with almost no logarithms: the engine of every exact enumeration.

A code is a first and a second half, h = (a, b), and x_i(h) = x_i(a) + x_i(b): two tables of 2^{H/2} rows hold all logits. A
group of g units contributes the logarithm of

    Π_i (1 + e^{x_i(a)} e^{x_i(b)}) = Σ_{S ⊆ group} e^{Σ_{i∈S} x_i(a)} e^{Σ_{i∈S} x_i(b)},

an inner product of 2^g features of a and of b. So a group is one matrix product for all pairs (a, b), groups are multiplied,
and a logarithm is taken once in about a hundred units. The gradient is the same in reverse: two matrix products a group.

Overflow. The pair (1, e^x) of each unit is divided by its larger entry, whose logarithm is summed apart; a factor then lies in
[e^{-w}, 2], where w is the smaller of the ranges of x(a) and x(b). Groups are made of units sorted by w, the wider the
smaller, and products are cut before they could leave the floating-point range; a unit too wide even alone takes softplus.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from pyrovae.ops.states import index_to_codes

# Most of Σw in a group, of Σw or Σ log 2 in a product of groups, by floating-point type: well inside the exponent's range.
_GROUP = {torch.float32: 64.0, torch.float64: 600.0}
_PRODUCT = {torch.float32: 80.0, torch.float64: 640.0}
_NEGLIGIBLE = {torch.float32: 1e-18, torch.float64: 1e-40}  # weights relative to the largest, below rounding for 2^30 codes


class SplitHalf:
    """The sums over units of softplus, and their gradient, for one tile of first x second halves at a time.

    Tables and products are kept in the type of the weights, float32 or float64; logits, sums over units and gradients in
    float64. Time: about 2^{H+3} D multiply-adds for the sums, thrice that for the gradient. Memory: O(max_bytes).

    Args:
        weight: `[H, D]`.
        bias: `[D]`.
        max_bytes: bounds the tables that are kept; more time is spent where they do not fit, by a few per cent.
    """

    def __init__(self, weight: Tensor, bias: Tensor, max_bytes: int = 2**28) -> None:
        self.bits, self.units = weight.shape
        self.split = self.bits // 2  # the first half's bits
        self.shape = (2**self.split, 2 ** (self.bits - self.split))
        self.dtype, self.device = weight.dtype, weight.device
        self._runs = _runs(weight.detach().double(), bias.detach().double(), self.split, self.dtype)
        self._max_bytes = max_bytes
        self._kept: dict[tuple[int, int], Block] = {}

    def tiles(self) -> Iterator[tuple[slice, slice, Block, Block]]:
        """All pairs of codes: the rows (first halves) and columns (second halves) of each tile, and their tables."""
        rows, columns = self._tile_shape()
        keep = 5 * self.shape[1] * self.units * torch.finfo(self.dtype).bits // 8 <= self._max_bytes // 2
        for row in range(0, self.shape[0], rows):
            first = self.block(torch.arange(row, row + rows, device=self.device), 0)
            for column in range(0, self.shape[1], columns):
                second = self._kept.get((column, columns))
                if second is None:
                    second = self.block(torch.arange(column, column + columns, device=self.device), 1)
                    if keep:
                        self._kept[column, columns] = second
                yield slice(row, row + rows), slice(column, column + columns), first, second

    def block(self, numbers: Tensor, half: int) -> Block:
        """The tables of some codes of one half.

        Args:
            numbers: of the codes `[S]`.
            half: 0 the first, 1 the second.
        """
        codes = self.codes(numbers, half)
        scale = codes.new_zeros(len(numbers))
        parts: list[Tensor] = []
        for run in self._runs:
            x = torch.addmm(run.offset[half][:, None], run.weight[half].T, codes)  # [units of the run, S]
            if run.group:
                x = x.to(self.dtype)
                top = x.clamp(min=0)
                scale += top.sum(0, dtype=torch.float64)
                parts.append(_features(x, top, run.group))
            else:
                parts.append(x)
        return Block(codes, scale, parts)

    def codes(self, numbers: Tensor, half: int) -> Tensor:
        """The bits of numbered codes of one half, `[bits, S]` in float64."""
        return index_to_codes(numbers, 2, self.bits - self.split if half else self.split).T.double()

    def sums(self, first: Block, second: Block) -> Tensor:
        """Σ_i softplus(x_i) of every pair of a tile, `[rows, columns]` in float64."""
        total = first.scale[:, None] + second.scale
        for run, a, b in zip(self._runs, first.parts, second.parts, strict=True):
            if run.group:
                for cuts in run.products:
                    total += _product(a, b, cuts).log_()
            else:
                for x, y in zip(a, b, strict=True):
                    total += softplus(x[:, None] + y, threshold=40.0)
        return total

    def _tile_shape(self) -> tuple[int, int]:
        """Rows and columns of a tile, powers of 2: as many pairs as stay in the second-level caches, or fill a GPU."""
        threads, double = torch.get_num_threads(), self.dtype == torch.float64
        rows, columns = (11, 11) if self.device.type == "cuda" else (9 - (threads == 1), 9 + (threads > 4) - double)
        fits = int(math.log2(max(self._max_bytes / (128 * max(self.units, 1)), 1)))  # the tables of a tile themselves
        return min(2 ** min(rows, fits), self.shape[0]), min(2 ** min(columns, fits), self.shape[1])


class Gradient:
    """Σ_h r(h) ∂A(h) for weights r given tile by tile, that is Σ_h r(h) h σ(x(h))ᵀ and Σ_h r(h) σ(x(h))."""

    def __init__(self, engine: SplitHalf) -> None:
        self._engine = engine
        self._sums: list[list[Tensor | float]] = [[0.0, 0.0] for _ in engine._runs]

    def add(self, first: Block, second: Block, r: Tensor) -> None:
        """Add a tile.

        Args:
            first: tables of the rows.
            second: tables of the columns.
            r: weights `[rows, columns]`.
        """
        # Over the largest of the tile, and 0 where it cannot matter: subnormal numbers would slow the products tenfold.
        top = r.abs().max().double().clamp(min=1e-300)
        r = (r / top).to(self._engine.dtype)
        r = r.masked_fill(r.abs() < _NEGLIGIBLE[r.dtype], 0.0)
        codes = [pad(block.codes, (0, 0, 0, 1), value=1.0).T for block in (first, second)]  # a column of ones for the bias
        for run, sums, a, b in zip(self._engine._runs, self._sums, first.parts, second.parts, strict=True):
            pulled = _pull_features(a, b, r) if run.group else _pull_softplus(a, b, r)
            for half, (c, p) in enumerate(zip(codes, pulled, strict=True)):
                sums[half] += (p @ c.to(p)).double() * top  # [groups, 2^g, bits + 1], or [units, bits + 1] of a run of softplus

    def result(self) -> tuple[Tensor, Tensor]:
        """∂weight `[H, D]` and ∂bias `[D]`, in the type of the weights."""
        engine = self._engine
        weight = torch.zeros(engine.bits + 1, engine.units, dtype=torch.float64, device=engine.device)
        for run, sums in zip(engine._runs, self._sums, strict=True):
            count = len(run.units)
            first, second = (_by_unit(torch.as_tensor(s), run.group)[:count].T for s in sums)
            weight[:, run.units] = torch.cat([first[:-1], second[:-1], first[-1:]])
        return weight[:-1].to(engine.dtype), weight[-1].to(engine.dtype)


@dataclass(frozen=True)
class Block:
    """Tables of some codes of one half.

    Attributes:
        codes: `[bits of the half, S]`, float64.
        scale: logarithms divided out of the features, `[S]`.
        parts: one a run: features `[groups, 2^g, S]`, or the logits `[units, S]` of a run of softplus.
    """

    codes: Tensor
    scale: Tensor
    parts: list[Tensor]


@dataclass(frozen=True)
class _Run:
    """Units that are summed alike.

    Attributes:
        units: their numbers `[U]`.
        group: g, or 0 for softplus.
        weight: of the first and the second half `[bits, U + padding]`.
        offset: what the logits of either half begin with `[U + padding]`, together the bias.
        products: one entry a logarithm; in it one `(start, stop)` of groups a product in the tables' type.
    """

    units: Tensor
    group: int
    weight: tuple[Tensor, Tensor]
    offset: tuple[Tensor, Tensor]
    products: list[list[tuple[int, int]]]


def _runs(weight: Tensor, bias: Tensor, split: int, dtype: torch.dtype) -> list[_Run]:
    halves = weight[:split], weight[split:]
    low = [w.clamp(max=0).sum(0) for w in halves]
    high = [w.clamp(min=0).sum(0) for w in halves]
    centre = [(lo + hi) / 2 for lo, hi in zip(low, high, strict=True)]
    # The logits of the half with the smaller range are centred; the other half carries the rest of the bias.
    shift = torch.where(high[0] - low[0] < high[1] - low[1], -centre[0], bias + centre[1])
    offset = shift, bias - shift
    (lo_a, lo_b), (hi_a, hi_b) = ([e + o for e, o in zip(end, offset, strict=True)] for end in (low, high))
    width = torch.maximum(torch.minimum(hi_a, -lo_b), torch.minimum(-lo_a, hi_b)).clamp(min=0)
    width, order = width.sort(descending=True)
    limit = _GROUP[dtype]
    count = [int(n) for n in torch.stack([(width > limit / g).sum() for g in (1, 2, 4)]).tolist()] + [len(order)]
    runs = []
    for start, stop, g in zip([0, *count], count, (0, 1, 2, 4), strict=False):
        if start == stop:
            continue
        units = order[start:stop]
        fill = -len(units) % max(g, 1)
        # A unit of padding has the pairs (1, 0) and (1, 1): a factor of 1.
        runs.append(
            _Run(
                units,
                g,
                (pad(halves[0][:, units], (0, fill)), pad(halves[1][:, units], (0, fill))),
                (pad(offset[0][units], (0, fill), value=-math.inf), pad(offset[1][units], (0, fill))),
                _cuts(pad(width[start:stop], (0, fill)).reshape(-1, g).sum(1).tolist(), g, dtype) if g else [],
            )
        )
    return runs


def _cuts(widths: list[float], group: int, dtype: torch.dtype) -> list[list[tuple[int, int]]]:
    """Where products of groups are cut: a product in the tables' type goes into one in float64, that into a logarithm."""
    cuts: list[list[tuple[int, int]]] = []
    inner, outer = [0.0, 0.0], [math.inf, math.inf]
    for k, width in enumerate(widths):
        for used in (inner, outer):
            used[0] += width
            used[1] += group * math.log(2)
        if max(outer) > _PRODUCT[torch.float64]:
            cuts.append([(k, k + 1)])
            inner, outer = [width, group * math.log(2)], [width, group * math.log(2)]
        elif max(inner) > _PRODUCT[dtype]:
            cuts[-1].append((k, k + 1))
            inner = [width, group * math.log(2)]
        else:
            cuts[-1][-1] = (cuts[-1][-1][0], k + 1)
    return cuts


def _features(x: Tensor, top: Tensor, group: int) -> Tensor:
    """e^{Σ_{i∈S} x_i} / Π_i max(1, e^{x_i}) for the subsets S of every group, `[groups, 2^g, S]`; x, top `[units, S]`."""
    pairs = x.new_empty(2, *x.shape)
    torch.neg(top, out=pairs[0])
    torch.sub(x, top, out=pairs[1])
    pairs = pairs.exp_().reshape(2, -1, group, x.shape[1]).transpose(0, 1)  # [groups, 2, g, S]
    features = pairs[:, :, 0]
    for k in range(1, group):
        features = (features[:, :, None] * pairs[:, None, :, k]).flatten(1, 2)
    return features.contiguous()


def _by_unit(pulled: Tensor, group: int) -> Tensor:
    """From features to units: the sum over the subsets that hold a unit, `[groups, 2^g, bits + 1]` to `[units, bits + 1]`."""
    if not group:
        return pulled
    member = index_to_codes(torch.arange(2**group, device=pulled.device), 2, group).to(pulled)
    return (member.T @ pulled).flatten(0, 1)


_SMALL = 2**14  # up to so many pairs, groups are multiplied in one batch
_BATCH = 2**18  # pairs x groups of a batch


def _product(a: Tensor, b: Tensor, cuts: list[tuple[int, int]]) -> Tensor:
    """The product of the groups of some cuts, `[rows, columns]` in float64."""
    rows, columns = a.shape[2], b.shape[2]
    step = max(_BATCH // (rows * columns), 1)
    buffer = a.new_empty(rows, columns)
    a = a.mT  # [groups, rows, 2^g]
    base, end = cuts[0][0], cuts[-1][1]
    each = list(zip(a[base:end].unbind(), b[base:end].unbind(), strict=True))
    product: Tensor | None = None
    for start, stop in cuts:
        if rows * columns <= _SMALL:
            inner = a.new_ones(rows, columns)
            for k in range(start, stop, step):
                inner *= (a[k : min(k + step, stop)] @ b[k : min(k + step, stop)]).prod(0)
        else:
            inner = torch.mm(*each[start - base])
            for left, right in each[start + 1 - base : stop - base]:
                torch.mm(left, right, out=buffer)
                inner.mul_(buffer)
        product = inner.double() if product is None else product.mul_(inner)
    assert product is not None
    return product


def _pull_features(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Features times the gradient of Σ r log(a · b) in them, of both halves `[groups, 2^g, S]`."""
    step = max(_BATCH // r.numel(), 1) if r.numel() <= _SMALL else 1
    by_row = torch.empty_like(a.mT, memory_format=torch.contiguous_format)  # [groups, rows, 2^g], quicker so
    by_column, b_rows = torch.empty_like(b), b.mT.contiguous()
    buffer = torch.empty_like(r)
    for k in range(0, len(a), step):
        if step > 1:
            part = slice(k, k + step)
            ratio = r / (a[part].mT @ b[part])
            torch.bmm(ratio, b_rows[part], out=by_row[part])
            torch.bmm(a[part], ratio, out=by_column[part])
        else:
            torch.mm(a[k].T, b[k], out=buffer)
            torch.div(r, buffer, out=buffer)
            torch.mm(buffer, b_rows[k], out=by_row[k])
            torch.mm(a[k], buffer, out=by_column[k])
    return by_row.mT * a, by_column.mul_(b)


def _pull_softplus(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over columns and over rows of r σ(x), of the units of a run of softplus, `[units, S]` each."""
    rows, columns = [], []
    for x, y in zip(a, b, strict=True):
        weighted = torch.sigmoid(x[:, None] + y) * r
        rows.append(weighted.sum(1))
        columns.append(weighted.sum(0))
    return torch.stack(rows), torch.stack(columns)
