"""Learn one model by every method of its family, then put every inference method to one learned model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyrovae.compare import Comparison, Progress, compare
from pyrovae.inference import ExactLikelihood, Variational
from pyrovae.main_job.families import Family, Task, falling
from pyrovae.main_job.settings import GENERATED, Settings, describe_data, family_of, load
from pyrovae.ops import isolated_rng

MAX_EVALUATIONS = 2**23


@dataclass(frozen=True, eq=False, kw_only=True)
class MainJob:
    """What the main job found.

    Attributes:
        settings: as asked for.
        learning: the learners side by side, or None if none was asked for.
        inference: the inference methods on one learned model, judged on test rows; or None.
        model: that model.
        train: the rows learned from `[N, …]`.
        test: the rows judged on `[M, …]`.
        samples: draws from each learned model `[16, D]`, beside some data.
        notes: what a reader must know, in words.
    """

    settings: Settings
    learning: Comparison | None
    inference: Comparison | None
    model: Any
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
    """Learn with every method, then put every inference method to the model that exact learning found.

    Numbers are float64 where torch's default dtype is (the command line sets it). About two minutes at the
    default settings.

    Args:
        settings: what to do.
        progress: called with a method's name, the number of runs done and their total.

    Raises:
        ValueError: for an unknown name, or whatever a method that was asked for refuses.
    """
    family = family_of(settings.family)
    train, test = load(settings)
    seed = settings.seeds[0]
    assert settings.hidden is not None
    assert settings.penalty is not None
    with isolated_rng(seed):
        model = family.build(settings.hidden, train)
    methods, left_out = choose(settings, model, train)
    notes = [describe_data(settings, train, test), *left_out]
    with isolated_rng(seed):  # guides draw their weights
        task = Task(model, len(train), settings.budget, settings.penalty)
        learners = {name: make(task) for name, make in family.learners.items() if name in methods}
    inferers = [name for name in (*family.inferers, *family.guided) if name in methods]
    preparing = ["guide"] if family.guided.keys() & set(inferers) else []
    if inferers and not learners:
        preparing.insert(0, "a model to infer on")
    tell = _Steps(progress, len(learners) * len(settings.seeds) + len(preparing) + len(inferers))
    learning = None
    if learners:
        learning = compare(model, train, learners, x_test=test, seeds=settings.seeds, progress=tell.within)
        notes.append(_of_the_penalty(family, settings.penalty, learning, train))
        source = learning
    else:
        tell("a model to infer on")
        name = family.reference if _fits(model, train) else family.approximate
        with isolated_rng(seed):
            source = compare(model, train, {name: family.learners[name](task)}, seeds=settings.seeds[:1])
    best = family.reference if family.reference in source.models else _best(family, source)
    fitted: Any = source.models[best]
    inference = None
    if inferers:
        guide = None
        if "guide" in preparing:
            tell("guide")
            guide = _trained_guide(family, fitted, train, settings)
        with isolated_rng(seed):
            task = Task(fitted, len(test), settings.budget)
            chosen = {name: family.inferers[name](task) for name in inferers if name in family.inferers}
            if guide is not None:
                made = {name: family.guided[name](task, guide.guide) for name in inferers if name in family.guided}
                chosen |= {name: _Prepared(method, guide) for name, method in made.items()}
        inference = compare(
            fitted,
            test,
            {name: chosen[name] for name in inferers},
            seeds=settings.seeds[:1],
            learn=False,
            progress=tell.within,
        )
        notes.append(f"Inference is on the model that {best} learned at seed {seed}, on the {len(test)} test rows.")
        if guide is not None:
            each = [name for name in ("local VI", "mean field", "Saul-Jaakkola-Jordan") if name in inferers]
            notes.append(
                "The guide of amortised VI and importance sampling was trained on the training rows, as amortised guides are "
                "used, and meets the test rows for the first time; its training is counted in the seconds and evaluations of "
                f"both rows.{' Fitted to each test row by itself: ' + ', '.join(each) + '.' if each else ''}"
            )
    tell("")
    about = {
        "data": settings.data,
        "binarization": "binary as generated" if settings.data in GENERATED else "threshold at 0.5",
        "model": heading(settings, train),
        "penalty": settings.penalty,
        "budget": settings.budget,
        "dtype": str(train.dtype).removeprefix("torch."),
    }
    return MainJob(
        settings=settings,
        learning=None if learning is None else replace(learning, metadata={**learning.metadata, **about, "judged on": "test"}),
        inference=None if inference is None else replace(inference, metadata={**inference.metadata, **about, "net": best}),
        model=fitted,
        train=train,
        test=test,
        samples=_samples(test, source, seed),
        notes=tuple(notes),
    )


def heading(settings: Settings, x: Tensor) -> str:
    """The model in words."""
    assert settings.hidden is not None
    title = family_of(settings.family).title
    title = title[0].lower() + title[1:]
    sizes = "-".join(map(str, settings.hidden))
    return f"{title} {x.shape[-1]}-{sizes}" if x.dim() == 2 else f"{title}, {sizes} states, {x.shape[-1]} pixels a step"


def choose(settings: Settings, model: Any, train: Tensor) -> tuple[tuple[str, ...], list[str]]:
    """The methods to run, and a word on those that were left out."""
    family = family_of(settings.family)
    if settings.methods is not None:
        asked = [name for name in settings.methods if name in family.enumerating]
        if asked:  # what cannot be enumerated is refused before work starts
            try:
                ExactLikelihood().model_evaluations(model, train)
            except ValueError as error:
                raise ValueError(str(error).replace("ExactLikelihood", ", ".join(asked))) from error
        return settings.methods, []
    evaluations = _evaluations(model, train)
    if evaluations is not None and evaluations <= MAX_EVALUATIONS:
        return family.methods, []
    assert settings.hidden is not None
    what = f"{sum(settings.hidden)} {family.sizes.split(' of ')[0]} and {len(train)} rows"
    kept = tuple(name for name in family.methods if name not in family.enumerating)
    named = ", ".join(sorted(family.enumerating))
    if evaluations is None:
        return kept, [f"{what} are more than enumeration can hold, so {named} do not fit and were left out."]
    return kept, [
        f"{what} take {evaluations:,} evaluations of log p(x, z), more than {MAX_EVALUATIONS:,}, so {named} were left out; "
        "name them with --methods to wait for them."
    ]


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


def _evaluations(model: Any, x: Tensor) -> int | None:
    """Values of log p(x, z) that exact inference computes; None where it refuses, or nobody would wait."""
    try:
        evaluations = ExactLikelihood().model_evaluations(model, x)
    except ValueError:
        return None
    return evaluations if evaluations <= 2**33 else None


def _fits(model: Any, x: Tensor) -> bool:
    evaluations = _evaluations(model, x)
    return evaluations is not None and evaluations <= MAX_EVALUATIONS


def _best(family: Family, learned: Comparison) -> str:
    """The learner with the highest exact log p(x), or the family's approximate one where that is unknown."""
    table = learned.learning
    assert table is not None
    for column in ("log_p_test", "log_p_train"):
        scores = {name: score for name, score in zip(table["method"], table[column], strict=True) if score == score and score}
        if scores:
            return max(scores, key=lambda name: scores[name])
    return family.approximate if family.approximate in learned.models else str(table["method"][0])


