"""Variational inference and learning by stochastic gradients, with stock Pyro objectives or ours."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import pyro.infer
import torch
from torch import Tensor
from tqdm.auto import trange

from pyrovae.handlers.structure import frozen_leaves, read_structure
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.elbo.exact_likelihood import ExactLikelihood
from pyrovae.inference.exact import Exact
from pyrovae.inference.fit import Fit, check_penalty, snapshot, versions
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.optimization import Optimization
from pyrovae.inference.posterior import Bound, Program, States
from pyrovae.inference.weighing import draw, weigh
from pyrovae.ops import isolated_rng

Optimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer] | Any  # or a pyro.optim.PyroOptim


class Variational:
    """Fit a guide (and, with `fit`, the model) by stochastic gradients of an evidence bound.

    `fit` learns model and guide together; `infer` leaves the model alone, takes `num_guide_steps` on the guide, in place,
    and evaluates. Reported bounds are those of the programs as written: per datum, discrete latents, KL weight 1; the mean
    of log p(x, z) − log q(z) over draws, a lower bound of log p(x) in expectation, with its standard error.

    With a `temperature`, both programs run through :func:`pyrovae.handlers.relax` while fitting. The relaxed objective is
    not a bound of log p(x): it is logged as `loss`, apart from the hard `bound`.

    `Variational(None, ExactLikelihood())` is exact gradient learning: no guide, nothing sampled.

    Cost of a step: one evaluation of the objective and its gradient on a minibatch.

    Args:
        guide: a Pyro guide with the model's arguments; None for objectives without one.
        elbo: an objective, stock or ours; default `Trace_ELBO` with 10 particles, vectorised where both programs broadcast
            on the left, else one after the other. The loss of an objective that returns several (`ReweightedWakeSleep`, whose
            weights are those of a whole batch) is their sum. Pyro's `Jit…` objectives are refused.
        optim: a function from parameters to a torch optimizer (`partial(torch.optim.Adam, lr=1e-2)`, the default) or a
            Pyro optimizer.
        num_steps: gradient steps of `fit`.
        batch_size: rows of a minibatch; None takes all. A program that takes `index` and `num_data` gets them, so that its
            plate scales; any other sees the rows alone and its loss is multiplied by N/B.
        temperature: of the relaxation: a float, or a function from the step to one; None does not relax.
        num_guide_steps: steps of `infer` on the guide.
        num_samples: draws per datum of the reported bound and posterior.
        penalty: λ, the precision of a Gaussian prior on every parameter of the model.
        preprocess: applied to the first argument at every step, at every record of the bound and once by `infer`, such as
            `pyrovae.data.binarize`.
        log_every: steps between records of the bound (by `num_log_samples` draws); default 20 records in all.
        num_log_samples: draws per datum of those records.
        progress: show a progress bar.

    Raises:
        ValueError: for numbers out of range, an objective that cannot run here, or neither guide nor a guide-free objective.

    References:
        Automated Variational Inference in Probabilistic Programming (Wingate and Weber, 2013)
        https://arxiv.org/abs/1301.1299
        Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2017)
        https://arxiv.org/abs/1611.01144
    """

    def __init__(
        self,
        guide: Program | None,
        elbo: pyro.infer.ELBO | None = None,
        *,
        optim: Optimizer | None = None,
        num_steps: int = 1000,
        batch_size: int | None = None,
        temperature: float | Callable[[int], float] | None = None,
        num_guide_steps: int = 0,
        num_samples: int = 1000,
        penalty: float = 0.0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        log_every: int | None = None,
        num_log_samples: int = 10,
        progress: bool = False,
    ) -> None:
        if num_steps < 1 or num_guide_steps < 0 or num_samples < 2 or num_log_samples < 2:
            raise ValueError(
                "expected num_steps >= 1, num_guide_steps >= 0, num_samples >= 2 and num_log_samples >= 2, got "
                f"{num_steps}, {num_guide_steps}, {num_samples} and {num_log_samples}"
            )
        if (batch_size is not None and batch_size < 1) or (log_every is not None and log_every < 1):
            raise ValueError(f"expected batch_size >= 1 and log_every >= 1, got {batch_size} and {log_every}")
        if guide is None and not isinstance(elbo, ExactLikelihood):
            raise ValueError("expected a guide, got None; only Variational(None, ExactLikelihood()) needs none")
        if isinstance(temperature, (int, float)) and not temperature > 0:
            raise ValueError(f"expected temperature > 0, got {temperature}; values from 0.1 to 1 are usual")
        if guide is None and temperature is not None:
            raise ValueError("expected no temperature without a guide: exact gradient learning relaxes nothing")
        if any(base.__name__.startswith("Jit") and base.__module__.startswith("pyro.") for base in type(elbo).__mro__):
            name = type(elbo).__name__
            raise ValueError(
                f"expected an objective that runs the programs at every step, got {name}, which compiles them once with the "
                f"parameters of Pyro's global store; use {name.removeprefix('Jit')}"
            )
        self.guide, self.elbo_is_default = guide, elbo is None
        self.elbo = pyro.infer.Trace_ELBO(num_particles=10, vectorize_particles=True) if elbo is None else elbo
        self.optim = partial(torch.optim.Adam, lr=1e-2) if optim is None else optim
        self.num_steps, self.batch_size, self.temperature = num_steps, batch_size, temperature
        self.num_guide_steps, self.num_samples = num_guide_steps, num_samples
        self.penalty = check_penalty(penalty)
        self.preprocess, self.log_every, self.num_log_samples = preprocess, log_every, num_log_samples
        self.progress = progress

    def fit(self, model: Program, *args: Any, validation: Any = None, **kwargs: Any) -> Fit:
        """Learn model and guide together, in place.

        Args:
            model: a Pyro program.
            *args: its arguments, the data first.
            validation: other data (a tensor, or a tuple of arguments) whose bound is logged.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: if there is nothing to learn, the programs meet a parameter that the optimizer lacks, or the particles
                of `elbo` are vectorised and the programs do not broadcast.
            FloatingPointError: if the loss is no longer finite; parameters stay as they were before that step.
        """
        begin, seed = time.perf_counter(), torch.initial_seed()
        every = self.log_every or max(1, self.num_steps // 20)
        history: list[dict[str, Any]] = []
        losses: list[float] = []
        held_out = self._held_out(validation, model, kwargs)
        with Optimization(self, model, args, kwargs, learn_model=True) as run:
            for step in trange(self.num_steps, desc="Variational", disable=not self.progress):
                if step % every == 0:
                    history.append(self._record(run, step, losses, held_out, begin))
                    losses = []
                losses.append(run.step(step))
        history.append(self._record(run, self.num_steps, losses, held_out, begin))
        return Fit(
            history=tuple(history),
            bound=self._bound,
            states=run.states(),
            seconds=time.perf_counter() - begin,
            model_evaluations=run.evaluations,
            seed=seed,
            penalty=self.penalty,
            versions=versions(),
        )

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> DrawsPosterior:
        """Take `num_guide_steps` on the guide, the model frozen, and draw from it.

        Args:
            model: a Pyro program; its parameters stay as they are.
            *args: its arguments, the data first. A `preprocess` is applied to it: at every step on the guide, and once for
                the posterior, which is that of one draw of the preprocessed data where `preprocess` is random.
            **kwargs: its keyword arguments.

        Returns:
            A posterior of `num_samples` draws; `log_evidence` is the evidence lower bound, −inf with `stderr` inf where the
            guide draws what the model excludes. `diagnostics["losses"]` are
            the losses of the steps on the guide.

        Raises:
            ValueError: if there is no guide.
        """
        if self.guide is None:
            raise ValueError("expected a guide to infer with, got None; use Exact for the exact posterior")
        begin = time.perf_counter()
        losses, evaluations = [], 0
        if self.num_guide_steps:
            with Optimization(self, model, args, kwargs, learn_model=False) as run:
                losses = [run.step(step) for step in trange(self.num_guide_steps, desc="guide", disable=not self.progress)]
            evaluations = run.evaluations
        log_joint = LogJoint(model, self._prepared(args), kwargs)
        states, log_w = weigh(log_joint, self.guide, self.num_samples)
        latents, rows = log_joint.structure.latents, log_joint.structure.batch_shape.numel()
        return VariationalPosterior(
            structure=log_joint.structure,
            log_evidence=log_w.mean(0),
            bound="lower",
            stderr=(log_w.std(0) / math.sqrt(self.num_samples)).masked_fill(torch.isneginf(log_w).any(0), math.inf),
            diagnostics={"model_evaluations": evaluations + self.num_samples * rows, "losses": tuple(losses)},
            seconds=time.perf_counter() - begin,
            log_joint=log_joint,
            codes={s.name: s.encode(states[s.name]).to(torch.int32) for s in latents if s.finite},
            values={s.name: states[s.name] for s in latents if not s.finite},
            guide=_FrozenGuide(self.guide, log_joint),
        )

    @property
    def _bound(self) -> Bound:
        return "exact" if self.guide is None else "lower"

    def _record(
        self, run: Optimization, step: int, losses: list[float], held_out: tuple[Any, ...] | None, begin: float
    ) -> dict[str, Any]:
        with isolated_rng():  # looking at the bound does not change the training
            bound, stderr = self._evaluate(run, run.args)
            validation = None if held_out is None else self._evaluate(run, held_out)[0]
        return {
            "step": step,
            "loss": sum(losses) / len(losses) if losses else None,
            "bound": bound,
            "stderr": stderr,
            "validation": validation,
            "seconds": time.perf_counter() - begin,
        }

    def _held_out(self, validation: Any, model: Program, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Arguments of the validation data; None where the guide has no parameters for other rows, but one set a datum."""
        if validation is None:
            return None
        with isolated_rng():
            args = self._prepared(validation if isinstance(validation, tuple) else (validation,))
        read_structure(model, args, kwargs)  # data that the model refuses are an error
        try:
            if self.guide is not None:
                read_structure(self.guide, args, kwargs)
        except ValueError:
            return None
        return validation if isinstance(validation, tuple) else (validation,)

    def _prepared(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self.preprocess is None or not args else (self.preprocess(args[0]), *args[1:])

    def _evaluate(self, run: Optimization, args: tuple[Any, ...]) -> tuple[float, float]:
        """The bound per datum, and its standard error; the evaluations that it takes count as the run's."""
        args = self._prepared(args)
        if self.guide is None:
            assert isinstance(self.elbo, ExactLikelihood)
            posterior = Exact(max_bytes=self.elbo.max_bytes).infer(run.model, *args, **run.kwargs)
            run.evaluations += int(posterior.diagnostics["model_evaluations"])
            assert posterior.log_evidence is not None
            return float(posterior.log_evidence.mean()), 0.0
        log_w = weigh(LogJoint(run.model, args, run.kwargs), self.guide, self.num_log_samples)[1]
        rows = max(1, log_w[0].numel())
        run.evaluations += log_w.numel()
        if bool(torch.isneginf(log_w).any()):
            return -math.inf, math.inf
        return float(log_w.mean()), float((log_w.var(0) / log_w.shape[0]).sum().sqrt() / rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class VariationalPosterior(DrawsPosterior):
    """q(z | x) as the guide was when it was evaluated."""

    guide: _FrozenGuide = field(repr=False)

    def sample(self, n: int) -> States:
        """`n` fresh draws from the guide, `{site: [n, batch, …]}`."""
        if n <= 0:
            raise ValueError(f"expected n > 0 draws, got {n}")
        return self.guide.sample(n)

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log q(z) `[n, batch]` of states `{site: [n, batch, …]}`."""
        return self.guide.log_prob(z)


class _FrozenGuide:
    """A guide with the parameters that it had."""

    def __init__(self, guide: Program, log_joint: LogJoint) -> None:
        self.guide, self.log_joint = guide, log_joint
        self.leaves = read_structure(guide, log_joint.args, log_joint.kwargs).leaves
        self.values = snapshot(self.leaves)
        self.log_q = LogJoint(guide, log_joint.args, log_joint.kwargs, structure=log_joint.structure)

    def sample(self, n: int) -> States:
        joint = self.log_joint
        with torch.no_grad(), frozen_leaves(self.leaves, self.values):
            return draw(self.guide, joint, n).states

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), frozen_leaves(self.leaves, self.values):
            return self.log_q(z)
