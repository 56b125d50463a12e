"""Exact inference where the hidden units are independent given the data: all in closed form, for any number of units.

A restricted Boltzmann machine is such a model: p(h | x) = Π_j Bern(σ(logits_j(x))).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrovae.handlers import declared
from pyrovae.handlers.structure import copied
from pyrovae.inference.exact.expectations import weighted_average
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Posterior, Program, States
from pyrovae.ops.states import index_to_codes
from pyrovae.ops.structures import FactorialCode
from pyrovae.ops.tracing import capturing

if TYPE_CHECKING:
    from pyrovae.inference.exact.routes import Task

_MAX_STATES = 2**33


class FactorialRoute:
    """The route of `factorial_code()`; see :class:`pyrovae.inference.exact.routes.Route`."""

    def fits(self, record: FactorialCode, task: Task) -> bool:
        """Whether the program's one latent is the record's.

        Raises:
            ValueError: for logits that are not finite.
        """
        latents = task.structure.latents
        if len(latents) != 1 or latents[0].name != record.site or record.logits.dim() != 2:
            return False
        if not capturing() and not bool(torch.isfinite(record.logits).all()):
            raise ValueError("expected finite parameters, got a posterior of NaN or infinity; start the model anew")
        return True

    def infer(self, record: FactorialCode, task: Task) -> FactorialPosterior:
        """The exact posterior."""
        start = time.perf_counter()
        return FactorialPosterior(
            structure=task.structure,
            log_evidence=self.log_evidence(record, task).detach().clone(),
            bound="exact",
            diagnostics={"model_evaluations": self.model_evaluations(record, task)},
            seconds=time.perf_counter() - start,
            site=record.site,
            logits=record.logits.detach().clone(),
            args=copied(task.args),
            kwargs=copied(dict(task.kwargs)),
            max_bytes=task.max_bytes,
        )

    def log_evidence(self, record: FactorialCode, task: Task) -> Tensor:
        """Log p(x) `[B]`, as the model declares it."""
        try:
            evidence = record.log_evidence()
        except ValueError as error:  # too many states, in the words of the distribution
            words = str(error).split("; ")[0]
            raise ValueError(
                f"{words}; use AIS().infer(model, x) for log p(x) from above, ContrastiveDivergence to learn"
            ) from error
        if not capturing() and not bool(torch.isfinite(evidence).all()):
            raise ValueError("expected finite parameters, got an evidence of NaN or infinity; start the model anew")
        return evidence

    def model_evaluations(self, record: FactorialCode, task: Task) -> int:
        """One for each row, where the sum over hidden units is closed, and one for each state of the normaliser."""
        return len(record.logits) + record.num_states


@dataclass(frozen=True, eq=False, kw_only=True)
class FactorialPosterior(Posterior):
    """p(h | x) = Π_j Bern(σ(logits_j)), exact; every answer costs rows x units, but `expectation`, which sums over 2^units."""

    site: str
    logits: Tensor = field(repr=False)  # [batch, units]
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    max_bytes: int = field(repr=False)

    @cached_property
    def marginals(self) -> States:
        """P(1) of every unit, `{site: [batch, units]}`."""
        return {self.site: torch.sigmoid(self.logits)}

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of p(h | x) in nats, `[batch]`."""
        p = torch.sigmoid(self.logits)
        return (-logsigmoid(-self.logits) - p * self.logits).sum(-1)

    @cached_property
    def mode(self) -> States:
        """The most probable state (MAP), `{site: [batch, units]}`."""
        return {self.site: (self.logits > 0).to(self._latent.dtype)}

    def sample(self, n: int) -> States:
        """`n` independent draws `{site: [n, batch, units]}`."""
        if n <= 0:
            raise ValueError(f"expected n > 0 draws, got {n}")
        p = torch.sigmoid(self.logits)
        return {self.site: (torch.rand((n, *p.shape), dtype=p.dtype, device=p.device) < p).to(self._latent.dtype)}

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log p(h | x) `[n, batch]` of states `{site: [n, batch, units]}`; −inf outside the support."""
        if self.site not in z:
            raise ValueError(f"expected values of every latent site, got none of {self.site!r}")
        h = z[self.site]
        if h.shape[1:] != self.logits.shape:
            expected = ", ".join(map(str, self.logits.shape))
            raise ValueError(f"expected {self.site!r} of shape [n, {expected}], got {tuple(h.shape)}")
        value = torch.where(h == 1, logsigmoid(self.logits), torch.where(h == 0, logsigmoid(-self.logits), -math.inf))
        return value.sum(-1)

    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """E[f(h)] summed over all 2^units states, `[batch, …]`, and 0; see :meth:`Posterior.expectation`.

        Raises:
            ValueError: if there are too many states; average over `sample(n)` instead.
        """
        rows, units = self.logits.shape
        size = self.logits.element_size() * rows * (3 * units + 4)
        if 2.0**units * rows > _MAX_STATES or size > self.max_bytes:
            raise ValueError(
                f"expected at most {_MAX_STATES:,} joint states x rows and {self.max_bytes:,} bytes for an expectation, got "
                f"2^{units} states of {rows:,} rows: {size:,} bytes a state and about {2.0**units * rows * 1e-7:.2g} seconds; "
                "average f over posterior.sample(n) instead"
            )
        return weighted_average(f, self._states(max(1, self.max_bytes // size)))

    def expected_log_joint(self, model: Program) -> Tensor:
        """E[log p(x, h)] under `model`, `[batch]`, differentiable; closed for a model that declares independent units too.

        Raises:
            ValueError: for another model, if there are too many states to sum over.
        """
        other = declared(model, "factorial_code", self.args, self.kwargs)
        if isinstance(other, FactorialCode) and other.logits.shape == self.logits.shape:
            inside = torch.sigmoid(self.logits) * other.logits + logsigmoid(-other.logits)
            return other.log_evidence() + inside.sum(-1)
        log_joint = LogJoint(model, self.args, self.kwargs)
        return self.expectation(lambda z: log_joint(z))[0]

    @property
    def _latent(self) -> Any:
        return self.structure.latents[0]

    def _states(self, size: int) -> Iterator[tuple[States, Tensor]]:
        """All states, `size` at a time, and their log probabilities `[S, batch]`."""
        units = self.logits.shape[1]
        log_off = logsigmoid(-self.logits).sum(-1)
        for start in range(0, 2**units, size):
            index = torch.arange(start, min(start + size, 2**units), device=self.logits.device)
            bits = index_to_codes(index, 2, units).to(self._latent.dtype)
            yield {self.site: bits[:, None].expand(-1, *self.logits.shape)}, bits.to(self.logits) @ self.logits.T + log_off
