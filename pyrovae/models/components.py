"""What a state emits: families p(x | z = k) shared by mixtures and hidden Markov models.

Each has its log probabilities of data under every state, a maximum a posteriori step in closed form from the states'
responsibilities, and the log density of its prior. Priors are told as data seen before: their effect on a closed-form step is
to add these to the counts.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Components(nn.Module, ABC):
    """K distributions of one observation. `event_dim` is 0 for a symbol, 1 for a vector of `width` numbers."""

    capturable: ClassVar[bool] = True
    event_dim: int
    width: int

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""

    @abstractmethod
    def at(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) at states `[...]`."""

    @abstractmethod
    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log p(x | z = k) `[..., K]` of data `[...]` or `[..., width]`."""

    @abstractmethod
    def m_step(self, weights: Tensor, x: Tensor) -> None:
        """Set the parameters to the maximisers of Σ_nk weights_nk log p(x_n | k) + log prior, in closed form.

        Args:
            weights: responsibilities `[N, K]`, not negative.
            x: data `[N]` or `[N, width]`.
        """

    @abstractmethod
    def log_prior(self) -> Tensor:
        """Log density of the parameters' prior up to a constant, 0-d."""

    @abstractmethod
    def possible(self, x: Tensor) -> Tensor:
        """Which observations `[...]` have a log probability, and a gradient of it, that are numbers."""

    @abstractmethod
    def check(self, x: Tensor, seen: Tensor | None = None) -> None:
        """Refuse data `[...]` or `[..., width]` that no component can emit; `seen` `[...]` tells what counts.

        Raises:
            ValueError: saying which.
        """


class CategoricalComponents(Components):
    """Symbols 0 … S − 1: x ~ Cat(softmax(logits_k)), with a Dirichlet(concentration) prior on every row."""

    event_dim = 0

    def __init__(self, components: int, symbols: int, concentration: float) -> None:
        super().__init__()
        self.width, self.concentration = symbols, at_least_one(concentration, "emission_concentration")
        self.logits = nn.Parameter(torch.empty(components, symbols))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the logits from N(0, 1)."""
        self.logits.normal_()

    def at(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z)."""
        return dist.Categorical(logits=self.logits[z])

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log p(x | k), `[..., K]`."""
        return F.embedding(x.long(), torch.log_softmax(self.logits, -1).T)

    @torch.no_grad()
    def m_step(self, weights: Tensor, x: Tensor) -> None:
        """Proportions of the symbols; see :class:`Components`."""
        counts = weights.new_zeros((self.width, weights.shape[-1])).index_add_(0, x.long(), weights).T
        self.logits.copy_(log_proportions(counts, self.concentration, self.logits))

    def log_prior(self) -> Tensor:
        """(concentration − 1) Σ log p, 0-d."""
        return log_dirichlet(self.logits, self.concentration)

    def possible(self, x: Tensor) -> Tensor:
        """Which are symbols."""
        return (x == x.round()) & (x >= 0) & (x < self.width)

    def check(self, x: Tensor, seen: Tensor | None = None) -> None:
        """Refuse what is no symbol; see :class:`Components`."""
        shown = x if seen is None else x[seen]
        if shown.is_floating_point() and not bool((shown == shown.round()).all()):
            raise ValueError("expected symbols, integers from 0, got fractions or NaN")
        if shown.numel() and not 0 <= int(shown.min()) <= int(shown.max()) < self.width:
            raise ValueError(
                f"expected symbols from 0 to {self.width - 1}, got {int(shown.min())} to {int(shown.max())}; build the model "
                "with as many symbols as the data have"
            )


class BernoulliComponents(Components):
    """Independent bits: x_d ~ Bern(σ(logits_kd)), with a Beta(concentration, concentration) prior on every mean."""

    event_dim = 1

    def __init__(self, components: int, visible: int, concentration: float) -> None:
        super().__init__()
        self.width, self.concentration = visible, at_least_one(concentration, "pixel_concentration")
        self.logits = nn.Parameter(torch.empty(components, visible))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the logits from N(0, 1)."""
        self.logits.normal_()

    def at(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z)."""
        return dist.Bernoulli(logits=self.logits[z]).to_event(1)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log p(x | k), `[..., K]`, one matrix product."""
        return x.to(self.logits) @ self.logits.T - F.softplus(self.logits, threshold=40).sum(-1)

    @torch.no_grad()
    def m_step(self, weights: Tensor, x: Tensor) -> None:
        """Means, kept off 0 and 1 by the precision of their dtype; a component without data or prior keeps its own."""
        eps, extra = torch.finfo(self.logits.dtype).eps, self.concentration - 1
        total = weights.sum(0).unsqueeze(-1) + 2 * extra
        mean = (weights.T @ x.to(weights) + extra) / total.clamp_min(eps**2)
        self.logits.copy_(torch.where(total > eps**2, torch.logit(mean.clamp(eps, 1 - eps)), self.logits))

    def log_prior(self) -> Tensor:
        """(concentration − 1) Σ (log μ + log(1 − μ)), 0-d."""
        if self.concentration == 1:
            return self.logits.new_zeros(())
        return (self.concentration - 1) * (F.logsigmoid(self.logits) + F.logsigmoid(-self.logits)).sum()

    def possible(self, x: Tensor) -> Tensor:
        """Which are bits, all of them."""
        return ((x == 0) | (x == 1)).all(-1)

    def check(self, x: Tensor, seen: Tensor | None = None) -> None:
        """Refuse what is no bit; see :class:`Components`."""
        shown = x if seen is None else x[seen]
        if not bool(((shown == 0) | (shown == 1)).all()):
            bad = "NaN" if bool(shown.isnan().any()) else f"values from {float(shown.min()):g} to {float(shown.max()):g}"
            raise ValueError(f"expected x in {{0, 1}} for Bernoulli components, got {bad}; see pyrovae.data.binarize")


