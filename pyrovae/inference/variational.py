"""Variational inference and learning by stochastic gradients, with stock Pyro objectives or ours."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import pyro.infer
import pyro.optim
import torch
from torch import Tensor
from tqdm.auto import trange

from pyrovae.handlers.own_params import own_params
from pyrovae.handlers.relax import relax
from pyrovae.handlers.structure import frozen_leaves, read_structure
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.elbo.exact_likelihood import ExactLikelihood
from pyrovae.inference.exact import Exact
from pyrovae.inference.fit import Fit, check_penalty, snapshot, squared_norm, versions
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Bound, Program, States
from pyrovae.inference.weighing import draw, weigh

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
        elbo: an objective, stock or ours; default `Trace_ELBO` with 10 vectorised particles.
        optim: a function from parameters to a torch optimizer (`partial(torch.optim.Adam, lr=1e-2)`, the default) or a
            Pyro optimizer.
        num_steps: gradient steps of `fit`.
        batch_size: rows of a minibatch; None takes all. A program that takes `index` and `num_data` gets them, so that its
            plate scales; any other sees the rows alone and its loss is multiplied by N/B.
        temperature: of the relaxation: a float, or a function from the step to one; None does not relax.
        num_guide_steps: steps of `infer` on the guide.
        num_samples: draws per datum of the reported bound and posterior.
        penalty: λ, the precision of a Gaussian prior on every parameter of the model.
        preprocess: applied to the first argument at every step, such as `pyrovae.data.binarize`.
        log_every: steps between records of the bound (by `num_log_samples` draws); default 20 records in all.
        num_log_samples: draws per datum of those records.
        progress: show a progress bar.

    Raises:
        ValueError: for numbers out of range, or neither guide nor a guide-free objective.

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
        if guide is None and temperature is not None:
            raise ValueError("expected no temperature without a guide: exact gradient learning relaxes nothing")
        self.guide = guide
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
            ValueError: if there is nothing to learn, or the programs meet a parameter that the optimizer lacks.
            FloatingPointError: if the loss is no longer finite; parameters stay as they were before that step.
        """
        begin, seed = time.perf_counter(), torch.initial_seed()
        run = _Run(self, model, args, kwargs, learn_model=True)
        every = self.log_every or max(1, self.num_steps // 20)
        history: list[dict[str, Any]] = []
        losses: list[float] = []
        for step in trange(self.num_steps, desc="Variational", disable=not self.progress):
            if step % every == 0:
                history.append(self._record(run, step, losses, validation, begin))
                losses = []
            losses.append(run.step(step))
        history.append(self._record(run, self.num_steps, losses, validation, begin))
        run.close()
        return Fit(
            history=tuple(history),
            bound=self._bound,
            states={name: snapshot(leaves) for name, leaves in run.leaves.items() if leaves},
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
            *args: its arguments, the data first.
            **kwargs: its keyword arguments.

        Returns:
            A posterior of `num_samples` draws; `log_evidence` is the evidence lower bound. `diagnostics["losses"]` are
            the losses of the steps on the guide.

        Raises:
            ValueError: if there is no guide.
        """
        if self.guide is None:
            raise ValueError("expected a guide to infer with, got None; use Exact for the exact posterior")
        begin = time.perf_counter()
        losses, evaluations = [], 0
        if self.num_guide_steps:
            run = _Run(self, model, args, kwargs, learn_model=False)
            losses = [run.step(step) for step in trange(self.num_guide_steps, desc="guide", disable=not self.progress)]
            run.close()
            evaluations = run.evaluations
        log_joint = LogJoint(model, args, kwargs)
        states, log_w = weigh(log_joint, self.guide, self.num_samples)
        latents, rows = log_joint.structure.latents, log_joint.structure.batch_shape.numel()
        return VariationalPosterior(
            structure=log_joint.structure,
            log_evidence=log_w.mean(0),
            bound="lower",
            stderr=log_w.std(0) / math.sqrt(self.num_samples),
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

    def _record(self, run: _Run, step: int, losses: list[float], validation: Any, begin: float) -> dict[str, Any]:
        bound, stderr = self._evaluate(run.model, run.args, run.kwargs)
        held_out = None
        if validation is not None:
            others = validation if isinstance(validation, tuple) else (validation,)
            held_out = self._evaluate(run.model, others, run.kwargs)[0] if self._serves(others, run) else None
        loss = sum(losses) / len(losses) if losses else None
        return {
            "step": step,
            "loss": loss,
            "bound": bound,
            "stderr": stderr,
            "validation": held_out,
            "seconds": time.perf_counter() - begin,
        }

    def _serves(self, others: tuple[Any, ...], run: _Run) -> bool:
        """Whether the guide has parameters for other rows: a table of one entry a datum has not."""
        if self.guide is None:
            return True
        try:
            read_structure(self.guide, others, run.kwargs)
        except ValueError:
            return False
        return True

    def _evaluate(self, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
        """The bound per datum, and its standard error."""
        if self.preprocess is not None:
            args = (self.preprocess(args[0]), *args[1:])
        if self.guide is None:
            assert isinstance(self.elbo, ExactLikelihood)
            return float(Exact(max_bytes=self.elbo.max_bytes).infer(model, *args, **kwargs).log_evidence.mean()), 0.0  # type: ignore[union-attr]
        log_w = weigh(LogJoint(model, args, kwargs), self.guide, self.num_log_samples)[1]
        rows = max(1, log_w[0].numel())
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

    def sample(self, n: int) -> States:
        joint = self.log_joint
        with torch.no_grad(), frozen_leaves(self.leaves, self.values):
            return draw(self.guide, joint.args, joint.kwargs, n, joint.structure, vectorized=joint.broadcasts)[0]

    def log_prob(self, z: Mapping[str, Tensor]) -> Tensor:
        joint = self.log_joint
        with torch.no_grad(), frozen_leaves(self.leaves, self.values):
            return LogJoint(self.guide, joint.args, joint.kwargs, structure=joint.structure)(z)


class _Run:
    """The state of an optimisation: programs with their own parameters, one optimizer, minibatches."""

    def __init__(
        self, method: Variational, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, learn_model: bool
    ) -> None:
        self.method, self.model, self.args, self.kwargs = method, model, args, kwargs
        self.evaluations = 0
        self.rows = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else 1
        if method.batch_size is not None and method.batch_size > self.rows:
            raise ValueError(f"expected batch_size <= the {self.rows} rows of the data, got {method.batch_size}")
        first = self._prepared(args)
        self.leaves: dict[str, dict[str, Tensor]] = {"model": _trainable(read_structure(model, first, kwargs).leaves)}
        if method.guide is not None:
            self.leaves["guide"] = _trainable(read_structure(method.guide, first, kwargs).leaves)
        learned = [leaf for part, leaves in self.leaves.items() for leaf in leaves.values() if part == "guide" or learn_model]
        learned = list({id(leaf): leaf for leaf in learned}.values())
        if not learned:
            raise ValueError("expected programs with parameters, got none; there is nothing to learn")
        self.learned = learned
        self.everything = [leaf for leaves in self.leaves.values() for leaf in leaves.values()]
        self.gradients = [leaf.grad for leaf in self.everything]
        self.penalty = method.penalty if learn_model else 0.0
        self.optimizer = (
            copy.deepcopy(method.optim) if isinstance(method.optim, pyro.optim.PyroOptim) else method.optim(learned)
        )
        self.elbo = copy.deepcopy(method.elbo)
        self.met: dict[str, Tensor] = {}
        self.batches = self._minibatches()
        self.temperature = torch.tensor(1.0)
        self.programs = self._programs()

    def step(self, step: int) -> float:
        """One gradient step; its loss, the sum over the data."""
        method = self.method
        if callable(method.temperature):
            self.temperature.fill_(method.temperature(step))
        args, kwargs, scale, rows = next(self.batches)
        for leaf in self.everything:
            leaf.grad = None
        self.met.clear()
        loss = float(self.elbo.loss_and_grads(*self.programs, *args, **kwargs)) * scale
        self._check_met()
        self.evaluations += rows * self._evaluations_a_row(args, kwargs)
        model_leaves = self.leaves["model"]
        if self.penalty and model_leaves:
            loss += self.penalty / 2 * float(squared_norm(model_leaves))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"expected a finite loss, got {loss} at step {step}; lower the learning rate, or raise the temperature"
            )
        known = {id(leaf) for leaf in model_leaves.values()}
        for leaf in self.learned:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            elif scale != 1:
                leaf.grad.mul_(scale)
            if self.penalty and id(leaf) in known:
                leaf.grad.add_(leaf.detach(), alpha=self.penalty)
        if isinstance(self.optimizer, pyro.optim.PyroOptim):
            self.optimizer(self.learned)
        else:
            self.optimizer.step()
        return loss

    def close(self) -> None:
        """Give the parameters the gradients back that they had."""
        for leaf, gradient in zip(self.everything, self.gradients, strict=True):
            leaf.grad = gradient

    def _programs(self) -> tuple[Program, Program | None]:
        method = self.method
        model: Program = self.model
        guide = method.guide
        if method.temperature is not None and guide is not None:
            self.temperature.fill_(method.temperature(0) if callable(method.temperature) else method.temperature)
            model, guide = relax(model, self.temperature), relax(guide, self.temperature)
        return own_params(model, self.met), None if guide is None else own_params(guide, self.met)

    def _minibatches(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], float, int]]:
        """Arguments, keyword arguments, the factor of the loss and the number of rows of every step."""
        size = self.method.batch_size
        if size is None:
            while True:
                yield self._prepared(self.args), self.kwargs, 1.0, self.rows
        assert size is not None
        indexed = _takes_index(self.model) and (self.method.guide is None or _takes_index(self.method.guide))
        device = self.args[0].device
        while True:
            order = torch.randperm(self.rows, device=device)
            for start in range(0, self.rows - size + 1, size):
                index = order[start : start + size]
                rows = self._prepared(tuple(_rows(a, index, self.rows) for a in self.args))
                kwargs = {name: _rows(a, index, self.rows) for name, a in self.kwargs.items()}
                if indexed:
                    yield rows, kwargs | {"index": index, "num_data": self.rows}, 1.0, size
                else:
                    yield rows, kwargs, self.rows / size, size

    def _prepared(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        preprocess = self.method.preprocess
        return args if preprocess is None or not args else (preprocess(args[0]), *args[1:])

    def _evaluations_a_row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if not hasattr(self, "_cost"):
            if isinstance(self.elbo, ExactLikelihood):
                self._cost = self.elbo.model_evaluations(self.model, *args, **kwargs) // max(1, len(args[0]))
            else:
                self._cost = int(getattr(self.elbo, "num_particles", 1))
        return self._cost

    def _check_met(self) -> None:
        known = {id(leaf) for leaf in self.everything}
        unknown = sorted(name for name, leaf in self.met.items() if leaf.requires_grad and id(leaf) not in known)
        if unknown:
            raise ValueError(
                f"expected every parameter at the first run of the programs, got {unknown[0]!r} later; it would never be "
                "trained, create it at construction"
            )


def _trainable(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}


def _takes_index(program: Program) -> bool:
    call = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        names = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False
    return {"index", "num_data"} <= set(names) or any(p.kind is p.VAR_KEYWORD for p in names.values())


def _rows(argument: Any, index: Tensor, rows: int) -> Any:
    """The rows of a tensor as long as the data; anything else as it is."""
    return argument[index] if isinstance(argument, Tensor) and argument.dim() and len(argument) == rows else argument
