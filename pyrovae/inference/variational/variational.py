"""Variational inference and learning by stochastic gradients, with stock Pyro objectives or ours."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro.infer
import pyro.optim
import torch
from torch import Tensor

from pyrovae.handlers.energy import warn_of_energies
from pyrovae.handlers.structure import frozen_leaves, read_structure
from pyrovae.inference.capture.optimizer import check_steps
from pyrovae.inference.capture.replay import Backend, check_backend
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.elbo.exact_likelihood import ExactLikelihood
from pyrovae.inference.fit import Fit, check_penalty, root_module, snapshot
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Bound, Program, States
from pyrovae.inference.variational.batches import check_device, on_device
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.inference.variational.progress import Bar, in_floats
from pyrovae.inference.variational.schedules import Optimizer, Schedule
from pyrovae.inference.variational.training import Training
from pyrovae.inference.weighing import draw, weigh


class Variational:
    """Fit a guide (and, with `fit`, the model) by stochastic gradients of an evidence bound.

    `fit` learns model and guide together; `infer` leaves the model alone, takes `num_guide_steps` on the guide, in place,
    and evaluates. Reported bounds are those of the programs as written: per datum, discrete latents, KL weight 1; the mean
    of log p(x, z) − log q(z) over draws, a lower bound of log p(x) in expectation, with its standard error.

    With a `temperature`, both programs run through :func:`pyrovae.handlers.relax` while fitting. The relaxed objective is
    not a bound of log p(x): it is logged as `loss`, apart from the hard `bound`.

    `Variational(None, ExactLikelihood())` is exact gradient learning: no guide, nothing sampled.

    Cost of a step: one evaluation of the objective and its gradient on a minibatch.

    **Records.** Every `log_every` steps, and at both ends, the true bound is evaluated with fixed draws, so that two records
    differ by the parameters alone: on the training data, or on `log_rows` fixed, random rows of them, and on all validation
    data, a few rows at a time. Modules are in evaluation mode for it. It does not change the training.

    **Early stopping.** With `patience`, the run ends once as many records have brought no better bound of the validation
    data, and the best parameters are put back, as they are when `num_steps` ends it.

    **Checkpoints.** At every record, `checkpoint` gets `last` and, when its bound is the best so far (of the validation data
    where there are any), `best`; see :mod:`pyrovae.inference.variational.checkpoint`. `fit(..., resume=True)` goes on from
    `last` until `num_steps`, bit for bit as if it had never stopped, with the same data, device, versions and options; other
    data, configs of the programs or options that make another run are refused by name (functions are not compared). The
    optimizer's settings are those of the checkpoint. What a record had not yet seen is done again.

    **Captured steps.** With `capture`, loss and gradients are recorded once as a flat graph of torch operations and replayed,
    with fresh noise and the present parameters, schedules and buffers; see :class:`pyrovae.inference.CapturedSVI`. Bias: none.
    "fx" gives every parameter and record the bits of eager steps (on the CPU); compiled ("inductor", and "auto" where it pays)
    loss and gradients agree to 1e-5 of their norm, and a resumed run still has the bits of an uninterrupted one of the same
    `num_steps`. Cost: about a millisecond an operation to record, some seconds to compile, which the progress bar tells. What
    takes its course from values, replaces tensors instead of writing in them, or makes parameters later cannot be captured; a
    Python number that changes from outside is noticed at the 10th and about every 200th replay (1000th on a GPU).
    `preprocess`, minibatches, averages and the
    schedule of the learning rate stay outside of the graph. On CUDA no captured step waits for the device where the
    optimizer is fused: a loss that is no number stops all updates, and is told within 200 steps.

    Args:
        guide: a Pyro guide with the model's arguments; None for objectives without one.
        elbo: an objective, stock or ours; default `Trace_ELBO` with 10 particles, vectorised where both programs broadcast
            on the left, else one after the other. The loss of an objective that returns several (`ReweightedWakeSleep`, whose
            weights are those of a whole batch) is their sum. Pyro's `Jit…` objectives are refused.
        optim: a function from parameters to a torch optimizer (`partial(torch.optim.Adam, lr=1e-2)`, the default; torch's
            Adam and AdamW are made `fused` where nothing is said of it) or a Pyro optimizer; none that needs a closure (LBFGS).
        num_steps: gradient steps of `fit`; default 1000.
        num_epochs: instead of `num_steps`: passes over the data, each of ⌊N/B⌋ steps (1 without `batch_size`).
        batch_size: rows of a minibatch; None takes all. A program that takes `index` and `num_data` gets them, so that its
            plate scales; any other sees the rows alone and its loss is multiplied by N/B. Rows are taken of every tensor as
            long as the data, unless a few rows are then scored otherwise: such a tensor is shared by all rows.
            Every epoch has a fresh order, and the N mod B rows at its end sit it out.
        temperature: of the relaxation: a float, or a function from the step to one; None does not relax. With `surrogate`, of
            the surrogate's gradient, default 1.
        straight_through: relax with hard values (:func:`pyrovae.handlers.relax`); needs a temperature.
        surrogate: "reinmax" or "straight_through": hard values with a surrogate's gradient
            (:func:`pyrovae.handlers.surrogate`), instead of a relaxation.
        beta: the weight of the KL divergence while fitting (:func:`pyrovae.handlers.scale_kl`): a float, or a function from
            the step to one.
        scheduler: a function from the optimizer to a `torch.optim.lr_scheduler`, stepped at every gradient step
            of `fit`.
        clip_norm: the largest norm of all gradients together.
        num_guide_steps: steps of `infer` on the guide.
        num_samples: draws per datum of the reported bound and posterior.
        penalty: λ, the precision of a Gaussian prior on every parameter of the model. A prior that the model declares by a
            method `log_prior()` is added to the objective of `fit` too.
        average: the decay of an exponential moving average of the parameters (0.999 is usual), which records, checkpoints and
            the end of `fit` use; None keeps none.
        preprocess: applied to the first argument at every step, to every part of the data at a record, and once by `infer`,
            such as `pyrovae.data.binarize`. Records see the same draw of it every time.
        device: where modules and tensors among the arguments are moved, in place and once; minibatches are made there.
            Tensors that a plain function closes over are the user's to move.
        log_every: steps between records of the bound (by `num_log_samples` draws); default 20 records in all.
        num_log_samples: draws per datum of those records.
        log_rows: rows of the training data that a record looks at, at most; None looks at all, which takes a while where there
            are tens of thousands. All where rows are not independent.
        patience: records without improvement before `fit` stops; None never stops early.
        checkpoint: a folder for checkpoints.
        log: a file that gets every record as a line of JSON; a new run starts it anew.
        progress: show a progress bar.
        capture: "off" runs the programs at every step; "fx" replays their graph, "inductor" compiles it, "cudagraph" makes a
            whole step on a GPU one CUDA graph, and these refuse programs that cannot be captured. "auto" replays, and compiles
            where the number of steps pays for it; it runs eagerly, with a warning, what cannot be captured, and without one
            what has less than 500 steps. None, the default, is "auto" where model and guide declare themselves capturable
            (:func:`pyrovae.handlers.declared.declares_capturable`), as those of this library do, else "off".

    Raises:
        ValueError: for numbers out of range, options that exclude one another, an objective that cannot run here, or neither
            guide nor a guide-free objective.

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
        num_steps: int | None = None,
        num_epochs: int | None = None,
        batch_size: int | None = None,
        temperature: Schedule | None = None,
        straight_through: bool = False,
        surrogate: Literal["reinmax", "straight_through"] | None = None,
        beta: Schedule = 1.0,
        scheduler: Callable[[Any], Any] | None = None,
        clip_norm: float | None = None,
        num_guide_steps: int = 0,
        num_samples: int = 1000,
        penalty: float = 0.0,
        average: float | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device | None = None,
        log_every: int | None = None,
        num_log_samples: int = 10,
        log_rows: int | None = None,
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        log: str | Path | None = None,
        progress: bool = False,
        capture: Backend | None = None,
    ) -> None:
        if num_steps is not None and num_epochs is not None:
            raise ValueError(f"expected num_steps or num_epochs, got both, {num_steps} and {num_epochs}; leave one out")
        counts = {"num_steps": (num_steps, 1), "num_epochs": (num_epochs, 1), "num_guide_steps": (num_guide_steps, 0)}
        counts |= {"num_samples": (num_samples, 2), "num_log_samples": (num_log_samples, 2), "batch_size": (batch_size, 1)}
        counts |= {"log_every": (log_every, 1), "log_rows": (log_rows, 1), "patience": (patience, 1)}
        for name, (count, least) in counts.items():
            if count is not None and (not isinstance(count, int) or count < least):
                raise ValueError(f"expected an integer {name} >= {least}, got {count!r}")
        if isinstance(optim, torch.optim.Optimizer):
            raise ValueError(
                f"expected optim to make an optimizer of the parameters, got one that is made, {type(optim).__name__}; pass "
                f"partial(torch.optim.{type(optim).__name__}, lr=...)"
            )
        if guide is None and not isinstance(elbo, ExactLikelihood):
            raise ValueError("expected a guide, got None; only Variational(None, ExactLikelihood()) needs none")
        if isinstance(temperature, (int, float)) and not 0 < temperature < math.inf:
            raise ValueError(f"expected temperature > 0, got {temperature}; values from 0.1 to 1 are usual")
        if isinstance(beta, (int, float)) and not 0 <= beta < math.inf:
            raise ValueError(f"expected beta >= 0, got {beta}; 1 is the evidence bound")
        if guide is None and (temperature is not None or surrogate is not None):
            what = "temperature" if surrogate is None else "surrogate"
            raise ValueError(f"expected no {what} without a guide: exact gradient learning relaxes nothing")
        if guide is None and beta != 1.0:
            raise ValueError(f"expected beta=1 without a guide, got {beta}; log p(x) has no KL divergence to weigh")
        if surrogate not in (None, "reinmax", "straight_through"):
            raise ValueError(f'expected surrogate "reinmax", "straight_through" or None, got {surrogate!r}')
        if straight_through and (temperature is None or surrogate is not None):
            raise ValueError(
                "expected straight_through with a temperature and no surrogate; for the straight-through estimator of softmax "
                'probabilities pass surrogate="straight_through" alone'
            )
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"expected clip_norm > 0, got {clip_norm}")
        if average is not None and not 0 < average < 1:
            raise ValueError(f"expected average, the decay of the mean, in (0, 1), got {average}; 0.999 is usual")
        if scheduler is not None and isinstance(optim, pyro.optim.PyroOptim):
            raise ValueError(
                "expected a torch optimizer with a scheduler, got a Pyro optimizer; pass "
                "optim=partial(torch.optim.Adam, lr=1e-3)"
            )
        if any(base.__name__.startswith("Jit") and base.__module__.startswith("pyro.") for base in type(elbo).__mro__):
            name = type(elbo).__name__
            raise ValueError(
                f"expected an objective that runs the programs at every step, got {name}, which compiles them once with the "
                f"parameters of Pyro's global store; use {name.removeprefix('Jit')}"
            )
        if capture is not None:
            check_backend(capture)
        self.guide, self.elbo_is_default = guide, elbo is None
        self.elbo = pyro.infer.Trace_ELBO(num_particles=10, vectorize_particles=True) if elbo is None else elbo
        self.optim = partial(torch.optim.Adam, lr=1e-2) if optim is None else optim
        check_steps(getattr(self.optim, "func", self.optim))
        self.num_steps = 1000 if num_steps is None and num_epochs is None else num_steps
        self.num_epochs, self.batch_size = num_epochs, batch_size
        self.temperature, self.straight_through, self.surrogate, self.beta = temperature, straight_through, surrogate, beta
        self.scheduler, self.clip_norm, self.average = scheduler, clip_norm, average
        self.num_guide_steps, self.num_samples = num_guide_steps, num_samples
        self.penalty = check_penalty(penalty)
        self.preprocess, self.device = preprocess, device
        self.log_every, self.num_log_samples, self.log_rows = log_every, num_log_samples, log_rows
        self.patience, self.checkpoint, self.log = patience, checkpoint, log
        self.progress, self.capture = progress, capture

    def fit(self, model: Program, *args: Any, validation: Any = None, resume: bool = False, **kwargs: Any) -> Fit:
        """Learn model and guide together, in place.

        Args:
            model: a Pyro program.
            *args: its arguments, the data first.
            validation: other data (a tensor, or a tuple of arguments) whose bound is recorded.
            resume: go on from the last checkpoint in `checkpoint`.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: if there is nothing to learn, model and guide do not match, the programs meet a parameter that the
                optimizer lacks, the particles of `elbo` are vectorised and the programs do not broadcast, or the checkpoint
                is damaged, of another architecture, config or format, of other data, or of other options; if a relaxation is
                asked for that would change nothing; if a tensor as long as the data fits neither as rows nor as shared by all.
            FileExistsError: if `checkpoint` holds a run already and `resume` is False.
            FileNotFoundError: if there is nothing to resume.
            CannotCapture: if the programs cannot be captured, and `capture` names a backend.
            FloatingPointError: if the loss or a gradient is no longer finite, with the first site or parameter that is not;
                parameters stay as they were before that step.
        """
        return Training(self, model, args, kwargs, validation, resume=resume)()

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
        device = check_device(self.device)
        if device is not None:
            for module in (root_module(model), root_module(self.guide)):
                if module is not None:
                    module.to(device)
            args, kwargs = on_device(args, device), on_device(kwargs, device)
        losses, evaluations = list[float](), 0
        if self.num_guide_steps:
            with Optimization(self, model, args, kwargs, learn_model=False) as run:
                losses = self._guide_steps(run)
            evaluations = run.evaluations
        log_joint = LogJoint(model, self._prepared(args), kwargs)
        warn_of_energies(model, args, kwargs, log_joint.structure, learn=False)
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

    def _guide_steps(self, run: Optimization) -> list[float]:
        losses = []
        with Bar(self.num_guide_steps, what="guide", shown=self.progress) as bar:
            run.tell = bar.say
            for step in range(self.num_guide_steps):
                losses.append(run.step(step))
                bar.tell(step + 1)
        run.check()
        return in_floats(losses)

    @property
    def _bound(self) -> Bound:
        return "exact" if self.guide is None else "lower"

    def _prepared(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self.preprocess is None or not args else (self.preprocess(args[0]), *args[1:])


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
