"""What every inference method returns: a frozen account of p(z | x) that says how far it can be trusted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pyrovae.handlers.structure import Latent, Structure

Bound = Literal["exact", "lower", "upper", "estimate"]
States = dict[str, Tensor]
Program = Callable[..., Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Posterior(ABC):
    """A posterior, or an approximation of one, of the latents of a program given its arguments.

    A snapshot: later changes of the model's parameters do not reach it. Batch dims stand where the program's plates
    stand; *batch* is the shape of the plates that enclose every site (`()` where a latent lies outside all of them).

    Attributes:
        log_evidence: log p(x) `[batch]` in nats, exact, a bound or an estimate as `bound` says; None where the method has
            none (Gibbs).
        bound: what `log_evidence` is.
        stderr: standard error of `log_evidence`, `[batch]`; 0 where nothing was sampled.
        diagnostics: what the method tells of itself; always `model_evaluations`.
        seconds: wall time.
        draws: `{site: [chain, draw, batch, …]}` for MCMC, else None.
        is_elbo: of a lower bound, whether it is E_q[log p(x, z) − log q(z)], so that what it lacks is KL(q‖p).
    """

    is_elbo: ClassVar[bool] = True

    structure: Structure = field(repr=False)
    log_evidence: Tensor | None
    bound: Bound
    stderr: Tensor | float = 0.0
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def draws(self) -> States | None:
        """Draws in order, `{site: [chain, draw, batch, …]}`; None for a method that is not MCMC."""
        return None

    @abstractmethod
    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """E_q[f(z)] and its standard error.

        Args:
            f: from `{site: [S, batch, …]}` to `[S, batch, …]`; it must treat rows apart.

        Returns:
            The expectation `[batch, …]`, differentiable in what `f` closes over, and its standard error (0 where the
            method sums over all states).
        """

    @abstractmethod
    def expected_log_joint(self, model: Program) -> Tensor:
        """E_q[log p(x, z)] under `model`, `[batch]`, differentiable in the model's parameters: all that EM uses."""

    def q_function(self, model: Program) -> Callable[[], Tensor]:
        """The objective of an M-step: a function that returns Σ_batch E_q[log p(x, z)] at the model's present parameters.

        What the data contribute is gathered once where the posterior can; else each call runs through them.
        """
        return lambda: self.expected_log_joint(model).sum()

    @property
    @abstractmethod
    def marginals(self) -> States:
        """Probabilities of each discrete site: P(1) `[batch, …]` for {0, 1} sites, `[batch, …, K]` for categories."""

    @abstractmethod
    def sample(self, n: int) -> States:
        """`n` draws, `{site: [n, batch, …]}`."""

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor | None:
        """Log q(z) `[n, batch]` of states `{site: [n, batch, …]}`; None where the method has no density."""
        return None

    @property
    def mean(self) -> States:
        """E_q[z] of every site that has a mean, `{site: [batch, …]}`."""
        return self._moments()[0]

    @property
    def variance(self) -> States:
        """Var_q[z] of every site that has one, elementwise, `{site: [batch, …]}`."""
        return self._moments()[1]

    def to_arviz(self, num_draws: int = 1000) -> Any:
        """The posterior as ArviZ knows it: an `InferenceData` (0.x) or a `DataTree` (1.x).

        MCMC draws keep (chain, draw); independent draws of other methods stand along one dim `sample`, so that no R-hat is
        computed for them.

        Args:
            num_draws: how many draws to take from a method that is not MCMC.
        """
        from pyrovae.inference.arviz import to_arviz

        return to_arviz(self, num_draws)

    def _moments(self) -> tuple[States, States]:
        """Mean and variance, from the marginals."""
        mean, variance = {}, {}
        for latent in self.structure.latents:
            if not latent.finite:
                continue
            p = self.marginals[latent.name]
            if latent.kind == "integer":
                k = torch.arange(latent.cardinality, dtype=p.dtype, device=p.device) + latent.low
                mean[latent.name] = (p * k).sum(-1)
                variance[latent.name] = (p * k**2).sum(-1) - mean[latent.name] ** 2
            else:
                mean[latent.name] = p
                variance[latent.name] = p * (1 - p)
        return mean, variance


def code_marginals(latent: Latent, weights: Tensor, codes: Tensor) -> Tensor:
    """Marginals of a site from weights of its states.

    Args:
        latent: the site.
        weights: probabilities `[S, *batch_shape]`, summing to 1 over S.
        codes: the states, `[S, components]`.

    Returns:
        P(1) `[*batch_shape, *event_shape]` for bits, else `[*batch_shape, *components, K]`.
    """
    batch = weights.shape[1:]
    flat = weights.reshape(weights.shape[0], -1).T  # [rows, S]
    if latent.kind == "bit":
        return (flat @ codes.to(flat.dtype)).reshape(batch + latent.event_shape)
    one_hot = torch.nn.functional.one_hot(codes.long(), latent.cardinality).to(flat.dtype)  # [S, n, K]
    event = latent.event_shape if latent.kind == "one_hot" else (*latent.event_shape, latent.cardinality)
    return (flat @ one_hot.reshape(one_hot.shape[0], -1)).reshape(batch + torch.Size(event))
