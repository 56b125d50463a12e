"""One optimizer that steps the parameters of many of its class, with their options and their state.

It shares each parameter's state, the same object, with the optimizer that owns it, and gathers parameters of equal options into
one group. Neither side can tell who stepped last.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyro.optim.clipped_adam
import torch
from torch import Tensor

from pyrovae.inference.capture.clipped_adam import ClippedAdam
from pyrovae.inference.capture.fused_adam import FusedAdam, FusedAdamW

Owner: TypeAlias = torch.optim.Optimizer

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
FASTER: dict[type, Any] = {
    pyro.optim.clipped_adam.ClippedAdam: ClippedAdam,
    torch.optim.Adam: FusedAdam,
    torch.optim.AdamW: FusedAdamW,
}
FORMS = ("fused", "foreach", "capturable", "differentiable")  # options that choose among forms of one step


class Together:
    """Steps what its owners would step one by one.

    Args:
        owners: torch optimizers of one class.
        in_graph: whether counts of steps and learning rates are to be on the parameters' GPU.
    """

    def __init__(self, owners: Sequence[Owner], *, in_graph: bool) -> None:
        kind, self.owners, self.in_graph, self.called = type(owners[0]), owners, in_graph, False
        alike: list[tuple[dict[str, Any], list[tuple[Owner, int]]]] = []
        for owner in owners:
            for place, options in enumerate(owner.param_groups):
                key = _identified(options)
                found = next((members for other, members in alike if other == key), None)
                if found is None:
                    alike.append((key, found := []))
                found.append((owner, place))
        self.groups = [Group(kind, members, in_graph=in_graph) for _, members in alike]
        self.optimizer: Owner = object.__new__(FASTER.get(kind, kind))
        vars(self.optimizer).update({name: value for name, value in vars(owners[0]).items() if name != "step"})
        self.optimizer.param_groups = [group.options for group in self.groups]
        self.optimizer.state = defaultdict(dict)
        for group in self.groups:
            for owner, place in group.members:
                for leaf in owner.param_groups[place]["params"]:
                    self.optimizer.state[leaf] = group.adopt(owner.state[leaf], leaf)

    def step(self) -> None:
        """One step by the gradients in `.grad`.

        Raises:
            RuntimeError: if it made new state while a CUDA graph was being recorded, whose replays would make it anew.
        """
        before = self._count()
        for group in self.groups:
            group.align()
        self.optimizer.step()
        for group in self.groups:
            group.lead()
        if not self.called:
            for owner in self.owners:
                vars(owner).update(_opt_called=True, _step_count=1)  # schedulers ask whether a step came before theirs
            self.called = True
        if self._count() != before and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("expected optimizer state before a CUDA graph is recorded, got none; take a step outside first")

    def follow(self) -> bool | None:
        """Take the owners' options over; whether a recorded graph stays right, or None where groups must be gathered anew."""
        outcomes = [group.follow() for group in self.groups]
        return None if None in outcomes else all(outcomes)

    def _count(self) -> int:
        return sum(map(len, self.optimizer.state.values())) if self.in_graph else 0


