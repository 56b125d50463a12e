"""The loop that :class:`pyrovae.inference.Variational` runs: programs with their own parameters, one optimizer, minibatches."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
import pyro.optim
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.handlers.own_params import own_params
from pyrovae.handlers.relax import relax
from pyrovae.handlers.structure import read_structure
from pyrovae.inference.elbo.exact_likelihood import ExactLikelihood
from pyrovae.inference.fit import squared_norm, state_of
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Program

if TYPE_CHECKING:
    from pyrovae.inference.variational import Variational


class Optimization:
    """The state of an optimisation; a context, in which parameters' `.grad` is borrowed.

    Args:
        method: the options.
        model: a Pyro program.
        args: its arguments.
        kwargs: its keyword arguments.
        learn_model: whether the model's parameters move.

    Raises:
        ValueError: if there is nothing to learn, or minibatches of the program cannot be scaled.
    """

    def __init__(
        self, method: Variational, model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, learn_model: bool
    ) -> None:
        self.method, self.model, self.args, self.kwargs = method, model, args, kwargs
        self.evaluations = 0
        self.rows = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else 1
        if method.batch_size is not None and method.batch_size > self.rows:
            raise ValueError(f"expected batch_size <= the {self.rows} rows of the data, got {method.batch_size}")
        first = method._prepared(args)
        structure = read_structure(model, first, kwargs)
        self.leaves: dict[str, dict[str, Tensor]] = {"model": _trainable(structure.leaves)}
        depth = structure.plate_depth
        if method.guide is not None:
            of_guide = read_structure(method.guide, first, kwargs)
            depth = max(depth, of_guide.plate_depth)
            self.leaves["guide"] = _trainable(of_guide.leaves)
        self.frozen = set() if learn_model else {id(leaf) for leaf in self.leaves["model"].values()}
        self.penalty = method.penalty if learn_model else 0.0
        self.elbo = copy.deepcopy(method.elbo)
        self.first = first
        if method.elbo_is_default:
            self.elbo.vectorize_particles = self._broadcasts()
        if math.isinf(getattr(self.elbo, "max_plate_nesting", 0)):  # what Pyro would guess by a run of both, and print
            self.elbo.max_plate_nesting = depth + (self.elbo.vectorize_particles and self.elbo.num_particles > 1)
        self.optimizer: Any = None  # made at the first step, when the objective's own parameters are known
        self.learned: list[Tensor] = []
        self.gradients: list[tuple[Tensor, Tensor | None]] = []
        if not self._named():
            raise ValueError("expected programs with parameters, got none; there is nothing to learn")
        self.indexed = method.batch_size is not None and self._indexed(first)
        if method.batch_size is not None and not self.indexed and method.batch_size < self.rows:
            outside = [latent.name for latent in structure.latents if not latent.plates]
            if outside:
                raise ValueError(
                    f"expected a program that takes index and num_data for minibatches with the latent {outside[0]!r} outside "
                    "all plates, got one that takes neither: its loss times N/B would count that latent N/B times; open the "
                    "plate as pyro.plate(name, num_data, subsample=index)"
                )
        self.met: dict[str, Tensor] = {}
        self.batches = self._minibatches()
        self.temperature = torch.tensor(1.0)
        self.programs = self._programs()

    def __enter__(self) -> Optimization:
        self.gradients = [(leaf, leaf.grad) for leaves in self.leaves.values() for leaf in leaves.values()]
        return self

    def __exit__(self, *_: object) -> None:
        """Give the parameters the gradients back that they had."""
        for leaf, gradient in self.gradients:
            leaf.grad = gradient

    def step(self, step: int) -> float:
        """One gradient step; its loss, the sum over the data."""
        method = self.method
        if callable(method.temperature):
            self.temperature.fill_(method.temperature(step))
        args, kwargs, scale, rows = next(self.batches)
        for leaf, _ in self.gradients:
            leaf.grad = None
        self.met.clear()
        with poutine.trace(param_only=True) as used:
            loss = self._loss_and_grads(args, kwargs) * scale
        self._check_met()
        if self.optimizer is None:
            self._make_optimizer(used.trace)
        self.evaluations += rows * self._evaluations_a_row(args, kwargs)
        model_leaves = self.leaves["model"]
        if self.penalty and model_leaves:
            loss += self.penalty / 2 * float(squared_norm(model_leaves).detach())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"expected a finite loss, got {loss} at step {step}; lower the learning rate, or raise the temperature"
            )
        for leaf in self.learned:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            elif scale != 1:
                leaf.grad.mul_(scale)
        if self.penalty:
            for leaf in {id(leaf): leaf for leaf in model_leaves.values()}.values():
                assert leaf.grad is not None
                leaf.grad.add_(leaf.detach(), alpha=self.penalty)
        self._move()
        return loss

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
        return all(LogJoint(program, self.first, self.kwargs).broadcasts for program in programs)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """What model, guide and the objective itself (its baselines) have learned so far, of those that have parameters."""
        programs = {"model": self.model, "guide": self.method.guide}
        found = {name: state_of(programs.get(name), leaves) for name, leaves in self.leaves.items()}
        return {name: state for name, state in found.items() if state}

    def _named(self) -> dict[str, Tensor]:
        """What is learned, by name; a parameter of model and guide stands once."""
        once = {id(leaf): (name, leaf) for leaves in self.leaves.values() for name, leaf in leaves.items()}
        return dict(named for key, named in once.items() if key not in self.frozen)

    def _make_optimizer(self, used: Any) -> None:
        """An optimizer of all that is learned; what the objective itself used, such as a baseline's net, is learned too."""
        known = {id(leaf) for leaves in self.leaves.values() for leaf in leaves.values()} | {id(x) for x in self.met.values()}
        own = {}
        for name, node in used.nodes.items():
            leaf = node["value"].unconstrained() if hasattr(node["value"], "unconstrained") else node["value"]
            if id(leaf) not in known and leaf.requires_grad:
                own[name] = leaf
        if own:
            self.leaves["objective"] = own
            self.gradients += [(leaf, None) for leaf in own.values()]
        self.learned = list(self._named().values())
        optim = self.method.optim
        self.optimizer = copy.deepcopy(optim) if isinstance(optim, pyro.optim.PyroOptim) else optim(self.learned)

    def _move(self) -> None:
        if not isinstance(self.optimizer, pyro.optim.PyroOptim):
            self.optimizer.step()
        elif self.optimizer.optim_objs:
            self.optimizer(self.learned)
        else:
            with _names_in_store(self._named()):
                self.optimizer(self.learned)

    def _programs(self) -> tuple[Program, Program | None]:
        method = self.method
        model: Program = self.model
        guide = method.guide
        if method.temperature is not None and guide is not None:
            self.temperature.fill_(method.temperature(0) if callable(method.temperature) else method.temperature)
            model, guide = relax(model, self.temperature), relax(guide, self.temperature)
        return own_params(model, self.met), None if guide is None else own_params(guide, self.met)

    def _indexed(self, first: tuple[Any, ...]) -> bool:
        """Whether the programs take `index` and `num_data`, and the model's plate then scales by N/B."""
        guide = self.method.guide
        if not _takes_index(self.model) or (guide is not None and not _takes_index(guide)):
            return False
        index = torch.arange(self.method.batch_size or self.rows, device=self.args[0].device)
        args, kwargs = self._pick(first, index)
        try:
            plates = read_structure(self.model, args, kwargs | {"index": index, "num_data": self.rows}).plates
        except TypeError:
            return False  # `**kwargs` that it hands on to what takes neither
        return any(plate.full_size == self.rows and plate.size == len(index) for plate in plates)

    def _minibatches(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], float, int]]:
        """Arguments, keyword arguments, the factor of the loss and the number of rows of every step."""
        size = self.method.batch_size
        while size is None:
            yield self.method._prepared(self.args), self.kwargs, 1.0, self.rows
        device = self.args[0].device
        while True:
            order = torch.randperm(self.rows, device=device)
            for start in range(0, self.rows - size + 1, size):
                index = order[start : start + size]
                args, kwargs = self._pick(self.args, index)
                if self.indexed:
                    yield self.method._prepared(args), kwargs | {"index": index, "num_data": self.rows}, 1.0, size
                else:
                    yield self.method._prepared(args), kwargs, self.rows / size, size

    def _pick(self, args: tuple[Any, ...], index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same rows of every tensor as long as the data; anything else as it is."""

        def rows(value: Any) -> Any:
            return value[index] if isinstance(value, Tensor) and value.dim() and len(value) == self.rows else value

        return tuple(rows(value) for value in args), {name: rows(value) for name, value in self.kwargs.items()}

    def _evaluations_a_row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if not hasattr(self, "_cost"):
            if isinstance(self.elbo, ExactLikelihood):
                rows = self.method.batch_size or self.rows
                self._cost = self.elbo.model_evaluations(self.model, *args, **kwargs) // rows
            else:
                self._cost = int(getattr(self.elbo, "num_particles", 1))
        return self._cost

    def _check_met(self) -> None:
        known = {id(leaf) for leaves in self.leaves.values() for leaf in leaves.values()}
        unknown = sorted(name for name, leaf in self.met.items() if leaf.requires_grad and id(leaf) not in known)
        if unknown:
            raise ValueError(
                f"expected every parameter at the first run of the programs, got {unknown[0]!r} later; it would never be "
                "trained, create it at construction"
            )


@contextmanager
def _names_in_store(named: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a Pyro optimizer, whose arguments may go by name, find the names of parameters that are not in the store."""
    names = pyro.get_param_store()._param_to_name
    added = [leaf for name, leaf in named.items() if leaf not in names]
    names.update({leaf: name for name, leaf in named.items() if leaf not in names})
    try:
        yield
    finally:
        for leaf in added:
            del names[leaf]


def _trainable(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}


def _takes_index(program: Callable[..., Any]) -> bool:
    while not isinstance(program, torch.nn.Module) and hasattr(program, "program"):
        program = program.program  # inside `relax` and the like
    call = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        names = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False
    return {"index", "num_data"} <= set(names) or any(p.kind is p.VAR_KEYWORD for p in names.values())
