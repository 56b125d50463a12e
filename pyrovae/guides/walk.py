"""The walk: a run of the model in which q's factors stand where the model has its priors.

Plates, their sizes, indices, scales and masks are then the model's own at that very call, and outer handlers (traces,
particle plates, `relax`) see the latents as ordinary sample statements of the guide, and nothing else of the model. It ends
after the last latent, so that the decoder never runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.guides.factor import factor
from pyrovae.handlers import own_params
from pyrovae.handlers.rewrite import MARK, values_of
from pyrovae.handlers.structure import Latent, is_subsample
from pyrovae.ops import isolated_rng
from pyrovae.ops.tracing import capturing, unrecorded

Rows = Callable[[Latent, Mapping[int, Any], Mapping[str, Tensor]], Tensor]


def walk(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], latents: Iterable[Latent], rows: Rows
) -> dict[str, Tensor]:
    """Sample the latents of a model from a guide's factors.

    Args:
        model: a Pyro program.
        args: its positional arguments.
        kwargs: its keyword arguments.
        latents: the sites to place factors at.
        rows: gives the unconstrained parameters `[..., *plate dims, width]` of a latent, for the plates of this call by dim
            and their indices by name.

    Returns:
        Values by site; their gradients reach the parameters, and of the model nothing but the temperature of relaxed sites.
    """
    handler = _Walk(latents, rows)
    try:
        with torch.set_grad_enabled(handler.model_grad), handler:
            own_params(model)(*args, **kwargs)
    except _LastSiteReached:
        pass
    return handler.values


@dataclass(frozen=True)
class Met:
    """A latent as a run of the model met it: its prior, its plates from the outermost in, its scale and mask."""

    prior: Any
    frames: tuple[Any, ...]
    scale: Any
    mask: Any


def meet(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], latents: Iterable[Latent]
) -> tuple[dict[str, Met], dict[str, Tensor]]:
    """Run a model up to its last latent, seen by nobody and without a trace in the caller's random state.

    Returns:
        The latents by name (temperatures with their gradient), and the rows of the plates that the program itself gave, not
        drew, by plate.
    """
    handler = _Meeting(latents)
    try:
        with poutine.block(), isolated_rng(), torch.set_grad_enabled(handler.model_grad), handler:
            own_params(model)(*args, **kwargs)
    except _LastSiteReached:
        pass
    return handler.met, handler.given


def marked(fn: Any) -> dict[str, Any]:
    """The `infer` that tells a relaxed model what kind of values a factor draws."""
    values = values_of(fn)
    return {} if values is None else {MARK: values}


class _LastSiteReached(Exception):
    """Every latent has its value."""


class _Meeting(Messenger):
    """Takes down a model's latents, and leaves after the last."""

    def __init__(self, latents: Iterable[Latent]) -> None:
        super().__init__()
        latents = tuple(latents)
        self.waiting = {latent.name for latent in latents}
        self.grad = torch.is_grad_enabled()
        self.model_grad = self.grad and any(latent.gradient == "relaxed" for latent in latents)  # of a learned temperature
        self.met: dict[str, Met] = {}
        self.given: dict[str, Tensor] = {}

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        """Answer without the store where it does not know the name; outer handlers do not see the model's parameters.

        Where gradients are wanted, the model is about to be run, too: a temperature has to be the same leaf in both.
        """
        msg["stop"] = True
        initial = msg["args"][1] if len(msg["args"]) > 1 else None
        if msg["done"] or self.model_grad or initial is None or msg["name"] in pyro.get_param_store():
            return
        value = (initial() if callable(initial) else initial).detach()
        value.unconstrained = weakref.ref(value)
        msg["value"], msg["done"] = value, True

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_subsample(msg) and msg["value"] is not None:
            self.given[msg["name"]] = torch.as_tensor(msg["value"])
        if capturing() and msg["value"] is None:  # a draw by which the run goes on, and of which nothing is kept
            with unrecorded():
                msg["value"] = msg["fn"]()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.waiting and not msg["is_observed"]:
            self.met[msg["name"]] = Met(msg["fn"], msg["cond_indep_stack"], msg["scale"], msg["mask"])
        self.waiting.discard(msg["name"])
        if not self.waiting:
            raise _LastSiteReached


class _Walk(_Meeting):
    """Puts factors where a model has priors, hides all else, and leaves after the last latent."""

    def __init__(self, latents: Iterable[Latent], rows: Rows) -> None:
        super().__init__(latents := tuple(latents))
        self.rows = rows
        self.latents = {latent.name: latent for latent in latents}
        self.indices: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_subsample(msg):
            return
        latent = self.latents.get(msg["name"])
        if latent is None or msg["is_observed"]:
            msg["stop"] = True
            return
        frames = {frame.dim: frame for frame in msg["cond_indep_stack"] if frame.vectorized}
        torch.set_grad_enabled(self.grad)
        msg["fn"] = factor(latent, self.rows(latent, frames, self.indices), frames, msg["fn"])
        kept = {key: value for key, value in msg["infer"].items() if key == "is_auxiliary"}
        msg["infer"] = kept | marked(msg["fn"])

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if is_subsample(msg):
            self.indices[msg["name"]] = torch.as_tensor(msg["value"])
            return
        torch.set_grad_enabled(self.model_grad)
        if msg["name"] in self.latents and not msg["is_observed"]:
            self.values[msg["name"]] = msg["value"]
        self.waiting.discard(msg["name"])
        if not self.waiting:
            raise _LastSiteReached
