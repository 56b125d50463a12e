"""Hidden Markov models."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from pyrovae.distributions import MarkovChain
from pyrovae.handlers import Module, own_params
from pyrovae.models.components import (
    BernoulliComponents,
    CategoricalComponents,
    Components,
    at_least_one,
    k_means,
    log_dirichlet,
    log_proportions,
)
from pyrovae.models.gaussian_components import Covariance, GaussianComponents
from pyrovae.models.mixture import check_sizes
from pyrovae.models.program import data_plate
from pyrovae.ops import Chain
from pyrovae.ops.tracing import capturing

Emission = Literal["categorical", "bernoulli", "gaussian"]


class HiddenMarkovModel(Module):
    """z_1 ~ Cat(π), z_{t+1} ~ Cat(A[z_t]), x_t ~ p(x | z_t): sequences, of unequal lengths if need be.

    Sites: `"z"`, integers `[B, L]` from a :class:`pyrovae.distributions.MarkovChain`, and `"x"`, in the plate `"data"` at dim
    −1. The model declares its chain: `Exact` and `ExactLikelihood` run forward-backward, O(B L K²) instead of K^L, and EM has
    closed forms (`m_step`), so that `EM().fit(model, x, lengths)` is the Baum-Welch algorithm.

    With many sequences an iteration of EM takes less time than hmmlearn's compiled loop; with one long sequence it takes a few
    times as long. A transition of probability 0 (logit −inf) stays 0 in EM. A state that is never visited keeps its row of A.

    Args:
        num_states: number of states K.
        visible: number of symbols for categorical emissions, of which one is seen at each time; else the width D of x_t.
        emission: "categorical" (x `[B, L]`, integers), "bernoulli" or "gaussian" (x `[B, L, D]`).
        length: of sequences drawn without data.
        covariance: of Gaussian emissions.
        concentration: of the symmetric Dirichlet priors on π and on each row of A; 1 is flat.
        emission_concentration: of the Dirichlet prior on each state's symbols, or the Beta prior on its bits; 1 is flat.
        prior_count: of Gaussian emissions, see :class:`pyrovae.models.GaussianMixture`.
        prior_variance: likewise.

    Raises:
        ValueError: for sizes or concentrations below 1, an unknown emission or covariance, negative numbers.

    Example:
        >>> from pyrovae.inference import EM
        >>> model = HiddenMarkovModel(2, 3, length=6)
        >>> x = model.sample(20)
        >>> fit = EM(num_iterations=3).fit(model, x)
        >>> fit.bound
        'exact'

    References:
        A maximization technique occurring in the statistical analysis of probabilistic functions of Markov chains
        (Baum et al., 1970)
        https://doi.org/10.1214/aoms/1177697196
        A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition (Rabiner, 1989)
        https://doi.org/10.1109/5.18626
    """

    capturable: ClassVar[bool] = True

    def __init__(
        self,
        num_states: int,
        visible: int,
        *,
        emission: Emission = "categorical",
        length: int = 10,
        covariance: Covariance = "diagonal",
        concentration: float = 1.0,
        emission_concentration: float = 1.0,
        prior_count: float = 1.0,
        prior_variance: float = 0.01,
    ) -> None:
        super().__init__()
        check_sizes(visible, num_states)
        self.length = _checked_length(length)
        self.concentration = at_least_one(concentration, "concentration")
        self.initial = nn.Parameter(torch.empty(num_states))
        self.transition = nn.Parameter(torch.empty(num_states, num_states))
        if emission == "categorical":
            self.emission: Components = CategoricalComponents(num_states, visible, emission_concentration)
        elif emission == "bernoulli":
            self.emission = BernoulliComponents(num_states, visible, emission_concentration)
        elif emission == "gaussian":
            self.emission = GaussianComponents(num_states, visible, covariance, prior_count, prior_variance)
        else:
            raise ValueError(f'expected emission in "categorical", "bernoulli", "gaussian", got {emission!r}')
        self._config = {
            "num_states": num_states,
            "visible": visible,
            "emission": emission,
            "length": length,
            "covariance": covariance,
            "concentration": float(concentration),
            "emission_concentration": float(emission_concentration),
            "prior_count": float(prior_count),
            "prior_variance": float(prior_variance),
        }
        self.reset_parameters()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON."""
        return dict(self._config)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all logits and means from N(0, 1)."""
        self.initial.normal_()
        self.transition.normal_()
        self.emission.reset_parameters()

    @torch.no_grad()
    def initialize(self, x: Tensor, lengths: Tensor | None = None) -> None:
        """Start from the data; seeded by torch.

        Vectors: the states are k-means clusters of all seen times, and the chain that of their transitions. Symbols: every
        state emits their overall frequencies, jittered, and the chain is jittered about a uniform one.

        Args:
            x: data, as in the program.
            lengths: seen times of each sequence, `[B]`.

        Raises:
            ValueError: as the program does, and for fewer seen times than states.
        """
        seen = self._seen(x, lengths)
        self.emission.check(x, seen)
        states, rows = len(self.initial), x[seen]
        if self.emission.event_dim == 0:
            self.initial.normal_().mul_(0.1)
            self.transition.normal_().mul_(0.1)
            self.emission.m_step(torch.ones(len(rows), states, dtype=torch.double, device=x.device), rows)
            for logits in self.emission.parameters():
                logits.add_(torch.randn_like(logits))
            return
        clusters = k_means(rows, states)
        self.emission.m_step(clusters, rows)
        path = clusters.new_zeros((*x.shape[:2], states))
        path[seen] = clusters
        pairs = path[:, :-1].flatten(0, 1).T @ path[:, 1:].flatten(0, 1)
        self.initial.copy_(((path[:, 0].sum(0) + 1) / (len(x) + states)).log())
        self.transition.copy_(((pairs + 1) / (pairs.sum(-1, keepdim=True) + states)).log())

    initialize_bias = initialize

    def forward(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        batch_size: int = 1,
        length: int | None = None,
        index: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """Run the program.

        Args:
            x: data, `[B, L]` symbols or `[B, L, D]`; None draws from the prior. What lies beyond a sequence's length does
                not count. Where it could not be seen (NaN, −1), the site `"x"` has the first symbol or vector there, and
                for the rest `x` itself.
            lengths: seen times of each sequence, `[B]`, from 1 to L; None for all. States beyond follow the chain unseen.
            batch_size: rows to draw where `x` is None.
            length: times to draw where `x` is None; by default the model's.
            index: row numbers `[B]` of a minibatch in the data set.
            num_data: the size of that data set.

        Returns:
            The observation, like `x`.

        Raises:
            ValueError: if `x` has another shape, is empty, or has other values than the emission; for lengths outside 1 … L.
        """
        seen = None
        if x is not None:
            seen = self._seen(x, lengths)
            if is_validation_enabled():
                self.emission.check(x, seen)
            x = self._filled(x, seen)
            if index is not None and len(index) != len(x):
                raise ValueError(f"expected index [B] and x with as many rows, got {len(index)} and {len(x)}")
        rows = batch_size if x is None else len(x)
        times = x.shape[1] if x is not None else self.length if length is None else _checked_length(length)
        with data_plate(None, 0, batch_size=rows, index=index, num_data=num_data):
            chain = MarkovChain(length=times, initial_logits=self.initial, transition_logits=self.transition)
            z = pyro.sample("z", chain)
            emission = self.emission.at(z)
            if lengths is not None and seen is not None:
                emission = _masked(emission, seen)
            return pyro.sample("x", emission.to_event(1), obs=x)

    def chain(self, x: Tensor | None = None, lengths: Tensor | None = None, **_: Any) -> Chain | None:
        """What Exact needs to know to run forward-backward: the chain, and what its states say of the data."""
        if x is None:
            return None
        if lengths is not None:
            x = self._filled(x, self._seen(x, lengths))
        log_initial, log_transition = torch.log_softmax(self.initial, -1), torch.log_softmax(self.transition, -1)
        log_likelihood = self.emission.log_likelihood(x.transpose(0, 1)).transpose(0, 1)  # times first in memory
        return Chain("z", log_initial, log_transition, log_likelihood, lengths)

    @torch.no_grad()
    def sample(self, n: int, *, length: int | None = None) -> Tensor:
        """`n` sequences from the model, `[n, length]` or `[n, length, D]`."""
        with pyro.poutine.block():
            return own_params(self)(batch_size=n, length=length)

    @torch.no_grad()
    def m_step(self, posterior: Any, x: Tensor, lengths: Tensor | None = None) -> None:
        """Set the parameters to their maximisers of E_q[log p(x, z)] + log prior, over seen times.

        Args:
            posterior: needs `marginals["z"]` `[B, L, K]`, and `expected_counts` (first states `[K]` and transitions
                `[K, K]`); without these, as for Gibbs, their expectation is asked for.
            x: data, as in the program.
            lengths: likewise.
        """
        weights = posterior.marginals["z"].double()  # [B, L, K]
        seen = None if lengths is None else self._seen(x, lengths)
        counts = getattr(posterior, "expected_counts", None)
        if counts is None:
            counts = _expected_counts(posterior, weights, seen)
        initial, transition = counts
        self.initial.copy_(log_proportions(initial, self.concentration, self.initial))
        self.transition.copy_(log_proportions(transition, self.concentration, self.transition))
        if seen is None:
            self.emission.m_step(weights.transpose(0, 1).flatten(0, 1), x.transpose(0, 1).flatten(0, 1))
        else:
            self.emission.m_step(weights[seen], x[seen])

    def log_prior(self) -> Tensor:
        """Log density of the priors, up to a constant; 0-d."""
        chain = log_dirichlet(self.initial, self.concentration) + log_dirichlet(self.transition, self.concentration)
        return chain + self.emission.log_prior()

    def _filled(self, x: Tensor, seen: Tensor) -> Tensor:
        """The data; a copy only for another dtype, or where padding, though masked, would spoil gradients."""
        x = x if self.emission.event_dim == 0 else x.to(self.initial)
        spoilt = ~(seen | self.emission.possible(x))
        if not capturing() and not bool(spoilt.any()):
            return x
        return torch.where(spoilt if self.emission.event_dim == 0 else spoilt.unsqueeze(-1), x[:1, :1], x)

    def _seen(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Which times of which sequences count, `[B, L]`."""
        dims = 2 + self.emission.event_dim
        width = ", ".join(["B", "L", str(self.emission.width)][:dims])
        if x.dim() != dims or 0 in x.shape or (dims == 3 and x.shape[-1] != self.emission.width):
            raise ValueError(f"expected data [{width}] with at least one row and one time, got {list(x.shape)}")
        if lengths is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if lengths.shape != x.shape[:1] or lengths.is_floating_point():
            raise ValueError(f"expected lengths as integers [{len(x)}], got {lengths.dtype} {list(lengths.shape)}")
        if not capturing() and not bool(((lengths >= 1) & (lengths <= x.shape[1])).all()):
            raise ValueError(
                f"expected lengths from 1 to {x.shape[1]}, got {int(lengths.min())} to {int(lengths.max())}; drop empty "
                "sequences, and pad x to the longest"
            )
        return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)


def _masked(emission: dist.TorchDistribution, seen: Tensor) -> dist.TorchDistribution:
    """Emissions of which only seen times count; the mask stands inside `.to_event`."""
    if not isinstance(emission, dist.Independent):
        return dist.MaskedDistribution(emission, seen)
    return dist.MaskedDistribution(emission.base_dist, seen.unsqueeze(-1)).to_event(1)


def _expected_counts(posterior: Any, marginals: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Expected first states and transitions between seen times, from a posterior that does not gather them itself."""
    states = marginals.shape[-1]

    def transitions(z: dict[str, Tensor]) -> Tensor:
        path = z["z"].long()  # [S, B, L]
        pairs = path[..., :-1] * states + path[..., 1:]
        both = torch.ones_like(pairs) if seen is None else seen[:, 1:].long().expand(pairs.shape)
        counts = marginals.new_zeros((*pairs.shape[:-1], states * states))
        return counts.scatter_add_(-1, pairs, both.to(counts))

    expected, _ = posterior.expectation(transitions)
    return marginals[:, 0].sum(0), expected.sum(0).reshape(states, states).to(marginals)


def _checked_length(length: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"expected a length >= 1, got {length!r}")
    return length
