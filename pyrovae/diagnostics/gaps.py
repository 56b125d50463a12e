"""What separates log p(x) from the bound that is trained: a factorised q, an amortised q, and a bound in closed form."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.diagnostics.bounds import log_weights, mean_weight
from pyrovae.guides.amortized import evaluating
from pyrovae.guides.pilot import innermost_program
from pyrovae.handlers.structure import Latent
from pyrovae.inference.exact.exact import Exact
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mean_field.layered_net import layered_net
from pyrovae.inference.mean_field.mean_field import MeanField
from pyrovae.inference.mean_field.saul_jaakkola_jordan import SaulJaakkolaJordan
from pyrovae.inference.posterior import Program
from pyrovae.inference.weighing import split_rows
from pyrovae.ops import index_to_codes


@dataclass(frozen=True, eq=False, kw_only=True)
class VariationalGaps:
    """What :func:`variational_gaps` found, per datum `[batch]` and in nats; None where there is no such bound.

    Attributes:
        log_evidence: log p(x), exact.
        mean_field: the ELBO of the best factorised q* of several starts of coordinate ascent, exact.
        amortised: the ELBO of the guide.
        amortised_stderr: its standard error; 0 where all states were summed.
        closed_form: the bound of Saul, Jaakkola and Jordan, maximised.
        seconds: wall time.
    """

    log_evidence: Tensor = field(repr=False)
    mean_field: Tensor = field(repr=False)
    amortised: Tensor | None = field(repr=False)
    amortised_stderr: Tensor | None = field(repr=False)
    closed_form: Tensor | None = field(repr=False)
    seconds: float

    @property
    def approximation(self) -> Tensor:
        """Log p(x) − ELBO(q*) = KL(q* ‖ p), `[batch]`: what a factorised posterior costs; at least 0."""
        return self.log_evidence - self.mean_field

    @property
    def amortisation(self) -> Tensor | None:
        """ELBO(q*) − ELBO(guide), `[batch]`: what one network for all data costs.

        Below 0 where the guide is not factorised, or coordinate ascent ended in a poorer optimum: take more restarts.
        """
        return None if self.amortised is None else self.mean_field - self.amortised

    @property
    def slack(self) -> Tensor | None:
        """ELBO(q*) − the closed-form bound, `[batch]`: what doing without enumeration costs."""
        return None if self.closed_form is None else self.mean_field - self.closed_form

    def summary(self) -> dict[str, Any]:
        """Means over rows; `name_stderr` is the standard error of a mean over rows, `amortised_monte_carlo` of sampling."""
        found: dict[str, Any] = {"rows": self.log_evidence.numel(), "seconds": self.seconds}
        names = ("log_evidence", "mean_field", "amortised", "closed_form", "approximation", "amortisation", "slack")
        for name in names:
            value = getattr(self, name)
            if value is not None:
                rows = value.numel()
                found[name] = float(value.mean())
                found[f"{name}_stderr"] = float(value.std() / rows**0.5) if rows > 1 else None
        if self.amortised_stderr is not None:
            found["amortised_monte_carlo"] = float(self.amortised_stderr.square().sum().sqrt()) / self.log_evidence.numel()
        return found

    def __str__(self) -> str:
        """A table of means over rows."""
        found = self.summary()
        lines = [f"{found['rows']} rows, {self.seconds:.1f} s; nats a row"]
        rows = [
            ("log_evidence", "log p(x), exact", None),
            ("mean_field", "ELBO of the best factorised q", "approximation"),
            ("amortised", "ELBO of the guide", "amortisation"),
            ("closed_form", "Saul-Jaakkola-Jordan bound", "slack"),
        ]
        for name, label, gap in rows:
            if name not in found:
                continue
            line = f"{label:<32}{found[name]:12.4f}"
            if gap is not None:
                line += f"   {gap:<13}{found[gap]:9.4f}"
                if found[f"{gap}_stderr"] is not None:
                    line += f" ± {found[f'{gap}_stderr']:.4f}"
            if name == "amortised" and found["amortised_monte_carlo"] > 0:
                line += f"   (Monte Carlo {found['amortised_monte_carlo']:.4f})"
            lines.append(line)
        lines.append("approximation is from log p(x); amortisation and slack are from the best factorised q; ± over rows")
        return "\n".join(lines)


@torch.no_grad()
def variational_gaps(
    model: Program,
    x: Tensor | tuple[Any, ...],
    guide: Program | None = None,
    *,
    num_restarts: int = 16,
    max_iterations: int = 500,
    num_particles: int = 1000,
    max_evaluations: int = 2**22,
    **kwargs: Any,
) -> VariationalGaps:
    """Report apart the three gaps between log p(x) and variational bounds.

    For models that can be enumerated, up to 20 bits or so: log p(x) and the ELBO of mean field are sums over all states. The
    guide's ELBO is too, where states x rows are at most `max_evaluations`; beyond, it is estimated with `num_particles` draws
    and its standard error is told. The closed-form bound exists for declared layers of sigmoid units.

    Args:
        model: a Pyro program with finite discrete latents.
        x: the data, or all of the program's arguments.
        guide: a guide of the model, such as a trained :class:`pyrovae.guides.AmortizedMeanField`.
        num_restarts: starts of coordinate ascent, of which the best counts, for each of the two bounds.
        max_iterations: sweeps of one start.
        num_particles: draws of the guide a datum, where its ELBO is sampled.
        max_evaluations: the most values of log p(x, z) − log q(z | x) to sum over.
        **kwargs: the model's keyword arguments.

    Raises:
        ValueError: for what `Exact` or `MeanField` refuse.

    Example:
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net(6, 3)
        >>> gaps = variational_gaps(net, net.sample(5), AmortizedMeanField(net))
        >>> bool((gaps.approximation >= 0).all()), gaps.slack.shape
        (True, torch.Size([5]))

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud, 2018)
        https://arxiv.org/abs/1801.03558
        Mean Field Theory for Sigmoid Belief Networks (Saul, Jaakkola, Jordan, 1996)
        https://arxiv.org/abs/cs/9603102
    """
    if num_particles < 2:
        raise ValueError(f"expected num_particles >= 2, got {num_particles}")
    begin = time.perf_counter()
    args = (x,) if isinstance(x, Tensor) else tuple(x)
    exact = Exact().infer(model, *args, **kwargs)
    mean_field = MeanField(num_restarts, max_iterations).infer(model, *args, **kwargs)
    closed = None
    if layered_net(model, args, kwargs, exact.structure) is not None:
        closed = SaulJaakkolaJordan(num_restarts, max_iterations).infer(model, *args, **kwargs).log_evidence
    elbo = stderr = None
    if guide is not None:
        with evaluating(innermost_program(model)), evaluating(innermost_program(guide)):
            elbo, stderr = _guide_elbo(model, guide, args, kwargs, num_particles, max_evaluations)
    assert exact.log_evidence is not None
    assert mean_field.log_evidence is not None
    return VariationalGaps(
        log_evidence=exact.log_evidence,
        mean_field=mean_field.log_evidence,
        amortised=elbo,
        amortised_stderr=stderr,
        closed_form=closed,
        seconds=time.perf_counter() - begin,
    )


def _guide_elbo(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    max_evaluations: int,
) -> tuple[Tensor, Tensor]:
    """E_q[log p(x, z) − log q(z | x)] of a guide `[batch]` and its standard error: summed where that is not too much."""
    log_p, log_q = LogJoint(model, args, kwargs), LogJoint(guide, args, kwargs)
    latents = log_p.structure.latents
    states, rows = 1, log_p.structure.batch_shape.numel()
    for latent in latents:
        states *= latent.num_states
    inside = all(latent.plate_dims == latents[0].plate_dims for latent in latents)
    if not inside or states * rows > max_evaluations or not log_q.broadcasts or not log_p.broadcasts:
        rows_in_turn = split_rows(model, guide, args, kwargs, num_particles, None)
        return mean_weight(log_weights(rows_in_turn, model, guide, num_particles))
    total: Tensor | float = 0.0
    size = max(1, 2**16 // rows)
    for start in range(0, states, size):
        z = _states(latents, torch.arange(start, min(start + size, states), device=latents[0].device))
        q, p = log_q(z), log_p(z)
        total = total + torch.where(q.isneginf(), 0.0, q.exp() * (p - q)).sum(0)
    assert isinstance(total, Tensor)
    return total, torch.zeros_like(total)


def _states(latents: tuple[Latent, ...], numbers: Tensor) -> dict[str, Tensor]:
    """Values `[S, *batch_shape, *event]` of joint states by number, the same for every row."""
    found = {}
    for latent in reversed(latents):
        codes = index_to_codes(numbers % latent.num_states, latent.cardinality, latent.components)
        numbers = numbers // latent.num_states
        value = latent.decode(codes)
        shape = value.shape[:1] + (1,) * len(latent.batch_shape) + latent.event_shape
        found[latent.name] = value.reshape(shape).expand(value.shape[:1] + latent.batch_shape + latent.event_shape)
    return found
