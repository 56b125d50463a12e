"""log Z by annealed importance sampling as `rbms` 0.5.0 computes it."""

from __future__ import annotations

import warnings

from torch import Tensor


def log_partition(W: Tensor, b: Tensor, c: Tensor, num_chains: int, num_temperatures: int) -> float:
    """Its estimate of log Z; linear β from the visible biases.

    Args:
        W: weights `[D, H]`.
        b: visible biases `[D]`.
        c: hidden biases `[H]`.
        num_chains: chains.
        num_temperatures: values of β, 0 and 1 included.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from rbms.bernoulli_bernoulli.classes import BBRBM
            from rbms.partition_function.ais import compute_partition_function_ais
        except ImportError as error:
            raise SystemExit("expected rbms 0.5.0 for this comparison; pip install rbms==0.5.0") from error
    return float(compute_partition_function_ais(num_chains, num_temperatures, BBRBM(W, b, c)))
