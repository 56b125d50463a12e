"""The inverse temperatures of annealed importance sampling, from 0 to 1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["linear", "sigmoid"] | Tensor

_SPREAD = 4.0  # the sigmoid schedule runs over σ(−4) … σ(4)


def inverse_temperatures(schedule: Schedule, num_temperatures: int | None) -> tuple[float, ...]:
    """β_0 = 0 < … < β_K = 1.

    Args:
        schedule: "linear"; "sigmoid", which is denser at both ends; or the values themselves.
        num_temperatures: how many values, 0 and 1 included; None takes 1000, or as many as are given.

    Raises:
        ValueError: for fewer than 2, and for values that do not increase strictly from 0 to 1.

    References:
        Measuring the reliability of MCMC inference with bidirectional Monte Carlo (Grosse et al., 2016), appendix
        https://arxiv.org/abs/1606.02275
    """
    if isinstance(schedule, Tensor):
        betas = schedule.detach().double().flatten()
        rising = len(betas) >= 2 and bool((betas[1:] > betas[:-1]).all())
        if schedule.dim() != 1 or not rising or float(betas[0]) != 0 or float(betas[-1]) != 1:
            raise ValueError(
                f"expected a schedule [K] that increases strictly from 0 to 1, got shape {list(schedule.shape)}"
                + (f" from {float(betas[0]):g} to {float(betas[-1]):g}" if len(betas) else "")
                + "; remove repeated values, as torch.unique does"
            )
        if num_temperatures not in (None, len(betas)):
            raise ValueError(f"expected num_temperatures={len(betas)} with this schedule, got {num_temperatures}; leave it out")
        return tuple(betas.tolist())
    if schedule not in ("linear", "sigmoid"):
        raise ValueError(f"expected schedule 'linear', 'sigmoid' or a tensor of inverse temperatures, got {schedule!r}")
    count = 1000 if num_temperatures is None else num_temperatures
    if count < 2:
        raise ValueError(f"expected num_temperatures >= 2, got {count}")
    grid = torch.linspace(0, 1, count, dtype=torch.float64)
    if schedule == "sigmoid":
        raw = torch.sigmoid(_SPREAD * (2 * grid - 1))
        grid = (raw - raw[0]) / (raw[-1] - raw[0])
    return tuple(grid.tolist())
