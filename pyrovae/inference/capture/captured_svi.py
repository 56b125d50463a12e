"""Pyro's SVI with the step captured: the programs run once under Pyro, and then as a flat graph of tensor operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro.infer
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.inference.capture.journal import undone
from pyrovae.inference.capture.optimizer import OneOptimizer, check_optimizer
from pyrovae.inference.capture.quiet import CannotCapture
from pyrovae.inference.capture.recording import Outputs, untouched
from pyrovae.inference.capture.replay import Backend, Replay
from pyrovae.ops.tracing import capturing


class CapturedSVI:
    """Stochastic variational inference with a captured step, in the place of `pyro.infer.SVI`.

    The first step on arguments of a kind (structure, shapes, dtypes, plain values) is an eager one, with Pyro's validation;
    at the second, loss and gradients are recorded as a flat graph of torch operations, which this and all further steps
    replay; one optimizer moves all parameters. A replay draws fresh noise, and sees the present values of parameters, buffers
    and 0-d tensors. Other arguments, other parameters, another training mode are recorded anew; kinds beyond the eighth, and
    programs recorded 16 times, run eagerly, and say so.

    Bias: none. The graph has the gradients of the eager programs bit by bit, given the same random numbers; compiled, to 1e-5
    of their norm. At its first, its 10th and about every 200th replay (1000th on a GPU) the programs run beside it from the
    same random state; where they differ, a warning names the first site that does, and from there on the programs run
    eagerly. So a Python number that a program closes over, and that changes, is stale until then at most: make it a 0-d tensor
    that is changed in place. Pyro validates the first step of a kind, and one whose loss is no number; other data outside a
    support go unseen. Python code of the programs runs at those steps alone: a print, a counter, a list that it fills.

    Cost: about a millisecond an operation to record; seconds to compile, which torch keeps on disk for the next process.

    Args:
        model: a Pyro program.
        guide: a Pyro program with the model's arguments.
        optim: a Pyro optimizer, whose schedules, clipping and saved state work as under SVI, or a function from parameters
            to a torch optimizer, `partial(torch.optim.Adam, lr=1e-3)`. Adam, AdamW, SGD and Adagrad are made `fused` where
            nothing is said of it.
        loss: an objective, `Trace_ELBO()`, `TraceMeanField_ELBO()` or another, ours included; or a differentiable function of
            model, guide and arguments.
        backend: "fx" replays the graph operation by operation. "inductor" compiles it. "cudagraph", on CUDA, makes one CUDA
            graph of the compiled step, optimizer included. "off" is eager, with one optimizer. "auto" replays at once and,
            where there is a compiler, compiles after as many steps as pay for it, by their number, not by a clock; on CUDA
            it takes CUDA graphs. What cannot be captured then runs eagerly, with a warning; other backends refuse it.

    Raises:
        ValueError: for an optimizer that needs a closure or is none, an unknown backend.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import Trace_ELBO
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.models import GaussianVAE
        >>> model = GaussianVAE(visible=16, latent=2, hidden=8)
        >>> svi = CapturedSVI(model, AmortizedMeanField(model), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), backend="fx")
        >>> x = torch.bernoulli(torch.full((8, 16), 0.5))
        >>> losses = [svi.step(x) for _ in range(5)]

    References:
        Automated Variational Inference in Probabilistic Programming (Wingate and Weber, 2013)
        https://arxiv.org/abs/1301.1299
        torch.fx: Practical Program Capture and Transformation for Deep Learning in Python (Reed et al., 2022)
        https://arxiv.org/abs/2112.08429
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: pyro.infer.ELBO | Callable[..., Tensor],
        backend: Backend = "auto",
    ) -> None:
        self.model, self.guide, self._objective = model, guide, _objective(loss)
        self._leaves: dict[str, Tensor] = {}
        self._moved: set[int] = set()  # parameters that have had a gradient
        self._call: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None  # of the present step
        self._several: type | None = None  # the sequence in which an objective gives several losses
        self._replay = Replay(
            self._run,
            self._apply,
            (model, guide),
            backend=backend,
            optimizer=lambda: self._optimizer,
        )
        self.optim = optim

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step; the loss, as the objective gives it (a float; several for `ReweightedWakeSleep`).

        Raises:
            CannotCapture: if the programs cannot be captured, and a backend other than "auto" was asked for.
            ValueError: for data and parameters on several devices.
        """
        loss: Any = self.step_async(*args, **kwargs).tolist()
        if self._several is not None:
            return self._several(loss)  # type: ignore[no-any-return]
        pyro.util.warn_if_nan(loss, "loss")
        return float(loss)

    def step_async(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a gradient step; the loss as a 0-d tensor (1-d, if several) that a GPU may still be computing."""
        self._call = (args, kwargs)
        try:
            return self._replay.step(args, kwargs)
        finally:
            self._call = None

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss without a step, by the eager programs."""
        with torch.no_grad():
            loss = self.loss(self.model, self.guide, *args, **kwargs)
        return float(loss) if not isinstance(loss, (tuple, list)) else type(loss)(map(float, loss))  # type: ignore[return-value]

    @property
    def optim(self) -> Any:
        """The optimizer; another one may be assigned."""
        return self._optim

    @optim.setter
    def optim(self, optim: Any) -> None:
        check_optimizer(optim)
        self._optim = optim
        self._optimizer = OneOptimizer(optim, self._leaves) if self._leaves else None

    @property
    def loss(self) -> Callable[..., Any]:
        """The objective's function of model, guide and arguments, without gradients, as under SVI."""
        return self._objective.loss

    @property
    def loss_and_grads(self) -> Callable[..., Any]:
        """The same with gradients added to the parameters' `.grad`."""
        return self._objective.loss_and_grads

    def __repr__(self) -> str:
        """Backend, graphs, and why steps are eager, if they are."""
        return f"{type(self).__name__}({self._replay})"

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outputs:
        """Loss and gradients, of the parameters in the order in which they were met."""
        for leaf in self._leaves.values():
            leaf.grad = None
        with poutine.trace(param_only=True) as used:
            try:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
                visited = {name: node["value"].unconstrained() for name, node in used.trace.nodes.items()}
                self._meet(visited)
                gradients = self._gradients(visited.values())
            finally:
                for node in used.trace.nodes.values():
                    node["value"].unconstrained().grad = None
        if isinstance(loss, (tuple, list)):
            self._several = type(loss)
            return torch.stack([_as_tensor(one) for one in loss]), *gradients
        return _as_tensor(loss), *gradients

    def _meet(self, visited: Mapping[str, Tensor]) -> None:
        """Take parameters in that are new, or that have taken another's name."""
        known = {id(leaf) for leaf in self._leaves.values()}
        new = {name: leaf for name, leaf in visited.items() if id(leaf) not in known}
        if not new:
            return
        if capturing():
            raise CannotCapture(
                f"expected every parameter at the first step, got {next(iter(new))!r} at a later one; create it in every run, "
                "or run eagerly"
            )
        once = {id(leaf): name for name, leaf in reversed({**self._leaves, **new}.items())}
        self._leaves = {name: leaf for name, leaf in {**self._leaves, **new}.items() if once[id(leaf)] == name}
        self._replay.forget()
        before, self._optimizer = self._optimizer, OneOptimizer(self.optim, self._leaves)
        if before is not None and isinstance(before.optimizer, torch.optim.Optimizer):
            present = set(self._leaves.values())
            kept = {leaf: state for leaf, state in before.optimizer.state.items() if leaf in present}
            self._optimizer.optimizer.state.update(kept)

    def _gradients(self, visited: Iterable[Tensor]) -> list[Tensor | None]:
        """As Pyro has them: zero for a parameter that is visited without a gradient, but had one before."""
        visiting = {id(leaf) for leaf in visited}
        found = {id(leaf) for leaf in self._leaves.values() if leaf.grad is not None}
        if not found <= self._moved and not capturing():
            self._moved |= found
            self._replay.forget()
        zero = (visiting & self._moved) - found
        return [torch.zeros_like(leaf) if id(leaf) in zero else leaf.grad for leaf in self._leaves.values()]

    def _apply(self, outputs: Outputs) -> None:
        """Move the parameters; where Pyro's validation has something to say of a loss that is no number, let it first."""
        loss = outputs[0]
        assert self._optimizer is not None
        assert loss is not None
        if loss.device.type == "cpu" and not bool(loss.isfinite().all()) and self._call is not None:
            with untouched((self.model, self.guide)), undone():
                self._run(*self._call)
        self._optimizer.step(outputs[1:])


def _as_tensor(loss: Any) -> Tensor:
    """A loss as the float that it would be."""
    return loss.detach().double() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)


class _Function:
    """A differentiable function in the place of an objective."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.loss(*args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss


def _objective(loss: Any) -> Any:
    """What has a loss and its gradients."""
    if isinstance(loss, type) or not callable(getattr(loss, "loss_and_grads", loss)):
        given = f"the class {loss.__name__}; write {loss.__name__}()" if isinstance(loss, type) else type(loss).__name__
        raise ValueError(f"expected an objective such as pyro.infer.Trace_ELBO(), got {given}")
    if any(base.__name__.startswith("Jit") and base.__module__.startswith("pyro.") for base in type(loss).__mro__):
        name = type(loss).__name__
        raise ValueError(f"expected an objective that runs the programs, got {name}; use {name.removeprefix('Jit')}")
    return loss if hasattr(loss, "loss_and_grads") else _Function(loss)
