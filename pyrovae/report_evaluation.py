"""An evaluation as tables, files and one HTML page: what was optimised beside what holds."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.report import DPI, Cell, Mark, Table, html_facts, html_picture, html_table, number, page, plain, staged

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from pyrovae.diagnostics import Evaluation, TemperatureCurve


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """What a page shows of one trained model.

    Attributes:
        title: of the page.
        facts: settings and versions, names to text.
        evaluation: the numbers; None where there are none but `loss` (an autoencoder).
        loss: of each datum, `[rows]`, where there is no evaluation.
        temperature: of the relaxed bound in `evaluation`.
        curve: the bounds against the temperature.
        values: number of values of each discrete site.
        history: records of the training.
        steps_per_epoch: of that history.
        data: images `[n, D]` in [0, 1].
        reconstructions: of these, likewise.
        samples: draws from the prior, likewise.
        notes: sentences for the reader.
    """

    title: str
    facts: Mapping[str, Any]
    evaluation: Evaluation | None = None
    loss: Tensor | None = None
    temperature: float | None = None
    curve: TemperatureCurve | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    steps_per_epoch: int = 1
    data: Tensor | None = None
    reconstructions: Tensor | None = None
    samples: Tensor | None = None
    notes: tuple[str, ...] = ()


def evaluation_tables(judged: Judged) -> list[Table]:
    """The bounds, and what the latents are used for, as printed text with every number marked."""
    found = judged.evaluation
    if found is None:
        assert judged.loss is not None
        error = float(judged.loss.double().std() / len(judged.loss) ** 0.5)
        words = "cross-entropy of the reconstruction: a loss, no likelihood and no bound"
        row = (Cell("reconstruction error"), Cell(number(float(judged.loss.mean()), error), "estimate"), Cell(words))
        return [
            Table("evaluation", (("method", "quantity"), ("value", "mean over rows"), ("note", "note")), (row,), _unit(judged))
        ]
    tables = [_bounds(judged, found)]
    if judged.curve is not None:
        tables.append(_curve(judged.curve, "lower" if found.normalized else "estimate"))
    if found.kl:
        tables.append(_latents(found, judged.values))
    return tables


def write_evaluation(judged: Judged, folder: str | Path) -> Path:
    """Write `report.html`, `evaluation.json`, `evaluation.csv` (a row a datum) and the plots; all of it or nothing.

    Args:
        judged: what to write.
        folder: made where it does not exist, updated where it does.

    Returns:
        The path of `report.html`.

    Raises:
        OSError: if the folder cannot be written.
    """
    light, dark = _figures(judged, dark=False), _figures(judged, dark=True)
    with staged(folder) as stage:
        record = {"facts": dict(judged.facts), "notes": list(judged.notes)}
        if judged.evaluation is not None:
            record["summary"] = judged.evaluation.summary()
        if judged.loss is not None:
            record["summary"] = {"rows": len(judged.loss), "loss": float(judged.loss.mean())}
        if judged.curve is not None:
            names = ("temperatures", "relaxed", "relaxed_stderr", "hard", "hard_stderr", "gap", "gap_stderr", "num_particles")
            found = {name: getattr(judged.curve, name) for name in names}
            record["temperature_curve"] = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in found.items()}
        (stage / "evaluation.json").write_text(json.dumps(plain(record), indent=1, allow_nan=False), encoding="utf-8")
        _frame(judged).to_csv(stage / "evaluation.csv", index_label="row")
        for name, figure in light.items():
            figure.savefig(stage / f"{name}.png", dpi=DPI)
        (stage / "report.html").write_text(_page(judged, light, dark), encoding="utf-8")
    return Path(folder) / "report.html"


def _bounds(judged: Judged, found: Evaluation) -> Table:
    numbers = found.summary()
    lower: Mark = "lower" if found.normalized else "estimate"
    evidence = "log p(x)" if found.normalized else "the log mean weight"
    rows = []

    def bound(name: str, label: str, mark: Mark, note: str) -> None:
        if name in numbers:
            value, error = numbers[name], numbers[f"{name}_stderr"]
            cells = (Cell(label), Cell(number(value, error), mark), Cell(number(numbers[f"{name}_monte_carlo"])), Cell(note))
            rows.append(cells)

    bound("hard_elbo", "unrelaxed ELBO" if found.normalized else "unrelaxed score", lower, "")
    bound("analytic_elbo", "the same, KL by formula", lower, "")
    bound("log_likelihood", f"{evidence}, {found.num_particles} particles", lower, "")
    at = "" if judged.temperature is None else f" at temperature {judged.temperature:g}"
    words = "with the densities of model and guide relaxed, a bound of that model's evidence and none of log p(x)"
    bound("relaxed_elbo", f"relaxed bound{at}", "estimate", words)
    share, ess = numbers["pareto_k_above_0.7"], numbers["ess"]
    trust = f"the particles are too few for log p(x) in {share:.0%} of rows: read it as a bound only" if share > 0.05 else ""
    rows.append((Cell("effective sample size"), Cell(f"{ess:.1f} of {found.num_particles}", "estimate"), Cell(""), Cell("")))
    rows.append((Cell("rows with Pareto k > 0.7"), Cell(f"{share:.0%}", "estimate"), Cell(""), Cell(trust)))
    columns = (("method", "quantity"), ("value", "mean over rows"), ("monte_carlo", "Monte Carlo error"), ("note", "note"))
    return Table("evaluation", columns, tuple(rows), _unit(judged))


def _curve(curve: TemperatureCurve, mark: Mark) -> Table:
    columns = (
        ("method", "temperature"),
        ("relaxed", "relaxed bound"),
        ("hard", "unrelaxed ELBO" if mark == "lower" else "unrelaxed score"),
        ("gap", "difference"),
        ("note", "note"),
    )
    rows = []
    for i, temperature in enumerate(curve.temperatures.tolist()):
        cells = (
            Cell(f"{temperature:g}"),
            Cell(number(curve.relaxed[i], curve.relaxed_stderr[i]), "estimate"),
            Cell(number(curve.hard, curve.hard_stderr), mark),
            Cell(number(curve.gap[i], curve.gap_stderr[i]), "estimate"),
            Cell(""),
        )
        rows.append(cells)
    return Table("relaxed beside unrelaxed", columns, tuple(rows), f"nats per datum, {curve.num_particles} particles")


def _latents(found: Evaluation, values: Mapping[str, int]) -> Table:
    """One row a site; of many sites, their sum only."""
    numbers = found.summary()
    columns = (
        ("method", "site"),
        ("kl", "KL(q ‖ p)"),
        ("units", "latents"),
        ("active", "active"),
        ("usage", "values in use"),
        ("note", "note"),
    )
    rows = []
    for name, kl in numbers["kl"].items() if len(numbers["kl"]) <= 5 else ():
        usage, most = numbers["code_usage"].get(name), values.get(name)
        used = "" if usage is None else f"{usage:.2f}" + ("" if most is None else f" of {most}")
        active = numbers["active_units"].get(name)
        units = found.kl[name].shape[-1]
        texts = (name, number(kl), str(units), "" if active is None else str(active), used)
        rows.append(_row(texts))
    if len(numbers["kl"]) > 1:
        units = sum(kl.shape[-1] for kl in found.kl.values())
        active = sum(found.active_units.values())
        rows.append(_row(("all sites", number(sum(numbers["kl"].values())), str(units), str(active), "")))
    return Table("latents", columns, tuple(rows), "nats per datum")


def _row(texts: Sequence[str]) -> tuple[Cell, ...]:
    marks: tuple[Mark, ...] = ("", "estimate", "", "estimate", "estimate")
    return (*(Cell(text, mark if text else "") for text, mark in zip(texts, marks, strict=True)), Cell(""))


def _unit(judged: Judged) -> str:
    return f"nats per datum, {judged.facts.get('judged on', 'all rows')}"


def _frame(judged: Judged) -> Any:
    """One row a datum."""
    import pandas as pd

    found = judged.evaluation
    if found is None:
        assert judged.loss is not None
        return pd.DataFrame({"loss": judged.loss.detach().cpu().numpy()})
    bounds = ("hard_elbo", "hard_stderr", "analytic_elbo", "analytic_stderr", "log_likelihood", "stderr")
    names = (*bounds, "relaxed_elbo", "relaxed_stderr", "ess", "pareto_k")
    columns = {name: getattr(found, name) for name in names}
    columns |= {f"kl_{site}": kl.sum(-1) for site, kl in found.kl.items()}
    shape = found.hard_elbo.shape
    return pd.DataFrame({k: v.reshape(-1).cpu().numpy() for k, v in columns.items() if v is not None and v.shape == shape})


def _figures(judged: Judged, *, dark: bool) -> dict[str, Figure]:
    """The plots that there is something for, by file name."""
    from pyrovae import plots

    made: dict[str, Figure | None] = {}
    normalized = judged.evaluation is not None and judged.evaluation.normalized
    if judged.curve is not None:
        made["temperature"] = plots.temperature_curve(judged.curve, normalized=normalized, dark=dark)
    if judged.evaluation is not None and judged.evaluation.kl:
        kl = {name: part.reshape(-1, part.shape[-1]).mean(0) for name, part in judged.evaluation.kl.items()}
        made["latents"] = plots.latents(kl, judged.evaluation.code_usage, values=judged.values, dark=dark)
    if judged.data is not None and judged.reconstructions is not None:
        made["reconstructions"] = plots.reconstruction_grid(judged.data, judged.reconstructions, dark=dark)
    if judged.samples is not None:
        title, means = "Draws from the prior", "latents drawn, means of the pixels"
        made["samples"] = plots.image_grid(judged.samples, columns=10, title=title, subtitle=means, dark=dark)
    made["curve"] = plots.training_curve(
        judged.history, steps_per_epoch=judged.steps_per_epoch, normalized=normalized, dark=dark
    )
    return {name: figure for name, figure in made.items() if figure is not None}


_SECTIONS = {
    "temperature": "Relaxed and unrelaxed",
    "latents": "Latents",
    "reconstructions": "Reconstructions",
    "samples": "Samples",
    "curve": "Training",
}
_CAPTIONS = {
    "temperature": "The same weights, judged twice: the bound of the relaxed densities at each temperature, and the "
    "unrelaxed one, which knows no temperature. Where the two part, the relaxed number is no answer about log p(x).",
    "latents": "Left: KL of each latent from its prior, averaged over the data; at 0 the latent says nothing. Right: how many "
    "of its values a discrete latent takes over the data, as the perplexity of q averaged over them.",
    "reconstructions": "Images, and beneath each the mean of its pixels given its code; latents are drawn hard.",
    "samples": "What the model believes the data look like.",
    "curve": "Measured with hard samples and KL weight 1, apart from the objective that was optimised.",
}


def _page(judged: Judged, light: Mapping[str, Figure], dark: Mapping[str, Figure]) -> str:
    tables = "".join(html_table(table) for table in evaluation_tables(judged))
    sections = [f"<section><h2>Evaluation</h2>{tables}</section>"]
    for name, figure in light.items():
        picture = html_picture({"light": figure, "dark": dark[name]}, _CAPTIONS[name])
        sections.append(f"<section><h2>{html.escape(_SECTIONS[name])}</h2>{picture}</section>")
    return page(judged.title, _LEAD, judged.notes, sections, html_facts(judged.facts))


_LEAD = "What was optimised beside what holds: every number says whether it is a bound, an estimate or neither."
