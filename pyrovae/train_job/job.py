"""Training, drawing and judging: what the three commands do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyrovae import data
from pyrovae.diagnostics import evaluate, temperature_curve
from pyrovae.guides import reconstruct
from pyrovae.handlers.structure import read_structure
from pyrovae.inference import Variational
from pyrovae.inference.fit import Fit
from pyrovae.inference.variational.training import Training
from pyrovae.ops import isolated_rng
from pyrovae.report import save_figure
from pyrovae.report_evaluation import Judged
from pyrovae.train_job.families import FAMILIES, build, check_known, written
from pyrovae.train_job.folder import (
    CHECKPOINTS,
    CONFIG,
    LOG,
    Run,
    check_same,
    found_device,
    fresh_run,
    load_run,
    progress_of,
    read_checkpoint,
    read_config,
    settings_of,
    steps_per_epoch,
    write_config,
)
from pyrovae.train_job.settings import (
    BINARIZATIONS,
    GENERATORS,
    Settings,
    arguments_of,
    is_dynamic,
    resolved,
    rows_of,
    sizes_of,
    title_of,
    word_of,
)

MEANS = "latents drawn, means of the pixels"


def train(
    settings: Settings,
    folder: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Fit:
    """Train a model and keep it in a folder: `config.json`, checkpoints, `log.jsonl` and pictures.

    Numbers are those of torch's default dtype; the command line sets float32, in which networks are usually trained. The
    global random state is left alone. An interrupted run leaves its checkpoints, and `resume` goes on from the last one.

    Args:
        settings: what to train, and how.
        folder: made where it does not exist; it must not hold a run, but for `resume`.
        resume: go on from the last checkpoint of the run in the folder, which must have the same settings.
        device: a torch device.
        progress: show a progress bar.
        tell: called with a line of text at the start and about every tenth of the steps.

    Returns:
        The account of the training.

    Raises:
        ValueError: for settings that the family refuses, or that differ from those of the run that is resumed.
        FileExistsError: if the folder holds a run already.
        FileNotFoundError: if there is no run to resume, or no data.
        FloatingPointError: if the loss is no longer finite; the last checkpoint stays.
    """
    folder = Path(folder)
    settings = resolved(settings)
    if resume:
        check_same(settings_of(read_config(folder)), vars(settings))
    elif (folder / CONFIG).exists():
        raise FileExistsError(
            f"expected a folder without a run, got {folder}, which holds one; go on with it by --resume, or name another "
            "folder with --output"
        )
    found = found_device(device)
    if resume:
        read_checkpoint(folder, "last")  # says what to do where it is damaged
    x = rows_of(settings, "train", fitting=True)
    validation = rows_of(settings, "validation")
    if settings.batch_size is not None and settings.batch_size > len(x):
        raise ValueError(f"expected batch_size of at most the {len(x)} training rows, got {settings.batch_size}; lower it")
    with isolated_rng(settings.seed):
        bits = data.binarize(x) if is_dynamic(settings) else x
        model, guide = build(settings.model, arguments_of(settings, x.shape[1]), bits)
        method = _method(settings, guide, len(x), folder, device=found, progress=progress)
        with fresh_run(folder, resume=resume):
            if not resume:
                write_config(folder, settings, model, {"train": len(x), "validation": len(validation)})
            run = _Telling(method, model, (x,), {}, validation, resume=resume)
            if tell is not None:
                run.tell, run.word = tell, word_of(read_config(folder))
                rows = f"{len(x):,} training and {len(validation):,} validation rows"
                tell(f"{title_of(read_config(folder))}: {rows}, {settings.epochs} epochs, {run.num_steps:,} steps")
            fit = run()
    _write_pictures(folder, settings, fit)
    return fit


class _Telling(Training):
    """A run that tells of its records, of about ten in all."""

    tell: Callable[[str], None] | None = None
    word = ""
    told = -1

    def _record(self, losses: list[float]) -> None:
        super()._record(losses)
        tenth = 10 * self.step // max(1, self.num_steps)
        if self.tell is None or tenth <= self.told:
            return
        self.told, last = tenth, self.history[-1]
        value = abs(last["validation"]) if self.word == "loss" else last["validation"]
        self.tell(
            f"step {self.step:,} of {self.num_steps:,}: {self.word} on validation rows {value:.3f}, {last['seconds']:.0f} s"
        )


def sample(folder: str | Path, n: int = 64, *, mean: bool = False, seed: int = 0, which: str = "best") -> Tensor:
    """Images `[n, D]` in [0, 1] from the prior of a trained model.

    Args:
        folder: of the run.
        n: how many.
        mean: the means of the pixels instead of draws; latents are drawn either way.
        seed: of the draws.
        which: the checkpoint, "best" or "last".

    Raises:
        ValueError: if n < 1, or the model is an autoencoder, which has no prior.
        FileNotFoundError: as `load_run`.
    """
    if n < 1:
        raise ValueError(f"expected at least 1 image, got {n}; 64 make a square grid")
    run = load_run(folder, which=which)
    if run.guide is None:
        raise ValueError(
            f"expected a model with a prior to draw from, got the autoencoder in {folder}; see its reconstructions.png, or "
            "train another family"
        )
    with isolated_rng(seed):
        return run.model.sample(n, mean=mean).clamp(0, 1).cpu()


@torch.no_grad()
def reconstructions(run: Run, x: Tensor, *, seed: int = 0) -> Tensor:
    """Means of the pixels given hard draws of the latents of images, `[n, D]` in [0, 1], on the CPU.

    Args:
        run: of `load_run`.
        x: images `[n, D]`.
        seed: of the draws.
    """
    device = next(run.model.parameters()).device
    with isolated_rng(seed):
        found = run.model(x.to(device)) if run.guide is None else reconstruct(run.model, run.guide, x.to(device), num_samples=1)
    return found.clamp(0, 1).cpu()


@torch.no_grad()
def evaluate_run(
    folder: str | Path,
    *,
    num_particles: int = 1000,
    split: str = "test",
    rows: int | None = None,
    temperatures: tuple[float, ...] | None = None,
    which: str = "best",
    seed: int = 0,
    device: str = "cpu",
) -> Judged:
    """Judge a trained model on rows of its data set; nothing is written.

    Bits of dynamic binarization are drawn once, the same for every run: `pyrovae.data.load` with "fixed".

    Args:
        folder: of the run.
        num_particles: draws a datum; a tenth of them, at least 10, at each temperature.
        split: "train", "validation" or "test".
        rows: the first so many rows; None takes all.
        temperatures: where to compare the relaxed objective and the unrelaxed ELBO; None takes a few from 0.1 to 1, () none.
        which: the checkpoint, "best" or "last".
        seed: of the draws.
        device: a torch device.

    Returns:
        Everything that a report shows.

    Raises:
        FileNotFoundError: as `load_run`.
        ValueError: as `load_run`; for an unknown split, more rows than there are, fewer than 2 particles, or temperatures
            for a model with nothing to relax.
    """
    check_known("split", split, ("train", "validation", "test"))
    if num_particles < 2:
        raise ValueError(f"expected num_particles of at least 2, got {num_particles}; 1000 is usual")
    run = load_run(folder, which=which, device=device)
    settings = settings_of(run.config)
    x = rows_of(settings, split)
    if rows is not None and not 1 <= rows <= len(x):
        raise ValueError(f"expected rows from 1 to the {len(x)} of the {split} split, got {rows}; leave it out for all")
    x = x[:rows].to(found_device(device))
    discrete = FAMILIES[settings.model].discrete
    if temperatures and not discrete:
        raise ValueError(
            f"expected no temperatures for the {settings.model} family, got {written(temperatures)}; it has nothing to relax"
        )
    levels = ((0.1, 0.2, 0.35, 0.5, 0.7, 1.0) if temperatures is None else temperatures) if discrete else ()
    about = {"judged on": f"{len(x):,} {split} rows, {_bits(settings)}", **_facts(run, which, num_particles, seed)}
    shown = x[:30]
    common = {
        "title": title_of(run.config),
        "facts": about,
        "data": shown.cpu(),
        "reconstructions": reconstructions(run, shown, seed=seed),
        **_account(Path(folder), which),
        "steps_per_epoch": steps_per_epoch(run.config),
    }
    if run.guide is None:
        return Judged(**common, loss=run.model.loss(x).cpu(), notes=_notes(run, settings, relaxed=False))
    with isolated_rng(seed):
        temperature = settings.temperature if settings.gradient == "relaxed" else None
        found = evaluate(run.model, run.guide, x, num_particles=num_particles, temperature=temperature)
        few = max(10, num_particles // 10)
        curve = temperature_curve(*_in_double(run, x), levels, num_particles=few) if levels else None
        images = run.model.sample(60, mean=True).clamp(0, 1).cpu()
    latents = read_structure(run.model, (x[:2],), {}).latents
    return Judged(
        **common,
        evaluation=found,
        temperature=temperature,
        curve=curve,
        values={latent.name: latent.cardinality for latent in latents if latent.finite},
        samples=images,
        notes=(
            *_notes(run, settings, relaxed=curve is not None),
            *found.clamped_notes,
            *(() if curve is None else curve.notes),
        ),
    )


def _account(folder: Path, which: str) -> dict[str, Any]:
    """History and progress of a run; where the last checkpoint is damaged, as far as the one that is judged knows."""
    which = which if (folder / CHECKPOINTS / f"{which}.pt").is_file() else "last"
    judged = read_checkpoint(folder, which).account
    try:
        history, progress = read_checkpoint(folder, "last").account["history"], progress_of(folder)
    except (ValueError, OSError):
        steps = judged["settings"]["num_steps"]
        done = judged["step"] >= steps
        progress = {"step": judged["step"], "num_steps": steps, "finished": done, "best_step": judged["best_step"]}
        history = judged["history"]
    return {"history": history, "training": {**progress, "judged_step": judged["step"]}}


def _in_double(run: Run, x: Tensor) -> tuple[Any, Any, Tensor]:
    """Model, guide and rows in float64, in which relaxed values of low temperatures are told from their ends."""
    model, guide = copy.deepcopy((run.model, run.guide))
    device = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
    return model.to(device).double(), guide.to(device).double(), x.to(device).double()


def _method(
    settings: Settings, guide: Any, rows: int, folder: Path, *, device: torch.device | None, progress: bool
) -> Variational:
    """The recipe of the library for a run."""
    assert settings.epochs is not None
    assert settings.batch_size is not None
    assert settings.lr is not None
    batch = min(settings.batch_size, rows)
    total = settings.epochs * (rows // batch)
    lr, warm = settings.lr, max(1, round(0.3 * total))
    return Variational(
        guide,
        _objective(settings),
        optim=partial(torch.optim.Adam, lr=lr),
        scheduler=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=lr, total_steps=total, pct_start=0.3, cycle_momentum=False
        ),
        num_epochs=settings.epochs,
        batch_size=batch,
        temperature=settings.temperature,
        straight_through=settings.gradient == "straight-through",
        surrogate="reinmax" if settings.gradient == "reinmax" else None,
        beta=lambda step: settings.beta * min(1.0, 0.3 + 0.7 * step / warm),
        preprocess=data.binarize if is_dynamic(settings) else None,
        patience=settings.patience,
        log_every=max(1, total // min(settings.epochs, 50)),
        log_rows=1000,
        checkpoint=folder / CHECKPOINTS,
        log=folder / LOG,
        device=device,
        progress=progress,
    )


def _objective(settings: Settings) -> pyro.infer.ELBO:
    """The KL by formula where that is right, and several draws for the decoder where latents are discrete.

    Of relaxed draws it is the KL of the discrete distributions (Jang et al.), which trains better than that of the relaxed
    densities. In a hierarchy the guide draws h2 after h1, at which the model's prior of h1 looks: no formula there. The score
    function needs its draws scored.
    """
    particles = {"score": 10, None: 1}.get(settings.gradient, 4)
    mean_field = settings.model not in ("hierarchical", "autoencoder") and settings.gradient != "score"
    kind = pyro.infer.TraceMeanField_ELBO if mean_field else pyro.infer.Trace_ELBO
    return kind(num_particles=particles, vectorize_particles=particles > 1)


def _write_pictures(folder: Path, settings: Settings, fit: Fit) -> None:
    """Samples, reconstructions of validation rows, and the curve."""
    from pyrovae import plots
    from pyrovae.plots.trained import Curve

    run = load_run(folder)
    x = rows_of(settings, "validation")[:30]
    figures = {"reconstructions": plots.reconstruction_grid(x, reconstructions(run, x))}
    if run.guide is not None:
        images = sample(folder, 100, mean=True)
        figures["samples"] = plots.image_grid(images, title="Draws from the prior", subtitle=MEANS)
    normalized = run.config["likelihood"] != "cross_entropy"
    what: Curve = "loss" if run.guide is None else "unrelaxed" if FAMILIES[settings.model].discrete else "bound"
    curve = plots.training_curve(fit.history, steps_per_epoch=steps_per_epoch(run.config), what=what, normalized=normalized)
    if curve is not None:
        figures["curve"] = curve
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")


def _bits(settings: Settings) -> str:
    if settings.data in GENERATORS:
        return "binary as generated"
    return {"grey": "grey", "threshold": "threshold at 0.5"}.get(settings.binarize or "", "bits drawn once")


def _facts(run: Run, which: str, num_particles: int, seed: int) -> dict[str, Any]:
    """What a reader must know to compare the numbers with others."""
    config = run.config
    stored = config["settings"]
    plain = run.guide is None
    shown = ("epochs", "batch_size", "lr", "gradient", "temperature", *(() if plain else ("beta",)), "patience", "seed")
    how = BINARIZATIONS[stored["binarize"]] if stored["data"] not in GENERATORS else "binary as generated"
    return {
        "sizes": sizes_of(config),
        "model": f"{type(run.model).__name__}({', '.join(f'{k}={v}' for k, v in config['model'].items())})",
        **({} if plain else {"guide": type(run.guide).__name__}),
        "data": f"{stored['data']}, {config['rows']['train']:,} training and {config['rows']['validation']:,} validation rows",
        "pixels while training": how,
        "training": ", ".join(f"{name.replace('_', ' ')} {stored[name]}" for name in shown if stored.get(name) is not None),
        "checkpoint": f"{which}, by the {word_of(config)} on validation rows" if which == "best" else which,
        **({} if plain else {"particles": f"{num_particles} a datum, seed {seed}"}),
        "dtype": config["dtype"],
        "versions": ", ".join(f"{name} {version}" for name, version in config["versions"].items()),
    }


def _notes(run: Run, settings: Settings, *, relaxed: bool) -> tuple[str, ...]:
    notes = []
    if run.guide is None:
        notes.append(
            "An autoencoder has no distribution of its code, and so no prior to draw images from and no log p(x); its error is "
            "a loss."
        )
    elif not run.model.normalized:
        notes.append(
            "Grey pixels: the cross-entropy is no likelihood, so that no number here is a bound of log p(x); compare only with "
            "others of the same kind."
        )
    elif is_dynamic(settings):
        notes.append("Trained on bits drawn afresh at every step; judged on bits drawn once from the same intensities.")
    if relaxed and settings.gradient != "relaxed":
        notes.append(
            "Trained with hard draws: the decoder has never seen a soft one, and what a relaxation says of this model, at any "
            "temperature, is no guide to how good it is."
        )
    if settings.beta != 1 and run.guide is not None:
        notes.append(f"Trained with the KL weighted by {settings.beta:g}; judged with weight 1.")
    return tuple(notes)
