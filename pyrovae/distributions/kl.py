"""Kullback-Leibler divergences of the relaxed and surrogate families: those of the discrete distributions behind them.

Torch's own have NaN gradients where both give a value probability 0; these have none there, and are ∞ where only q does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import register_kl
from torch.nn.functional import softplus

from pyrovae.distributions.parameters import EXACT_SOFTPLUS, bounded
from pyrovae.distributions.relaxed import RelaxedBernoulli, RelaxedOneHotCategorical
from pyrovae.distributions.surrogate import SurrogateBernoulli, SurrogateOneHotCategorical


def _one_hot(p: Any, q: Any) -> Tensor:
    """Σ_k p_k (log p_k − log q_k)."""
    log_p, log_q = bounded(p.logits), bounded(q.logits)
    prob = log_p.exp()
    infinite = (q.logits == -torch.inf) & (prob > 0)
    return (prob * (log_p - log_q)).masked_fill(infinite, torch.inf).sum(-1)


def _bit(p: Any, q: Any) -> Tensor:
    """σ(a) (softplus(−b) − softplus(−a)) + σ(−a) (softplus(b) − softplus(a))."""
    a, b = bounded(p.logits), bounded(q.logits)
    kl = torch.sigmoid(a) * (_softplus(-b) - _softplus(-a)) + torch.sigmoid(-a) * (_softplus(b) - _softplus(a))
    return kl.masked_fill(torch.isinf(q.logits) & (p.logits != q.logits), torch.inf)


def _softplus(x: Tensor) -> Tensor:
    return softplus(x, threshold=EXACT_SOFTPLUS)


for _kl, _ours, _discrete in (
    (_one_hot, (RelaxedOneHotCategorical, SurrogateOneHotCategorical), torch.distributions.OneHotCategorical),
    (_bit, (RelaxedBernoulli, SurrogateBernoulli), torch.distributions.Bernoulli),
):
    for _family in _ours:
        register_kl(_family, _discrete)(_kl)
        register_kl(_discrete, _family)(_kl)
        for _other in _ours:
            register_kl(_family, _other)(_kl)
