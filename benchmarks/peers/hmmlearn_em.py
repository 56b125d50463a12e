"""Baum-Welch by hmmlearn 0.3.3 from a given start, ten iterations by default and no early stop; single-threaded C++.

Sequences of unequal lengths are concatenated, as hmmlearn wants them. Its priors are made flat.

    pip install hmmlearn
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor


def fitter(
    initial: Tensor, transition: Tensor, emission: dict[str, Tensor], x: Tensor, lengths: Tensor, iterations: int = 10
) -> Callable[[], Any]:
    """A function that fits anew from the start and returns the fitted hmmlearn model.

    Args:
        initial: `[K]`, probabilities.
        transition: `[K, K]`, probabilities.
        emission: `{"probs": [K, S]}` for symbols, or `{"loc": [K, D], "variance": [K, D]}`.
        x: `[B, L]` symbols or `[B, L, D]`.
        lengths: seen times, `[B]`.
        iterations: EM iterations.
    """
    from hmmlearn import hmm

    logging.getLogger("hmmlearn").setLevel(logging.ERROR)
    rows = np.concatenate([row[:n].numpy().reshape(n, -1) for row, n in zip(x, lengths.tolist(), strict=True)])
    common = {"n_iter": iterations, "tol": -np.inf, "implementation": "scaling", "init_params": ""}

    def fit() -> Any:
        if "probs" in emission:
            model = hmm.CategoricalHMM(len(initial), params="ste", **common)
            model.emissionprob_, model.n_features = emission["probs"].numpy(), emission["probs"].shape[1]
        else:
            flat = {"covars_prior": 0.0, "covars_weight": 1.0, "means_weight": 0.0, "min_covar": 0.0}
            model = hmm.GaussianHMM(len(initial), "diag", params="stmc", **flat, **common)
            model.means_, model.covars_ = emission["loc"].numpy(), emission["variance"].numpy()
        model.startprob_, model.transmat_ = initial.numpy(), transition.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.fit(rows, lengths.tolist())

    return fit
