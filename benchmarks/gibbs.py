"""`Gibbs` against numpyro's `DiscreteGibbs` under `jax.vmap` over data and chains, in datum-sweeps per second.

    pip install -e '.[benchmark]'
    python benchmarks/gibbs.py            # all of it
    python benchmarks/gibbs.py layers     # only the sweeps of declared layers against the program's log joint

One datum-sweep updates every bit of one datum in one chain once. Both run on one thread (numpyro is faster so here), in
turn, in one process; compilation and the making of tables are left out on numpyro's side and counted on ours.
"""

from __future__ import annotations

import os

os.environ.setdefault("NPROC", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import time

import torch
from exact import HIDDEN, ROWS, VISIBLE, net, one_layer
from scipy.stats import t as student_t

from pyrovae.inference import Exact, Gibbs
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.models import SigmoidBeliefNet

CHAINS, SWEEPS, REPEATS = 4, 500, 5


def ours(max_bytes: int, sweeps: int) -> tuple[float, DrawsPosterior]:
    """Datum-sweeps per second of a whole `Gibbs.infer`, the table and the decoding of draws included."""
    weight, bias, prior, x = net(VISIBLE, HIDDEN, ROWS)
    start = time.perf_counter()
    posterior = Gibbs(sweeps, CHAINS, 0, max_bytes=max_bytes).infer(one_layer(weight, bias, prior), x)
    return CHAINS * ROWS * sweeps / (time.perf_counter() - start), posterior


def largest_z(max_bytes: int, rows: int) -> tuple[float, float]:
    """Largest |z| of the marginals, and its Bonferroni bound at a false-alarm rate of 1e-5.

    The standard error is that of the means of independent chains (Student's t); a bit whose chains hardly moved gets that of
    independent draws of the exact law at least.
    """
    weight, bias, prior, x = net(VISIBLE, HIDDEN, ROWS)
    model, x = one_layer(weight, bias, prior), x[:rows]
    exact = Exact().infer(model, x).marginals["h"]
    chains, sweeps = 64, 400
    draws = Gibbs(sweeps, chains, 200, max_bytes=max_bytes).infer(model, x).draws
    assert draws is not None
    means = draws["h"].mean(1)  # [chain, N, H]
    error = torch.maximum(means.std(0) / chains**0.5, (exact * (1 - exact) / (chains * sweeps)).sqrt())
    z = float(((means.mean(0) - exact).abs() / error).nan_to_num(0.0).max())
    return z, float(student_t.isf(1e-5 / exact.numel() / 2, chains - 1))


def layers_against_program() -> None:
    """Sweeps of declared layers beside those by the program's log joint, on nets that no table serves."""
    print(f"torch {torch.__version__}, 1 thread; declared layers against the program's log joint")
    for visible, hidden, rows, dtype in ((784, [200], 20, torch.float32), (784, [200, 100], 20, torch.float32)):
        torch.manual_seed(0)
        model = SigmoidBeliefNet(visible, hidden).to(dtype)
        x = model.sample(rows)
        rates: dict[str, list[float]] = {}
        for repeat in range(REPEATS + 1):  # the first is a warm-up
            for name, declared, sweeps in (("layers", True, 20), ("program", False, 2)):
                start = time.perf_counter()
                posterior = Gibbs(sweeps, CHAINS, 0, max_bytes=0, declared=declared).infer(model, x)
                rate = CHAINS * rows * sweeps / (time.perf_counter() - start)
                assert posterior.diagnostics["route"] == name
                if repeat:
                    rates.setdefault(name, []).append(rate)
        shape = "-".join(map(str, (visible, *hidden)))
        print(f"  {shape} belief net, {str(dtype).removeprefix('torch.')}, {rows} rows, {CHAINS} chains")
        for name, found in rates.items():
            middle, low, high = statistics.median(found), min(found), max(found)
            print(f"    by the {name:<10} {middle:12,.0f} datum-sweeps/s   ({low:,.0f} to {high:,.0f})")
        pairs = sorted(a / b for a, b in zip(rates["layers"], rates["program"], strict=True))
        print(f"    layers / program: {statistics.median(pairs):.1f} ({pairs[0]:.1f} to {pairs[-1]:.1f})")


def main() -> None:
    """All comparisons."""
    from peers import numpyro_gibbs

    weight, bias, prior, x = net(VISIBLE, HIDDEN, ROWS)
    print(f"torch {torch.__version__}, 1 thread, float64; {VISIBLE}-{HIDDEN} belief net, {ROWS} rows, {CHAINS} chains")
    rates: dict[str, list[float]] = {}
    for repeat in range(REPEATS + 1):  # the first is a warm-up
        measured = {
            "ours, table of the joint": ours(2**28, SWEEPS)[0],
            "ours, program's log joint": ours(0, 20)[0],
        }
        for likelihood in ("joint_table", "code_table", "bernoulli"):
            measured[f"numpyro, {likelihood}"] = numpyro_gibbs.datum_sweeps_per_second(
                weight, bias, prior, x, CHAINS, 100, likelihood=likelihood, num_runs=1
            )[0]
        if repeat:
            for name, rate in measured.items():
                rates.setdefault(name, []).append(rate)
    for name, found in rates.items():
        print(f"  {name:<28} {statistics.median(found):12,.0f} datum-sweeps/s   ({min(found):,.0f} to {max(found):,.0f})")
    for a, b in (
        ("ours, table of the joint", "numpyro, joint_table"),
        ("ours, table of the joint", "numpyro, code_table"),
        ("ours, program's log joint", "numpyro, bernoulli"),
    ):
        pairs = sorted(x / y for x, y in zip(rates[a], rates[b], strict=True))
        print(f"  {a} / {b}: {statistics.median(pairs):.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})")
    for name, size, rows in (("table", 2**28, ROWS), ("program", 0, 16)):
        z, bound = largest_z(size, rows)
        print(f"  largest |z| of {rows * HIDDEN} marginals, {name}: {z:.2f}; Bonferroni bound at 1e-5: {bound:.2f}")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if sys.argv[1:] != ["layers"]:
        main()
    layers_against_program()
