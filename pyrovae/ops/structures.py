"""What a model may declare of itself, so that a method can take a fast route instead of the generic one.

A model declares a structure by a method that returns one of these records: `layers()`, `factorial_code(*args)` or
`chain(*args)`. Methods ask for the record (:func:`pyrovae.handlers.declared`), never for the model's class, and the generic
route through the program stays the oracle of the fast one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SigmoidLayers:
    """A belief net of binary layers over binary data, with independent units or an RBM on top.

    p(h_l | h_{l+1}) = Bern(σ(biases[l] + h_{l+1} weights[l])), where h_0 is the first argument of the program, `[B, D]`. The
    top layer h_L has p(h_L) = Bern(σ(top_bias)), or, with `top_weight`, it is the visible side of an RBM whose hidden side is
    summed out: log p(h_L) = h_L · top_bias + Σ_j softplus(top_hidden_bias + h_L top_weight)_j − log Z.

    Attributes:
        sites: the latent sites from the data upwards, `(h_1, …, h_L)`.
        weights: `weights[l]` is `[units of h_{l+1}, units of h_l]`, from the data upwards.
        biases: `biases[l]` is `[units of h_l]`.
        top_bias: `[units of h_L]`.
        top_weight: None, or `[units of h_L, T]`.
        top_hidden_bias: None, or `[T]`.
    """

    sites: tuple[str, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    top_bias: Tensor
    top_weight: Tensor | None = None
    top_hidden_bias: Tensor | None = None


@dataclass(frozen=True)
class FactorialCode:
    """A latent vector of bits that are independent given the data, and the evidence of the data.

    Attributes:
        site: the latent site.
        logits: of p(h = 1 | x), `[B, H]`.
        log_evidence: a function that returns log p(x) `[B]`, differentiable in the model's parameters: it may cost far more
            than the logits, or be out of reach.
        num_states: states that its normaliser sums over.
    """

    site: str
    logits: Tensor
    log_evidence: Callable[[], Tensor]
    num_states: int = 0


@dataclass(frozen=True)
class Chain:
    """A latent Markov chain of states 0 … K − 1, each of which alone emits what is seen at its time.

    Attributes:
        site: the latent site, integers `[B, L]`.
        log_initial: log p(z_1), `[K]`.
        log_transition: log p(z_{t+1} = column | z_t = row), `[K, K]`.
        log_likelihood: log p(x_t | z_t = k), `[B, L, K]`.
        lengths: how many times of each sequence were seen, `[B]`; None for all. States beyond follow the chain unseen.
    """

    site: str
    log_initial: Tensor
    log_transition: Tensor
    log_likelihood: Tensor
    lengths: Tensor | None = None
