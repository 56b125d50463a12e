"""A whole training step (loss, gradients, clipping, optimizer) as one CUDA graph: one launch in place of hundreds.

The first steps are ordinary ones, on a stream of their own, as `CUDA semantics`_ asks: libraries and the optimizer make what
they need then. The next one is recorded, which runs nothing, and replayed from there on. So the parameters go the way of a loop
without graphs, and nothing has to be put back. Draws are fresh in every replay: torch advances its generator by what a replay
takes.

.. _CUDA semantics: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrovae.inference.capture.quiet import warn

WARM_UP = 3  # ordinary steps before the recorded one, torch's own number


class Recorder(Protocol):
    """What runs, records and replays a step."""

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Run the step as the recorded one will run."""

    def record(self, step: Callable[[], Tensor]) -> Tensor:
        """Record the step without running it; the tensor that every replay writes its result in.

        Raises:
            RuntimeError: if the step does what a graph cannot hold; then nothing has moved.
        """

    def replay(self) -> None:
        """Run what was recorded."""


class CudaGraphStep:
    """A training step on one GPU, recorded after a few calls and replayed from then on.

    Parameters, state and the optimizer's tensors are read and written where they are; any that is replaced by another tensor
    is replaced in vain. Python code of a step runs while it is recorded alone. Where a step cannot be recorded, as with a
    tensor on the CPU, whose value would be fixed, a warning says why, and steps stay ordinary.

    Cost: memory of one step, which the graph keeps, and a copy of the inputs at every step.

    Args:
        run: gives loss and gradients; a captured graph or its compiled form.
        apply: clips gradients and moves the parameters, by an optimizer with `capturable=True`.
        inputs: example inputs.
        state: the other tensors that `run` reads or changes.
        prepare: called before every step, outside of the graph; it fills what changes from step to step, such as learning
            rates, into the tensors that `apply` reads.
        recorder: None takes :class:`CudaRecorder`.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], tuple[Tensor | None, ...]],
        apply: Callable[[tuple[Tensor | None, ...]], None],
        inputs: Sequence[Tensor],
        *,
        state: Sequence[Tensor],
        prepare: Callable[[], Any],
        recorder: Recorder | None = None,
    ) -> None:
        self.run, self.apply, self.prepare = run, apply, prepare
        self._inputs = [tensor.detach().clone() for tensor in inputs]
        self._written: set[int] = set()  # places of inputs that a step changes in place
        self._recorder = _recorder((*inputs, *state)) if recorder is None else recorder
        self._count = 0
        self._loss: Tensor | None = None  # of the last replay

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """One step; its loss, 0-d, without waiting for the GPU.

        Args:
            inputs: of the examples' shapes and dtypes.
        """
        self.prepare()
        with torch.no_grad():
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given, non_blocking=True)
            loss = self._stepped()
            for place in self._written:
                inputs[place].copy_(self._inputs[place], non_blocking=True)
        return loss

    def _stepped(self) -> Tensor:
        if self._recorder is None:
            return self._step()
        self._count += 1
        if self._count == WARM_UP + 1:
            self._record(self._recorder)
        if self._loss is None:
            return self._recorder.warm_up(self._step)
        self._recorder.replay()
        return self._loss.clone()

    @property
    def recorded(self) -> bool:
        """Whether steps are replays."""
        return self._loss is not None

    def _step(self) -> Tensor:
        versions = [tensor._version for tensor in self._inputs]
        outputs = self.run(self._inputs)
        self._written.update(k for k, tensor in enumerate(self._inputs) if tensor._version != versions[k])
        self.apply(outputs)
        loss = outputs[0]
        assert loss is not None
        return loss

    def _record(self, recorder: Recorder) -> None:
        try:
            self._loss = recorder.record(self._step)
        except RuntimeError as error:
            _refuse((str(error).splitlines() or [type(error).__name__])[0])


class CudaRecorder:
    """Records on a stream of its own, which is the one of the warm-up too, so that libraries find their workspaces.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Run the step on the stream; what follows waits for it."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = step()
        current.wait_stream(self.stream)
        return loss.clone()

    def record(self, step: Callable[[], Tensor]) -> Tensor:
        """Record the step; other threads may use the GPU meanwhile."""
        before = torch.cuda.get_rng_state(self.device)
        try:
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                return step()
        except RuntimeError:
            torch.cuda.set_rng_state(before, self.device)
            raise

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self.graph.replay()


def _recorder(tensors: Sequence[Tensor]) -> Recorder | None:
    """A recorder for the GPU that all tensors are on; None, after a warning, where they are on no such one."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) == 1 and {device.type for device in devices} == {"cuda"}:
        return CudaRecorder(devices.pop())
    _refuse(f"tensors on {' and '.join(sorted(map(str, devices))) or 'no device'}")
    return None


def _refuse(found: str) -> None:
    warn(
        f"expected a step that a CUDA graph can hold, got {found}; steps stay ordinary. Move data, parameters and 0-d "
        "schedules to one GPU, or take backend='inductor', which records no CUDA graph"
    )
