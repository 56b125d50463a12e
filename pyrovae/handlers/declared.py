"""What a program declares of itself: structures (:mod:`pyrovae.ops.structures`), and that its runs can be captured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pyrovae.handlers.own_params import OwnedProgram
from pyrovae.handlers.partition import WithLogPartition
from pyrovae.handlers.rewrite import RewrittenProgram
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


def declares_capturable(program: Callable[..., Any]) -> bool:
    """Whether a model or guide declares that a run of it can be recorded as tensor operations, and replayed in place of it.

    It says so by an attribute `capturable = True`: its statements, shapes and branches depend on its arguments' shapes and on
    nothing that a tensor holds or that changes from run to run, but for tensors changed in place. The models and guides of this
    library do; a program of yours may, a plain function too. Layers of `torch.nn` need not. Around it may stand `relax`,
    `discretize`, `surrogate`, `scale_kl`, `with_log_partition` and `own_params`; a temperature given as a function may return
    another number at each run, and is not trusted.

    Every part of a module is asked: a declaration does not speak for an encoder or an activation that was passed in, nor a
    guide's for a model that it runs. Nor does it hold in a subclass that writes a method of its own, other than `__init__`, and
    does not repeat it; nor with hooks.

    Args:
        program: a Pyro program.

    Example:
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.handlers import relax
        >>> from pyrovae.models import BernoulliVAE
        >>> model = BernoulliVAE(6, 2, 4)
        >>> declares_capturable(relax(model, 0.5)), declares_capturable(AmortizedMeanField(model))
        (True, True)
        >>> declares_capturable(lambda x: model(x))
        False
    """
    while isinstance(program, (RewrittenProgram, OwnedProgram, WithLogPartition)):
        temperature = getattr(program, "temperature", None)
        if callable(temperature) and not isinstance(temperature, Tensor):
            return False
        program = program.program
    if not isinstance(program, nn.Module):
        return getattr(program, "capturable", False) is True
    return all(_part_declares(part) for part in program.modules())


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


def _part_declares(part: nn.Module) -> bool:
    if any(getattr(part, hooks) for hooks in _HOOKS):
        return False
    methods = [name for name in part.__dict__ if callable(getattr(type(part), name, None))]
    if "capturable" in part.__dict__ or methods:
        return part.__dict__.get("capturable") is True
    ours = False
    for cls in type(part).__mro__:
        if "capturable" in vars(cls):
            return part.capturable is True
        if cls is nn.Module:
            return not ours  # a layer of torch
        if cls.__module__.startswith("pyrovae."):
            ours = True  # what the base class says was said of its children here
        elif not cls.__module__.startswith("torch.nn.") and _writes_methods(cls):
            return False
    return False


def _writes_methods(cls: type) -> bool:
    return any(callable(value) or hasattr(value, "__get__") for name, value in vars(cls).items() if name not in _PLAIN)


_PLAIN = ("__init__", "__dict__", "__weakref__", "__annotate__", "__annotate_func__")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
