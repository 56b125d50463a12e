"""Steps whose loss or gradients are no numbers move nothing, and no step waits for the device to say so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EVERY = 200  # steps between two looks at the device


@dataclass(frozen=True)
class Fault:
    """A step that failed: its loss, and how many steps ago it was."""

    loss: float
    ago: int


class Guard:
    """Tells whether loss and norm of the gradients are finite.

    Every step is read before anything moves, which costs nothing on the CPU. On CUDA it would be a wait for the device: there,
    a flag stays on the device, which, once up, makes torch's fused optimizers skip all further steps (`found_inf`), and it
    is read every 200 steps and whenever :meth:`read` is called. Steps of optimizers that know no such flag are read.

    Args:
        optimizer: that steps.
        device: of the parameters.
        deferred: whether to leave the flag on the device; None decides by device and optimizer.
    """

    def __init__(self, optimizer: Any, device: torch.device, *, deferred: bool | None = None) -> None:
        self.deferred = device.type == "cuda" and skips(optimizer) if deferred is None else deferred
        self.steps, self.last = 0, (0.0, 0.0)
        if self.deferred:
            self.found, self.ago, self.loss = (torch.zeros((), dtype=torch.float32, device=device) for _ in range(3))
            optimizer.found_inf, optimizer.grad_scale = self.found, None

    @torch.no_grad()
    def see(self, loss: Tensor, norm: Tensor) -> None:
        """Take a step's numbers in, before the optimizer moves; 0-d, on any device."""
        if not self.deferred:
            self.last = float(loss), float(norm)
            return
        loss, norm = (value.to(self.loss, non_blocking=True) for value in (loss, norm))
        self.loss.copy_(torch.where(self.found > 0, self.loss, loss))
        self.found.copy_(torch.maximum(self.found, (~(loss.isfinite() & norm.isfinite())).to(self.found)))
        self.ago.add_(self.found)

    def due(self) -> bool:
        """Whether it is time for :meth:`read`; to be asked after every step."""
        self.steps += 1
        return self.deferred and self.steps % EVERY == 0

    def read(self) -> Fault | None:
        """The first step that failed, if one did; waits for the device."""
        if not self.deferred:
            return None if all(map(math.isfinite, self.last)) else Fault(self.last[0], 0)
        ago = round(float(self.ago))
        return Fault(float(self.loss), ago - 1) if ago else None


def skips(optimizer: Any) -> bool:
    """Whether an optimizer skips the steps that a flag on its device tells it to skip: torch's fused ones."""
    groups = optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else []
    known = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    return type(optimizer) in known and all(group.get("fused") for group in groups)
