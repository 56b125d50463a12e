"""Who runs in `speed.py`: one gradient step of the same program by each library, from the same first parameters.

Every maker takes a `Problem` and its minibatches, and gives a `Contestant`, whose `step(i)` steps on the i-th of them and
returns the loss as its user would take it: stock SVI and `.step` a float, all others something not yet read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyro
import torch
from peers import pyro_categorical_vae, pyro_gaussian_vae, torch_categorical_vae, torch_gaussian_vae, torch_loop
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import relax
from pyrovae.inference import CapturedSVI, Variational
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.models import CategoricalVAE, GaussianVAE, SigmoidBeliefNet

TEMPERATURE = 0.5
_serial = itertools.count()


@dataclass
class Contestant:
    """A training run that others race against."""

    step: Callable[[int], Any]
    finish: Callable[[], object]  # returns when the device is done
    python_runs: Sequence[object] = ()  # grows by one when the program runs in Python
    replays: bool = False  # whether it should seldom do so


@dataclass(frozen=True)
class Problem:
    """A program, its guide and their first parameters, the same at every making.

    Attributes:
        family: "categorical" (relaxed), "gaussian" or "belief net" (score function, four vectorised particles).
        latents: one-hot latents, Normal latents or bits.
        hidden: sizes from the data to the latents.
        start: parameters of model and guide; None for those that seed 0 draws.
    """

    family: str = "categorical"
    latents: int = 30
    hidden: tuple[int, ...] = (512, 256)
    visible: int = 784
    categories: int = 10
    device: str = "cpu"
    start: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None

    def model(self) -> nn.Module:
        """The program before it is relaxed."""
        torch.manual_seed(0)
        if self.family == "belief net":
            return SigmoidBeliefNet(self.visible, self.latents).to(self.device)
        if self.family == "gaussian":
            return GaussianVAE(self.visible, self.latents, self.hidden).to(self.device)
        return CategoricalVAE(self.visible, self.latents, self.categories, self.hidden).to(self.device)

    def programs(self) -> tuple[Callable[..., Any], AmortizedMeanField, list[object]]:
        """Model and guide, and a list that grows when the guide's encoder is run in Python."""
        base = self.model()
        model = relax(base, TEMPERATURE) if self.family == "categorical" else base
        guide = AmortizedMeanField(model).to(self.device)
        if self.start is not None:
            base.load_state_dict(self.start[0])
            guide.load_state_dict(self.start[1])
        runs: list[object] = []
        guide.encoder.register_forward_pre_hook(lambda *_: runs.append(None))
        return model, guide, runs

    def learned(self, rows: Sequence[Tensor], lr: float = 1e-3) -> Problem:
        """The same after a step of stock SVI on each of the minibatches."""
        model, guide, _ = self.programs()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), self.elbo())
        for x in rows:
            svi.step(x)
        return replace(self, start=(getattr(model, "program", model).state_dict(), guide.state_dict()))

    def elbo(self) -> Trace_ELBO:
        """One draw; four at once for the belief net."""
        if self.family != "belief net":
            return Trace_ELBO()
        return Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)

    def layers(self) -> tuple[list[nn.Linear], list[nn.Linear]]:
        """The linear layers of encoder and decoder."""
        model, guide, _ = self.programs()
        nets = guide.encoder, getattr(model, "program", model).decoder
        encoder, decoder = ([layer for layer in net.modules() if isinstance(layer, nn.Linear)] for net in nets)
        return encoder, decoder

    def net(self, like: nn.Module) -> nn.Module:
        """A peer's autoencoder with these first parameters."""
        with torch.no_grad():
            for net, layers in zip((like.encoder, like.decoder), self.layers(), strict=True):
                for theirs, ours in zip((m for m in net if isinstance(m, nn.Linear)), layers, strict=True):
                    theirs.weight.copy_(ours.weight)
                    theirs.bias.copy_(ours.bias)
        return like.to(self.device)


def synchronise(device: str) -> None:
    """Wait for the GPU, where it is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def stock(problem: Problem, rows: Sequence[Tensor], lr: float = 1e-3) -> Contestant:
    """`pyro.infer.SVI` with all defaults on our program."""
    model, guide, runs = problem.programs()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), problem.elbo())
    return Contestant(lambda i: svi.step(rows[i % len(rows)]), partial(synchronise, problem.device), runs)


def stock_pyro(problem: Problem, rows: Sequence[Tensor], lr: float = 1e-3) -> Contestant:
    """The same SVI on a program of Pyro's distributions alone."""
    program = _pyro_program(problem)
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": lr}), problem.elbo())
    return Contestant(lambda i: svi.step(rows[i % len(rows)]), partial(synchronise, problem.device))


