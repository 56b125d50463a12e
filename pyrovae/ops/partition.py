"""Exact log partition function, moments and independent draws of an RBM, by enumeration of its smaller side.

p(v, h) ∝ exp(bᵀv + cᵀh + vᵀWh) over v ∈ {0, 1}^D, h ∈ {0, 1}^H. The larger side is summed in closed form: with D ≥ H,
p(h) ∝ exp(cᵀh + Σ_i softplus(b_i + (Wh)_i)), one number a code. These numbers come from :mod:`pyrovae.ops.split_half` tile by
tile, and none is stored for longer than its tile, but where the caller asks for them (:func:`softplus_sums`) or they are
few (a forward pass of up to 2^22 codes keeps them for the backward pass).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrovae.ops.inverse_cdf import draw_pairs
from pyrovae.ops.once import only_once
from pyrovae.ops.opaque import apply_whole, run_whole
from pyrovae.ops.split_half import Block, Gradient, SplitHalf

MAX_BITS = 30
MAX_SECONDS = 120  # of an enumeration with the default `max_bits`
_AIS = "an estimate with an interval, pyrovae.inference.AIS,"


def rbm_log_partition(
    weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor, *, max_bits: int = MAX_BITS, max_bytes: int = 2**28
) -> Tensor:
    """The log partition function of an RBM, log Σ_{v,h} exp(bᵀv + cᵀh + vᵀWh).

    Exact. In float64 to rounding; with float32 weights to a relative 1e-7 or so, that of the result's own rounding, for sums
    and logarithms are taken in float64.
    Differentiable once: the gradient is the exact moments (:func:`rbm_moments`), computed in the backward pass in thrice the
    time of the forward pass and with no more memory.

    Cost: 2^min(D,H) max(D,H) · 0.05 ns in float32 on two CPU cores (784 x 20: 0.05 s); memory of order `max_bytes` at most.

    Args:
        weight: W `[D, H]`, float32 or float64.
        visible_bias: b `[D]`.
        hidden_bias: c `[H]`.
        max_bits: the largest min(D, H) that is enumerated.
        max_bytes: bounds the tables that are kept for speed.

    Returns:
        0-d, in the type of the weights.

    Raises:
        ValueError: if shapes disagree, a value is not finite, or the smaller side has more than `max_bits` units.

    References:
        A fast learning algorithm for deep belief nets (Hinton, Osindero, Teh, 2006)
        https://doi.org/10.1162/neco.2006.18.7.1527
        On the quantitative analysis of deep belief networks (Salakhutdinov, Murray, 2008)
        https://doi.org/10.1145/1390156.1390266

    Example:
        >>> rbm_log_partition(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))  # log 2^5
        tensor(3.4657)
    """
    _check(weight, visible_bias, hidden_bias, max_bits, _AIS)
    return apply_whole(_RbmLogPartition, weight, visible_bias, hidden_bias, max_bytes)


def rbm_moments(
    weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor, *, max_bits: int = MAX_BITS, max_bytes: int = 2**28
) -> tuple[Tensor, Tensor, Tensor]:
    """The means of an RBM's statistics, which are the gradient of its log partition function. Exact, not differentiable.

    Args:
        weight: W `[D, H]`, float32 or float64.
        visible_bias: b `[D]`.
        hidden_bias: c `[H]`.
        max_bits: the largest min(D, H) that is enumerated.
        max_bytes: bounds the tables that are kept for speed.

    Returns:
        E[v hᵀ] `[D, H]`, E[v] `[D]` and E[h] `[H]`.

    Raises:
        ValueError: as :func:`rbm_log_partition`.

    Example:
        >>> rbm_moments(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1))
        (tensor([[0.2500]]), tensor([0.5000]), tensor([0.5000]))
    """
    _check(weight, visible_bias, hidden_bias, max_bits, _AIS)
    _check_finite(weights=weight, visible_bias=visible_bias, hidden_bias=hidden_bias)
    with torch.no_grad():
        side = _Side(weight, visible_bias, hidden_bias, max_bytes)
        return side.moments(*side.log_partition(keep=True))


def sample_rbm(
    weight: Tensor,
    visible_bias: Tensor,
    hidden_bias: Tensor,
    n: int,
    generator: torch.Generator | None = None,
    *,
    max_bits: int = MAX_BITS,
    max_bytes: int = 2**28,
) -> tuple[Tensor, Tensor]:
    """Independent draws from an RBM, exact: no chain, no burn-in.

    The smaller side's first half is drawn from its marginal, its second half given the first, both by the inverse of the
    cumulative distribution function; the other side's units are then independent.
    Cost: a pass of :func:`rbm_log_partition`, and at most a second one over the first halves that were drawn.

    Args:
        weight: W `[D, H]`, float32 or float64.
        visible_bias: b `[D]`.
        hidden_bias: c `[H]`.
        n: number of draws.
        generator: of random numbers, on the device of the weights; None for the global one.
        max_bits: the largest min(D, H) that is enumerated.
        max_bytes: bounds the tables that are kept for speed.

    Returns:
        v `[n, D]` and h `[n, H]`, zeros and ones in the type of the weights.

    Raises:
        ValueError: as :func:`rbm_log_partition`.
    """
    _check(weight, visible_bias, hidden_bias, max_bits, "chains of block Gibbs or pyrovae.inference.ParallelTempering")

    def draw(weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor) -> tuple[Tensor, Tensor]:
        _check_finite(weights=weight, visible_bias=visible_bias, hidden_bias=hidden_bias)
        return _Side(weight, visible_bias, hidden_bias, max_bytes).sample(n, generator)

    with torch.no_grad():
        v, h = run_whole(draw, weight, visible_bias, hidden_bias)
    return v, h


def softplus_sums(
    weight: Tensor, bias: Tensor, *, dtype: torch.dtype | None = None, max_bits: int = 28, max_bytes: int = 2**28
) -> Tensor:
    """A(h) = Σ_i softplus(bias_i + (h W)_i) for all codes h, in the order of :mod:`pyrovae.ops.states`: first bit slowest.

    What a layer of D sigmoid units, given h, normalises by. Exact as :func:`rbm_log_partition`, and of its cost.
    Differentiable once: for weights r(h) the backward pass gives Σ_h r(h) h σ(x(h))ᵀ, tile by tile.

    Args:
        weight: W `[H, D]`, float32 or float64.
        bias: `[D]`.
        dtype: of the result; None for that of the weights. float64 keeps what a large A would lose in float32.
        max_bits: the largest H.
        max_bytes: bounds the tables that are kept for speed, beside the result.

    Returns:
        `[2^H]`.

    Raises:
        ValueError: if shapes disagree, a value is not finite, or H is more than `max_bits`.

    Example:
        >>> softplus_sums(torch.tensor([[100.0]]), torch.tensor([0.0]))
        tensor([  0.6931, 100.0000])
    """
    _check_tensors(weight, {"bias": bias}, {"bias": 1})
    check_enumerable(weight.shape[0], weight.shape[1], weight.dtype, "Gibbs sampling or a variational guide", max_bits=max_bits)
    return apply_whole(_SoftplusSums, weight, bias, dtype or weight.dtype, max_bytes)


def is_enumerable(bits: int, units: int, dtype: torch.dtype, *, max_bits: int = MAX_BITS) -> bool:
    """Whether :func:`check_enumerable` lets an enumeration pass."""
    return bits <= max_bits and (max_bits > MAX_BITS or _seconds(bits, units, dtype) <= MAX_SECONDS)


def check_enumerable(bits: int, units: int, dtype: torch.dtype, instead: str, *, max_bits: int = MAX_BITS) -> None:
    """Refuse an enumeration of 2^bits codes that would not end in time, before it starts.

    Too many are more than `max_bits` bits, or what takes longer than about two minutes on two CPU cores (784 units: 30 bits in
    float64, not in float32). A `max_bits` above 30 insists: it lifts the limit of time.

    Args:
        bits: binary units that are enumerated.
        units: units summed out in closed form for every code.
        dtype: of the weights.
        instead: the method to use instead, named in the message.
        max_bits: the most bits allowed; more than 30 allow any time, too.

    Raises:
        ValueError: with the seconds it would take, on two CPU cores, and the bytes of a table of all codes.

    Example:
        >>> check_enumerable(45, 784, torch.float32, "AIS")
        Traceback (most recent call last):
        ValueError: expected at most 30 bits to enumerate, got 45: 2^45 codes with 784 units each would take about 2.0e+06 seconds, and a table of them 1.4e+14 bytes; use AIS instead, or raise max_bits
    """  # noqa: E501
    if not is_enumerable(bits, units, dtype, max_bits=max_bits):
        seconds, size = _seconds(bits, units, dtype), 2.0**bits * dtype.itemsize
        table = f"a table of them {size:.1e} bytes"
        cost = f"2^{bits} codes with {units} units each would take about {seconds:.1e} seconds, and {table}"
        if bits > max_bits:
            raise ValueError(
                f"expected at most {max_bits} bits to enumerate, got {bits}: {cost}; use {instead} instead, or raise max_bits"
            )
        raise ValueError(
            f"expected an enumeration of at most {MAX_SECONDS} seconds, got {bits} bits: {cost}; use {instead} instead, or "
            f"insist by max_bits={MAX_BITS + 1}"
        )


def _seconds(bits: int, units: int, dtype: torch.dtype) -> float:
    """What an enumeration takes on two CPU cores, about."""
    return 2.0**bits * (1e-8 + units * (1.5e-10 if dtype == torch.float64 else 6e-11))


class _Side:
    """An RBM seen from its smaller side, whose codes h are enumerated; x are the units summed out."""

    def __init__(self, weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor, max_bytes: int) -> None:
        self.swapped = weight.shape[0] < weight.shape[1]
        self.weight, bias, own = (weight, hidden_bias, visible_bias) if self.swapped else (weight.T, visible_bias, hidden_bias)
        self.bias, self.own = bias, own.double()
        self.engine = SplitHalf(self.weight, bias, max_bytes)
        self.max_bytes = max_bytes

    def log_partition(self, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Log Z in float64, and the unnormalised log p(h) `[rows, columns]` if they are to be kept and few."""
        engine = self.engine
        few = keep and 8 * 2**engine.bits <= self.max_bytes // 8
        table = self.own.new_empty(engine.shape) if few else None
        largest, total = self.own.new_full((), -torch.inf), self.own.new_zeros(())
        for rows, columns, first, second in engine.tiles():
            logits = self._logits(first, second)
            if table is not None:
                table[rows, columns] = logits
            higher = torch.maximum(largest, logits.max())
            total = total * (largest - higher).exp() + (logits - higher).to(engine.dtype).exp_().sum(dtype=torch.float64)
            largest = higher
        return largest + total.log(), table

    def moments(self, log_partition: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """E[v hᵀ], E[v] and E[h] of the RBM."""
        gradient = Gradient(self.engine)
        own = torch.zeros_like(self.own)
        split = self.engine.split
        for rows, columns, first, second in self.engine.tiles():
            p = ((self._logits(first, second) if table is None else table[rows, columns]) - log_partition).exp_()
            gradient.add(first, second, p)
            own[:split] += first.codes @ p.sum(1)
            own[split:] += second.codes @ p.sum(0)
        weight, bias = gradient.result()
        return (weight, own.to(bias), bias) if self.swapped else (weight.T, bias, own.to(bias))

    def sample(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draws v and h."""
        engine = self.engine
        marginal = self.own.new_full((engine.shape[0],), -torch.inf)  # log p of the first halves, unnormalised
        for rows, _, first, second in engine.tiles():
            marginal[rows] = torch.logaddexp(marginal[rows], self._logits(first, second).logsumexp(1))
        step = min(max(self.max_bytes // (32 * engine.shape[1]), 1), 2**9)
        numbers = draw_pairs(marginal, self._conditional, step, n, generator)
        codes = torch.cat([engine.codes(numbers[half], half) for half in (0, 1)]).T.to(self.weight)
        logits = torch.addmm(self.bias, codes, self.weight)
        other = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype) < torch.sigmoid(logits)
        return (codes, other.to(codes)) if self.swapped else (other.to(codes), codes)

    def _logits(self, first: Block, second: Block) -> Tensor:
        own = (self.own[: self.engine.split] @ first.codes)[:, None] + self.own[self.engine.split :] @ second.codes
        return own.add_(self.engine.sums(first, second))

    def _conditional(self, numbers: Tensor) -> Tensor:
        """Unnormalised log p(h) of all codes with the given first halves."""
        blocks = ((columns, second) for rows, columns, _, second in self.engine.tiles() if rows.start == 0)
        out = self.own.new_empty(len(numbers), self.engine.shape[1])
        first = self.engine.block(numbers, 0)
        for columns, second in blocks:
            out[:, columns] = self._logits(first, second)
        return out


class _RbmLogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor, max_bytes: int) -> Tensor:
        _check_finite(weights=weight, visible_bias=visible_bias, hidden_bias=hidden_bias)
        side = _Side(weight, visible_bias, hidden_bias, max_bytes)
        log_partition, table = side.log_partition(keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(weight, visible_bias, hidden_bias)
        ctx.kept = log_partition, table, max_bytes
        return log_partition.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_partition, table, max_bytes = ctx.kept
        weight, visible_bias, hidden_bias = ctx.saved_tensors
        with torch.no_grad():
            moments = _Side(weight, visible_bias, hidden_bias, max_bytes).moments(log_partition, table)
        return *only_once(tuple(grad * moment for moment in moments), weight, visible_bias, hidden_bias), None


class _SoftplusSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, dtype: torch.dtype, max_bytes: int) -> Tensor:
        ctx.save_for_backward(weight, bias)
        ctx.max_bytes = max_bytes
        _check_finite(weights=weight, bias=bias)
        engine = SplitHalf(weight, bias, max_bytes)
        out = torch.empty(engine.shape, dtype=dtype, device=weight.device)
        for rows, columns, first, second in engine.tiles():
            out[rows, columns] = engine.sums(first, second)
        return out.flatten()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias = ctx.saved_tensors
        with torch.no_grad():
            engine = SplitHalf(weight, bias, ctx.max_bytes)
            gradient = Gradient(engine)
            r = grad.reshape(engine.shape)
            for rows, columns, first, second in engine.tiles():
                gradient.add(first, second, r[rows, columns])
        return *only_once(gradient.result(), weight, bias, grad), None, None


def _check(weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor, max_bits: int, instead: str) -> None:
    _check_tensors(weight, {"visible_bias": visible_bias, "hidden_bias": hidden_bias}, {"visible_bias": 0, "hidden_bias": 1})
    check_enumerable(min(weight.shape), max(weight.shape), weight.dtype, instead, max_bits=max_bits)


def _check_tensors(weight: Tensor, biases: dict[str, Tensor], sides: dict[str, int]) -> None:
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected a matrix of weights in float32 or float64, got shape {tuple(weight.shape)} in {weight.dtype}; convert it"
        )
    for name, bias in biases.items():
        if bias.shape != (weight.shape[sides[name]],):
            raise ValueError(
                f"expected {name} of shape ({weight.shape[sides[name]]},) for weights of shape {tuple(weight.shape)}, got "
                f"{tuple(bias.shape)}; transpose the weights or exchange the biases"
            )


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"expected finite {name}, got {int((~tensor.isfinite()).sum())} values that are not; check the fit"
            )
