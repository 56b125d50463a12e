"""The exact log Z of an RBM as `rbms` 0.5.0 computes it: all codes of the hidden layer at once."""

from __future__ import annotations

import warnings

from torch import Tensor


def log_partition(W: Tensor, b: Tensor, c: Tensor) -> float:
    """Its log Z, the making of the codes included.

    Args:
        W: weights `[D, H]`.
        b: visible biases `[D]`.
        c: hidden biases `[H]`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rbms.bernoulli_bernoulli.classes import BBRBM
        from rbms.partition_function.exact import compute_partition_function
        from rbms.utils import get_categorical_configurations
    return compute_partition_function(BBRBM(W, b, c), get_categorical_configurations(2, len(c), dtype=W.dtype))
