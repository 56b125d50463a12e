"""Tensor mathematics without Pyro: state tables, sums in log space, weights and their effective sample size."""

from pyrovae.ops.block_gibbs import boltzmann_sweep, colour_blocks, rbm_hidden, rbm_sweep
from pyrovae.ops.boltzmann import boltzmann_log_partition, boltzmann_moments, sample_boltzmann
from pyrovae.ops.code_regression import fit_code_regression
from pyrovae.ops.linear_code import LinearCodes, linear_code_logsumexp, linear_code_max
from pyrovae.ops.partition import check_enumerable, is_enumerable, rbm_log_partition, rbm_moments, sample_rbm, softplus_sums
from pyrovae.ops.rng import isolated_rng
from pyrovae.ops.states import codes_to_index, index_to_codes
from pyrovae.ops.structures import Chain, FactorialCode, SigmoidLayers
from pyrovae.ops.weights import effective_sample_size, log_mean_exp

__all__ = [
    "Chain",
    "FactorialCode",
    "LinearCodes",
    "SigmoidLayers",
    "boltzmann_log_partition",
    "boltzmann_moments",
    "boltzmann_sweep",
    "check_enumerable",
    "codes_to_index",
    "colour_blocks",
    "effective_sample_size",
    "fit_code_regression",
    "index_to_codes",
    "is_enumerable",
    "isolated_rng",
    "linear_code_logsumexp",
    "linear_code_max",
    "log_mean_exp",
    "rbm_hidden",
    "rbm_log_partition",
    "rbm_moments",
    "rbm_sweep",
    "sample_boltzmann",
    "sample_rbm",
    "softplus_sums",
]
