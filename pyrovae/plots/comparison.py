"""The plots of a comparison: what each method says of itself beside what is true."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyrovae.compare import tie_factor
from pyrovae.plots.look import COLOURS, Look, end_labels, figure_of, fitted, look_of, number_of, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyrovae.compare import Comparison


def learning_curves(comparison: Comparison, *, dark: bool = False) -> Figure | None:
    """What each learner reports against seconds; log p(x) in black, bounds in colour. None where no learner has a bound.

    Args:
        comparison: one with a learning table.
        dark: for a dark page.
    """
    look = look_of(dark=dark)
    curves = {}
    for name, fit in comparison.fits.items():
        points = [(entry["seconds"], entry["bound"]) for entry in fit.history if entry["bound"] is not None]
        if len(points) > 1:
            curves[name] = points
    if not curves:
        return None
    figure, (axes,) = fitted(look, 8.4, 4.4)
    colours = _colours(comparison, look)
    best = max(value for points in curves.values() for _, value in points)
    worst_end = min(points[-1][1] for points in curves.values())
    lowest = min(value for points in curves.values() for _, value in points)
    floor = max(lowest - 0.05 * (best - lowest), worst_end - 1.6 * max(best - worst_end, 0.05))
    for name, points in curves.items():
        exact = comparison.fits[name].bound == "exact"
        axes.plot(*zip(*points, strict=True), color=colours[name], lw=2.2 if exact else 1.7, ls=_dashes(comparison, name))
        axes.plot(*points[-1], "o", ms=5, color=colours[name])
    axes.set_ylim(floor, best + 0.06 * (best - floor))
    axes.set_xlim(left=0)
    for name, points in curves.items():
        x, y = points[-1]
        axes.plot([x, axes.get_xlim()[1]], [y, y], color=colours[name], lw=0.8, ls=":", alpha=0.7, scalex=False, zorder=0)
    ends = {name: points[-1][1] for name, points in curves.items()}
    labels = {name: name if comparison.fits[name].bound == "exact" else f"{name} (bound)" for name in ends}
    end_labels(axes, ends, labels, colours)
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"{comparison.metadata['unit']}, training")
    bounded = any(comparison.fits[name].bound != "exact" for name in curves)
    title_of(
        figure,
        look,
        "What each method reports while it learns",
        f"{'white' if dark else 'black'}: exact log p(x);  colour: a bound of it" if bounded else "",
    )
    return figure


def learned(comparison: Comparison, *, dark: bool = False) -> Figure | None:
    """Exact log p(x) of what was learned, joined to the method's own bound; and paired differences on test rows.

    None where the exact values are not known.

    Args:
        comparison: one with a learning table.
        dark: for a dark page.
    """
    assert comparison.learning is not None
    rows = [row for row in comparison.learning.to_dict("records") if number_of(row["log_p_train"]) is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: row["log_p_train"])
    look, count = look_of(dark=dark), len(rows)
    paired = [row for row in rows if number_of(row["difference"]) is not None]
    panels = 2 if paired else 1
    figure, axes = figure_of(
        look, 9.6 if panels == 2 else 7.0, 1.7 + 0.42 * count, panels, left=0.17, right=0.97, ratios=(1.5, 1)[:panels]
    )
    colours = _colours(comparison, look)
    for y, row in enumerate(rows):
        name, exact, own = row["method"], row["log_p_train"], number_of(row["own_bound"])
        error = number_of(row["log_p_train_se"])
        if own is not None and own != exact:
            axes[0].plot([own, exact], [y, y], color=colours[name], lw=1.6, alpha=0.75, solid_capstyle="butt", zorder=1)
            axes[0].plot(own, y, "o", ms=8, mfc=look.paper, mec=colours[name], mew=1.6)
            if exact - own > 0.02 * _span(rows):
                axes[0].annotate(
                    f"{exact - own:.2f}", ((own + exact) / 2, y), (0, 5), textcoords="offset points", ha="center",
                    fontsize=8.5, color=look.soft,
                )  # fmt: skip
        axes[0].errorbar(exact, y, xerr=error, fmt="o", ms=8, color=colours[name], elinewidth=1.4, zorder=3)
    _name_rows(axes[0], [row["method"] for row in rows], colours)
    axes[0].set_xlabel(f"{comparison.metadata['unit']}, training\n●  exact log p(x)     ○  what the method reports")
    if panels == 2:
        reference = next(row["method"] for row in rows if row["difference"] != row["difference"] or row["difference"] is None)
        seeds = len(comparison.metadata["seeds"])
        factor = tie_factor(seeds)
        axes[1].axvline(0, color=look.soft, lw=1, ls=(0, (3, 3)))
        for y, row in enumerate(rows):
            difference, error = number_of(row["difference"]), number_of(row["difference_se"])
            if difference is None:
                axes[1].annotate(
                    "reference", (0, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=look.soft
                )
                continue
            axes[1].errorbar(
                difference,
                y,
                xerr=None if error is None else factor * error,
                fmt="o",
                ms=6.5,
                color=colours[row["method"]],
                elinewidth=1.4,
            )
        axes[1].set_yticks([])
        axes[1].set_ylim(*axes[0].get_ylim())
        where = "test" if comparison.metadata.get("test_rows") is not None else "training"
        axes[1].set_xlabel(
            f"difference to {reference}, {where}\npaired, ± {factor:.3g} s.e. over {'seeds' if seeds > 1 else 'rows'}"
        )
        low, high = axes[1].get_xlim()
        axes[1].set_xlim(low, max(high, 0.22 * (0 - low)))
    title_of(
        figure, look, "What was learned, and what the method says it learned", "the line between them is its error about itself"
    )
    return figure


def inference_errors(comparison: Comparison, *, dark: bool = False) -> Figure | None:
    """Gap of the evidence and largest marginal error of each inference method, on log scales; None without a reference.

    Args:
        comparison: one with an inference table.
        dark: for a dark page.
    """
    assert comparison.inference is not None
    rows = comparison.inference.to_dict("records")
    if comparison.reference is None:
        return None
    rows.sort(key=lambda row: -(number_of(row["marginal_error"]) or 0.0))
    look = look_of(dark=dark)
    figure, axes = figure_of(look, 9.6, 1.7 + 0.42 * len(rows), 2, left=0.15, right=0.97, ratios=(1, 1))
    colours = _colours(comparison, look)
    columns = (
        ("gap", "gap_se", f"log p(x) minus what it reports, {comparison.metadata['unit']}"),
        ("marginal_error", None, "largest error of a marginal"),
    )
    for panel, (column, stderr, label) in zip(axes, columns, strict=True):
        values = [number_of(row[column]) for row in rows]
        positive = [value for value in values if value is not None and value > 1e-9]
        floor = 10 ** (math.floor(math.log10(min(positive, default=1e-3))) - 0.7)
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter("")  # within one decade the labels between would overlap
        panel.set_xlim(floor, 2.5 * max(positive, default=1.0))
        for y, (row, value) in enumerate(zip(rows, values, strict=True)):
            if value is None:
                _say(panel, floor, y, "gives no evidence" if column == "gap" else "gives none", look)
            elif abs(value) <= 1e-9:
                _say(panel, floor, y, "0: exact" if row["bound"] == "exact" else "0", look, colours[row["method"]])
            elif value < 0:
                _say(panel, floor, y, f"{value:.1e}: within its noise", look)
            else:
                error = None if stderr is None else number_of(row[stderr])
                panel.plot([floor, value], [y, y], color=colours[row["method"]], lw=1, alpha=0.35)
                spread = None if not error else [[min(2 * error, 0.999 * value - floor * 0.5)], [2 * error]]
                panel.errorbar(value, y, xerr=spread, fmt="o", ms=8, color=colours[row["method"]], elinewidth=1.6)
                panel.annotate(
                    f"{value:.2g}", (value, y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5, color=look.soft
                )
        panel.set_xlabel(label)
        panel.set_ylim(-0.6, len(rows) - 0.35)
    _name_rows(axes[0], [row["method"] for row in rows], colours)
    axes[1].set_yticks([])
    axes[0].set_ylim(-0.6, len(rows) - 0.35)
    title_of(figure, look, "How wrong each inference method is", "one model, judged by exact enumeration; left is better")
    return figure


def marginals(comparison: Comparison, *, dark: bool = False, most: int = 4000) -> Figure | None:
    """Each method's marginals against the exact ones, one panel a method; None without a reference.

    Args:
        comparison: one with an inference table.
        dark: for a dark page.
        most: points drawn of each method, evenly taken.
    """
    reference = comparison.reference
    names = [name for name, posterior in comparison.posteriors.items() if posterior.bound != "exact"]
    if reference is None or not names:
        return None
    look = look_of(dark=dark)
    wide = min(len(names), 5)
    tall = math.ceil(len(names) / wide)
    width, left = max(4.2, 0.7 + 1.95 * wide), 0.08 if wide > 2 else 0.16
    figure, axes = figure_of(look, width, 1.2, wide, tall, left=left, right=0.985, square=0.6)
    colours = _colours(comparison, look)
    for panel, name in zip(axes, names, strict=False):
        pairs = [
            (exact.reshape(-1), comparison.posteriors[name].marginals[site].reshape(-1))
            for site, exact in reference.marginals.items()
            if site in comparison.posteriors[name].marginals
        ]
        exact, found = (torch.cat(parts).detach().cpu() for parts in zip(*pairs, strict=True))
        step = max(1, len(exact) // most)
        panel.plot([0, 1], [0, 1], color=look.soft, lw=0.8, ls=(0, (3, 3)))
        panel.scatter(exact[::step], found[::step], s=5, color=colours[name], alpha=0.35, lw=0)
        panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[0, 1], yticks=[0, 1], aspect="equal")
        rms = float((exact - found).square().mean().sqrt())
        panel.set_title(f"{name}", fontsize=10.5, color=colours[name], loc="left", pad=16, fontweight="bold")
        panel.annotate(
            f"r.m.s. error {rms:.2g}", (0, 1), (0, 5), "axes fraction", "offset points", fontsize=8.5, color=look.soft
        )
    for panel in axes[len(names) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("method's marginal")
    axes[0].set_xlabel("exact marginal")
    title_of(figure, look, "Marginals of each latent unit and row", "on the diagonal nothing is wrong")
    return figure


def _colours(comparison: Comparison, look: Look) -> dict[str, str]:
    """A colour a method: ink for the exact ones."""
    exact = {name for name, fit in comparison.fits.items() if fit.bound == "exact"}
    exact |= {name for name, posterior in comparison.posteriors.items() if posterior.bound == "exact"}
    names = [*comparison.fits, *comparison.posteriors]
    others = [name for name in names if name not in exact]
    return {name: look.ink if name in exact else COLOURS[others.index(name) % len(COLOURS)] for name in names}


def _dashes(comparison: Comparison, name: str) -> Any:
    """Solid, but for the second and later exact lines, which would hide one another."""
    exact = [label for label, fit in comparison.fits.items() if fit.bound == "exact"]
    return (0, (4, 2)) if name in exact[1:] else "-"


def _name_rows(axes: Axes, names: Sequence[str], colours: Mapping[str, str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.35)
    axes.tick_params(axis="y", length=0, labelsize=10)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(colours[name])


def _say(axes: Axes, x: float, y: float, words: str, look: Look, colour: str | None = None) -> None:
    axes.annotate(words, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=9, color=colour or look.soft)


def _span(rows: Sequence[Mapping[Any, Any]]) -> float:
    ends = [
        value for row in rows for value in (number_of(row["log_p_train"]), number_of(row["own_bound"])) if value is not None
    ]
    return max(ends) - min(ends)
