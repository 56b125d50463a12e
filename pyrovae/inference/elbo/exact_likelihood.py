"""The objective −log p(x), by enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyrovae.handlers.energy import check_normalized, warn_of_energies
from pyrovae.handlers.own_params import announce
from pyrovae.handlers.structure import Structure, read_structure
from pyrovae.inference.exact.enumeration import Enumeration
from pyrovae.inference.exact.routes import FoundRoute, find_route
from pyrovae.inference.fit import root_module
from pyrovae.inference.log_joint import log_likelihood
from pyrovae.ops.tracing import capturing, unrecorded

Program = Callable[..., Any]


class ExactLikelihood(pyro.infer.ELBO):
    """−Σ_n log p(x_n), summed over every joint state of the latents; there is no guide.

    Exact and differentiable: `Variational(None, ExactLikelihood())` is exact gradient learning. The backward pass recomputes
    chunks, so that the gradient takes no more memory than `max_bytes`. Plate factors full_size/size and a `poutine.scale`
    common to all sites multiply the sum. Costs joint states x rows values of log p(x, z), as
    :class:`pyrovae.inference.Exact` does, or less where the model declares a structure, and refuses what that refuses. A
    program without latents, such as a fully visible Boltzmann machine, is learned by its own log probability.

    Args:
        max_bytes: the memory that an evaluation may take.
        declared: take the route of a declared structure; False enumerates the program, whatever it declares.

    Example:
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net()
        >>> loss = ExactLikelihood().differentiable_loss(net, None, net.sample(8))
        >>> loss.backward()
    """

    unbiased = True
    objective = "log_evidence"

    def __init__(self, *, max_bytes: int = 2**30, declared: bool = True) -> None:
        super().__init__()
        self.max_bytes, self.declared = max_bytes, declared
        self._warned = False
        self._checked: type | None = None  # the class whose declaration was compared with its program

    def differentiable_loss(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> Tensor:
        """−log p(x), 0-d; `guide` is ignored."""
        found = self._declared_route(model, args, kwargs)
        if found is not None:
            announce(found.task.structure.leaves)
            return -found.log_evidence().sum() * _rows_for_each(found.task.structure)
        with torch.no_grad(), unrecorded():
            structure = read_structure(model, args, kwargs)
        if capturing():
            _check_capturable(structure)
        check_normalized(structure, "ExactLikelihood")
        if torch.is_grad_enabled() and not self._warned and not capturing():
            warn_of_energies(model, args, kwargs, structure)
            self._warned = True
        if not structure.latents:
            announce(structure.leaves)
            return -log_likelihood(model, args, kwargs, structure).sum() * _rows_for_each(structure)
        with torch.no_grad(), unrecorded():
            method, size = "ExactLikelihood", self.max_bytes
            space = Enumeration(model, args, kwargs, max_bytes=size, method=method, structure=structure)
        announce(space.structure.leaves)
        if space.structure.random_plates:
            torch.rand(())  # moves the caller's random state on: the next call sees other rows
        return -(space.log_evidence() * _to_batch(space.scale, space.structure)).sum() * _rows_for_each(space.structure)

    def loss(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> Tensor:
        """−log p(x), 0-d, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> Tensor:
        """−log p(x), 0-d, its gradient added to `.grad` of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def model_evaluations(self, model: Program, *args: Any, **kwargs: Any) -> int:
        """Values of log p(x, z) that one evaluation computes."""
        with torch.no_grad():
            found = self._declared_route(model, args, kwargs)
            if found is not None:
                return found.model_evaluations()
            structure = read_structure(model, args, kwargs)
            if not structure.latents:
                return structure.batch_shape.numel()
            method, size = "ExactLikelihood", self.max_bytes
            space = Enumeration(model, args, kwargs, max_bytes=size, method=method, structure=structure)
        return space.num_evaluations

    def _declared_route(self, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FoundRoute | None:
        if not self.declared:
            return None
        seen = type(root_module(model))
        found = find_route(
            model, args, kwargs, max_bytes=self.max_bytes, method="ExactLikelihood", check=seen is not self._checked
        )
        if found is not None:
            self._checked = seen
        return found

    def _get_trace(self, model: Program, guide: Program | None, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("ExactLikelihood sums over states and draws no traces")


def _check_capturable(structure: Structure) -> None:
    """Refuse what would be the same at every replay and should not be."""
    for name in structure.random_plates:
        raise RuntimeError(f"the plate {name!r} draws its rows, which an enumeration fixes for a run; pass them as an argument")
    if any(isinstance(scale, Tensor) for scale in structure.scales.values()):
        raise RuntimeError("poutine.scale has a tensor, which an enumeration compares between sites; scale by a number")


def _rows_for_each(structure: Structure) -> float:
    """How many rows of the whole data set each row seen stands for."""
    return math.prod(plate.full_size / plate.size for plate in structure.batch)


def _to_batch(scale: Any, structure: Structure) -> Any:
    """A scale over plates brought to the batch."""
    if not isinstance(scale, Tensor) or not scale.dim():
        return scale
    wide = scale.reshape((1,) * (structure.plate_depth - scale.dim()) + scale.shape)
    inside = {plate.dim for plate in structure.batch}
    if any(wide.shape[d] > 1 and d not in inside for d in range(-structure.plate_depth, 0)):
        raise ValueError(
            f"expected a poutine.scale that varies between data only, got one of shape {tuple(scale.shape)} inside a datum; "
            "scale the plate of the data"
        )
    return structure.to_batch(wide)
