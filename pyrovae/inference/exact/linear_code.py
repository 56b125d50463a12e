"""Exact inference in belief nets: the sum over all codes of the first hidden layer as a matrix product.

The posterior of the layer next to the data is p(h_1 | x) ∝ exp(drive(x) · h_1 + table[h_1]) with drive = x W_0ᵀ and
table[h_1] = log p(h_1) − A_0(h_1); see :mod:`pyrovae.ops.linear_code`. log p(h_1) of all its codes comes from the layers above
in the same way, their codes being the rows, from the top down: independent units, or an RBM whose hidden side is summed out.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrovae.handlers import declared
from pyrovae.handlers.structure import copied, frozen_leaves
from pyrovae.inference.exact.expectations import sites_read, weighted_average
from pyrovae.inference.posterior import Posterior, Program, States
from pyrovae.ops.code_regression import fit_code_regression
from pyrovae.ops.linear_code import LinearCodes, linear_code_logsumexp, linear_code_max
from pyrovae.ops.partition import softplus_sums
from pyrovae.ops.states import codes_to_index, index_to_codes
from pyrovae.ops.structures import SigmoidLayers

if TYPE_CHECKING:
    from pyrovae.inference.exact.exact import ExactPosterior
    from pyrovae.inference.exact.routes import Task

_PER_SECOND = 2e10  # multiplications of float64 that two slow cores do
_MAX_SECONDS = 3600.0
_ENUMERABLE = 2**33  # joint states x rows that the generic enumeration takes


class LinearCodeRoute:
    """The route of `layers()`; see :class:`pyrovae.inference.exact.routes.Route`."""

    def fits(self, record: SigmoidLayers, task: Task) -> bool:
        """Whether the program's sites are the record's, and a table of all first-layer codes fits in memory.

        Raises:
            ValueError: for a table or a sum too large for the generic way too.
        """
        x, structure = task.args[0], task.structure
        if x.dim() != 2 or {site.name for site in structure.latents} != set(record.sites):
            return False
        sizes = [weight.shape[0] for weight in record.weights]
        size, seconds = 40.0 * 2.0 ** max(sizes), _work(record, len(x)) / _PER_SECOND
        if size <= task.max_bytes and seconds <= _MAX_SECONDS:
            return True
        layers = [len(x) * 2.0 ** sizes[0], *(2.0 ** (a + b) for a, b in itertools.pairwise(sizes))]
        if max(layers) <= _ENUMERABLE:
            return False
        raise ValueError(
            f"expected hidden layers whose codes {task.method} can list in max_bytes={task.max_bytes:,}, got {max(sizes)} bits "
            f"in a layer: to sum over 2^{max(sizes)} codes takes about {size:.2g} bytes and {seconds:.2g} seconds; use AIS "
            "for log p(x), Variational for a bound or Gibbs for draws instead"
        )

    def infer(self, record: SigmoidLayers, task: Task) -> LinearCodePosterior:
        """The exact posterior."""
        start = time.perf_counter()
        net, args = _detached(record), copied(task.args)
        x, found = args[0], list[LinearCodes]()

        def solve(drive: Tensor, table: Tensor) -> Tensor:
            found.append(LinearCodes(drive, table, max_bytes=task.max_bytes // 4))
            return found[-1].log_sum

        tables = _prior_tables(net, solve)
        drive, base = _drive(net, x)
        log_evidence = base + solve(drive, tables[0] - _normalisers(net, 0))
        return LinearCodePosterior(
            structure=task.structure,
            log_evidence=log_evidence.to(net.top_bias.dtype),
            bound="exact",
            diagnostics={
                "model_evaluations": self.model_evaluations(record, task),
                "joint_states": 2 ** sum(_sizes(net)),
                "groups": tuple(codes.num_groups for codes in reversed(found)),
            },
            seconds=time.perf_counter() - start,
            net=net,
            codes=tuple(reversed(found)),
            tables=tables,
            base=base,
            model=task.model,
            args=args,
            kwargs=copied(dict(task.kwargs)),
            leaves={name: leaf.detach().clone() for name, leaf in task.structure.leaves.items()},
            max_bytes=task.max_bytes,
        )

    def log_evidence(self, record: SigmoidLayers, task: Task) -> Tensor:
        """Log p(x) `[B]`, differentiable."""

        def solve(drive: Tensor, table: Tensor) -> Tensor:
            return linear_code_logsumexp(drive, table, max_bytes=task.max_bytes // 4)

        table = _prior_tables(record, solve)[0] - _normalisers(record, 0)
        x = task.args[0].to(record.weights[0].dtype)
        return (x @ record.biases[0] + solve(x @ record.weights[0].T, table)).to(record.top_bias.dtype)

    def model_evaluations(self, record: SigmoidLayers, task: Task) -> int:
        """Log probabilities that are computed: of every code, and of half codes for every row."""
        total, rows = 0, len(task.args[0])
        for units in _sizes(record):
            total += 2**units + rows * (2 ** (units // 2) + 2 ** (units - units // 2))
            rows = 2**units
        return total


def check_finite(record: SigmoidLayers) -> None:
    """Refuse a net with parameters that are not finite.

    Raises:
        ValueError: with the name of one.
    """
    for name, tensor in _named(record):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"expected finite parameters, got NaN or infinity in {name} of the net; start it anew")


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearCodePosterior(Posterior):
    """p(h_1, …, h_L | x) of a belief net, implicit: no table has rows x codes entries.

    Exact. Costs, with N rows and H bits in the first layer: evidence N 2^H multiplications, and 2^H exponentials for each group
    of rows that are far apart under large weights (`diagnostics["groups"]`, of each layer; mostly 1); marginals of that layer,
    an M-step's statistics and entropy as many again; a deeper layer's marginals as many for each of its units; draws N 2^H
    once and n 2^(H/2) a row; the mode N 2^H additions; E[f(h_1)] N 2^H values of f. A function of deeper layers goes through
    the generic enumeration (`Exact(declared=False)`), which refuses what does not fit.
    """

    net: SigmoidLayers = field(repr=False)
    codes: tuple[LinearCodes, ...] = field(repr=False)  # codes[l]: of h_{l+1}, given each row of x, or each code of h_l
    tables: tuple[Tensor, ...] = field(repr=False)  # tables[l]: log p(h_{l+1}) of each of its codes
    base: Tensor = field(repr=False)  # x · biases[0]
    model: Program = field(repr=False)
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    leaves: Mapping[str, Tensor] = field(repr=False)
    max_bytes: int = field(repr=False)

    @cached_property
    def marginals(self) -> States:
        """P(1) of every unit, `{site: [batch, units]}`."""
        found = {self.net.sites[0]: self.codes[0].mean}
        for level, site in enumerate(self.net.sites[1:], 1):
            table = self.codes[level].mean  # E[h_{l+1} | h_l], then given each code further down
            for code in reversed(self.codes[:level]):
                table = code.average(table)
            found[site] = table
        return {latent.name: self._out(found[latent.name].clamp(0, 1)) for latent in self.structure.latents}

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy of p(h_1, …, h_L | x) in nats, `[batch]`."""
        above: Tensor | None = None
        for code in reversed(self.codes):
            here = code.entropy()
            above = here if above is None else here + code.average(above[:, None])[:, 0]
        assert above is not None
        return self._out(above)

    @cached_property
    def mode(self) -> States:
        """The most probable joint state (MAP), `{site: [batch, units]}`."""
        best, numbers = self.tables[-1], list[Tensor]()
        for level in reversed(range(len(self.codes))):
            drive, base = self.codes[level].drive, self._bases[level]
            value, number = linear_code_max(drive, best - self._normaliser(level), max_bytes=self.max_bytes // 4)
            best = base + value
            numbers.insert(0, number)
        index, states = torch.arange(len(best), device=best.device), {}
        for level, number in enumerate(numbers):
            index = number[index]
            states[self.net.sites[level]] = self._values(level, index)
        return {latent.name: states[latent.name] for latent in self.structure.latents}

    def sample(self, n: int) -> States:
        """`n` independent draws `{site: [n, batch, units]}`, each layer given the one below."""
        if n <= 0:
            raise ValueError(f"expected n > 0 draws, got {n}")
        index = self.codes[0].sample(n)
        states = {self.net.sites[0]: self._values(0, index)}
        for level in range(1, len(self.codes)):
            index = self.codes[level].sample(1, index.reshape(-1)).reshape(index.shape)
            states[self.net.sites[level]] = self._values(level, index)
        return {latent.name: states[latent.name] for latent in self.structure.latents}

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log p(z | x) `[n, batch]` of states `{site: [n, batch, units]}`; −inf outside the support."""
        total: Tensor | float = 0.0
        below: Tensor | None = None
        possible: Tensor | bool = True
        for level, site in enumerate(self.net.sites):
            value = z.get(site)
            expected = (len(self.base), _sizes(self.net)[level])
            if value is None:
                raise ValueError(f"expected values of every latent site, got none of {site!r}")
            if value.shape[1:] != expected:
                raise ValueError(f"expected {site!r} of shape [n, {expected[0]}, {expected[1]}], got {tuple(value.shape)}")
            code, bits = self.codes[level], value.nan_to_num().round().clamp(0, 1).to(self.base)
            possible = possible & (bits == value).all(-1)
            drive = code.drive if below is None else code.drive[below]
            log_sum = code.log_sum if below is None else code.log_sum[below]
            below = codes_to_index(bits, 2)
            total = total + (drive * bits).sum(-1) + code.table[below] - log_sum
        assert isinstance(total, Tensor)
        return self._out(torch.where(torch.as_tensor(possible), total, -math.inf))

    def expectation(self, f: Callable[[States], Tensor]) -> tuple[Tensor, Tensor]:
        """E[f(z)] summed over all states, `[batch, …]`, and 0; see :meth:`Posterior.expectation`.

        Raises:
            ValueError: if that is too much work; average over `sample(n)` instead.
        """
        first = self.net.sites[0]
        start = torch.zeros(1, dtype=torch.long, device=self.base.device)
        states = {site: self._expand(self._values(level, start)) for level, site in enumerate(self.net.sites)}
        if sites_read(f, states) - {first}:
            return self._enumerated.expectation(f)
        total, rows = len(self.tables[0]), len(self.base)
        size = 8 * rows * (3 * _sizes(self.net)[0] + 4)
        if total * rows > _ENUMERABLE or size > self.max_bytes:
            raise ValueError(
                f"expected at most {_ENUMERABLE:,} joint states x rows and {self.max_bytes:,} bytes for an expectation, got "
                f"{total:,} states of {rows:,} rows: {size:,} bytes a state, {total * rows * 1e-7:.2g} seconds; average f "
                "over posterior.sample(n) instead"
            )
        return weighted_average(f, self._first_layer(max(1, self.max_bytes // size)))

    def expected_log_joint(self, model: Program) -> Tensor:
        """E[log p(x, z)] under `model`, `[batch]`, differentiable; what the posterior's own program costs."""
        other = self._like(model)
        if other is None:
            return self._enumerated.expected_log_joint(model)
        values = _top_table(other)  # E[log p(h_l, …, h_L) | h_l] of each code of h_l
        for level in reversed(range(len(self.codes))):
            code = self.codes[level]
            below = self.args[0] if level == 0 else self._bits(level - 1)
            drive, base = _drive(other, below, level)
            values = base + (drive * code.mean).sum(1) + code.average((values - _normalisers(other, level))[:, None])[:, 0]
        return self._out(values)

    def q_function(self, model: Program) -> Callable[[], Tensor]:
        """Σ_batch E[log p(x, z)] as a function of the model's parameters that no longer looks at the data."""
        if self._like(model) is None:
            return self._enumerated.q_function(model)

        def total() -> Tensor:
            other = self._like(model)
            assert other is not None
            value = self.statistics[-1].counts @ _top_table(other)
            for level, s in enumerate(self.statistics):
                value = value + (other.weights[level].double() * s.cross).sum() + other.biases[level].double() @ s.below
                value = value - s.counts @ _normalisers(other, level)
            return value.to(other.top_bias.dtype)

        return total

    def m_step(self, model: Program, leaves: Mapping[str, Tensor], *, penalty: float, max_steps: int) -> int | None:
        """Raise Q − λ/2 ‖θ‖² of a net of this shape, in place, without the data: a Newton step for every unit at once.

        Independent top units take their closed form (with a penalty, Newton steps), an RBM on top L-BFGS steps.

        Args:
            model: the net to learn.
            leaves: its parameters; all must be those of the declared layers.
            penalty: λ.
            max_steps: steps of a layer.

        Returns:
            Evaluations of Q; None, and nothing done, where the parameters are not simply those of the declared layers.
        """
        other = self._like(model)
        if other is None or {id(leaf) for leaf in leaves.values()} != {id(tensor) for _, tensor in _named(other)}:
            return None
        if not all(leaf.is_leaf and leaf.requires_grad for leaf in leaves.values()):
            return None
        calls = 0
        with torch.no_grad():
            for level, s in enumerate(self.statistics):
                weight, bias = other.weights[level], other.biases[level]
                fitted = fit_code_regression(weight, bias, s.cross, s.below, s.counts, penalty=penalty, max_steps=max_steps)
                weight.copy_(fitted[0])
                bias.copy_(fitted[1])
                calls += fitted[2]
            counts = self.statistics[-1].counts
            on = counts @ self._bits(len(self.codes) - 1)
            if other.top_weight is None and penalty == 0:
                edge = torch.finfo(other.top_bias.dtype).eps
                other.top_bias.copy_((on / counts.sum()).clamp(edge, 1 - edge).logit())
                return calls + 1
            if other.top_weight is None:
                none, total = other.top_bias.new_zeros(0, len(on)), counts.sum().reshape(1)
                fitted = fit_code_regression(none, other.top_bias, none, on, total, penalty=penalty, max_steps=max_steps)
                other.top_bias.copy_(fitted[1])
                return calls + fitted[2]
        from pyrovae.inference.em import maximise

        top = {name: tensor for name, tensor in _named(other) if name.startswith("top_")}
        return calls + maximise(lambda: counts @ _top_table(other), top, penalty, max_steps, len(self.base))

    @cached_property
    def statistics(self) -> tuple[LayerStatistics, ...]:
        """What an M-step needs to know, a layer at a time from the data upwards."""
        found, weights = list[LayerStatistics](), None
        for level, code in enumerate(self.codes):
            mean, counts = code.statistics(weights)
            below = self.args[0] if level == 0 else self._bits(level - 1)
            weighted = mean if weights is None else mean * weights[:, None]
            cross = sum(w.T @ b.to(w) for w, b in zip(weighted.split(8192), below.split(8192), strict=True))
            seen = below.sum(0, dtype=torch.float64) if weights is None else weights @ below.to(weights)
            assert isinstance(cross, Tensor)
            found.append(LayerStatistics(cross, seen, counts))
            weights = counts
        return tuple(found)

    # ---- parts ------------------------------------------------------------------------------------------------------

    @cached_property
    def _enumerated(self) -> ExactPosterior:
        """The posterior by the generic enumeration, at the parameters of this snapshot."""
        from pyrovae.inference.exact.exact import Exact, ExactPosterior

        with frozen_leaves(self.structure.leaves, self.leaves):
            found = Exact(max_bytes=self.max_bytes, declared=False).infer(self.model, *self.args, **self.kwargs)
        assert isinstance(found, ExactPosterior)
        return found

    def _like(self, model: Program) -> SigmoidLayers | None:
        """What a model declares, if it is a net of the same shape."""
        other = declared(model, "layers")
        same = isinstance(other, SigmoidLayers) and other.sites == self.net.sites and _sizes(other) == _sizes(self.net)
        return other if same else None

    @cached_property
    def _bases(self) -> tuple[Tensor, ...]:
        """The part of log p(h_l | h_{l+1}) that the layer above does not change: of rows, then of codes."""
        return (self.base, *(self._bits(level) @ bias.double() for level, bias in enumerate(self.net.biases[1:])))

    def _normaliser(self, level: int) -> Tensor:
        """A_l of each code of h_{l+1}."""
        return self.tables[level] - self.codes[level].table

    def _first_layer(self, size: int) -> Iterator[tuple[States, Tensor]]:
        """Codes of the first layer, `size` at a time, and their log posterior `[S, batch]`."""
        for index in torch.arange(len(self.tables[0]), device=self.base.device).split(size):
            values = self._expand(self._values(0, index))
            yield {self.net.sites[0]: values}, self._out(self.codes[0].log_prob(index))

    def _bits(self, level: int) -> Tensor:
        """All codes of h_{level+1}, `[2^H, H]`, in float64."""
        units = _sizes(self.net)[level]
        return index_to_codes(torch.arange(2**units, device=self.base.device), 2, units).double()

    def _values(self, level: int, index: Tensor) -> Tensor:
        """Values `[…, H]` of code numbers, in the dtype of the site."""
        latent = next(site for site in self.structure.latents if site.name == self.net.sites[level])
        return index_to_codes(index, 2, latent.components).to(latent.dtype)

    def _expand(self, values: Tensor) -> Tensor:
        return values[:, None].expand(-1, len(self.base), -1)

    def _out(self, values: Tensor) -> Tensor:
        return values.to(self.net.top_bias.dtype)


@dataclass(frozen=True)
class LayerStatistics:
    """All that Σ E[log p(h_l | h_{l+1})] depends on, in float64.

    Attributes:
        cross: Σ E[h_{l+1} h_lᵀ], `[units above, units below]`.
        below: Σ E[h_l], `[units below]`.
        counts: the expected number of rows with each code of h_{l+1}, `[2^units above]`.
    """

    cross: Tensor
    below: Tensor
    counts: Tensor


def _prior_tables(net: SigmoidLayers, solve: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Log p(h_l) of all codes of h_1, …, h_L, the deepest first computed."""
    tables = [_top_table(net)]
    for level in reversed(range(1, len(net.weights))):
        units = net.weights[level].shape[1]
        bits = index_to_codes(torch.arange(2**units, device=net.top_bias.device), 2, units)
        drive, base = _drive(net, bits, level)
        tables.insert(0, base + solve(drive, tables[0] - _normalisers(net, level)))
    return tuple(tables)


def _top_table(net: SigmoidLayers) -> Tensor:
    """Log p(h_L) of all its codes `[2^H]`, in float64."""
    units, bias = len(net.top_bias), net.top_bias.double()
    bits = index_to_codes(torch.arange(2**units, device=bias.device), 2, units)
    linear = torch.cat([part.to(bias) @ bias for part in bits.split(2**16)])
    if net.top_weight is None:
        return linear + logsigmoid(-bias).sum()
    assert net.top_hidden_bias is not None
    free = linear + softplus_sums(net.top_weight, net.top_hidden_bias).double()
    return free - free.logsumexp(0)


def _normalisers(net: SigmoidLayers, level: int) -> Tensor:
    """A(h) = Σ_i softplus of all codes of the layer above, `[2^H]`, in float64."""
    return softplus_sums(net.weights[level], net.biases[level]).double()


def _drive(net: SigmoidLayers, below: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
    """What rows of a layer say to the layer above, `[N, H]`, and by themselves, `[N]`, in float64."""
    weight, bias = net.weights[level].double(), net.biases[level].double()
    parts = [(part.to(weight) @ weight.T, part.to(weight) @ bias) for part in below.split(8192)]
    return torch.cat([drive for drive, _ in parts]), torch.cat([base for _, base in parts])


def _sizes(net: SigmoidLayers) -> list[int]:
    """Units of each hidden layer, from the data upwards."""
    return [weight.shape[0] for weight in net.weights]


def _work(net: SigmoidLayers, rows: int) -> float:
    """Multiplications of one evaluation of log p(x)."""
    total, below = 0.0, float(rows)
    for weight in net.weights:
        codes = 2.0 ** weight.shape[0]
        total, below = total + (below + 4 * weight.shape[1]) * codes, codes
    return total


def _named(net: SigmoidLayers) -> Iterator[tuple[str, Tensor]]:
    for item in fields(net):
        value = getattr(net, item.name)
        if isinstance(value, Tensor):
            yield item.name, value
        elif item.name != "sites" and value is not None:
            yield from ((f"{item.name}[{i}]", tensor) for i, tensor in enumerate(value))


def _detached(net: SigmoidLayers) -> SigmoidLayers:
    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().clone()

    return SigmoidLayers(
        net.sites,
        tuple(weight.detach().clone() for weight in net.weights),
        tuple(bias.detach().clone() for bias in net.biases),
        net.top_bias.detach().clone(),
        copy(net.top_weight),
        copy(net.top_hidden_bias),
    )
