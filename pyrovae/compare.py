"""Put several methods to one model and say, in one table, how wrong each is.

`compare(model, x, methods)` runs every method from the same copy of the model. Methods that learn (`fit`) are judged by
the exact log p(x) of what they learned, wherever enumeration can compute it, never by their own bound; methods that infer
(`infer`) by their distance from the exact posterior of the model as given. The caller's model, guides, parameter store and
random state end as they began.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import pyro.infer
import torch
from torch import Tensor, nn

from pyrovae.handlers import discretize
from pyrovae.handlers.structure import read_structure
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.elbo import ExactLikelihood
from pyrovae.inference.exact.exact import Exact
from pyrovae.inference.fit import Fit, versions
from pyrovae.inference.posterior import Posterior, Program
from pyrovae.ops import isolated_rng

if TYPE_CHECKING:
    import pandas as pd

Method = Any
Progress = Callable[[str, int, int], None]

PER_DATUM = "nats per datum"
WHOLE = "nats, whole data set"


def compare(
    model: Program,
    x: Tensor | tuple[Any, ...],
    methods: Mapping[str, Method],
    *,
    x_test: Tensor | tuple[Any, ...] | None = None,
    seeds: Sequence[int] = (0,),
    learn: bool | None = None,
    max_bytes: int = 2**30,
    max_evaluations: int = 2**28,
    progress: Progress | None = None,
) -> Comparison:
    """Run methods side by side on copies of one model.

    Every run starts from a copy of the model and of the method (a guide inside it is copied together with the model). With
    several seeds, the first starts from the model's parameters as given, each further one from freshly drawn parameters
    where the model and guide have `reset_parameters`, the same for all methods; where all starts are alike, a note says so.

    Where the exact evaluation refuses the data but a learner takes them (grey pixels with `preprocess=data.binarize`), the
    exact columns stay blank and the note tells why.

    Args:
        model: a Pyro program: ours, a `PyroModule` or a plain function.
        x: the data, or a tuple of the program's arguments.
        methods: by name. A method with `fit` joins the learning table, one with only `infer` the inference table.
        x_test: other data of the same kind, on which learned models are judged.
        seeds: one run a seed.
        learn: False puts every method that has `infer` into the inference table, also those that could learn.
        max_bytes: memory for the exact reference; where it does not fit, its columns stay blank.
        max_evaluations: the most values of log p(x, z) that a reference may compute: joint states x rows where the program is
            enumerated (2**28 take about half a minute), few where a structure is declared; its columns stay blank beyond.
        progress: called with a method's name, the number of runs done and their total.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: for no methods, no seeds, a class instead of an instance, or a method with neither `fit` nor `infer`;
            and whatever a method refuses.
        TypeError: for methods without names, or `x` that is neither a tensor nor a tuple.

    Example:
        >>> from pyrovae.inference import Exact, Gibbs
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net(visible=4, hidden=2)
        >>> found = compare(net, net.sample(8), {"exact": Exact(), "Gibbs": Gibbs(200)})
        >>> list(found.table["bound"])
        ['exact', 'estimate']
    """
    train, test = _arguments(x, "x"), None if x_test is None else _arguments(x_test, "x_test")
    learners, inferers = _sort(methods, learn=learn)
    if not seeds:
        raise ValueError("expected at least one seed, got none; pass seeds=(0,)")
    total = (len(learners) + len(inferers)) * len(seeds)
    learned: dict[str, list[_Learned]] = {name: [] for name in learners}
    inferred: dict[str, list[Posterior]] = {name: [] for name in inferers}
    exact = partial(_try_exact, Exact(max_bytes=max_bytes), max_evaluations)
    reference: Posterior | None = None
    starts: list[Mapping[str, Tensor]] = []
    has_reset, done = False, 0
    _warm_up()
    with isolated_rng():
        with _same_store():
            readable = _readable(model, methods.values(), train)
        with _untouched(model, None, readable):
            unit = _unit(model, readable)
            if inferers:
                if any(getattr(method, "preprocess", None) is None for method in inferers.values()):
                    read_structure(model, train, {})  # data that the model refuses are refused now, not after the learning
                reference = exact(model, train)[0]
            if test is not None:
                read_structure(model, _readable(model, methods.values(), test), {})
        for number, seed in enumerate(seeds):
            for name, method in (learners | inferers).items():
                if progress is not None:
                    progress(name, done, total)
                with isolated_rng(seed), _untouched(model, method, readable):
                    own_model, own_method = copy.deepcopy((model, method))
                    if name in learners:
                        if number:
                            has_reset |= _reset(own_model, own_method, seed)
                        if len(starts) == number:
                            starts.append(_start(own_model, readable))
                        learned[name].append(_learn(own_model, own_method, train, test, exact))
                    else:
                        inferred[name].append(own_method.infer(own_model, *train))
                done += 1
    if progress is not None:
        progress("", total, total)
    rows_in_unit = _rows(train) if unit == WHOLE else 1
    return Comparison(
        learning=_learning_table(learned, rows_in_unit, _alike(starts, has_reset=has_reset)) if learned else None,
        inference=_inference_table(inferred, reference, rows_in_unit) if inferred else None,
        fits={name: runs[0].fit for name, runs in learned.items()},
        runs={name: tuple(run.fit for run in runs) for name, runs in learned.items()},
        models={name: runs[0].model for name, runs in learned.items()},
        posteriors={name: runs[0] for name, runs in inferred.items()},
        reference=reference,
        metadata={
            "unit": unit,
            "versions": versions(),
            "seeds": list(seeds),
            "rows": _rows(train),
            "test_rows": None if test is None else _rows(test),
            "threads": torch.get_num_threads(),
            "methods": {name: _describe(method) for name, method in methods.items()},
        },
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        learning: one row a learner (pandas), or None. In nats per datum; where a latent lies outside all plates there is one
            evidence, and it is in nats of the whole data set, as `metadata["unit"]` says. Columns: `method`; `log_p_train`,
            `log_p_test`: exact log p(x) of the learned model; `bound`, `own_bound`: what the method itself reports at the end,
            and what that is; `gap`: exact minus own bound; `difference`: exact log p(x), on test data where given, minus
            that of exact learning, paired; `model_evaluations`, `seconds`, `note`. `…_se` are standard errors: over seeds where
            there are several (blank where all start alike and end alike); else over rows for `difference`, and of the draws
            for bounds and gaps.
        inference: one row a method, or None. Columns: `method`, `bound`, `log_evidence`, `gap` (exact minus it), `kl`
            (KL(q‖p) where computable), `marginal_error` (the largest over sites and rows), `ess` (the smallest), `rhat` (the
            largest), `pareto_k` (share of rows above 0.7), `model_evaluations`, `seconds`, `sampled` (whether expectations are
            averages over draws), `note`.
        fits: the `Fit` of each learner at the first seed, learned parameters in `.states`.
        runs: the same for all seeds.
        models: the learned models at the first seed; a plain function stays as it is, its learned parameters are in `fits`.
        posteriors: the posterior of each inference method at the first seed.
        reference: the exact posterior, or None where it does not fit.
        metadata: unit, versions, seeds, sizes and the methods' settings.
    """

    learning: pd.DataFrame | None
    inference: pd.DataFrame | None
    fits: Mapping[str, Fit] = field(repr=False)
    runs: Mapping[str, tuple[Fit, ...]] = field(repr=False)
    models: Mapping[str, Program] = field(repr=False)
    posteriors: Mapping[str, Posterior] = field(repr=False)
    reference: Posterior | None = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """The table; where methods of both kinds ran, both, told apart by a column `task`."""
        both = {"learning": self.learning, "inference": self.inference}
        tables = {task: table for task, table in both.items() if table is not None}
        if len(tables) == 1:
            return next(iter(tables.values()))
        import pandas as pd

        return pd.concat([table.assign(task=task) for task, table in tables.items()], ignore_index=True)

    def to_markdown(self) -> str:
        """The tables as Markdown, standard errors beside their numbers, blanks where nothing is defined."""
        from pyrovae.report import markdown

        return markdown(self)

    def save(self, folder: str | Path) -> Path:
        """Write CSV, Markdown, JSON (versions, seeds, budget), netCDF for each posterior, and PNG.

        Files are written to a temporary folder first, so that an interrupted run leaves nothing half-written.

        Args:
            folder: made where it does not exist.

        Returns:
            The folder.

        Raises:
            OSError: if it cannot be written.
        """
        from pyrovae.report import save

        return save(self, Path(folder))

    def _repr_html_(self) -> str:
        from pyrovae.report import html_tables

        return html_tables(self)


