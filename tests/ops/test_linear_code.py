"""Sums over codes as matrix products, against the full table of rows x codes; and the logistic regressions on codes."""

import itertools

import pytest
import torch
from stats import bound

from pyrovae.ops import index_to_codes
from pyrovae.ops.code_regression import fit_code_regression
from pyrovae.ops.linear_code import LinearCodes, linear_code_logsumexp, linear_code_max

ROWS = 9


def all_codes(units):
    return index_to_codes(torch.arange(2**units), 2, units).double()


def instance(units, scale):
    torch.manual_seed(units)
    drive, table = torch.randn(ROWS, units) * scale, torch.randn(2**units) * scale
    return drive, table, drive @ all_codes(units).T + table


def close(a, b, scale=1.0):
    torch.testing.assert_close(a, b, rtol=1e-10 * scale, atol=1e-10 * scale)


@pytest.mark.parametrize("max_bytes", [2**28, 1])
@pytest.mark.parametrize("units", [1, 2, 5, 8])
@pytest.mark.parametrize("scale", [1.0, 30.0, 400.0, 3000.0])  # from 400 on, rows underflow under the common tilt
def test_against_the_table(units, scale, max_bytes):
    drive, table, logits = instance(units, scale)
    codes = LinearCodes(drive, table, max_bytes=max_bytes)
    assert (len(codes._groups) > 1) == (scale >= 400 and units >= 5) or units < 5
    p, bits = logits.softmax(1), all_codes(units)
    close(codes.log_sum, logits.logsumexp(1))
    close(codes.mean, p @ bits, scale)
    weights, values = torch.randn(ROWS), torch.randn(2**units, 3) + 5
    close(codes.aggregate(weights), p.T @ weights, scale)
    close(codes.aggregate(), p.sum(0), scale)
    close(codes.average(values), p @ values, scale)
    close(codes.entropy(), -(p * logits.log_softmax(1)).sum(1), scale)
    close(codes.log_prob(torch.arange(2**units)), logits.log_softmax(1).T, scale)
    best, number = linear_code_max(drive, table, max_bytes=max_bytes)
    close(best, logits.amax(1))
    assert torch.equal(number, logits.argmax(1))
    fresh = LinearCodes(drive, table, max_bytes=max_bytes)
    mean, total = fresh.statistics(weights)
    close(mean, p @ bits, scale)
    close(total, p.T @ weights, scale)


def test_a_wrong_table_is_noticed():
    drive, table, logits = instance(5, 1.0)
    table[3] += 1e-6
    with pytest.raises(AssertionError):
        close(LinearCodes(drive, table).log_sum, logits.logsumexp(1))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_gradients(scale):
    drive, table, _ = instance(5, scale)
    drive.requires_grad_(), table.requires_grad_()
    upstream = torch.randn(ROWS)
    found = torch.autograd.grad(linear_code_logsumexp(drive, table) @ upstream, (drive, table))
    logits = drive @ all_codes(5).T + table
    for a, b in zip(found, torch.autograd.grad(logits.logsumexp(1) @ upstream, (drive, table)), strict=True):
        close(a, b, scale)
    codes, values = LinearCodes(drive, table), torch.randn(32, 2, requires_grad=True)
    (found,) = torch.autograd.grad((codes.average(values) * upstream[:, None]).sum(), values)
    close(found, (logits.softmax(1).T @ upstream)[:, None].expand(-1, 2).detach(), scale)


def test_float32_is_computed_in_float64():
    drive, table, logits = instance(6, 3.0)
    found = linear_code_logsumexp(drive.float(), table.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logits.logsumexp(1), rtol=1e-6, atol=1e-6)
    codes = LinearCodes(drive.float(), table.float())
    close(codes.log_sum, (drive.float().double() @ all_codes(6).T + table.float().double()).logsumexp(1))


