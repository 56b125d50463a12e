"""Mean field of declared layers: exact coordinate ascent on a table of 2^units for each layer, none for each row.

With q(h) = Π Bern(h_j), E_q[log p(x, h)] is bilinear in the means of neighbouring layers but for the normalisers of each
layer's children, A(h) = Σ_i softplus(z_i(h)), which no datum enters. They are tabulated once for all codes of a layer, as a
matrix over its two halves: E_q[A] = q_Aᵀ A q_B, a matrix product for all rows. The ascent runs in the dtype of the model; the
bound that it ends at is computed anew in float64, and only then rounded to that dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrovae.handlers.structure import Structure
from pyrovae.inference.exact.linear_code import LayerStatistics
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mean_field.bits import BitsPosterior, bit_entropy
from pyrovae.inference.mean_field.layered_net import LayeredNet, layered_net
from pyrovae.inference.posterior import Program
from pyrovae.ops import softplus_sums

_ROWS = 2**22  # entries of a half table x rows
_INSTEAD = "SaulJaakkolaJordan()"


@dataclass(frozen=True, eq=False, kw_only=True)
class LayeredMeanFieldPosterior(BitsPosterior):
    """q(h) = Π q(h_j) of declared layers; every answer but a very large expectation is exact for q."""

    def expected_log_joint(self, model: Program) -> Tensor:
        """E_q[log p(x, h)] under `model`, `[batch]`, differentiable; by tables where it declares layers."""
        net = layered_net(model, self.log_joint.args, self.log_joint.kwargs, self.structure)
        if net is None:
            return self.expectation(lambda z: self.log_joint(z, model))[0]
        logits = self._by_layer(net)
        total = net.linear_terms([value.sigmoid() for value in logits]) - net.log_normalizer(_INSTEAD)
        for value, table in zip(logits, tables(net), strict=True):
            q_a, q_b = halves(value)
            total = total + ((q_a @ table) * q_b).sum(-1)
        return total

    def q_function(self, model: Program) -> Callable[[], Tensor]:
        """Σ_batch E_q[log p(x, h)], the data gathered once: a call costs 2^units of each layer, whatever the rows."""
        if layered_net(model, self.log_joint.args, self.log_joint.kwargs, self.structure) is None:
            return super().q_function(model)

        def total() -> Tensor:
            net = layered_net(model, self.log_joint.args, self.log_joint.kwargs, self.structure)
            assert net is not None
            like = net.x
            value = -len(like) * net.log_normalizer(_INSTEAD) + net.layers.top_bias @ self._top.to(like)
            for layer, (s, table) in enumerate(zip(self.statistics, tables(net), strict=True)):
                value = value + (net.layers.weights[layer] * s.cross.to(like)).sum() + net.bias(layer) @ s.below.to(like)
                value = value + s.counts.to(like) @ table.flatten()
            return value

        return total

    @cached_property
    def statistics(self) -> tuple[LayerStatistics, ...]:
        """What an M-step needs to know, a layer at a time from the data upwards."""
        below, found = self.log_joint.args[0].double(), []
        for site in self._sites:
            logits = self.logits[site].double()
            q_a, q_b = halves(logits)
            found.append(LayerStatistics(logits.sigmoid().T @ below, below.sum(0), (q_a.T @ q_b).flatten()))
            below = logits.sigmoid()
        return tuple(found)

    @property
    def _top(self) -> Tensor:
        return self.logits[self._sites[-1]].sigmoid().sum(0)

    @property
    def _sites(self) -> tuple[str, ...]:
        return tuple(self.logits)  # from the data upwards

    def _by_layer(self, net: LayeredNet) -> list[Tensor]:
        return [self.logits[site].to(net.x) for site in net.layers.sites]


def fits(net: LayeredNet, max_bytes: int) -> bool:
    """Whether the tables of all layers fit, with the temporaries that they take."""
    return 4 * 8 * sum(2.0**units for units in net.sizes) <= max_bytes


def infer_layers(
    structure: Structure,
    net: LayeredNet,
    log_joint: LogJoint,
    *,
    num_restarts: int,
    max_iterations: int,
    tolerance: float,
) -> LayeredMeanFieldPosterior:
    """The best of several starts for every row; the arguments are those of :class:`pyrovae.inference.MeanField`."""
    begin = time.perf_counter()
    ascent = _Ascent(net)
    best: list[Tensor] | None = None
    evidence = torch.zeros(())
    histories = []
    size = max(1, _ROWS // max(2 ** ((units + 1) // 2) for units in net.sizes))
    for _ in range(num_restarts):
        start = _random_logits(structure, net)
        parts, bounds = [], []
        for first in range(0, len(net.x), size):
            rows = slice(first, first + size)
            found, history = ascent.climb(rows, [logits[rows] for logits in start], max_iterations, tolerance)
            parts.append(found)
            bounds.append(history)
        histories.append(_mean_history(bounds))
        logits = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        reached = torch.cat([history[-1] for history in bounds])
        if best is None:
            best, evidence = logits, reached
        else:
            better = reached > evidence
            best = [torch.where(better.unsqueeze(-1), new, old) for new, old in zip(logits, best, strict=True)]
            evidence = torch.maximum(evidence, reached)
    assert best is not None
    if evidence.dtype != torch.float64:
        del ascent
        evidence = _bound_in_float64(net, best, size).to(evidence)
    return LayeredMeanFieldPosterior(
        structure=structure,
        log_evidence=evidence,
        bound="lower",
        diagnostics={
            "model_evaluations": sum(2**units for units in net.sizes),
            "bounds": tuple(histories),
            "route": "layers",
        },
        seconds=time.perf_counter() - begin,
        logits=dict(zip(net.layers.sites, best, strict=True)),
        log_joint=log_joint,
    )


def _bound_in_float64(net: LayeredNet, logits: list[Tensor], size: int) -> Tensor:
    """The bound of a q, `[N]`: at large weights the terms that cancel are far larger than what is left of them."""
    net = net.double()
    ascent, rows = _Ascent(net), [slice(first, first + size) for first in range(0, len(net.x), size)]
    return torch.cat([ascent.bound(net.rows(part), [value[part].double() for value in logits]) for part in rows])


class _Ascent:
    """Coordinate ascent over the bits of all layers, rows at once."""

    def __init__(self, net: LayeredNet) -> None:
        self.net, self.tables = net, tables(net)
        self.constant = net.log_normalizer(_INSTEAD)

    def climb(
        self, rows: slice, logits: list[Tensor], max_iterations: int, tolerance: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sweep until no row rises; the logits `[N, H_l]` and the bounds `[N]` after each sweep."""
        net = self.net.rows(rows)
        history = [self.bound(net, logits)]
        for _ in range(max_iterations):
            for layer in range(net.depth):
                logits[layer] = self._update(net, layer, logits)
            history.append(self.bound(net, logits))
            if float((history[-1] - history[-2]).max()) <= tolerance:
                break
        return logits, history

    def bound(self, net: LayeredNet, logits: list[Tensor]) -> Tensor:
        """E_q[log p(x, h)] + H(q), `[N]`."""
        total = net.linear_terms([value.sigmoid() for value in logits]) - self.constant
        for value, table in zip(logits, self.tables, strict=True):
            q_a, q_b = halves(value)
            total = total + ((q_a @ table) * q_b).sum(-1) + bit_entropy(value).sum(-1)
        return total

    def _update(self, net: LayeredNet, layer: int, logits: list[Tensor]) -> Tensor:
        """New logits of a layer: first of the bits of its first half, given the other half, then of its second."""
        below = net.x if layer == 0 else logits[layer - 1].sigmoid()
        linear = below @ net.layers.weights[layer].T + net.bias(layer + 1)
        if layer + 1 < net.depth:
            linear = linear + logits[layer + 1].sigmoid() @ net.layers.weights[layer + 1]
        middle, table = logits[layer].shape[1] // 2, self.tables[layer]
        first, second = logits[layer][:, :middle], logits[layer][:, middle:]
        first = ascend(table @ _codes_weights(second).T, linear[:, :middle], first)
        second = ascend(table.T @ _codes_weights(first).T, linear[:, middle:], second)
        return torch.cat([first, second], -1)


