"""Gaussian components of mixtures and hidden Markov models."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.components import Components
from pyrovae.ops.tracing import unrecorded

Covariance = Literal["full", "diagonal", "spherical"]
_CANCELLATION = 1e-4  # a variance below this share of the mean square is summed anew around its own mean


class GaussianComponents(Components):
    """x ~ N(loc_k, Σ_k), Σ_k full, diagonal or σ_k² I.

    The prior is that of `prior_count` rows seen before at each component's own mean, with covariance `prior_variance` I: an
    inverse Wishart (inverse gamma) density, −ν/2 (log |Σ| + s² tr Σ⁻¹), under which Σ = (scatter + ν s² I) / (N + ν). With
    `prior_count=0` the likelihood has no maximum, for a component may shrink onto one row: variances are then kept above the
    precision of the dtype times those of all data, and a component that reaches it is warned of.
    """

    event_dim = 1

    def __init__(
        self, components: int, visible: int, covariance: Covariance, prior_count: float, prior_variance: float
    ) -> None:
        super().__init__()
        if covariance not in ("full", "diagonal", "spherical"):
            raise ValueError(f'expected covariance in "full", "diagonal", "spherical", got {covariance!r}')
        if not 0 <= prior_count < math.inf or not 0 < prior_variance < math.inf:
            raise ValueError(f"expected prior_count >= 0 and prior_variance > 0, got {prior_count} and {prior_variance}")
        self.width, self.covariance = visible, covariance
        self.prior_count, self.prior_variance = float(prior_count), float(prior_variance)
        self.loc = nn.Parameter(torch.empty(components, visible))
        self.log_scale = nn.Parameter(torch.empty(components, 1 if covariance == "spherical" else visible))
        if covariance == "full":
            self.lower = nn.Parameter(torch.empty(components, visible * (visible - 1) // 2))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the means from N(0, 1); unit covariances."""
        self.loc.normal_()
        self.log_scale.zero_()
        if self.covariance == "full":
            self.lower.zero_()

    @property
    def scale_tril(self) -> Tensor:
        """Lower triangular factors L of Σ = L Lᵀ, `[K, D, D]`."""
        diagonal = torch.diag_embed(self.log_scale.exp().expand(self.loc.shape))
        if self.covariance != "full":
            return diagonal
        row, column = torch.tril_indices(self.width, self.width, -1, device=diagonal.device)
        return diagonal.index_put((torch.arange(len(self.loc), device=row.device).unsqueeze(-1), row, column), self.lower)

    def at(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z)."""
        if self.covariance == "full":
            return dist.MultivariateNormal(self.loc[z], scale_tril=self.scale_tril[z])
        return dist.Normal(self.loc[z], self.log_scale.exp().expand(self.loc.shape)[z]).to_event(1)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log p(x | k), `[..., K]`."""
        x = x.to(self.loc)
        log_det = self.log_scale.expand(self.loc.shape).sum(-1)
        if self.covariance == "full":
            squares = [((x - m) @ w.T).square().sum(-1) for m, w in zip(self.loc, self._whitening(), strict=True)]
        elif (quick := self._squares(x)) is not None:
            return -0.5 * quick - log_det - 0.5 * self.width * math.log(2 * math.pi)
        else:
            squares = [((x - m) / s).square().sum(-1) for m, s in zip(self.loc, self.log_scale.exp(), strict=True)]
        return -0.5 * torch.stack(squares, -1) - log_det - 0.5 * self.width * math.log(2 * math.pi)

    @torch.no_grad()
    def m_step(self, weights: Tensor, x: Tensor) -> None:
        """Means and covariances; a component without data keeps its mean, and without a prior its covariance too."""
        x = x.to(weights)
        total = weights.sum(0)
        eps = torch.finfo(self.loc.dtype).eps
        total = torch.where(total > eps**2, total, 0.0)
        some = (total > 0).unsqueeze(-1)
        centre = x.mean(0)
        shifted = x - centre
        mean = (weights.T @ shifted) / total.clamp_min(eps**2).unsqueeze(-1)
        self.loc.copy_(torch.where(some, mean + centre, self.loc))
        spread = shifted.square().mean(0)
        floor = eps * torch.where(spread > 0, spread, spread.mean().clamp_min(eps))
        scatter = self._scatter(torch.where(some.T, weights, 0.0), shifted, mean)  # [K, D, D] or [K, D]
        empty = [k for k, share in enumerate((total + self.prior_count).tolist()) if not share > 0]
        if self.covariance == "full":
            collapsed = self._set_full(scatter, total, floor)
        else:
            collapsed = self._set_diagonal(scatter, total, floor)
        if empty or collapsed:
            what = f"component {empty[0]} has no data" if empty else f"component {collapsed[0]} has shrunk onto too few rows"
            warnings.warn(
                f"{what}: {'its parameters stay' if empty else 'its variance is kept at the precision of the dtype'}; give "
                "the model prior_count > 0, fewer components or another start",
                stacklevel=3,
            )

    def log_prior(self) -> Tensor:
        """−ν/2 Σ_k (log |Σ_k| + s² tr Σ_k⁻¹), 0-d."""
        if self.prior_count == 0:
            return self.loc.new_zeros(())
        log_scale = self.log_scale.expand(self.loc.shape)
        trace = self._whitening().square().sum() if self.covariance == "full" else (-2 * log_scale).exp().sum()
        return -0.5 * self.prior_count * (2 * log_scale.sum() + self.prior_variance * trace)

    def possible(self, x: Tensor) -> Tensor:
        """Which are finite, and so far from the largest number that their squares, divided by a variance, are so too."""
        return (x.abs() < torch.finfo(self.loc.dtype).max ** 0.125).all(-1)

    def check(self, x: Tensor, seen: Tensor | None = None) -> None:
        """Refuse what is no number; see :class:`Components`."""
        shown = x if seen is None else x[seen]
        if not bool(torch.isfinite(shown).all()):
            raise ValueError("expected finite numbers for Gaussian components, got NaN or infinite ones; drop these rows")

    def _squares(self, x: Tensor) -> Tensor | None:
        """Σ_d ((x_d − m_kd) / s_kd)² by matrix products, `[..., K]`; None where its terms would cancel beyond 1e-11."""
        precision = (-2 * self.log_scale).exp().expand(self.loc.shape)
        centre = self.loc.detach().mean(0)
        shifted, mean = x - centre, self.loc - centre
        with torch.no_grad(), unrecorded():
            far = torch.maximum(shifted.abs().flatten(0, -2).amax(0), mean.abs().amax(0)).square() @ precision.amax(0)
        if x.dtype != torch.float64 or not float(far) < 1e4:
            return None
        linear = mean * precision
        return shifted.square() @ precision.T - 2 * (shifted @ linear.T) + (mean * linear).sum(-1)

    def _whitening(self) -> Tensor:
        """Inverses of the factors L, `[K, D, D]`."""
        eye = torch.eye(self.width, dtype=self.loc.dtype, device=self.loc.device)
        return torch.linalg.solve_triangular(self.scale_tril, eye.expand(len(self.loc), -1, -1), upper=False)

    def _scatter(self, weights: Tensor, x: Tensor, mean: Tensor) -> Tensor:
        """Σ_n w_nk (x_n − m_k)(x_n − m_k)ᵀ, `[K, D, D]`, or its diagonal `[K, D]`."""
        if self.covariance == "full":
            return torch.stack([((d := x - m) * w.unsqueeze(-1)).T @ d for m, w in zip(mean, weights.T, strict=True)])
        squares = weights.T @ x.square()
        scatter = squares - weights.sum(0).unsqueeze(-1) * mean.square()
        for k in (scatter < _CANCELLATION * squares).any(-1).nonzero().flatten().tolist():
            scatter[k] = weights[:, k] @ (x - mean[k]).square()
        return scatter

    def _set_diagonal(self, scatter: Tensor, total: Tensor, floor: Tensor) -> list[int]:
        """Set the scales; the components whose variance was kept at the floor."""
        total = total.unsqueeze(-1)
        if self.covariance == "spherical":
            scatter, floor = scatter.mean(-1, keepdim=True), floor.mean(-1, keepdim=True)
        count = total + self.prior_count
        variance = (scatter + self.prior_count * self.prior_variance) / count
        present = (2 * self.log_scale).exp().to(variance)
        variance = torch.where(count > 0, variance, present)
        self.log_scale.copy_(0.5 * torch.maximum(variance, floor).log())
        return (variance < floor).any(-1).nonzero().flatten().tolist()

    def _set_full(self, scatter: Tensor, total: Tensor, floor: Tensor) -> list[int]:
        """Set the factors; the components of which some variance was kept at the floor."""
        count = (total + self.prior_count)[:, None, None]
        eye = torch.eye(self.width, dtype=scatter.dtype, device=scatter.device)
        tril = self.scale_tril.to(scatter)
        covariance = torch.where(count > 0, (scatter + self.prior_count * self.prior_variance * eye) / count, tril @ tril.mT)
        values, vectors = torch.linalg.eigh(covariance)
        low = floor.max()
        collapsed = (values < low).any(-1)
        lifted = (vectors * values.clamp_min(low).unsqueeze(-2)) @ vectors.mT
        tril = torch.linalg.cholesky(torch.where(collapsed[:, None, None], lifted, covariance))
        self.log_scale.copy_(tril.diagonal(dim1=-2, dim2=-1).log())
        row, column = torch.tril_indices(self.width, self.width, -1, device=tril.device)
        self.lower.copy_(tril[:, row, column])
        return collapsed.nonzero().flatten().tolist()
