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
from contextlib import contextmanager
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
from pyrovae.inference.exact import Exact
from pyrovae.inference.fit import Fit, versions
from pyrovae.inference.posterior import Posterior, Program
from pyrovae.ops import isolated_rng

if TYPE_CHECKING:
    import pandas as pd

Method = Any
Progress = Callable[[str, int, int], None]


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
    where the model and guide have `reset_parameters`, the same for all methods.

    Args:
        model: a Pyro program: ours, a `PyroModule` or a plain function.
        x: the data, or a tuple of the program's arguments.
        methods: by name. A method with `fit` joins the learning table, one with only `infer` the inference table.
        x_test: other data of the same kind, on which learned models are judged.
        seeds: one run a seed.
        learn: False puts every method that has `infer` into the inference table, also those that could learn.
        max_bytes: memory for the exact reference; where it does not fit, its columns stay blank.
        max_evaluations: the most joint states x rows that a reference may take (2**28 take about half a minute); its columns
            stay blank beyond.
        progress: called with a method's name, the number of runs done and their total.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: for no methods, no seeds, or a method with neither `fit` nor `infer`; and whatever a method refuses.

    Example:
        >>> from pyrovae.inference import Exact, Gibbs
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net(visible=4, hidden=2)
        >>> found = compare(net, net.sample(8), {"exact": Exact(), "Gibbs": Gibbs(200)})
        >>> list(found.table["bound"])
        ['exact', 'estimate']
    """
    train, test = _arguments(x), None if x_test is None else _arguments(x_test)
    learners, inferers = _sort(methods, learn=learn)
    if not seeds:
        raise ValueError("expected at least one seed, got none")
    total = (len(learners) + len(inferers)) * len(seeds)
    learned: dict[str, list[_Learned]] = {name: [] for name in learners}
    inferred: dict[str, list[Posterior]] = {name: [] for name in inferers}
    exact = partial(_try_exact, Exact(max_bytes=max_bytes), max_evaluations)
    reference: Posterior | None = None
    done = 0
    with isolated_rng():
        with _untouched(model, None, train):
            if inferers:
                reference = exact(model, train)
            if test is not None:
                read_structure(model, test, {})  # data that the model refuses are refused now, not after the learning
        for number, seed in enumerate(seeds):
            for name, method in (learners | inferers).items():
                if progress is not None:
                    progress(name, done, total)
                with isolated_rng(seed), _untouched(model, method, train):
                    own_model, own_method = copy.deepcopy((model, method))
                    if name in learners:
                        if number:
                            _reset(own_model, own_method, seed)
                        learned[name].append(_learn(own_model, own_method, train, test, exact))
                    else:
                        inferred[name].append(own_method.infer(own_model, *train))
                done += 1
    if progress is not None:
        progress("", total, total)
    return Comparison(
        learning=_learning_table(learned, len(seeds)) if learned else None,
        inference=_inference_table(inferred, reference) if inferred else None,
        fits={name: runs[0].fit for name, runs in learned.items()},
        runs={name: tuple(run.fit for run in runs) for name, runs in learned.items()},
        models={name: runs[0].model for name, runs in learned.items()},
        posteriors={name: runs[0] for name, runs in inferred.items()},
        reference=reference,
        metadata={
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
        learning: one row a learner (pandas), or None. Nats per datum. Columns: `method`; `log_p_train`, `log_p_test`: exact
            log p(x) of the learned model; `bound`, `own_bound`: what the method itself reports at the end, and what that
            is; `gap`: exact minus own bound; `difference`: exact log p(x), on test data where given, minus that of exact
            learning, paired; `model_evaluations`, `seconds`, `note`. `…_se` are standard errors: over seeds where there are
            several; else over rows for `difference`, and of the draws for bounds and gaps.
        inference: one row a method, or None. Columns: `method`, `bound`, `log_evidence`, `gap` (exact minus it), `kl`
            (KL(q‖p) where computable), `marginal_error` (the largest over sites and rows), `ess` (the smallest), `rhat` (the
            largest), `pareto_k` (share of rows above 0.7), `model_evaluations`, `seconds`, `sampled` (whether expectations are
            averages over draws), `note`.
        fits: the `Fit` of each learner at the first seed, learned parameters in `.states`.
        runs: the same for all seeds.
        models: the learned models at the first seed; a plain function stays as it is, its learned parameters are in `fits`.
        posteriors: the posterior of each inference method at the first seed.
        reference: the exact posterior, or None where it does not fit.
        metadata: versions, seeds, sizes and the methods' settings.
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
    """One learning run: the fit, the learned model, and the exact log p(x) of each row where it can be computed."""

    fit: Fit
    model: Program
    train: Tensor | None
    test: Tensor | None
    seconds: float


def _learn(
    model: Program, method: Method, train: tuple[Any, ...], test: tuple[Any, ...] | None, exact: Callable[..., Posterior | None]
) -> _Learned:
    fit = method.fit(model, *train)
    found = [None if data is None else exact(model, data) for data in (train, test)]
    evidence = [None if posterior is None else posterior.log_evidence for posterior in found]
    return _Learned(fit, model, evidence[0], evidence[1], fit.seconds)


def _learning_table(learned: Mapping[str, list[_Learned]], num_seeds: int) -> pd.DataFrame:
    import pandas as pd

    baseline = next((name for name, runs in learned.items() if runs[0].fit.bound == "exact"), None)
    rows = []
    for name, runs in learned.items():
        row: dict[str, Any] = {"method": name}
        row["log_p_train"], row["log_p_train_se"] = _over_seeds(_mean(run.train) for run in runs)
        row["log_p_test"], row["log_p_test_se"] = _over_seeds(_mean(run.test) for run in runs)
        row["bound"] = runs[0].fit.bound
        ends = [run.fit.history[-1] for run in runs]
        row["own_bound"], row["own_bound_se"] = _over_seeds(end["bound"] for end in ends)
        row["gap"], row["gap_se"] = _over_seeds(
            _difference(_mean(run.train), end["bound"]) for run, end in zip(runs, ends, strict=True)
        )
        if len(runs) == 1:  # no spread over seeds; what remains is the noise of the bound itself
            row["own_bound_se"] = ends[0]["stderr"]
            row["gap_se"] = None if row["gap"] is None else ends[0]["stderr"]
        row["difference"], row["difference_se"] = (
            (None, None) if baseline is None or name == baseline else _paired(runs, learned[baseline])
        )
        row["model_evaluations"] = round(sum(run.fit.model_evaluations for run in runs) / len(runs))
        row["seconds"] = sum(run.seconds for run in runs) / len(runs)
        row["note"] = _learning_note(row, baseline, num_seeds)
        rows.append(row)
    return pd.DataFrame(rows)


def _inference_table(inferred: Mapping[str, list[Posterior]], reference: Posterior | None) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for name, posteriors in inferred.items():
        parts = [_inference_row(posterior, reference) for posterior in posteriors]
        row: dict[str, Any] = {"method": name, "bound": posteriors[0].bound}
        for key in parts[0]:
            row[key] = _combine(key, [part[key] for part in parts])
        row["sampled"] = isinstance(posteriors[0], DrawsPosterior)
        row["note"] = _inference_note(posteriors[0], row)
        rows.append(row)
    return pd.DataFrame(rows)


def _inference_row(posterior: Posterior, reference: Posterior | None) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    evidence = posterior.log_evidence
    row["log_evidence"] = _mean(evidence)
    stderr = torch.as_tensor(posterior.stderr)
    row["log_evidence_se"] = (
        None if evidence is None else float(stderr.expand_as(evidence).square().sum().sqrt()) / max(1, evidence.numel())
    )
    exact = None if reference is None else _mean(reference.log_evidence)
    row["gap"] = None if exact is None or row["log_evidence"] is None else exact - row["log_evidence"]
    row["gap_se"] = None if row["gap"] is None else row["log_evidence_se"]
    row["kl"] = row["gap"] if posterior.log_prob is not None and _is_elbo(posterior) else None
    row["marginal_error"] = None if reference is None else _marginal_error(posterior, reference)
    row["ess"], row["rhat"], row["pareto_k"] = _reliability(posterior)
    row["model_evaluations"] = posterior.diagnostics.get("model_evaluations")
    row["seconds"] = posterior.seconds
    return row


def _is_elbo(posterior: Posterior) -> bool:
    """Whether `log_evidence` is E_q[log p(x, z) − log q(z)], so that its gap is KL(q‖p)."""
    return posterior.bound == "exact" or (posterior.bound == "lower" and getattr(posterior, "log_weights", None) is None)


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
        return float(posterior.diagnostics["ess"].min()), None, float((k > 0.7).double().mean())
    return None, None, None


def _extreme(values: Iterable[Tensor], which: Callable[[Iterable[float]], float]) -> float | None:
    finite = [float(which(v[~torch.isnan(v)].tolist())) for v in values if bool((~torch.isnan(v)).any())]
    return which(finite) if finite else None


def _inference_note(posterior: Posterior, row: Mapping[str, Any]) -> str:
    if posterior.bound == "exact":
        return "the reference"
    notes = []
    if row["rhat"] is not None and row["rhat"] > 1.01:
        notes.append(f"R-hat up to {row['rhat']:.3f}: chains disagree, do not trust; run longer")
    if isinstance(posterior, DrawsPosterior) and posterior.shape is not None:
        stuck = sum(int(torch.isnan(v).sum()) for v in (posterior.rhat or {}).values())
        if stuck:
            notes.append(f"{stuck} quantities never moved")
        if row["ess"] is not None and row["ess"] < 100 * posterior.shape[0]:
            notes.append(f"ESS down to {row['ess']:.0f}")
    if row["pareto_k"]:
        notes.append(f"Pareto k > 0.7 on {100 * row['pareto_k']:.0f}% of rows: their numbers cannot be trusted")
    elif row["pareto_k"] is not None and row["ess"] is not None and row["ess"] < 100:
        notes.append(f"ESS down to {row['ess']:.0f} draws")
    if row["kl"] is not None and row["kl"] > 0.1:
        notes.append(f"q is {row['kl']:.2g} nats from the posterior: a bound, not the evidence")
    return "; ".join(notes) or ("estimate" if row["log_evidence"] is None else f"{posterior.bound} bound")


def _learning_note(row: Mapping[str, Any], baseline: str | None, num_seeds: int) -> str:
    notes = []
    if row["method"] == baseline:
        notes.append("the reference")
    if row["log_p_train"] is None:
        notes.append("exact log p(x) does not fit: judged by its bound alone")
    if row["own_bound"] is None:
        notes.append("no bound of its own")
    elif row["gap"] is not None and row["gap"] > 0.1:
        notes.append(f"its bound understates log p(x) by {row['gap']:.2g} nats")
    if row["difference"] is not None and row["difference_se"] is not None:
        over = "seeds" if num_seeds > 1 else "rows"
        if abs(row["difference"]) < 2 * row["difference_se"]:
            notes.append(f"tie with {baseline} (within 2 s.e. over {over})")
    return "; ".join(notes)


def _paired(runs: list[_Learned], baseline: list[_Learned]) -> tuple[float | None, float | None]:
    """Mean difference to the baseline and its standard error: over seeds where there are several, else over rows."""
    differences: list[Tensor | None] = []
    for own, other in zip(runs, baseline, strict=True):
        judged = (own.test, other.test) if own.test is not None and other.test is not None else (own.train, other.train)
        differences.append(None if judged[0] is None or judged[1] is None else judged[0] - judged[1])
    if any(d is None for d in differences):
        return None, None
    found = [d for d in differences if d is not None]
    if len(found) > 1:
        return _over_seeds(float(d.mean()) for d in found)
    rows = found[0].reshape(-1)
    return float(rows.mean()), float(rows.std() / math.sqrt(len(rows))) if len(rows) > 1 else None


def _over_seeds(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard error of one value a seed; None where undefined."""
    found = list(values)
    if not found or any(v is None for v in found):
        return None, None
    tensor = torch.tensor(found, dtype=torch.float64)
    return float(tensor.mean()), float(tensor.std() / math.sqrt(len(found))) if len(found) > 1 else None


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


