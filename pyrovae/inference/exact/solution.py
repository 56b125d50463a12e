"""Sums over the tables of an enumeration: probabilities of cliques, joint probabilities, draws, modes.

The one engine behind every question to a posterior whose joint states can be listed. Levels are answered from the outermost
inwards, each given what was chosen or summed outside; the chunked axis is walked piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.handlers.structure import frozen_leaves
from pyrovae.inference.exact.elimination import Reduce, Term, amax, eliminate, elimination_numel, gather, logsumexp
from pyrovae.inference.exact.enumeration import Axis, Enumeration


@dataclass(frozen=True)
class Clique:
    """Axes and plates whose joint posterior weights are wanted, and the level in which they are summed.

    Weights are summed over the plates in `summed`, without ever having a value a row.
    """

    axes: frozenset[int]
    plate_dims: frozenset[int]
    level: int
    summed: frozenset[int] = frozenset()


class Solution:
    """The tables of an enumeration, held where they fit in memory and computed anew where not, and the sums over them."""

    def __init__(self, space: Enumeration, held: dict[str, Term] | None = None) -> None:
        self.space = space
        self.level = space.chunk_axis.level
        self.held = space.terms() if held is None and len(space.chunks) == 1 else held
        if self.held is None:
            self.leaves = {name: leaf.detach().clone() for name, leaf in space.structure.leaves.items()}
        self.message = self._combine(logsumexp)
        self.log_evidence = space.finish(self.message, self.terms(space.chunks[0]).values()).clone()

    def terms(self, chunk: slice) -> dict[str, Term]:
        """The terms of a chunk, with the parameters that the program had when it was inferred."""
        space = self.space
        if self.held is None:
            with torch.no_grad(), frozen_leaves(space.structure.leaves, self.leaves):
                return space.terms(chunk)
        if chunk.stop - chunk.start == space.chunk_axis.size:
            return self.held
        dim, found = space.chunk_axis.dim, {}
        for name, term in self.held.items():
            table = term.table
            if table.shape[dim] > 1:
                table = table.narrow(dim, chunk.start, chunk.stop - chunk.start)
            found[name] = Term(table, term.plate_dims, term.level)
        return found

    def weights(self, wanted: Mapping[Any, Clique]) -> Iterator[tuple[slice, dict[Any, Tensor]]]:
        """Posterior probabilities of cliques, as gradients of log p(x) in tables of zeros added to the terms.

        Yields:
            Each chunk with `[axes, plates]` of every clique; cliques above the chunked level come once, with the first.
        """
        space = self.space
        outer = {name: clique for name, clique in wanted.items() if clique.level < self.level}
        inner = {name: clique for name, clique in wanted.items() if clique.level >= self.level}
        lead = self.message.table.shape[: space.ndim - space.structure.plate_depth]
        shape = lead + self._plate_shape(self.level, native=False)
        with torch.enable_grad():
            message = Term(self.message.table.expand(shape).clone().requires_grad_(), self.message.plate_dims, self.level)
            probes = [self._zeros(clique, None) for clique in outer.values()]
            total = space.finish(message, [*self.terms(space.chunks[0]).values(), *probes])
            upstream, *above = torch.autograd.grad(total.sum(), [message.table, *(probe.table for probe in probes)])
        first = dict(zip(outer, above, strict=True))
        for chunk in self._fitting(inner.values()):
            with torch.enable_grad():
                probes = [self._zeros(clique, chunk) for clique in inner.values()]
                part = space.message([*self.terms(chunk).values(), *probes], self.level).table.expand(shape)
                flow = upstream * torch.exp(part.detach() - self.message.table)
                found = torch.autograd.grad(part, [probe.table for probe in probes], flow)
            yield chunk, first | dict(zip(inner, found, strict=True))
            first = {}

    def _fitting(self, cliques: Collection[Clique]) -> list[slice]:
        """Slices of the chunked axis so small that the weights of some cliques, and the sums that make them, fit."""
        space, size = self.space, self.space.chunk_size

        def bytes_at(size: int) -> int:
            axes = {axis.dim: size if axis is space.chunk_axis else axis.size for axis in space.axes}
            sizes = axes | space.plate_sizes
            made: list[list[int]] = []
            below: list[list[int]] = []
            for level in range(len(space.levels) - 1, self.level - 1, -1):
                wanted = [c.axes | (c.plate_dims - c.summed) for c in cliques if c.level == level]
                weights = [[sizes[d] if d in dims else 1 for d in range(-space.ndim, 0)] for dims in wanted]
                terms = [space.scaled(shape.table, axes) for shape in space.shapes.values() if shape.level == level]
                below = elimination_numel(terms + weights + below, [axis.dim for axis in space.level_axes(level)])
                made += weights + below
                below = below[-1:]
            return 3 * self.message.table.element_size() * sum(map(math.prod, made))

        while size > 1 and bytes_at(size) > space.max_bytes:
            size = (size + 1) // 2
        return [slice(i, min(i + size, space.chunk_axis.size)) for i in range(0, space.chunk_axis.size, size)]

    def joint(self, asked: Collection[Axis]) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
        """The joint posterior of some axes, all others summed out, its S states piece by piece.

        Args:
            asked: the axes.

        Yields:
            State numbers of each axis asked for `[S]`, and log probabilities `[S, *plates of the deepest one's level]`.

        Raises:
            ValueError: if the table does not fit in memory, with the bytes it would take.
        """
        space, level = self.space, max(axis.level for axis in asked)
        axes = sorted(asked, key=lambda axis: axis.dim)
        others = [axis.dim for axis in space.axes if axis.level <= level and axis not in asked]
        plates, depth = self._plate_shape(level), space.structure.plate_depth
        for chunk in self._pieces(axes, math.prod(plates)) if space.chunk_axis in asked else [None]:
            if chunk is None:
                within = space.chunks if space.chunk_axis.level <= level else space.chunks[:1]
                total = torch.logsumexp(torch.stack([self._marginal(level, others, c) for c in within]), 0)
            else:
                total = self._marginal(level, others, chunk)
            sizes = [chunk.stop - chunk.start if chunk and axis is space.chunk_axis else axis.size for axis in axes]
            lead = [1] * (space.ndim - depth)
            for axis, size in zip(axes, sizes, strict=True):
                lead[axis.dim + depth] = size
            wide = total.expand((*lead, *self._plate_shape(level, native=False)))
            index = torch.unravel_index(torch.arange(math.prod(sizes), device=total.device), tuple(sizes))
            start = {space.chunk_axis.dim: chunk.start} if chunk else {}
            numbers = {axis.dim: i + start.get(axis.dim, 0) for axis, i in zip(axes, index, strict=True)}
            yield numbers, wide.reshape((-1, *plates))

    def descend(self, n: int, reduce: Reduce) -> dict[int, Tensor]:
        """Choose the states of one axis after another, each given those chosen: draws with `logsumexp`, modes with `amax`.

        Returns:
            State numbers `[n, *plates]` of each axis.
        """
        space, greedy, index = self.space, reduce is amax, dict[int, Tensor]()
        root = space.chunk_axis
        for level in range(len(space.levels)):
            plates = self._plate_shape(level, native=False)
            pieces = space.chunks if root.level <= level else space.chunks[:1]
            if root.level == level:
                choice = _Choice(n, plates, self.message.table, greedy=greedy)
                for piece in pieces:
                    steps, total = self._steps(level, piece, reduce)
                    choice.offer(self._given(steps[-1][1] - (0.0 if greedy else total), root.dim, index, piece), piece.start)
                index[root.dim] = choice.chosen
            before = dict(index)
            for piece in pieces:
                given = dict(before)
                for dim, table in reversed(self._steps(level, piece, reduce)[0]):
                    if dim != root.dim:
                        given[dim] = self._choose(table, dim, given, piece, plates, n, greedy=greedy)
                if len(pieces) == 1:
                    index = given
                    continue
                inside = (before[root.dim] >= piece.start) & (before[root.dim] < piece.stop)
                for dim in given.keys() - before.keys():
                    index[dim] = torch.where(inside, given[dim], index.get(dim, given[dim]))
        return index

    def log_joint(self, index: Mapping[int, Tensor]) -> Tensor:
        """Log p(x, z) `[n, batch]` at state numbers `[n, *plates]` of each axis."""
        space = self.space
        depth = space.structure.plate_depth
        n = next(iter(index.values())).shape[0]
        totals: Tensor | None = None
        keep = frozenset(plate.dim for plate in space.structure.batch)
        for chunk in space.chunks:
            for name, term in self.terms(chunk).items():
                chunked = self.held is None and space.chunk_axis.dim in space.shapes[name].axes
                if not chunked and chunk.start > 0:
                    continue
                value = gather(term.table.unsqueeze(0), self._local(index, chunk), depth)[0]  # [n, plates]
                if chunked:
                    number = index[space.chunk_axis.dim]
                    value = torch.where((number >= chunk.start) & (number < chunk.stop), value, 0.0)
                for dim in term.plate_dims - keep:
                    value = value.sum(dim, keepdim=True) if value.shape[dim] > 1 else value * space.plate_sizes[dim]
                totals = value if totals is None else totals + value
        assert totals is not None
        return space.structure.to_batch(totals.expand((n, *totals.shape[1:])))

    def _combine(self, reduce: Reduce) -> Term:
        """The message of the chunked level, over all chunks."""
        space = self.space
        parts = [space.message(self.terms(c).values(), self.level, reduce).table for c in space.chunks]
        table = parts[0] if len(parts) == 1 else reduce(torch.stack(parts), 0).squeeze(0)
        return Term(table, space.levels[self.level], self.level)

    def _ladder(self, chunk: slice, reduce: Reduce) -> tuple[list[list[Tensor]], list[Tensor]]:
        """For each level its tables and its sum, the chunked level's sum being over all chunks."""
        space, terms = self.space, list(self.terms(chunk).values())
        message = self.message if reduce is logsumexp else self._combine(reduce)
        below: Term | None = None
        tables: list[list[Tensor]] = []
        sums: list[Tensor] = []
        for level in reversed(range(len(space.levels))):
            tables.insert(0, space.level_tables(terms, level, below))
            below = (
                message
                if level == self.level
                else space.message(terms, level, reduce)
                if level > self.level
                else (space.sweep(terms, range(level, level - 1, -1), below, reduce))
            )
            sums.insert(0, below.table)
        return tables, sums

    def _marginal(self, level: int, others: Collection[int], chunk: slice) -> Tensor:
        """Log posterior of the axes down to a level at a chunk, some axes summed out: `[axes, plates]`."""
        tables, sums = self._ladder(chunk, logsumexp)
        parts = [table for here in tables[: level + 1] for table in here] + [-total for total in sums[: level + 1]]
        needed = 3 * parts[0].element_size() * max(map(math.prod, elimination_numel([p.shape for p in parts], others)))
        if needed > 2 * self.space.max_bytes:
            raise ValueError(
                f"expected a function of few latents, whose joint table fits in max_bytes={self.space.max_bytes:,}, got one "
                f"that takes {needed:,} bytes; average it over posterior.sample(n) instead"
            )
        return eliminate(parts, others)

    def _steps(self, level: int, chunk: slice, reduce: Reduce) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """The eliminations of a level at a chunk, the chunked axis last, and the level's sum over all chunks."""
        tables, sums = self._ladder(chunk, reduce)
        steps: list[tuple[int, Tensor]] = []
        dims = [axis.dim for axis in self.space.level_axes(level)]
        eliminate(tables[level], dims, reduce, last=self.space.chunk_axis.dim, steps=steps)
        return steps, sums[level]

    def _choose(
        self,
        table: Tensor,
        dim: int,
        index: Mapping[int, Tensor],
        piece: slice,
        plates: tuple[int, ...],
        n: int,
        *,
        greedy: bool,
    ) -> Tensor:
        """Choose the states `[n, *plates]` of an axis given those of others, some draws at a time."""
        block = max(1, self.space.max_bytes // (8 * table.element_size() * table.shape[dim] * math.prod(plates)))
        chosen = []
        for start in range(0, n, block):
            some = {d: number[start : start + block] for d, number in index.items()}
            log_p = self._given(table, dim, some, piece)
            choice = _Choice(min(block, n - start), plates, table, greedy=greedy)
            choice.offer(log_p if greedy else torch.log_softmax(log_p, 0), 0)
            chosen.append(choice.chosen)
        return torch.cat(chosen)

    def _given(self, table: Tensor, dim: int, index: Mapping[int, Tensor], piece: slice) -> Tensor:
        """A table of an axis at chosen states of others: `[S, n, *plates]`, n = 1 where nothing is chosen yet."""
        depth = self.space.structure.plate_depth
        chosen = sorted(index)
        order = [dim, *chosen, *(d for d in range(-table.dim(), -depth) if d != dim and d not in index), *range(-depth, 0)]
        sizes = [table.shape[d] for d in (dim, *chosen)] + list(table.shape[table.dim() - depth :])
        flat = table.permute(order).reshape(sizes)
        return gather(flat, self._local(index, piece), depth) if index else flat.unsqueeze(1)

    def _pieces(self, axes: list[Axis], rows: int) -> list[slice]:
        """Slices of the chunked axis so that the joint table of some axes fits."""
        space = self.space
        others = math.prod(axis.size for axis in axes if axis is not space.chunk_axis)
        states = space.max_bytes // (6 * self.message.table.element_size() * others * max(rows, 1))
        size = max(1, min(states, space.chunk_size))
        return [slice(i, min(i + size, space.chunk_axis.size)) for i in range(0, space.chunk_axis.size, size)]

    def _plate_shape(self, level: int, *, native: bool = True) -> tuple[int, ...]:
        """Sizes of a level's plates; as its sites have them, or over all plate dims."""
        space = self.space
        depth = space.structure.plate_depth
        wide = tuple(space.plate_sizes[dim] if dim in space.levels[level] else 1 for dim in range(-depth, 0))
        return wide if not native else tuple(space.level_axes(level)[0].sites[0].batch_shape)

    def _zeros(self, clique: Clique, chunk: slice | None) -> Term:
        space, like = self.space, self.message.table
        shape = [1] * space.ndim
        for axis in space.axes:
            if axis.dim in clique.axes:
                part = chunk if chunk is not None and axis is space.chunk_axis else slice(0, axis.size)
                shape[axis.dim] = part.stop - part.start
        for dim in clique.plate_dims - clique.summed:
            shape[dim] = space.plate_sizes[dim]
        return Term(like.new_zeros(shape).requires_grad_(), clique.plate_dims, clique.level)

    def _local(self, index: Mapping[int, Tensor], chunk: slice) -> dict[int, Tensor]:
        """State numbers counted within a chunk, those outside brought to its edge."""
        dim = self.space.chunk_axis.dim
        return {
            d: (number - chunk.start).clamp(0, chunk.stop - chunk.start - 1) if d == dim else number
            for d, number in index.items()
        }


class _Choice:
    """A choice of one state per draw and row from tables that come piece by piece."""

    def __init__(self, n: int, plates: tuple[int, ...], like: Tensor, *, greedy: bool) -> None:
        self.shape, self.greedy = (n, *plates), greedy
        self.below = like.new_zeros(self.shape)
        self.best = like.new_full(self.shape, -math.inf)
        self.uniform = self.below if greedy else torch.rand(self.shape, dtype=like.dtype, device=like.device)
        self.chosen = torch.zeros(self.shape, dtype=torch.long, device=like.device)

    def offer(self, log_p: Tensor, offset: int) -> None:
        """Consider the states from number `offset` on, with log probabilities `[S, n or 1, plates]`."""
        if self.greedy:
            value, number = log_p.max(0)
            taken = value.expand(self.shape) > self.best
            self.best = torch.where(taken, value, self.best)
        else:
            # The inverse of the cumulative distribution; rows that share a table are searched together.
            edges = log_p.exp().cumsum(0).expand((-1, -1, *self.shape[1:]))
            value = self.uniform - self.below
            shared = edges.shape[1] == 1
            table = edges.reshape(edges.shape[0], -1).T.contiguous()
            rows = value.reshape(self.shape[0], -1).T.contiguous() if shared else value.reshape(-1, 1)
            number = torch.searchsorted(table, rows, right=True)
            number = (number.T if shared else number).reshape(self.shape)
            # Rounding may leave the largest uniforms above the total: they keep the last possible state.
            number = torch.where(value >= edges[-1], _last_possible(edges), number)
            taken = (value >= 0) & (edges[-1] > 0)
            self.below = self.below + edges[-1]
        self.chosen = torch.where(taken, number + offset, self.chosen)


def _last_possible(cumulative: Tensor) -> Tensor:
    """The last state with a positive step, from cumulative probabilities over dim 0."""
    steps = torch.diff(cumulative, dim=0, prepend=torch.zeros_like(cumulative[:1])) > 0
    return cumulative.shape[0] - 1 - steps.flip(0).int().argmax(0)
