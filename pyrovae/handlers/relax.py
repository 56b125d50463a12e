"""The relaxed twin of a discrete program, and the discrete twin of a relaxed one.

`relax(program, t)` runs a model or guide with every latent Bernoulli and OneHotCategorical replaced by its
Gumbel-Softmax relaxation, so that pathwise gradients exist; `discretize(program)` goes the other way, so that a program
written with `Relaxed*` sites can be enumerated. A program is wrapped once, before it is given to `SVI` or to a method: a
handler around the call would not reach what runs inside `poutine.block`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor


class RewrittenProgram:
    """A program whose latent sites are rewritten at every run; the original is in `program`."""

    def __init__(self, program: Callable[..., Any], temperature: Tensor | None) -> None:
        self.program = program
        self.temperature = temperature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, rewritten."""
        with _Rewrite(_discrete) if self.temperature is None else _Rewrite(_Relaxer(self.temperature)):
            return self.program(*args, **kwargs)


def relax(program: Callable[..., Any], temperature: float | Tensor) -> RewrittenProgram:
    """The relaxed twin of a model or guide.

    Every latent Bernoulli becomes a RelaxedBernoulli with the same logits, every latent OneHotCategorical a
    RelaxedOneHotCategorical, also inside `.to_event`, `.mask` and `.expand`; batch and event shapes are kept. Observed,
    continuous and already relaxed sites stay as they are. A site that is not observed in this call counts as latent: the
    observation of a model called without data is relaxed too, so draw pictures from the discrete program.

    Bias: the relaxed program is another model. Its ELBO, with model and guide both relaxed, bounds the evidence of the
    *relaxed* model; it is no bound on the discrete log p(x), and its gradient is a biased estimate of that of the discrete
    ELBO, with less bias and more variance as the temperature falls. Report the discrete bound.
    Cost: that of the program.

    Args:
        program: a Pyro program: ours, a `PyroModule`, a plain function; also a guide, whose sites must then meet those of a
            model relaxed at the same sites.
        temperature: positive; a float, or a 0-d tensor that is read at every run, so that it may be changed in place.

    Returns:
        A callable with the program's arguments and the attributes `program` and `temperature`.

    Raises:
        ValueError: if the temperature is not positive and finite; at a run, for a latent that is discrete but neither
            Bernoulli nor OneHotCategorical.

    Example:
        >>> import pyro
        >>> def model():
        ...     return pyro.sample("z", dist.Bernoulli(torch.tensor([0.2, 0.7])).to_event(1))
        >>> z = relax(model, 0.5)()
        >>> bool(((0 < z) & (z < 1)).all())
        True

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017)
        https://arxiv.org/abs/1611.01144
        The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
        https://arxiv.org/abs/1611.00712
    """
    value = temperature if isinstance(temperature, Tensor) else torch.tensor(float(temperature))
    if value.dim() != 0 or not bool(torch.isfinite(value)) or not bool(value > 0):
        raise ValueError(
            f"expected a positive, finite temperature (a float or a 0-d tensor), got "
            f"{temperature if value.dim() == 0 else f'a tensor of shape {tuple(value.shape)}'}; values from 0.1 to 1 are usual"
        )
    return RewrittenProgram(program, value)


def discretize(program: Callable[..., Any]) -> RewrittenProgram:
    """The discrete twin of a program written with relaxed sites; the inverse of :func:`relax`.

    Every latent RelaxedBernoulli (also straight-through) becomes a Bernoulli with the same logits, every latent
    RelaxedOneHotCategorical a OneHotCategorical; everything else stays. Exact, at the cost of the program.

    Args:
        program: a Pyro program.

    Returns:
        A callable with the program's arguments and the attribute `program`.

    Example:
        >>> import pyro
        >>> def model():
        ...     return pyro.sample("z", dist.RelaxedBernoulli(torch.tensor(0.5), logits=torch.zeros(3)).to_event(1))
        >>> z = discretize(model)()
        >>> bool(((z == 0) | (z == 1)).all())
        True
    """
    return RewrittenProgram(program, None)


