"""Whether the steps of a run are captured, where the user has not said so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyrovae.handlers.declared import declares_capturable
from pyrovae.inference.capture.replay import Backend
from pyrovae.inference.posterior import Program

MIN_STEPS = 500  # recording takes some 0.3 s, and saves some 0.6 ms a step


def chosen(capture: Backend | None, programs: Sequence[Program], elbo: Any, num_steps: int) -> Backend:
    """The backend of a run: what was asked for; else "auto" for programs and objectives that are known to allow it.

    It depends on nothing but the arguments, so that a run can be repeated bit for bit.

    Args:
        capture: what the user asked for.
        programs: the model, and the guide if there is one.
        elbo: the objective.
        num_steps: of the whole run; short ones are not worth recording.
    """
    if capture is None:
        known = type(elbo).__module__.startswith(("pyro.", "pyrovae.")) and all(map(declares_capturable, programs))
        capture = "auto" if known else "off"
    return "off" if capture == "auto" and num_steps < MIN_STEPS else capture
