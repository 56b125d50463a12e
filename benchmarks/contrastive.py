"""A PCD epoch of a 784-500 RBM on MNIST, 100 chains, minibatches of 100, float32, against scikit-learn and rbms 0.5.0.

    pip install -e '.[benchmark]'
    python benchmarks/contrastive.py

PCD-1 against scikit-learn's `BernoulliRBM` (float32 input keeps float32 there), PCD-10 against `rbms`' `fit_batch_pcd` with its
own loop, centred there and here. Each method runs in turn, in one process; medians of pairwise ratios. `rbms` gets a
fresh permutation of all rows at every update, which is its loop.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import in_turn, line, ratio

from pyrovae import data
from pyrovae.inference import ContrastiveDivergence
from pyrovae.models import RestrictedBoltzmannMachine

HIDDEN, BATCH, CHAINS, RATE = 500, 100, 100, 0.05
RESULT = Path(__file__).parent / "results" / "contrastive.txt"


def ours(x: torch.Tensor, k: int, *, centered: bool = True) -> None:
    """One epoch, records at both ends and the final check of the chains included."""
    model = RestrictedBoltzmannMachine(x.shape[1], HIDDEN)
    method = ContrastiveDivergence(
        k, num_epochs=1, batch_size=BATCH, num_chains=CHAINS, centered=centered, optim=partial(torch.optim.SGD, lr=RATE)
    )
    method.fit(model, x)


def scikit_learn(x: torch.Tensor) -> Callable[[], object]:
    """PCD-1, chains as many as rows in a minibatch; no shuffling."""
    from sklearn.neural_network import BernoulliRBM

    array = x.numpy()
    return lambda: BernoulliRBM(n_components=HIDDEN, learning_rate=RATE, batch_size=BATCH, n_iter=1, random_state=0).fit(array)


def main() -> None:
    """Both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of the training images, one epoch of them")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="count the processor's seconds: for a busy machine, with one thread")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu else time.perf_counter
    warnings.filterwarnings("ignore", message=".*persistent chains have not mixed")
    x = (data.load("mnist")[: options.rows] > 0.5).float()
    lines = [f"784-{HIDDEN}, {CHAINS} chains, batch {BATCH}, {len(x)} rows an epoch, float32, {options.threads} threads, "]
    lines[0] += "processor's seconds" if options.cpu else "wall time"
    jobs: dict[str, Callable[[], object]] = {
        "pyrovae PCD-1, centred": partial(ours, x, 1),
        "pyrovae PCD-1, plain": partial(ours, x, 1, centered=False),
        "scikit-learn PCD-1": scikit_learn(x),
    }
    seconds = in_turn(jobs, options.repeats, clock)
    lines += [line(name, found) for name, found in seconds.items()]
    base = seconds["scikit-learn PCD-1"]
    for name in list(jobs)[:2]:
        lines.append(f"  {name} / scikit-learn: {ratio(seconds[name], base, 2)}")
    try:
        from peers import rbms_pcd
    except ImportError as error:
        lines.append(f"  rbms is not installed ({error}); pip install rbms==0.5.0")
    else:
        part = x[: options.rows // 4]
        jobs = {"pyrovae PCD-10": partial(ours, part, 10), "rbms PCD-10": rbms_pcd.epoch(part, HIDDEN, BATCH, CHAINS, 10)}
        seconds = in_turn(jobs, options.repeats, clock)
        lines += [f"  ({len(part)} rows an epoch)"] + [line(name, found) for name, found in seconds.items()]
        lines.append(f"  rbms / pyrovae: {ratio(seconds['rbms PCD-10'], seconds['pyrovae PCD-10'], 2)}")
    print("\n".join(lines))
    RESULT.write_text("\n".join([*lines, "python benchmarks/contrastive.py " + " ".join(sys.argv[1:])]) + "\n")


if __name__ == "__main__":
    main()
