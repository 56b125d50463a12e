"""The spot check: a few joint states evaluated together, as enumeration does it, and alone, as an ordinary run.

It learns how each site's factor varies, from which memory is planned; and it catches what shapes cannot show: a branch on a
value, a statistic over the batch, dropout. Such a program is refused rather than answered wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.handlers.structure import Latent, Site, run_sites
from pyrovae.inference.exact.elimination import gather
from pyrovae.inference.exact.factors import site_factor

if TYPE_CHECKING:
    from pyrovae.inference.exact.enumeration import Enumeration

INSTEAD = "or use Variational, whose bound of all rows together holds for any program"
_SPOT_AXES = 4  # how many axes a run varies at once, three values each


@dataclass(frozen=True)
class SiteShape:
    """What the spot check learned of a site's factor: the axes it varies along, its level, its sizes."""

    axes: frozenset[int]
    plate_dims: frozenset[int]
    level: int
    tables: tuple[tuple[int, ...], ...]  # shapes, with spot sizes in the axes, of all that its evaluation makes
    itemsize: int

    @property
    def table(self) -> tuple[int, ...]:
        """The shape of the factor's own table."""
        return self.tables[0]

    @property
    def repeated(self) -> frozenset[int]:
        """The plates along which the table merely repeats."""
        return frozenset(dim for dim in self.plate_dims if self.table[dim] == 1)


class SpotCheck:
    """Compare joint states run together with the same states run alone.

    Args:
        space: an enumeration whose axes are laid out.
    """

    def __init__(self, space: Enumeration) -> None:
        self.space = space
        self.shapes: dict[str, SiteShape] = {}

    def run(self) -> dict[str, SiteShape]:
        """The shapes of all sites.

        Raises:
            Mismatch: if a joint state has one log probability alone and another among others.
            Refusal: if no layout can serve the program.
        """
        stream = torch.Generator().manual_seed(0)
        spots = {site.name: self._spot_codes(site, stream) for site in self.space.structure.latents}
        for first in range(0, len(self.space.axes), _SPOT_AXES):
            active = self.space.axes[first : first + _SPOT_AXES]
            values: dict[str, Tensor] = {}
            for axis in self.space.axes:
                values.update(self.space.values(axis, spots if axis in active else {n: c[2:] for n, c in spots.items()}))
            sites = run_sites(self.space.program, self.space.args, self.space.kwargs, values, self.space.structure.subsample)
            tables = {name: self._learn_shape(site) for name, site in sites.items()}
            for pick in self._picks():
                picks = {
                    axis.dim: pick[axis.level] if axis in active else torch.full_like(pick[axis.level], 2)
                    for axis in self.space.axes
                }
                single = self._run_alone(spots, picks)
                self._compare(tables, single, {axis.dim: picks[axis.dim] * (axis in active) for axis in self.space.axes})
        for name, shape in self.shapes.items():
            self.shapes[name] = self._settle(shape)
        return self.shapes

    def _spot_codes(self, site: Latent, stream: torch.Generator) -> Tensor:
        """Codes `[3, components]` of a site's first value, its last and a random one."""
        ends = torch.tensor([[0], [site.cardinality - 1]]).expand(2, site.components)
        return torch.cat([ends, torch.randint(site.cardinality, (1, site.components), generator=stream)]).to(self.space.device)

    def _picks(self) -> Iterator[list[Tensor]]:
        """Which spot value each level takes, `[*plates]` or of size 1: the first, the last, one that differs between rows."""
        dims = range(-self.space.structure.plate_depth, 0)
        wide = [[self.space.plate_sizes[d] if d in plates else 1 for d in dims] for plates in self.space.levels]
        for k in range(2):
            yield [torch.full([1] * len(shape), k, device=self.space.device) for shape in wide]
        yield [(torch.arange(math.prod(shape), device=self.space.device).reshape(shape) + 2) % 3 for shape in wide]

    def _run_alone(self, spots: Mapping[str, Tensor], picks: Mapping[int, Tensor]) -> dict[str, Site]:
        """Run at one joint state of every row, with the shapes of an ordinary run."""
        values = {}
        for axis in self.space.axes:
            for latent in axis.sites:
                wide = (1,) * (self.space.structure.plate_depth - len(latent.batch_shape)) + latent.batch_shape
                index = picks[axis.dim].expand(wide).reshape(latent.batch_shape)
                values[latent.name] = latent.decode(spots[latent.name][index])
        return run_sites(self.space.program, self.space.args, self.space.kwargs, values, self.space.structure.subsample)

    def _learn_shape(self, site: Site) -> Tensor:
        """Widen what is known of a site's shape by one run; its table there."""
        factor = site_factor(site, self.space.ndim, plain=self.space.plain)
        table = factor.table()
        for dim in range(-self.space.structure.plate_depth, 0):
            if table.shape[dim] > 1 and dim not in site.plate_dims:
                raise Mismatch(
                    f"expected site {site.name!r} to vary only along its own plates, got {table.shape[dim]} values along dim "
                    f"{dim}; sum over a plate with keepdim=True and only of observed values, keep sites of a plate inside "
                    f"it, and write tensor code that broadcasts on the left, {INSTEAD}"
                )
        for axis in self.space.axes:
            if table.shape[axis.dim] > 1 and not self.space.levels[axis.level] <= site.plate_dims:
                raise Refusal(self._outside(site.name, site.plate_dims, axis.sites[0]))
        tables: list[tuple[int, ...]] = [tuple(table.shape)]
        if factor.bilinear is not None:
            tables += [tuple(factor.bilinear.eta.shape), tuple(factor.bilinear.statistic.shape)]
        else:
            tables += [(*table.shape, max(1, math.prod(site.fn.event_shape)))] * 2
        known = self.shapes.get(site.name)
        if known is not None:
            tables = [tuple(map(max, a, b)) for a, b in zip(tables, known.tables, strict=True)]
        itemsize = table.element_size()
        self.shapes[site.name] = SiteShape(frozenset(), site.plate_dims, -1, tuple(tables), itemsize)
        return table

    def _settle(self, shape: SiteShape) -> SiteShape:
        """The axes and the level of a site, from all that was learned of its shape."""
        axes = [axis for axis in self.space.axes if shape.table[axis.dim] > 1]
        inside = [k for k, plates in enumerate(self.space.levels) if plates <= shape.plate_dims]
        home = max([axis.level for axis in axes] or inside, default=-1)
        return replace(shape, axes=frozenset(axis.dim for axis in axes), level=home)

    def _outside(self, name: str, plate_dims: frozenset[int], latent: Latent) -> str:
        missing = sorted(plate.name for plate in latent.plates if plate.dim not in plate_dims)
        return (
            f"expected site {name!r} inside the plate {missing[0]!r} of the latent {latent.name!r} that it depends on, "
            f"got it outside; if it joins all rows of that plate, make the latent a vector with .to_event(1) instead"
        )

    def _compare(self, tables: Mapping[str, Tensor], single: Mapping[str, Site], picks: Mapping[int, Tensor]) -> None:
        """Refuse the program if a site's table, at the picked states, differs from the site of a single run."""
        depth = self.space.structure.plate_depth
        if set(single) != set(tables):
            odd = sorted(set(single) ^ set(tables))[0]
            raise Mismatch(
                f"expected the same sites at every value of the latents, got {odd!r} at some only; {self.space.method} "
                f"needs a program without branches on latent values, {INSTEAD}"
            )
        for name, site in single.items():
            reference = site_factor(site, depth, plain=True).table()
            table = _at(tables[name], picks, depth).to(reference.dtype)
            tolerance = max(torch.finfo(dtype).eps for dtype in _float_types(tables[name], reference, site.value)) ** 0.5
            if torch.allclose(table, reference, rtol=tolerance, atol=tolerance):
                continue
            if bool(torch.isnan(reference).any()):
                raise Refusal(
                    f"expected numbers for log p of site {name!r}, got NaN at some states; look for infinite or NaN parameters "
                    "and data"
                )
            raise Mismatch(
                f"expected log p of site {name!r} to be the same for a joint state evaluated alone and among others, got a "
                f"difference of {float((table - reference).abs().max()):.3g}; the program branches on a latent's value, mixes "
                f"rows of the batch or draws hidden noise (dropout), so that {self.space.method} would be silently wrong; "
                f"remove this, {INSTEAD}"
            )


class Mismatch(ValueError):
    """A joint state has one log probability alone and another among others."""


class Refusal(ValueError):
    """A program that no layout can serve."""


def _at(table: Tensor, picks: Mapping[int, Tensor], depth: int) -> Tensor:
    """A table `[axes, plates]` at the picked states: `[plates]`."""
    if any(pick.numel() > 1 for pick in picks.values()):
        return gather(table.unsqueeze(0), {dim: pick.unsqueeze(0) for dim, pick in picks.items()}, depth)[0, 0]
    for dim, pick in picks.items():
        if table.shape[dim] > 1:
            table = table.narrow(dim, int(pick), 1)
    return table.reshape(table.shape[table.dim() - depth :])


def _float_types(*tensors: Any) -> list[torch.dtype]:
    """The floating types among tensors: agreement is to the coarsest."""
    return [t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
