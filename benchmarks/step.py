"""What a gradient step of the categorical autoencoder costs: ours, stock Pyro and plain PyTorch.

    python benchmarks/step.py [repeats]

784-512-256-30x10 with ReLU, batch 100 of random bits, one soft Gumbel-softmax draw a datum, float32, one thread, validation
off, nothing compiled. All in one process, in turn, five steps at a time, in the processor's seconds.

- `ours, stock SVI`: CategoricalVAE and AmortizedMeanField, relaxed, through `pyro.infer.SVI` and `Trace_ELBO`.
- `Pyro alone`: the same program and guide with Pyro's distributions, through the same SVI (`peers/pyro_categorical_vae.py`).
- `PyTorch by hand`: a plain step, with the KL in closed form (`peers/torch_categorical_vae.py`).
- `ours, Variational.fit`: a step of our own loop, for both gradients; its Adam is torch's fused one.

The optimizer is Adam; `pyro.optim.Adam` gives each parameter its own. By hand it is one for all, in the plain form and fused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import pyro
import torch
from peers import pyro_categorical_vae, torch_categorical_vae
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from timing import in_turn, line, ratio
from torch import Tensor

from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import relax
from pyrovae.inference import Variational
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.models import CategoricalVAE

TEMPERATURE, STEPS = 0.5, 5


def by_hand(x: Tensor, *, fused: bool) -> Callable[[], object]:
    """Steps of the plain loop."""
    net = torch_categorical_vae.Autoencoder()
    step = torch_categorical_vae.make_step(net, TEMPERATURE, torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused))
    return lambda: [float(step(x)) for _ in range(STEPS)]


def by_pyro(x: Tensor) -> Callable[[], object]:
    """Steps of Pyro's distributions."""
    program = pyro_categorical_vae.Program(TEMPERATURE)
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return lambda: [svi.step(x) for _ in range(STEPS)]


def by_ours(x: Tensor) -> Callable[[], object]:
    """Steps of our programs through the same SVI."""
    model = relax(CategoricalVAE(), TEMPERATURE)
    svi = SVI(model, AmortizedMeanField(model), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return lambda: [svi.step(x) for _ in range(STEPS)]


def by_fit(x: Tensor, method: Callable[..., Variational]) -> Callable[[], object]:
    """Steps of `Variational.fit`."""
    model = CategoricalVAE()
    fit = method(AmortizedMeanField(model), optim=partial(torch.optim.Adam, lr=1e-3))
    run = Optimization(fit, model, (x,), {}, learn_model=True)
    run.__enter__()
    return lambda: [run.step(step) for step in range(STEPS)]


def main(repeats: int = 40) -> None:
    """Time all, and print the ratios."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(is_validate=False)
    x = torch.bernoulli(torch.full((100, 784), 0.13))
    jobs = {
        "PyTorch by hand": by_hand(x, fused=False),
        "PyTorch by hand, fused Adam": by_hand(x, fused=True),
        "Pyro alone, SVI": by_pyro(x),
        "ours, stock SVI": by_ours(x),
        "ours, Variational.fit, soft": by_fit(
            x, partial(Variational, elbo=Trace_ELBO(), temperature=TEMPERATURE, capture="off")
        ),
        "ours, Variational.fit, ReinMax": by_fit(
            x, partial(Variational, elbo=TraceMeanField_ELBO(), surrogate="reinmax", capture="off")
        ),
    }
    seconds = in_turn(jobs, repeats, time.process_time)
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, 1 thread, float32; {STEPS} steps, {repeats} rounds")
    for name, values in seconds.items():
        print(line(name, [value / STEPS for value in values]))
    ours = seconds["ours, stock SVI"]
    print(f"  ours / Pyro alone, both by stock SVI: {ratio(ours, seconds['Pyro alone, SVI'], digits=2)}")
    print(f"  ours by stock SVI / by hand: {ratio(ours, seconds['PyTorch by hand'], digits=2)}")
    for kind in ("soft", "ReinMax"):
        fit = seconds[f"ours, Variational.fit, {kind}"]
        print(f"  Variational.fit, {kind} / by hand, fused: {ratio(fit, seconds['PyTorch by hand, fused Adam'], digits=2)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
