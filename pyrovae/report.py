"""Comparisons as text, as files and as one HTML page: every number marked exact, bound or estimate."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal

from pyrovae.ops import isolated_rng

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from pyrovae.compare import Comparison

Mark = Literal["exact", "lower", "upper", "estimate", ""]

SYMBOLS: Mapping[str, str] = {"exact": "=", "lower": "≥", "upper": "≤", "estimate": "≈", "": ""}
LEGEND: Mapping[str, str] = {
    "exact": "exact, nothing sampled",
    "lower": "lower bound: the true value is at least this, in expectation where a ± stands",
    "upper": "upper bound: the true value is at most this, in expectation where a ± stands",
    "estimate": "estimate, by sampling",
}


@dataclass(frozen=True)
class Cell:
    """A printed value and what it is; empty where undefined."""

    text: str
    mark: Mark = ""

    @property
    def marked(self) -> str:
        """The text behind its symbol."""
        return f"{SYMBOLS[self.mark]} {self.text}" if self.mark and self.text else self.text


@dataclass(frozen=True)
class Table:
    """A table ready to print.

    Attributes:
        task: what was done, such as `"learning"` or `"inference"`.
        columns: key and title of each column.
        rows: one a method, cells in the order of the columns; the last column holds the notes.
        unit: of evidences, bounds and their differences.
    """

    task: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    unit: str

    @property
    def heading(self) -> str:
        """What stands above the table."""
        return f"{self.task.capitalize()}, {self.unit}"


def tables(comparison: Comparison) -> list[Table]:
    """The learning and the inference table as printed text, where they exist."""
    made, unit = [], comparison.metadata["unit"]
    if comparison.learning is not None:
        made.append(_learning(comparison.learning, unit, tested=comparison.metadata.get("test_rows") is not None))
    if comparison.inference is not None:
        made.append(_inference(comparison.inference, unit))
    return made


def facts(comparison: Comparison) -> dict[str, str]:
    """What a reader must know to compare the numbers with others: data, seeds, penalty, versions."""
    about = comparison.metadata
    rows = f"{about['rows']:,}"
    if about.get("test_rows") is not None:
        rows += f" training, {about['test_rows']:,} test"
    penalties = sorted({fit.penalty for fit in comparison.fits.values()})
    found = {
        "unit": about["unit"],
        "model": about.get("model"),
        "data": about.get("data"),
        "binarization": about.get("binarization"),
        "rows": rows,
        "seeds": ", ".join(map(str, about["seeds"])),
        "penalty": ", ".join(f"{p:g}" for p in penalties) + " (precision of a Gaussian prior on parameters)"
        if penalties
        else None,
        "budget": None if about.get("budget") is None else f"{about['budget']:g} x default",
        "dtype": about.get("dtype"),
        "threads": str(about["threads"]),
        "versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    }
    return {name: value for name, value in found.items() if value}


def markdown(comparison: Comparison) -> str:
    """The tables as Markdown, standard errors beside their numbers, blanks where nothing is defined."""
    lines = ["; ".join(f"{name}: {value}" for name, value in facts(comparison).items()), ""]
    for table in tables(comparison):
        lines += [f"**{table.heading}**", ""]
        lines.append("| " + " | ".join(title for _, title in table.columns) + " |")
        lines.append("|" + "|".join(":--" if key in ("method", "note") else "--:" for key, _ in table.columns) + "|")
        lines += ["| " + " | ".join(cell.marked.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        lines.append("")
    used = {cell.mark for table in tables(comparison) for row in table.rows for cell in row}
    lines.append("; ".join(f"`{SYMBOLS[mark]}` {words}" for mark, words in LEGEND.items() if mark in used))
    return "\n".join(lines) + "\n"


def html_tables(comparison: Comparison) -> str:
    """The tables as an HTML fragment with its own style, as notebooks show them."""
    parts = [html_table(table) for table in tables(comparison)]
    line = "; ".join(f"{name}: {value}" for name, value in facts(comparison).items())
    return f'<div class="pyrovae"><style>{_TABLE_STYLE}</style>{"".join(parts)}{html_legend()}<p>{html.escape(line)}</p></div>'


def save(comparison: Comparison, folder: str | Path) -> Path:
    """Write CSV, Markdown, JSON (versions, seeds, settings, histories), one netCDF for each posterior, and PNG plots.

    Everything is written to a temporary folder first and moved when whole: an interrupted run leaves nothing half-written.
    An existing folder is updated.

    Args:
        comparison: what to write.
        folder: made where it does not exist.

    Returns:
        The folder.

    Raises:
        OSError: if the folder cannot be written; found out before anything is computed.
    """
    with staged(folder) as stage:
        _write({"comparison": comparison}, stage)
    return Path(folder)


def write_report(
    comparisons: Mapping[str, Comparison],
    folder: str | Path,
    title: str,
    *,
    samples: Mapping[str, Tensor] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write what `save` writes for several comparisons, and one self-contained `report.html` that shows them.

    Args:
        comparisons: by name; the names head the sections.
        folder: made where it does not exist, updated where it does.
        title: of the page.
        samples: rows in [0, 1] `[n, D]` by name, shown as images where D is a square; the first are the data.
        notes: sentences for the reader, shown above the tables.

    Returns:
        The path of `report.html`.

    Raises:
        OSError: if the folder cannot be written; found out before anything is computed.
    """
    from pyrovae import plots

    with staged(folder) as stage:
        _write(comparisons, stage)
        grids: Mapping[str, Figure] = {}
        if samples:
            grids = {shade: plots.samples_grid(samples, dark=shade == "dark") for shade in ("light", "dark")}
            grids["light"].savefig(stage / "samples.png", dpi=DPI)
        (stage / "report.html").write_text(_page(comparisons, title, grids, notes), encoding="utf-8")
    return Path(folder) / "report.html"


