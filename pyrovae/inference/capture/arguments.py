"""The signature of a call: what of its arguments and of the process is baked into a captured graph, tensors' contents aside."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from numbers import Number
from typing import Any, NamedTuple

import torch
from pyro.poutine import runtime
from torch import Tensor

Rebuild = Callable[[Sequence[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
_PLAIN = (str, bytes, type(None), torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format, Enum, type, range)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


class Same:
    """A thing that is compared by identity, and kept alive; two methods of one object are the same if their function is."""

    __slots__ = ("key", "thing")

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        method = isinstance(thing, types.MethodType)
        self.key = (id(thing.__self__), id(thing.__func__)) if method else (id(thing),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Rebuild, Hashable]:
    """Take a call's tensors out of its arguments, and of the (named) tuples, lists and dicts among them.

    Args:
        args: positional arguments.
        kwargs: the others; their order does not matter.

    Returns:
        The tensors; a function that puts others in their place; and the signature of the call, which is equal to that of
        another one if the structure is, the shape, strides, dtype, device and `requires_grad` of tensors, type and value of
        numbers, strings and the like, and the identity of anything else, which the signature keeps alive. Cost: 1 µs a tensor.
    """
    for arg in args:
        if kwargs or type(arg) is not Tensor:
            break
    else:
        if not kwargs:
            return list(args), _positional, (tuple([_of_tensor(a) for a in args]), ())
    tensors: list[Tensor] = []
    names = sorted(kwargs)
    positional = tuple([_signature(a, tensors) for a in args])
    signature = positional, tuple([(name, _signature(kwargs[name], tensors)) for name in names])

    def rebuild(others: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rest = iter(others)
        new = tuple([_with(a, rest) for a in args])
        by_name = {name: _with(kwargs[name], rest) for name in names}
        return new, {name: by_name[name] for name in kwargs}

    return tensors, rebuild, signature


def describe_change(before: Any, after: Any) -> str:
    """The first argument whose signature is another, in words, such as "the second argument is the float 0.3 and was 0.2".

    Args:
        before: a signature, or a pair of one and :class:`Flags`.
        after: another.
    """
    if isinstance(after[1], Flags):
        return _flags(before[1], after[1]) if before[0] == after[0] else describe_change(before[0], after[0])
    (old, old_names), (new, new_names) = before, after
    if len(old) != len(new):
        return f"the call has {len(new)} positional arguments and had {len(old)}"
    was, now = dict(old_names), dict(new_names)
    for name in (*now, *was):
        if name not in was or name not in now:
            return f"the argument {name!r} is {'new' if name in now else 'gone'}"
    pairs = [(_ordinal(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    pairs += [(f"the argument {name!r}", was[name], now[name]) for name in now]
    for words, a, b in pairs:
        if a != b:
            return _difference(words, "", a, b)
    return "nothing has changed"


class Flags(NamedTuple):
    """What of the process's state a captured run depends on."""

    default_dtype: torch.dtype
    threads: int
    gradients: bool
    inference_mode: bool
    deterministic_algorithms: bool
    matmul_precision: str
    autocast_on_the_gpu: torch.dtype | None
    autocast_on_the_cpu: torch.dtype | None
    handlers_around_the_step: tuple[Same, ...]


def process_flags() -> Flags:
    """Those of now. Cost: 2 µs."""
    return Flags(
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        _autocast("cuda"),
        _autocast("cpu"),
        tuple([Same(handler) for handler in runtime._PYRO_STACK]),
    )


def _autocast(device: str) -> torch.dtype | None:
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    on = torch.is_autocast_enabled() if device == "cuda" else torch.is_autocast_cpu_enabled()  # torch 2.3
    return (torch.get_autocast_gpu_dtype() if device == "cuda" else torch.get_autocast_cpu_dtype()) if on else None


