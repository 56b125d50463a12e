"""Expectations of a function of the latents as sums over joint states: which sites it reads, and the weighted total."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrovae.inference.exact.factors import dot
from pyrovae.inference.posterior import States


def weighted_average(f: Callable[[States], Tensor], pieces: Iterable[tuple[States, Tensor]]) -> tuple[Tensor, Tensor]:
    """Σ_s w_s f(z_s) over joint states that come piece by piece, `[batch, …]`, and 0, its standard error.

    Args:
        f: from `{site: [S, batch, …]}` to `[S, batch, …]`; it must treat rows apart.
        pieces: states, and their log weights `[S, batch]`, which sum to 1 over all pieces.

    Raises:
        ValueError: if the result of `f` lacks the rows of the batch.
    """
    total: Tensor | None = None
    for states, log_weights in pieces:
        value = f(states)
        weights = log_weights.exp()
        if value.shape[: weights.dim()] != weights.shape:
            raise ValueError(
                f"expected f to return [S, batch, …] = {tuple(weights.shape)} and any dims after, got "
                f"{tuple(value.shape)}; f must treat rows apart, average over posterior.sample(n) otherwise"
            )
        weights = weights.reshape(weights.shape + (1,) * (value.dim() - weights.dim()))
        value = value if value.is_floating_point() else value.to(weights.dtype)
        part = dot(weights, value).sum(0)
        total = part if total is None else total + part
    assert total is not None
    return total, torch.zeros_like(total)


def sites_read(f: Callable[[States], Tensor], states: States) -> set[str]:
    """The names of the sites that `f` looks at, found by calling it once on some states."""
    watched = _Watched(states)
    with torch.no_grad():
        f(watched)
    return watched.names


class _Watched(dict):  # type: ignore[type-arg]
    """A dict that remembers which keys were read."""

    def __init__(self, states: States) -> None:
        super().__init__(states)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        value: Tensor = super().__getitem__(name)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a site, which counts as read."""
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        """All names, all of which count as read: what follows is not known."""
        self.names.update(list(super().keys()))
        return super().keys()

    def values(self) -> Any:
        """All values, all of which count as read."""
        self.names.update(list(super().keys()))
        return super().values()

    def items(self) -> Any:
        """All items, all of which count as read."""
        self.names.update(list(super().keys()))
        return super().items()

    def __iter__(self) -> Iterator[str]:
        self.names.update(list(super().keys()))
        return super().__iter__()
