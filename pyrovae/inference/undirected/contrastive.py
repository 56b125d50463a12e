"""Contrastive divergence: learning of undirected models, with model expectations from short, persistent or tempered chains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import trange

from pyrovae.distributions.boltzmann import BoltzmannMachine
from pyrovae.distributions.rbm import RBM
from pyrovae.distributions.undirected import Undirected
from pyrovae.inference.capture.optimizer import check_steps
from pyrovae.inference.fit import Fit, check_penalty, state_of, versions
from pyrovae.inference.undirected.energy import data_energy
from pyrovae.inference.undirected.free import all_free
from pyrovae.inference.undirected.likelihood_gradient import BoltzmannGradient, RBMGradient
from pyrovae.inference.undirected.negative_phase import NegativePhase, Persistent, Restarted, Tempered
from pyrovae.inference.undirected.settle import leave, mixing, settle, state_of_chains
from pyrovae.inference.undirected.tempering import Ladder, ParallelTempering, moves_of
from pyrovae.inference.variational.batches import Batches
from pyrovae.ops import check_enumerable, isolated_rng


class ContrastiveDivergence:
    """Learn an RBM or Boltzmann machine by the gradient E_data[∂ −E] − E_model[∂ −E] of its mean log likelihood.

    Data expectations are exact given the data where hidden units are independent (an RBM) or at most 10. Model expectations are
    averages over Gibbs chains, and so the gradient is biased:

    - `persistent=True` (PCD): chains live through the whole run, so that the bias vanishes as the learning rate falls, if the
      chains mix. Where they do not, the likelihood may get stuck or fall.
    - `persistent=False` (CD-k): chains start at the minibatch and take k sweeps. The bias stays at any learning rate: the fixed
      point is not that of maximum likelihood, and log p(x) may rise at first and then fall without end, while the
      reconstructions look ever better. Its expectation is the data's minus that after k sweeps from the data.
    - `negative=ParallelTempering(…)`: persistent, with exchanges between temperatures; for models with several modes.
    - `negative="exact"`: by enumeration; no bias, and nothing sampled but minibatches.

    `centered` subtracts the means of data and hidden units in the gradient of the couplings: the same maximum, with or without
    a penalty, reached with far less interference of biases and weights. That needs couplings and biases that are all learned,
    each by itself, as those of :class:`pyrovae.models.RestrictedBoltzmannMachine` and `BoltzmannMachine` are, or as leaves of
    the distribution. Where some are frozen, masked, tied or computed from others, and where the optimizer has a
    `weight_decay`, the fixed point would be another: the gradient is then the plain one, and records say `centered` False.

    Cost of a step for an RBM: three products of a matrix `[rows, D]` with W for the gradient, two for each sweep. Gradients are
    written out by hand; minibatches, chains and buffers stay allocated.

    **Records.** Where the smaller side of an RBM (all units of a Boltzmann machine) has at most `exact_bits` units, `bound` and
    `validation` are the exact mean log p(x) of `log_rows` rows; else None: no bound comes out of these methods, see
    :class:`pyrovae.inference.AIS`. `reconstruction` of an RBM is the mean squared error of 100 rows x against
    E[x | E[h | x]], which measures no likelihood.

    **Draws.** A model beyond its `max_bits` draws from persistent chains of its own. A run leaves them the last states of the
    negative phase; after CD-k they start at the data and take 200 sweeps, and a warning says where they have not mixed.

    Args:
        k: sweeps of the chains a step; with `ParallelTempering`, its rounds.
        persistent: whether chains go on from step to step, or restart at the minibatch.
        centered: use the centred gradient, where it has the same fixed point, see above.
        num_chains: persistent chains (those of `negative` count instead, if given). They start at rows of the data.
        batch_size: rows of a minibatch; None takes all.
        num_epochs: passes over the data, each of ⌊N/B⌋ steps; default 10.
        num_steps: gradient steps, instead of `num_epochs`.
        optim: a function from parameters to a torch optimizer; default `partial(torch.optim.SGD, lr=0.05)`. The gradient is
            that of the mean log likelihood, nats per datum, as in scikit-learn's `learning_rate`.
        scheduler: a function from the optimizer to a `torch.optim.lr_scheduler`, stepped at every gradient step.
        penalty: λ, the precision of a Gaussian prior on every parameter: λ θ / N is added to the gradient of −mean log p.
        negative: None, a :class:`ParallelTempering`, or "exact".
        preprocess: applied to every minibatch, and to the rows of a record, such as `pyrovae.data.binarize`.
        log_every: steps between records; default 20 records in all.
        log_rows: rows of training and of validation data that a record looks at.
        exact_bits: up to how many units records enumerate; 0 never does.
        callback: called with every record.
        progress: show a progress bar.

    Raises:
        ValueError: for numbers out of range, or options that exclude one another.

    Example:
        >>> from pyrovae.models import RestrictedBoltzmannMachine
        >>> rbm, x = RestrictedBoltzmannMachine(4, 2), torch.eye(4).repeat(25, 1)
        >>> fit = ContrastiveDivergence(num_epochs=5, batch_size=10, num_chains=20).fit(rbm, x)
        >>> fit.history[-1]["bound"] > fit.history[0]["bound"]
        True

    References:
        Training Products of Experts by Minimizing Contrastive Divergence (Hinton, 2002)
        https://doi.org/10.1162/089976602760128018
        Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient (Tieleman, 2008)
        https://doi.org/10.1145/1390156.1390290
        How to Center Deep Boltzmann Machines (Melchior et al., 2016)
        https://www.jmlr.org/papers/v17/14-237.html
        Empirical Analysis of the Divergence of Gibbs Sampling Based Learning Algorithms for Restricted Boltzmann Machines
        (Fischer and Igel, 2010)
        https://doi.org/10.1007/978-3-642-15825-4_26
    """

    def __init__(
        self,
        k: int = 1,
        *,
        persistent: bool = True,
        centered: bool = True,
        num_chains: int = 100,
        batch_size: int | None = 100,
        num_epochs: int | None = None,
        num_steps: int | None = None,
        optim: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        penalty: float = 0.0,
        negative: ParallelTempering | Literal["exact"] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        log_every: int | None = None,
        log_rows: int = 1000,
        exact_bits: int = 16,
        callback: Callable[[Mapping[str, Any]], object] | None = None,
        progress: bool = False,
    ) -> None:
        counts = {"k": (k, 1), "num_chains": (num_chains, 1), "batch_size": (batch_size, 1), "num_epochs": (num_epochs, 1)}
        counts |= {"num_steps": (num_steps, 1), "log_every": (log_every, 1), "log_rows": (log_rows, 1)}
        counts |= {"exact_bits": (exact_bits, 0)}
        for name, (count, least) in counts.items():
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < least):
                raise ValueError(f"expected an integer {name} >= {least}, got {count!r}")
        if num_steps is not None and num_epochs is not None:
            raise ValueError(f"expected num_steps or num_epochs, got both, {num_steps} and {num_epochs}; leave one out")
        if negative is not None and negative != "exact" and not isinstance(negative, ParallelTempering):
            raise ValueError(f'expected negative=ParallelTempering(...), "exact" or None, got {negative!r}')
        if negative is not None and not persistent:
            raise ValueError("expected persistent=True with negative=...: chains that restart at the data have no other phase")
        if isinstance(optim, torch.optim.Optimizer):
            name = type(optim).__name__
            raise ValueError(
                f"expected optim to make an optimizer of the parameters, got one that is made; pass "
                f"partial(torch.optim.{name}, lr=...)"
            )
        self.k, self.persistent, self.centered, self.num_chains = k, persistent, centered, num_chains
        self.batch_size, self.num_steps = batch_size, num_steps
        self.num_epochs = 10 if num_epochs is None and num_steps is None else num_epochs
        self.optim = partial(torch.optim.SGD, lr=0.05) if optim is None else optim
        check_steps(getattr(self.optim, "func", self.optim))
        self.scheduler, self.penalty, self.negative = scheduler, check_penalty(penalty), negative
        self.preprocess, self.log_every, self.log_rows, self.exact_bits = preprocess, log_every, log_rows, exact_bits
        self.callback, self.progress = callback, progress

    def fit(self, model: Any, x: Tensor, *, validation: Tensor | None = None) -> Fit:
        """Learn the model's parameters in place.

        Warns where chains have not mixed at the end: by R-hat of energies and of units over 20 to 100 more sweeps (a
        twentieth of those of the run), or, tempered, by exchanges and round trips.

        Args:
            model: with a method `distribution()`, or a program whose data are drawn from an RBM or Boltzmann machine.
            x: data `[N, D]` in {0, 1}. Of a Boltzmann machine with n > D units, the others are hidden.
            validation: other data, whose log p(x) is recorded.

        Returns:
            The account; `bound` is "exact" where records are, else "estimate" and None in the history. Records also have
            `epoch`, `rows`, `reconstruction`, `learning_rate`, `centered`; the last has `rhat`, or `swap_rate` (the lowest) and
            `round_trips`.

        Raises:
            ValueError: for data of another width, without rows, or not in {0, 1}; fewer rows than `batch_size`; parameters that
                cannot be learned; or too many units for `negative="exact"`.
            FloatingPointError: if parameters are no longer finite.
        """
        return _Run(self, model, x, validation)()


class _Run:
    """One run; see :class:`ContrastiveDivergence` for its options."""

    def __init__(self, method: ContrastiveDivergence, model: Any, x: Tensor, validation: Tensor | None) -> None:
        self.begin, self.seed = time.perf_counter(), torch.initial_seed()
        self.method, self.model = method, model
        distribution = data_energy(model, x)
        like = distribution.parameters[0]
        self.x = _check_rows(x, distribution).to(like)
        self.held_out = None if validation is None else _check_rows(validation, distribution, x.shape[1]).to(like)
        with isolated_rng(0):
            rows = torch.randperm(len(self.x), device=self.x.device)
        bits = self._bits(distribution)
        self.exact = bits <= method.exact_bits
        self.seen = self.x[rows[: method.log_rows if self.exact else _RECONSTRUCTED]]
        self.tensors = distribution.parameters
        self.fixed = distribution if all(t.is_leaf for t in self.tensors) else None
        self.leaves = self._leaves(model)
        first = self._prepared(self.x[: method.batch_size])
        _check_bits(first)
        if self.held_out is not None:
            with isolated_rng():
                _check_bits(self._prepared(self.held_out))
        if method.preprocess is None:
            _check_bits(self.x)
        self.batches = Batches((self.x,), {}, method.batch_size, lambda args: (self._prepared(args[0]),), indexed=True)
        self.num_steps = method.num_steps or (method.num_epochs or 0) * self.batches.per_epoch
        self.every = method.log_every or max(1, self.num_steps // 20)
        if method.negative == "exact":
            check_enumerable(bits, 1, like.dtype, "negative=ParallelTempering(...)")
        self.gradient: RBMGradient | BoltzmannGradient
        mean = self.x.mean(0)
        self.free = all_free(model, distribution, self.leaves.values())
        centered, decay = method.centered and self.free, method.penalty / len(x) if self.free else 0.0
        if isinstance(distribution, RBM):
            self.gradient = RBMGradient(mean, centered=centered, decay=decay)
        else:
            self.gradient = BoltzmannGradient(mean, len(x), k=method.k, centered=centered, decay=decay)
        self.negative = self._negative_phase(distribution, first)
        self.history: list[dict[str, Any]] = []
        self.evaluations = 0

    def __call__(self) -> Fit:
        """Train."""
        method = self.method
        optimizer = method.optim(list(self.leaves.values()))
        if any(group.get("weight_decay") for group in optimizer.param_groups):
            self.gradient.centered = False
        scheduler = None if method.scheduler is None else method.scheduler(optimizer)
        before = {name: leaf.grad for name, leaf in self.leaves.items()}
        for leaf in self.leaves.values():
            leaf.grad = None
        try:
            self._warm_up()
            moves = moves_of(self.num_steps) if self._adaptive() else set()
            for step in trange(self.num_steps, desc="ContrastiveDivergence", disable=not method.progress):
                if step in moves and isinstance(self.negative, Tempered):
                    self.negative.ladder.equalise()
                    self.negative.ladder.forget()
                if step % self.every == 0:
                    self._record(step, optimizer)
                self._step()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
        finally:
            for name, leaf in self.leaves.items():
                leaf.grad = before[name]
        self._record(self.num_steps, optimizer, last=True)
        return Fit(
            history=tuple(self.history),
            bound="exact" if self.exact else "estimate",
            states={"model": state_of(self.model, self.leaves)},
            seconds=time.perf_counter() - self.begin,
            model_evaluations=self.evaluations,
            seed=self.seed,
            penalty=method.penalty,
            versions=versions(),
            exact_learning=method.negative == "exact",
        )

    def _step(self) -> None:
        """Set the leaves' gradients."""
        batch = self.batches.draw()
        x = batch.args[0]
        distribution = self.fixed
        if distribution is None:
            with torch.enable_grad():
                distribution = data_energy(self.model, x)
        gradients = self.gradient(distribution, x, self.negative, batch.kwargs.get("index"))
        if self.fixed is None:
            for leaf in self.leaves.values():
                leaf.grad = None
            tensors = [(t, g) for t, g in zip(distribution.parameters, gradients, strict=True) if t.requires_grad]
            torch.autograd.backward([t for t, _ in tensors], [g for _, g in tensors])
        else:
            for tensor, gradient in zip(self.tensors, gradients, strict=True):
                if tensor.requires_grad:
                    tensor.grad = gradient
        if self.method.penalty and not self.free:
            for leaf in self.leaves.values():
                if leaf.grad is not None:
                    leaf.grad.add_(leaf.detach(), alpha=self.method.penalty / len(self.x))
        self.evaluations += batch.rows + (0 if self.negative is None else self.negative.chain_sweeps)

    def _negative_phase(self, distribution: Undirected, first: Tensor) -> NegativePhase | None:
        method = self.method
        if method.negative == "exact":
            return None
        if not method.persistent:
            return Restarted(distribution, method.batch_size or len(self.x), method.k)
        tempering = method.negative
        number = method.num_chains if tempering is None else tempering.num_chains * tempering.num_temperatures
        rows = torch.randint(len(self.x), (number,), device=self.x.device)
        visible = self._prepared(self.x[rows])
        if tempering is None:
            return Persistent(distribution, visible, method.k)
        return Tempered(Ladder(tempering, distribution, visible), method.k)

    def _adaptive(self) -> bool:
        return isinstance(self.method.negative, ParallelTempering) and self.method.negative.adapt

    @torch.no_grad()
    def _warm_up(self) -> None:
        """The rounds that a tempered phase wants before the first step."""
        if isinstance(self.negative, Tempered) and isinstance(self.method.negative, ParallelTempering):
            distribution = self.fixed or data_energy(self.model, self._prepared(self.seen))
            self.negative.ladder.run(distribution, self.method.negative.warmup)
            self.negative.ladder.forget()

    @torch.no_grad()
    def _record(self, step: int, optimizer: torch.optim.Optimizer, *, last: bool = False) -> None:
        """Look at the model without changing the training."""
        for name, leaf in self.leaves.items():
            if not bool(torch.isfinite(leaf).all()):
                raise FloatingPointError(
                    f"expected finite parameters, got {name!r} infinite or NaN at step {step}; lower the learning rate"
                )
        with isolated_rng(0):
            seen = self._prepared(self.seen)
            distribution = self.fixed or data_energy(self.model, seen)
            record: dict[str, Any] = {
                "step": step,
                "epoch": step / self.batches.per_epoch,
                "loss": None,
                "bound": None,
                "stderr": None,
                "rows": len(seen),
                "validation": None,
            }
            if self.exact:
                log_partition = distribution._exact_log_partition()
                record["bound"] = self._log_likelihood(distribution, seen, log_partition)
                record["stderr"] = 0.0
                if self.held_out is not None:
                    record["validation"] = self._log_likelihood(
                        distribution, self._prepared(self.held_out[: self.method.log_rows]), log_partition
                    )
            if isinstance(distribution, RBM):
                few = seen[:_RECONSTRUCTED]
                hidden = torch.addmm(distribution.c, few, distribution.W).sigmoid_()
                means = torch.addmm(distribution.b, hidden, distribution.W.t()).sigmoid_()
                record["reconstruction"] = float((means - few).square().mean())
            record["learning_rate"] = float(optimizer.param_groups[0]["lr"])
            record["centered"] = self.gradient.centered
            if last:
                record |= self._mixing(distribution)
        self.history.append(record | {"seconds": time.perf_counter() - self.begin})
        if self.method.callback is not None:
            self.method.callback(self.history[-1])

    def _log_likelihood(self, distribution: Undirected, x: Tensor, log_partition: Tensor) -> float:
        self.evaluations += len(x)
        visible = distribution
        if isinstance(distribution, BoltzmannMachine) and x.shape[1] < distribution.event_shape[0]:
            visible = distribution.marginal(x.shape[1])
        return float(-visible.free_energy(x).double().mean() - log_partition.double())

    def _mixing(self, distribution: Undirected) -> dict[str, Any]:
        """How well the chains of the negative phase mix at the last parameters."""
        if isinstance(self.negative, Tempered):
            ladder = self.negative.ladder
            ladder.warn(stacklevel=6)
            leave(distribution, state_of_chains(ladder.chains)[ladder.row[0]])
            rates = ladder.swap_rates
            return {"swap_rate": float(rates[~rates.isnan()].min()), "round_trips": ladder.round_trips}
        if self.negative is None and distribution.chains is not None:
            leave(distribution, distribution._exact_sample(torch.Size([distribution.chains.num_chains])))
        if isinstance(self.negative, Restarted):
            settle(distribution, self._prepared(self.x) if self.method.preprocess else self.x)
        if not isinstance(self.negative, Persistent):
            return {}
        found = mixing(self.negative.chains, distribution, min(100, max(20, self.num_steps * self.method.k // 20)))
        leave(distribution, state_of_chains(self.negative.chains))
        found.warn(
            "the persistent chains",
            "the gradient was that of where they were, not of the model; use a falling learning rate, a larger k, or "
            "negative=ParallelTempering(...)",
            stacklevel=5,
        )
        return {"rhat": found.rhat}

    def _bits(self, distribution: Undirected) -> int:
        """Units to enumerate for log Z."""
        return min(distribution.W.shape) if isinstance(distribution, RBM) else distribution.parameters[0].shape[0]

    def _prepared(self, x: Tensor) -> Tensor:
        preprocess = self.method.preprocess
        return x if preprocess is None else preprocess(x)

    def _leaves(self, model: Any) -> dict[str, Tensor]:
        """What is learned, by name: the model's parameters that the distribution depends on."""
        if isinstance(model, torch.nn.Module):
            leaves: dict[str, Tensor] = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}
        else:
            leaves = {str(place): t for place, t in enumerate(self.tensors) if t.is_leaf and t.requires_grad}
        if not leaves or not any(t.requires_grad for t in self.tensors):
            raise ValueError("expected an RBM or Boltzmann machine with parameters that require a gradient, got none to learn")
        return leaves


def _check_rows(x: Tensor, distribution: Undirected, width: int | None = None) -> Tensor:
    """Data of the distribution's width, or of some units of a Boltzmann machine."""
    units = distribution.event_shape[0]
    fits = isinstance(x, Tensor) and x.dim() == 2 and len(x) > 0
    if fits and width is None:
        fits = x.shape[1] == units or (isinstance(distribution, BoltzmannMachine) and x.shape[1] < units)
    elif fits:
        fits = x.shape[1] == width
    if not fits:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected data [N, {width or units}] with at least one row, got {got}")
    return x


def _check_bits(x: Tensor) -> None:
    if not bool(((x == 0) | (x == 1)).all()):
        nan = int(torch.isnan(x).sum())
        got = f"{nan} NaN" if nan else f"values from {float(x.min()):g} to {float(x.max()):g}"
        raise ValueError(f"expected x in {{0, 1}}, got {got}; scale to [0, 1] and pass preprocess=pyrovae.data.binarize")


_RECONSTRUCTED = 100  # rows, so that records stay cheap
