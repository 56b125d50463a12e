"""Hard samples with a surrogate gradient: ReinMax and straight-through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.distributions import SurrogateBernoulli, SurrogateOneHotCategorical
from pyrovae.distributions.surrogate import Estimator, check_estimator
from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers.rewrite import Rewrite, RewrittenProgram, as_temperature, read_temperature, refuse_other_discrete


def surrogate(
    program: Callable[..., Any],
    estimator: Estimator = "reinmax",
    temperature: float | Tensor | Callable[[], float | Tensor] = 1.0,
) -> RewrittenProgram:
    """A model or guide whose discrete latents are drawn as ever, with the gradient of a surrogate.

    Every latent Bernoulli becomes a :class:`pyrovae.distributions.SurrogateBernoulli`, every latent OneHotCategorical a
    :class:`pyrovae.distributions.SurrogateOneHotCategorical`. Values, log probabilities and KLs are those of the program,
    so that the objective is its discrete bound; only the gradient is an estimate.

    An RBM or Boltzmann machine stays as it is: as a prior, it passes the gradient of −F(z), taken at the hard z as if z were
    real, on to the draw of the guide. That of a Boltzmann machine is linear in each unit, which adds no bias where the guide's
    bits are independent; an RBM's softplus adds one, under ReinMax of third order in its weights. In a guide, such a site is
    left to the score function.

    Wrap **model and guide**: log p(z) of a stock OneHotCategorical does not depend on z differentiably, so that with the
    guide alone wrapped the prior's part of the gradient is silently missing under `Trace_ELBO`.

    Bias: small, see the families; none for objectives that are quadratic in each latent (ReinMax, temperature 1).
    Cost: that of the program; one backward pass.

    Args:
        program: a Pyro program; also a guide.
        estimator: "reinmax" or "straight_through".
        temperature: of the surrogate; a float, a 0-d tensor read at every run, or a function that returns one. ReinMax
            wants 1 or more.

    Returns:
        A callable with the program's arguments and the attributes `program` and `temperature`.

    Raises:
        ValueError: for another estimator or a bad temperature; at a run, for a latent that is discrete but neither Bernoulli
            nor OneHotCategorical nor an RBM or Boltzmann machine.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> z = surrogate(lambda: pyro.sample("z", dist.OneHotCategorical(logits=logits)))()
        >>> float(z.detach().sum()), z.requires_grad
        (1.0, True)

    References:
        Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu, Dong, Liu, Yu, Gao, 2023)
        https://arxiv.org/abs/2304.08612
        Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation (Bengio, Léonard,
        Courville, 2013)
        https://arxiv.org/abs/1308.3432
    """
    check_estimator(estimator)
    checked = as_temperature(temperature)
    return RewrittenProgram(program, _Surrogates(estimator, temperature if isinstance(temperature, int | float) else checked))


class _Surrogates:
    def __init__(self, estimator: Estimator, temperature: Any) -> None:
        self.estimator, self.temperature = estimator, temperature

    def handler(self) -> Messenger:
        t = self.temperature
        return Rewrite(_Change(self.estimator, t if isinstance(t, int | float) else read_temperature(t)), "hard")


class _Change:
    def __init__(self, estimator: Estimator, temperature: float | Tensor) -> None:
        self.estimator, self.temperature = estimator, temperature

    def __call__(self, name: str, fn: Any) -> Any:
        if isinstance(fn, torch.distributions.Bernoulli):
            return SurrogateBernoulli(fn.logits, self.estimator, self.temperature, validate_args=fn._validate_args)
        if isinstance(fn, torch.distributions.OneHotCategorical):
            return SurrogateOneHotCategorical(fn.logits, self.estimator, self.temperature, validate_args=fn._validate_args)
        if not isinstance(fn, (torch.distributions.RelaxedBernoulli, torch.distributions.RelaxedOneHotCategorical, Undirected)):
            refuse_other_discrete(name, fn, "surrogate")
        return fn
