"""Inference methods: each takes any Pyro program and returns an account of how far it can be trusted."""

from pyrovae.inference.elbo import ExactLikelihood
from pyrovae.inference.exact import Exact, ExactPosterior
from pyrovae.inference.posterior import Posterior

__all__ = ["Exact", "ExactLikelihood", "ExactPosterior", "Posterior"]
