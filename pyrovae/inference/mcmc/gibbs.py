"""Gibbs sampling of finite discrete latents, chains and rows in parallel."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrovae.handlers import declared
from pyrovae.handlers.structure import Latent, finite_latents, one_plate_a_dim
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.exact.declaration import check_declaration
from pyrovae.inference.exact.enumeration import Enumeration
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mcmc.chain_sweep import ChainSweep
from pyrovae.inference.mcmc.layer_sweep import FactorialSweep, LayerSweep, faster_than_table
from pyrovae.inference.mcmc.sweeps import ProgramSweep, TableSweep
from pyrovae.inference.mean_field.layered_net import layered_net
from pyrovae.inference.posterior import Program
from pyrovae.ops import isolated_rng

Sweep = TableSweep | LayerSweep | FactorialSweep | ChainSweep | ProgramSweep
_ROUTES = {
    TableSweep: "table",
    LayerSweep: "layers",
    FactorialSweep: "independent",
    ChainSweep: "chain",
    ProgramSweep: "program",
}


class Gibbs:
    """Draws from p(z | x) by updating one component after another from its conditional.

    Asymptotically exact; for a finite run read `posterior.rhat` and `posterior.ess` (ArviZ's). It gives no evidence:
    `log_evidence` is None and `bound` "estimate". Takes any program whose latents have finitely many values, in any plates.
    Conditionals come from the program's own log joint: looked up where a table of joint states x rows fits in `max_bytes`,
    else by evaluating the changed state alone. A model that declares layers of sigmoid units is swept by them, where that is
    faster than the table; one that declares bits independent given the data is drawn from at once, and its draws are
    independent; one that declares a Markov chain moves its even times at once, then its odd ones. All chains and all rows
    move in parallel. `diagnostics["route"]` tells which way was taken.

    Cost of one sweep: nothing beyond the table (made once: joint states x rows evaluations of log p(x, z)); by declared
    layers a few operations for each weight, chain and row; without either components x chains x rows evaluations.

    Args:
        num_samples: draws kept of each chain.
        num_chains: chains, each started at states drawn uniformly, more spread than the posterior.
        warmup_steps: sweeps before the first kept draw.
        max_bytes: memory for the table of the joint; 0 never makes one.
        declared: take the route of a declared structure; False goes by the program's log joint, whatever it declares.

    References:
        Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images (Geman and Geman, 1984)
        https://doi.org/10.1109/TPAMI.1984.4767596
    """

    def __init__(
        self,
        num_samples: int = 1000,
        num_chains: int = 4,
        warmup_steps: int = 100,
        *,
        max_bytes: int = 2**28,
        declared: bool = True,
    ) -> None:
        if num_samples < 1 or num_chains < 1 or warmup_steps < 0 or max_bytes < 0:
            raise ValueError(
                f"expected num_samples >= 1, num_chains >= 1, warmup_steps >= 0 and max_bytes >= 0, got {num_samples}, "
                f"{num_chains}, {warmup_steps} and {max_bytes}"
            )
        self.num_samples, self.num_chains, self.warmup_steps = num_samples, num_chains, warmup_steps
        self.max_bytes, self.declared = max_bytes, declared

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> DrawsPosterior:
        """Run the chains.

        Args:
            model: a Pyro program with finite discrete latents.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: for a continuous latent, or a program that branches on values or mixes rows of the batch.
        """
        begin = time.perf_counter()
        with torch.no_grad():
            log_joint = LogJoint(model, args, kwargs)
            latents = finite_latents(log_joint.structure, "Gibbs", "MCMC(NUTS(model), ...)")
            one_plate_a_dim(log_joint.structure, "Gibbs")
            sweeps = self.warmup_steps + self.num_samples
            sweep, evaluations = make_sweep(
                log_joint, self.num_chains, self.max_bytes, by_declaration=self.declared, sweeps=sweeps
            )
            sweep.start({latent.name: uniform_codes(latent, self.num_chains) for latent in latents})
            for _ in range(self.warmup_steps):
                sweep.sweep()
            snapshots: list[Any] = []
            for _ in range(self.num_samples):
                sweep.sweep()
                snapshots.append(sweep.snapshot())
            codes = _stack(snapshots, sweep)
        return DrawsPosterior(
            structure=log_joint.structure,
            log_evidence=None,
            bound="estimate",
            diagnostics={
                "model_evaluations": evaluations + sweep.evaluations_per_sweep * sweeps,
                "sweeps": self.num_chains * sweeps,
                "tabulated": isinstance(sweep, TableSweep),
                "route": _ROUTES[type(sweep)],
            },
            seconds=time.perf_counter() - begin,
            log_joint=log_joint,
            codes=codes,
            values={},
            shape=(self.num_chains, self.num_samples),
        )


def check_conditionals(log_joint: LogJoint) -> None:
    """Refuse a program whose conditionals cannot be had for many states, or for the rows of a plate, at once.

    Raises:
        ValueError: if the log joint of a state depends on the other states of a run, or a factor of one row on another row.
    """
    if not log_joint.broadcasts:
        raise ValueError(
            "expected a program whose log joint at a state does not depend on other states for Gibbs, got one that branches "
            "on a latent's value, mixes rows of the batch, draws hidden noise (dropout) or does not broadcast on the left; "
            "write z.reshape(z.shape[:-2] + (-1,)) and h @ W, or use Variational"
        )
    latents = log_joint.structure.latents
    with isolated_rng(0):
        for plates in {latent.plate_dims for latent in latents} - {frozenset()}:
            _check_rows(log_joint, latents, plates)


def _check_rows(log_joint: LogJoint, latents: Sequence[Latent], plates: frozenset[int]) -> None:
    """Compare three states: two, and one that takes the latents inside `plates` from either, row by row."""
    depth = log_joint.structure.plate_depth
    rows = [log_joint.plate_sizes[dim] if dim in plates else 1 for dim in range(-depth, 0)]
    second = torch.rand(rows, device=latents[0].device) < 0.5
    states = {}
    for latent in latents:
        first, other = latent.decode(uniform_codes(latent, 2))
        mixed = other = other if plates <= latent.plate_dims else first
        if plates <= latent.plate_dims:
            own = second.reshape(rows[depth - len(latent.batch_shape) :] + [1] * len(latent.event_shape))
            mixed = torch.where(own, other, first)
        states[latent.name] = torch.stack((first, other, mixed))
    for name, term in log_joint.terms(states).items():
        first, other, mixed = term.table.expand(3, *term.table.shape[1:])
        expected = torch.where(second, other, first) if plates <= term.plate_dims else first
        pairs = [(mixed, expected)] if plates <= term.plate_dims else [(mixed, first), (other, first)]
        if not all(_close(*torch.broadcast_tensors(*pair)) for pair in pairs):
            raise ValueError(
                f"expected the rows of a plate to be independent given what is outside it for Gibbs, got site {name!r} that "
                "depends on the latents of several rows; put it inside their plate, or use Variational"
            )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def make_sweep(
    log_joint: LogJoint, chains: int, max_bytes: int, *, by_declaration: bool = True, sweeps: int | None = None
) -> tuple[Sweep, int]:
    """How to sweep a program, and the model evaluations that this took.

    By what it declares where that is faster; by table where there is one level and it fits; else by the program.

    Args:
        log_joint: of the program.
        chains: number of chains.
        max_bytes: memory for the table.
        by_declaration: whether declared structures count.
        sweeps: how many sweeps will be made, where that is known: a table must be worth its making.

    Raises:
        ValueError: if the conditionals cannot be had for many states, or for the rows of a plate, at once.
    """
    latents = log_joint.structure.latents
    states = math.prod(latent.num_states for latent in latents)
    rows = math.prod(latents[0].batch_shape)
    tabulable = len({latent.plate_dims for latent in latents}) == 1 and 4 * 8 * states * rows <= max_bytes
    if by_declaration and (found := _declared_sweep(log_joint, chains, sweeps if tabulable else 0)) is not None:
        return found, 0
    if tabulable:
        try:
            space = Enumeration(log_joint.program, log_joint.args, log_joint.kwargs, max_bytes=max_bytes, method="Gibbs")
        except ValueError:
            pass  # the program's own log joint is the general way, or the checks below say what is wrong
        else:
            if len(space.chunks) == 1:
                return TableSweep(space, chains), space.num_evaluations
    check_conditionals(log_joint)
    return ProgramSweep(log_joint, chains), 0


def _declared_sweep(log_joint: LogJoint, chains: int, sweeps: int | None) -> LayerSweep | FactorialSweep | ChainSweep | None:
    """The sweep of a declared structure; None where there is none, or a table would be faster (0 sweeps: there is none)."""
    model, args, kwargs, structure = log_joint.program, log_joint.args, log_joint.kwargs, log_joint.structure
    if declared(model, "layers") is not None:
        net = layered_net(model, args, kwargs, structure)
        if net is None or (sweeps != 0 and (sweeps is None or not faster_than_table(net, structure.latents, chains, sweeps))):
            return None
        return LayerSweep(net.snapshot(), structure, chains)
    if not args or not isinstance(args[0], Tensor):
        return None
    if len(structure.latents) != 1 or any(mask is not None for mask in structure.masks.values()):
        return None
    if len(structure.plates) != 1 or structure.batch_shape != (len(args[0]),):
        return None
    for name, sweep in (("chain", ChainSweep), ("factorial_code", FactorialSweep)):
        record = declared(model, name, args, kwargs)
        if record is not None and record.site == structure.latents[0].name:
            check_declaration(model, record, args, kwargs, structure)
            return sweep(record, structure, chains)
    return None


def uniform_codes(latent: Latent, chains: int) -> Tensor:
    """Independent uniform states of a site for each chain and row, `[C, *batch_shape, components]`."""
    return torch.randint(latent.cardinality, (chains, *latent.batch_shape, latent.components), device=latent.device)


def _stack(snapshots: list[Any], sweep: Sweep) -> dict[str, Tensor]:
    """Snapshots of all chains, chain by chain: `{site: [C D, *batch_shape, components]}`."""
    if isinstance(sweep, TableSweep):
        return sweep.decode(torch.stack(snapshots, 1).flatten(0, 1))
    return {name: torch.stack([shot[name] for shot in snapshots], 1).flatten(0, 1) for name in snapshots[0]}
