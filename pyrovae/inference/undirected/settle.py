"""What learning leaves to a model's persistent chains, and whether chains mix."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.distributions.undirected import Undirected
from pyrovae.inference.arviz import split_rhat
from pyrovae.inference.undirected.block_chains import BoltzmannChains, RBMChains, chains_of

RHAT = 1.1  # of energies
UNIT_RHAT = 2**0.5  # of the worst unit: chains differ by as much as each varies over the sweeps
SETTLE = 200  # sweeps from data, for chains that no learning has moved


@dataclass(frozen=True)
class Mixing:
    """How chains moved over some sweeps.

    Attributes:
        sweeps: how many.
        energy: split R-hat of the chains' energies; nan where these never changed.
        units: the largest split R-hat of a unit, which sees modes of equal energy; where a unit only differs between
            chains, as if it had changed once; nan where no unit varied.
        moved: whether any unit changed in any chain.
    """

    sweeps: int
    energy: float
    units: float
    moved: bool

    @property
    def rhat(self) -> float | None:
        """The largest R-hat; None where there is no finite one."""
        found = [r for r in (self.energy, self.units) if not math.isnan(r)]
        return max(found) if found and math.isfinite(max(found)) else None

    def warn(self, what: str, instead: str, stacklevel: int) -> None:
        """Say so where chains stand still or apart."""
        if not self.moved:
            warnings.warn(f"{what} did not move at all in {self.sweeps} sweeps; {instead}", stacklevel=stacklevel + 1)
        elif self.energy > RHAT or self.units > UNIT_RHAT:  # nan is not
            warnings.warn(
                f"{what} have not mixed: R-hat over {self.sweeps} sweeps at the last parameters is {self.energy:.2f} of their "
                f"energies and up to {self.units:.2f} of a unit, above {RHAT} or {UNIT_RHAT:.2f}; {instead}",
                stacklevel=stacklevel + 1,
            )


@torch.no_grad()
def mixing(chains: RBMChains | BoltzmannChains, distribution: Undirected, sweeps: int) -> Mixing:
    """Sweep on, and compare the chains' halves: one energy a sweep, and the sum of each unit over either half, are kept."""
    sweeps -= sweeps % 2
    states = state_of_chains(chains)
    first, sums, energies = states.clone(), states.new_zeros(2, *states.shape), []
    moved = False
    for sweep in range(sweeps):
        chains.sweep(distribution)
        states = state_of_chains(chains)
        moved = moved or not torch.equal(states, first)
        sums[2 * sweep // sweeps] += states
        energies.append(chains.energy(distribution))
    # bits have the same ranks as values: this is the rank-normalised R-hat
    length = sweeps // 2
    p = (sums.double() / length).flatten(0, 1)  # means of half chains
    within = (p * (1 - p)).mean(0) * length / (length - 1)
    least = 1 / (length * len(p))  # one change in one half chain, so that chains that stand apart get a finite number
    ratio = (length - 1) / length + p.var(0) / within.clamp_min(least)
    ratio[p.var(0) == 0] = math.nan  # a unit that never varies
    largest = float(ratio[~ratio.isnan()].max().sqrt()) if bool((~ratio.isnan()).any()) else math.nan
    return Mixing(sweeps, float(split_rhat(torch.stack(energies, 1).double())), largest, moved)


def state_of_chains(chains: RBMChains | BoltzmannChains) -> Tensor:
    """Visible units of an RBM, all of a Boltzmann machine, `[C, units]`: what persistent chains keep."""
    return chains.visible if isinstance(chains, RBMChains) else chains.states


def leave(distribution: Undirected, states: Tensor) -> None:
    """Give the distribution's persistent chains, if it has some, states `[C, units]`, repeated where it has more chains."""
    if distribution.chains is not None:
        rows = torch.arange(distribution.chains.num_chains, device=states.device) % len(states)
        distribution.chains.put(states[rows])


@torch.no_grad()
def settle(distribution: Undirected, visible: Tensor, sweeps: int = SETTLE) -> None:
    """Start the distribution's persistent chains, if it has some, anew from given visible states, and sweep.

    Warns where they have not mixed over the second half of the sweeps.

    Args:
        distribution: at its last parameters.
        visible: rows `[N, D]` of data, or of draws of the layer given data.
        sweeps: how many.
    """
    if distribution.chains is None:
        return
    rows = torch.randperm(len(visible), device=visible.device)
    rows = rows[torch.arange(distribution.chains.num_chains, device=rows.device) % len(rows)]
    chains = chains_of(distribution, visible[rows])
    chains.sweep(distribution, sweeps // 2)
    found = mixing(chains, distribution, sweeps - sweeps // 2)
    leave(distribution, state_of_chains(chains))
    found.warn(
        "the chains that later draws come from", "draw with ParallelTempering(...).sample instead of model.sample", stacklevel=4
    )
