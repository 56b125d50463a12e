"""Objectives: subclasses of `pyro.infer.ELBO` that serve stock SVI and this library's `Variational` alike."""

from pyrovae.inference.elbo.exact_likelihood import ExactLikelihood

__all__ = ["ExactLikelihood"]
