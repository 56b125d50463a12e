"""Draws from a guide and their log weights log p(x, z) − log q(z), per datum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae.handlers.structure import Structure, draw_sites
from pyrovae.inference.elimination import Term, add, sum_plates
from pyrovae.inference.factors import site_factor
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Program, States

_MAX_BYTES = 2**28


def weigh(log_joint: LogJoint, guide: Program, num_particles: int) -> tuple[States, Tensor]:
    """Draw from a guide and weigh, without gradients.

    Plate factors and scales are left out, so that the weights are those of the rows seen.

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
            drawn, log_q = draw(guide, log_joint.args, log_joint.kwargs, count, structure, vectorized=log_joint.broadcasts)
            states.append(drawn)
            weights.append(log_joint(drawn) - log_q)
    return {name: torch.cat([part[name] for part in states]) for name in states[0]}, torch.cat(weights)


def draw(
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_particles: int,
    structure: Structure,
    *,
    vectorized: bool = True,
) -> tuple[States, Tensor]:
    """Draws `{site: [K, *batch_shape, *event]}` from a guide and their log q `[K, batch]`."""
    if not vectorized:
        parts = [_draw(guide, args, kwargs, 1, structure) for _ in range(num_particles)]
        return {name: torch.cat([p[0][name] for p in parts]) for name in parts[0][0]}, torch.cat([p[1] for p in parts])
    return _draw(guide, args, kwargs, num_particles, structure)


def _draw(
    guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int, structure: Structure
) -> tuple[States, Tensor]:
    depth = structure.plate_depth
    particles = pyro.plate("num_particles_vectorized", count, dim=-1 - depth)
    sites = draw_sites(guide if count == 1 else particles(guide), args, kwargs, structure.subsample)
    sites = {name: site for name, site in sites.items() if not site.observed}
    expected = {latent.name for latent in structure.latents}
    if set(sites) != expected:
        raise ValueError(
            f"expected the guide to sample the model's latents {sorted(expected)}, got {sorted(sites)}; give both the same "
            "site names"
        )
    states, terms = {}, []
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
        factor = site_factor(site, depth + 1, plain=True)
        terms.append(Term(factor.table(), latent.plate_dims, 0))
    keep = frozenset(plate.dim for plate in structure.batch)
    sizes = {plate.dim: plate.size for plate in structure.plates}
    total = add(sum_plates(term, keep, sizes).table for term in terms)
    return states, structure.to_batch(total.expand((count, *total.shape[1:])))
