"""Draws from a guide and their log weights log p(x, z) − log q(z), per datum."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyrovae.handlers.structure import both, draw_sites, unmask
from pyrovae.inference.elimination import Term
from pyrovae.inference.factors import site_factor
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Program, States

_MAX_BYTES = 2**28


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
    structure = log_joint.structure
    row = sum(math.prod(site.event_shape) * math.prod(p.size for p in site.plates) for site in structure.observed)
    row += sum(math.prod(latent.batch_shape + latent.event_shape) for latent in structure.latents)
    size = max(1, min(num_particles, _MAX_BYTES // (64 * max(1, row))))
    states: list[States] = []
    weights: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, num_particles, size):
            count = min(size, num_particles - start)
            drawn = draw(guide, log_joint, count)
            states.append(drawn.states)
            terms = log_joint.terms(drawn.states)
            weights.append(log_joint.total(_seen(terms, drawn.seen), count) - log_joint.total(drawn.terms, count))
    return {name: torch.cat([part[name] for part in states]) for name in states[0]}, torch.cat(weights)


@dataclass(frozen=True)
class Drawn:
    """Draws from a guide: states, log q of each site, and the elements of each masked site that count."""

    states: States
    terms: dict[str, Term]
    seen: dict[str, Tensor]


def draw(guide: Program, log_joint: LogJoint, num_particles: int) -> Drawn:
    """Draw states `{site: [K, *batch_shape, *event]}` from a guide, in one run where model and guide broadcast."""
    if log_joint.broadcasts:
        with contextlib.suppress(RuntimeError, IndexError):  # of a guide that does not broadcast
            return _draw(guide, log_joint, num_particles)
    parts = [_draw(guide, log_joint, 1) for _ in range(num_particles)]
    states = {name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states}
    terms = {}
    for name, term in parts[0].terms.items():
        terms[name] = Term(torch.cat([part.terms[name].table for part in parts]), term.plate_dims, 0)
    return Drawn(states, terms, parts[0].seen)


def _draw(guide: Program, log_joint: LogJoint, count: int) -> Drawn:
    structure = log_joint.structure
    depth = structure.plate_depth
    particles = pyro.plate("num_particles_vectorized", count, dim=-1 - depth)
    program = guide if count == 1 else particles(guide)
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
    return Drawn(states, _seen(terms, seen), seen)


def _seen(terms: Mapping[str, Term], seen: Mapping[str, Tensor]) -> dict[str, Term]:
    """Terms whose masked elements are 0."""
    return {
        name: Term(torch.where(seen[name], t.table, 0.0), t.plate_dims, t.level) if name in seen else t
        for name, t in terms.items()
    }
