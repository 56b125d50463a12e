"""Densities and masses: a model and a guide must score a site by the same of the two, and be wrapped once."""

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


def check_bare(program: Structure, what: str) -> None:
    """Refuse a program with a relaxed or surrogate site, which a relaxation around it would leave as it is.

    Args:
        program: a model or guide, as it is before it is wrapped; from :func:`pyrovae.handlers.structure.read_structure`.
        what: what would wrap it, for the message: "temperature" or "surrogate".

    Raises:
        ValueError: with the site and what to do.
    """
    for latent in program.latents:
        if latent.gradient is None:
            continue
        wrapper = "relax" if latent.gradient == "relaxed" else "surrogate"
        state = "relaxed" if latent.gradient == "relaxed" else "with a surrogate gradient"
        raise ValueError(
            f"expected programs as written for {what}=..., got site {latent.name!r} already {state} (a guide made of "
            f"{wrapper}(model)?), which {what}=... would leave as it is; pass the bare programs, or leave {what} out"
        )


def check_changes(model: Structure, what: str) -> None:
    """Refuse a model in which a relaxation, or a surrogate gradient, changes no site.

    Args:
        model: as it is before it is wrapped; from :func:`pyrovae.handlers.structure.read_structure`.
        what: what would wrap it, for the message: "temperature" or "surrogate".

    Raises:
        ValueError: saying so.
    """
    if any(latent.kind in ("bit", "one_hot") for latent in model.latents):
        return
    sites = ", ".join(repr(latent.name) for latent in model.latents) or "none"
    raise ValueError(
        f"expected a Bernoulli or OneHotCategorical latent for {what}=..., got latents {sites} and none of these families; "
        f"leave {what} out"
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
