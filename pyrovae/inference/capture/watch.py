"""What a captured run reads that is no tensor's content: what names are bound to, and training flags.

A graph reads the tensors that it was captured with, so that steps of an optimizer and `fill_` reach it. That a name is bound to
another tensor, or a module set to evaluate, does not: this file notices it, in a few microseconds a step.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Number
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

_MISSING = object()
_requires_grad, _dtype = attrgetter("requires_grad"), attrgetter("dtype")  # `module.double()` keeps the Parameter
Slot = tuple[dict[str, Any], str, Any, str]  # a dict, a key, what it holds, and the name of it in words


class Watch:
    """What the programs of a block are bound to, made by `with Watch.during(model, guide) as watch:` around a run of them.

    It knows the modules that are, or lie under, the programs (wrapped ones, methods, partials and closures included), those
    whose forward ran in the block, and the entries of Pyro's store that were asked for in it; not other threads'. Of a module
    it knows parameters, buffers, parts, whether it is training, and the tensors and floats among its attributes.

    Attributes:
        rebound: what the block itself has bound to another tensor, in words, or None. A replay would not bind it again. What
            held an activation (a tensor with a history in autograd) does not count: a run writes it before it reads it.
        evaluating: the outermost modules that ran in evaluation mode, as "'encoder' (Sequential)".
        devices: of all parameters and buffers.
    """

    rebound: str | None = None
    evaluating: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()
        self._slots: list[Slot] = []
        self._rebound: list[Slot] = []
        self._told: list[tuple[str, Tensor]] = []
        self._parameters: list[Tensor] = []
        self._words: list[str] = []
        self._learn: list[bool] = []
        self._dtypes: list[torch.dtype] = []

    @classmethod
    @contextmanager
    def during(cls, *programs: Any) -> Iterator[Watch]:
        """Watch a block that runs the programs; the watch knows nothing before it has ended."""
        watch, family, store = cls(), _Family(), _Asked()
        for program in programs:
            for name, module in _modules_of(program, set()):
                family.add(name, module)
        thread, entries = threading.get_ident(), dict(pyro.get_param_store()._params)

        def before_forward(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                family.ran(module)

        hook = register_module_forward_pre_hook(before_forward)
        try:
            with store:
                yield watch
        finally:
            hook.remove()
            watch._end(family, store.names, entries)

    def change(self) -> str | None:
        """What is bound otherwise than at the end of the block, in words; None if nothing.

        Contents do not count. Cost: 0.1 µs a binding.
        """
        try:
            for holder, key, thing, words in self._slots:
                if holder[key] is not thing and not (type(thing) is float and _equal(holder[key], thing)):
                    return _rebinding(holder, key, thing, words)
        except KeyError:
            return _rebinding(holder, key, thing, words)
        learn, dtypes = list(map(_requires_grad, self._parameters)), list(map(_dtype, self._parameters))
        if learn != self._learn:
            i = next(i for i, (a, b) in enumerate(zip(learn, self._learn, strict=True)) if a != b)
            return f"the {self._words[i]} requires {'a' if learn[i] else 'no'} gradient now"
        if dtypes != self._dtypes:
            i = next(i for i, (a, b) in enumerate(zip(dtypes, self._dtypes, strict=True)) if a != b)
            return f"the {self._words[i]} is {dtypes[i]} and was {self._dtypes[i]}"
        return None

    def restore(self) -> None:
        """Bind what the block has bound to other tensors to the old ones again."""
        for holder, key, old, _ in self._rebound:
            holder[key] = old

    def rebound_among(self, tensors: Iterable[Tensor]) -> str | None:
        """What of given tensors the block has replaced, in words."""
        among = {id(tensor) for tensor in tensors}
        return next((words for words, old in self._told if id(old) in among), None)

    def _end(self, family: _Family, asked: list[str], entries: dict[str, Tensor]) -> None:
        store = pyro.get_param_store()
        known = [name for name in asked if name in entries]
        entered = [(store._params, name, entries[name], f"parameter {name!r} of Pyro's store") for name in known]
        names = {id(store._params[name]): name for name in asked if name in store._params}
        family.look_again()
        family.name_by(names)
        self._rebound = [s for s in (*family.slots(), *entered) if isinstance(s[2], Tensor) and s[0].get(s[1]) is not s[2]]
        self._told = [(_rebinding(*slot), slot[2]) for slot in self._rebound]
        self.rebound = next((words for words, old in self._told if old.grad_fn is None), None)
        floats = [s for s in family.slots() if type(s[2]) is float and s[0].get(s[1]) is not s[2]]
        own = {(id(slot[0]), slot[1]) for slot in (*self._rebound, *floats)}
        self._slots = [slot for slot in family.slots(now=True) if (id(slot[0]), slot[1]) not in own]
        if names:
            self._slots.append((vars(store), "_params", store._params, "Pyro's param store"))
            self._slots += [(store._params, n, store._params[n], f"parameter {n!r} of Pyro's store") for n in names.values()]
        held = {id(slot[2]): slot for slot in reversed(self._slots) if isinstance(slot[2], Tensor)}
        parameters = [slot for slot in reversed(held.values()) if slot[3].startswith("parameter")]
        self._parameters, self._words = [slot[2] for slot in parameters], [slot[3] for slot in parameters]
        self._learn, self._dtypes = [p.requires_grad for p in self._parameters], [p.dtype for p in self._parameters]
        self.devices = {slot[2].device for slot in held.values() if not slot[3].startswith("attribute")}
        self.evaluating = family.evaluating()


class _Family:
    """Modules by identity, with a name and what each was bound to when it was met."""

    def __init__(self) -> None:
        self.names: dict[int, tuple[str, nn.Module]] = {}
        self.before: list[tuple[nn.Module, dict[int, dict[str, Any]]]] = []
        self.roots: list[tuple[str, nn.Module]] = []
        self.strangers: list[nn.Module] = []
        self.off: list[nn.Module] = []

    def add(self, root: str, top: nn.Module) -> None:
        self.roots.append((root, top))
        for path, module in top.named_modules():
            if id(module) not in self.names:
                self.names[id(module)] = (".".join(filter(None, (root, path))), module)
                self.before.append((module, {id(holder): dict(holder) for holder in _holders(module)}))

    def look_again(self) -> None:
        """Meet the modules that the block has made, as an automatic guide makes its own when it first runs."""
        for root, top in list(self.roots):
            self.add(root, top)

    def ran(self, module: nn.Module) -> None:
        if id(module) not in self.names:
            self.strangers.append(module)
            self.add(type(module).__name__, module)
        if not module.training and all(module is not other for other in self.off):
            self.off.append(module)

    def name_by(self, store: dict[int, str]) -> None:
        """Name the modules that no program holds as `pyro.module` names their parameters."""
        for stranger in self.strangers:
            for path, parameter in stranger.named_parameters():
                full = store.get(id(parameter), "").replace("$$$", ".")
                if full.endswith(f".{path}"):
                    for inner, module in stranger.named_modules():
                        self.names[id(module)] = (".".join(filter(None, (full.removesuffix(f".{path}"), inner))), module)
                    break

    def slots(self, *, now: bool = False) -> Iterator[Slot]:
        """All that modules are bound to: as they were met, or as they are."""
        for module, before in self.before:
            name, _ = self.names[id(module)]
            at = f"{name}." if name else ""
            for holder in _holders(module):
                for key, thing in (holder if now else before.get(id(holder), {})).items():
                    if holder is vars(module):
                        if key == "training":
                            yield holder, key, thing, self.words(module)
                        elif isinstance(thing, Tensor) or type(thing) is float:
                            yield holder, key, thing, f"attribute {at + key!r}"
                    else:
                        kind = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "module"}[_kind(module, holder)]
                        yield holder, key, thing, f"{kind} {at + key!r}"

    def words(self, module: nn.Module) -> str:
        name, _ = self.names[id(module)]
        cls = type(module).__name__
        return f"module {name!r} ({cls})" if name and name != cls else f"module {cls}"

    def evaluating(self) -> tuple[str, ...]:
        inner = {id(child) for module in self.off for child in module.modules() if child is not module}
        return tuple(self.words(module).removeprefix("module ") for module in self.off if id(module) not in inner)


class _Asked(Messenger):
    """The names of the parameter statements of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        self.names.append(msg["name"])


