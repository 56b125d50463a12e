"""The cross-entropy of grey pixels: a training loss in the place of a likelihood."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class CrossEntropy(TorchDistribution):
    """x · logits − softplus(logits) on [0, 1]: the Bernoulli's log probability, used at values between 0 and 1.

    It is no density: exp of it, integrated over x, is below 1 (at logits 0 it is 1/2). A bound built on it orders models by
    their loss, but is no bound on any log p(x), and not to be compared with one. The attribute `normalized` is False.

    Draws are Bernoulli draws, in {0, 1}. Cost: one fused operation a value.

    Args:
        logits: of the mean, any shape.
        validate_args: whether to check the support; None takes Pyro's setting.

    Example:
        >>> float(CrossEntropy(logits=torch.tensor(0.0)).log_prob(torch.tensor(0.3)).exp())
        0.5

    References:
        The continuous Bernoulli: fixing a pervasive error in variational autoencoders (Loaiza-Ganem, Cunningham, 2019)
        https://arxiv.org/abs/1907.06845
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.unit_interval
    normalized = False

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = torch.as_tensor(logits)
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CrossEntropy:
        """The same at a larger batch shape."""
        new = self._get_checked_instance(CrossEntropy, _instance)
        new.logits = self.logits.expand(batch_shape)
        super(CrossEntropy, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Mean pixels σ(logits)."""
        return torch.sigmoid(self.logits)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Bernoulli draws `[*sample_shape, *batch_shape]`."""
        return torch.bernoulli(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the cross-entropy of `value` in [0, 1], elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        logits, value = torch.broadcast_tensors(self.logits, value)
        return -torch.nn.functional.binary_cross_entropy_with_logits(logits, value, reduction="none")
