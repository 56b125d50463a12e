"""Energies without their log Z: what a program must not learn, or call a probability, in silence."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrovae.distributions.undirected import Undirected
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
      Found by runs of the program in grad mode (:func:`learned_energies`), so that neither a factor without parameters nor a
      penalty on parameters alone is taken for one. Costs nothing where the program has no factor, one run where none depends
      on parameters, else up to nine, over all the data given. Data in a closure whose rows are all alike are not noticed.
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
    """Names of `pyro.factor` statements with trainable parameters whose value varies with latents or data.

    Found, in this order, by the graph of the value; by rows of a batch that differ even if all parameters of a kind are equal,
    as where the data are in a closure; and by a gradient for the parameters that is another with other latents or data, as
    where a code is an index or data are cast. Random state, parameters and the buffers of modules stay.
    """
    with _kept_buffers(program):
        try:
            first = _probe(program, args, kwargs, structure, trace=True)
        except RuntimeError:  # code that takes no inputs with a gradient, such as `.numpy()`
            first = _probe(program, args, kwargs, structure)
        open_ = [name for name in first.factors if first.reached(name)]
        found = {name for name in open_ if first.reached(name) & first.inputs}
        if not found.issuperset(open_):
            with contextlib.suppress(Exception), _alike(first.leaves):  # not every program takes such parameters
                level = _probe(program, args, kwargs, structure).factors
                found |= {name for name in open_ if name in level and _rows_differ(level[name], name, structure)}
        rest = [name for name in open_ if name not in found]
        gradients = {name: first.gradient(name) for name in rest}
        changes = list(_changes(args, kwargs, structure)) if rest else []
        failed = 0
        for others, named, codes in changes:
            try:
                run = _probe(program, others, named, structure, codes=codes)
                found |= {name for name in rest if name in run.factors and _differ(gradients[name], run.gradient(name))}
            except Exception:  # values that the program does not take
                failed += 1
            if found.issuperset(rest):
                break
        if changes and failed == len(changes):  # nothing is known: rather a warning too many
            found |= set(rest)
    return [name for name in first.factors if name in found]


@dataclass
class _Probe:
    """Values of factors in one run in grad mode; trainable leaves; the ids of leaves that stand for latents and data."""

    factors: dict[str, Tensor]
    leaves: dict[str, Tensor]
    inputs: set[int]

    def reached(self, name: str) -> set[int]:
        """The ids of the leaves behind a factor; empty if none of them is a trainable parameter."""
        found = _leaves_of(self.factors[name])
        return found if found & {id(leaf) for leaf in self.leaves.values()} else set()

    def gradient(self, name: str) -> dict[str, Tensor]:
        """The gradient of a factor's weighted sum for the parameters, by name; the weights differ, but not between runs."""
        value = self.factors[name]
        if not value.requires_grad:
            return {}
        weights = 1 + torch.arange(value.numel(), device=value.device).to(value).reshape(value.shape).sin() / 2
        found = torch.autograd.grad((value * weights).sum(), list(self.leaves.values()), retain_graph=True, allow_unused=True)
        return {k: g.nan_to_num() for k, g in zip(self.leaves, found, strict=True) if g is not None}


def _probe(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    structure: Structure,
    *,
    trace: bool = False,
    codes: int | None = None,
) -> _Probe:
    """One run of the program, with finite latents of the given codes (−1: drawn uniformly), or all drawn from the prior."""
    reader, leaves = _Factors(structure.subsample, codes, trace=trace), dict[str, Tensor]()
    if trace:
        args, kwargs = _traced(args, reader.inputs), _traced(dict(kwargs), reader.inputs)
    with torch.enable_grad(), isolated_rng(), poutine.block(), pyro.validation_enabled(is_validate=False), reader:
        own_params(program, leaves)(*args, **kwargs)
    factors = {name: value for name, value in reader.factors.items() if isinstance(value, Tensor)}
    return _Probe(factors, {k: v for k, v in leaves.items() if v.requires_grad}, {id(leaf) for leaf in reader.inputs})


