"""Computations whose course depends on values, as single operations of a recorded run.

An enumeration sorts units by their range, a chain is summed in logarithms where its messages leave the range of floats: a graph
of tensor operations, recorded once, cannot choose so. While a run is recorded (:func:`pyrovae.ops.tracing.capturing`) such a
computation enters the graph as one operation, whose replay runs this very code; else nothing is between the caller and it.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyrovae.ops.tracing import capturing


def apply_whole(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """`function.apply(*args)`, in a recorded run one operation forward and one backward.

    Args:
        function: with one output, differentiable once, and no use of its context but `save_for_backward`, `saved_tensors`,
            `needs_input_grad` and attributes.
        *args: its arguments.
    """
    found: Tensor = _Replayed.apply(function, *args) if capturing() else function.apply(*args)
    return found


def run_whole(function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
    """`function(*tensors)`, without gradients and perhaps with draws; in a recorded run one operation.

    Args:
        function: returns new tensors, not views of its arguments; kept as long as the record, see :func:`kept`.
        *tensors: its arguments.
    """
    if not capturing():
        return function(*tensors)
    return _record("opaque_draw", lambda given: function(*given), list(tensors))


class _Call:
    """What an operation of a graph runs; and what the run gave that is being recorded."""

    def __init__(self, run: Callable[[list[Tensor]], Sequence[Tensor]], found: list[Tensor]) -> None:
        self.run = run
        self.found: list[Tensor] | None = found


class _Context:
    """Stands for the context of an autograd function between its forward and its backward."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors."""
        self.saved_tensors = tensors


class _Differentiable:
    """An autograd function at one place of a recorded run; between forward and backward it holds one context."""

    def __init__(self, function: Any, args: tuple[Any, ...], needs_input_grad: tuple[bool, ...]) -> None:
        self.function, self.needs_input_grad = function, needs_input_grad
        self.template = [None if isinstance(value, Tensor) else (value,) for value in args]
        self.differentiable = [k for k, needed in enumerate(needs_input_grad) if needed]
        self.context: _Context | None = None
        self.ticket = 0

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The value, and a ticket for the way back."""
        if self.differentiable:  # what the context keeps is its own: a compiled graph uses memory again
            tensors = [tensor.clone() for tensor in tensors]
        given = iter(tensors)
        context = _Context(self.needs_input_grad)
        value = self.function.forward(context, *(next(given) if kept is None else kept[0] for kept in self.template))
        if not self.differentiable:
            return [value]
        self.context, self.ticket = context, self.ticket + 1
        return [value.clone(), torch.tensor(self.ticket)]

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The gradients of the arguments that need one."""
        grad, ticket = tensors
        if self.context is None or int(ticket) != self.ticket:
            raise RuntimeError("expected the replays of a graph one after another, got two at once; capture a graph a thread")
        context, self.context = self.context, None
        gradients = self.function.backward(context, grad)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return [gradients[k] for k in self.differentiable]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, *args: Any) -> Tensor:
        ctx.place = _Differentiable(function, args, tuple(ctx.needs_input_grad[1:]))
        ctx.num_args = len(args)
        found = _record("opaque", ctx.place.forward, [value for value in args if isinstance(value, Tensor)])
        ctx.ticket = found[1] if len(found) > 1 else None
        return found[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _record("opaque", ctx.place.backward, [grad, ctx.ticket])
        gradients: list[Tensor | None] = [None] * (1 + ctx.num_args)
        for k, gradient in zip(ctx.place.differentiable, found, strict=True):
            gradients[1 + k] = gradient
        return tuple(gradients)


_calls: WeakValueDictionary[int, _Call] = WeakValueDictionary()
_serial = itertools.count()
_keepers: list[list[_Call]] = [[]]  # the outermost keeps what is recorded by others for as long as the process runs


@contextmanager
def kept() -> Iterator[list[_Call]]:
    """A block that records; what is to be kept with the record, which cannot be replayed without it."""
    _keepers.append([])
    try:
        yield _keepers[-1]
    finally:
        _keepers.pop()


def _record(name: str, run: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Run, and write the run down as one operation, whose arguments tell what its outputs are like."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        found = list(run(tensors))
    number = next(_serial)
    _calls[number] = call = _Call(run, found)
    _keepers[-1].append(call)
    like = repr([(tuple(t.shape), t.stride(), str(t.dtype).removeprefix("torch."), str(t.device)) for t in found])
    outputs: list[Tensor] = getattr(_operations(), name)(tensors, number, like)
    return outputs


def _run(tensors: list[Tensor], call: int, like: str) -> list[Tensor]:
    entry = _calls[call]
    found, entry.found = entry.found, None
    if found is not None:
        return found
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return list(entry.run(tensors))


def _shapes(tensors: list[Tensor], call: int, like: str) -> list[Tensor]:
    outputs = ast.literal_eval(like)
    return [torch.empty_strided(size, stride, dtype=getattr(torch, dtype), device=to) for size, stride, dtype, to in outputs]


@cache
def _library() -> torch.library.Library:
    library = torch.library.Library("pyrovae", "FRAGMENT")
    for name, tags in (("opaque", ()), ("opaque_draw", (torch.Tag.nondeterministic_seeded,))):
        library.define(f"{name}(Tensor[] tensors, int call, str like) -> Tensor[]", tags=tags)
        library.impl(name, _run, "CompositeExplicitAutograd")
        library._register_fake(name, _shapes)
    return library


def _operations() -> Any:
    _library()
    return torch.ops.pyrovae
