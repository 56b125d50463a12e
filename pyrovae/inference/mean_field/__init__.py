"""Factorised posteriors and their bounds."""

from pyrovae.inference.mean_field.mean_field import MeanField
from pyrovae.inference.mean_field.saul_jaakkola_jordan import SaulJaakkolaJordan

__all__ = ["MeanField", "SaulJaakkolaJordan"]
