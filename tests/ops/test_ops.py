"""State numbers, weights and isolated random states."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from pyrovae.ops import codes_to_index, effective_sample_size, index_to_codes, isolated_rng, log_mean_exp


@pytest.mark.parametrize(("cardinality", "components"), [(2, 1), (2, 5), (3, 3), (5, 2), (1, 4)])
def test_states_are_numbered_as_itertools_does(cardinality, components):
    index = torch.arange(cardinality**components)
    codes = index_to_codes(index, cardinality, components)
    assert [tuple(c) for c in codes.tolist()] == list(itertools.product(range(cardinality), repeat=components))
    assert torch.equal(codes_to_index(codes, cardinality), index)
    if cardinality > 1 and components > 1:
        assert not torch.equal(codes_to_index(codes.flip(-1), cardinality), index)


def test_more_states_than_can_be_numbered():
    with pytest.raises(ValueError, match=r"expected fewer than 2\^62 states, got 3\^40"):
        index_to_codes(torch.tensor(0), 3, 40)
    with pytest.raises(ValueError, match=r"expected fewer than 2\^62 states, got 2\^63"):
        codes_to_index(torch.zeros(63), 2)
    assert index_to_codes(torch.tensor(2**61), 2, 62)[0] == 1


def test_log_mean_exp():
    log_w = torch.randn(7, 3) * 500
    expected = [
        math.log(sum(math.exp(float(v) - m) for v in column) / 7) + m for column in log_w.T for m in [float(column.max())]
    ]
    torch.testing.assert_close(log_mean_exp(log_w), torch.tensor(expected))
    assert log_mean_exp(torch.full((4,), -math.inf)) == -math.inf


def test_effective_sample_size():
    torch.testing.assert_close(effective_sample_size(torch.full((8,), 800.0)), torch.tensor(8.0))
    torch.testing.assert_close(effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf])), torch.tensor(1.0))
    w = torch.rand(9)
    torch.testing.assert_close(effective_sample_size(w.log() - 1000), w.sum() ** 2 / (w**2).sum())


def _draws():
    return torch.rand(()).item(), random.random(), np.random.rand()


@pytest.mark.parametrize("seed", [None, 3])
def test_isolated_rng_leaves_the_callers_generators(seed):
    with isolated_rng():
        expected = _draws()
    with isolated_rng(seed):
        inside = _draws()
    assert _draws() == expected
    assert (inside == expected) is (seed is None)
    with pytest.raises(KeyError), isolated_rng(seed):
        raise KeyError
    with isolated_rng(3), isolated_rng(3):
        again = _draws()
    assert (again == inside) is (seed == 3)