def check_writable(folder: str | Path) -> None:
    """Raise a clear OSError where a folder could not be made or written."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write to, got the file {folder}; name another with --output")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is a file")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise type(error)(
            f"expected a folder that can be written, got {folder} ({error.strerror or error}); name another"
        ) from None


@contextlib.contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when the block ends well, and vanish when it does not."""
    folder = Path(folder)
    check_writable(folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    inside = folder if folder.exists() else folder.absolute().parent
    outer = Path(tempfile.mkdtemp(prefix=".pyrovae-", dir=inside))
    try:
        stage = outer / "whole"  # with the permissions of an ordinary folder, which mkdtemp's has not
        stage.mkdir()
        yield stage
        if not folder.exists():
            stage.rename(folder)
            return
        for file in sorted(path for path in stage.rglob("*") if path.is_file()):
            target = folder / file.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all, in the format of its suffix."""
    handle, name = tempfile.mkstemp(prefix=".pyrovae-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        figure.savefig(name, dpi=DPI)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# --- Numbers as text -------------------------------------------------------------------------------------------------


def number(value: Any, stderr: Any = None) -> str:
    """A number as text, with 'a ± b' where it has a standard error; empty where undefined.

    >>> number(-18.82486, 0.0123), number(1.25), number(3e-15), number(None)
    ('-18.825 ± 0.012', '1.250', '0', '')
    """
    value, stderr = _defined(value), _defined(stderr)
    if value is None:
        return ""
    if stderr:
        digits = min(6, max(0, 1 - math.floor(math.log10(stderr))))
        return f"{value:.{digits}f} ± {stderr:.{digits}f}"
    if abs(value) < 5e-10:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3f}"


def count(value: Any) -> str:
    """A number of things, to three digits.

    >>> count(950), count(12_345_678), count(None)
    ('950', '12.3 M', '')
    """
    value = _defined(value)
    if value is None:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"


def _defined(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def _seconds(value: Any) -> str:
    value = _defined(value)
    return "" if value is None else f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _learning(frame: pd.DataFrame, unit: str, *, tested: bool) -> Table:
    where = "test" if tested else "training"
    columns = (
        ("method", "method"),
        ("log_p_train", "log p(x), training"),
        *((("log_p_test", "log p(x), test"),) if tested else ()),
        ("own_bound", "own bound, training"),
        ("gap", "gap"),
        ("difference", f"difference to exact learning, {where}"),
        ("model_evaluations", "evaluations"),
        ("seconds", "seconds"),
        ("note", "note"),
    )
    rows = []
    for row in frame.to_dict("records"):
        sampled = row["bound"] != "exact" and bool(_defined(row["own_bound_se"]))
        cells = {
            "method": Cell(row["method"]),
            "log_p_train": Cell(number(row["log_p_train"], row["log_p_train_se"]), "exact"),
            "log_p_test": Cell(number(row["log_p_test"], row["log_p_test_se"]), "exact"),
            "own_bound": Cell(number(row["own_bound"], row["own_bound_se"]), row["bound"]),
            "gap": Cell(number(row["gap"], row["gap_se"]), "estimate" if sampled else "exact"),
            "difference": Cell(number(row["difference"], row["difference_se"]), "estimate"),
            "model_evaluations": Cell(count(row["model_evaluations"])),
            "seconds": Cell(_seconds(row["seconds"])),
            "note": Cell(row["note"]),
        }
        rows.append(tuple(cells[key] for key, _ in columns))
    return Table("learning", columns, tuple(rows), unit)


def _inference(frame: pd.DataFrame, unit: str) -> Table:
    columns = (
        ("method", "method"),
        ("log_evidence", "log p(x)"),
        ("gap", "gap to exact"),
        ("kl", "KL(q‖p)"),
        ("marginal_error", "largest marginal error"),
        ("ess", "least ESS"),
        ("rhat", "largest R-hat"),
        ("pareto_k", "rows with Pareto k > 0.7"),
        ("model_evaluations", "evaluations"),
        ("seconds", "seconds"),
        ("note", "note"),
    )
    rows = []
    for row in frame.to_dict("records"):
        sampled = bool(_defined(row["log_evidence_se"]))
        known: Mark = "estimate" if sampled else "exact"
        share = _defined(row["pareto_k"])
        cells = {
            "method": Cell(row["method"]),
            "log_evidence": Cell(number(row["log_evidence"], row["log_evidence_se"]), row["bound"]),
            "gap": Cell(number(row["gap"], row["gap_se"]), known),
            "kl": Cell(number(row["kl"], row["gap_se"]), known),
            "marginal_error": Cell(number(row["marginal_error"]), "estimate" if row["sampled"] else "exact"),
            "ess": Cell(count(row["ess"]), "estimate"),
            "rhat": Cell(number(row["rhat"]), "estimate"),
            "pareto_k": Cell("" if share is None else f"{share:.0%}", "estimate"),
            "model_evaluations": Cell(count(row["model_evaluations"])),
            "seconds": Cell(_seconds(row["seconds"])),
            "note": Cell(row["note"]),
        }
        rows.append(tuple(cells[key] for key, _ in columns))
    return Table("inference", columns, tuple(rows), unit)


# --- Files -----------------------------------------------------------------------------------------------------------


def _write(comparisons: Mapping[str, Comparison], stage: Path) -> None:
    """Everything but the page, into an empty folder."""
    texts, records = [], {}
    prefixes, files = set[str](), set[str]()
    for name, comparison in comparisons.items():
        prefix = "" if len(comparisons) == 1 else f"{_unique(_slug(name), prefixes)}-"
        for task, frame in (("learning", comparison.learning), ("inference", comparison.inference)):
            if frame is not None:
                frame.to_csv(stage / f"{task if prefix == f'{task}-' else prefix + task}.csv", index=False)
        heading = f"## {name}\n\n" if prefix else ""
        texts.append(heading + markdown(comparison))
        records[name] = _record(comparison)
        for label, posterior in comparison.posteriors.items():
            (stage / "posteriors").mkdir(exist_ok=True)
            slug = _slug(label)
            path = stage / "posteriors" / f"{_unique(prefix + slug if slug in files else slug, files)}.nc"
            with isolated_rng(0):  # draws of a posterior that is not draws
                data = posterior.to_arviz()
            _write_netcdf(data, path)
        for key, figure in _figures(comparison).items():
            figure.savefig(stage / f"{key if prefix == '' or len(records) == 1 else prefix + key}.png", dpi=DPI)
    (stage / "comparison.md").write_text("\n".join(texts), encoding="utf-8")
    content = records if len(records) > 1 else next(iter(records.values()))
    (stage / "comparison.json").write_text(json.dumps(plain(content), indent=1, allow_nan=False), encoding="utf-8")


def _figures(comparison: Comparison, *, dark: bool = False) -> dict[str, Figure]:
    """The plots that a comparison has something for, by file name."""
    from pyrovae import plots

    made = {
        "curves": plots.learning_curves(comparison, dark=dark) if comparison.learning is not None else None,
        "learned": plots.learned(comparison, dark=dark) if comparison.learning is not None else None,
        "errors": plots.inference_errors(comparison, dark=dark) if comparison.inference is not None else None,
        "marginals": plots.marginals(comparison, dark=dark) if comparison.inference is not None else None,
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _record(comparison: Comparison) -> dict[str, Any]:
    """All that JSON can hold."""
    record: dict[str, Any] = {"metadata": dict(comparison.metadata)}
    for task, frame in (("learning", comparison.learning), ("inference", comparison.inference)):
        if frame is not None:
            record[task] = frame.to_dict("records")
    record["runs"] = {
        name: [
            {
                "seed": seed,
                "bound": fit.bound,
                "penalty": fit.penalty,
                "seconds": fit.seconds,
                "model_evaluations": fit.model_evaluations,
                "versions": dict(fit.versions),
                "history": [dict(entry) for entry in fit.history],
            }
            for seed, fit in zip(comparison.metadata["seeds"], fits, strict=True)
        ]
        for name, fits in comparison.runs.items()
    }
    return record


def plain(value: Any) -> Any:
    """What JSON can hold: numbers, text, lists and dicts; None where a number is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (int, float)):
        return value if isinstance(value, int) or math.isfinite(value) else None
    return str(value)


