"""The main job: one belief net, every kind of learning, then every kind of inference on one learned net.

Judged on real data by exact enumeration wherever it fits. `pyrovae compare` is this, on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyro.infer
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

from pyrovae import data
from pyrovae.compare import Comparison, Progress, compare
from pyrovae.guides import AmortizedMeanField, LocalMeanField
from pyrovae.inference import EM, Exact, ExactLikelihood, Gibbs, Importance, MeanField, Variational
from pyrovae.models import SigmoidBeliefNet
from pyrovae.ops import isolated_rng

LEARNERS = ("exact EM", "exact gradient", "Monte-Carlo EM", "variational EM", "score function", "relaxation")
INFERENCE = ("exact", "Gibbs", "mean field", "local VI", "amortised VI", "importance")
BUDGETS: Mapping[str, float] = {"small": 0.2, "default": 1.0, "large": 4.0}
BATCH_SIZE = 128
MAX_EVALUATIONS = 2**23


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the main job is to do.

    Attributes:
        data: a name of `pyrovae.data.NAMES`; pixels are 1 where the intensity is above 0.5.
        hidden: units of each hidden layer, from the data upwards.
        methods: names of `LEARNERS` and `INFERENCE`; None takes all that fit.
        budget: multiplies the number of steps, iterations and draws of every method.
        seeds: one run of each learner a seed.
        penalty: λ, the precision of a Gaussian prior on every parameter, shared by all learners.
        rows: the most rows of each split; None takes all.
    """

    data: str = "digits"
    hidden: tuple[int, ...] = (8,)
    methods: tuple[str, ...] | None = None
    budget: float = 1.0
    seeds: tuple[int, ...] = (0,)
    penalty: float = 0.1
    rows: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class MainJob:
    """What the main job found.

    Attributes:
        settings: as asked for.
        learning: the learners side by side, or None if none was asked for.
        inference: the inference methods on one learned net, judged on test rows; or None.
        net: that net.
        train: the rows learned from `[N, D]`.
        test: the rows judged on `[M, D]`.
        samples: draws from each learned net `[16, D]`, beside some data.
        notes: what a reader must know, in words.
    """

    settings: Settings
    learning: Comparison | None
    inference: Comparison | None
    net: SigmoidBeliefNet
    train: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    samples: Mapping[str, Tensor] = field(repr=False)
    notes: tuple[str, ...]

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """The comparisons that were made, by name."""
        found = {"learning": self.learning, "inference": self.inference}
        return {name: comparison for name, comparison in found.items() if comparison is not None}


def run(settings: Settings, progress: Progress | None = None) -> MainJob:
    """Learn with every method, then put every inference method to the net that exact EM learned.

    Numbers are float64 where torch's default dtype is (the command line sets it). About a minute on 2 cores at the
    default settings.

    Args:
        settings: what to do.
        progress: called with a method's name, the number of runs done and their total.

    Raises:
        ValueError: for an unknown name, or whatever a method that was asked for refuses.
    """
    train, test = load(settings)
    notes = [_describe_data(settings, train, test)]
    with isolated_rng(settings.seeds[0]):
        net = SigmoidBeliefNet(train.shape[1], list(settings.hidden))
    methods, left_out = _choose(settings, net, train)
    notes += left_out
    with isolated_rng(settings.seeds[0]):  # guides draw their weights
        known = learning_methods(net, len(train), settings.budget, settings.penalty)
    learners = {name: method for name, method in known.items() if name in methods}
    inferers = [name for name in INFERENCE if name in methods]
    preparing = ["guide"] if {"amortised VI", "importance"} & set(inferers) else []
    if inferers and not learners:
        preparing.insert(0, "a net to infer on")
    count = len(learners) * len(settings.seeds)
    total = count + len(preparing) + len(inferers)
    tell = _Steps(progress, total)
    learning = None
    if learners:
        learning = compare(net, train, learners, x_test=test, seeds=settings.seeds, progress=tell.within)
        if settings.penalty:
            notes.append(
                f"All learners share one weak penalty, a Gaussian prior of precision {settings.penalty:g} on each parameter: "
                "pixels that are never on would otherwise drive the maximum likelihood to infinity. Log p(x) and bounds are "
                "without it."
            )
        else:
            notes.append("No penalty: where a pixel is never on, the maximum likelihood is at infinity.")
    else:
        tell("a net to infer on")
        evaluations = _evaluations(net, train)
        name = "exact EM" if evaluations is not None and evaluations <= MAX_EVALUATIONS else "relaxation"
        learned = compare(net, train, {name: known[name]}, seeds=settings.seeds[:1])
    source = learning if learning is not None else learned
    assert source.learning is not None
    best = "exact EM" if "exact EM" in source.models else _best(source)
    fitted: Any = source.models[best]
    inference = None
    if inferers:
        guide = None
        if "guide" in preparing:
            tell("guide")
            guide = _trained_guide(fitted, train, settings)
        with isolated_rng(settings.seeds[0]):
            chosen = inference_methods(fitted, len(test), settings.budget, guide)
        inference = compare(
            fitted,
            test,
            {name: chosen[name] for name in inferers},
            seeds=settings.seeds[:1],
            learn=False,
            progress=tell.within,
        )
        notes.append(f"Inference is on the net that {best} learned at seed {settings.seeds[0]}, on the {len(test)} test rows.")
        if guide is not None:
            notes.append(
                "The guide of amortised VI and importance sampling was trained on the training rows, as amortised guides are "
                "used, and meets the test rows for the first time; its training is counted in the seconds and evaluations of "
                "both rows. Local VI and mean field fit each test row by itself."
            )
    tell("")
    about = {
        "data": settings.data,
        "binarization": "threshold at 0.5" if "mnist" in settings.data or settings.data == "digits" else "binary as generated",
        "model": f"sigmoid belief net {train.shape[1]}-{'-'.join(map(str, settings.hidden))}",
        "penalty": settings.penalty,
        "budget": settings.budget,
        "dtype": str(train.dtype).removeprefix("torch."),
    }
    return MainJob(
        settings=settings,
        learning=None if learning is None else replace(learning, metadata={**learning.metadata, **about, "judged on": "test"}),
        inference=None if inference is None else replace(inference, metadata={**inference.metadata, **about, "net": best}),
        net=fitted,
        train=train,
        test=test,
        samples=_samples(test, source, settings.seeds[0]),
        notes=tuple(notes),
    )


