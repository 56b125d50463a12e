"""The Python numbers that a program may advance by itself: a replay, which runs no Python, would leave them where they are."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, complex, str)


class Counters:
    """Numbers, strings and short lists of them that programs can reach at a moment.

    They are looked for among the attributes of modules and of the objects that programs are methods of or close over, in the
    cells that functions close over, and among the globals that they name; names with a leading underscore are left out.

    Args:
        programs: model and guide.
    """

    def __init__(self, programs: Sequence[Any]) -> None:
        self._holders: list[tuple[str, dict[str, Any] | types.CellType, str, Any]] = []
        seen: set[int] = set()
        for program in programs:
            for name, holder, key in _places(program, seen, depth=2):
                value = _get(holder, key)
                if (kept := _kept(value)) is not None:
                    self._holders.append((name, holder, key, (value, kept[0])))

    def change(self) -> str | None:
        """The first that is another now, in words."""
        for name, holder, key, (_, kept) in self._holders:
            now = _kept(_get(holder, key))
            if now is None or now[0] != kept:
                return f"{name}, from {kept} to {_get(holder, key)}"
        return None

    def restore(self) -> None:
        """Put all back."""
        for _, holder, key, (value, kept) in self._holders:
            if isinstance(value, list):
                value[:] = kept
            if _get(holder, key) is not value:
                _put(holder, key, value)


def _kept(value: Any) -> tuple[Any] | None:
    """A copy of what counts, in a tuple; None for anything else."""
    if type(value) in _PLAIN:
        return None if value != value else (value,)
    if type(value) is list and len(value) <= 64 and all(type(item) in _PLAIN for item in value):
        return (list(value),)
    return None


def _get(holder: dict[str, Any] | types.CellType, key: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(key)
    try:
        return holder.cell_contents
    except ValueError:  # an empty cell
        return None


def _put(holder: dict[str, Any] | types.CellType, key: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[key] = value
    else:
        holder.cell_contents = value


def _places(thing: Any, seen: set[int], depth: int) -> Iterator[tuple[str, dict[str, Any] | types.CellType, str]]:
    """Names, holders and keys of what a program, or an object at hand, holds."""
    if id(thing) in seen or depth < 0:
        return
    seen.add(id(thing))
    if isinstance(thing, functools.partial):
        yield from _places(thing.func, seen, depth)
    elif isinstance(thing, types.MethodType):
        yield from _places(thing.__func__, seen, depth)
        yield from _places(thing.__self__, seen, depth)
    elif isinstance(thing, types.FunctionType):
        yield from _of_function(thing, seen, depth)
    elif isinstance(thing, nn.Module):
        for module in thing.modules():
            yield from _of_object(module, seen, depth=0)
            forward = type(module).forward
            if isinstance(forward, types.FunctionType) and not forward.__module__.startswith(("torch.", "pyro.", "pyrovae.")):
                yield from _of_function(forward, seen, depth=0)
    elif hasattr(thing, "__dict__") and not isinstance(thing, (type, types.ModuleType)):
        yield from _of_object(thing, seen, depth)


def _of_object(thing: Any, seen: set[int], depth: int) -> Iterator[tuple[str, dict[str, Any] | types.CellType, str]]:
    holder = vars(thing)
    for key, value in list(holder.items()):
        if not key.startswith("_") and key != "training":
            yield f"the attribute {key!r} of {type(thing).__name__}", holder, key
        if callable(value) and not isinstance(value, type):
            yield from _places(value, seen, depth - 1)


def _of_function(
    function: types.FunctionType, seen: set[int], depth: int
) -> Iterator[tuple[str, dict[str, Any] | types.CellType, str]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield f"{name!r}, which {function.__name__} closes over", cell, name
        yield from _places(_get(cell, name), seen, depth - 1)
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield f"the global {name!r}", function.__globals__, name
            if not isinstance(function.__globals__[name], types.FunctionType):
                yield from _places(function.__globals__[name], seen, depth - 1)
    yield from _of_object(function, seen, depth=0)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
