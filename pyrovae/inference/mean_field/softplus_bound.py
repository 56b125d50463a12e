"""An upper bound of E_q[softplus(z)], z = b + Σ_j h_j W_j, for independent bits h_j ~ Bern(μ_j).

For every ξ in [0, 1], softplus(z) = ξz + log(e^{−ξz} + e^{(1−ξ)z}), so that by Jensen's inequality

    E[softplus(z)] ≤ ξ E[z] + log(e^{K(−ξ)} + e^{K(1−ξ)}),    K(t) = log E[e^{tz}] = tb + Σ_j log(1 − μ_j + μ_j e^{tW_j}),

convex in ξ. ξ = 0 is the plain Jensen bound log(1 + E[e^z]).

All take the logits of μ: where μ rounds to 1, 1 − μ = σ(−logit) may still be what outweighs a small e^{tW}.

References:
    Mean Field Theory for Sigmoid Belief Networks, section 3 (Saul, Jaakkola, Jordan, 1996)
    https://arxiv.org/abs/cs/9603102
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bound_of_softplus(logits: Tensor, tilt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Σ_i of the bound over the units of a layer, `[N]`; differentiable, with `[N, H, D]` numbers in memory.

    Args:
        logits: of μ of the parents, `[N, H]`.
        tilt: ξ of each unit, `[N, D]`.
        weight: `[H, D]`.
        bias: `[D]`.
    """
    low = _log_moment(-tilt, logits, weight, bias)
    high = _log_moment(1 - tilt, logits, weight, bias)
    return (tilt * (bias + logits.sigmoid() @ weight) + torch.logaddexp(low, high)).sum(-1)


def _log_moment(t: Tensor, logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """K(t) `[N, D]`."""
    off, on = logsigmoid(-logits).unsqueeze(-1), logsigmoid(logits).unsqueeze(-1)
    return t * bias + torch.logaddexp(off, on + t.unsqueeze(1) * weight).sum(1)


class SoftplusBound:
    """The bound of all units of a layer for N rows, kept up to date while μ and ξ move.

    Args:
        weight: W `[H, D]` in float64, from parents to units, of at most 600 in absolute value.
        bias: `[D]`.
    """

    LARGEST_LOGIT = 600.0  # of μ: e^600 and e^−600 are far from overflow and underflow

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias, self.exp_weight = weight, bias, weight.exp()
        self.tilt = self.mean = self.low = self.high = torch.zeros(())
        self._factors = (self.low,) * 4

    def start(self, logits: Tensor) -> None:
        """Take a good ξ for μ of these logits `[N, H]`."""
        self.tilt = self.weight.new_full((len(logits), len(self.bias)), 0.5)
        self.tighten(logits, steps=3)

    def value(self) -> Tensor:
        """Σ_i of the bound, `[N]`."""
        return (self.tilt * self.mean + torch.logaddexp(self.low, self.high)).sum(-1)

    def slope(self, j: int, old: Tensor) -> Tensor:
        """The derivative of the bound with respect to μ_j `[N]`, at the logit that it has, `old`."""
        e_low = torch.exp(-self.tilt * self.weight[j])
        e_high = e_low * self.exp_weight[j]
        d_low, d_high = self._factor(e_low, old), self._factor(e_high, old)
        self._factors = e_low, e_high, d_low, d_high
        odds = self.high - self.low
        # Either share may be tiny and its ratio huge: neither is to be had as 1 minus the other.
        slope = ((e_low - 1) / d_low).mul_((-odds).sigmoid_()) + ((e_high - 1) / d_high).mul_(odds.sigmoid_())
        return slope.sum(-1) + self.tilt @ self.weight[j]

    def move(self, j: int, new: Tensor) -> None:
        """Set the logit of μ_j `[N]`, after :meth:`slope` of the same j."""
        e_low, e_high, d_low, d_high = self._factors
        self.low += self._factor(e_low, new).log_().sub_(d_low.log_())
        self.high += self._factor(e_high, new).log_().sub_(d_high.log_())

    @staticmethod
    def _factor(e: Tensor, logit: Tensor) -> Tensor:
        """1 − μ + μ e, `[N, D]`, without loss where μ rounds to 1."""
        wide = logit.unsqueeze(-1)
        return torch.addcmul((-wide).sigmoid_(), wide.sigmoid(), e)

    def tighten(self, logits: Tensor, *, steps: int = 1) -> None:
        """Lower the bound in ξ by safeguarded Newton steps; no unit's bound is raised.

        Args:
            logits: of μ, `[N, H]`.
            steps: the most steps; fewer where none moves ξ by more than 1e-9.
        """
        self.mean = self.bias + logits.sigmoid() @ self.weight
        below, above = torch.zeros_like(self.tilt), torch.ones_like(self.tilt)  # the minimum lies between
        tilt = self.tilt
        low, high, first, second = self._moments(tilt, logits)
        best = tilt * self.mean + torch.logaddexp(low, high)
        self.low, self.high = low, high
        for step in range(steps):
            below, above = torch.where(first < 0, tilt, below), torch.where(first < 0, above, tilt)
            new = tilt - first / second.clamp_min(_TINY)
            new = torch.where((new >= below) & (new <= above), new, (below + above) / 2)
            moved = float((new - tilt).abs().max())
            tilt, last = new, step + 1 == steps or moved < 1e-9
            if last:
                low, high = self._log_moments(tilt, logits)
            else:
                low, high, first, second = self._moments(tilt, logits)
            value = tilt * self.mean + torch.logaddexp(low, high)
            better = value < best
            best = torch.where(better, value, best)
            self.tilt = torch.where(better, tilt, self.tilt)
            self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
            if last:
                break

    def _log_moments(self, tilt: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """K(−ξ) and K(1 − ξ), `[N, D]` each."""
        low, high = -tilt * self.bias, (1 - tilt) * self.bias
        for j, weight in enumerate(self.weight):
            on, off = logits[:, j : j + 1].sigmoid(), (-logits[:, j : j + 1]).sigmoid()
            e_low = torch.exp(-tilt * weight).mul_(on)  # μ e^{tW}
            e_high = e_low * self.exp_weight[j]
            low += e_low.add_(off).log_()
            high += e_high.add_(off).log_()
        return low, high

    def _moments(self, tilt: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`_log_moments`, and the first and second derivative of the bound in ξ, `[N, D]` each."""
        low, high = -tilt * self.bias, (1 - tilt) * self.bias
        mean_low, mean_high = self.bias.expand_as(tilt).clone(), self.bias.expand_as(tilt).clone()
        var_low, var_high = torch.zeros_like(tilt), torch.zeros_like(tilt)
        for j, weight in enumerate(self.weight):
            on, off = logits[:, j : j + 1].sigmoid(), (-logits[:, j : j + 1]).sigmoid()
            e_low = torch.exp(-tilt * weight).mul_(on)
            e_high = e_low * self.exp_weight[j]
            for e, total, mean, var in ((e_low, low, mean_low, var_low), (e_high, high, mean_high, var_high)):
                factor = e + off
                tilted = e.div_(factor)  # the probability of the bit under the law tilted by e^{tz}
                total += factor.log_()
                mean.addcmul_(tilted, weight)
                var.addcmul_(tilted.mul_(1 - tilted), weight**2)
        share = (high - low).sigmoid()
        first = self.mean - torch.lerp(mean_low, mean_high, share)
        second = torch.lerp(var_low, var_high, share) + share * (1 - share) * (mean_high - mean_low) ** 2
        return low, high, first, second


_TINY = 1e-300
