"""The autoencoder with Normal latents as a Pyro program and guide, with Pyro's own distributions and nothing of ours.

References:
    https://pyro.ai/examples/vae.html
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from peers.torch_gaussian_vae import Autoencoder

__all__ = ["Program"]


class Program(PyroModule):
    """Model and guide with Normal latents and Bernoulli pixels."""

    def __init__(self, latent: int = 20, visible: int = 784, name: str = "") -> None:
        super().__init__()
        self.name = name  # of its modules in the store, where another instance of the same name is found again
        self.net = Autoencoder(latent, visible)
        self.register_buffer("zero", torch.zeros(latent))

    def model(self, x: Tensor) -> None:
        """Draw z ~ N(0, I); x ~ Bernoulli(decoder(z))."""
        pyro.module(f"decoder{self.name}", self.net.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw z ~ the encoder's Normals."""
        pyro.module(f"encoder{self.name}", self.net.encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.net.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
