"""The log probability of one site at many joint states, without ever expanding what does not vary.

A plate expands a distribution to all rows, but a parameter that merely repeats has stride 0, so the expansion can be seen
and undone (*thin* evaluation): the prior of a latent then costs S states instead of S x N. Where moreover the parameters
vary along one set of dims and the values along another, an exponential family is one matrix product,

    log p(x_n | s) = eta_s . T(x_n) − A(eta_s) + h(x_n).

This is where the whole speed of enumeration comes from. The plain `fn.log_prob(value)` is the oracle and the fallback.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions.utils import probs_to_logits

from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers.structure import Site, both, unmask
from pyrovae.ops.tracing import capturing, unrecorded


class Bilinear(NamedTuple):
    """Natural parameters and sufficient statistics of a site, flattened over its event.

    `eta [*P, F]`, `statistic [*V, F]`, `log_normalizer [*P]`, `log_base [*V]` or 0; in each dim at most one of P and V
    exceeds 1.
    """

    eta: Tensor
    statistic: Tensor
    log_normalizer: Tensor
    log_base: Tensor | float


@dataclass
class Factor:
    """log p of one site as a table over axes (dims of states, left) and plates (right), of size 1 where it is constant.

    Exactly one of `dense` and `bilinear` is set. `mask`, if any, applies to an observed site.
    """

    name: str
    plate_dims: frozenset[int]
    ndim: int
    dtype: torch.dtype
    dense: Tensor | None = None
    bilinear: Bilinear | None = None
    mask: Tensor | None = None

    def table(self) -> Tensor:
        """The log probabilities, `[axes, plates]`."""
        if self.dense is not None:
            table = self.dense
        else:
            assert self.bilinear is not None
            table = _product(self.bilinear, self.ndim).to(self.dtype)
        return table if self.mask is None else torch.where(self.mask, table, table.new_zeros(()))

    def statistics(self, weights: Tensor) -> Callable[[Factor], Tensor]:
        """Reduce the data to what the weighted sum of this factor needs.

        Args:
            weights: `[axes, plates]`, of full size wherever the factor or its plates vary.

        Returns:
            A function of the same site's factor at other parameters: the 0-d sum of weights x table, differentiable in
            them. Where the factor is bilinear it does not touch the data again.
        """
        if self.mask is not None:
            weights = weights * self.mask
        if self.bilinear is None:
            return lambda other: dot(_sum_to(weights, (table := other.table()).shape), table).sum()
        eta, statistic, log_normalizer, log_base = self.bilinear
        gathered = _gather(weights, statistic, eta.shape[:-1])  # [*P, F]
        total = _sum_to(weights, log_normalizer.shape)  # [*P]
        base = (weights * log_base).sum()

        def weighted_sum(other: Factor) -> Tensor:
            if other.bilinear is None:
                raise ValueError(f"expected site {self.name!r} to keep its form between evaluations, it changed")
            return (other.bilinear.eta * gathered).sum() - (other.bilinear.log_normalizer * total).sum() + base

        return weighted_sum


def dot(weights: Tensor, table: Tensor) -> Tensor:
    """Weights x log probabilities, where a weight of 0 counts 0 though the log probability be −inf."""
    return weights * torch.where(weights > 0, table, 0.0)


def site_factor(site: Site, ndim: int, *, plain: bool = False) -> Factor:
    """The factor of a site.

    Args:
        site: the site of a run whose values have `ndim` batch dims at most.
        ndim: how many dims (axes and plates) tables have.
        plain: evaluate `fn.log_prob(value)` as it stands (the oracle).
    """
    fn, mask, inner = unmask(site.fn)
    mask = both(mask, site.mask) if site.observed else None  # the factor of a latent always integrates to 1
    value = site.value
    factor = Factor(site.name, site.plate_dims, ndim, _parameter_dtype(fn))
    if isinstance(mask, Tensor) and not capturing() and not bool(mask.any()):
        mask = False
    if isinstance(mask, Tensor):
        factor.mask = _pad(mask, ndim)
        value = _show_only(value, mask, len(fn.event_shape))
    elif mask is False:
        factor.dense = torch.zeros((1,) * ndim, dtype=factor.dtype, device=getattr(value, "device", None))
        return factor
    if inner is not None and site.observed:
        factor.dense = _pad(_masked_elements(fn, value, torch.as_tensor(inner)), ndim)
        return factor
    family = None if plain else _thin_family(fn, value, ndim)
    if family is None:
        factor.dense = _pad(_thin_fn(fn, plain=plain).log_prob(value), ndim)
    elif _separate(family):
        factor.bilinear = family
    else:
        eta, statistic, log_normalizer, log_base = family
        factor.dense = ((eta * statistic).sum(-1) - log_normalizer + log_base).to(factor.dtype)
    return factor


# Exponential families: the thin parameters of a distribution and a value, told as a Bilinear. The number of event dims
# (of `to_event`) is `events`; parameters have batch dims first.


def _bernoulli(fn: Any, value: Tensor, events: int) -> Bilinear:
    logits = _thin_logits(fn, events, is_binary=True)
    return Bilinear(logits, value, F.softplus(logits, threshold=40), 0.0)


def _categorical(fn: Any, value: Tensor, events: int) -> Bilinear:
    logits = _thin_logits(fn, events + 1)
    one_hot = F.one_hot(value.long(), logits.shape[-1]).to(logits.dtype)
    return Bilinear(logits, one_hot, logits.new_zeros(()), 0.0)


def _one_hot(fn: Any, value: Tensor, events: int) -> Bilinear:
    logits = _thin_logits(fn._categorical, events + 1)
    return Bilinear(logits, value.to(logits.dtype), logits.new_zeros(()), 0.0)


def _normal(fn: Any, value: Tensor, events: int) -> Bilinear:
    # In float64, and with values centred, so that the squares do not cancel.
    loc, scale = _thin(fn.loc, events).double(), _thin(fn.scale, events).double()
    value = value.double()
    rows = value.reshape((-1,) + value.shape[value.dim() - events :])
    centre = rows.mean(0) if rows.shape[0] > 1 else torch.zeros_like(rows[0])
    value, loc = value - centre, loc - centre
    eta = torch.stack(torch.broadcast_tensors(loc / scale**2, -0.5 / scale**2), -1)
    statistic = torch.stack((value, value**2), -1)
    log_normalizer = 0.5 * (loc / scale) ** 2 + scale.log() + 0.5 * math.log(2 * math.pi)
    return Bilinear(eta, statistic, log_normalizer, 0.0)


def _poisson(fn: Any, value: Tensor, events: int) -> Bilinear:
    rate = _thin(fn.rate, events)
    return Bilinear(rate.log(), value, rate, -(value + 1).lgamma())


_FAMILIES: dict[type, Callable[[Any, Tensor, int], Bilinear]] = {
    dist.Bernoulli: _bernoulli,
    dist.Categorical: _categorical,
    dist.OneHotCategorical: _one_hot,
    dist.Normal: _normal,
    dist.Poisson: _poisson,
}


def _thin_family(fn: Any, value: Tensor, ndim: int) -> Bilinear | None:
    """The Bilinear of a distribution with its event flattened and its dims padded to `ndim`; None if it has none."""
    events = 0
    base = fn
    while type(base) is dist.Independent:
        events += base.reinterpreted_batch_ndims
        base = base.base_dist
    if type(base) not in _FAMILIES or (type(base) is dist.Normal and _meet(base, value, events)):
        return None
    eta, statistic, log_normalizer, log_base = _FAMILIES[type(base)](base, value, events)
    extra = eta.dim() - (len(base.batch_shape))  # dims that the family itself adds: K, or the pair of a Normal
    summed = tuple(range(-events, 0))
    eta = _flatten(eta, events + extra, ndim)
    statistic = _flatten(statistic, events + extra, ndim)
    if log_normalizer.dim():
        log_normalizer = log_normalizer.sum(summed) if events else log_normalizer
    if isinstance(log_base, Tensor):
        log_base = _pad(log_base.sum(summed) if events else log_base, ndim)
    with unrecorded():
        total = float(eta.detach().sum())
    if not math.isfinite(total):  # a sum is finite only where every term is
        return None
    return Bilinear(eta, statistic, _pad(log_normalizer, ndim), log_base)


def _meet(normal: Any, value: Tensor, events: int) -> bool:
    """Whether parameters and values vary along one dim: then nothing is gained by squares in float64."""
    shapes = [_thin(parameter, events).shape for parameter in (normal.loc, normal.scale)]
    shapes = [shape[: len(shape) - events] for shape in (*shapes, value.shape)]
    ndim = max(map(len, shapes))
    loc, scale, of_value = ((1,) * (ndim - len(shape)) + tuple(shape) for shape in shapes)
    return any(max(p, q) > 1 and v > 1 for p, q, v in zip(loc, scale, of_value, strict=True))


def _separate(family: Bilinear) -> bool:
    """Whether, in each dim, at most one of parameters and values varies."""
    return all(p == 1 or v == 1 for p, v in zip(family.eta.shape[:-1], family.statistic.shape[:-1], strict=True))


def _product(family: Bilinear, ndim: int) -> Tensor:
    """Eta . T − A + h as one matrix product, its dims in their places."""
    eta, statistic, log_normalizer, log_base = family
    rows, columns = eta.shape[:-1], statistic.shape[:-1]
    table = torch.addmm(
        -log_normalizer.expand(rows).reshape(-1, 1),
        eta.reshape(-1, eta.shape[-1]),
        statistic.reshape(-1, statistic.shape[-1]).to(eta.dtype).T,
    )
    of_rows = [d for d in range(ndim) if rows[d] > 1]
    of_columns = [d for d in range(ndim) if columns[d] > 1]
    order = of_rows + of_columns
    if order:
        table = table.reshape([rows[d] for d in of_rows] + [columns[d] for d in of_columns])
        table = table.permute([order.index(d) for d in sorted(order)])
    table = table.reshape([max(r, c) for r, c in zip(rows, columns, strict=True)])
    return table if isinstance(log_base, float) else table + log_base


def _gather(weights: Tensor, statistic: Tensor, rows: torch.Size) -> Tensor:
    """Sum of weights x statistic over all dims in which the parameters do not vary: `[*P, F]`."""
    columns = statistic.shape[:-1]
    keep = [r if r > 1 else (c if c > 1 else 1) for r, c in zip(rows, columns, strict=True)]
    weights = _sum_to(weights, torch.Size(keep))
    of_rows = [d for d in range(len(rows)) if rows[d] > 1]
    of_columns = [d for d in range(len(rows)) if rows[d] == 1]
    matrix = weights.permute(of_rows + of_columns).reshape(math.prod(rows), -1)
    gathered = matrix @ statistic.reshape(-1, statistic.shape[-1]).to(matrix.dtype)
    return gathered.reshape((*rows, statistic.shape[-1]))


def _thin(parameter: Tensor, events: int) -> Tensor:
    """Narrow to size 1 every batch dim in which a parameter merely repeats (stride 0), event dims excepted."""
    batch = parameter.dim() - events
    strides = parameter.stride()
    size = [1 if d < batch and strides[d] == 0 else n for d, n in enumerate(parameter.shape)]
    if size == list(parameter.shape):
        return parameter
    # Through the base: the backward of narrowing the expanded view would be dense in the expanded shape.
    root = parameter._base if parameter.requires_grad and parameter._base is not None else parameter
    return root.as_strided(size, strides, parameter.storage_offset())


def _thin_logits(fn: Any, events: int, *, is_binary: bool = False) -> Tensor:
    """Logits from whichever of a distribution's `logits` and `probs` repeats more: a cached one may have lost its strides."""
    thin = {name: _thin(fn.__dict__[name], events) for name in ("logits", "probs") if name in fn.__dict__}
    name = min(thin, key=lambda name: thin[name].numel())
    return thin[name] if name == "logits" else probs_to_logits(thin[name], is_binary=is_binary)


