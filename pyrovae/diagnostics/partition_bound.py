"""Bounds of log p(x) where log Z is an estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrovae.handlers import with_log_partition
from pyrovae.inference.em import InferenceMethod
from pyrovae.inference.posterior import Program


class Interval(Protocol):
    """An estimate of log Z, as :meth:`pyrovae.inference.AIS.log_partition` returns it."""

    @property
    def log_z(self) -> Tensor:
        """The estimate, 0-d."""

    @property
    def lower(self) -> Tensor:
        """Lower end of its interval."""

    @property
    def upper(self) -> Tensor:
        """Upper end."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PartitionBound:
    """A bound of the mean log p(x) per datum that stands on an estimate of log Z: itself an estimate, in nats.

    Attributes:
        value: the mean over rows.
        stderr: of `value`, by the draws of the inference method alone.
        lower: `value` with the upper end of log Z's interval in its place: cautious.
        upper: `value` with the lower end.
        log_evidence: of each row, `[batch]`.
        log_z: the estimate that went in.
        bound: "estimate": an ELBO is a lower bound of log p(x), but log Ẑ ≤ log Z in expectation lifts it by as much.
    """

    value: float
    stderr: float
    lower: float
    upper: float
    log_evidence: Tensor = field(repr=False)
    log_z: float
    bound: str = "estimate"


def bound_with_partition(
    method: InferenceMethod, model: Program, *args: Any, partition: Interval | float, **kwargs: Any
) -> PartitionBound:
    """A bound of log p(x) of a model under an RBM or Boltzmann machine that is too large to sum over, with a given log Z.

    For a deep belief net this is E_Q[log p*(h, x)] − log Ẑ + H(Q), with log Ẑ of :class:`pyrovae.inference.AIS` (the recipe of
    Salakhutdinov and Murray); `Importance(guide, K)` for the method gives the tighter bound of K draws.

    log Ẑ understates log Z in expectation, so that the number overstates the bound by E[log Z − log Ẑ]: small where AIS has
    many temperatures and a large effective sample size, without limit where its chains miss a mode. `lower` and `upper` tell
    what log Z's own interval allows for. Costs what the method costs.

    Args:
        method: an inference method that gives evidence, such as `Variational(guide)` or `Importance(guide, 100)`.
        model: a Pyro program with one site drawn from an RBM or Boltzmann machine.
        *args: its arguments, the data first.
        partition: `AIS(num_chains, num_temperatures).log_partition(model)`, or log Z itself where it is known.
        **kwargs: its keyword arguments.

    Raises:
        ValueError: for a program without such a site, a method without evidence, or a log Z that is not finite.

    References:
        On the Quantitative Analysis of Deep Belief Networks (Salakhutdinov, Murray, 2008)
        https://doi.org/10.1145/1390156.1390266
    """
    if isinstance(partition, (int, float)):
        log_z = lower = upper = float(partition)
    else:
        log_z, lower, upper = (float(end) for end in (partition.log_z, partition.lower, partition.upper))
    if not math.isfinite(log_z):
        raise ValueError(f"expected a finite log Z, got {log_z}; use more chains or temperatures")
    posterior = method.infer(with_log_partition(model, log_z), *args, **kwargs)
    evidence = posterior.log_evidence
    if evidence is None:
        raise ValueError(
            f"expected a method that gives evidence, got {type(method).__name__}; use Variational(guide) or Importance(guide, "
            "K)"
        )
    stderr = torch.as_tensor(posterior.stderr).to(evidence).expand_as(evidence)
    value = float(evidence.mean())
    return PartitionBound(
        value=value,
        stderr=float(stderr.square().sum().sqrt()) / max(1, evidence.numel()),
        lower=value + log_z - upper,
        upper=value + log_z - lower,
        log_evidence=evidence,
        log_z=log_z,
    )
