"""A block that leaves no trace: random states and tensors written in place are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pyrovae.ops import isolated_rng

_STATISTICS = ("running_mean", "running_var")  # which the schemas of batch norms do not mark as written


class Journal(TorchDispatchMode):
    """Keeps a copy of every storage from before its first change in the block; one that the block made itself is not kept.

    Attributes:
        read: tensors from before the block whose value became a Python number in it, with their versions then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, tuple[Tensor, int]] = {}
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Copy what an operation is about to write."""
        given = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, Tensor)]
        for tensor in _written(func, args, kwargs or {}):
            key = _key(tensor)
            if key not in self._made and key not in self._before:
                self._before[key] = _whole_storage(tensor)
        if torch.Tag.data_dependent_output in func.tags:
            self.read.update((id(x), (x, x._version)) for x in given if _key(x) not in self._made)
        out = func(*args, **(kwargs or {}))
        old = {_key(tensor) for tensor in given}
        self._made.update(key for x in tree_leaves(out) if isinstance(x, Tensor) and (key := _key(x)) not in old)
        return out

    def has(self, tensor: Tensor) -> bool:
        """Whether the block wrote a tensor that was there before it."""
        return _key(tensor) in self._before

    def undo(self) -> None:
        """Put every storage back."""
        with torch.no_grad():
            for whole, before in self._before.values():
                whole.copy_(before)


@contextmanager
def undone() -> Iterator[Journal]:
    """A block whose draws and in-place changes are undone at its end, also where it fails.

    Attributes of objects that the block sets anew are not.
    """
    journal = Journal()
    with isolated_rng():
        try:
            with journal:
                yield journal
        finally:
            journal.undo()


class Moment:
    """The random state, and the contents of some tensors, at a moment."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors, self.contents = tensors, [tensor.detach().clone() for tensor in tensors]
        self.cpu = torch.default_generator.get_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put(self) -> None:
        """Go back to it."""
        with torch.no_grad():
            for tensor, content in zip(self.tensors, self.contents, strict=True):
                tensor.copy_(content)
        torch.default_generator.set_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in _STATISTICS or (argument.alias_info is not None and argument.alias_info.is_write):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (tensor for tensor in tree_leaves(value) if isinstance(tensor, Tensor))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _whole_storage(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A flat tensor on the same storage, and a copy of it."""
    with _disable_current_modes(), torch.no_grad():
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        return whole, whole.clone()
