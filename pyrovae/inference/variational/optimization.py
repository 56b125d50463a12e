"""The loop that :class:`pyrovae.inference.Variational` runs: programs with their own parameters, one optimizer, minibatches."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import pyro.optim
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.distributions import PersistentChains
from pyrovae.handlers.anneal import scale_kl
from pyrovae.handlers.energy import warn_of_energies
from pyrovae.handlers.measures import check_bare, check_changes, check_measures
from pyrovae.handlers.own_params import own_params
from pyrovae.handlers.relax import relax
from pyrovae.handlers.structure import Structure, read_structure
from pyrovae.handlers.surrogate import surrogate
from pyrovae.inference.elbo.exact_likelihood import ExactLikelihood
from pyrovae.inference.fit import squared_norm, state_of
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.log_prior import log_prior_of
from pyrovae.inference.posterior import Program
from pyrovae.inference.rows import minibatch_keys, take
from pyrovae.inference.variational.batches import Batches, check_scalable, num_rows, take_index
from pyrovae.inference.variational.fault import check_gradients, explained, found_fault, generators
from pyrovae.inference.variational.schedules import Average, Dial, make_optimizer, make_scheduler, names_in_store
from pyrovae.inference.variational.true_bound import evaluating, modules_of
from pyrovae.ops import isolated_rng

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
            _check_sites(structure, of_guide)
            _warn_of_scales(structure, of_guide)
            _warn_of_quantized(structure, of_guide)
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
            self.elbo.vectorize_particles = self._broadcasts()
        if math.isinf(getattr(self.elbo, "max_plate_nesting", 0)):  # what Pyro would guess by a run of both, and print
            self.elbo.max_plate_nesting = depth + (self.elbo.vectorize_particles and self.elbo.num_particles > 1)
        self.optimizer: Any = None  # made at the first step, when the objective's own parameters are known
        self.scheduler: Any = None
        self.average: Average | None = None
        self.learned: list[Tensor] = []
        self.gradients: list[tuple[Tensor, Tensor | None]] = []
        if not self.named():
            raise ValueError("expected programs with parameters, got none; there is nothing to learn")
        if method.batch_size is not None and not self.batches.indexed and method.batch_size < self.rows:
            check_scalable(structure)
            self._check_other_rows(programs)
        self.met: dict[str, Tensor] = {}
        self.temperature = self._dial("temperature", method.temperature, 1.0 if method.surrogate else None)
        self.beta = self._dial("beta", None if method.beta == 1.0 else method.beta, None, zero=True)
        self.programs = self._programs()

    def __enter__(self) -> Optimization:
        self.gradients = [(leaf, leaf.grad) for leaves in self.leaves.values() for leaf in leaves.values()]
        self._hold_chains(held=not self.learn_model)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the parameters the gradients back that they had."""
        self._hold_chains(held=False)
        for leaf, gradient in self.gradients:
            leaf.grad = gradient

    def _hold_chains(self, *, held: bool) -> None:
        """Let the chains of a model that does not learn stay where they are."""
        for module in modules_of(self.model):
            if isinstance(module, PersistentChains):
                module.held = held

    def step(self, step: int) -> float:
        """One gradient step; its loss, the sum over the data.

        Raises:
            FloatingPointError: if the loss or a gradient is not finite, with the first site or parameter that is not; nothing
                has moved.
        """
        for dial in (self.temperature, self.beta):
            if dial is not None:
                dial.turn(step)
        batch = self.batches.draw()
        for leaf, _ in self.gradients:
            leaf.grad = None
        before = generators(self.device)
        with explained(self, batch, before, step):
            if self.optimizer is None:
                self.met.clear()
                with poutine.trace(param_only=True) as used:
                    loss = self._loss_and_grads(batch.args, batch.kwargs) * batch.factor
            else:
                loss = self._loss_and_grads(batch.args, batch.kwargs) * batch.factor
        self._check_met()
        if self.optimizer is None:
            self.make_optimizer(used.trace)
        self.evaluations += round(batch.rows * self._evaluations_a_row(batch.args, batch.kwargs))
        model_leaves = self.leaves["model"]
        if self.penalty and model_leaves:
            loss += self.penalty / 2 * float(squared_norm(model_leaves).detach())
        log_prior = None if self.log_prior is None else self.log_prior()
        if log_prior is not None:
            loss -= float(log_prior.detach())
        if not math.isfinite(loss):
            raise found_fault(self, batch, before, f"expected a finite loss, got {loss} at step {step}")
        missing = [leaf for leaf in self.learned if leaf.grad is None]
        for leaf in missing:
            leaf.grad = torch.zeros_like(leaf)
        gradients = [leaf.grad for leaf in self.learned if leaf.grad is not None]
        if batch.factor != 1:
            torch._foreach_mul_(gradients, batch.factor)
        if self.penalty:
            for leaf in {id(leaf): leaf for leaf in model_leaves.values()}.values():
                assert leaf.grad is not None
                leaf.grad.add_(leaf.detach(), alpha=self.penalty)
        if log_prior is not None and log_prior.requires_grad:
            wanted = [leaf for leaf in self.learned if leaf.requires_grad]
            for leaf, gradient in zip(wanted, torch.autograd.grad(log_prior, wanted, allow_unused=True), strict=True):
                if gradient is not None and leaf.grad is not None:
                    leaf.grad.sub_(gradient)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            check_gradients(self.leaves, step)
        if self.method.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.learned, self.method.clip_norm, norm)
        self._move()
        return loss

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What model, guide and the objective itself (its baselines) have learned so far, of those that have parameters."""
        programs = {"model": self.model, "guide": self.method.guide}
        found = {name: state_of(programs.get(name), leaves) for name, leaves in self.leaves.items()}
        return {name: state for name, state in found.items() if state}

    def discover(self) -> None:
        """Run the objective once, moving nothing, so that its own parameters (a baseline's net) are known."""
        with isolated_rng(), poutine.trace(param_only=True) as used:
            self._loss_and_grads(self.first, self.first_kwargs)
        for leaf, _ in self.gradients:
            leaf.grad = None
        self.make_optimizer(used.trace)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which parameters are their moving averages, where there are any."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

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

    def _check_other_rows(self, programs: tuple[Program, ...]) -> None:
        """Refuse programs with parameters for each row that no `index` reaches: minibatches would share them by place."""
        index = torch.arange(len(self.first[0]) + 1, device=self.device)
        args, kwargs = take(self.args, self.kwargs, index, self.batches.keys)
        args = self.method._prepared(args)
        for program in programs:
            try:
                read_structure(program, args, kwargs)
            except (ValueError, RuntimeError, IndexError) as error:
                store = pyro.get_param_store()
                for name in [name for leaves in self.leaves.values() for name in leaves if name in store._params]:
                    if name not in self.known:
                        del store[name]
                raise ValueError(
                    f"expected programs that take any number of rows for minibatches, got one that ran with "
                    f"{len(self.first[0])} and failed with {len(args[0])} ({str(error).splitlines()[0]}); parameters for "
                    "each row need index and num_data, as LocalMeanField takes them"
                ) from error

    def _loss_and_grads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        try:
            loss = self.elbo.loss_and_grads(*self.programs, *args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            if not self._vectorised() or self._broadcasts():
                raise
            raise ValueError(
                f"expected programs that broadcast over a dim of {self.elbo.num_particles} particles on the left for an "
                f"objective with vectorize_particles=True, got {type(error).__name__}: {str(error).splitlines()[0]}; give the "
                "objective vectorize_particles=False, or write the programs with dims counted from the right"
            ) from error
        return sum(map(float, loss)) if isinstance(loss, tuple) else float(loss)

    def _vectorised(self) -> bool:
        return bool(getattr(self.elbo, "vectorize_particles", False)) and getattr(self.elbo, "num_particles", 1) > 1

    def _broadcasts(self) -> bool:
        """Whether one run of the programs serves many particles."""
        programs = (self.model,) if self.method.guide is None else (self.model, self.method.guide)
        return all(LogJoint(program, self.first, self.first_kwargs).broadcasts for program in programs)

    def named(self) -> dict[str, Tensor]:
        """What is learned, by name; a parameter of model and guide stands once."""
        once = {id(leaf): (name, leaf) for leaves in self.leaves.values() for name, leaf in leaves.items()}
        return dict(named for key, named in once.items() if key not in self.frozen)

    def make_optimizer(self, used: Any) -> None:
        """An optimizer of all that is learned; what the objective itself used, such as a baseline's net, is learned too."""
        known = {id(leaf) for leaves in self.leaves.values() for leaf in leaves.values()} | {id(x) for x in self.met.values()}
        own = {}
        for name, node in {} if used is None else used.nodes.items():
            leaf = node["value"].unconstrained() if hasattr(node["value"], "unconstrained") else node["value"]
            if id(leaf) not in known and leaf.requires_grad:
                own[name] = leaf
        if own:
            self.leaves["objective"] = own
            self.gradients += [(leaf, None) for leaf in own.values()]
        self.learned = list(self.named().values())
        optim, method = self.method.optim, self.method
        is_pyro = isinstance(optim, pyro.optim.PyroOptim)
        self.optimizer = copy.deepcopy(optim) if is_pyro else make_optimizer(optim, self.learned)
        if self.learn_model:
            self.scheduler = make_scheduler(method.scheduler, self.optimizer)
            self.average = None if method.average is None else Average(self.learned, method.average)

    def _move(self) -> None:
        if not isinstance(self.optimizer, pyro.optim.PyroOptim):
            self.optimizer.step()
        elif self.optimizer.optim_objs:
            self.optimizer(self.learned)
        else:
            with names_in_store(self.named()):
                self.optimizer(self.learned)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update()

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

    def _check_met(self) -> None:
        known = {id(leaf) for leaves in self.leaves.values() for leaf in leaves.values()}
        unknown = sorted(name for name, leaf in self.met.items() if leaf.requires_grad and id(leaf) not in known)
        if unknown:
            raise ValueError(
                f"expected every parameter at the first run of the programs, got {unknown[0]!r} later; it would never be "
                "trained, create it at construction"
            )


def _check_sites(model: Structure, guide: Structure) -> None:
    """Refuse a guide whose sites are not the model's latents."""
    ours, theirs = ({latent.name: latent for latent in structure.latents} for structure in (guide, model))
    if set(ours) != set(theirs):
        raise ValueError(
            f"expected the guide to sample the model's latents {sorted(theirs)}, got {sorted(ours)}; give both the same "
            "site names"
        )
    for name, latent in theirs.items():
        if ours[name].event_shape != latent.event_shape:
            raise ValueError(
                f"expected the guide's {name!r} with the model's event shape {tuple(latent.event_shape)}, got "
                f"{tuple(ours[name].event_shape)}; declare a vector with .to_event(1), and give the guide the model's "
                "sizes"
            )


def _warn_of_scales(model: Structure, guide: Structure) -> None:
    """Say so where a latent counts otherwise in the model than in the guide: the two make no KL divergence then."""
    for latent in model.latents:
        p, q = (torch.as_tensor(s.scales[latent.name], dtype=torch.double).cpu() for s in (model, guide))
        if not bool(torch.isclose(p, q).all()):
            shown = [f"{float(scale):g}" if scale.numel() == 1 else "several" for scale in (p, q)]
            warnings.warn(
                f"the log probability of {latent.name!r} is scaled by {shown[0]} in the model and by {shown[1]} in the guide, "
                "so that the loss is no evidence bound and weighs no KL divergence; where the model has a beta, wrap the guide "
                "in pyrovae.handlers.scale_kl(guide, model.beta)",
                stacklevel=5,
            )
            return


def _warn_of_quantized(model: Structure, guide: Structure) -> None:
    """Say what Pyro's straight-through relaxations on both sides score."""
    theirs = {latent.name for latent in guide.latents if latent.measure == "quantized"}
    for latent in model.latents:
        if latent.measure == "quantized" and latent.name in theirs:
            warnings.warn(
                f"site {latent.name!r} is Pyro's straight-through relaxation in model and guide: the program sees hard values, "
                "but the loss scores the soft ones behind them by their densities, and is no bound of log p(x); use "
                "pyrovae.distributions.RelaxedOneHotCategorical (RelaxedBernoulli) with straight_through=True, which scores "
                "what the program sees, or write the site discrete and pass temperature=... and straight_through=True",
                stacklevel=5,
            )
            return


def _trainable(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
