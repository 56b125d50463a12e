"""Whether tensor code is being recorded as a graph to be replayed, and what then stays out of the record.

:mod:`pyrovae.inference.capture` records a run by `make_fx`: real tensors flow, and the operations on them are written down.
What a run checks of its values it has checked in the eager run before, so that a recorded one leaves the check out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pyrovae.ops.rng import isolated_rng


def capturing() -> bool:
    """Whether operations are being recorded; False within :func:`unrecorded`, and in every ordinary run."""
    recorder = sys.modules.get("torch.fx.experimental.proxy_tensor")  # slow to import; nobody records without it
    return recorder is not None and recorder.get_proxy_mode() is not None


@contextmanager
def unrecorded() -> Iterator[None]:
    """A block that is run and not recorded, so that it may read values; its draws do not advance the caller's random state.

    For what a run finds out of a program's form: a tensor made in the block has the same contents at every replay. Where
    nothing is being recorded, the block is like any other.
    """
    if not capturing():
        yield
        return
    with torch._C.DisableTorchFunction(), _disable_current_modes(), isolated_rng():
        yield
