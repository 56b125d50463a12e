"""Energies without their log Z: what a program must not learn, or call a probability, in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.handlers.own_params import own_params
from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import Structure, is_subsample
from pyrovae.ops import isolated_rng


def warn_of_energies(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure, *, learn: bool = True
) -> None:
    """Warn of factors whose parameters would be learned without log Z, and of bounds that lack log Z.

    * A `pyro.factor` whose value depends on trainable parameters and on latents or data, as the energy of a Boltzmann machine
      does: the objective lacks −log Z(θ), and its maximum over θ means nothing, unless the factor is a normalised likelihood.
      Found by the graph of the factor's value in one run of the program in grad mode, so that neither a factor without
      parameters nor a penalty on parameters alone is taken for one. Costs nothing where the program has no factor.
    * A site drawn from an RBM or Boltzmann machine whose log Z is unknown: bounds lack −log Z.

    Args:
        program: a model.
        args: its arguments.
        kwargs: its keyword arguments.
        structure: of the program, from :func:`pyrovae.handlers.structure.read_structure`.
        learn: whether the model's parameters are about to be learned.
    """
    for name in learned_energies(program, args, kwargs, structure) if learn and structure.factors else ():
        warnings.warn(
            f"site {name!r} is a pyro.factor with trainable parameters: unless it is a normalised log likelihood, the "
            "objective lacks -log Z(theta) and what is learned means nothing; draw the site from pyrovae.distributions.RBM or "
            "BoltzmannMachine, whose log_prob has the right gradient",
            UserWarning,
            stacklevel=3,
        )
    for name in structure.unnormalized:
        warnings.warn(
            f"site {name!r} is drawn from an undirected distribution whose log Z is unknown: gradients are those of its "
            "chains, but every reported bound lacks -log Z and is none; to evaluate, give the distribution "
            "log_partition=AIS(...).log_partition(...).log_z",
            UserWarning,
            stacklevel=3,
        )


def check_normalized(structure: Structure, method: str) -> None:
    """Refuse a program with a site whose log Z is unknown: its joint is no probability.

    Raises:
        ValueError: with the site and what to do.
    """
    for name in structure.unnormalized:
        raise ValueError(
            f"expected sites with a known log Z for {method}, got the undirected site {name!r} with chains in the place of "
            "log Z; give the distribution log_partition=AIS(...).log_partition(...).log_z, or no chains where that can be "
            "enumerated"
        )


def learned_energies(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure
) -> list[str]:
    """Names of `pyro.factor` statements whose value depends on trainable parameters and on latents or data."""
    reader, leaves = _Factors(structure.subsample), dict[str, Tensor]()
    args, kwargs = _traced(args, reader.inputs), _traced(dict(kwargs), reader.inputs)
    try:
        with torch.enable_grad(), isolated_rng(), poutine.block(), pyro.validation_enabled(is_validate=False), reader:
            own_params(program, leaves)(*args, **kwargs)
    except RuntimeError:  # code that takes no inputs with a gradient, such as `.numpy()`
        return []
    trainable = {id(leaf) for leaf in leaves.values() if leaf.requires_grad}
    inputs = {id(leaf) for leaf in reader.inputs}
    reached = {name: _leaves_of(value) for name, value in reader.factors.items()}
    return [name for name, found in reached.items() if found & trainable and found & inputs]


class _Factors(Messenger):
    """Collects the values of factors, and lets a gradient through to what floating latents and data they are made of."""

    def __init__(self, subsample: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.subsample = subsample
        self.inputs: list[Tensor] = []
        self.factors: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_subsample(msg):
            if msg["name"] in self.subsample and msg["value"] is None:
                msg["value"], msg["done"] = self.subsample[msg["name"]], True
        elif msg["is_observed"] and isinstance(innermost(msg["fn"]), dist.Unit):
            self.factors[msg["name"]] = innermost(msg["fn"]).log_factor

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and not is_subsample(msg):
            msg["value"] = _traced(msg["value"].detach(), self.inputs)


def _traced(value: Any, inputs: list[Tensor]) -> Any:
    """Floating tensors in arguments, replaced by copies whose graphs begin at leaves that are put into `inputs`."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        leaf = value.clone().requires_grad_()
        inputs.append(leaf)
        return leaf.clone()
    if type(value) in (tuple, list):
        return type(value)(_traced(v, inputs) for v in value)
    return {k: _traced(v, inputs) for k, v in value.items()} if type(value) is dict else value


def _leaves_of(value: Any) -> set[int]:
    """The ids of the leaves that the graph of a value reaches."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return set()
    if value.grad_fn is None:
        return {id(value)}
    found, seen = set[int](), set[Any]()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [parent for parent, _ in node.next_functions]
    return found
