"""log p(x) of an undirected model by an estimate of its log Z: in expectation an upper bound."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers import declared, with_log_partition
from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import Site, draw_sites, read_structure
from pyrovae.inference.exact.exact import Exact
from pyrovae.inference.exact.routes import ROUTES, Task
from pyrovae.inference.posterior import Posterior, Program
from pyrovae.ops import FactorialCode, isolated_rng

if TYPE_CHECKING:
    from pyrovae.inference.ais.ais import AIS

_MAX_BYTES = 2**30


def infer_machine(
    ais: AIS, model: Program, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], begin: float
) -> Posterior:
    """The exact posterior of the hidden units, and log p(x) = −F(x) − log Ẑ; see :meth:`pyrovae.inference.AIS.infer`.

    Raises:
        ValueError: if the posterior of the hidden units cannot be had exactly.
    """
    machine, x = innermost(site.fn), site.value
    with torch.no_grad():
        found = ais.log_partition(machine, data=x.reshape(-1, x.shape[-1]))
        log_z = found.log_z.to(x.dtype)
        record = declared(model, "factorial_code", args, kwargs)
        if isinstance(record, FactorialCode):
            task = Task(model, args, kwargs, read_structure(model, args, kwargs), _MAX_BYTES, "AIS")
            record = replace(record, log_evidence=lambda: -machine.free_energy(x) - log_z)
            posterior = ROUTES["factorial_code"].infer(record, task)
        else:
            posterior = Exact().infer(with_log_partition(model, log_z, site.name), *args, **kwargs)
    assert posterior.log_evidence is not None
    return replace(
        posterior,
        bound="upper",
        stderr=found.stderr.to(x.dtype).expand_as(posterior.log_evidence),
        diagnostics={
            "model_evaluations": posterior.diagnostics["model_evaluations"] + ais.num_chains * ais.num_temperatures,
            "partition": found,
            "common_error": True,
            "note": f"log Z by AIS: {float(found.log_z):.3f}, interval {float(found.lower):.3f} to {float(found.upper):.3f}, "
            f"ESS {float(found.ess):.0f} of {ais.num_chains} chains; it shifts all rows alike",
        },
        seconds=time.perf_counter() - begin,
    )


def observed_machine(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Site | None:
    """A program's one observed site, if it is drawn from an RBM or Boltzmann machine; None of any other program."""
    with torch.no_grad(), isolated_rng():
        sites = draw_sites(model, args, kwargs, read_structure(model, args, kwargs).subsample)
    observed = [site for site in sites.values() if site.observed]
    return observed[0] if len(observed) == 1 and isinstance(innermost(observed[0].fn), Undirected) else None
