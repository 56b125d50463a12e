"""Effect handlers that read or rewrite a program."""

from pyrovae.handlers.own_params import Module, own_params
from pyrovae.handlers.relax import discretize, relax

__all__ = ["Module", "discretize", "own_params", "relax"]
