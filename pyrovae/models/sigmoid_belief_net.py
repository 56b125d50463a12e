"""Sigmoid belief nets: layers of binary units, each driven by the layer above."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.handlers import Module, own_params
from pyrovae.models.program import data_plate
from pyrovae.ops import SigmoidLayers


class SigmoidBeliefNet(Module):
    """A directed net of binary units.

    p(h_L) = Bern(σ(c)),   p(h_l | h_{l+1}) = Bern(σ(b_l + h_{l+1} W_l)),   p(x | h_1) = Bern(σ(b_0 + h_1 W_0)).

    Sites: `"h1"` (next to the data), `"h2"`, … and `"x"`, in the plate `"data"` at dim −1. Exact inference sums over
    2^hidden states of a layer (2^(h_l + h_{l+1}) for neighbouring layers).

    Args:
        visible: number of visible units D.
        hidden: number of hidden units, or one number a layer from the data upwards.

    Raises:
        ValueError: for sizes below 1.

    Example:
        >>> net = SigmoidBeliefNet(4, [3, 2])
        >>> tuple(net.sample(5).shape)
        (5, 4)

    References:
        Connectionist learning of belief networks (Neal, 1992)
        https://doi.org/10.1016/0004-3702(92)90065-6
    """

    capturable: ClassVar[bool] = True

    def __init__(self, visible: int, hidden: int | Sequence[int]) -> None:
        super().__init__()
        sizes = [visible, *(hidden if isinstance(hidden, Sequence) else [hidden])]
        if len(sizes) < 2 or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(f"expected visible >= 1 and hidden >= 1 units in every layer, got {visible} and {hidden}")
        self.sizes = tuple(sizes)
        self.prior = nn.Parameter(torch.empty(sizes[-1]))
        self.weights = nn.ParameterList(torch.empty(above, n) for n, above in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(torch.empty(n) for n in sizes[:-1])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1/units above) and set biases to 0."""
        with torch.no_grad():
            self.prior.zero_()
            for weight, bias in zip(self.weights, self.biases, strict=True):
                weight.normal_(0, weight.shape[0] ** -0.5)
                bias.zero_()

    def forward(
        self,
        x: Tensor | None = None,
        *,
        batch_size: int = 1,
        index: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """Run the program.

        Args:
            x: data `[B, visible]` in {0, 1}; None draws from the prior.
            batch_size: rows to draw where `x` is None.
            index: row numbers `[B]` of a minibatch in the data set.
            num_data: the size of that data set.

        Returns:
            The visible units `[..., B, visible]`.

        Raises:
            ValueError: if `x` has another width, or is empty.
        """
        with data_plate(x, self.sizes[0], batch_size=batch_size, index=index, num_data=num_data):
            above = pyro.sample(f"h{len(self.weights)}", dist.Bernoulli(logits=self.prior).to_event(1))
            for layer in range(len(self.weights) - 1, 0, -1):
                above = pyro.sample(f"h{layer}", self._layer(layer, above))
            return pyro.sample("x", self._layer(0, above), obs=x)

    def layers(self) -> SigmoidLayers:
        """What Exact, Gibbs and the bounds need to know of this net to take their fast routes."""
        sites = tuple(f"h{layer + 1}" for layer in range(len(self.weights)))
        return SigmoidLayers(sites, tuple(self.weights), tuple(self.biases), self.prior)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """`n` draws from the model, `[n, visible]`."""
        with pyro.poutine.block():
            return own_params(self)(batch_size=n)

    def mirror(self) -> nn.Sequential:
        """An encoder in the shape of the net, for a mean-field guide.

        One tanh layer, as wide as the wider of the visible and all hidden units, then a logit for every hidden unit, the top
        layer first: the order of the program. Fresh weights at each call.
        """
        visible, total = self.sizes[0], sum(self.sizes[1:])
        width = max(visible, total)
        return nn.Sequential(nn.Linear(visible, width), nn.Tanh(), nn.Linear(width, total)).to(self.prior)

    def _layer(self, layer: int, above: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.biases[layer] + above @ self.weights[layer]).to_event(1)
