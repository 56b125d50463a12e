"""What annealed importance sampling says of a partition function, and how far to trust it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.distributions import RBM, BoltzmannMachine
from pyrovae.distributions.boltzmann import BoltzmannMarginal
from pyrovae.inference.ais.interval import normal_interval
from pyrovae.inference.undirected.energy import energy_of
from pyrovae.ops import check_enumerable, effective_sample_size, log_mean_exp, sample_boltzmann, sample_rbm
from pyrovae.ops.annealing import BoltzmannPath, RbmPath
from pyrovae.ops.mean_bound import log_mean_lower_bound

_TRUSTED = 0.05  # of the chains, that the effective sample size must reach
_ROUNDING = 4  # half the least width of an interval, in ulps of log Z in the dtype of the parameters
_PSEUDO_COUNT = 5.0  # of ones and of zeros, for each unit of the base


@dataclass(frozen=True, eq=False, kw_only=True)
class LogPartition:
    """An estimate of log Z by independent chains, in float64; `[*batch]` for machines with a batch of biases, else 0-d.

    Ẑ is unbiased, so that E[log Ẑ] ≤ log Z: `log_z` is a lower bound in expectation, and log p(x) computed with it overstates
    in expectation, log Z − log Ẑ on average: label it an *upper* bound, as `bound_on_log_prob` does.

    Attributes:
        log_z: log Ẑ, the log of the mean weight plus `log_z_base`.
        lower: lower end of the interval at `confidence`: log(Ẑ − sigmas σ̂), by Student's t; where that is no number,
            :meth:`lower_bound`. Both ends are at least a few ulps of log Z, in the dtype of the parameters, from `log_z`.
        upper: upper end; see :func:`pyrovae.inference.ais.interval.normal_interval` for what it allows for. No upper end
            can be guaranteed from forward chains: a mode that all of them miss leaves no trace. :meth:`AIS.sandwich` can.
        ess: Kish's effective sample size of the chains' weights; below 5% of them, do not trust the rest.
        log_weights: `[M, *batch]`.
        log_z_base: log Z of the independent units that the path starts from.
        num_temperatures: of the path, 0 and 1 included.
        sigmas: of the interval.
    """

    log_z: Tensor
    lower: Tensor
    upper: Tensor
    ess: Tensor
    log_weights: Tensor = field(repr=False)
    log_z_base: Tensor = field(repr=False)
    num_temperatures: int
    sigmas: float

    bound = "lower"
    bound_on_log_prob = "upper"
    direction = "E[log_z] <= log Z; log p(x) computed with it overstates in expectation (upper)"

    @property
    def stderr(self) -> Tensor:
        """Standard error of `log_z` by the delta method, `[*batch]`."""
        return (1 / self.ess - 1 / len(self.log_weights)).clamp_min(0).sqrt()

    @property
    def confidence(self) -> float:
        """Nominal probability that the interval holds log Z."""
        return math.erf(self.sigmas / math.sqrt(2))

    def lower_bound(self, confidence: float = 0.99) -> Tensor:
        """A lower bound on log Z that holds with at least this probability, whatever the law of the weights is.

        Never worse than Markov's log Ẑ − t at confidence 1 − e^{−t} by more than log 2, and for weights that agree much
        tighter; see :func:`pyrovae.ops.mean_bound.log_mean_lower_bound`.
        """
        return self.log_z_base + log_mean_lower_bound(self.log_weights, confidence)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sandwich:
    """Bounds on log Z, or on log p(x), from both sides: forward chains from the base, reverse ones from exact draws.

    Attributes:
        forward: log of the mean forward weight: in expectation a lower bound.
        reverse: −log of the mean of the reverse chains' 1/w: in expectation an upper bound.
        lower: below the truth, and
        upper: above it, both at once with probability at least `confidence`, whatever the laws of the weights are. None of
            the chains' convergence is assumed, only that the reverse ones start from exact draws.
        confidence: as asked for.
        forward_ess: Kish's effective sample size of the forward weights.
        reverse_ess: of the reverse chains' 1/w; for simulated data, whose chains of a row share one start, the bound is
            Markov's and this only describes.
        data: simulated data; None for a partition function.
    """

    forward: Tensor
    reverse: Tensor
    lower: Tensor
    upper: Tensor
    confidence: float
    forward_ess: Tensor
    reverse_ess: Tensor
    data: Tensor | None = field(default=None, repr=False)

    @property
    def gap(self) -> Tensor:
        """Reverse minus forward: in expectation at least the sum of both errors."""
        return self.reverse - self.forward


def log_partition(
    target: Any, betas: tuple[float, ...], num_chains: int, base: Any, data: Tensor | None, sigmas: float
) -> LogPartition:
    """Forward chains; see :meth:`pyrovae.inference.AIS.log_partition`."""
    with torch.no_grad():
        distribution = energy_of(target)
        path = _path(distribution, base, data)
        log_w = path.forward(betas, num_chains)
        _check_weights(log_w)
        ess = torch.where(log_w.amax(0).isneginf(), 0.0, effective_sample_size(log_w))
        lower, upper = (path.log_z_base + end for end in normal_interval(log_w, sigmas))
        log_z = path.log_z_base + log_mean_exp(log_w)
        eps = torch.finfo(distribution.parameters[0].dtype).eps
        rounding = _ROUNDING * eps * torch.maximum(log_z.abs(), path.log_z_base.abs()).nan_to_num(posinf=0.0)
        found = LogPartition(
            log_z=log_z,
            lower=torch.minimum(lower, log_z - rounding),
            upper=torch.maximum(upper, log_z + rounding),
            ess=ess,
            log_weights=log_w,
            log_z_base=path.log_z_base,
            num_temperatures=len(betas),
            sigmas=sigmas,
        )
    warn_of_few(ess, num_chains, "log Z")
    return found


def sandwich(
    target: Any,
    betas: tuple[float, ...],
    num_chains: int,
    base: Any,
    data: Tensor | None,
    num_exact: int | None,
    confidence: float,
    max_bits: int,
) -> Sandwich:
    """Chains both ways; see :meth:`pyrovae.inference.AIS.sandwich`."""
    with torch.no_grad():
        distribution = energy_of(target)
        path = _path(distribution, base, data)
        start = _exact_draws(distribution, num_chains if num_exact is None else num_exact, max_bits)
        forward, reverse = path.forward(betas, num_chains), -path.backward(betas, start)
        _check_weights(forward)
        _check_weights(reverse)
        each = (1 + confidence) / 2  # one side errs with at most half of what both may
        found = Sandwich(
            forward=path.log_z_base + log_mean_exp(forward),
            reverse=path.log_z_base - log_mean_exp(reverse),
            lower=path.log_z_base + log_mean_lower_bound(forward, each),
            upper=path.log_z_base - log_mean_lower_bound(reverse, each),
            confidence=confidence,
            forward_ess=effective_sample_size(forward),
            reverse_ess=effective_sample_size(reverse),
        )
    return found


def warn_of_few(ess: Tensor, num_chains: int, what: str) -> None:
    """Warn where the effective sample size is below 5% of the chains (and of what they could be)."""
    few = ess < max(_TRUSTED * num_chains, min(2.0, num_chains - 0.5))
    if bool(few.any()):
        where = f" for {int(few.sum())} of {few.numel()}" if few.numel() > 1 else ""
        warnings.warn(
            f"AIS: effective sample size down to {float(ess.min()):.1f} of {num_chains} chains{where}: the estimate of {what} "
            "is not to be trusted, and lies probably below; raise num_temperatures",
            UserWarning,
            stacklevel=4,
        )


def _path(distribution: Any, base: Any, data: Tensor | None) -> RbmPath | BoltzmannPath:
    for name, value in zip(distribution.arg_constraints, distribution.parameters, strict=True):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"expected finite {name}, got {int((~torch.isfinite(value)).sum())} infinite or NaN values")
    if isinstance(distribution, RBM):
        logits = _base(distribution, base, data)
        return RbmPath(distribution.W, distribution.b, distribution.c, logits)
    if isinstance(distribution, (BoltzmannMachine, BoltzmannMarginal)):
        return BoltzmannPath(distribution.J, distribution.b, _base(distribution, base, data))
    raise TypeError(f"expected an RBM or a BoltzmannMachine, got {type(distribution).__name__}; AIS knows no path to it")


def _base(distribution: Any, base: Any, data: Tensor | None) -> Tensor:
    """Logits of the independent units at β = 0, of the shape of the biases or broadcasting to it."""
    if base is not None and data is not None:
        raise ValueError("expected data or a base of its own, got both; data set the base")
    biases, visible = distribution.b.detach(), distribution.event_shape[0]
    n = biases.shape[-1]
    if isinstance(base, Tensor):
        if base.shape[-1:] != (n,) or base.dim() > biases.dim() or not bool(torch.isfinite(base).all()):
            raise ValueError(f"expected base logits, finite, [{n}], got {list(base.shape)}")
        return base
    if base == "uniform":
        return torch.zeros_like(biases)
    if base is not None:
        raise ValueError(f"expected base None, 'uniform' or a tensor of logits [{n}], got {base!r}")
    if data is None:
        return biases
    rows = data.flatten(0, -2) if data.dim() > 1 else data[None]
    units = rows.shape[-1]
    hidden = isinstance(distribution, BoltzmannMachine)  # some of its units may be
    if not (units == visible or (hidden and 0 < units < visible)) or not bool(((rows >= 0) & (rows <= 1)).all()):
        width = f"<= {visible}" if hidden else str(visible)
        raise ValueError(f"expected data [N, {width}] within [0, 1], got {list(data.shape)}; scale or binarize them")
    rate = (rows.to(biases).sum(0) + _PSEUDO_COUNT) / (len(rows) + 2 * _PSEUDO_COUNT)
    logits = biases.clone()
    logits[..., :units] = torch.logit(rate)  # hidden units of a Boltzmann machine keep their biases
    return logits


def _exact_draws(distribution: Any, count: int, max_bits: int) -> Tensor:
    if count < 1:
        raise ValueError(f"expected num_exact >= 1, got {count}")
    tensors = [value.detach() for value in distribution.parameters]
    bits = min(tensors[0].shape)
    check_enumerable(
        bits,
        max(tensors[0].shape),
        tensors[0].dtype,
        "AIS.log_partition (a reverse run from anything but exact draws would bound nothing)",
        max_bits=max_bits,
    )
    if isinstance(distribution, RBM):
        return sample_rbm(tensors[0], tensors[1], tensors[2], count, max_bits=max_bits)[0]
    return sample_boltzmann(tensors[0], tensors[1], count, max_bits=max_bits)


def _check_weights(log_w: Tensor) -> None:
    bad = log_w.isnan() | (log_w == math.inf)
    if bool(bad.any()):
        raise ValueError(
            f"expected finite log weights, got {int(bad.sum())} NaN or infinite of {log_w.numel()}; look at the parameters, or "
            "use float64"
        )
