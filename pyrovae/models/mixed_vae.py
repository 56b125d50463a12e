"""The variational autoencoder with a class and Normal latents."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.nets import Activation, positive
from pyrovae.models.program import VAE


class MixedVAE(VAE):
    """y ~ Cat(1/K), z ~ N(0, I) whatever y is, x ~ p(x | decoder(y, z)).

    Sites `"y"`, a OneHotCategorical with event `[categories]`, `"z"`, event `[latent]`, and `"x"`, in the plate `"data"` at
    dim −1. The classes live in the decoder: z's prior is the same for all of them. Relax y as in :class:`CategoricalVAE`
    (`relax` leaves z alone), or sum over it; pixels and beta, which weighs both latents, as in :class:`GaussianVAE`.

    Args:
        visible: number of pixels.
        latent: width of z.
        categories: number K of classes, at least 2.
        hidden: hidden sizes of the encoder, from the data to the latents; the decoder has them reversed.
        likelihood: see :class:`GaussianVAE`.
        beta: weight of the KL; also the 0-d buffer `beta`, which may be changed in place.
        scale: standard deviation of Normal pixels.
        levels: number of values of categorical pixels.
        activation: between layers, a module class or its name in `torch.nn`.

    Raises:
        ValueError: as :class:`GaussianVAE`; for fewer than two categories.

    Example:
        >>> model = MixedVAE(6, 2, 3, (5,))
        >>> tuple(model.sample(4).shape), model.mirror()[-1].out_features
        ((4, 6), 7)

    References:
        Semi-Supervised Learning with Deep Generative Models, model M2 (Kingma et al., 2014)
        https://arxiv.org/abs/1406.5298
        Learning Disentangled Joint Continuous and Discrete Representations (Dupont, 2018)
        https://arxiv.org/abs/1804.00104
    """

    logits: Tensor
    loc: Tensor

    def __init__(
        self,
        visible: int = 784,
        latent: int = 20,
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
            positive(categories, "categories", least=2) + positive(latent, "latent"),
            hidden,
            likelihood=likelihood,
            beta=beta,
            scale=scale,
            levels=levels,
            activation=activation,
            latent=latent,
            categories=categories,
        )
        self.register_buffer("logits", torch.zeros(categories))
        self.register_buffer("loc", torch.zeros(latent))

    def mirror(self) -> nn.Sequential:
        """An encoder for `AmortizedMeanField`: the logits of y, all means of z, then the logarithms of its scales."""
        return self._encoder(len(self.logits) + 2 * len(self.loc))

    def _code(self) -> Tensor:
        y = pyro.sample("y", dist.OneHotCategorical(logits=self.logits))
        z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
        lead = torch.broadcast_shapes(y.shape[:-1], z.shape[:-1])  # they differ where one of them is enumerated
        return torch.cat([y.expand((*lead, -1)), z.expand((*lead, -1))], -1)