def log_proportions(counts: Tensor, concentration: float, present: Tensor) -> Tensor:
    """Log of the proportions that maximise Σ counts log p + (concentration − 1) Σ log p, over the last dim.

    A proportion of 0 becomes the smallest number of its dtype. What is impossible now (−inf) stays so, and a row without
    counts and prior stays as it is.
    """
    possible = present > -torch.inf
    total = (counts + (concentration - 1)) * possible
    whole = total.sum(-1, keepdim=True)
    tiny = torch.finfo(present.dtype).tiny
    found = (total / whole.clamp_min(torch.finfo(total.dtype).tiny)).to(present.dtype).clamp_min(tiny).log()
    return torch.where(possible & (whole > 0), found, present)


def log_dirichlet(logits: Tensor, concentration: float) -> Tensor:
    """(concentration − 1) Σ log softmax(logits), 0-d, over what is possible."""
    if concentration == 1:
        return logits.new_zeros(())
    log_p = torch.log_softmax(logits, -1)
    return (concentration - 1) * torch.where(log_p > -torch.inf, log_p, 0.0).sum()


def at_least_one(concentration: float, name: str) -> float:
    """A concentration whose mode exists.

    Raises:
        ValueError: below 1.
    """
    if not 1 <= concentration < math.inf:
        raise ValueError(f"expected {name} >= 1 (1 is flat), got {concentration}; below 1 the posterior has no maximum")
    return float(concentration)


@torch.no_grad()
def k_means(x: Tensor, clusters: int, *, max_rows: int = 10_000) -> Tensor:
    """Responsibilities of a k-means start, `[N, K]`: 0.9 for a row's own cluster, the rest spread over all; seeded by torch.

    Args:
        x: data `[N, D]`.
        clusters: K.
        max_rows: how many rows, drawn at random, the centres are found from.
    """
    from sklearn.cluster import KMeans

    rows = x.detach().cpu().double().numpy()
    seed = int(torch.randint(2**31 - 1, ()))
    some = rows if len(rows) <= max_rows else rows[torch.randperm(len(rows))[:max_rows].numpy()]
    if len(some) < clusters:
        raise ValueError(f"expected at least as many rows as the {clusters} components, got {len(some)}; pass more data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than clusters
        labels = KMeans(clusters, n_init=1, random_state=seed).fit(some).predict(rows)
    own = F.one_hot(torch.as_tensor(labels, device=x.device).long(), clusters).double()
    return 0.9 * own + 0.1 / clusters
