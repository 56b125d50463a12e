"""Annealed importance sampling: of partition functions, and of log p(x)."""

from __future__ import annotations

import time
from typing import Any, Literal

from torch import Tensor

from pyrovae.inference.ais.machine import infer_machine, observed_machine
from pyrovae.inference.ais.partition import LogPartition, Sandwich, log_partition, sandwich
from pyrovae.inference.ais.posterior import infer, sandwich_simulated
from pyrovae.inference.ais.schedule import Schedule, inverse_temperatures
from pyrovae.inference.posterior import Posterior, Program


class AIS:
    """Annealed importance sampling: chains move from a distribution of known normaliser to the one in question, with weights.

    The mean weight is unbiased, its log in expectation too small. So `log_partition` bounds log Z from below in expectation
    (and log p(x) computed with that Z is overstated: an upper bound), and `infer` bounds log p(x) from below. A weight collects
    f_{k+1} − f_k of the state *before* it moves at β_{k+1}. `sandwich` and `sandwich_simulated` also run from exact draws
    backwards, for bounds from the other side; there is no such bound without exact draws, so nothing else is offered.

    `log_partition` costs num_chains x num_temperatures sweeps, for an RBM of 4 D H operations each. `infer` costs as many
    sweeps of its latents for every row: finite ones by Gibbs (a model evaluation for each value of each component but one, or,
    where a model declares layers of sigmoid units, a few operations for each weight),
    continuous ones by one trajectory of Hamiltonian Monte Carlo, `num_leapfrog` + 1 gradients. The leapfrogs are Pyro's
    integrator; its HMC kernel accepts or rejects the whole state of all rows and chains at once, so the accept rule is
    applied here, for each row and chain apart.

    Args:
        num_chains: M, independent chains.
        num_temperatures: values of β, 0 and 1 included; None takes 1000, or as many as `schedule` has.
        schedule: "linear", "sigmoid" (denser at both ends), or the values of β, rising from 0 to 1. Salakhutdinov and
            Murray's is, in float64, `torch.cat([torch.arange(500) / 1e3, 0.5 + torch.arange(4000) / 1e4, torch.linspace(0.9, 1,
            10001)])`.
        base: of `log_partition`: None starts from the base rates of the data where given, smoothed by 5 ones and 5 zeros for
            each unit, else from the model's own biases; "uniform" from fair coins; a tensor `[D]` from these logits.
        sigmas: half the width of the interval of `log_partition`, in standard errors (Student's t allowed for).
        num_leapfrog: leapfrog steps of a trajectory.
        step_size: of the leapfrogs, in unconstrained space; None adapts one to each row and β in a preliminary run of
            separate chains, to accept 65%.
        declared: take the route of declared layers; False goes by the program's log joint, whatever it declares.

    Raises:
        ValueError: for fewer than 2 chains or temperatures, a schedule that does not rise from 0 to 1, and numbers that are
            not positive.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import RBM
        >>> rbm = RBM(torch.zeros(4, 3), torch.zeros(4), torch.zeros(3))
        >>> found = AIS(num_chains=10, num_temperatures=20).log_partition(rbm)
        >>> round(float(found.log_z / torch.tensor(2.0).log()), 4)
        7.0

    References:
        Annealed importance sampling (Neal, 2001)
        https://arxiv.org/abs/physics/9803008
        On the quantitative analysis of deep belief networks (Salakhutdinov and Murray, 2008)
        https://doi.org/10.1145/1390156.1390266
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani and Adams, 2015)
        https://arxiv.org/abs/1511.02543
        On the quantitative analysis of decoder-based generative models (Wu et al., 2017)
        https://arxiv.org/abs/1611.04273
    """

    def __init__(
        self,
        num_chains: int = 100,
        num_temperatures: int | None = None,
        *,
        schedule: Schedule = "linear",
        base: Literal["uniform"] | Tensor | None = None,
        sigmas: float = 3.0,
        num_leapfrog: int = 10,
        step_size: float | None = None,
        declared: bool = True,
    ) -> None:
        if num_chains < 2:
            raise ValueError(f"expected num_chains >= 2, got {num_chains}; one weight has no spread to judge it by")
        if sigmas <= 0 or num_leapfrog < 1 or (step_size is not None and step_size <= 0):
            raise ValueError(
                f"expected sigmas > 0, num_leapfrog >= 1 and step_size > 0, got {sigmas}, {num_leapfrog} and {step_size}"
            )
        self.betas = inverse_temperatures(schedule, num_temperatures)
        self.num_chains, self.base, self.sigmas = num_chains, base, sigmas
        self.num_leapfrog, self.step_size, self.declared = num_leapfrog, step_size, declared

    @property
    def num_temperatures(self) -> int:
        """How many values of β, 0 and 1 included."""
        return len(self.betas)

    def log_partition(self, target: Any, data: Tensor | None = None) -> LogPartition:
        """Estimate log Z of an undirected model.

        Args:
            target: an `RBM` or `BoltzmannMachine`; a model with a method `distribution()`; or a program that draws from one.
            data: binary data `[N, D]` whose base rates are where the path starts; of a Boltzmann machine, D may be less than
                its units: the first ones, the others start from their biases.

        Returns:
            The estimate with its interval; a lower bound in expectation. Warns where the effective sample size is below 5%
            of the chains.

        Raises:
            TypeError: for a target without such an energy.
            ValueError: for parameters or weights that are not finite, and a base that does not fit.
        """
        return log_partition(target, self.betas, self.num_chains, self.base, data, self.sigmas)

    def sandwich(
        self,
        target: Any,
        data: Tensor | None = None,
        *,
        num_exact: int | None = None,
        confidence: float = 0.99,
        max_bits: int = 30,
    ) -> Sandwich:
        """Bound log Z from both sides: bidirectional Monte Carlo, with exact draws by enumeration for the reverse chains.

        Args:
            target: as of :meth:`log_partition`.
            data: likewise.
            num_exact: exact draws, each the start of one reverse chain; None takes `num_chains`.
            confidence: with which both bounds hold at once.
            max_bits: the most units, on the smaller side of an RBM or of a Boltzmann machine in all, that are enumerated.

        Raises:
            ValueError: where the model has too many units for exact draws, with the bytes and seconds that they would take;
                a reverse run from anything else bounds nothing.
        """
        return sandwich(target, self.betas, self.num_chains, self.base, data, num_exact, confidence, max_bits)

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> Posterior:
        """Weighted draws of p(z | x) and a lower bound on log p(x), along p(z) p(x | z)^β from the prior.

        `log_evidence` is in expectation a lower bound of log p(x), tight as the number of temperatures grows; `diagnostics`
        holds per datum `ess` and `pareto_k` of the weights, and for continuous latents the mean `acceptance` of trajectories.

        Where the data themselves are drawn from an RBM or Boltzmann machine, it is log Z that has to be annealed: the
        posterior of the hidden units is then exact, `log_evidence` is −F(x) − log Ẑ, in expectation an upper bound, and its
        `stderr`, that of log Ẑ, is an error that all rows have in common. `diagnostics["partition"]` is the estimate.

        Args:
            model: a Pyro program with a plate for its rows, latents finite or continuous or both.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: for a program that branches on values, mixes rows of the batch, masks or scales its latents.
        """
        begin = time.perf_counter()
        machine = observed_machine(model, args, kwargs)
        if machine is not None:
            return infer_machine(self, model, machine, args, kwargs, begin)
        return infer(self, model, args, kwargs, begin)

    def sandwich_simulated(
        self,
        model: Program,
        batch_size: int = 10,
        *args: Any,
        observation: str = "x",
        confidence: float = 0.99,
    ) -> Sandwich:
        """Bound log p(x) of data that the model itself draws, from both sides: how far off `infer` is on such data.

        The latents that made a datum are an exact draw from its posterior: the reverse chains start there. Says nothing for
        certain of other data.

        Args:
            model: a program that runs as `model(None, *args, batch_size=n)` and as `model(x, *args)`.
            batch_size: data drawn.
            *args: further arguments of the program.
            observation: the site of the data.
            confidence: with which both bounds of a row hold at once, by Markov's inequality.
        """
        return sandwich_simulated(self, model, batch_size, args, observation, confidence)
