"""log p(x, z) of a program at given states of its latents, one run for many states where the program allows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrovae.handlers.structure import (
    Latent,
    Observed,
    Site,
    Structure,
    common_scale,
    copied,
    draw_sites,
    read_structure,
    run_sites,
)
from pyrovae.inference.exact.elimination import Term, add, sum_plates
from pyrovae.inference.exact.factors import site_factor
from pyrovae.ops import isolated_rng

Program = Callable[..., Any]
States = dict[str, Tensor]


class LogJoint:
    """log p(x, z) at states `{site: [K, *batch_shape, *event]}` that may differ between rows.

    A program that broadcasts on the left is run once for all K states; one that does not, or whose result for a state
    depends on the other states, is run K times. Which of the two holds is found out by evaluating three states together
    and apart: finite sites at their first values, their last, and random ones, the others at draws of the program.

    Args:
        program: a Pyro model.
        args: its arguments.
        kwargs: its keyword arguments.
        structure: of the program at these arguments, where it is known already.
        broadcasts: whether one run serves many states, where it is known already.
    """

    def __init__(
        self,
        program: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        structure: Structure | None = None,
        broadcasts: bool | None = None,
    ) -> None:
        self.program, self.args, self.kwargs = program, copied(args), copied(dict(kwargs))
        self.structure = read_structure(program, args, kwargs) if structure is None else structure
        self.plate_sizes = {plate.dim: plate.size for plate in self.structure.plates}
        sites: list[Latent | Observed] = [*self.structure.latents, *self.structure.observed]
        self._sizes = {site.name: {plate.dim: plate.size for plate in site.plates} for site in sites}
        self._broadcasts = broadcasts

    @property
    def broadcasts(self) -> bool:
        """Whether one run serves many states."""
        if self._broadcasts is None:
            with torch.no_grad():
                self._broadcasts = self._agrees()
        return self._broadcasts

    def __call__(self, states: Mapping[str, Tensor], program: Program | None = None) -> Tensor:
        """Log p(x, z) `[K, batch]`, plate factors and scales left out, differentiable in the program's parameters.

        Args:
            states: `{site: [K, *batch_shape, *event]}` for every latent.
            program: another program with the same sites (the model after an M-step).
        """
        return self.total(self.terms(states, program), next(iter(states.values())).shape[0])

    def total(self, terms: Mapping[str, Term], num_states: int) -> Tensor:
        """The sum of terms `[K, batch]`, each over its plates outside the batch."""
        total = self._sum(terms)
        return self.structure.to_batch(total.expand((num_states, *total.shape[1:])))

    def terms(self, states: Mapping[str, Tensor], program: Program | None = None) -> dict[str, Term]:
        """The log probability of every site, `[K, plates]`."""
        if self.broadcasts:
            return self._run(states, program)
        size = next(iter(states.values())).shape[0]
        rows = [self._run({name: value[k : k + 1] for name, value in states.items()}, program) for k in range(size)]
        names = [name for name in rows[0] if all(name in row for row in rows)]
        if len(names) < max(len(row) for row in rows):
            # Sites that exist at some states only: told as one term over the batch.
            return {"log_joint": Term(torch.cat([self._sum(row) for row in rows]), self._batch_dims(), 0)}
        found = {}
        for name in names:
            shape = torch.broadcast_shapes(*(row[name].table.shape for row in rows))
            tables = torch.cat([row[name].table.expand(shape) for row in rows])
            found[name] = Term(tables, rows[0][name].plate_dims, 0)
        return found

    def check_rows(self, method: str) -> None:
        """Refuse a program whose log joint of one row of the batch depends on the latents of another.

        Raises:
            ValueError: if a state that takes each row from one of two others is not scored row by row as they are.
        """
        if not self.structure.batch:
            return
        with isolated_rng(0), torch.no_grad():
            draws: list[Mapping[str, Any]] = [{}, {}, {}]
            if not all(latent.finite for latent in self.structure.latents):
                draws = [draw_sites(self.program, self.args, self.kwargs, self.structure.subsample) for _ in range(3)]
                if any(set(draw) != set(draws[0]) for draw in draws):
                    return
            take = torch.rand(self.structure.batch_shape, device=self.structure.latents[0].device) < 0.5
            take.view(-1)[0], take.view(-1)[-1] = True, False  # some of either, however few the rows
            wide, states = self.structure.from_batch(take), {}
            for latent in self.structure.latents:
                _, first, other = _spots(latent, draws)
                depth, events = len(latent.batch_shape), len(latent.event_shape)
                rows = wide.reshape(wide.shape[wide.dim() - depth :] + (1,) * events)
                states[latent.name] = torch.stack((first, other, torch.where(rows, other, first)))
            first, other, mixed = self(states)
        expected = torch.where(take, other, first)
        tolerance = torch.finfo(mixed.dtype).eps ** 0.5
        if not torch.allclose(mixed, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise ValueError(
                f"expected rows that are independent given what is outside their plate for {method}, got a program that mixes "
                "rows of the batch (or draws hidden noise): a weight for each row would belong to no density; make the latent "
                "one vector with .to_event(1) outside the plate, or use Variational, whose bound of all rows together holds"
            )

    def sites(self, states: Mapping[str, Tensor], program: Program | None = None) -> dict[str, Site]:
        """The sites of one run at all states together, by name; with one state, at the program's own shapes."""
        depth = self.structure.plate_depth
        values = {}
        for latent in self.structure.latents:
            value = states[latent.name]
            wide = (1,) * (depth - len(latent.batch_shape))
            values[latent.name] = value.reshape(value.shape[:1] + wide + latent.batch_shape + latent.event_shape)
            if value.shape[0] == 1:
                values[latent.name] = value.reshape(latent.batch_shape + latent.event_shape)
        with isolated_rng():
            return run_sites(program or self.program, self.args, self.kwargs, values, self.structure.subsample)

    def factors(self, sites: Mapping[str, Site]) -> dict[str, Term]:
        """The log probability of every site of a run, `[K, plates]`."""
        factors = [site_factor(site, self.structure.plate_depth + 1) for site in sites.values()]
        return {factor.name: Term(factor.table(), factor.plate_dims, 0) for factor in factors}

    def _run(self, states: Mapping[str, Tensor], program: Program | None) -> dict[str, Term]:
        return self.factors(self.sites(states, program))

    def _agrees(self) -> bool:
        """Whether three states have the same log joint together and apart."""
        latents = self.structure.latents
        with isolated_rng(0):
            draws: list[Mapping[str, Any]] = [{}, {}, {}]
            if not all(latent.finite for latent in latents):
                draws = [draw_sites(self.program, self.args, self.kwargs, self.structure.subsample) for _ in range(3)]
                if any(set(draw) != set(draws[0]) for draw in draws):
                    return False
            states = {latent.name: _spots(latent, draws) for latent in latents}
        try:
            together = self._run(states, None)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return False
        for k in range(3):
            apart = self._run({name: value[k : k + 1] for name, value in states.items()}, None)
            if set(apart) != set(together):
                return False
            for name, term in apart.items():
                table = together[name].table[k if together[name].table.shape[0] > 1 else 0]
                tolerance = torch.finfo(table.dtype).eps ** 0.5
                if not torch.allclose(table, term.table[0], rtol=tolerance, atol=tolerance, equal_nan=True):
                    return False
        return True

    def _sum(self, terms: Mapping[str, Term]) -> Tensor:
        keep = self._batch_dims()
        return add(sum_plates(t, keep, self._sizes.get(name, self.plate_sizes)).table for name, t in terms.items())

    def _batch_dims(self) -> frozenset[int]:
        return frozenset(plate.dim for plate in self.structure.batch)


def log_likelihood(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure) -> Tensor:
    """Log p(x) `[batch]` of a program without latents, scales common to all sites included, differentiable.

    Raises:
        ValueError: if sites are scaled differently.
    """
    scale = common_scale(structure, "ExactLikelihood")
    joint = LogJoint(program, args, kwargs, structure=structure, broadcasts=True)
    total = joint.total(joint.terms({}), 1)[0]
    return total * structure.to_batch(scale) if isinstance(scale, Tensor) and scale.dim() else total * scale


def _spots(latent: Latent, draws: Sequence[Mapping[str, Any]]) -> Tensor:
    """Three values `[3, *batch_shape, *event]` of a site: its ends and a random one, or those of draws of the program."""
    if not latent.finite:
        shape = latent.batch_shape + latent.event_shape
        return torch.stack([draw[latent.name].value.expand(shape) for draw in draws])
    codes = torch.randint(latent.cardinality, (3, *latent.batch_shape, latent.components), device=latent.device)
    codes[0], codes[1] = 0, latent.cardinality - 1
    return latent.decode(codes)
