"""Kullback-Leibler divergences of the relaxed families: those of the discrete distributions behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import register_kl
from torch.nn.functional import softplus

from pyrovae.distributions.parameters import EXACT_SOFTPLUS
from pyrovae.distributions.relaxed import RelaxedBernoulli, RelaxedOneHotCategorical


def _one_hot(p: Any, q: Any) -> Tensor:
    """Σ_k p_k (log p_k − log q_k)."""
    log_p, log_q = p.logits, q.logits
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _bit(p: Any, q: Any) -> Tensor:
    """σ(a) (a − b) − softplus(a) + softplus(b)."""
    a, b = p.logits, q.logits
    return torch.sigmoid(a) * (a - b) - softplus(a, threshold=EXACT_SOFTPLUS) + softplus(b, threshold=EXACT_SOFTPLUS)


for _ours, _discrete, _kl in (
    (RelaxedOneHotCategorical, torch.distributions.OneHotCategorical, _one_hot),
    (RelaxedBernoulli, torch.distributions.Bernoulli, _bit),
):
    register_kl(_ours, _ours)(_kl)
    register_kl(_ours, _discrete)(_kl)
    register_kl(_discrete, _ours)(_kl)
