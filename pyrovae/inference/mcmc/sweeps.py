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
from pyrovae.inference.exact.elimination import Term, add
from pyrovae.inference.exact.enumeration import Enumeration
from pyrovae.inference.log_joint import LogJoint

Codes = dict[str, Tensor]  # {site: [C, *batch_shape, components]}, int64


class TableSweep:
    """Sweeps on the table of p(x, z), `[rows, states]`.

    Probabilities below e^-700 of a row's largest count as equal to one another, so that a sweep needs neither logarithms
    nor exponentials: two look-ups and three flops a bit. The table is float64 whatever the program computes in: in float32
    all states 80 nats below the best would be alike, and chains that start there lost.

    Args:
        space: the enumeration of a program with one level, in one chunk.
        chains: number of chains C.

    Raises:
        ValueError: if log p(x, z) is NaN somewhere, or a row of the data has probability 0.
    """

    def __init__(self, space: Enumeration, chains: int) -> None:
        self.latents, self.axes = space.structure.latents, space.level_axes(0)
        depth = space.structure.plate_depth
        plates = tuple(space.plate_sizes[dim] if dim in space.levels[0] else 1 for dim in range(-depth, 0))
        log_joint = add(space.level_tables(space.terms().values(), 0, None))
        log_joint = log_joint.expand((*log_joint.shape[: log_joint.dim() - depth], *plates))
        self.shape = (chains, math.prod(plates))
        flat = log_joint.reshape(-1, self.shape[1]).double()
        self.states = len(flat)
        best = flat.amax(0)  # NaN where one state's is
        _check_numbers(best)
        if bool(best.isneginf().any()):
            raise ValueError("expected data that the program can produce, got a row of probability 0 at every state")
        # A row's states lie together: the likely ones of neighbouring numbers share cache lines.
        self.table = (flat - best).clamp_min(-700.0).exp().T.reshape(-1)
        self.first = torch.arange(0, self.states * self.shape[1], self.states, device=flat.device)
        self.steps = self._steps()
        self.position = self.first.expand(self.shape)  # of each chain and row in the table
        self.offsets = [torch.zeros(self.shape, dtype=torch.long, device=flat.device) for _ in self.steps]

    def start(self, codes: Codes) -> None:
        """Set the chains to a state."""
        number = torch.zeros(self.shape, dtype=torch.long, device=self.table.device)
        for axis in self.axes:
            number = number * axis.size + axis.index(codes).reshape(self.shape)
        self.position = number + self.first
        self.offsets = [number // step % cardinality * step for step, cardinality in self.steps]

    def sweep(self) -> None:
        """Draw every component of every row and chain once from its conditional."""
        uniform = torch.rand((len(self.steps), *self.shape), dtype=self.table.dtype, device=self.table.device)
        for j, (step, cardinality) in enumerate(self.steps):
            rest = self.position - self.offsets[j]
            if cardinality == 2:
                p_one = torch.take(self.table, rest + step)
                total = torch.take(self.table, rest).add_(p_one)
                self.offsets[j] = (total.mul_(uniform[j]) < p_one) * step
            else:
                values = step * torch.arange(cardinality, device=rest.device).reshape(-1, 1, 1)
                cumulative = torch.take(self.table, rest + values).cumsum(0)
                code = (cumulative <= uniform[j] * cumulative[-1]).sum(0).clamp_max(cardinality - 1)
                self.offsets[j] = code * step
            self.position = rest.add_(self.offsets[j])

    def snapshot(self) -> Tensor:
        """The present state of every chain and row, `[C, rows]`, as numbers of joint states."""
        return (self.position - self.first).to(torch.int16 if self.states < 2**15 else torch.int32)

    def decode(self, snapshots: Tensor) -> Codes:
        """Codes `{site: [K, *batch_shape, components]}`, uint8 or wider, of snapshots `[K, rows]`."""
        numbers, found = snapshots, {}
        for axis in reversed(self.axes):
            sites = {site.name: site for site in axis.sites}
            own = numbers % axis.size if len(self.axes) > 1 else numbers
            for name, codes in axis.site_codes(own).items():
                site = sites[name]
                found[name] = codes.to(code_dtype(site)).reshape((len(codes), *site.batch_shape, site.components))
            numbers = numbers // axis.size
        return found

    def present(self) -> Codes:
        """The present codes `{site: [C, *batch_shape, components]}`."""
        return self.decode(self.snapshot())

    @property
    def evaluations_per_sweep(self) -> int:
        """None beyond those of the table."""
        return 0

    def _steps(self) -> list[tuple[int, int]]:
        """(Place value in the number of the state, cardinality) of each component, in the program's order."""
        place, steps = 1, dict[str, list[tuple[int, int]]]()
        for axis in reversed(self.axes):
            for site in reversed(axis.sites):
                steps[site.name] = [(place * site.cardinality**j, site.cardinality) for j in reversed(range(site.components))]
                place *= site.num_states
        return [step for latent in self.latents for step in steps[latent.name] if step[1] > 1]


class ProgramSweep:
    """Sweeps by the program's own log joint, for any plates, global latents included.

    Costs, for each component, one run of the program for all chains and rows (K − 1 states of a K-valued component).

    Args:
        log_joint: of the program.
        chains: number of chains C.

    Attributes:
        powers: exponents of sites' probabilities in the conditionals, 1 where none is given.
        fixed: values `[C, *batch_shape, *event]` of the latents that are not finite, which a sweep conditions on.
        current: log probabilities of every site at the present state, without those exponents.
    """

    def __init__(self, log_joint: LogJoint, chains: int) -> None:
        self.log_joint, self.chains = log_joint, chains
        self.latents = tuple(latent for latent in log_joint.structure.latents if latent.finite)
        self.powers: dict[str, float] = {}
        self.fixed: dict[str, Tensor] = {}
        self.codes: Codes = {}
        self.current: dict[str, Term] = {}

    def start(self, codes: Codes) -> None:
        """Set the chains to a state."""
        self.codes = {name: value.clone() for name, value in codes.items()}
        self.current = self._terms(self.codes)
        for term in self.current.values():
            _check_numbers(term.table)

    def sweep(self) -> None:
        """Draw every component of every row and chain once from its conditional."""
        for latent in self.latents:
            for j in range(latent.components):
                self._update(latent, j)

    def snapshot(self) -> Codes:
        """The present codes, uint8 or wider."""
        return {latent.name: self.codes[latent.name].to(code_dtype(latent)) for latent in self.latents}

    def present(self) -> Codes:
        """The present codes `{site: [C, *batch_shape, components]}`."""
        return self.codes

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
        pick = (cumulative <= u * cumulative[-1]).sum(0).clamp_max(others)  # 0 stays
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
            change = (table - term.table) * self.powers.get(name, 1.0)
            for dim in term.plate_dims - latent.plate_dims:
                change = change.sum(dim, keepdim=True) if change.shape[dim] > 1 else change * sizes[dim]
            total = total + change
        assert isinstance(total, Tensor)
        return total.expand((others, self.chains, *shape))

    def _select(self, pick: Tensor, present: Term, proposed: Term, others: int) -> Term:
        """The term of the state that was picked, row by row."""
        if proposed.table.shape[0] < others * self.chains:
            return proposed  # the same at every state
        table = proposed.table.reshape((others, -1, *proposed.table.shape[1:]))
        result = present.table
        for k in range(others):
            result = torch.where(pick == k + 1, table[k], result)
        return Term(result, present.plate_dims, 0)

    def _terms(self, codes: Codes) -> dict[str, Term]:
        """Log probabilities by site; −inf as a number so small that differences of impossible states stay numbers."""
        states = {latent.name: latent.decode(codes[latent.name]) for latent in self.latents}
        repeats = len(next(iter(states.values()))) // self.chains
        states |= {name: value.repeat((repeats,) + (1,) * (value.dim() - 1)) for name, value in self.fixed.items()}
        terms = self.log_joint.terms(states)
        return {
            name: Term(term.table.clamp_min(-1e300 if term.table.dtype == torch.float64 else -1e30), term.plate_dims, 0)
            for name, term in terms.items()
        }


def _check_numbers(log_joint: Tensor) -> None:
    if bool(log_joint.isnan().any()):
        raise ValueError("expected log p(x, z) to be a number at every state, got NaN; look at the parameters and the data")


def code_dtype(latent: Latent) -> torch.dtype:
    """The smallest integers that hold a site's codes."""
    return torch.uint8 if latent.cardinality <= 256 else torch.int32