def load(settings: Settings) -> tuple[Tensor, Tensor]:
    """Training and test rows, `[N, D]` and `[M, D]` in {0, 1}."""
    binarize = "threshold" if settings.data not in ("bars_and_stripes", "labelled_shifter") else None
    train, test = (data.load(settings.data, split=split, binarize=binarize)[: settings.rows] for split in ("train", "test"))
    return train, test


def learning_methods(net: SigmoidBeliefNet, rows: int, budget: float, penalty: float) -> dict[str, Any]:
    """The learners of the main job, by name."""

    def times(count: int, least: int = 2) -> int:
        return max(least, round(count * budget))

    def stochastic(guide: Any, elbo: Any, steps: int, rate: float, **options: Any) -> Variational:
        steps = times(steps, 20)
        return Variational(
            guide,
            elbo,
            num_steps=steps,
            batch_size=min(BATCH_SIZE, rows),
            optim=_falling(rate, steps),
            penalty=penalty,
            **options,
        )

    return {
        "exact EM": EM(Exact(), times(60), penalty=penalty),
        "exact gradient": stochastic(None, ExactLikelihood(), 1000, 0.2),
        "Monte-Carlo EM": EM(Gibbs(10, 1, 5), times(40), penalty=penalty),
        "variational EM": EM(MeanField(1), times(30), penalty=penalty),
        "score function": stochastic(AmortizedMeanField(net), None, 2500, 0.03),
        "relaxation": stochastic(AmortizedMeanField(net), pyro.infer.Trace_ELBO(), 2500, 0.03, temperature=0.5),
    }


