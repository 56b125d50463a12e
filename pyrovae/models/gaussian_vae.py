"""The variational autoencoder with Normal latents."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.models.nets import Activation, positive
from pyrovae.models.program import VAE


class GaussianVAE(VAE):
    """z ~ N(0, I), x ~ p(x | decoder(z)).

    Sites `"z"`, event `[latent]`, and `"x"`, in the plate `"data"` at dim −1. Train it with `AmortizedMeanField(model)`.

    *Pixels.* "bernoulli": {0, 1}. "normal": real, with standard deviation `scale`. "normal_learned": with one learned variance
    for all pixels, which starts from `scale`. "categorical": `levels` values from 0 to 1, a softmax for each pixel.
    "cross_entropy": grey pixels in [0, 1] under the Bernoulli's formula, a common training loss, but no likelihood: bounds are
    then not on any log p(x), and `normalized` is False.

    *Weight of the KL.* The objective is E_q[log p(x|z)] − β KL(q || p(z)): log p(z), and log q(z) in a guide of this library,
    are multiplied by `beta`; a guide of your own must be wrapped, `scale_kl(guide, model.beta)`, or the entropy of q is left at
    weight 1 (see the attribute `beta` of :class:`~pyrovae.models.program.VAE`). At β = 1 it is a lower bound on log p(x); at
    β > 1 still one, but looser; at β < 1 it is none.
    Codes that minimise a loss with a weight on the KL (`kld_weight`, or M_N, often batch size / size of the data set) do the
    same, up to a factor, as some β. With D pixels, KL the mean over the batch of each image's KL, and

    - squared error averaged over batch and pixels, plus M_N · KL: "normal" with β = M_N · D / (2 scale²); 784 pixels, scale 1
      and M_N = 0.00025 make β = 0.098;
    - squared error averaged over the batch, summed over pixels, plus w · KL: "normal" with β = w / (2 scale²);
    - cross-entropy averaged over batch and pixels, plus w · KL: "bernoulli" or "cross_entropy" with β = w · D;
    - cross-entropy averaged over the batch, summed over pixels, plus w · KL: β = w.

    Where such a code sums the error over the batch of B, too, its weight is worth w / B.

    Args:
        visible: number of pixels D.
        latent: width of z.
        hidden: hidden sizes of the encoder, from the data to z; the decoder has them reversed.
        likelihood: see above.
        beta: weight of the KL; also the 0-d buffer `beta`, which may be changed in place.
        scale: standard deviation of Normal pixels.
        levels: number of values of categorical pixels.
        activation: between layers, a module class or its name in `torch.nn`.

    Raises:
        ValueError: for sizes below 1, an unknown likelihood, beta < 0, scale <= 0, levels < 2.

    Example:
        >>> model = GaussianVAE(6, 2, (5,))
        >>> tuple(model.sample(3).shape), model.mirror()[-1].out_features
        ((3, 6), 4)

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014)
        https://arxiv.org/abs/1312.6114
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Higgins et al., 2017)
        https://openreview.net/forum?id=Sy2fzU9gl
        Simple and Effective VAE Training with Calibrated Decoders (Rybkin, Daniilidis, Levine, 2021)
        https://arxiv.org/abs/2006.13202
    """

    loc: Tensor

    def __init__(
        self,
        visible: int = 784,
        latent: int = 20,
        hidden: int | Sequence[int] = (400,),
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
        self.register_buffer("loc", torch.zeros(latent))

    def mirror(self) -> nn.Sequential:
        """An encoder for `AmortizedMeanField`: all means of z, then the logarithms of its scales."""
        return self._encoder(2 * len(self.loc))

    def _code(self) -> Tensor:
        return pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
