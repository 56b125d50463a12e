"""Gumbel-Softmax relaxations of Bernoulli and OneHotCategorical that stay finite at low temperature.

A soft instance is a density on the open interval or simplex; a straight-through one draws the discrete values themselves
and scores them with the discrete log probability, so that nothing hidden travels with a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import constraints, transforms
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.distributions.utils import probs_to_logits
from torch.nn.functional import softplus


class _Relaxed:
    """What the two families share: parameters, shapes, copies and the messages of validation."""

    has_rsample = True  # pathwise, or straight-through
    straight_through: bool
    rsample: Callable[..., Tensor]
    _batch_shape: Size
    _event_shape: Size
    _validate_args: bool
    _get_checked_instance: Callable[..., Any]
    _torch_base: Any
    _hard_name: str
    _is_hard: Callable[[Tensor], bool]

    def _set(self, temperature: Tensor, logits: Tensor, batch_shape: Size, *, straight_through: bool) -> None:
        shape = batch_shape + self._event_shape
        self._temperature = temperature
        self._logits = logits if logits.shape == shape else logits.expand(shape)
        self._batch_shape = batch_shape
        self.straight_through = straight_through

    @property
    def temperature(self) -> Tensor:
        """Temperature, 0-d or broadcastable to the batch shape."""
        return self._temperature

    @property
    def base_dist(self) -> Any:
        """Torch's distribution of the logarithms (logits), for code that takes the family as a transformed distribution."""
        return self._torch_base(self._temperature, logits=self._logits, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """A draw without gradient, `[*sample_shape, *batch_shape, *event_shape]`."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape; no memory is taken."""
        new = self._get_checked_instance(type(self), _instance)
        new._event_shape = self._event_shape
        new._set(self._temperature, self._logits, Size(batch_shape), straight_through=self.straight_through)
        new._validate_args = self._validate_args
        return new

    def _validate_sample(self, value: Tensor) -> None:
        """Torch's check, with an explanation where a soft value meets a mass, or a hard one a density."""
        try:
            super()._validate_sample(value)  # type: ignore[misc]
        except ValueError as error:
            if not isinstance(value, Tensor) or not str(error).startswith("Expected value argument"):
                raise
            raise ValueError(self._explain(value)) from error

    def _explain(self, value: Tensor) -> str:
        name = type(self).__name__
        if bool(torch.isnan(value).any()):
            return f"expected values of {name} without NaN, got {int(torch.isnan(value).sum())}; check what drew them"
        outside = bool((value < 0).any() | (value > 1).any())
        if outside:
            return f"expected values of {name} in [0, 1], got {float(value.min()):g} to {float(value.max()):g}"
        if self.straight_through:
            return (
                f"expected {self._hard_name} values for the straight-through {name}, which scores them by a mass, got soft "
                "ones; relax model and guide alike (straight_through on both, or on neither)"
            )
        if self._is_hard(value):
            return (
                f"expected soft values for the density of {name}, got exact {self._hard_name} ones: a mass has no density "
                "here, and the difference of the two log probabilities means nothing; relax model and guide alike, or "
                "score hard values with the discrete program"
            )
        return f"expected values of {name} that sum to 1, got sums from {float(value.sum(-1).min()):g} to " + (
            f"{float(value.sum(-1).max()):g}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_normalized"}

    def __repr__(self) -> str:
        t = self._temperature
        shown = f"{float(t):g}" if t.dim() == 0 else f"of shape {tuple(t.shape)}"
        kind = ", straight_through=True" if self.straight_through else ""
        return f"{type(self).__name__}(temperature {shown}, logits of shape {tuple(self._logits.shape)}{kind})"


class RelaxedOneHotCategorical(_Relaxed, dist.RelaxedOneHotCategorical):
    """The Gumbel-Softmax (Concrete) relaxation of a OneHotCategorical.

    A draw is softmax((logits + G) / temperature) with Gumbel noise G: a point of the open simplex whose argmax has the law
    of the category at every temperature. With `straight_through=True` a draw is the one-hot vector of that argmax, with the
    gradient of the soft point, and its log probability is Σ_k v_k log π_k, differentiable in v.

    What is a bound on what, model and guide being of the same kind: soft values under `Trace_ELBO` bound the evidence of the
    *relaxed* model (Maddison et al.); soft values with the KL of `TraceMeanField_ELBO`, which is that of the categories (Jang
    et al.), bound nothing; straight-through values give the true discrete bound under either, with a biased gradient.

    Soft values are clamped to at least tiny/eps of their dtype (1e-31 in float32, 1e-292 in float64), where the gradient of
    the value is 0; log densities are then finite at every temperature and exact where no value is clamped. With logits from
    N(0, 1), values clamped in float32 are: none of 10 to 1000 categories at temperature 0.3; at 0.2 a row in 10 000 has one
    with 10 categories, one in 50 with 1000; at 0.1, 2% of the values with 10 categories and 57% with 1000; at 0.05, 32% and
    97%. A clamped value has lost what log q − log p would tell of it: the relaxed KL of 10 categories to the uniform, 3.73 at
    every temperature shared with the prior, is estimated as 3.49 at 0.1 and as 0.53 at 0.05. Below 0.2, take float64 (a row
    in 10 has a clamped value at 0.02 with 1000 categories), straight-through values or `TraceMeanField_ELBO`.

    Cost: three quarters of Pyro's own.

    Args:
        temperature: positive; a number, a 0-d tensor, or a batch of them `[*batch_shape]`, also with the event dim kept
            (`[*batch_shape, 1]` beside logits of as many dims).
        probs: probabilities `[*batch_shape, K]`, summing to 1.
        logits: log probabilities up to a constant, `[*batch_shape, K]`; give this or `probs`.
        straight_through: draw one-hot values.
        validate_args: check parameters and values; None follows Pyro's setting.

    Raises:
        ValueError: for a temperature that is not positive and finite; for infinite or NaN logits, and probabilities that do
            not sum to 1; when scoring, for one-hot values of a soft instance and soft values of a straight-through one.
            A number as the temperature is always checked, the rest where validation is on.

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
        logits = _parameter(type(self).__name__, probs, logits, validate=self._validate_args, event_dim=1)
        t = _temperature(temperature, logits, validate=self._validate_args)
        if t.dim() and t.dim() == logits.dim() and t.shape[-1] == 1:
            t = t.squeeze(-1)
        self._event_shape = logits.shape[-1:]
        self._set(t, logits, torch.broadcast_shapes(logits.shape[:-1], t.shape), straight_through=straight_through)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        """The open simplex; one-hot vectors where straight-through."""
        return constraints.one_hot if self.straight_through else _open_simplex

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
        score = (self._logits - u.log_().neg_().log_()) / self._event_temperature  # logits plus Gumbel noise
        soft = softmax(score)
        if not self.straight_through:
            return soft.clamp_min(lowest(soft.dtype))
        hard = torch.zeros_like(soft).scatter_(-1, score.detach().argmax(-1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (Maddison et al., definition 1) or log mass of `value [..., *batch_shape, K]`."""
        if self._validate_args:
            self._validate_sample(value)
        if self.straight_through:
            return (value * self.logits).sum(-1)
        k = self._event_shape[-1]
        log_v = value.clamp_min(lowest(value.dtype)).log()
        score = self._logits - self._event_temperature * log_v
        return (score - score.logsumexp(-1, keepdim=True) - log_v).sum(-1) + (
            (k - 1) * self._temperature.log() + math.lgamma(k)
        )

    @property
    def _event_temperature(self) -> Tensor:
        return self._temperature.unsqueeze(-1) if self._temperature.dim() else self._temperature

    @staticmethod
    def _is_hard(value: Tensor) -> bool:
        return bool(constraints.one_hot.check(value).any())


class RelaxedBernoulli(_Relaxed, dist.RelaxedBernoulli):
    """The relaxation of a Bernoulli: sigmoid((logits + L) / temperature) with logistic noise L.

    The case of two categories; bounds, `straight_through` and cost as in :class:`RelaxedOneHotCategorical`, with the log
    probability v · logits − softplus(logits) of straight-through values.

    Soft values are clamped to [tiny/eps, 1 − eps] of their dtype (eps is 1.2e-7 in float32, 2.2e-16 in float64), where the
    gradient of the value is 0: the density is exact within, and finite at the ends. With logits from N(0, 4²), 4% of the
    values are clamped at the upper end in float32 at temperature 0.5, 14% at 0.3, 36% at 0.1; in float64 none, 1% and 21%.

    Args:
        temperature: positive; a number, or a tensor that broadcasts with the batch.
        probs: probabilities of a 1, `[*batch_shape]`.
        logits: log odds of a 1, `[*batch_shape]`; give this or `probs`.
        straight_through: draw values in {0, 1}.
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
        logits = _parameter(type(self).__name__, probs, logits, validate=self._validate_args, event_dim=0)
        t = _temperature(temperature, logits, validate=self._validate_args)
        self._set(t, logits, torch.broadcast_shapes(logits.shape, t.shape), straight_through=straight_through)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        """The open unit interval; {0, 1} where straight-through."""
        return constraints.boolean if self.straight_through else _open_interval

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
        score = (self._logits + torch.logit(u)) / self._temperature
        soft = torch.sigmoid(score)
        if not self.straight_through:
            return soft.clamp(lowest(soft.dtype), 1 - torch.finfo(soft.dtype).eps)
        return (score > 0).to(soft.dtype) + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (Maddison et al., appendix B) or log mass of `value [..., *batch_shape]`."""
        if self._validate_args:
            self._validate_sample(value)
        if self.straight_through:
            return value * self._logits - softplus(self._logits, threshold=_EXACT)
        value = value.clamp(lowest(value.dtype), 1 - torch.finfo(value.dtype).eps)
        log_v, log_not_v = value.log(), torch.log1p(-value)
        d = self._logits - self._temperature * (log_v - log_not_v)
        return self._temperature.log() + d - 2 * softplus(d, threshold=_EXACT) - log_v - log_not_v

    @staticmethod
    def _is_hard(value: Tensor) -> bool:
        return bool(((value == 0) | (value == 1)).any())


_EXACT = 40.0  # torch's default cut-off of softplus, 20, is off by 2e-9


def open_uniform(shape: Size, like: Tensor) -> Tensor:
    """Uniform values in (0, 1), away from both ends."""
    eps = torch.finfo(like.dtype).eps
    return torch.rand(shape, dtype=like.dtype, device=like.device).clamp_(eps, 1 - eps)


def softmax(score: Tensor) -> Tensor:
    """The softmax in steps that vectorise over all dims: torch's is five times slower for a handful of categories."""
    e = (score - score.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def lowest(dtype: torch.dtype) -> float:
    """The smallest relaxed value: its log and reciprocal are finite, and so are sums of reciprocals."""
    limits = torch.finfo(dtype)
    return limits.tiny / limits.eps


def check_temperature(temperature: Any) -> None:
    """Refuse a temperature that is not positive and finite.

    Raises:
        ValueError: saying so.
    """
    t = torch.as_tensor(temperature)
    if not bool(((t > 0) & torch.isfinite(t)).all()):
        got = f"{float(t):g}" if t.dim() == 0 else f"values from {float(t.min()):g} to {float(t.max()):g}"
        raise ValueError(f"expected a positive, finite temperature, got {got}; values from 0.1 to 1 are usual")


def _temperature(temperature: float | Tensor, logits: Tensor, *, validate: bool) -> Tensor:
    if isinstance(temperature, Tensor):
        if validate:
            check_temperature(temperature)
        return temperature.to(logits)
    if not isinstance(temperature, Real):
        raise ValueError(f"expected a temperature that is a number or a tensor, got {type(temperature).__name__}")
    check_temperature(temperature)
    return logits.new_tensor(float(temperature))


def _parameter(family: str, probs: Any, logits: Any, *, validate: bool, event_dim: int) -> Tensor:
    """The logits, as given or from the probabilities, as a floating tensor."""
    if (probs is None) == (logits is None):
        raise ValueError(f"expected either probs or logits for {family}, got {'none' if probs is None else 'both'}")
    name = "probs" if logits is None else "logits"
    given = probs if logits is None else logits
    value = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.get_default_dtype())
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    if value.dim() < event_dim:
        raise ValueError(f"expected {name} of {family} with a last dim of categories, got a 0-d tensor")
    if validate and not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"expected finite {name} for {family}, got {int((~torch.isfinite(value)).sum())} infinite or NaN of "
            f"{value.numel()}; a category that is all but impossible has a logit of -30 or so"
        )
    if name == "logits":
        return value
    if validate and not bool(((value >= 0) & (value <= 1 + 1e-6)).all()):
        raise ValueError(f"expected probs of {family} in [0, 1], got {float(value.min()):g} to {float(value.max()):g}")
    if not event_dim:
        return probs_to_logits(value, is_binary=True)
    total = value.sum(-1)
    if validate and not bool(((total - 1).abs() <= _simplex_tolerance(value)).all()):
        raise ValueError(
            f"expected probs of {family} that sum to 1, got sums from {float(total.min()):g} to {float(total.max()):g}; "
            "normalise them, or pass their logarithms as logits"
        )
    return probs_to_logits(value / total.unsqueeze(-1))


def _simplex_tolerance(value: Tensor) -> float:
    """What rounding may take a sum of K values of total 1 away from 1."""
    dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
    return max(1e-6, value.shape[-1] * torch.finfo(dtype).eps)


class _OpenSimplex(constraints.Constraint):
    """Positive vectors that sum to 1 up to rounding; not the corners."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        near = (value.sum(-1) - 1).abs() <= _simplex_tolerance(value)
        valid = (value >= 0).all(-1) & near
        return valid & ((value == 0).sum(-1) < value.shape[-1] - 1) if value.shape[-1] > 1 else valid


class _OpenInterval(constraints.Constraint):
    """Between 0 and 1, the ends excluded."""

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)


_open_simplex, _open_interval = _OpenSimplex(), _OpenInterval()


def _register() -> None:
    """The bijections that autoguides and HMC look up, for our own constraints."""
    registry = torch.distributions.constraint_registry
    registry.biject_to.register(_OpenSimplex, lambda _: transforms.StickBreakingTransform())
    registry.transform_to.register(_OpenSimplex, lambda _: transforms.SoftmaxTransform())
    for each in (registry.biject_to, registry.transform_to):
        each.register(_OpenInterval, lambda _: transforms.SigmoidTransform())


_register()
