"""What the programs of this package share: the plate of the data."""

from __future__ import annotations

import pyro
from torch import Tensor


def data_plate(x: Tensor | None, width: int, *, batch_size: int, index: Tensor | None, num_data: int | None) -> pyro.plate:
    """The plate `"data"` at dim −1: as long as `x`, or, with `index`, a subsample of `num_data` rows.

    Args:
        x: data `[B, width]`, or None.
        width: the width that the model was built for.
        batch_size: rows where `x` and `index` are None.
        index: row numbers `[B]` of a minibatch.
        num_data: the number of rows that the minibatch is taken from.

    Raises:
        ValueError: if `x` has another width or no rows, or `index` comes without `num_data`.
    """
    if x is not None and (x.dim() < 2 or x.shape[-1] != width or x.shape[-2] == 0):
        raise ValueError(f"expected data [B, {width}] with at least one row, got {list(x.shape)}; pass rows of {width}")
    if index is None:
        rows = batch_size if x is None else x.shape[-2]
        if rows < 1:
            raise ValueError(f"expected batch_size >= 1, got {rows}")
        return pyro.plate("data", rows, dim=-1)
    if num_data is None or num_data < len(index) or (x is not None and x.shape[-2] != len(index)):
        raise ValueError(
            f"expected index [B] with num_data >= B and x [B, {width}], got {len(index)} indices, num_data={num_data} and "
            f"x {None if x is None else list(x.shape)}"
        )
    return pyro.plate("data", num_data, subsample=index, dim=-1)
