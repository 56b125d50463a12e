"""Boltzmann machines as distributions, whole and with units summed out, against sums over all of their states."""

import itertools

import pyro
import pytest
import stats
import torch

from pyrovae.distributions import BoltzmannMachine, BoltzmannMarginal, PersistentChains
from pyrovae.ops import boltzmann_log_partition


def states(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def parameters(n=5, batch=()):
    half = torch.randn(n, n).triu(1)
    return (half + half.T).requires_grad_(), torch.randn(*batch, n).requires_grad_()


def brute_log_prob(J, b):
    """log p of all states, `[*batch, 2^n]`, pair by pair."""
    x, n = states(J.shape[0]), J.shape[0]
    pairs = sum(J[i, j] * x[:, i] * x[:, j] for i in range(n) for j in range(i))
    minus_energy = b @ x.T + pairs
    return minus_energy - minus_energy.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1)])
def test_log_prob_and_its_gradient(batch):
    J, b = parameters(batch=batch)
    machine, x = BoltzmannMachine(J, b), states(5)
    assert machine.batch_shape == batch
    expected = brute_log_prob(J, b)  # [*batch, 32]
    rows = x.reshape(32, *(1,) * len(batch), 5)
    value = machine.log_prob(rows).movedim(0, -1)
    assert machine.partition_is == "exact"
    assert torch.allclose(value, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(BoltzmannMachine(J, b + 0.1 * torch.randn(5)).log_prob(rows).movedim(0, -1), expected, atol=1e-6)
    weights = torch.randn(value.shape)
    ours = torch.autograd.grad((value * weights).sum(), (J, b))
    gradients = list(torch.autograd.grad((expected * weights).sum(), (J, b)))
    gradients[0] = (gradients[0] + gradients[0].T) / 2  # the sum above uses J below the diagonal only
    for a, e in zip(ours, gradients, strict=True):
        assert torch.allclose(a, e, rtol=0, atol=1e-10)


def test_moments_and_conditionals():
    J, b = parameters()
    machine, x = BoltzmannMachine(J, b), states(5)
    p = brute_log_prob(J, b).detach().exp()
    assert torch.allclose(machine.mean, p @ x, rtol=0, atol=1e-10)
    assert torch.allclose(machine.variance, p @ x - (p @ x) ** 2, rtol=0, atol=1e-10)
    table = p.reshape(8, 4)  # the first three units, and the rest
    given = machine.given(states(3))
    assert given.batch_shape == (8,)
    assert torch.allclose(given.log_prob(states(2)[:, None]).T, (table / table.sum(1, keepdim=True)).log(), rtol=0, atol=1e-10)
    for k in (0, 5):
        with pytest.raises(ValueError, match="expected between 1 and 4 of the 5 units"):
            machine.given(torch.zeros(2, k))
        with pytest.raises(ValueError, match="expected between 1 and 4 of the 5 units"):
            machine.marginal(k)


def test_marginal():
    J, b = parameters()
    machine = BoltzmannMachine(J, b)
    marginal, v = machine.marginal(3), states(3)
    assert isinstance(marginal, BoltzmannMarginal)
    expected = brute_log_prob(J, b).reshape(8, 4).logsumexp(1)
    assert torch.allclose(marginal.log_prob(v), expected, rtol=0, atol=1e-10)
    assert torch.allclose(-marginal.free_energy(v) - marginal.log_partition(), expected, rtol=0, atol=1e-10)
    assert torch.allclose(marginal.mean, machine.mean[:3], rtol=0, atol=1e-12)
    ours = torch.autograd.grad(marginal.log_prob(v[2:5]).sum(), (J, b))
    exact = torch.autograd.grad(expected[2:5].sum(), (J, b))
    assert torch.allclose(ours[0], (exact[0] + exact[0].T) / 2, rtol=0, atol=1e-10)
    assert torch.allclose(ours[1], exact[1], rtol=0, atol=1e-10)
    assert torch.allclose(marginal.hidden_given(v).log_prob(torch.ones(2)), machine.given(v).log_prob(torch.ones(2)))
    counts = torch.bincount((marginal.sample((20000,)) @ torch.tensor([4.0, 2.0, 1.0])).long(), minlength=8)
    assert stats.frequencies_agree(counts, 20000, expected.detach().exp())
    assert not stats.frequencies_agree(counts, 20000, expected.detach().exp().flip(0))


def test_draws_of_a_batch():
    J, b = parameters(3, batch=(2, 1))
    machine = BoltzmannMachine(J, b).expand((3, 2, 4))
    assert machine.b is b
    draws = machine.sample((2000,))
    assert draws.shape == (2000, 3, 2, 4, 3)
    assert machine.mean.shape == (3, 2, 4, 3)
    counts = torch.zeros(2, 8)
    for row in range(2):
        index = (draws[:, :, row] @ torch.tensor([4.0, 2.0, 1.0])).long()
        counts[row] = torch.bincount(index.flatten(), minlength=8)
    p = brute_log_prob(J, b).detach().exp().reshape(2, 8)
    assert stats.frequencies_agree(counts, 24000, p)
    assert not stats.frequencies_agree(counts, 24000, p.flip(0))
    assert machine.log_prob(draws).shape == (2000, 3, 2, 4)
    wide = machine.marginal(2)
    assert wide.batch_shape == (3, 2, 4)
    assert wide.sample((5,)).shape == (5, 3, 2, 4, 2)
    assert wide.log_prob(torch.ones(2)).shape == (3, 2, 4)
    assert machine.unexpanded().batch_shape == (2, 1)


@pytest.mark.parametrize("visible", [5, 3])
def test_chains(visible):
    J, b = parameters()
    chains = PersistentChains(40, 2)
    machine = BoltzmannMachine(J, b, chains=chains)
    fn, v = machine if visible == 5 else machine.marginal(visible), states(visible)[3:6]
    assert not fn.normalized
    value = fn.log_prob(v)
    assert torch.allclose(value, -fn.free_energy(v), rtol=0, atol=1e-12)
    assert chains.states.shape == (40, 5)  # of all units
    ours = torch.autograd.grad(value.mean(), (J, b))
    expected = torch.autograd.grad(machine.free_energy(chains.states).mean() - fn.free_energy(v).mean(), (J, b))
    for a, e in zip(ours, expected, strict=True):
        assert torch.allclose(a, e, rtol=0, atol=1e-12)
    before = chains.states.clone()
    assert fn.sample((7,)).shape == (7, visible)
    assert torch.equal(chains.states, before)
    exact = BoltzmannMachine(J, b)
    chains = PersistentChains(20000, 2)
    chains.states = exact.sample((20000,))
    draws = BoltzmannMachine(J, b, chains=chains).marginal(3).sample((20000,))
    counts = torch.bincount((draws @ torch.tensor([4.0, 2.0, 1.0])).long(), minlength=8)
    p = brute_log_prob(J, b).detach().exp().reshape(8, 4).sum(1)
    assert stats.frequencies_agree(counts, 20000, p)
    assert not stats.frequencies_agree(counts, 20000, p.flip(0))


def test_given_log_partition():
    J, b = parameters(batch=(3,))
    given = torch.tensor([1.0, 2.0, 3.0])
    machine = BoltzmannMachine(J, b, log_partition=given)
    x = torch.ones(3, 5)
    assert torch.allclose(machine.log_prob(x), -machine.free_energy(x) - given)
    with pytest.raises(ValueError, match="expected a log_partition with a gradient"):
        machine.log_prob(x).sum().backward()
    assert torch.allclose(machine.marginal(4).log_partition(), given)


def test_bad_parameters():
    J, b = (p.detach() for p in parameters())
    for wrong in ((J[:4], b), (J, b[:4]), (J[0], b), (torch.zeros(0, 0), b[:0]), (J, torch.tensor(1.0))):
        with pytest.raises(ValueError, match=r"expected J \[n, n\] and b \[\*batch, n\]"):
            BoltzmannMachine(*wrong)
    with pytest.raises(ValueError, match="expected symmetric couplings J with a zero diagonal, got asymmetries up to"):
        BoltzmannMachine(J.triu(), b)
    with pytest.raises(ValueError, match=r"a diagonal up to 0\.5; .* move the diagonal into b"):
        BoltzmannMachine(J + 0.5 * torch.eye(5), b)
    with pytest.raises(ValueError, match="expected finite J for BoltzmannMachine, got 20 infinite or NaN of 25"):
        BoltzmannMachine((J / 0).fill_diagonal_(0.0), b)
    with pytest.raises(ValueError, match=r"expected biases .* with chains"):
        BoltzmannMachine(J, b.expand(2, 5), chains=PersistentChains())
    with pytest.raises(ValueError, match=r"expected values in \{0, 1\} for BoltzmannMarginal, got values from 0.3 to 1"):
        BoltzmannMachine(J, b).marginal(2).log_prob(torch.tensor([0.3, 1.0]))
    for dtype, within, beyond in ((torch.float32, 3e-6, 3e-5), (torch.float64, 1e-12, 1e-11)):  # as the ops that it calls
        symmetric = torch.ones(5, 5, dtype=dtype) - torch.eye(5, dtype=dtype)
        near, far = symmetric.clone(), symmetric.clone()
        near[0, 1] += within
        far[0, 1] += beyond
        BoltzmannMachine(near, b.to(dtype)).log_partition()
        with pytest.raises(ValueError, match="expected symmetric"):
            BoltzmannMachine(far, b.to(dtype))
        with pytest.raises(ValueError, match="expected symmetric"):
            boltzmann_log_partition(far, b.to(dtype))
    # rounding is no asymmetry, and what is not validated is not looked at
    BoltzmannMachine(J + 1e-15 * J.triu(), b)
    BoltzmannMachine(J.triu(), b, validate_args=False)
    with pyro.validation_enabled(False):
        BoltzmannMachine(J.triu(), b)


def test_45_units_are_refused():
    machine = BoltzmannMachine(torch.zeros(45, 45), torch.zeros(45))
    x = torch.ones(45)
    for call in (machine.log_partition, machine.sample, lambda: machine.log_prob(x), lambda: machine.mean):
        with pytest.raises(ValueError, match=r"45.*seconds.*bytes.*chains=PersistentChains.*AIS"):
            call()
    given = BoltzmannMachine(torch.zeros(45, 45), torch.zeros(45), log_partition=45 * 0.6931471805599453)
    assert float(given.log_prob(x).exp()) == pytest.approx(2.0**-45)
    with pytest.raises(ValueError, match=r"seconds.*bytes.*use ContrastiveDivergence"):
        given.marginal(3).log_prob(x[:3])


def test_float32():
    J, b = parameters()
    machine = BoltzmannMachine(J.float(), b.float())
    x = states(5).float()
    assert machine.log_prob(x).dtype == machine.sample((2,)).dtype == torch.float32
    assert torch.allclose(machine.log_prob(x).double(), brute_log_prob(J, b), atol=1e-4)
