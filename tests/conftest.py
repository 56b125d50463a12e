"""Float64, an empty parameter store, and a guard on process-wide state."""

import logging
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # brute_force and programs, shared by the tests of several parts
torch.set_num_threads(1)  # tensors here are tiny, and threads that wait for one another take three times as long


def _global_state():
    return {
        "torch default dtype": torch.get_default_dtype(),
        "torch threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "validation of torch distributions": torch.distributions.Distribution._Distribution__validate_args
        if hasattr(torch.distributions.Distribution, "_Distribution__validate_args")
        else torch.distributions.Distribution._validate_args,
        "pyro validation": pyro.infer.util._VALIDATION_ENABLED if hasattr(pyro.infer.util, "_VALIDATION_ENABLED") else None,
        "pyro settings": dict(pyro.settings.get()),
        "pyro stack": tuple(pyro.poutine.runtime._PYRO_STACK),
        "logging handlers": tuple(logging.getLogger().handlers),
    }


@pytest.fixture(autouse=True)
def _isolated():
    """Each test starts from float64, seed 0 and an empty store, and must leave process-wide state as it was."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = _global_state()
    with warnings.catch_warnings():
        yield
    after = _global_state()
    torch.set_default_dtype(default)
    pyro.clear_param_store()
    assert before == after, {k: (before[k], after[k]) for k in before if before[k] != after[k]}
