"""A declared belief net of binary layers beside its data: what mean field, the Saul-Jaakkola-Jordan bound and Gibbs read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.handlers import declared
from pyrovae.handlers.structure import Structure
from pyrovae.inference.exact.declaration import check_declaration
from pyrovae.inference.posterior import Program
from pyrovae.ops import SigmoidLayers, check_enumerable, rbm_log_partition


@dataclass(frozen=True)
class LayeredNet:
    """The declared layers and the data `x` `[B, D]`, which stands below them as layer 0.

    Attributes:
        layers: what the model declared.
        x: the data, in the dtype of the weights.
    """

    layers: SigmoidLayers
    x: Tensor

    @property
    def depth(self) -> int:
        """L, the number of latent layers."""
        return len(self.layers.sites)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Units of the latent layers, from the data upwards."""
        return tuple(weight.shape[0] for weight in self.layers.weights)

    def bias(self, layer: int) -> Tensor:
        """The bias of a layer, 0 for the data and L for the top."""
        return self.layers.top_bias if layer == self.depth else self.layers.biases[layer]

    def linear_terms(self, values: list[Tensor]) -> Tensor:
        """The bilinear part of log p(x, h), Σ_l h_l · (bias_l + h_{l+1} W_l), `[B]`.

        Args:
            values: states or means of the latent layers from the data upwards, `[B, H_l]` each.
        """
        below, total = self.x, torch.zeros(())
        for layer, value in enumerate(values):
            total = total + (below * (self.bias(layer) + value @ self.layers.weights[layer])).sum(-1)
            below = value
        return total + below @ self.layers.top_bias

    def log_normalizer(self, instead: str) -> Tensor:
        """What the top layer's own normalisation subtracts: Σ softplus(top_bias), or log Z of the top RBM, 0-d and exact.

        Args:
            instead: the method named where the RBM is too wide to be summed.

        Raises:
            ValueError: if both its sides are too wide.
        """
        layers = self.layers
        if layers.top_weight is None or layers.top_hidden_bias is None:
            return -torch.nn.functional.logsigmoid(-layers.top_bias).sum()
        bits, units = sorted(layers.top_weight.shape)
        check_enumerable(bits, units, layers.top_weight.dtype, instead)
        return rbm_log_partition(layers.top_weight, layers.top_bias, layers.top_hidden_bias)

    def double(self) -> LayeredNet:
        """A detached copy in float64: a snapshot."""
        return self._mapped(lambda tensor: tensor.detach().double().clone())

    def snapshot(self) -> LayeredNet:
        """A detached copy."""
        return self._mapped(lambda tensor: tensor.detach().clone())

    def rows(self, part: slice) -> LayeredNet:
        """The same net beside some of the rows."""
        return LayeredNet(self.layers, self.x[part])

    def _mapped(self, change: Any) -> LayeredNet:
        old = self.layers
        tensors = {
            "weights": tuple(change(weight) for weight in old.weights),
            "biases": tuple(change(bias) for bias in old.biases),
            "top_bias": change(old.top_bias),
            "top_weight": None if old.top_weight is None else change(old.top_weight),
            "top_hidden_bias": None if old.top_hidden_bias is None else change(old.top_hidden_bias),
        }
        return LayeredNet(SigmoidLayers(sites=old.sites, **tensors), change(self.x))


def layered_net(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure) -> LayeredNet | None:
    """The net that a program declares at its arguments, live; None where it declares none or is run otherwise than declared.

    Args:
        model: a Pyro program.
        args: its arguments, the data first.
        kwargs: its keyword arguments.
        structure: what a pilot run told of it.

    Raises:
        ValueError: for weights that are not finite, or a declaration that tells another log joint than the program.
    """
    layers = declared(model, "layers")
    if not isinstance(layers, SigmoidLayers) or not args or not isinstance(args[0], Tensor) or args[0].dim() != 2:
        return None
    rows = torch.Size([len(args[0])])
    same = {latent.name for latent in structure.latents} == set(layers.sites)
    in_rows = all(latent.kind == "bit" and latent.batch_shape == rows for latent in structure.latents)
    if not same or not in_rows or structure.batch_shape != rows or len(structure.plates) != 1 or structure.sequential:
        return None
    if structure.random_plates:
        return None
    if any(mask is not None and mask is not True for mask in structure.masks.values()):
        return None
    tensors = (*layers.weights, *layers.biases, layers.top_bias, layers.top_weight, layers.top_hidden_bias)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None):
        raise ValueError("expected finite weights and biases, got NaN or infinite ones; look at the learning rate")
    check_declaration(model, layers, args, kwargs, structure)
    return LayeredNet(layers, args[0].to(layers.weights[0]))
