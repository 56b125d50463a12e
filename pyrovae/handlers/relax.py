"""The relaxed twin of a discrete program, and the discrete twin of a relaxed one.

`relax(program, t)` runs a model or guide with every latent Bernoulli and OneHotCategorical replaced by its
Gumbel-Softmax relaxation, so that pathwise gradients exist; `discretize(program)` goes the other way, so that a program
written with `Relaxed*` sites can be enumerated. A program is wrapped once, before it is given to `SVI` or to a method: a
handler around the call would not reach what runs inside `poutine.block`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.distributions import RelaxedBernoulli, RelaxedOneHotCategorical
from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers.rewrite import (
    Rewrite,
    RewrittenProgram,
    as_temperature,
    read_temperature,
    refuse_other_discrete,
    rewrap,
)

Temperature = float | Tensor | Callable[[], "float | Tensor"]


def relax(
    program: Callable[..., Any],
    temperature: Temperature,
    straight_through: bool = False,  # noqa: FBT001, FBT002
) -> RewrittenProgram:
    """The relaxed twin of a model or guide.

    Every latent Bernoulli becomes a :class:`pyrovae.distributions.RelaxedBernoulli` with the same logits, every latent
    OneHotCategorical a :class:`pyrovae.distributions.RelaxedOneHotCategorical`, also inside `.to_event`, `.mask` and
    `.expand`; batch and event shapes are kept. Observed and continuous sites stay as they are, and so do sites that are
    relaxed already, at their own temperature, and grey levels. A site that is not observed in this call counts as latent: the
    observation of a model called without data is relaxed too, so draw pictures from the discrete program.

    Bias: the relaxed program is another model. With soft values (`straight_through=False`) and `Trace_ELBO`, the ELBO of
    model and guide both relaxed bounds the evidence of the *relaxed* model; it is no bound on the discrete log p(x), and its
    gradient is a biased estimate of that of the discrete ELBO, with less bias and more variance as the temperature falls.
    With soft values and `TraceMeanField_ELBO` the KL is the categorical one (Jang et al.), and the objective bounds nothing.
    With `straight_through=True` values are one-hot and scored by their mass: the objective is the true discrete bound, its
    gradient biased. Report the discrete bound.
    Cost: that of the program.

    *Model and guide must agree.* A density that meets a mass at a site makes no bound. What is relaxed here says so where the
    guide's sites are marked (wrapped by `relax` or `surrogate`, or drawn by a guide of this library), where Pyro's validation
    is on, and else by a look at the values, on the CPU. Stock `SVI` cannot see all: a Normal prior takes the values of a bit
    without a word. `Variational` and `evaluate` refuse every such pair (:func:`pyrovae.handlers.check_measures`).

    Args:
        program: a Pyro program: ours, a `PyroModule`, a plain function; also a guide, whose sites must then meet those of a
            model relaxed at the same sites, in the same way.
        temperature: positive; a float, or a 0-d tensor that is read at every run, so that it may be changed in place, or a
            function without arguments that returns one of them and is called once at every run: with
            `lambda: pyro.param("t", torch.tensor(0.5), constraint=constraints.positive)` it is learned.
        straight_through: draw hard values, whose gradient is that of the soft ones.

    Returns:
        A callable with the program's arguments and the attributes `program` and `temperature`.

    Raises:
        ValueError: if the temperature is not positive and finite; at a run, for a latent that is discrete but neither
            Bernoulli nor OneHotCategorical (an RBM or Boltzmann machine has no relaxed twin), and where one of model and guide
            is relaxed softly and the other straight-through.

    Example:
        >>> import pyro
        >>> def model():
        ...     return pyro.sample("z", dist.Bernoulli(torch.tensor([0.2, 0.7])).to_event(1))
        >>> z = relax(model, 0.5)()
        >>> bool(((0 < z) & (z < 1)).all())
        True

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017)
        https://arxiv.org/abs/1611.01144
        The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
        https://arxiv.org/abs/1611.00712
    """
    return RewrittenProgram(program, _Relaxation(as_temperature(temperature), straight_through=straight_through))


def discretize(program: Callable[..., Any]) -> RewrittenProgram:
    """The discrete twin of a program written with relaxed sites; the inverse of :func:`relax`.

    Every latent RelaxedBernoulli (Pyro's or ours, also straight-through) becomes a Bernoulli with the same logits, every
    latent RelaxedOneHotCategorical a OneHotCategorical; everything else stays. Exact, at the cost of the program.

    Args:
        program: a Pyro program.

    Returns:
        A callable with the program's arguments and the attribute `program`.

    Example:
        >>> import pyro
        >>> def model():
        ...     return pyro.sample("z", dist.RelaxedBernoulli(torch.tensor(0.5), logits=torch.zeros(3)).to_event(1))
        >>> z = discretize(model)()
        >>> bool(((z == 0) | (z == 1)).all())
        True
    """
    return RewrittenProgram(program, _Discretization())


class RelaxReparam(Reparam):
    """The relaxation of single sites, for `poutine.reparam`.

    The site keeps its name and stays a latent, so that it works on models and on hand-written guides; bias as in
    :func:`relax`. Observed and continuous sites stay as they are. Pyro lets a reparameterisation leave no mark at a site: that
    model and guide agree is checked only while Pyro's validation is on, and by `Variational` and `evaluate`.

    Args:
        temperature: positive; as for :func:`relax`.
        straight_through: draw hard values, whose gradient is that of the soft ones.

    Raises:
        ValueError: if the temperature is not positive and finite; at a run, for another discrete site.

    Example:
        >>> import pyro
        >>> from pyro import poutine
        >>> def model():
        ...     return pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3)))
        >>> z = poutine.reparam(model, config={"z": RelaxReparam(0.5)})()
        >>> bool((z < 1).all())
        True
    """

    def __init__(
        self,
        temperature: Temperature,
        straight_through: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        self.temperature = as_temperature(temperature)
        self.straight_through = straight_through

    def apply(self, msg: Any) -> Any:
        """The message with the relaxed distribution."""
        if msg["is_observed"]:
            return msg
        change = _Relaxer(read_temperature(self.temperature), straight_through=self.straight_through)
        return {**msg, "fn": rewrap(msg["fn"], lambda fn: change(msg["name"], fn))}


class _Relaxation:
    def __init__(self, temperature: Any, *, straight_through: bool) -> None:
        self.temperature, self.straight_through = temperature, straight_through

    def handler(self) -> Messenger:
        change = _Relaxer(read_temperature(self.temperature), straight_through=self.straight_through)
        return Rewrite(change, "hard" if self.straight_through else "soft")


class _Discretization:
    def handler(self) -> Messenger:
        return Rewrite(_discrete, "hard")


class _Relaxer:
    """Bernoulli and OneHotCategorical to their relaxations at one temperature."""

    def __init__(self, temperature: Tensor, *, straight_through: bool) -> None:
        self.temperature, self.straight_through = temperature, straight_through

    def __call__(self, name: str, fn: Any) -> Any:
        family: Any
        if isinstance(fn, torch.distributions.Bernoulli):
            family = RelaxedBernoulli
        elif isinstance(fn, torch.distributions.OneHotCategorical):
            family = RelaxedOneHotCategorical
        elif isinstance(fn, (RelaxedBernoulli, RelaxedOneHotCategorical)):
            return fn
        elif isinstance(fn, Undirected):
            raise ValueError(
                f"expected Bernoulli or OneHotCategorical latents for relax, got the {type(fn).__name__} site {name!r}, which "
                "has no relaxed twin; keep its values hard, with pyrovae.handlers.surrogate (Variational(surrogate=...)) or "
                "the score function (Trace_ELBO), and where it is the observation, pass data"
            )
        else:
            refuse_other_discrete(name, fn, "relax")
            return fn
        t, hard, check = self.temperature, self.straight_through, fn._validate_args
        try:
            return family(t, logits=fn.logits, straight_through=hard, validate_args=check)
        except ValueError as error:
            raise ValueError(f"at site {name!r}: {error}") from error


def _discrete(_: str, fn: Any) -> Any:
    if isinstance(fn, torch.distributions.RelaxedBernoulli):
        return dist.Bernoulli(logits=fn.logits)
    if isinstance(fn, torch.distributions.RelaxedOneHotCategorical):
        return dist.OneHotCategorical(logits=fn.logits)
    return fn
