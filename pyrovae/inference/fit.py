"""What every learning method returns."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae.inference.posterior import Bound


@dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    """An account of a learning run. The learned parameters are in the model (and guide) themselves, and in `states`.

    Attributes:
        history: records in order, each with `step`, `loss` (the objective, summed over the data, penalties, relaxation and
            KL weight included; the mean over the steps since the record before), `bound` (log p(x) or a bound of it as
            `bound` says, per datum in nats, discrete latents and KL weight 1, None where the method has none), `stderr`,
            `validation` (the same on validation data, or None) and `seconds`. Those of `Variational` also have `epoch`,
            `rows` (of the training data that `bound` was evaluated on), `temperature`, `beta` and `learning_rate` (None
            where there is none).
        bound: what the histories' `bound` is.
        states: what was learned, at the end, `{"model": …, "guide": …}`, detached copies. Of a module it is its
            `state_dict()`, also where `relax` and the like wrap it: `net.load_state_dict(fit.states["model"])`. Of a plain
            function it is `{name: value}` by the names that Pyro gives its parameters (`"net$$$weight"` under
            `pyro.module("net", …)`); the value of a constrained `pyro.param` is the constrained one.
        seconds: wall time.
        model_evaluations: values of log p(x, z) of one datum at one z that were computed, one gradient counted once; those
            for the history's records included. EM counts an evaluation of Q as one, however many states it sums over.
        seed: the seed of torch's generator at the start.
        penalty: the precision λ of the Gaussian prior on the model's parameters, −λ/2 ‖θ‖² in the objective.
        versions: of Python and the packages that matter.
        best_step: the step of the record with the best bound, that of the validation data where there are any; None where
            the method keeps none.
        exact_learning: False where the records' `bound` may be exact but the steps followed an estimate of its gradient.
        stopped: why the run ended: "num_steps", or "patience", after which `states` are those of `best_step`.
    """

    history: tuple[Mapping[str, Any], ...] = field(repr=False)
    bound: Bound
    states: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    seconds: float
    model_evaluations: int
    seed: int
    penalty: float
    versions: Mapping[str, str] = field(repr=False)
    best_step: int | None = None
    stopped: str = "num_steps"
    exact_learning: bool = True


def versions() -> dict[str, str]:
    """Versions of Python, torch, Pyro and this library."""
    from pyrovae import __version__

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyro-ppl": version("pyro-ppl"),
        "pyrovae": __version__,
    }


def state_of(program: Callable[..., Any] | None, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a program has learned: a module's `state_dict()`, else the values of its parameters by name; detached copies.

    Args:
        program: a Pyro program, perhaps wrapped (by `relax`, `own_params`); None for parameters without one.
        leaves: its unconstrained parameters, by name.
    """
    inner = root_module(program)
    if inner is not None:
        return snapshot(inner.state_dict())
    store = pyro.get_param_store()
    kept = {name for name, leaf in leaves.items() if store._params.get(name) is leaf}
    return snapshot({name: store[name] if name in kept else leaf for name, leaf in leaves.items()})


def root_module(program: Any) -> torch.nn.Module | None:
    """The module that a program is, perhaps inside `relax` and the like; None for a plain function."""
    while not isinstance(program, torch.nn.Module) and hasattr(program, "program"):
        program = program.program
    return program if isinstance(program, torch.nn.Module) else None


def snapshot(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies of parameters."""
    return {name: leaf.detach().clone() for name, leaf in leaves.items()}


def squared_norm(leaves: Mapping[str, Tensor]) -> Tensor:
    """‖θ‖² of all parameters, 0-d."""
    return torch.stack([(leaf**2).sum() for leaf in leaves.values()]).sum()


def check_held_out(args: tuple[Any, ...], kwargs: Mapping[str, Any], validation: Any) -> None:
    """Refuse validation data beside keyword arguments with a row for each row of the training data: they take those along.

    Args:
        args: the training data's arguments.
        kwargs: likewise; they serve the validation data too.
        validation: a tensor, a tuple of arguments, or None.

    Raises:
        ValueError: with the name of the argument.
    """
    first = validation[0] if isinstance(validation, tuple) and validation else validation
    if validation is None or not args or not isinstance(args[0], torch.Tensor) or first is args[0] or not args[0].dim():
        return
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == len(args[0]):
            raise ValueError(
                f"expected keyword arguments that serve the validation data too, got {name} with an entry for each of the "
                f"{len(value)} rows of the training data; pass it by position, fit(model, x, {name}, "
                f"validation=(x_validation, {name}_validation)), or fit without validation"
            )


def check_penalty(penalty: float) -> float:
    """A penalty's precision, not negative."""
    if not penalty >= 0:
        raise ValueError(f"expected penalty >= 0, got {penalty}")
    return float(penalty)
