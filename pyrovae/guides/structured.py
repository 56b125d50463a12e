"""A guide whose layers look at one another: q(h1 | x) q(h2 | h1) and so on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae.guides.amortized import evaluating, explain_dtype, taken, tensors_of
from pyrovae.guides.factor import factor, width
from pyrovae.guides.mean_field import MeanField, plate_sizes, stored_rows, taken_rows
from pyrovae.guides.pilot import example_of, innermost_program, positional, read_pilot
from pyrovae.guides.walk import Met, marked, meet
from pyrovae.handlers.anneal import ScaleLatents
from pyrovae.handlers.structure import Latent
from pyrovae.ops import isolated_rng


class AmortizedStructured(MeanField):
    """q(h1 | x) q(h2 | h1) …: each site drawn given the one drawn before it, by an encoder of its own.

    Sites are drawn in the order of `encoders`, which need not be the model's: the bottom layer first, where the model starts
    at the top. The first encoder gets the data, the tensors among the model's positional arguments; each other one the value
    drawn just before it, and, if its signature takes more, the ones before that, the nearest first, and then the data (so
    `net(h2, h1, x)`). Values come as the model's sites have them, `[..., B, *event]`, with a dim of 1 put at the end of
    scalars that are no integers, and with any particles on the left; data are expanded to the same dims on the left.

    Encoders return unconstrained parameters as for :class:`AmortizedMeanField`: in the last dim 1 a bit (its logit), K a
    category (logits), 2 a Normal component (all means, then all logarithms of scales). The components of a site are
    independent given what it is drawn from. Where the values have a reparameterised gradient (Normal, relaxed and surrogate
    sites), it flows through them into the encoders before. Sites without an encoder have free parameters, one set for all
    data, and are drawn first.

    Plates, indices, scales and masks are the model's own at every call: the guide runs the model up to its last latent.
    Cost: that, and one run of every encoder. Model gradients do not flow into the guide, but for that of a learned temperature.

    Args:
        model: a Pyro program; the guide keeps it, but does not own its parameters.
        encoders: a net by site, in the order of the draws; modules become part of the guide. None takes `model.mirror()`.
        example: positional arguments of one call, any batch; None runs the model without arguments, and takes its own draw
            as the data.

    Raises:
        ValueError: for a model that cannot run without arguments, encoders of no site of the model or of another width.

    Example:
        >>> from pyrovae.models import HierarchicalVAE
        >>> model = HierarchicalVAE(6, [("normal", 4), ("bernoulli", 3)], hidden=8)
        >>> guide = AmortizedStructured(model)
        >>> {name: tuple(value.shape) for name, value in guide(model.sample(5)).items()}
        {'h1': (5, 4), 'h2': (5, 3)}

    References:
        Ladder Variational Autoencoders (Sønderby, Raiko, Maaløe, Sønderby, Winther, 2016)
        https://arxiv.org/abs/1602.02282
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016)
        https://arxiv.org/abs/1509.00519
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoders: Mapping[str, Callable[..., Any]] | None = None,
        *,
        example: tuple[Any, ...] | None = None,
    ) -> None:
        args = example_of(model, example, "AmortizedStructured")
        super().__init__(model, read_pilot(model, args, "AmortizedStructured", None))
        given = _mirror(model) if encoders is None else dict(encoders)
        names = {latent.name for latent in self._pilot.latents}
        if not given or not set(given) <= names:
            raise ValueError(
                f"expected encoders by site, some of {sorted(names)}, got {sorted(given)}; name the model's latents"
            )
        self.encoders = nn.ModuleDict({_key(name): net for name, net in given.items() if isinstance(net, nn.Module)})
        self._functions = {name: net for name, net in given.items() if not isinstance(net, nn.Module)}
        self._order = tuple(given)
        shared = frozenset(plate.name for plate in self._pilot.batch)
        for latent in self._pilot.latents:
            if latent.name not in given:
                self._add(self.free, latent, plate_sizes(latent, shared))
        tensors = tensors_of(args)
        if tensors and (example is not None or encoders is None):
            with evaluating(self), poutine.block(), isolated_rng(), torch.no_grad():
                self(*args)

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents of one call; see :meth:`MeanField.forward`."""
        (model,) = self._model
        if observations is not None:
            args = self._observe(args, observations)
        data = tensors_of(positional(model, args, kwargs))
        met, given = meet(model, args, kwargs, self._pilot.latents)
        plates = _plates(met, given)
        indices = {name: torch.as_tensor(plate._indices) for name, plate in plates.items()}
        latents = {latent.name: latent for latent in self._pilot.latents}
        shared = frozenset(plate.name for plate in self._pilot.batch)
        values: dict[str, Tensor] = {}
        for name, free in self._stored(self.free, lambda name: name not in self._order).items():
            frames = _frames(met[name])
            values[name] = self._draw(
                latents[name], met[name], stored_rows(latents[name], free, frames, indices, shared), plates
            )
        drawn: list[tuple[Tensor, torch.Size]] = []  # values and their dims left of events, the nearest first
        for name in self._order:
            latent, frames = latents[name], _frames(met[name])
            output = self._encode(latent, drawn, data, frames, indices)
            rows = taken_rows(latent, output, frames, indices, self._pilot.plate_depth)
            value = values[name] = self._draw(latent, met[name], rows, plates)
            drawn.insert(0, (_as_input(latent, value), value.shape[: value.dim() - len(latent.event_shape)]))
        return values

    def _draw(self, latent: Latent, met: Met, parameters: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """The sample statement of a site in the plates, scale and mask that the model has it in."""
        fn = factor(latent, parameters, _frames(met), met.prior)
        factor_of_plates = 1.0
        for frame in reversed(met.frames):
            if frame.vectorized:
                factor_of_plates = factor_of_plates * frame.full_size / frame.size
        with contextlib.ExitStack() as stack:
            if isinstance(met.scale, Tensor) or met.scale != factor_of_plates:
                stack.enter_context(ScaleLatents(met.scale / factor_of_plates))
            if met.mask is not None:
                stack.enter_context(poutine.mask(mask=met.mask))
            for frame in met.frames:
                if frame.vectorized:
                    stack.enter_context(plates[frame.name])
            value: Tensor = pyro.sample(latent.name, fn, infer=marked(fn))
        return value

    def _encode(
        self,
        latent: Latent,
        drawn: list[tuple[Tensor, torch.Size]],
        data: tuple[Tensor, ...],
        frames: Mapping[int, Any],
        indices: Mapping[str, Tensor],
    ) -> Tensor:
        """Unconstrained parameters of a site, `[..., *plate dims, width]`."""
        name = latent.name
        net = self._functions[name] if name in self._functions else self.encoders[_key(name)]
        if not drawn and not data:
            raise ValueError("expected data for the encoder as the program's first argument, got none; pass the data")
        inputs = [value for value, _ in drawn]
        inputs += [self._beside(x, drawn[0][1], frames, indices) for x in data] if drawn else data
        inputs = list(taken(net, tuple(inputs)))
        try:
            output = net(*inputs)
        except RuntimeError as error:
            explain_dtype(error, net, tuple(inputs))
            if "cannot be multiplied" in str(error):
                raise ValueError(
                    f"expected an encoder of {name!r} as wide as its inputs, got inputs of shapes "
                    f"{[list(value.shape) for value in inputs]}: {error}; make its first layer fit, and flatten events of more "
                    "than one dim"
                ) from error
            raise
        got = output.shape[-1] if isinstance(output, Tensor) and output.dim() else type(output).__name__
        if got != width(latent):
            raise ValueError(
                f"expected an encoder of {name!r} with {width(latent)} outputs, got {got}; a bit takes 1, a category K, a "
                "Normal component 2"
            )
        return output if drawn else self._place(output)

    def _beside(self, data: Tensor, lead: torch.Size, frames: Mapping[int, Any], indices: Mapping[str, Tensor]) -> Tensor:
        """Data of the rows that a value has, expanded to the dims `lead` that the value has left of its events."""
        batch = len(self._pilot.batch)
        if data.dim() < batch or batch != self._pilot.plate_depth:
            return data
        for axis, plate in enumerate(self._pilot.batch):
            frame = frames.get(plate.dim)
            if frame is not None and frame.size < data.shape[axis] == frame.full_size:
                data = data.index_select(axis, indices[frame.name].to(data.device))
        return data.expand(lead + data.shape[batch:])


def _plates(met: Mapping[str, Met], given: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model's plates, opened anew: with the rows that the program gave, else rows drawn here."""
    plates: dict[str, Any] = {}
    for latent in met.values():
        with contextlib.ExitStack() as stack:  # nested as in the model, so that their draws of rows are
            for frame in latent.frames:
                if not frame.vectorized:
                    continue
                if frame.name not in plates:
                    rows = {"subsample": given[frame.name]} if frame.name in given else {"subsample_size": int(frame.size)}
                    plates[frame.name] = pyro.plate(frame.name, int(frame.full_size), dim=frame.dim, **rows)
                stack.enter_context(plates[frame.name])
    return plates


def _frames(met: Met) -> dict[int, Any]:
    return {frame.dim: frame for frame in met.frames if frame.vectorized}


def _as_input(latent: Latent, value: Tensor) -> Tensor:
    """A value as encoders take it: scalars with a dim of 1 at the end, integers as they are."""
    return value if latent.event_shape or latent.kind == "integer" else value.unsqueeze(-1)


def _mirror(model: Callable[..., Any]) -> dict[str, Any]:
    mirror = getattr(innermost_program(model), "mirror", None)
    nets = None if mirror is None else mirror()
    if not isinstance(nets, Mapping):
        raise ValueError(
            "expected a model whose mirror() gives an encoder for each site, got "
            f"{'none' if nets is None else type(nets).__name__}; pass encoders={{site: net, …}} in the order of the draws"
        )
    return dict(nets)


def _key(name: str) -> str:
    return name.replace(".", "__")
