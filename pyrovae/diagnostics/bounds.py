"""What bounds share: log weights of batches of rows, their means over draws, and means of those over rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrovae.inference.posterior import Program
from pyrovae.inference.weighing import Rows, log_joints, weighed


def log_weights(rows: Rows, model: Program, guide: Program, num_particles: int) -> Tensor:
    """Log p(x, z) − log q(z | x) at draws of the guide, `[K, batch]`."""
    parts = []
    for log_joint in log_joints(model, rows):
        parts.append(torch.cat([some.log_weights for some in weighed(log_joint, guide, num_particles)]))
    return rows.join(parts, 1)


def mean_weight(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over draws of `[K, batch]` and its standard error, inf where a draw is impossible under the model."""
    stderr = log_w.std(0) / math.sqrt(log_w.shape[0])
    return log_w.mean(0), stderr.masked_fill(torch.isneginf(log_w).any(0), math.inf)


def over_rows(value: Tensor, error: Tensor) -> tuple[float, float, float]:
    """The mean over rows, its standard error over rows, and the Monte Carlo part of it."""
    rows = value.numel()
    monte_carlo = float(error.square().sum().sqrt()) / rows
    return float(value.mean()), float(value.std() / math.sqrt(rows)) if rows > 1 else monte_carlo, monte_carlo
