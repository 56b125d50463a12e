"""Structures that a model declares of itself; see :mod:`pyrovae.ops.structures`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pyrovae.handlers.own_params import OwnedProgram


def declared(
    program: Callable[..., Any], name: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The record that a model declares, or None.

    Only a module itself declares: a program that is relaxed, scaled, conditioned or wrapped in anything else than
    `own_params` is another program, of which the declaration might not hold.

    Args:
        program: a Pyro program.
        name: of the declaring method: "layers", "factorial_code" or "chain".
        args: what the method takes.
        kwargs: likewise.
    """
    while isinstance(program, OwnedProgram):
        program = program.program
    method = getattr(program, name, None) if isinstance(program, nn.Module) else None
    return method(*args, **(kwargs or {})) if callable(method) else None
