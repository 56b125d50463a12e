"""Expectation maximisation, with any posterior for its E-step."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from pyrovae.handlers.declared import method_of_program, takes
from pyrovae.handlers.energy import check_normalized, warn_of_energies
from pyrovae.handlers.structure import Structure, read_structure
from pyrovae.inference.exact.exact import Exact
from pyrovae.inference.fit import Fit, check_held_out, check_penalty, snapshot, squared_norm, state_of, versions
from pyrovae.inference.log_prior import log_prior_of
from pyrovae.inference.posterior import Posterior, Program
from pyrovae.ops import isolated_rng


class InferenceMethod(Protocol):
    """What an E-step is."""

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior of a program's latents at its arguments."""


class EM:
    """Maximise log p(x) + log p(θ) by alternating q(z) ← posterior and θ ← argmax Q(θ) = E_q[log p(x, z)] + log p(θ).

    The prior is that of `penalty`, log p(θ) = −λ/2 ‖θ‖², and, where the model declares one by a method `log_prior()`, its own
    too; with neither this is maximum likelihood. With `EM(e_step=Exact())` this is EM: the log posterior density of θ (the
    penalised log likelihood) never decreases, which is checked at every iteration; with a prior, log p(x) itself may.
    `EM(e_step=Gibbs(…))` is Monte-Carlo EM, monotone only on average; `EM(e_step=MeanField())` is variational EM, whose
    M-steps raise the bound and whose E-steps start anew, so that it may fall by a worse local optimum. The M-step is the
    model's own `m_step(posterior, *args)` where it declares one and λ = 0, its own prior within; else that of the posterior,
    Newton steps for a belief net; else L-BFGS on Q, undone if Q fell (generalised EM). Where parameters do not vary over the
    data, Q needs the data only once an E-step.

    Cost of an iteration: one E-step, and about `m_steps` runs of the program over the joint states. `model_evaluations` is
    that of the E-steps, those on validation data too, and one for each evaluation of Q, however many states it sums over.

    Args:
        e_step: any inference method; default `Exact()`.
        num_iterations: M-steps; one more E-step tells the bound of the last parameters.
        m_steps: L-BFGS (or Newton) iterations of one M-step, at most.
        penalty: λ, the precision of a Gaussian prior on every parameter of the model.
        progress: show a progress bar.

    Raises:
        ValueError: for negative numbers.

    References:
        Maximum likelihood from incomplete data via the EM algorithm (Dempster et al., 1977)
        https://doi.org/10.1111/j.2517-6161.1977.tb01600.x
        A view of the EM algorithm that justifies incremental, sparse, and other variants (Neal and Hinton, 1998)
        https://doi.org/10.1007/978-94-011-5014-9_12
    """

    def __init__(
        self,
        e_step: InferenceMethod | None = None,
        num_iterations: int = 50,
        *,
        m_steps: int = 5,
        penalty: float = 0.0,
        progress: bool = False,
    ) -> None:
        if num_iterations < 1 or m_steps < 1:
            raise ValueError(f"expected num_iterations >= 1 and m_steps >= 1, got {num_iterations} and {m_steps}")
        self.e_step = Exact() if e_step is None else e_step
        if isinstance(self.e_step, type) or not callable(getattr(self.e_step, "infer", None)):
            raise ValueError(f"expected an inference method such as Exact() for e_step, got {e_step!r}; pass an instance")
        self.num_iterations, self.m_steps, self.progress = num_iterations, m_steps, progress
        self.penalty = check_penalty(penalty)

    def fit(self, model: Program, *args: Any, validation: Any = None, **kwargs: Any) -> Fit:
        """Learn the model's parameters in place.

        Args:
            model: a Pyro program.
            *args: its arguments, the data first.
            validation: other data (a tensor, or a tuple of arguments) whose bound is logged.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: if the model has no parameters, or the E-step refuses the program; for a minibatch, and for validation
                data beside a keyword argument that belongs to the rows of the training data.
            RuntimeError: if the penalised log likelihood fell although the E-step is exact.
        """
        begin, seed = time.perf_counter(), torch.initial_seed()
        structure = read_structure(model, args, kwargs)
        check_normalized(structure, "EM")
        _check_all_data(structure)
        check_held_out(args, kwargs, validation)
        warn_of_energies(model, args, kwargs, structure)
        leaves = {n: leaf for n, leaf in structure.leaves.items() if leaf.requires_grad}
        if not leaves:
            raise ValueError("expected a model with parameters, got none; there is nothing to learn")
        history: list[dict[str, Any]] = []
        evaluations, previous = 0, None
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        repeated = getattr(self.e_step, "repeated", None)
        e_step: Callable[[], Posterior] = (
            partial(self.e_step.infer, model, *args, **kwargs) if repeated is None else repeated(model, args, kwargs, structure)
        )
        log_prior = log_prior_of(model)
        own_step = self._own_m_step(model, structure, args, kwargs)
        try:
            for step in trange(self.num_iterations + 1, desc="EM", disable=not self.progress):
                posterior = e_step()
                evaluations += int(posterior.diagnostics.get("model_evaluations", 0))
                record = self._record(step, posterior, leaves, log_prior)
                if validation is not None:
                    others = validation if isinstance(validation, tuple) else (validation,)
                    with isolated_rng():  # looking at other data does not change the training
                        held_out = self.e_step.infer(model, *others, **kwargs)
                    evaluations += int(held_out.diagnostics.get("model_evaluations", 0))
                    evidence = held_out.log_evidence
                    record["validation"] = None if evidence is None else float(evidence.mean())
                history.append(record | {"seconds": time.perf_counter() - begin})
                if posterior.bound == "exact":
                    self._check_monotone(previous, record["loss"], posterior)
                    previous = record["loss"]
                if step < self.num_iterations:
                    evaluations += self._m_step(model, posterior, leaves, own_step, log_prior)
        finally:
            for name, leaf in leaves.items():
                leaf.grad = gradients[name]
        return Fit(
            history=tuple(history),
            bound=posterior.bound,
            states={"model": state_of(model, leaves)},
            seconds=time.perf_counter() - begin,
            model_evaluations=evaluations,
            seed=seed,
            penalty=self.penalty,
            versions=versions(),
        )

    def _own_m_step(
        self, model: Program, structure: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Posterior], object] | None:
        """The model's own M-step at these arguments; None where it has none for this penalty, or would move what is frozen."""
        own = method_of_program(model, "m_step")
        parameters = list(structure.leaves.values()) + (list(model.parameters()) if isinstance(model, nn.Module) else [])
        if own is None or not all(parameter.requires_grad for parameter in parameters):
            return None
        known = inspect.signature(own).parameters
        if self.penalty and "penalty" not in known:
            return None
        given = {name: value for name, value in kwargs.items() if name in known}
        if self.penalty:
            given["penalty"] = self.penalty
        if not takes(own, (None, *args), given):
            return None
        return lambda posterior: own(posterior, *args, **given)

    def _m_step(
        self,
        model: Program,
        posterior: Posterior,
        leaves: Mapping[str, Tensor],
        own: Callable[[Posterior], object] | None,
        log_prior: Callable[[], Tensor] | None,
    ) -> int:
        """Raise Q; the number of its evaluations."""
        if own is not None:
            own(posterior)
            return 0
        structured = getattr(posterior, "m_step", None)
        if structured is not None and log_prior is None:
            calls = structured(model, leaves, penalty=self.penalty, max_steps=self.m_steps)
            if calls is not None:
                return int(calls)
        q = posterior.q_function(model)
        objective = q if log_prior is None else lambda: q() + log_prior()
        return maximise(objective, leaves, self.penalty, self.m_steps, posterior.structure.batch_shape.numel())

    def _record(
        self, step: int, posterior: Posterior, leaves: Mapping[str, Tensor], log_prior: Callable[[], Tensor] | None
    ) -> dict[str, Any]:
        record: dict[str, Any] = {"step": step, "loss": None, "bound": None, "stderr": None, "validation": None}
        if posterior.log_evidence is not None:
            rows = max(1, posterior.log_evidence.numel())
            stderr = torch.as_tensor(posterior.stderr).expand_as(posterior.log_evidence)
            record["loss"] = float(-posterior.log_evidence.sum())
            if self.penalty:
                record["loss"] += float(self.penalty / 2 * squared_norm(leaves).detach())
            if log_prior is not None:
                record["loss"] -= float(log_prior().detach())
            record["bound"] = float(posterior.log_evidence.mean())
            record["stderr"] = float(stderr.square().sum().sqrt() / rows)
        return record

    def _check_monotone(self, previous: float | None, loss: float, posterior: Posterior) -> None:
        evidence = posterior.log_evidence
        assert evidence is not None
        rows = max(1, evidence.numel())
        allowed = abs(loss) * torch.finfo(evidence.dtype).eps * 16
        if evidence.dtype == torch.float64:
            allowed = max(allowed, rows * 1e-9)
        if previous is not None and not loss <= previous + allowed:
            raise RuntimeError(
                f"expected exact EM never to lower the penalised log likelihood (with the model's prior), got "
                f"{-previous:.12g} then {-loss:.12g}; the model's m_step does not raise Q, or the program is not the same at "
                "every call"
            )


