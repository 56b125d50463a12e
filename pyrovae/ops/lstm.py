"""One step of a long short-term memory, for any dims on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def lstm_step(
    gates: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], hidden: Tensor, cell: Tensor, constant: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """One LSTM step, its gates computed in one product; dims on the left broadcast.

    (f, i, o, g) = gates([inputs, hidden]) + constant,   c ← σ(f) c + σ(i) tanh(g),   h ← σ(o) tanh(c).

    Args:
        gates: a linear map from `[..., Σ n_i + hidden]` to `[..., 4·hidden]`.
        inputs: each `[..., n_i]`.
        hidden: h, `[..., hidden]`.
        cell: c, `[..., hidden]`.
        constant: what inputs that stay the same at every step add to the gates, `[..., 4·hidden]`.

    Returns:
        The new h and c, `[..., hidden]`.

    References:
        Long Short-Term Memory (Hochreiter, Schmidhuber, 1997)
        https://doi.org/10.1162/neco.1997.9.8.1735
    """
    batch = torch.broadcast_shapes(*(value.shape[:-1] for value in (*inputs, hidden)))
    joined = torch.cat([value.expand(*batch, value.shape[-1]) for value in (*inputs, hidden)], -1)
    values = gates(joined).to(cell) + constant  # autocast may have made the product in a shorter type
    width = cell.shape[-1]
    forget, enter, leave = torch.sigmoid(values[..., : 3 * width]).chunk(3, -1)
    cell = forget * cell + enter * torch.tanh(values[..., 3 * width :])
    return leave * torch.tanh(cell), cell
