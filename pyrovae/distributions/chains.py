"""Markov chains that persist from one evaluation of a distribution to the next."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class PersistentChains(nn.Module):
    """States of block-Gibbs chains at an RBM or Boltzmann machine, which stand for samples of it.

    The negative phase of learning: `log_prob` of a distribution that holds them advances them by `num_sweeps` sweeps
    whenever it is evaluated in grad mode at parameters that require a gradient, never else. They are buffers, saved and
    moved with the module that owns them. Fresh chains start at fair coins.

    Args:
        num_chains: how many.
        num_sweeps: sweeps (all units once) an evaluation.
        units: units of one state: D of an RBM, n of a Boltzmann machine; None takes them from the first distribution.

    Attributes:
        states: `[num_chains, units]`, in {0, 1}.
        advanced: whether learning has ever moved them, or put them somewhere: else draws are those of a few sweeps from coins.
        held: while True, the chains stay where they are.

    Raises:
        ValueError: for numbers below 1.

    References:
        Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient (Tieleman, 2008)
        https://doi.org/10.1145/1390156.1390290
    """

    capturable: ClassVar[bool] = True
    states: Tensor
    advanced: Tensor

    def __init__(self, num_chains: int = 100, num_sweeps: int = 1, *, units: int | None = None) -> None:
        super().__init__()
        for name, number in (("num_chains", num_chains), ("num_sweeps", num_sweeps), ("units", 1 if units is None else units)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"expected an integer {name} >= 1, got {number!r}")
        self.num_chains, self.num_sweeps, self.held = num_chains, num_sweeps, False
        self.register_buffer("states", torch.empty(0) if units is None else _coins(num_chains, units, torch.empty(0)))
        self.register_buffer("advanced", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def advance(self, distribution: Any) -> Tensor:
        """Move all chains on by `num_sweeps`, and return a copy of their states `[num_chains, units]`."""
        states = self._states(distribution).clone()
        if self.held:
            return states
        distribution.sweep(states, self.num_sweeps)
        self.put(states)
        return states

    @torch.no_grad()
    def put(self, states: Tensor) -> None:
        """Go on from copies of these states `[num_chains, units]`, such as those of learning."""
        if self.states.shape == states.shape and self.states.dtype == states.dtype:
            self.states.copy_(states)
        else:
            self.states = states.detach().clone()
        self.advanced.fill_(1)

    def warn_if_fresh(self, stacklevel: int = 2) -> None:
        """Say so where the chains are still near fair coins: nothing is drawn from the distribution then."""
        if not bool(self.advanced):
            warnings.warn(
                f"the persistent chains were never advanced: draws are {self.num_sweeps} sweeps from fair coins, not from the "
                "distribution; learn first, or draw with ParallelTempering(...).sample",
                stacklevel=stacklevel + 1,
            )

    @torch.no_grad()
    def draw(self, distribution: Any, n: int, *, quiet: bool = False) -> Tensor:
        """`n` states `[n, units]` from copies of the chains, moved on by `num_sweeps`; the chains stay.

        Warns where the chains were never advanced, unless `quiet`.
        """
        if not quiet:
            self.warn_if_fresh(stacklevel=5)
        states = self._states(distribution)
        order = torch.randperm(self.num_chains, device=states.device)
        draws = states[order.repeat(-(-n // self.num_chains))[:n]]
        distribution.sweep(draws, self.num_sweeps)
        return draws

    def reset(self) -> None:
        """Start anew from fair coins."""
        self.states = _coins(self.num_chains, self.states.shape[-1], self.states) if self.states.numel() else self.states
        self.advanced.zero_()

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"num_chains={self.num_chains}, num_sweeps={self.num_sweeps}"

    def _states(self, distribution: Any) -> Tensor:
        units, like = distribution.chain_units, distribution.parameters[0]
        if not self.states.numel():
            return _coins(self.num_chains, units, like)
        if self.states.shape != (self.num_chains, units):
            raise ValueError(
                f"expected chains of {units} units for {type(distribution).__name__}, got states {list(self.states.shape)}; "
                "give each distribution PersistentChains of its own"
            )
        return self.states.to(like)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "states")
        if not self.states.numel() and isinstance(saved, Tensor):
            self.states = torch.empty_like(saved, device=self.states.device)
        state_dict.setdefault(prefix + "advanced", torch.ones((), dtype=torch.bool))  # saved before it was kept
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _coins(rows: int, units: int, like: Tensor) -> Tensor:
    return (torch.rand(rows, units, device=like.device) < 0.5).to(like.dtype)
