"""A category a pixel, whose values are grey levels from 0 to 1."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class GreyLevels(TorchDistribution):
    """L equally spaced values 0, 1/(L − 1), …, 1, each with its own probability.

    A Categorical whose values can be shown as pixels and fed to a network. Values may miss their level by a thousandth of a
    step, so that bytes divided by 255 fit `L = 256` in either precision.

    Args:
        logits: `[..., L]`, normalised or not, L ≥ 2.
        validate_args: whether to check the support; None takes Pyro's setting.

    Raises:
        ValueError: for fewer than two levels.

    Example:
        >>> pixel = GreyLevels(torch.tensor([0.2, 0.3, 0.5]).log())
        >>> round(float(pixel.log_prob(torch.tensor(0.5)).exp()), 4), round(float(pixel.mean), 4)
        (0.3, 0.65)
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        if logits.dim() < 1 or logits.shape[-1] < 2:
            raise ValueError(f"expected logits [..., L] of L >= 2 grey levels, got {list(logits.shape)}")
        self.logits = logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @property
    def levels(self) -> int:
        """The number of values L."""
        return self.logits.shape[-1]

    @property
    def support(self) -> constraints.Constraint:
        """The L values."""
        return _Grid(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GreyLevels:
        """The same at a larger batch shape."""
        new = self._get_checked_instance(GreyLevels, _instance)
        new.logits = self.logits.expand((*batch_shape, self.levels))
        super(GreyLevels, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Mean pixels."""
        return self.logits.exp() @ torch.linspace(0, 1, self.levels).to(self.logits)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `[*sample_shape, *batch_shape]`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        probs = self.logits.exp().expand((*shape, self.levels)).reshape(-1, self.levels)
        return (probs.multinomial(1).reshape(shape) / (self.levels - 1)).to(self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of grey levels, elementwise; values off the grid count as the nearest level."""
        if self._validate_args:
            self._validate_sample(value)
        logits, level = torch.broadcast_tensors(self.logits, level_of(value, self.levels).unsqueeze(-1))
        return logits.gather(-1, level[..., :1]).squeeze(-1)


def level_of(value: Tensor, levels: int) -> Tensor:
    """The number, from 0, of the grey level nearest to each value."""
    return (value * (levels - 1)).round().long().clamp(0, levels - 1)


class _Grid(constraints.Constraint):
    is_discrete = True

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        steps = value * (self.levels - 1)
        return ((steps - steps.round()).abs() < 1e-3) & (value > -1e-3) & (value < 1 + 1e-3)
