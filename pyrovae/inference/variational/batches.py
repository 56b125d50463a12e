"""Minibatches: the same rows of every tensor, in a fresh order every epoch, with a state that a checkpoint can hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.handlers.structure import read_structure
from pyrovae.inference.posterior import Program
from pyrovae.inference.rows import row_keys, take


@dataclass(frozen=True)
class Batch:
    """Arguments of one step, and its number of rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int


class Batches:
    """Draws minibatches without replacement, where the data are; all rows at every step where `size` is None.

    Every epoch has a fresh order, from torch's generator of the data's device, and ⌊N/B⌋ minibatches of exactly B rows: the
    rows left over sit this epoch out. As the order is fresh, every row is as likely to be among them.

    Args:
        args: the programs' arguments, the data first.
        kwargs: their keyword arguments.
        size: B; None takes all rows.
        prepare: applied to the arguments of every minibatch.
        indexed: whether the programs get `index` and `num_data`.

    Raises:
        ValueError: if the data have fewer than B rows.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        size: int | None,
        prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]],
        *,
        indexed: bool = False,
    ) -> None:
        self.args, self.kwargs, self.size, self.prepare, self.indexed = args, dict(kwargs), size, prepare, indexed
        self.rows = num_rows(args)
        self.keys = row_keys(args, kwargs, self.rows)  # whose rows a minibatch takes
        if size is not None and size > self.rows:
            given = "" if args and isinstance(args[0], Tensor) else "; the first argument must be a tensor of rows"
            raise ValueError(f"expected batch_size <= the {self.rows} rows of the data, got {size}{given}")
        self.order: Tensor | None = None
        self.start = 0

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return 1 if self.size is None else self.rows // self.size

    @property
    def factor(self) -> float:
        """What makes the loss of a minibatch that of all data."""
        return 1.0 if self.size is None or self.indexed else self.rows / self.size

    def draw(self) -> Batch:
        """The next minibatch."""
        size = self.size
        if size is None:
            return Batch(self.prepare(self.args), self.kwargs, self.rows)
        if self.order is None or self.start + size > self.rows:
            self.order, self.start = torch.randperm(self.rows, device=self.args[0].device), 0
        index = self.order[self.start : self.start + size]
        self.start += size
        args, kwargs = take(self.args, self.kwargs, index, self.keys)
        if self.indexed:
            return Batch(self.prepare(args), kwargs | {"index": index, "num_data": self.rows}, size)
        return Batch(self.prepare(args), kwargs, size)

    def state_dict(self) -> dict[str, Any]:
        """The order of this epoch and the place in it."""
        return {"order": None if self.order is None else self.order.cpu().clone(), "start": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another instance was."""
        order = state["order"]
        self.order = None if order is None else order.to(self.args[0].device)
        self.start = int(state["start"])


def num_rows(args: tuple[Any, ...]) -> int:
    """The rows of the data, the first argument; 1 where it is no tensor with a first dim."""
    return len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else 1


def take_index(
    programs: tuple[Program, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], index: Tensor, num_data: int
) -> bool:
    """Whether programs, the model first, take `index` and `num_data`, and the model's plate then scales by N/B.

    Args:
        programs: the model, and the guide if there is one.
        args: the arguments of a minibatch.
        kwargs: its keyword arguments.
        index: its rows `[B]`.
        num_data: N.
    """
    if not all(_takes_index(program) for program in programs):
        return False
    try:
        plates = read_structure(programs[0], args, {**kwargs, "index": index, "num_data": num_data}).plates
    except TypeError:
        return False  # `**kwargs` that it hands on to what takes neither
    return any(plate.full_size == num_data and plate.size == len(index) for plate in plates)


def on_device(value: Any, device: torch.device | None) -> Any:
    """Arguments with their tensors on a device; as they are where it is None."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(on_device(item, device) for item in value)
    return {key: on_device(item, device) for key, item in value.items()} if type(value) is dict else value


def check_device(device: str | torch.device | None) -> torch.device | None:
    """A device that this machine has.

    Raises:
        ValueError: if it has no such device.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("tensors on 'meta' hold no numbers")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"expected a device of this machine, got {str(device)!r} ({reason}); use device='cpu'") from None
    return found


def _takes_index(program: Callable[..., Any]) -> bool:
    while not isinstance(program, torch.nn.Module) and hasattr(program, "program"):
        program = program.program  # inside `relax` and the like
    call = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        names = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False
    return {"index", "num_data"} <= set(names) or any(p.kind is p.VAR_KEYWORD for p in names.values())