class StableRelaxedBernoulli(dist.RelaxedBernoulli):
    """Pyro's RelaxedBernoulli, with values kept inside (0, 1) and a log density that stays finite.

    Values are clamped to [tiny/eps, 1 − eps] of their dtype; where the clamp acts, the gradient of the value is 0.
    """

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Values `[*sample_shape, *batch_shape]`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = _open_uniform(shape, self.logits)
        y = (self.logits + u.log() - torch.log1p(-u)) / self.temperature
        low, high = _bounds(y.dtype)
        return torch.sigmoid(y).clamp(low, high)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of `value [..., *batch_shape]` (Maddison et al., appendix B)."""
        low, high = _bounds(value.dtype)
        value = value.clamp(low, high)
        log_v, log_not_v = value.log(), torch.log1p(-value)
        d = self.logits - self.temperature * (log_v - log_not_v)
        # d - 2 softplus(d), without the cut-off of torch's softplus at 20
        logistic = torch.nn.functional.logsigmoid(d) + torch.nn.functional.logsigmoid(-d)
        return torch.as_tensor(self.temperature).log() + logistic - log_v - log_not_v


class StableRelaxedOneHotCategorical(dist.RelaxedOneHotCategorical):
    """Pyro's RelaxedOneHotCategorical, with values kept off the faces of the simplex and a log density that stays finite.

    Values are clamped to at least tiny/eps of their dtype; where the clamp acts, the gradient of the value is 0.
    """

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Values `[*sample_shape, *batch_shape, K]`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        gumbel = -(-_open_uniform(shape, self.logits).log()).log()
        return torch.softmax((self.logits + gumbel) / self.temperature, -1).clamp_min(_bounds(gumbel.dtype)[0])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of `value [..., *batch_shape, K]` with respect to K − 1 coordinates (Maddison et al., definition 1)."""
        k = self.event_shape[-1]
        log_v = value.clamp_min(_bounds(value.dtype)[0]).log()
        score = torch.log_softmax(self.logits - self.temperature * log_v, -1)
        log_scale = math.lgamma(k) + (k - 1) * torch.as_tensor(self.temperature).log()
        return log_scale + (score - log_v).sum(-1)


def innermost(fn: Any) -> Any:
    """The distribution inside `.to_event`, `.mask` and `.expand`."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution, _EXPANDED)):
        fn = fn.base_dist
    return fn


def rewrap(fn: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the innermost distribution and put `.to_event`, `.mask` and `.expand` back around it."""
    if isinstance(fn, torch.distributions.Independent):
        base = rewrap(fn.base_dist, change)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        base = rewrap(fn.base_dist, change)
        return fn if base is fn.base_dist else base.mask(fn._mask)
    if isinstance(fn, _EXPANDED):
        base = rewrap(fn.base_dist, change)
        return fn if base is fn.base_dist else base.expand(fn.batch_shape)
    return change(fn)


_EXPANDED = dist.torch_distribution.ExpandedDistribution


class _Rewrite(Messenger):
    def __init__(self, change: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.change = change

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        # A replayed value is already there, but `fn` still scores it: no early return on msg["done"].
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        msg["fn"] = rewrap(msg["fn"], lambda fn: self.change(msg["name"], fn))


class _Relaxer:
    """Bernoulli and OneHotCategorical to their relaxations at one temperature."""

    def __init__(self, temperature: Tensor) -> None:
        self.temperature = temperature

    def __call__(self, name: str, fn: Any) -> Any:
        if isinstance(fn, torch.distributions.Bernoulli):
            return StableRelaxedBernoulli(self._temperature(fn), logits=fn.logits, validate_args=False)
        if isinstance(fn, torch.distributions.OneHotCategorical):
            return StableRelaxedOneHotCategorical(self._temperature(fn), logits=fn.logits, validate_args=False)
        if _is_discrete(fn):
            remedy = (
                "write the site as dist.OneHotCategorical and index with `z @ table` instead of `table[z]`"
                if isinstance(fn, torch.distributions.Categorical)
                else "use a score-function or exact method for this program"
            )
            raise ValueError(
                f"expected Bernoulli or OneHotCategorical latents for relax, got the {type(fn).__name__} site {name!r}; "
                f"{remedy}"
            )
        return fn

    def _temperature(self, fn: Any) -> Tensor:
        return self.temperature.to(fn.logits)


def _discrete(_: str, fn: Any) -> Any:
    if isinstance(fn, torch.distributions.RelaxedBernoulli):
        return dist.Bernoulli(logits=fn.logits)
    if isinstance(fn, torch.distributions.RelaxedOneHotCategorical):
        return dist.OneHotCategorical(logits=fn.logits)
    return fn


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _open_uniform(shape: torch.Size, like: Tensor) -> Tensor:
    """Uniform values in (0, 1), away from both ends."""
    limits = torch.finfo(like.dtype)
    return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(limits.eps, 1 - limits.eps)


def _bounds(dtype: torch.dtype) -> tuple[float, float]:
    """Smallest and largest relaxed value: logs and reciprocals of them are finite, and so are sums of reciprocals."""
    limits = torch.finfo(dtype)
    return limits.tiny / limits.eps, 1 - limits.eps
