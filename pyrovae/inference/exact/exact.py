"""Exact inference by enumeration, for any program whose latents are finite and discrete."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyrovae.handlers.structure import Latent, Structure, copied
from pyrovae.inference.exact.elimination import Term, amax, logsumexp
from pyrovae.inference.exact.enumeration import Axis, Enumeration
from pyrovae.inference.exact.expectations import sites_read, weighted_average
from pyrovae.inference.exact.routes import find_route
from pyrovae.inference.exact.solution import Clique, Solution
from pyrovae.inference.exact.tabulated import TabulatedPosterior, weighted_sum
from pyrovae.inference.posterior import Posterior, Program, States, code_marginals


class Exact:
    """The posterior p(z | x) by summing over every joint state of the latents.

    Exact: bound "exact", nothing sampled. Takes any Pyro program whose latents have finitely many values: vectors of bits
    (also inside `.to_event`, where Pyro's own enumeration silently samples), categories, one-hot vectors, several sites
    and layers, plates of any name, and global latents outside a full plate together with local ones inside it.

    Cost: joint states x rows values of log p(x, z), layer by layer where sites form layers, in chunks of at most
    `max_bytes`. Only the evidence is computed at once; marginals, samples and the rest when they are asked for.

    A model that declares a structure takes a faster route to the same answers: a belief net the bilinear one (20 hidden units
    on all of MNIST take seconds), units that are independent given the data a closed form, a chain forward-backward.

    Args:
        max_bytes: the memory that an evaluation may take.
        declared: take the route of a declared structure; False enumerates the program, whatever it declares.

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

    def __init__(self, *, max_bytes: int = 2**30, declared: bool = True) -> None:
        if max_bytes <= 0:
            raise ValueError(f"expected max_bytes > 0, got {max_bytes}")
        self.max_bytes, self.declared = max_bytes, declared

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> Posterior:
        """The exact posterior of a program at its arguments.

        Args:
            model: a Pyro program.
            *args: its arguments, the data first, as in `svi.step`.
            **kwargs: its keyword arguments.

        Returns:
            An :class:`ExactPosterior`, or the posterior of a declared route; either has, beside what every posterior has,
            `entropy` `[batch]` and `mode`.

        Raises:
            ValueError: for a continuous latent; a sequential plate; latents in sibling plates; a site outside the plate of
                a latent that it depends on; a subsampled plate with a latent outside it; unequal `poutine.scale`s; a
                program that branches on values, mixes rows or draws hidden noise; tensor code that does not broadcast on
                the left; and work that would not fit, with the bytes it would take.
        """
        start = time.perf_counter()
        with torch.no_grad():
            if self.declared:
                found = find_route(model, args, kwargs, max_bytes=self.max_bytes, method="Exact")
                if found is not None:
                    return found.infer()
            space = Enumeration(model, copied(args), copied(kwargs), max_bytes=self.max_bytes)
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

    def repeated(
        self, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure | None = None
    ) -> Callable[[], Posterior]:
        """A function that infers at the same arguments and the model's present parameters: the E-steps of EM.

        Where the model declares a structure, its program is run and checked now, and not again at every call.

        Args:
            model: a Pyro program.
            args: its arguments, which must not change between calls.
            kwargs: its keyword arguments.
            structure: of the program at its arguments, where it is known already.

        Raises:
            ValueError: as :meth:`infer`.
        """
        with torch.no_grad():
            found = None
            if self.declared:
                found = find_route(model, args, kwargs, max_bytes=self.max_bytes, method="Exact", structure=structure)
        if found is None:
            return lambda: self.infer(model, *args, **kwargs)

        def infer() -> Posterior:
            with torch.no_grad():
                return found.again().infer()

        return infer


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

    def site_weights(self, *, summed: bool = False) -> Iterator[tuple[slice, States]]:
        """Posterior weights of every site's clique; see :class:`TabulatedPosterior`."""
        wanted = {
            name: Clique(s.axes, s.plate_dims, s.level, s.repeated if summed else frozenset())
            for name, s in self.enumeration.shapes.items()
        }
        yield from self.solution.weights(wanted)

    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """E[f(z)] summed over all joint states, `[batch, …]`, and 0; see :meth:`Posterior.expectation`.

        Raises:
            ValueError: if the result of `f` lacks the rows of a plate whose latents it uses: a function of several rows at
                once has too many joint states; draw samples instead.
        """
        pieces = self.solution.joint(self._asked(f))
        return weighted_average(f, ((self._values(index), log_weights) for index, log_weights in pieces))

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

    def _asked(self, f: Callable[[States], Tensor]) -> list[Axis]:
        """The axes of the sites that `f` looks at."""
        axes = self.enumeration.axes
        start = torch.zeros(1, dtype=torch.long, device=self.enumeration.device)
        names = sites_read(f, self._values({axis.dim: start for axis in axes}))
        found = [axis for axis in axes if any(site.name in names for site in axis.sites)]
        return found or [min(axes, key=lambda axis: axis.size)]

    def _values(self, index: Mapping[int, Tensor]) -> States:
        """Values `[S, *batch_shape, *event]` at joint states, the same for every row."""
        states = {}
        for axis in self.enumeration.axes:
            if axis.dim not in index:
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
