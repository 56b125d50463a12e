"""The path p(z) p(x | z)^β of a program, with the moves that leave it invariant: Gibbs for finite latents, HMC for others.

Rows and chains move together, and each is accepted or rejected for itself. Weights are taken before the move.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from pyro.ops.integrator import velocity_verlet
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.handlers.structure import Latent, draw_sites
from pyrovae.inference.exact.elimination import Term
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mcmc.gibbs import check_conditionals
from pyrovae.inference.mcmc.layer_sweep import LayerSweep
from pyrovae.inference.mcmc.sweeps import ProgramSweep
from pyrovae.inference.mean_field.layered_net import LayeredNet
from pyrovae.inference.posterior import States
from pyrovae.inference.weighing import draw

_PILOT_CHAINS, _PILOT_TEMPERATURES, _PILOT_MOVES, _WARM_UP = 16, 200, 100, 30
_TARGET, _RATE = 0.65, 0.3  # acceptance that step sizes aim at, and how fast log step sizes follow
_IMPOSSIBLE = -1e29


def check_program(log_joint: LogJoint) -> None:
    """Refuse a program, not declared, whose rows cannot be annealed apart, in one run for many states.

    Raises:
        ValueError: with the reason.
    """
    latents = log_joint.structure.latents
    if all(latent.finite for latent in latents):
        check_conditionals(log_joint)
        log_joint.check_rows("AIS")
        return
    if not log_joint.broadcasts:
        raise ValueError(
            "expected a program whose log joint at a state does not depend on other states for AIS, got one that branches on a "
            "latent's value, mixes rows of the batch, draws hidden noise (dropout) or does not broadcast on the left; write "
            "z.reshape(z.shape[:-2] + (-1,)) and h @ W, or use Variational"
        )
    log_joint.check_rows("AIS")
    batch = {plate.dim for plate in log_joint.structure.batch}
    for latent in latents:
        if latent.finite and latent.plate_dims != batch:
            raise ValueError(
                f"expected discrete latents beside continuous ones in the plates of the batch alone, got {latent.name!r} in "
                "further plates; declare it a vector with .to_event(1)"
            )
        if latent.kind.startswith("relaxed") or latent.measure in ("point", "quantized"):
            raise ValueError(
                f"expected finite or continuous latents with a density for AIS, got the {latent.kind} site {latent.name!r}; "
                "use pyrovae.handlers.discretize first"
            )


class ProgramPath:
    """Chains of a program's latents, at any β.

    Args:
        log_joint: of a program that :func:`check_program` passed.
        num_leapfrog: leapfrog steps of a trajectory.
        step_size: of the leapfrogs; None to find by :meth:`prepare`.
        net: the layers that the program declares, a snapshot; None goes by its log joint.

    Attributes:
        evaluations: values of log p(x, z) of one datum, so far.
    """

    def __init__(self, log_joint: LogJoint, num_leapfrog: int, step_size: float | None, net: LayeredNet | None = None) -> None:
        self.log_joint, self.structure, self._net = log_joint, log_joint.structure, net
        self.finite = [latent for latent in self.structure.latents if latent.finite]
        self.smooth = [latent for latent in self.structure.latents if not latent.finite]
        self.observed = {site.name for site in self.structure.observed}
        self.rows = max(1, self.structure.batch_shape.numel())
        self.num_leapfrog = num_leapfrog
        self._fixed = step_size is not None
        self.evaluations, self._moves = 0, 0
        self._accepted: Tensor | None = None
        self._sweep: ProgramSweep | LayerSweep | None = None
        self._free: States = {}  # continuous latents in unconstrained space, [K, *batch_shape, *event]
        self._prior: Tensor  # [K, batch], as the likelihood; set by `start`
        self._likelihood: Tensor
        self._transforms = {}
        self._steps: list[tuple[float, Tensor]] = []  # β and log step sizes [batch]
        if self.smooth:
            sites = draw_sites(log_joint.program, log_joint.args, log_joint.kwargs, self.structure.subsample)
            self._transforms = {latent.name: biject_to(sites[latent.name].fn.support) for latent in self.smooth}
            like, start = sites[self.smooth[0].name].value, 0.5 if step_size is None else step_size
            self._steps = [(0.0, like.new_full(self.structure.batch_shape, math.log(start)))]

    @property
    def by_layers(self) -> bool:
        """Whether declared layers are swept, not the program."""
        return self._net is not None

    @property
    def acceptance(self) -> Tensor | None:
        """The mean acceptance of trajectories `[batch]`; None where no latent is continuous."""
        return None if self._accepted is None else self._accepted / max(1, self._moves)

    def prepare(self, betas: Sequence[float], num_chains: int) -> None:
        """Find a step size for each row and β, by chains of a preliminary run that no weight uses."""
        if not self.smooth or self._fixed:
            return
        chains = min(num_chains, _PILOT_CHAINS)
        self.start(draw(self.log_joint.program, self.log_joint, chains).states)
        ladder = [*betas[1 : -1 : max(1, len(betas) // _PILOT_TEMPERATURES)], 1.0]
        repeats = max(1, _PILOT_MOVES // len(ladder))
        ladder = [0.0] * _WARM_UP + [beta for beta in ladder for _ in range(repeats)]
        log_step, found = self._steps[0][1], []
        for beta in ladder:
            self._steps = [(beta, log_step)]
            if self._sweep is not None:
                self._gibbs(beta)
            log_step = log_step + _RATE * (self._trajectory(beta) - _TARGET)
            found.append((beta, log_step))
        self._steps = found[_WARM_UP - 1 :: repeats]
        self._accepted, self._moves = None, 0

    def start(self, states: Mapping[str, Tensor]) -> None:
        """Set the chains to states `{site: [K, *batch_shape, *event]}`."""
        chains = len(next(iter(states.values())))
        self._free = {s.name: self._transforms[s.name].inv(states[s.name]).detach() for s in self.smooth}
        codes = {latent.name: latent.encode(states[latent.name]) for latent in self.finite}
        if self._net is not None:
            self._sweep = LayerSweep(self._net, self.structure, chains)
        elif self.finite:
            self._sweep = ProgramSweep(self.log_joint, chains)
            self._sweep.fixed = {latent.name: states[latent.name] for latent in self.smooth}
        if self._sweep is not None:
            self._sweep.start(codes)
            self.evaluations += chains * self.rows
        self._evaluate()

    def states(self) -> States:
        """The present states `{site: [K, *batch_shape, *event]}`."""
        found = {name: self._transforms[name](value) for name, value in self._free.items()}
        if self._sweep is not None:
            codes = self._sweep.present()
            found |= {latent.name: latent.decode(codes[latent.name]) for latent in self.finite}
        return found

    def forward(self, betas: Sequence[float]) -> Tensor:
        """Log weights `[K, batch]` of chains that start at the prior, float64; they end at the posterior's β."""
        log_w = torch.zeros_like(self._likelihood, dtype=torch.float64)
        for low, high in itertools.pairwise(betas):
            log_w += (high - low) * self._likelihood.double()
            self._move(high)
        return log_w

    def backward(self, betas: Sequence[float]) -> Tensor:
        """Log weights `[K, batch]` of chains from exact draws of the posterior down to the prior: E[1 / w] = 1 / p(x)."""
        log_w = torch.zeros_like(self._likelihood, dtype=torch.float64)
        for low, high in reversed(list(itertools.pairwise(betas))):
            self._move(high)
            log_w += (high - low) * self._likelihood.double()
        return log_w

    def _move(self, beta: float) -> None:
        """A move that leaves p_β invariant."""
        if self._sweep is not None:
            self._gibbs(beta)
        if self.smooth:
            accepted = self._trajectory(beta)
            self._accepted = accepted if self._accepted is None else self._accepted + accepted
            self._moves += 1

    def _gibbs(self, beta: float) -> None:
        sweep = self._sweep
        assert sweep is not None
        if isinstance(sweep, LayerSweep):
            sweep.power = beta
            sweep.sweep()
            self.evaluations += sweep.evaluations_per_sweep + sweep.chains * self.rows
            self._evaluate()
            return
        sweep.powers = dict.fromkeys(self.observed, beta)
        if self.smooth:
            sweep.fixed = {latent.name: self._transforms[latent.name](self._free[latent.name]) for latent in self.smooth}
            sweep.start(sweep.codes)
            self.evaluations += sweep.chains * self.rows
        sweep.sweep()
        self.evaluations += sweep.evaluations_per_sweep
        self._read(sweep.current, sweep.chains)

    def _trajectory(self, beta: float) -> Tensor:
        """One trajectory of Hamiltonian Monte Carlo; the mean acceptance of each row over chains, `[batch]`."""
        scales = {s.name: self._over(self._log_step(beta).exp(), s) for s in self.smooth}
        place = {name: value / scales[name] for name, value in self._free.items()}
        push = {name: torch.randn_like(value) for name, value in place.items()}
        before = self._kinetic(push) - self._prior - beta * self._likelihood
        old = self._free, self._prior, self._likelihood

        def potential(z: Mapping[str, Tensor]) -> Tensor:
            self._free = {name: value * scales[name] for name, value in z.items()}
            self._evaluate()
            return -(self._prior + beta * self._likelihood).sum()

        with torch.enable_grad():
            place, push, _, _ = velocity_verlet(place, push, potential, dict, 1.0, self.num_leapfrog)
        change = before - (self._kinetic(push) - self._prior - beta * self._likelihood)
        accept = change.detach().nan_to_num(nan=-math.inf).clamp_max(0).exp()  # [K, batch]
        take = torch.rand_like(accept) < accept
        self._free = {
            s.name: torch.where(self._over(take, s), (place[s.name] * scales[s.name]).detach(), old[0][s.name])
            for s in self.smooth
        }
        self._prior = torch.where(take, self._prior.detach(), old[1])
        self._likelihood = torch.where(take, self._likelihood.detach(), old[2])
        return accept.mean(0)

    def _evaluate(self) -> None:
        """Log p(z) in unconstrained space and log p(x | z) at the present states, `[K, batch]`."""
        if isinstance(self._sweep, LayerSweep):
            self._likelihood = self._sweep.log_likelihood()
            return
        if not self.smooth and self._sweep is not None:
            self._read(self._sweep.current, self._sweep.chains)
            return
        states = self.states()
        chains = len(next(iter(states.values())))
        self._read(self.log_joint.terms(states), chains)
        self.evaluations += chains * self.rows

    def _read(self, terms: Mapping[str, Term], chains: int) -> None:
        """Split log probabilities by site into prior, in unconstrained space, and likelihood."""
        latent = {name: term for name, term in terms.items() if name not in self.observed}
        seen = {name: term for name, term in terms.items() if name in self.observed}
        self._prior = self.log_joint.total(latent, chains)
        likelihood = self.log_joint.total(seen, chains)
        self._likelihood = torch.where(likelihood < _IMPOSSIBLE, -math.inf, likelihood)  # a sweep has numbers in place of −inf
        if self.smooth:
            jacobian = {}
            for site in self.smooth:
                transform, free = self._transforms[site.name], self._free[site.name]
                jacobian[site.name] = self._term(transform.log_abs_det_jacobian(free, transform(free)), site)
            self._prior = self._prior + self.log_joint.total(jacobian, chains)

    def _kinetic(self, push: Mapping[str, Tensor]) -> Tensor:
        terms = {s.name: self._term(0.5 * push[s.name] ** 2, s) for s in self.smooth}
        return self.log_joint.total(terms, len(next(iter(push.values()))))

    def _term(self, values: Tensor, latent: Latent) -> Term:
        """Values `[K, *batch_shape, (event)]` summed over the event, as a table over the plates."""
        lead = 1 + len(latent.batch_shape)
        table = values.flatten(lead).sum(-1) if values.dim() > lead else values
        wide = (1,) * (self.structure.plate_depth - len(latent.batch_shape))
        return Term(table.reshape((len(table), *wide, *latent.batch_shape)), latent.plate_dims, 0)

    def _over(self, values: Tensor, latent: Latent) -> Tensor:
        """`[…, batch]` with the dims of a site's free values, `[…, *batch_shape, *event]`, to broadcast."""
        wide = self.structure.from_batch(values)
        lead, depth = wide.shape[: wide.dim() - self.structure.plate_depth], len(latent.batch_shape)
        own = wide.shape[wide.dim() - depth :] if depth else ()
        free = self._free[latent.name].dim() - 1 - depth  # event dims, in unconstrained space
        return wide.reshape((*lead, *own) + (1,) * free)

    def _log_step(self, beta: float) -> Tensor:
        """Log step size `[batch]` at β, linear in between."""
        steps = self._steps
        if beta <= steps[0][0] or len(steps) == 1:
            return steps[0][1]
        for (low, first), (high, second) in itertools.pairwise(steps):
            if beta <= high:
                return torch.lerp(first, second, (beta - low) / (high - low) if high > low else 1.0)
        return steps[-1][1]
