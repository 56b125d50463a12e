"""The undirected distribution that a target means: a distribution, a model that has one, or a program that draws from one."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from torch import nn

from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers.own_params import OwnedProgram, own_params
from pyrovae.handlers.rewrite import innermost
from pyrovae.ops import isolated_rng


def energy_of(target: Any, *args: Any, **kwargs: Any) -> Undirected:
    """The RBM or Boltzmann machine that `target` is, has or draws from.

    Nothing is computed of a distribution or of a model with a method `distribution()`. Any other program runs once, without
    drawing from the machine (its value there is 0 unless it is observed); random state and parameter store stay.

    Args:
        target: an :class:`pyrovae.distributions.RBM` or :class:`pyrovae.distributions.BoltzmannMachine`; a model with a method
            `distribution()`; or a Pyro program with exactly one site drawn from such a distribution.
        *args: the program's arguments.
        **kwargs: its keyword arguments.

    Raises:
        TypeError: for anything else.
        ValueError: for a program with no such site, or with several.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import RBM
        >>> rbm = RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
        >>> energy_of(rbm) is rbm, energy_of(lambda: pyro.sample("z", rbm)) is rbm
        (True, True)
    """
    return _found(target, args, kwargs)[0]


def data_energy(target: Any, x: Any) -> Undirected:
    """The distribution that a target says its data `x` are drawn from: as :func:`energy_of`, and observed by a program.

    Raises:
        TypeError: as `energy_of`.
        ValueError: as `energy_of`, and for a program in which the machine is a latent, the prior of something else.
    """
    distribution, latent = _found(target, (x,), {})
    if latent is not None:
        raise ValueError(
            f"expected a program whose data are drawn from the {type(distribution).__name__}, got the latent {latent!r}, a "
            "prior; learn such a program by Variational, WakeSleep or UpDown"
        )
    return distribution


def _found(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Undirected, str | None]:
    """The distribution, and the name of its site where a program does not observe it."""
    if isinstance(target, Undirected):
        return target, None
    program = target
    while isinstance(program, OwnedProgram):
        program = program.program
    method = getattr(program, "distribution", None) if isinstance(program, nn.Module) else None
    if callable(method):
        found = method()
        if not isinstance(found, Undirected):
            raise TypeError(
                f"expected {type(program).__name__}.distribution() to return an RBM or BoltzmannMachine, got "
                f"{type(found).__name__}; a program without that method is read by its sites"
            )
        return found, None
    if not callable(program) or isinstance(program, type):
        raise TypeError(
            f"expected an RBM, a BoltzmannMachine, a model with distribution() or a Pyro program, got {type(target).__name__}"
        )
    reader = _Reader()
    with isolated_rng(), pyro.poutine.block(), reader:
        own_params(program)(*args, **kwargs)
    if len(reader.found) != 1:
        sites = ", ".join(repr(name) for name in reader.found) or "none"
        raise ValueError(
            f"expected a program with exactly one site drawn from an RBM or BoltzmannMachine, got {sites}; pass the "
            "distribution itself"
        )
    name, found = next(iter(reader.found.items()))
    return found, name if name in reader.latent else None


class _Reader(Messenger):
    """Collects undirected distributions of sites, and answers those that are not observed with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Undirected] = {}
        self.latent: set[str] = set()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = innermost(msg["fn"])
        if not isinstance(fn, Undirected):
            return
        self.found[msg["name"]] = fn
        if not msg["is_observed"]:
            self.latent.add(msg["name"])
        if not msg["done"] and not msg["is_observed"]:
            msg["value"], msg["done"] = fn.parameters[-1].new_zeros(msg["fn"].shape()), True
