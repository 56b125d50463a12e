"""The bound on a mean holds for any non-negative law, at its confidence."""

import math

import pytest
import torch
from scipy import stats

from pyrovae.ops.mean_bound import log_mean_lower_bound

TRIALS, SIZE, CONFIDENCE = 2000, 20, 0.9
LAWS = {  # log weights [SIZE, TRIALS] with E[w] = 1
    "equal": lambda: torch.zeros(SIZE, TRIALS),
    "log-normal": lambda: 2 * torch.randn(SIZE, TRIALS) - 2,
    "rare and large": lambda: torch.where(torch.rand(SIZE, TRIALS) < 0.01, math.log(100), -math.inf),
    "mostly zero": lambda: torch.where(torch.rand(SIZE, TRIALS) < 0.5, math.log(2), -math.inf),
    "bounded": lambda: torch.rand(SIZE, TRIALS).mul(2).log(),
}


def misses(bound):
    return int((bound > 1e-9).sum())


def too_many(count):
    """Whether so many misses refute the stated confidence, at 1e-5."""
    return stats.binom.sf(count - 1, TRIALS, 1 - CONFIDENCE) < 1e-5


@pytest.mark.parametrize("law", LAWS)
def test_it_holds_at_its_confidence(law):
    log_w = LAWS[law]()
    assert not too_many(misses(log_mean_lower_bound(log_w, CONFIDENCE)))
    if law != "equal":  # the estimate itself is no such bound
        assert too_many(misses(torch.logsumexp(log_w, 0) - math.log(SIZE)))


def test_never_below_markov_by_more_than_log_2_and_tight_where_weights_agree():
    log_w = torch.randn(50, 300) * torch.linspace(0, 5, 300)
    mean = torch.logsumexp(log_w, 0) - math.log(50)
    bound = log_mean_lower_bound(log_w, 0.99)
    assert bool((bound >= mean - math.log(100) - math.log(2) - 1e-9).all())
    assert bool((bound <= mean).all())
    assert float(mean[0] - bound[0]) < 0.2
    shifted = log_mean_lower_bound(log_w + 1000, 0.99)
    assert torch.allclose(shifted, bound + 1000)


def test_no_weight_and_bad_confidence():
    assert float(log_mean_lower_bound(torch.full((5,), -math.inf), 0.9)) == -math.inf
    with pytest.raises(ValueError, match="expected a confidence between 0 and 1, got 1"):
        log_mean_lower_bound(torch.zeros(5), 1.0)
