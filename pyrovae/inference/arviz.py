"""ArviZ, of either generation: 0.x returns `InferenceData`, 1.x `DataTree`, and their `from_dict` differ silently."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyrovae.inference.posterior import Posterior


def to_arviz(posterior: Posterior, num_draws: int) -> Any:
    """See :meth:`Posterior.to_arviz`."""
    draws = posterior.draws
    chains = draws is not None
    states = draws if draws is not None else posterior.sample(num_draws)
    groups = {"posterior": {name: _array(value) for name, value in states.items()}}
    attributes = {"bound": posterior.bound, "inference_library": "pyrovae", "seconds": posterior.seconds}
    evidence = {}
    if posterior.log_evidence is not None:
        evidence["log_evidence"] = _array(posterior.log_evidence)
    return _convert(groups, evidence, ["chain", "draw"] if chains else ["sample"], attributes)


def effective_sample_size(draws: Tensor) -> Tensor:
    """Bulk effective sample size of draws `[chain, draw, …]`, `[…]`.

    NaN where a quantity never changes, and for fewer than 4 draws.

    References:
        Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021)
        https://arxiv.org/abs/1903.08008
    """
    return _per_quantity("ess", draws)


def split_rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat of draws `[chain, draw, …]`, `[…]`.

    NaN where a quantity never changes, for one chain and for fewer than 4 draws.

    References:
        Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021)
        https://arxiv.org/abs/1903.08008
    """
    return _per_quantity("rhat", draws)


def pareto_k(log_weights: Tensor) -> Tensor:
    """The tail shape k of importance weights, one a datum; above 0.7 the weights' mean should not be trusted.

    Args:
        log_weights: `[K, rows…]`.

    Returns:
        `[rows…]`; −inf where the tail is one repeated value, as equal weights and guides over few states make it: then no
        heavy tail was seen, and the effective sample size is what there is to judge by.

    References:
        Pareto smoothed importance sampling (Vehtari et al., 2024)
        https://arxiv.org/abs/1507.02646
    """
    flat = _array(log_weights).reshape(log_weights.shape[0], -1).T.astype(float)  # [rows, K]
    best = flat.max(axis=1, keepdims=True)
    found = np.where(np.isfinite(best[:, 0]), -np.inf, np.inf)  # every weight 0: nothing can be trusted
    flat = np.maximum(flat - np.where(np.isfinite(best), best, 0.0), -700.0)  # a weight of 0 is a number too
    varied = np.isneginf(found) & (np.ptp(flat, axis=1) > 1e-12 * np.maximum(1.0, np.abs(best[:, 0])))
    if varied.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[varied] = _psis(flat[varied])
    few = np.asarray([len(np.unique(row)) < len(row) / 2 for row in flat])
    found[np.isnan(found)] = np.where(few, -np.inf, np.inf)[np.isnan(found)]  # 1.x where values of the tail repeat
    repeats = (flat == 0).sum(axis=1)
    found[varied & np.isinf(found) & (repeats > 4)] = -np.inf
    return torch.as_tensor(found, dtype=log_weights.dtype).reshape(log_weights.shape[1:])


def _per_quantity(name: str, draws: Tensor) -> Tensor:
    array = _array(draws).astype(float)
    flat = array.reshape((*array.shape[:2], -1))
    found = np.full(flat.shape[-1], np.nan)
    if array.shape[1] < 4 or (name == "rhat" and array.shape[0] < 2):  # ArviZ's 0.x logs a warning for each quantity
        return torch.as_tensor(found).reshape(draws.shape[2:])
    varied = np.flatnonzero(np.ptp(flat, axis=(0, 1)) > 0)
    statistic = _statistic(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in varied:
            found[i] = statistic(flat[:, :, i])
    return torch.as_tensor(found).reshape(draws.shape[2:])


def _array(values: Tensor) -> Any:
    return values.detach().cpu().numpy()


def _generation() -> int:
    import arviz

    return int(arviz.__version__.split(".")[0])


def _statistic(name: str) -> Any:
    if _generation() == 0:
        import arviz

        return getattr(arviz, name)
    from arviz_stats.base import array_stats

    return lambda array: float(getattr(array_stats, name)(array, chain_axis=0, draw_axis=1))


def _psis(log_weights: Any) -> Any:
    """Pareto k of each row of `[rows, K]`."""
    return np.asarray([_psis_row(row) for row in log_weights], dtype=float).reshape(-1)


def _psis_row(log_weights: Any) -> float:
    if _generation() == 0:
        import arviz

        return float(arviz.psislw(log_weights)[1])
    from arviz_stats.base import array_stats

    try:
        return float(array_stats.psislw(-log_weights, axis=-1)[1])  # 1.x takes log likelihoods, the negative log weights
    except (ValueError, IndexError):  # fewer than 5 draws in the tail, or all alike: what 0.x calls inf
        return np.inf


def _convert(groups: dict[str, Any], evidence: dict[str, Any], sample_dims: list[str], attributes: dict[str, Any]) -> Any:
    import xarray

    # ArviZ's own converters would give an evidence without dims one of size 1.
    named = {name: ([f"{name}_dim_{i}" for i in range(values.ndim)], values) for name, values in evidence.items()}
    held = xarray.Dataset(named, attrs=attributes)
    if _generation() == 0:
        import arviz

        built = {}
        for group, data in groups.items():
            dims = {name: list(sample_dims) for name in data}
            built[group] = arviz.dict_to_dataset(data, default_dims=[], dims=dims, attrs=attributes)
        if evidence:
            built["evidence"] = held
        return arviz.InferenceData(**built, warn_on_custom_groups=False)
    from arviz_base import from_dict

    tree = from_dict(groups, sample_dims=sample_dims, attrs={"/": attributes, "posterior": attributes})
    if evidence:
        tree["evidence"] = xarray.DataTree(held)
    return tree
