"""Gumbel-Softmax relaxations of Bernoulli and OneHotCategorical that stay finite at low temperature.

A soft instance is a density on the open interval or simplex; a straight-through one draws the discrete values themselves
and scores them with the discrete log probability, so that nothing hidden travels with a sample.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import constraints, transforms
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.nn.functional import softplus

from pyrovae.distributions.parameters import (
    EXACT_SOFTPLUS,
    as_logits,
    as_temperature,
    bit_log_prob,
    bounded,
    category_log_prob,
    open_uniform,
    softmax,
)
from pyrovae.distributions.relaxed_base import Relaxed
from pyrovae.distributions.supports import lowest, open_interval, open_simplex


class RelaxedOneHotCategorical(Relaxed, dist.RelaxedOneHotCategorical):
    """The Gumbel-Softmax (Concrete) relaxation of a OneHotCategorical.

    A draw is softmax((logits + G) / temperature) with Gumbel noise G: a point of the open simplex whose argmax has the law
    of the category at every temperature. With `straight_through=True` a draw is the one-hot vector of that argmax, with the
    gradient of the soft point, and its log probability is Σ_k v_k log π_k, differentiable in v.

    What is a bound on what, model and guide being of the same kind: soft values under `Trace_ELBO` bound the evidence of the
    *relaxed* model (Maddison et al.); soft values with the KL of `TraceMeanField_ELBO`, which is that of the categories (Jang
    et al.), bound nothing; straight-through values give the true discrete bound under either, with a biased gradient.

    Soft values are clamped to at least tiny/eps of their dtype (1e-31 in float32, 1e-292 in float64), where the gradient of
    the value is 0. The log probability is that of the clamped draw: a density of the values above the clamp times the mass of
    the others' lying at it, finite and exact at every temperature. So a bound is one for the clamped law, whose KL lies
    between that of the categories and that of the unclamped densities (by the data-processing inequality). With logits from
    N(0, 1), values clamped in float32 are: none of 10 to 1000 categories at temperature 0.3; at 0.2 a row in 10 000 has one
    with 10 categories, one in 50 with 1000; at 0.1, 2% of the values with 10 categories and 57% with 1000; at 0.05, 32% and
    97%. Pathwise gradients do not see a value cross the clamp, so that below 0.2 they get a bias in float32: take float64
    there, or straight-through values.

    Cost: three quarters of Pyro's own.

    Args:
        temperature: positive; a number, a 0-d tensor, or a batch of them `[*batch_shape]`, also with the event dim kept
            (`[*batch_shape, 1]` beside logits of as many dims).
        probs: probabilities `[*batch_shape, K]`, summing to 1.
        logits: log probabilities up to a constant, `[*batch_shape, K]`; give this or `probs`.
        straight_through: draw one-hot values; a logit may then be −∞, of a category that is never drawn and gets no gradient.
        validate_args: check parameters and values; None follows Pyro's setting.

    Raises:
        ValueError: for a temperature that is not positive and finite; for infinite (where soft) or NaN logits, and
            probabilities that do not sum to 1; when scoring, for one-hot values of a soft instance and soft values of a
            straight-through one. A number as the temperature is always checked, the rest where validation is on.

    Example:
        >>> q = RelaxedOneHotCategorical(0.5, logits=torch.zeros(4, 3), straight_through=True)
        >>> q.log_prob(q.sample()).exp()
        tensor([0.3333, 0.3333, 0.3333, 0.3333])

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017)
        https://arxiv.org/abs/1611.01144
        The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
        https://arxiv.org/abs/1611.00712
    """

    _torch_base = ExpRelaxedCategorical
    _hard_name = "one-hot"

    def __init__(
        self,
        temperature: float | Tensor,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        straight_through: bool = False,  # noqa: FBT001, FBT002
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        if validate_args is not None:
            self._validate_args = validate_args
        family, check = type(self).__name__, self._validate_args
        logits = as_logits(family, probs, logits, validate=check, event_dim=1, hard=straight_through)
        t = as_temperature(temperature, logits, validate=self._validate_args)
        if t.dim() and t.dim() == logits.dim() and t.shape[-1] == 1:
            t = t.squeeze(-1)
        self._event_shape = logits.shape[-1:]
        self._set(t, logits, torch.broadcast_shapes(logits.shape[:-1], t.shape), straight_through=straight_through)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        """The open simplex; one-hot vectors where straight-through."""
        return constraints.one_hot if self.straight_through else open_simplex

    @property
    def transforms(self) -> list[Any]:
        """From the logarithms."""
        return [transforms.ExpTransform()]

    @property
    def logits(self) -> Tensor:
        """Normalised log probabilities of the categories, `[*batch_shape, K]`."""
        if "_normalized" not in self.__dict__:
            self._normalized = self._logits - self._logits.logsumexp(-1, keepdim=True)
        return self._normalized

    @property
    def probs(self) -> Tensor:
        """Probabilities of the categories, `[*batch_shape, K]`."""
        return self.logits.exp()

    @property
    def mean(self) -> Tensor:
        """The probabilities, where straight-through; a soft draw's mean has no closed form."""
        if self.straight_through:
            return self.probs
        raise NotImplementedError

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Values `[*sample_shape, *batch_shape, K]`, with their pathwise or straight-through gradient."""
        u = open_uniform(self._extended_shape(Size(sample_shape)), self._logits)
        logits = bounded(self._logits) if self.straight_through else self._logits
        score = (logits - u.log_().neg_().log_()) / self._event_temperature  # logits plus Gumbel noise
        soft = softmax(score)
        if not self.straight_through:
            return soft.clamp_min(lowest(soft.dtype))
        hard = torch.zeros_like(soft).scatter_(-1, score.detach().argmax(-1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (Maddison et al., definition 1; of clamped values see above) or log mass of `value [..., *batch, K]`."""
        if self._validate_args:
            self._validate_sample(value)
        if self.straight_through:
            return category_log_prob(value, self.logits)
        low = lowest(value.dtype)
        log_v = value.clamp_min(low).log()
        score = self._logits - self._event_temperature * log_v
        # Given the largest, a clamped category says only that its Gumbel lies below: integrated out, its factor leaves the
        # product but not the sum in the denominator, and the Gamma function counts the categories that are left.
        free = (value > low).to(score.dtype)
        count = free.sum(-1)
        product = (free * (score - log_v)).sum(-1) - count * score.logsumexp(-1)
        return product + (count - 1) * self._temperature.log() + torch.lgamma(count)

    @property
    def _event_temperature(self) -> Tensor:
        return self._temperature.unsqueeze(-1) if self._temperature.dim() else self._temperature

    @staticmethod
    def _is_hard(value: Tensor) -> bool:
        return bool(constraints.one_hot.check(value).any())


