"""The exact posterior of a declared chain: forward-backward instead of a sum over K^L paths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.handlers import declared
from pyrovae.handlers.structure import copied
from pyrovae.inference.exact.expectations import weighted_average
from pyrovae.inference.exact.factors import dot
from pyrovae.inference.posterior import Posterior, Program, States
from pyrovae.ops import Chain, index_to_codes
from pyrovae.ops.forward_backward import Counts, ForwardBackward, forward_backward
from pyrovae.ops.opaque import apply_whole
from pyrovae.ops.tracing import capturing

if TYPE_CHECKING:
    from pyrovae.inference.exact.routes import Task

_MAX_PATHS = 2**20  # that an expectation of any function sums over


class ChainRoute:
    """Exact inference in a declared :class:`pyrovae.ops.Chain`: O(B L K²) time, O(B L K) memory, float64 inside."""

    def fits(self, record: Any, task: Task) -> bool:
        """Whether the record is a chain over the one latent site; see :class:`pyrovae.inference.exact.routes.Route`."""
        latents = task.structure.latents
        if not isinstance(record, Chain) or len(latents) != 1 or latents[0].name != record.site:
            return False
        rows, times, states = record.log_likelihood.shape
        latent = latents[0]
        if latent.kind != "integer" or latent.low != 0 or latent.cardinality != states:
            return False
        if latent.event_shape != (times,) or latent.batch_shape != (rows,):
            return False
        if (needed := 32 * rows * times * states) > task.max_bytes:
            raise ValueError(
                f"expected {task.method} to fit in max_bytes={task.max_bytes:,}, got {rows:,} sequences of {times:,} times and "
                f"{states:,} states, whose messages take {needed:,} bytes; raise max_bytes, or pass fewer sequences at a time"
            )
        return True

    def infer(self, record: Chain, task: Task) -> ChainPosterior:
        """The exact posterior."""
        start = time.perf_counter()
        sums = forward_backward(
            record.log_initial.clone(), record.log_transition.clone(), record.log_likelihood, record.lengths
        )
        _check_numbers(sums.log_evidence)
        return ChainPosterior(
            structure=task.structure,
            log_evidence=sums.log_evidence.to(record.log_likelihood.dtype),
            bound="exact",
            diagnostics={"model_evaluations": self.model_evaluations(record, task)},
            seconds=time.perf_counter() - start,
            site=record.site,
            sums=sums,
            lengths=None if record.lengths is None else record.lengths.clone(),
            arguments=(copied(task.args), copied(dict(task.kwargs))),
            max_bytes=task.max_bytes,
        )

    def log_evidence(self, record: Chain, task: Task) -> Tensor:
        """Log p(x) `[B]`; its gradient is that of the posterior's expected log joint, from the same messages."""
        chain = (record.log_initial, record.log_transition, record.log_likelihood, record.lengths)
        log_evidence = apply_whole(_LogEvidence, *chain)
        _check_numbers(log_evidence.detach())
        return log_evidence

    def model_evaluations(self, record: Chain, task: Task) -> int:
        """Every sequence is evaluated once in each state."""
        return record.log_likelihood.shape[0] * record.log_likelihood.shape[2]


