"""The gradient of an undirected model's log likelihood: data expectations minus model expectations, centred if wanted.

Written out by hand: no computation graph is built. Centring replaces v and h by v − μ and h − λ in the gradient of the
couplings and takes the biases' gradient along, which is the plain gradient of the same model with biases redefined. The
maximum stays where it is as long as the couplings and all biases may move, each by itself: then both gradients are zero
together. Where some are frozen, masked, tied or functions of others, only the plain gradient ends there. A Gaussian prior on
the parameters is part of what is centred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae.distributions.rbm import RBM
from pyrovae.distributions.undirected import Undirected
from pyrovae.inference.undirected.block_chains import Colours, parameters
from pyrovae.inference.undirected.negative_phase import NegativePhase
from pyrovae.ops import boltzmann_moments, boltzmann_sweep, index_to_codes, rbm_moments

SLIDE = 0.01  # of the running means, as in Melchior et al.
CLAMPED_BITS = 10  # up to which hidden units are summed out exactly in a Boltzmann machine's positive phase


class RBMGradient:
    """The gradient of −mean log p(v) with respect to W, b and c of an RBM.

    Cost: three matrix products, 2 B D H + C D H multiplications beside the negative phase's own, or an enumeration.

    Args:
        mean: of the training data `[D]`, which is μ.
        centered: subtract μ, and λ, the running mean of the hidden units given data.
        decay: the precision of a Gaussian prior on W, b and c, over the number of data: what times θ the plain gradient gets.
    """

    def __init__(self, mean: Tensor, *, centered: bool, decay: float = 0.0) -> None:
        self.mu, self.centered, self.decay = mean, centered, decay
        self.lam: Tensor | None = None
        self._v = self._h = mean.new_empty(0, 0)
        self._out: Tensor | None = None

    @torch.no_grad()
    def __call__(self, rbm: Undirected, x: Tensor, negative: NegativePhase | None, index: Tensor | None = None) -> list[Tensor]:
        """Gradients like `rbm.parameters`, in buffers that the next call overwrites.

        Args:
            rbm: the distribution at the present parameters.
            x: rows of data `[B, D]`.
            negative: where model states come from; None enumerates them.
            index: unused.
        """
        assert isinstance(rbm, RBM)
        rows = len(x)
        probs = torch.addmm(rbm.c, x, rbm.W).sigmoid_()  # [B, H]
        if negative is None:
            return self._exact(rbm, x, probs)
        v, h = negative(rbm, x, probs)
        assert h is not None
        total = rows + len(v)
        if self._v.shape[0] != total + 2:
            self._v, self._h = x.new_empty(total + 2, x.shape[1]), x.new_empty(total + 2, probs.shape[1])
            self._out = torch.empty_like(rbm.W)
        left, right = self._v, self._h
        left[:rows], left[rows:total] = x, v
        torch.mul(probs, -1 / rows, out=right[:rows])
        torch.mul(h, 1 / len(v), out=right[rows:total])
        b = v.mean(0) - x.mean(0)  # of −log p
        c = right[:total].sum(0)
        if self.decay:
            b, c = b.add_(rbm.b, alpha=self.decay), c.add_(rbm.c, alpha=self.decay)
        if not self.centered:
            left, right = left[:total], right[:total]
        else:
            # Σ (v − μ)(h − λ)ᵀ = Σ v hᵀ − b λᵀ − μ cᵀ with signed weights: two more rows
            lam = self._slide(probs)
            left[total], right[total] = b, -lam
            left[total + 1], right[total + 1] = self.mu, -c
        weight = torch.mm(left.t(), right, out=self._out)
        if self.decay:
            weight.add_(rbm.W, alpha=self.decay)
        if self.centered:
            b, c = b - weight @ lam, c - weight.t() @ self.mu
        return [weight, b, c]

    def _exact(self, rbm: RBM, x: Tensor, probs: Tensor) -> list[Tensor]:
        vh, v, h = rbm_moments(rbm.W, rbm.b, rbm.c)
        weight, b, c = torch.addmm(vh, x.t(), probs, alpha=-1 / len(x)), v - x.mean(0), h - probs.mean(0)
        if self.decay:
            weight, b, c = (g + self.decay * p for g, p in zip((weight, b, c), rbm.parameters, strict=True))
        if self.centered:
            lam = self._slide(probs)
            weight = weight - torch.outer(b, lam) - torch.outer(self.mu, c)
            b, c = b - weight @ lam, c - weight.t() @ self.mu
        return [weight, b, c]

    def _slide(self, probs: Tensor) -> Tensor:
        mean = probs.mean(0)
        self.lam = mean if self.lam is None else self.lam.lerp_(mean, SLIDE)
        return self.lam


class BoltzmannGradient:
    """The gradient of −mean log p(v) with respect to J and b of a Boltzmann machine with visible and hidden units.

    Data expectations over hidden units are exact up to 10 of them; beyond, each row of the data keeps a state of its hidden
    units, moved on by Gibbs with the row clamped whenever it comes up: asymptotically right at falling learning rates.

    Args:
        mean: of the training data `[k]`.
        num_data: rows of the training data.
        centered: subtract the data's mean, and the running mean of the hidden units given data.
        k: clamped sweeps at each visit.
        decay: the precision of a Gaussian prior over the number of data: on b, and on all entries of J where J itself is a
            parameter, else on the couplings above its diagonal.
    """

    def __init__(self, mean: Tensor, num_data: int, *, centered: bool, k: int, decay: float = 0.0) -> None:
        self.mean, self.num_data, self.centered, self.k, self.decay = mean, num_data, centered, k, decay
        self.lam: Tensor | None = None
        self._hidden: Tensor | None = None
        self._colours = Colours()

    @torch.no_grad()
    def __call__(
        self, machine: Undirected, x: Tensor, negative: NegativePhase | None, index: Tensor | None = None
    ) -> list[Tensor]:
        """Gradients like `machine.parameters`.

        Args:
            machine: the distribution at the present parameters.
            x: rows of data `[B, k]`.
            negative: where model states come from; None enumerates them.
            index: which rows of the data they are `[B]`; None says all.
        """
        couplings, bias = parameters(machine)
        second, first, start = self._data_moments(couplings, bias, x, index)
        if negative is None:
            model_second, model_first = boltzmann_moments(couplings, bias)
        else:
            s, _ = negative(machine, x, start)
            model_second, model_first = s.t() @ s / len(s), s.mean(0)
        b = model_first - first
        J = (model_second - second).fill_diagonal_(0)  # of a coupling, J_ij and J_ji together
        if self.decay:
            J = J.add_(couplings, alpha=self.decay * (2 if couplings.is_leaf else 1))
            b = b.add_(bias, alpha=self.decay)
        if self.centered:
            self.lam = first.clone() if self.lam is None else self.lam.lerp_(first, SLIDE)
            m = torch.cat([self.mean, self.lam[len(self.mean) :]])
            J = (J - torch.outer(b, m) - torch.outer(m, b)).fill_diagonal_(0)
        J = (J + J.t()) / 2  # symmetric to the last bit
        if self.centered:
            b = b - (J / 2 if couplings.is_leaf else J) @ m  # J moves by half where both J_ij and J_ji are parameters
        return [J / 2, b]

    def _data_moments(self, couplings: Tensor, bias: Tensor, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """E[s sᵀ] and E[s] over data and the hidden units given them, and one state s `[B, n]` for each row."""
        k, rows = x.shape[1], len(x)
        if k == len(bias):
            return x.t() @ x / rows, x.mean(0), x
        inner, field = couplings[k:, k:], bias[k:] + x @ couplings[:k, k:]
        if len(bias) - k <= CLAMPED_BITS:
            codes = index_to_codes(torch.arange(2 ** len(inner), device=x.device), 2, len(inner)).to(x.dtype)
            p = (field @ codes.t() + ((codes @ inner) * codes).sum(1) / 2).softmax(1)  # p(h | x), [B, 2^H]
            h = p @ codes
            vh, hh = x.t() @ h / rows, codes.t() @ (p.mean(0).unsqueeze(-1) * codes)
            second = torch.cat([torch.cat([x.t() @ x / rows, vh], 1), torch.cat([vh.t(), hh], 1)])
            state = torch.cat([x, codes[torch.multinomial(p, 1).squeeze(1)]], 1)
            return second, torch.cat([x.mean(0), h.mean(0)]), state
        if self._hidden is None:
            self._hidden = torch.rand(self.num_data, len(bias) - k, device=x.device) < 0.5
        places = slice(None) if index is None else index
        h = self._hidden[places].to(x.dtype)
        boltzmann_sweep(h, inner, field, num_sweeps=self.k, blocks=self._colours(inner))
        self._hidden[places] = h.bool()
        s = torch.cat([x, h], 1)
        return s.t() @ s / rows, s.mean(0), s
