"""The exact quantities of a Boltzmann machine against brute force over all codes in float64."""

import pytest
import torch
from stats import frequencies_agree

from pyrovae.ops import boltzmann, boltzmann_log_partition, boltzmann_moments, sample_boltzmann
from pyrovae.ops.states import codes_to_index, index_to_codes


def draw(n, batch=(), scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    couplings = torch.randn(n, n, generator=generator, dtype=torch.float64) * scale
    couplings = (couplings + couplings.T).fill_diagonal_(0)
    return couplings.to(dtype), (torch.randn(*batch, n, generator=generator, dtype=torch.float64) * scale).to(dtype)


def brute_force(couplings, biases):
    """All codes and their exponents `[*batch, 2^n]`."""
    n = len(couplings)
    x = index_to_codes(torch.arange(2**n), 2, n).double()
    return x, ((x @ couplings.double()) * x).sum(1) / 2 + biases.double() @ x.T


SIZES = [0, 1, 2, 3, 6, 9]
BATCHES = [(), (1,), (5,), (2, 3), (0,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e4], ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_log_partition_moments_and_gradient(n, batch, scale, dtype):
    couplings, biases = (p.requires_grad_() for p in draw(n, batch, scale, dtype))
    x, exponents = brute_force(couplings.detach(), biases.detach())
    rounding = 1e-6 if dtype == torch.float32 else 1e-13
    largest = 1 + float(exponents.abs().max() if exponents.numel() else 0.0)
    found = boltzmann_log_partition(couplings, biases)
    assert found.shape == batch
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exponents.logsumexp(-1), rtol=0, atol=rounding * largest)
    p = exponents.softmax(-1)
    second = torch.einsum("...s,si,sj->...ij", p, x, x)
    slack = {"rtol": 0, "atol": rounding if dtype == torch.float32 else rounding * largest}
    moments = boltzmann_moments(couplings.detach(), biases.detach())
    torch.testing.assert_close(moments[0].double(), second, **slack)
    torch.testing.assert_close(moments[1].double(), p @ x, **slack)
    r = torch.linspace(0.5, 2, max(found.numel(), 1), dtype=dtype)[: found.numel()].reshape(batch)
    grads = torch.autograd.grad((r * found).sum(), (couplings, biases))
    expected = (r.double()[..., None, None] * second).reshape(found.numel(), n, n).sum(0) / 2
    slack["atol"] *= 1 + found.numel()
    torch.testing.assert_close(grads[0].double(), expected - expected.diag().diag(), **slack)
    torch.testing.assert_close(grads[1].double(), r.double()[..., None] * (p @ x), **slack)


def test_gradcheck():
    """J through the symmetric parametrisation that the function takes."""
    couplings, biases = draw(5, (3,))
    lower = couplings.tril(-1).requires_grad_()

    def function(lower, biases):
        lower = lower.tril(-1)
        return boltzmann_log_partition(lower + lower.T, biases)

    assert torch.autograd.gradcheck(function, (lower, biases.requires_grad_()))
    assert torch.autograd.gradcheck(function, (lower, biases[0].detach().requires_grad_()))


def test_biases_that_leave_the_range_are_summed_in_log_space():
    """Couplings of −3000 between halves that each alone prefer all units on: no product of halves holds the sum."""
    n = 6
    couplings = torch.zeros(n, n)
    couplings[:3, 3:] = couplings[3:, :3] = -3000.0
    biases = torch.stack([torch.full((n,), 2000.0), torch.zeros(n), torch.linspace(1, 3000, n)])
    x, exponents = brute_force(couplings, biases)
    halves = boltzmann._Halves(couplings, biases)
    log_partition = halves.log_partition()
    assert 0 in halves._scale(log_partition)[1]
    assert 1 not in halves._scale(log_partition)[1]
    torch.testing.assert_close(log_partition, exponents.logsumexp(-1))
    p = exponents.softmax(-1)
    second = torch.einsum("bs,si,sj->bij", p, x, x)
    torch.testing.assert_close(boltzmann_moments(couplings, biases)[0], second)
    biases.requires_grad_()
    grad = torch.autograd.grad(boltzmann_log_partition(couplings, biases).sum(), biases)[0]
    torch.testing.assert_close(grad, p @ x)


def test_several_tiles_and_chunks(monkeypatch):
    """Tiles of 4 codes and chunks of 2 biases change nothing."""
    couplings, biases = draw(9, (7,))
    whole = boltzmann_log_partition(couplings, biases), *boltzmann_moments(couplings, biases)
    monkeypatch.setattr(boltzmann, "_SIDE", 4)
    monkeypatch.setattr(boltzmann, "_BATCH_BYTES", 1)
    assert len(boltzmann._chunks(biases)) == 4
    for a, b in zip(whole, (boltzmann_log_partition(couplings, biases), *boltzmann_moments(couplings, biases)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(boltzmann_log_partition(couplings, biases[3]), whole[0][3], rtol=1e-13, atol=0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_draws_follow_the_law(n):
    couplings, biases = draw(n, (2,), 1.5)
    count = 20000
    x = sample_boltzmann(couplings, biases, count)
    assert x.shape == (count, 2, n)
    p = brute_force(couplings, biases)[1].softmax(-1)
    for k in range(2):
        counts = torch.bincount(codes_to_index(x[:, k].long(), 2), minlength=2**n)
        assert frequencies_agree(counts, count, p[k])
        assert not frequencies_agree(counts, count, p[1 - k])


def test_refusals():
    couplings, biases = draw(4)
    with pytest.raises(ValueError, match="expected symmetric couplings"):
        boltzmann_log_partition(couplings.triu(), biases)
    with pytest.raises(ValueError, match="zero diagonal"):
        boltzmann_moments(couplings + torch.eye(4), biases)
    with pytest.raises(ValueError, match=r"expected biases of shape \(…, 4\)"):
        boltzmann_log_partition(couplings, biases[:3])
    with pytest.raises(ValueError, match="square matrix"):
        boltzmann_log_partition(couplings[:3], biases)
    with pytest.raises(ValueError, match="expected finite biases"):
        boltzmann_log_partition(couplings, biases * torch.nan)
    with pytest.raises(ValueError, match="expected finite couplings"):
        boltzmann_log_partition(couplings * torch.inf, biases)
    with pytest.raises(ValueError, match=r"at most 30 bits to enumerate, got 45.*seconds.*bytes; use .*AIS"):
        boltzmann_log_partition(torch.zeros(45, 45), torch.zeros(45))
    with pytest.raises(ValueError, match="ParallelTempering"):
        sample_boltzmann(torch.zeros(45, 45), torch.zeros(45), 2)
