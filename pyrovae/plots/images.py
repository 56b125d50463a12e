"""Grids of images: data, draws, reconstructions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.plots.look import figure_of, look_of, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def samples_grid(samples: Mapping[str, Tensor], *, dark: bool = False, columns: int = 4, most: int = 16) -> Figure:
    """Rows of data and of draws as images, one block a name.

    Args:
        samples: rows in [0, 1] `[n, D]` by name; images where D is a square, strips where it is not.
        dark: for a dark page.
        columns: images side by side in a block.
        most: images of a block.
    """
    look = look_of(dark=dark)
    wide = min(len(samples), 7)
    tall = math.ceil(len(samples) / wide)
    figure, axes = figure_of(look, max(3.0, 1.35 * wide + 0.2), 0.7, wide, tall, left=0.015, right=0.985, square=0.1)
    for panel, (name, rows) in zip(axes, samples.items(), strict=False):
        panel.imshow(
            _tiles(_images(rows[:most].clamp(0, 1)), columns),
            cmap="gray" if dark else "gray_r",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        panel.set_title(
            name, fontsize=9.5, loc="left", color=look.ink, pad=4, fontweight="bold" if name == "data" else "normal"
        )
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set_visible(False)
    for panel in axes[len(samples) :]:
        panel.set_visible(False)
    title_of(figure, look, "Data, and what each learned model draws", "")
    return figure


def image_grid(
    images: Tensor, *, columns: int | None = None, title: str = "", subtitle: str = "", dark: bool = False
) -> Figure:
    """Images beside one another, laid out by torchvision's `make_grid`.

    Args:
        images: rows in [0, 1] `[n, D]`, or `[n, height, width]`. Rows are images where D is a square, strips where it is not.
        columns: images side by side; None takes about a square, without a gap in the last line where that can be.
        title: above the grid; none where empty.
        subtitle: beneath the title.
        dark: for a dark page: white on black, where a light page has black on white.

    Raises:
        ValueError: if there is no image, or a value outside [0, 1].
        ImportError: if torchvision does not import.
    """
    if columns is not None and columns < 1:
        raise ValueError(f"expected columns >= 1, got {columns}; 8 are usual")
    return _picture(_tiles(_images(images), columns or _columns(len(images))), title, subtitle, dark=dark)


def reconstruction_grid(
    data: Tensor,
    reconstructions: Tensor,
    *,
    columns: int = 10,
    title: str = "Data, and beneath each its reconstruction",
    subtitle: str = "",
    dark: bool = False,
) -> Figure:
    """Data and their reconstructions in pairs of lines, laid out by torchvision's `make_grid`.

    Args:
        data: rows in [0, 1] `[n, D]`, or `[n, height, width]`.
        reconstructions: likewise, one a datum.
        columns: data side by side.
        title: above the grid; none where empty.
        subtitle: beneath the title.
        dark: for a dark page.

    Raises:
        ValueError: if the two differ in shape, there is no image, or a value outside [0, 1].
        ImportError: if torchvision does not import.
    """
    if data.shape != reconstructions.shape:
        raise ValueError(
            f"expected one reconstruction of the same shape a datum, got {tuple(data.shape)} and {tuple(reconstructions.shape)}"
        )
    above, below = _images(data), _images(reconstructions)
    columns = min(columns, len(above))
    lines = []
    for start in range(0, len(above) // columns * columns, columns):  # whole lines only
        pair = torch.cat([above[start : start + columns], below[start : start + columns]])
        lines.append(torch.from_numpy(_tiles(pair, columns)))
    gap = torch.full((4, lines[0].shape[1]), math.nan, dtype=torch.float64)  # paper between the pairs
    canvas = torch.cat([part for line in lines for part in (line, gap)][:-1])
    return _picture(canvas.numpy(), title, subtitle, dark=dark)


def _columns(count: int) -> int:
    """About the root of a number, a divisor of it where there is one nearby."""
    least = math.ceil(math.sqrt(count))
    return next((c for c in range(least, int(2.5 * math.sqrt(count)) + 1) if count % c == 0), least)


GAP = 0.14  # the grey between images


def _images(x: Tensor) -> Tensor:
    """Rows as images `[n, 1, height, width]`, checked."""
    if x.dim() not in (2, 3) or not x.numel():
        raise ValueError(f"expected images [n, D] or [n, height, width] with n >= 1, got shape {tuple(x.shape)}")
    x = x.detach().to("cpu", torch.float64)
    if not bool(((x >= 0) & (x <= 1)).all()):  # a NaN is refused too
        raise ValueError(
            f"expected images with values in [0, 1], got values from {x.min():g} to {x.max():g}; divide grey levels by the "
            "largest possible (255), and clamp means that leave the range"
        )
    side = math.isqrt(x.shape[1])
    shape = x.shape[1:] if x.dim() == 3 else (side, side) if side * side == x.shape[1] else (1, x.shape[1])
    return x.reshape(len(x), 1, *shape)


def _tiles(images: Tensor, columns: int) -> Any:
    """Images `[n, 1, height, width]` as one, `[height, width]`, with gaps between them and none around."""
    try:
        from torchvision.utils import make_grid
    except (ImportError, RuntimeError) as error:  # RuntimeError: operator torchvision::nms does not exist
        raise ImportError(
            f"expected torchvision for grids of images, got {error!r}; if it is installed, the builds of torchvision and "
            f"torch {torch.__version__} do not match: install both from one index"
        ) from error
    grid = make_grid(images, nrow=columns if images.shape[2] > 1 else 1, padding=1, pad_value=GAP)[0]
    return (grid if len(images) == 1 else grid[1:-1, 1:-1]).numpy()


def _picture(canvas: Any, title: str, subtitle: str, *, dark: bool) -> Figure:
    """A figure around an image, every pixel of which takes the same whole number of dots at 160 dots an inch."""
    from matplotlib.figure import Figure

    look, margin, dots = look_of(dark=dark), 0.1, 160
    rows, wide = canvas.shape
    zoom = max(1, min(round(960 / wide), round(960 / rows), 14))
    across, down = wide * zoom / dots, rows * zoom / dots
    above = (0.72 if subtitle else 0.5) if title else margin
    least = 0.2 + 0.092 * max(len(title) * 1.2, len(subtitle) * 0.85) if title else 0.0
    width, height = max(across + 2 * margin, least), down + above + margin
    figure = Figure(figsize=(width, height), facecolor=look.paper)
    axes = figure.add_axes((margin / width, margin / height, across / width, down / height))
    axes.imshow(canvas, cmap="gray" if dark else "gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    if title:
        title_of(figure, look, title, subtitle)
    return figure
