"""Markov chain Monte Carlo: Gibbs sweeps of our own, and any kernel of Pyro's."""

from pyrovae.inference.mcmc.gibbs import Gibbs
from pyrovae.inference.mcmc.kernel import GibbsKernel
from pyrovae.inference.mcmc.mcmc import MCMC

__all__ = ["MCMC", "Gibbs", "GibbsKernel"]
