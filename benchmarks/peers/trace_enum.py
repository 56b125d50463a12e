"""Exact evidence of a one-layer net of hidden bits by Pyro's own enumeration, `TraceEnum_ELBO`.

The stock recipe: every hidden bit is a scalar Bernoulli site marked `infer={"enumerate": "parallel"}` inside the data
plate at dim -1, the guide is empty, and the program is written so that enumeration dimensions may stand to the left.
With no latent site left in the guide the loss is the summed negative log evidence, exact up to rounding.

The H sites take H tensor dimensions, so that the likelihood is a table of `2**H x N x D` log probabilities before its
sum over D: time O(2^H N D), and several arrays of 8 * 2^H * N * D bytes in float64 (537 MB each for 12 bits, 256 rows,
64 visibles).

References:
    Tensor Variable Elimination for Plated Factor Graphs (Obermeyer et al., 2019)
    https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

__all__ = ["BeliefNet", "belief_net_loss", "belief_net_loss_and_gradients"]


def belief_net_loss(
    weight: Tensor, bias: Tensor, prior: Tensor, x: Tensor, *, sigma: float | None = None
) -> Callable[[], float]:
    """Make a function that computes the summed negative log evidence by `TraceEnum_ELBO.loss`.

    Args:
        weight: Weights from hidden to visible, `[H, D]`.
        bias: Bias of the visibles, `[D]`.
        prior: Logits of the hidden bits, `[H]`.
        x: Data, `[N, D]`; in {0, 1} for the Bernoulli likelihood.
        sigma: Standard deviation of a Normal likelihood; None takes a Bernoulli with the same natural bias.

    Returns:
        A function without arguments that returns -sum_n log p(x_n) in nats; exact, no sampling, no gradients.
    """
    net = BeliefNet(weight, bias, prior, sigma=sigma)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def loss() -> float:
        # A fresh store: Pyro keys parameters by name, and another net's must not be found under ours.
        with pyro.get_param_store().scope(), torch.no_grad():
            return float(elbo.loss(net, _empty_guide, x))

    return loss


def belief_net_loss_and_gradients(
    weight: Tensor, bias: Tensor, prior: Tensor, x: Tensor, *, sigma: float | None = None
) -> Callable[[], tuple[float, dict[str, Tensor]]]:
    """Make a function that computes the summed negative log evidence and its gradient by `loss_and_grads`.

    Args:
        weight: Weights from hidden to visible, `[H, D]`.
        bias: Bias of the visibles, `[D]`.
        prior: Logits of the hidden bits, `[H]`.
        x: Data, `[N, D]`; in {0, 1} for the Bernoulli likelihood.
        sigma: Standard deviation of a Normal likelihood; None takes a Bernoulli with the same natural bias.

    Returns:
        A function without arguments that returns -sum_n log p(x_n) in nats and its exact gradient by `"weight"`
        `[H, D]`, `"bias"` `[D]` and `"prior"` `[H]`. The gradients are new tensors at every call.
    """
    net = BeliefNet(weight, bias, prior, sigma=sigma)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def loss_and_gradients() -> tuple[float, dict[str, Tensor]]:
        net.zero_grad(set_to_none=True)
        with pyro.get_param_store().scope():
            value = float(elbo.loss_and_grads(net, _empty_guide, x))
        return value, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    return loss_and_gradients


class BeliefNet(nn.Module):
    """The Pyro program h_j ~ Bernoulli(logits=prior_j), x ~ Bernoulli(logits=bias + h W) or Normal(bias + h W, sigma).

    Args:
        weight: Weights from hidden to visible, `[H, D]`; copied, as are the others.
        bias: Bias of the visibles, `[D]`.
        prior: Logits of the hidden bits, `[H]`.
        sigma: Standard deviation of a Normal likelihood; None takes the Bernoulli.
    """

    def __init__(self, weight: Tensor, bias: Tensor, prior: Tensor, *, sigma: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.prior = nn.Parameter(prior.detach().clone())
        self.sigma = sigma

    def forward(self, x: Tensor) -> None:
        """Run the program on data `x` `[N, D]`; sites `h_0`, `h_1`, ... and `x` in the plate `data`."""
        pyro.module("belief_net", self)
        with pyro.plate("data", len(x), dim=-1):
            bits = [
                pyro.sample(f"h_{j}", dist.Bernoulli(logits=self.prior[j]), infer={"enumerate": "parallel"})
                for j in range(len(self.prior))
            ]
            h = torch.stack(torch.broadcast_tensors(*bits), dim=-1)  # [2, ..., 2, 1, H] enumerated, else [N, H]
            mean = self.bias + h @ self.weight  # [..., D]
            likelihood = dist.Bernoulli(logits=mean) if self.sigma is None else dist.Normal(mean, self.sigma)
            pyro.sample("x", likelihood.to_event(1), obs=x)


def _empty_guide(x: Tensor) -> None:
    """A guide without latent sites: all of them are summed out in the model."""
