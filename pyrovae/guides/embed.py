"""Codes and reconstructions by any guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.guides.amortized import evaluating
from pyrovae.guides.pilot import innermost_program
from pyrovae.handlers import discretize
from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import Site, check_all_rows, draw_sites, read_structure, run_sites, unmask
from pyrovae.ops import isolated_rng


@torch.no_grad()
def embed(guide: Callable[..., Any], *args: Any, num_samples: int = 100, **kwargs: Any) -> dict[str, Tensor]:
    """The mean of q(z | x) at each site: P(1) of bits, probabilities of categories, means of Normals.

    Relaxed sites are made discrete. A site that is drawn given others (`AmortizedStructured`, `DRAWGuide`) is averaged over
    `num_samples` draws of those, always the same ones; all other means are exact, and so is the answer of two calls. The
    caller's random state and parameter store stay as they are; modules run in evaluation mode.

    Args:
        guide: any Pyro guide, perhaps relaxed.
        *args: its arguments, the data first.
        num_samples: draws where a mean depends on them.
        **kwargs: its keyword arguments.

    Returns:
        `{site: [B, *event]}`; of a Categorical `[B, *event, K]`.

    Example:
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.models import SigmoidBeliefNet
        >>> net = SigmoidBeliefNet(4, 3)
        >>> tuple(embed(AmortizedMeanField(net), net.sample(5))["h1"].shape)
        (5, 3)
    """
    if not callable(guide):
        raise ValueError(f"expected embed(guide, x), a program and the data, got {type(guide).__name__} first")
    if num_samples < 2:
        raise ValueError(f"expected num_samples >= 2, got {num_samples}")
    program = discretize(guide)
    with isolated_rng(0), evaluating(innermost_program(guide)):
        first, second = (_means(program, args, kwargs) for _ in range(2))
        moving = [name for name in first if not torch.equal(first[name], second[name])]
        total = {name: first[name] + second[name] for name in moving}
        for _ in range(num_samples - 2 if moving else 0):
            means = _means(program, args, kwargs)
            total = {name: total[name] + means[name] for name in moving}
    return first | {name: value / num_samples for name, value in total.items()}


@torch.no_grad()
def reconstruct(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 1, **kwargs: Any
) -> Tensor:
    """The model's mean of the data given codes of them: E[x' | z] averaged over draws z ~ q(z | x).

    Relaxed sites are made discrete, so that codes are hard. Draws from the caller's random state; the parameter store stays.
    Modules run in evaluation mode.

    Args:
        model: a Pyro program, perhaps relaxed.
        guide: its guide, likewise.
        *args: their arguments, the data first.
        num_samples: draws of z.
        **kwargs: their keyword arguments.

    Returns:
        Means of the observed site that is the first argument (else of the last observed one), with its shape.

    Raises:
        ValueError: if the guide's sites are not the model's latents, the model observes nothing or draws which rows it sees, or
            its likelihood has no mean.

    Example:
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.models import SigmoidBeliefNet
        >>> net = SigmoidBeliefNet(4, 3)
        >>> tuple(reconstruct(net, AmortizedMeanField(net), net.sample(5), num_samples=10).shape)
        (5, 4)
    """
    if num_samples < 1:
        raise ValueError(f"expected num_samples >= 1, got {num_samples}")
    hard_model, hard_guide = discretize(model), discretize(guide)
    total: Tensor | None = None
    with evaluating(innermost_program(model)), evaluating(innermost_program(guide)):
        structure = read_structure(hard_model, args, kwargs)
        check_all_rows(structure, "reconstruct")
        names = {latent.name for latent in structure.latents}
        for _ in range(num_samples):
            sites = draw_sites(hard_guide, args, kwargs, structure.subsample)
            drawn = {name: site.value for name, site in sites.items() if not site.observed}
            if set(drawn) != names:
                raise ValueError(
                    f"expected the guide to sample the model's latents {sorted(names)}, got {sorted(drawn)}; give both the "
                    "same site names"
                )
            mean = _mean_of_data(run_sites(hard_model, args, kwargs, drawn, structure.subsample), args)
            total = mean if total is None else total + mean
    assert total is not None
    return total / num_samples


def _means(program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    sites = draw_sites(program, args, kwargs, {})
    return {name: _mean(site) for name, site in sites.items() if not site.observed}


def _mean(site: Site) -> Tensor:
    fn, _, _ = unmask(site.fn)
    family = innermost(fn)
    if isinstance(family, torch.distributions.Categorical):
        return family.probs.expand(fn.batch_shape + fn.event_shape + family.probs.shape[-1:]).clone()
    try:
        mean: Tensor = fn.mean
    except (NotImplementedError, AttributeError):
        mean = site.value  # a family without a formula: draws, averaged
    return mean.clone()


def _mean_of_data(sites: dict[str, Site], args: tuple[Any, ...]) -> Tensor:
    observed = [s for s in sites.values() if s.observed and not isinstance(innermost(s.fn), (dist.Delta, dist.Unit))]
    if not observed:
        raise ValueError("expected a model that observes its data, got one that observes nothing; pass the data")
    site = next((s for s in observed if args and s.value is args[0]), observed[-1])
    try:
        mean: Tensor = unmask(site.fn)[0].mean
    except (NotImplementedError, AttributeError) as error:
        family = type(innermost(site.fn)).__name__
        raise ValueError(f"expected a likelihood with a mean at site {site.name!r}, got {family}, which has none") from error
    return mean
