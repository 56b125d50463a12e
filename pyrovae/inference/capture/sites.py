"""What every sample statement of a run was, and the first one that two runs disagree on, in words.

A captured run replays the numbers of the program as it was. When an eager run gives others, the site where they part tells
the user what has changed: a number that the program holds outside of any tensor.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, Independent, Transform

Entry = int | float | bool | str | None
_WRAPPERS = (Independent, dist.MaskedDistribution, dist.torch_distribution.ExpandedDistribution)
_HOUSEKEEPING = {"_validate_args", "_cache_size", "training"}


class At(int):
    """An entry that is a tensor: its place in the recorder's `tensors`."""


@dataclass(frozen=True)
class Site:
    """What one `pyro.sample` statement was in one run.

    Attributes:
        name: of the site.
        observed: whether its value was given.
        family: the distribution's class without `.to_event`, `.expand` and `.mask`, and its transforms.
        batch_shape: of its distribution.
        event_shape: likewise.
        plates: (name, size, dim) of the plates around it, the outermost first; dim is None in a sequential plate.
        entries: (label, number) of what the distribution holds, of the scale and mask of its log probability, and of its value;
            in the place of a tensor its index, an :class:`At`.
    """

    name: str
    observed: bool
    family: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int | None], ...]
    entries: tuple[tuple[str, Entry], ...]


class SiteRecorder(Messenger):
    """Records the sample statements of the block it surrounds, in order; put it outside of all other handlers.

    It looks only at what distributions already hold: no lazy parameter is computed, nothing is drawn or scored, and no tensor
    is read, so that it may stand in a run that is traced. Sites inside `poutine.block` are hidden from it.

    Attributes:
        sites: a record of each.
        tensors: what the records refer to, detached and not copied.

    Example:
        >>> import pyro
        >>> with SiteRecorder() as recorder:
        ...     _ = pyro.sample("z", dist.Normal(torch.zeros(3), 0.5).to_event(1))
        >>> recorder.sites[0].family, [label for label, _ in recorder.sites[0].entries]
        ('Normal', ['loc', 'scale', 'log-probability scale', 'log-probability mask', 'value'])
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self.tensors: list[Tensor] = []

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        held: dict[str, Any] = {}
        for label, thing, owner in _held(fn, "", set()):
            names = itertools.chain(
                (label, f"{label} of the {owner}"), (f"{label} of the {owner} {k}" for k in itertools.count(2))
            )
            held[next(name for name in names if name not in held)] = thing
        held["log-probability scale"] = msg["scale"]
        held["log-probability mask"] = msg["mask"]
        held["value"] = msg["value"]
        self.sites.append(
            Site(
                name=msg["name"],
                observed=bool(msg["is_observed"]),
                family=_family(fn),
                batch_shape=tuple(getattr(fn, "batch_shape", ())),
                event_shape=tuple(getattr(fn, "event_shape", ())),
                plates=tuple((frame.name, frame.size, frame.dim) for frame in msg["cond_indep_stack"]),
                entries=self._entries(held),
            )
        )

    def _entries(self, held: dict[str, Any]) -> tuple[tuple[str, Entry], ...]:
        entries: list[tuple[str, Entry]] = []
        places: dict[int, At] = {}
        for label, thing in held.items():
            if not isinstance(thing, Tensor):
                entries.append((label, thing if isinstance(thing, Entry) else None))
            elif id(thing) not in places or label == "value":
                places[id(thing)] = At(len(self.tensors))
                self.tensors.append(thing.detach())
                entries.append((label, places[id(thing)]))
        return tuple(entries)


def structural_change(before: Sequence[Site], after: Sequence[Site]) -> str | None:
    """The first site that is another statement in the second run than in the first, in words; None if all are the same.

    Numbers and the shapes of values do not count, see :func:`numerical_difference`.
    """
    for old, new in zip(before, after, strict=False):
        if old.name != new.name:
            return _added_or_gone(old, new, before, after)
        changed = _changed(old, new)
        if changed:
            return f"{_named(new)} {changed}"
    if len(after) != len(before):
        extra = after[len(before)] if len(after) > len(before) else before[len(after)]
        return _added_or_gone(extra, extra, before, after)
    return None


def numerical_difference(
    sites: Sequence[Site],
    before: Sequence[Tensor | None],
    after_sites: Sequence[Site],
    after: Sequence[Tensor],
    *,
    tolerance: float = 0.0,
) -> str | None:
    """The first number that two runs with the same random state disagree on, in words; None if there is none.

    Args:
        sites: of the captured run.
        before: its tensors; None where one was not kept, which is passed over.
        after_sites: of the run it is compared with, of the same structure (see :func:`structural_change`).
        after: its tensors.
        tolerance: how far elements may lie apart, relative to the largest finite one of the tensor. At 0 they are equal; NaN
            equals NaN.
    """
    for old, new in zip(sites, after_sites, strict=False):
        was = dict(old.entries)
        for label, entry in new.entries:
            if label not in was:
                continue
            a = before[was[label]] if isinstance(was[label], At) else was[label]  # type: ignore[index]
            b = after[entry] if isinstance(entry, At) else entry
            if a is None and isinstance(was[label], At):
                continue
            differ = _differ(a, b, tolerance)
            if differ:
                return f"the {label} of {_named(new)}{'' if _is_plate(new) else f' ({new.family})'} {differ}"
    return None


def _held(thing: Any, owner: str, seen: set[int]) -> Iterator[tuple[str, Any, str]]:
    """(label, tensor or number, whose) of all that a distribution holds, the distributions and transforms within included."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    parts = getattr(thing, "__dict__", {})
    if isinstance(thing, _WRAPPERS):
        parts = {name: parts.get(name) for name in ("base_dist", "_mask")}
    given = ("base_dist", *getattr(thing, "arg_constraints", ()))
    for name in (*filter(parts.__contains__, given), *(name for name in parts if name not in given)):
        part, label = parts[name], name.strip("_").replace("_", " ")
        if isinstance(part, Distribution | Transform):
            yield from _held(part, owner if name == "base_dist" else label, seen)
        elif isinstance(part, list | tuple):
            for item in part:
                if isinstance(item, Distribution | Transform):
                    yield from _held(item, type(item).__name__, seen)
        elif isinstance(part, Tensor | int | float | str) and name not in _HOUSEKEEPING:
            yield label, part, owner or type(thing).__name__


