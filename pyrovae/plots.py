"""The plots of a comparison, and the pictures of a trained model: what each says of itself beside what is true.

Every function returns a matplotlib `Figure` made without pyplot: no window, no global state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pyrovae.compare import tie_factor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyrovae.compare import Comparison
    from pyrovae.diagnostics import TemperatureCurve

# Okabe and Ito's colours, told apart by colour-blind readers; https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7A5195")


@dataclass(frozen=True)
class _Look:
    """Colours of a page, light or dark."""

    ink: str
    soft: str
    line: str
    paper: str


Curve = Literal["unrelaxed", "bound", "loss"]
SILENT = 0.01  # nats of KL beneath which a latent says nothing of the data
RELAXED = "relaxed objective (no bound of log p(x))"

_LIGHT = _Look(ink="#1c1e21", soft="#5b6168", line="#d8dce0", paper="#ffffff")
_DARK = _Look(ink="#e6e8ea", soft="#a3aab2", line="#3a3f45", paper="#16181b")


def learning_curves(comparison: Comparison, *, dark: bool = False) -> Figure | None:
    """What each learner reports against seconds; log p(x) in black, bounds in colour. None where no learner has a bound.

    Args:
        comparison: one with a learning table.
        dark: for a dark page.
    """
    look = _look(dark=dark)
    curves = {}
    for name, fit in comparison.fits.items():
        points = [(entry["seconds"], entry["bound"]) for entry in fit.history if entry["bound"] is not None]
        if len(points) > 1:
            curves[name] = points
    if not curves:
        return None
    figure, (axes,) = _fitted(look, 8.4, 4.4)
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
    _end_labels(axes, ends, labels, colours)
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"{comparison.metadata['unit']}, training")
    bounded = any(comparison.fits[name].bound != "exact" for name in curves)
    _title(
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
    rows = [row for row in comparison.learning.to_dict("records") if _number(row["log_p_train"]) is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: row["log_p_train"])
    look, count = _look(dark=dark), len(rows)
    paired = [row for row in rows if _number(row["difference"]) is not None]
    panels = 2 if paired else 1
    figure, axes = _figure(
        look, 9.6 if panels == 2 else 7.0, 1.7 + 0.42 * count, panels, left=0.17, right=0.97, ratios=(1.5, 1)[:panels]
    )
    colours = _colours(comparison, look)
    for y, row in enumerate(rows):
        name, exact, own = row["method"], row["log_p_train"], _number(row["own_bound"])
        error = _number(row["log_p_train_se"])
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
            difference, error = _number(row["difference"]), _number(row["difference_se"])
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
    _title(
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
    rows.sort(key=lambda row: -(_number(row["marginal_error"]) or 0.0))
    look = _look(dark=dark)
    figure, axes = _figure(look, 9.6, 1.7 + 0.42 * len(rows), 2, left=0.15, right=0.97, ratios=(1, 1))
    colours = _colours(comparison, look)
    columns = (
        ("gap", "gap_se", f"log p(x) minus what it reports, {comparison.metadata['unit']}"),
        ("marginal_error", None, "largest error of a marginal"),
    )
    for panel, (column, stderr, label) in zip(axes, columns, strict=True):
        values = [_number(row[column]) for row in rows]
        positive = [value for value in values if value is not None and value > 1e-9]
        floor = 10 ** (math.floor(math.log10(min(positive, default=1e-3))) - 0.7)
        panel.set_xscale("log")
        panel.set_xlim(floor, 2.5 * max(positive, default=1.0))
        for y, (row, value) in enumerate(zip(rows, values, strict=True)):
            if value is None:
                _say(panel, floor, y, "gives no evidence" if column == "gap" else "gives none", look)
            elif abs(value) <= 1e-9:
                _say(panel, floor, y, "0: exact" if row["bound"] == "exact" else "0", look, colours[row["method"]])
            elif value < 0:
                _say(panel, floor, y, f"{value:.1e}: within its noise", look)
            else:
                error = None if stderr is None else _number(row[stderr])
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
    _title(figure, look, "How wrong each inference method is", "one net, judged by exact enumeration; left is better")
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
    look = _look(dark=dark)
    wide = min(len(names), 5)
    tall = math.ceil(len(names) / wide)
    width, left = max(4.2, 0.7 + 1.95 * wide), 0.08 if wide > 2 else 0.16
    figure, axes = _figure(look, width, 1.2, wide, tall, left=left, right=0.985, square=0.6)
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
    _title(figure, look, "Marginals of each latent unit and row", "on the diagonal nothing is wrong")
    return figure


def samples_grid(samples: Mapping[str, Tensor], *, dark: bool = False, columns: int = 4, most: int = 16) -> Figure:
    """Rows of data and of draws as images, one block a name.

    Args:
        samples: rows in [0, 1] `[n, D]` by name; images where D is a square, strips where it is not.
        dark: for a dark page.
        columns: images side by side in a block.
        most: images of a block.
    """
    look = _look(dark=dark)
    wide = min(len(samples), 7)
    tall = math.ceil(len(samples) / wide)
    figure, axes = _figure(look, max(3.0, 1.35 * wide + 0.2), 0.7, wide, tall, left=0.015, right=0.985, square=0.1)
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
    _title(figure, look, "Data, and what each learned net draws", "")
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


def training_curve(
    history: Sequence[Mapping[str, Any]],
    *,
    steps_per_epoch: int = 1,
    what: Curve = "unrelaxed",
    normalized: bool = True,
    dark: bool = False,
) -> Figure | None:
    """The bound (or the loss) while a model trains, on training and on validation rows. None with fewer than two records.

    Args:
        history: records with `step`, `bound` and `validation`, as of a `Fit`; values that are None or not finite are left out.
        steps_per_epoch: of the horizontal axis.
        what: "unrelaxed" of a model with discrete latents, "bound" of one without, "loss" of an autoencoder, whose records
            are minus its loss.
        normalized: whether it is a bound of a log probability; a score otherwise.
        dark: for a dark page.
    """
    look, sign = _look(dark=dark), -1.0 if what == "loss" else 1.0
    kept = {
        "training rows": ("bound", _COLOURS[0]),
        "validation rows": ("validation", _COLOURS[1]),
    }
    curves = {}
    for name, (key, _) in kept.items():
        values = [(entry["step"] / steps_per_epoch, _number(entry.get(key))) for entry in history]
        points = [(x, sign * y) for x, y in values if y is not None and math.isfinite(y)]
        if len(points) > 1:
            curves[name] = points
    if not curves:
        return None
    figure, (axes,) = _fitted(look, 8.4, 4.2)
    colours = {name: colour for name, (_, colour) in kept.items()}
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), color=colours[name], lw=1.9, marker="o", ms=3)
    pick = min if sign < 0 else max
    best = pick(y for points in curves.values() for _, y in points)
    early = (max if sign < 0 else min)(points[len(points) // 10][1] for points in curves.values())
    span = max(abs(best - early), 0.05)
    axes.set_ylim(sorted((early - sign * 0.05 * span, best + sign * 0.06 * span)))
    axes.set_xlim(left=0)
    _end_labels(axes, {name: points[-1][1] for name, points in curves.items()}, {name: name for name in curves}, colours)
    axes.set_xlabel("step" if steps_per_epoch == 1 else "epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("nats per datum")
    if what == "loss":
        _title(figure, look, "The loss while training", "cross-entropy of the reconstructions")
        return figure
    name, how = ("unrelaxed ", "hard samples, KL weight 1") if what == "unrelaxed" else ("", "KL weight 1")
    if normalized:
        _title(figure, look, f"The {name}ELBO while training", f"{how}: a lower bound of log p(x), in expectation")
    else:
        _title(figure, look, f"The {name}score while training", "cross-entropy and KL: no bound of any log p(x)")
    return figure


def temperature_curve(curve: TemperatureCurve, *, normalized: bool = True, dark: bool = False) -> Figure:
    """The relaxed objective at each temperature beside the unrelaxed ELBO, which has none; beneath, their paired difference.

    Args:
        curve: of :func:`pyrovae.diagnostics.temperature_curve`.
        normalized: whether the unrelaxed one is a bound of a log probability; a score otherwise.
        dark: for a dark page.
    """
    look = _look(dark=dark)
    figure, (axes, below) = _fitted(look, 8.4, 5.4, rows=2, ratios=(1.6, 1))
    order = curve.temperatures.argsort()
    x, relaxed, gap, error = (
        [float(v) for v in part[order]] for part in (curve.temperatures, curve.relaxed, curve.gap, curve.gap_stderr)
    )
    hard = "unrelaxed ELBO (≥)" if normalized else "unrelaxed score"
    colours = {hard: _COLOURS[0], RELAXED: _COLOURS[1]}
    for panel in (axes, below):
        panel.set_xscale("log")
        panel.set_xticks(x, [f"{value:g}" for value in x])
        panel.minorticks_off()
        panel.set_xlim(x[0] / 1.15 if len(x) > 1 else x[0] / 2, x[-1] * 1.15 if len(x) > 1 else x[0] * 2)
        panel.ticklabel_format(axis="y", useOffset=False)
    axes.plot(x, [curve.hard] * len(x), color=colours[hard], lw=3.2, solid_capstyle="round")
    axes.plot(x, relaxed, color=colours[RELAXED], lw=1.6, marker="o", ms=5)
    ends = [value for value in (*relaxed, curve.hard) if math.isfinite(value)]
    room = max(0.14 * (max(ends) - min(ends)), 0.6 * _finite(curve.hard_stderr), 1e-3)
    axes.set_ylim(min(ends) - room, max(ends) + room)
    _end_labels(
        axes, {hard: curve.hard, RELAXED: relaxed[-1]}, {hard: hard, RELAXED: RELAXED.replace(" (", "\n(")}, colours, least=0.14
    )
    axes.set_ylabel("nats per datum")
    below.axhline(0, color=_COLOURS[0], lw=1.6)
    bars = [2 * _finite(e) for e in error]
    below.errorbar(x, gap, yerr=bars, fmt="o", ms=5, color=_COLOURS[1], elinewidth=1.5, capsize=3)
    for place, value, bar in zip(x, gap, bars, strict=True):
        text = f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.2g}"
        below.annotate(
            text.replace("-", "−"), (place, value + bar), (0, 4), textcoords="offset points",
            ha="center", fontsize=8.5, color=look.soft,
        )  # fmt: skip
    low, high = below.get_ylim()
    below.set_ylim(low, high + 0.22 * (high - low))
    below.set_ylabel("nats per datum")
    below.annotate(
        "relaxed − unrelaxed,\nrow by row, ± 2 s.e.", (1, 0.5), (6, 0), "axes fraction", "offset points", va="center",
        fontsize=9.5, color=_COLOURS[1], annotation_clip=False,
    )  # fmt: skip
    axes.tick_params(labelbottom=False)
    below.set_xlabel("temperature")
    about = "only the blue line bounds log p(x) from below, in expectation" if normalized else "neither bounds any log p(x)"
    _title(
        figure, look, "Relaxed objective and unrelaxed " + ("ELBO" if normalized else "score"), f"one trained model; {about}"
    )
    return figure


def latents(
    kl: Mapping[str, Tensor],
    usage: Mapping[str, Tensor] | None = None,
    *,
    values: Mapping[str, int] | None = None,
    dark: bool = False,
) -> Figure:
    """KL(q ‖ p) of every latent as bars, and how many of its values a discrete latent uses; grey where a latent is `SILENT`.

    Args:
        kl: by site, `[components]`, averaged over the data. Of steps (`z_1`, `z_2`, …), and of more than 5 sites, each site is
            one bar.
        usage: by discrete site, `[components]`, the perplexity of q(z) averaged over the data.
        values: by discrete site, the number of its values.
        dark: for a dark page.
    """
    look, usage, values = _look(dark=dark), usage or {}, values or {}
    rows = {name: [float(v) for v in part.reshape(-1)] for name, part in kl.items()}
    steps = are_steps(list(rows))
    if steps or len(rows) > 5:
        names, rows, usage = list(rows), {"total KL of a site": [sum(part) for part in rows.values()]}, {}
    both = any(name in usage for name in rows)
    figure, panels = _fitted(
        look, 9.6, 1.0 + 2.1 * len(rows), 2 if both else 1, len(rows), whole=[n not in usage for n in rows]
    )
    remaining = iter(panels)
    for name, bars in rows.items():
        silent = [value < SILENT for value in bars]
        panel = next(remaining)
        _bars(panel, bars, silent, _COLOURS[0], look)
        panel.set_ylabel(f"{name}, nats" if steps or name.startswith("total") else f"{name}: KL(q ‖ p), nats")
        panel.set_ylim(0, 1.06 * max([0.05, *bars]))
        panel.set_xlabel("step" if steps else "site, in order" if name.startswith("total") else "latent")
        if steps and len(names) <= 12:
            panel.set_xticks(range(len(names)), names)
            panel.set_xlabel("")
        if name in usage:
            panel, used = next(remaining), [float(v) for v in usage[name].reshape(-1)]
            _bars(panel, used, silent, _COLOURS[2], look, hollow=True)
            panel.set_ylabel(f"{name}: values in use")
            panel.set_xlabel("latent")
            panel.set_ylim(0, 1.06 * max([values.get(name, 0), 1, *used]))
            if name in values:
                panel.axhline(values[name], color=look.soft, lw=1, ls=(0, (3, 3)))
    about = (
        [f"grey{' or hollow' * both}: says nothing of the data, KL < {SILENT:g} nats"]
        if any(v < SILENT for b in rows.values() for v in b)
        else []
    )
    about = ["total of its latents, averaged over the data", *about] if steps else about
    about += ["dashed: the number of values; one in use: stuck at it"] if both else []
    _title(
        figure,
        look,
        "What each step says about an image" if steps else "What each latent says about an image",
        "; ".join(about),
    )
    return figure


# --- Looks -----------------------------------------------------------------------------------------------------------


def are_steps(names: Sequence[str]) -> bool:
    """Whether sites are the steps of one latent, `z_1`, `z_2` and so on."""
    found = [re.fullmatch(r"(.*)_(\d+)", name) for name in names]
    return len(names) > 1 and all(found) and len({match[1] for match in found if match}) == 1


def _look(*, dark: bool) -> _Look:
    return _DARK if dark else _LIGHT


def _figure(
    look: _Look,
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


def _fitted(
    look: _Look,
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


def _style(axes: Sequence[Any], look: _Look) -> None:
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


def _title(figure: Figure, look: _Look, title: str, subtitle: str) -> None:
    height = figure.get_figheight()
    figure.text(0.015, 1 - 0.12 / height, title, fontsize=12.5, fontweight="bold", color=look.ink, va="top")
    figure.text(0.015, 1 - 0.38 / height, subtitle, fontsize=9.5, color=look.soft, va="top")


def _colours(comparison: Comparison, look: _Look) -> dict[str, str]:
    """A colour a method: ink for the exact ones."""
    exact = {name for name, fit in comparison.fits.items() if fit.bound == "exact"}
    exact |= {name for name, posterior in comparison.posteriors.items() if posterior.bound == "exact"}
    names = [*comparison.fits, *comparison.posteriors]
    others = [name for name in names if name not in exact]
    return {name: look.ink if name in exact else _COLOURS[others.index(name) % len(_COLOURS)] for name in names}


def _dashes(comparison: Comparison, name: str) -> Any:
    """Solid, but for the second and later exact lines, which would hide one another."""
    exact = [label for label, fit in comparison.fits.items() if fit.bound == "exact"]
    return (0, (4, 2)) if name in exact[1:] else "-"


def _end_labels(
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


def _name_rows(axes: Axes, names: Sequence[str], colours: Mapping[str, str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.35)
    axes.tick_params(axis="y", length=0, labelsize=10)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(colours[name])


def _bars(
    axes: Axes, heights: Sequence[float], silent: Sequence[bool], colour: str, look: _Look, *, hollow: bool = False
) -> None:
    """Grey, or hollow, where silent. A bar a latent, numbered from 1; few bars are no wider than one of five."""
    count = len(heights)
    edges = [look.line if quiet else colour for quiet in silent]
    faces = [look.paper if quiet and hollow else edge for quiet, edge in zip(silent, edges, strict=True)]
    axes.bar(range(count), heights, color=faces, edgecolor=edges, linewidth=0.8, width=0.8 if count < 60 else 1.0)
    step = max(1, math.ceil(count / 12))
    axes.set_xticks(range(0, count, step), [str(k + 1) for k in range(0, count, step)])
    middle, half = (count - 1) / 2, max(count / 2 + 0.2, 2.5)
    axes.set_xlim(middle - half, middle + half)


def _columns(count: int) -> int:
    """About the root of a number, a divisor of it where there is one nearby."""
    least = math.ceil(math.sqrt(count))
    return next((c for c in range(least, int(2.5 * math.sqrt(count)) + 1) if count % c == 0), least)


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0


def _say(axes: Axes, x: float, y: float, words: str, look: _Look, colour: str | None = None) -> None:
    axes.annotate(words, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=9, color=colour or look.soft)


def _span(rows: Sequence[Mapping[Any, Any]]) -> float:
    ends = [value for row in rows for value in (_number(row["log_p_train"]), _number(row["own_bound"])) if value is not None]
    return max(ends) - min(ends)


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


_GAP = 0.14  # the grey between images


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
    grid = make_grid(images, nrow=columns if images.shape[2] > 1 else 1, padding=1, pad_value=_GAP)[0]
    return (grid if len(images) == 1 else grid[1:-1, 1:-1]).numpy()


def _picture(canvas: Any, title: str, subtitle: str, *, dark: bool) -> Figure:
    """A figure around an image, every pixel of which takes the same whole number of dots at 160 dots an inch."""
    from matplotlib.figure import Figure

    look, margin, dots = _look(dark=dark), 0.1, 160
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
        _title(figure, look, title, subtitle)
    return figure
