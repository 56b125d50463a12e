"""The filters of DRAW against loops over pixels, in the notation of the paper."""

import math

import pytest
import torch

from pyrovae.ops.attention import Window, attention_window, filter_bank


def bank(g, delta, variance, n, size):
    """One row of filters at a time, one pixel at a time, pixels and filters counted from 1."""
    rows = []
    for i in range(1, n + 1):
        mean = g + (i - n / 2 - 0.5) * delta
        row = [math.exp(-((a - mean) ** 2) / (2 * variance)) for a in range(1, size + 1)]
        rows.append([value / sum(row) for value in row])
    return rows


def placed(raw, n, height, width, *, half_pixel=0.0):
    gx, gy, log_variance, log_stride, log_intensity = raw
    delta = (max(height, width) - 1) / max(n - 1, 1) * math.exp(log_stride)
    fx = bank((width + 1) / 2 * (gx + 1) + half_pixel, delta, math.exp(log_variance), n, width)
    fy = bank((height + 1) / 2 * (gy + 1) + half_pixel, delta, math.exp(log_variance), n, height)
    return fy, fx, math.exp(log_intensity)


def read(raw, image, n, **kwargs):
    height, width = len(image), len(image[0])
    fy, fx, gamma = placed(raw, n, height, width, **kwargs)
    return [
        [gamma * sum(fy[i][b] * image[b][a] * fx[j][a] for b in range(height) for a in range(width)) for j in range(n)]
        for i in range(n)
    ]


def write(raw, patch, height, width):
    n = len(patch)
    fy, fx, gamma = placed(raw, n, height, width)
    return [
        [sum(fy[i][b] * patch[i][j] * fx[j][a] for i in range(n) for j in range(n)) / gamma for a in range(width)]
        for b in range(height)
    ]


def close(value, expected):
    return torch.allclose(value, torch.tensor(expected, dtype=value.dtype), rtol=0, atol=1e-10)


def test_filter_bank():
    g, delta, variance = torch.randn(4) * 2 + 3, torch.rand(4) + 0.2, torch.rand(4) + 0.1
    found = filter_bank(g, delta, variance, count=3, size=6)
    expected = [bank(*(float(v[k]) for v in (g, delta, variance)), 3, 6) for k in range(4)]
    assert close(found, expected)
    assert not close(filter_bank(g - 1, delta, variance, count=3, size=6), expected)  # pixels counted from 0
    assert not close(filter_bank(g, delta, variance.sqrt(), count=3, size=6), expected)


@pytest.mark.parametrize(("n", "height", "width"), [(1, 4, 4), (2, 5, 3), (3, 4, 6), (5, 3, 3)])
def test_read_and_write(n, height, width):
    raw = torch.randn(2, 3, 5) * 0.5
    images, patches = torch.randn(3, height, width), torch.randn(2, 3, n, n)
    window = attention_window(raw, count=n, height=height, width=width)
    seen = [[read(raw[s, b].tolist(), images[b].tolist(), n) for b in range(3)] for s in range(2)]
    drawn = [[write(raw[s, b].tolist(), patches[s, b].tolist(), height, width) for b in range(3)] for s in range(2)]
    assert close(window.read(images), seen)  # [3, H, W] under windows [2, 3]: aligned at the right
    assert close(window.write(patches), drawn)
    wrong = Window(window.rows.flip(-1), window.columns, window.intensity)
    assert not close(wrong.read(images), seen)
    assert not close(wrong.write(patches), drawn)
    inverse = Window(window.rows, window.columns, 1 / window.intensity)
    assert not close(inverse.read(images), seen)
    assert not close(inverse.write(patches), drawn)
    swapped = attention_window(raw[..., [1, 0, 2, 3, 4]], count=n, height=height, width=width)
    assert not close(swapped.read(images), seen)
    shifted = [[read(raw[s, b].tolist(), images[b].tolist(), n, half_pixel=0.5) for b in range(3)] for s in range(2)]
    assert not close(window.read(images), shifted)


def test_all_zeros_cover_the_image():
    window = attention_window(torch.zeros(5), count=7, height=7, width=7)
    assert float(window.intensity) == 1.0
    pixels = torch.arange(1, 8, dtype=window.rows.dtype)
    assert torch.equal(window.rows.argmax(-1) + 1, pixels.long())
    assert torch.allclose((window.rows @ pixels)[3], torch.tensor(4.0))
    corner = attention_window(torch.tensor([0.75, -0.75, 0.0, 0.0, 0.0]), count=1, height=7, width=7)
    assert (int(corner.columns.argmax()) + 1, int(corner.rows.argmax()) + 1) == (7, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_windows_stay_finite(dtype):
    raw = torch.tensor([[s * 50.0 * (k == i) for k in range(5)] for i in range(5) for s in (-1, 1)], dtype=dtype)
    raw = torch.cat([raw, raw[:2] + raw[4:6]]).requires_grad_()  # far off the image with a narrow filter
    window = attention_window(raw, count=3, height=4, width=4)
    assert window.rows.dtype == dtype
    for filters in (window.rows, window.columns):
        assert torch.allclose(filters.sum(-1), torch.ones((), dtype=dtype), atol=1e-6 if dtype == torch.float32 else 1e-12)
    out = window.read(torch.rand(4, 4, dtype=dtype)).tanh().sum() + window.write(torch.rand(3, 3, dtype=dtype)).tanh().sum()
    out.backward()
    assert bool(out.isfinite())
    assert bool(raw.grad.isfinite().all())


def test_gradients():
    raw = (torch.randn(2, 5) * 0.5).requires_grad_()
    image, patch = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 3, 3, requires_grad=True)

    def both(raw, image, patch):
        window = attention_window(raw, count=3, height=4, width=5)
        return window.read(image), window.write(patch)

    assert torch.autograd.gradcheck(both, (raw, image, patch))


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected raw \[\.\.\., 5\]"):
        attention_window(torch.zeros(4), count=2, height=3, width=3)
    with pytest.raises(ValueError, match="count, height, width >= 1"):
        attention_window(torch.zeros(5), count=0, height=3, width=3)