def inference_methods(net: SigmoidBeliefNet, rows: int, budget: float, guide: _TrainedGuide | None) -> dict[str, Any]:
    """The inference methods of the main job, by name; those that need a trained guide only where there is one."""
    steps = max(20, round(1500 * budget))
    draws = max(50, round(1000 * budget))
    methods = {
        "exact": Exact(),
        "Gibbs": Gibbs(2 * draws, 4, max(10, draws // 5)),
        "mean field": MeanField(),
        "local VI": Variational(
            LocalMeanField(net, rows), num_guide_steps=steps, optim=_falling(0.2, steps), num_samples=draws
        ),
    }
    if guide is not None:
        methods["amortised VI"] = _Prepared(Variational(guide.guide, num_samples=draws), guide)
        methods["importance"] = _Prepared(Importance(guide.guide, draws), guide)
    return methods


@dataclass(frozen=True)
class _TrainedGuide:
    guide: Any
    seconds: float
    evaluations: int


class _Prepared:
    """An inference method whose guide was trained before; the cost of that is counted as its own."""

    def __init__(self, method: Any, trained: _TrainedGuide) -> None:
        self.method, self.guide = method, method.guide
        self.training_seconds, self.training_evaluations = trained.seconds, trained.evaluations

    def infer(self, model: Any, *args: Any) -> Any:
        posterior = self.method.infer(model, *args)
        evaluations = posterior.diagnostics["model_evaluations"] + self.training_evaluations
        return replace(
            posterior,
            seconds=posterior.seconds + self.training_seconds,
            diagnostics={**posterior.diagnostics, "model_evaluations": evaluations},
        )


class _Steps:
    """Progress over several calls of `compare`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, name: str) -> None:
        """A run begins, or, without a name, all are over."""
        if self.progress is not None:
            self.progress(name, self.done if name else self.total, self.total)
        self.done += 1

    def within(self, name: str, done: int, total: int) -> None:
        if name:
            self(name)


def _choose(settings: Settings, net: SigmoidBeliefNet, train: Tensor) -> tuple[tuple[str, ...], list[str]]:
    """The methods to run, and a word on those that were left out."""
    tables = {"exact EM", "exact gradient", "variational EM", "exact", "mean field"}
    if settings.methods is not None:
        if tables & set(settings.methods):
            ExactLikelihood().model_evaluations(net, train)  # what cannot be enumerated is refused before work starts
        return settings.methods, []
    evaluations = _evaluations(net, train)
    if evaluations is not None and evaluations <= MAX_EVALUATIONS:
        return LEARNERS + INFERENCE, []
    what = f"{sum(settings.hidden)} hidden units and {len(train)} rows"
    named = ", ".join(sorted(tables))
    kept = tuple(name for name in LEARNERS + INFERENCE if name not in tables)
    if evaluations is None:
        return kept, [f"{what} are more than enumeration can hold, so {named} do not fit and were left out."]
    return kept, [
        f"{what} make {evaluations:,} joint states x rows, more than {MAX_EVALUATIONS:,}, so {named} were left out; name them "
        "with --methods to wait for them."
    ]


def _evaluations(net: SigmoidBeliefNet, x: Tensor) -> int | None:
    """Joint states x rows; None where enumeration refuses them."""
    try:
        return ExactLikelihood().model_evaluations(net, x)
    except ValueError:
        return None


def _best(learned: Comparison) -> str:
    """The learner with the highest exact log p(x), or the first where that is unknown."""
    table = learned.learning
    assert table is not None
    for column in ("log_p_test", "log_p_train"):
        scores = {name: score for name, score in zip(table["method"], table[column], strict=True) if score == score and score}
        if scores:
            return max(scores, key=lambda name: scores[name])
    return str(table["method"][0])


def _trained_guide(net: SigmoidBeliefNet, train: Tensor, settings: Settings) -> _TrainedGuide:
    steps = max(20, round(1500 * settings.budget))
    with isolated_rng(settings.seeds[0]):
        guide = AmortizedMeanField(net)
        training = Variational(
            guide, batch_size=min(BATCH_SIZE, len(train)), optim=_falling(0.02, steps), num_guide_steps=steps, num_samples=2
        )
        posterior = training.infer(net, train)
    return _TrainedGuide(guide, posterior.seconds, int(posterior.diagnostics["model_evaluations"]))


def _falling(rate: float, steps: int) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Adam whose rate falls to 3% of its start over the steps."""
    return partial(ClippedAdam, lr=rate, lrd=0.03 ** (1 / steps), clip_norm=math.inf)


def _samples(test: Tensor, learned: Comparison, seed: int) -> dict[str, Tensor]:
    with isolated_rng(seed):
        drawn: dict[str, Tensor] = {"data": test[:16]}
        for name, model in learned.models.items():
            sampler: Any = model
            drawn[name] = sampler.sample(16)
    return drawn


def _describe_data(settings: Settings, train: Tensor, test: Tensor) -> str:
    how = (
        "a pixel is 1 above half intensity" if settings.data in ("digits", "mnist", "fashion_mnist") else "binary as generated"
    )
    words = f"Data: {settings.data}, {len(train)} training and {len(test)} test rows of {train.shape[1]} pixels; {how}."
    if settings.data in ("bars_and_stripes", "labelled_shifter"):
        words += f" No model can reach more than {-data.entropy(settings.data):.3f} nats per datum in expectation."
    return words


def parse_methods(text: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of methods from a comma list; case, hyphens and underscores do not matter. None or 'all' is every method.

    Raises:
        ValueError: for an unknown name, or none at all.
    """
    names = text.split(",") if isinstance(text, str) else list(text or ["all"])
    names = [name.strip() for name in names if name.strip()]
    known = {_plain(name): name for name in LEARNERS + INFERENCE}
    listed = ", ".join(LEARNERS + INFERENCE)
    if not names:
        raise ValueError(f"expected at least one method, got none; choose from: {listed}")
    if [_plain(name) for name in names] == ["all"]:
        return None
    for name in names:
        if _plain(name) not in known:
            raise ValueError(f"expected names of methods, got {name!r}; choose from: {listed}")
    return tuple(known[_plain(name)] for name in names)


def _plain(name: str) -> str:
    return name.lower().replace("-", " ").replace("_", " ").strip()