def _changes(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], int | None]]:
    """Arguments with other data, and codes of the latents: none; the first, the last, and some at random."""
    for change in (_complement, _halved, _flipped):
        others = tuple(_changed(value, change) for value in args)
        named = {k: v if k in _ROW_NAMES else _changed(v, change) for k, v in kwargs.items()}
        pairs = (*zip(args, others, strict=True), *((v, named[k]) for k, v in kwargs.items()))
        if any(value is not other for value, other in pairs):
            yield others, named, None
    if structure.latents:
        yield from ((args, dict(kwargs), codes) for codes in (0, 1, -1, -1))


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Other data in the place of a tensor, unless that is an index of rows."""
    if not isinstance(value, Tensor) or not value.dim() or value.is_complex():
        return value
    whole = not value.is_floating_point() and value.dtype != torch.bool
    return value if whole and value.dim() == 1 and len(value.unique()) == len(value) else change(value)


def _complement(x: Tensor) -> Tensor:
    if x.dtype == torch.bool:
        return ~x
    return 1 - x if bool(((x == 0) | (x == 1)).all()) else x


def _halved(x: Tensor) -> Tensor:
    return x / 2 if x.is_floating_point() else x & False if x.dtype == torch.bool else x // 2


def _flipped(x: Tensor) -> Tensor:
    return x.flip(0)


def _differ(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two gradients are apart by more than rounding."""
    for name in a.keys() | b.keys():
        sides = [side[name] for side in (a, b) if name in side]
        one, other = sides if len(sides) == 2 else (sides[0], torch.zeros_like(sides[0]))
        if bool((one - other).abs().max() > _ROUNDING * torch.maximum(one.abs().max(), other.abs().max())):
            return True
    return False


def _rows_differ(value: Tensor, name: str, structure: Structure) -> bool:
    """Whether a factor has other values in other rows of the batch."""
    sites: list[Any] = [*structure.latents, *structure.observed]
    sites = [site for site in sites if site.name not in structure.factors or site.name == name]
    batch = set.intersection(*(set(site.plates) for site in sites))
    value, bound = value.detach().nan_to_num(), _ROUNDING * float(value.detach().nan_to_num().abs().max())
    return any(
        value.dim() + plate.dim >= 0 and bool((value.amax(plate.dim) - value.amin(plate.dim)).max() > bound) for plate in batch
    )


@contextlib.contextmanager
def _alike(leaves: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with all elements of each parameter equal, so that rows with parameters of their own are alike."""
    kept = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    try:
        for leaf in leaves.values():
            leaf.data.fill_(_LEVEL)  # no change that a graph of the caller's would count
        yield
    finally:
        for name, leaf in leaves.items():
            leaf.data.copy_(kept[name])


@contextlib.contextmanager
def _kept_buffers(program: Any) -> Iterator[None]:
    """Run, and put back what layers such as batch normalisation count."""
    while not isinstance(program, nn.Module) and hasattr(program, "program"):
        program = program.program
    buffers = list(program.buffers()) if isinstance(program, nn.Module) else []
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)


class _Factors(Messenger):
    """Collects the values of factors.

    It may let a gradient through to what floating latents and data they are made of, and set finite latents to given codes.
    """

    def __init__(self, subsample: Mapping[str, Tensor], codes: int | None, *, trace: bool) -> None:
        super().__init__()
        self.subsample, self.codes, self.trace = subsample, codes, trace
        self.inputs: list[Tensor] = []
        self.factors: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_subsample(msg):
            if msg["name"] in self.subsample and msg["value"] is None:
                msg["value"], msg["done"] = self.subsample[msg["name"]], True
        elif msg["is_observed"] and isinstance(innermost(msg["fn"]), dist.Unit):
            self.factors[msg["name"]] = innermost(msg["fn"]).log_factor
        elif self.codes is not None and not msg["is_observed"] and msg["value"] is None:
            value = _value_of(msg["fn"], self.codes)
            if value is not None:
                msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and not is_subsample(msg) and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()
            if self.trace:
                msg["value"] = _traced(msg["value"], self.inputs)


def _value_of(fn: Any, codes: int) -> Tensor | None:
    """A value of bits or categories by code: all the first, all the last, or (−1) uniformly drawn; None of other families."""
    base = innermost(fn)
    if isinstance(base, (torch.distributions.Bernoulli, Undirected)):
        like = base.probs if isinstance(base, torch.distributions.Bernoulli) else base.parameters[-1]
        shape, last = fn.shape(), 1
    elif isinstance(base, (torch.distributions.Categorical, torch.distributions.OneHotCategorical)):
        like, last = base.probs, base.probs.shape[-1] - 1
        shape = fn.shape()[:-1] if isinstance(base, torch.distributions.OneHotCategorical) else fn.shape()
    else:
        return None
    code = torch.full(shape, codes * last, device=like.device)
    code = torch.randint(last + 1, shape, device=like.device) if codes < 0 else code
    if isinstance(base, torch.distributions.Categorical):
        return code
    if isinstance(base, torch.distributions.OneHotCategorical):
        return torch.nn.functional.one_hot(code, last + 1).to(like.dtype)
    return code.to(like.dtype)


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


_ROW_NAMES = ("index", "num_data")  # arguments that say which rows the data are
_ROUNDING = 1e-4
_LEVEL = 0.37  # of all parameters, where rows are compared
