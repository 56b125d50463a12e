"""The variational autoencoder with binary latents."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.nets import Activation, positive
from pyrovae.models.program import VAE


class BernoulliVAE(VAE):
    """z ~ Bern(1/2), x ~ p(x | decoder(z)).

    Sites `"z"`, event `[latent]`, and `"x"`, in the plate `"data"` at dim −1. With `hidden=()` the decoder is linear: a
    sigmoid belief net of one layer with a fixed prior. Relax it as :class:`CategoricalVAE`; pixels and beta as in
    :class:`GaussianVAE`.

    Args:
        visible: number of pixels.
        latent: number of bits.
        hidden: hidden sizes of the encoder, from the data to z; the decoder has them reversed.
        likelihood: see :class:`GaussianVAE`.
        beta: weight of the KL; also the 0-d buffer `beta`, which may be changed in place.
        scale: standard deviation of Normal pixels.
        levels: number of values of categorical pixels.
        activation: between layers, a module class or its name in `torch.nn`.

    Raises:
        ValueError: as :class:`GaussianVAE`.

    Example:
        >>> model = BernoulliVAE(6, 3)
        >>> tuple(model.sample(2).shape), model.mirror()[-1].out_features
        ((2, 6), 3)

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017)
        https://arxiv.org/abs/1611.01144
        The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
        https://arxiv.org/abs/1611.00712
    """

    logits: Tensor

    def __init__(
        self,
        visible: int = 784,
        latent: int = 200,
        hidden: int | Sequence[int] = (),
        *,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        scale: float = 0.1,
        levels: int = 256,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__(
            visible,
            positive(latent, "latent"),
            hidden,
            likelihood=likelihood,
            beta=beta,
            scale=scale,
            levels=levels,
            activation=activation,
            latent=latent,
        )
        self.register_buffer("logits", torch.zeros(latent))

    def mirror(self) -> nn.Sequential:
        """An encoder for `AmortizedMeanField`: the logits of z."""
        return self._encoder(len(self.logits))

    def _code(self) -> Tensor:
        return pyro.sample("z", dist.Bernoulli(logits=self.logits).to_event(1))
