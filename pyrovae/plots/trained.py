"""The plots of one trained model: its training, its bound over temperatures, what its latents say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pyrovae.plots.look import COLOURS, Look, end_labels, finite, fitted, look_of, number_of, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from pyrovae.diagnostics import TemperatureCurve

Curve = Literal["unrelaxed", "bound", "loss"]
SILENT = 0.01  # nats of KL beneath which a latent says nothing of the data
RELAXED = "relaxed objective (no bound of log p(x))"


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
    look, sign = look_of(dark=dark), -1.0 if what == "loss" else 1.0
    kept = {
        "training rows": ("bound", COLOURS[0]),
        "validation rows": ("validation", COLOURS[1]),
    }
    curves = {}
    for name, (key, _) in kept.items():
        values = [(entry["step"] / steps_per_epoch, number_of(entry.get(key))) for entry in history]
        points = [(x, sign * y) for x, y in values if y is not None and math.isfinite(y)]
        if len(points) > 1:
            curves[name] = points
    if not curves:
        return None
    figure, (axes,) = fitted(look, 8.4, 4.2)
    colours = {name: colour for name, (_, colour) in kept.items()}
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), color=colours[name], lw=1.9, marker="o", ms=3)
    pick = min if sign < 0 else max
    best = pick(y for points in curves.values() for _, y in points)
    early = (max if sign < 0 else min)(points[len(points) // 10][1] for points in curves.values())
    span = max(abs(best - early), 0.05)
    axes.set_ylim(sorted((early - sign * 0.05 * span, best + sign * 0.06 * span)))
    axes.set_xlim(left=0)
    end_labels(axes, {name: points[-1][1] for name, points in curves.items()}, {name: name for name in curves}, colours)
    axes.set_xlabel("step" if steps_per_epoch == 1 else "epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("nats per datum")
    if what == "loss":
        title_of(figure, look, "The loss while training", "cross-entropy of the reconstructions")
        return figure
    name, how = ("unrelaxed ", "hard samples, KL weight 1") if what == "unrelaxed" else ("", "KL weight 1")
    if normalized:
        title_of(figure, look, f"The {name}ELBO while training", f"{how}: a lower bound of log p(x), in expectation")
    else:
        title_of(figure, look, f"The {name}score while training", "cross-entropy and KL: no bound of any log p(x)")
    return figure


def temperature_curve(curve: TemperatureCurve, *, normalized: bool = True, dark: bool = False) -> Figure:
    """The relaxed objective at each temperature beside the unrelaxed ELBO, which has none; beneath, their paired difference.

    Args:
        curve: of :func:`pyrovae.diagnostics.temperature_curve`.
        normalized: whether the unrelaxed one is a bound of a log probability; a score otherwise.
        dark: for a dark page.
    """
    look = look_of(dark=dark)
    figure, (axes, below) = fitted(look, 8.4, 5.4, rows=2, ratios=(1.6, 1))
    order = curve.temperatures.argsort()
    x, relaxed, gap, error = (
        [float(v) for v in part[order]] for part in (curve.temperatures, curve.relaxed, curve.gap, curve.gap_stderr)
    )
    hard = "unrelaxed ELBO (≥)" if normalized else "unrelaxed score"
    colours = {hard: COLOURS[0], RELAXED: COLOURS[1]}
    for panel in (axes, below):
        panel.set_xscale("log")
        panel.set_xticks(x, [f"{value:g}" for value in x])
        panel.minorticks_off()
        panel.set_xlim(x[0] / 1.15 if len(x) > 1 else x[0] / 2, x[-1] * 1.15 if len(x) > 1 else x[0] * 2)
        panel.ticklabel_format(axis="y", useOffset=False)
    axes.plot(x, [curve.hard] * len(x), color=colours[hard], lw=3.2, solid_capstyle="round")
    axes.plot(x, relaxed, color=colours[RELAXED], lw=1.6, marker="o", ms=5)
    ends = [value for value in (*relaxed, curve.hard) if math.isfinite(value)]
    room = max(0.14 * (max(ends) - min(ends)), 0.6 * finite(curve.hard_stderr), 1e-3)
    axes.set_ylim(min(ends) - room, max(ends) + room)
    end_labels(
        axes, {hard: curve.hard, RELAXED: relaxed[-1]}, {hard: hard, RELAXED: RELAXED.replace(" (", "\n(")}, colours, least=0.14
    )
    axes.set_ylabel("nats per datum")
    below.axhline(0, color=COLOURS[0], lw=1.6)
    bars = [2 * finite(e) for e in error]
    below.errorbar(x, gap, yerr=bars, fmt="o", ms=5, color=COLOURS[1], elinewidth=1.5, capsize=3)
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
        fontsize=9.5, color=COLOURS[1], annotation_clip=False,
    )  # fmt: skip
    axes.tick_params(labelbottom=False)
    below.set_xlabel("temperature")
    about = "only the blue line bounds log p(x) from below, in expectation" if normalized else "neither bounds any log p(x)"
    title_of(
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
    look, usage, values = look_of(dark=dark), usage or {}, values or {}
    rows = {name: [float(v) for v in part.reshape(-1)] for name, part in kl.items()}
    steps = are_steps(list(rows))
    if steps or len(rows) > 5:
        names, rows, usage = list(rows), {"total KL of a site": [sum(part) for part in rows.values()]}, {}
    both = any(name in usage for name in rows)
    figure, panels = fitted(look, 9.6, 1.0 + 2.1 * len(rows), 2 if both else 1, len(rows), whole=[n not in usage for n in rows])
    remaining = iter(panels)
    for name, bars in rows.items():
        silent = [value < SILENT for value in bars]
        panel = next(remaining)
        _bars(panel, bars, silent, COLOURS[0], look)
        panel.set_ylabel(f"{name}, nats" if steps or name.startswith("total") else f"{name}: KL(q ‖ p), nats")
        panel.set_ylim(0, 1.06 * max([0.05, *bars]))
        panel.set_xlabel("step" if steps else "site, in order" if name.startswith("total") else "latent")
        if steps and len(names) <= 12:
            panel.set_xticks(range(len(names)), names)
            panel.set_xlabel("")
        if name in usage:
            panel, used = next(remaining), [float(v) for v in usage[name].reshape(-1)]
            _bars(panel, used, silent, COLOURS[2], look, hollow=True)
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
    title_of(
        figure,
        look,
        "What each step says about an image" if steps else "What each latent says about an image",
        "; ".join(about),
    )
    return figure


def are_steps(names: Sequence[str]) -> bool:
    """Whether sites are the steps of one latent, `z_1`, `z_2` and so on."""
    found = [re.fullmatch(r"(.*)_(\d+)", name) for name in names]
    return len(names) > 1 and all(found) and len({match[1] for match in found if match}) == 1


def _bars(
    axes: Axes, heights: Sequence[float], silent: Sequence[bool], colour: str, look: Look, *, hollow: bool = False
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
