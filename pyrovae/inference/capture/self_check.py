"""Whether a recorded run still is what the programs do: both run from the same random state, and are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import pyro
import torch
from torch import Tensor
from torch.linalg import vector_norm

from pyrovae.inference.capture.journal import Moment
from pyrovae.inference.capture.recording import Outputs, Recording
from pyrovae.inference.capture.sites import SiteRecorder, numerical_difference, structural_change

TOLERANCE = 1e-5  # relative, in norm, of what is not computed by the same operations


def compare(recording: Recording, tensors: Sequence[Tensor], run: Callable[[], Outputs]) -> tuple[Outputs, str | None]:
    """Loss and gradients of this step, and what differs between the programs and the recording, in words, if anything does.

    Where they differ, loss and gradients are those of the programs; the random state and the tensors that a run changes are
    moved on once, by whatever was taken.

    Cost: an eager run beside the replay.

    Args:
        recording: of the run.
        tensors: this step's, among the arguments.
        run: the programs on these arguments.
    """
    state = recording.graph.state
    begin = Moment(state)
    outputs = recording.replay(tensors)
    replayed = Moment(state)
    begin.put()
    with pyro.validation_enabled(is_validate=False), SiteRecorder() as recorder:
        expected = run()
    ran = Moment(state)
    if alike((*outputs, *replayed.contents), (*expected, *ran.contents), exact=recording.exact):
        replayed.put()
        return outputs, None
    if not recording.exact:  # rounding may have carried a draw over a threshold: the graph itself decides
        begin.put()
        plain = recording.graph(tensors)
        if alike(plain, expected, exact=recording.device.type == "cpu"):
            replayed.put()
            return outputs, None
    begin.put()
    then = recording.whole(tensors)[len(outputs) :]
    ran.put()
    change = structural_change(recording.sites, recorder.sites)
    if change is None:
        tolerance = 0.0 if recording.device.type == "cpu" else TOLERANCE
        change = numerical_difference(recording.sites, then, recorder.sites, recorder.tensors, tolerance=tolerance)
    return expected, change or "no site differs, but the loss or a gradient does, by what the objective itself computes"


def alike(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], *, exact: bool) -> bool:
    """Whether tensors are equal: in every bit, or each to 1e-5 of its norm."""
    if len(ours) != len(theirs) or any((a is None) != (b is None) for a, b in zip(ours, theirs, strict=True)):
        return False
    pairs = [(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if any(a.shape != b.shape for a, b in pairs):
        return False
    if exact:
        return all(torch.equal(a, b) or torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs)
    return relative_error(pairs) <= TOLERANCE


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest norm of a difference, relative to the norm of the second; infinite where one alone is not finite."""
    worst = 0.0
    for a, b in pairs:
        distance, size = float(vector_norm(a - b)), float(vector_norm(b))
        if not math.isfinite(distance):
            finite = a.isfinite()
            if not torch.equal(finite, b.isfinite()) or not torch.allclose(a[~finite], b[~finite], equal_nan=True):
                return math.inf
            distance, size = float(vector_norm(a[finite] - b[finite])), float(vector_norm(b[finite]))
        worst = max(worst, distance / size if size else distance)
    return worst
