"""Exact EM of a 784-20 belief net on all 60,000 binarized MNIST images, beside variational learning of the same net.

    PYROVAE_DATA=... python benchmarks/belief_net_em.py run --method em --iterations 40
    PYROVAE_DATA=... python benchmarks/belief_net_em.py run --method reinmax --budget 500
    python benchmarks/belief_net_em.py table

Every run is a process of its own, starts from the same net (biases from the data, weights N(0, 0.01)) and is judged by the
exact log p(x) of the 10,000 test images, a sum over all 2^20 codes. The budget of the variational runs is in seconds of the
processor, as other work on a machine lengthens them less than those of the clock. Each run adds lines to
results/belief_net_em.jsonl; `table` writes results/belief_net_em.md from them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from timing import _status
from torch import Tensor

from pyrovae import data
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import EM, Exact, Variational
from pyrovae.inference.fit import versions
from pyrovae.models import SigmoidBeliefNet

HIDDEN, BATCH, RATE = 20, 100, 3e-3
RESULTS = Path(__file__).parent / "results"
LEARNERS: dict[str, dict[str, Any]] = {
    "reinmax": {"surrogate": "reinmax", "elbo": pyro.infer.Trace_ELBO()},
    "relaxation": {"temperature": 0.5, "elbo": pyro.infer.Trace_ELBO()},
    "score function": {"elbo": pyro.infer.Trace_ELBO(num_particles=10, vectorize_particles=True)},
}


def belief_net(x: Tensor, seed: int) -> SigmoidBeliefNet:
    """The start of every run."""
    torch.manual_seed(seed)
    net = SigmoidBeliefNet(x.shape[1], HIDDEN)
    with torch.no_grad():
        net.weights[0].normal_(0, 0.1)
        net.biases[0].copy_(((x.sum(0) + 1) / (len(x) + 2)).logit())
    return net


class Watched:
    """An exact E-step that tells every bound and the time it took to get there."""

    def __init__(self, settings: dict[str, Any], out: Path) -> None:
        self.settings, self.out = settings, out
        self.start, self.cpu, self.step = time.perf_counter(), time.process_time(), 0

    def infer(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The exact posterior."""
        posterior = Exact().infer(model, *args, **kwargs)
        assert posterior.log_evidence is not None
        record = {"step": self.step, "train": float(posterior.log_evidence.double().mean())}
        self.step += 1
        _write(self.out, self.settings | record | self.spent())
        return posterior

    def spent(self) -> dict[str, float]:
        """Seconds since the start, of the clock and of the processor, and the peak memory of the process."""
        wall, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        return {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": _status("VmHWM"), "load": os.getloadavg()[0]}


def run(method: str, iterations: int, budget: float, seed: int, threads: int, out: Path) -> None:
    """One learner, from the common start to its exact test log p(x)."""
    torch.set_num_threads(threads)
    x = torch.cat([data.load("mnist", split=split, binarize="fixed") for split in ("train", "validation")])
    test = data.load("mnist", split="test", binarize="fixed")
    net = belief_net(x, seed)
    settings = {"method": method, "seed": seed, "threads": threads}
    watch = Watched(settings, out)
    own: dict[str, Any] = {}
    if method == "em":
        EM(watch, iterations).fit(net, x)
        spent = watch.spent()
    else:
        guide = AmortizedMeanField(net)
        learner = partial(_learner, method, rows=x.shape[0])
        spent_at = []
        for steps in (100, 300):  # their difference is free of what every fit takes once
            trial_net, trial_guide = copy.deepcopy((net, guide))
            cpu = time.process_time()
            learner(trial_guide, steps, log_rows=100).fit(trial_net, x)
            spent_at.append(time.process_time() - cpu)
        steps = max(100, int(budget / (spent_at[1] - spent_at[0]) * 200))
        watch = Watched(settings, out)
        learning = learner(guide, steps, log_rows=2000)
        learning.fit(net, x)
        spent = watch.spent()
        bound = learning.infer(net, test)
        assert bound.log_evidence is not None
        stderr = torch.as_tensor(bound.stderr).expand(len(test))
        own = {
            "steps": steps,
            "test_bound": float(bound.log_evidence.double().mean()),
            "test_bound_se": float(stderr.double().square().sum().sqrt() / len(test)),
        }
    exact = {name: _log_likelihood(net, rows) for name, rows in (("train", x), ("test", test))}
    spread = exact["test"].std() / len(test) ** 0.5
    _write(
        out,
        settings
        | {"step": "end", "train": float(exact["train"].mean()), "test": float(exact["test"].mean()), "test_se": float(spread)}
        | own
        | spent
        | {"versions": versions()},
    )


def _learner(method: str, guide: Any, steps: int, *, rows: int, log_rows: int) -> Variational:
    return Variational(
        guide,
        optim=partial(torch.optim.Adam, lr=RATE),
        scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: max(0.02, 1 - step / steps)),
        batch_size=min(BATCH, rows),
        num_steps=steps,
        log_every=steps,
        log_rows=log_rows,
        num_samples=20,
        **LEARNERS[method],
    )


