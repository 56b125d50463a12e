"""Where the negative phase of learning takes its states: chains that persist, restart at the data, or are tempered."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pyrovae.distributions.rbm import RBM
from pyrovae.distributions.undirected import Undirected
from pyrovae.inference.undirected.block_chains import BoltzmannChains, RBMChains, chains_of
from pyrovae.inference.undirected.tempering import Ladder


class NegativePhase(Protocol):
    """Draws states of the present distribution.

    `start` are rows of data, and their hidden units: means `[B, H]` under an RBM, all units' states `[B, n]` otherwise.
    The states are v `[C, D]` and p(h = 1 | v) `[C, H]` of an RBM, all units `[C, n]` and None of a Boltzmann machine. They are
    the chains' own, not copies.
    """

    def __call__(self, distribution: Undirected, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor | None]:
        """The states."""

    @property
    def chain_sweeps(self) -> int:
        """Sweeps of one chain that a call makes, over all chains."""


class Persistent:
    """Persistent contrastive divergence: chains go on where the last parameters left them.

    Args:
        distribution: of the chains.
        visible: first visible states `[C, D]`.
        k: sweeps a call.
    """

    def __init__(self, distribution: Undirected, visible: Tensor, k: int) -> None:
        self.chains, self.k = chains_of(distribution, visible), k
        self.chain_sweeps = k * len(visible)

    def __call__(self, distribution: Undirected, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sweep on."""
        self.chains.sweep(distribution, self.k)
        return _states(self.chains)


class Restarted:
    """Contrastive divergence: a chain for each row of data, which starts there.

    Args:
        distribution: of the chains.
        rows: B.
        k: sweeps a call.
    """

    def __init__(self, distribution: Undirected, rows: int, k: int) -> None:
        blank = distribution.parameters[0].new_zeros(rows, distribution.event_shape[0])
        self.chains, self.k, self.chain_sweeps = chains_of(distribution, blank), k, k * rows

    def __call__(self, distribution: Undirected, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor | None]:
        """Begin at x and h ~ p(h | x), and sweep."""
        if isinstance(self.chains, RBMChains):
            self.chains.hidden.uniform_().lt_(start)
        else:
            self.chains.states.copy_(start)
        self.chains.sweep(distribution, self.k)
        return _states(self.chains)


class Tempered:
    """Chains at β = 1 of a ladder of temperatures that persists.

    Args:
        ladder: the chains.
        k: rounds a call.
    """

    def __init__(self, ladder: Ladder, k: int) -> None:
        self.ladder, self.k = ladder, k
        self.chain_sweeps = k * ladder.num_sweeps * ladder.row.numel()

    @torch.no_grad()
    def __call__(self, distribution: Undirected, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sweep and exchange."""
        for _ in range(self.k):
            self.ladder.round(distribution)
        chains, cold = self.ladder.chains, self.ladder.row[0]
        if isinstance(chains, RBMChains):
            assert isinstance(distribution, RBM)
            v = chains.visible[cold]
            return v, torch.addmm(distribution.c, v, distribution.W).sigmoid_()
        return chains.states[cold], None


def _states(chains: RBMChains | BoltzmannChains) -> tuple[Tensor, Tensor | None]:
    return (chains.visible, chains.probs) if isinstance(chains, RBMChains) else (chains.states, None)
