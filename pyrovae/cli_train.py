"""The command line: `pyrovae train`, `pyrovae sample` and `pyrovae evaluate`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyrovae.console import check_threads, clear_errors, integers, own_process, print_legend

import rich.padding  # isort: skip  after console, which puts back the random state that the first import draws from
import rich.table
import rich.text
import typer
from rich.console import Console

if TYPE_CHECKING:
    from pyrovae.inference.fit import Fit
    from pyrovae.report_evaluation import Judged
    from pyrovae.train_job import Settings

Threads = Annotated[int, typer.Option(help="Threads of torch; small nets gain little from more than one.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only where the result lies.")]


def train_command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="Family: categorical, bernoulli, gaussian, mixed, hierarchical, draw or autoencoder."),
    ] = "categorical",
    data: Annotated[
        str, typer.Option(help="Data set: digits, mnist, fashion_mnist, bars_and_stripes or labelled_shifter.")
    ] = "digits",
    binarize: Annotated[
        str | None,
        typer.Option(
            help="dynamic: bits drawn afresh at every step; fixed: drawn once; threshold: 1 above half intensity; grey: "
            "intensities, whose cross-entropy is no likelihood. Default: threshold for digits, dynamic for MNIST."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows. Default: 100; MNIST 30.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a minibatch. Default: 100.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate, at the height of its schedule. Default: 0.005; MNIST 0.003.")
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option(help="Of discrete latents: reinmax, relaxed, straight-through or score. Default: reinmax."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the relaxation or the surrogate. Default: reinmax 1; relaxed and straight-through 0.5."),
    ] = None,
    beta: Annotated[float, typer.Option(help="Weight of the KL divergence; 1 is the evidence bound.")] = 1.0,
    latent: Annotated[
        int | None,
        typer.Option(
            help="Number of latents. Default: categorical 10, bernoulli 40, gaussian 10, mixed 8, draw 4 a step, autoencoder "
            "10; MNIST 30, 200, 20, 20, 100, 20."
        ),
    ] = None,
    categories: Annotated[
        int | None, typer.Option(help="Values of each categorical latent of categorical and mixed. Default: 10.")
    ] = None,
    hidden: Annotated[
        str | None,
        typer.Option(
            help="Hidden units from the data upwards. Default: 128,64; MNIST 512,256. Of draw 64; MNIST 256. Of hierarchical "
            "200,200."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Hierarchical: from the data upwards. Default: normal:10,categorical:5x10; MNIST normal:30,categorical:10x10."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="DRAW: number of steps. Default: 5; MNIST 10.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="DRAW: patches that are read and written, as in 2,5. Default: whole images.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without a better bound on validation rows.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and all draws; not of the splits.")] = 0,
    rows: Annotated[int | None, typer.Option(help="Use at most this many rows of each split.")] = None,
    threads: Threads = 1,
    device: Device = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for the run; made, and not overwritten.")] = Path("pyrovae-run"),
    resume: Annotated[  # noqa: FBT002
        bool, typer.Option("--resume", help="Go on with the run in --output; other options are those of that run.")
    ] = False,
    download: Annotated[  # noqa: FBT002
        bool, typer.Option("--download", help="Fetch MNIST or Fashion-MNIST where its files are not there.")
    ] = False,
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Train a variational autoencoder and keep it in a folder.

    With no options: a VAE with 10 categorical latents of 10 values on 1437 scans of digits, nothing downloaded; less than a
    minute. Discrete latents are drawn hard while training, with ReinMax gradients; --gradient relaxed trains the
    Gumbel-softmax relaxation instead. Either way the bound that is shown and that picks the best weights is the
    unrelaxed one.

    MNIST and Fashion-MNIST are looked for in the folder that the variable PYROVAE_DATA names, or else in ~/.cache/pyrovae;
    --download puts them there.

    Computed in float32. Ctrl-C keeps the last checkpoint, and --resume goes on from it as if nothing had happened.

    For example:

      pyrovae train

      pyrovae train --model gaussian --data mnist --epochs 30 --output mnist-run

      pyrovae evaluate mnist-run
    """
    with clear_errors("add --download"):
        check_threads(threads)
        import torch

        from pyrovae import report, train_job
        from pyrovae.data import load

        given = {
            name: value
            for name, value in context.params.items()
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        }
        report.check_writable(output)
        base = train_job.settings_of(train_job.read_config(output)) if resume else train_job.Settings()
        settings = _settings(base, given, resume=resume)
        before = train_job.progress_of(output) if resume and train_job.has_checkpoint(output) else None
        whole = before is not None and before["finished"]
        if download:
            load(settings.data, download=True)
        try:
            progress = not quiet and not whole and sys.stderr.isatty()
            tell = None if quiet or whole or progress else _tell
            with own_process(threads, torch.float32):
                fit = train_job.train(settings, output, resume=resume, device=device, progress=progress, tell=tell)
        except KeyboardInterrupt:
            kept = train_job.has_checkpoint(output)
            words = (
                f"Interrupted; the last checkpoint is kept. Go on with: pyrovae train --resume --output {output}"
                if kept
                else "Interrupted before the first checkpoint; nothing was kept."
            )
            Console(stderr=True, highlight=False).print(words, markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
        if not quiet:
            _print_fit(fit, train_job.read_config(output), output, whole=before if whole else None)
    typer.echo(f"Run: {output}")


def sample_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, made by pyrovae train.")],
    n: Annotated[int, typer.Option("--n", "-n", help="Number of images.")] = 64,
    mean: Annotated[bool, typer.Option("--mean", help="Means of the pixels instead of draws.")] = False,  # noqa: FBT002
    columns: Annotated[int | None, typer.Option(help="Images side by side. Default: about a square.")] = None,
    which: Annotated[str, typer.Option("--checkpoint", help="best (on validation rows) or last.")] = "best",
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="The picture: .png, .pdf or .svg. Default: RUN-samples.png, in the current folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture where it exists.")] = False,  # noqa: FBT002
) -> None:
    """Draw images from the prior of a trained model.

    A file that exists is left alone, unless --overwrite is given.

    For example:

      pyrovae sample pyrovae-run --n 100 --columns 10 --mean
    """
    with clear_errors():
        import torch

        from pyrovae import plots, report, train_job

        output = Path(f"{run.resolve().name}-samples.png") if output is None else output
        if output.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"expected --output to end in .png, .pdf or .svg, got {output}; write samples.png")
        if output.exists() and not overwrite:
            raise FileExistsError(
                f"expected --output to be a new file, got {output}, which exists; name another, or add --overwrite"
            )
        report.check_writable(output.parent)
        with own_process(1, torch.float32):
            images = train_job.sample(run, n, mean=mean, seed=seed, which=which)
            report.save_figure(plots.image_grid(images, columns=columns), output)
    typer.echo(f"Picture: {output}")


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, made by pyrovae train.")],
    num_particles: Annotated[int, typer.Option(help="Draws a datum; more make the bound of log p(x) tighter.")] = 1000,
    split: Annotated[str, typer.Option(help="Rows to judge on: train, validation or test.")] = "test",
    rows: Annotated[int | None, typer.Option(help="Use the first so many of them.")] = None,
    temperatures: Annotated[
        str | None,
        typer.Option(
            help="Where to compare the relaxed objective with the unrelaxed ELBO, as in 0.1,0.3,1; 'none' for nowhere."
        ),
    ] = None,
    which: Annotated[str, typer.Option("--checkpoint", help="best (on validation rows) or last.")] = "best",
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    threads: Threads = 1,
    device: Device = "cpu",
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Judge a trained model by bounds that hold, and write a report into its folder.

    Per datum: the unrelaxed ELBO, the same with the KL by formula, log p(x) by importance weighting with its effective
    sample size and Pareto k, and, beside them, the relaxed objective (no bound of log p(x)). What each latent says: KL,
    active units, values in use. The folder gets report.html, evaluation.json, evaluation.csv and pictures.

    Seconds for digits; for the 10000 test rows of MNIST about ten minutes on one core, and --rows 1000 takes a tenth.

    For example:

      pyrovae evaluate pyrovae-run

      pyrovae evaluate pyrovae-run --num-particles 5000 --temperatures 0.1,0.5,1
    """
    with clear_errors():
        check_threads(threads)
        import torch

        from pyrovae import report, report_evaluation, train_job

        levels = _temperatures(temperatures)
        report.check_writable(run)
        try:
            with own_process(threads, torch.float32), _waiting(f"{num_particles} particles a datum", quiet=quiet):
                judged = train_job.evaluate_run(
                    run,
                    num_particles=num_particles,
                    split=split,
                    rows=rows,
                    temperatures=levels,
                    which=which,
                    seed=seed,
                    device=device,
                )
                path = report_evaluation.write_evaluation(judged, run)
        except KeyboardInterrupt:
            Console(stderr=True, highlight=False).print("Interrupted; nothing was written.")
            raise typer.Exit(130) from None
        if not quiet:
            _print_judged(judged)
    typer.echo(f"Report: {path}")


def _settings(base: Settings, given: dict[str, Any], *, resume: bool) -> Settings:
    """The settings of a command line upon others; those of a run that is resumed must stay."""
    from pyrovae.train_job import FAMILIES, OPTIONS, check_same, parse_layers

    sizes = {name: given[name] for name in OPTIONS if name in given}
    model = base.model if resume else given.get("model", base.model)
    if model in FAMILIES and (others := [name for name in sizes if name not in FAMILIES[model].options]):
        known = ", ".join(f"--{name}" for name in FAMILIES[model].options)
        raise ValueError(f"expected {known}, got --{others[0]}; --{others[0]} does not apply to --model {model}, leave it out")
    for name in ("hidden", "attention"):
        if name in sizes:
            sizes[name] = integers(f"--{name}", sizes[name], least=1)
    if "layers" in sizes:
        sizes["layers"] = parse_layers(sizes["layers"])
    names = ("model", "data", "binarize", "epochs", "batch_size", "lr", "gradient", "temperature", "beta")
    rest = {name: given[name] for name in (*names, "patience", "seed", "rows") if name in given}
    if resume:
        check_same(base, {**rest, "sizes": {**base.sizes, **sizes}})
    return replace(base, **rest, sizes={**base.sizes, **sizes})


def _tell(text: str) -> None:
    """A line on the error stream, where there is no terminal for a bar."""
    print(text, file=sys.stderr, flush=True)


def _waiting(words: str, *, quiet: bool) -> Any:
    """A sign of life on the error stream."""
    return nullcontext() if quiet else Console(stderr=True).status(words)


def _temperatures(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    if text.strip().lower() == "none":
        return ()
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise ValueError(f"expected --temperatures above 0, with commas between, got {text!r}; write 0.1,0.3,1")
    return tuple(sorted(set(values)))


def _print_fit(fit: Fit, config: dict[str, Any], output: Path, *, whole: dict[str, Any] | None) -> None:
    """What was trained and how good it is; `whole` is the progress of a run that had ended before."""
    from pyrovae.train_job import sizes_of, title_of, word_of

    console = Console(file=sys.stdout, highlight=False)
    bounds = [entry for entry in fit.history if entry.get("validation") is not None]
    console.print()
    console.print(title_of(config), style="bold", markup=False)
    console.print(sizes_of(config), style="dim", markup=False)
    if bounds:
        best = max(bounds, key=lambda entry: entry["validation"])
        mark = "≥" if config["likelihood"] == "bernoulli" else "≈"
        value = abs(best["validation"]) if config["settings"]["model"] == "autoencoder" else best["validation"]
        console.print(f"{word_of(config)} on validation rows: {mark} {value:.3f} nats per datum, at step {best['step']}")
        if best["step"] == 0:
            console.print("the best weights are those of step 0: no later record was better on validation rows", style="dim")
    if config["settings"]["binarize"] == "grey":
        console.print("grey pixels: cross-entropy is no likelihood, and no number here is a bound of log p(x)", style="dim")
    if whole is None:
        console.print(f"{fit.seconds:.0f} s; next: pyrovae evaluate {output}", style="dim", markup=False)
    else:
        words = f"the run was finished already, at step {whole['step']} of {whole['num_steps']}: nothing was trained"
        console.print(f"{words}; next: pyrovae evaluate {output}", style="dim", markup=False)
    console.print()


def _print_judged(judged: Judged) -> None:
    """The tables, their notes beneath, and what the marks mean."""
    from pyrovae.report_evaluation import evaluation_tables, marks_of

    console = Console(file=sys.stdout, highlight=False)
    console.print()
    console.print(judged.title, style="bold", markup=False)
    for words in filter(None, (judged.unfinished, judged.silent)):
        console.print(words, markup=False)
    made = evaluation_tables(judged)
    for table in made:
        grid = rich.table.Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
        shown = [i for i, (key, _) in enumerate(table.columns) if key != "note" and any(row[i].text for row in table.rows)]
        for i in shown:
            key, title = table.columns[i]
            grid.add_column(title.replace(" (", "\n("), justify="left" if key == "method" else "right", no_wrap=True)
        for row in table.rows:
            label = rich.text.Text(row[shown[0]].text.replace(" (", "\n("))
            grid.add_row(label, *(rich.text.Text(row[i].marked) for i in shown[1:]))
        console.print()
        console.print(table.heading, style="bold", markup=False)
        console.print(grid)
        for row in table.rows:
            if row[-1].text:
                said = rich.text.Text(f"{row[0].text}: {row[-1].text}", style="dim")
                console.print(rich.padding.Padding(said, (0, 0, 0, 2)))
    console.print()
    marks = marks_of(made)
    print_legend(console, marks)
    holds = "; bounds hold in expectation" if "lower" in marks else ""
    console.print(f"± is over rows, Monte Carlo error included{holds}", style="dim")
    shown_above = {f"{judged.silent}."}
    for note in (note for note in judged.all_notes if note not in shown_above):
        console.print(f"- {note}", markup=False, style="dim")
    console.print()