@dataclass(frozen=True, eq=False)
class _Learned:
    """One learning run: the fit, the learned model, the exact log p(x) of each row where it can be computed, else why not."""

    fit: Fit
    model: Program
    train: Tensor | None
    test: Tensor | None
    why_not: str
    seconds: float


def _learn(
    model: Program,
    method: Method,
    train: tuple[Any, ...],
    test: tuple[Any, ...] | None,
    exact: Callable[..., tuple[Posterior | None, str]],
) -> _Learned:
    fit = method.fit(model, *train)
    found, why_not = exact(model, train)
    held_out, why_not_test = (None, "") if test is None else exact(model, test)
    evidence = [None if posterior is None else posterior.log_evidence for posterior in (found, held_out)]
    return _Learned(fit, model, evidence[0], evidence[1], why_not or why_not_test, fit.seconds)


def _learning_table(learned: Mapping[str, list[_Learned]], rows_in_unit: int, alike: str) -> pd.DataFrame:
    import pandas as pd

    baseline = next(
        (name for name, runs in learned.items() if runs[0].fit.bound == "exact" and runs[0].fit.exact_learning), None
    )
    over_seeds = partial(_over_seeds, alike=bool(alike))
    rows = []
    for name, runs in learned.items():
        row: dict[str, Any] = {"method": name}
        row["log_p_train"], row["log_p_train_se"] = over_seeds(_mean(run.train) for run in runs)
        row["log_p_test"], row["log_p_test_se"] = over_seeds(_mean(run.test) for run in runs)
        row["bound"] = runs[0].fit.bound
        ends = [run.fit.history[-1] for run in runs]
        row["own_bound"], row["own_bound_se"] = over_seeds(end["bound"] for end in ends)
        row["gap"], row["gap_se"] = over_seeds(
            None if _of_some_rows(run) else _difference(_mean(run.train), run.fit.history[-1]["bound"]) for run in runs
        )
        if len(runs) == 1:  # no spread over seeds; what remains is the noise of the bound itself
            row["own_bound_se"] = ends[0]["stderr"]
            row["gap_se"] = None if row["gap"] is None else ends[0]["stderr"]
        pairs = None if baseline is None or name == baseline else _paired(runs, learned[baseline])
        row["difference"], row["difference_se"] = (None, None) if pairs is None else _spread(pairs, alike=bool(alike))
        row["model_evaluations"] = round(sum(run.fit.model_evaluations for run in runs) / len(runs))
        row["seconds"] = sum(run.seconds for run in runs) / len(runs)
        tested = baseline is not None and runs[0].test is not None and learned[baseline][0].test is not None
        row["note"] = _learning_note(row, baseline, runs, rows_in_unit, alike, "test" if tested else "training")
        rows.append(row)
    return pd.DataFrame(rows)


