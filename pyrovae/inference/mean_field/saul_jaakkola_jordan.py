"""The mean-field bound of Saul, Jaakkola and Jordan: for sigmoid belief nets of any depth and width, nothing enumerated.

With q(h) = Π Bern(μ_j), E_q[log p(x, h)] asks for E_q[softplus(z)] of every unit that has parents, which has no closed form.
It is bounded from above, with one number ξ for each such unit and row (:mod:`pyrovae.inference.mean_field.softplus_bound`),
and the bound of log p(x) is raised in μ and in ξ by turns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from pyrovae.handlers.structure import common_scale, finite_latents, read_structure
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mean_field.bits import BitsPosterior, bit_entropy
from pyrovae.inference.mean_field.layered_net import LayeredNet, layered_net
from pyrovae.inference.mean_field.softplus_bound import SoftplusBound, bound_of_softplus
from pyrovae.inference.posterior import Program

_ENTRIES = 2**17  # rows x units of one step: they stay in the processor's cache
_INSTEAD = "AIS().infer(model, x)"


class SaulJaakkolaJordan:
    """The best factorised q(h) under a lower bound of log p(x) that costs no enumeration, of several starts, per datum.

    `log_evidence` is Σ E_q[linear terms] − Σ_units (ξ E_q[z] + log E_q[e^{−ξz} + e^{(1−ξ)z}]) + H(q): a lower bound of the
    ELBO of q, hence of log p(x), with nothing sampled. Each μ_j is moved to the optimum of a minorant (the logarithms are
    convex in it), each ξ by Newton's method on a convex function in [0, 1]; the bound never decreases
    (`diagnostics["bounds"]`). ξ = 0 would be Jensen's inequality, which is looser; softplus(E_q[z]) in place of E_q[softplus]
    would lie on the wrong side.

    For models that declare layers of sigmoid units, of any depth and width: :class:`pyrovae.models.SigmoidBeliefNet`, and
    :class:`pyrovae.models.DeepBeliefNet` where log Z of its top can be summed. `expected_log_joint`, which EM raises, is the
    same bound of E_q[log p(x, h)], so that `EM(e_step=SaulJaakkolaJordan())` is the learning of the paper.

    Cost of a sweep: about 20 operations for each weight and row; memory a few numbers for each unit and row.

    Args:
        num_restarts: random starts; the best bound is kept for every datum.
        max_iterations: sweeps over μ and ξ of one start.
        tolerance: a start ends when no datum's bound rises by more than this, in nats.
        num_draws: draws of q by which `expectation` answers where q has too many states to be summed.

    Example:
        >>> from pyrovae.inference import Exact
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net(6, [3, 2])
        >>> x = net.sample(4)
        >>> bool((SaulJaakkolaJordan().infer(net, x).log_evidence < Exact().infer(net, x).log_evidence).all())
        True

    References:
        Mean Field Theory for Sigmoid Belief Networks (Saul, Jaakkola, Jordan, 1996)
        https://arxiv.org/abs/cs/9603102
    """

    def __init__(
        self, num_restarts: int = 4, max_iterations: int = 200, *, tolerance: float = 1e-6, num_draws: int = 1000
    ) -> None:
        if num_restarts < 1 or max_iterations < 1 or tolerance < 0 or num_draws < 2:
            raise ValueError(
                "expected num_restarts >= 1, max_iterations >= 1, tolerance >= 0 and num_draws >= 2, got "
                f"{num_restarts}, {max_iterations}, {tolerance} and {num_draws}"
            )
        self.num_restarts, self.max_iterations = num_restarts, max_iterations
        self.tolerance, self.num_draws = tolerance, num_draws

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> SaulJaakkolaJordanPosterior:
        """Fit q and ξ.

        Args:
            model: a module that declares `layers()`.
            *args: its arguments, the data first.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: for a program that declares no layers, data that it refuses, weights above 600 in absolute value, and
                a top RBM whose log Z cannot be summed.
        """
        begin = time.perf_counter()
        with torch.no_grad():
            structure = read_structure(model, args, kwargs)
            finite_latents(structure, "SaulJaakkolaJordan", "Variational")
            live = layered_net(model, args, kwargs, structure)
            if live is None:
                raise ValueError(
                    "expected a model that declares layers of sigmoid units by layers(), called with its data, for "
                    "SaulJaakkolaJordan, got a program without; use MeanField, or Variational(LocalMeanField(model, num_data), "
                    "num_guide_steps=...)"
                )
            common_scale(structure, "SaulJaakkolaJordan")
            net = live.double()
            _check_weights(net)
            constant = net.log_normalizer(_INSTEAD)
            size = max(1, _ENTRIES // max(weight.shape[1] for weight in net.layers.weights))
            parts = [self._rows(net.rows(slice(i, i + size)), constant) for i in range(0, len(net.x), size)]
        like = live.x
        logits = [torch.cat(layer).to(like) for layer in zip(*(part.logits for part in parts), strict=True)]
        tilts = tuple(torch.cat(layer) for layer in zip(*(part.tilts for part in parts), strict=True))
        return SaulJaakkolaJordanPosterior(
            structure=structure,
            log_evidence=torch.cat([part.bound for part in parts]).to(like),
            bound="lower",
            diagnostics={
                "model_evaluations": sum(part.sweeps * len(part.bound) for part in parts),
                "bounds": tuple(history for part in parts for history in part.histories),
                "converged": torch.cat([part.converged for part in parts]),
                "iterations": max(part.longest for part in parts),
            },
            seconds=time.perf_counter() - begin,
            logits=dict(zip(net.layers.sites, logits, strict=True)),
            log_joint=LogJoint(model, args, kwargs, structure=structure),
            num_draws=self.num_draws,
            tilts=tilts,
        )

    def _rows(self, net: LayeredNet, constant: Tensor) -> _Found:
        """The best of all starts for some rows."""
        best: _Found | None = None
        for _ in range(self.num_restarts):
            ascent = _Ascent(net, constant)
            history = [ascent.bound()]
            for _ in range(self.max_iterations):
                ascent.sweep()
                history.append(ascent.bound())
                if float((history[-1] - history[-2]).max()) <= self.tolerance:
                    break
            converged = history[-1] - history[-2] <= self.tolerance
            found = _Found(
                ascent.logits,
                [bound.tilt for bound in ascent.bounds],
                history[-1],
                converged,
                [tuple(float(value.mean()) for value in history)],
                len(history) - 1,
                len(history) - 1,
            )
            best = found if best is None else best.better_of(found)
        assert best is not None
        return best


@dataclass(frozen=True, eq=False, kw_only=True)
class SaulJaakkolaJordanPosterior(BitsPosterior):
    """q(h) = Π Bern(μ_j), with the ξ of every unit that has parents.

    Attributes:
        tilts: ξ of the units of layers 0 … L − 1, `[batch, units]` each.
    """

    is_elbo: ClassVar[bool] = False  # it also bounds what the units that a code drives expect

    tilts: tuple[Tensor, ...] = field(repr=False)

    def expected_log_joint(self, model: Program) -> Tensor:
        """A lower bound of E_q[log p(x, h)] under `model`, `[batch]`, differentiable in its parameters; ξ is kept.

        At the parameters that q was fitted to, adding the entropy of q gives `log_evidence`. A model that declares no layers
        gets E_q[log p(x, h)] itself, by :meth:`expectation`.
        """
        net = layered_net(model, self.log_joint.args, self.log_joint.kwargs, self.structure)
        if net is None:
            return self.expectation(lambda z: self.log_joint(z, model))[0]
        logits = [self.logits[site].to(net.x) for site in net.layers.sites]
        means = [value.sigmoid() for value in logits]
        total = net.linear_terms(means) - net.log_normalizer(_INSTEAD)
        for layer, (value, tilt) in enumerate(zip(logits, self.tilts, strict=True)):
            size = max(1, 2**22 // net.layers.weights[layer].numel())
            parts = [
                checkpoint(bound_of_softplus, v, t, net.layers.weights[layer], net.bias(layer), use_reentrant=False)
                for v, t in zip(value.split(size), tilt.to(net.x).split(size), strict=True)
            ]
            total = total - torch.cat(parts)
        if net.layers.top_weight is not None and net.layers.top_hidden_bias is not None:
            total = total - logsigmoid(-net.layers.top_hidden_bias - means[-1] @ net.layers.top_weight).sum(-1)
        return total


@dataclass(frozen=True)
class _Found:
    """The best of some starts for some rows."""

    logits: list[Tensor]
    tilts: list[Tensor]
    bound: Tensor
    converged: Tensor
    histories: list[tuple[float, ...]]
    sweeps: int
    longest: int

    def better_of(self, other: _Found) -> _Found:
        better = other.bound > self.bound
        wide = better.unsqueeze(-1)
        return _Found(
            [torch.where(wide, new, old) for new, old in zip(other.logits, self.logits, strict=True)],
            [torch.where(wide, new, old) for new, old in zip(other.tilts, self.tilts, strict=True)],
            torch.maximum(other.bound, self.bound),
            torch.where(better, other.converged, self.converged),
            self.histories + other.histories,
            self.sweeps + other.sweeps,
            max(self.longest, other.longest),
        )


class _Ascent:
    """Coordinate ascent on μ and ξ for some rows, from a random q."""

    def __init__(self, net: LayeredNet, constant: Tensor) -> None:
        self.net, self.constant = net, constant
        self.logits = [torch.randn(len(net.x), units, dtype=net.x.dtype, device=net.x.device) for units in net.sizes]
        self.bounds = [SoftplusBound(weight, net.bias(layer)) for layer, weight in enumerate(net.layers.weights)]
        for bound, logits in zip(self.bounds, self.logits, strict=True):
            bound.start(logits)

    def bound(self) -> Tensor:
        """The bound of log p(x), `[N]`."""
        means = [logits.sigmoid() for logits in self.logits]
        total = self.net.linear_terms(means) - self.constant
        for bound, logits in zip(self.bounds, self.logits, strict=True):
            total = total - bound.value() + bit_entropy(logits).sum(-1)
        if self.net.layers.top_weight is not None:
            total = total - logsigmoid(-self._top(means[-1])).sum(-1)
        return total

    def sweep(self) -> None:
        """Raise the bound in every μ in turn, layer by layer from the data upwards, then in ξ."""
        for layer in range(self.net.depth):
            self._update(layer)
        for bound, logits in zip(self.bounds, self.logits, strict=True):
            bound.tighten(logits)

    def _update(self, layer: int) -> None:
        """Every μ_j of a layer to σ(its bilinear terms − the slope of the bound of its children's softplus)."""
        net, weight = self.net, self.net.layers.weights[layer]
        below = net.x if layer == 0 else self.logits[layer - 1].sigmoid()
        linear = below @ weight.T + net.bias(layer + 1)
        if layer + 1 < net.depth:
            linear = linear + self.logits[layer + 1].sigmoid() @ net.layers.weights[layer + 1]
        means = self.logits[layer].sigmoid()
        # A softplus of the top RBM counts with the other sign: Jensen's inequality holds, and its tangent minorises again.
        top = self._top(means) if layer + 1 == net.depth and net.layers.top_weight is not None else None
        for j in range(weight.shape[0]):
            old = means[:, j].clone()
            logit = linear[:, j] - self.bounds[layer].slope(j, self.logits[layer][:, j])
            if top is not None and net.layers.top_weight is not None:
                logit = logit + top.sigmoid() @ net.layers.top_weight[j]
            # What is maximised is concave in μ_j: the largest logit is the best one within bounds.
            logit = logit.clamp(-SoftplusBound.LARGEST_LOGIT, SoftplusBound.LARGEST_LOGIT)
            means[:, j] = logit.sigmoid()
            self.logits[layer][:, j] = logit
            self.bounds[layer].move(j, logit)
            if top is not None and net.layers.top_weight is not None:
                top = top + (means[:, j] - old).unsqueeze(-1) * net.layers.top_weight[j]

    def _top(self, means: Tensor) -> Tensor:
        """What the hidden side of the top RBM receives, `[N, T]`."""
        layers = self.net.layers
        assert layers.top_weight is not None
        assert layers.top_hidden_bias is not None
        return layers.top_hidden_bias + means @ layers.top_weight


def _check_weights(net: LayeredNet) -> None:
    largest = max(float(weight.abs().max()) for weight in net.layers.weights)
    if largest > 600:
        raise ValueError(f"expected weights of at most 600, got {largest:.3g}, whose exponential overflows; rescale the model")
