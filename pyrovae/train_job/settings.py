"""What `pyrovae train` is to do: data, model, recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pyrovae import data
from pyrovae.train_job.families import FAMILIES, check_known, written

BINARIZATIONS: Mapping[str, str] = {
    "dynamic": "bits drawn afresh from the intensities at every step, and once for every evaluation",
    "fixed": "bits drawn once from the intensities",
    "threshold": "a pixel is 1 above half intensity",
    "grey": "intensities as they are; their cross-entropy is no likelihood",
}
GRADIENTS: Mapping[str, str] = {
    "reinmax": "ReinMax: hard samples, a second-order surrogate's gradient",
    "relaxed": "Gumbel-softmax relaxation: soft samples, so that the objective is no bound",
    "straight-through": "straight-through Gumbel-softmax: hard samples, the relaxation's gradient",
    "score": "score function: hard samples, unbiased",
}
TEMPERATURES: Mapping[str, float] = {"reinmax": 1.0, "relaxed": 0.5, "straight-through": 0.5}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "small": {"epochs": 100, "batch_size": 100, "lr": 5e-3, "gradient": "reinmax"},
    "large": {"epochs": 30, "batch_size": 100, "lr": 3e-3, "gradient": "reinmax"},
}
GENERATORS = ("bars_and_stripes", "labelled_shifter")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to be trained, and how; None takes the default of the family and the recipe.

    Attributes:
        model: a name of `FAMILIES`.
        data: a name of `pyrovae.data.NAMES`.
        binarize: a name of `BINARIZATIONS`; a generator's rows are binary already. None is "dynamic" for the MNIST family, and
            "threshold" for digits, whose few grey levels would make noise of most of the bits.
        sizes: the family's options, by the names of `OPTIONS`.
        epochs: passes over the training rows.
        batch_size: rows of a minibatch.
        lr: the learning rate at its height.
        gradient: of discrete latents, a name of `GRADIENTS`.
        temperature: of the relaxation or the surrogate.
        beta: weight of the KL divergence.
        patience: records without a better bound on validation rows before the end.
        seed: of the initial weights, the batches and everything drawn; the splits of the data are those of seed 0.
        rows: the most rows of each split.
    """

    model: str = "categorical"
    data: str = "digits"
    binarize: str | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    gradient: str | None = None
    temperature: float | None = None
    beta: float = 1.0
    patience: int | None = None
    seed: int = 0
    rows: int | None = None

    def __post_init__(self) -> None:
        check_known("model", self.model, FAMILIES)
        check_known("data", self.data, data.NAMES)
        if self.binarize is not None:
            check_known("binarize", self.binarize, BINARIZATIONS)
        family = FAMILIES[self.model]
        if unknown := [name for name in self.sizes if name not in family.options]:
            raise ValueError(
                f"expected sizes of the {self.model} family, {', '.join(family.options)}, got {', '.join(unknown)}; leave "
                "it out"
            )
        for name, least in (("latent", 1), ("categories", 2), ("steps", 1)):
            if name in self.sizes and self.sizes[name] < least:
                raise ValueError(f"expected {name} of at least {least}, got {self.sizes[name]}; leave it out for the default")
        if len(self.sizes.get("attention", (1, 1))) != 2:
            raise ValueError(
                f"expected attention as two numbers, of reading and of writing, got {written(self.sizes['attention'])}; write "
                "2,5"
            )
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 1), ("seed", 0), ("rows", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}; leave it out for the default")
        for name in ("lr", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"expected {name} above 0 and finite, got {value}; leave it out for the default")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"expected beta of at least 0 and finite, got {self.beta}; 1 is the evidence bound")
        if self.gradient is not None:
            check_known("gradient", self.gradient, GRADIENTS)
            if not family.discrete:
                raise ValueError(
                    f"expected no gradient for the {self.model} family, got {self.gradient!r}; its latents are Normal and "
                    "reparameterised, so leave it out"
                )
        if self.temperature is not None and (not family.discrete or self.gradient == "score"):
            raise ValueError(
                f"expected no temperature where nothing is relaxed, got {self.temperature}; leave it out, or take the gradient "
                "relaxed of a family with discrete latents"
            )


def resolved(settings: Settings) -> Settings:
    """The settings with every default written out."""
    recipe = RECIPES["small" if is_small(settings) else "large"]
    family = FAMILIES[settings.model]
    gradient = settings.gradient or (recipe["gradient"] if family.discrete else None)
    temperature = settings.temperature
    if temperature is None:
        temperature = TEMPERATURES.get(gradient or "")
    return replace(
        settings,
        binarize=settings.binarize or ("threshold" if is_small(settings) else "dynamic"),
        epochs=recipe["epochs"] if settings.epochs is None else settings.epochs,
        batch_size=recipe["batch_size"] if settings.batch_size is None else settings.batch_size,
        lr=recipe["lr"] if settings.lr is None else settings.lr,
        gradient=gradient,
        temperature=temperature,
    )


def rows_of(settings: Settings, split: str, *, fitting: bool = False) -> Tensor:
    """Rows `[N, D]` of a split as the model sees them; those to fit by dynamic binarization are still grey.

    Args:
        settings: which data.
        split: "train", "validation" or "test".
        fitting: whether a fit draws the bits of dynamic binarization itself, at every step.
    """
    how = {"dynamic": None if fitting else "fixed", "fixed": "fixed", "threshold": "threshold"}.get(settings.binarize or "")
    return data.load(settings.data, split=split, binarize=how)[: settings.rows]


def arguments_of(settings: Settings, visible: int) -> dict[str, Any]:
    """The model's arguments: the family's for images of this size, and the user's."""
    family = FAMILIES[settings.model]
    found = dict(family.small if visible <= 256 else family.large)
    found |= {family.options[name]: value for name, value in settings.sizes.items()}
    if settings.model == "draw" and isinstance(found["hidden"], tuple):
        if len(found["hidden"]) != 1:
            raise ValueError(f"expected one hidden size of DRAW's LSTMs, got {written(found['hidden'])}; write one number")
        found["hidden"] = found["hidden"][0]
    if settings.model != "autoencoder":
        found["likelihood"] = "cross_entropy" if settings.binarize == "grey" else "bernoulli"
    return {"visible": visible, **found}


def title_of(config: Mapping[str, Any]) -> str:
    """Family and data of a run."""
    settings = config["settings"]
    name = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}.get(settings["data"], settings["data"].replace("_", " "))
    return f"{FAMILIES[settings['model']].title}, on {name}"


def sizes_of(config: Mapping[str, Any]) -> str:
    """Sizes of a run's model, by the names of the options."""
    family = FAMILIES[config["settings"]["model"]]
    sizes = {option: config["model"].get(name) for option, name in family.options.items()}
    return ", ".join(f"{option} {written(value)}" for option, value in sizes.items() if value)


def word_of(config: Mapping[str, Any]) -> str:
    """What is measured on validation rows."""
    model = config["settings"]["model"]
    if model == "autoencoder":
        return "loss"
    kind = "ELBO" if config["likelihood"] == "bernoulli" else "score"
    return f"unrelaxed {kind}" if FAMILIES[model].discrete else kind


def is_dynamic(settings: Settings) -> bool:
    """Whether bits are drawn afresh at every step."""
    return settings.binarize == "dynamic" and settings.data not in GENERATORS


def is_small(settings: Settings) -> bool:
    """Whether images have at most 256 pixels."""
    return settings.data not in ("mnist", "fashion_mnist")