def _positional(tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(tensors), {}


def _of_tensor(t: Tensor) -> tuple[Any, ...]:
    try:
        return Tensor, t.shape, t.stride(), t.dtype, t.device, t.requires_grad
    except RuntimeError:  # a sparse one has no strides
        return Tensor, t.shape, t.layout, t.dtype, t.device, t.requires_grad


def _signature(thing: Any, tensors: list[Tensor]) -> Hashable:
    """(class, …) of a tensor, number or container; the tensors within are appended to the list."""
    if isinstance(thing, Tensor):
        tensors.append(thing)
        return _of_tensor(thing)
    if isinstance(thing, float):
        return type(thing), thing.hex()  # tells -0.0 from 0.0, and NaN is NaN
    if isinstance(thing, torch.Size):
        return torch.Size, thing
    if isinstance(thing, slice):
        return slice, repr(thing)
    if isinstance(thing, _PLAIN):
        return type(thing), thing
    if isinstance(thing, Number) and isinstance(thing, Hashable):
        return type(thing), repr(thing)
    if _is_container(thing):
        keys = list(thing) if isinstance(thing, dict) else range(len(thing))
        return type(thing), tuple([(_signature(key, []), _signature(thing[key], tensors)) for key in keys])
    return Same(thing)


def _with(thing: Any, tensors: Any) -> Any:
    """A copy of an argument with the next tensors in the place of its own."""
    if isinstance(thing, Tensor):
        return next(tensors)
    if isinstance(thing, torch.Size) or not _is_container(thing):
        return thing
    if isinstance(thing, dict):
        new = thing.copy()
        new.update({key: _with(value, tensors) for key, value in thing.items()})
        return new
    items = [_with(item, tensors) for item in thing]
    return type(thing)(*items) if hasattr(thing, "_fields") else type(thing)(items)


def _is_container(thing: Any) -> bool:
    return isinstance(thing, tuple | list | dict)


def _flags(before: Flags, after: Flags) -> str:
    for name, a, b in zip(Flags._fields, before, after, strict=True):
        if a != b:
            what = f"the process's state, {name.replace('_', ' ')},"
            return f"{what} is another" if name.startswith("handlers") else f"{what} is {b} and was {a}"
    return "nothing has changed"


def _ordinal(i: int) -> str:
    return f"the {_ORDINALS[i]} argument" if i < len(_ORDINALS) else f"positional argument {i + 1}"


def _difference(words: str, path: str, a: Any, b: Any) -> str:
    """How two different signatures of one argument differ, at the place within it."""
    what = f"entry {path} of {words}" if path else words
    what = what if not path else f"the {what}"
    if isinstance(a, tuple) and isinstance(b, tuple) and a[0] is b[0]:
        if a[0] is Tensor:
            return f"{what} {_tensors(a, b)}"
        if isinstance(a[1], tuple) and not isinstance(a[1], torch.Size) and issubclass(a[0], tuple | list | dict):
            if [key for key, _ in a[1]] != [key for key, _ in b[1]]:
                keys = issubclass(a[0], dict)
                return f"{what} has " + (
                    f"keys {_keys(b)} and had {_keys(a)}" if keys else f"length {len(b[1])} and had {len(a[1])}"
                )
            for (key, old), (_, new) in zip(a[1], b[1], strict=True):
                if old != new:
                    return _difference(words, f"{path}[{_plain(key)}]", old, new)
    same_class = isinstance(a, tuple) and isinstance(b, tuple) and a[0] is b[0]
    return f"{what} is {_words(b)} and was {_plain(a) if same_class else _words(a)}"


def _tensors(a: tuple[Any, ...], b: tuple[Any, ...]) -> str:
    for name, old, new in zip(("shape", "strides", "dtype", "device"), a[1:5], b[1:5], strict=True):
        if old != new:
            shown = (tuple(x) if isinstance(x, tuple) else x for x in (new, old))
            return "has {} {} and had {}".format(name, *shown)
    return f"requires {'a' if b[5] else 'no'} gradient and did{' not' if b[5] else ''}"


def _keys(signature: tuple[Any, ...]) -> str:
    return ", ".join(_plain(key) for key, _ in signature[1]) or "none"


def _plain(signature: Any) -> str:
    """The value that a signature stands for."""
    if isinstance(signature, Same):
        return _words(signature)
    cls, value = signature[0], signature[1]
    if issubclass(cls, float):
        return repr(float.fromhex(value))
    return value if isinstance(value, str) and not issubclass(cls, str) else repr(value)


def _words(signature: Any) -> str:
    if isinstance(signature, Same):
        thing = signature.thing
        name = getattr(thing, "__qualname__", None)
        return f"{'the function ' + name if name else 'an object of class ' + type(thing).__name__} (at {id(thing):#x})"
    cls = signature[0]
    if cls is Tensor:
        return f"a tensor of shape {tuple(signature[1])}"
    if issubclass(cls, type(None)):
        return "None"
    if issubclass(cls, tuple | list | dict) and not issubclass(cls, torch.Size):
        return f"a {cls.__name__} of length {len(signature[1])}"
    return f"the {cls.__name__} {_plain(signature)}"
