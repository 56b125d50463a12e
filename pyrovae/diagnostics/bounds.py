"""What bounds share: log weights of batches of rows, their means over draws, and means of those over rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyrovae.distributions.supports import lowest
from pyrovae.handlers.structure import Latent
from pyrovae.inference.posterior import Program
from pyrovae.inference.weighing import Rows, log_joints, weighed


def log_weights(rows: Rows, model: Program, guide: Program, num_particles: int) -> Tensor:
    """Log p(x, z) − log q(z | x) at draws of the guide, `[K, batch]`."""
    parts = []
    for log_joint in log_joints(model, rows):
        parts.append(torch.cat([some.log_weights for some in weighed(log_joint, guide, num_particles)]))
    return rows.join(parts, 1)


def soft_weights(rows: Rows, model: Program, guide: Program, num_particles: int) -> tuple[Tensor, float]:
    """As :func:`log_weights` of relaxed programs, and the share of relaxed values that lie at an end of their dtype."""
    parts, ends, total = [], 0, 0
    for log_joint in log_joints(model, rows):
        relaxed = [latent for latent in log_joint.structure.latents if latent.kind.startswith("relaxed")]
        of_rows = []
        for some in weighed(log_joint, guide, num_particles):
            of_rows.append(some.log_weights)
            found = _at_the_ends(relaxed, some.drawn.states)
            ends, total = ends + found[0], total + found[1]
        parts.append(torch.cat(of_rows))
    return rows.join(parts, 1), ends / max(1, total)


def clamped_note(share: float, dtype: torch.dtype, at: str = "") -> str | None:
    """What to say of a share of clamped values, None where it is at most 0.1%."""
    if share <= 1e-3:
        return None
    instead = "a higher temperature" if dtype == torch.float64 else "float64"
    shown = f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"
    name = str(dtype).removeprefix("torch.")
    return (
        f"{shown} of the relaxed values{at} lie at the end of {name}: the relaxed objective is that of "
        f"the clamped draws, nearer to the unrelaxed one than that of the densities; take {instead}"
    )


def _at_the_ends(relaxed: list[Latent], states: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many relaxed values are clamped, and how many there are."""
    ends = total = 0
    for latent in relaxed:
        value = states[latent.name]
        at_end = value <= lowest(value.dtype)
        if latent.kind == "relaxed_bit":
            at_end = at_end | (value >= 1 - torch.finfo(value.dtype).eps)
        ends, total = ends + int(at_end.sum()), total + value.numel()
    return ends, total


def mean_weight(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over draws of `[K, batch]` and its standard error, inf where a draw is impossible under the model."""
    stderr = log_w.std(0) / math.sqrt(log_w.shape[0])
    return log_w.mean(0), stderr.masked_fill(torch.isneginf(log_w).any(0), math.inf)


def over_rows(value: Tensor, error: Tensor) -> tuple[float, float, float]:
    """The mean over rows, its standard error over rows, and the Monte Carlo part of it."""
    rows = value.numel()
    monte_carlo = float(error.square().sum().sqrt()) / rows
    return float(value.mean()), float(value.std() / math.sqrt(rows)) if rows > 1 else monte_carlo, monte_carlo
