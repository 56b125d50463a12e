"""The factor that a mean-field guide puts at a site: one distribution for each support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.distributions import (
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    SurrogateBernoulli,
    SurrogateOneHotCategorical,
)
from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import Latent


def width(latent: Latent) -> int:
    """How many unconstrained parameters the factor of a site has."""
    per_component = {"bit": 1, "relaxed_bit": 1, "real": 2}
    return latent.components * per_component.get(latent.kind, latent.cardinality)


def factor(latent: Latent, parameters: Tensor, frames: Mapping[int, Any], prior: Any) -> Any:
    """The distribution of a site under q: independent components, batch shape that of the model's plates, the prior's masks."""
    event = latent.event_shape
    if prior.event_shape != event:
        raise ValueError(
            f"expected site {latent.name!r} with events of shape {tuple(event)} as in the guide's example, got "
            f"{tuple(prior.event_shape)}; make another guide for this shape"
        )
    plates = torch.Size(int(frames[dim].size) if dim in frames else 1 for dim in range(min(frames, default=0), 0))
    batch = torch.broadcast_shapes(parameters.shape[:-1], plates)
    fn = _components(latent, parameters, innermost(prior))
    dims = len(event) - fn.event_dim
    masks = _masks(prior)
    if not {depth for depth, _ in masks} <= {0, dims}:
        raise ValueError(
            f"expected the mask of site {latent.name!r} inside or outside all of .to_event, got it between; move it"
        )
    fn = fn.expand(batch + event[:dims])
    for depth, mask in masks:
        fn = fn.mask(mask) if depth and dims else fn
    fn = fn.to_event(dims)
    for depth, mask in masks:
        fn = fn if depth and dims else fn.mask(mask)
    return fn


def _components(latent: Latent, parameters: Tensor, prior: Any) -> Any:
    """The factor of each component, from `[..., width]`; `prior` is the model's own, bare."""
    lead = parameters.shape[:-1] + latent.event_shape
    if isinstance(prior, (torch.distributions.RelaxedBernoulli, torch.distributions.RelaxedOneHotCategorical)):
        return _relaxed(prior, parameters.reshape(lead))
    if isinstance(prior, (SurrogateBernoulli, SurrogateOneHotCategorical)):
        return type(prior)(parameters.reshape(lead), prior.estimator, prior.surrogate_temperature)
    if latent.kind == "bit":
        return dist.Bernoulli(logits=parameters.reshape(lead))
    if latent.kind == "integer":
        return dist.Categorical(logits=parameters.reshape((*lead, latent.cardinality)))
    if latent.kind == "one_hot":
        return dist.OneHotCategorical(logits=parameters.reshape(lead))
    loc, log_scale = parameters.chunk(2, -1)
    return dist.Normal(loc.reshape(lead), log_scale.exp().reshape(lead))


def _relaxed(prior: Any, logits: Tensor) -> Any:
    """The prior's family at its temperature: ours for Pyro's own soft ones, any subclass (straight-through) as it is."""
    stable: dict[Any, Any] = {
        dist.RelaxedBernoulli: RelaxedBernoulli,
        dist.RelaxedOneHotCategorical: RelaxedOneHotCategorical,
    }
    family = stable.get(type(prior), type(prior))
    ours = {"straight_through": getattr(prior, "straight_through", False)} if family in stable.values() else {}
    return family(prior.temperature, logits=logits, **ours)


def _masks(prior: Any) -> list[tuple[int, Any]]:
    """The masks around a distribution, each with the number of event dims that `.to_event` adds outside it."""
    masks, depth = [], 0
    base = innermost(prior)
    while prior is not base:
        if isinstance(prior, torch.distributions.Independent):
            depth += prior.reinterpreted_batch_ndims
        elif isinstance(prior, dist.MaskedDistribution):
            masks.append((depth, prior._mask))
        prior = prior.base_dist
    return masks
