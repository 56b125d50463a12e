"""Structures that a model declares of itself; see :mod:`pyrovae.ops.structures`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pyrovae.handlers.own_params import OwnedProgram
from pyrovae.ops.structures import Chain, FactorialCode, SigmoidLayers

_RECORDS = {"layers": SigmoidLayers, "factorial_code": FactorialCode, "chain": Chain}


def declared(
    program: Callable[..., Any], name: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The record that a model declares, or None.

    Only a module itself declares: a program that is relaxed, scaled, conditioned or wrapped in anything else than
    `own_params` is another program, of which the declaration might not hold. Nor does it hold for a subclass that writes a
    `forward` of its own and no declaration; see :func:`method_of_program`. A method of that name that takes other arguments, or
    returns anything else than its record, is the model's own business.

    Args:
        program: a Pyro program.
        name: of the declaring method: "layers", "factorial_code" or "chain".
        args: what the method takes.
        kwargs: likewise.
    """
    method = _method(program, name, args, kwargs)
    record = None if method is None else method(*args, **(kwargs or {}))
    return record if isinstance(record, _RECORDS[name]) else None


def declares(
    program: Callable[..., Any], name: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> bool:
    """Whether there is a method to be asked by :func:`declared`, which may still return None."""
    return _method(program, name, args, kwargs) is not None


def method_of_program(program: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    """A program's method that tells something of the program as it runs, or None.

    It must come with the program: a class that overrides `forward` and inherits the method tells nothing by it, since what its
    parent says holds for the parent's program.

    Args:
        program: a Pyro program.
        name: of the method; an attribute that is no method, such as a submodule, is none.
    """
    if _level(program, name) > min(_level(program, "forward"), _level(program, "__call__")):
        return None
    method = getattr(program, name, None)
    return method if callable(method) and not isinstance(method, nn.Module) else None


def takes(method: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether a callable's signature has room for arguments."""
    try:
        inspect.signature(method).bind(*args, **(kwargs or {}))
    except (TypeError, ValueError):
        return False
    return True


def _method(
    program: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> Callable[..., Any] | None:
    while isinstance(program, OwnedProgram):
        program = program.program
    method = method_of_program(program, name) if isinstance(program, nn.Module) else None
    return method if method is not None and takes(method, args, kwargs) else None


def _level(program: Callable[..., Any], name: str) -> float:
    """How far up the classes an attribute is defined: -1 on the instance, 0 in its class, and so on; infinity for nowhere."""
    if name in getattr(program, "__dict__", {}):
        return -1
    return next((level for level, cls in enumerate(type(program).__mro__) if name in vars(cls)), math.inf)
