"""Draws from a guide and their log weights log p(x, z) − log q(z), per datum, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae.handlers.structure import Site, both, draw_sites, unmask
from pyrovae.inference.exact.elimination import Term
from pyrovae.inference.exact.factors import site_factor
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.narrow import NarrowDraws
from pyrovae.inference.posterior import Program, States
from pyrovae.inference.rows import NUMEL, doubt, row_numel, row_wise, take
from pyrovae.ops import effective_sample_size, log_mean_exp

_SPREAD = 40  # particles of one run, where the rows are split: more and an encoder's runs cost nothing beside the decoder's


def weigh(log_joint: LogJoint, guide: Program, num_particles: int) -> tuple[States, Tensor]:
    """Draw from a guide and weigh, without gradients.

    Plate factors and scales are left out, so that the weights are those of the rows seen. Elements of a latent that both
    model and guide mask count in neither; those that only one of them masks count in both, so that the weights stay those of
    normalised densities.

    Args:
        log_joint: of the model at its arguments.
        guide: with the same arguments and latent sites.
        num_particles: K.

    Returns:
        States `{site: [K, *batch_shape, *event]}` and log weights `[K, batch]`. Costs K model evaluations a datum.

    Raises:
        ValueError: if the guide's sites are not the model's latents, in name and event shape.
    """
    parts = list(weighed(log_joint, guide, num_particles))
    states = {name: torch.cat([part.drawn.states[name] for part in parts]) for name in parts[0].drawn.states}
    return states, torch.cat([part.log_weights for part in parts])


@dataclass(frozen=True)
class Drawn:
    """Draws from a guide: states, log q of each site, and the elements of each masked site that count.

    `sites` are those of the run; of the last one where each draw took a run.
    """

    states: States
    terms: dict[str, Term]
    seen: dict[str, Tensor]
    sites: dict[str, Site]


@dataclass(frozen=True)
class Weighed:
    """Some particles: draws from the guide, log p of each site and log weights `[k, batch]`.

    `sites` are the model's at the states drawn, by name. With k > 1, one run of guide and model made them all.
    """

    drawn: Drawn
    terms: dict[str, Term]
    sites: dict[str, Site]
    log_weights: Tensor


def weighed(log_joint: LogJoint, guide: Program, num_particles: int) -> Iterator[Weighed]:
    """Draw from a guide and weigh, as :func:`weigh`, some particles at a time."""
    row = row_numel(log_joint.structure) * max(1, log_joint.structure.batch_shape.numel())
    size = max(1, min(num_particles, NUMEL // max(1, row)))
    if not log_joint.broadcasts:
        size = 1
    start = 0
    while start < num_particles:
        count = min(size, num_particles - start)
        with torch.no_grad():
            try:
                drawn = _draw(guide, log_joint, count)
            except (RuntimeError, IndexError, TypeError, AssertionError):  # a guide that does not broadcast
                if count == 1:
                    raise
                size = 1
                continue
            sites = log_joint.sites(drawn.states)
            terms = _seen(log_joint.factors(sites), drawn.seen)
            log_w = log_joint.total(terms, count) - log_joint.total(drawn.terms, count)
        start += count
        yield Weighed(drawn, terms, sites, log_w)


def draw(guide: Program, log_joint: LogJoint, num_particles: int) -> Drawn:
    """Draw states `{site: [K, *batch_shape, *event]}` from a guide, in one run where model and guide broadcast."""
    if log_joint.broadcasts:
        try:
            return _draw(guide, log_joint, num_particles)
        except (RuntimeError, IndexError, TypeError, AssertionError):  # a guide that does not broadcast
            pass
    parts = [_draw(guide, log_joint, 1) for _ in range(num_particles)]
    states = {name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states}
    terms = {}
    for name, term in parts[0].terms.items():
        terms[name] = Term(torch.cat([part.terms[name].table for part in parts]), term.plate_dims, 0)
    return Drawn(states, terms, parts[0].seen, parts[-1].sites)


LEAST_FOR_PARETO_K = 25  # draws, of which ArviZ fits the tail of a fifth


@dataclass(frozen=True)
class Evidence:
    """What weights say of log p(x): log (1/K) Σ_k w_k, its standard error by the delta method, and how far to trust both.

    All `[batch]`. Where every weight is 0: −inf, stderr inf, ess 0, pareto_k inf. With fewer than 25 draws pareto_k is NaN: not
    defined.
    """

    log_evidence: Tensor
    stderr: Tensor
    ess: Tensor
    pareto_k: Tensor


def evidence(log_w: Tensor) -> Evidence:
    """The evidence by log weights `[K, batch]`; `pareto_k` is ArviZ's."""
    from pyrovae.inference.arviz import pareto_k

    ess = torch.where(torch.isneginf(log_w).all(0), 0.0, effective_sample_size(log_w))
    stderr = (1 / ess - 1 / log_w.shape[0]).clamp_min(0).sqrt()  # 1 / 0 is inf
    k = pareto_k(log_w) if len(log_w) >= LEAST_FOR_PARETO_K else torch.full_like(ess, math.nan)
    return Evidence(log_mean_exp(log_w), stderr, ess, k)


