"""Discrete distributions whose draws carry a surrogate gradient: ReinMax and straight-through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.distributions.relaxed import check_temperature

Estimator = Literal["reinmax", "straight_through"]


class _Surrogate:
    """The estimator and its temperature, kept by copies."""

    has_rsample = True
    estimator: str
    surrogate_temperature: Any
    _family: Any
    _validate_args: bool
    _get_checked_instance: Callable[..., Any]

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        new.estimator, new.surrogate_temperature = self.estimator, self.surrogate_temperature
        return self._family.expand(self, batch_shape, _instance=new)

    def _check(self, estimator: str, temperature: Any) -> None:
        check_estimator(estimator)
        if not isinstance(temperature, Tensor) or self._validate_args:
            check_temperature(temperature)
        self.estimator, self.surrogate_temperature = estimator, temperature


class SurrogateOneHotCategorical(_Surrogate, dist.OneHotCategorical):
    """A OneHotCategorical whose draws D carry the gradient of a surrogate."""

    _family = torch.distributions.OneHotCategorical

    def __init__(
        self,
        logits: Tensor,
        estimator: Estimator = "reinmax",
        temperature: float | Tensor = 1.0,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        super().__init__(logits=logits, validate_args=validate_args)
        self._check(estimator, temperature)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """One-hot values `[*sample_shape, *batch_shape, K]`, with the surrogate's gradient."""
        hard = self.sample(sample_shape)
        logits = self.logits
        zero = logits - logits.detach()
        t = self.surrogate_temperature
        soft = torch.softmax(logits.detach() / t, -1)
        if self.estimator == "straight_through":
            return hard + _jacobian(soft, zero) / t
        pi = soft if isinstance(t, float) and t == 1 else torch.softmax(logits.detach(), -1)
        return hard + 2 * _jacobian((soft + hard) / 2, zero) - _jacobian(pi, zero) / 2

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of `value [..., *batch_shape, K]`, linear in it, so that its gradient reaches the draw."""
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum(-1)


class SurrogateBernoulli(_Surrogate, dist.Bernoulli):
    """A Bernoulli whose draws b carry the gradient of a surrogate."""

    _family = torch.distributions.Bernoulli

    def __init__(
        self,
        logits: Tensor,
        estimator: Estimator = "reinmax",
        temperature: float | Tensor = 1.0,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        super().__init__(logits=logits, validate_args=validate_args)
        self._check(estimator, temperature)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Values in {0, 1}, `[*sample_shape, *batch_shape]`, with the surrogate's gradient."""
        hard = self.sample(sample_shape)
        zero = self.logits - self.logits.detach()
        t = self.surrogate_temperature
        soft = torch.sigmoid(self.logits.detach() / t)
        if self.estimator == "straight_through":
            return hard + soft * (1 - soft) / t * zero
        pi, half = torch.sigmoid(self.logits.detach()), (soft + hard) / 2
        return hard + (2 * half * (1 - half) - pi * (1 - pi) / 2) * zero

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of `value [..., *batch_shape]`, linear in it."""
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits - softplus(self.logits, threshold=40.0)


def check_estimator(estimator: str) -> None:
    """Refuse the name of an estimator that is not here.

    Raises:
        ValueError: saying which there are.
    """
    if estimator not in ("reinmax", "straight_through"):
        raise ValueError(f'expected estimator "reinmax" or "straight_through", got {estimator!r}')


def _jacobian(p: Tensor, direction: Tensor) -> Tensor:
    """(diag(p) − p pᵀ) · direction, along the last dim."""
    weighted = p * direction
    return weighted - p * weighted.sum(-1, keepdim=True)
