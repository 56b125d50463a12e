"""A posterior of independent bits: what mean field and the Saul-Jaakkola-Jordan bound return for declared layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrovae.handlers.structure import Latent
from pyrovae.inference.exact.expectations import sites_read, weighted_average
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
        """E_q[f(h)], by a sum, with error 0, over up to 2^26 joint states x rows of the sites that `f` reads; else by draws.

        The draws are `num_draws` independent ones of q, and the error is that of their mean.
        """
        read = sites_read(f, {site: torch.zeros_like(logits).unsqueeze(0) for site, logits in self._in_order().items()})
        logits = {site: value for site, value in self._in_order().items() if site in read} or self._in_order()
        bits, rows = sum(value.shape[-1] for value in logits.values()), self.structure.batch_shape.numel()
        if 2.0**bits * rows <= _MAX_STATES:
            return weighted_average(f, self._all_states(logits, bits, rows))
        value = f(self.sample(self.num_draws))
        expected = (self.num_draws, *self.structure.batch_shape)
        if value.shape[: len(expected)] != expected:
            raise ValueError(f"expected f to return [S, batch, …] = {expected} and any dims after, got {tuple(value.shape)}")
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
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
            bits = logsigmoid(torch.where(value > 0.5, logits, -logits))
            total = total + torch.where((value == 0) | (value == 1), bits, -math.inf).sum(-1)
        assert isinstance(total, Tensor)
        return total

    def _drawn(self, latent: Latent, n: int) -> Tensor:
        p = self.marginals[latent.name]
        return (torch.rand((n, *p.shape), dtype=p.dtype, device=p.device) < p).to(latent.dtype)

    def _in_order(self) -> dict[str, Tensor]:
        return {latent.name: self.logits[latent.name] for latent in self.structure.latents}

    def _all_states(self, logits: Mapping[str, Tensor], bits: int, rows: int) -> Iterator[tuple[States, Tensor]]:
        """All joint states of some sites in chunks, the same for every row, and log q of them `[S, batch]`."""
        dtypes = {latent.name: latent.dtype for latent in self.structure.latents}
        joint = torch.cat(list(logits.values()), -1)  # [batch, bits]
        none = logsigmoid(-joint).sum(-1)
        size = max(1, _CHUNK // (rows * bits))
        for start in range(0, 2**bits, size):
            numbers = torch.arange(start, min(start + size, 2**bits), device=joint.device)
            codes = index_to_codes(numbers, 2, bits).to(joint.dtype)
            parts = codes.split([value.shape[-1] for value in logits.values()], -1)
            states = {
                site: part.to(dtypes[site]).unsqueeze(1).expand(-1, *value.shape)
                for (site, value), part in zip(logits.items(), parts, strict=True)
            }
            yield states, codes @ joint.T + none


def bit_entropy(logits: Tensor) -> Tensor:
    """The entropy of a Bernoulli by its logit, elementwise, in nats."""
    size = logits.abs()  # the entropy is even, and large terms would cancel
    return size * (-size).sigmoid() - logsigmoid(size)