def _holders(module: nn.Module) -> list[dict[str, Any]]:
    holders = vars(module), module._parameters, module._buffers, module._modules
    return [holder for holder in holders if isinstance(holder, dict)]  # scripted modules have others, made at each call


def _kind(module: nn.Module, holder: dict[str, Any]) -> str:
    return next(name for name in ("_parameters", "_buffers", "_modules") if getattr(module, name) is holder)


def _modules_of(program: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules that a program is or holds on to; the name of a program itself is empty."""
    if id(program) in seen:
        return
    seen.add(id(program))
    if isinstance(program, nn.Module):
        yield "", program
    elif isinstance(program, functools.partial):
        for part in (program.func, *program.args, *program.keywords.values()):
            yield from _modules_of(part, seen)
    elif inspect.ismethod(program):
        yield from _modules_of(program.__self__, seen)
    elif inspect.isfunction(program):
        try:
            outer = inspect.getclosurevars(program)
        except ValueError:  # a cell that is still empty
            return
        for name, thing in {**outer.globals, **outer.nonlocals}.items():
            if isinstance(thing, nn.Module):
                yield name, thing
            elif getattr(thing, "__module__", None) == program.__module__ or name in outer.nonlocals:
                yield from _modules_of(thing, seen)
    else:
        for name, thing in getattr(program, "__dict__", {}).items():
            if isinstance(thing, nn.Module):
                yield "" if name == "program" else name, thing
            elif name in ("program", "func", "fn") and callable(thing):
                yield from _modules_of(thing, seen)


def _rebinding(holder: dict[str, Any], key: str, old: Any, words: str) -> str:
    new = holder.get(key, _MISSING)
    if type(old) is float and isinstance(new, Number):
        return f"the {words} is {new!r} and was {old!r}"
    if key == "training":
        return f"the {words} was {_mode(old)} and is {_mode(new)}"
    if words == "Pyro's param store":
        return f"{words} was cleared"
    if new is _MISSING or new is None:
        return f"the {words} is gone"
    if old is None:
        return f"the {words} is new"
    kind = "module" if isinstance(new, nn.Module) else "tensor" if isinstance(new, Tensor) else type(new).__name__
    return f"the {words} is another {kind}" if isinstance(new, type(old)) else f"the {words} is a {kind} now"


def _equal(a: Any, b: float) -> bool:
    return isinstance(a, Number) and (a == b or (a != a and b != b))


def _mode(training: bool) -> str:  # noqa: FBT001
    return "training" if training else "in evaluation mode"