def _trained_guide(family: Family, model: Any, train: Tensor, settings: Settings) -> _TrainedGuide:
    assert family.guide is not None
    task = Task(model, len(train), settings.budget)
    steps = task.times(1500, 20)
    with isolated_rng(settings.seeds[0]):
        guide = family.guide(model)
        training = Variational(
            guide, batch_size=task.batch_size, optim=falling(0.02, steps), num_guide_steps=steps, num_samples=2
        )
        posterior = training.infer(model, train)
    return _TrainedGuide(guide, posterior.seconds, int(posterior.diagnostics["model_evaluations"]))


def _samples(test: Tensor, learned: Comparison, seed: int) -> dict[str, Tensor]:
    """Draws from each model as rows of pixels, beside some data."""
    drawn: dict[str, Tensor] = {"data": test[:16]}
    for name, model in learned.models.items():
        sampler: Any = model
        with isolated_rng(seed), torch.no_grad():
            drawn[name] = sampler.sample(16)
    return {name: x.reshape(len(x), -1) for name, x in drawn.items()}


def _of_the_penalty(family: Family, penalty: float, learning: Comparison, train: Tensor) -> str:
    if not family.takes_penalty:
        return "Learners maximise the log likelihood plus the log density of the model's own priors on its parameters."
    constant = bool((train.amax(0) == train.amin(0)).any())
    if penalty == 0:
        return "No penalty" + (": where a pixel never changes, the maximum likelihood is at infinity." if constant else ".")
    without = [name for name, fit in learning.fits.items() if fit.penalty != penalty]
    shared = (
        "Learners share one weak penalty" if not without else f"All learners but {', '.join(without)} share one weak penalty"
    )
    why = ": pixels that never change would otherwise drive the maximum likelihood to infinity" if constant else ""
    return f"{shared}, a Gaussian prior of precision {penalty:g} on each parameter{why}. Log p(x) and bounds are without it."
