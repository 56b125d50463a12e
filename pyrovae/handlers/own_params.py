"""Parameters live in modules, not in Pyro's process-wide store.

Pyro keys its global store by name, so a second instance of a module silently shares, or loses, its parameters.
:func:`own_params` wraps a program so that every `pyro.param` and `pyro.module` statement is answered with the module's
own `nn.Parameter`: the store is neither read nor written for it. A bare `pyro.param("theta", tensor)` has no module and
keeps living in the store. :class:`Module` is the base of this library's programs; its instances carry names of their own,
so that they do not meet in the store under stock Pyro either.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn
from torch.distributions import constraints

_serial = itertools.count()


def announce(leaves: Mapping[str, Tensor]) -> None:
    """Tell handlers outside, such as the one by which `pyro.infer.SVI` collects what it trains, of parameters used.

    Args:
        leaves: the unconstrained leaves by name; the store is not touched.
    """
    if not am_i_wrapped():
        return
    for name, leaf in leaves.items():
        value = leaf.detach()
        value.unconstrained = lambda leaf=leaf: leaf  # type: ignore[attr-defined]
        effectful(lambda _, value=value: value, type="param")(name, name=name)


class OwnedProgram:
    """A program whose parameters are its own; see :func:`own_params`."""

    def __init__(self, program: Callable[..., Any], leaves: dict[str, Tensor]) -> None:
        self.program = program
        self.leaves = leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        with _OwnParams(self.leaves), _pyro_params_of(self.program):
            return self.program(*args, **kwargs)


def own_params(program: Callable[..., Any], leaves: dict[str, Tensor] | None = None) -> OwnedProgram:
    """Wrap a model or guide so that it uses its own parameters and reports them.

    Args:
        program: any Pyro program: a function, an `nn.Module`, a `PyroModule`.
        leaves: filled, at each call, with the unconstrained leaf of every parameter that the program used, by site name.

    Returns:
        A callable with the program's arguments, and an attribute `leaves`.
    """
    return OwnedProgram(program, {} if leaves is None else leaves)


class Module(PyroModule):
    """A `PyroModule` with a process-unique name, renewed by `deepcopy` and by unpickling."""

    def __init__(self) -> None:
        super().__init__(_unique_name(type(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Module:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        state: Any = self.__getstate__()
        new.__dict__.update(copy.deepcopy(dict(state), memo))
        new._take_new_name()
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_new_name()

    def _take_new_name(self) -> None:
        name = _unique_name(type(self))
        for path, module in self.named_modules():
            if isinstance(module, PyroModule):
                module._pyro_name = f"{name}.{path}" if path else name
                module._pyro_context = self._pyro_context


class _OwnParams(Messenger):
    """Answers a parameter statement that brings an `nn.Parameter` with that very Parameter."""

    def __init__(self, leaves: dict[str, Tensor]) -> None:
        super().__init__()
        self.leaves = leaves

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        initial = msg["args"][1] if len(msg["args"]) > 1 else msg["kwargs"].get("init_tensor")
        constraint = msg["args"][2] if len(msg["args"]) > 2 else msg["kwargs"].get("constraint", constraints.real)
        if isinstance(initial, nn.Parameter) and constraint is constraints.real:
            msg["value"], msg["done"] = initial, True
            self.leaves[msg["name"]] = initial

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.leaves or not isinstance(msg["value"], nn.Parameter):
            self.leaves[msg["name"]] = msg["value"].unconstrained()


@contextmanager
def _pyro_params_of(program: Callable[..., Any]) -> Iterator[None]:
    """Lend a module's `PyroParam`s to the store under their names, and put the store back as it was.

    `PyroParam` attributes go through the store without a message, so that a handler alone cannot answer them.
    """
    while not isinstance(program, nn.Module) and hasattr(program, "program"):
        program = program.program  # what `relax` and the like have wrapped
    lent = {
        ".".join(filter(None, (getattr(program, "_pyro_name", ""), path, name))): (
            getattr(module, name + "_unconstrained"),
            constraint,
        )
        for path, module in (program.named_modules() if isinstance(program, nn.Module) else ())
        for name, (constraint, _) in getattr(module, "_pyro_params", {}).items()
    }
    if not lent:
        yield
        return
    store = pyro.get_param_store()
    before = {name: (store._params[name], store._constraints[name]) for name in lent if name in store._params}
    try:
        for name, (value, constraint) in lent.items():
            _put(store, name, value, constraint)
        yield
    finally:
        for name, (value, _) in lent.items():
            store._params.pop(name, None)
            store._constraints.pop(name, None)
            store._param_to_name.pop(value, None)
            if name in before:
                _put(store, name, *before[name])


def _put(store: Any, name: str, value: Tensor, constraint: Any) -> None:
    store._params[name] = value
    store._constraints[name] = constraint
    store._param_to_name[value] = name


def _unique_name(cls: type) -> str:
    return f"{cls.__name__}_{next(_serial)}"
