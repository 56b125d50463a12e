"""Guides q(z | x): importable into any Pyro program."""

from pyrovae.guides.amortized import AmortizedMeanField
from pyrovae.guides.local import LocalMeanField

__all__ = ["AmortizedMeanField", "LocalMeanField"]
