"""Fast exact routes for models that declare a structure, beside the generic enumeration that serves any program.

A model declares by a method that returns a frozen record (:mod:`pyrovae.ops.structures`). The table below names, for each
such method, the route that knows what to do with the record. `Exact` and `ExactLikelihood` ask :func:`find_route`; where it
answers None, they enumerate the program, which is also the oracle of every route.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrovae.handlers import declared
from pyrovae.handlers.declared import declares
from pyrovae.handlers.structure import Structure, read_structure
from pyrovae.inference.exact.chain import ChainRoute
from pyrovae.inference.exact.declaration import check_declaration
from pyrovae.inference.exact.factorial import FactorialRoute
from pyrovae.inference.exact.linear_code import LinearCodeRoute, check_finite
from pyrovae.inference.posterior import Posterior, Program
from pyrovae.ops.tracing import capturing, unrecorded


@dataclass(frozen=True)
class Task:
    """What is asked of a route.

    Attributes:
        model: the program, which declared the record.
        args: its arguments, the data `[B, …]` first.
        kwargs: its keyword arguments.
        structure: its sites and plates at these arguments, from a validated pilot run: one plate around all sites, unscaled.
        max_bytes: the memory that an evaluation may take.
        method: named in error messages.
    """

    model: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    structure: Structure
    max_bytes: int
    method: str


class Route(Protocol):
    """A fast way to the exact posterior of a model that declares a structure; `record` is what the model declared."""

    def fits(self, record: Any, task: Task) -> bool:
        """Whether the route serves this task; False sends it to the generic enumeration.

        Raises:
            ValueError: where the generic way would not do either, with the bytes and seconds that the task would take and the
                method to use instead.
        """

    def infer(self, record: Any, task: Task) -> Posterior:
        """The exact posterior, a snapshot; called without gradients."""

    def log_evidence(self, record: Any, task: Task) -> Tensor:
        """Log p(x) `[B]` in nats, differentiable in the model's parameters, within `task.max_bytes`."""

    def model_evaluations(self, record: Any, task: Task) -> int:
        """How many joint log probabilities one evaluation of log p(x) really computes."""


@dataclass(frozen=True)
class FoundRoute:
    """A route, with the record and the task that it fits."""

    name: str
    route: Route
    record: Any
    task: Task

    def infer(self) -> Posterior:
        """The exact posterior."""
        return self.route.infer(self.record, self.task)

    def again(self) -> FoundRoute:
        """The same task at the model's present parameters: only the record is read anew."""
        record = _record(self.task.model, self.name, self.task.args, self.task.kwargs)
        if record is None or not self.route.fits(record, self.task):
            raise ValueError(f"expected {type(self.task.model).__name__} to declare the same structure again, it does not")
        return replace(self, record=record)

    def log_evidence(self) -> Tensor:
        """Log p(x) `[B]`, differentiable in the model's parameters."""
        return self.route.log_evidence(self.record, self.task)

    def model_evaluations(self) -> int:
        """How many joint log probabilities one evaluation of log p(x) computes."""
        return self.route.model_evaluations(self.record, self.task)


def find_route(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    max_bytes: int,
    method: str,
    structure: Structure | None = None,
    check: bool = True,
) -> FoundRoute | None:
    """The declared route that serves a program at its arguments, or None: then it is enumerated.

    Call it with gradients enabled where those of the evidence are wanted: the record may hold what depends on parameters.

    Args:
        model: a Pyro program.
        args: its arguments.
        kwargs: its keyword arguments.
        max_bytes: the memory that an evaluation may take.
        method: named in error messages.
        structure: of the program at its arguments, where it is known already.
        check: compare the declaration with the program at a few rows.

    Raises:
        ValueError: if the program refuses its data, the work is too much for any route, or the declaration tells another log
            joint than the program.
    """
    names = [name for name in ROUTES if declares(model, name, *_arguments(name, args, kwargs))]
    if not names or not args or not isinstance(args[0], Tensor):
        return None
    if "layers" in names and not capturing() and (record := declared(model, "layers")) is not None:
        check_finite(record)  # before the program runs into them
    if structure is None:
        with torch.no_grad(), unrecorded():
            structure = read_structure(model, args, kwargs)
    if not _plain(structure):
        return None
    task = Task(model, args, kwargs, structure, max_bytes, method)
    for name in names:
        record = _record(model, name, args, kwargs)
        if record is not None and ROUTES[name].fits(record, task):
            if check and not capturing():
                check_declaration(model, record, args, kwargs, structure)
            return FoundRoute(name, ROUTES[name], record, task)
    return None


def _record(model: Program, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a model declares."""
    return declared(model, name, *_arguments(name, args, kwargs))


def _arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """What a declaring method takes; layers alone do not depend on the data."""
    return ((), {}) if name == "layers" else (args, kwargs)


def _plain(structure: Structure) -> bool:
    """Whether all sites lie in one plate, neither scaled, masked, nor of rows that the program draws."""
    return (
        len(structure.batch) == len(structure.plates) == 1
        and bool(structure.latents)
        and not structure.sequential
        and not structure.random_plates
        and all(isinstance(scale, float) and scale == 1.0 for scale in structure.scales.values())
        and all(mask is None or mask is True for mask in structure.masks.values())
    )


ROUTES: dict[str, Route] = {"layers": LinearCodeRoute(), "factorial_code": FactorialRoute(), "chain": ChainRoute()}
