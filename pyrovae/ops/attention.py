"""Selective attention by a grid of Gaussian filters: what DRAW reads from an image and writes to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RAW = 5  # numbers that place a window: g̃X, g̃Y, log σ², log δ̃, log γ
LIMIT = 20.0  # of their logarithms: e^-20 is a point, e^20 a constant, and neither overflows in float32


class Window(NamedTuple):
    """Where a grid of N×N filters lies on an image.

    Attributes:
        rows: filters along the height, `[..., N, H]`; each sums to 1.
        columns: filters along the width, `[..., N, W]`; each sums to 1.
        intensity: γ, `[...]`.
    """

    rows: Tensor
    columns: Tensor
    intensity: Tensor

    def read(self, image: Tensor) -> Tensor:
        """The patch γ F_Y x F_Xᵀ, `[..., N, N]`, of images `[..., H, W]`."""
        return self.intensity[..., None, None] * (self.rows @ image @ self.columns.mT)

    def write(self, patch: Tensor) -> Tensor:
        """The image F_Yᵀ w F_X / γ, `[..., H, W]`, of patches `[..., N, N]`."""
        return (self.rows.mT @ patch @ self.columns) / self.intensity[..., None, None]


def filter_bank(centre: Tensor, stride: Tensor, variance: Tensor, *, count: int, size: int) -> Tensor:
    """Gaussian filters on a line of pixels 1, …, size, evenly spaced around a centre.

    F[i, a] ∝ exp(−(a − μ_i)² / 2σ²), μ_i = g + (i − N/2 − ½) δ, i = 1, …, N; each row sums to 1, also where a filter lies
    far off the image (its nearest pixel then takes all).

    Args:
        centre: g in pixels, `[...]`; the middle of the line is (size + 1) / 2.
        stride: δ > 0 in pixels, `[...]`.
        variance: σ² > 0 in pixels squared, `[...]`.
        count: N.
        size: number of pixels.

    Returns:
        `[..., count, size]`.
    """
    steps = torch.arange(1, count + 1, dtype=centre.dtype, device=centre.device) - count / 2 - 0.5
    pixels = torch.arange(1, size + 1, dtype=centre.dtype, device=centre.device)
    means = centre[..., None] + steps * stride[..., None]
    distance = (pixels - means[..., None]).square()
    return torch.softmax(-distance / (2 * variance[..., None, None]), -1)


def attention_window(raw: Tensor, *, count: int, height: int, width: int) -> Window:
    """The window that five numbers place on an image.

    g_X = (W + 1)/2 · (g̃_X + 1), g_Y = (H + 1)/2 · (g̃_Y + 1), δ = (max(H, W) − 1)/(N − 1) · δ̃; variance, stride and intensity
    are given by their logarithms. All zeros: the window covers the whole image. The logarithms are clamped to ±20.

    Args:
        raw: (g̃_X, g̃_Y, log σ², log δ̃, log γ), `[..., 5]`.
        count: N, filters along each axis.
        height: H, rows of the image.
        width: W, columns of the image.

    Returns:
        A :class:`Window`. Reading or writing costs N·H·W + N²·W multiplications an image.

    Raises:
        ValueError: if `raw` has another last dim, or a size is below 1.

    Example:
        >>> window = attention_window(torch.zeros(2, 5), count=3, height=6, width=4)
        >>> tuple(window.read(torch.ones(2, 6, 4)).shape)
        (2, 3, 3)

    References:
        DRAW: A Recurrent Neural Network For Image Generation (Gregor, Danihelka, Graves, Rezende, Wierstra, 2015)
        https://arxiv.org/abs/1502.04623
    """
    if raw.shape[-1:] != (RAW,):
        raise ValueError(
            f"expected raw [..., {RAW}] = (g_X, g_Y, log variance, log stride, log intensity), got {list(raw.shape)}"
        )
    if min(count, height, width) < 1:
        raise ValueError(f"expected count, height, width >= 1, got {count}, {height}, {width}")
    g_x, g_y, *logs = raw.unbind(-1)
    variance, stride, intensity = (log.clamp(-LIMIT, LIMIT).exp() for log in logs)
    stride = (max(height, width) - 1) / max(count - 1, 1) * stride
    return Window(
        rows=filter_bank((height + 1) / 2 * (g_y + 1), stride, variance, count=count, size=height),
        columns=filter_bank((width + 1) / 2 * (g_x + 1), stride, variance, count=count, size=width),
        intensity=intensity,
    )
