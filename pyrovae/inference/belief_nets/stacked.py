"""The bound of a stack of RBMs, exact by enumeration of one layer at a time, and exact ascent on its top."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.distributions import RBM
from pyrovae.ops import index_to_codes, rbm_log_partition, softplus_sums

_CHUNK = 2**12
_PAIRS = 10  # that L-BFGS remembers
_EXACT = 700.0  # softplus(x) = x beyond, to float64
Tensors = tuple[Tensor, ...]


def rbm_of(weight: Tensor, b: Tensor, c: Tensor) -> RBM:
    """An RBM that is not checked again at every step."""
    return RBM(weight, b, c, validate_args=False)


@dataclass(frozen=True)
class Level:
    """The distribution of a layer's states under Q and the data: rows with weights, or the weights of all 2^H codes.

    Attributes:
        units: of the layer.
        rows: `[M, units]`, or None for all codes.
        weights: of the rows, or of the codes in the order of :func:`pyrovae.ops.index_to_codes`; None where the layer is too
            large to tell.
    """

    units: int
    rows: Tensor | None
    weights: Tensor | None

    @property
    def known(self) -> bool:
        """Whether expectations can be computed."""
        return self.weights is not None

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """States `[m, units]` and their weights `[m]`."""
        assert self.weights is not None
        for start in range(0, len(self.weights), _CHUNK):
            part = self.weights[start : start + _CHUNK]
            if self.rows is not None:
                yield self.rows[start : start + _CHUNK], part
            else:
                index = torch.arange(start, start + len(part), device=part.device)
                yield index_to_codes(index, 2, self.units).to(part.dtype), part

    def mean(self) -> Tensor:
        """E[h], `[units]`."""
        return torch.stack([w @ states for states, w in self.chunks()]).sum(0)


@dataclass
class Stack:
    """RBMs on one another over data: all but the last are the directed layers, and Q is that of their hidden units.

    Args:
        x: data `[N, D]`, float64.
        max_bits: units of a layer whose states are enumerated.
    """

    x: Tensor
    max_bits: int
    rbms: list[RBM] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    terms: list[float | None] = field(default_factory=list)  # E_Q[log p(below | above)] + H(q(above | below)) of each layer

    def __post_init__(self) -> None:
        self.levels.append(Level(self.x.shape[1], self.x, self.x.new_full((len(self.x),), 1 / len(self.x))))

    def top(self, rbm: RBM) -> None:
        """Put an RBM on top, in the place of one that is there."""
        self.rbms[len(self.levels) - 1 :] = [rbm]

    def push(self) -> None:
        """Make the top RBM a directed layer; the next one goes over its hidden units."""
        rbm, below = self.rbms[-1], self.levels[-1]
        units = rbm.W.shape[1]
        if not below.known or units > self.max_bits:
            self.terms.append(None)
            self.levels.append(Level(units, None, None))
            return
        linear, weights = self.x.new_zeros(()), self.x.new_zeros(2**units)
        for rows, w in below.chunks():
            drive = rows @ rbm.W
            logits = rbm.c + drive
            q = logits.sigmoid()
            entropy = (softplus(logits, threshold=_EXACT) - q * logits).sum(-1)
            linear += w @ (rows @ rbm.b + (drive * q).sum(-1) + entropy)
            weights += aggregate(logits, w)
        self.terms.append(float(linear - weights @ softplus_sums(rbm.W.T, rbm.b)))
        self.levels.append(Level(units, None, weights))

    def constant(self) -> float:
        """The terms of the bound that the top RBM does not move."""
        assert all(term is not None for term in self.terms)
        return sum(term for term in self.terms if term is not None)

    def objective(self) -> Callable[..., Tensor]:
        """The term that it moves, E_Q[log p_top], as a differentiable function of its W, b and c."""
        level = self.levels[-1]
        assert level.weights is not None
        weights = level.weights
        if level.rows is not None:
            rows = level.rows

            def of_rows(weight: Tensor, b: Tensor, c: Tensor) -> Tensor:
                return -(weights @ rbm_of(weight, b, c).free_energy(rows)) - rbm_log_partition(weight, b, c)

            return of_rows
        codes = index_to_codes(torch.arange(len(weights), device=weights.device), 2, level.units).to(weights.dtype)

        def of_codes(weight: Tensor, b: Tensor, c: Tensor) -> Tensor:
            score = codes @ b + softplus_sums(weight, c)  # −F of all codes
            return weights @ score - score.logsumexp(0)

        return of_codes

    def bound(self) -> float | None:
        """The bound per datum with the last RBM on top; None where it cannot be enumerated."""
        rbm, level = self.rbms[-1], self.levels[-1]
        if not level.known or None in self.terms or min(rbm.W.shape) > self.max_bits:
            return None
        with torch.no_grad():
            return self.constant() + float(self.objective()(rbm.W, rbm.b, rbm.c))


def aggregate(logits: Tensor, weights: Tensor) -> Tensor:
    """Σ_m w_m Π_j Bern(h_j; σ(logits_mj)) of all codes h, `[2^H]`, by a product of two tables of half the bits each.

    Args:
        logits: `[M, H]`.
        weights: `[M]`.
    """
    half = (logits.shape[1] + 1) // 2
    left, right = (_table(part) for part in (logits[:, :half], logits[:, half:]))
    return ((left * weights.unsqueeze(-1)).T @ right).flatten()


def _table(logits: Tensor) -> Tensor:
    """Π_j Bern(h_j; σ(logits_mj)) of all codes, `[M, 2^H]`, the first bit slowest."""
    table = logits.new_ones(len(logits), 1)
    for on, off in zip(logits.sigmoid().unbind(1), (-logits).sigmoid().unbind(1), strict=True):
        table = torch.stack((table * off.unsqueeze(-1), table * on.unsqueeze(-1)), -1).flatten(1)
    return table


def ascend(objective: Callable[..., Tensor], start: Tensors) -> Iterator[tuple[float, Tensors]]:
    """L-BFGS with a backtracking line search (Armijo): the objective never falls. Ends where no step raises it.

    A step is halved until the objective rises by at least 1e-4 of what the slope promises. Pairs of steps and gradients
    between which the objective is not concave are left out, so that every direction ascends.

    References:
        Numerical Optimization (Nocedal, Wright, 2006), algorithms 3.1 and 7.4
        https://doi.org/10.1007/978-0-387-40065-5
    """
    shapes = [t.shape for t in start]
    point = torch.cat([t.detach().flatten() for t in start])
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=_PAIRS)  # steps, and the falls of the gradient along them

    def parts(flat: Tensor) -> Tensors:
        pieces = flat.split([shape.numel() for shape in shapes])
        return tuple(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))

    def slope_at(flat: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            leaf = flat.clone().requires_grad_()
            value = objective(*parts(leaf))
            (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient

    now, gradient = slope_at(point)
    while True:
        direction = _newton(gradient, pairs)
        slope, rate = float(gradient @ direction), 1.0
        if not slope > 0:
            return
        with torch.no_grad():
            while not float(objective(*parts(point + rate * direction))) >= now + 1e-4 * rate * slope:
                rate /= 2
                if rate * slope < 1e-15 * max(1.0, abs(now)):
                    return
        step, before = rate * direction, gradient
        point = point + step
        now, gradient = slope_at(point)
        if float(step @ (before - gradient)) > 0:
            pairs.append((step, before - gradient))
        yield now, parts(point)


def _newton(gradient: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse of the negative Hessian, as the pairs tell it, times the gradient."""
    kept, direction = list(pairs), gradient.clone()
    along = []
    for step, fall in reversed(kept):
        along.append(step @ direction / (step @ fall))
        direction -= along[-1] * fall
    if kept:
        step, fall = kept[-1]
        direction *= step @ fall / (fall @ fall)
    for (step, fall), part in zip(kept, reversed(along), strict=True):
        direction += (part - fall @ direction / (step @ fall)) * step
    return direction
