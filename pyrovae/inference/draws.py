"""Posteriors that are draws: of a Markov chain, of a guide, or weighted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pyrovae.handlers.structure import Latent
from pyrovae.inference.exact.enumeration import Enumeration
from pyrovae.inference.exact.factors import dot
from pyrovae.inference.exact.tabulated import q_function
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Posterior, Program, States
from pyrovae.ops import codes_to_index

_MAX_BYTES = 2**28


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawsPosterior(Posterior):
    """K draws of the latents, with or without weights; averages over them estimate expectations.

    Attributes:
        codes: finite sites as small integers `[K, *batch_shape, components]`.
        values: other sites `[K, *batch_shape, *event]`.
        log_weights: normalised log weights `[K, batch]`, or None for equal weights.
        shape: (chains, draws) with K = chains x draws, chain by chain, for MCMC; else None.
    """

    log_joint: LogJoint = field(repr=False)
    codes: Mapping[str, Tensor] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    log_weights: Tensor | None = field(default=None, repr=False)
    shape: tuple[int, int] | None = None

    @property
    def num_draws(self) -> int:
        """K, over all chains."""
        return int(next(iter({**self.codes, **self.values}.values())).shape[0])

    @property
    def draws(self) -> States | None:
        """`{site: [chain, draw, batch, …]}` for MCMC, decoded at each access; None otherwise."""
        if self.shape is None:
            return None
        return {name: value.reshape((*self.shape, *value.shape[1:])) for name, value in self._at(slice(None)).items()}

    @cached_property
    def ess(self) -> States | None:
        """Bulk effective sample size `{site: [batch, …]}` of chains, by ArviZ; None for other draws."""
        return self._per_component("effective_sample_size")

    @cached_property
    def rhat(self) -> States | None:
        """Split R-hat `{site: [batch, …]}` of chains, by ArviZ; None for other draws."""
        return self._per_component("split_rhat")

    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """The (weighted) mean of f over the draws, and its standard error.

        The error of chains is that of batch means, of weighted draws the delta method's, else that of independent draws.

        References:
            Batch means and spectral variance estimators in Markov chain Monte Carlo (Flegal and Jones, 2010)
            https://arxiv.org/abs/0811.1729
        """
        parts = [f(self._at(piece)) for piece in self._pieces()]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]  # [K, batch, …]
        expected = (self.num_draws, *self.structure.batch_shape)
        if value.shape[: len(expected)] != expected:
            raise ValueError(f"expected f to return [S, batch, …] = {expected} and any dims after, got {tuple(value.shape)}")
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        if self.log_weights is None:
            return value.mean(0), self._standard_error(value.detach())
        weights = self.log_weights.exp().to(value.dtype)
        weights = weights.reshape(weights.shape + (1,) * (value.dim() - weights.dim()))
        mean = dot(weights, value).sum(0)
        return mean, dot(weights**2, (value.detach() - mean.detach()) ** 2).sum(0).sqrt()

    def expected_log_joint(self, model: Program) -> Tensor:
        """The (weighted) mean of log p(x, z) under `model`, `[batch]`; one evaluation a draw.

        Raises:
            ValueError: if the kernel summed discrete sites out, so that there are no draws of them.
        """
        absent = [s.name for s in self.log_joint.structure.latents if s.name not in self.codes and s.name not in self.values]
        if absent:
            raise ValueError(f"expected draws of every latent site, got none of {absent[0]!r}, which the kernel summed out")
        total: Tensor | None = None
        for piece in self._pieces():
            value = self.log_joint(self._at(piece), model)  # [k, batch]
            weights = self._weights(piece).to(value.dtype)
            part = dot(weights, value).sum(0)
            total = part if total is None else total + part
        assert total is not None
        return total

    def q_function(self, model: Program) -> Callable[[], Tensor]:
        """Σ_batch E_q[log p(x, z)]; for finite latents, over the distinct states and with the data gathered once."""
        table = self._distinct_states(model)
        return super().q_function(model) if table is None else table

    @cached_property
    def marginals(self) -> States:
        """(Weighted) frequencies: P(1) `[batch, …]` for {0, 1} sites, `[batch, …, K]` for categories."""
        found = {}
        for latent in self.structure.latents:
            if not latent.finite:
                continue
            codes = self.codes[latent.name]
            batch = codes.shape[1:-1]
            if latent.kind == "bit":
                found[latent.name] = self._average(codes, latent).reshape(batch + latent.event_shape)
                continue
            shares = [self._average((codes == k).to(torch.uint8), latent) for k in range(latent.cardinality)]
            event = latent.event_shape if latent.kind == "one_hot" else (*latent.event_shape, latent.cardinality)
            found[latent.name] = torch.stack(shares, -1).reshape(batch + torch.Size(event))
        return found

    def sample(self, n: int) -> States:
        """`n` of the draws, `{site: [n, batch, …]}`: with replacement, by their weights in each row where they have any."""
        if n <= 0:
            raise ValueError(f"expected n > 0 draws, got {n}")
        if self.log_weights is None:
            device = next(iter({**self.codes, **self.values}.values())).device
            return self._at(torch.randint(self.num_draws, (n,), device=device))
        weights = self.log_weights.exp().reshape(self.num_draws, -1).T
        index = torch.multinomial(weights, n, replacement=True).T.reshape((n, *self.log_weights.shape[1:]))
        states = self._at(slice(None))
        picked = {}
        for latent in self.structure.latents:
            wide = self._over_site(index, latent)
            wide = wide.reshape(wide.shape + (1,) * len(latent.event_shape))
            value = states[latent.name]
            picked[latent.name] = value.gather(0, wide.expand((n, *value.shape[1:])))
        return picked

    def _moments(self) -> tuple[States, States]:
        mean, variance = super()._moments()
        for name, value in self.values.items():
            latent = next(s for s in self.structure.latents if s.name == name)
            weights = self._over_site(self._weights(slice(None)), latent)
            weights = weights.reshape(weights.shape + (1,) * len(latent.event_shape))
            mean[name] = (weights * value).sum(0)
            variance[name] = (weights * (value - mean[name]) ** 2).sum(0)
        return mean, variance

    def _at(self, index: slice | Tensor) -> States:
        """Values `{site: [k, *batch_shape, *event]}` of some draws."""
        found = {}
        for latent in self.structure.latents:
            if latent.finite:
                found[latent.name] = latent.decode(self.codes[latent.name][index].long())
            else:
                found[latent.name] = self.values[latent.name][index]
        return found

    def _pieces(self) -> Iterator[slice]:
        """Slices of the draws whose values, and an observed row of like size, fit in memory."""
        row = sum(math.prod(latent.batch_shape + latent.event_shape) for latent in self.structure.latents)
        seen = sum(
            math.prod(plate.size for plate in site.plates) * max(1, math.prod(site.event_shape))
            for site in self.structure.observed
        )
        size = max(1, _MAX_BYTES // (32 * max(1, row + seen)))
        for start in range(0, self.num_draws, size):
            yield slice(start, min(start + size, self.num_draws))

    def _weights(self, index: slice) -> Tensor:
        """Normalised weights `[k, batch]`."""
        if self.log_weights is not None:
            return self.log_weights[index].exp()
        size = len(range(*index.indices(self.num_draws)))
        return torch.full((size, *self.structure.batch_shape), 1 / self.num_draws, device=self._device)

    def _average(self, codes: Tensor, latent: Latent) -> Tensor:
        """The (weighted) mean of `[K, *batch_shape, components]` over draws."""
        if self.log_weights is None:
            return codes.sum(0, dtype=torch.long).to(torch.get_default_dtype()) / codes.shape[0]
        return (self._over_site(self.log_weights.exp(), latent).unsqueeze(-1) * codes).sum(0)

    def _over_site(self, values: Tensor, latent: Latent) -> Tensor:
        """`[k, batch]` broadcast to `[k, *batch_shape]` of a site."""
        wide = self.structure.from_batch(values)  # [k, plates]
        depth = len(latent.batch_shape)
        return wide.reshape(wide.shape[:1] + wide.shape[wide.dim() - depth :] if depth else wide.shape[:1]).expand(
            (values.shape[0], *latent.batch_shape)
        )

    def _standard_error(self, value: Tensor) -> Tensor:
        """Of the mean over draws `[K, …]`: batch means where they are chains."""
        if self.shape is None:
            return value.std(0) / math.sqrt(value.shape[0])
        chains, draws = self.shape
        length = math.isqrt(draws)  # of a batch
        kept = draws // length * length
        batches = value.reshape((chains, draws, *value.shape[1:]))[:, :kept].reshape((-1, length, *value.shape[1:])).mean(1)
        return batches.std(0) / math.sqrt(len(batches)) if len(batches) > 1 else torch.full_like(batches[0], math.nan)

    def _per_component(self, name: str) -> States | None:
        if self.shape is None:
            return None
        from pyrovae.inference import arviz

        draws = self.draws
        assert draws is not None
        return {site: getattr(arviz, name)(value) for site, value in draws.items()}

    def _distinct_states(self, model: Program) -> Callable[[], Tensor] | None:
        """The M-step's objective over the distinct states of all rows; None where these are too many, or not finite."""
        latents = self.structure.latents
        if self.values or len({latent.plate_dims for latent in latents}) > 1:
            return None
        if math.prod(latent.num_states for latent in latents) > 2**62:
            return None
        number: Tensor | int = 0
        for latent in latents:
            number = number * latent.num_states + codes_to_index(self.codes[latent.name], latent.cardinality)
        assert isinstance(number, Tensor)  # [K, *batch_shape]
        distinct, inverse = torch.unique(number, return_inverse=True)
        rows = math.prod(number.shape[1:])
        if distinct.numel() * rows * 8 > _MAX_BYTES:
            return None
        weights = self._over_site(self._weights(slice(None)), latents[0]).reshape(self.num_draws, rows)
        table = weights.new_zeros((rows, distinct.numel()))
        table.scatter_add_(1, inverse.reshape(self.num_draws, rows).T, weights.T.contiguous())
        states = {}
        first = torch.zeros(distinct.numel(), dtype=torch.long, device=number.device)
        flat = inverse.reshape(-1)
        first.scatter_(0, flat, torch.arange(flat.numel(), device=flat.device))
        for latent in latents:
            codes = self.codes[latent.name].reshape(-1, latent.components)
            states[latent.name] = codes[first].long()
        try:
            space = Enumeration(
                model, self.log_joint.args, self.log_joint.kwargs, max_bytes=_MAX_BYTES, method="EM", states=states
            )
        except ValueError:
            return None  # a program that LogJoint runs one state at a time
        wide = (1,) * (self.structure.plate_depth - len(latents[0].batch_shape))
        table = table.T.reshape((distinct.numel(), *wide, *latents[0].batch_shape))
        weights_of = {}
        for name, shape in space.shapes.items():
            sizes = [space.plate_sizes[d] if d in shape.plate_dims else 1 for d in range(-self.structure.plate_depth, 0)]
            lead = distinct.numel() if shape.axes else 1
            weights_of[name] = (table if shape.axes else table.new_ones(())).expand((lead, *sizes))
        return q_function(space, [(slice(0, distinct.numel()), weights_of)], model)

    @property
    def _device(self) -> torch.device:
        return next(iter({**self.codes, **self.values}.values())).device
