"""The categorical autoencoder of the tutorials, written by hand in PyTorch: no library, no Pyro.

Soft Gumbel-Softmax samples at a fixed temperature of 1, the KL of the categoricals in closed form, Adam with a rate of 1e-3:
the loss that such scripts print is that of soft samples. `hard_loss` puts true one-hot samples through the same weights.

References:
    Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017)
    https://arxiv.org/abs/1611.01144
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gumbel_softmax, one_hot

__all__ = ["Autoencoder", "hard_loss", "make_step", "train"]


class Autoencoder(nn.Module):
    """784-512-256-(latents x categories) and back, with ReLU."""

    def __init__(self, latents: int = 30, categories: int = 10, visible: int = 784) -> None:
        super().__init__()
        self.latents, self.categories = latents, categories
        code = latents * categories
        self.encoder = nn.Sequential(nn.Linear(visible, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, code))
        self.decoder = nn.Sequential(nn.Linear(code, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, visible))

    def logits(self, x: Tensor) -> Tensor:
        """Of q(z | x), `[B, latents, categories]`."""
        return self.encoder(x).view(-1, self.latents, self.categories)

    def loss(self, x: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of the pixels plus KL from the uniform prior, nats a datum."""
        reconstruction = binary_cross_entropy_with_logits(self.decoder(z.flatten(1)), x, reduction="sum")
        log_q = logits.log_softmax(-1)
        kl = (log_q.exp() * (log_q + math.log(self.categories))).sum()
        return (reconstruction + kl) / len(x)


def make_step(net: Autoencoder, temperature: float, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
    """A function that takes one gradient step on a batch and returns its relaxed loss."""

    def step(x: Tensor) -> Tensor:
        logits = net.logits(x)
        loss = net.loss(x, gumbel_softmax(logits, tau=temperature), logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def train(
    x: Tensor, epochs: int, *, batch_size: int = 100, after_epoch: Callable[[int, float, Autoencoder], None] | None = None
) -> Autoencoder:
    """Train on rows `x` in a fresh order every epoch.

    Args:
        x: Images in [0, 1], `[N, 784]`.
        epochs: Passes over them.
        batch_size: Rows of a minibatch.
        after_epoch: Gets the number of epochs done, their last mean relaxed loss, and the net.
    """
    net = Autoencoder(visible=x.shape[1])
    step = make_step(net, 1.0, torch.optim.Adam(net.parameters(), lr=1e-3))
    for epoch in range(1, epochs + 1):
        losses = torch.stack([step(x[rows]) for rows in torch.randperm(len(x)).split(batch_size)])
        if after_epoch is not None:
            after_epoch(epoch, float(losses.mean()), net)
    return net


@torch.no_grad()
def hard_loss(net: Autoencoder, x: Tensor, *, samples: int = 1) -> float:
    """The loss with one-hot samples in place of soft ones, nats a datum."""
    total = 0.0
    for rows in x.split(1000):
        logits = net.logits(rows)
        for _ in range(samples):
            z = torch.distributions.Categorical(logits=logits).sample()
            loss = net.loss(rows, one_hot(z, net.categories).to(rows.dtype), logits)
            total += float(loss) * len(rows) / samples
    return total / len(x)
