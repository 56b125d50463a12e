"""Families of models that `pyrovae compare` knows: how one is built, and which methods learn it and infer with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro.infer
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

from pyrovae.guides import AmortizedMeanField, AmortizedStructured, LocalMeanField
from pyrovae.inference import (
    AIS,
    EM,
    ContrastiveDivergence,
    Exact,
    ExactLikelihood,
    Fit,
    Gibbs,
    GreedyPretraining,
    Importance,
    MeanField,
    ParallelTempering,
    SaulJaakkolaJordan,
    UpDown,
    Variational,
    WakeSleep,
)
from pyrovae.models import (
    BernoulliMixture,
    BoltzmannMachine,
    DeepBeliefNet,
    HiddenMarkovModel,
    RestrictedBoltzmannMachine,
    SigmoidBeliefNet,
)

BATCH_SIZE = 128


@dataclass(frozen=True)
class Task:
    """What a method is made for.

    Attributes:
        model: the program.
        rows: of the data that it will see.
        budget: multiplies numbers of steps, iterations and draws.
        penalty: the precision of the Gaussian prior on parameters.
    """

    model: Any
    rows: int
    budget: float
    penalty: float = 0.0

    def times(self, count: int, least: int = 2) -> int:
        """A number of steps within the budget."""
        return max(least, round(count * self.budget))

    @property
    def draws(self) -> int:
        """A number of draws within the budget."""
        return self.times(1000, 50)

    @property
    def batch_size(self) -> int:
        """Rows of a minibatch."""
        return min(BATCH_SIZE, self.rows)


Make = Callable[[Task], Any]
MakeGuided = Callable[[Task, Any], Any]
MakeGuide = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model, and what can be done with it.

    Attributes:
        title: in words.
        sizes: what the numbers of `--hidden` count.
        layers: the least and the greatest number of them.
        hidden: their default.
        data: the default data set.
        build: a model for training data, from the sizes and the data.
        learners: by name.
        inferers: by name.
        guided: inference methods that take a trained guide, by name.
        guide: an amortised guide of a model, where `guided` has methods.
        reference: the learner whose objective is the exact likelihood, and whose net is inferred on.
        approximate: the learner whose net is inferred on where `reference` does not fit.
        enumerating: methods that sum over joint states.
        arranged: brings rows `[N, D]` to what the program takes; None leaves them.
        penalty: the default precision.
        takes_penalty: False where the model's own priors take its place.
    """

    title: str
    sizes: str
    layers: tuple[int, int]
    hidden: tuple[int, ...]
    data: str
    build: Callable[[tuple[int, ...], Tensor], Any]
    learners: Mapping[str, Make]
    inferers: Mapping[str, Make]
    guided: Mapping[str, MakeGuided]
    guide: Callable[[Any], Any] | None
    reference: str
    approximate: str
    enumerating: frozenset[str]
    arranged: Callable[[Tensor], Tensor] | None = None
    penalty: float = 0.1
    takes_penalty: bool = True

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of all methods, learners first."""
        return (*self.learners, *self.inferers, *self.guided)


def falling(rate: float, steps: int) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Adam whose rate falls to 3% of its start over the steps."""
    return partial(ClippedAdam, lr=rate, lrd=0.03 ** (1 / steps), clip_norm=math.inf)


def _stochastic(task: Task, guide: Any, elbo: Any, steps: int, rate: float, **options: Any) -> Variational:
    steps = task.times(steps, 20)
    return Variational(
        guide,
        elbo,
        num_steps=steps,
        batch_size=task.batch_size,
        optim=falling(rate, steps),
        penalty=task.penalty,
        **options,
    )


def _exact_em(task: Task) -> EM:
    return EM(Exact(), task.times(60), penalty=task.penalty)


def _exact_gradient(task: Task, rate: float = 0.2) -> Variational:
    return _stochastic(task, None, ExactLikelihood(), 1000, rate)


def _monte_carlo_em(task: Task) -> EM:
    return EM(Gibbs(10, 1, 5), task.times(40), penalty=task.penalty)


def _variational_em(task: Task) -> EM:
    return EM(MeanField(1), task.times(30), penalty=task.penalty)


def _score_function(task: Task, guide: MakeGuide = AmortizedMeanField) -> Variational:
    return _stochastic(task, guide(task.model), None, 2500, 0.03)


def _relaxation(task: Task) -> Variational:
    return _stochastic(task, AmortizedMeanField(task.model), pyro.infer.Trace_ELBO(), 2500, 0.03, temperature=0.5)


def _wake_sleep(task: Task, guide: MakeGuide = AmortizedMeanField) -> WakeSleep:
    steps = task.times(2500, 20)
    return WakeSleep(
        guide(task.model), num_steps=steps, batch_size=task.batch_size, optim=falling(0.03, steps), penalty=task.penalty
    )