def _of_some_rows(run: _Learned) -> bool:
    """Whether a method's own bound looked at a part of the training data, so that exact values are those of other rows."""
    rows = run.fit.history[-1].get("rows")
    return rows is not None and run.train is not None and rows < run.train.numel()


def _inference_table(inferred: Mapping[str, list[Posterior]], reference: Posterior | None, rows_in_unit: int) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for name, posteriors in inferred.items():
        parts = [_inference_row(posterior, reference) for posterior in posteriors]
        row: dict[str, Any] = {"method": name, "bound": posteriors[0].bound}
        for key in parts[0]:
            row[key] = _combine(key, [part[key] for part in parts])
        row["sampled"] = isinstance(posteriors[0], DrawsPosterior)
        row["note"] = _inference_note(posteriors[0], row, rows_in_unit)
        rows.append(row)
    return pd.DataFrame(rows)


def _inference_row(posterior: Posterior, reference: Posterior | None) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    evidence = posterior.log_evidence
    row["log_evidence"] = _mean(evidence)
    stderr = torch.as_tensor(posterior.stderr)
    if evidence is None:
        row["log_evidence_se"] = None
    elif posterior.diagnostics.get("common_error"):
        row["log_evidence_se"] = float(stderr.max())
    else:
        row["log_evidence_se"] = float(stderr.expand_as(evidence).square().sum().sqrt()) / max(1, evidence.numel())
    exact = None if reference is None else _mean(reference.log_evidence)
    row["gap"] = None if exact is None or row["log_evidence"] is None else exact - row["log_evidence"]
    row["gap_se"] = None if row["gap"] is None else row["log_evidence_se"]
    row["kl"] = row["gap"] if _is_elbo(posterior) else None
    row["marginal_error"] = None if reference is None else _marginal_error(posterior, reference)
    row["ess"], row["rhat"], row["pareto_k"] = _reliability(posterior)
    row["model_evaluations"] = posterior.diagnostics.get("model_evaluations")
    row["seconds"] = posterior.seconds
    return row


