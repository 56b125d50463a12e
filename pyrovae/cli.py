"""The command line: `pyrovae compare`; and the app, to which `cli_train` adds its commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyrovae.cli_train import evaluate_command, sample_command, train_command
from pyrovae.console import check_threads, clear_errors, integers, own_process, print_legend, progress_bar

import rich.markup  # isort: skip  after console, which puts back the random state that the first import draws from
import rich.padding
import rich.table
import rich.text
import typer
from rich.console import Console

if TYPE_CHECKING:
    from pyrovae.main_job import MainJob, Settings

app = typer.Typer(
    name="pyrovae",
    help="Know how wrong your fit is: exact, EM, MCMC and variational inference side by side.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:  # noqa: FBT001
    if value:
        from pyrovae import __version__

        typer.echo(f"pyrovae {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[  # noqa: FBT002
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Know how wrong your fit is: exact, EM, MCMC and variational inference side by side."""


@app.command("compare")
def compare_command(
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set: digits, bars_and_stripes, labelled_shifter, mnist or fashion_mnist.  "
            "[default: digits; bars_and_stripes for bm]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Family: sbn (sigmoid belief net), dbn (deep belief net), rbm (restricted Boltzmann machine), bm (Boltzmann "
            "machine), mixture (of Bernoullis) or hmm (hidden Markov model of an image's rows)."
        ),
    ] = "sbn",
    hidden: Annotated[
        str | None,
        typer.Option(
            help="Hidden units, one number a layer from the data upwards, as in 8,4; components; or states.  "
            "[default: sbn 8, dbn 8,16, rbm 12, bm 2, mixture 10, hmm 6]",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods, with commas between; the list stands above.")] = "all",
    budget: Annotated[
        str, typer.Option(help="small, default, large, or a factor for every number of steps and draws, as in 0.5.")
    ] = "default",
    seeds: Annotated[
        str, typer.Option(help="How many seeds, as in 5, or which, as in 0,1,2. Errors are then over seeds.")
    ] = "1",
    penalty: Annotated[
        float | None,
        typer.Option(
            help="Precision of the Gaussian prior on every parameter, shared by all learners.  "
            "[default: 0.1; mixture and hmm have priors of their own]",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Use at most this many rows of each split.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; the tensors are small, and more than one gains little.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for the report; made or updated.")] = Path("pyrovae-report"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only where the report lies.")] = False,  # noqa: FBT002
) -> None:
    """Learn one model by every method, then put every inference method to one learned model.

    Each number is marked: = exact, ≥ lower bound, ≤ upper bound, ≈ estimate. What was learned is judged by exact
    enumeration where it fits, not by what a method says of itself. Tables are printed; the folder gets report.html, CSV,
    JSON, Markdown, plots, and each posterior as netCDF for ArviZ.

    Learners of sbn: exact EM, exact gradient, Monte-Carlo EM, variational EM, wake-sleep, score function, relaxation. Of dbn:
    exact gradient, Monte-Carlo EM, greedy, up-down, wake-sleep, score function. Of rbm and bm: exact gradient, CD-1, PCD-1,
    PCD-10; of rbm also tempering. Of mixture and hmm: exact EM, exact gradient, Monte-Carlo EM; of mixture also score function.

    Inference: exact, Gibbs, mean field, Saul-Jaakkola-Jordan, local VI, AIS, amortised VI, importance, where they apply.

    Computed in float64 on one thread. With no options: a sigmoid belief net with 8 hidden units learns 1437
    scans of digits; about two minutes.

    For example:

      pyrovae compare

      pyrovae compare --data bars_and_stripes --budget small

      pyrovae compare --methods "exact EM,relaxation,exact,Gibbs" --seeds 5

      pyrovae compare --model rbm --data bars_and_stripes --hidden 8
    """
    with clear_errors(f"load it once with pyrovae.data.load({data!r}, download=True) in Python"):
        check_threads(threads)
        settings = _settings(data, model, hidden, methods, budget, seeds, penalty, rows)
        import torch

        from pyrovae import main_job, report

        report.check_writable(output)
        try:
            with own_process(threads, torch.float64):
                job = _run(main_job, settings, quiet=quiet)
                path = report.write_report(job.comparisons, output, _heading(job), samples=job.samples, notes=job.notes)
        except KeyboardInterrupt:
            Console(stderr=True, highlight=False).print("Interrupted; nothing was written.")
            raise typer.Exit(130) from None
    if not quiet:
        _print(job)
    typer.echo(f"Report: {path}")


def _settings(
    data: str | None,
    model: str,
    hidden: str | None,
    methods: str,
    budget: str,
    seeds: str,
    penalty: float | None,
    rows: int | None,
) -> Settings:
    from pyrovae.data import NAMES
    from pyrovae.main_job import BUDGETS, Settings, parse_methods

    if data is not None and data not in NAMES:
        raise ValueError(f"expected --data to be a known data set, got {data!r}; choose from: {', '.join(NAMES)}")
    chosen_methods = parse_methods(methods, model)
    sizes = None if hidden is None else integers("--hidden", hidden, least=1)
    if budget in BUDGETS:
        factor = BUDGETS[budget]
    else:
        try:
            factor = float(budget)
        except ValueError:
            factor = 0.0
        if not 0 < factor <= 1000:
            raise ValueError(
                f"expected --budget small, default, large or a factor above 0 and up to 1000, got {budget!r}; 0.5 halves every "
                "number of steps and draws"
            )
    listed = integers("--seeds", seeds, least=0)
    chosen = listed if "," in seeds else tuple(range(listed[0]))
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"expected --seeds to be a count of at least 1 or a list of different seeds, got {seeds!r}; write 5, or 0,1,2"
        )
    if penalty is not None and not 0 <= penalty < float("inf"):
        raise ValueError(f"expected --penalty of at least 0, got {penalty}; 0 is no penalty")
    if rows is not None and rows < 2:
        raise ValueError(f"expected --rows of at least 2, got {rows}; leave it out for all rows")
    return Settings(
        family=model,
        data=data,
        hidden=sizes,
        methods=chosen_methods,
        budget=factor,
        seeds=chosen,
        penalty=penalty,
        rows=rows,
    )


