"""Annealing from the prior to the posterior of a program: lower bounds on log p(x), and upper ones on simulated data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.handlers.structure import check_all_rows, check_whole_plates, common_scale, draw_sites, one_plate_a_dim
from pyrovae.inference.ais.partition import Sandwich, warn_of_few
from pyrovae.inference.ais.path import ProgramPath, check_program
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mean_field.layered_net import layered_net
from pyrovae.inference.posterior import Program, States
from pyrovae.inference.rows import NUMEL, row_numel
from pyrovae.inference.weighing import draw, evidence
from pyrovae.ops import effective_sample_size, log_mean_exp

if TYPE_CHECKING:
    from pyrovae.inference.ais.ais import AIS


def infer(ais: AIS, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], begin: float) -> DrawsPosterior:
    """Weighted draws of p(z | x); see :meth:`pyrovae.inference.AIS.infer`."""
    with torch.no_grad():
        path = make_path(ais, model, args, kwargs)
        log_joint = path.log_joint
        path.prepare(ais.betas, ais.num_chains)
        parts, weights = [], []
        for count in _blocks(log_joint, ais.num_chains):
            path.start(draw(model, log_joint, count).states)
            weights.append(path.forward(ais.betas))
            parts.append(path.states())
        states = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        log_w = torch.cat(weights)
    if bool((log_w.isnan() | (log_w == math.inf)).any()):
        raise ValueError("expected log p(x, z) to be a number below infinity at every state, got NaN or inf; look at the data")
    lost, found = torch.isneginf(log_w).all(0), evidence(log_w)
    latents = log_joint.structure.latents
    note = f"{int(lost.sum())} of {lost.numel()} rows have no chain of weight above 0: no estimate there" if lost.any() else ""
    warn_of_few(torch.where(lost, math.inf, found.ess), ais.num_chains, "log p(x)")
    if note:
        warnings.warn(f"AIS: {note}", UserWarning, stacklevel=3)
    dtype = torch.get_default_dtype()
    return DrawsPosterior(
        structure=log_joint.structure,
        log_evidence=found.log_evidence.to(dtype),
        bound="lower",
        stderr=found.stderr.to(dtype),
        diagnostics={
            "model_evaluations": path.evaluations,
            "ess": found.ess,
            "pareto_k": found.pareto_k,
            "num_temperatures": len(ais.betas),
            "route": "layers" if path.by_layers else "program",
            **({"acceptance": path.acceptance} if path.acceptance is not None else {}),
            **({"note": note} if note else {}),
        },
        seconds=time.perf_counter() - begin,
        log_joint=log_joint,
        codes={s.name: s.encode(states[s.name]).to(torch.int32) for s in latents if s.finite},
        values={s.name: states[s.name] for s in latents if not s.finite},
        log_weights=torch.log_softmax(torch.where(lost, 0.0, log_w), 0).to(dtype),
    )


def sandwich_simulated(
    ais: AIS, model: Program, batch_size: int, args: tuple[Any, ...], observation: str, confidence: float
) -> Sandwich:
    """Bounds on log p(x) of simulated data; see :meth:`pyrovae.inference.AIS.sandwich_simulated`."""
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence}")
    with torch.no_grad():
        x, latents = _simulate(model, batch_size, args, observation)
        path = make_path(ais, model, (x, *args), {})
        log_joint = path.log_joint
        path.prepare(ais.betas, ais.num_chains)
        forward, reverse = [], []
        for count in _blocks(log_joint, ais.num_chains):
            path.start(draw(model, log_joint, count).states)
            forward.append(path.forward(ais.betas))
            path.start({name: value.expand((count, *value.shape)).clone() for name, value in latents.items()})
            reverse.append(-path.backward(ais.betas))
        up, down = torch.cat(forward), torch.cat(reverse)
    if bool((up.isnan() | down.isnan()).any()):
        raise ValueError("expected log p(x, z) to be a number at every state, got NaN; look at the parameters")
    margin = -math.log((1 - confidence) / 2)  # Markov: P(log of an unbiased estimate > log of its mean + t) ≤ e^−t
    below, above = log_mean_exp(up), -log_mean_exp(down)
    return Sandwich(
        forward=below,
        reverse=above,
        lower=below - margin,
        upper=above + margin,
        confidence=confidence,
        forward_ess=effective_sample_size(up),
        reverse_ess=effective_sample_size(down),
        data=x,
    )


def make_path(ais: AIS, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ProgramPath:
    """The path of a program that can be annealed row by row; by its declared layers where it has some.

    Raises:
        ValueError: if it cannot.
    """
    log_joint = LogJoint(model, args, kwargs)
    structure = log_joint.structure
    if not structure.latents or not structure.observed:
        what = "latent" if not structure.latents else "observed"
        raise ValueError(f"expected a program with latent and observed sites for AIS, got no {what} one; pass the data")
    if structure.unnormalized:
        raise ValueError(
            f"expected a prior that can be drawn from exactly for AIS, got {structure.unnormalized[0]!r}, whose log Z is "
            "unknown; estimate that by AIS.log_partition and add it to a bound of Variational"
        )
    common_scale(structure, "AIS")
    check_whole_plates(structure, "AIS")
    check_all_rows(structure, "AIS")
    one_plate_a_dim(structure, "AIS")
    net = layered_net(model, args, kwargs, structure) if ais.declared else None
    if net is None:
        check_program(log_joint)
    return ProgramPath(log_joint, ais.num_leapfrog, ais.step_size, None if net is None else net.snapshot())


def _blocks(log_joint: LogJoint, chains: int) -> list[int]:
    """Numbers of chains that run together, so that data and latents of one run stay within memory."""
    row = row_numel(log_joint.structure) * max(1, log_joint.structure.batch_shape.numel())
    size = max(1, min(chains, NUMEL // max(1, row)))
    return [min(size, chains - start) for start in range(0, chains, size)]


def _simulate(model: Program, batch_size: int, args: tuple[Any, ...], observation: str) -> tuple[Tensor, States]:
    """Data drawn by the model, and the latents that made them."""
    sites = draw_sites(model, (None, *args), {"batch_size": batch_size}, {})
    if observation not in sites:
        raise ValueError(f"expected a site {observation!r} for the data, got {sorted(sites)}; name it by observation=")
    latents = {name: site.value for name, site in sites.items() if name != observation and not site.observed}
    return sites[observation].value, latents
