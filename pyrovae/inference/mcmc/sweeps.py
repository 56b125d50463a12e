"""One Gibbs sweep over the components of finite latents, for many chains and all rows at once.

Two ways to the same conditionals. :class:`TableSweep` looks them up in a table of the joint, where 2^bits x rows fits;
:class:`ProgramSweep` evaluates the program at the changed state only, carrying the log probabilities of the present one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyrovae.handlers.structure import Latent
from pyrovae.inference.elimination import Term, add
from pyrovae.inference.enumeration import Enumeration
from pyrovae.inference.log_joint import LogJoint

Codes = dict[str, Tensor]  # {site: [C, *batch_shape, components]}, int64


class TableSweep:
    """Sweeps on the table of p(x, z), `[states, rows]`.

    Probabilities below e^-700 of a row's largest (e^-80 in float32) count as equal to one another, so that a sweep needs
    neither logarithms nor exponentials. Costs three look-ups and three flops a bit.

    Args:
        space: the enumeration of a program with one level, in one chunk.
        chains: number of chains C.
    """

    def __init__(self, space: Enumeration, chains: int) -> None:
        self.latents = space.structure.latents
        self.axes = space.level_axes(0)
        depth = space.structure.plate_depth
        plates = tuple(space.plate_sizes[dim] if dim in space.levels[0] else 1 for dim in range(-depth, 0))
        tables = space.level_tables(space.terms().values(), 0, None)
        log_joint = add(tables)
        log_joint = log_joint.expand((*log_joint.shape[: log_joint.dim() - depth], *plates))
        self.shape = (chains, math.prod(plates))
        flat = log_joint.reshape(-1, self.shape[1])  # [S, rows]
        floor = -700.0 if flat.dtype == torch.float64 else -80.0
        self.table = (flat - flat.amax(0)).clamp_min(floor).exp().reshape(-1)
        self.rows = torch.arange(self.shape[1], device=flat.device).expand(self.shape)
        self.state = torch.zeros(self.shape, dtype=torch.long, device=flat.device)  # index into `table`
        self.components = self._components()

    def start(self, codes: Codes) -> None:
        """Set the chains to a state."""
        index = torch.zeros_like(self.state)
        for axis in self.axes:
            number = axis.index(codes).reshape(self.shape)
            index = index * axis.size + number
        self.state = index * self.shape[1] + self.rows

    def sweep(self) -> None:
        """Draw every component of every row and chain once from its conditional, in place."""
        uniform = torch.rand((len(self.components), *self.shape), dtype=self.table.dtype, device=self.table.device)
        for (step, cardinality), u in zip(self.components, uniform, strict=True):
            base = self.state - (self.state // step) % cardinality * step
            if cardinality == 2:
                one = base + step
                p_one = torch.take(self.table, one)
                taken = u.mul_(torch.take(self.table, base).add_(p_one)) < p_one
                self.state = torch.where(taken, one, base)
            else:
                several = base + step * torch.arange(cardinality, device=base.device).reshape(-1, 1, 1)
                cumulative = torch.take(self.table, several).cumsum(0)
                code = (cumulative < u * cumulative[-1]).sum(0).clamp_max(cardinality - 1)
                self.state = base + step * code

    def snapshot(self) -> Tensor:
        """The present state of every chain and row, `[C, rows]`, as numbers of joint states."""
        number = self.state // self.shape[1]
        return number.to(torch.int16 if len(self.table) // self.shape[1] < 2**15 else torch.int32)

    def decode(self, snapshots: Tensor) -> Codes:
        """Codes `{site: [K, *batch_shape, components]}`, uint8 or wider, of snapshots `[K, rows]`."""
        numbers, found = snapshots.long(), {}
        for axis in reversed(self.axes):
            for name, codes in axis.site_codes(numbers % axis.size).items():
                site = next(latent for latent in axis.sites if latent.name == name)
                found[name] = codes.to(code_dtype(site)).reshape((len(codes), *site.batch_shape, site.components))
            numbers = numbers // axis.size
        return found

    @property
    def evaluations_per_sweep(self) -> int:
        """None beyond those of the table."""
        return 0

    def _components(self) -> list[tuple[int, int]]:
        """(step in the table, cardinality) of each component, in the program's order."""
        place = self.shape[1]
        steps: dict[str, list[tuple[int, int]]] = {}
        for axis in reversed(self.axes):
            for site in reversed(axis.sites):
                own = []
                for _ in range(site.components):
                    own.append((place, site.cardinality))
                    place *= site.cardinality
                steps[site.name] = own[::-1]
        return [step for latent in self.latents for step in steps[latent.name] if step[1] > 1]


