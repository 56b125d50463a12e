"""RBMs and Boltzmann machines: contrastive divergence and parallel tempering."""

from pyrovae.inference.undirected.contrastive import ContrastiveDivergence
from pyrovae.inference.undirected.energy import energy_of
from pyrovae.inference.undirected.tempering import ParallelTempering, TemperedDraws

__all__ = ["ContrastiveDivergence", "ParallelTempering", "TemperedDraws", "energy_of"]
