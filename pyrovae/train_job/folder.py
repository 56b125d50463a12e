"""The folder of a trained model: `config.json`, checkpoints, log and pictures."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyrovae.inference.fit import versions
from pyrovae.inference.variational import checkpoint
from pyrovae.inference.variational.batches import check_device
from pyrovae.ops import isolated_rng
from pyrovae.train_job.families import FAMILIES, Autoencoding, build, check_known
from pyrovae.train_job.settings import Settings

FORMAT = 1
CONFIG, CHECKPOINTS, LOG = "config.json", "checkpoints", "log.jsonl"


class Run(NamedTuple):
    """A trained model.

    Attributes:
        model: the model, or a plain `AutoEncoder`.
        guide: its guide; None for an autoencoder.
        config: what `config.json` says.
    """

    model: Any
    guide: Any
    config: dict[str, Any]


def load_run(folder: str | Path, *, which: str = "best", device: str = "cpu") -> Run:
    """The model and guide that `train` has left in a folder.

    Args:
        folder: of the run.
        which: the checkpoint, "best" (the highest bound on validation rows) or "last".
        device: where to put them.

    Raises:
        FileNotFoundError: if the folder holds no run, or no checkpoint yet.
        ValueError: if a file is damaged, of another version, or does not fit the others.
    """
    folder = Path(folder)
    config = read_config(folder)
    with isolated_rng(0):  # the weights that are drawn are overwritten
        model, guide = build(config["settings"]["model"], config["model"])
    _restore(folder, which, model, guide, found_device(device))
    if isinstance(model, Autoencoding):
        return Run(model.net, None, config)
    return Run(model, guide, config)


def read_config(folder: str | Path) -> dict[str, Any]:
    """What `config.json` of a run says.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if the file is damaged, or of another version.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        what = "a folder without one" if path.parent.is_dir() else "no folder of that name"
        raise FileNotFoundError(
            f"expected a run folder with a {CONFIG}, got {what}: {folder}; make one with: pyrovae train --output {folder}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        written, family = config["format"], config["settings"]["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected the settings of a run in {path}, got a damaged file ({error!r}); train again") from None
    if written != FORMAT:
        raise ValueError(
            f"expected a run of format {FORMAT}, got format {written} in {path}, written by pyrovae "
            f"{config.get('versions', {}).get('pyrovae', 'of unknown version')}; install that version, or train again"
        )
    if family not in FAMILIES:
        raise ValueError(f"expected a known family in {path}, got {family!r}; this pyrovae knows {', '.join(FAMILIES)}")
    return config


def read_checkpoint(folder: str | Path, which: str) -> checkpoint.Checkpoint:
    """A checkpoint of a run.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, with what is left to do.
    """
    folder = Path(folder)
    path = folder / CHECKPOINTS / f"{which}.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a checkpoint in {folder}, got a run that was interrupted before its first; train again in another folder"
        )
    try:
        return checkpoint.load(path.parent, which)
    except ValueError as error:
        if "checkpoint of format" in str(error):
            raise
        other = "last" if which == "best" else "best"
        try:
            step = checkpoint.load(path.parent, other).account["step"]
        except (ValueError, OSError):
            remedy = "no other is left, so train again in another folder"
        else:
            remedy = f"judge or draw from the other, of step {step}: pyrovae evaluate {folder} --checkpoint {other}"
            if other == "best":
                remedy += f"; or copy {other}.pt over it and go on from there: pyrovae train --resume --output {folder}"
        raise ValueError(f"expected a whole checkpoint, got {path}, truncated or damaged; {remedy}") from None


def progress_of(folder: str | Path) -> dict[str, Any]:
    """How far the training of a run has gone, by its last checkpoint: `step`, `num_steps`, `finished`, `best_step`.

    Raises:
        FileNotFoundError: if the folder holds no run, or no checkpoint yet.
        ValueError: if a file is damaged.
    """
    account = read_checkpoint(folder, "last").account
    step, best, steps = account["step"], account["best_step"], account["settings"]["num_steps"]
    patience = read_config(folder)["settings"]["patience"]
    tired = patience is not None and sum(r["step"] > (best or 0) for r in account["history"]) >= patience
    return {"step": step, "num_steps": steps, "finished": step >= steps or tired, "best_step": best}


def found_device(device: str) -> torch.device | None:
    """A device of this machine.

    Raises:
        ValueError: if it has no such device, with those that it has.
    """
    try:
        return check_device(device)
    except ValueError:
        known = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count())), *["mps"] * torch.backends.mps.is_available()]
        raise ValueError(
            f"expected a device of this machine ({', '.join(known)}), got {device!r}; leave it out for cpu"
        ) from None


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings of a run, from its `config.json`."""
    known = {f.name for f in fields(Settings)}
    stored = {name: _frozen(value) for name, value in config["settings"].items() if name in known}
    return Settings(**{**stored, "sizes": {name: _frozen(value) for name, value in config["settings"]["sizes"].items()}})


def write_config(folder: Path, settings: Settings, model: Any, rows: Mapping[str, int]) -> None:
    """Write `config.json`, from which alone a run is loaded and resumed."""
    config = {
        "format": FORMAT,
        "title": FAMILIES[settings.model].title,
        "model": model.config,
        "settings": asdict(settings),
        "rows": rows,
        "likelihood": "cross_entropy" if settings.binarize == "grey" or settings.model == "autoencoder" else "bernoulli",
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def check_same(before: Settings, given: Mapping[str, Any]) -> None:
    """Refuse other settings than those of a run that is resumed.

    Args:
        before: those of the run.
        given: others, by name.

    Raises:
        ValueError: with the first that differs.
    """
    for name, new in given.items():
        if (old := getattr(before, name)) != new:
            raise ValueError(
                f"expected the settings of the run that is resumed, {name}={old!r}, got {new!r}; leave it out, or train "
                "another run in another folder"
            )


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a run can be resumed."""
    return (Path(folder) / CHECKPOINTS / "last.pt").is_file()


@contextmanager
def fresh_run(folder: Path, *, resume: bool) -> Iterator[None]:
    """Take back what a run has written that ended before its first checkpoint."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not resume and not has_checkpoint(folder):
            for name in (CONFIG, LOG):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            if not existed and folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=".pyrovae-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def steps_per_epoch(config: Mapping[str, Any]) -> int:
    """Minibatches of an epoch of a run."""
    rows = config["rows"]["train"]
    return max(1, rows // min(config["settings"]["batch_size"], rows))


def _restore(folder: Path, which: str, model: Any, guide: Any, device: torch.device | None) -> None:
    check_known("checkpoint", which, ("best", "last"))
    if which == "best" and not (folder / CHECKPOINTS / "best.pt").is_file() and has_checkpoint(folder):
        which = "last"
    read_checkpoint(folder, which).restore(model, guide)
    model.to(device)
    guide.to(device)


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
