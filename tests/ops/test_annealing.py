"""Weights of annealed chains against sums over all states."""

import itertools
import math

import pytest
import torch
from stats import means_agree

from pyrovae.ops import boltzmann_log_partition, rbm_log_partition, sample_boltzmann, sample_rbm
from pyrovae.ops.annealing import BoltzmannPath, RbmPath, _RbmChains, _softplus_gain

BETAS = [0.0, 0.3, 0.7, 1.0]
CHAINS = 20_000


def rbm(seed=0, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) * scale for shape in ((4, 3), (4,), (3,))]


def couplings(sizes=5, dense=True):
    g = torch.Generator().manual_seed(1)
    j = torch.randn(sizes, sizes, generator=g).triu(1)
    if not dense:
        j[:2, :2] = 0
        j[2:, 2:] = 0
    return j + j.T, torch.randn(2, sizes, generator=g)


@pytest.mark.parametrize("base", ["own", "uniform", "other"])
def test_weights_of_an_rbm_have_the_mean_z_ratio(base):
    w, b, c = rbm()
    path = RbmPath(w, b, c, {"own": b, "uniform": torch.zeros(4), "other": torch.tensor([1.0, -1.0, 0.5, 0.0])}[base])
    log_z = rbm_log_partition(w, b, c)
    log_w = path.forward(BETAS, CHAINS)
    assert means_agree(torch.exp(log_w + path.log_z_base - log_z), 1.0)
    back = path.backward(BETAS, sample_rbm(w, b, c, CHAINS)[0])
    assert means_agree(torch.exp(log_z - path.log_z_base - back), 1.0)


def test_a_weight_taken_after_the_move_is_noticed():
    w, b, c = rbm()
    path = RbmPath(w, b, c, b)
    chains = _RbmChains(path, (torch.rand(CHAINS, 4) < torch.sigmoid(b)).to(w))
    for low, high in itertools.pairwise(BETAS):
        chains.move(high)
        chains.weigh(low, high)
    log_z = rbm_log_partition(w, b, c)
    assert not means_agree(torch.exp(chains.log_w + path.log_z_base - log_z), 1.0)


def test_a_reverse_run_that_does_not_start_from_the_model_is_noticed():
    w, b, c = rbm()
    path = RbmPath(w, b, c, b)
    back = path.backward(BETAS, torch.zeros(CHAINS, 4))
    assert not means_agree(torch.exp(rbm_log_partition(w, b, c) - path.log_z_base - back), 1.0)


@pytest.mark.parametrize("dense", [True, False])
def test_weights_of_a_boltzmann_machine(dense):
    j, b = couplings(dense=dense)
    path = BoltzmannPath(j, b, torch.zeros_like(b))
    log_z = boltzmann_log_partition(j, b)
    assert len(path.blocks) == (5 if dense else 2)
    assert means_agree(torch.exp(path.forward(BETAS, CHAINS) + path.log_z_base - log_z), torch.ones(2))
    back = path.backward(BETAS, sample_boltzmann(j, b, CHAINS))
    assert means_agree(torch.exp(log_z - path.log_z_base - back), torch.ones(2))


@pytest.mark.parametrize("reach", [0.9, 1e4])
def test_gain_of_softplus(reach):
    a = torch.linspace(-reach, reach, 50).reshape(5, 10)
    expected = torch.nn.functional.softplus(0.8 * a, threshold=700) - torch.nn.functional.softplus(0.1 * a, threshold=700)
    assert torch.allclose(
        _softplus_gain(a, torch.empty_like(a), torch.empty_like(a), 0.1, 0.8, reach), expected.sum(-1), rtol=1e-12, atol=1e-12
    )


def test_float32_agrees_with_float64():
    w, b, c = rbm(scale=0.3)
    path, fine = (RbmPath(*(t.to(dtype) for t in (w, b, c, b))) for dtype in (torch.float32, torch.float64))
    betas = torch.linspace(0, 1, 300).tolist()
    v = (torch.rand(50, 4) < 0.5).double()
    coarse, exact = _RbmChains(path, v.float()), _RbmChains(fine, v)
    for low, high in itertools.pairwise(betas):
        coarse.weigh(low, high)
        exact.weigh(low, high)
    assert torch.allclose(coarse.log_w, exact.log_w, atol=1e-5)
    assert coarse.log_w.dtype == torch.float64
    assert math.isclose(float(path.log_z_base), float(fine.log_z_base), rel_tol=1e-6)