def captured(
    problem: Problem, rows: Sequence[Tensor], lr: float = 1e-3, *, backend: str = "auto", read: bool = False
) -> Contestant:
    """Our CapturedSVI on our program; `read` takes the loss by `.step`, as a float."""
    model, guide, runs = problem.programs()
    svi = CapturedSVI(model, guide, pyro.optim.Adam({"lr": lr}), problem.elbo(), backend=backend)
    step = svi.step if read else svi.step_async
    return Contestant(lambda i: step(rows[i % len(rows)]), partial(synchronise, problem.device), runs, replays=backend != "off")


def captured_pyro(problem: Problem, rows: Sequence[Tensor], lr: float = 1e-3, *, backend: str = "auto") -> Contestant:
    """Our CapturedSVI on the program of Pyro's distributions alone."""
    program = _pyro_program(problem)
    runs: list[object] = []
    program.net.encoder.register_forward_pre_hook(lambda *_: runs.append(None))
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": lr}), problem.elbo(), backend=backend)
    return Contestant(
        lambda i: svi.step_async(rows[i % len(rows)]), partial(synchronise, problem.device), runs, replays=backend != "off"
    )


def fit(problem: Problem, rows: Sequence[Tensor], lr: float = 1e-3, *, backend: str = "auto") -> Contestant:
    """The loop inside `Variational.fit`, on the first minibatch alone as its whole data set."""
    model = problem.model()
    guide = AmortizedMeanField(model).to(problem.device)
    runs: list[object] = []
    guide.encoder.register_forward_pre_hook(lambda *_: runs.append(None))
    temperature = TEMPERATURE if problem.family == "categorical" else None
    optim = partial(torch.optim.Adam, lr=lr)
    method = Variational(guide, problem.elbo(), optim=optim, num_steps=10**6, temperature=temperature, capture=backend)
    run = Optimization(method, model, (rows[0],), {}, learn_model=True)
    run.__enter__()
    return Contestant(lambda i: run.step(i), partial(synchronise, problem.device), runs, replays=backend != "off")


def by_hand(
    problem: Problem,
    rows: Sequence[Tensor],
    lr: float = 1e-3,
    *,
    fused: bool = False,
    compiled: bool = False,
    densities: bool = False,
) -> Contestant:
    """A plain PyTorch loop with the KL in closed form, or, for one-hot latents, with the densities of `Trace_ELBO`."""
    loss: Callable[[Tensor], Tensor]
    if problem.family == "gaussian":
        net = problem.net(torch_gaussian_vae.Autoencoder(problem.latents, problem.visible, *problem.hidden))
        loss = net.loss
    else:
        net = problem.net(torch_categorical_vae.Autoencoder(problem.latents, problem.categories, problem.visible))
        loss = partial(torch_loop.densities if densities else torch_loop.closed_form, net, temperature=TEMPERATURE)
    step = torch_loop.make_step(net, loss, lr=lr, fused=fused, compiled=compiled)
    return Contestant(lambda i: step(rows[i % len(rows)]), partial(synchronise, problem.device))


def numpyro(problem: Problem, rows: Sequence[Tensor], lr: float = 1e-3) -> Contestant:
    """NumPyro's SVI, jitted."""
    import jax
    from peers import numpyro_svi

    theirs = [jax.device_put(np.asarray(x.cpu())) for x in rows]
    nets = [
        [(layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()) for layer in net] for net in problem.layers()
    ]
    one_hot = problem.family == "categorical"
    training = numpyro_svi.Training(
        *nets,
        theirs[0],
        latent=(problem.latents, problem.categories) if one_hot else (problem.latents,),
        temperature=TEMPERATURE if one_hot else None,
        lr=lr,
    )
    return Contestant(lambda i: training.step(theirs[i % len(theirs)]), training.finish)


def numpyro_lacks(device: str) -> str:
    """Why NumPyro cannot run there; empty where it can."""
    if missing := [name for name in ("jax", "numpyro") if find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    import jax

    wanted, found = "gpu" if device.startswith("cuda") else "cpu", jax.default_backend()
    return "" if found == wanted else f"JAX is on {found} and not on {wanted}"


def _pyro_program(problem: Problem) -> Any:
    name = str(next(_serial))
    if problem.family == "gaussian":
        program = pyro_gaussian_vae.Program(problem.latents, problem.visible, name)
    else:
        program = pyro_categorical_vae.Program(TEMPERATURE, problem.latents, problem.categories, problem.visible, name)
    problem.net(program.net)
    return program.to(problem.device)