@dataclass(frozen=True)
class Rows:
    """The arguments of a call, rows of the data plate split into batches.

    Attributes:
        calls: positional and keyword arguments of each batch.
        axis: the place of the data plate among the batch dims of results.
    """

    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    axis: int = 0

    def join(self, parts: list[Tensor], lead: int) -> Tensor:
        """Put results `[…, batch, …]` of the batches together; `lead` dims are left of the batch's."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, lead + self.axis)


def split_rows(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_particles: int,
    batch_size: int | None = None,
) -> Rows:
    """Split the rows of a call, so that model and guide see a few at a time.

    The plate of the data is one around every site, as long as the first argument. Every tensor as long as it is split
    likewise, if a few rows are then scored as they are among all; a program that takes `index` and `num_data` gets them.
    Where no such plate exists, or the programs cannot run on a part (parameters for each row that no index reaches) or score
    it otherwise, all rows stay together.

    Args:
        model: a Pyro program.
        guide: with the same arguments.
        args: their positional arguments, the data first.
        kwargs: their keyword arguments.
        num_particles: how many draws a row will take.
        batch_size: rows of a batch; None takes as many as memory and speed ask for.

    Raises:
        ValueError: if `batch_size` is given and the rows cannot be split.
    """
    kwargs = dict(kwargs)
    whole = Rows(((args, kwargs),))
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    total = next((len(value) for value in args if isinstance(value, Tensor) and value.dim()), 0)
    if total <= 3 or (batch_size is not None and batch_size >= total):
        return whole

    def size(numel: int) -> int:
        return batch_size or min(total, max(1, NUMEL // numel // max(1, min(num_particles, _SPREAD))))

    for indexed in (True, False):
        found = row_wise((model, guide), args, kwargs, total, indexed=indexed, needed=lambda numel: size(numel) < total)
        if found is None:
            continue
        if size(found.numel) == total:
            return whole
        device = next(value.device for value in args if isinstance(value, Tensor) and value.dim())
        calls = []
        for start in range(0, total, size(found.numel)):
            part = slice(start, min(start + size(found.numel), total))
            some, named = take(args, kwargs, part, found.keys)
            if indexed:
                named = {"index": torch.arange(part.start, part.stop, device=device), "num_data": total} | named
            calls.append((some, named))
        return Rows(tuple(calls), found.axis)
    if batch_size is not None:
        raise ValueError(
            f"expected programs whose rows can be split into batches of {batch_size}, got some without a plate of the {total} "
            "rows of their first argument around every site, that cannot run on a part of them, or that score a part of them "
            f"otherwise; {doubt(args, kwargs, total) or 'leave out batch_size'}"
        )
    return whole


def log_joints(model: Program, rows: Rows, method: str | None = None) -> Iterator[LogJoint]:
    """The log joint of every batch; that the program broadcasts, and with `method` that its rows are apart, is checked once."""
    first: LogJoint | None = None
    for args, kwargs in rows.calls:
        log_joint = LogJoint(model, args, kwargs, broadcasts=None if first is None else first.broadcasts)
        if first is None:
            first = log_joint
            if method is not None:
                log_joint.check_rows(method)
        yield log_joint


def _draw(guide: Program, log_joint: LogJoint, count: int) -> Drawn:
    structure = log_joint.structure
    depth = structure.plate_depth
    particles = pyro.plate("num_particles_vectorized", count, dim=-1 - depth)
    program = guide if count == 1 else NarrowDraws(particles(guide))
    sites = draw_sites(program, log_joint.args, log_joint.kwargs, structure.subsample)
    sites = {name: site for name, site in sites.items() if not site.observed}
    expected = {latent.name for latent in structure.latents}
    if set(sites) != expected:
        raise ValueError(
            f"expected the guide to sample the model's latents {sorted(expected)}, got {sorted(sites)}; give both the same "
            "site names"
        )
    states, terms, seen = {}, {}, {}
    for latent in structure.latents:
        site = sites[latent.name]
        event = latent.event_shape
        if site.fn.event_shape != event:
            raise ValueError(
                f"expected the guide's {latent.name!r} with the model's event shape {tuple(event)}, got "
                f"{tuple(site.fn.event_shape)}; declare a vector with .to_event(1)"
            )
        plates = (1,) * (depth - len(latent.batch_shape)) + tuple(latent.batch_shape)
        value = site.value.reshape((1,) * (1 + depth + len(event) - site.value.dim()) + site.value.shape)
        states[latent.name] = value.expand((count, *plates, *event)).reshape((count, *latent.batch_shape, *event))
        terms[latent.name] = Term(site_factor(site, depth + 1, plain=True).table(), latent.plate_dims, 0)
        masks = structure.masks.get(latent.name), both(unmask(site.fn)[1], site.mask)
        if masks[0] is not None and masks[1] is not None:
            shown = torch.as_tensor(masks[0]) | torch.as_tensor(masks[1])
            seen[latent.name] = shown.reshape((1,) * (1 + depth - shown.dim()) + shown.shape)
    return Drawn(states, _seen(terms, seen), seen, sites)


def _seen(terms: Mapping[str, Term], seen: Mapping[str, Tensor]) -> dict[str, Term]:
    """Terms whose masked elements are 0."""
    return {
        name: Term(torch.where(seen[name], t.table, 0.0), t.plate_dims, t.level) if name in seen else t
        for name, t in terms.items()
    }