def _write_netcdf(inference_data: Any, path: Path) -> None:
    """An `InferenceData` (ArviZ 0.x) or `DataTree` (1.x) as netCDF, whole numbers as bytes."""
    if hasattr(inference_data, "map_over_datasets"):
        inference_data.map_over_datasets(_compact).to_netcdf(path, engine="h5netcdf")
        return
    for group in inference_data.groups():
        setattr(inference_data, group, _compact(inference_data[group]))
    inference_data.to_netcdf(str(path), engine="h5netcdf")


def _compact(dataset: Any) -> Any:
    """States as bytes: draws of bits take an eighth of the file and of the time."""
    for name, variable in dataset.data_vars.items():
        values = variable.values
        if values.dtype.kind == "f" and values.size and abs(values).max() < 128 and (values == values.round()).all():
            dataset = dataset.assign({name: variable.astype("int8")})
    return dataset


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.strip().lower()).strip("-.") or "unnamed"


def _unique(slug: str, taken: set[str]) -> str:
    """The slug, numbered from 2 where it is taken; now it is."""
    candidates = itertools.chain([slug], (f"{slug}-{number}" for number in itertools.count(2)))
    found = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(found)
    return found


# --- The page --------------------------------------------------------------------------------------------------------

DPI = 160
_CAPTIONS = {
    "curves": "What each method reports while it learns. Lines without colour are exact log p(x); the others are bounds of it.",
    "learned": "Left: filled, the exact log p(x) of what was learned; hollow, the bound that the method reports. The line "
    "between them is what the method does not know about itself. Right: the same nets on rows that they have not seen.",
    "errors": "How far each method is from the exact answer for one and the same net: its evidence and its marginals.",
    "marginals": "Every marginal P(h = 1 | x) of every row against its exact value; on the diagonal nothing is wrong.",
}
_HEADINGS = {"learning": "Learning", "inference": "Inference on one learned model"}