@pytest.mark.parametrize("max_bytes", [2**28, 1])
@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_draws(scale, max_bytes):
    drive, table, logits = instance(3, scale)
    n = 4000
    codes = LinearCodes(drive, table, max_bytes=max_bytes)
    rows = torch.tensor([2, 0, 2])
    for index, p in ((codes.sample(n), logits.softmax(1)), (codes.sample(n, rows), logits[rows].softmax(1))):
        seen = torch.stack([(index == k).double().mean(0) for k in range(8)], 1)
        error = ((p * (1 - p)).clamp(min=1e-300) / n).sqrt()
        z = torch.where(p * n > 10, (seen - p) / error, 0.0)
        assert float(z.abs().max()) < bound(z.numel())
        assert float(seen[p * n < 1e-9].sum()) == 0
    wrong = LinearCodes(drive.roll(1, 0), table).sample(n)
    seen = torch.stack([(wrong == k).double().mean(0) for k in range(8)], 1)
    assert float((seen - logits.softmax(1)).abs().max()) > 0.1


def test_what_is_refused():
    with pytest.raises(ValueError, match="a value a code"):
        LinearCodes(torch.zeros(2, 3), torch.zeros(4))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="finite drive and table"):
            LinearCodes(torch.zeros(2, 2), torch.tensor([0.0, bad, 0.0, 0.0]))


def regression(units, visible, scale, dtype):
    """Statistics of a layer whose best parameters are known, and a start."""
    torch.manual_seed(visible)
    weight, bias, counts = torch.randn(units, visible), torch.randn(visible), torch.rand(2**units) ** 4 * 100
    seen = torch.sigmoid(bias + all_codes(units) @ weight) * counts[:, None]
    start = (torch.randn(units, visible) * scale).to(dtype), (torch.randn(visible) * scale).to(dtype)
    return (*start, all_codes(units).T @ seen, seen.sum(0), counts), weight, bias


def objective(weight, bias, cross, below, counts, penalty):
    x = bias + all_codes(len(weight)) @ weight
    linear = (weight * cross).sum() + bias @ below
    return (
        linear - counts @ torch.nn.functional.softplus(x).sum(1) - penalty / 2 * (weight.square().sum() + bias.square().sum())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.3, 3.0, 20.0])  # saturated units, where Newton steps overshoot
@pytest.mark.parametrize(("units", "visible", "penalty"), [(3, 5, 0.0), (6, 40, 2.0), (0, 4, 1.0), (13, 6, 0.0)])
def test_regression_never_falls_and_ends_at_the_best(units, visible, penalty, scale, dtype):
    given, weight, bias = regression(units, visible, scale, dtype)
    if dtype == torch.float32 and scale == 20:
        pytest.skip("sums of 1e5 in float32 say nothing of steps of 1e-2")
    values = [float(objective(given[0].double(), given[1].double(), *given[2:], penalty))]
    w, b = given[:2]
    for _ in range(40):
        w, b, passes = fit_code_regression(w, b, *given[2:], penalty=penalty, max_steps=5)
        assert w.dtype == b.dtype == dtype
        assert passes >= 1
        values.append(float(objective(w.double(), b.double(), *given[2:], penalty)))
    slack = 1e-12 if dtype == torch.float64 else 1e-6
    assert min(b - a for a, b in itertools.pairwise(values)) >= -slack * abs(values[0])
    if dtype == torch.float64:
        theta = torch.cat([b[None], w]).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(theta[1:], theta[0], *given[2:], penalty), theta)
        assert float(gradient.abs().max()) < 1e-3 * float(given[4].sum())
        if penalty == 0:
            assert values[-1] >= float(objective(weight, bias, *given[2:], 0.0)) - 1e-3 * float(given[4].sum())


def test_regression_over_all_codes_and_over_those_that_count():
    """Counts on few codes are listed; the same answer comes from all codes."""
    import pyrovae.ops.code_regression as module

    given, _, _ = regression(13, 6, 0.3, torch.float64)
    given = (*given[:4], torch.where(torch.rand(2**13) < 0.2, given[4], 0.0))
    few = module._Objective(given[0], given[2], given[3], given[4], 0.5)
    assert few.listed is not None
    assert len(few.listed) < 2**13 / 4
    everything = module._Objective(given[0], given[2], given[3], given[4], 0.5)
    everything.listed = None
    theta = torch.cat([given[1][None], given[0]])
    for a, b in zip(few(theta), everything(theta), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-6)
