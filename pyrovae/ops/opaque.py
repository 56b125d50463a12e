"""Computations whose course depends on values, as single operations of a recorded run.

An enumeration sorts units by their range, a chain is summed in logarithms where its messages leave the range of floats: a graph
of tensor operations, recorded once, cannot choose so. While a run is recorded (:func:`pyrovae.ops.tracing.capturing`) such a
computation enters the graph as one operation, whose replay runs this very code; else nothing is between the caller and it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

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
        function: returns new tensors, not views of its arguments; a closure is kept as long as the process runs.
        *tensors: its arguments.
    """
    if not capturing():
        return function(*tensors)
    return _operations().opaque_draw(list(tensors), _register(_Call(lambda given: list(function(*given)))))


class _Call:
    """What an operation of a graph runs, and what its outputs looked like when it was recorded."""

    def __init__(self, run: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.run = run
        self.like: list[tuple[torch.Size, torch.dtype, torch.device]] = []


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
        given = iter(tensors)
        context = _Context(self.needs_input_grad)
        value = self.function.forward(context, *(next(given) if kept is None else kept[0] for kept in self.template))
        if not self.differentiable:
            return [value]
        self.context, self.ticket = context, self.ticket + 1
        return [value, torch.tensor(self.ticket)]

    def backward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The gradients of the arguments that need one."""
        grad, ticket = tensors
        if self.context is None or int(ticket) != self.ticket:
            raise RuntimeError("expected the replays of a graph one after another, got two at once; capture a graph a thread")
        context, self.context = self.context, None
        gradients = self.function.backward(context, grad)
        return [gradients[k] for k in self.differentiable]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, *args: Any) -> Tensor:
        ctx.place = _Differentiable(function, args, tuple(ctx.needs_input_grad[1:]))
        ctx.num_args = len(args)
        found = _operations().opaque([a for a in args if isinstance(a, Tensor)], _register(_Call(ctx.place.forward)))
        ctx.ticket = found[1] if len(found) > 1 else None
        return found[0]  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _operations().opaque([grad, ctx.ticket], _register(_Call(ctx.place.backward)))
        gradients: list[Tensor | None] = [None] * (1 + ctx.num_args)
        for k, gradient in zip(ctx.place.differentiable, found, strict=True):
            gradients[1 + k] = gradient
        return tuple(gradients)


_calls: list[_Call] = []


def _register(call: _Call) -> int:
    _calls.append(call)
    return len(_calls) - 1


def _run(tensors: list[Tensor], call: int) -> list[Tensor]:
    entry = _calls[call]
    with torch._C.DisableTorchFunction(), torch.no_grad():
        found = entry.run(tensors)
    entry.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in found]
    return found


def _shapes(tensors: list[Tensor], call: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in _calls[call].like]


@cache
def _library() -> torch.library.Library:
    library = torch.library.Library("pyrovae", "FRAGMENT")
    for name, tags in (("opaque", ()), ("opaque_draw", (torch.Tag.nondeterministic_seeded,))):
        library.define(f"{name}(Tensor[] tensors, int call) -> Tensor[]", tags=tags)
        library.impl(name, _run, "CompositeExplicitAutograd")
        library._register_fake(name, _shapes)
    return library


def _operations() -> Any:
    _library()
    return torch.ops.pyrovae
