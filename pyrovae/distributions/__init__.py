"""Pyro distributions: relaxations that stay finite, discrete ones with surrogate gradients, and undirected ones."""

import pyrovae.distributions.kl  # noqa: F401  registers the divergences
from pyrovae.distributions.boltzmann import BoltzmannMachine, BoltzmannMarginal
from pyrovae.distributions.chains import PersistentChains
from pyrovae.distributions.cross_entropy import CrossEntropy
from pyrovae.distributions.grey_levels import GreyLevels
from pyrovae.distributions.markov_chain import MarkovChain
from pyrovae.distributions.rbm import RBM
from pyrovae.distributions.relaxed import RelaxedBernoulli, RelaxedOneHotCategorical
from pyrovae.distributions.surrogate import SurrogateBernoulli, SurrogateOneHotCategorical

__all__ = [
    "RBM",
    "BoltzmannMachine",
    "BoltzmannMarginal",
    "CrossEntropy",
    "GreyLevels",
    "MarkovChain",
    "PersistentChains",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "SurrogateBernoulli",
    "SurrogateOneHotCategorical",
]
