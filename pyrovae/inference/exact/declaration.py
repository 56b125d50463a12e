"""Whether a declared structure tells the program's own log joint, looked at in a few rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import Site, Structure, draw_sites, run_sites
from pyrovae.inference.exact.factors import site_factor
from pyrovae.inference.posterior import Program
from pyrovae.ops import Chain, FactorialCode, SigmoidLayers, isolated_rng

Record = SigmoidLayers | FactorialCode | Chain
_NAMES = {SigmoidLayers: "layers", FactorialCode: "factorial_code", Chain: "chain"}
_ROWS = 4


def check_declaration(
    model: Program, record: Record, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure
) -> None:
    """Compare log p(x, z) of the program with that of what it declares, at one joint state of four rows.

    A spot check: it finds a declaration that is wrong at ordinary states, and proves none right. Costs a run of the program on
    four rows, or on all rows where arguments cannot be cut into rows; two runs where log Z is not to be computed, for then
    differences between two states are compared.

    Args:
        model: the program.
        record: what it declares at its arguments, of the sites that it has.
        args: its arguments, the data `[B, …]` first.
        kwargs: its keyword arguments.
        structure: of the program, one plate around all sites.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    whole = _Rows(model, record, args, kwargs, structure)
    with torch.no_grad():
        try:
            if whole.cut(torch.arange(_ROWS) % len(args[0])).agree():
                return
        except (RuntimeError, ValueError, IndexError, TypeError):
            pass  # a program that cannot be run on some of its rows is run on all
        if whole.agree():
            return
    name = _NAMES[type(record)]
    raise ValueError(
        f"expected {type(model).__name__}.{name}() to declare the structure of the program, got another log p(x, z) than the "
        f"program's own; mend {name}(), or remove it to have the program enumerated"
    )


@dataclass(frozen=True)
class _Rows:
    """A program beside its declaration, at some rows."""

    model: Program
    record: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    structure: Structure

    def cut(self, rows: Tensor) -> _Rows:
        """The same of some rows: every tensor with as many rows as the data is cut."""
        size = len(self.args[0])

        def part(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.dim() and len(value) == size
            return value[rows.to(value.device)] if whole else value

        record = self.record
        if isinstance(record, Chain):
            record = Chain(
                record.site,
                record.log_initial,
                record.log_transition,
                part(record.log_likelihood),
                part(record.lengths),
            )
        elif isinstance(record, FactorialCode):
            record = FactorialCode(record.site, part(record.logits), record.log_evidence)
        kwargs = {name: part(value) for name, value in self.kwargs.items()}
        return _Rows(self.model, record, tuple(part(value) for value in self.args), kwargs, self.structure)

    def agree(self) -> bool:
        """Whether program and declaration give the same log joint, up to rounding."""
        with isolated_rng(0):
            if isinstance(self.record, Chain):  # random paths might be impossible
                first = draw_sites(self.model, self.args, self.kwargs, {})
                states = {latent.name: first[latent.name].value for latent in self.structure.latents}
            else:
                states = self._random_bits()
                first = run_sites(self.model, self.args, self.kwargs, states, {})
            theirs, absolute = self._log_joint(first)
            ours, size = _log_joint(self.record, states, self.args[0])
            if not absolute:
                states = {name: 1 - value for name, value in states.items()}
                second = run_sites(self.model, self.args, self.kwargs, states, {})
                other, other_size = _log_joint(self.record, states, self.args[0])
                theirs, ours, size = theirs - self._log_joint(second)[0], ours - other, size + other_size
        floating = [a.dtype for a in self.args if isinstance(a, Tensor) and a.is_floating_point()]
        coarsest = max(torch.finfo(dtype).eps for dtype in (_dtype(self.record), *floating))
        tolerance = coarsest**0.5 * (1 + size)
        return not bool(((theirs - ours).abs() > tolerance).any())  # what is no number is told elsewhere

    def _random_bits(self) -> dict[str, Tensor]:
        """A state of every site, all ones in the first of several rows."""
        states = {}
        for latent in self.structure.latents:
            bits = torch.randint(2, (len(self.args[0]), latent.components), device=latent.device)
            if len(bits) > 1:
                bits[0] = 1
            states[latent.name] = bits.to(latent.dtype).reshape(bits.shape[:1] + latent.event_shape)
        return states

    def _log_joint(self, sites: Mapping[str, Site]) -> tuple[Tensor, bool]:
        """Log p(x, z) `[B]` of a run; False with it where log Z, or what does not depend on z, is left out."""
        rows, depth = len(self.args[0]), self.structure.plate_depth
        total, absolute = torch.zeros((), dtype=torch.float64), not isinstance(self.record, FactorialCode)
        for site in sites.values():
            machine = innermost(site.fn)
            if isinstance(machine, Undirected):
                absolute = False
                table = torch.zeros(()) if site.observed else -machine.free_energy(site.value)
            else:
                table = site_factor(site, depth, plain=True).table()
            total = total + table.double().reshape(-1).expand(rows)
        return total, absolute


def _log_joint(record: Record, states: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x, z) `[B]` as a record tells it, in float64, and the size of its terms; log Z and log p(x) left out."""
    if isinstance(record, FactorialCode):
        parts = states[record.site].double() * record.logits.double()
        return parts.sum(-1), parts.abs().sum(-1)
    if isinstance(record, Chain):
        return _chain_log_joint(record, states[record.site].long())
    total = size = torch.zeros((), dtype=torch.float64, device=x.device)
    below = x.double()
    for site, weight, bias in zip(record.sites, record.weights, record.biases, strict=True):
        above = states[site].double()
        logits = bias.double() + above @ weight.double()
        total = total + (below * logits - softplus(logits)).sum(-1)
        size, below = size + logits.abs().sum(-1), above
    top = record.top_bias.double()
    total, size = total + below @ top, size + top.abs().sum()
    if record.top_weight is None or record.top_hidden_bias is None:
        return total - softplus(top).sum(), size
    free = softplus(record.top_hidden_bias.double() + below @ record.top_weight.double()).sum(-1)
    return total + free, size + free


def _chain_log_joint(record: Chain, path: Tensor) -> tuple[Tensor, Tensor]:
    emitted = record.log_likelihood.double().gather(-1, path.unsqueeze(-1)).squeeze(-1)  # [B, L]
    if record.lengths is not None:
        seen = torch.arange(path.shape[1], device=path.device) < record.lengths.unsqueeze(-1)
        emitted = torch.where(seen, emitted, 0.0)
    moves = record.log_transition.double()[path[:, :-1], path[:, 1:]]
    terms = torch.cat([record.log_initial.double()[path[:, :1]], moves, emitted], -1)
    return terms.sum(-1), terms.abs().nan_to_num(posinf=0.0).sum(-1)


def _dtype(record: Record) -> torch.dtype:
    if isinstance(record, Chain):
        return record.log_likelihood.dtype
    return record.logits.dtype if isinstance(record, FactorialCode) else record.top_bias.dtype
