"""AIS for log Z: against `rbms` 0.5.0 on 784 x 500 units, and how often its intervals and bounds miss on RBMs of 20 x 10.

    pip install rbms==0.5.0
    python benchmarks/ais.py            # prints both parts, writes results/ais.txt
    python benchmarks/ais.py coverage   # one of the two, prints only

Both estimators of the first part take the same path (the model's visible biases at β = 0, linear β) with the same number of
chains and temperatures, in turn, in one process, on one thread, in float32, by the processor's seconds. The second part takes
200 RBMs for each scale s of weights and biases N(0, s²), 1000 temperatures and 100 chains, and compares with log Z by
enumeration in float64.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path

import torch
from scipy.stats import binom
from timing import in_turn, line, ratio

from pyrovae.distributions import RBM
from pyrovae.inference import AIS
from pyrovae.ops import rbm_log_partition

CHAINS, TEMPERATURES, TIMED_TEMPERATURES, REPEATS = 100, 1000, 400, 5
MACHINES, SCALES = 200, (0.3, 1.0, 2.0)
CONFIDENCE = 0.99
RESULT = Path(__file__).parent / "results" / "ais.txt"


def speed() -> list[str]:
    """The same work by `rbms` and by us."""
    from peers.rbms_ais import log_partition

    torch.set_num_threads(1)
    torch.manual_seed(0)
    W, b, c = torch.randn(784, 500) * 0.1, torch.randn(784) - 2, torch.randn(500)
    ais, rbm = AIS(CHAINS, TIMED_TEMPERATURES), RBM(W, b, c, log_partition=0.0)
    ours, theirs = [], []
    jobs = {
        "rbms 0.5.0": lambda: theirs.append(log_partition(W, b, c, CHAINS, TIMED_TEMPERATURES)),
        "AIS": lambda: ours.append(float(ais.log_partition(rbm).log_z)),
    }
    seconds = in_turn(jobs, REPEATS, time.process_time)
    found = [f"784 x 500 units, {CHAINS} chains, {TIMED_TEMPERATURES} linear temperatures, float32, 1 thread, CPU time"]
    found += [line(name, seconds[name]) for name in jobs]
    found.append(f"  ratio {ratio(seconds['rbms 0.5.0'], seconds['AIS'])}")
    for name, values in (("rbms 0.5.0", theirs), ("AIS", ours)):
        error = statistics.stdev(values) / math.sqrt(len(values))
        found.append(f"  mean log Z of {len(values)} runs, {name:<12} {statistics.mean(values):.3f} +- {error:.3f}")
    return found


def coverage() -> list[str]:
    """Misses of the 3-sigma interval and of the sandwich, with the probability of as many at the stated rates."""
    torch.set_num_threads(1)
    ais = AIS(CHAINS, TEMPERATURES)
    found = [
        f"{MACHINES} RBMs of 20 x 10 for each s, weights and biases N(0, s^2), {CHAINS} chains, {TEMPERATURES} linear "
        "temperatures, float32",
        f"  interval: 3 sigma, nominal rate of misses {1 - math.erf(3 / math.sqrt(2)):.4f}; sandwich: stated confidence "
        f"{CONFIDENCE}",
        "  p: probability of so many misses or more at these rates; the test asks for p > 1e-3",
        "    s   misses (low, high)      p    width   ESS min   sandwich misses      p    its width   reverse - forward   "
        "seconds",
    ]
    for s in SCALES:
        torch.manual_seed(int(10 * s))
        begin = time.perf_counter()
        low, high, outside, widths, wide, gaps, ess = 0, 0, 0, [], [], [], []
        for _ in range(MACHINES):
            W, b, c = torch.randn(20, 10) * s, torch.randn(20) * s, torch.randn(10) * s
            log_z = float(rbm_log_partition(W.double(), b.double(), c.double()))
            estimate = ais.log_partition(RBM(W, b, c))
            both = ais.sandwich(RBM(W, b, c), confidence=CONFIDENCE)
            low, high = low + int(log_z < float(estimate.lower)), high + int(log_z > float(estimate.upper))
            outside += int(not float(both.lower) <= log_z <= float(both.upper))
            widths.append(float(estimate.upper - estimate.lower))
            wide.append(float(both.upper - both.lower))
            gaps.append(float(both.gap))
            ess.append(float(estimate.ess))
        seconds = time.perf_counter() - begin
        nominal = float(binom.sf(low + high - 1, MACHINES, 1 - math.erf(3 / math.sqrt(2))))
        stated = float(binom.sf(outside - 1, MACHINES, 1 - CONFIDENCE))
        found.append(
            f"  {s:3.1f}   {low + high:6d} ({low}, {high})      {nominal:7.4f}   {statistics.median(widths):.3f}   "
            f"{min(ess):7.1f}   {outside:10d}     {stated:7.4f}        {statistics.median(wide):.3f}   "
            f"{statistics.mean(gaps):17.5f}   {seconds:7.0f}"
        )
    return found


def main() -> None:
    """Both parts, or the one that is named."""
    parts = {"speed": speed, "coverage": coverage}
    chosen = sys.argv[1:] or list(parts)
    lines = [f"torch {torch.__version__}"]
    for name in chosen:
        lines += ["", *parts[name]()]
        print("\n".join(lines[1:] if name == chosen[0] else lines[-1:]), flush=True)
    if len(chosen) == len(parts):
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
