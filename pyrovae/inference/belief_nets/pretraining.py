"""Greedy learning of deep belief nets, one restricted Boltzmann machine on another."""

from __future__ import annotations

import itertools
import time
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import trange

from pyrovae.distributions import RBM
from pyrovae.handlers import Module, declared
from pyrovae.inference.belief_nets.stacked import Stack, ascend, rbm_of
from pyrovae.inference.fit import Fit, root_module, snapshot, versions
from pyrovae.inference.posterior import Program
from pyrovae.inference.undirected.energy import energy_of
from pyrovae.inference.undirected.settle import settle
from pyrovae.ops import SigmoidLayers


class Learner(Protocol):
    """What learns one RBM."""

    def fit(self, model: Any, x: Tensor) -> Fit:
        """Learn a program that draws `x` from an RBM, in place."""


class GreedyPretraining:
    """Learn a deep belief net layer by layer, each as the RBM over the one below, from the data upwards.

    RBM 1 learns the data. Its p(x | h_1) becomes the bottom layer of the net, its p(h_1 | x) the recognition model q(h_1 | x),
    and RBM 2 takes the place of its prior of h_1: it starts tied, W_2 = W_1ᵀ with the biases exchanged, where its visible
    marginal *is* that prior, and learns h_1 ~ q(h_1 | x). And so upwards. With Q the product of the q's,

        log p(x) ≥ E_Q[log p_top(h)] + Σ_l E_Q[log p(h_{l−1} | h_l)] + H(Q),

    where learning RBM l moves the first term alone: no step that raises it lowers the bound. log p(x) itself may fall.

    * `method=None`: ascent (L-BFGS) on the exact first term, E_Q taken over all data and all 2^H_l states, with a backtracking
      line search from the tied start. The bound never decreases, over all layers; a `RuntimeError` would say otherwise. All
      in float64, for layers h_1 … h_{L−1} of up to `max_bits` units and a bottom RBM whose smaller side has as many.
    * `method=ContrastiveDivergence(…)`, or another learner of RBMs: for any size, on one draw of h_l ~ q for each datum (the
      means of q are not used: they would not learn the bound). The bound is reported where it can be computed, and may fall.

    A layer with fewer units than the one two below it cannot start tied: it keeps the units with the largest weights, and
    the others' mean input goes into the biases; the bound may fall at this start, and only there. With more units, the
    additional ones have weights of 0 and biases from N(0, 1), which changes no p(h).

    Args:
        guide: gets the recognition weights: `AmortizedStructured(net)`, or another with linear `encoders` by site; None keeps
            none.
        method: how RBMs are learned, see above.
        num_iterations: steps of the exact ascent for each layer.
        max_bits: units of a layer whose states are enumerated, for the exact ascent and for the bound in the records.
        progress: show a progress bar.

    Raises:
        ValueError: for numbers out of range, or a method without `fit`.

    Example:
        >>> from pyrovae.models import DeepBeliefNet
        >>> net, x = DeepBeliefNet(4, [3, 4]), torch.eye(4).repeat(5, 1)
        >>> fit = GreedyPretraining(num_iterations=20).fit(net, x)
        >>> fit.history[-1]["bound"] > fit.history[0]["bound"] + 0.5
        True

    References:
        A Fast Learning Algorithm for Deep Belief Nets (Hinton, Osindero, Teh, 2006)
        https://doi.org/10.1162/neco.2006.18.7.1527
        Greedy Layer-Wise Training of Deep Networks (Bengio, Lamblin, Popovici, Larochelle, 2007)
        https://papers.nips.cc/paper/3048-greedy-layer-wise-training-of-deep-networks
    """

    def __init__(
        self,
        guide: Any = None,
        method: Learner | None = None,
        *,
        num_iterations: int = 100,
        max_bits: int = 16,
        progress: bool = False,
    ) -> None:
        for name, number in (("num_iterations", num_iterations), ("max_bits", max_bits)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"expected an integer {name} >= 1, got {number!r}")
        if max_bits > 20:
            raise ValueError(f"expected max_bits <= 20, got {max_bits}: 2^{max_bits} states for every layer; pass a method")
        if method is not None and (isinstance(method, type) or not callable(getattr(method, "fit", None))):
            raise ValueError(f"expected a method with fit, such as ContrastiveDivergence(), got {method!r}; pass an instance")
        self.guide, self.method = guide, method
        self.num_iterations, self.max_bits, self.progress = num_iterations, max_bits, progress

    def fit(self, model: Program, x: Tensor, *, validation: Tensor | None = None) -> Fit:
        """Learn the net, and the guide, in place; parameters are what the layers leave, whatever they were before.

        Args:
            model: a model whose `layers()` have an RBM on top, such as :class:`pyrovae.models.DeepBeliefNet`.
            x: data `[N, D]` in {0, 1}.
            validation: other data, whose bound is recorded at both ends of each layer.

        Returns:
            The account. Records have `layer` (from 1) and `start` (how it began: "random", "tied" or "truncated"); their
            `bound` is that of the net so far, with RBM `layer` on top, and `loss` is −N times it.

        Raises:
            ValueError: for another model, data, or guide; without a method, for layers too large to enumerate.
            RuntimeError: if the exact ascent from a tied start lowered the bound.
        """
        begin, seed = time.perf_counter(), torch.initial_seed()
        record = _top_layers(model)
        check_bits(x, record)
        if validation is not None:
            check_bits(validation, record)
        encoders = [] if self.guide is None else _encoders(self.guide, record)
        run = _Run(self, x, validation, begin)
        sizes = [bias.shape[0] for bias in (*record.biases, record.top_bias)] + [_top(record)[1].shape[0]]
        if self.method is None:
            _check_sizes(sizes, self.max_bits)
        for layer, (below, above) in enumerate(itertools.pairwise(sizes)):
            weight, b, c = (t.to(record.top_bias) for t in run.layer(layer, below, above))
            with torch.no_grad():
                if layer == len(sizes) - 2:
                    for target, value in zip((*_top(record), record.top_bias), (weight, c, b), strict=True):
                        target.copy_(value)
                    run.leave_chains(model, x)
                    break
                record.weights[layer].copy_(weight.T)
                record.biases[layer].copy_(b)
                if encoders:
                    encoders[layer].weight.copy_(weight.T)
                    encoders[layer].bias.copy_(c)
        programs = {"model": model} | ({} if self.guide is None else {"guide": self.guide})
        return Fit(
            history=tuple(run.history),
            bound="lower",
            states={name: snapshot(root_module(p).state_dict()) for name, p in programs.items()},  # type: ignore[union-attr]
            seconds=time.perf_counter() - begin,
            model_evaluations=run.evaluations,
            seed=seed,
            penalty=0.0,
            versions=versions(),
        )


