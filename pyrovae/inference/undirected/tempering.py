"""Parallel tempering of undirected models: chains at a ladder of temperatures that exchange their states."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.distributions.rbm import RBM
from pyrovae.distributions.undirected import Undirected
from pyrovae.inference.arviz import split_rhat
from pyrovae.inference.undirected.block_chains import chains_of
from pyrovae.inference.undirected.energy import energy_of


class ParallelTempering:
    """Draw from an RBM or Boltzmann machine with several modes: the chain at β = 1 gets its states from hotter ones.

    Each of `num_chains` replicas has T chains, at p_β(x) ∝ exp(−β E(x) + (1 − β) b₀ᵀx), β from 1 to 0, where x are all units,
    hidden ones too. In turn, all chains take `num_sweeps` block-Gibbs sweeps, and neighbours exchange states with probability
    min(1, exp((β_i − β_k) (U(x_i) − U(x_k)))), U = E + b₀ᵀx: pairs (0, 1), (2, 3), … and (1, 2), (3, 4), … alternately. The
    product of all p_β is left invariant, exactly; draws are biased only as far as the chains had no time to forget their start.

    Use it as a sampler, :meth:`sample`, and as the negative phase of :class:`pyrovae.inference.ContrastiveDivergence`.

    Cost of a round: `num_sweeps` sweeps of T · `num_chains` chains, all in one batch (two matrix products a sweep for an RBM).

    Args:
        num_temperatures: T, where `betas` is None: evenly spaced from 1 to 0.
        num_chains: replicas of the ladder.
        betas: inverse temperatures, decreasing from 1; the last is best 0, where draws are independent.
        num_sweeps: Gibbs sweeps between exchanges.
        warmup: rounds before the first draw of :meth:`sample`, or before the first step of learning.
        adapt: move the temperatures so that all pairs exchange equally often: after 1/8, 1/4 and 1/2 of the warm-up; in
            learning, where the distribution changes, after 1/8, 1/4 and 1/2 of all steps.
        base_bias: b₀ of the first units, such as the logit of the data's mean; None is 0: uniform at β = 0.

    Raises:
        ValueError: for numbers below 1, or betas that do not decrease from 1 to something not negative.

    Example:
        >>> from pyrovae.distributions import RBM
        >>> rbm = RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
        >>> found = ParallelTempering(3, 4).sample(rbm, 10)
        >>> tuple(found.draws.shape), found.swap_rates.tolist()
        ((4, 10, 3), [1.0, 1.0])

    References:
        Parallel tempering is efficient for learning restricted Boltzmann machines (Cho et al., 2010)
        https://doi.org/10.1109/IJCNN.2010.5596837
        Parallel Tempering for Training of Restricted Boltzmann Machines (Desjardins et al., 2010)
        https://proceedings.mlr.press/v9/desjardins10a.html
        Non-Reversible Parallel Tempering: a Scalable Highly Parallel MCMC Scheme (Syed et al., 2022)
        https://arxiv.org/abs/1905.02939
    """

    def __init__(
        self,
        num_temperatures: int = 10,
        num_chains: int = 100,
        *,
        betas: Sequence[float] | Tensor | None = None,
        num_sweeps: int = 1,
        warmup: int = 100,
        adapt: bool = False,
        base_bias: Tensor | None = None,
    ) -> None:
        if betas is None:
            if not isinstance(num_temperatures, int) or num_temperatures < 2:
                raise ValueError(f"expected an integer num_temperatures >= 2, got {num_temperatures!r}")
            betas = torch.linspace(1.0, 0.0, num_temperatures, dtype=torch.float64)
        ladder = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
        if ladder.dim() != 1 or len(ladder) < 2 or ladder[0] != 1 or not ladder[-1] >= 0 or not bool((ladder.diff() < 0).all()):
            raise ValueError(f"expected betas that decrease from 1 to at least 0, two or more, got {ladder.tolist()}")
        for name, (number, least) in {
            "num_chains": (num_chains, 1),
            "num_sweeps": (num_sweeps, 1),
            "warmup": (warmup, 0),
        }.items():
            if not isinstance(number, int) or number < least:
                raise ValueError(f"expected an integer {name} >= {least}, got {number!r}")
        if base_bias is not None and (
            not isinstance(base_bias, Tensor) or base_bias.dim() != 1 or not bool(torch.isfinite(base_bias).all())
        ):
            got = f"shape {list(base_bias.shape)}" if isinstance(base_bias, Tensor) else type(base_bias).__name__
            nan = "" if not isinstance(base_bias, Tensor) else f", {int((~torch.isfinite(base_bias)).sum())} infinite or NaN"
            raise ValueError(
                f"expected a finite base_bias [D], a number for each of the first units, got {got}{nan}; of a mean of 0 or 1 "
                "take the logit of a smoothed one, (sum + 1) / (N + 2)"
            )
        self.num_temperatures, self.num_chains, self.betas, self.num_sweeps = len(ladder), num_chains, ladder, num_sweeps
        self.warmup, self.adapt, self.base_bias = warmup, adapt, base_bias

    def sample(self, target: Any, num_draws: int = 1000, *args: Any, **kwargs: Any) -> TemperedDraws:
        """Draw from the distribution of a target.

        All chains start at fair coins. Warns where fewer than one chain in a hundred pairs exchanges, or no state has
        travelled from β = 1 to the last temperature and back.

        Args:
            target: an RBM, a BoltzmannMachine, a model that has one, or a program, see
                :func:`pyrovae.inference.undirected.energy.energy_of`.
            num_draws: draws of each chain, one a round.
            *args: arguments of the program.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: for `num_draws` below 1, or a target without one such distribution.
        """
        if not isinstance(num_draws, int) or num_draws < 1:
            raise ValueError(f"expected an integer num_draws >= 1, got {num_draws!r}")
        begin = time.perf_counter()
        distribution = energy_of(target, *args, **kwargs)
        ladder = Ladder(self, distribution)
        ladder.run(distribution, self.warmup, adapt=self.adapt)
        ladder.forget()
        draws = []
        for _ in range(num_draws):
            ladder.round(distribution)
            draws.append(ladder.cold().clone())
        found = TemperedDraws(
            draws=torch.stack(draws, 1),
            betas=ladder.betas,
            swap_rates=ladder.swap_rates,
            round_trips=ladder.round_trips,
            seconds=time.perf_counter() - begin,
            distribution=distribution,
        )
        ladder.warn(stacklevel=3)
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class TemperedDraws:
    """What :meth:`ParallelTempering.sample` found.

    Attributes:
        draws: states of the distribution's units at β = 1, `[chain, draw, n]`, in {0, 1}.
        betas: the ladder, after adaptation, `[T]`.
        swap_rates: the share of proposed exchanges that were accepted, of each pair of neighbours, `[T - 1]`.
        round_trips: how often a state went from β = 1 to the last temperature and back, over all replicas, warm-up left out.
        seconds: wall time.
        distribution: what was drawn from; its tensors are those of the target.
    """

    draws: Tensor
    betas: Tensor
    swap_rates: Tensor
    round_trips: int
    seconds: float
    distribution: Undirected = field(repr=False)

    @property
    def samples(self) -> Tensor:
        """All draws in one row, `[chain * draw, n]`."""
        return self.draws.flatten(0, 1)

    @property
    def rhat(self) -> Tensor:
        """Split R-hat of each unit over chains, `[n]`; nan of units that never changed, and for one chain."""
        return split_rhat(self.draws.double())


class Ladder:
    """The chains of one :class:`ParallelTempering`: T · C rows, each with a place on its replica's ladder.

    States stay in their rows and temperatures wander.

    Args:
        method: the options.
        distribution: of the chains.
        visible: first visible states `[T * C, D]`; None draws fair coins.
    """

    def __init__(self, method: ParallelTempering, distribution: Undirected, visible: Tensor | None = None) -> None:
        like = distribution.parameters[0].detach()
        self.num_sweeps, (T, C) = method.num_sweeps, (method.num_temperatures, method.num_chains)
        self.betas = method.betas.to(like.device)
        if visible is None:
            visible = (torch.rand(T * C, distribution.event_shape[0], device=like.device) < 0.5).to(like)
        _check_base(method.base_bias, distribution)
        self.chains = chains_of(distribution, visible, method.base_bias)
        self.dtype = like.dtype
        self.row = torch.arange(T * C, device=like.device).view(T, C)  # which row is at place t of replica c
        self.parity = 0
        self._visited = torch.zeros(T * C, dtype=torch.int8, device=like.device)  # 1: β = 1, 2: then the last
        self.forget()

    def round(self, distribution: Undirected) -> None:
        """Sweep all chains, then exchange."""
        inverse = torch.empty(self.row.numel(), dtype=self.dtype, device=self.row.device)
        inverse[self.row] = self.betas.to(self.dtype).unsqueeze(-1).expand_as(self.row)
        self.chains.sweep(distribution, self.num_sweeps, inverse.unsqueeze(-1))
        self.exchange(self.chains.energy(distribution))

    def exchange(self, energy: Tensor) -> None:
        """Offer every second pair of neighbours an exchange; `energy [T * C]` is U of each row."""
        u = energy.double()[self.row]  # [T, C]
        log_ratio = (self.betas[:-1] - self.betas[1:]).unsqueeze(-1) * (u[:-1] - u[1:])  # [T - 1, C]
        accept = torch.rand_like(log_ratio).log() < log_ratio
        self._rejection += 1 - log_ratio.clamp(max=0).exp().mean(1)
        self._energies += 1
        offered = torch.zeros(len(accept), dtype=torch.bool, device=accept.device)
        offered[self.parity :: 2] = True
        self.parity = 1 - self.parity
        accept &= offered.unsqueeze(-1)
        self._accepted += accept.sum(1)
        self._offered += offered * accept.shape[1]
        upper, lower = self.row[:-1], self.row[1:]
        swapped = self.row.clone()
        swapped[:-1] = torch.where(accept, lower, swapped[:-1])
        swapped[1:] = torch.where(accept, upper, swapped[1:])
        self.row = swapped
        self._follow()

    def run(self, distribution: Undirected, rounds: int, *, adapt: bool = False) -> None:
        """Rounds of a warm-up; with `adapt` the temperatures move after 1/8, 1/4 and 1/2 of them."""
        moves = moves_of(rounds) if adapt else set()
        for done in range(1, rounds + 1):
            self.round(distribution)
            if done in moves:
                self.equalise()
                self.forget()

    def equalise(self) -> None:
        """Move the inner temperatures so that every pair is expected to reject equally often (Syed et al., section 5)."""
        rejection = (self._rejection / max(1, self._energies)).clamp_min(1e-6)
        barrier = torch.cat([rejection.new_zeros(1), rejection.cumsum(0)])
        wanted = torch.linspace(0, 1, len(barrier), dtype=barrier.dtype, device=barrier.device) * barrier[-1]
        place = torch.searchsorted(barrier, wanted).clamp(1, len(barrier) - 1)
        share = (wanted - barrier[place - 1]) / (barrier[place] - barrier[place - 1])
        betas = self.betas[place - 1] + share * (self.betas[place] - self.betas[place - 1])
        betas[0], betas[-1] = self.betas[0], self.betas[-1]
        self.betas = betas

    def cold(self) -> Tensor:
        """Visible states at β = 1, `[C, D]`, a copy."""
        return self.chains.visible[self.row[0]]

    def forget(self) -> None:
        """Count exchanges and round trips anew."""
        pairs = len(self.betas) - 1
        self._accepted, self._offered, self._rejection = self.betas.new_zeros(3, pairs)
        self._energies, self.round_trips = 0, 0
        self._visited.zero_()
        self._visited[self.row[0]] = 1

    @property
    def swap_rates(self) -> Tensor:
        """The share of exchanges accepted, `[T - 1]`; nan where none was offered."""
        return self._accepted / self._offered

    def warn(self, stacklevel: int) -> None:
        """Say so where the ladder does not work."""
        rates = self.swap_rates
        if rates.isnan().all():
            return
        lowest = min((rate, pair) for pair, rate in enumerate(rates.tolist()) if not math.isnan(rate))
        if lowest[0] < 0.01 or self.round_trips == 0:
            betas = [round(float(beta), 3) for beta in self.betas[lowest[1] : lowest[1] + 2]]
            warnings.warn(
                f"{self.round_trips} round trips between β = 1 and β = {float(self.betas[-1]):g}; the lowest swap rate is "
                f"{lowest[0]:.3g}, between β = {betas[0]} and {betas[1]}: draws at β = 1 come from few hot states; use more "
                "temperatures, adapt=True, a base_bias, or more rounds",
                stacklevel=stacklevel,
            )

    def _follow(self) -> None:
        """Count the states that came back to β = 1 after the last temperature."""
        top, bottom = self.row[0], self.row[-1]
        self.round_trips += int((self._visited[top] == 2).sum())
        self._visited[top] = 1
        self._visited[bottom] = torch.where(self._visited[bottom] == 1, 2, self._visited[bottom])


def moves_of(rounds: int) -> set[int]:
    """After which of so many rounds, or steps, an adaptive ladder moves its temperatures."""
    return {rounds // 8, rounds // 4, rounds // 2} - {0}


def _check_base(base_bias: Tensor | None, distribution: Undirected) -> None:
    """A base bias has a number for each visible unit of an RBM, or for each of the first units of a Boltzmann machine."""
    if base_bias is None:
        return
    units = distribution.parameters[1].shape[0]
    fits = len(base_bias) == units if isinstance(distribution, RBM) else 1 <= len(base_bias) <= units
    if not fits:
        wanted = f"[{units}]" if isinstance(distribution, RBM) else f"of 1 to {units} units"
        raise ValueError(f"expected base_bias {wanted}, got {list(base_bias.shape)}")
