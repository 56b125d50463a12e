"""Mean field whose parameters an encoder computes from the data."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae.guides.factor import width
from pyrovae.guides.mean_field import MeanField, plate_sizes, stored_rows, taken_rows
from pyrovae.guides.pilot import Pilot, example_of, innermost_program, read_pilot
from pyrovae.handlers import own_params
from pyrovae.handlers.structure import Latent
from pyrovae.ops import isolated_rng


class AmortizedMeanField(MeanField):
    """q(z | x): independent sites and components, with parameters computed from the data by an encoder.

    The encoder gets the data, the tensors among the model's positional arguments (as many as it takes, from the first), and
    returns unconstrained parameters. Its last dim holds those of all sites inside the data plate, in the order of the
    program: 1 a bit (its logit), K a category (logits), 2 a Normal component (all means of the site, then all logarithms of
    scales); a relaxed site has those of its discrete twin, and the temperature that the model has in this call, with its
    gradient. The dims before it are the batch's, or those of all plates right-aligned. Or it returns a dict of such tensors
    by site.
    Sites outside the data plate, and sites that the dict lacks, have free parameters, one set for all data.

    Without an encoder the guide takes `model.mirror()` where the model declares it, else a net with one tanh layer on the
    flattened first argument; that net gives a site in a plate inside the batch its own outputs for each of the plate's rows.

    Plates, indices, scales and masks are the model's own at every call: the guide runs the model up to its last latent.
    Cost: that, and one run of the encoder. Model gradients do not flow into the guide, but for that of a learned temperature.

    Args:
        model: a Pyro program; the guide keeps it, but does not own its parameters.
        encoder: see above; a module becomes part of the guide.
        example: positional arguments of one call, any batch; None runs the model without arguments, and takes its own draw
            as the data.

    Raises:
        ValueError: for a model that cannot run without arguments, a site with another support, an encoder of another width
            (at construction where it can be tried, else at the first call).

    Example:
        >>> from pyrovae.models import SigmoidBeliefNet
        >>> net = SigmoidBeliefNet(4, [3, 2])
        >>> guide = AmortizedMeanField(net, nn.Linear(4, 5))
        >>> {name: tuple(value.shape) for name, value in guide(net.sample(6)).items()}
        {'h2': (6, 2), 'h1': (6, 3)}

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014)
        https://arxiv.org/abs/1312.6114
        Neural Variational Inference and Learning in Belief Networks (Mnih, Gregor, 2014)
        https://arxiv.org/abs/1402.0030
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any] | None = None,
        *,
        example: tuple[Any, ...] | None = None,
    ) -> None:
        args = example_of(model, example, "AmortizedMeanField")
        super().__init__(model, read_pilot(model, args, "AmortizedMeanField", None))
        self._given = frozenset(latent.name for latent in self._pilot.latents)  # until the encoder is known
        tensors = tensors_of(args)
        self._example_shapes = _event_shapes(tensors, len(self._pilot.batch))
        if encoder is None and self._pilot.local:
            encoder = _default_encoder(model, self._pilot, tensors)
        self.encoder = encoder
        self._given = self._try_encoder(tensors, strict=example is not None)
        shared = frozenset(plate.name for plate in self._pilot.batch)
        for latent in self._pilot.latents:
            if latent.name not in self._given:
                self._add(self.free, latent, plate_sizes(latent, shared))

    def _unconstrained(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        stored = self._stored(self.free, lambda name: name not in self._given)
        return stored | (self._encode(tensors_of(args)) if self._given else {})

    def _rows(self, latent: Latent, parameters: Tensor, frames: Mapping[int, Any], indices: Mapping[str, Tensor]) -> Tensor:
        if latent.name in self._given:
            return taken_rows(latent, parameters, frames, indices, self._pilot.plate_depth)
        shared = frozenset(plate.name for plate in self._pilot.batch)
        return stored_rows(latent, parameters, frames, indices, shared)

    def _try_encoder(self, tensors: tuple[Tensor, ...], *, strict: bool) -> frozenset[str]:
        """Run the encoder on the example; the sites that it gives parameters for.

        Where the example is the guide's own guess, an encoder that cannot run on it waits for the first call.
        """
        encoder = self.encoder
        if encoder is None:
            return frozenset()
        run = own_params(encoder)
        try:
            with poutine.block(), isolated_rng(), torch.no_grad(), evaluating(encoder):
                output = run(*taken(encoder, tensors))
        except Exception as error:
            if strict:
                explain_dtype(error, encoder, tensors)
                _explain_width(error, self._example_shapes)
                raise
            return self._pilot.local
        return frozenset(self._split(output))

    def _encode(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        encoder = self.encoder
        assert encoder is not None
        if not tensors:
            raise ValueError("expected data for the encoder as the program's first argument, got none; pass the data")
        try:
            output = encoder(*taken(encoder, tensors))
        except RuntimeError as error:
            explain_dtype(error, encoder, tensors)
            shapes = _event_shapes(tensors, len(self._pilot.batch))
            if shapes == self._example_shapes:
                _explain_width(error, shapes)
                raise
            raise ValueError(
                f"expected data of shape [batch, …] with … as in the guide's example, {self._example_shapes}, got {shapes}, on "
                f"which the encoder failed: {error}; pass data of the width that the guide was built for"
            ) from error
        parameters = self._split(output)
        if missing := self._given - set(parameters):
            raise ValueError(
                f"expected an encoder that gives parameters for {sorted(self._given)}, got none for {sorted(missing)}; return "
                "the same sites at every call"
            )
        return parameters

    def _split(self, output: Any) -> dict[str, Tensor]:
        """Parameters `[..., *plate dims, width]` by site."""
        if isinstance(output, Mapping):
            latents = {latent.name: latent for latent in self._pilot.latents}
            if unknown := set(output) - set(latents):
                raise ValueError(f"expected an encoder with outputs for {sorted(latents)}, got also {sorted(unknown)}")
            for name, value in output.items():
                self._check_width(value, (latents[name],))
            return {name: self._place(value) for name, value in output.items()}
        latents_in = self._pilot.local_latents
        self._check_width(output, latents_in)
        parts = output.split([width(latent) for latent in latents_in], -1)
        return {latent.name: self._place(part) for latent, part in zip(latents_in, parts, strict=True)}

    def _check_width(self, output: Any, latents: tuple[Latent, ...]) -> None:
        total = sum(width(latent) for latent in latents)
        got = output.shape[-1] if isinstance(output, Tensor) and output.dim() else type(output).__name__
        if got != total:
            parts = ", ".join(f"{latent.name}: {width(latent)}" for latent in latents)
            raise ValueError(
                f"expected an encoder with {total} outputs ({parts}), got {got}; a bit takes 1, a category K, a Normal "
                "component 2"
            )


class _Perceptron(nn.Module):
    """One tanh layer on flattened data; outputs by site, for every row of plates inside the batch."""

    capturable: ClassVar[bool] = True

    def __init__(self, pilot: Pilot, data: Tensor) -> None:
        super().__init__()
        batch = frozenset(plate.name for plate in pilot.batch)
        self.dims = tuple(plate.dim for plate in pilot.batch)
        self.event_dims = data.dim() - len(self.dims)
        self.sites = tuple(
            (latent.name, _wide(pilot.plate_depth, plate_sizes(latent, batch)), width(latent)) for latent in pilot.local_latents
        )
        inputs = data[(0,) * len(self.dims)].numel()
        outputs = [torch.Size(wide).numel() * n for _, wide, n in self.sites]
        units = min(max(inputs, sum(outputs)), 512)
        self.dtype = dtype = data.dtype if data.is_floating_point() else torch.get_default_dtype()
        self.net = nn.Sequential(
            nn.Linear(inputs, units, dtype=dtype, device=data.device),
            nn.Tanh(),
            nn.Linear(units, sum(outputs), dtype=dtype, device=data.device),
        )
        self.outputs = outputs

    def forward(self, data: Tensor) -> dict[str, Tensor]:
        lead = data.shape[: data.dim() - self.event_dims]
        outputs = self.net(data.reshape((*lead, -1)).to(self.dtype))
        parts = outputs.split(self.outputs, -1)
        result = {}
        for (name, wide, n), part in zip(self.sites, parts, strict=True):
            shape = list(wide)
            for i, dim in enumerate(self.dims):
                shape[dim] = lead[i - len(self.dims)]
            result[name] = part.reshape((*lead[: len(lead) - len(self.dims)], *shape, n))
        return result


def explain_dtype(error: Exception, encoder: Any, tensors: tuple[Tensor, ...]) -> None:
    """Turn torch's error of an encoder that was given another dtype than its own into one that says so.

    Raises:
        ValueError: if the dtypes differ; else the error is another, and the caller's.
    """
    own = {p.dtype for p in encoder.parameters() if p.is_floating_point()} if isinstance(encoder, nn.Module) else set()
    if not isinstance(error, RuntimeError) or len(own) != 1:
        return
    (wanted,) = own
    other = sorted({str(tensor.dtype) for tensor in taken(encoder, tensors)} - {str(wanted)})
    if other:
        raise ValueError(
            f"expected data of {wanted}, as the encoder's parameters, got {', '.join(other)}, on which it failed: {error}; "
            f"convert it with x.to({wanted}), and divide bytes by 255"
        ) from error


def _explain_width(error: Exception, shapes: list[list[int]]) -> None:
    """Turn torch's error of a layer that does not fit the data into one that says so; other errors are the encoder's own."""
    if isinstance(error, RuntimeError) and "cannot be multiplied" in str(error):
        raise ValueError(
            f"expected an encoder whose input width is that of the data, rows of {shapes}, got {error}; make its first layer "
            "as wide as the data"
        ) from error


def _default_encoder(model: Callable[..., Any], pilot: Pilot, tensors: tuple[Tensor, ...]) -> nn.Module:
    mirror = getattr(innermost_program(model), "mirror", None)
    net = None if mirror is None else mirror()
    if isinstance(net, nn.Module):  # a structured guide's encoders, by site, are no encoder for this one
        return net
    if not tensors or tensors[0].dim() < len(pilot.batch):
        raise ValueError(
            "expected a model whose first argument is the data, to build an encoder for; pass encoder=... and example=(x,), "
            "or use LocalMeanField"
        )
    return _Perceptron(pilot, tensors[0])


def _wide(depth: int, sizes: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(sizes.get(dim, 1) for dim in range(-depth, 0))


def tensors_of(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The data among positional arguments."""
    return tuple(argument for argument in args if isinstance(argument, Tensor))


def _event_shapes(tensors: tuple[Tensor, ...], batch_dims: int) -> list[list[int]]:
    return [list(tensor.shape[batch_dims:]) for tensor in tensors]


def taken(encoder: Callable[..., Any], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As many data tensors as the encoder takes."""
    try:
        parameters = inspect.signature(encoder.forward if isinstance(encoder, nn.Module) else encoder).parameters.values()
    except (TypeError, ValueError):
        return tensors[:1]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return tensors
    return tensors[: sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)]


@contextlib.contextmanager
def evaluating(encoder: Any) -> Iterator[None]:
    """Run modules in evaluation mode, and put their modes back."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
