"""Families of models by name: class, guide, sizes; what `pyrovae train` can train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.distributions import CrossEntropy
from pyrovae.guides import AmortizedMeanField, AmortizedStructured, DRAWGuide
from pyrovae.handlers import Module
from pyrovae.models import DRAW, AutoEncoder, BernoulliVAE, CategoricalVAE, GaussianVAE, HierarchicalVAE, MixedVAE
from pyrovae.models.program import data_plate

OPTIONS: Mapping[str, str] = {
    "latent": "number of latents",
    "categories": "values of each categorical latent",
    "hidden": "units of the hidden layers, from the data upwards",
    "layers": "stochastic layers from the data upwards, as in normal:20,bernoulli:20,categorical:5x10",
    "steps": "steps of DRAW",
    "attention": "DRAW's patches, read and written, as in 2,5",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model.

    Attributes:
        title: in words.
        model: its class.
        guide: a guide for a model; None for one without latents.
        options: option of `OPTIONS` to argument of the class; no other option is taken.
        small: arguments for images of at most 256 pixels.
        large: arguments for larger ones.
        discrete: whether a latent is discrete, so that its gradient is chosen.
    """

    title: str
    model: Callable[..., Any]
    guide: Callable[[Any], Any]
    options: Mapping[str, str]
    small: Mapping[str, Any]
    large: Mapping[str, Any]
    discrete: bool


class _Flat(dist.Normal):
    """Draws like a Normal and scores every value 0: the code of an autoencoder costs nothing."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(value + self.loc)


class Autoencoding(Module):
    """The decoder of an `AutoEncoder` as a program whose "bound" is minus its loss: one training loop serves all families."""

    normalized = False

    def __init__(self, net: AutoEncoder) -> None:
        super().__init__()
        self.net = net

    @property
    def config(self) -> dict[str, Any]:
        """The net's."""
        return self.net.config

    def initialize_bias(self, x: Tensor) -> None:
        """Of the net."""
        self.net.initialize_bias(x)

    def forward(
        self, x: Tensor | None = None, *, batch_size: int = 1, index: Tensor | None = None, num_data: int | None = None
    ) -> None:
        """Run the program; its arguments are those of the models."""
        with data_plate(x, self.net.visible, batch_size=batch_size, index=index, num_data=num_data):
            zeros = next(self.net.parameters()).new_zeros(self.net.latent)
            code = pyro.sample("code", _Flat(zeros, 1.0).to_event(1))
            pyro.sample("x", CrossEntropy(logits=self.net.decoder(code)).to_event(1), obs=x)


class Encoding(Module):
    """Its encoder as the guide, a point mass."""

    def __init__(self, net: AutoEncoder) -> None:
        super().__init__()
        self.visible, self.encoder = net.visible, net.encoder

    def forward(
        self, x: Tensor, *, batch_size: int = 1, index: Tensor | None = None, num_data: int | None = None
    ) -> dict[str, Tensor]:
        """Give the code; its arguments are those of the models."""
        with data_plate(x, self.visible, batch_size=batch_size, index=index, num_data=num_data):
            return {"code": pyro.sample("code", dist.Delta(self.encoder(x)).to_event(1))}


