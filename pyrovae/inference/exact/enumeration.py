"""The joint states of a program's finite latents, laid out along tensor dims and evaluated in bounded memory.

Each latent site takes an *axis*, a dim of its own left of all plates, along which its states run while its plates keep
size 1. Latents with the same plates form a *level*; levels must be nested. From the deepest level up, a level's axes are
summed out and its remaining plates are then multiplied together:

    log p(x) = Σ_n log Σ_{z_n} p(x_n, z_n | g), summed over g in turn where a global g lies outside the plate.

One axis, the largest, is walked in chunks. A program that cannot broadcast so (it concatenates two latents, say) shares
one axis a level. Whichever layout, a few joint states are also evaluated alone: a branch on a value, a statistic over the
batch or a dropout shows as a difference, and the program is refused rather than answered wrongly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyrovae.handlers.energy import check_normalized
from pyrovae.handlers.structure import (
    Latent,
    Structure,
    common_scale,
    finite_latents,
    one_plate_a_dim,
    read_structure,
    run_sites,
)
from pyrovae.inference.exact.elimination import Reduce, Term, add, eliminate, elimination_numel, logsumexp, sum_plates
from pyrovae.inference.exact.factors import Factor, site_factor
from pyrovae.inference.exact.spot_check import INSTEAD, Mismatch, Refusal, SiteShape, SpotCheck
from pyrovae.ops import codes_to_index, index_to_codes, isolated_rng

_MAX_DIMS = 64  # of a torch tensor


@dataclass(frozen=True)
class Axis:
    """A dim of joint states: all values of its sites, or, with `codes`, a list of them."""

    dim: int
    level: int
    sites: tuple[Latent, ...]
    size: int
    codes: Mapping[str, Tensor] | None = None

    def site_codes(self, index: Tensor) -> dict[str, Tensor]:
        """Codes `[..., components]` of each site at state numbers `[...]`."""
        if self.codes is not None:
            return {site.name: self.codes[site.name][index] for site in self.sites}
        found = {}
        for site in reversed(self.sites):
            found[site.name] = index_to_codes(index % site.num_states, site.cardinality, site.components)
            index = index // site.num_states
        return found

    def index(self, codes: Mapping[str, Tensor]) -> Tensor:
        """State numbers `[...]` of codes `[..., components]`, the inverse of :meth:`site_codes`."""
        index: Tensor | int = 0
        for site in self.sites:
            index = index * site.num_states + codes_to_index(codes[site.name], site.cardinality)
        assert isinstance(index, Tensor)
        return index


class Enumeration:
    """All joint states of a program at given arguments; see the module's docstring.

    Args:
        program: a Pyro model whose latents are finite.
        args: its arguments.
        kwargs: its keyword arguments.
        max_bytes: the memory that an evaluation may take.
        max_evaluations: the most log joint values that may be computed.
        method: named in error messages.
        plain: evaluate every site by its own `log_prob` (the oracle).
        states: codes `[S, components]` of every site: only these S joint states, along one axis. The program must have a
            single level.
        structure: of the program at these arguments, where it is known already.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        max_bytes: int,
        max_evaluations: int = 2**33,
        method: str = "Exact",
        plain: bool = False,
        states: Mapping[str, Tensor] | None = None,
        structure: Structure | None = None,
    ) -> None:
        self.program, self.args, self.kwargs, self.method, self.plain = program, args, dict(kwargs), method, plain
        self.structure = read_structure(program, args, kwargs) if structure is None else structure
        self.max_bytes = max_bytes
        self.shapes: dict[str, SiteShape] = {}
        if method != "Gibbs":  # which needs no evidence
            check_normalized(self.structure, method)
        latents = finite_latents(self.structure, method, "Variational, Importance or MCMC(NUTS(model), ...)")
        self.levels = _nested_levels(self.structure, latents, method)
        self.scale = common_scale(self.structure, method)
        with isolated_rng():
            self._lay_out(latents, (max_bytes, max_evaluations) if states is None else None)
        if states is not None:
            self._restrict(latents, states)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> list[slice]:
        """Slices of the chunked axis; one where everything fits."""
        size = self.chunk_axis.size
        return [slice(i, min(i + self.chunk_size, size)) for i in range(0, size, self.chunk_size)]

    @property
    def num_evaluations(self) -> int:
        """How many values of log p(x, z) are summed: joint states x rows, of several layers one after another."""
        eliminations = self._eliminations({axis.dim: axis.size for axis in self.axes})
        return sum(math.prod(shape) for shapes in eliminations for shape in shapes[:-1])

    def factors(self, chunk: slice | None = None, program: Callable[..., Any] | None = None) -> dict[str, Factor]:
        """The factor of every site at the states of a chunk, one run of the program.

        Args:
            chunk: states of the chunked axis; None for all.
            program: another program with the same sites (the model after an M-step).
        """
        values = {}
        for axis in self.axes:
            part = chunk if chunk is not None and axis is self.chunk_axis else slice(0, axis.size)
            values.update(self.values(axis, axis.site_codes(torch.arange(part.start, part.stop, device=self.device))))
        with isolated_rng():
            sites = run_sites(program or self.program, self.args, self.kwargs, values, self.structure.subsample)
        return {name: site_factor(site, self.ndim, plain=self.plain) for name, site in sites.items()}

    def terms(self, chunk: slice | None = None, program: Callable[..., Any] | None = None) -> dict[str, Term]:
        """The log tables of a chunk, by site."""
        return {
            name: Term(factor.table(), factor.plate_dims, self._shape(name).level)
            for name, factor in self.factors(chunk, program).items()
        }

    def log_evidence(self, program: Callable[..., Any] | None = None) -> Tensor:
        """Log p(x) `[batch]`, differentiable in the program's parameters; chunks are recomputed by the backward pass."""
        level = self.chunk_axis.level

        def message(chunk: slice) -> Tensor:
            return self.message(self.terms(chunk, program).values(), level).table

        if len(self.chunks) == 1:
            terms = self.terms(None, program).values()
            return self.finish(self.message(terms, level), terms)
        grad = torch.is_grad_enabled()
        parts = [checkpoint(message, c, use_reentrant=False) if grad else message(c) for c in self.chunks]
        combined = Term(torch.logsumexp(torch.stack(parts), 0), self.levels[level], level)
        return self.finish(combined, self.terms(slice(0, 1), program).values())

    def message(self, terms: Iterable[Term], level: int, reduce: Reduce = logsumexp) -> Term:
        """Sum out the axes of all levels from the deepest up to `level`; a term over that level's plates."""
        return self.sweep(list(terms), range(len(self.levels) - 1, level - 1, -1), None, reduce)

    def finish(self, message: Term, terms: Iterable[Term], reduce: Reduce = logsumexp) -> Tensor:
        """From the message of the chunked level to log p(x) `[batch]`."""
        terms = list(terms)
        root = self.sweep(terms, range(message.level - 1, -1, -1), message, reduce)
        return self.to_batch([root, *(term for term in terms if term.level < 0)])

    def to_batch(self, terms: Iterable[Term]) -> Tensor:
        """The sum of terms without axes, each summed over its plates outside the batch: `[batch]`."""
        keep = frozenset(plate.dim for plate in self.structure.batch)
        total = add(sum_plates(term, keep, self.plate_sizes).table for term in terms)
        return self.structure.to_batch(total.reshape(total.shape[total.dim() - self.structure.plate_depth :]))

    def level_tables(self, terms: Iterable[Term], level: int, below: Term | None) -> list[Tensor]:
        """The tables of a level and the message from below, `[axes, level's plates]`."""
        here = [term for term in terms if term.level == level] + ([] if below is None else [below])
        return [sum_plates(term, self.levels[level], self.plate_sizes).table for term in here]

    def level_axes(self, level: int) -> list[Axis]:
        """The axes of a level, left to right."""
        return sorted((axis for axis in self.axes if axis.level == level), key=lambda axis: axis.dim)

    def sweep(self, terms: list[Term], levels: range, below: Term | None, reduce: Reduce) -> Term:
        """Sum out the axes of some levels, one level after another, starting from a message below; the last message."""
        for level in levels:
            tables = self.level_tables(terms, level, below)
            below = Term(eliminate(tables, [axis.dim for axis in self.level_axes(level)], reduce), self.levels[level], level)
        assert below is not None
        return below

    def _shape(self, name: str) -> SiteShape:
        if name not in self.shapes:
            raise ValueError(
                f"expected the same sites at every value of the latents, got {name!r} at some only; {self.method} needs "
                f"a program without branches on latent values, {INSTEAD}"
            )
        return self.shapes[name]

    # ---- layout -----------------------------------------------------------------------------------------------------

    def _lay_out(self, latents: Sequence[Latent], plan: tuple[int, int] | None) -> None:
        """Choose the first layout in which the program runs, agrees with single states, and fits in memory."""
        self.device = latents[0].device
        self.plate_sizes = {plate.dim: plate.size for plate in self.structure.plates}
        problem: Exception | None = None
        for joint, expand in ((False, False), (True, False), (True, True)):
            if joint and not expand and len(latents) == len(self.levels):
                continue  # a site a level: the joint layout is the same
            if isinstance(problem, _TooLarge) and expand:
                break
            self.expand = expand
            self.axes = self._make_axes(latents, joint=joint)
            self.ndim = self.structure.plate_depth + len(self.axes)
            if self.ndim + 2 > _MAX_DIMS:
                problem = _TooLarge(
                    f"expected fewer than {_MAX_DIMS - 2} latent sites in {self.method}, got {len(latents)}; write them "
                    "as one vector site with .to_event(1)"
                )
                continue
            try:
                self.shapes = SpotCheck(self).run()
                if plan is not None:
                    self.chunk_axis, self.chunk_size = self._plan(*plan)
            except Refusal:
                raise
            except _TooLarge as error:
                problem = error
                if plan is None or math.prod(axis.size for axis in self.axes) > plan[1]:
                    break
                continue  # one axis for all sites can be walked in smaller chunks
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                problem = problem or error
                continue
            return
        assert problem is not None
        if isinstance(problem, (Mismatch, _TooLarge)):
            raise ValueError(str(problem)) from None
        raise ValueError(
            f"expected tensor code that broadcasts on the left for {self.method}, got {type(problem).__name__}: "
            f"{problem}. Latents arrive with dims of joint states left of the plates: write z.reshape(z.shape[:-2] + "
            "(-1,)) and h @ W, not z.view(N, -1); do not concatenate a latent with data; do not branch on its value"
        ) from problem

    def _restrict(self, latents: Sequence[Latent], states: Mapping[str, Tensor]) -> None:
        """Put a list of joint states along one axis instead of all."""
        size = next(iter(states.values())).shape[0]
        axis = Axis(-1 - self.structure.plate_depth, 0, tuple(latents), size, dict(states))
        self.axes, self.ndim, self.chunk_axis, self.chunk_size = [axis], self.structure.plate_depth + 1, axis, size
        self.shapes = {
            name: replace(shape, axes=frozenset({axis.dim}) if shape.axes else frozenset(), level=0)
            for name, shape in self.shapes.items()
        }

    def _make_axes(self, latents: Sequence[Latent], *, joint: bool) -> list[Axis]:
        groups: list[tuple[Latent, ...]] = []
        for plates in self.levels:
            here = tuple(latent for latent in latents if latent.plate_dims == plates)
            groups.extend([here] if joint else [(latent,) for latent in here])
        return [
            Axis(
                dim=-1 - self.structure.plate_depth - k,
                level=self.levels.index(group[0].plate_dims),
                sites=group,
                size=math.prod(site.num_states for site in group),
            )
            for k, group in enumerate(groups)
        ]

    def values(self, axis: Axis, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of an axis's sites with its states at its dim: `[S, 1, …, 1, *event]`."""
        found = {}
        for site in axis.sites:
            value = site.decode(codes[site.name])
            size = value.shape[0]
            right = -axis.dim - 1
            value = value.reshape((size,) + (1,) * right + site.event_shape)
            if self.expand:
                plates = (1,) * (right - len(site.batch_shape)) + tuple(site.batch_shape)
                value = value.expand((size, *plates, *site.event_shape))
            found[site.name] = value
        return found

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _plan(self, max_bytes: int, max_evaluations: int) -> tuple[Axis, int]:
        """The axis to walk and its chunk size, from the shapes that the spot run had."""
        itemsize = max(shape.itemsize for shape in self.shapes.values())
        sizes = {axis.dim: axis.size for axis in self.axes}
        largest = max(self._made(sizes), key=math.prod)
        axis = max(self.axes, key=lambda a: (largest[a.dim] > 1, a.size))
        needed = 3 * itemsize * math.prod(largest)
        rows = math.prod(self.structure.batch_shape)
        total = math.prod(sizes.values())
        if math.prod(largest) > max_evaluations:
            raise _TooLarge(
                f"expected at most {max_evaluations:,} evaluations of log p(x, z) in {self.method}, got {total:,} joint "
                f"states for {rows:,} rows, {math.prod(largest):,} evaluations, whose table would take "
                f"{itemsize * math.prod(largest):,} bytes; use Gibbs, Variational or Importance, or fewer latents"
            )
        chunk = axis.size
        while (needed := self._bytes({**sizes, axis.dim: chunk}, itemsize)) > max_bytes and chunk > 1:
            chunk = (chunk + 1) // 2
        if needed > max_bytes:
            raise _TooLarge(
                f"expected {self.method} to fit in max_bytes={max_bytes:,}, got {total:,} joint states for {rows:,} rows, "
                f"which would take at least {needed:,} bytes even in the smallest chunks; raise max_bytes, pass fewer "
                "rows, or use Gibbs, Variational or Importance"
            )
        return axis, chunk

    def _made(self, sizes: Mapping[int, int]) -> list[tuple[int, ...]]:
        """Shapes of every table that an evaluation makes, with the axes at `sizes`."""
        return [tuple(shape) for shapes in self._eliminations(sizes) for shape in shapes]

    def _eliminations(self, sizes: Mapping[int, int]) -> list[list[list[int]]]:
        """For each level, the shapes of the table before each of its axes is summed out, and of what is left."""
        found: list[list[list[int]]] = []
        below: list[list[int]] = []
        for level in range(len(self.levels) - 1, -1, -1):
            here = [self.scaled(s.table, sizes) for s in self.shapes.values() if s.level == level] + below
            found.append(elimination_numel(here, [a.dim for a in self.axes if a.level == level]))
            below = [found[-1][-1]]
        return found

    def _bytes(self, sizes: Mapping[int, int], itemsize: int) -> int:
        tables = [self.scaled(s, sizes) for shape in self.shapes.values() for s in shape.tables]
        peak = max(math.prod(shape) for shape in self._made(sizes))
        return itemsize * (3 * peak + 2 * sum(math.prod(t) for t in tables))

    def scaled(self, shape: Sequence[int], sizes: Mapping[int, int]) -> list[int]:
        """A spot shape with each axis at its own size; a last dim beyond `ndim` is the event's."""
        event = list(shape[self.ndim :])
        full = list(shape[: self.ndim])
        for dim, size in sizes.items():
            if full[dim] > 1:
                full[dim] = size
        return full + event


class _TooLarge(ValueError):
    """A layout whose tables do not fit."""


def _nested_levels(structure: Structure, latents: Sequence[Latent], method: str) -> list[frozenset[int]]:
    """The sets of plates around latents, outermost first; each must hold the one before."""
    levels = sorted({latent.plate_dims for latent in latents}, key=len)
    for outer, inner in itertools.pairwise(levels):
        if not outer < inner:
            a, b = (next(s for s in latents if s.plate_dims == level) for level in (outer, inner))
            raise ValueError(
                f"expected the plates of latents nested in one another, got {a.name!r} and {b.name!r} in sibling plates; "
                f"{method} cannot sum them level by level, make one of them a vector with .to_event(1)"
            )
    one_plate_a_dim(structure, method)
    return levels
