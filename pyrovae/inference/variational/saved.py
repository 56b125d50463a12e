"""What a checkpoint holds of the programs: state dicts of modules, and parameters that live in no module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.optim.optim import _get_state_dict, _load_state_dict
from torch import Tensor

from pyrovae.inference.capture.optimizer import names_in_store
from pyrovae.inference.fit import root_module
from pyrovae.inference.variational.checkpoint import describe

if TYPE_CHECKING:
    from pyrovae.inference.variational.optimization import Optimization
    from pyrovae.inference.variational.update import Update
    from pyrovae.inference.variational.variational import Variational


class Saved:
    """Takes the parameters of a run's programs, and puts them back in place.

    A module's are its `state_dict()`. Those of plain functions and of the objective are kept unconstrained, by the names
    that Pyro gives them; buffers of modules that a function merely closes over are not known.

    Args:
        run: an optimisation.
    """

    def __init__(self, run: Optimization) -> None:
        self.run = run
        programs = {"model": run.model, "guide": run.method.guide}
        self.modules = {name: root for name, program in programs.items() if (root := root_module(program)) is not None}

    def take(self) -> dict[str, Any]:
        """`{"states": …, "leaves": …}`, detached copies."""
        leaves = {
            group: {name: leaf.detach().clone() for name, leaf in named.items()} for group, named in self._outside().items()
        }
        return {"states": self.run.states(), "leaves": leaves}

    def put(self, saved: Mapping[str, Any]) -> None:
        """The inverse of :meth:`take`."""
        for name, module in self.modules.items():
            module.load_state_dict(dict(saved["states"].get(name, {})))
        with torch.no_grad():
            for group, named in self._outside().items():
                for name, leaf in named.items():
                    leaf.copy_(saved["leaves"][group][name])

    def take_run(self) -> dict[str, Any]:
        """The state of optimizer, schedules, minibatches and the objective, and parameters that have averages."""
        run, update = self.run, self.run.update
        moments: Any = None
        if update is not None and update.is_pyro:
            moments = [_get_state_dict(update.optimizer.optim_objs[leaf]) for leaf in update.leaves]
        elif update is not None:
            moments = update.optimizer.state_dict()
        average = None if update is None else update.average
        return {
            "optimizer": moments,
            "scheduler": None if update is None or update.scheduler is None else update.scheduler.state_dict(),
            "average": None
            if update is None or average is None
            else {"count": average.count, "values": average.values, "leaves": list(update.leaves)},
            "objective": run.elbo.state_dict() if hasattr(run.elbo, "state_dict") else None,
            "batches": run.batches.state_dict(),
            "evaluations": run.evaluations,
        }

    def put_run(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`take_run`, once the programs are in place."""
        run = self.run
        if state["objective"] is not None and hasattr(run.elbo, "load_state_dict"):
            run.elbo.load_state_dict(state["objective"])
        run.batches.load_state_dict(state["batches"])
        run.evaluations = state["evaluations"]
        if state["optimizer"] is None:
            return  # saved before the first step
        if run.update is None:
            run.make_update(None)
        assert run.update is not None
        update = run.update
        self._put_optimizer(update, state["optimizer"])
        for what, mine in (("scheduler", update.scheduler), ("average", update.average)):
            if (state[what] is None) != (mine is None):
                here, there = ("none", "one") if mine is None else ("one", "none")
                raise ValueError(
                    f"expected the {what} of the checkpoint, which has {there}, got {here}; pass what it was made with"
                )
        if update.scheduler is not None:
            update.scheduler.load_state_dict(state["scheduler"])
        if update.average is not None:
            saved = state["average"]
            update.average.count = saved["count"]
            with torch.no_grad():
                for mine, value in zip(update.average.values + update.leaves, saved["values"] + saved["leaves"], strict=True):
                    mine.copy_(value)

    def _put_optimizer(self, update: Update, state: Any) -> None:
        optimizer = update.optimizer
        if isinstance(state, list) != update.is_pyro:
            raise ValueError("expected the optimizer of the checkpoint, got one of another kind; pass the one it was made with")
        if not update.is_pyro:
            optimizer.load_state_dict(state)
            return
        with names_in_store(update.named):
            for leaf, saved in zip(update.leaves, state, strict=True):
                optimizer.optim_objs[leaf] = optimizer._get_optim(leaf)
                optimizer.grad_clip[leaf] = optimizer._get_grad_clip(leaf)
                _load_state_dict(optimizer.optim_objs[leaf], saved)

    def architecture(self) -> dict[str, dict[str, list[int]]]:
        """Names and shapes: of modules, and of parameters outside them."""
        found = {name: describe(module.state_dict()) for name, module in self.modules.items()}
        for group, named in self._outside().items():
            found[group] = {**found.get(group, {}), **describe(named)}
        return found

    def _outside(self) -> dict[str, dict[str, Tensor]]:
        """Parameters that no module holds, as they are now: some objectives replace theirs in Pyro's store."""
        inside = {id(parameter) for module in self.modules.values() for parameter in module.parameters()}
        store = pyro.get_param_store()._params
        found = {}
        for group, leaves in self.run.leaves.items():
            outside = {name: leaf for name, leaf in leaves.items() if id(leaf) not in inside}
            if outside:
                names = _stable(list(outside))
                found[group] = {
                    names[name]: store.get(name, leaf) if group == "objective" else leaf for name, leaf in outside.items()
                }
        return found


# Options by which a run that goes on would be another one; functions are not compared.
FIXED = (
    "elbo",
    "num_particles",
    "temperature",
    "straight_through",
    "surrogate",
    "beta",
    "clip_norm",
    "penalty",
    "average",
    "preprocess",
)


def settings(method: Variational, run: Optimization, num_steps: int) -> dict[str, Any]:
    """The options as plain values; functions by their names."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        keywords = getattr(value, "keywords", {})
        name = getattr(getattr(value, "func", value), "__qualname__", type(value).__name__)
        return name + (f"({', '.join(f'{key}={item!r}' for key, item in keywords.items())})" if keywords else "")

    names: tuple[str, ...] = (
        "batch_size",
        "temperature",
        "straight_through",
        "surrogate",
        "beta",
        "clip_norm",
        "penalty",
        "patience",
        "average",
    )
    names += ("optim", "scheduler", "preprocess", "num_log_samples", "log_rows")
    return {
        "num_steps": num_steps,
        "log_every": method.log_every,
        "elbo": type(run.elbo).__name__,
        "num_particles": getattr(run.elbo, "num_particles", None),
        "device": str(run.device),
        "capture": run.capture,
        **{name: plain(getattr(method, name)) for name in names},
    }


def _stable(names: list[str]) -> dict[str, str]:
    """Names without the number that a `pyrovae.handlers.Module` takes in its process, which differs in the next one."""
    serials: dict[str, int] = {}
    found = {}
    for name in names:
        match = re.match(r"([A-Za-z]\w*)_(\d+)(?=[.$])", name)
        if match:
            number = serials.setdefault(match[0], sum(key.startswith(match[1] + "_") for key in serials))
            found[name] = f"{match[1]}_{number}{name[match.end() :]}"
        else:
            found[name] = name
    return found