FAMILIES: Mapping[str, Family] = {
    "categorical": Family(
        title="VAE with categorical latents",
        model=CategoricalVAE,
        guide=AmortizedMeanField,
        options={"latent": "latents", "categories": "categories", "hidden": "hidden"},
        small={"latents": 10, "categories": 10, "hidden": (128, 64)},
        large={"latents": 30, "categories": 10, "hidden": (512, 256)},
        discrete=True,
    ),
    "bernoulli": Family(
        title="VAE with Bernoulli latents",
        model=BernoulliVAE,
        guide=AmortizedMeanField,
        options={"latent": "latent", "hidden": "hidden"},
        small={"latent": 40, "hidden": (128, 64)},
        large={"latent": 200, "hidden": (512, 256)},
        discrete=True,
    ),
    "gaussian": Family(
        title="VAE with Normal latents",
        model=GaussianVAE,
        guide=AmortizedMeanField,
        options={"latent": "latent", "hidden": "hidden"},
        small={"latent": 10, "hidden": (128, 64)},
        large={"latent": 20, "hidden": (512, 256)},
        discrete=False,
    ),
    "mixed": Family(
        title="VAE with one categorical and several Normal latents",
        model=MixedVAE,
        guide=AmortizedMeanField,
        options={"latent": "latent", "categories": "categories", "hidden": "hidden"},
        small={"latent": 8, "categories": 10, "hidden": (128, 64)},
        large={"latent": 20, "categories": 10, "hidden": (512, 256)},
        discrete=True,
    ),
    "hierarchical": Family(
        title="VAE with several stochastic layers",
        model=HierarchicalVAE,
        guide=AmortizedStructured,
        options={"layers": "layers", "hidden": "hidden"},
        small={"layers": (("normal", 10), ("categorical", (5, 10)))},
        large={"layers": (("normal", 30), ("categorical", (10, 10)))},
        discrete=True,
    ),
    "draw": Family(
        title="DRAW",
        model=DRAW,
        guide=lambda model: DRAWGuide(model, hidden=model.hidden),
        options={"latent": "latent", "hidden": "hidden", "steps": "steps", "attention": "attention"},
        small={"latent": 4, "hidden": 64, "steps": 5},
        large={"latent": 100, "hidden": 256, "steps": 10},
        discrete=False,
    ),
    "autoencoder": Family(
        title="Autoencoder, without a distribution",
        model=lambda visible, **sizes: Autoencoding(AutoEncoder(visible, **sizes)),
        guide=lambda program: Encoding(program.net),
        options={"latent": "latent", "hidden": "hidden"},
        small={"latent": 10, "hidden": (128, 64)},
        large={"latent": 20, "hidden": (512, 256)},
        discrete=False,
    ),
}


def build(name: str, arguments: Mapping[str, Any], x: Tensor | None = None) -> tuple[Any, Any]:
    """A model and its guide, with fresh weights that know the mean of data, where there are any."""
    family = FAMILIES[name]
    model = family.model(**arguments)
    if x is not None:
        model.initialize_bias(x)  # first: the guide starts from a copy of what it sets
    return model, family.guide(model)


def parse_layers(text: str) -> tuple[tuple[str, Any], ...]:
    """Layers of a `HierarchicalVAE` from text.

    Raises:
        ValueError: for anything that names no layers.

    Example:
        >>> parse_layers("normal:50,bernoulli:20,categorical:5x10")
        (('normal', 50), ('bernoulli', 20), ('categorical', (5, 10)))
    """
    layers: list[tuple[str, Any]] = []
    try:
        for part in text.split(","):
            kind, size = part.strip().split(":")
            sizes = tuple(int(n) for n in size.split("x"))
            if kind not in ("normal", "bernoulli", "categorical") or min(sizes) < 1:
                raise ValueError
            if len(sizes) != (2 if kind == "categorical" else 1):
                raise ValueError
            layers.append((kind, sizes if kind == "categorical" else sizes[0]))
    except ValueError:
        raise ValueError(
            f"expected layers from the data upwards, each normal:N, bernoulli:N or categorical:NxK, got {text!r}; write "
            "normal:20,categorical:5x10"
        ) from None
    return tuple(layers)


def written(value: Any) -> str:
    """Sizes as the options have them."""
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (list, tuple)):
            return ", ".join(f"{kind} {'x'.join(map(str, _listed(size)))}" for kind, size in value)
        return "-".join(map(str, value))
    return str(value)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_known(what: str, value: str, names: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones."""
    if value not in names:
        raise ValueError(f"expected {what} to be one of the known ones, got {value!r}; choose from: {', '.join(names)}")