def _is_elbo(posterior: Posterior) -> bool:
    """Whether `log_evidence` is E_q[log p(x, z) − log q(z)], so that its gap is KL(q‖p)."""
    unweighted = getattr(posterior, "log_weights", None) is None
    return posterior.bound == "exact" or (posterior.bound == "lower" and posterior.is_elbo and unweighted)


def _marginal_error(posterior: Posterior, reference: Posterior) -> float | None:
    errors = [
        float((posterior.marginals[name] - exact).abs().max())
        for name, exact in reference.marginals.items()
        if name in posterior.marginals
    ]
    return max(errors, default=None)


def _reliability(posterior: Posterior) -> tuple[float | None, float | None, float | None]:
    """Smallest ESS, largest R-hat, share of rows with Pareto k above 0.7."""
    if isinstance(posterior, DrawsPosterior) and posterior.shape is not None:
        ess, rhat = posterior.ess or {}, posterior.rhat or {}
        return _extreme(ess.values(), min), _extreme(rhat.values(), max), None
    if "ess" in posterior.diagnostics:
        k = posterior.diagnostics["pareto_k"]
        return (
            float(posterior.diagnostics["ess"].min()),
            None,
            None if bool(k.isnan().all()) else float((k > 0.7).double().mean()),
        )
    return None, None, None


def _extreme(values: Iterable[Tensor], which: Callable[[Iterable[float]], float]) -> float | None:
    finite = [float(which(v[~torch.isnan(v)].tolist())) for v in values if bool((~torch.isnan(v)).any())]
    return which(finite) if finite else None


def _inference_note(posterior: Posterior, row: Mapping[str, Any], rows_in_unit: int) -> str:
    if posterior.bound == "exact":
        return "the reference"
    notes = []
    independent = posterior.diagnostics.get("route") == "independent"
    if independent:
        notes.append("its draws are independent: hidden units are, given the data")
    elif row["rhat"] is not None and row["rhat"] > 1.01:
        notes.append(f"R-hat up to {row['rhat']:.3f}: chains disagree, do not trust; run longer")
    if isinstance(posterior, DrawsPosterior) and posterior.shape is not None:
        if posterior.shape[0] == 1:
            notes.append("one chain: no R-hat")
        stuck, total = _constant(posterior)
        if stuck and not independent:
            notes.append(f"{stuck} of {total} {'quantity' if total == 1 else 'quantities'} constant in every chain")
        if row["ess"] is not None and row["ess"] < 100 * posterior.shape[0] and not independent:
            notes.append(f"ESS down to {row['ess']:.0f}")
    if row["pareto_k"]:
        notes.append(f"Pareto k > 0.7 on {100 * row['pareto_k']:.0f}% of rows: their numbers cannot be trusted")
    elif row["pareto_k"] is not None and row["ess"] is not None and row["ess"] < 100:
        notes.append(f"ESS down to {row['ess']:.0f} draws")
    if row["kl"] is not None and row["kl"] > 0.1 * rows_in_unit:
        notes.append(f"q is {row['kl']:.2g} nats from the posterior: a bound, not the evidence")
        if posterior.diagnostics.get("losses") == ():
            notes.append("guide taken as given, not fitted here")
    if posterior.diagnostics.get("note"):
        notes.append(posterior.diagnostics["note"])
    expected = " in expectation" if row["log_evidence_se"] else ""
    return "; ".join(notes) or ("estimate" if row["log_evidence"] is None else f"{posterior.bound} bound{expected}")


