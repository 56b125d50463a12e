"""Guides q(z | x): importable into any Pyro program."""

from pyrovae.guides.amortized import AmortizedMeanField
from pyrovae.guides.draw import DRAWGuide
from pyrovae.guides.embed import embed, reconstruct
from pyrovae.guides.local import LocalMeanField
from pyrovae.guides.structured import AmortizedStructured

__all__ = ["AmortizedMeanField", "AmortizedStructured", "DRAWGuide", "LocalMeanField", "embed", "reconstruct"]
