"""What `speed.py` compares must be the same: gradients with eager Pyro's, and what the peers compute with ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from contestants import Contestant, Problem, by_hand, captured, numpyro, numpyro_lacks, stock, stock_pyro
from pyro.infer import SVI, TraceMeanField_ELBO
from race import LR, Bench
from torch import Tensor

from pyrovae.inference import CapturedSVI


def gradients(bench: Bench) -> None:
    """Captured against eager at one seed, for every program; the largest relative difference of a parameter."""
    print("\ngradients at one seed, against eager Pyro")
    for family, problem in bench.problems.items():
        rows = bench.rows()
        model, guide, runs = problem.programs()
        eager, _ = _gradient(SVI, model, guide, problem, rows, runs)
        for backend in ("fx", "inductor"):
            ours, in_python = _gradient(partial(CapturedSVI, backend=backend), model, guide, problem, rows, runs)
            if in_python or ours.keys() != eager.keys():
                raise RuntimeError(f"expected replayed gradients of {len(eager)} parameters, got {len(ours)}, {in_python=}")
            worst = max(float((ours[k] - g).norm() / g.norm()) for k, g in eager.items() if float(g.norm()) > 0)
            exact = all(torch.equal(ours[k], g) for k, g in eager.items())
            equal = "bitwise equal" if exact else f"{worst:.1e}"
            bitwise = backend == "fx" and not bench.on_gpu
            met = exact if bitwise else worst <= 1e-5
            asked = "bitwise" if bitwise else "<= 1e-5"
            bench.report("gradients", f"{family}, {backend}", equal, asked, met=met, worst=worst, bitwise=exact)


def peers(bench: Bench) -> None:
    """The losses of all on the same minibatches: at two sets of parameters, and while they learn."""
    print("\npeers: loss minus that of stock SVI in nats a datum, at first parameters and at learned ones; after learning")
    for family in ("categorical", "gaussian"):
        problem, one_hot = bench.problems[family], family == "categorical"
        makers: dict[str, tuple[Callable[..., Contestant], dict[str, Any]]] = {
            "ours, fx": (captured, {"backend": "fx"}),
            f"ours, {bench.best}": (captured, {"backend": bench.best}),
            "stock SVI, Pyro's program": (stock_pyro, {}),
            "by hand, densities" if one_hot else "by hand": (by_hand, {"densities": one_hot}),
            "by hand, compiled": (by_hand, {"densities": one_hot, "compiled": True}),
        }
        if lacks := numpyro_lacks(problem.device):
            print(f"  no NumPyro: {lacks}")
        else:
            makers["NumPyro, jit"] = numpyro, {}
        _compare(bench, problem, stock, makers)
        if one_hot:  # the KL of the categories is that of TraceMeanField_ELBO on relaxed programs
            closed = {"by hand": (by_hand, {}), "by hand, closed form, compiled": (by_hand, {"compiled": True})}
            _compare(bench, problem, _stock_mean_field, closed)


def _compare(
    bench: Bench,
    problem: Problem,
    reference: Callable[..., Contestant],
    makers: dict[str, tuple[Callable[..., Contestant], dict[str, Any]]],
) -> None:
    rows = bench.rows(count=300)
    starts = problem, problem.learned(rows)

    def losses(make: Callable[..., Contestant], start: Problem, lr: float, steps: int = 200, **options: Any) -> np.ndarray:
        one = make(start, rows, lr, **options)
        torch.manual_seed(0)
        return np.array([float(one.step(i)) for i in range(steps)]) / len(rows[0])

    theirs = [losses(reference, start, 0.0) for start in starts]
    end = losses(reference, problem, LR, 300)[200:].mean()
    print(f"  {problem.family}, {reference.__name__.strip('_')}: {theirs[0].mean():.2f}, {theirs[1].mean():.2f}, {end:.2f}")
    for name, (make, options) in makers.items():
        differences = [losses(make, start, 0.0, **options) - their for start, their in zip(starts, theirs, strict=True)]
        found = [(float(d.mean()), float(d.std(ddof=1)) / len(d) ** 0.5) for d in differences]
        share = float(losses(make, problem, LR, 300, **options)[200:].mean() / end - 1)
        met = all(abs(mean) <= 5 * error for mean, error in found) and abs(share) <= 0.02
        measured = ", ".join(f"{mean:+.4f} ± {error:.4f}" for mean, error in found) + f", {share:+.2%}"
        bench.report("peers", f"{problem.family}, {name}", measured, "5 se, 2%", met=met, differences=found, learned=share)


def _stock_mean_field(problem: Problem, rows: list[Tensor], lr: float) -> Contestant:
    model, guide, _ = problem.programs()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), TraceMeanField_ELBO())
    return Contestant(lambda i: svi.step(rows[i % len(rows)]), lambda: None)


def _gradient(
    make: Callable[..., Any], model: Any, guide: Any, problem: Problem, rows: list[Tensor], runs: list[object]
) -> tuple[dict[int, Tensor], bool]:
    """The gradient of a fourth step at a fixed seed, by parameter, and whether the programs ran in Python for it."""
    found: dict[int, Tensor] = {}

    class Recorder(torch.optim.Optimizer):
        """Writes gradients down, and moves nothing."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                found.update({id(p): p.grad.clone() for p in group["params"] if p.grad is not None})

    svi = make(model, guide, pyro.optim.PyroOptim(Recorder, {}), problem.elbo())
    for seed in range(4):
        torch.manual_seed(seed)
        before = len(runs)
        svi.step(rows[seed])
    return found, len(runs) > before
