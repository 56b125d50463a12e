"""What the commands share: numbers from options, errors in one sentence, a process of its own, a progress bar, the legend."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

_state = random.getstate()  # rich draws from Python's generator at its first import
import rich.progress  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402

random.setstate(_state)

if TYPE_CHECKING:
    import torch


def integers(option: str, text: str, *, least: int) -> tuple[int, ...]:
    """Integers with commas between.

    Raises:
        ValueError: naming the option, for anything else.
    """
    try:
        values = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or min(values) < least:
        raise ValueError(
            f"expected {option} to be integers of at least {least}, with commas between, got {text!r}; write 8 or 8,4"
        )
    return values


def check_threads(threads: int) -> None:
    """A number of threads, at least 1."""
    if threads < 1:
        raise ValueError(f"expected --threads of at least 1, got {threads}; leave it out for 1")


@contextmanager
def clear_errors(fetch: str = "") -> Iterator[None]:
    """Leave with code 2 and one sentence on the error stream where the block fails for a reason that the user can mend.

    Args:
        fetch: how to fetch data that are not there, in words; empty where there is no way but `PYROVAE_DATA`.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        text = " ".join(str(error).split()).replace(", or load with download=True", f", or {fetch}" if fetch else "")
        text = text.replace(", for example with download=True", f": {fetch}" if fetch else "")
        Console(stderr=True, highlight=False).print(f"Error: {text}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def own_process(threads: int, dtype: torch.dtype) -> Iterator[None]:
    """One floating type, few threads, and none of Pyro's remarks to developers, while the command runs."""
    import torch

    logger = logging.getLogger("pyro")
    level, default, before = logger.level, torch.get_default_dtype(), torch.get_num_threads()
    logger.setLevel(logging.WARNING)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(default)
        logger.setLevel(level)


def progress_bar(*columns: rich.progress.ProgressColumn | str) -> rich.progress.Progress:
    """A bar on the error stream that vanishes when done; further columns stand at its end."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description:16}"),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        *columns,
        console=Console(stderr=True),
        transient=True,
    )


def print_legend(console: Console, marks: Container[str] | None = None) -> None:
    """What the marks mean, in one line; None takes all."""
    from pyrovae.report import LEGEND, SYMBOLS

    kept = {mark: words for mark, words in LEGEND.items() if marks is None or mark in marks}
    short = "   ".join(f"{SYMBOLS[mark]} {words.split(':')[0].split(',')[0]}" for mark, words in kept.items())
    console.print(f"{short}   ± one standard error", markup=False)
