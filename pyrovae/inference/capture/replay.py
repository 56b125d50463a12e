"""Steps by replay: a graph for every kind of arguments, the backend that runs it, and the check against the eager programs.

A kind is the structure, shapes and plain values of the arguments, the state of the process, and what the programs' modules
are bound to. What it cannot show, such as a Python float that a program closes over, is found by running the programs beside
the graph now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from pyrovae.inference.capture.arguments import Rebuild, describe_change, flatten, process_flags
from pyrovae.inference.capture.counters import Counters
from pyrovae.inference.capture.cuda_graph import CudaGraphStep
from pyrovae.inference.capture.inductor import CannotCompile, compile_graph, find_compiler, steps_to_pay
from pyrovae.inference.capture.journal import Moment, undone
from pyrovae.inference.capture.quiet import CannotCapture, warn
from pyrovae.inference.capture.recording import Outputs, Recording, Run, record, untouched
from pyrovae.inference.capture.self_check import alike, compare
from pyrovae.inference.capture.sites import Site, SiteRecorder
from pyrovae.inference.capture.watch import Watch
from pyrovae.ops import isolated_rng

Backend: TypeAlias = Literal["auto", "off", "fx", "inductor", "cudagraph"]

MAX_GRAPHS = 8
FIRST_CHECKS = (1, 10)  # replays of a recording
CHECK_EVERY = {"cpu": 200, "cuda": 1000}  # steps, about; a replay on a GPU is that much faster than the programs
JITTER = (-3, 11, -7, -1)  # so that nothing periodic is always missed


class Recordable(Protocol):
    """An optimizer whose step may be recorded in a CUDA graph, as `pyrovae.inference.capture.optimizer.OneOptimizer`."""

    @property
    def capturable(self) -> bool:
        """Whether it may."""
        ...

    @property
    def version(self) -> int:
        """Another number where a recorded graph no longer does the right step."""
        ...

    def make_capturable(self) -> None:
        """Let it."""
        ...

    def prepare(self) -> bool:
        """Take over what has changed outside; False where a step is due that is in no graph."""
        ...


class Replay:
    """Takes steps of an optimisation, by replay where it can.

    Args:
        run: loss and gradients, `(loss, …)`, of positional and keyword arguments.
        apply: moves the parameters by what `run` gives.
        programs: model and guide.
        backend: see :class:`pyrovae.inference.CapturedSVI`.
        num_steps: of the whole optimisation, where it is known.
        dry: run the programs once beside, and undo it, before the first step; else the first step of every kind is eager.
        optimizer: gives what `apply` steps, if that may be part of a CUDA graph.
        learns: whether the programs are being trained, so that evaluation mode is worth a warning.
        tell: called with what takes time, such as "compiling".

    Raises:
        ValueError: for an unknown backend.
    """

    def __init__(
        self,
        run: Run,
        apply: Callable[[Outputs], None],
        programs: Sequence[Any],
        *,
        backend: Backend = "auto",
        num_steps: int | None = None,
        dry: bool = False,
        learns: bool = True,
        optimizer: Callable[[], Recordable | None] = lambda: None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        check_backend(backend)
        self.run, self.apply, self.programs, self.backend = run, apply, programs, backend
        self.num_steps, self.dry, self.optimizer, self.tell = num_steps, dry, optimizer, tell
        self.eager, self._why = backend == "off", ""  # for good
        self.learns = learns
        self.steps = 0  # by replay
        self._recordings: dict[tuple[Hashable, Hashable], Recording] = {}
        self._met: dict[tuple[Hashable, Hashable], tuple[Site, ...]] = {}  # kinds that have run eagerly
        self._num_recorded, self._num_checks = 0, 0
        self._change = "arguments are of ever other kinds"  # why the last recording was made anew
        self._told: set[str] = set()

    def step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """One step; its loss, 0-d, which is not waited for.

        Raises:
            CannotCapture: if the programs cannot be captured, and a backend was asked for.
            CannotCompile: likewise, if the graph cannot be compiled.
            ValueError: for tensors on several devices, or a CUDA graph on the CPU.
        """
        if self.eager:
            return self._applied(self.run(args, kwargs))
        tensors, rebuild, signature = flatten(args, dict(kwargs))
        kind = (signature, process_flags())
        recording = self._recordings.get(kind)
        if recording is not None and (change := recording.change()) is not None:
            self._change = change
            del self._recordings[kind], self._met[kind]
            recording = None
        if recording is None:
            if not self.dry and kind not in self._met:
                return self._applied(self._meet(kind, tensors, args, kwargs))
            recording = self._record(kind, tensors, rebuild, args, kwargs)
            if recording is None:
                return self._applied(self.run(args, kwargs))
        return self._replayed(recording, tensors, args, kwargs)

    def __str__(self) -> str:
        """Backend, graphs, and why steps are eager, if they are."""
        if self.eager:
            return f"backend={self.backend!r}" + (f", eager: {self._why}" if self._why else "")
        compiled = sum(recording.replay is not recording.graph for recording in self._recordings.values())
        return f"backend={self.backend!r}, {len(self._recordings)} graphs, {compiled} compiled, {self.steps} steps replayed"

    def forget(self) -> None:
        """Let the next step of every kind be the first again."""
        self._recordings.clear()
        self._met.clear()

    def _applied(self, outputs: Outputs) -> Tensor:
        self.apply(outputs)
        loss = outputs[0]
        assert loss is not None
        return loss

    def _replayed(
        self, recording: Recording, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        self.steps += 1
        recording.count += 1
        if self._pays(recording):
            self._compile(recording, tensors)
            recording.step = None
        if recording.count in FIRST_CHECKS or self.steps >= recording.next_check:
            return self._applied(self._compared(recording, tensors, args, kwargs))
        optimizer = self.optimizer() if self._may_be_cuda_graph(recording) else None
        if optimizer is not None and optimizer.capturable:
            optimizer.make_capturable()
            if optimizer.prepare():
                return self._by_cuda_graph(recording, optimizer, tensors)
        return self._applied(recording.replay(tensors))

    def _compared(
        self, recording: Recording, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Outputs:
        """Loss and gradients, after a comparison with the programs; where they differ, those of the programs."""
        interval = CHECK_EVERY.get(recording.device.type, 200) + JITTER[self._num_checks % len(JITTER)]
        self._num_checks += 1
        recording.next_check = self.steps + interval
        begin = Moment(recording.graph.state)
        try:
            outputs, difference = compare(recording, tensors, lambda: self.run(args, kwargs))
        except RuntimeError as error:
            begin.put()
            outputs = self.run(args, kwargs)  # raises what the programs raise themselves
            difference = f"the graph fails ({(str(error).splitlines() or [type(error).__name__])[0]})"
        if difference is None:
            return outputs
        if recording.count > 1:
            self._give_up(
                f"the captured graph and the programs differ at its replay {recording.count}: {difference}. The steps since "
                "the last comparison used what was captured. A program probably reads a Python number that has changed, "
                "or a tensor that was replaced: make the number a 0-d tensor that is changed in place, "
                "number.fill_(value), and tensors arguments"
            )
            return outputs
        why = (
            f"the programs cannot be captured: the first replay differs from them: {difference}. They do what a graph of "
            "tensor operations cannot repeat, such as draws that are not of torch's own generator, a number that changes "
            "from run to run, or autocast around several steps"
        )
        if self.backend != "auto":
            begin.put()
            raise CannotCapture(why)
        self._give_up(why)
        return outputs

    def _eagerly(self, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outputs:
        """A run under Pyro's validation; the first of its kind."""
        try:
            return self.run(args, kwargs)
        except RuntimeError as error:
            with Watch.during(*self.programs) as watch:
                pass
            used = {x.device for x in tensors}
            others = watch.devices - used
            if not used or not others or used & watch.devices:
                raise
            raise ValueError(
                f"expected data and parameters on one device, got data on {_names(used)} and parameters or buffers on "
                f"{_names(others)}; move the modules, or the data, with .to(device)"
            ) from error

    def _meet(
        self, kind: tuple[Hashable, Hashable], tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Outputs:
        """An eager step, after which arguments of this kind are recorded when they come again."""
        if len(self._met) >= MAX_GRAPHS:
            change = describe_change(next(reversed(self._met)), kind)
            self._warn(
                "kinds",
                f"arguments of more than {MAX_GRAPHS} kinds have come; those of further kinds run eagerly. The last change: "
                f"{change}; pass numbers that change as 0-d tensors, arrays as tensors, and minibatches of one size",
            )
            return self.run(args, kwargs)
        with SiteRecorder() as recorder:
            outputs = self._eagerly(tensors, args, kwargs)
        self._met[kind] = tuple(recorder.sites)
        return outputs

    def _record(
        self,
        kind: tuple[Hashable, Hashable],
        tensors: Sequence[Tensor],
        rebuild: Rebuild,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Recording | None:
        """Record arguments of a kind; None where the programs run eagerly instead."""
        if self.dry and kind not in self._met:
            counters = Counters(self.programs)
            with untouched(self.programs), undone(), isolated_rng(0), SiteRecorder() as recorder:
                self._eagerly(tensors, args, kwargs)  # with other draws than the recorded run, so that what it leaves shows
            counters.restore()
            self._met[kind] = tuple(recorder.sites)
        if self._num_recorded == 2 * MAX_GRAPHS:
            self._give_up(f"the programs have been captured {2 * MAX_GRAPHS} times, the last time because {self._change}")
            return None
        try:
            recording = record(self.run, tensors, rebuild, self.programs, self._met[kind])
            self._check_device(recording)
        except CannotCapture as error:
            if self.backend != "auto":
                raise
            self._give_up(f"the programs cannot be captured: {error}")
            return None
        self._num_recorded += 1
        if recording.watch.evaluating and self.learns:
            self._warn(
                "evaluation",
                f"captured in evaluation mode: {', '.join(recording.watch.evaluating[:3])}; dropout is off and BatchNorm's "
                "statistics stay; call .train() to learn",
            )
        self._recordings[kind] = recording
        return recording

    def _check_device(self, recording: Recording) -> None:
        if self.backend == "cudagraph" and recording.device.type != "cuda":
            raise ValueError(f"expected data and parameters on CUDA for a CUDA graph, got {recording.device}; take 'auto'")
        optimizer = self.optimizer()
        if self.backend == "cudagraph" and not (optimizer is not None and optimizer.capturable):
            raise ValueError("expected an optimizer that torch can record in a CUDA graph, got another; take Adam, or 'auto'")
        if self.backend == "cudagraph" and recording.graph.opaque:
            raise ValueError("expected tensor operations alone in a CUDA graph, got sums by Python code; take 'auto'")

    def _pays(self, recording: Recording) -> bool:
        """Whether to compile now; it depends on counts alone, so that a run can be repeated bit for bit."""
        if self._num_recorded > MAX_GRAPHS:
            return False  # the programs change too often
        if self.backend in ("inductor", "cudagraph"):
            return recording.count == 1
        if self.backend != "auto" or find_compiler() is None:
            return False
        price = steps_to_pay(recording.graph) if recording.count == 1 or self.num_steps is None else 0
        if self.num_steps is not None:
            return recording.count == 1 and self.num_steps > price
        return recording.count == price

    def _compile(self, recording: Recording, tensors: Sequence[Tensor]) -> None:
        self.tell("compiling")
        start = time.perf_counter()
        try:
            compiled = compile_graph(recording.graph, tensors)
        except CannotCompile as error:
            if self.backend != "auto":
                raise
            self._warn("compiler", f"the captured graph is not compiled, and replayed as it is: {error}")
            return
        finally:
            self.tell(f"compiled in {time.perf_counter() - start:.1f} s")
        begin = Moment(recording.graph.state)
        for seed in range(3):  # rounding may carry a draw over a threshold, which is no error
            outputs = []
            for replay in (compiled, recording.graph):
                with isolated_rng(seed):
                    outputs.append(replay(tensors))
                begin.put()
            if alike(*outputs, exact=False):
                recording.replay, recording.exact = compiled, False
                return
        self._warn(
            "compiled",
            "the compiled graph does not give the gradients of the captured one to 1e-5, and is not used: an error of "
            "torch's compiler, or a program that magnifies rounding",
        )

    def _may_be_cuda_graph(self, recording: Recording) -> bool:
        return recording.device.type == "cuda" and self.backend in ("auto", "cudagraph") and not recording.graph.opaque

    def _by_cuda_graph(self, recording: Recording, optimizer: Recordable, tensors: Sequence[Tensor]) -> Tensor:
        """A step, optimizer included, in one CUDA graph, recorded anew where the optimizer is no longer what it was."""
        if recording.step is None or recording.version != optimizer.version:
            read = recording.graph.constants
            recording.step = CudaGraphStep(recording.replay, self.apply, tensors, state=read, prepare=optimizer.prepare)
            recording.version = optimizer.version
        return recording.step(tensors)

    def _give_up(self, why: str) -> None:
        self._recordings.clear()
        self.eager, self._why = True, why
        self._warn("eager", f"{why}. From here on the programs run eagerly")

    def _warn(self, what: str, text: str) -> None:
        """Say one thing once."""
        if what not in self._told:
            self._told.add(what)
            warn(text)


def check_backend(backend: Any) -> None:
    """Refuse a word that names no backend.

    Raises:
        ValueError: with those that there are.
    """
    if backend not in get_args(Backend):
        where = "; the device is that of data and parameters" if str(backend).startswith(("cuda", "cpu", "gpu")) else ""
        raise ValueError(f"expected a backend among {', '.join(map(repr, get_args(Backend)))}, got {backend!r}{where}")


def _names(devices: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, devices)))
