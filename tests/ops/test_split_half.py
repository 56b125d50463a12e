"""The sums over units of softplus and their gradient, against brute force in float64."""

import pytest
import torch

from pyrovae.ops import split_half
from pyrovae.ops.split_half import Gradient, SplitHalf
from pyrovae.ops.states import index_to_codes


def draw(bits, units, scale, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(bits, units, generator=generator, dtype=torch.float64) * scale
    bias = torch.randn(units, generator=generator, dtype=torch.float64) * scale
    return weight.to(dtype), bias.to(dtype)


def brute_force(weight, bias):
    codes = index_to_codes(torch.arange(2 ** len(weight)), 2, len(weight)).double()
    x = codes @ weight.double() + bias.double()
    return codes, x, torch.nn.functional.softplus(x, threshold=40).sum(1)


def both(engine, r):
    """All sums, and the gradient for weights r."""
    sums, gradient = torch.full(engine.shape, torch.nan, dtype=torch.float64), Gradient(engine)
    for rows, columns, first, second in engine.tiles():
        sums[rows, columns] = engine.sums(first, second)
        gradient.add(first, second, r.reshape(engine.shape)[rows, columns])
    return sums.flatten(), *gradient.result()


def errors(engine, weight, bias):
    """Largest error of the sums, relative to the largest logit x units; of the gradient, relative to its largest entry."""
    codes, x, expected = brute_force(weight, bias)
    r = torch.linspace(-1, 2, len(codes), dtype=torch.float64).sin() + 1.2
    sums, weight_grad, bias_grad = both(engine, r)
    assert weight_grad.dtype == bias_grad.dtype == weight.dtype
    weighted = x.sigmoid() * r[:, None]
    wrong = [float((sums - expected).abs().max()) / (1 + float(x.abs().max() if x.numel() else 0.0))]
    for found, exact in ((weight_grad, codes.T @ weighted), (bias_grad, weighted.sum(0))):
        assert found.shape == exact.shape
        if exact.numel():
            wrong.append(float((found - exact).abs().max() / exact.abs().max()))
    return wrong


SHAPES = [(0, 3), (1, 1), (2, 0), (5, 7), (6, 4), (9, 33), (10, 130)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, 6.0, 40.0, 1e4], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_gradient(shape, scale, dtype):
    weight, bias = draw(*shape, scale, dtype)
    assert max(errors(SplitHalf(weight, bias), weight, bias)) < TOLERANCE[dtype]


def test_a_wrong_bias_is_noticed():
    weight, bias = draw(5, 7, 1.0, torch.float32)
    assert max(errors(SplitHalf(weight, bias + 1e-4), weight, bias)) > TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_of_all_widths_beside_each_other(dtype):
    """Every group size at once, and the softplus of the units too wide."""
    weight, bias = draw(9, 200, 1.0, dtype)
    weight *= torch.logspace(-2, 4, 200, dtype=dtype)
    engine = SplitHalf(weight, bias)
    assert {run.group for run in engine._runs} == {0, 1, 2, 4}
    assert max(errors(engine, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1.0, 3.0, 200.0])
def test_products_are_cut_before_they_leave_the_range(size, dtype):
    """Half of the codes have factors of e^{-w} or of 2 only: thousands of them leave the range of any type."""
    weight = size * torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=dtype)[:, None].expand(8, 3000)
    bias = torch.zeros(3000, dtype=dtype)
    assert max(errors(SplitHalf(weight, bias), weight, bias)) < 100 * TOLERANCE[dtype]  # 3000 units that err alike


@pytest.mark.parametrize("size", [0.0, 1.0, 3.0])
def test_without_the_cuts_they_would(size, monkeypatch):
    for dtype in (torch.float32, torch.float64):
        monkeypatch.setitem(split_half._PRODUCT, dtype, 1e9)
    weight = size * torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float32)[:, None].expand(8, 3000)
    sums, *_ = both(SplitHalf(weight, torch.zeros(3000, dtype=torch.float32)), torch.ones(2**8))
    assert not sums.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_of_any_size_and_tables_not_kept(dtype):
    weight, bias = draw(11, 21, 1.0, dtype)
    for max_bytes in (1, 2**14, 2**18, 2**28):
        engine = SplitHalf(weight, bias, max_bytes)
        assert max(errors(engine, weight, bias)) < TOLERANCE[dtype]
        assert sum(part.numel() for block in engine._kept.values() for part in block.parts) * 4 <= max_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_too_large_for_a_batch_of_groups(dtype):
    """More than 2^14 pairs in a tile: groups are multiplied one by one."""
    weight, bias = draw(16, 9, 1.0, dtype)
    engine = SplitHalf(weight, bias)
    rows, columns, *_ = next(engine.tiles())
    assert (rows.stop - rows.start) * (columns.stop - columns.start) > 2**14
    assert max(errors(engine, weight, bias)) < TOLERANCE[dtype]
