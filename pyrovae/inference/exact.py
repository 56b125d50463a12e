"""Exact inference by enumeration, for any program whose latents are finite and discrete."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyrovae.handlers.structure import Latent, frozen_leaves
from pyrovae.inference.elimination import Reduce, Term, add, amax, elimination_numel, gather, logsumexp
from pyrovae.inference.enumeration import Axis, Enumeration
from pyrovae.inference.posterior import Program, States, code_marginals
from pyrovae.inference.tabulated import TabulatedPosterior, weighted_sum


class Exact:
    """The posterior p(z | x) by summing over every joint state of the latents.

    Exact: bound "exact", nothing sampled. Takes any Pyro program whose latents have finitely many values: vectors of bits
    (also inside `.to_event`, where Pyro's own enumeration silently samples), categories, one-hot vectors, several sites
    and layers, plates of any name, and global latents outside a full plate together with local ones inside it.

    Cost: joint states x rows values of log p(x, z), layer by layer where sites form layers, in chunks of at most
    `max_bytes`. Only the evidence is computed at once; marginals, samples and the rest when they are asked for.

    Args:
        max_bytes: the memory that an evaluation may take.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)
        >>> posterior = Exact().infer(model, torch.tensor([0.0, 1.0, 2.0]))
        >>> [round(float(p), 4) for p in posterior.marginals["z"]]
        [0.1192, 0.5, 0.8808]
    """

    def __init__(self, *, max_bytes: int = 2**30) -> None:
        if max_bytes <= 0:
            raise ValueError(f"expected max_bytes > 0, got {max_bytes}")
        self.max_bytes = max_bytes

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> ExactPosterior:
        """The exact posterior of a program at its arguments.

        Args:
            model: a Pyro program.
            *args: its arguments, the data first, as in `svi.step`.
            **kwargs: its keyword arguments.

        Returns:
            An :class:`ExactPosterior`.

        Raises:
            ValueError: for a continuous latent; a sequential plate; latents in sibling plates; a site outside the plate of
                a latent that it depends on; a subsampled plate with a latent outside it; unequal `poutine.scale`s; a
                program that branches on values, mixes rows or draws hidden noise; tensor code that does not broadcast on
                the left; and work that would not fit, with the bytes it would take.
        """
        start = time.perf_counter()
        with torch.no_grad():
            space = Enumeration(model, _copy(args), _copy(kwargs), max_bytes=self.max_bytes)
            solution = Solution(space)
        return ExactPosterior(
            structure=space.structure,
            log_evidence=solution.log_evidence,
            bound="exact",
            diagnostics={
                "model_evaluations": space.num_evaluations,
                "joint_states": math.prod(axis.size for axis in space.axes),
            },
            seconds=time.perf_counter() - start,
            enumeration=space,
            solution=solution,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ExactPosterior(TabulatedPosterior):
    """p(z | x) itself: every answer below is exact, and draws are independent."""

    solution: Solution = field(repr=False)

    @cached_property
    def marginals(self) -> States:
        """P(1) `[batch, …]` for {0, 1} sites, `[batch, …, K]` for categories."""
        space = self.enumeration
        wanted = {axis.dim: Clique(frozenset({axis.dim}), space.levels[axis.level], axis.level) for axis in space.axes}
        found: States = {}
        for chunk, weights in self.solution.weights(wanted):
            for axis in space.axes:
                if axis.dim not in weights:
                    continue
                part = chunk if axis is space.chunk_axis else slice(0, axis.size)
                index = torch.arange(part.start, part.stop, device=weights[axis.dim].device)
                for latent in axis.sites:
                    w = weights[axis.dim].reshape((index.numel(), *latent.batch_shape))
                    p = code_marginals(latent, w, axis.site_codes(index)[latent.name])
                    found[latent.name] = found[latent.name] + p if latent.name in found else p
        return {latent.name: found[latent.name] for latent in space.structure.latents}

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of p(z | x) in nats, `[batch]`: log p(x) − E[log p(x, z)]."""
        assert self.log_evidence is not None
        space, parts = self.enumeration, []
        for chunk, weights in self.site_weights():
            terms = self.solution.terms(chunk)
            parts += [
                Term(weighted_sum(w, terms[name].table, space), terms[name].plate_dims, -1) for name, w in weights.items()
            ]
        return self.log_evidence - space.to_batch(parts)

    def site_weights(self) -> Iterator[tuple[slice, States]]:
        """Posterior weights of every site's clique; see :class:`TabulatedPosterior`."""
        shapes = self.enumeration.shapes
        yield from self.solution.weights({name: Clique(s.axes, s.plate_dims, s.level) for name, s in shapes.items()})

    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """E[f(z)] summed over all joint states, `[batch, …]`, and 0; see :meth:`Posterior.expectation`.

        Raises:
            ValueError: if the result of `f` lacks the rows of a plate whose latents it uses: a function of several rows at
                once has too many joint states; draw samples instead.
        """
        total: Tensor | None = None
        level = self._level_of(f)
        for index, log_weights in self.solution.joint(level):
            value = f(self._values(index, level))
            weights = log_weights.exp()
            if value.shape[: weights.dim()] != weights.shape:
                raise ValueError(
                    f"expected f to return [S, batch, …] = {tuple(weights.shape)} and any dims after, got "
                    f"{tuple(value.shape)}; f must treat rows apart, average over posterior.sample(n) otherwise"
                )
            weights = weights.reshape(weights.shape + (1,) * (value.dim() - weights.dim()))
            part = (weights.to(value.dtype) * value).sum(0)
            total = part if total is None else total + part
        assert total is not None
        return total, torch.zeros_like(total)

    def sample(self, n: int) -> States:
        """`n` independent draws from p(z | x), `{site: [n, batch, …]}`, by the inverse of the cumulative distribution."""
        if n <= 0:
            raise ValueError(f"expected n > 0 draws, got {n}")
        return self._at(self.solution.descend(n, logsumexp))

    @cached_property
    def mode(self) -> States:
        """The most probable joint state (MAP), `{site: [batch, …]}`; the first of several."""
        return {name: value[0] for name, value in self._at(self.solution.descend(1, amax)).items()}

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log p(z | x) `[n, batch]` of states `{site: [n, batch, …]}`; −inf outside the support."""
        assert self.log_evidence is not None
        log_prob = self.solution.log_joint(self._index_of(z)) - self.log_evidence
        return torch.where(self._possible(z), log_prob, -math.inf)

    def _level_of(self, f: Callable[[States], Tensor]) -> int:
        """The deepest level whose sites `f` looks at."""
        index, _ = next(self.solution.joint(len(self.enumeration.levels) - 1, states=1))
        asked = _Asked(self._values(index, len(self.enumeration.levels) - 1))
        with torch.no_grad():
            f(asked)
        return max((axis.level for axis in self.enumeration.axes for site in axis.sites if site.name in asked.names), default=0)

    def _values(self, index: Mapping[int, Tensor], level: int) -> States:
        """Values `[S, *batch_shape, *event]` at joint states, the same for every row."""
        states = {}
        for axis in self.enumeration.axes:
            if axis.level > level:
                continue
            for latent in axis.sites:
                value = latent.decode(axis.site_codes(index[axis.dim])[latent.name])
                lead = (value.shape[0],) + (1,) * len(latent.batch_shape)
                value = value.reshape(lead + latent.event_shape)
                states[latent.name] = value.expand(value.shape[:1] + latent.batch_shape + latent.event_shape)
        return {latent.name: states[latent.name] for latent in self.structure.latents if latent.name in states}

    def _at(self, index: Mapping[int, Tensor]) -> States:
        """Values `[n, *batch_shape, *event]` at state numbers `[n, *plates]` that differ between rows."""
        states = {}
        for axis in self.enumeration.axes:
            codes = axis.site_codes(index[axis.dim])
            for latent in axis.sites:
                value = latent.decode(codes[latent.name])
                states[latent.name] = value.reshape((value.shape[0], *latent.batch_shape, *latent.event_shape))
        return {latent.name: states[latent.name] for latent in self.structure.latents}

    def _possible(self, z: Mapping[str, Tensor]) -> Tensor:
        """Whether states are values of their sites, `[n, batch]`."""
        structure = self.structure
        possible = torch.ones((), dtype=torch.bool)
        for latent in structure.latents:
            value = z[latent.name]
            same = (latent.decode(self._codes(latent, value)) == value).reshape(
                (*value.shape[: 1 + len(latent.batch_shape)], -1)
            )
            wide = (1,) * (structure.plate_depth - len(latent.batch_shape))
            same = same.all(-1).reshape(value.shape[:1] + wide + latent.batch_shape)
            for dim in latent.plate_dims - {plate.dim for plate in structure.batch}:
                same = same.all(dim, keepdim=True)
            possible = possible & same
        return structure.to_batch(possible)

    def _codes(self, latent: Latent, values: Tensor) -> Tensor:
        """Codes of values, those outside the support brought to its edge."""
        return latent.encode(values.nan_to_num() if values.is_floating_point() else values).clamp(0, latent.cardinality - 1)

    def _index_of(self, z: Mapping[str, Tensor]) -> dict[int, Tensor]:
        space = self.enumeration
        index = {}
        for axis in space.axes:
            codes = {}
            for latent in axis.sites:
                if latent.name not in z:
                    raise ValueError(f"expected values of every latent site, got none of {latent.name!r}")
                expected = latent.batch_shape + latent.event_shape
                if z[latent.name].shape[1:] != expected:
                    raise ValueError(
                        f"expected {latent.name!r} of shape [n, {', '.join(map(str, expected))}], got "
                        f"{tuple(z[latent.name].shape)}"
                    )
                codes[latent.name] = self._codes(latent, z[latent.name])
            number = axis.index(codes)
            wide = (1,) * (space.structure.plate_depth - len(axis.sites[0].batch_shape))
            index[axis.dim] = number.reshape(number.shape[:1] + wide + number.shape[1:])
        return index


def _copy(arguments: Any) -> Any:
    """Arguments with their tensors cloned: a posterior that looks at the data again must not see later changes."""
    if isinstance(arguments, Tensor):
        return arguments.clone()
    if type(arguments) in (tuple, list):
        return type(arguments)(_copy(value) for value in arguments)
    return {key: _copy(value) for key, value in arguments.items()} if type(arguments) is dict else arguments


@dataclass(frozen=True)
class Clique:
    """Axes and plates whose joint posterior weights are wanted, and the level in which they are summed."""

    axes: frozenset[int]
    plate_dims: frozenset[int]
    level: int


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
                wanted = [c.axes | c.plate_dims for c in cliques if c.level == level]
                weights = [[sizes[d] if d in dims else 1 for d in range(-space.ndim, 0)] for dims in wanted]
                terms = [space._scaled(shape.table, axes) for shape in space.shapes.values() if shape.level == level]
                below = elimination_numel(terms + weights + below, [axis.dim for axis in space.level_axes(level)])
                made += weights + below
                below = below[-1:]
            return 3 * self.message.table.element_size() * sum(map(math.prod, made))

        while size > 1 and bytes_at(size) > space.max_bytes:
            size = (size + 1) // 2
        return [slice(i, min(i + size, space.chunk_axis.size)) for i in range(0, space.chunk_axis.size, size)]

    def joint(self, level: int, states: int | None = None) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
        """The joint posterior of all axes down to `level`, flattened to S states, piece by piece.

        Args:
            level: the deepest level to include.
            states: the number of states of the chunked axis in a piece; by default what memory allows.

        Yields:
            State numbers of each axis `[S]`, and log posterior probabilities `[S, *plates of that level]`.
        """
        space = self.space
        axes = sorted((axis for axis in space.axes if axis.level <= level), key=lambda axis: axis.dim)
        plates = self._plate_shape(level)
        for chunk in self._pieces(axes, math.prod(plates), states):
            tables, sums = self._ladder(chunk, logsumexp)
            total = add([table for here in tables[: level + 1] for table in here] + [-s for s in sums[: level + 1]])
            sizes = [chunk.stop - chunk.start if axis is space.chunk_axis else axis.size for axis in axes]
            depth = space.structure.plate_depth
            lead = (1,) * (space.ndim - depth - len(axes))
            wide = total.expand((*lead, *sizes, *self._plate_shape(level, native=False)))
            index = torch.unravel_index(torch.arange(math.prod(sizes), device=total.device), tuple(sizes))
            numbers = {
                axis.dim: i + (chunk.start if axis is space.chunk_axis else 0) for axis, i in zip(axes, index, strict=True)
            }
            yield numbers, wide.reshape((-1, *plates))

    def descend(self, n: int, reduce: Reduce) -> dict[int, Tensor]:
        """Choose states level by level from the outermost: draws with `logsumexp`, modes with `amax`.

        Returns:
            State numbers `[n, *plates]` of each axis.
        """
        space, index = self.space, dict[int, Tensor]()
        for level in range(len(space.levels)):
            choice = _Choice(n, self._plate_shape(level, native=False), reduce is amax, self.message.table)
            axes = space.level_axes(level)
            pieces = self._pieces(axes, math.prod(choice.plates) * (n if level else 1), None)
            for chunk in pieces if space.chunk_axis.level <= level else pieces[:1]:
                tables, sums = self._ladder(chunk, reduce)
                total = add(tables[level]) - (sums[level] if reduce is logsumexp else 0.0)
                sizes = [chunk.stop - chunk.start if axis is space.chunk_axis else axis.size for axis in axes]
                offsets = [chunk.start if axis is space.chunk_axis else 0 for axis in axes]
                inside = None
                if space.chunk_axis.dim in index:
                    inside = (index[space.chunk_axis.dim] >= chunk.start) & (index[space.chunk_axis.dim] < chunk.stop)
                picked = self._clamp(total, sizes, index, chunk, choice.plates)  # [S, n or 1, plates]
                choice.offer(picked, sizes, offsets, inside)
            index.update({axis.dim: number for axis, number in zip(axes, choice.numbers(), strict=True)})
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
                else (space._sweep(terms, range(level, level - 1, -1), below, reduce))
            )
            sums.insert(0, below.table)
        return tables, sums

    def _pieces(self, axes: list[Axis], rows: int, states: int | None) -> list[slice]:
        """Slices of the chunked axis so that the joint table of some axes fits."""
        space = self.space
        if states is None:
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
        for dim in clique.plate_dims:
            shape[dim] = space.plate_sizes[dim]
        return Term(like.new_zeros(shape).requires_grad_(), clique.plate_dims, clique.level)

    def _local(self, index: Mapping[int, Tensor], chunk: slice) -> dict[int, Tensor]:
        """State numbers counted within a chunk, those outside brought to its edge."""
        dim = self.space.chunk_axis.dim
        return {
            d: (number - chunk.start).clamp(0, chunk.stop - chunk.start - 1) if d == dim else number
            for d, number in index.items()
        }

    def _clamp(
        self, table: Tensor, sizes: list[int], index: Mapping[int, Tensor], chunk: slice, plates: tuple[int, ...]
    ) -> Tensor:
        """A level's table at chosen states of the outer levels: `[S, n, *plates]`, n = 1 where nothing is chosen yet."""
        outer = self.space.ndim - len(plates)
        chosen = list(table.shape[outer - len(index) : outer])
        deeper = [1] * (outer - len(index) - len(sizes))
        flat = table.expand((*deeper, *sizes, *chosen, *plates)).reshape((-1, *chosen, *plates))
        return gather(flat, self._local(index, chunk), len(plates)) if index else flat.unsqueeze(1)


