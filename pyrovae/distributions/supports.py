"""Where relaxed values live: the open interval and the open simplex, as floating numbers can tell them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints, transforms


def lowest(dtype: torch.dtype) -> float:
    """The smallest relaxed value: its log and reciprocal are finite, and so are sums of reciprocals."""
    limits = torch.finfo(dtype)
    return limits.tiny / limits.eps


def simplex_tolerance(value: Tensor) -> float:
    """What rounding may take a sum of K values of total 1 away from 1."""
    dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
    return max(1e-6, value.shape[-1] * torch.finfo(dtype).eps)


class OpenSimplex(constraints.Constraint):
    """Positive vectors that sum to 1 up to rounding; not the corners."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether each row is inside, `[...]` of `[..., K]`."""
        near = (value.sum(-1) - 1).abs() <= simplex_tolerance(value)
        valid = (value >= 0).all(-1) & near
        return valid & ((value == 0).sum(-1) < value.shape[-1] - 1) if value.shape[-1] > 1 else valid


class OpenInterval(constraints.Constraint):
    """Between 0 and 1, the ends excluded."""

    def check(self, value: Tensor) -> Tensor:
        """Whether each value is inside."""
        return (value > 0) & (value < 1)


open_simplex, open_interval = OpenSimplex(), OpenInterval()


def _register() -> None:
    """The bijections that autoguides and HMC look up, for our own constraints."""
    registry = torch.distributions.constraint_registry
    registry.biject_to.register(OpenSimplex, lambda _: transforms.StickBreakingTransform())
    registry.transform_to.register(OpenSimplex, lambda _: transforms.SoftmaxTransform())
    for each in (registry.biject_to, registry.transform_to):
        each.register(OpenInterval, lambda _: transforms.SigmoidTransform())


_register()