def ascend(table: Tensor, linear: Tensor, logits: Tensor) -> Tensor:
    """Set every bit in turn to its optimum, logit_j = linear_j + E[table | h_j = 1] − E[table | h_j = 0].

    Args:
        table: a function of the code for every row, `[2^n, N]`.
        linear: `[N, n]`.
        logits: of q before, `[N, n]`.
    """
    bits, rows = logits.shape[1], len(logits)
    later = [table]  # [2^{j+1}, N]: averaged over the bits after j, as they were before
    for j in range(bits - 1, 0, -1):
        one = logits[:, j].sigmoid()
        pairs = later[0].reshape(-1, 2, rows)
        later.insert(0, torch.lerp(pairs[:, 0], pairs[:, 1], one))
    new = logits.clone()
    for j in range(bits):
        mean = later[j]
        for i in range(j):  # over the bits before j, as they are now
            pairs = mean.reshape(2, -1, rows)
            mean = torch.lerp(pairs[0], pairs[1], new[:, i].sigmoid())
        new[:, j] = linear[:, j] + mean[1] - mean[0]
    return new


def tables(net: LayeredNet) -> list[Tensor]:
    """For each layer, what its code adds to log p(x, h) beside bilinear terms, as a matrix over its halves `[2^a, 2^b]`."""
    found = []
    for layer, units in enumerate(net.sizes):
        table = -softplus_sums(net.layers.weights[layer], net.bias(layer))
        if layer + 1 == net.depth and net.layers.top_weight is not None and net.layers.top_hidden_bias is not None:
            table = table + softplus_sums(net.layers.top_weight, net.layers.top_hidden_bias)
        found.append(table.reshape(2 ** (units // 2), -1))
    return found


def halves(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights under q of all codes of the first and of the second half of a layer, `[N, 2^a]` and `[N, 2^b]`."""
    middle = logits.shape[1] // 2
    return _codes_weights(logits[:, :middle]), _codes_weights(logits[:, middle:])


def _codes_weights(logits: Tensor) -> Tensor:
    """Π_j Bern(h_j) of all codes, `[N, 2^n]`, the first bit slowest."""
    weights = logits.new_ones((len(logits), 1))
    for j in range(logits.shape[1]):
        pair = torch.stack((-logits[:, j], logits[:, j]), -1).sigmoid()  # [N, 2]
        weights = (weights.unsqueeze(-1) * pair.unsqueeze(1)).flatten(1)
    return weights


def _random_logits(structure: Structure, net: LayeredNet) -> list[Tensor]:
    """A random q, of the same law and by the same random numbers as the start of the generic route."""
    found = {}
    for latent in structure.latents:
        noise = [torch.randn((2, len(net.x)), dtype=net.x.dtype, device=net.x.device) for _ in range(latent.components)]
        found[latent.name] = torch.stack([pair[1] - pair[0] for pair in noise], -1)
    return [found[site] for site in net.layers.sites]


def _mean_history(bounds: list[list[Tensor]]) -> tuple[float, ...]:
    """Means over all rows after each sweep; rows that had ended keep their last bound."""
    longest = max(len(history) for history in bounds)
    full = [history + history[-1:] * (longest - len(history)) for history in bounds]
    return tuple(float(torch.cat(step).mean()) for step in zip(*full, strict=True))