class _Choice:
    """A choice of one state per draw and row from tables that come piece by piece."""

    def __init__(self, n: int, plates: tuple[int, ...], greedy: bool, like: Tensor) -> None:  # noqa: FBT001
        self.n, self.plates, self.greedy = n, plates, greedy
        self.below = like.new_zeros((n, *plates))
        self.best = like.new_full((n, *plates), -math.inf)
        self.uniform = self.below if greedy else torch.rand((n, *plates), dtype=like.dtype, device=like.device)
        self.chosen: list[Tensor] = []

    def offer(self, log_p: Tensor, sizes: list[int], offsets: list[int], inside: Tensor | None) -> None:
        """Consider S more states with log probabilities `[S, n or 1, *plates]`; `inside` tells which draws they concern."""
        if self.greedy:
            value, flat = log_p.max(0)
            taken = (value > self.best) | (self.best == -math.inf)
            taken = taken if inside is None else taken & inside
            self.best = torch.where(taken, value, self.best)
            flat = flat.expand(self.best.shape)
        else:
            cumulative = log_p.exp().cumsum(0)
            value = (self.uniform - self.below).expand((self.n, *self.plates))
            rows = cumulative.expand((-1, *torch.broadcast_shapes(cumulative.shape[1:], (1, *self.plates))))
            if rows.shape[1] == 1:
                edges = rows.squeeze(1).reshape(rows.shape[0], -1).T.contiguous()  # [rows, S]
                flat = torch.searchsorted(edges, value.reshape(self.n, -1).T.contiguous(), right=True).T
            else:
                edges = rows.reshape(rows.shape[0], -1).T.contiguous()  # [n rows, S]
                flat = torch.searchsorted(edges, value.reshape(-1, 1), right=True)
            flat = flat.reshape(value.shape)
            last = rows.shape[0] - 1
            possible = rows[-1] > 0
            taken = (value >= 0) & possible
            # Rounding may leave the very last uniforms above the total: they keep the last possible state.
            flat = flat.clamp(max=last)
            flat = torch.where(value >= rows[-1], _last_possible(rows).expand(value.shape), flat)
            taken = taken if inside is None else taken & inside
            step = rows[-1].expand(value.shape)
            self.below = self.below + (step if inside is None else torch.where(inside, step, 0.0))
        numbers = [i + o for i, o in zip(torch.unravel_index(flat, tuple(sizes)), offsets, strict=True)]
        if not self.chosen:
            self.chosen = numbers
        else:
            self.chosen = [torch.where(taken, new, old) for new, old in zip(numbers, self.chosen, strict=True)]

    def numbers(self) -> list[Tensor]:
        """State numbers `[n, *plates]` of each axis of the level."""
        return self.chosen


def _last_possible(cumulative: Tensor) -> Tensor:
    """The last state with a positive step, from cumulative probabilities over dim 0."""
    steps = torch.diff(cumulative, dim=0, prepend=torch.zeros_like(cumulative[:1])) > 0
    return cumulative.shape[0] - 1 - steps.flip(0).int().argmax(0)


class _Asked(dict):  # type: ignore[type-arg]
    """A dict that remembers which keys were read."""

    def __init__(self, states: States) -> None:
        super().__init__(states)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        value: Tensor = super().__getitem__(name)
        return value

    def values(self) -> Any:
        """All values: every name counts as read."""
        self.names.update(self)
        return super().values()

    def items(self) -> Any:
        """All items: every name counts as read."""
        self.names.update(self)
        return super().items()
