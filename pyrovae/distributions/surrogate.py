"""Discrete distributions whose draws carry a surrogate gradient: ReinMax and straight-through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from pyrovae.distributions.parameters import (
    bit_log_prob,
    bounded,
    category_log_prob,
    check_temperature,
    open_uniform,
    softmax,
)

Estimator = Literal["reinmax", "straight_through"]


class _Surrogate:
    """The estimator and its temperature, kept by copies."""

    has_rsample = True
    estimator: Estimator
    surrogate_temperature: Any
    _family: Any
    _validate_args: bool
    _get_checked_instance: Callable[..., Any]

    def __init__(
        self,
        logits: Tensor,
        estimator: Estimator = "reinmax",
        temperature: float | Tensor = 1.0,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        super().__init__(logits=logits, validate_args=validate_args)  # type: ignore[call-arg]
        check_estimator(estimator)
        if not isinstance(temperature, Tensor) or self._validate_args:
            check_temperature(temperature)
        self.estimator, self.surrogate_temperature = estimator, temperature

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        new.estimator, new.surrogate_temperature = self.estimator, self.surrogate_temperature
        return self._family.expand(self, batch_shape, _instance=new)


class SurrogateOneHotCategorical(_Surrogate, dist.OneHotCategorical):
    """A OneHotCategorical whose draws D carry the gradient of a surrogate.

    With g the gradient of the objective at D, J(p) = diag(p) − p pᵀ, π the probabilities and π_t those at the surrogate's
    temperature t, the gradient for the logits is

    * "reinmax": 2 J((π_t + D)/2) g − J(π) g / 2. Unbiased for objectives quadratic in D at t = 1, a second-order
      approximation else;
    * "straight_through": J(π_t) g / t. Unbiased for objectives linear in D at t = 1.

    Values are one-hot and scored by their mass, linearly in the value, so that log p(z) and log q(z) pass their gradient on
    to the draw; the objective is the true discrete bound. Put it in model **and** guide: a prior that is a stock
    OneHotCategorical scores the argmax of z, and its part of the gradient is then missing under `Trace_ELBO`.

    Args:
        logits: log probabilities up to a constant, `[*batch_shape, K]`; a category with −∞ is never drawn and gets no gradient.
        estimator: "reinmax" or "straight_through".
        temperature: of the surrogate's softmax only, draws have that of the distribution; ReinMax wants 1 or more.
        validate_args: check parameters and values; None follows Pyro's setting.

    Raises:
        ValueError: for another estimator, or a temperature that is not positive and finite.

    References:
        Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu, Dong, Liu, Yu, Gao, 2023)
        https://arxiv.org/abs/2304.08612
        Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation (Bengio, Léonard,
        Courville, 2013)
        https://arxiv.org/abs/1308.3432
    """

    _family = torch.distributions.OneHotCategorical

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """One-hot values `[*sample_shape, *batch_shape, K]`, with the surrogate's gradient."""
        hard = self.sample(sample_shape)
        given = bounded(self.logits)
        logits = given.detach()
        zero = given - logits
        t = self.surrogate_temperature
        pi = logits.exp()
        soft = pi if type(t) in (int, float) and t == 1 else softmax(logits / t)
        if self.estimator == "straight_through":
            return hard + _jacobian(soft, zero) / t
        return hard + 2 * _jacobian((soft + hard) / 2, zero) - _jacobian(pi, zero) / 2

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """One-hot values `[*sample_shape, *batch_shape, K]`, by the Gumbel-max trick: several times faster than multinomial."""
        with torch.no_grad():
            u = open_uniform(self._extended_shape(Size(sample_shape)), self.logits)
            score = self.logits - u.log_().neg_().log_()
            return torch.zeros_like(score).scatter_(-1, score.argmax(-1, keepdim=True), 1.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of `value [..., *batch_shape, K]`, linear in it, so that its gradient reaches the draw."""
        if self._validate_args:
            self._validate_sample(value)
        return category_log_prob(value, self.logits)


class SurrogateBernoulli(_Surrogate, dist.Bernoulli):
    """A Bernoulli whose draws b carry the gradient of a surrogate.

    :class:`SurrogateOneHotCategorical` with two classes: with π the probability, the gradient for the logit is
    (2 m (1 − m) − π (1 − π) / 2) g with m = (π_t + b)/2 ("reinmax"; at t = 1 this is |b − π| g / 2, Gregor's estimator), or
    π_t (1 − π_t) g / t ("straight_through").

    Args:
        logits: log odds of a 1, `[*batch_shape]`; −∞ is always 0 and ∞ always 1, without a gradient.
        estimator: "reinmax" or "straight_through".
        temperature: of the surrogate's softmax only, draws have that of the distribution; ReinMax wants 1 or more.
        validate_args: check parameters and values; None follows Pyro's setting.

    Raises:
        ValueError: for another estimator, or a temperature that is not positive and finite.

    References:
        Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu, Dong, Liu, Yu, Gao, 2023)
        https://arxiv.org/abs/2304.08612
        Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation (Bengio, Léonard,
        Courville, 2013)
        https://arxiv.org/abs/1308.3432
    """

    _family = torch.distributions.Bernoulli

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Values in {0, 1}, `[*sample_shape, *batch_shape]`, with the surrogate's gradient."""
        hard = self.sample(sample_shape)
        given = bounded(self.logits)
        logits = given.detach()
        zero = given - logits
        t = self.surrogate_temperature
        soft = torch.sigmoid(logits / t)
        if self.estimator == "straight_through":
            return hard + soft * (1 - soft) / t * zero
        pi, half = torch.sigmoid(logits), (soft + hard) / 2
        return hard + (2 * half * (1 - half) - pi * (1 - pi) / 2) * zero

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of `value [..., *batch_shape]`, linear in it."""
        if self._validate_args:
            self._validate_sample(value)
        return bit_log_prob(value, self.logits)


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
