"""Any Pyro kernel as an inference method."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import pyro.infer.mcmc
import torch
from pyro import poutine
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

from pyrovae.handlers.own_params import own_params
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Program


class MCMC:
    """Draws from p(z | x) by a kernel of `pyro.infer.mcmc`: NUTS, HMC, or our :class:`GibbsKernel`.

    Asymptotically exact; for a finite run read `posterior.rhat` and `posterior.ess` (ArviZ's). It gives no evidence. Chains
    run one after the other in this process, each from a fresh copy of the kernel. Discrete sites that NUTS and HMC sum out
    are not in the result.

    Args:
        kernel: a kernel of the model that will be given to `infer`, or a function from a model to a kernel (`NUTS` itself).
        num_samples: draws kept of each chain.
        num_chains: chains.
        warmup_steps: steps before the first kept draw; default `num_samples`.

    Example:
        >>> from pyro.infer import NUTS
        >>> from pyrovae.models import toy
        >>> model = toy.LinearGaussian()
        >>> posterior = MCMC(NUTS, num_samples=20, warmup_steps=20).infer(model, torch.zeros(4, 3))
        >>> tuple(posterior.mean["z"].shape)
        (4, 2)
    """

    def __init__(
        self,
        kernel: MCMCKernel | Callable[[Program], MCMCKernel],
        num_samples: int = 1000,
        num_chains: int = 1,
        warmup_steps: int | None = None,
    ) -> None:
        if num_samples < 1 or num_chains < 1 or (warmup_steps is not None and warmup_steps < 0):
            raise ValueError(
                f"expected num_samples >= 1, num_chains >= 1 and warmup_steps >= 0, got {num_samples}, {num_chains} and "
                f"{warmup_steps}"
            )
        self.kernel, self.num_samples, self.num_chains = kernel, num_samples, num_chains
        self.warmup_steps = num_samples if warmup_steps is None else warmup_steps

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> DrawsPosterior:
        """Run the chains.

        Args:
            model: the program of the kernel.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: if the kernel was made for another program.
        """
        begin = time.perf_counter()
        log_joint = LogJoint(model, args, kwargs)
        counted = _Counted(model)
        chains, divergences = [], 0
        for _ in range(self.num_chains):
            kernel = self._kernel(model, counted)
            with poutine.block():
                run = pyro.infer.mcmc.MCMC(kernel, self.num_samples, warmup_steps=self.warmup_steps, disable_progbar=True)
                run.run(*args, **kwargs)
            chains.append(run.get_samples())
            divergences += sum(len(chain.get("divergences", ())) for chain in run._diagnostics)
        sites = chains[0]
        structure = log_joint.structure
        structure = dataclasses.replace(structure, latents=tuple(s for s in structure.latents if s.name in sites))
        states = {s.name: torch.cat([chain[s.name] for chain in chains]).detach() for s in structure.latents}
        states = {s.name: states[s.name].reshape((-1, *s.batch_shape, *s.event_shape)) for s in structure.latents}
        rows = math.prod(structure.batch_shape)
        return DrawsPosterior(
            structure=structure,
            log_evidence=None,
            bound="estimate",
            diagnostics={"model_evaluations": counted.runs * rows, "divergences": divergences},
            seconds=time.perf_counter() - begin,
            log_joint=log_joint,
            codes={s.name: s.encode(states[s.name]).to(torch.int32) for s in structure.latents if s.finite},
            values={s.name: states[s.name] for s in structure.latents if not s.finite},
            shape=(self.num_chains, self.num_samples),
        )

    def _kernel(self, model: Program, counted: Program) -> MCMCKernel:
        if not isinstance(self.kernel, MCMCKernel):
            return self.kernel(counted)
        if getattr(self.kernel, "model", model) is not model:
            raise ValueError(
                "expected a kernel of the model that is inferred, got one made for another program; pass the same object "
                "to both, or the kernel's class: MCMC(NUTS).infer(model, x)"
            )
        memo = {id(model): model}
        kernel = copy.deepcopy(self.kernel, memo)
        kernel.model = counted
        return kernel


class _Counted:
    """A program with its own parameters that counts its runs."""

    def __init__(self, program: Program) -> None:
        self.program, self.runs = own_params(program), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.program(*args, **kwargs)
