"""The Gibbs sweep as a kernel for Pyro's own `MCMC`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyrovae.handlers.structure import finite_latents
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mcmc.gibbs import Sweep, make_sweep, uniform_codes
from pyrovae.inference.posterior import Program


class GibbsKernel(MCMCKernel):
    """One sweep over all components of all finite latents, as one step of `pyro.infer.MCMC`.

    All rows of the data are one state of one chain: draws are `{site: [draw, *plates, *event]}`, as floats, since Pyro's and
    ArviZ's diagnostics need them so. For chains that move in parallel use :class:`Gibbs`. `arviz.from_pyro` works on the
    resulting `MCMC` object.

    Args:
        model: a Pyro program with finite discrete latents.
        max_bytes: memory for the table of the joint; 0 never makes one.

    Example:
        >>> from pyro.infer import MCMC
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net(visible=4, hidden=2)
        >>> mcmc = MCMC(GibbsKernel(net), num_samples=10, warmup_steps=2, disable_progbar=True)
        >>> mcmc.run(net.sample(3))
        >>> tuple(mcmc.get_samples()["h1"].shape)
        (10, 3, 2)
    """

    def __init__(self, model: Program, *, max_bytes: int = 2**28) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.transforms: dict[str, Any] = {}
        self._initial: dict[str, Tensor] | None = None
        self._sweep: Sweep | None = None
        self._log_joint: LogJoint | None = None

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the program and choose how to sweep; called by `MCMC`."""
        del warmup_steps
        with torch.no_grad():
            self._log_joint = LogJoint(self.model, args, kwargs)
            finite_latents(self._log_joint.structure, "Gibbs", "NUTS")
            self._sweep = make_sweep(self._log_joint, 1, self.max_bytes)[0]

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chain starts: as set, else uniform over the states.

        Raises:
            ValueError: if a site of what was set is missing, or has another shape.
        """
        if self._log_joint is None:
            return self._initial or {}
        latents = self._log_joint.structure.latents
        if self._initial is None:
            dtype = torch.get_default_dtype()
            self._initial = {s.name: s.decode(uniform_codes(s, 1)[0]).to(dtype) for s in latents}
        for latent in latents:
            expected = tuple(latent.batch_shape + latent.event_shape)
            value = self._initial.get(latent.name)
            if value is None or tuple(value.shape) != expected:
                raise ValueError(
                    f"expected initial_params with every latent site, of {latent.name!r} with shape {expected}, got "
                    f"{'none' if value is None else tuple(value.shape)}"
                )
        return self._initial

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial = params

    @torch.no_grad()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after one sweep from `params`, `{site: [*plates, *event]}`."""
        assert self._sweep is not None
        assert self._log_joint is not None
        latents = self._log_joint.structure.latents
        self._sweep.start({s.name: s.encode(params[s.name].unsqueeze(0)) for s in latents})
        self._sweep.sweep()
        codes = self._sweep.present()
        return {s.name: s.decode(codes[s.name][0].long()).to(params[s.name].dtype) for s in latents}

    def cleanup(self) -> None:
        """Forget the chain; called by `MCMC`, twice a chain."""
        self._sweep = self._log_joint = self._initial = None

    def logging(self) -> OrderedDict[str, str]:
        """Nothing to show in the progress bar."""
        return OrderedDict()

    def diagnostics(self) -> dict[str, Any]:
        """What `arviz.from_pyro` asks for: no divergences, every sweep accepted."""
        return {"divergences": [], "acceptance rate": 1.0}
