"""Expected log joints under weights over joint states: of an exact or mean-field posterior, or of states that chains visited.

For every site, Σ_s w(s, n) log p(site | s, n) needs only the weights of the axes that the site depends on. Where its
parameters do not vary over the data, the weights are first contracted with the sufficient statistics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrovae.inference.exact.elimination import Term
from pyrovae.inference.exact.enumeration import Enumeration
from pyrovae.inference.exact.factors import dot
from pyrovae.inference.posterior import Posterior, Program

SiteWeights = dict[str, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class TabulatedPosterior(Posterior):
    """A posterior with weights over the joint states of an :class:`Enumeration`."""

    enumeration: Enumeration = field(repr=False)

    @abstractmethod
    def site_weights(self, *, summed: bool = False) -> Iterator[tuple[slice, SiteWeights]]:
        """For each chunk, the weights of every site's table, `[axes, plates]` of full size along both.

        Args:
            summed: sum the weights over plates along which the site's table merely repeats (size 1 there).
        """

    def expected_log_joint(self, model: Program) -> Tensor:
        """E_q[log p(x, z)] under `model`, `[batch]`, differentiable; one run of the program a chunk."""
        space, parts = self.enumeration, []
        for chunk, weights in self.site_weights():
            for name, factor in space.factors(chunk, model).items():
                if name in weights:
                    parts.append(Term(weighted_sum(weights[name], factor.table(), space), factor.plate_dims, -1))
        return space.to_batch(parts)

    def q_function(self, model: Program) -> Callable[[], Tensor]:
        """Σ_batch E_q[log p(x, z)], the data gathered into sufficient statistics once; see :func:`q_function`."""
        return q_function(self.enumeration, self.site_weights(summed=True), model)


def q_function(space: Enumeration, site_weights: Iterable[tuple[slice, SiteWeights]], model: Program) -> Callable[[], Tensor]:
    """The objective of an M-step over weighted joint states.

    Each call of the result costs one run of the program over the states, whatever the number of rows, for every site whose
    parameters do not vary over the data.

    Args:
        space: the states.
        site_weights: for each chunk, the weights of every site's table, `[axes, plates]`; where the table merely repeats
            along a plate, they may be summed over it.
        model: the program to learn.

    Returns:
        A function without arguments: Σ w log p(x, z) at the model's present parameters, 0-d.
    """
    with torch.no_grad():
        parts = []
        for chunk, weights in site_weights:
            factors = space.factors(chunk, model)
            parts.append((chunk, {name: factors[name].statistics(w) for name, w in weights.items()}))

    def total() -> Tensor:
        values = []
        for chunk, statistics in parts:
            factors = space.factors(chunk, model)
            values += [weighted(factors[name]) for name, weighted in statistics.items()]
        return torch.stack(values).sum()

    return total


def weighted_sum(weights: Tensor, table: Tensor, space: Enumeration) -> Tensor:
    """Σ over axes of weights x table, `[1, plates]`, where a state of weight 0 counts 0 whatever its log probability."""
    product = dot(weights, table)
    axes = list(range(space.ndim - space.structure.plate_depth))
    return product.sum(axes, keepdim=True) if axes else product
