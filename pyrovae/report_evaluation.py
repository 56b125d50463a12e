"""An evaluation as tables, files and one HTML page: what was optimised beside what holds."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrovae import plots
from pyrovae.inference.weighing import LEAST_FOR_PARETO_K
from pyrovae.plots import RELAXED, SILENT
from pyrovae.plots.trained import Curve
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
        temperature: of the relaxed objective in `evaluation`.
        curve: the bounds against the temperature.
        values: number of values of each discrete site.
        history: records of the training.
        steps_per_epoch: of that history.
        data: images `[n, D]` in [0, 1].
        reconstructions: of these, likewise.
        samples: draws from the prior, likewise.
        training: how far it went: `step`, `num_steps`, `finished`, `best_step`, `judged_step`.
        notes: sentences for the reader; `all_notes` puts those before them that the numbers call for.
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
    training: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def discrete(self) -> bool:
        """Whether a latent is discrete, so that there is something to relax and a value to be in use."""
        return bool(self.values)

    @property
    def unfinished(self) -> str:
        """Where the training stopped before its end, in words; empty where it did not."""
        if self.training.get("finished", True):
            return ""
        return f"unfinished: step {self.training['step']:,} of {self.training['num_steps']:,}"

    @property
    def silent(self) -> str:
        """How many latents say nothing of the data, in words; empty where all say something."""
        if self.evaluation is None:
            return ""
        kl = torch.cat([_over_rows(part) for part in self.evaluation.kl.values()] or [torch.zeros(0)])
        quiet = int((kl < SILENT).sum())
        if not quiet:
            return ""
        verb = "says" if quiet == 1 else "say"
        return f"{quiet} of {len(kl)} latents {verb} nothing of the data (KL < {SILENT:g} nats)"

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Sentences for the reader."""
        found = []
        if self.unfinished:
            found.append(f"{self.unfinished.capitalize()}. What stands here is of a run that has not ended.")
        if self.training.get("judged_step") == 0:
            found.append("These are the weights of step 0, before any training: no later record was better on validation rows.")
        if self.silent:
            found.append(f"{self.silent}.")
        return (*found, *self.notes)


def evaluation_tables(judged: Judged) -> list[Table]:
    """The bounds, and what the latents are used for, as printed text with every number marked."""
    found = judged.evaluation
    if found is None:
        assert judged.loss is not None
        error = float(judged.loss.double().std() / len(judged.loss) ** 0.5)
        words = "; ".join(filter(None, ("cross-entropy of the reconstruction, a loss", judged.unfinished)))
        row = (Cell("reconstruction error"), Cell(number(float(judged.loss.mean()), error), "estimate"), Cell(words))
        return [
            Table("evaluation", (("method", "quantity"), ("value", "mean over rows"), ("note", "note")), (row,), _unit(judged))
        ]
    tables = [_bounds(judged, found)]
    if judged.curve is not None:
        tables.append(_curve(judged, judged.curve, "lower" if found.normalized else "estimate"))
    if found.kl:
        tables.append(_latents(judged, found))
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
        record: dict[str, Any] = {"facts": dict(judged.facts), "notes": list(judged.all_notes), "training": judged.training}
        if judged.evaluation is not None:
            record["summary"] = judged.evaluation.summary()
        if judged.loss is not None:
            record["summary"] = {"rows": len(judged.loss), "loss": float(judged.loss.mean())}
        if judged.curve is not None:
            names = (
                "temperatures",
                "relaxed",
                "relaxed_stderr",
                "hard",
                "hard_stderr",
                "gap",
                "gap_stderr",
                "num_particles",
                "clamped",
            )
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

    bound("hard_elbo", _name(judged), lower, judged.unfinished)
    bound("analytic_elbo", "the same, KL by formula", lower, "")
    bound("log_likelihood", f"{evidence}, {found.num_particles} particles", lower, "")
    at = "" if judged.temperature is None else f"at temperature {judged.temperature:g}, "
    words = f"{at}with the densities of model and guide relaxed: a bound of that model's evidence"
    bound("relaxed_elbo", RELAXED, "estimate", words)
    share, ess = numbers["pareto_k_above_0.7"] or 0.0, numbers["ess"]
    reading = "read it as a bound only" if found.normalized else "it may lie far below what more particles would give"
    trust = f"the particles are too few for {evidence} in {share:.0%} of rows: {reading}" if share > 0.05 else ""
    shown = f"{share:.0%}"
    if found.num_particles < LEAST_FOR_PARETO_K:
        shown, trust = "", f"needs {LEAST_FOR_PARETO_K} draws or more, got {found.num_particles}"
    rows.append((Cell("effective sample size"), Cell(f"{ess:.1f} of {found.num_particles}", "estimate"), Cell(""), Cell("")))
    rows.append((Cell("rows with Pareto k > 0.7"), Cell(shown, "estimate"), Cell(""), Cell(trust)))
    columns = (("method", "quantity"), ("value", "mean over rows"), ("monte_carlo", "Monte Carlo error"), ("note", "note"))
    return Table("evaluation", columns, tuple(rows), _unit(judged))


