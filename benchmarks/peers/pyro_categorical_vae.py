"""The same categorical autoencoder as a Pyro program and guide, with Pyro's own distributions and nothing of ours."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from peers.torch_categorical_vae import Autoencoder

__all__ = ["Program"]


class Program(PyroModule):
    """Model and guide with relaxed one-hot sites at one temperature and Bernoulli pixels."""

    def __init__(self, temperature: float, latents: int = 30, categories: int = 10, visible: int = 784, name: str = "") -> None:
        super().__init__()
        self.name = name  # of its modules in the store, where another instance of the same name is found again
        self.net = Autoencoder(latents, categories, visible)
        self.register_buffer("temperature", torch.tensor(temperature))
        self.register_buffer("uniform", torch.zeros(latents, categories))

    def model(self, x: Tensor) -> None:
        """Draw z ~ uniform, relaxed; x ~ Bernoulli(decoder(z))."""
        pyro.module(f"decoder{self.name}", self.net.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self._relaxed(self.uniform))
            pyro.sample("x", dist.Bernoulli(logits=self.net.decoder(z.flatten(-2))).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw z ~ the encoder's categories, relaxed."""
        pyro.module(f"encoder{self.name}", self.net.encoder)
        with pyro.plate("data", len(x), dim=-1):
            logits = self.net.logits(x)
            pyro.sample("z", self._relaxed(logits))

    def _relaxed(self, logits: Tensor) -> dist.TorchDistribution:
        """Unchecked: float32 draws do not sum to 1 as exactly as Pyro's validation asks, which stops the program."""
        return dist.RelaxedOneHotCategorical(self.temperature, logits=logits, validate_args=False).to_event(1)
