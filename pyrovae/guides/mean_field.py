"""What the mean-field guides share: one factor a site, and the walk through the model that places them.

At each call the guide runs its model under a handler that puts q's factor where the model has its prior, and leaves right
after the last latent site. So plates, their sizes, indices, scales and masks are the model's own at that very call, and the
decoder never runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrovae.guides.pilot import Pilot, positional
from pyrovae.handlers import Module, own_params
from pyrovae.handlers.relax import StableRelaxedBernoulli, StableRelaxedOneHotCategorical, innermost
from pyrovae.handlers.structure import Latent


class MeanField(Module):
    """A guide whose sites are independent given the data; the base of the amortised and the local one."""

    def __init__(self, model: Callable[..., Any], pilot: Pilot) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: an attribute would make the model a submodule of its guide
        self._pilot = pilot
        self.free = nn.ParameterDict()

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents of one call.

        Args:
            *args: the model's.
            observations: values of observed sites, which take the place of the data arguments: the convention of
                `pyro.infer.ReweightedWakeSleep`. Not passed on to the model.
            **kwargs: the model's.

        Returns:
            The values by site, each with the shape that the model gives it.

        Raises:
            ValueError: if the encoder's output or a plate does not fit.
        """
        (model,) = self._model
        if observations is not None:
            args = self._observe(args, observations)
        walk = _Walk(self, self._unconstrained(positional(model, args, kwargs)))
        try:
            with torch.no_grad(), walk:
                own_params(model)(*args, **kwargs)
        except _LastSite:
            pass
        return walk.values

    def _unconstrained(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """Unconstrained parameters `[..., *plate dims, width]` by site, for data arguments `args`."""
        raise NotImplementedError

    def _stored(self, parameters: nn.ParameterDict, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        return {latent.name: parameters[_key(latent)] for latent in self._pilot.latents if wanted(latent.name)}

    def _rows(self, latent: Latent, parameters: Tensor, frames: Mapping[int, Any], indices: Mapping[str, Tensor]) -> Tensor:
        """Take the rows that the plates `frames` (by dim) of a site see; `indices` are those of the plates by name."""
        raise NotImplementedError

    def _observe(self, args: tuple[Any, ...], observations: Mapping[str, Tensor]) -> tuple[Any, ...]:
        given = {i: observations[name] for name, i in self._pilot.data if name in observations}
        if not given:
            raise ValueError(
                f"expected observations of a site that is an argument of the model, got {sorted(observations)}; this program "
                "transforms its data before it observes them, so leave out observations="
            )
        return tuple(given.get(i, argument) for i, argument in enumerate(args)) + tuple(
            given[i] for i in sorted(given) if i >= len(args)
        )

    def _add(self, parameters: nn.ParameterDict, latent: Latent, sizes: Mapping[int, int]) -> None:
        """Create parameters of a site, `sizes` long along its plates by dim (1 elsewhere)."""
        lead = [sizes.get(dim, 1) for dim in range(-self._pilot.plate_depth, 0)]
        dtype = latent.dtype if latent.dtype.is_floating_point else torch.get_default_dtype()
        value = torch.empty(*lead, width(latent), dtype=dtype, device=latent.device)
        parameters[_key(latent)] = nn.Parameter(small_normal(value))


def width(latent: Latent) -> int:
    """How many unconstrained parameters the factor of a site has."""
    per_component = {"bit": 1, "relaxed_bit": 1, "real": 2}
    return latent.components * per_component.get(latent.kind, latent.cardinality)


def stored_rows(
    latent: Latent, parameters: Tensor, frames: Mapping[int, Any], indices: Mapping[str, Tensor], shared: frozenset[str]
) -> Tensor:
    """The rows of stored parameters that a site's plates see.

    Args:
        latent: the site.
        parameters: `[*plate dims, width]`, as long as the full plates.
        frames: the plates of this call by dim.
        indices: the indices of the plates of this call by name.
        shared: names of the plates along which parameters are shared.

    Raises:
        ValueError: if a plate has another size than the parameters.
    """
    for dim, frame in frames.items():
        size = parameters.shape[dim - 1]
        if frame.name in shared:
            continue
        if frame.full_size != size:
            raise ValueError(
                f"expected plate {frame.name!r} around site {latent.name!r} with the {size} rows of the guide's example, got "
                f"{int(frame.full_size)}; the site has parameters for each row: make the guide with example=..., or let an "
                "encoder give its parameters"
            )
        if frame.name in indices:
            parameters = parameters.index_select(dim - 1, _on(indices[frame.name], parameters))
        elif frame.size != size:
            raise ValueError(f"expected plate {frame.name!r} made inside the model, got one whose indices are not seen")
    return parameters


def taken_rows(
    latent: Latent, parameters: Tensor, frames: Mapping[int, Any], indices: Mapping[str, Tensor], plate_depth: int
) -> Tensor:
    """The rows of an encoder's output `[..., *plate dims, width]` that a site's plates see.

    Raises:
        ValueError: if a dim has neither size 1 nor that of its plate.
    """
    for dim in range(1 - parameters.dim(), 0):
        size, frame = parameters.shape[dim - 1], frames.get(dim)
        if size == 1 or (frame is not None and size == frame.size) or dim < -plate_depth:
            continue
        if frame is not None and size == frame.full_size and frame.name in indices:
            parameters = parameters.index_select(dim - 1, _on(indices[frame.name], parameters))
            continue
        where = f"the {int(frame.size)} rows of plate {frame.name!r}" if frame is not None else "no plate"
        raise ValueError(
            f"expected an encoder whose leading dims fit the plates of site {latent.name!r}, got {size} rows for {where} at "
            f"dim {dim}; return a dict by site, each [*plates, {width(latent)}]"
        )
    return parameters


class _LastSite(Exception):
    """Every latent has its value."""


class _Walk(Messenger):
    """Puts factors where a model has priors, hides all else, and leaves after the last latent."""

    def __init__(self, guide: MeanField, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.guide, self.parameters = guide, parameters
        self.latents = {latent.name: latent for latent in guide._pilot.latents}
        self.waiting = set(self.latents)
        self.indices: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.grad = torch.is_grad_enabled()

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        """Answer without the store where it does not know the name; outer handlers do not see the model's parameters."""
        msg["stop"] = True
        initial = msg["args"][1] if len(msg["args"]) > 1 else None
        if msg["done"] or initial is None or msg["name"] in pyro.get_param_store():
            return
        value = (initial() if callable(initial) else initial).detach()
        value.unconstrained = weakref.ref(value)
        msg["value"], msg["done"] = value, True

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if _is_subsample(msg):
            return
        latent = self.latents.get(msg["name"])
        if latent is None or msg["is_observed"]:
            msg["stop"] = True
            return
        frames = {frame.dim: frame for frame in msg["cond_indep_stack"] if frame.vectorized}
        torch.set_grad_enabled(self.grad)
        parameters = self.guide._rows(latent, self.parameters[latent.name], frames, self.indices)
        msg["fn"] = _factor(latent, parameters, frames, msg["fn"])
        msg["infer"] = {key: value for key, value in msg["infer"].items() if key == "is_auxiliary"}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if _is_subsample(msg):
            if isinstance(msg["value"], Tensor):
                self.indices[msg["name"]] = msg["value"]
            return
        torch.set_grad_enabled(False)
        if msg["name"] in self.latents and not msg["is_observed"]:
            self.values[msg["name"]] = msg["value"]
        self.waiting.discard(msg["name"])
        if not self.waiting:
            raise _LastSite


def _factor(latent: Latent, parameters: Tensor, frames: Mapping[int, Any], prior: Any) -> Any:
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
    if latent.kind == "bit":
        return dist.Bernoulli(logits=parameters.reshape(lead))
    if latent.kind == "integer":
        return dist.Categorical(logits=parameters.reshape((*lead, latent.cardinality)))
    if latent.kind == "one_hot":
        return dist.OneHotCategorical(logits=parameters.reshape(lead))
    if latent.kind == "real":
        loc, log_scale = parameters.chunk(2, -1)
        return dist.Normal(loc.reshape(lead), log_scale.exp().reshape(lead))
    family = _relaxed_family(type(prior))
    return family(prior.temperature.detach(), logits=parameters.reshape(lead), validate_args=False)


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


def _relaxed_family(family: type) -> type:
    """The stable form of Pyro's own soft families; a subclass, as a straight-through one, is taken as it is."""
    stable = {
        dist.RelaxedBernoulli: StableRelaxedBernoulli,
        dist.RelaxedOneHotCategorical: StableRelaxedOneHotCategorical,
    }
    return stable.get(family, family)


def _is_subsample(msg: dict[str, Any]) -> bool:
    return type(msg["fn"]).__name__ == "_Subsample"


def _on(indices: Tensor, parameters: Tensor) -> Tensor:
    return indices.to(parameters.device)


def _key(latent: Latent) -> str:
    return latent.name.replace(".", "__")


def small_normal(value: Tensor) -> Tensor:
    """Close to the middle (p = 1/2, equal categories, N(0, 1)), and off it, so that no gradient is zero by symmetry."""
    with torch.no_grad():
        return value.normal_(0, 0.1)


def plate_sizes(latent: Latent, shared: frozenset[str]) -> dict[int, int]:
    """Full sizes of a site's plates by dim; 1 along those whose rows share parameters."""
    return {plate.dim: 1 if plate.name in shared else plate.full_size for plate in latent.plates}
