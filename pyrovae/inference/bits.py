"""A posterior of independent bits: what mean field and the Saul-Jaakkola-Jordan bound return for declared layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.handlers.structure import Latent
from pyrovae.inference.factors import dot
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Posterior, Program, States
from pyrovae.ops import index_to_codes

_MAX_STATES = 2**26  # states x rows that an expectation sums over; beyond it draws
_CHUNK = 2**22


@dataclass(frozen=True, eq=False, kw_only=True)
class BitsPosterior(Posterior):
    """q(h) = Π_j Bern(h_j | σ(logits_j)) for every row: marginals, entropy, log q and draws in closed form.

    Attributes:
        logits: `{site: [batch, H]}`.
        log_joint: of the program.
        num_draws: draws of an expectation that has too many states to be summed.
    """

    logits: Mapping[str, Tensor] = field(repr=False)
    log_joint: LogJoint = field(repr=False)
    num_draws: int = 1000

    @cached_property
    def marginals(self) -> States:
        """q(1) `[batch, H]`."""
        return {latent.name: self.logits[latent.name].sigmoid() for latent in self.structure.latents}

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of q in nats, `[batch]`."""
        return torch.stack([bit_entropy(logits).sum(-1) for logits in self.logits.values()]).sum(0)

    @property
    def mode(self) -> States:
        """The most probable joint state of q, `{site: [batch, H]}`."""
        return {latent.name: (self.logits[latent.name] > 0).to(latent.dtype) for latent in self.structure.latents}

    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """E_q[f(h)]: summed over all joint states, with error 0, up to 2^26 states x rows; else over `num_draws` draws of q."""
        bits = sum(logits.shape[-1] for logits in self.logits.values())
        rows = self.structure.batch_shape.numel()
        if bits <= 40 and 2**bits * rows <= _MAX_STATES:
            total: Tensor | None = None
            for states, weights in self._all_states(bits, rows):
                value = self._checked(f(states), len(weights))
                part = dot(weights.reshape(weights.shape + (1,) * (value.dim() - weights.dim())), value).sum(0)
                total = part if total is None else total + part
            assert total is not None
            return total, torch.zeros_like(total.detach())
        value = self._checked(f(self.sample(self.num_draws)), self.num_draws)
        return value.mean(0), value.detach().std(0) / math.sqrt(self.num_draws)

    @abstractmethod
    def expected_log_joint(self, model: Program) -> Tensor:
        """E_q[log p(x, h)] under `model`, `[batch]`, differentiable in its parameters."""

    def sample(self, n: int) -> States:
        """`n` independent draws from q, `{site: [n, batch, H]}`."""
        if n <= 0:
            raise ValueError(f"expected n > 0 draws, got {n}")
        return {latent.name: self._drawn(latent, n) for latent in self.structure.latents}

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log q(h) `[n, batch]` of states `{site: [n, batch, H]}`; −inf where one is neither 0 nor 1."""
        total: Tensor | float = 0.0
        for latent in self.structure.latents:
            logits, value = self.logits[latent.name], z[latent.name]
            if value.shape[1:] != logits.shape:
                raise ValueError(
                    f"expected {latent.name!r} of shape [n, {', '.join(map(str, logits.shape))}], got {value.shape}"
                )
            bits = -softplus(torch.where(value > 0.5, -logits, logits), threshold=700.0)
            total = total + torch.where((value == 0) | (value == 1), bits, -math.inf).sum(-1)
        assert isinstance(total, Tensor)
        return total

    def _drawn(self, latent: Latent, n: int) -> Tensor:
        p = self.marginals[latent.name]
        return (torch.rand((n, *p.shape), dtype=p.dtype, device=p.device) < p).to(latent.dtype)

    def _all_states(self, bits: int, rows: int) -> Iterator[tuple[States, Tensor]]:
        """All joint states in chunks, the same for every row, and q of them `[S, batch]`."""
        size = max(1, _CHUNK // (rows * bits))
        device = next(iter(self.logits.values())).device
        for start in range(0, 2**bits, size):
            codes = index_to_codes(torch.arange(start, min(start + size, 2**bits), device=device), 2, bits)
            states, log_q, at = {}, torch.zeros((), device=device), 0
            for latent in self.structure.latents:
                logits = self.logits[latent.name]
                own = codes[:, at : at + logits.shape[-1]].to(logits.dtype)
                at += logits.shape[-1]
                log_q = log_q + own @ -softplus(-logits, threshold=700.0).T
                log_q = log_q + (1 - own) @ -softplus(logits, threshold=700.0).T
                states[latent.name] = own.to(latent.dtype).unsqueeze(1).expand(-1, *logits.shape)
            yield states, log_q.exp()

    def _checked(self, value: Tensor, count: int) -> Tensor:
        expected = (count, *self.structure.batch_shape)
        if value.shape[: len(expected)] != expected:
            raise ValueError(f"expected f to return [S, batch, …] = {expected} and any dims after, got {tuple(value.shape)}")
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def bit_entropy(logits: Tensor) -> Tensor:
    """The entropy of a Bernoulli by its logit, elementwise, in nats."""
    return softplus(logits, threshold=700.0) - logits * logits.sigmoid()
