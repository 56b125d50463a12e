"""Two or more layers of latents, each drawn given the layer above."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.nets import Activation, perceptron, positive, sizes_of
from pyrovae.models.program import VAE


class HierarchicalVAE(VAE):
    """h_L ~ its standard prior, h_l ~ p(h_l | net(h_{l+1})), x ~ p(x | decoder(h_1)).

    Sites `"h1"` (next to the data), `"h2"`, … and `"x"`, in the plate `"data"` at dim −1. A layer is `("normal", n)`,
    `("bernoulli", n)` or `("categorical", (N, K))`, event `[n]`, `[n]` or `[N, K]` (one-hot), in any mix. Standard means
    N(0, 1), Bern(1/2), Cat(1/K). Relax bits and classes as in :class:`CategoricalVAE`; pixels and beta, which weighs all
    layers, as in :class:`GaussianVAE`. The guide of the model is `AmortizedStructured(model)`, q(h1 | x) q(h2 | h1) …

    Args:
        visible: number of pixels.
        layers: from the data upwards.
        hidden: hidden sizes of the encoder from x to h1; the decoder has them reversed.
        between: hidden sizes of the nets from a layer to the one above; those of the model have them reversed. None takes
            `hidden`.
        likelihood: see :class:`GaussianVAE`.
        beta: weight of the KL; also the 0-d buffer `beta`, which may be changed in place.
        scale: standard deviation of Normal pixels.
        levels: number of values of categorical pixels.
        activation: between layers, a module class or its name in `torch.nn`.

    Raises:
        ValueError: as :class:`GaussianVAE`; for no layers, another kind or shape of a layer.

    Example:
        >>> model = HierarchicalVAE(6, [("normal", 4), ("categorical", (2, 3))], (5,))
        >>> tuple(model.sample(3).shape), {site: net[-1].out_features for site, net in model.mirror().items()}
        ((3, 6), {'h1': 8, 'h2': 6})

    References:
        Importance Weighted Autoencoders, two stochastic layers (Burda, Grosse, Salakhutdinov, 2016)
        https://arxiv.org/abs/1509.00519
        Ladder Variational Autoencoders (Sønderby et al., 2016)
        https://arxiv.org/abs/1602.02282
    """

    top: Tensor

    def __init__(
        self,
        visible: int = 784,
        layers: Sequence[Sequence[Any]] = (("normal", 100), ("normal", 50)),
        hidden: int | Sequence[int] = (200, 200),
        *,
        between: int | Sequence[int] | None = None,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        scale: float = 0.1,
        levels: int = 256,
        activation: Activation = nn.ReLU,
    ) -> None:
        read = tuple(_Layer.read(layer) for layer in layers)
        if not read:
            raise ValueError("expected at least one layer, such as ('normal', 50), got none")
        above = sizes_of(hidden if between is None else between)
        super().__init__(
            visible,
            read[0].size,
            hidden,
            likelihood=likelihood,
            beta=beta,
            scale=scale,
            levels=levels,
            activation=activation,
            layers=[layer.written for layer in read],
            between=list(above),
        )
        self.layers, self.between = read, above
        self.nets = nn.ModuleList(
            perceptron([high.size, *reversed(above), low.outputs], self._activation) for low, high in itertools.pairwise(read)
        )
        self.register_buffer("top", torch.zeros(read[-1].outputs))

    def mirror(self) -> dict[str, nn.Sequential]:
        """Encoders for `AmortizedStructured`, in the order of its draws: that of `"h1"` takes x, the next one the value of h1.

        Each gives logits, or all means and then the logarithms of scales; a one-hot value is flattened by the net.
        """
        nets = {"h1": self._encoder(self.layers[0].outputs)}
        for i, (low, high) in enumerate(itertools.pairwise(self.layers), start=2):
            net = perceptron([low.size, *self.between, high.outputs], self._activation).to(self.beta)
            nets[f"h{i}"] = net if len(low.shape) == 1 else nn.Sequential(nn.Flatten(-len(low.shape), -1), *net)
        return nets

    def _code(self) -> Tensor:
        nets, outputs = self.nets, self.top
        for i in range(len(self.layers), 0, -1):
            layer = self.layers[i - 1]
            value = pyro.sample(f"h{i}", layer(outputs))
            value = value.reshape((*value.shape[: value.dim() - len(layer.shape)], layer.size))
            if i > 1:
                outputs = nets[i - 2](value)
        return value


@dataclass(frozen=True)
class _Layer:
    """A layer's distribution, given the outputs of a net; all zeros stand for the standard one."""

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def read(cls, layer: Sequence[Any]) -> _Layer:
        wanted = "('normal', n), ('bernoulli', n) or ('categorical', (N, K)) with K >= 2"
        if isinstance(layer, str) or len(layer) != 2 or layer[0] not in ("normal", "bernoulli", "categorical"):
            raise ValueError(f"expected a layer {wanted}, got {layer!r}")
        kind, shape = layer
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(sizes) != (2 if kind == "categorical" else 1):
            raise ValueError(f"expected a layer {wanted}, got {layer!r}")
        positive(sizes[0], f"the size of layer {layer!r}")
        positive(sizes[-1], f"the size of layer {layer!r}", least=len(sizes))
        return cls(kind, sizes)

    @property
    def written(self) -> list[Any]:
        return [self.kind, list(self.shape) if len(self.shape) > 1 else self.shape[0]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def outputs(self) -> int:
        return self.size * (2 if self.kind == "normal" else 1)

    def __call__(self, outputs: Tensor) -> Any:
        if self.kind == "normal":
            loc, log_scale = outputs.chunk(2, -1)
            return dist.Normal(loc, log_scale.exp()).to_event(1)
        if self.kind == "bernoulli":
            return dist.Bernoulli(logits=outputs).to_event(1)
        return dist.OneHotCategorical(logits=outputs.reshape((*outputs.shape[:-1], *self.shape))).to_event(1)