def _thin_fn(fn: Any, *, plain: bool) -> Any:
    """The distribution with thin parameters where its class is told by its `arg_constraints`; else as it stands."""
    if plain:
        return fn
    if isinstance(fn, Undirected):
        return fn.unexpanded()
    if type(fn) is dist.Independent:
        base = _thin_fn_base(fn.base_dist, fn.reinterpreted_batch_ndims)
        return fn if base is None else base.to_event(fn.reinterpreted_batch_ndims)
    base = _thin_fn_base(fn, 0)
    return fn if base is None else base


def _thin_fn_base(fn: Any, events: int) -> Any | None:
    names = [name for name in getattr(fn, "arg_constraints", {}) if name in fn.__dict__]
    both = {"probs", "logits"} <= set(fn.arg_constraints) if isinstance(fn.arg_constraints, dict) else False
    if type(fn).__module__ != "pyro.distributions.torch" or not names or fn.event_shape or hasattr(fn, "_lims"):
        return None
    if len(names) < len(fn.arg_constraints) - both:
        return None
    parameters = {name: fn.__dict__[name] for name in names}
    if not all(isinstance(p, Tensor) for p in parameters.values()):
        return None
    return type(fn)(**{name: _thin(p, events) for name, p in parameters.items()}, validate_args=False)