class _InTurn:
    """Two learning methods one after the other, as one."""

    def __init__(self, first: Any, then: Any) -> None:
        self.first, self.then = first, then
        self.guide = self.then.guide  # which both learn

    def fit(self, model: Any, *args: Any) -> Fit:
        first, then = self.first.fit(model, *args), self.then.fit(model, *args)
        last = first.history[-1]
        later = tuple(
            {**record, "step": record["step"] + last["step"], "seconds": record["seconds"] + first.seconds}
            for record in then.history
        )
        return replace(
            then,
            history=first.history + later,
            seconds=first.seconds + then.seconds,
            model_evaluations=first.model_evaluations + then.model_evaluations,
        )


def _greedy(task: Task, guide: Any = None) -> GreedyPretraining:
    sizes = task.model.sizes
    enumerable = all(units <= 16 for units in sizes[1:-1]) and min(sizes[:2]) <= 16
    return GreedyPretraining(guide, None if enumerable else _contrastive(task, 1), num_iterations=task.times(300))


def _up_down(task: Task) -> _InTurn:
    guide, steps = AmortizedStructured(task.model), task.times(2000, 20)
    fine = UpDown(guide, num_steps=steps, batch_size=task.batch_size, optim=falling(0.003, steps), penalty=task.penalty)
    return _InTurn(_greedy(task, guide), fine)


