"""Expected log joints of posteriors that are tables over joint states: exact, mean-field, or visited by a chain."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrovae.inference.elimination import Term
from pyrovae.inference.enumeration import Enumeration
from pyrovae.inference.posterior import Posterior, Program


@dataclass(frozen=True, eq=False, kw_only=True)
class TabulatedPosterior(Posterior):
    """A posterior with weights over the joint states of an :class:`Enumeration`.

    For every site, Σ_s w(s, n) log p(site | s, n) needs only the weights of the axes that the site depends on. Where its
    parameters do not vary over the data, the weights are first contracted with the sufficient statistics.
    """

    enumeration: Enumeration = field(repr=False)

    @abstractmethod
    def site_weights(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """For each chunk, the weights of every site's table, `[axes, plates]` of full size along both."""

    def expected_log_joint(self, model: Program) -> Tensor:
        """E_q[log p(x, z)] under `model`, `[batch]`; see :meth:`Posterior.expected_log_joint`. One run a chunk."""
        space = self.enumeration
        parts = []
        for chunk, weights in self.site_weights():
            for name, factor in space.factors(chunk, model).items():
                if name in weights:
                    parts.append(Term(weighted_sum(weights[name], factor.table(), space), factor.plate_dims, -1))
        return space.to_batch(parts)

    def q_function(self, model: Program) -> Callable[[], Tensor]:
        """Σ_batch E_q[log p(x, z)] with the data gathered into sufficient statistics once.

        Each call then costs one run of the program over the states, whatever the number of rows, for every site whose
        parameters do not vary over the data.
        """
        space = self.enumeration
        with torch.no_grad():
            parts = []
            for chunk, weights in self.site_weights():
                factors = space.factors(chunk, model)
                parts.append((chunk, {name: factors[name].statistics(w) for name, w in weights.items()}))

        def total() -> Tensor:
            value: Tensor | float = 0.0
            for chunk, statistics in parts:
                factors = space.factors(chunk, model)
                value = value + sum(weighted(factors[name]) for name, weighted in statistics.items())
            assert isinstance(value, Tensor)
            return value

        return total


def weighted_sum(weights: Tensor, table: Tensor, space: Enumeration) -> Tensor:
    """Σ over axes of weights x table, `[1, plates]`, where a state of weight 0 counts 0 whatever its log probability."""
    product = torch.where(weights > 0, weights * torch.where(weights > 0, table, 0.0), 0.0)
    return product.sum(list(range(space.ndim - space.structure.plate_depth)), keepdim=True)
