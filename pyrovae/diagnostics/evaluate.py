"""How good a fitted pair is: bounds and estimates of log p(x) per datum, and what the latents are used for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.diagnostics.bounds import clamped_note, mean_weight, over_rows, soft_weights
from pyrovae.diagnostics.sites import active_units, analytic_kl, code_usage, expected, flat_rows, sampled_kl
from pyrovae.guides.amortized import evaluating
from pyrovae.guides.pilot import innermost_program
from pyrovae.handlers import check_measures, discretize, relax
from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import Latent, check_all_rows, check_whole_plates, read_structure
from pyrovae.inference.exact.elimination import Term
from pyrovae.inference.fit import versions
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Program
from pyrovae.inference.weighing import LEAST_FOR_PARETO_K, Rows, Weighed, evidence, log_joints, split_rows, weighed


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """What :func:`evaluate` found, per datum `[batch]` (`()` where a latent lies outside the data plate) and in nats.

    Attributes:
        hard_elbo: the mean of log p(x, z) − log q(z | x) over draws of the discrete programs, KL weight 1: in expectation a
            lower bound of log p(x), whatever was trained.
        hard_stderr: its standard error.
        analytic_elbo: the same bound with the KL of a site by its formula where one is registered and the model's prior of
            the site looks at nothing that the guide draws later; less noisy. None where no site has one.
        analytic_stderr: its standard error.
        log_likelihood: log of the mean weight (importance-weighted bound of `num_particles` draws): in expectation a lower
            bound of log p(x), tighter with more particles.
        stderr: its standard error by the delta method; not to be trusted where `pareto_k` > 0.7.
        relaxed_elbo: the mean of log p̃(x, z̃) − log q̃(z̃ | x) over soft draws, the densities of model and guide both relaxed
            (Maddison et al.). A bound of the evidence of the *relaxed* model; of log p(x) it is no bound, in either direction.
            None where no relaxed version exists or no temperature is known.
        relaxed_stderr: its standard error.
        ess: effective sample size of the weights, between 1 and `num_particles`; 0 where all are 0.
        pareto_k: the shape of their tail, ArviZ's; NaN, for not defined, with fewer than 25 particles.
        kl: `{site: [*plates, components]}`, KL(q || p) of each component of a site given its parents, by formula or by draws
            as `analytic_elbo`. One component where those of a site are not independent.
        active_units: `{site: count}` of the components whose posterior mean varies over the data with a variance above 0.01.
            For a bit the mean is P(1); for a category half the sum of the variances of its probabilities. Only sites with at
            least two rows.
        code_usage: `{site: [components]}` for finite sites: the perplexity of q(z_j) averaged over the data, from 1 (a
            single value) to the number of values (all alike).
        normalized: whether the likelihood is a density. If not, as for `CrossEntropy` on grey pixels, every bound here is one
            of an unnormalised score, and `log_likelihood` is no likelihood.
        num_particles: K, draws a datum of each estimate.
        seconds: wall time.
        versions: of Python and the packages that matter.
        clamped: the share of relaxed values at an end of what their dtype can tell. `relaxed_elbo` is the bound of the clamped
            draws: with more of them its KL goes from that of the densities to that of the categories. Above 0.1% `notes` say
            so.
    """

    hard_elbo: Tensor
    hard_stderr: Tensor
    analytic_elbo: Tensor | None
    analytic_stderr: Tensor | None
    log_likelihood: Tensor
    stderr: Tensor
    relaxed_elbo: Tensor | None
    relaxed_stderr: Tensor | None
    ess: Tensor
    pareto_k: Tensor
    kl: Mapping[str, Tensor] = field(repr=False)
    active_units: Mapping[str, int]
    code_usage: Mapping[str, Tensor] = field(repr=False)
    normalized: bool
    num_particles: int
    seconds: float
    versions: Mapping[str, str] = field(repr=False)
    clamped: float = 0.0

    @property
    def clamped_notes(self) -> tuple[str, ...]:
        """A sentence where more than 0.1% of the relaxed values are clamped."""
        note = None if self.relaxed_elbo is None else clamped_note(self.clamped, self.relaxed_elbo.dtype)
        return () if note is None else (note,)

    def summary(self) -> dict[str, Any]:
        """Numbers for a table or a JSON file.

        For each bound `name` its mean over rows, `name_stderr`, the standard error of that mean over rows (a sample of the
        data's distribution), and `name_monte_carlo`, the part of it that more particles would remove. `notes` say how to
        read them.
        """
        found: dict[str, Any] = {"rows": self.hard_elbo.numel(), "num_particles": self.num_particles}
        for name, value, error in self._bounds():
            found[name], found[f"{name}_stderr"], found[f"{name}_monte_carlo"] = over_rows(value, error)
        found["ess"] = float(self.ess.mean())
        defined = self.num_particles >= LEAST_FOR_PARETO_K
        found["pareto_k_above_0.7"] = float((self.pareto_k > 0.7).double().mean()) if defined else None
        rows = max(1, self.hard_elbo.numel())
        found["kl"] = {name: float(kl.sum()) / rows for name, kl in self.kl.items()}
        found["active_units"] = dict(self.active_units)
        found["code_usage"] = {name: float(usage.mean()) for name, usage in self.code_usage.items()}
        found["normalized"] = self.normalized
        if self.relaxed_elbo is not None:
            found["clamped"] = self.clamped
        found["seconds"] = self.seconds
        found["notes"] = self._notes()
        return found

    def __str__(self) -> str:
        """A table of means ± standard errors over rows, each marked as a lower bound (≥) or an estimate (≈)."""
        found = self.summary()
        lines = [f"{found['rows']} rows, {self.num_particles} particles each, {self.seconds:.1f} s; nats a row"]
        for name, _, _ in self._bounds():
            label = name if self.normalized or name != "log_likelihood" else "log mean weight"
            mark = "≥" if self.normalized and name != "relaxed_elbo" else "≈"
            error, monte_carlo = found[f"{name}_stderr"], found[f"{name}_monte_carlo"]
            lines.append(f"{label:>16} {mark} {found[name]:10.3f} ± {error:.3f} (Monte Carlo {monte_carlo:.3f})")
        share = found["pareto_k_above_0.7"]
        text = f"needs {LEAST_FOR_PARETO_K} particles" if share is None else f"> 0.7 in {100 * share:.1f}% of rows"
        lines.append(f"{'ESS':>16} ≈ {found['ess']:10.1f}   Pareto k {text}")
        for name, kl in self.kl.items():
            text = f"{'KL ' + name:>16} ≈ {found['kl'][name]:10.3f}   over {kl.shape[-1]} components"
            if name in self.active_units:
                text += f", {self.active_units[name]} active"
            if name in self.code_usage:
                text += f", mean code usage {found['code_usage'][name]:.2f}"
            lines.append(text)
        legend = "≥ lower bound of log p(x) in expectation, ≈ estimate; ± one standard error of the mean over rows"
        return "\n".join(
            [*lines, legend if self.normalized else legend.split(", ")[1], *(f"note: {n}" for n in found["notes"])]
        )

    def _bounds(self) -> list[tuple[str, Tensor, Tensor]]:
        found = [
            ("hard_elbo", self.hard_elbo, self.hard_stderr),
            ("analytic_elbo", self.analytic_elbo, self.analytic_stderr),
            ("log_likelihood", self.log_likelihood, self.stderr),
            ("relaxed_elbo", self.relaxed_elbo, self.relaxed_stderr),
        ]
        return [(name, value, error) for name, value, error in found if value is not None and error is not None]

    def _notes(self) -> list[str]:
        notes = []
        if not self.normalized:
            notes.append("the likelihood is not normalised: these are scores of a loss, no bounds of any log p(x)")
        if self.relaxed_elbo is not None:
            notes.append("relaxed_elbo (Maddison et al., both densities relaxed) bounds the relaxed model, not log p(x)")
        notes.extend(self.clamped_notes)
        share = float((self.pareto_k > 0.7).double().mean())
        if self.normalized and share > 0.1:
            notes.append(
                f"Pareto k > 0.7 in {share:.0%} of rows: log_likelihood is far below log p(x) there; take more particles"
            )
        lost = int((self.ess == 0).sum())
        if lost:
            notes.append(f"{lost} rows have no draw of weight above 0: no estimate there")
        return notes


@torch.no_grad()
def evaluate(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1000,
    temperature: float | None = None,
    batch_size: int | None = None,
    **kwargs: Any,
) -> Evaluation:
    """Evaluate a model and its guide on data, without gradients.

    The programs are told apart from what they were trained as: sites relaxed by `relax` or by hand are made discrete, scales
    (`scale_kl`, `beta`, `poutine.scale`) are left out, a minibatch's plate counts the rows that it sees. The relaxed bound is
    that of the programs as they are given, where they have soft sites, or of both relaxed at `temperature`.

    Modules run in evaluation mode. Rows of the data plate are taken in batches, particles in chunks, so that memory is
    bounded; where a latent lies outside the data plate (one number for the data set), or the programs cannot run on some of
    the rows, only particles are.
    Cost: `num_particles` evaluations of the model a datum, and as many again where there is a relaxed bound.

    Args:
        model: a Pyro program, perhaps relaxed.
        guide: with the same arguments and latent sites.
        *args: their arguments, the data first.
        num_particles: K, draws a datum.
        temperature: of the relaxed bound; None takes that of relaxed programs.
        batch_size: rows of one run; None takes as many as memory and speed ask for.
        **kwargs: their keyword arguments.

    Raises:
        ValueError: if the model observes nothing, the guide's sites are not the model's latents, one has a density where the
            other has a mass, a program mixes rows of the batch or draws which rows it sees, or a plate is subsampled with a
            latent outside it.

    Example:
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net(4, 3)
        >>> found = evaluate(net, AmortizedMeanField(net), net.sample(5), num_particles=50)
        >>> found.log_likelihood.shape, found.kl["h1"].shape
        (torch.Size([5]), torch.Size([5, 3]))

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016)
        https://arxiv.org/abs/1509.00519
        The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
        https://arxiv.org/abs/1611.00712
    """
    if not isinstance(num_particles, int) or num_particles < 2:
        raise ValueError(f"expected an integer num_particles >= 2, got {num_particles!r}")
    if not callable(model) or not callable(guide):
        raise ValueError(
            f"expected evaluate(model, guide, x), two programs and the data, got {type(model).__name__} and "
            f"{type(guide).__name__} first"
        )
    with evaluating(innermost_program(model)), evaluating(innermost_program(guide)):
        return _evaluate(model, guide, args, kwargs, num_particles, temperature, batch_size)


def _evaluate(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    temperature: float | None,
    batch_size: int | None,
) -> Evaluation:
    begin = time.perf_counter()
    hard = discretize(model), discretize(guide)
    rows = split_rows(*hard, args, kwargs, num_particles, batch_size)
    relaxed_pair = _relaxed(model, guide, rows, temperature)
    parts, normalized = [], True
    for log_joint in log_joints(hard[0], rows, "evaluate"):
        check_whole_plates(log_joint.structure, "evaluate")
        check_all_rows(log_joint.structure, "evaluate")
        if not log_joint.structure.observed:
            raise ValueError(
                "expected a model that observes its data, got one that observes nothing; pass the data, and the model before "
                "the guide"
            )
        part = _Batch(log_joint)
        for some in weighed(log_joint, hard[1], num_particles):
            part.add(some)
            normalized = normalized and _normalized(some)
        parts.append(part)
    structure = parts[0].structure
    log_w = rows.join([part.joined(part.log_weights) for part in parts], 1)
    analytic = rows.join([part.joined(part.analytic) for part in parts], 1) if parts[0].analytic else None
    weights = evidence(log_w)
    kl, means = _over_plates(rows, parts, "kl"), _over_plates(rows, parts, "means")
    flat = {s.name: flat_rows(means[s.name], len(s.batch_shape)) for s in structure.latents}
    soft, clamped = (None, 0.0) if relaxed_pair is None else soft_weights(rows, *relaxed_pair, num_particles)
    hard_elbo, hard_stderr = mean_weight(log_w)
    analytic_elbo, analytic_stderr = (None, None) if analytic is None else mean_weight(analytic)
    relaxed_elbo, relaxed_stderr = (None, None) if soft is None else mean_weight(soft)
    return Evaluation(
        hard_elbo=hard_elbo,
        hard_stderr=hard_stderr,
        analytic_elbo=analytic_elbo,
        analytic_stderr=analytic_stderr,
        log_likelihood=weights.log_evidence,
        stderr=weights.stderr,
        relaxed_elbo=relaxed_elbo,
        relaxed_stderr=relaxed_stderr,
        ess=weights.ess,
        pareto_k=weights.pareto_k,
        kl=kl,
        active_units={s.name: int(active_units(s, flat[s.name]).sum()) for s in structure.latents if len(flat[s.name]) > 1},
        code_usage={s.name: code_usage(flat[s.name]) for s in structure.latents if s.finite},
        normalized=normalized,
        num_particles=num_particles,
        seconds=time.perf_counter() - begin,
        versions=versions(),
        clamped=clamped,
    )


class _Batch:
    """Sums over the particles of some rows."""

    def __init__(self, log_joint: LogJoint) -> None:
        self.log_joint, self.structure = log_joint, log_joint.structure
        self.log_weights: list[Tensor] = []  # [k, batch]
        self.analytic: list[Tensor] = []
        self.kl: dict[str, Tensor] = {}  # by site, [*batch_shape, components]
        self.means: dict[str, Tensor] = {}
        self.count = 0

    def add(self, some: Weighed) -> None:
        """Take in some particles."""
        count = some.log_weights.shape[0]
        many = count > 1  # then one run made them all, and its sites have a dim of particles
        formulas: dict[str, Term] = {}
        for latent in self.structure.latents:
            q, p = some.drawn.sites[latent.name], some.sites[latent.name]
            kl = analytic_kl(q.fn, p.fn, many=many) if self._conditions_hold(latent, some) else None
            if kl is not None:
                formulas[latent.name] = Term(self._seen(latent, some, self._wide(kl, 1)).sum(-1), latent.plate_dims, 0)
            else:
                kl = sampled_kl(q.fn, p.fn, q.value)
            self._sum(self.kl, latent, self._seen(latent, some, self._wide(kl, 1)), count, 1)
            mean = expected(latent, q.fn, q.value, many=many)
            self._sum(self.means, latent, self._wide(mean, 1 + latent.finite), count, 1 + latent.finite)
        self.log_weights.append(some.log_weights)
        if formulas:
            plus = {name: term for name, term in some.terms.items() if name not in formulas}
            minus = {name: term for name, term in some.drawn.terms.items() if name not in formulas} | formulas
            total = -self.log_joint.total(minus, count)
            self.analytic.append(self.log_joint.total(plus, count) + total if plus else total)
        self.count += count

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Particles put together, `[K, batch]`."""
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _conditions_hold(self, latent: Latent, some: Weighed) -> bool:
        """Whether whatever the model's prior of a site may look at was drawn before it by the guide."""
        drawn = list(some.drawn.sites)
        before = [other.name for other in self.structure.latents]
        before = before[: before.index(latent.name)]
        return set(before) <= set(drawn[: drawn.index(latent.name)])

    def _wide(self, table: Tensor, trailing: int) -> Tensor:
        """A table `[…, *plates, trailing dims]` with the dims of one particle axis and all plates."""
        missing = 1 + self.structure.plate_depth + trailing - table.dim()
        return table.reshape((1,) * missing + table.shape)

    def _seen(self, latent: Latent, some: Weighed, table: Tensor) -> Tensor:
        shown = some.drawn.seen.get(latent.name)
        return table if shown is None else torch.where(shown.unsqueeze(-1), table, 0.0)

    def _sum(self, totals: dict[str, Tensor], latent: Latent, table: Tensor, count: int, trailing: int) -> None:
        total = table.sum(0) * (count / table.shape[0])
        lead = total.shape[: total.dim() - trailing]
        plates = (1,) * (len(lead) - len(latent.batch_shape)) + tuple(latent.batch_shape)
        rest = total.shape[total.dim() - trailing :]
        total = total.expand(*plates, *rest).reshape(latent.batch_shape + rest)
        totals[latent.name] = totals[latent.name] + total if latent.name in totals else total


