"""An RBM with 500 hidden units on binarized MNIST: learned by centred PCD, judged by AIS with an interval.

    python benchmarks/rbm_mnist.py train --epochs 200 --weights rbm_mnist.pt
    python benchmarks/rbm_mnist.py train --epochs 30 --rate 0.07 --start rbm_mnist.pt --weights rbm_mnist.pt  # goes on
    python benchmarks/rbm_mnist.py evaluate --weights rbm_mnist.pt

Training binarizes the grey training images afresh at every step (a pixel is 1 with probability grey level); the learning rate
falls linearly to 0. Evaluation uses one fixed binarization, by a generator of seed 0, of all test and of the first 10,000
training images. log p(x) computed with the log Z of AIS overstates in expectation; the interval is that of log Z, 3 sigma.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pyrovae
from pyrovae import data
from pyrovae.inference import ContrastiveDivergence
from pyrovae.models import RestrictedBoltzmannMachine

HIDDEN, CHAINS, BATCH = 500, 100, 100
RESULT = Path(__file__).parent / "results" / "rbm_mnist.md"


def train(epochs: int, k: int, rate: float, weights: Path, start: Path | None) -> None:
    """Learn, and keep the weights of every fifth epoch, replacing the file in one step."""
    torch.manual_seed(0)
    x = data.load("mnist")
    rbm = RestrictedBoltzmannMachine(x.shape[1], HIDDEN)
    rbm.initialize_bias(data.binarize(x))
    runs: list[dict[str, Any]] = []
    if start is not None:
        earlier = torch.load(start)
        rbm.load_state_dict(earlier["state"])
        runs = earlier["runs"]
    steps = epochs * (len(x) // BATCH)

    def keep(record: Mapping[str, Any]) -> None:
        account = {
            "epochs": epochs,
            "k": k,
            "rate": rate,
            "rows": len(x),
            "done": record["epoch"],
            "seconds": record["seconds"],
        }
        new = weights.with_suffix(".new")
        torch.save({"state": rbm.state_dict(), "runs": [*runs, account]}, new)
        os.replace(new, weights)
        print(json.dumps(dict(record)), flush=True)

    ContrastiveDivergence(
        k,
        num_chains=CHAINS,
        batch_size=BATCH,
        num_epochs=epochs,
        optim=partial(torch.optim.SGD, lr=rate),
        scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: max(0.0, 1 - step / steps)),
        preprocess=data.binarize,
        log_every=5 * (len(x) // BATCH),
        callback=keep,
    ).fit(rbm, x)


def evaluate(weights: Path, num_chains: int, num_temperatures: int) -> None:
    """Test and training log likelihood with the interval of log Z, into the results."""
    from pyrovae.inference import AIS

    saved = torch.load(weights)
    test, training = data.load("mnist", split="test"), data.load("mnist")[:10_000]
    rbm = RestrictedBoltzmannMachine(test.shape[1], HIDDEN)
    rbm.load_state_dict(saved["state"])
    torch.manual_seed(0)
    rates = (training.sum(0) + 5) / (len(training) + 10)
    found = AIS(num_chains, num_temperatures, base=rates.logit()).log_partition(rbm)
    generator = torch.Generator().manual_seed(0)
    energies = {
        name: rbm.distribution().free_energy(data.binarize(x, generator=generator)).detach().double()
        for name, x in {"test": test, "training": training}.items()
    }
    runs = "; then ".join(
        f"{run['done']:.0f} of {run['epochs']} epochs of PCD-{run['k']} at a rate falling linearly from {run['rate']} to 0 "
        f"({run['seconds'] / 60:.0f} min)"
        for run in saved["runs"]
    )
    lines = [
        "# An RBM with 500 hidden units on binarized MNIST",
        "",
        f"Centred gradient, {CHAINS} chains that start anew with each run, minibatches of {BATCH} of "
        f"{saved['runs'][-1]['rows']} training images, binarized afresh at every step, SGD, seed 0: {runs}, on a shared core.",
        f"AIS: {num_chains} chains, {num_temperatures} evenly spaced temperatures from the base rates of the data, float32: "
        f"log Z = {float(found.log_z):.3f} "
        f"[{float(found.lower):.3f}, {float(found.upper):.3f}], ESS {float(found.ess):.1f}.",
        "",
        "| data (one fixed binarization) | rows | log p(x), nats | 3-sigma interval of log Z | standard error over rows |",
        "|---|---|---|---|---|",
    ]
    for name, energy in energies.items():
        mean = float(-energy.mean())
        values = [mean - float(z) for z in (found.log_z, found.upper, found.lower)]
        error = float(energy.std()) / len(energy) ** 0.5
        lines.append(f"| {name} | {len(energy)} | {values[0]:.2f} | {values[1]:.2f} to {values[2]:.2f} | {error:.2f} |")
    lines += [
        "",
        "AIS understates log Z in expectation, so that log p(x) is overstated in expectation: an estimate, no bound.",
        "Published, from memory: -86.3 on the test set by CD-25 (Salakhutdinov and Murray, 2008), also by AIS.",
        "",
        f"`python benchmarks/rbm_mnist.py`, pyrovae {pyrovae.__version__}, torch {torch.__version__}.",
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "evaluate"])
    parser.add_argument("--weights", type=Path, default=Path("rbm_mnist.pt"))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--temperatures", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "train":
        train(options.epochs, options.k, options.rate, options.weights, options.start)
    else:
        evaluate(options.weights, options.chains, options.temperatures)


if __name__ == "__main__":
    main()