def _page(comparisons: Mapping[str, Comparison], title: str, grids: Mapping[str, Figure], notes: Sequence[str]) -> str:
    sections = []
    for name, comparison in comparisons.items():
        parts = [f"<h2>{html.escape(_HEADINGS.get(name, name))}</h2>"]
        parts += [html_table(table) for table in tables(comparison)]
        light, dark = _figures(comparison), _figures(comparison, dark=True)
        parts += [html_picture({"light": light[key], "dark": dark[key]}, _CAPTIONS[key]) for key in light]
        sections.append(f"<section>{''.join(parts)}</section>")
    if grids:
        caption = "Data, and draws from each learned model: what it believes the data look like."
        sections.append(f"<section><h2>Samples</h2>{html_picture(grids, caption)}</section>")
    ends = []
    for name, comparison in comparisons.items():
        settings = {name: _settings(described) for name, described in comparison.metadata["methods"].items()}
        ends.append(
            f"<h3>{html.escape(name)}</h3>{html_facts(facts(comparison))}"
            f"<details open><summary>Methods</summary>{html_facts(settings)}</details>"
        )
    return page(title, _LEAD, notes, sections, "".join(ends))


def page(
    title: str, lead: str, notes: Sequence[str], sections: Sequence[str], ends: str, *, marks: Container[str] | None = None
) -> str:
    """One self-contained HTML page in the style of the reports, for light and dark screens, phones and paper.

    Args:
        title: of the page.
        lead: a sentence beneath it.
        notes: sentences for the reader, above the sections.
        sections: HTML of each section.
        ends: HTML of the settings and versions.
        marks: those of the legend; None takes all.
    """
    return Template(_PAGE).substitute(
        title=html.escape(title),
        style=_TABLE_STYLE + _PAGE_STYLE,
        lead=html.escape(lead),
        legend=html_legend(marks),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes),
        sections="".join(sections),
        ends=ends,
    )