def _run(main_job: Any, settings: Settings, *, quiet: bool) -> MainJob:
    if quiet:
        return main_job.run(settings)
    bar = progress_bar()
    with bar:
        task = bar.add_task("starting", total=None)

        def progress(name: str, done: int, total: int) -> None:
            bar.update(task, description=name or "done", completed=done, total=total)

        return main_job.run(settings, progress)


def _heading(job: MainJob) -> str:
    from pyrovae.main_job import heading

    words = heading(job.settings, job.train)
    return f"{words[0].upper()}{words[1:]} on {str(job.settings.data).replace('_', ' ')}"


def _without_error(text: str) -> str:
    """A cell with its standard error left out, to three decimals."""
    if " ±" not in text:
        return text
    mark, value = text.split(" ±")[0].split(" ")
    return f"{mark} {float(value):.3f}"


_SHORT = {
    "log_p_train": "log p(x)\ntraining",
    "log_p_test": "log p(x)\ntest",
    "own_bound": "own bound\ntraining",
    "gap": "gap to\nexact",
    "difference": "difference to\nexact learning",
    "marginal_error": "marginal\nerror",
    "ess": "least\nESS",
    "rhat": "largest\nR-hat",
    "pareto_k": "Pareto\nk > 0.7",
    "model_evaluations": "evalu-\nations",
}


def _print(job: MainJob) -> None:
    """The tables, their notes beneath, and what the marks mean."""
    from pyrovae.report import tables

    console = Console(file=sys.stdout, highlight=False)
    narrow = console.width < 110
    for comparison in job.comparisons.values():
        for table in tables(comparison):
            grid = rich.table.Table(box=None, padding=(0, 1 if narrow else 3, 0, 0), header_style="underline")
            shown = []
            for i, (key, title) in enumerate(table.columns):
                if (
                    key == "note"
                    or (narrow and key in ("kl", "model_evaluations"))
                    or not any(row[i].text for row in table.rows)
                ):
                    continue
                shown.append(i)
                grid.add_column(_SHORT.get(key, title), justify="left" if key == "method" else "right", no_wrap=True)
            for row in table.rows:
                cells = [row[i].marked for i in shown]
                if narrow:  # the files and the page have every standard error
                    keep = [table.columns[i][0] == "difference" for i in shown]
                    cells = [c if kept else _without_error(c) for c, kept in zip(cells, keep, strict=True)]
                grid.add_row(*map(rich.markup.escape, cells))
            console.print()
            console.print(table.heading, style="bold", markup=False)
            console.print(grid)
            for row in table.rows:
                if row[-1].text:
                    console.print(
                        rich.padding.Padding(rich.text.Text(f"{row[0].text}: {row[-1].text}", style="dim"), (0, 0, 0, 2))
                    )
    console.print()
    print_legend(console)
    console.print("bounds of rows that were sampled hold in expectation", style="dim")
    for note in job.notes:
        console.print(f"- {note}", markup=False, style="dim")
    console.print()


app.command("train")(train_command)
app.command("sample")(sample_command)
app.command("evaluate")(evaluate_command)

if __name__ == "__main__":
    app()