def _over_plates(rows: Rows, parts: list[_Batch], what: str) -> dict[str, Tensor]:
    """Averages over particles by site, the batches put together."""
    found = {}
    for latent in parts[0].structure.latents:
        tables = [getattr(part, what)[latent.name] / part.count for part in parts]
        if len(tables) == 1:
            found[latent.name] = tables[0]
            continue
        place = len(latent.batch_shape) + parts[0].structure.batch[rows.axis].dim
        found[latent.name] = torch.cat(tables, place)
    return found


def _relaxed(model: Program, guide: Program, rows: Rows, temperature: float | None) -> tuple[Program, Program] | None:
    """The pair with soft sites, if there is one."""
    args, kwargs = rows.calls[0]
    structure = read_structure(model, args, kwargs)
    check_measures(structure, read_structure(guide, args, kwargs))
    latents = structure.latents
    if temperature is None:
        if any(latent.measure == "quantized" for latent in latents):
            return None  # hard values scored by densities of soft ones
        return (model, guide) if any(latent.kind.startswith("relaxed") for latent in latents) else None
    if not any(latent.finite or latent.kind.startswith("relaxed") for latent in latents):
        return None
    return relax(discretize(model), temperature), relax(discretize(guide), temperature)


def _normalized(some: Weighed) -> bool:
    return all(getattr(innermost(site.fn), "normalized", True) for site in some.sites.values())
