"""Statistical checks at a false-alarm rate of 1e-5 over all that a check looks at (Bonferroni), never a tuned tolerance."""

import numpy as np
import torch
from scipy import stats

FALSE_ALARM = 1e-5


def bound(count, dof=None):
    """What the largest |z| of `count` true hypotheses exceeds with a probability of at most 1e-5.

    With `dof`, z is a Student t with so many degrees of freedom: a mean over its own measured standard error.
    """
    tail = FALSE_ALARM / 2 / count
    return float(stats.norm.isf(tail) if dof is None else stats.t.isf(tail, dof))


def largest_z(value, expected, stderr):
    """The largest |value − expected| / stderr; inf where they differ and the standard error is 0."""
    difference = (torch.as_tensor(value) - torch.as_tensor(expected)).abs()
    stderr = torch.as_tensor(stderr).expand_as(difference)
    z = torch.where(difference > 1e-12 * (1 + torch.as_tensor(expected).abs()), difference / stderr, 0.0)
    return float(z.nan_to_num(nan=float("inf")).max())


def means_agree(samples, expected, dim=0):
    """Whether the mean of independent `samples` [n, …] is `expected`, by Student's t."""
    samples = torch.as_tensor(samples).movedim(dim, 0)
    n = len(samples)
    stderr = samples.std(0) / n**0.5
    return largest_z(samples.mean(0), expected, stderr) < bound(stderr.numel(), n - 1)


def frequencies_agree(counts, n, p):
    """Whether `counts` of `n` trials fit probabilities `p`, by exact binomial tails (inf for what cannot happen)."""
    k, q = np.asarray(counts), np.asarray(p).clip(0, 1)
    tail = 2 * np.minimum(stats.binom.sf(k - 1, n, q), stats.binom.cdf(k, n, q))
    return float(tail.min()) > FALSE_ALARM / q.size


def chains_agree(draws, expected):
    """Whether the means of chains `[chain, draw, …]`, each its own independent estimate, average to `expected`."""
    return means_agree(draws.to(torch.get_default_dtype()).mean(1), expected)
