"""Which arguments have a row for each datum: told by their lengths, and checked by scoring a few rows alone and among many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyrovae.handlers.structure import Structure, draw_sites, read_structure
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Program
from pyrovae.ops import isolated_rng

NUMEL = 2**22  # elements of data and latents that one run of a program sees
Key: TypeAlias = int | str  # the place of a positional argument, or the name of another
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class RowWise:
    """A call that can be made on some of its rows.

    Attributes:
        keys: the arguments that have a row for each datum, the data first.
        indexed: whether the programs get `index` and `num_data`.
        axis: the place of the plate of the data among the batch dims of results.
        numel: elements of data and latents of one row.
        structures: of the programs with two rows.
    """

    keys: tuple[Key, ...]
    indexed: bool
    axis: int
    numel: int
    structures: tuple[Structure, ...]


def row_keys(args: tuple[Any, ...], kwargs: Mapping[str, Any], length: int) -> tuple[Key, ...]:
    """The tensors of a length, the first positional one first."""
    named: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
    return tuple(key for key, value in named if isinstance(value, Tensor) and value.dim() and len(value) == length)


def take(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: Tensor | slice, keys: tuple[Key, ...]) -> Call:
    """The same rows of some arguments; the others as they are."""
    return (
        tuple(value[index] if key in keys else value for key, value in enumerate(args)),
        {key: value[index] if key in keys else value for key, value in kwargs.items()},
    )


def take_some(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: Tensor, found: RowWise, total: int) -> Call:
    """The arguments for some of `total` rows."""
    some, named = take(args, kwargs, index, found.keys)
    return some, ({"index": index, "num_data": total} | named if found.indexed else named)


def readings(keys: tuple[Key, ...]) -> Iterator[tuple[Key, ...]]:
    """What may be rows among tensors as long as the data: all; else all but one, and so on; the data always."""
    data, *others = keys
    counts = range(len(others) + 1) if len(others) < 5 else (0, 1, len(others))
    for count in counts:
        for shared in combinations(others, count):
            yield (data, *(key for key in others if key not in shared))


def row_wise(
    programs: tuple[Program, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    total: int,
    *,
    indexed: bool,
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
    needed: Callable[[int], bool] = lambda numel: True,
) -> RowWise | None:
    """How a call can be made on some of its rows, if it can.

    Every latent and observed site must be in a plate that follows the number of rows passed, and its log probabilities of two
    rows must be those that they have among many. A tensor as long as the data for which this fails (weights of the pixels,
    where there are as many images as pixels) is tried as one that all rows share. Costs a few runs of the programs.

    Args:
        programs: the model, and the guide if there is one.
        args: their positional arguments.
        kwargs: their keyword arguments.
        total: the rows of the first tensor among `args`.
        indexed: whether to pass `index` and `num_data`.
        prepare: applied to the arguments of every run.
        needed: whether, by the elements of a row, the rows will be split at all; if not, nothing is compared.
    """
    if total <= 3:
        return None
    for keys in readings(row_keys(args, kwargs, total)):
        found = _judged(programs, args, kwargs, total, keys, indexed=indexed, prepare=prepare, needed=needed)
        if isinstance(found, RowWise):
            return found
    return None


def minibatch_keys(
    programs: tuple[Program, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    total: int,
    *,
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> tuple[Key, ...]:
    """The arguments whose rows a minibatch takes; latents may lie outside the plate of the data.

    Raises:
        ValueError: if some tensor is as long as the data, and rows are scored otherwise in a minibatch than among many both
            with its rows and with all of it.
    """
    every = row_keys(args, kwargs, total)
    if len(every) < 2 or total <= 3:
        return every
    differ = []
    for keys in readings(every):
        for with_index in (True, False):
            found = _judged(programs, args, kwargs, total, keys, indexed=with_index, prepare=prepare, inside=False)
            if isinstance(found, RowWise):
                return keys
            if found:
                differ.append(keys)
    if any(keys != every for keys in differ) and every in differ:
        raise ValueError(
            f"expected programs that score a row alike in any minibatch, got another; {doubt(args, kwargs, total)}"
        )
    return every


def doubt(args: tuple[Any, ...], kwargs: Mapping[str, Any], total: int) -> str:
    """What to say of tensors that may be rows or not, "" where there are none."""
    others = row_keys(args, kwargs, total)[1:]
    if not others:
        return ""
    named = [f"argument {key} {list((args[key] if isinstance(key, int) else kwargs[key]).shape)}" for key in others]
    return (
        f"{', '.join(named)}, as long as the {total} rows of the data, fits neither as rows nor as shared by all rows; pass "
        "what is shared in another shape, such as [1, …], or let the program close over it"
    )


def _judged(
    programs: tuple[Program, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    total: int,
    keys: tuple[Key, ...],
    *,
    indexed: bool,
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
    needed: Callable[[int], bool] = lambda numel: True,
    inside: bool = True,
) -> RowWise | bool:
    """A reading of the arguments that holds; else whether the programs run by it, with other numbers."""

    def some(index: Tensor) -> Call:
        picked, named = take(args, kwargs, index, keys)
        with isolated_rng(0):
            prepared = picked if prepare is None else prepare(picked)
        return prepared, ({"index": index, "num_data": total} | named if indexed else named)

    try:
        index = torch.arange(total, device=_device(args))
        two, three = ([read_structure(program, *some(index[-n:])) for program in programs] for n in (2, 3))
        follow = _following(two, three, inside=inside)
        if follow is None:
            return False
        row = max(1, row_numel(two[0]) * two[0].batch_shape.numel() // 2)
        dims = [plate.dim for plate in two[0].batch]
        found = RowWise(keys, indexed, dims.index(follow) if follow in dims else 0, row, tuple(two))
        if not needed(row):
            return found
        number = max(4, NUMEL // row) if len(row_keys(args, kwargs, total)) > 1 else 64
        many = some(index[-number:])
        few = (*take(*many, slice(-2, None), keys),)
        if indexed:
            few = few[0], few[1] | {"index": index[-2:]}
        return found if _alike(programs, many, few, follow) else True
    except Exception:  # whatever a program does with arguments of another shape
        return False


def _following(two: list[Structure], three: list[Structure], *, inside: bool) -> int | None:
    """The dim of the plate that follows the number of rows, in every program; None where there is none."""

    def plates(structure: Structure) -> list[Any]:
        return sorted(structure.batch if inside else structure.plates, key=lambda plate: plate.dim)

    followed = []
    for a, b in zip(two, three, strict=True):
        dims = {p.dim for p in plates(a) if p.size == 2 and p.name not in a.random_plates}
        followed.append(dims & {p.dim for p in plates(b) if p.size == 3})
    common = set.intersection(*followed)
    return min(common) if common else None


def _alike(programs: tuple[Program, ...], many: Call, few: Call, dim: int) -> bool:
    """Whether the last two rows have the same log probabilities, site by site, in a call of theirs as in one of many."""
    structures = [read_structure(programs[0], *call) for call in (many, few)]
    with isolated_rng(0), torch.no_grad():
        drawn = draw_sites(programs[0], *many, structures[0].subsample)
        states: list[dict[str, Tensor]] = [{}, {}]
        for latent in structures[0].latents:
            value = drawn[latent.name].value.expand(latent.batch_shape + latent.event_shape)
            states[0][latent.name] = value.unsqueeze(0)
            if dim in latent.plate_dims:
                value = value.narrow(dim - len(latent.event_shape), value.shape[dim - len(latent.event_shape)] - 2, 2)
            states[1][latent.name] = value.unsqueeze(0)
        for program in programs:
            whole, part = (
                LogJoint(program, *call, structure=structure, broadcasts=True).terms(state)
                for call, structure, state in zip((many, few), structures, states, strict=True)
            )
            if set(whole) != set(part):
                return False
            for name, term in part.items():
                if dim not in term.plate_dims:
                    continue  # such as a global latent of a guide that looks at the rows
                table = whole[name].table
                table = table if table.shape[dim] == 1 else table.narrow(dim, table.shape[dim] - 2, 2)
                bounded = table[table.isfinite()].abs()
                tolerance = torch.finfo(table.dtype).eps ** 0.5
                near = tolerance * max(1.0, float(bounded.max()) if bounded.numel() else 0.0)
                other = term.table.expand(torch.broadcast_shapes(table.shape, term.table.shape))
                if not torch.allclose(table.expand(other.shape), other, rtol=0, atol=near, equal_nan=True):
                    return False
    return True


def row_numel(structure: Structure) -> int:
    """Elements of data and latents of one element of the batch."""
    total = sum(math.prod(site.event_shape) * math.prod(p.size for p in site.plates) for site in structure.observed)
    total += sum(math.prod(latent.batch_shape + latent.event_shape) for latent in structure.latents)
    return max(1, total // max(1, structure.batch_shape.numel()))


def _device(args: tuple[Any, ...]) -> torch.device:
    found: torch.device = next(value.device for value in args if isinstance(value, Tensor) and value.dim())
    return found