def _constant(posterior: DrawsPosterior) -> tuple[int, int]:
    """How many quantities never changed within any chain, and how many there are."""
    draws = list((posterior.draws or {}).values())  # [chain, draw, …] each
    stuck = sum(int((value == value[:, :1]).all(1).all(0).sum()) for value in draws)
    return stuck, sum(value[0, 0].numel() for value in draws)


def _learning_note(
    row: Mapping[str, Any], baseline: str | None, runs: list[_Learned], rows_in_unit: int, alike: str, judged_on: str
) -> str:
    notes = []
    if row["method"] == baseline:
        notes.append("the reference")
    if runs[0].why_not:
        notes.append(f"exact log p(x) not computed: {runs[0].why_not}")
    if row["log_p_train"] is None and row["own_bound"] is None:
        notes.append("neither exact log p(x) nor a bound of its own")
    elif row["log_p_train"] is None and not runs[0].why_not:
        notes.append("exact log p(x) does not fit: judged by its bound alone")
    elif row["own_bound"] is None:
        notes.append("no bound of its own")
    elif _of_some_rows(runs[0]):
        notes.append(f"its bound is that of {runs[0].fit.history[-1]['rows']} rows")
    elif row["gap"] is not None and row["gap"] > 0.1 * rows_in_unit:
        notes.append(f"its bound understates log p(x) by {row['gap']:.2g} nats")
    if row["difference"] is not None:
        notes.append(_verdict(row["difference"], row["difference_se"], str(baseline), len(runs), judged_on))
    if alike:
        notes.append(alike)
    return "; ".join(notes)


def _verdict(difference: float, stderr: float | None, baseline: str, num_seeds: int, judged_on: str) -> str:
    """Tie, better or worse than exact learning."""
    words = f"{'worse' if difference < 0 else 'better'} than {baseline} by {abs(difference):.2g} nats"
    if stderr is None:
        return f"{words}, no error known" if difference else f"equal to {baseline}"
    factor = tie_factor(num_seeds)
    over = "over seeds" if num_seeds > 1 else f"over {judged_on} rows, one run"
    if abs(difference) <= factor * stderr:
        return f"tie with {baseline} (within {factor:.3g} s.e. {over})"
    return f"{words} (beyond {factor:.3g} s.e. {over})"


def tie_factor(num_seeds: int) -> float:
    """How many standard errors a difference must exceed not to be called a tie.

    Several seeds: the 97.5% point of Student's t with `num_seeds` − 1 degrees of freedom, as the spread is estimated from
    so few. One seed: 2, with the error over rows, in which the noise of learning is not.
    """
    if num_seeds < 2:
        return 2.0
    from scipy.stats import t  # type: ignore[import-untyped]

    return float(t.ppf(0.975, num_seeds - 1))


def _paired(runs: list[_Learned], baseline: list[_Learned]) -> list[Tensor] | None:
    """Differences to the baseline, a tensor over rows for each seed; on test rows where there are any."""
    differences = []
    for own, other in zip(runs, baseline, strict=True):
        judged = (own.test, other.test) if own.test is not None and other.test is not None else (own.train, other.train)
        if judged[0] is None or judged[1] is None:
            return None
        differences.append(judged[0] - judged[1])
    return differences


