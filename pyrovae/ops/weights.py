"""Importance weights, kept as logarithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """Log of the mean of exp(log_w) over `dim`; −inf where every weight is zero."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def effective_sample_size(log_w: Tensor, dim: int = 0) -> Tensor:
    """Kish's effective sample size (Σw)² / Σw², between 1 and the number of weights.

    Args:
        log_w: log weights, up to a constant; any shape.
        dim: the dim of the particles.

    Returns:
        The shape of `log_w` without `dim`.

    References:
        Survey Sampling (Kish, 1965)
        https://en.wikipedia.org/wiki/Effective_sample_size
    """
    return torch.exp(2 * torch.logsumexp(log_w, dim) - torch.logsumexp(2 * log_w, dim))
