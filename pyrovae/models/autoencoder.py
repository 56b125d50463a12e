"""The deterministic autoencoder: the baseline without a distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrovae.models.likelihood import BernoulliPixels
from pyrovae.models.nets import Activation, named_activation, perceptron, positive, reset, sizes_of


class AutoEncoder(nn.Module):
    """x → z → x̂, no latent distribution and no bound: a plain module, trained by any optimizer on `loss(x).mean()`.

    Its nets are those of `GaussianVAE(visible, latent, hidden)`, but for the scales that the latter's encoder gives too.

    Args:
        visible: number of pixels.
        latent: width of the code.
        hidden: hidden sizes from the data to the code; the decoder has them reversed.
        loss: "cross_entropy" (pixels in [0, 1], decoded through a sigmoid) or "squared" (real pixels, decoded as they are).
        activation: between layers, a module class or its name in `torch.nn`.

    Raises:
        ValueError: for sizes below 1 or an unknown loss.

    Example:
        >>> net = AutoEncoder(6, 2, (5,))
        >>> x = torch.rand(3, 6, dtype=net.decoder[-1].bias.dtype)
        >>> tuple(net.encode(x).shape), tuple(net(x).shape), tuple(net.loss(x).shape)
        ((3, 2), (3, 6), (3,))

    References:
        Reducing the Dimensionality of Data with Neural Networks (Hinton, Salakhutdinov, 2006)
        https://doi.org/10.1126/science.1127647
    """

    def __init__(
        self,
        visible: int = 784,
        latent: int = 2,
        hidden: int | Sequence[int] = (512, 256),
        *,
        loss: str = "cross_entropy",
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        if loss not in ("cross_entropy", "squared"):
            raise ValueError(f"expected loss to be 'cross_entropy' or 'squared', got {loss!r}")
        between = named_activation(activation)
        sizes = (positive(visible, "visible"), *sizes_of(hidden), positive(latent, "latent"))
        self.visible, self.latent, self.hidden, self._loss = visible, latent, sizes[1:-1], loss
        self._activation = between
        self.encoder = perceptron(sizes, between)
        self.decoder = perceptron(sizes[::-1], between)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON."""
        sizes = {"visible": self.visible, "latent": self.latent, "hidden": list(self.hidden)}
        return {**sizes, "loss": self._loss, "activation": self._activation.__name__}

    def reset_parameters(self) -> None:
        """Draw both nets anew, by torch's own rules for a linear layer."""
        reset(self)

    @torch.no_grad()
    def initialize_bias(self, x: Tensor) -> None:
        """Set the decoder's last bias to the mean of data `[n, visible]`, or its logit, (sum + 1) / (n + 2)."""
        last = self.decoder[-1].bias
        assert isinstance(last, Tensor)
        last.copy_(BernoulliPixels().bias(x.to(last)) if self._loss == "cross_entropy" else x.mean(0))

    def encode(self, x: Tensor) -> Tensor:
        """Codes `[..., latent]` of data `[..., visible]`."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels `[..., visible]` of codes `[..., latent]`."""
        outputs = self.decoder(z)
        return torch.sigmoid(outputs) if self._loss == "cross_entropy" else outputs

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions of data `[..., visible]`."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor) -> Tensor:
        """The error `[...]` of each row of `x [..., visible]`, summed over pixels: cross-entropy in nats, or squares."""
        outputs = self.decoder(self.encode(x))
        if self._loss == "squared":
            return (x - outputs).square().sum(-1)
        return functional.binary_cross_entropy_with_logits(outputs, x, reduction="none").sum(-1)
