"""One recorded run: its graph, what it has read that no tensor holds, and what replays it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor

from pyrovae.inference.capture.arguments import Rebuild
from pyrovae.inference.capture.counters import Counters
from pyrovae.inference.capture.cuda_graph import CudaGraphStep
from pyrovae.inference.capture.graph import Graph, capture
from pyrovae.inference.capture.quiet import CannotCapture
from pyrovae.inference.capture.sites import Site, SiteRecorder, structural_change
from pyrovae.inference.capture.watch import Watch

Outputs: TypeAlias = tuple[Tensor | None, ...]
Run: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any]], Outputs]


@dataclass(eq=False)
class Recording:
    """A run of the programs on arguments of one kind.

    Attributes:
        graph: loss and gradients.
        whole: the same with what every site was, for the account of a difference.
        sites: the sites, in the order in which they ran.
        watch: what the run has read of modules and of Pyro's store.
        device: where it runs.
        replay: gives loss and gradients: the graph, or its compiled form.
        step: also moves the parameters, as one CUDA graph; None elsewhere.
        version: of the optimizer in `step`.
        exact: whether `replay` gives the bits of the eager programs.
        count: steps taken.
        next_check: at which step of all recordings it is to be compared with the programs.
    """

    graph: Graph
    whole: Graph
    sites: tuple[Site, ...]
    watch: Watch
    device: torch.device
    replay: Callable[[Sequence[Tensor]], Outputs] = field(init=False)
    step: CudaGraphStep | None = None
    version: int = 0
    exact: bool = field(init=False)
    count: int = 0
    next_check: int = 0

    def __post_init__(self) -> None:
        self.replay, self.exact = self.graph, self.device.type == "cpu"

    def change(self) -> str | None:
        """What is bound otherwise than in the recorded run, in words; None if nothing."""
        change = self.watch.change()
        if change is None and any(tensor._version != version for tensor, version in self.graph.read):
            return "a tensor that the programs read as a Python number has been changed"
        return change


def record(run: Run, tensors: Sequence[Tensor], rebuild: Rebuild, programs: Sequence[Any], before: Sequence[Site]) -> Recording:
    """Record a run; nothing moves.

    Args:
        run: gives loss and gradients.
        tensors: those among its arguments.
        rebuild: makes the arguments of tensors.
        programs: model and guide.
        before: the sites of an eager run on such arguments, which must be the same.

    Raises:
        CannotCapture: if the run cannot be recorded, has other sites than before, or rebinds what it reads.
    """
    sites: tuple[Site, ...] = ()
    num_outputs = 0

    def function(*inputs: Tensor) -> Outputs:
        nonlocal sites, num_outputs
        args, kwargs = rebuild(inputs)
        with SiteRecorder() as recorder:
            outputs = run(args, kwargs)
        sites, num_outputs = tuple(recorder.sites), len(outputs)
        return (*outputs, *recorder.tensors)

    if any(tensor.requires_grad for tensor in tensors):
        raise CannotCapture(
            "expected arguments without requires_grad, got one whose gradient a replay would not give; compute it inside of "
            "the programs, or detach it"
        )
    counters = Counters(programs)
    with untouched(programs) as watch:
        try:
            whole = capture(function, tensors)
            change = counters.change()
        finally:
            counters.restore()
    if change is not None:
        raise CannotCapture(
            f"expected programs that keep no count, got a run that changes {change}; a replay would not: keep it in a 0-d "
            "tensor that add_ changes, or run it eagerly"
        )
    if (rebound := watch.rebound or watch.rebound_among(whole.constants)) is not None:
        raise CannotCapture(
            f"expected programs that change tensors in place, got a run that has replaced one: {rebound}; write the new "
            "values with copy_, or run it eagerly"
        )
    if (change := structural_change(before, sites)) is not None:
        raise CannotCapture(
            f"expected the same sites at every run, got others at the second: {change}; keep the program's structure fixed, or "
            "run it eagerly"
        )
    everything = (*tensors, *whole.constants)
    device = next((x.device for x in everything if x.device.type != "cpu"), torch.device("cpu"))
    return Recording(whole.first(num_outputs), whole, sites, watch, device)


@contextmanager
def untouched(programs: Sequence[Any]) -> Iterator[Watch]:
    """A block after which modules are bound, and Pyro's store is filled, as before it, also where it fails."""
    store = pyro.get_param_store()
    parts = (store._params, store._constraints, store._param_to_name)
    before: list[dict[Any, Any]] = [dict(part) for part in parts]
    watch: Watch | None = None
    try:
        with Watch.during(*programs) as watch:
            yield watch
    finally:
        if watch is not None:
            watch.restore()
        for part, contents in zip(parts, before, strict=True):
            if part.keys() != contents.keys() or any(part[key] is not value for key, value in contents.items()):
                part.clear()
                part.update(contents)