def _spread(differences: list[Tensor], *, alike: bool) -> tuple[float | None, float | None]:
    """Mean difference and its standard error: over seeds where there are several, else over rows."""
    if len(differences) > 1:
        return _over_seeds((float(d.mean()) for d in differences), alike=alike)
    rows = differences[0].reshape(-1)
    return float(rows.mean()), float(rows.std() / math.sqrt(len(rows))) if len(rows) > 1 else None


def _over_seeds(values: Iterable[float | None], *, alike: bool) -> tuple[float | None, float | None]:
    """Mean and standard error of one value a seed; None where undefined.

    Equal values from equal starts are one run repeated: they have no standard error.
    """
    given = list(values)
    found = [v for v in given if v is not None]
    if not found or len(found) < len(given):
        return None, None
    tensor = torch.tensor(found, dtype=torch.float64)
    mean, spread = float(tensor.mean()), float(tensor.std()) if len(found) > 1 else 0.0
    repeated = len(found) == 1 or (alike and spread <= 1e-12 * max(1.0, abs(mean)))
    return mean, None if repeated else spread / math.sqrt(len(found))


def _combine(key: str, values: list[float | None]) -> float | None:
    """One number from one a seed: the worst for reliability, the mean otherwise."""
    found = [v for v in values if v is not None]
    if not found:
        return None
    if key in ("marginal_error", "rhat"):
        return max(found)
    if key == "ess":
        return min(found)
    if key.endswith("_se"):
        return math.sqrt(sum(v**2 for v in found)) / len(found)
    return sum(found) / len(found)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Tensor | None) -> Any:
    return None if values is None else float(values.mean())


def _try_exact(exact: Exact, max_evaluations: int, model: Program, args: tuple[Any, ...]) -> tuple[Posterior | None, str]:
    """The exact posterior, of the discrete twin where latents are relaxed.

    None where enumeration refuses or is too long, and, where the data are refused, the first clause of the reason.
    """
    try:
        structure = read_structure(model, args, {})
    except ValueError as error:
        return None, str(error).split(";")[0]
    if any(latent.kind.startswith("relaxed") for latent in structure.latents):
        model = discretize(model)
    try:
        objective = ExactLikelihood(max_bytes=exact.max_bytes, declared=exact.declared)
        if objective.model_evaluations(model, *args) > max_evaluations:
            return None, ""
        return exact.infer(model, *args), ""
    except ValueError:
        return None, ""