def _show_only(value: Any, mask: Tensor, events: int) -> Any:
    """A value whose masked rows, which may hold anything, repeat a visible one: NaN must not reach a gradient."""
    if not isinstance(value, Tensor) or not mask.dim():
        return value
    batch = torch.broadcast_shapes(value.shape[: value.dim() - events], mask.shape)
    wide = value.expand(batch + value.shape[value.dim() - events :])
    visible = mask.expand(batch)
    row = wide.reshape((-1,) + wide.shape[len(batch) :]).index_select(0, visible.reshape(-1).int().argmax().reshape(1))[0]
    return torch.where(visible.reshape(batch + (1,) * events), wide, row)


def _masked_elements(fn: Any, value: Tensor, mask: Tensor) -> Tensor:
    """Log p of a vector of which single elements are masked, as by `.mask(m).to_event(1)`."""
    base, events = fn.base_dist, fn.reinterpreted_batch_ndims
    if not capturing() and not bool(mask.any()):
        return value.new_zeros(())
    table = torch.where(mask, base.log_prob(_show_only(value, mask, len(base.event_shape))), 0.0)
    return table.flatten(table.dim() - events).sum(-1)


def _parameter_dtype(fn: Any) -> torch.dtype:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    for name in getattr(fn, "arg_constraints", ()):
        parameter = fn.__dict__.get(name, getattr(fn, "_categorical", fn).__dict__.get(name))
        if isinstance(parameter, Tensor) and parameter.is_floating_point():
            return parameter.dtype
    return torch.get_default_dtype()


def _pad(table: Tensor, ndim: int) -> Tensor:
    return table.reshape((1,) * (ndim - table.dim()) + table.shape)


def _flatten(values: Tensor, events: int, ndim: int) -> Tensor:
    """`[*batch, *event]` to `[*batch padded to ndim, F]`."""
    batch = values.shape[: values.dim() - events] if events else values.shape
    return values.reshape((1,) * (ndim - len(batch)) + batch + (math.prod(values.shape[len(batch) :]),))


def _sum_to(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum over every dim in which `shape` has size 1."""
    dims = [d for d in range(-len(shape), 0) if shape[d] == 1 and values.shape[d] > 1]
    return values.sum(dims, keepdim=True) if dims else values
