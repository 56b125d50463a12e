"""The exact quantities of an RBM against brute force over both sides in float64."""

import pytest
import torch
from stats import frequencies_agree

from pyrovae.distributions import RBM
from pyrovae.ops import check_enumerable, is_enumerable, rbm_log_partition, rbm_moments, sample_rbm, softplus_sums
from pyrovae.ops.partition import _Side
from pyrovae.ops.states import codes_to_index, index_to_codes


def draw(visible, hidden, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(visible * 100 + hidden)
    shapes = (visible, hidden), (visible,), (hidden,)
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(dtype) for s in shapes]


def codes(bits):
    return index_to_codes(torch.arange(2**bits), 2, bits).double()


def joint(weight, b, c):
    """All v `[2^D, D]`, all h `[2^H, H]`, and the exponent of each pair `[2^D, 2^H]`."""
    v, h = codes(len(b)), codes(len(c))
    return v, h, v @ weight.double() @ h.T + (v @ b.double())[:, None] + h @ c.double()


def brute_moments(weight, b, c):
    v, h, exponent = joint(weight, b, c)
    p = exponent.flatten().softmax(0).reshape(exponent.shape)
    return v.T @ p @ h, p.sum(1) @ v, p.sum(0) @ h


SHAPES = [(0, 0), (3, 0), (0, 3), (1, 1), (4, 3), (3, 4), (5, 5), (8, 6), (6, 9)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0, 1e4], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_partition_moments_and_gradient(shape, scale, dtype):
    parameters = [p.requires_grad_() for p in draw(*shape, scale, dtype)]
    exponent = joint(*(p.detach() for p in parameters))[2]
    log_partition = rbm_log_partition(*parameters)
    assert log_partition.shape == ()
    assert log_partition.dtype == dtype
    error = abs(log_partition.item() - exponent.flatten().logsumexp(0).item())
    assert error <= TOLERANCE[dtype] * (1 + float(exponent.abs().max()))
    grads = torch.autograd.grad(3 * log_partition, parameters)
    means = rbm_moments(*(p.detach() for p in parameters))
    for grad, mean, exact in zip(grads, means, brute_moments(*(p.detach() for p in parameters)), strict=True):
        assert grad.shape == mean.shape == exact.shape
        assert grad.dtype == mean.dtype == dtype
        # an exponent rounded at 1e4 · 100 moves probabilities by its error
        slack = TOLERANCE[dtype] * (10 + float(exponent.abs().max()))
        assert (mean - exact).abs().max() < slack if exact.numel() else True
        torch.testing.assert_close(grad, 3 * mean)


def test_gradcheck():
    for shape in ((4, 3), (3, 5)):
        parameters = [p.requires_grad_() for p in draw(*shape)]
        assert torch.autograd.gradcheck(rbm_log_partition, parameters)
        assert torch.autograd.gradcheck(softplus_sums, (parameters[0], parameters[2]))


def test_gradient_without_the_kept_table():
    """Small `max_bytes`: the backward pass enumerates again, and ends at the same moments."""
    parameters = [p.requires_grad_() for p in draw(12, 11)]
    kept = torch.autograd.grad(rbm_log_partition(*parameters), parameters)
    again = torch.autograd.grad(rbm_log_partition(*parameters, max_bytes=2**16), parameters)
    assert _Side(*(p.detach() for p in parameters), 2**16).log_partition(keep=True)[1] is None
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_gradient_of_one_parameter_alone():
    weight, b, c = draw(5, 4)
    c.requires_grad_()
    (grad,) = torch.autograd.grad(rbm_log_partition(weight, b, c), c)
    torch.testing.assert_close(grad, brute_moments(weight, b, c.detach())[2])