def html_facts(facts: Mapping[str, Any]) -> str:
    """Names and values as a plain table."""
    rows = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>" for key, value in facts.items())
    return f"<div class=scroll><table class=plain>{rows}</table></div>"


def _settings(described: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in described.items() if key != "class" and value is not None and value is not False}
    inner = ", ".join(f"{key}={_settings(v) if isinstance(v, Mapping) else _short(v)}" for key, v in shown.items())
    return f"{described['class']}({inner})"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def html_table(table: Table) -> str:
    """The numbers as a table, the notes as a list beneath it."""
    columns = table.columns[:-1]
    head = "".join(f"<th>{html.escape(title)}</th>" for _, title in columns)
    body = "".join(
        "<tr>" + "".join(_html_cell(key, cell) for (key, _), cell in zip(columns, row, strict=False)) + "</tr>"
        for row in table.rows
    )
    notes = "".join(
        f"<li><b>{html.escape(row[0].text)}</b>: {html.escape(row[-1].text)}</li>" for row in table.rows if row[-1].text
    )
    return (
        f'<div class="scroll"><table class="numbers"><caption>{html.escape(table.heading)}</caption>'
        f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div><ul class="notes">{notes}</ul>'
    )


def _html_cell(key: str, cell: Cell) -> str:
    text = html.escape(cell.text) if key == "method" else html.escape(cell.text).replace("-", "−")
    if cell.mark and cell.text:
        text = f'<span class="m {cell.mark}" title="{LEGEND[cell.mark]}">{html.escape(SYMBOLS[cell.mark])}</span>&nbsp;{text}'
    tag = "th" if key == "method" else "td"
    return f'<{tag} class="{key}">{text}</{tag}>'


def html_legend(marks: Container[str] | None = None) -> str:
    """What the marks mean; None takes all."""
    items = "".join(
        f'<span><span class="m {mark}">{html.escape(SYMBOLS[mark])}</span> {html.escape(words)}</span>'
        for mark, words in LEGEND.items()
        if marks is None or mark in marks
    )
    return f'<p class="legend">{items}<span>± one standard error</span><span>blank: not defined</span></p>'


