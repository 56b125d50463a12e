"""Densities and masses: a model and a guide must score a site by the same of the two."""

from __future__ import annotations

from pyrovae.handlers.structure import Structure


def check_measures(model: Structure, guide: Structure) -> None:
    """Refuse a guide that scores a site by a density where the model has a mass, or the other way round.

    The difference log p(z) − log q(z) of a mass and a density means nothing: it changes with the units of the density, and
    an "ELBO" made of it is no bound. This also finds Pyro's straight-through relaxations, whose values are discrete but
    scored by a density that is lost as soon as the value is reshaped, unless they are on both sides. A point mass (`Delta`)
    may meet either.

    Args:
        model: from :func:`pyrovae.handlers.structure.read_structure`.
        guide: likewise.

    Raises:
        ValueError: with the site and what to do.
    """
    ours = {latent.name: latent for latent in guide.latents}
    for latent in model.latents:
        if latent.name not in ours:
            continue
        p, q = latent.measure, ours[latent.name].measure
        if p == q or "point" in (p, q):
            continue
        raise ValueError(
            f"expected one measure for site {latent.name!r} in model and guide, got {_WORDS[p]} in the model and {_WORDS[q]} "
            f"in the guide: the difference of their log probabilities means nothing; {_remedy(p, q)}"
        )


_WORDS = {
    "density": "a density",
    "mass": "a mass",
    "quantized": "Pyro's straight-through relaxation (discrete values, scored by a density)",
}


def _remedy(p: str, q: str) -> str:
    if "quantized" in (p, q):
        return (
            "use pyrovae.distributions.RelaxedOneHotCategorical (RelaxedBernoulli) with straight_through=True, which scores "
            "its values by their mass, or write both discrete and wrap them in pyrovae.handlers.relax"
        )
    return "write both discrete and wrap both in pyrovae.handlers.relax, or wrap the relaxed one in pyrovae.handlers.discretize"
