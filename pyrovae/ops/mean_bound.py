"""A lower confidence bound on the mean of non-negative numbers that assumes nothing else of their law."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_lower_bound(log_w: Tensor, confidence: float) -> Tensor:
    """L with P(log E[w] < L) ≤ 1 − confidence, whatever the law of independent weights w ≥ 0 is.

    If E[w] = Z, then (1/M) Σ_m w_m / Z and Π_m (1 − λ + λ w_m / Z), for any λ in [0, 1], are non-negative with mean 1, and so
    is any mixture K(Z) of them; by Markov, K(Z) exceeds 1 / (1 − confidence) with probability at most 1 − confidence. L is
    the log Z at which it is reached. Half of the mixture is the first term, so that L is never below Markov's own bound
    log (1/M) Σ_m w_m − log(1 / (1 − confidence)) by more than log 2; the other half is spread over λ, and for weights that
    agree L comes within about 10 / M of the log of their mean.

    Args:
        log_w: independent log weights `[M, *batch]`.
        confidence: between 0 and 1.

    Returns:
        L `[*batch]`; −inf where all weights are 0.

    Raises:
        ValueError: for a confidence outside (0, 1).

    Example:
        >>> round(float(log_mean_lower_bound(torch.zeros(1000), 0.99)), 3)
        -0.007

    References:
        Estimating means of bounded random variables by betting (Waudby-Smith and Ramdas, 2024)
        https://arxiv.org/abs/2010.09686
    """
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence}")
    log_w = log_w.double()
    needed = -math.log1p(-confidence)
    top = log_w.amax(0)
    none = top.isneginf()
    scaled = log_w - torch.where(none, 0.0, top)  # at most 0
    mean = torch.logsumexp(scaled, 0) - math.log(len(log_w))
    low, high = torch.where(none, -1.0, mean - needed - 1), torch.zeros_like(mean)  # K(low) > 1/(1 − confidence) ≥ K(high)
    for _ in range(60):
        middle = (low + high) / 2
        enough = _log_capital(scaled, mean, middle) >= needed
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(none, -math.inf, top + low)


def _log_capital(scaled: Tensor, mean: Tensor, log_z: Tensor) -> Tensor:
    """Log K at e^{log_z}, `[*batch]`; decreasing."""
    ratio = scaled - log_z  # [M, *batch]
    bets = [torch.logaddexp(ratio + math.log(s), torch.full_like(ratio, math.log1p(-s))).sum(0) for s in _SHARES]
    product = torch.logsumexp(torch.stack([ratio.sum(0), *bets]), 0) - math.log(len(_SHARES) + 1)
    return torch.logaddexp(mean - log_z, product) - math.log(2)


_SHARES = [2.0**-k for k in range(1, 11)] + [1 - 2.0**-k for k in range(2, 8)]
