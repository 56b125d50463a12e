"""Gibbs sweeps of a declared Markov chain: its even times at once, then its odd ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae.handlers.structure import Structure
from pyrovae.inference.mcmc.sweeps import Codes, code_dtype
from pyrovae.ops import Chain


class ChainSweep:
    """Sweeps of one chain of states for each row.

    p(z_t = k | rest) ∝ p(z_t = k | z_{t−1}) p(x_t | z_t = k) p(z_{t+1} | z_t = k): given the odd times, the even ones are
    independent of one another, and are drawn at once. A sweep costs a few operations on `[C, rows, L, K]` numbers.

    Args:
        chain: the declared chain, a snapshot.
        structure: of the program.
        chains: number of chains C.
    """

    def __init__(self, chain: Chain, structure: Structure, chains: int) -> None:
        (self.latent,) = structure.latents
        self.chains = chains
        seen = chain.log_likelihood
        if chain.lengths is not None:
            times = torch.arange(seen.shape[1], device=seen.device)
            seen = seen.masked_fill((times >= chain.lengths[:, None])[..., None], 0.0)
        lowest = torch.finfo(seen.dtype).min / 8  # impossible, and yet a number: differences of impossible states stay numbers
        self.seen = seen.detach().clone()
        self.seen[:, 0] += chain.log_initial.detach()
        self.seen.clamp_min_(lowest)
        self.forward = chain.log_transition.detach().clamp_min(lowest)
        self.backward = self.forward.T.contiguous()
        self.state = torch.empty(0, dtype=torch.long)

    def start(self, codes: Codes) -> None:
        """Set the chains to a state."""
        self.state = codes[self.latent.name].long().clone()

    def sweep(self) -> None:
        """Draw the state of every time, row and chain once from its conditional."""
        for first in (0, 1):
            self._update(slice(first, None, 2))

    def snapshot(self) -> Codes:
        """The present codes, uint8 or wider."""
        return {self.latent.name: self.state.to(code_dtype(self.latent))}

    def present(self) -> Codes:
        """The present codes `{site: [C, rows, L]}`."""
        return {self.latent.name: self.state}

    @property
    def evaluations_per_sweep(self) -> int:
        """Conditionals that one sweep of all chains computes: times x chains x rows."""
        return self.chains * self.seen.shape[0] * self.seen.shape[1]

    def _update(self, times: slice) -> None:
        length = self.state.shape[-1]
        chosen = torch.arange(length, device=self.state.device)[times]
        if not len(chosen):
            return
        logits = self.seen[:, times].expand(self.chains, -1, -1, -1).clone()
        after, before = chosen > 0, chosen < length - 1
        logits[:, :, after] += self.forward[self.state[..., chosen[after] - 1]]
        logits[:, :, before] += self.backward[self.state[..., chosen[before] + 1]]
        self.state[..., times] = _draw(logits)


def _draw(logits: Tensor) -> Tensor:
    """Draws from categories with logits `[..., K]`, by the inverse of the cumulative distribution."""
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    uniform = torch.rand((*logits.shape[:-1], 1), dtype=logits.dtype, device=logits.device)
    return (cumulative <= uniform * cumulative[..., -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)
