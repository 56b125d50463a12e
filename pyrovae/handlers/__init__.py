"""Effect handlers that read or rewrite a program."""

from pyrovae.handlers.own_params import Module, own_params

__all__ = ["Module", "own_params"]
