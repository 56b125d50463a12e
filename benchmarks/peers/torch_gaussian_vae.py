"""The autoencoder with Normal latents as PyTorch's own example writes it: no library, no Pyro.

784-400-20 with ReLU, one draw of the latents a datum, the KL of the Normals in closed form.

References:
    Auto-Encoding Variational Bayes (Kingma, Welling, 2014)
    https://arxiv.org/abs/1312.6114
    https://github.com/pytorch/examples/tree/main/vae
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """784-400-latent and back; the encoder gives all means, then the logarithms of the scales."""

    def __init__(self, latent: int = 20, visible: int = 784, hidden: int = 400) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(visible, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, visible))

    def loss(self, x: Tensor) -> Tensor:
        """Cross-entropy of the pixels plus KL from the standard Normal, nats summed over the batch."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        scale = log_scale.exp()
        z = loc + scale * torch.randn_like(loc)
        kl = 0.5 * (loc.square() + scale.square() - 1).sum() - log_scale.sum()
        return binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl
