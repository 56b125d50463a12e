"""What a program is made of: its latent sites, observed sites and plates, read from one validated pilot run.

Methods assume nothing of a program's names. :func:`read_structure` runs it once and returns frozen descriptors;
:func:`run_sites` runs it again with given values for its latents and returns the sites it met. Both leave the user's
random state and parameter store alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyrovae.distributions import SurrogateBernoulli, SurrogateOneHotCategorical
from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers.own_params import own_params
from pyrovae.handlers.rewrite import innermost, is_discrete
from pyrovae.ops import isolated_rng

Kind = Literal["bit", "integer", "one_hot", "real", "relaxed_bit", "relaxed_one_hot", "other"]
Measure = Literal["density", "mass", "point", "quantized"]
Gradient = Literal["relaxed", "surrogate"]


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: `size` rows are seen of `full_size`, along the (negative) dim `dim`."""

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True)
class Latent:
    """A latent site, as the pilot run met it.

    A finite site is a vector of `components`, each with `cardinality` values; its states are told by *codes*, integers
    `[..., components]` in [0, cardinality). `gradient` tells how a discrete site was made differentiable, if it was.
    """

    name: str
    kind: Kind
    batch_shape: torch.Size
    event_shape: torch.Size
    plates: tuple[Plate, ...]
    cardinality: int
    components: int
    low: int
    dtype: torch.dtype
    device: torch.device
    measure: Measure = "density"
    gradient: Gradient | None = None

    @property
    def finite(self) -> bool:
        """Whether the site takes finitely many values."""
        return self.kind in ("bit", "integer", "one_hot")

    @property
    def plate_dims(self) -> frozenset[int]:
        """The dims of the site's plates."""
        return frozenset(plate.dim for plate in self.plates)

    @property
    def num_states(self) -> int:
        """The number of values of the whole site (of one element of its plates)."""
        return int(self.cardinality**self.components)

    def decode(self, codes: Tensor) -> Tensor:
        """Values `[..., *event_shape]` of codes `[..., components]`."""
        one_hot = self.kind == "one_hot"
        values = torch.nn.functional.one_hot(codes.long(), self.cardinality) if one_hot else codes + self.low
        return values.to(self.dtype).reshape(codes.shape[:-1] + self.event_shape)

    def encode(self, values: Tensor) -> Tensor:
        """Codes `[..., components]` of values `[..., *event_shape]`."""
        batch = values.shape[: values.dim() - len(self.event_shape)]
        if self.kind == "one_hot":
            return values.argmax(-1).reshape((*batch, self.components))
        return (values.reshape((*batch, self.components)) - self.low).round().long()


@dataclass(frozen=True)
class Observed:
    """An observed site: its name, its plates and the number of elements of one event."""

    name: str
    plates: tuple[Plate, ...]
    event_shape: torch.Size


@dataclass(frozen=True)
class Structure:
    """The sites and plates of a program at given arguments.

    Attributes:
        latents: in the order of the program.
        observed: likewise.
        batch: the plates that enclose every latent and every observed site, left to right.
        plate_depth: how many dims, counted from the right, plates take.
        subsample: the indices that random plates drew in the pilot run; every later run sees the same rows.
        leaves: the unconstrained parameters that the program used, by name.
        sequential: names of sequential plates.
        random_plates: names of plates that draw which rows they see.
        scales: `poutine.scale` of each site, the plates' factors divided out.
        masks: the mask of each latent, a tensor over its plates, a bool or None.
        factors: names of `pyro.factor` statements.
        unnormalized: names of sites drawn from an RBM or Boltzmann machine whose log Z is unknown.
    """

    latents: tuple[Latent, ...]
    observed: tuple[Observed, ...]
    batch: tuple[Plate, ...]
    plate_depth: int
    subsample: dict[str, Tensor] = field(repr=False)
    leaves: dict[str, Tensor] = field(repr=False)
    sequential: tuple[str, ...] = ()
    random_plates: tuple[str, ...] = ()
    scales: dict[str, Any] = field(default_factory=dict, repr=False)
    masks: dict[str, Any] = field(default_factory=dict, repr=False)
    factors: tuple[str, ...] = ()
    unnormalized: tuple[str, ...] = ()

    @property
    def plates(self) -> frozenset[Plate]:
        """All plates around latents and observed sites."""
        return frozenset(p for site in self.latents for p in site.plates) | frozenset(
            p for site in self.observed for p in site.plates
        )

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of results per datum."""
        return torch.Size(plate.size for plate in self.batch)

    def to_batch(self, table: Tensor) -> Tensor:
        """Bring `[..., *plate dims]`, of size 1 outside the batch, to `[..., *batch_shape]`."""
        lead = table.shape[: table.dim() - self.plate_depth] if self.plate_depth else table.shape
        wide = [1] * self.plate_depth
        for plate in self.batch:
            wide[plate.dim] = plate.size
        return table.expand(lead + torch.Size(wide)).reshape(lead + self.batch_shape)

    def from_batch(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`to_batch`."""
        lead = values.shape[: values.dim() - len(self.batch)]
        wide = [1] * self.plate_depth
        for plate in self.batch:
            wide[plate.dim] = plate.size
        return values.reshape(lead + torch.Size(wide))


@dataclass
class Site:
    """One sample statement as a run met it; `fn` is already expanded by its plates."""

    name: str
    fn: Any
    value: Any
    observed: bool
    frames: tuple[Any, ...]
    scale: Any
    mask: Any

    @property
    def plate_dims(self) -> frozenset[int]:
        """The dims of the vectorised plates around the site."""
        return frozenset(frame.dim for frame in self.frames if frame.vectorized)

    @property
    def user_scale(self) -> Any:
        """`poutine.scale` of the site, the plates' factor full_size/size divided out."""
        factor = math.prod(frame.full_size / frame.size for frame in self.frames if frame.vectorized)
        return self.scale if factor == 1 else self.scale / factor


def read_structure(program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
    """Run a program once, validated, and describe it.

    Args:
        program: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: if an observed value is outside the support of its distribution, a batch dim belongs to no plate,
            or a plate is empty.
    """
    leaves: dict[str, Tensor] = {}
    random: set[str] = set()
    with pyro.validation_enabled(is_validate=True), isolated_rng(), torch.no_grad():
        try:
            sites, subsample = _record(program, args, kwargs, {}, {}, leaves, random)
        except ZeroDivisionError as error:  # raised by pyro.plate
            raise ValueError("expected at least one row, got a plate of size 0; pass data with rows") from error
        except (AttributeError, TypeError) as error:
            if not any(type(value).__module__ == "numpy" for value in (*args, *kwargs.values())):
                raise
            raise ValueError(f"expected tensors, got numpy arrays ({error}); pass torch.as_tensor(x)") from error
    latents, observed, sequential = [], [], set[str]()
    for site in sites.values():
        sequential.update(frame.name for frame in site.frames if not frame.vectorized)
        _check_site(site)
        if site.observed:
            observed.append(Observed(site.name, _plates(site), site.fn.event_shape))
        else:
            latents.append(_describe(site))
    around = [set(site.plates) for site in latents] + [set(site.plates) for site in observed]
    common = set.intersection(*around) if around else set()
    return Structure(
        latents=tuple(latents),
        observed=tuple(observed),
        batch=tuple(sorted(common, key=lambda plate: plate.dim)),
        plate_depth=-min((plate.dim for plates in around for plate in plates), default=0),
        subsample=subsample,
        leaves=leaves,
        sequential=tuple(sorted(sequential)),
        random_plates=tuple(sorted(random)),
        scales={name: site.user_scale for name, site in sites.items()},
        masks={site.name: both(unmask(site.fn)[1], site.mask) for site in sites.values() if not site.observed},
        factors=tuple(name for name, site in sites.items() if site.observed and isinstance(innermost(site.fn), dist.Unit)),
        unnormalized=tuple(name for name, site in sites.items() if not _has_log_partition(innermost(site.fn))),
    )


def run_sites(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    subsample: Mapping[str, Tensor],
) -> dict[str, Site]:
    """Run a program, unvalidated, with its latents set to `values`; the sites by name, in order.

    A value may have any dims left of its plates, and size 1 along them. Costs one run of the program, whose hidden draws
    (dropout), if any, advance the caller's random state: isolate it around several runs.
    """
    with pyro.validation_enabled(is_validate=False):
        return _record(program, args, kwargs, values, subsample, {})[0]


def draw_sites(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], subsample: Mapping[str, Tensor]
) -> dict[str, Site]:
    """Run a program, unvalidated, and let it draw its latents from the caller's random state; the sites by name."""
    with pyro.validation_enabled(is_validate=False):
        return _record(program, args, kwargs, {}, subsample, {})[0]


def common_scale(structure: Structure, method: str) -> Any:
    """The `poutine.scale` that all sites share.

    Raises:
        ValueError: if they differ: no posterior has their product for its joint.
    """
    (first, reference), *others = structure.scales.items()
    for name, scale in others:
        if isinstance(scale, float) and scale == reference:
            continue
        a, b = torch.as_tensor(scale, dtype=torch.double), torch.as_tensor(reference, dtype=torch.double)
        if a.shape != b.shape or not torch.allclose(a, b):
            raise ValueError(
                f"expected one poutine.scale for all sites, got different ones at {first!r} and {name!r}; then no "
                f"posterior exists whose evidence {method} could return, scale all sites alike or none"
            )
    return reference


def check_whole_plates(structure: Structure, method: str) -> None:
    """Refuse a subsampled plate with a latent outside it: the rows seen do not tell that latent's posterior.

    Raises:
        ValueError: with the plate and the latent.
    """
    for plate in structure.plates:
        outside = [latent.name for latent in structure.latents if plate not in latent.plates]
        if plate.size < plate.full_size and outside:
            raise ValueError(
                f"expected the whole plate {plate.name!r} with the latent {outside[0]!r} outside it, got {plate.size} of "
                f"{plate.full_size} rows; {method} cannot scale a subsample inside a sum, pass all rows"
            )


def check_all_rows(structure: Structure, method: str) -> None:
    """Refuse a program that draws which rows of its data it sees.

    Raises:
        ValueError: with the plate.
    """
    for plate in structure.plates:
        if plate.name in structure.random_plates:
            raise ValueError(
                f"expected all rows for {method}, got plate {plate.name!r}, which draws {plate.size} of {plate.full_size}; let "
                "the program take index and num_data and open the plate as pyro.plate(name, num_data, subsample=index), or "
                "make subsample_size an argument"
            )


def one_plate_a_dim(structure: Structure, method: str) -> None:
    """Refuse sibling plates that share a dim, which tables could not tell apart.

    Raises:
        ValueError: with the two plates.
    """
    at: dict[int, str] = {}
    for plate in sorted(structure.plates, key=lambda plate: plate.name):
        if at.setdefault(plate.dim, plate.name) != plate.name:
            raise ValueError(
                f"expected one plate a dim, got the sibling plates {at[plate.dim]!r} and {plate.name!r} both along dim "
                f"{plate.dim}; {method} keeps them apart by their dims, write pyro.plate(..., dim={-1 - structure.plate_depth})"
            )


def copied(arguments: Any) -> Any:
    """Arguments with their tensors cloned: a posterior that looks at the data again must not see later changes."""
    if isinstance(arguments, Tensor):
        return arguments.clone()
    if type(arguments) in (tuple, list):
        return type(arguments)(copied(value) for value in arguments)
    return {key: copied(value) for key, value in arguments.items()} if type(arguments) is dict else arguments


def finite_latents(structure: Structure, method: str, instead: str) -> tuple[Latent, ...]:
    """The latents of a structure, once it is sure that their states can be listed and have a posterior.

    Raises:
        ValueError: if there is none, one is continuous, a plate is sequential, sites are scaled differently, or a subsampled
            plate has a latent outside it.
    """
    if structure.sequential:
        raise ValueError(
            f"expected vectorised plates (`with pyro.plate(...)`), got the sequential plate "
            f"{structure.sequential[0]!r}; {method} cannot follow a Python loop, write the plate as a context"
        )
    if not structure.latents:
        raise ValueError(f"expected a program with latent sites, got none; {method} has nothing to infer")
    for latent in structure.latents:
        if not latent.finite:
            what = "relaxed" if latent.kind.startswith("relaxed") else "continuous or infinite"
            remedy = "use pyrovae.handlers.discretize first" if what == "relaxed" else f"use {instead}"
            raise ValueError(
                f"expected latents with finitely many values for {method}, got the {what} site {latent.name!r}; {remedy}"
            )
    common_scale(structure, method)
    check_whole_plates(structure, method)
    return structure.latents


class _Recorder(Messenger):
    """Sets latents to given values, fixes random subsamples, and records every sample site."""

    def __init__(self, values: Mapping[str, Tensor], subsample: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.subsample = values, subsample
        self.sites: dict[str, Site] = {}
        self.drawn: dict[str, Tensor] = {}
        self.random: set[str] = set()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        source = self.subsample if is_subsample(msg) else self.values
        if msg["name"] in source and not msg["is_observed"] and msg["value"] is None:
            msg["value"], msg["done"] = source[msg["name"]], True
        elif is_subsample(msg) and msg["value"] is None and msg["fn"].subsample_size not in (None, msg["fn"].size):
            self.random.add(msg["name"])

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if is_subsample(msg):
            if msg["value"] is not None:
                self.drawn[msg["name"]] = msg["value"]
            return
        if _is_deterministic(msg):
            return
        if msg["name"] in self.sites:
            raise ValueError(f"expected one statement a site, got the name {msg['name']!r} twice; rename one")
        self.sites[msg["name"]] = Site(
            msg["name"],
            msg["fn"],
            msg["value"],
            msg["is_observed"],
            msg["cond_indep_stack"],
            msg["scale"],
            msg["mask"],
        )


def _record(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    subsample: Mapping[str, Tensor],
    leaves: dict[str, Tensor],
    random: set[str] | None = None,
) -> tuple[dict[str, Site], dict[str, Tensor]]:
    with poutine.block(), _Recorder(values, subsample) as recorder:
        own_params(program, leaves)(*args, **kwargs)
    if random is not None:
        random.update(recorder.random)
    return recorder.sites, recorder.drawn


def _is_deterministic(msg: dict[str, Any]) -> bool:
    """Whether a site is `pyro.deterministic`: a value with a name, which observes nothing and may lie in any plates."""
    fn, mask, _ = unmask(msg["fn"])
    return msg["is_observed"] and mask is False and isinstance(fn, dist.Delta)


def is_subsample(msg: dict[str, Any]) -> bool:
    """Whether a message is a plate's draw of the rows that it sees."""
    return type(msg["fn"]).__name__ == "_Subsample"


def _plates(site: Site) -> tuple[Plate, ...]:
    plates = [Plate(f.name, f.dim, int(f.size), int(f.full_size)) for f in site.frames if f.vectorized]
    return tuple(sorted(plates, key=lambda plate: plate.dim))


def _check_site(site: Site) -> None:
    plates = {plate.dim: plate for plate in _plates(site)}
    batch = site.fn.batch_shape
    if site.observed and isinstance(site.value, Tensor):
        lead = site.value.shape[: site.value.dim() - len(site.fn.event_shape)]
        batch = batch if len(lead) < len(batch) else lead  # data may have batch dims of their own
    for dim in range(-len(batch), 0):
        if batch[dim] > 1 and dim not in plates:
            raise ValueError(
                f"expected every batch dim of site {site.name!r} in a plate, got batch shape {tuple(batch)} with dim "
                f"{dim} in none; declare a vector with .to_event(1) or open a pyro.plate"
            )
    if site.observed and isinstance(site.value, Tensor):
        event = site.fn.event_shape
        if not site.value.is_floating_point() and _base_support(site.fn.support) is constraints.boolean:
            raise ValueError(f"expected floating {site.name} in {{0, 1}}, got {site.value.dtype}; pass {site.name}.float()")
        if event and site.value.shape[-len(event) :] != event:
            raise ValueError(
                f"expected {site.name} with rows of shape {tuple(event)}, got {tuple(site.value.shape)}; pass data of the "
                "width that the program was built for"
            )
        _check_support(site)


def _check_support(site: Site) -> None:
    """Observed values must be possible; what a mask hides may be anything."""
    fn, mask, inner = unmask(site.fn)
    mask = both(mask, site.mask)
    if not isinstance(fn, TorchDistributionMixin) or isinstance(fn, (dist.Delta, dist.Unit)) or mask is False:
        return
    try:
        if inner is None:
            valid = fn.support.check(site.value)
        else:
            valid = fn.base_dist.support.check(site.value) | torch.as_tensor(inner).logical_not()
            valid = valid.flatten(valid.dim() - fn.reinterpreted_batch_ndims).all(-1)
    except NotImplementedError:
        return
    if isinstance(mask, Tensor):
        valid = valid | ~mask
    if not bool(valid.all()):
        _explain_support(site, fn)


def _explain_support(site: Site, fn: Any) -> None:
    value = site.value
    number = value[~torch.isnan(value)] if value.is_floating_point() else value
    if number.numel() < value.numel():
        got = f"{value.numel() - number.numel()} NaN; mask missing values (poutine.mask) or drop these rows"
    else:
        got = f"values from {float(number.min()):g} to {float(number.max()):g}"
    family = type(innermost(fn)).__name__
    if _base_support(fn.support) is constraints.boolean:
        hint = "" if "NaN" in got else "; scale to [0, 1] and binarize, see pyrovae.data.binarize"
        raise ValueError(f"expected {site.name} in {{0, 1}} for a {family} likelihood, got {got}{hint}")
    raise ValueError(f"expected {site.name} within {fn.support} for a {family} likelihood, got {got}")


def _describe(site: Site) -> Latent:
    fn = site.fn
    kind, cardinality, low = _classify(fn)
    shape = fn.event_shape[:-1] if kind in ("one_hot", "relaxed_one_hot") else fn.event_shape
    return Latent(
        name=site.name,
        kind=kind,
        batch_shape=fn.batch_shape,
        event_shape=fn.event_shape,
        plates=_plates(site),
        cardinality=cardinality,
        components=math.prod(shape),
        low=low,
        dtype=site.value.dtype,
        device=site.value.device,
        measure=_measure(fn),
        gradient=_gradient(fn),
    )


def _classify(fn: Any) -> tuple[Kind, int, int]:
    """Kind, cardinality and lowest value of a latent's support."""
    support = _base_support(fn.support)
    family = innermost(fn)
    if not getattr(family, "straight_through", False):  # ours are discrete where straight-through
        if isinstance(family, torch.distributions.RelaxedBernoulli):
            return "relaxed_bit", 1, 0
        if isinstance(family, torch.distributions.RelaxedOneHotCategorical):
            return "relaxed_one_hot", fn.event_shape[-1], 0
    if support is constraints.boolean:
        return "bit", 2, 0
    if isinstance(support, type(constraints.one_hot)):
        return "one_hot", fn.event_shape[-1], 0
    if isinstance(support, constraints.integer_interval):
        low, high = (torch.as_tensor(bound) for bound in (support.lower_bound, support.upper_bound))
        if bool((low == low.flatten()[0]).all()) and bool((high == high.flatten()[0]).all()):
            return "integer", int(high.flatten()[0] - low.flatten()[0]) + 1, int(low.flatten()[0])
    if support is constraints.real:
        return "real", 1, 0
    return "other", 1, 0


def _measure(fn: Any) -> Measure:
    family = innermost(fn)
    if isinstance(family, dist.Delta):
        return "point"
    if isinstance(family, (dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough)):
        return "quantized"
    return "mass" if is_discrete(family) else "density"


def _gradient(fn: Any) -> Gradient | None:
    """How a discrete site was made differentiable, if it was."""
    family = innermost(fn)
    if isinstance(family, (SurrogateBernoulli, SurrogateOneHotCategorical)):
        return "surrogate"
    relaxed = (torch.distributions.RelaxedBernoulli, torch.distributions.RelaxedOneHotCategorical)
    return "relaxed" if isinstance(family, relaxed) else None


def _has_log_partition(family: Any) -> bool:
    return family.normalized if isinstance(family, Undirected) else True


def _base_support(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def unmask(fn: Any) -> tuple[Any, Any, Any]:
    """A distribution without its masks, their conjunction over batch dims, and that of masks inside its `.to_event`."""
    mask: Any = None
    while isinstance(fn, dist.MaskedDistribution):
        mask, fn = both(mask, fn._mask), fn.base_dist
    base, events = fn, 0
    while type(base) is dist.Independent:
        base, events = base.base_dist, events + base.reinterpreted_batch_ndims
    if not isinstance(base, dist.MaskedDistribution):
        return fn, mask, None
    inner: Any = None
    while isinstance(base, dist.MaskedDistribution):
        inner, base = both(inner, base._mask), base.base_dist
    return base.to_event(events), mask, inner


def both(a: Any, b: Any) -> Any:
    """The conjunction of two masks, each a tensor, a bool or None."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, bool) or isinstance(b, bool):
        return (b if a else False) if isinstance(a, bool) else (a if b else False)
    return a & b


@contextlib.contextmanager
def frozen_leaves(leaves: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a block with parameters set to `values`, and put the present ones back."""
    present = {name: leaf.data for name, leaf in leaves.items()}
    try:
        for name, leaf in leaves.items():
            leaf.data = values[name]
        yield
    finally:
        for name, leaf in leaves.items():
            leaf.data = present[name]
