"""The loop that :class:`pyrovae.inference.Variational` runs: programs with their own parameters, one optimizer, minibatches."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyrovae.distributions import PersistentChains
from pyrovae.handlers.anneal import scale_kl
from pyrovae.handlers.energy import warn_of_energies
from pyrovae.handlers.measures import check_bare, check_changes, check_measures
from pyrovae.handlers.own_params import own_params
from pyrovae.handlers.relax import relax
from pyrovae.handlers.structure import read_structure
from pyrovae.handlers.surrogate import surrogate
from pyrovae.inference.capture.journal import undone
from pyrovae.inference.capture.replay import Replay
from pyrovae.inference.elbo.exact_likelihood import ExactLikelihood
from pyrovae.inference.fit import state_of
from pyrovae.inference.log_prior import log_prior_of
from pyrovae.inference.posterior import Program
from pyrovae.inference.rows import minibatch_keys, take
from pyrovae.inference.variational.batches import Batches, num_rows, take_index
from pyrovae.inference.variational.capturing import chosen
from pyrovae.inference.variational.fault import Moment, check_fault, explained, generators
from pyrovae.inference.variational.gradients import broadcasts, discover, loss_and_gradients
from pyrovae.inference.variational.pairing import (
    check_other_rows,
    check_scalable,
    check_sites,
    warn_of_quantized,
    warn_of_scales,
)
from pyrovae.inference.variational.schedules import Dial
from pyrovae.inference.variational.true_bound import evaluating, modules_of
from pyrovae.inference.variational.update import Update

if TYPE_CHECKING:
    from pyrovae.inference.variational.variational import Variational


class Optimization:
    """The state of an optimisation; a context, in which parameters' `.grad` is borrowed.

    Args:
        method: the options.
        model: a Pyro program.
        args: its arguments.
        kwargs: its keyword arguments.
        learn_model: whether the model's parameters move.

    Raises:
        ValueError: if there is nothing to learn, model and guide do not match, or minibatches of the program cannot be scaled.
    """

    def __init__(
        self, method: Variational, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, learn_model: bool
    ) -> None:
        self.method, self.model, self.args, self.kwargs = method, model, args, kwargs
        self.learn_model, self.evaluations = learn_model, 0
        self.rows = num_rows(args)
        self.known = set(pyro.get_param_store()._params)  # before this run
        self.batches = Batches(args, kwargs, method.batch_size, method._prepared)
        self.device = args[0].device if args and isinstance(args[0], Tensor) else torch.device(method.device or "cpu")
        programs = (model,) if method.guide is None else (model, method.guide)
        self.first, self.first_kwargs = self._first(programs)
        structure = read_structure(model, self.first, self.first_kwargs)
        self.leaves: dict[str, dict[str, Tensor]] = {"model": _trainable(structure.leaves)}
        if not isinstance(method.elbo, ExactLikelihood):  # which warns itself
            warn_of_energies(model, self.first, self.first_kwargs, structure, learn=learn_model)
        depth = structure.plate_depth
        if method.guide is not None:
            of_guide = read_structure(method.guide, self.first, self.first_kwargs)
            check_sites(structure, of_guide)
            warn_of_scales(structure, of_guide)
            warn_of_quantized(structure, of_guide)
            depth = max(depth, of_guide.plate_depth)
            self.leaves["guide"] = _trainable(of_guide.leaves)
        if what := "surrogate" if method.surrogate is not None else "temperature" if method.temperature is not None else None:
            for one in (structure, of_guide):
                check_bare(one, what)
            check_changes(structure, what)
        self.frozen = set() if learn_model else {id(leaf) for leaf in self.leaves["model"].values()}
        self.penalty = method.penalty if learn_model else 0.0
        self.log_prior = log_prior_of(model) if learn_model else None
        self.elbo = copy.deepcopy(method.elbo)
        if method.elbo_is_default:
            self.elbo.vectorize_particles = broadcasts(self)
        if math.isinf(getattr(self.elbo, "max_plate_nesting", 0)):  # what Pyro would guess by a run of both, and print
            self.elbo.max_plate_nesting = depth + (self.elbo.vectorize_particles and self.elbo.num_particles > 1)
        self.update: Update | None = None  # made at the first step, when the objective's own parameters are known
        self.tell: Callable[[str], None] = lambda _: None
        self.borrowed: list[tuple[Tensor, Tensor | None]] = []
        if not self.named():
            raise ValueError("expected programs with parameters, got none; there is nothing to learn")
        if method.batch_size is not None and not self.batches.indexed and method.batch_size < self.rows:
            check_scalable(structure)
            check_other_rows(self, programs)
        self.met: dict[str, Tensor] = {}
        self.temperature = self._dial("temperature", method.temperature, 1.0 if method.surrogate else None)
        self.beta = self._dial("beta", None if method.beta == 1.0 else method.beta, None, zero=True)
        self.programs = self._programs()
        epochs = (method.num_epochs or 0) * self.batches.per_epoch
        self.num_steps = (method.num_steps or epochs or 1000) if learn_model else method.num_guide_steps
        self.capture = chosen(method.capture, programs, self.elbo, self.num_steps)
        self.replay = Replay(
            partial(loss_and_gradients, self),
            self._apply,
            programs,
            backend=self.capture,
            num_steps=self.num_steps,
            dry=self.capture != "fx",  # whose graph has the bits of an eager first step
            learns=learn_model,
            optimizer=lambda: None if self.update is None else self.update.recordable(),
            tell=lambda text: self.tell(text),
        )

    def __enter__(self) -> Optimization:
        self.borrowed = [(leaf, leaf.grad) for leaves in self.leaves.values() for leaf in leaves.values()]
        self._hold_chains(held=not self.learn_model)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the parameters the gradients back that they had."""
        self._hold_chains(held=False)
        for leaf, gradient in self.borrowed:
            leaf.grad = gradient
        self.replay.forget()

    def _hold_chains(self, *, held: bool) -> None:
        """Let the chains of a model that does not learn stay where they are."""
        for module in modules_of(self.model):
            if isinstance(module, PersistentChains):
                module.held = held

    def step(self, step: int) -> Tensor:
        """One gradient step; its loss, the sum over the data, 0-d float64.

        Raises:
            FloatingPointError: if the loss or a gradient is not finite, with the first site or parameter that is not; nothing
                has moved. Where steps do not wait for their device, some later call raises it, or :meth:`check`.
        """
        for dial in (self.temperature, self.beta):
            if dial is not None:
                dial.turn(step)
        batch = self.batches.draw()
        waits = self.update is None or not self.update.guard.deferred
        self.moment = Moment(step, batch, generators(self.device) if waits else None)
        with explained(self, self.moment):
            loss = self.replay.step(batch.args, batch.kwargs)
        assert self.update is not None
        self.update.moved()
        self.evaluations += round(batch.rows * self._evaluations_a_row(batch.args, batch.kwargs))
        if self.update.guard.due():
            self.check()
        return loss

    def _apply(self, outputs: Sequence[Any]) -> None:
        """Move the parameters by `(loss, norm, *gradients)`; on a GPU it may become part of a CUDA graph."""
        loss, norm, *gradients = outputs
        assert self.update is not None
        self.update.take(gradients)
        self.update.guard.see(loss, norm)
        if not self.update.guard.deferred:
            self.check()
        self.update.move(norm)

    def check(self) -> None:
        """Refuse to go on from a step whose loss or gradients were not finite.

        Raises:
            FloatingPointError: as :meth:`step`.
        """
        if self.update is not None and (fault := self.update.guard.read()) is not None:
            check_fault(self, fault)

    def forget(self) -> None:
        """Clear `.grad` of all parameters."""
        for leaves in self.leaves.values():
            for leaf in leaves.values():
                leaf.grad = None

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What model, guide and the objective itself (its baselines) have learned so far, of those that have parameters."""
        programs = {"model": self.model, "guide": self.method.guide}
        found = {name: state_of(programs.get(name), leaves) for name, leaves in self.leaves.items()}
        return {name: state for name, state in found.items() if state}

    def discover(self) -> None:
        """Run the objective once, moving nothing, so that its own parameters (a baseline's net) are known."""
        with self, undone():
            self.forget()
            discover(self, self.first, self.first_kwargs)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which parameters are their moving averages, where there are any."""
        average = None if self.update is None else self.update.average
        if average is None:
            yield
            return
        average.swap()
        try:
            yield
        finally:
            average.swap()

    def _first(self, programs: tuple[Program, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a first call: those of a minibatch, where there are any."""
        size, batches = self.method.batch_size, self.batches
        if size is None:
            return self.method._prepared(self.args), self.kwargs
        index = torch.arange(size, device=self.device)
        with evaluating([module for program in programs for module in modules_of(program)]):
            batches.keys = minibatch_keys(programs, self.args, self.kwargs, self.rows, prepare=self.method._prepared)
        args, kwargs = take(self.args, self.kwargs, index, batches.keys)
        args = self.method._prepared(args)
        batches.indexed = take_index(programs, args, kwargs, index, self.rows)
        return args, kwargs | ({"index": index, "num_data": self.rows} if batches.indexed else {})

    def named(self) -> dict[str, Tensor]:
        """What is learned, by name; a parameter of model and guide stands once."""
        once = {id(leaf): (name, leaf) for leaves in self.leaves.values() for name, leaf in leaves.items()}
        return dict(named for key, named in once.items() if key not in self.frozen)

    def make_update(self, used: Any) -> None:
        """An optimizer of all that is learned; what the objective itself used, such as a baseline's net, is learned too."""
        known = {id(leaf) for leaves in self.leaves.values() for leaf in leaves.values()} | {id(x) for x in self.met.values()}
        own = {}
        for name, node in {} if used is None else used.nodes.items():
            leaf = node["value"].unconstrained() if hasattr(node["value"], "unconstrained") else node["value"]
            if id(leaf) not in known and leaf.requires_grad:
                own[name] = leaf
        if own:
            self.leaves["objective"] = own
            self.borrowed += [(leaf, None) for leaf in own.values()]
        self.update = Update(self.method, self.named(), learn_model=self.learn_model)

    def _dial(self, name: str, schedule: Any, default: float | None, *, zero: bool = False) -> Dial | None:
        schedule = default if schedule is None else schedule
        return None if schedule is None else Dial(name, schedule, self.device, zero=zero)

    def _programs(self) -> tuple[Program, Program | None]:
        """The programs as they are fitted: relaxed or with surrogate gradients, then the KL weight, then own parameters."""
        method = self.method
        pair: list[Program] = [self.model] if method.guide is None else [self.model, method.guide]
        if method.surrogate is not None and self.temperature is not None:
            pair = [surrogate(program, method.surrogate, self.temperature.tensor) for program in pair]
        elif self.temperature is not None:
            pair = [relax(program, self.temperature.tensor, method.straight_through) for program in pair]
        if self.beta is not None:
            pair = [scale_kl(program, self.beta.tensor) for program in pair]
        if len(pair) == 2:
            check_measures(*(read_structure(program, self.first, self.first_kwargs) for program in pair))
        owned = [own_params(program, self.met) for program in pair]
        return owned[0], owned[1] if len(owned) == 2 else None

    def _evaluations_a_row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        if not hasattr(self, "_cost"):
            if isinstance(self.elbo, ExactLikelihood):
                rows = self.method.batch_size or self.rows
                self._cost = self.elbo.model_evaluations(self.model, *args, **kwargs) / rows
            else:
                self._cost = float(getattr(self.elbo, "num_particles", 1))
        return self._cost

    def check_met(self) -> None:
        """Refuse parameters that the programs had not at their first run.

        Raises:
            ValueError: with the name of one.
        """
        known = {id(leaf) for leaves in self.leaves.values() for leaf in leaves.values()}
        unknown = sorted(name for name, leaf in self.met.items() if leaf.requires_grad and id(leaf) not in known)
        if unknown:
            raise ValueError(
                f"expected every parameter at the first run of the programs, got {unknown[0]!r} later; it would never be "
                "trained, create it at construction"
            )


def _trainable(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
