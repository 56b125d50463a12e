"""Annealed importance sampling, of partition functions and of log p(x)."""

from pyrovae.inference.ais.ais import AIS
from pyrovae.inference.ais.partition import LogPartition, Sandwich

__all__ = ["AIS", "LogPartition", "Sandwich"]