class RelaxedBernoulli(Relaxed, dist.RelaxedBernoulli):
    """The relaxation of a Bernoulli: sigmoid((logits + L) / temperature) with logistic noise L.

    The case of two categories; bounds, `straight_through` and cost as in :class:`RelaxedOneHotCategorical`, with the log
    probability v · logits − softplus(logits) of straight-through values.

    Soft values are clamped to [tiny/eps, 1 − eps] of their dtype (eps is 1.2e-7 in float32, 2.2e-16 in float64), where the
    gradient of the value is 0. The log probability is that of the clamped draw: a density within, a mass at the ends. With
    logits from N(0, 4²), 4% of the values are clamped at the upper end in float32 at temperature 0.5, 14% at 0.3, 36% at 0.1;
    in float64 none, 1% and 21%.

    Args:
        temperature: positive; a number, or a tensor that broadcasts with the batch.
        probs: probabilities of a 1, `[*batch_shape]`.
        logits: log odds of a 1, `[*batch_shape]`; give this or `probs`.
        straight_through: draw values in {0, 1}; a logit may then be infinite.
        validate_args: check parameters and values; None follows Pyro's setting.

    Raises:
        ValueError: as for :class:`RelaxedOneHotCategorical`.

    Example:
        >>> z = RelaxedBernoulli(0.5, logits=torch.zeros(3)).sample()
        >>> bool(((0 < z) & (z < 1)).all())
        True

    References:
        The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
        https://arxiv.org/abs/1611.00712
    """

    _torch_base = LogitRelaxedBernoulli
    _hard_name = "0-or-1"
    _event_shape = Size()

    def __init__(
        self,
        temperature: float | Tensor,
        probs: float | Tensor | None = None,
        logits: float | Tensor | None = None,
        straight_through: bool = False,  # noqa: FBT001, FBT002
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        if validate_args is not None:
            self._validate_args = validate_args
        family, check = type(self).__name__, self._validate_args
        logits = as_logits(family, probs, logits, validate=check, event_dim=0, hard=straight_through)
        t = as_temperature(temperature, logits, validate=self._validate_args)
        self._set(t, logits, torch.broadcast_shapes(logits.shape, t.shape), straight_through=straight_through)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        """The open unit interval; {0, 1} where straight-through."""
        return constraints.boolean if self.straight_through else open_interval

    @property
    def transforms(self) -> list[Any]:
        """From the logits of a value."""
        return [transforms.SigmoidTransform()]

    @property
    def logits(self) -> Tensor:
        """Log odds of a 1, `[*batch_shape]`."""
        return self._logits

    @property
    def probs(self) -> Tensor:
        """Probability of a 1, `[*batch_shape]`."""
        return torch.sigmoid(self._logits)

    @property
    def mean(self) -> Tensor:
        """The probability of a 1, where straight-through; a soft draw's mean has no closed form."""
        if self.straight_through:
            return self.probs
        raise NotImplementedError

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Values `[*sample_shape, *batch_shape]`, with their pathwise or straight-through gradient."""
        u = open_uniform(self._extended_shape(Size(sample_shape)), self._logits)
        logits = bounded(self._logits) if self.straight_through else self._logits
        score = (logits + torch.logit(u)) / self._temperature
        soft = torch.sigmoid(score)
        if not self.straight_through:
            return soft.clamp(lowest(soft.dtype), 1 - torch.finfo(soft.dtype).eps)
        return (score > 0).to(soft.dtype) + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (Maddison et al., appendix B) or log mass of `value [..., *batch_shape]`."""
        if self._validate_args:
            self._validate_sample(value)
        if self.straight_through:
            return bit_log_prob(value, self._logits)
        low, high = lowest(value.dtype), 1 - torch.finfo(value.dtype).eps
        value = value.clamp(low, high)
        log_v, log_not_v = value.log(), torch.log1p(-value)
        d = self._logits - self._temperature * (log_v - log_not_v)
        log_not = -softplus(d, threshold=EXACT_SOFTPLUS)  # log of the mass below the value; d + log_not is that above it
        density = self._temperature.log() + d + 2 * log_not - log_v - log_not_v
        return torch.where(value <= low, log_not, torch.where(value >= high, d + log_not, density))

    @staticmethod
    def _is_hard(value: Tensor) -> bool:
        return bool(((value == 0) | (value == 1)).any())
