"""Effect handlers that read or rewrite a program."""

from pyrovae.handlers.anneal import scale_kl
from pyrovae.handlers.declared import declared, declares_capturable
from pyrovae.handlers.measures import check_measures
from pyrovae.handlers.own_params import Module, own_params
from pyrovae.handlers.partition import with_log_partition
from pyrovae.handlers.relax import RelaxReparam, discretize, relax
from pyrovae.handlers.surrogate import surrogate

__all__ = [
    "Module",
    "RelaxReparam",
    "check_measures",
    "declared",
    "declares_capturable",
    "discretize",
    "own_params",
    "relax",
    "scale_kl",
    "surrogate",
    "with_log_partition",
]