class Group:
    """Parameters of equal options: one parameter group, and those that it stands for.

    Args:
        kind: the class of the optimizer.
        members: optimizers, and the places of their groups.
        in_graph: as of :class:`Together`.
    """

    def __init__(self, kind: Any, members: list[tuple[Owner, int]], *, in_graph: bool) -> None:
        self.members = members
        groups = self._groups()
        self.seen = [dict(group) for group in groups]
        leaves = [leaf for group in groups for leaf in group["params"]]
        self.fused = _unsaid(kind, groups[0]) and all(_fuses(kind, leaf.device, leaf.dtype) and _dense(leaf) for leaf in leaves)
        fused = self.fused or bool(groups[0].get("fused"))
        by_number = not fused and groups[0].get("foreach") is False  # some read the learning rate as a Python number
        self.capturable = ("capturable" in groups[0] and not by_number) or (kind is torch.optim.SGD and fused)
        self.in_graph, rate = in_graph, groups[0].get("lr")
        own = in_graph and not (isinstance(rate, Tensor) and rate.device == leaves[0].device)
        self.rate = torch.zeros((), dtype=torch.float32, device=leaves[0].device) if own else None
        self.strides = [(leaf, leaf.stride()) for leaf in leaves] if fused else []
        self.options: dict[str, Any] = {}
        self._take(groups[0])
        self.options["params"] = leaves

    def follow(self) -> bool | None:
        """As :meth:`Together.follow`."""
        groups = self._groups()
        if groups == self.seen and not (self.rate is not None and isinstance(groups[0]["lr"], Tensor)):
            return True
        before, first = _identified(self.seen[0]), _identified(groups[0])
        if any(_identified(other) != first for other in groups[1:]) or any(
            first.get(form) != before.get(form) for form in FORMS
        ):
            return None
        self.seen = [dict(group) for group in groups]
        self._take(groups[0])
        return before | {"lr": None} == first | {"lr": None}

    def lead(self) -> None:
        """Tell the owners the learning rate that a step has lowered (Pyro's `lrd`)."""
        if self.options.get("lrd", 1.0) != 1.0:
            for group, seen in zip(self._groups(), self.seen, strict=True):
                group["lr"] = seen["lr"] = self.options["lr"]

    def align(self) -> None:
        """Give gradients the strides of their parameters, which the fused forms take for granted."""
        for leaf, strides in self.strides:
            gradient = leaf.grad
            if gradient is not None and gradient.stride() != strides:
                leaf.grad = torch.empty_like(leaf).copy_(gradient)

    def adopt(self, state: dict[str, Any], leaf: Tensor) -> dict[str, Any]:
        """A parameter's state, the same object, with what this group's form needs in it."""
        if self.fused and self.options.get("momentum", 0) != 0 and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(leaf)  # its first step is the same; a list with gaps is refused
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                if self.fused and name == "step":
                    state[name] = value.to(leaf.device, torch.float32)
                elif self.in_graph:
                    state[name] = value.to(leaf.device)
        return state

    def _groups(self) -> list[dict[str, Any]]:
        return [owner.param_groups[place] for owner, place in self.members]

    def _take(self, options: Mapping[str, Any]) -> None:
        self.options.update({name: value for name, value in options.items() if name not in ("params", "param_names")})
        if self.fused:
            self.options["fused"] = True
        if self.rate is not None:
            self.rate.fill_(float(options["lr"]))
            self.options["lr"] = self.rate
        if self.in_graph and "capturable" in options:
            self.options["capturable"] = True


def is_known(owner: Owner) -> bool:
    """Whether another of its class may step in its place: torch's own, and Pyro's, without hooks."""
    hooks = owner._optimizer_step_pre_hooks or owner._optimizer_step_post_hooks
    return type(owner).__module__.startswith(("torch.optim", "pyro.optim.")) and not hooks


def _identified(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options to be compared: tensors by identity, since they may change in place; without the parameters."""
    kept = {name: id(value) if isinstance(value, Tensor) else value for name, value in options.items()}
    return kept | {"params": None, "param_names": None}


def _unsaid(kind: type[Owner], options: Mapping[str, Any]) -> bool:
    """Whether the class has a fused form of the same step, and nothing was said of forms."""
    chosen = options.get("fused") is not None or options.get("foreach") is not None
    chosen = chosen or bool(options.get("capturable")) or bool(options.get("differentiable"))
    return kind in FUSED and not chosen and options.get("dampening", 0) == 0


@functools.cache
def _fuses(kind: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has the fused form there."""
    probe = torch.zeros(1, device=device, dtype=dtype, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe], fused=True).step()
    except (RuntimeError, TypeError):
        return False
    return True


def _dense(leaf: Tensor) -> bool:
    """Whether its elements lie in memory without gaps, so that state made like it has its strides."""
    return torch.empty_like(leaf).stride() == leaf.stride()
