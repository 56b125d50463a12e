"""The course of `speed.py`: data, turns, and how figures are written."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from contestants import Contestant, Problem
from timing import line, ratio
from torch import Tensor

from pyrovae import data

WARM_UP = 15  # past capture, compilation and the first self-check
LR = 1e-3

Makers = dict[str, Callable[[], Contestant]]
Times = dict[str, list[float]]


class Bench:
    """The options, the data, and where the figures go."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.device, self.rounds, self.json = o.device, o.rounds, o.json
        self.on_gpu = o.device.startswith("cuda")
        self.best = "cudagraph" if self.on_gpu else "inductor"
        self.problems = {
            "categorical": Problem(device=o.device),
            "gaussian": Problem("gaussian", 20, (400,), device=o.device),
            "belief net": Problem("belief net", 200, (), device=o.device),
        }
        try:
            self.pixels, self.data = data.load("mnist", binarize="fixed", dtype=torch.float32), "MNIST"
        except FileNotFoundError:
            draws = torch.Generator().manual_seed(0)
            self.pixels, self.data = torch.bernoulli(torch.full((10_000, 784), 0.13), generator=draws), "random bits"

    def rows(self, batch: int = 100, count: int = 16, visible: int = 784) -> list[Tensor]:
        """Minibatches, the same at every call."""
        draws = torch.Generator().manual_seed(1)
        picks = [torch.randint(len(self.pixels), (batch,), generator=draws) for _ in range(count)]
        return [self.pixels[pick, :visible].to(self.device) for pick in picks]

    def race(self, makers: Makers, rounds: int | None = None, seconds: float = 1.0) -> Times:
        """Seconds a step of every contestant, a list over rounds.

        Args:
            makers: by name.
            rounds: how many; None for the option's.
            seconds: of a turn at most; it has fewer than ten (on a GPU fifty) steps where they would take longer.

        Raises:
            RuntimeError: where a contestant of ours ran in Python more often than self-checks explain.
        """
        contestants: dict[str, Contestant] = {}
        steps: dict[str, int] = {}
        seen: dict[str, int] = {}
        rounds = rounds or self.rounds
        for name, make in makers.items():
            contestants[name] = one = make()
            for i in range(WARM_UP):
                one.step(i)
            each = turn(one, 2)
            steps[name] = max(1, min(50 if self.on_gpu else 10, int(seconds / each)))
            seen[name] = len(one.python_runs)
        times: Times = {name: [] for name in contestants}
        names = list(contestants)
        for k in range(rounds):
            for name in names[k % len(names) :] + names[: k % len(names)]:
                times[name].append(turn(contestants[name], steps[name]))
        for name, one in contestants.items():
            runs, most = len(one.python_runs) - seen[name], rounds * (steps[name] + 1) / 100 + 2
            if one.replays and runs > most:
                raise RuntimeError(f"expected {name!r} to be replayed, got {runs} runs in Python; read its warning above")
        return times

    def table(self, part: str, program: str, times: Times) -> None:
        """Milliseconds a step."""
        for name, values in times.items():
            print(line(name, values, digits=2))
            self.write(part, program=program, who=name, ms=[round(1e3 * value, 4) for value in values])

    def verdict(
        self, part: str, what: str, times: Times, slow: str, fast: str, *, least: float | None = None, most: float | None = None
    ) -> None:
        """One ratio of two contestants, what was asked, and whether it is met."""
        asked = f">= {least}" if most is None else f"<= {most}"
        if slow not in times or fast not in times:
            print(f"  {what:<54} asked {asked:<7} not measured")
            return
        value = statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))
        met = (least is None or value >= least) and (most is None or value <= most)
        self.report(part, what, ratio(times[slow], times[fast], 2), asked, met=met, ratio=value)

    def report(self, part: str, what: str, measured: str, asked: str, *, met: bool, **figures: object) -> None:
        """A line of asked, measured and met."""
        print(f"  {what:<54} asked {asked:<7} {measured}   {'met' if met else 'NOT met'}")
        self.write(part, what=what, asked=asked, met=met, **figures)

    def write(self, part: str, **figures: object) -> None:
        """A line of JSON, where a file is wanted."""
        if self.json is not None:
            with Path(self.json).open("a") as file:
                file.write(json.dumps({"part": part, **figures}) + "\n")

    def settings(self) -> str:
        """Versions and the machine."""
        info = Path("/proc/cpuinfo")
        names = [entry.split(":")[1].strip() for entry in info.read_text().splitlines() if entry.startswith("model name")]
        cpu = names[0] if names else platform.processor() or platform.machine()
        device = torch.cuda.get_device_name(self.device) if self.on_gpu else cpu
        return (
            f"torch {torch.__version__}, pyro {pyro.__version__}; {device}; {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; {self.data}; {self.rounds} rounds"
        )


def turn(one: Contestant, steps: int) -> float:
    """Seconds a step, the device idle before and after, the first step not counted."""
    one.step(0)
    one.finish()
    start = time.perf_counter()
    for i in range(1, steps + 1):
        one.step(i)
    one.finish()
    return (time.perf_counter() - start) / steps
