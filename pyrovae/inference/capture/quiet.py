"""What lets a run of the programs be recorded: no value of a tensor becomes a Python number."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import FrameType, TracebackType
from typing import Any

import pyro
import pyro.util
import torch
from pyro.infer.util import Dice
from torch import Tensor, fx
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

_READS = {
    getattr(Tensor, name): what
    for name, what in {
        "item": "item()",
        "__bool__": "bool(), as `if` takes it",
        "__float__": "float()",
        "__int__": "int()",
        "__index__": "int()",
        "__complex__": "complex()",
        "__format__": "format(), as a print does,",
        "__contains__": "in",
        "tolist": "tolist()",
        "numpy": "numpy()",
        "__array__": "numpy()",
    }.items()
}
_OUTSIDE = (*(str(Path(module.__file__).parent) for module in (torch, pyro) if module.__file__), str(Path(__file__).parents[1]))
_LIBRARIES = ("pyro.", "torch.distributions", "torch.nn")


class CannotCapture(RuntimeError):
    """A program that cannot be recorded once and replayed; the message says what it does, where, and what to do."""


class Quiet(TorchFunctionMode):
    """Answers or refuses what would read a tensor's value while a run is recorded.

    `item()` of a float, by which objectives report their loss, gives the 0-d tensor itself, detached: to an objective in
    float64, as a Python float is, to others in the default dtype, which a Python float takes among tensors. `TraceEnum_ELBO`
    is told that no probability is zero, and so sums zeros that it would leave out. Any other reading of a value that the run
    has computed is refused; one of a tensor that was there before is answered, and remembered in `read` with its version.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer, refuse, or let through."""
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func is Tensor.item and args[0].is_floating_point():
            return args[0].detach().to(torch.float64 if _in_objective() else torch.get_default_dtype())
        if func is Tensor.__bool__ and _asks_for_zeros():
            return True
        if func in _READS:
            self._check(args[0], f"takes {_READS[func]} of a tensor that the run computes")
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return func(*args, **(kwargs or {}))
        elif func is Tensor.__getitem__:
            for mask in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8):
                    self._check(mask, "indexes by a mask that the run computes, so that shapes depend on values")
        return func(*args, **(kwargs or {}))

    def _check(self, tensor: Tensor, what: str) -> None:
        if is_computed(tensor):
            raise CannotCapture(
                f"expected a program whose course does not depend on values, got one that {what} ({place()}); write it with "
                "tensor operations such as torch.where, or run it eagerly"
            )
        self.read.setdefault(id(tensor), (tensor, tensor._version))


@contextmanager
def quiet() -> Iterator[Quiet]:
    """A block in which Pyro validates nothing, warns of no NaN, and :class:`Quiet` answers."""
    isnan, validate = pyro.util.torch_isnan, Distribution._validate_sample
    pyro.util.torch_isnan = lambda _: False  # type: ignore[assignment]
    Distribution._validate_sample = lambda *_: None  # type: ignore[method-assign]
    try:
        with pyro.validation_enabled(is_validate=False), Quiet() as mode:
            yield mode
    finally:
        pyro.util.torch_isnan = isnan
        Distribution._validate_sample = validate  # type: ignore[method-assign]


def is_computed(tensor: Tensor) -> bool:
    """Whether a tensor of the run that is being recorded may have other values next time."""
    mode = get_proxy_mode()
    if mode is None or tensor not in mode.tracer.tensor_tracker:
        return False
    entry = mode.tracer.tensor_tracker[tensor]
    return entry.constant is None and _varies(entry.proxy.node)


def _varies(node: fx.Node) -> bool:
    """Whether an input, an existing tensor or a draw stands behind a node; not so for `arange` and its like."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return True
        new = [other for other in node.all_input_nodes if other not in seen]
        seen.update(new)
        todo += new
    return False


def place(traceback: TracebackType | None = None) -> str:
    """The innermost line that is neither torch's nor Pyro's nor ours: of the present stack, or of an error's."""
    if traceback is None:
        frames = [(frame, frame.f_lineno) for frame in _stack()]
    else:
        frames = [(frame, line) for frame, line in walk_tb(traceback)][::-1]
    inner = ""
    for frame, line in frames:
        name = frame.f_globals.get("__name__", "")
        if _is_users(frame):
            return f"{inner}{Path(frame.f_code.co_filename).name}, line {line}, in {frame.f_code.co_name}"
        if not inner and name.startswith(_LIBRARIES):
            inner = f"in {name}.{frame.f_code.co_name}, called from "
    return f"{inner}the objective" if inner else "in the objective's own code"


def warn(text: str) -> None:
    """Warn at the line of the user's that is being run."""
    level = next((k for k, frame in enumerate(_stack()) if _is_users(frame)), 1)
    warnings.warn(text, stacklevel=level + 1)


def _in_objective() -> bool:
    """Whether Pyro's own code of inference, or ours, asks."""
    names = (frame.f_globals.get("__name__", "") for frame in _stack()[1:])
    caller = next((name for name in names if not name.startswith(("torch", "pyrovae.inference.capture"))), "")
    return caller.startswith(("pyro.infer", "pyrovae.inference"))


def _asks_for_zeros() -> bool:
    """Whether it is Pyro's sum over enumerated values that asks whether all probabilities are positive."""
    return any(frame.f_code is Dice.compute_expectation.__code__ for frame in _stack()[:6])


def _stack() -> list[FrameType]:
    """The frames of the caller and outwards."""
    return [frame for frame, _ in walk_stack(sys._getframe(1))]


def _is_users(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith((*_OUTSIDE, "<"))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Torch's, without the check of its range, which reads values."""
    if num_classes < 0:
        raise CannotCapture(
            f"expected one_hot with num_classes, got one that counts the classes by value ({place()}); pass num_classes"
        )
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).to(torch.int64)
