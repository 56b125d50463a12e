"""Exact inference: enumeration of any program with finite latents, and fast routes for structures that a model declares."""

from pyrovae.inference.exact.exact import Exact, ExactPosterior

__all__ = ["Exact", "ExactPosterior"]
