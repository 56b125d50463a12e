"""How fast captured SVI is, and what it costs: against stock Pyro, PyTorch by hand, `torch.compile` and NumPyro.

    PYROVAE_DATA=… python benchmarks/speed.py [part ...] [--rounds N] [--device D] [--threads T] [--json FILE]

The programs: CategoricalVAE 784-512-256-30x10, relaxed at temperature 0.5, and GaussianVAE 784-400-20, batch 100, float32,
`Trace_ELBO`, Adam at 1e-3, all from the same first parameters, on the same minibatches, in one process. A round gives every
contestant a turn: one step untimed, then ten timed together (fifty on a GPU), the device idle before and after. A ratio is
the median over rounds of the quotients of two contestants' turns in one round, with the range of these.

- `ratios`: a step of each. Stock SVI is as shipped, validation on, a float a step. By hand is a loop without any library,
  its KL in closed form, which is cheaper than `Trace_ELBO`; "densities" has the same terms as `Trace_ELBO`. Ours is
  `.step_async` unless said otherwise; a self-check each 200 steps is within its time. Losses are read by stock SVI and by
  `.step` alone. "Pyro's program" has Pyro's distributions and a guide written by hand, and nothing of ours.
- `score`: a belief net of 200 bits, `AmortizedMeanField`, the score function, four vectorised particles.
- `growth`: a step by batch, latents and layers. *Overhead* is the time of a step of the same program at toy size (8 pixels,
  hidden layers of 4, two latents of two categories, batch 2), with the same calls and operations and nothing to compute; its
  share is that time over the step's. Starting threads, which toy operations do without, is not in it.
- `gradients`: at one seed, against eager Pyro: bitwise for fx, within 1e-5 for Inductor, |difference| / |gradient| in norm,
  parameter by parameter, the largest shown. On a GPU, where sums may be taken in any order, 1e-5 for all.
- `check`: the time of steps in which the program ran in Python beyond that of the median step, over the time of all steps,
  from the sixth to the 2005th.
- `compile`: seconds of the first 12 steps beyond those of twelve later ones, each in a fresh process, torch's cache empty
  and then full: capture and compilation, one step with validation, and a self-check.
- `peers`: whether the peers compute the same. Mean loss of 200 minibatches, nothing moving, at the first parameters and at
  those that 300 steps of stock SVI lead to: the differences, minibatch by minibatch, are to be within five standard errors
  of 0. Then the mean loss of the last 100 of 300 steps of their own: within 2% of stock SVI's. The loop by hand with the KL
  in closed form is compared with `TraceMeanField_ELBO`, which takes that KL too.

MNIST in fixed binary form where PYROVAE_DATA has it, else random bits with probability 0.13. NumPyro takes as many
processors as `--threads`, by `NPROC`. On a GPU "ours" is the CUDA graph and not Inductor, and compiled by hand means
`mode="reduce-overhead"`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from agreement import gradients, peers
from contestants import (
    Contestant,
    Problem,
    by_hand,
    captured,
    captured_pyro,
    fit,
    numpyro,
    numpyro_lacks,
    stock,
    stock_pyro,
)
from race import LR, Bench
from timing import in_fresh_process
from torch import Tensor

ASKED = {"cpu": (2.2, 1.35, 1.05, 1.0), "cuda": (10.0, 4.0, 1.10, 1.0)}  # stock, by hand, by hand compiled, NumPyro


def ratios(bench: Bench) -> None:
    """A step of every contestant, and the four ratios asked."""
    ours = f"ours, {bench.best}"
    against_stock, against_hand, against_compiled, against_jax = ASKED["cuda" if bench.on_gpu else "cpu"]
    for family in ("categorical", "gaussian"):
        problem = bench.problems[family]
        make = partial(_on, problem, bench.rows())
        makers = {
            "stock SVI": make(stock),
            "stock SVI, Pyro's program": make(stock_pyro),
            "by hand, Adam": make(by_hand),
            "by hand, fused Adam": make(by_hand, fused=True),
            "by hand, densities, Adam": make(by_hand, densities=True),
            "by hand, compiled, Adam": make(by_hand, compiled=True),
            "by hand, compiled, fused Adam": make(by_hand, compiled=True, fused=True),
            "NumPyro, jit": make(numpyro),
            "ours, fx": make(captured, backend="fx"),
            ours: make(captured, backend=bench.best),
            f"{ours}, .step": make(captured, backend=bench.best, read=True),
            f"{ours}, Pyro's program": make(captured_pyro, backend=bench.best),
            f"{ours}, Variational.fit": make(fit, backend=bench.best),
        }
        print(f"\n{family}, batch 100")
        if family == "gaussian":
            del makers["by hand, densities, Adam"]
        if lacks := numpyro_lacks(bench.device):
            print(f"  no NumPyro: {lacks}")
            del makers["NumPyro, jit"]
        times = bench.race(makers)
        bench.table("ratios", family, times)
        for slow, fast, limit in (
            ("stock SVI", ours, {"least": against_stock}),
            ("by hand, Adam", ours, {"least": against_hand}),
            (ours, "by hand, compiled, Adam", {"most": against_compiled}),
            (ours, "by hand, compiled, fused Adam", {"most": against_compiled}),
            ("NumPyro, jit", ours, {"least": against_jax}),
        ):
            bench.verdict("ratios", f"{slow} / {fast}", times, slow, fast, **limit)


def score(bench: Bench) -> None:
    """The belief net."""
    make, ours = partial(_on, bench.problems["belief net"], bench.rows()), f"ours, {bench.best}"
    makers = {
        "stock SVI": make(stock),
        "eager, one optimizer (backend='off')": make(captured, backend="off"),
        "ours, fx": make(captured, backend="fx"),
        ours: make(captured, backend=bench.best),
    }
    print(f"\nbelief net 784-200 on {bench.data}, score function, 4 particles, batch 100")
    times = bench.race(makers)
    bench.table("score", "belief net", times)
    for name in ("ours, fx", ours):
        bench.verdict("score", f"stock SVI / {name}", times, "stock SVI", name, least=2.0)


def growth(bench: Bench) -> None:
    """Time by batch, latents and layers."""
    layers = {1: (512,), 2: (512, 256), 4: (512, 256, 256, 256)}
    cases = [(batch, 30, 2) for batch in (100, 250, 1000, 4096)]
    cases += [(100, 10, 2), (100, 100, 2), (100, 30, 1), (100, 30, 4)]
    toys = {}
    print(f"\ngrowth, categorical{'stock SVI':>24}{'ours, ' + bench.best:>19}{'ratio':>10}{'overhead: stock':>19}{'ours':>8}")
    for depth in layers:
        problem = Problem("categorical", 2, (4,) * depth, 8, 2, bench.device)
        toys[depth] = _pair(bench, problem, bench.rows(2, visible=8))
        print(f"  {f'toy size, {depth} hidden':<28}{toys[depth][0]:10.3f} ms{toys[depth][1]:16.3f} ms")
    for batch, latents, depth in cases:
        pair = _pair(bench, Problem("categorical", latents, layers[depth], device=bench.device), bench.rows(batch, 4))
        share = [toy / whole for toy, whole in zip(toys[depth], pair, strict=True)]
        what = f"batch {batch}, {latents}x10, {depth} hidden"
        print(f"  {what:<28}{pair[0]:10.3f} ms{pair[1]:16.3f} ms{pair[0] / pair[1]:9.2f}x{share[0]:19.0%}{share[1]:8.0%}")
        bench.write("growth", batch=batch, latents=latents, layers=depth, ms=pair, overhead=share)


def check(bench: Bench, steps: int = 2000) -> None:
    """What the self-check costs."""
    print("\nself-check")
    for family, problem in bench.problems.items():
        for backend in ("fx", bench.best):
            one, seconds, eager = captured(problem, bench.rows(), LR, backend=backend), [], []
            for i in range(5 + steps):
                before, start = len(one.python_runs), time.perf_counter()
                one.step(i)
                one.finish()
                if i >= 5:
                    seconds.append(time.perf_counter() - start)
                    if len(one.python_runs) > before:
                        eager.append(i + 1)
            ordinary = statistics.median(seconds)
            share = sum(seconds[i - 6] - ordinary for i in eager) / sum(seconds)
            measured = f"{share:.2%} ({len(eager)} of {steps} steps: {', '.join(map(str, eager[:3]))}, …)"
            met = bool(eager) and share <= 0.02
            bench.report("check", f"{family}, {backend}", measured, "<= 2%", met=met, share=share, steps=eager)


def compile_(bench: Bench) -> None:
    """Seconds until replay is under way."""
    print("\nseconds before the ordinary step, in a fresh process")
    for family in bench.problems:
        whos = ["fx", bench.best] + [who for who in ("by hand, compiled", "NumPyro, jit") if family != "belief net"]
        if numpyro_lacks(bench.device) and "NumPyro, jit" in whos:
            whos.remove("NumPyro, jit")
        for who in whos:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                options = ("--device", bench.device, "--threads", str(torch.get_num_threads()), "--start-up", family, who)
                found = [
                    json.loads(in_fresh_process(__file__, *options)) for _ in range(1 if who in ("fx", "NumPyro, jit") else 2)
                ]
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            shown = " s, then ".join(f"{seconds:.1f}" for seconds in found)
            print(f"  {f'{family}, {who}':<44} {shown} s{' with the cache' if len(found) == 2 else ''}")
            bench.write("compile", program=family, who=who, seconds=found)


def start_up(bench: Bench, family: str, who: str) -> None:
    """In a process of its own: seconds of the first steps beyond those of later ones."""
    makers: dict[str, Callable[..., Contestant]] = {
        "by hand, compiled": partial(by_hand, compiled=True),
        "NumPyro, jit": numpyro,
    }
    rows, seconds = bench.rows(), []
    start = time.perf_counter()
    one = makers.get(who, partial(captured, backend=who))(bench.problems[family], rows, LR)
    making = time.perf_counter() - start
    for i in range(60):
        start = time.perf_counter()
        one.step(i)
        one.finish()
        seconds.append(time.perf_counter() - start)
    print(json.dumps((making if who == "NumPyro, jit" else 0.0) + sum(seconds[:12]) - 12 * statistics.median(seconds[12:])))


def _pair(bench: Bench, problem: Problem, rows: list[Tensor]) -> tuple[float, float]:
    """Median milliseconds a step of stock SVI and of ours."""
    makers = {"stock": _on(problem, rows, stock), "ours": _on(problem, rows, captured, backend=bench.best)}
    times = bench.race(makers, max(5, bench.rounds // 2), seconds=0.25)
    return 1e3 * statistics.median(times["stock"]), 1e3 * statistics.median(times["ours"])


def _on(problem: Problem, rows: list[Tensor], make: Callable[..., Contestant], **options: Any) -> Callable[[], Contestant]:
    return partial(make, problem, rows, LR, **options)


PARTS: dict[str, Callable[[Bench], None]] = {
    "ratios": ratios,
    "score": score,
    "growth": growth,
    "gradients": gradients,
    "check": check,
    "compile": compile_,
    "peers": peers,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu", help="of torch: cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="a file that gets every figure, a line each")
    parser.add_argument("--start-up", nargs=2, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if unknown := set(o.parts) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if not __debug__:
        parser.error("expected Python without -O, which would switch stock Pyro's validation off")
    torch.set_num_threads(o.threads)
    os.environ["NPROC"] = str(o.threads)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if o.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    bench = Bench(o)
    if o.start_up:
        start_up(bench, *o.start_up)
    else:
        print(bench.settings())
        bench.write("settings", settings=bench.settings())
        for part in o.parts or PARTS:
            PARTS[part](bench)
