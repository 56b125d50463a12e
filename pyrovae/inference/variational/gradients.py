"""What a step follows: loss and gradients of an objective, of a penalty and of a declared prior."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.inference.fit import squared_norm
from pyrovae.inference.log_joint import LogJoint
from pyrovae.ops.tracing import capturing

if TYPE_CHECKING:
    from pyrovae.inference.variational.optimization import Optimization


def loss_and_gradients(run: Optimization, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """`(loss, norm, *gradients)` of the sum over all data; nothing moves, and nothing waits for the device.

    Args:
        run: an optimisation; `.grad` of its parameters is written on the way, and None at the end.
        args: of a minibatch.
        kwargs: of a minibatch.

    Returns:
        The loss, 0-d float64; the norm of all gradients together, 0-d; the gradients of what is learned.
    """
    run.forget()
    loss = (discover if run.update is None else _objective)(run, args, kwargs) * run.batches.factor
    assert run.update is not None
    learned = run.update.leaves
    model_leaves = run.leaves["model"]
    if run.penalty and model_leaves:
        loss = loss + run.penalty / 2 * in_double(squared_norm(model_leaves))
    log_prior = None if run.log_prior is None else run.log_prior()
    if log_prior is not None:
        loss = loss - in_double(log_prior)
    for leaf in learned:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
    gradients = [leaf.grad for leaf in learned if leaf.grad is not None]
    if run.batches.factor != 1:
        torch._foreach_mul_(gradients, run.batches.factor)
    if run.penalty:
        for leaf in {id(leaf): leaf for leaf in model_leaves.values()}.values():
            assert leaf.grad is not None
            leaf.grad.add_(leaf.detach(), alpha=run.penalty)
    if log_prior is not None and log_prior.requires_grad:
        wanted = [leaf for leaf in learned if leaf.requires_grad]
        for leaf, gradient in zip(wanted, torch.autograd.grad(log_prior, wanted, allow_unused=True), strict=True):
            if gradient is not None and leaf.grad is not None:
                leaf.grad.sub_(gradient)
    run.forget()
    return loss, torch.nn.utils.get_total_norm(gradients), *gradients


def discover(run: Optimization, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The loss of a first run, by which the objective's own parameters (a baseline's net) are known; all get an optimizer."""
    run.met.clear()
    with poutine.trace(param_only=True) as used:
        loss = _objective(run, args, kwargs)
    run.make_update(used.trace)
    return loss


def broadcasts(run: Optimization) -> bool:
    """Whether one run of the programs serves many particles."""
    programs = (run.model,) if run.method.guide is None else (run.model, run.method.guide)
    return all(LogJoint(program, run.first, run.first_kwargs).broadcasts for program in programs)


def _objective(run: Optimization, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The loss of the objective, which adds its gradients to `.grad`."""
    try:
        loss = run.elbo.loss_and_grads(*run.programs, *args, **kwargs)
    except (RuntimeError, ValueError, IndexError) as error:
        particles = getattr(run.elbo, "num_particles", 1) if getattr(run.elbo, "vectorize_particles", False) else 1
        if particles == 1 or capturing() or broadcasts(run):
            raise
        raise ValueError(
            f"expected programs that broadcast over a dim of {particles} particles on the left for an objective with "
            f"vectorize_particles=True, got {type(error).__name__}: {str(error).splitlines()[0]}; give the objective "
            "vectorize_particles=False, or write the programs with dims counted from the right"
        ) from error
    run.check_met()
    return in_double(loss) if not isinstance(loss, tuple) else torch.stack([in_double(part) for part in loss]).sum()


def in_double(value: Tensor | float) -> Tensor:
    """A number as a 0-d float64 tensor; on the CPU where its device has none."""
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float64)
    value = value.detach()
    return (value.cpu() if value.device.type == "mps" else value).double()
