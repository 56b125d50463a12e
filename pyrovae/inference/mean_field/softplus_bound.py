"""An upper bound of E_q[softplus(z)], z = b + Σ_j h_j W_j, for independent bits h_j ~ Bern(μ_j).

For every ξ in [0, 1], softplus(z) = ξz + log(e^{−ξz} + e^{(1−ξ)z}), so that by Jensen's inequality

    E[softplus(z)] ≤ ξ E[z] + log(e^{K(−ξ)} + e^{K(1−ξ)}),    K(t) = log E[e^{tz}] = tb + Σ_j log(1 − μ_j + μ_j e^{tW_j}),

convex in ξ. ξ = 0 is the plain Jensen bound log(1 + E[e^z]).

References:
    Mean Field Theory for Sigmoid Belief Networks, section 3 (Saul, Jaakkola, Jordan, 1996)
    https://arxiv.org/abs/cs/9603102
"""

from __future__ import annotations

import torch
from torch import Tensor


def bound_of_softplus(means: Tensor, tilt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Σ_i of the bound over the units of a layer, `[N]`; differentiable, with `[N, H, D]` numbers in memory.

    Args:
        means: μ of the parents, `[N, H]`.
        tilt: ξ of each unit, `[N, D]`.
        weight: `[H, D]`.
        bias: `[D]`.
    """
    low = _log_moment(-tilt, means, weight, bias)
    high = _log_moment(1 - tilt, means, weight, bias)
    return (tilt * (bias + means @ weight) + torch.logaddexp(low, high)).sum(-1)


def _log_moment(t: Tensor, means: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """K(t) `[N, D]`."""
    return t * bias + torch.log1p(means.unsqueeze(-1) * torch.expm1(t.unsqueeze(1) * weight)).sum(1)


class SoftplusBound:
    """The bound of all units of a layer for N rows, kept up to date while μ and ξ move.

    Args:
        weight: W `[H, D]` in float64, from parents to units.
        bias: `[D]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias, self.exp_weight, self._one = weight, bias, weight.exp(), weight.new_ones(())
        self.tilt = self.mean = self.low = self.high = torch.zeros(())
        self._factors = (self.low,) * 4

    def start(self, means: Tensor) -> None:
        """Take a good ξ for μ `[N, H]`."""
        self.tilt = self.weight.new_full((len(means), len(self.bias)), 0.5)
        self.tighten(means, steps=3)

    def value(self) -> Tensor:
        """Σ_i of the bound, `[N]`."""
        return (self.tilt * self.mean + torch.logaddexp(self.low, self.high)).sum(-1)

    def slope(self, j: int, old: Tensor) -> Tensor:
        """The derivative of the bound with respect to μ_j `[N]`, at its present value `old`."""
        e_low = torch.exp(-self.tilt * self.weight[j])
        e_high = e_low * self.exp_weight[j] - 1
        e_low -= 1
        d_low, d_high = (torch.addcmul(self._one, old.unsqueeze(-1), e).clamp_min(_TINY) for e in (e_low, e_high))
        share = (self.high - self.low).sigmoid()
        self._factors = e_low, e_high, d_low, d_high
        slope = torch.lerp(e_low / d_low, e_high / d_high, share)
        return slope.sum(-1) + self.tilt @ self.weight[j]

    def move(self, j: int, new: Tensor) -> None:
        """Set μ_j `[N]`, after :meth:`slope` of the same j."""
        e_low, e_high, d_low, d_high = self._factors
        wide = new.unsqueeze(-1)
        self.low += torch.addcmul(self._one, wide, e_low).clamp_min_(_TINY).div_(d_low).log_()
        self.high += torch.addcmul(self._one, wide, e_high).clamp_min_(_TINY).div_(d_high).log_()

    def tighten(self, means: Tensor, *, steps: int = 1) -> None:
        """Lower the bound in ξ by safeguarded Newton steps, for μ `[N, H]`; no unit's bound is raised.

        Args:
            means: μ.
            steps: the most steps; fewer where none moves ξ by more than 1e-9.
        """
        self.mean = self.bias + means @ self.weight
        below, above = torch.zeros_like(self.tilt), torch.ones_like(self.tilt)  # the minimum lies between
        tilt = self.tilt
        low, high, first, second = self._moments(tilt, means)
        best = tilt * self.mean + torch.logaddexp(low, high)
        self.low, self.high = low, high
        for step in range(steps):
            below, above = torch.where(first < 0, tilt, below), torch.where(first < 0, above, tilt)
            new = tilt - first / second.clamp_min(_TINY)
            new = torch.where((new >= below) & (new <= above), new, (below + above) / 2)
            moved = float((new - tilt).abs().max())
            tilt, last = new, step + 1 == steps or moved < 1e-9
            if last:
                low, high = self._log_moments(tilt, means)
            else:
                low, high, first, second = self._moments(tilt, means)
            value = tilt * self.mean + torch.logaddexp(low, high)
            better = value < best
            best = torch.where(better, value, best)
            self.tilt = torch.where(better, tilt, self.tilt)
            self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
            if last:
                break

    def _log_moments(self, tilt: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """K(−ξ) and K(1 − ξ), `[N, D]` each."""
        low, high = -tilt * self.bias, (1 - tilt) * self.bias
        for j, weight in enumerate(self.weight):
            one = means[:, j : j + 1]
            e_low = torch.exp(-tilt * weight).mul_(one)  # μ e^{tW}
            e_high = e_low * self.exp_weight[j]
            low += e_low.add_(1 - one).clamp_min_(_TINY).log_()
            high += e_high.add_(1 - one).clamp_min_(_TINY).log_()
        return low, high

    def _moments(self, tilt: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`_log_moments`, and the first and second derivative of the bound in ξ, `[N, D]` each."""
        low, high = -tilt * self.bias, (1 - tilt) * self.bias
        mean_low, mean_high = self.bias.expand_as(tilt).clone(), self.bias.expand_as(tilt).clone()
        var_low, var_high = torch.zeros_like(tilt), torch.zeros_like(tilt)
        for j, weight in enumerate(self.weight):
            one = means[:, j : j + 1]
            e_low = torch.exp(-tilt * weight).mul_(one)
            e_high = e_low * self.exp_weight[j]
            for e, total, mean, var in ((e_low, low, mean_low, var_low), (e_high, high, mean_high, var_high)):
                factor = (e + (1 - one)).clamp_min_(_TINY)
                tilted = e.div_(factor)  # the probability of the bit under the law tilted by e^{tz}
                total += factor.log_()
                mean.addcmul_(tilted, weight)
                var.addcmul_(tilted.mul_(1 - tilted), weight**2)
        share = (high - low).sigmoid()
        first = self.mean - torch.lerp(mean_low, mean_high, share)
        second = torch.lerp(var_low, var_high, share) + share * (1 - share) * (mean_high - mean_low) ** 2
        return low, high, first, second


_TINY = 1e-300
