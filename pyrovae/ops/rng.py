"""Randomness that leaves the caller's generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Run a block whose draws do not advance the caller's torch, NumPy and Python generators.

    Args:
        seed: seeds the three generators inside the block; None continues from the caller's state.
    """
    on_cuda = torch.cuda.is_initialized()
    cpu, cuda = torch.default_generator.get_state(), torch.cuda.get_rng_state_all() if on_cuda else []
    python, legacy_numpy = random.getstate(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    numpy = legacy_numpy.state
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if on_cuda:
                torch.cuda.manual_seed_all(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
        yield
    finally:
        torch.default_generator.set_state(cpu)
        if on_cuda:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        legacy_numpy.state = numpy
