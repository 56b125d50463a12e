"""Mean field by coordinate ascent: q(z) = Π q(z_j), every component updated to its optimum given the others."""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyrovae.handlers import declared
from pyrovae.handlers.structure import common_scale, copied, read_structure
from pyrovae.inference.exact.elimination import Term, add, sum_plates
from pyrovae.inference.exact.enumeration import Axis, Enumeration
from pyrovae.inference.exact.exact import ExactPosterior
from pyrovae.inference.exact.solution import Solution
from pyrovae.inference.exact.tabulated import TabulatedPosterior
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mean_field.layered_mean_field import LayeredMeanFieldPosterior, fits, infer_layers
from pyrovae.inference.mean_field.layered_net import layered_net
from pyrovae.inference.posterior import Program, States

Components = list[Tensor]  # log q of each component of an axis, [K, plates]

_INSTEAD = (
    "for mean field without a table use Variational(LocalMeanField(model, num_data), num_guide_steps=...), or "
    "SaulJaakkolaJordan() for sigmoid belief nets"
)


class MeanField:
    """The best factorised q(z) that coordinate ascent finds, of several random starts, per datum.

    `log_evidence` is E_q[log p(x, z)] + H(q), a lower bound, nothing sampled; its gap to log p(x) is KL(q‖p). Expectations
    are exact sums over the table of the joint, so that the bound never decreases (`diagnostics["bounds"]`). Works wherever
    that table fits in memory, and refuses beyond.

    Cost: the table (joint states x rows evaluations of log p(x, z)) and, for each sweep over all components, about four
    passes over it. A model that declares binary layers (`layers()`) needs a table of 2^units for each layer only, the same
    for all rows: layers of 20 units and thousands of rows are quick, and the result is the same.

    Args:
        num_restarts: random starts; the best bound is kept for every datum. Latents outside the innermost plates begin at
            another state in each start; up to 16 such states are all tried, whatever the number.
        max_iterations: sweeps of one start.
        tolerance: a start ends when no datum's bound rises by more than this, in nats.
        max_bytes: memory for the table.
        declared: take the route of declared layers; False makes the table of the program, whatever it declares.

    References:
        An Introduction to Variational Methods for Graphical Models (Jordan et al., 1999)
        https://doi.org/10.1023/A:1007665907178
    """

    def __init__(
        self,
        num_restarts: int = 4,
        max_iterations: int = 200,
        *,
        tolerance: float = 1e-6,
        max_bytes: int = 2**30,
        declared: bool = True,
    ) -> None:
        if num_restarts < 1 or max_iterations < 1 or tolerance < 0 or max_bytes <= 0:
            raise ValueError(
                "expected num_restarts >= 1, max_iterations >= 1, tolerance >= 0 and max_bytes > 0, got "
                f"{num_restarts}, {max_iterations}, {tolerance} and {max_bytes}"
            )
        self.num_restarts, self.max_iterations = num_restarts, max_iterations
        self.tolerance, self.max_bytes, self.declared = tolerance, max_bytes, declared

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> MeanFieldPosterior | LayeredMeanFieldPosterior:
        """Fit q.

        Args:
            model: a Pyro program with finite discrete latents.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: for what Exact refuses, and where the table does not fit.
        """
        begin = time.perf_counter()
        with torch.no_grad():
            if self.declared and (found := self._by_layers(model, args, kwargs)) is not None:
                return found
            try:
                space = Enumeration(model, copied(args), copied(kwargs), max_bytes=self.max_bytes, method="MeanField")
            except ValueError as error:
                if "bytes" in str(error):
                    raise ValueError(f"{error}; {_INSTEAD}") from error
                raise
            if len(space.chunks) > 1:
                raise ValueError(
                    f"expected the table of the joint to fit in max_bytes={self.max_bytes:,} for MeanField, got "
                    f"{space.num_evaluations:,} entries ({8 * space.num_evaluations:,} bytes); raise max_bytes, pass fewer "
                    f"rows; {_INSTEAD}"
                )
            ascent = _Ascent(space)
            best: list[Components] | None = None
            evidence: Tensor | None = None
            histories = []
            outer = max((axis.size for axis in space.axes if axis.level < len(space.levels) - 1), default=1)
            for number in range(max(self.num_restarts, min(outer, 16))):
                ascent.start(number)
                history = self._climb(ascent)
                histories.append(tuple(float(bound.mean()) for bound in history))
                if best is None or evidence is None:
                    best, evidence = ascent.q, history[-1]
                else:
                    better = space.structure.from_batch(history[-1] > evidence)
                    best = [
                        [torch.where(better, new, old) for new, old in zip(news, olds, strict=True)]
                        for news, olds in zip(ascent.q, best, strict=True)
                    ]
                    evidence = torch.maximum(evidence, history[-1])
            assert best is not None
        return MeanFieldPosterior(
            structure=space.structure,
            log_evidence=evidence,
            bound="lower",
            diagnostics={"model_evaluations": space.num_evaluations, "bounds": tuple(histories)},
            seconds=time.perf_counter() - begin,
            enumeration=space,
            components=best,
        )

    def _by_layers(self, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayeredMeanFieldPosterior | None:
        """The answer by the tables of declared layers; None where none are declared, or the tables do not fit."""
        if declared(model, "layers") is None:
            return None
        structure = read_structure(model, args, kwargs)
        net = layered_net(model, args, kwargs, structure)
        if net is None or not fits(net, self.max_bytes):
            return None
        common_scale(structure, "MeanField")
        return infer_layers(
            structure,
            net.snapshot(),
            LogJoint(model, args, kwargs, structure=structure),
            num_restarts=self.num_restarts,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
        )

    def _climb(self, ascent: _Ascent) -> list[Tensor]:
        """Sweep until nothing rises; the bounds `[batch]` after each sweep."""
        history = [ascent.bound()]
        for _ in range(self.max_iterations):
            ascent.sweep()
            history.append(ascent.bound())
            if float((history[-1] - history[-2]).max()) <= self.tolerance:
                break
        return history


@dataclass(frozen=True, eq=False, kw_only=True)
class MeanFieldPosterior(TabulatedPosterior):
    """q(z) = Π q(z_j); every answer below is exact for q."""

    components: Sequence[Components] = field(repr=False)

    @cached_property
    def marginals(self) -> States:
        """q(1) `[batch, …]` for {0, 1} sites, `[batch, …, K]` for categories."""
        return self._q.marginals

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of q in nats, `[batch]`."""
        with torch.no_grad():
            return self.enumeration.to_batch(_entropies(self.enumeration, self.components))

    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """E_q[f(z)] summed over all joint states, and 0; see :meth:`Posterior.expectation`."""
        return self._q.expectation(f)

    def sample(self, n: int) -> States:
        """`n` independent draws from q, `{site: [n, batch, …]}`."""
        return self._q.sample(n)

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log q(z) `[n, batch]` of states `{site: [n, batch, …]}`."""
        return self._q.log_prob(z)

    def site_weights(self, *, summed: bool = False) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Products of q over the axes of every site; see :class:`TabulatedPosterior`."""
        space, weights = self.enumeration, {}
        tables = {axis.dim: _table(space, axis, q).exp() for axis, q in zip(space.axes, self.components, strict=True)}
        for name, shape in space.shapes.items():
            sizes = [space.plate_sizes[d] if d in shape.plate_dims else 1 for d in range(-space.structure.plate_depth, 0)]
            ones = self.components[0][0].new_ones((1,) * (space.ndim - len(sizes)) + tuple(sizes))
            away = shape.repeated if summed else frozenset()
            weights[name] = _contract([ones, *(tables[dim] for dim in shape.axes)], away)
        yield space.chunks[0], weights

    @cached_property
    def _q(self) -> ExactPosterior:
        """Q as the exact posterior of a program whose factors are q's own tables."""
        space = self.enumeration
        terms = {
            str(axis.dim): Term(_table(space, axis, q), space.levels[axis.level], axis.level)
            for axis, q in zip(space.axes, self.components, strict=True)
        }
        with torch.no_grad():
            solution = Solution(space, held=terms)
        return ExactPosterior(
            structure=self.structure,
            log_evidence=solution.log_evidence,
            bound="exact",
            enumeration=space,
            solution=solution,
        )


class _Ascent:
    """Coordinate ascent on the tables of an enumeration."""

    def __init__(self, space: Enumeration) -> None:
        self.space = space
        # Finite, since a state of probability 0 and a weight of 0 must not meet as 0 x −inf: log q then falls so low that
        # its weight is 0 to all digits.
        self.terms = {
            name: Term(term.table.clamp_min(-1e300 if term.table.dtype == torch.float64 else -1e30), term.plate_dims, 0)
            for name, term in space.terms().items()
        }
        self.cardinalities = [[s.cardinality for s in axis.sites for _ in range(s.components)] for axis in space.axes]
        self.q: list[Components] = []
        self.plates = [_plates(space, axis) for axis in space.axes]
        self.like = next(iter(self.terms.values())).table

    def start(self, number: int) -> None:
        """A random q; latents outside the innermost plates begin near one state each, another for every start.

        From an even q of a global latent the rows would settle on what suits the mixture of its states, and hold it there.
        """
        self.q = []
        for axis, sizes, plates in zip(self.space.axes, self.cardinalities, self.plates, strict=True):
            noise = [torch.randn((k, *plates), dtype=self.like.dtype, device=self.like.device) for k in sizes]
            if axis.level < len(self.space.levels) - 1:
                codes = axis.site_codes(torch.tensor(number % axis.size, device=self.like.device))
                for values, code in zip(noise, torch.cat([codes[site.name] for site in axis.sites]), strict=True):
                    values[code] += 10.0
            self.q.append([torch.log_softmax(values, 0) for values in noise])

    def sweep(self) -> None:
        """Set every component once to its optimum, exp(E[log p(x, z) | z_j]) normalised, the innermost plates first."""
        for number, axis in reversed(list(enumerate(self.space.axes))):
            plates = self.plates[number]
            gain = self._expected(axis).expand((axis.size, *plates)).reshape(axis.size, -1)  # [S, rows]
            q = [log_q.reshape(len(log_q), -1).exp() for log_q in self.q[number]]
            # Tables with the later components averaged out: [K_1 … K_j, rows].
            suffixes = [gain]
            for p in reversed(q[1:]):
                suffixes.insert(0, (suffixes[0].reshape(-1, len(p), gain.shape[1]) * p).sum(1))
            for j, table in enumerate(suffixes):
                for p in q[:j]:  # and the earlier, already updated, ones
                    table = (table.reshape(len(p), -1, gain.shape[1]) * p.unsqueeze(1)).sum(0)
                log_q = torch.log_softmax(table, 0)
                q[j] = log_q.exp()
                self.q[number][j] = log_q.reshape((-1, *plates))
        self.q = [list(components) for components in self.q]

    def bound(self) -> Tensor:
        """E_q[log p(x, z)] + H(q), `[batch]`."""
        tables = {axis.dim: _table(self.space, axis, q).exp() for axis, q in zip(self.space.axes, self.q, strict=True)}
        parts = [Term(self._average(name, term, tables, None), term.plate_dims, -1) for name, term in self.terms.items()]
        return self.space.to_batch([*parts, *_entropies(self.space, self.q)])

    def _expected(self, axis: Axis) -> Tensor:
        """E[log p(x, z) | state of an axis], `[S, plates]`, the other axes averaged out."""
        space = self.space
        tables = {
            other.dim: _table(space, other, q).exp() for other, q in zip(space.axes, self.q, strict=True) if other is not axis
        }
        keep = space.levels[axis.level]
        found = [
            sum_plates(Term(self._average(name, term, tables, axis.dim), term.plate_dims, 0), keep, space.plate_sizes).table
            for name, term in self.terms.items()
            if axis.dim in space.shapes[name].axes
        ]
        total = add(found)
        depth = space.structure.plate_depth
        return total.reshape((total.shape[axis.dim], *total.shape[total.dim() - depth :]))

    def _average(self, name: str, term: Term, q: Mapping[int, Tensor], free: int | None) -> Tensor:
        """A term averaged over all its axes but one."""
        axes = [dim for dim in self.space.shapes[name].axes if dim != free]
        if not axes:
            return term.table
        return _contract([term.table, *(q[dim] for dim in axes)], frozenset(axes))


def _contract(operands: Sequence[Tensor], away: frozenset[int]) -> Tensor:
    """The product of broadcastable tables, summed over some dims, which keep size 1."""
    ndim = operands[0].dim()
    varied = [[d for d in range(-ndim, 0) if t.shape[d] > 1] for t in operands]
    kept = sorted({d for dims in varied for d in dims} - away)
    letter = dict(zip(sorted({d for dims in varied for d in dims}), string.ascii_letters, strict=False))
    formula = ",".join("".join(letter[d] for d in dims) for dims in varied)
    result = torch.einsum(f"{formula}->{''.join(letter[d] for d in kept)}", *(t.squeeze() for t in operands))
    shape = [1] * ndim
    for d, size in zip(kept, result.shape, strict=True):
        shape[d] = size
    return result.reshape(shape)


def _table(space: Enumeration, axis: Axis, q: Components) -> Tensor:
    """Log q of the states of an axis, `[S at its dim, plates]`."""
    plates = q[0].shape[1:]
    total = q[0].reshape(len(q[0]), -1)
    for log_q in q[1:]:
        total = (total.unsqueeze(1) + log_q.reshape(1, len(log_q), -1)).reshape(-1, total.shape[-1])
    right = -axis.dim - 1 - len(plates)
    left = space.ndim - len(plates) - 1 - right
    return total.reshape((1,) * left + (axis.size,) + (1,) * right + tuple(plates))


def _entropies(space: Enumeration, components: Sequence[Components]) -> list[Term]:
    """The entropy of each axis's q, a term over its plates."""
    found = []
    for axis, q in zip(space.axes, components, strict=True):
        entropy = torch.stack([-(log_q.exp() * log_q).sum(0) for log_q in q]).sum(0)
        wide = entropy.reshape((1,) * (space.ndim - entropy.dim()) + tuple(entropy.shape))
        found.append(Term(wide, space.levels[axis.level], -1))
    return found


def _plates(space: Enumeration, axis: Axis) -> tuple[int, ...]:
    """Sizes of an axis's plates over all plate dims."""
    inside = space.levels[axis.level]
    return tuple(space.plate_sizes[d] if d in inside else 1 for d in range(-space.structure.plate_depth, 0))