class _Run:
    """The stack as far as it has been learned."""

    def __init__(self, method: GreedyPretraining, x: Tensor, validation: Tensor | None, begin: float) -> None:
        self.method, self.begin = method, begin
        self.exact = method.method is None
        self.dtype = torch.float64
        data = [x] if validation is None else [x, validation]
        self.stacks = [Stack(v.to(self.dtype), method.max_bits) for v in data]
        self.rows = x.to(self.dtype)  # what the next RBM learns where a method is given
        self.number = len(x)
        self.history: list[dict[str, Any]] = []
        self.evaluations, self.step = 0, 0

    def layer(self, layer: int, below: int, above: int) -> tuple[Tensor, Tensor, Tensor]:
        """Learn one RBM: W `[below, above]`, b and c."""
        previous = self.stacks[0].rbms[-1] if layer else None
        if previous is None:
            start, first = "random", _fresh(self.rows, above)
        else:
            for stack in self.stacks:
                stack.push()
            if not self.exact:
                p = (previous.c + self.rows @ previous.W).sigmoid()
                self.rows = (torch.rand_like(p) < p).to(self.dtype)
            start = "tied" if above >= previous.W.shape[0] else "truncated"
            first = tied(previous, above, self._mean(previous))
        rbm = self._place(first)
        self._record(layer, start)
        learned = self._ascend(rbm, layer, start) if self.exact else self._learn(rbm)
        rbm = self._place(learned)
        if not self.exact:
            self.step += 1
        if not self.exact or (len(self.stacks) > 1 and self.history[-1]["validation"] is None):
            self._record(layer, start, replace=self.exact)
        return rbm.W, rbm.b, rbm.c

    def leave_chains(self, model: Program, x: Tensor) -> None:
        """Start the chains that the net draws from at its top layer given the data, and sweep."""
        top = energy_of(model, x)
        if top.chains is not None:
            rows = self.rows
            if self.exact:
                for rbm in self.stacks[0].rbms[:-1]:
                    p = (rbm.c + rows @ rbm.W).sigmoid()
                    rows = (torch.rand_like(p) < p).to(rows)
            settle(top, rows)

    def _place(self, tensors: tuple[Tensor, ...]) -> RBM:
        rbm = rbm_of(*(t.detach().to(self.dtype) for t in tensors))
        for stack in self.stacks:
            stack.top(rbm)
        return rbm

    def _mean(self, previous: RBM) -> Tensor:
        """E_Q[h] of the layer that the next RBM learns."""
        level = self.stacks[0].levels[-1]
        return level.mean() if level.known else self.rows.mean(0)

    def _ascend(self, rbm: RBM, layer: int, start: str) -> tuple[Tensor, ...]:
        stack = self.stacks[0]
        objective, constant = stack.objective(), stack.constant()
        found: tuple[Tensor, ...] = (rbm.W, rbm.b, rbm.c)
        steps = ascend(objective, found)
        for _ in trange(self.method.num_iterations, desc=f"layer {layer + 1}", disable=not self.method.progress):
            raised = next(steps, None)
            if raised is None:
                break
            value, found = raised
            self.step += 1
            self.evaluations += self.number
            self._append(layer, start, constant + value, None)
        return found

    def _learn(self, rbm: RBM) -> tuple[Tensor, ...]:
        assert self.method.method is not None
        program = _RBMProgram(*(t.to(torch.get_default_dtype()) for t in (rbm.W, rbm.b, rbm.c)))
        fit = self.method.method.fit(program, self.rows.to(program.weight))
        self.evaluations += fit.model_evaluations
        return program.weight, program.visible_bias, program.hidden_bias

    def _record(self, layer: int, start: str, *, replace: bool = False) -> None:
        """The bound at the present top, and that of the validation data."""
        bounds = [stack.bound() for stack in self.stacks]
        if replace:
            self.history[-1]["validation"] = bounds[-1]
            return
        self._append(layer, start, bounds[0], bounds[1] if len(bounds) > 1 else None)

    def _append(self, layer: int, start: str, bound: float | None, validation: float | None) -> None:
        last = self.history[-1] if self.history else None
        first_of_layer = last is not None and last["layer"] != layer + 1
        if self.exact and last is not None and not (first_of_layer and start == "truncated"):
            assert bound is not None
            if not bound >= last["bound"] - 1e-9 * max(1.0, abs(last["bound"])):
                raise RuntimeError(
                    f"expected exact greedy learning never to lower the bound, got {last['bound']:.12g} then {bound:.12g} in "
                    f"layer {layer + 1}; are the data the same at every call?"
                )
        self.history.append(
            {
                "step": self.step,
                "layer": layer + 1,
                "start": start,
                "loss": None if bound is None else -self.number * bound,
                "bound": bound,
                "stderr": None if bound is None else 0.0,
                "validation": validation,
                "seconds": time.perf_counter() - self.begin,
            }
        )