def test_a_second_derivative_is_refused_not_dropped():
    weight, b, c = (p.requires_grad_() for p in draw(3, 2))
    (grad,) = torch.autograd.grad(rbm_log_partition(weight, b, c), c, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second one"):
        (grad.sum() + c.square().sum()).backward()
    (grad,) = torch.autograd.grad(softplus_sums(weight, c).sum(), c, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second one"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_layer_against_brute_force_over_the_smaller_side(dtype):
    """784 units on one side: 1e-3 nat in float32, 1e-9 in float64, where a float32 sum loses more."""
    for scale in (0.05, 0.5):
        weight, b, c = draw(784, 11, scale, dtype)
        h = codes(11)
        x = h @ weight.double().T + b.double()
        exact = float((torch.nn.functional.softplus(x, threshold=40).sum(1) + h @ c.double()).logsumexp(0))
        side = _Side(weight, b, c, 2**28)
        assert abs(float(side.log_partition(keep=False)[0]) - exact) < (2e-5 if dtype == torch.float32 else 1e-11)
        assert abs(rbm_log_partition(weight.T, c, b).item() - exact) < (1e-3 if dtype == torch.float32 else 1e-9)


def test_softplus_sums_and_their_type():
    weight, bias = draw(6, 20)[0], draw(6, 20)[2]
    exact = torch.nn.functional.softplus(codes(6) @ weight + bias).sum(1)
    torch.testing.assert_close(softplus_sums(weight, bias), exact, rtol=1e-13, atol=1e-13)
    narrow = softplus_sums(weight.float(), bias.float())
    assert narrow.dtype == torch.float32
    wide = softplus_sums(weight.float(), bias.float(), dtype=torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, exact, rtol=1e-6, atol=1e-6)
    leaf = weight.float().requires_grad_()
    softplus_sums(leaf, bias.float(), dtype=torch.float64).sum().backward()
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (5, 0), (0, 2), (6, 6)], ids=str)
def test_draws_follow_the_joint(shape):
    parameters = draw(*shape, 1.5)
    n = 20000
    v, h = sample_rbm(*parameters, n)
    assert v.shape == (n, shape[0])
    assert h.shape == (n, shape[1])
    p = joint(*parameters)[2].flatten().softmax(0)
    counts = torch.bincount(codes_to_index(torch.cat([v, h], 1).long(), 2), minlength=2 ** sum(shape))
    assert frequencies_agree(counts, n, p)
    if sum(shape) > 5:
        assert not frequencies_agree(
            counts, n, joint(parameters[0], parameters[1] + 0.3, parameters[2])[2].flatten().softmax(0)
        )


def test_draws_of_many_halves_in_small_steps():
    """More first halves than are tabulated at a time."""
    weight, b, c = draw(9, 8, 0.3)
    n = 20000
    h = sample_rbm(weight, b, c, n, max_bytes=2**10)[1]
    p = joint(weight, b, c)[2].logsumexp(0).softmax(0)
    assert frequencies_agree(torch.bincount(codes_to_index(h.long(), 2), minlength=2**8), n, p)


def test_draws_repeat_with_a_generator_and_leave_the_global_one():
    parameters, state = draw(4, 3), torch.get_rng_state()
    first, second = (sample_rbm(*parameters, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals():
    weight, b, c = torch.zeros(60, 45), torch.zeros(60), torch.zeros(45)
    for function in (rbm_log_partition, rbm_moments):
        with pytest.raises(ValueError, match=r"at most 30 bits to enumerate, got 45.*seconds.*bytes; use .*AIS"):
            function(weight, b, c)
    with pytest.raises(ValueError, match=r"45.*seconds.*bytes; use .*Gibbs.*ParallelTempering"):
        sample_rbm(weight, b, c, 3)
    with pytest.raises(ValueError, match=r"45.*seconds.*bytes; use Gibbs"):
        softplus_sums(weight.T, b)
    with pytest.raises(ValueError, match="expected at most 5 bits"):
        rbm_log_partition(torch.zeros(8, 6), torch.zeros(8), torch.zeros(6), max_bits=5)
    with pytest.raises(ValueError, match="transpose the weights"):
        rbm_log_partition(torch.zeros(4, 3), torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="expected bias of shape"):
        softplus_sums(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="float32 or float64"):
        rbm_log_partition(torch.zeros(4, 3).half(), torch.zeros(4), torch.zeros(3))
    for bad in (torch.nan, torch.inf):
        for k in range(3):
            parameters = draw(4, 3)
            parameters[k].view(-1)[1] = bad
            with pytest.raises(ValueError, match="expected finite"):
                rbm_log_partition(*parameters)
    check_enumerable(30, 784, torch.float32, "AIS")


def test_minutes_are_refused_unless_insisted_on():
    weight = torch.zeros(784, 30, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"at most 120 seconds, got 30 bits: .*1\.4e\+02 seconds.*8\.6e\+09 bytes; use .*AIS.*=31"
    ):
        rbm_log_partition(weight, weight[:, 0], weight[0])
    with pytest.raises(ValueError, match="at most 120 seconds"):
        check_enumerable(30, 10_000, torch.float32, "AIS", max_bits=30)
    check_enumerable(30, 784, torch.float64, "AIS", max_bits=31)
    assert is_enumerable(30, 784, torch.float64, max_bits=31)
    assert not is_enumerable(30, 784, torch.float64)
    assert not is_enumerable(32, 1, torch.float64, max_bits=31)
    wide = RBM(weight, weight[:, 0], weight[0])
    assert (wide.partition_is, RBM(weight, weight[:, 0], weight[0], max_bits=31).partition_is) == ("unknown", "exact")
    with pytest.raises(ValueError, match=r"120 seconds.*chains=PersistentChains.*AIS"):
        wide.log_prob(weight[:, 0])
