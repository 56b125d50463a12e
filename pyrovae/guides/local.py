"""Mean field with parameters of its own for every datum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pyrovae.guides.mean_field import MeanField, plate_sizes, small_normal, stored_rows
from pyrovae.guides.pilot import read_pilot
from pyrovae.handlers.structure import Latent


class LocalMeanField(MeanField):
    """q(z | n): independent sites and components, with one set of parameters for each of N data.

    No encoder: nothing is amortised, so that its best ELBO is the best that any mean-field guide reaches on these data, and
    what an :class:`AmortizedMeanField` falls short of it is the amortisation gap. It says nothing about other data.

    Sites inside the data plate (the plate around the observed sites, `num_data` long) have a table with a row for each
    datum; sites outside it have one set. A bit has a logit, a category K logits, a Normal component its mean and the
    logarithm of its scale; a relaxed site has those of its discrete twin, and the temperature that the model has in this
    call, with its gradient. Rows are taken by the indices of the model's own plate.

    Cost: one run of the model up to its last latent; memory `num_data` times the parameters of a datum, and as much again
    for its gradient.

    Args:
        model: a Pyro program; the guide keeps it, but does not own its parameters.
        num_data: the number N of data.
        example: positional arguments of one call, any batch; None runs the model without arguments.

    Raises:
        ValueError: for `num_data` below 1, a model that cannot run without arguments, a site with another support; at a
            call, if the data plate has another size than `num_data`.

    Example:
        >>> import torch
        >>> from pyrovae.models import SigmoidBeliefNet
        >>> net = SigmoidBeliefNet(4, 2)
        >>> guide = LocalMeanField(net, num_data=10)
        >>> x = net.sample(10)
        >>> tuple(guide(x)["h1"].shape)
        (10, 2)
        >>> rows = torch.tensor([1, 7, 3])
        >>> tuple(guide(x[rows], index=rows, num_data=10)["h1"].shape)
        (3, 2)

    References:
        Stochastic Variational Inference (Hoffman, Blei, Wang, Paisley, 2013)
        https://arxiv.org/abs/1206.7051
    """

    def __init__(self, model: Callable[..., Any], num_data: int, *, example: tuple[Any, ...] | None = None) -> None:
        if not isinstance(num_data, int) or isinstance(num_data, bool) or num_data < 1:
            raise ValueError(f"expected num_data >= 1, got {num_data!r}")
        super().__init__(model, read_pilot(model, example, "LocalMeanField", num_data))
        self.num_data = num_data
        self.table = nn.ParameterDict()
        anchor = self._pilot.anchor
        for latent in self._pilot.latents:
            sizes = plate_sizes(latent, frozenset())
            if anchor is not None and latent.name in self._pilot.local:
                self._add(self.table, latent, sizes | {anchor.dim: num_data})
            else:
                self._add(self.free, latent, sizes)

    def reset_parameters(self) -> None:
        """Draw all parameters anew from N(0, 0.1²)."""
        for parameter in self.parameters():
            small_normal(parameter)

    def _unconstrained(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        local = self._pilot.local
        return self._stored(self.table, lambda name: name in local) | self._stored(self.free, lambda name: name not in local)

    def _rows(self, latent: Latent, parameters: Tensor, frames: Mapping[int, Any], indices: Mapping[str, Tensor]) -> Tensor:
        anchor = self._pilot.anchor
        if anchor is not None and latent.name in self._pilot.local:
            frame = frames.get(anchor.dim)
            if frame is None or frame.full_size != self.num_data:
                saw = 1 if frame is None else int(frame.full_size)
                raise ValueError(
                    f"expected index=... because LocalMeanField(num_data={self.num_data}) saw {saw} rows; pass "
                    f"index=rows, num_data={self.num_data}, or give the plate {anchor.name!r} the size {self.num_data} and a "
                    "subsample"
                )
        return stored_rows(latent, parameters, frames, indices, frozenset())