def _try_exact(exact: Exact, max_evaluations: int, model: Program, args: tuple[Any, ...]) -> Posterior | None:
    """The exact posterior, of the discrete twin where latents are relaxed; None where enumeration refuses or is too long."""
    structure = read_structure(model, args, {})
    if any(latent.kind.startswith("relaxed") for latent in structure.latents):
        model = discretize(model)
    try:
        if ExactLikelihood(max_bytes=exact.max_bytes).model_evaluations(model, *args) > max_evaluations:
            return None
        return exact.infer(model, *args)
    except ValueError:
        return None


@contextmanager
def _untouched(model: Program, method: Method | None, args: tuple[Any, ...]) -> Iterator[None]:
    """Put back, afterwards, the store and the parameters that a run could reach through closures."""
    store = pyro.get_param_store()
    state = {key: dict(value) for key, value in store.get_state().items()}
    saved: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def save(leaves: Iterable[Tensor]) -> None:
        saved.update({id(leaf): (leaf, leaf.detach().clone(), leaf.grad) for leaf in leaves if id(leaf) not in saved})

    save(state["params"].values())
    try:
        for program in (model, *_programs(method)):
            if not isinstance(program, nn.Module):
                save(read_structure(program, args, {}).leaves.values())
        yield
    finally:
        for leaf, value, gradient in saved.values():
            leaf.data.copy_(value)
            leaf.grad = gradient
        store.clear()  # `set_state` alone keeps what is new
        store.set_state(state)


