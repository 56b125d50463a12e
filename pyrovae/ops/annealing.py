"""Annealed importance sampling of undirected models: chains that move from independent units to the model, and their weights.

The path goes from a base of independent units, of known partition function, at β = 0 to the model at β = 1:

    RBM                p_β(v) ∝ exp((1 − β) aᵀv + β bᵀv + Σ_j softplus(β (c_j + (vW)_j)))
    Boltzmann machine  p_β(x) ∝ exp(½β xᵀJx + (1 − β) aᵀx + β bᵀx)

where a are the logits of the base. A chain that starts at β_0 = 0 and moves by Gibbs sweeps collects
log w = Σ_k f_{k+1}(x_k) − f_k(x_k), each term before the move at β_{k+1}; then E[w] = Z_1 / Z_0. Annealed the
other way, from an exact draw of the model, chains have E[1 / w] = Z_0 / Z_1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.ops.block_gibbs import boltzmann_sweep, colour_blocks


class RbmPath:
    """The path to an RBM, its hidden units summed out in the weights.

    Costs two matrix products a temperature, `[M, D] x [D, H]` and back; the weights come from the pre-activations that the
    sweep needs anyway. Chains move in place, in the dtype of W; log weights are summed in float64.

    Args:
        W: weights `[D, H]`.
        b: visible biases `[D]`.
        c: hidden biases `[H]`.
        base: logits of the base `[D]`.

    References:
        On the quantitative analysis of deep belief networks (Salakhutdinov and Murray, 2008)
        https://doi.org/10.1145/1390156.1390266
    """

    def __init__(self, W: Tensor, b: Tensor, c: Tensor, base: Tensor) -> None:
        self.W, self.b, self.c, self.base = W.detach(), b.detach(), c.detach(), base.detach().to(W)
        # No |c_j + (vW)_j| is larger, so that a small step in β needs no care for overflow.
        self.reach = float((self.c.abs() + self.W.abs().sum(0)).max()) if W.numel() else 0.0

    @property
    def log_z_base(self) -> Tensor:
        """Log Z at β = 0, in float64: that of the base, and log 2 a hidden unit."""
        return softplus(self.base.double()).sum() + len(self.c) * math.log(2)

    def forward(self, betas: Sequence[float], num_chains: int) -> Tensor:
        """Log weights `[M]` of chains from the base, float64: E[w] = Z_1 / Z_0.

        Args:
            betas: from 0 to 1, increasing.
            num_chains: M.
        """
        chains = _RbmChains(self, _bernoulli(self.base.expand(num_chains, -1)))
        for k in range(len(betas) - 1):
            chains.weigh(betas[k], betas[k + 1])
            if k + 2 < len(betas):
                chains.move(betas[k + 1])
        return chains.log_w

    def backward(self, betas: Sequence[float], start: Tensor) -> Tensor:
        """Log weights `[M]` of chains from the model, float64: E[1 / w] = Z_0 / Z_1.

        Args:
            betas: from 0 to 1, increasing.
            start: exact independent draws from the model, `[M, D]`.
        """
        chains = _RbmChains(self, start.to(self.W).clone())
        for k in reversed(range(len(betas) - 1)):
            chains.weigh(betas[k], betas[k + 1])
            if k:
                chains.move(betas[k])
        return chains.log_w


class BoltzmannPath:
    """The path to a Boltzmann machine, or to many with the same couplings.

    Costs a product `[M, n] x [n, n]` a temperature for the weights, and a sweep of
    :func:`pyrovae.ops.block_gibbs.boltzmann_sweep`.

    Args:
        J: couplings `[n, n]`, symmetric with a zero diagonal.
        b: biases `[*batch, n]`.
        base: logits of the base `[*batch, n]` or `[n]`.
    """

    def __init__(self, J: Tensor, b: Tensor, base: Tensor) -> None:
        self.J, self.b = J.detach(), b.detach()
        self.base = base.detach().to(self.b).expand_as(self.b)
        self.blocks = colour_blocks(self.J)

    @property
    def log_z_base(self) -> Tensor:
        """Log Z of the base `[*batch]`, in float64."""
        return softplus(self.base.double()).sum(-1)

    def forward(self, betas: Sequence[float], num_chains: int) -> Tensor:
        """Log weights `[M, *batch]`, float64; see :meth:`RbmPath.forward`."""
        x = _bernoulli(self.base.expand(num_chains, *self.base.shape))
        log_w = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
        for k in range(len(betas) - 1):
            log_w += self._gain(x, betas[k], betas[k + 1])
            if k + 2 < len(betas):
                self._sweep(x, betas[k + 1])
        return log_w

    def backward(self, betas: Sequence[float], start: Tensor) -> Tensor:
        """Log weights `[M, *batch]` from exact draws `[M, *batch, n]`; see :meth:`RbmPath.backward`."""
        x = start.to(self.J).clone()
        log_w = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
        for k in reversed(range(len(betas) - 1)):
            log_w += self._gain(x, betas[k], betas[k + 1])
            if k:
                self._sweep(x, betas[k])
        return log_w

    def _gain(self, x: Tensor, low: float, high: float) -> Tensor:
        """f_high(x) − f_low(x), linear in β."""
        return (high - low) * (x * (0.5 * (x @ self.J) + self.b - self.base)).sum(-1).double()

    def _sweep(self, x: Tensor, beta: float) -> None:
        bias = torch.lerp(self.base, self.b, beta)
        if bias.dim() > 1:
            bias = bias.expand_as(x).reshape(-1, x.shape[-1])
        boltzmann_sweep(x.view(-1, x.shape[-1]), beta * self.J, bias, blocks=self.blocks)


class _RbmChains:
    """Visible states of M chains, their pre-activations and log weights."""

    def __init__(self, path: RbmPath, v: Tensor) -> None:
        self.path, self.v = path, v
        self.slope = None if torch.equal(path.base, path.b) else path.b - path.base
        self.a = v.new_empty(len(v), len(path.c))
        self.p, self.h, self.means = torch.empty_like(self.a), torch.empty_like(self.a), torch.empty_like(v)
        self.log_w = torch.zeros(len(v), dtype=torch.float64, device=v.device)
        self.fresh = False

    def weigh(self, low: float, high: float) -> None:
        """Add f_high(v) − f_low(v)."""
        self._activate()
        gain = _softplus_gain(self.a, self.p, self.h, low, high, self.path.reach)
        if self.slope is not None:
            gain += (high - low) * (self.v @ self.slope)
        self.log_w += gain

    def move(self, beta: float) -> None:
        """One block sweep h | v, v | h at β, which leaves p_β(v) invariant."""
        self._activate()
        path = self.path
        torch.mul(self.a, beta, out=self.p).sigmoid_()
        self.h.uniform_().lt_(self.p)
        bias = torch.lerp(path.base, path.b, beta)
        torch.addmm(bias, self.h, path.W.T, alpha=beta, out=self.means).sigmoid_()
        self.v.uniform_().lt_(self.means)
        self.fresh = False

    def _activate(self) -> None:
        if not self.fresh:
            torch.addmm(self.path.c, self.v, self.path.W, out=self.a)
            self.fresh = True


def _softplus_gain(a: Tensor, p: Tensor, t: Tensor, low: float, high: float, reach: float) -> Tensor:
    """Σ_j softplus(high a_j) − softplus(low a_j), `[M]`; `reach` bounds |a|, and the buffers p and t are overwritten.

    (1 + e^{high a}) / (1 + e^{low a}) = 1 + σ(low a)(e^{(high − low) a} − 1), which for small steps is exact to rounding and
    needs no difference of large numbers.
    """
    step = high - low
    if step * reach > 1:
        return (softplus(high * a, threshold=40) - softplus(low * a, threshold=40)).sum(-1)
    torch.mul(a, low, out=p).sigmoid_()
    return torch.mul(a, step, out=t).expm1_().mul_(p).log1p_().sum(-1)


def _bernoulli(logits: Tensor) -> Tensor:
    """Bits of the shape and dtype of `logits`."""
    p = torch.sigmoid(logits)
    return torch.rand_like(p).lt_(p)
