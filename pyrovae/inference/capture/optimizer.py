"""One torch optimizer for all parameters, out of a Pyro optimizer, which keeps one for each parameter, or a torch factory.

The optimizers that Pyro (or the factory) makes stay what the user sees: they own the options and the state, so that
`get_state`, `save`, `load`, schedulers and stock SVI go on with them. Another optimizer of the same class shares their state
and steps all parameters at once, gathered into groups of equal options.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, TypeAlias

import pyro
import pyro.optim
import torch
from pyro.optim.multi import MultiOptimizer
from pyro.optim.optim import _load_state_dict
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyrovae.inference.capture.together import Together, is_known

Optim: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer] | Any  # or a pyro.optim.PyroOptim

REMEDY = "take pyro.optim.Adam({'lr': 1e-3}) or partial(torch.optim.Adam, lr=1e-3)"


class OneOptimizer:
    """Steps all parameters at once, as a Pyro or torch optimizer would one by one.

    Adam, AdamW, SGD and Adagrad take torch's fused form where nothing was said of it, which agrees to rounding; the others
    agree bitwise. Classes that are neither torch's nor Pyro's are stepped one by one, as Pyro does.

    Cost: beside the step of all parameters, a comparison of each one's options with those of the step before.

    Args:
        optim: a `pyro.optim.PyroOptim`, or a function from parameters to a torch optimizer.
        leaves: the parameters, unconstrained, by their names in Pyro's parameter store.

    Raises:
        ValueError: as :func:`check_optimizer`.

    Attributes:
        optimizer: what owns options and state: the given Pyro optimizer, or the torch optimizer that was made.
        version: changes whenever recorded CUDA graphs no longer do the right step.

    Example:
        >>> from functools import partial
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> one = OneOptimizer(partial(torch.optim.SGD, lr=0.5), {"x": x})
        >>> one.step([torch.tensor([1.0, 2.0])])
        >>> x.tolist()
        [0.5, 1.0]
    """

    def __init__(self, optim: Optim, leaves: Mapping[str, Tensor]) -> None:
        check_optimizer(optim)
        self.leaves = dict(leaves)
        self._parameters = list(leaves.values())
        self._pyro = isinstance(optim, pyro.optim.PyroOptim)
        self.optimizer: Any = optim if self._pyro else _made(optim, self._parameters)
        self._together: list[Together] = []
        self._alone: list[torch.optim.Optimizer] = []
        self._linked = self._in_graph = self._stepped = False
        self.version = 0

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One step of all parameters; a parameter without a gradient stays, and its state too.

        Nothing waits for the device. `.grad` is None afterwards.

        Args:
            gradients: in the order of the leaves, each of its leaf's shape; some optimizers write in them.
        """
        if not (self._in_graph and torch.cuda.is_current_stream_capturing()):
            self.prepare()
        for leaf, gradient in zip(self._parameters, self._clipped(gradients), strict=True):
            leaf.grad = gradient
        sparse = any(gradient is not None and gradient.is_sparse for gradient in gradients)  # for which no form is fused
        try:
            for owner in dict.fromkeys(self._owners) if sparse else self._alone:
                owner.step()
            for together in () if sparse else self._together:
                together.step()
        finally:
            for leaf in self._parameters:
                leaf.grad = None
        self._stepped = True

    def prepare(self) -> bool:
        """Take over what changed outside since the last step: options, loaded state, new optimizers.

        A learning rate gets into a recorded CUDA graph, as a tensor that is filled; other options do not.

        Returns:
            Whether to replay a CUDA graph that was recorded at this `version`, or to record one. If not, call :meth:`step`
            outside of a graph, which makes the state that a graph needs.
        """
        moved = not self._linked or self._moved()
        kept = [None] if moved else [together.follow() for together in self._together]
        if None in kept:
            self._link()
        if not all(kept):
            self.version += 1
            self._stepped = False
        return self._stepped

    @property
    def capturable(self) -> bool:
        """Whether a step can be recorded in a CUDA graph: all parameters on one GPU, and a class that torch can record."""
        if not self._linked:
            self._link()
        devices = {leaf.device for leaf in self._parameters}
        on_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda"
        return on_gpu and not self._alone and all(group.capturable for together in self._together for group in together.groups)

    def make_capturable(self) -> None:
        """Keep counts of steps and learning rates on the GPU from now on; learning rates in float32.

        Raises:
            ValueError: if no step can be recorded.
        """
        if not self.capturable:
            raise ValueError(
                "expected an optimizer of parameters on one GPU whose steps torch can record (capturable), got another; "
                "take Adam, or step outside of the graph"
            )
        if not self._in_graph:
            self._in_graph = True
            self._link()
            self.version += 1
            self._stepped = False

    def _moved(self) -> bool:
        """Whether optimizers or their states were exchanged."""
        if self._pyro and list(self.optimizer.optim_objs.values()) != self._objects:
            return True
        return not all(map(is_, [owner.state for owner in self._owners], self._states))

    def _link(self) -> None:
        """Find the optimizers, share their state, and gather their parameters."""
        self._owners = self._pyro_owners() if self._pyro else [self.optimizer]
        for kind in {type(owner) for owner in self._owners}:
            check_steps(kind)
        self._states = [owner.state for owner in self._owners]
        self._alone = [owner for owner in self._owners if not is_known(owner)]
        kinds: defaultdict[type, list[torch.optim.Optimizer]] = defaultdict(list)
        for owner in self._owners:
            if is_known(owner):
                kinds[type(owner)].append(owner)
        self._together = [Together(owners, in_graph=self._in_graph) for owners in kinds.values()]
        self._linked = True

    def _pyro_owners(self) -> list[torch.optim.Optimizer]:
        """Each parameter's own optimizer, made where Pyro has not met it yet, and how its gradient is clipped."""
        optim = self.optimizer
        self._clips: defaultdict[tuple[float | None, float | None], list[int]] = defaultdict(list)
        with names_in_store(self.leaves):
            for k, leaf in enumerate(self._parameters):
                if leaf not in optim.optim_objs:  # as PyroOptim.__call__
                    made = optim.optim_objs[leaf] = optim._get_optim(leaf)
                    optim.grad_clip[leaf] = optim._get_grad_clip(leaf)
                    state = optim._state_waiting_to_be_consumed.pop(pyro.get_param_store().param_name(leaf), None)
                    if state is not None:
                        _load_state_dict(made, state)
                if optim.grad_clip[leaf] is not None:
                    clip = optim._get_grad_clip_args(leaf)
                    self._clips[clip.get("clip_norm"), clip.get("clip_value")].append(k)
        self._objects = list(optim.optim_objs.values())
        objects = [optim.optim_objs[leaf] for leaf in self._parameters]
        return [made.optimizer if isinstance(made, LRScheduler) else made for made in objects]

    def _clipped(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Each gradient by its own norm, then by value, as `torch.nn.utils.clip_grad_norm_` does, in new tensors."""
        if not self._pyro or not self._clips:
            return gradients
        clipped = list(gradients)
        for (clip_norm, clip_value), positions in self._clips.items():
            which = [k for k in positions if gradients[k] is not None]
            some: Any = [gradients[k] for k in which]
            if not some:
                continue
            if clip_norm is not None:
                factors = torch._foreach_add(torch._foreach_norm(some, 2.0), 1e-6)
                torch._foreach_reciprocal_(factors)
                torch._foreach_mul_(factors, clip_norm)
                torch._foreach_clamp_max_(factors, 1.0)
                some = torch._foreach_mul(some, factors)
            if clip_value is not None:
                some = torch._foreach_clamp_min(some, -clip_value)
                torch._foreach_clamp_max_(some, clip_value)
            for k, gradient in zip(which, some, strict=True):
                clipped[k] = gradient
        return clipped


def check_optimizer(optim: Any) -> None:
    """Refuse what cannot step all parameters by one gradient each.

    Raises:
        ValueError: for optimizers that need a closure (LBFGS), that differentiate the loss themselves
            (`pyro.optim.multi`), that step in a way of their own (Horovod), and for torch optimizers that are already made.
    """
    kind = type(optim).__name__
    if isinstance(optim, pyro.optim.PyroOptim):
        stock = (pyro.optim.PyroOptim, pyro.optim.PyroLRScheduler)
        for name in ("__call__", "_get_grad_clip", "_clip_grad"):
            if not any(getattr(type(optim), name) is getattr(one, name) for one in stock):
                raise ValueError(
                    f"expected an optimizer that steps as PyroOptim does, got {kind} with its own {name}; {REMEDY}"
                )
        check_steps(optim.pt_optim_constructor)
    elif isinstance(optim, MultiOptimizer):
        raise ValueError(f"expected an optimizer that takes gradients, got {kind}, which differentiates the loss; {REMEDY}")
    elif isinstance(optim, torch.optim.Optimizer):
        raise ValueError(
            f"expected a function from parameters to an optimizer, got {kind}, made already; "
            f"pass partial(torch.optim.{kind}, lr=...)"
        )
    elif not callable(optim):
        raise ValueError(f"expected a Pyro optimizer or a function from parameters to a torch one, got {kind}; {REMEDY}")
    elif getattr(pyro.optim, name := getattr(optim, "__name__", ""), None) is optim:
        raise ValueError(
            f"expected an optimizer, got pyro.optim.{name} without its options; pass pyro.optim.{name}({{'lr': 1e-3}})"
        )
    else:
        check_steps(optim.func if isinstance(optim, functools.partial) else optim)


def check_steps(kind: Any) -> None:
    """Refuse a class of torch optimizers whose step needs a closure.

    Raises:
        ValueError: with its name.
    """
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"expected an optimizer that steps by one gradient, got {kind.__name__}, which evaluates the loss "
                "by a closure; take torch.optim.Adam"
            )


def _made(optim: Optim, parameters: list[Tensor]) -> torch.optim.Optimizer:
    made = optim(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"expected a function that returns a torch optimizer, got one that returned {type(made).__name__}; {REMEDY}"
        )
    check_steps(type(made))
    return made


@contextlib.contextmanager
def names_in_store(named: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a Pyro optimizer, whose arguments may go by name, find the names of parameters that are not in the store."""
    names = pyro.get_param_store()._param_to_name
    added = [leaf for leaf in named.values() if leaf not in names]
    names.update({leaf: name for name, leaf in named.items() if leaf not in names})
    try:
        yield
    finally:
        for leaf in added:
            del names[leaf]
