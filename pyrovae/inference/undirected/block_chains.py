"""Many block-Gibbs chains of one undirected distribution, each perhaps at its own temperature, with their energies."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrovae.distributions.boltzmann import BoltzmannMachine, BoltzmannMarginal
from pyrovae.distributions.rbm import RBM
from pyrovae.distributions.undirected import Undirected
from pyrovae.ops import boltzmann_sweep, colour_blocks, rbm_hidden, rbm_sweep


class RBMChains:
    """Chains of p_β(v, h) ∝ exp(−β E(v, h) + (1 − β) b₀ᵀv) of an RBM; β = 1 where no temperatures are given.

    Args:
        distribution: the RBM.
        visible: first visible states `[R, D]`, copied; the hidden ones are drawn given these, at β = 1.
        base_bias: b₀ `[D]`; None is 0.

    Attributes:
        visible: `[R, D]`.
        hidden: `[R, H]`.
        probs: p(h = 1 | v) of the last sweep, `[R, H]`, at each row's β.
    """

    def __init__(self, distribution: RBM, visible: Tensor, base_bias: Tensor | None = None) -> None:
        weight = distribution.W
        self.visible = visible.detach().to(weight).clone()
        self.hidden = weight.new_empty(len(visible), weight.shape[1])
        self.base_bias = None if base_bias is None else base_bias.to(weight)
        self._means = torch.empty_like(self.visible)
        self.probs = torch.empty_like(self.hidden)
        self._fields: Tensor | None = None
        rbm_hidden(self.visible, self.hidden, weight, distribution.c, probs=self.probs)

    def sweep(self, distribution: RBM, num_sweeps: int = 1, inverse_temperature: Tensor | None = None) -> None:
        """Draw all v given h, then all h given v, so many times; β is `[R, 1]`."""
        if inverse_temperature is not None and self._fields is None:
            self._fields = torch.empty_like(self.hidden)
        rbm_sweep(
            self.visible,
            self.hidden,
            distribution.W,
            distribution.b,
            distribution.c,
            num_sweeps=num_sweeps,
            inverse_temperature=inverse_temperature,
            base_bias=self.base_bias,
            probs=(self._means, self.probs),
            fields=self._fields,
        )

    @torch.no_grad()
    def energy(self, distribution: RBM) -> Tensor:
        """−∂ log p_β(v, h) / ∂β but for a constant: E(v, h) + b₀ᵀv, `[R]`.

        From the hidden units' inputs of the last sweep with temperatures, at no further matrix product.
        """
        fields = self._fields if self._fields is not None else torch.addmm(distribution.c, self.visible, distribution.W)
        bias = distribution.b if self.base_bias is None else distribution.b - self.base_bias
        return -(self.visible @ bias) - torch.linalg.vecdot(self.hidden, fields)


class BoltzmannChains:
    """Chains of p_β(x) ∝ exp(−β E(x) + (1 − β) b₀ᵀx) of a Boltzmann machine; β = 1 where no temperatures are given.

    Args:
        distribution: the machine, or its marginal; chains have all units.
        visible: first states of the first units `[R, k]`; the others start at fair coins.
        base_bias: b₀ `[n]`, or `[k]` of the first units; None is 0.

    Attributes:
        states: `[R, n]`.
    """

    def __init__(self, distribution: Undirected, visible: Tensor, base_bias: Tensor | None = None) -> None:
        _, bias = parameters(distribution)
        self.states = (torch.rand(len(visible), len(bias), device=bias.device) < 0.5).to(bias)
        self.states[:, : visible.shape[1]] = visible
        self.num_visible = distribution.event_shape[0]
        self.base_bias = None
        if base_bias is not None:
            self.base_bias = torch.zeros_like(bias, requires_grad=False)
            self.base_bias[: len(base_bias)] = base_bias
        self._colours = Colours()

    @property
    def visible(self) -> Tensor:
        """The units of the distribution, `[R, k]`."""
        return self.states[:, : self.num_visible]

    @torch.no_grad()
    def sweep(self, distribution: Undirected, num_sweeps: int = 1, inverse_temperature: Tensor | None = None) -> None:
        """Draw all units given the others, so many times; β is `[R, 1]`."""
        couplings, bias = parameters(distribution)
        boltzmann_sweep(
            self.states,
            couplings,
            bias,
            num_sweeps=num_sweeps,
            blocks=self._colours(couplings),
            inverse_temperature=inverse_temperature,
            base_bias=self.base_bias,
        )

    @torch.no_grad()
    def energy(self, distribution: Undirected) -> Tensor:
        """−∂ log p_β(x) / ∂β but for a constant: E(x) + b₀ᵀx, `[R]`."""
        couplings, bias = parameters(distribution)
        offset = bias if self.base_bias is None else bias - self.base_bias
        return -torch.linalg.vecdot(self.states @ couplings, self.states) / 2 - self.states @ offset


class Colours:
    """The colouring of couplings, found anew only when their zeros change."""

    def __init__(self) -> None:
        self._pattern: Tensor | None = None
        self._blocks: tuple[Tensor, ...] = ()

    def __call__(self, couplings: Tensor) -> tuple[Tensor, ...]:
        """Blocks of units that are not coupled."""
        pattern = couplings.detach() != 0
        if self._pattern is None or not torch.equal(pattern, self._pattern):
            self._pattern, self._blocks = pattern, colour_blocks(couplings.detach())
        return self._blocks


def parameters(distribution: Undirected) -> tuple[Tensor, Tensor]:
    """J and b of a Boltzmann machine or its marginal."""
    if not isinstance(distribution, (BoltzmannMachine, BoltzmannMarginal)):
        raise TypeError(f"expected an RBM or a BoltzmannMachine, got {type(distribution).__name__}, without block chains")
    if distribution.b.dim() != 1:
        raise ValueError(f"expected one machine, biases [n], got {list(distribution.b.shape)}; pass each of them in turn")
    return distribution.J, distribution.b


def chains_of(distribution: Undirected, visible: Tensor, base_bias: Tensor | None = None) -> RBMChains | BoltzmannChains:
    """Chains of a distribution that start from visible states `[R, D]`."""
    kind = RBMChains if isinstance(distribution, RBM) else BoltzmannChains
    return kind(distribution, visible, base_bias)  # type: ignore[arg-type]