@dataclass(frozen=True, eq=False, kw_only=True)
class ChainPosterior(Posterior):
    """p(z | x) of hidden chains: exact, and draws are independent.

    Attributes:
        site: the latent site, `[B, L]`.
        sums: the messages.
        lengths: seen times of each sequence, `[B]`, or None.
    """

    site: str
    sums: ForwardBackward = field(repr=False)
    lengths: Tensor | None = field(repr=False)
    arguments: tuple[Any, dict[str, Any]] = field(repr=False)
    max_bytes: int = field(repr=False)

    @cached_property
    def marginals(self) -> States:
        """p(z_t = k | x), `{site: [B, L, K]}`.

        Raises:
            ValueError: if a sequence is impossible, as everything below.
        """
        return {self.site: self._possible().marginals.transpose(0, 1).to(self._dtype)}

    @property
    def expected_counts(self) -> Counts:
        """Expected numbers of first states `[K]` and of transitions `[K, K]` between seen times, over all sequences."""
        return self._possible().counts

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of p(z | x) in nats, `[B]`: log p(x) − E[log p(x, z)]."""
        sums = self._possible()
        joint = self._expected(sums.log_initial, sums.log_transition, sums.log_likelihood.transpose(0, 1))
        return (sums.log_evidence - joint).clamp(min=0).to(self._dtype)

    @cached_property
    def mode(self) -> States:
        """The most probable path of each sequence (Viterbi), `{site: [B, L]}`; the first of several."""
        return {self.site: self._possible().viterbi().to(self._latent.dtype)}

    def expected_log_joint(self, model: Program) -> Tensor:
        """E_q[log p(x, z)] under `model`, `[B]`, differentiable; O(B L K²).

        Raises:
            ValueError: if the model does not declare a chain of the same shape.
        """
        record = self._record(model)
        return self._expected(record.log_initial.double(), record.log_transition.double(), record.log_likelihood.double()).to(
            self._dtype
        )

    def q_function(self, model: Program) -> Callable[[], Tensor]:
        """Σ_B E_q[log p(x, z)] over what was seen, from the expected counts; each call evaluates the emissions once."""
        sums = self._possible()
        initial, transition = sums.counts
        marginals = self._seen(sums.marginals.transpose(0, 1))

        def q() -> Tensor:
            record = self._record(model)
            chain = dot(initial, record.log_initial).sum() + dot(transition, record.log_transition).sum()
            return chain + dot(marginals, record.log_likelihood).sum()

        return q

    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """E[f(z)] summed over all K^L paths, `[B, …]`, and 0; see :meth:`Posterior.expectation`.

        Raises:
            ValueError: for more than 2^20 paths: average f over `sample(n)` instead, or use `marginals` and `expected_counts`.
        """
        length, rows, states = self.sums.marginals.shape
        if states**length > _MAX_PATHS:
            raise ValueError(
                f"expected at most {_MAX_PATHS:,} paths to sum a function over, got {states}^{length}; average f over "
                "posterior.sample(n), or use posterior.marginals and posterior.expected_counts, which are exact"
            )
        return weighted_average(f, self._paths(length, rows, states))

    def sample(self, n: int) -> States:
        """`n` independent paths from p(z | x), `{site: [n, B, L]}`, by backward sampling; O(n B L K)."""
        if n <= 0:
            raise ValueError(f"expected n > 0 draws, got {n}")
        sums = self._possible()
        _, rows, states = sums.marginals.shape
        part = max(1, self.max_bytes // (64 * rows * states))
        paths = [sums.sample(min(part, n - i)) for i in range(0, n, part)]
        return {self.site: torch.cat(paths).to(self._latent.dtype)}

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log p(z | x) `[n, B]` of paths `{site: [n, B, L]}`; −inf for what is no path."""
        sums = self._possible()
        length, rows, states = sums.marginals.shape
        if self.site not in z or z[self.site].shape[1:] != (rows, length):
            got = None if self.site not in z else list(z[self.site].shape)
            raise ValueError(f"expected values {{{self.site!r}: [n, {rows}, {length}]}}, got {got}")
        value = z[self.site]
        path = value.nan_to_num() if value.is_floating_point() else value
        path = path.round().long().clamp(0, states - 1) if path.is_floating_point() else path.long().clamp(0, states - 1)
        log_prob = sums.path_log_prob(path) - sums.log_evidence
        return torch.where((path == value).all(-1), log_prob, -math.inf).to(self._dtype)

    @property
    def _latent(self) -> Any:
        return self.structure.latents[0]

    @property
    def _dtype(self) -> torch.dtype:
        assert self.log_evidence is not None
        return self.log_evidence.dtype

    def _possible(self) -> ForwardBackward:
        self.sums.check_possible()
        return self.sums

    def _seen(self, table: Tensor) -> Tensor:
        """A table `[B, L, …]` with 0 at unseen times."""
        if self.lengths is None:
            return table
        unseen = torch.arange(table.shape[1], device=table.device) >= self.lengths.unsqueeze(-1)
        return table.masked_fill(unseen.unsqueeze(-1), 0.0)

    def _expected(self, log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor) -> Tensor:
        marginals = self._possible().marginals
        first = dot(marginals[0], log_initial).sum(-1)
        emitted = dot(self._seen(marginals.transpose(0, 1)), log_likelihood).sum((-1, -2))
        return first + self.sums.pair_sum(log_transition) + emitted

    def _record(self, model: Program) -> Chain:
        args, kwargs = self.arguments
        record = declared(model, "chain", args, kwargs)
        shape = self.sums.marginals.transpose(0, 1).shape
        if not isinstance(record, Chain) or record.log_likelihood.shape != shape:
            raise ValueError(
                f"expected a model that declares a chain over {list(shape)}, got {type(model).__name__}, which does not; infer "
                "with Exact(declared=False) to look at another program"
            )
        return record

    def _paths(self, length: int, rows: int, states: int) -> Iterator[tuple[States, Tensor]]:
        """All paths in chunks, with their log probabilities `[S, B]`."""
        part = max(1, self.max_bytes // (64 * rows * length))
        for i in range(0, states**length, part):
            index = torch.arange(i, min(i + part, states**length), device=self._latent.device)
            path = index_to_codes(index, states, length).unsqueeze(1).expand(-1, rows, -1).to(self._latent.dtype)
            yield {self.site: path}, self.log_prob({self.site: path})


class _LogEvidence(torch.autograd.Function):
    """Log p(x) `[B]`, whose gradients are marginals and expected counts."""

    @staticmethod
    def forward(
        ctx: Any, log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor | None
    ) -> Tensor:
        ctx.sums = forward_backward(log_initial, log_transition, log_likelihood, lengths)
        ctx.dtypes = log_initial.dtype, log_transition.dtype, log_likelihood.dtype
        log_evidence: Tensor = ctx.sums.log_evidence
        return log_evidence.to(log_likelihood.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums: ForwardBackward = ctx.sums
        sums.check_possible()
        rows = grad.double()
        counts = sums.weighted_counts(rows)
        emitted = sums.marginals * rows.unsqueeze(-1)
        if sums.unseen is not None:
            emitted = emitted.masked_fill(sums.unseen.unsqueeze(-1), 0.0)
        found = (counts.initial, counts.transition, emitted.transpose(0, 1))
        return (*(g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)), None)


def _check_numbers(log_evidence: Tensor) -> None:
    """Refuse what is no number.

    Raises:
        ValueError: for NaN.
    """
    if not capturing() and bool(log_evidence.isnan().any()):
        raise ValueError("expected numbers for log p(x), got NaN; look for infinite or NaN parameters and data")
