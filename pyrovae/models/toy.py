"""Small models whose answers are known: by enumeration (at most 10 bits) or in closed form."""

from __future__ import annotations

from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.handlers import Module
from pyrovae.models.program import data_plate
from pyrovae.models.sigmoid_belief_net import SigmoidBeliefNet
from pyrovae.ops import isolated_rng


def belief_net(visible: int = 6, hidden: int | list[int] = 3, *, seed: int = 0) -> SigmoidBeliefNet:
    """A sigmoid belief net with weights of order one, so that its posterior is far from factorised.

    Args:
        visible: visible units.
        hidden: hidden units, or one number a layer.
        seed: of the parameters; the caller's random state stays.
    """
    with isolated_rng(seed):
        net = SigmoidBeliefNet(visible, hidden)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(0, 1.5 if parameter.dim() == 2 else 0.5)
    return net


class Mixture(Module):
    """A mixture of products of Bernoullis: z ~ Cat(π), x_d ~ Bern(μ_zd); its M-step is in closed form.

    Args:
        visible: number of binary variables D.
        components: number of components K.

    References:
        Pattern Recognition and Machine Learning, section 9.3.3 (Bishop, 2006)
        https://www.microsoft.com/en-us/research/people/cmbishop/prml-book/
    """

    capturable: ClassVar[bool] = True

    def __init__(self, visible: int, components: int) -> None:
        super().__init__()
        if visible < 1 or components < 1:
            raise ValueError(f"expected visible >= 1 and components >= 1, got {visible} and {components}")
        self.weights = nn.Parameter(torch.empty(components))
        self.logits = nn.Parameter(torch.empty(components, visible))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make π uniform and draw the logits of μ from N(0, 1)."""
        self.weights.zero_()
        self.logits.normal_()

    def forward(
        self,
        x: Tensor | None = None,
        *,
        batch_size: int = 1,
        index: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """Run the program; `x [B, visible]` in {0, 1}, see :class:`SigmoidBeliefNet`."""
        with data_plate(x, self.logits.shape[1], batch_size=batch_size, index=index, num_data=num_data):
            z = pyro.sample("z", dist.Categorical(logits=self.weights))
            return pyro.sample("x", dist.Bernoulli(logits=self.logits[z]).to_event(1), obs=x)

    @torch.no_grad()
    def m_step(self, posterior: object, x: Tensor) -> None:
        """Set π and μ to their maximisers of E_q[log p(x, z)]; needs `posterior.marginals["z"]`, `[B, K]`.

        Means are kept off 0 and 1 by the precision of their dtype. A component that no row belongs to keeps its mean.
        """
        r = posterior.marginals["z"].to(self.logits)  # type: ignore[attr-defined]
        limits = torch.finfo(self.logits.dtype)
        count = r.sum(0)
        mean = ((r.T @ x) / count.clamp_min(limits.tiny).unsqueeze(-1)).clamp(limits.eps, 1 - limits.eps)
        self.weights.copy_((count / count.sum()).clamp_min(limits.tiny).log())
        self.logits.copy_(torch.where(count.unsqueeze(-1) > limits.tiny, torch.logit(mean), self.logits))


class LinearGaussian(Module):
    """z ~ N(0, I), x = W z + b + σ ε: evidence and posterior in closed form.

    Args:
        visible: width D of x.
        latent: width of z.
        scale: σ.

    References:
        Probabilistic principal component analysis (Tipping and Bishop, 1999)
        https://doi.org/10.1111/1467-9868.00196
    """

    capturable: ClassVar[bool] = True

    def __init__(self, visible: int = 3, latent: int = 2, *, scale: float = 0.5) -> None:
        super().__init__()
        if visible < 1 or latent < 1 or scale <= 0:
            raise ValueError(f"expected visible, latent >= 1 and scale > 0, got {visible}, {latent} and {scale}")
        self.weight = nn.Parameter(torch.empty(latent, visible))
        self.bias = nn.Parameter(torch.empty(visible))
        self.scale = scale
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 1) and set the biases to 0."""
        self.weight.normal_()
        self.bias.zero_()

    def forward(
        self,
        x: Tensor | None = None,
        *,
        batch_size: int = 1,
        index: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """Run the program; `x [B, visible]`, see :class:`SigmoidBeliefNet`."""
        latent, visible = self.weight.shape
        with data_plate(x, visible, batch_size=batch_size, index=index, num_data=num_data):
            z = pyro.sample("z", dist.Normal(self.weight.new_zeros(latent), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.bias + z @ self.weight, self.scale).to_event(1), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) `[B]`: a Normal with covariance WᵀW + σ²I."""
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        covariance = self.weight.T @ self.weight + self.scale**2 * eye
        return torch.distributions.MultivariateNormal(self.bias, covariance).log_prob(x)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[B, latent]` and covariance `[latent, latent]` of p(z | x)."""
        eye = torch.eye(self.weight.shape[0], dtype=x.dtype, device=x.device)
        covariance = torch.linalg.inv(eye + self.weight @ self.weight.T / self.scale**2)
        return (x - self.bias) @ self.weight.T @ covariance / self.scale**2, covariance