def _gibbs(task: Task) -> Gibbs:
    return Gibbs(2 * task.draws, 4, max(10, task.draws // 5))


def _local_vi(task: Task) -> Variational:
    steps = task.times(1500, 20)
    return Variational(
        LocalMeanField(task.model, task.rows), num_guide_steps=steps, optim=falling(0.2, steps), num_samples=task.draws
    )


def _amortised_vi(task: Task, guide: Any) -> Variational:
    return Variational(guide, num_samples=task.draws)


def _importance(task: Task, guide: Any) -> Importance:
    return Importance(guide, task.draws)


def _posterior_ais(task: Task) -> AIS:
    return AIS(20, task.times(100, 10))


def _partition_ais(task: Task) -> AIS:
    return AIS(100, task.times(2000, 50))


def _contrastive(task: Task, k: int, **options: Any) -> ContrastiveDivergence:
    batch_size, steps = min(32, task.rows), task.times(3000, 20)  # one schedule, so that the phases alone differ
    return ContrastiveDivergence(
        k,
        num_steps=steps,
        batch_size=batch_size,
        optim=partial(torch.optim.SGD, lr=0.5),
        scheduler=partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.02, total_iters=steps),
        penalty=task.penalty,
        log_rows=task.rows,
        exact_bits=20,
        **options,
    )


def _tempered(task: Task) -> ContrastiveDivergence:
    return _contrastive(task, 1, negative=ParallelTempering(10, 20))


GUIDED: Mapping[str, MakeGuided] = {"amortised VI": _amortised_vi, "importance": _importance}
CONTRASTIVE: Mapping[str, Make] = {
    "exact gradient": partial(_contrastive, k=1, negative="exact"),
    "CD-1": partial(_contrastive, k=1, persistent=False),
    "PCD-1": partial(_contrastive, k=1),
    "PCD-10": partial(_contrastive, k=10),
    "tempering": _tempered,
}


def _with_bias(model: Any, x: Tensor) -> Any:
    model.initialize_bias(x)
    return model


def _started(model: Any, x: Tensor) -> Any:
    model.initialize(x)
    return model


def _rows_of_pixels(x: Tensor) -> Tensor:
    """Square images `[N, D]` as sequences of their rows `[N, √D, √D]`; others as sequences of pixels `[N, D, 1]`."""
    side = math.isqrt(x.shape[1])
    return x.reshape(len(x), side, side) if side**2 == x.shape[1] else x.unsqueeze(-1)


FAMILIES: Mapping[str, Family] = {
    "sbn": Family(
        title="Sigmoid belief net",
        sizes="hidden units of each layer from the data upwards",
        layers=(1, 9),
        hidden=(8,),
        data="digits",
        build=lambda hidden, x: SigmoidBeliefNet(x.shape[1], list(hidden)),
        learners={
            "exact EM": _exact_em,
            "exact gradient": _exact_gradient,
            "Monte-Carlo EM": _monte_carlo_em,
            "variational EM": _variational_em,
            "wake-sleep": _wake_sleep,
            "score function": _score_function,
            "relaxation": _relaxation,
        },
        inferers={
            "exact": lambda task: Exact(),
            "Gibbs": _gibbs,
            "mean field": lambda task: MeanField(),
            "Saul-Jaakkola-Jordan": lambda task: SaulJaakkolaJordan(),
            "local VI": _local_vi,
            "AIS": _posterior_ais,
        },
        guided=GUIDED,
        guide=AmortizedMeanField,
        reference="exact EM",
        approximate="relaxation",
        enumerating=frozenset({"exact EM", "exact gradient", "variational EM", "exact", "mean field"}),
    ),
    "dbn": Family(
        title="Deep belief net",
        sizes="hidden units of each layer from the data upwards, the last two an RBM",
        layers=(2, 9),
        hidden=(8, 16),
        data="digits",
        build=lambda hidden, x: _with_bias(DeepBeliefNet(x.shape[1], list(hidden)), x),
        learners={
            "exact gradient": partial(_exact_gradient, rate=0.3),
            "Monte-Carlo EM": _monte_carlo_em,
            "greedy": _greedy,
            "up-down": _up_down,
            "wake-sleep": partial(_wake_sleep, guide=AmortizedStructured),
            "score function": partial(_score_function, guide=AmortizedStructured),
        },
        inferers={
            "exact": lambda task: Exact(),
            "Gibbs": _gibbs,
            "mean field": lambda task: MeanField(),
            "Saul-Jaakkola-Jordan": lambda task: SaulJaakkolaJordan(),
            "AIS": _posterior_ais,
        },
        guided=GUIDED,
        guide=AmortizedStructured,
        reference="exact gradient",
        approximate="greedy",
        enumerating=frozenset(
            {"exact gradient", "Monte-Carlo EM", "exact", "Gibbs", "mean field", "Saul-Jaakkola-Jordan", "AIS", *GUIDED}
        ),
    ),
    "rbm": Family(
        title="Restricted Boltzmann machine",
        sizes="hidden units",
        layers=(1, 1),
        hidden=(12,),
        data="digits",
        build=lambda hidden, x: _with_bias(RestrictedBoltzmannMachine(x.shape[1], hidden[0], max_bits=20), x),
        learners=CONTRASTIVE,
        inferers={"exact": lambda task: Exact(), "Gibbs": _gibbs, "AIS": _partition_ais},
        guided={},
        guide=None,
        reference="exact gradient",
        approximate="PCD-10",
        enumerating=frozenset({"exact gradient", "exact"}),
    ),
    "bm": Family(
        title="Boltzmann machine",
        sizes="hidden units",
        layers=(1, 1),
        hidden=(2,),
        data="bars_and_stripes",
        build=lambda hidden, x: _with_bias(BoltzmannMachine(x.shape[1], hidden[0], max_bits=20), x),
        learners={name: make for name, make in CONTRASTIVE.items() if name != "tempering"},
        inferers={
            "exact": lambda task: Exact(),
            "Gibbs": _gibbs,
            "mean field": lambda task: MeanField(),
            "AIS": _partition_ais,
        },
        guided={},
        guide=None,
        reference="exact gradient",
        approximate="PCD-10",
        enumerating=frozenset({"exact gradient", "exact", "mean field"}),
    ),
    "mixture": Family(
        title="Mixture of Bernoullis",
        sizes="components",
        layers=(1, 1),
        hidden=(10,),
        data="digits",
        build=lambda hidden, x: _started(BernoulliMixture(x.shape[1], hidden[0]), x),
        learners={
            "exact EM": _exact_em,
            "exact gradient": partial(_exact_gradient, rate=0.1),
            "Monte-Carlo EM": _monte_carlo_em,
            "score function": _score_function,
        },
        inferers={"exact": lambda task: Exact(), "Gibbs": _gibbs, "local VI": _local_vi, "AIS": _posterior_ais},
        guided=GUIDED,
        guide=AmortizedMeanField,
        reference="exact EM",
        approximate="score function",
        enumerating=frozenset({"exact EM", "exact gradient", "exact"}),
        penalty=0.0,
        takes_penalty=False,
    ),
    "hmm": Family(
        title="Hidden Markov model",
        sizes="states",
        layers=(1, 1),
        hidden=(6,),
        data="digits",
        build=lambda hidden, x: _started(HiddenMarkovModel(hidden[0], x.shape[2], emission="bernoulli", length=x.shape[1]), x),
        learners={
            "exact EM": _exact_em,
            "exact gradient": partial(_exact_gradient, rate=0.1),
            "Monte-Carlo EM": _monte_carlo_em,
        },
        inferers={"exact": lambda task: Exact(), "Gibbs": _gibbs, "local VI": _local_vi, "AIS": _posterior_ais},
        guided={},
        guide=None,
        reference="exact EM",
        approximate="Monte-Carlo EM",
        enumerating=frozenset({"exact EM", "exact gradient", "exact"}),
        arranged=_rows_of_pixels,
        penalty=0.0,
        takes_penalty=False,
    ),
}
