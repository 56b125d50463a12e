"""The variational autoencoder with one-hot latents."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.nets import Activation, positive
from pyrovae.models.program import VAE


class CategoricalVAE(VAE):
    """N one-hot latents of K classes, uniform; x ~ p(x | decoder(z)).

    Sites `"z"`, a OneHotCategorical with event `[latents, categories]`, and `"x"`, in the plate `"data"` at dim −1. To train
    it by pathwise gradients, relax model and guide: `relax(model, 0.5)`, `AmortizedMeanField(relax(model, 0.5))`; the same
    program gives the discrete bound. Pixels and beta as in :class:`GaussianVAE`.

    Args:
        visible: number of pixels.
        latents: number N of latents.
        categories: number K of classes of each, at least 2.
        hidden: hidden sizes of the encoder, from the data to z; the decoder has them reversed.
        likelihood: see :class:`GaussianVAE`.
        beta: weight of the KL; also the 0-d buffer `beta`, which may be changed in place.
        scale: standard deviation of Normal pixels.
        levels: number of values of categorical pixels.
        activation: between layers, a module class or its name in `torch.nn`.

    Raises:
        ValueError: as :class:`GaussianVAE`; for fewer than two categories.

    Example:
        >>> model = CategoricalVAE(6, 3, 4, (5,))
        >>> tuple(model.sample(2).shape), model.mirror()[-1].out_features
        ((2, 6), 12)

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017)
        https://arxiv.org/abs/1611.01144
    """

    logits: Tensor

    def __init__(
        self,
        visible: int = 784,
        latents: int = 30,
        categories: int = 10,
        hidden: int | Sequence[int] = (512, 256),
        *,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        scale: float = 0.1,
        levels: int = 256,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__(
            visible,
            positive(latents, "latents") * positive(categories, "categories", least=2),
            hidden,
            likelihood=likelihood,
            beta=beta,
            scale=scale,
            levels=levels,
            activation=activation,
            latents=latents,
            categories=categories,
        )
        self.register_buffer("logits", torch.zeros(latents, categories))

    def mirror(self) -> nn.Sequential:
        """An encoder for `AmortizedMeanField`: the logits of z, those of a latent side by side."""
        return self._encoder(self.logits.numel())

    def _code(self) -> Tensor:
        z = pyro.sample("z", dist.OneHotCategorical(logits=self.logits).to_event(1))
        return z.reshape((*z.shape[:-2], -1))
