"""What the mean-field guides share: their parameters' layout, and the rows of them that a call sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.guides.factor import width
from pyrovae.guides.pilot import Pilot, positional
from pyrovae.guides.walk import walk
from pyrovae.handlers import Module, declares_capturable
from pyrovae.handlers.structure import Latent


class MeanField(Module):
    """A guide whose sites are independent given the data; the base of the amortised and the local one."""

    def __init__(self, model: Callable[..., Any], pilot: Pilot) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: an attribute would make the model a submodule of its guide
        self._pilot = pilot
        self.free = nn.ParameterDict()

    @property
    def capturable(self) -> bool:
        """Whether the model, and encoders that are functions, declare so; see :func:`pyrovae.handlers.declares_capturable`."""
        functions = [vars(self).get("encoder"), *vars(self).get("_functions", {}).values()]
        return all(declares_capturable(program) for program in (*self._model, *functions) if program is not None)

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
        parameters = self._unconstrained(positional(model, args, kwargs))
        return walk(
            model,
            args,
            kwargs,
            self._pilot.latents,
            lambda latent, frames, indices: self._rows(latent, parameters[latent.name], frames, indices),
        )

    def _unconstrained(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """Unconstrained parameters `[..., *plate dims, width]` by site, for data arguments `args`."""
        raise NotImplementedError

    def _stored(self, parameters: nn.ParameterDict, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        return {latent.name: parameters[_key(latent)] for latent in self._pilot.latents if wanted(latent.name)}

    def _rows(self, latent: Latent, parameters: Tensor, frames: Mapping[int, Any], indices: Mapping[str, Tensor]) -> Tensor:
        """Take the rows that the plates `frames` (by dim) of a site see; `indices` are those of the plates by name."""
        raise NotImplementedError

    def _place(self, value: Tensor) -> Tensor:
        """Put leading dims that are the batch's where the batch's plates are."""
        batch, depth = self._pilot.batch, self._pilot.plate_depth
        if value.dim() - 1 != len(batch) or len(batch) == depth:
            return value
        wide = [1] * depth
        for size, plate in zip(value.shape[:-1], batch, strict=True):
            wide[plate.dim] = size
        return value.reshape((*wide, value.shape[-1]))

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
        size = parameters.shape[dim - 1] if -dim < parameters.dim() else 1
        if frame.name in shared:
            continue
        if frame.full_size != size or -dim >= parameters.dim():
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
