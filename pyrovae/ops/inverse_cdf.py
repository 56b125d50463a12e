"""Independent draws from large tables of unnormalised log probabilities, by the inverse of the cumulative distribution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def draw_pairs(
    marginal: Tensor, conditional: Callable[[Tensor], Tensor], step: int, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draws of a row from its marginal, then of a column given the row, with only the rows drawn ever tabulated.

    Args:
        marginal: unnormalised log probabilities of the rows `[R]`.
        conditional: from row numbers `[S]` to unnormalised log probabilities of the columns `[S, C]`.
        step: how many rows are tabulated at a time.
        n: number of draws.
        generator: of random numbers, on the device of the table; None for the global one.

    Returns:
        Row numbers `[n]` and column numbers `[n]`.
    """
    rows = draw_columns(marginal[None], torch.zeros(n, dtype=torch.long, device=marginal.device), generator)
    unique, inverse = rows.unique(return_inverse=True)
    columns = torch.empty_like(rows)
    for start in range(0, len(unique), step):
        mine = ((inverse >= start) & (inverse < start + step)).nonzero()[:, 0]
        columns[mine] = draw_columns(conditional(unique[start : start + step]), inverse[mine] - start, generator)
    return rows, columns


def draw_columns(logits: Tensor, rows: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws of a column, given the row.

    Args:
        logits: `[R, C]`, unnormalised in each row.
        rows: which row each draw is from `[n]`.
        generator: of random numbers, on the device of the table; None for the global one.

    Returns:
        Column numbers `[n]`.
    """
    cumulative = logits.double().softmax(1).cumsum(1)
    cumulative /= cumulative[:, -1:].clone()
    cumulative += torch.arange(len(logits), device=logits.device)[:, None]  # row k ends at k + 1: one ascending list
    u = torch.rand(len(rows), generator=generator, device=logits.device, dtype=torch.float64)
    found = torch.searchsorted(cumulative.flatten(), rows + u, right=True)
    return (found - rows * logits.shape[1]).clamp(0, logits.shape[1] - 1)