def _programs(method: Method | None) -> list[Program]:
    """Guides that a method holds."""
    guides = [getattr(method, "guide", None), *(_programs(getattr(method, "e_step", None)) if method is not None else [])]
    return [guide for guide in guides if guide is not None]


def _reset(model: Program, method: Method, seed: int) -> None:
    """Draw fresh parameters, from a stream apart from that of the run and of a caller who seeds with the same number."""
    with isolated_rng(0x9E3779B9 ^ seed):
        for program in (model, *_programs(method)):
            for module in program.modules() if isinstance(program, nn.Module) else ():
                reset: Any = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()


def _sort(methods: Mapping[str, Method], *, learn: bool | None) -> tuple[dict[str, Method], dict[str, Method]]:
    if not methods:
        raise ValueError("expected at least one method, got none; pass {'exact': Exact(), ...}")
    learners, inferers = {}, {}
    for name, method in methods.items():
        if hasattr(method, "fit") and learn is not False:
            learners[name] = method
        elif hasattr(method, "infer") and not learn:
            inferers[name] = method
        else:
            need = "fit" if learn else "infer" if learn is False else "fit or infer"
            raise ValueError(f"expected a method with {need}, got {type(method).__name__} for {name!r}; see pyrovae.inference")
    return learners, inferers


def _arguments(x: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


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
