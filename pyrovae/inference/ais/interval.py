"""An interval for the log of a mean of positive weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrovae.ops import log_mean_exp
from pyrovae.ops.mean_bound import log_mean_lower_bound


def normal_interval(log_w: Tensor, sigmas: float) -> tuple[Tensor, Tensor]:
    """log(w̄ ± t σ̂ / √M), computed around the largest weight, with both ends made safe for skewed weights.

    t is the quantile of Student's law with M − 1 degrees of freedom at the confidence of `sigmas` of a normal: 3.08 for 3 with
    100 weights.

    Weights of annealed importance sampling are skewed to the right: most samples miss the largest weights, and then mean and
    deviation are both too small, so that the plain interval ends too low. The upper end is therefore the larger of the
    one above and of Cox's, which takes the log weights for normal: m + s²/2 + t (s²/M + s⁴/(2(M − 1)))^½ with m, s² their mean
    and variance. The lower end, −inf where t σ̂ / √M ≥ w̄, is there a bound by Markov's inequality at the same one-sided
    confidence, which any weights keep (:func:`pyrovae.ops.mean_bound.log_mean_lower_bound`).

    Args:
        log_w: independent log weights `[M, *batch]`.
        sigmas: half the width, in standard errors of a normal law.

    Returns:
        Lower and upper end `[*batch]`; −inf where all weights are 0.

    References:
        Confidence intervals for the log-normal mean (Zhou and Gao, 1997)
        https://doi.org/10.1002/(SICI)1097-0258(19970415)16:7%3C783::AID-SIM488%3E3.0.CO;2-2
    """
    from scipy.stats import t as student  # type: ignore[import-untyped]

    count, top = len(log_w), log_w.amax(0)
    tail = math.erfc(sigmas / math.sqrt(2)) / 2
    t = float(student.isf(tail, count - 1))
    none = top.isneginf()
    w = torch.exp(log_w - torch.where(none, 0.0, top))
    mean, error = w.mean(0), t * w.std(0) / math.sqrt(count)
    lower = torch.where(error < mean, top + (mean - error).clamp_min(torch.finfo(w.dtype).tiny).log(), -math.inf)
    unknown = lower.isneginf()
    if bool(unknown.any()):
        lower[unknown] = log_mean_lower_bound(log_w[:, unknown], 1 - tail)
    upper = torch.where(none, -math.inf, top + (mean + error).log())
    m, s2 = log_w.mean(0), log_w.var(0)
    cox = m + s2 / 2 + t * (s2 / count + s2**2 / (2 * (count - 1))).sqrt()
    upper = torch.where(torch.isfinite(cox), torch.maximum(upper, cox), upper)
    return lower, torch.maximum(upper, torch.where(none, upper, log_mean_exp(log_w)))