class ProgramSweep:
    """Sweeps by the program's own log joint, for any plates, global latents included.

    Costs, for each component, one run of the program for all chains and rows (K − 1 states of a K-valued component).

    Args:
        log_joint: of the program.
        chains: number of chains C.
    """

    def __init__(self, log_joint: LogJoint, chains: int) -> None:
        self.log_joint, self.chains = log_joint, chains
        self.latents = log_joint.structure.latents
        self.codes: Codes = {}
        self.current: dict[str, Term] = {}

    def start(self, codes: Codes) -> None:
        """Set the chains to a state."""
        self.codes = {name: value.clone() for name, value in codes.items()}
        self.current = self._terms(self.codes)

    def sweep(self) -> None:
        """Draw every component of every row and chain once from its conditional."""
        for latent in self.latents:
            for j in range(latent.components):
                self._update(latent, j)

    def snapshot(self) -> Codes:
        """The present codes, uint8 or wider."""
        return {latent.name: self.codes[latent.name].to(code_dtype(latent)) for latent in self.latents}

    @property
    def evaluations_per_sweep(self) -> int:
        """Values of log p(x, z) that one sweep of all chains computes."""
        rows = math.prod(self.log_joint.structure.batch_shape)
        return self.chains * rows * sum(s.components * (s.cardinality - 1) for s in self.latents)

    def _update(self, latent: Latent, j: int) -> None:
        old = self.codes[latent.name]
        others = latent.cardinality - 1
        # The K − 1 other values, stacked before the chains: [(K−1) C, *batch_shape, n].
        changed = old.repeat((others,) + (1,) * (old.dim() - 1)).reshape((others, *old.shape))
        shift = torch.arange(1, latent.cardinality, device=old.device).reshape((-1,) + (1,) * (old.dim() - 1))
        changed[..., j] = (old[..., j] + shift) % latent.cardinality
        stacked = {
            name: changed.flatten(0, 1) if name == latent.name else value.repeat((others,) + (1,) * (value.dim() - 1))
            for name, value in self.codes.items()
        }
        proposed = self._terms(stacked)
        gain = self._gain(latent, proposed, others)  # [K−1, C, plates of the site]
        log_weights = torch.cat((torch.zeros_like(gain[:1]), gain))
        cumulative = torch.softmax(log_weights, 0).cumsum(0)
        u = torch.rand(cumulative.shape[1:], dtype=cumulative.dtype, device=cumulative.device)
        pick = (cumulative < u * cumulative[-1]).sum(0).clamp_max(others)  # 0 stays
        own = pick.reshape((self.chains, *latent.batch_shape))
        self.codes[latent.name][..., j] = (old[..., j] + own) % latent.cardinality
        for name, term in self.current.items():
            if latent.plate_dims <= term.plate_dims:
                self.current[name] = self._select(pick, term, proposed[name], others)

    def _gain(self, latent: Latent, proposed: Mapping[str, Term], others: int) -> Tensor:
        """Log p(changed) − log p(present) of the terms inside the site's plates."""
        sizes = self.log_joint.plate_sizes
        depth = self.log_joint.structure.plate_depth
        shape = [sizes[d] if d in latent.plate_dims else 1 for d in range(-depth, 0)]
        total: Tensor | float = 0.0
        for name, term in self.current.items():
            if not latent.plate_dims <= term.plate_dims:
                continue  # outside the site's plates: it cannot depend on one row's value
            table = proposed[name].table
            table = table.reshape((others, -1, *table.shape[1:])) if table.shape[0] > 1 else table.unsqueeze(0)
            change = table - term.table
            for dim in term.plate_dims - latent.plate_dims:
                change = change.sum(dim, keepdim=True) if change.shape[dim] > 1 else change * sizes[dim]
            total = total + change
        assert isinstance(total, Tensor)
        return total.expand((others, self.chains, *shape))

    def _select(self, pick: Tensor, present: Term, proposed: Term, others: int) -> Term:
        """The term of the state that was picked, row by row."""
        if proposed.table.shape[0] == 1:
            return proposed
        table = proposed.table.reshape((others, -1, *proposed.table.shape[1:]))
        result = present.table
        for k in range(others):
            result = torch.where(pick == k + 1, table[k], result)
        return Term(result, present.plate_dims, 0)

    def _terms(self, codes: Codes) -> dict[str, Term]:
        return self.log_joint.terms({latent.name: latent.decode(codes[latent.name]) for latent in self.latents})


def code_dtype(latent: Latent) -> torch.dtype:
    """The smallest integers that hold a site's codes."""
    return torch.uint8 if latent.cardinality <= 256 else torch.int32