def maximise(q: Callable[[], Tensor], leaves: Mapping[str, Tensor], penalty: float, steps: int, rows: int) -> int:
    """Raise q − λ/2 ‖θ‖² by L-BFGS, in place; parameters are put back if it fell, or could not be told any more.

    Returns:
        The number of evaluations of q.

    Raises:
        ValueError, RuntimeError: what q raises at the parameters as they are.
    """
    calls = 0
    before = snapshot(leaves)
    optimizer = torch.optim.LBFGS(
        list(leaves.values()),
        max_iter=steps,
        max_eval=4 * steps,
        tolerance_grad=1e-12,  # torch's own would end EM a thousandth of a nat early
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        nonlocal calls
        calls += 1
        return (penalty / 2 * squared_norm(leaves) - q()) / rows

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    raised, told = False, "Q that is not finite"
    try:
        start = optimizer.step(closure)
        with torch.no_grad():
            end = objective()
        raised, finite = bool(end <= start), bool(end.isfinite())
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:  # a program far from where it was
        if calls < 2:
            raise
        finite, told = False, f"an error ({error})"
    finally:
        if not raised:
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(before[name])
    if not finite:
        warnings.warn(
            f"an M-step by L-BFGS met {told}: its parameters are put back, and this step learned nothing", stacklevel=4
        )
    return calls


def _check_all_data(structure: Structure) -> None:
    """Refuse a minibatch: E-steps of a part of the rows tell the M-step nothing of the others.

    Raises:
        ValueError: with the plate.
    """
    for plate in structure.plates:
        if plate.size < plate.full_size:
            raise ValueError(
                f"expected all rows for EM, got {plate.size} of {plate.full_size} in plate {plate.name!r}; pass the whole data "
                "without index and num_data, or learn in minibatches by Variational(None, ExactLikelihood())"
            )