def _curve(judged: Judged, curve: TemperatureCurve, mark: Mark) -> Table:
    columns = (
        ("method", "temperature"),
        ("relaxed", RELAXED),
        ("hard", _name(judged)),
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


def _latents(judged: Judged, found: Evaluation) -> Table:
    """One row a site; of many sites, their sum only. Values in use are of latents that say something."""
    columns: tuple[tuple[str, str], ...] = (
        ("method", "site"),
        ("kl", "KL(q ‖ p)"),
        ("units", "latents"),
        ("speaking", f"KL ≥ {SILENT:g}"),
        ("active", "active units"),
        ("usage", "values in use"),
        ("note", "note"),
    )
    rows, total, loud, active = [], 0.0, 0, 0
    for name, table in found.kl.items():
        kl = _over_rows(table)
        speaking = kl >= SILENT
        usage, most = found.code_usage.get(name), judged.values.get(name)
        used = ""
        if usage is not None and bool(speaking.any()):
            used = f"{float(usage.reshape(-1)[speaking.to(usage.device)].mean()):.2f}" + ("" if most is None else f" of {most}")
        units = found.active_units.get(name)
        total, loud, active = total + float(kl.sum()), loud + int(speaking.sum()), active + (units or 0)
        texts = (name, number(kl.sum()), str(len(kl)), str(int(speaking.sum())), "" if units is None else str(units), used)
        rows.append(_row(texts))
    if len(rows) > 5:
        rows = []
    if len(found.kl) > 1:
        count = sum(table.shape[-1] for table in found.kl.values())
        rows.append(_row(("all sites", number(total), str(count), str(loud), str(active) if found.active_units else "", "")))
    if not any(row[-2].text for row in rows):
        columns = (*columns[:-2], columns[-1])
        rows = [(*row[:-2], row[-1]) for row in rows]
    return Table("latents", columns, tuple(rows), "nats per datum")


def _row(texts: Sequence[str]) -> tuple[Cell, ...]:
    marks: tuple[Mark, ...] = ("", "estimate", "", "estimate", "estimate", "estimate")
    return (*(Cell(text, mark if text else "") for text, mark in zip(texts, marks, strict=True)), Cell(""))


def _name(judged: Judged) -> str:
    """What the bound of the programs as they are is called; only discrete latents could have been relaxed."""
    normalized = judged.evaluation is None or judged.evaluation.normalized
    return ("unrelaxed " if judged.discrete else "") + ("ELBO" if normalized else "score")


def _over_rows(table: Tensor) -> Tensor:
    """Means over rows of `[*plates, components]`."""
    return table.reshape(-1, table.shape[-1]).mean(0).cpu()


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
    if found.num_particles < LEAST_FOR_PARETO_K:
        del columns["pareto_k"]
    return pd.DataFrame({k: v.reshape(-1).cpu().numpy() for k, v in columns.items() if v is not None and v.shape == shape})


def _figures(judged: Judged, *, dark: bool) -> dict[str, Figure]:
    """The plots that there is something for, by file name."""
    made: dict[str, Figure | None] = {}
    normalized = judged.evaluation is not None and judged.evaluation.normalized
    if judged.curve is not None:
        made["temperature"] = plots.temperature_curve(judged.curve, normalized=normalized, dark=dark)
    if judged.evaluation is not None and judged.evaluation.kl:
        kl = {name: _over_rows(part) for name, part in judged.evaluation.kl.items()}
        made["latents"] = plots.latents(kl, judged.evaluation.code_usage, values=judged.values, dark=dark)
    if judged.data is not None and judged.reconstructions is not None:
        made["reconstructions"] = plots.reconstruction_grid(judged.data, judged.reconstructions, dark=dark)
    if judged.samples is not None:
        title, means = "Draws from the prior", "latents drawn, means of the pixels"
        made["samples"] = plots.image_grid(judged.samples, title=title, subtitle=means, dark=dark)
    what: Curve = "loss" if judged.evaluation is None else "unrelaxed" if judged.discrete else "bound"
    made["curve"] = plots.training_curve(
        judged.history, steps_per_epoch=judged.steps_per_epoch, what=what, normalized=normalized, dark=dark
    )
    return {name: figure for name, figure in made.items() if figure is not None}


_SECTIONS = {
    "temperature": "Relaxed and unrelaxed",
    "latents": "Latents",
    "reconstructions": "Reconstructions",
    "samples": "Samples",
    "curve": "Training",
}


def _caption(name: str, judged: Judged) -> str:
    if name == "temperature":
        return (
            f"The same weights, judged twice: the {RELAXED} at each temperature, and the {_name(judged)}, which knows no "
            "temperature. Where the two part, the relaxed number is no answer about log p(x)."
        )
    if name == "latents":
        assert judged.evaluation is not None
        kl = "KL of each latent from its prior, averaged over the data; at 0 it says nothing of the data."
        sites = list(judged.evaluation.kl)
        if plots.are_steps(sites) or len(sites) > 5:
            return "KL of all latents of a site from their prior, averaged over the data; at 0 the site says nothing of them."
        if not judged.evaluation.code_usage:
            return kl
        uses = "how many of its values it takes over the data, as the perplexity of q averaged over them; hollow where it says "
        return f"{kl} Beside it, of a discrete latent, {uses}nothing, and then the values mean nothing."
    if judged.evaluation is None:
        words = {
            "reconstructions": "Images, and beneath each what the decoder makes of its code.",
            "curve": "Of the reconstructions, a mean over images.",
        }
    else:
        hard = ", latents drawn hard" if judged.discrete else ", latents drawn"
        words = {
            "reconstructions": f"Images, and beneath each the mean of its pixels given its code{hard}.",
            "samples": "What the model believes the data look like.",
            "curve": f"With {'hard samples and ' if judged.discrete else ''}KL weight 1, apart from what was optimised.",
        }
    return words[name]


def marks_of(tables: Sequence[Table]) -> set[Mark]:
    """Those that stand in tables, for a legend of no others."""
    return {cell.mark for table in tables for row in table.rows for cell in row if cell.text}


def _page(judged: Judged, light: Mapping[str, Figure], dark: Mapping[str, Figure]) -> str:
    made = evaluation_tables(judged)
    sections = [f"<section><h2>Evaluation</h2>{''.join(map(html_table, made))}</section>"]
    for name, figure in light.items():
        picture = html_picture({"light": figure, "dark": dark[name]}, _caption(name, judged))
        sections.append(f"<section><h2>{html.escape(_SECTIONS[name])}</h2>{picture}</section>")
    lead = _LEAD_LOSS if judged.evaluation is None else _LEAD
    return page(judged.title, lead, judged.all_notes, sections, html_facts(judged.facts), marks=marks_of(made))


_LEAD = "What was optimised beside what holds: every number says whether it is a bound, an estimate or neither."
_LEAD_LOSS = "How well images are rebuilt from their codes."