def _family(fn: Any) -> str:
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    if type(fn).__name__ != "TransformedDistribution":
        return type(fn).__name__
    return f"{_family(fn.base_dist)} through {', '.join(_transform(t) for t in fn.transforms)}"


def _transform(transform: Any) -> str:
    parts = getattr(transform, "parts", None)
    return ", ".join(_transform(part) for part in parts) if parts else type(transform).__name__


def _added_or_gone(old: Site, new: Site, before: Sequence[Site], after: Sequence[Site]) -> str:
    was, now = Counter(site.name for site in before), Counter(site.name for site in after)
    for site in (new, old):
        many, before_that = now[site.name], was[site.name]
        if many != before_that and many and before_that:
            return f"{_named(site)} occurs {_times(many)} now and did {_times(before_that)}"
        if many != before_that:
            return f"{_named(site)} is {'new' if many else 'gone'}"
    return f"{_named(new)} stands where {_named(old)} stood"


def _times(many: int) -> str:
    return "once" if many == 1 else f"{many} times"


def _named(site: Site) -> str:
    return f"the {'plate' if _is_plate(site) else 'site'} {site.name!r}"


def _is_plate(site: Site) -> bool:
    return site.family == "_Subsample"


def _changed(old: Site, new: Site) -> str | None:
    if old.family != new.family:
        return f"is {_a(new.family)} now and was {_a(old.family)}"
    if old.observed != new.observed:
        return "is observed now and was latent" if new.observed else "is latent now and was observed"
    for words, was, now in (("batch", old.batch_shape, new.batch_shape), ("event", old.event_shape, new.event_shape)):
        if was != now:
            return f"has {words} shape {now} now and had {was}"
    if old.plates != new.plates:
        return f"is in {_plates(new)} now and was in {_plates(old)}"
    return None


def _a(family: str) -> str:
    return f"{'an' if family[0] in 'AEIO' else 'a'} {family}"


def _plates(site: Site) -> str:
    return ", ".join(f"the plate {name!r} (size {size}, dim {dim})" for name, size, dim in site.plates) or "no plate"


def _differ(a: Tensor | Entry, b: Tensor | Entry, tolerance: float) -> str | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return f"is {_kind(b)} and was {_kind(a)} when the program was captured"
        same = a == b or (a != a and b != b)
        same = same or (isinstance(a, float) and isinstance(b, float) and abs(a - b) <= tolerance * max(abs(a), abs(b)))
        return None if same else f"is {b!r} and was {a!r} when the program was captured"
    if a.shape != b.shape:
        return f"has shape {tuple(b.shape)} and had {tuple(a.shape)} when the program was captured"
    if a.dtype != b.dtype:
        return f"has dtype {b.dtype} and had {a.dtype} when the program was captured"
    a, b = a.detach(), b.detach()
    apart = ~((a == b) | ((a != a) & (b != b)))
    if tolerance and a.is_floating_point():
        largest = torch.where(torch.isfinite(a), a, 0).abs().amax() if a.numel() else 0
        apart &= ~((a - b).abs() <= tolerance * largest)
    where = apart.nonzero()
    if not len(where):
        return None
    if a.numel() == 1 or (_constant(a) and _constant(b)):
        return f"is {_number(b.flatten()[0])} and was {_number(a.flatten()[0])} when the program was captured"
    index = tuple(int(i) for i in where[0])
    return f"is {_number(b[index])} at {list(index)} and was {_number(a[index])} when the program was captured"


def _constant(x: Tensor) -> bool:
    return bool((x == x.flatten()[0]).all())


def _kind(thing: Tensor | Entry) -> str:
    return f"a tensor of shape {tuple(thing.shape)}" if isinstance(thing, Tensor) else repr(thing)


def _number(x: Tensor) -> str:
    """The fewest digits that are this number in its dtype."""
    value = x.item()
    if not isinstance(value, float):
        return str(value)
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    same = (short for short in shorter if torch.tensor(short, dtype=x.dtype).item() == value)
    return repr(next(same, value)).removesuffix(".0")