def _readable(model: Program, methods: Iterable[Method], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The data, or, where the model refuses them, what some method's `preprocess` makes of them; only sizes are read of it.

    Raises:
        ValueError: the model's refusal, where no method has a `preprocess` that mends it.
    """
    try:
        read_structure(model, args, {})
    except ValueError:
        for method in methods:
            preprocess = getattr(method, "preprocess", None)
            if preprocess is not None and args:
                prepared = (preprocess(args[0]), *args[1:])
                with suppress(ValueError):
                    read_structure(model, prepared, {})
                    return prepared
        raise
    return args


def _warm_up() -> None:
    """Let torch and ArviZ import what they import at first use, so that no method's seconds hold it."""
    import arviz  # noqa: F401

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()


def _unit(model: Program, args: tuple[Any, ...]) -> str:
    """What the numbers count: one evidence a datum, or, where a latent lies outside all plates, one for all data."""
    return PER_DATUM if read_structure(model, args, {}).batch else WHOLE


def _start(model: Program, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Copies of the parameters from which learning starts."""
    leaves = dict(model.named_parameters()) if isinstance(model, nn.Module) else read_structure(model, args, {}).leaves
    return {name: leaf.detach().clone() for name, leaf in leaves.items()}


def _alike(starts: Sequence[Mapping[str, Tensor]], *, has_reset: bool) -> str:
    """A note where several seeds started from the same parameters, else nothing."""
    if len(starts) < 2 or any(
        start.keys() != starts[0].keys() or any(not torch.equal(leaf, starts[0][name]) for name, leaf in start.items())
        for start in starts[1:]
    ):
        return ""
    return "all seeds start alike" + ("" if has_reset else ": the model has no reset_parameters")


@contextmanager
def _untouched(model: Program, method: Method | None, args: tuple[Any, ...]) -> Iterator[None]:
    """Put back, afterwards, the store and the parameters that a run could reach through closures."""
    saved: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def save(leaves: Iterable[Tensor]) -> None:
        saved.update({id(leaf): (leaf, leaf.detach().clone(), leaf.grad) for leaf in leaves if id(leaf) not in saved})

    with _same_store() as params:
        save(params)
        try:
            for program in (model, *_programs(method)):
                if not isinstance(program, nn.Module):
                    save(read_structure(program, args, {}).leaves.values())
            yield
        finally:
            for leaf, value, gradient in saved.values():
                leaf.data.copy_(value)
                leaf.grad = gradient


@contextmanager
def _same_store() -> Iterator[list[Tensor]]:
    """Put back, afterwards, what the store held; its leaves meanwhile."""
    store = pyro.get_param_store()
    state = {key: dict(value) for key, value in store.get_state().items()}
    try:
        yield list(state["params"].values())
    finally:
        store.clear()  # `set_state` alone keeps what is new
        store.set_state(state)


def _programs(method: Method | None) -> list[Program]:
    """Guides that a method holds."""
    guides = [getattr(method, "guide", None), *(_programs(getattr(method, "e_step", None)) if method is not None else [])]
    return [guide for guide in guides if guide is not None]


def _reset(model: Program, method: Method, seed: int) -> bool:
    """Draw fresh parameters, from a stream apart from that of the run and of a caller who seeds with the same number.

    Returns:
        Whether the model could.
    """
    able = False
    with isolated_rng(0x9E3779B9 ^ seed):
        for program in (model, *_programs(method)):
            for module in program.modules() if isinstance(program, nn.Module) else ():
                reset: Any = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
                    able |= program is model
    return able


def _sort(methods: Mapping[str, Method], *, learn: bool | None) -> tuple[dict[str, Method], dict[str, Method]]:
    if not isinstance(methods, Mapping):
        raise TypeError(f"expected a dict of methods by name, got {type(methods).__name__}; pass {{'exact': Exact(), ...}}")
    if not methods:
        raise ValueError("expected at least one method, got none; pass {'exact': Exact(), ...}")
    learners, inferers = {}, {}
    for name, method in methods.items():
        if isinstance(method, type):
            raise ValueError(
                f"expected an instance of a method, got the class {method.__name__} for {name!r}; write {method.__name__}(...)"
            )
        if hasattr(method, "fit") and learn is not False:
            learners[name] = method
        elif hasattr(method, "infer") and not learn:
            inferers[name] = method
        else:
            need = "fit" if learn else "infer" if learn is False else "fit or infer"
            raise ValueError(f"expected a method with {need}, got {type(method).__name__} for {name!r}; see pyrovae.inference")
    return learners, inferers


def _arguments(x: Tensor | tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if isinstance(x, tuple):
        return x
    if not isinstance(x, Tensor):
        raise TypeError(
            f"expected {name} to be a tensor or a tuple of the program's arguments, got {type(x).__name__}; write "
            f"torch.as_tensor({name}), or ({name},) where the program takes it as it is"
        )
    return (x,)


def _rows(args: tuple[Any, ...]) -> int:
    return len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else 1


def _describe(method: Any) -> dict[str, Any]:
    """The settings of a method that JSON can hold; of an E-step, an objective and an optimizer too."""
    if isinstance(method, partial):
        return {"class": getattr(method.func, "__name__", "partial"), **_numbers(method.keywords)}
    settings = vars(method) if hasattr(method, "__dict__") else {}
    described = {"class": type(method).__name__, **_numbers(settings)}
    if isinstance(method, pyro.infer.ELBO):
        return {key: described[key] for key in ("class", "num_particles", "max_bytes") if key in described}
    for name, value in settings.items():
        if isinstance(value, (partial, pyro.infer.ELBO)) or hasattr(value, "infer"):
            described[name] = _describe(value)
        elif name not in described and not isinstance(value, float):
            described[name] = type(value).__name__
    return described


def _numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool, type(None)))}
    return {k: v for k, v in plain.items() if not isinstance(v, float) or math.isfinite(v)}
