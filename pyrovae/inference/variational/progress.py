"""What is read of a run while it goes on: losses at records, a progress bar a few times a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

SECONDS = 0.1  # between two looks at a loss for the bar, for which its device is waited for


class Bar:
    """A progress bar; a context.

    Args:
        total: steps.
        done: steps that are done.
        what: is in progress.
        shown: whether there is one.
    """

    def __init__(self, total: int, done: int = 0, what: str = "Variational", *, shown: bool) -> None:
        self.bar = tqdm(total=total, initial=done, desc=what, disable=not shown)
        self.what, self.shown, self.step, self.next = what, shown, done, 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.update(self.step - self.bar.n)
        self.bar.close()

    def say(self, text: str) -> None:
        """Say what takes time, or has taken it, which the forecast leaves out."""
        self.bar.set_description(f"{self.what}, {text}")
        self.bar.unpause()

    def tell(self, step: int, numbers: Callable[[], dict[str, Any]] | None = None) -> None:
        """So many steps are done; `numbers` are asked for where they are shown."""
        self.step = step
        if not self.shown or time.monotonic() < self.next:
            return
        self.next = time.monotonic() + SECONDS
        if numbers is not None:
            self.bar.set_postfix(numbers(), refresh=False)
        self.bar.update(step - self.bar.n)


def in_floats(losses: Sequence[Tensor]) -> list[float]:
    """Losses as numbers, by one wait for their device."""
    return torch.stack(list(losses)).tolist() if losses else []
