"""Logistic regressions of many units on the same weighted codes: the M-step of a sigmoid belief net's layer.

Expected counts r(h) of the codes h of the layer above, and the sums T = Σ E[h vᵀ] and s = Σ v, say all that the data say of
p(v | h) = Π_i Bern(σ(b_i + (h W)_i)):

    Q(W, b) = ⟨W, T⟩ + b · s − Σ_h r(h) Σ_i softplus(b_i + (h W)_i) − λ/2 (‖W‖² + ‖b‖²),

concave, and apart for each unit i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.ops.partition import softplus_sums
from pyrovae.ops.states import index_to_codes

_LISTED = 0.25  # codes are listed where at most this share of them has counts that matter
_CURVATURE_CODES = 4096
_CHUNK = 2**23  # elements of a chunk of codes x units


def fit_code_regression(
    weight: Tensor, bias: Tensor, cross: Tensor, below: Tensor, counts: Tensor, *, penalty: float = 0.0, max_steps: int = 5
) -> tuple[Tensor, Tensor, int]:
    """Raise Q by Newton steps, one small system a unit; Q never falls beyond the rounding of its dtype.

    Gradients are exact: a step costs one pass over codes x units, forward and backward, those of negligible counts (1e-12 of
    the total) left out. Curvature is taken from the codes of the largest counts and a systematic sample of the others, with a
    fiftieth of Böhning's bound ¼ Σ r(h) h hᵀ added; a unit that overshoots takes the secant step, and where Q still fell, all
    take the step under the bound itself, which cannot lower Q.

    Args:
        weight: W `[H, D]`, where to start.
        bias: b `[D]`.
        cross: T = Σ E[h vᵀ] `[H, D]`.
        below: s = Σ E[v] `[D]`.
        counts: r(h) `[2^H]`, at least 0, in the order of :func:`pyrovae.ops.index_to_codes`.
        penalty: λ.
        max_steps: Newton steps; fewer where a step promises less than a thousandth of what was gained.

    Returns:
        W, b and the number of passes.

    References:
        Multinomial logistic regression algorithm (Böhning, 1992)
        https://doi.org/10.1007/BF00048682
    """
    q = _Objective(weight, cross, below, counts, penalty)
    theta = torch.cat([bias.detach()[None], weight.detach()]).double()  # [1 + H, D]
    value, gradient = q(theta)
    first, calls = value, 1
    for _ in range(max_steps):
        step = _newton_step(q, theta, gradient)
        slope = (gradient * step).sum(0)  # [D], at least 0
        if not float(slope.sum()) > max(1e-3 * (value - first), q.rounding * abs(value)):
            break
        length = torch.ones_like(slope)
        for attempt in range(4):
            trial = q.rounded(theta + (length * step if attempt < 3 else q.sure_step(gradient)))
            new_value, new_gradient = q(trial)
            calls += 1
            end_slope = (new_gradient * step).sum(0)
            overshot = end_slope < -0.5 * slope
            if new_value >= value and (attempt or not bool((end_slope < -0.9 * slope).any())):
                break
            secant = length * slope / (slope - end_slope).clamp(min=torch.finfo(slope.dtype).tiny)
            length = torch.where(overshot, secant, length if bool(overshot.any()) else length / 2)
        if not new_value >= value - q.rounding * abs(value):
            break
        theta, value, gradient = trial, new_value, new_gradient
    return theta[1:].to(weight.dtype), theta[0].to(bias.dtype), calls


class _Objective:
    """Q and its gradient, in the dtype of the weights over codes, in float64 over what is linear."""

    def __init__(self, weight: Tensor, cross: Tensor, below: Tensor, counts: Tensor, penalty: float) -> None:
        self.dtype, self.units, self.penalty = weight.dtype, len(weight), penalty
        self.linear = torch.cat([below[None], cross]).double()  # [1 + H, D]
        self.rounding = 4 * torch.finfo(weight.dtype).eps
        counts = counts.double()
        order = torch.argsort(counts, descending=True)
        tail = counts.sum() - counts[order].cumsum(0)
        listed = order[: int((tail > 1e-12 * counts.sum()).sum()) + 1]
        self.counts = counts
        self.listed = listed if len(listed) <= max(_LISTED * len(counts), _CURVATURE_CODES) else None
        self.curved, self.curved_counts = _representatives(counts, order)

    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        """Q and its gradient `[1 + H, D]`."""
        normaliser, moments = self._listed(theta) if self.listed is not None else self._all(theta)
        value = float((theta * self.linear).sum()) - normaliser - self.penalty / 2 * float(theta.square().sum())
        return value, self.linear - moments - self.penalty * theta

    def rounded(self, theta: Tensor) -> Tensor:
        """Parameters as their dtype holds them."""
        return theta.to(self.dtype).double()

    def codes(self, index: Tensor) -> Tensor:
        """Codes with a leading 1, `[S, 1 + H]`."""
        bits = index_to_codes(index, 2, self.units)
        return torch.cat([bits.new_ones(len(bits), 1), bits], 1)

    def sure_step(self, gradient: Tensor) -> Tensor:
        """The step under Böhning's bound of the curvature, the same for all units."""
        bound = self.penalty * torch.eye(1 + self.units, dtype=gradient.dtype, device=gradient.device)
        for index in torch.arange(len(self.counts), device=gradient.device).split(2**16):
            h = self.codes(index).to(gradient)
            bound += 0.25 * (h * self.counts[index][:, None]).T @ h
        return torch.linalg.lstsq(bound, gradient, driver="gelsd" if gradient.device.type == "cpu" else None).solution

    def _listed(self, theta: Tensor) -> tuple[float, Tensor]:
        assert self.listed is not None
        weights, total, moments = theta.to(self.dtype), 0.0, torch.zeros_like(theta)
        for index in self.listed.split(max(1, _CHUNK // theta.shape[1])):
            h, r = self.codes(index).to(self.dtype), self.counts[index].to(self.dtype)
            x = h @ weights
            total += float((r @ _softplus(x)).sum(dtype=torch.float64))
            moments += (h * r[:, None]).T @ x.sigmoid_()
        return total, moments

    def _all(self, theta: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            bias, weight = (part.to(self.dtype).detach().requires_grad_() for part in (theta[0], theta[1:]))
            sums = softplus_sums(weight, bias)
            by_bias, by_weight = torch.autograd.grad(sums, (bias, weight), self.counts.to(self.dtype))
        return float(sums.detach().double() @ self.counts), torch.cat([by_bias[None], by_weight]).double()


def _newton_step(q: _Objective, theta: Tensor, gradient: Tensor) -> Tensor:
    """(curvature)⁻¹ gradient of each unit, `[1 + H, D]`."""
    h = q.codes(q.curved).to(theta)  # [S, 1 + H]
    size = h.shape[1]
    bohning = 0.25 * (h * q.curved_counts[:, None]).T @ h
    pairs = (h[:, :, None] * h[:, None, :]).reshape(len(h), -1)
    s = torch.sigmoid(h @ theta)
    curvature = ((s * (1 - s) * q.curved_counts[:, None]).T @ pairs).reshape(-1, size, size)
    ridge = q.penalty + 1e-9 * float(q.curved_counts.sum())
    curvature += 0.02 * bohning + ridge * torch.eye(size, dtype=h.dtype, device=h.device)
    return torch.linalg.solve(curvature, gradient.T).T


def _representatives(counts: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Few codes whose weighted sums are close to those of all: the most frequent, and a systematic sample of the others."""
    if len(order) <= _CURVATURE_CODES:
        return order, counts[order]
    half = _CURVATURE_CODES // 2
    top, rest = order[:half], order[half:]
    edges = counts[rest].cumsum(0)
    points = (torch.arange(half, dtype=edges.dtype, device=edges.device) + 0.5) / half * edges[-1]
    sampled = rest[torch.searchsorted(edges, points).clamp(max=len(rest) - 1)]
    return torch.cat([top, sampled]), torch.cat([counts[top], (edges[-1] / half).expand(half)])


def _softplus(x: Tensor) -> Tensor:
    return softplus(x, threshold=700) if x.dtype == torch.float64 else x.clamp(min=0) + x.abs().neg_().exp_().log1p_()