class _RBMProgram(Module):
    """The layer being learned, as a program for any learner."""

    def __init__(self, weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor) -> None:
        super().__init__()
        self.weight, self.visible_bias = nn.Parameter(weight.clone()), nn.Parameter(visible_bias.clone())
        self.hidden_bias = nn.Parameter(hidden_bias.clone())

    def distribution(self) -> RBM:
        return RBM(self.weight, self.visible_bias, self.hidden_bias)

    def forward(self, x: Tensor, index: Tensor | None = None, num_data: int | None = None) -> None:
        with pyro.plate("data", len(x) if num_data is None else num_data, subsample=index):
            pyro.sample("x", self.distribution(), obs=x)


def tied(below: RBM, units: int, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The RBM over the hidden layer of another, with the weights of that one: p(h) is the same where `units` is large enough.

    Args:
        below: an RBM with D visible units.
        units: hidden units of the new one. Beyond D they have weights 0; below D, the D − units with the smallest weights are
            replaced by their linear expansion about `mean`.
        mean: E[h] of the data `[H]`.

    Returns:
        W `[H, units]`, b `[H]`, c `[units]`.
    """
    weight, b, c = below.W.T, below.c, below.b
    extra = units - weight.shape[1]
    if extra >= 0:
        return torch.cat((weight, weight.new_zeros(len(b), extra)), 1), b, torch.cat((c, torch.randn(extra).to(c)))
    order = weight.norm(dim=0).argsort(descending=True)
    kept, left = order[:units].sort().values, order[units:]
    slope = (c[left] + mean @ weight[:, left]).sigmoid()
    return weight[:, kept], b + weight[:, left] @ slope, c[kept]


def _fresh(x: Tensor, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    bias = ((x.sum(0) + 1) / (len(x) + 2)).logit()
    return 0.1 * torch.randn(x.shape[1], hidden).to(x), bias, x.new_zeros(hidden)


def _top(record: SigmoidLayers) -> tuple[Tensor, Tensor]:
    assert record.top_weight is not None
    assert record.top_hidden_bias is not None
    return record.top_weight, record.top_hidden_bias


def _top_layers(model: Program) -> SigmoidLayers:
    record = declared(model, "layers")
    if record is None or record.top_weight is None or not record.weights:
        raise ValueError(
            "expected a model that declares layers() under an RBM, such as DeepBeliefNet, got "
            f"{type(model).__name__}; learn others with WakeSleep or Variational"
        )
    return record  # type: ignore[no-any-return]


def _encoders(guide: Any, record: SigmoidLayers) -> list[nn.Linear]:
    nets = dict(getattr(guide, "encoders", {}).items())
    found = []
    for site, weight in zip(record.sites, record.weights, strict=True):
        net = nets.get(site)
        if not isinstance(net, nn.Linear) or net.weight.shape != weight.shape or net.bias is None:
            raise ValueError(
                f"expected a guide with a linear encoder of {site!r}, nn.Linear({weight.shape[1]}, {weight.shape[0]}), got "
                f"{net}; pass AmortizedStructured(model), or guide=None"
            )
        found.append(net)
    return found


def check_bits(x: Tensor, record: SigmoidLayers) -> None:
    """Refuse data that are no rows of bits of a net's width.

    Raises:
        ValueError: with what came.
    """
    width = record.biases[0].shape[0]
    if x.dim() != 2 or x.shape[1] != width or not len(x):
        raise ValueError(f"expected data [N, {width}] with at least one row, got {list(x.shape)}")
    if not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(
            f"expected x in {{0, 1}}, got values from {float(x.min()):g} to {float(x.max()):g}; scale to [0, 1] and binarize, "
            "see pyrovae.data.binarize"
        )


def _check_sizes(sizes: list[int], max_bits: int) -> None:
    bits = [min(sizes[0], sizes[1]), *sizes[1:-1]]
    if max(bits) > max_bits:
        units = max(sizes)
        seconds, size = 2.0 ** max(bits) * units * 2e-9, 2.0 ** max(bits) * 8 * max(sizes[1:-1])
        raise ValueError(
            f"expected at most {max_bits} units in a layer whose states are enumerated, got {max(bits)}: a step would take "
            f"about {seconds:.1e} seconds and {size:.1e} bytes; pass method=ContrastiveDivergence(...)"
        )
