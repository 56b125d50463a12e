"""Sums over joint states by variable elimination, in log space.

Terms are tables right-aligned over the same dims: axes (one dim of states each) on the left, plates on the right. An axis
is summed out by adding the terms in which it varies and taking logsumexp over its dim, the cheapest axis first, so that
two layers of 8 bits cost 2^16 + 2^8 N and not 2^16 N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Term:
    """A log table, the plates it lies in, and the level of latents in which it is summed.

    Size 1 in one of its plates means that it repeats there. Level −1 is above all latents.
    """

    table: Tensor
    plate_dims: frozenset[int]
    level: int


def logsumexp(table: Tensor, dim: int) -> Tensor:
    """Log Σ exp over one dim, kept with size 1."""
    return torch.logsumexp(table, dim, keepdim=True)


def amax(table: Tensor, dim: int) -> Tensor:
    """The maximum over one dim, kept with size 1: the elimination that finds a mode."""
    return torch.amax(table, dim, keepdim=True)


def add(tables: Iterable[Tensor]) -> Tensor:
    """Sum of broadcastable tables, the small ones first."""
    total, *rest = sorted(tables, key=Tensor.numel)
    for table in rest:
        total = total + table
    return total


def eliminate(
    tables: Sequence[Tensor],
    axes: Iterable[int],
    reduce: Reduce = logsumexp,
    *,
    last: int | None = None,
    steps: list[tuple[int, Tensor]] | None = None,
) -> Tensor:
    """Sum tables and reduce the axes, the cheapest first.

    Args:
        tables: broadcastable log tables.
        axes: the (negative) dims to reduce.
        reduce: `logsumexp` for sums, `amax` for modes.
        last: an axis to reduce after all others, from the sum of all that is left (also where only one state of it is here).
        steps: filled with each axis and the table from which it was reduced, in order. Such a table depends only on its
            axis and on axes that are reduced later, so that states can be chosen backwards, each given the later ones.

    Returns:
        The reduced table, of size 1 in every axis.
    """
    remaining, live = set(axes), list(tables)
    while remaining:
        axis = min(remaining - {last} or remaining, key=lambda d: (_numel(_involving(live, d)), d))
        involved = list(live) if axis == last else _involving(live, axis)
        live = [t for t in live if all(t is not i for i in involved)]
        joint = add(involved)
        if steps is not None:
            steps.append((axis, joint))
        live.append(reduce(joint, axis))
        remaining.discard(axis)
    return add(live)


def elimination_numel(shapes: Sequence[Sequence[int]], axes: Iterable[int]) -> list[list[int]]:
    """The shapes of the tables that :func:`eliminate` makes on its way, without making them."""
    remaining, live, made = set(axes), [list(s) for s in shapes], []
    while remaining:
        joint = {d: _broadcast([s for s in live if s[d] > 1] or live[:1]) for d in remaining}
        axis = min(remaining, key=lambda d: (_prod(joint[d]), d))
        made.append(joint[axis])
        reduced = list(joint[axis])
        reduced[axis] = 1
        live = [s for s in live if s[axis] == 1] + [reduced]
        remaining.discard(axis)
    made.append(_broadcast(live))
    return made


def sum_plates(term: Term, keep: frozenset[int], sizes: dict[int, int]) -> Term:
    """Sum a term over its plates outside `keep`; one that repeats along a plate counts once a row."""
    table = term.table
    for dim in term.plate_dims - keep:
        table = table.sum(dim, keepdim=True) if table.shape[dim] > 1 else table * sizes[dim]
    return Term(table, term.plate_dims & keep, term.level)


def gather(table: Tensor, index: Mapping[int, Tensor], depth: int) -> Tensor:
    """`table [S, axes, plates]` at state numbers `[n, *plates]` of its axes: `[S, n, plates]`."""
    plates = table.shape[table.dim() - depth :]
    axes = list(zip(table.shape[1:], sorted(index), strict=False))
    shape = torch.broadcast_shapes(*(index[dim].shape for size, dim in axes if size > 1), (1, *plates))
    zero = torch.zeros((), dtype=torch.long, device=table.device)
    where: list[Any] = [(index[dim] if size > 1 else zero).expand(shape) for size, dim in axes]
    for d in range(depth):
        rows = torch.arange(shape[1 + d], device=table.device) * int(plates[d] > 1)
        where.append(rows.reshape((-1,) + (1,) * (depth - 1 - d)).expand(shape))
    return table[(slice(None), *where)]


def _involving(tables: list[Tensor], axis: int) -> list[Tensor]:
    return [t for t in tables if t.shape[axis] > 1] or tables[:1]


def _numel(tables: list[Tensor]) -> int:
    return _prod(_broadcast([t.shape for t in tables]))


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    return [max(sizes) for sizes in zip(*shapes, strict=True)]


def _prod(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