def html_picture(figures: Mapping[str, Figure], caption: str) -> str:
    """An image within the page: one for light screens and one for dark ones, by "light" and "dark"."""
    sources = {shade: f"data:image/png;base64,{_encoded(figure)}" for shade, figure in figures.items()}
    alternative = html.escape(caption)
    return (
        f'<figure><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{alternative}"></picture><figcaption>{alternative}</figcaption></figure>'
    )


def _encoded(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return base64.b64encode(buffer.getvalue()).decode()


_TABLE_STYLE = """
.scroll{overflow-x:auto;margin:1em 0}
table.numbers{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88em;width:100%}
table.numbers caption{text-align:left;font-weight:600;padding-bottom:.4em}
table.numbers th,table.numbers td{padding:.35em .6em;text-align:right;vertical-align:top;white-space:nowrap}
table.numbers thead th{border-bottom:2px solid;font-weight:600;white-space:normal;vertical-align:bottom;min-width:5.5em}
table.numbers tbody tr+tr>*{border-top:1px solid #8884}
table.numbers .method,table.numbers thead th:first-child{text-align:left}
ul.notes{padding-left:1.2em;font-size:.93em}
.m{display:inline-block;min-width:1.25em;text-align:center;border-radius:.3em;font-weight:700;line-height:1.35}
.m.exact{background:#1a1a1a;color:#fff}.m.lower{background:#bfe0f5;color:#06324d}
.m.upper{background:#f8d3b8;color:#5c2600}.m.estimate{background:#f3e6a5;color:#4a3b00}
.legend{display:flex;flex-wrap:wrap;gap:.3em 1.4em;font-size:.9em}
@media (prefers-color-scheme:dark){.m.exact{background:#f0f0f0;color:#111}}
"""

_PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--paper:#fff;--soft:#5b6168;--line:#d8dce0}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--paper:#16181b;--soft:#a3aab2;--line:#3a3f45}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:var(--ink);background:var(--paper);
margin:0 auto;padding:1.5em 1.2em 4em;max-width:72rem}
h1{font-size:1.8em;line-height:1.2;margin:.2em 0}h2{margin:2.2em 0 .4em;padding-top:.6em;border-top:1px solid var(--line)}
.lead{color:var(--soft);font-size:1.08em;margin:.2em 0 1.2em;max-width:46rem}
ul.notes{padding-left:1.2em;max-width:52rem}ul.notes li{margin:.3em 0}
figure{margin:1.6em 0}img{max-width:100%;height:auto;display:block}
figcaption{color:var(--soft);font-size:.93em;max-width:52rem;margin-top:.5em}
table.plain{border-collapse:collapse;font-size:.88em}table.plain th{text-align:left;white-space:nowrap;font-weight:600}
table.plain th,table.plain td{padding:.2em .8em .2em 0;vertical-align:top}
summary{cursor:pointer;font-weight:600;margin:.6em 0}
table.numbers tbody th.method{position:sticky;left:0;background:var(--paper)}
@media (max-width:40rem){picture{display:block;overflow-x:auto}img{max-width:none;width:38rem}
body{font-size:15px;padding:1em .8em 3em}h1{font-size:1.4em}}
@media print{:root{--ink:#000;--paper:#fff;--soft:#333;--line:#999}body{max-width:none;padding:0;font-size:10pt}
.scroll{overflow:visible}table.numbers{font-size:7.5pt}table.numbers th,table.numbers td{padding:.25em .35em}
figure,tr{break-inside:avoid}
.m.exact{background:#1a1a1a!important;color:#fff!important}.m{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

_LEAD = "Know how wrong your fit is: each method beside the exact answer, and each number says what it is."

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body>
<h1>$title</h1>
<p class="lead">$lead</p>
$legend
<ul class="notes">$notes</ul>
$sections
<section><h2>Settings and versions</h2>$ends</section>
</body></html>
"""
