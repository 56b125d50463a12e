"""Pyro distributions: relaxations of discrete ones that stay finite, and discrete ones with surrogate gradients."""

import pyrovae.distributions.kl  # noqa: F401  registers the divergences
from pyrovae.distributions.cross_entropy import CrossEntropy
from pyrovae.distributions.grey_levels import GreyLevels
from pyrovae.distributions.relaxed import RelaxedBernoulli, RelaxedOneHotCategorical
from pyrovae.distributions.surrogate import SurrogateBernoulli, SurrogateOneHotCategorical

__all__ = [
    "CrossEntropy",
    "GreyLevels",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "SurrogateBernoulli",
    "SurrogateOneHotCategorical",
]
