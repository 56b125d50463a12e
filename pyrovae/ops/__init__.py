"""Tensor mathematics without Pyro: state tables, sums in log space, weights and their effective sample size."""

from pyrovae.ops.rng import isolated_rng
from pyrovae.ops.states import codes_to_index, index_to_codes
from pyrovae.ops.structures import Chain, FactorialCode, SigmoidLayers
from pyrovae.ops.weights import effective_sample_size, log_mean_exp

__all__ = [
    "Chain",
    "FactorialCode",
    "SigmoidLayers",
    "codes_to_index",
    "effective_sample_size",
    "index_to_codes",
    "isolated_rng",
    "log_mean_exp",
]
