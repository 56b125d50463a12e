"""How every figure looks: colours for light and dark pages, frames, titles, labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7A5195")


@dataclass(frozen=True)
class Look:
    """Colours of a page, light or dark."""

    ink: str
    soft: str
    line: str
    paper: str


LIGHT = Look(ink="#1c1e21", soft="#5b6168", line="#d8dce0", paper="#ffffff")
DARK = Look(ink="#e6e8ea", soft="#a3aab2", line="#3a3f45", paper="#16181b")


def look_of(*, dark: bool) -> Look:
    """The colours of a light or a dark page."""
    return DARK if dark else LIGHT


def figure_of(
    look: Look,
    width: float,
    height: float,
    columns: int = 1,
    rows: int = 1,
    *,
    left: float = 0.09,
    right: float = 0.97,
    ratios: Sequence[float] | None = None,
    square: float | None = None,
) -> tuple[Figure, list[Any]]:
    """A figure with room for a title of two lines, and its axes in reading order.

    With `square`, panels are square: `height` is the room above them and `square` that below, in inches.
    """
    from matplotlib.figure import Figure

    above, below, gap = 0.72, 0.62, 0.09  # inches, inches, panel widths
    if square is not None:
        above, below, gap = height, square, 0.22
        side = (right - left) * width / (columns + gap * (columns - 1))
        height = above + below + side * (rows + 0.5 * (rows - 1))
    figure = Figure(figsize=(width, height), facecolor=look.paper)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left,
        right=right,
        top=1 - above / height,
        bottom=below / height,
        width_ratios=ratios,
        wspace=gap,
        hspace=0.5,
    )
    axes = [figure.add_subplot(grid[i, j]) for i in range(rows) for j in range(columns)]
    _style(axes, look)
    return figure, axes


def fitted(
    look: Look,
    width: float,
    height: float,
    columns: int = 1,
    rows: int = 1,
    *,
    ratios: Sequence[float] | None = None,
    whole: Sequence[bool] = (),
) -> tuple[Figure, list[Any]]:
    """A figure whose panels take what room their labels leave, beneath a title of two lines; axes in reading order.

    Where `whole` says so, a row of two panels is one panel over its whole width.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=look.paper)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.68 / height), w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.0)
    grid = figure.add_gridspec(rows, columns, height_ratios=ratios)
    axes = []
    for i in range(rows):
        spans = [slice(None)] if columns > 1 and i < len(whole) and whole[i] else list(range(columns))
        axes += [figure.add_subplot(grid[i, span]) for span in spans]
    _style(axes, look)
    return figure, axes


def _style(axes: Sequence[Any], look: Look) -> None:
    for panel in axes:
        panel.set_facecolor(look.paper)
        panel.tick_params(colors=look.soft, labelsize=9, length=3)
        panel.xaxis.label.set_color(look.soft)
        panel.yaxis.label.set_color(look.soft)
        panel.xaxis.label.set_fontsize(9.5)
        panel.yaxis.label.set_fontsize(9.5)
        for edge, spine in panel.spines.items():
            spine.set_color(look.line)
            spine.set_visible(edge in ("left", "bottom"))


def title_of(figure: Figure, look: Look, title: str, subtitle: str) -> None:
    """Write a title of two lines above a figure."""
    height = figure.get_figheight()
    figure.text(0.015, 1 - 0.12 / height, title, fontsize=12.5, fontweight="bold", color=look.ink, va="top")
    figure.text(0.015, 1 - 0.38 / height, subtitle, fontsize=9.5, color=look.soft, va="top")


def end_labels(
    axes: Axes, ends: Mapping[str, float], labels: Mapping[str, str], colours: Mapping[str, str], *, least: float = 0.062
) -> None:
    """Names at the right of the lines' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    least *= high - low
    order = sorted(ends, key=lambda name: ends[name], reverse=True)
    places: list[float] = []
    for name in order:
        places.append(min(ends[name], places[-1] - least) if places else min(ends[name], high))
    overflow = low + 0.02 * (high - low) - places[-1]
    if overflow > 0:
        places = [max(place, low + 0.02 * (high - low) + least * (len(places) - 1 - i)) for i, place in enumerate(places)]
    right = axes.get_xlim()[1]
    for name, place in zip(order, places, strict=True):
        axes.annotate(
            labels[name],
            (right, place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=colours[name],
            annotation_clip=False,
        )


def finite(value: float) -> float:
    """A value, or 0 where it is none."""
    return float(value) if math.isfinite(value) else 0.0


def number_of(value: Any) -> float | None:
    """A cell of a table as a number; None where it is blank."""
    return None if value is None or value != value else float(value)
