"""What a guide learns of its model before the first call: its sites, and which plate holds the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import Latent, Plate, Site, read_structure, run_sites
from pyrovae.ops import isolated_rng


@dataclass(frozen=True)
class Pilot:
    """Descriptors of a model, as one run on example data met it.

    Attributes:
        latents: in the order of the program.
        local: names of the latents inside the data plate.
        batch: the plates common to the observed sites and the local latents, left to right; the first axes of the data.
        anchor: the plate of the data, one of `batch`; None where no latent is local.
        plate_depth: how many dims, counted from the right, plates take.
        data: pairs (observed site, position of the argument that it is).
    """

    latents: tuple[Latent, ...]
    local: frozenset[str]
    batch: tuple[Plate, ...]
    anchor: Plate | None
    plate_depth: int
    data: tuple[tuple[str, int], ...]

    @property
    def local_latents(self) -> tuple[Latent, ...]:
        """The latents inside the data plate."""
        return tuple(latent for latent in self.latents if latent.name in self.local)


def read_pilot(model: Callable[..., Any], example: tuple[Any, ...] | None, guide: str, rows: int | None) -> Pilot:
    """Run a model on example data and describe it.

    Args:
        model: a Pyro program.
        example: its positional arguments; None tries the model without arguments, and then on its own draw.
        guide: the name of the guide, for messages.
        rows: the size of the data plate where it is known; None takes the length of the first argument.

    Raises:
        ValueError: if the program needs arguments, or has no latent that a mean-field factor can be made for.
    """
    args = _own_example(model, guide) if example is None else _as_arguments(example)
    structure = read_structure(model, args, {})
    if not structure.latents:
        raise ValueError(f"expected a model with latent sites for {guide}, got none; pass the data in example=(x,)")
    for latent in structure.latents:
        if latent.kind == "other" or (latent.kind == "integer" and latent.low != 0):
            raise ValueError(
                f"expected bits, categories from 0, one-hot vectors, reals or relaxed sites for {guide}, got another support "
                f"at site {latent.name!r}; rewrite it as a transform of such a site, or write its guide by hand"
            )
    sites = _sites(model, args)
    if rows is None and args and isinstance(args[0], Tensor) and args[0].dim():
        rows = args[0].shape[0]
    observed = [site for site in sites.values() if _is_data(site)]
    plates = [set(o.plates) for o in structure.observed if any(o.name == site.name for site in observed)]
    batch, anchor, local = _batch(structure.latents, plates, rows)
    return Pilot(
        latents=structure.latents,
        local=frozenset(latent.name for latent in local),
        batch=batch,
        anchor=anchor,
        plate_depth=structure.plate_depth,
        data=tuple((site.name, i) for site in observed for i, argument in enumerate(args) if argument is site.value),
    )


def example_of(model: Callable[..., Any], example: tuple[Any, ...] | None, guide: str) -> tuple[Any, ...]:
    """The arguments that :func:`read_pilot` runs the model on."""
    return _own_example(model, guide) if example is None else _as_arguments(example)


def innermost_program(program: Any) -> Any:
    """The program inside `relax` and its like."""
    while hasattr(program, "program"):
        program = program.program
    return program


def positional(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The data arguments of a call, also where they were given by keyword."""
    if args or not kwargs:
        return args
    program = innermost_program(model)
    try:
        signature = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
        bound = signature.bind_partial(**kwargs).arguments
    except TypeError:
        return args
    return tuple(bound[p.name] for p in signature.parameters.values() if p.name in bound and p.kind is p.POSITIONAL_OR_KEYWORD)


def _own_example(model: Callable[..., Any], guide: str) -> tuple[Any, ...]:
    """No arguments, or a draw of the model that becomes its observation when it is passed as the data."""
    model = innermost_program(model)  # `relax` would relax the data, too
    hint = f"pass example=(x,) to {guide}, with the arguments of one call"
    try:
        sites = _sites(model, ())
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"expected a model that runs without arguments, got {type(error).__name__}: {error}; {hint}"
        ) from error
    if any(_is_data(site) for site in sites.values()):
        return ()
    for name, site in reversed(sites.items()):
        try:
            again = _sites(model, (site.value,))
        except Exception:  # a latent is no data, and the program may fail on it in any way
            continue
        if name in again and again[name].observed and again[name].value is site.value:
            return (site.value,)
    raise ValueError(f"expected a model that observes its first argument, got one that observes nothing; {hint}")


@torch.no_grad()
def _sites(model: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Site]:
    with isolated_rng():
        return run_sites(model, args, {}, {}, {})


def _is_data(site: Site) -> bool:
    """Whether a site is observed, and no `pyro.deterministic` or `pyro.factor`."""
    return site.observed and not isinstance(innermost(site.fn), (dist.Delta, dist.Unit))


def _batch(
    latents: tuple[Latent, ...], observed: list[set[Plate]], rows: int | None
) -> tuple[tuple[Plate, ...], Plate | None, tuple[Latent, ...]]:
    """The plates of the data, and the latents inside them.

    The data plate is one around every observed site (around any, where they share none) and around a latent: of the length
    of the data where there is such a one, else the one around most latents, else the outermost.
    """
    if not observed:
        return (), None, ()
    common = set.intersection(*observed) or set.union(*observed)
    inside = {plate: sum(plate in latent.plates for latent in latents) for plate in common}
    common = {plate for plate in common if inside[plate]}
    if not common:
        return (), None, ()
    anchor = max(common, key=lambda plate: (rows in (plate.size, plate.full_size), inside[plate], -plate.dim))
    local = tuple(latent for latent in latents if anchor in latent.plates)
    batch = common.intersection(*(latent.plates for latent in local))
    return tuple(sorted(batch, key=lambda plate: plate.dim)), anchor, local


def _as_arguments(example: Any) -> tuple[Any, ...]:
    """An example as positional arguments; a bare tensor is one of them."""
    return (example,) if isinstance(example, Tensor) else tuple(example)