def _log_likelihood(net: SigmoidBeliefNet, x: Tensor) -> Tensor:
    log_evidence = Exact().infer(net, x).log_evidence
    assert log_evidence is not None
    return log_evidence.double()


def table(out: Path) -> str:
    """The report, from the lines of all runs."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        runs.setdefault((record["method"], record["seed"]), []).append(record)
    lines = [
        "# A 784-20 belief net on MNIST: exact EM beside variational learning",
        "",
        '60,000 training and 10,000 test images, each pixel drawn once from its grey level (`binarize="fixed"`); nats per',
        "image. log p(x) is exact, a sum over all 2^20 codes, float32 parameters, float64 sums; ± is the error over the",
        "test images. One start, no validation: later iterations still improve. Own bounds of variational runs: 20 draws a",
        "test image; Adam, rate 3e-3 falling linearly, batches of 100. Learners are to be compared at equal CPU seconds; those",
        "of the clock grow with what else runs (load: the average at the end).",
        "",
        "| learner | seed | train log p(x) | test log p(x) | own bound | CPU s | wall s | load | threads | peak GB | steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (method, seed), found in runs.items():
        end = found[-1]
        done = end["step"] == "end"
        steps = end.get("steps", len(found) - 1 - done)
        test = f"{end['test']:.2f} ± {end['test_se']:.2f}" if done else "(not at its end)"
        bound = f"{end['test_bound']:.2f} ± {end['test_bound_se']:.2f}" if "test_bound" in end else ""
        lines.append(
            f"| {method} | {seed} | {end['train']:.2f} | {test} | {bound} | {end['cpu_seconds']:.0f} | {end['seconds']:.0f} | "
            f"{end.get('load', float('nan')):.0f} | {end['threads']} | {end['peak_bytes'] / 1e9:.2f} | {steps} |"
        )
    for (method, seed), found in runs.items():
        steps_ = [record for record in found if method == "em" and record["step"] != "end"]
        if len(steps_) < 2:
            continue
        pairs = list(itertools.pairwise(steps_))
        cpu = sorted(b["cpu_seconds"] - a["cpu_seconds"] for a, b in pairs)
        wall = sorted(b["seconds"] - a["seconds"] for a, b in pairs)
        smallest = min(b["train"] - a["train"] for a, b in pairs)
        lines += [
            "",
            f"EM, seed {seed}: {len(pairs)} iterations, {cpu[len(cpu) // 2]:.1f} CPU seconds an iteration by median "
            f"({cpu[0]:.1f} to {cpu[-1]:.1f}), {wall[len(wall) // 2]:.1f} of the clock ({wall[0]:.1f} to {wall[-1]:.1f}); "
            f"smallest step of the train log p(x) {smallest:+.2g} nats. Train log p(x) by iteration:",
            "",
            ", ".join(f"{record['train']:.2f}" for record in steps_),
        ]
    return "\n".join(lines) + "\n"


def _write(out: Path, record: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--method", choices=["em", *LEARNERS], default="em")
    parser.add_argument("--iterations", type=int, default=40, help="of EM")
    parser.add_argument("--budget", type=float, default=500, help="CPU seconds of a variational run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "belief_net_em.jsonl")
    options = parser.parse_args()
    if options.command == "run":
        run(options.method, options.iterations, options.budget, options.seed, options.threads, options.out)
    else:
        report = table(options.out)
        (RESULTS / "belief_net_em.md").write_text(report)
        print(report)
