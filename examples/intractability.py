"""Why log Z and posteriors are called intractable: every bit doubles the time and the memory of the sum over states.

Measured on restricted Boltzmann machines and sigmoid belief nets that grow bit by bit: the sum written down plainly; the
library's split-half sum, which pays far less for each state, in bounded memory, but doubles all the same; and what takes
over: annealed importance sampling for log Z, with an interval that is held against the exact value, and Gibbs sweeps for the
posterior.

Run: python examples/intractability.py
"""

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrovae.distributions import RBM
from pyrovae.inference import AIS, Exact, Gibbs
from pyrovae.models import SigmoidBeliefNet

BLUE, ORANGE, GREEN, INK, SOFT = "#0072B2", "#D55E00", "#009E73", "#1c1e21", "#5b6168"
VISIBLE = 196
PLAIN, SPLIT, SAMPLED = range(4, 14), range(4, 23, 2), (4, 8, 12, 16, 20, 32, 48, 64)  # bits
ROWS, SWEEPS = 20, 100  # of the posterior
Points = dict[int, float]


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block occupy at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.bytes = 0
        self.holders: dict[int, int] = {}  # tensors of each storage
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor) not in self.seen:
                storage = tensor.untyped_storage()
                at, size = storage.data_ptr(), storage.nbytes()
                self.seen.add(id(tensor))
                self.bytes += 0 if self.holders.get(at) else size
                self.holders[at] = self.holders.get(at, 0) + 1
                weakref.finalize(tensor, self._free, id(tensor), at, size)
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, tensor: int, at: int, size: int) -> None:
        self.seen.discard(tensor)
        self.holders[at] -= 1
        self.bytes -= 0 if self.holders[at] else size


def machine(hidden: int) -> RBM:
    """An RBM of 196 visible units with weights and biases of order one half."""
    generator = torch.Generator().manual_seed(hidden)
    shapes = ((VISIBLE, hidden), (VISIBLE,), (hidden,))
    weight, b, c = (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return RBM(weight, b - 0.5 * weight.sum(1), c, log_partition=None if hidden <= 24 else 0.0)


def plainly(rbm: RBM) -> Tensor:
    """Log Z as it is written down: a row for every hidden state."""
    codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(rbm.c)).reshape(-1, len(rbm.c))
    return torch.logsumexp(codes @ rbm.c + torch.nn.functional.softplus(rbm.b + codes @ rbm.W.T).sum(1), 0)


def belief_net(hidden: int) -> tuple[SigmoidBeliefNet, Tensor]:
    """A sigmoid belief net and data from it."""
    torch.manual_seed(hidden)
    net = SigmoidBeliefNet(VISIBLE, hidden).double()
    return net, net.sample(ROWS)


def seconds(job: Callable[[], object], repeats: int = 3) -> float:
    """The processor's median time of a job."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        job()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def peak(job: Callable[[], object]) -> float:
    """The peak bytes of a job."""
    with PeakMemory() as memory:
        job()
    return float(memory.peak)


def main(steps: int, output: Path) -> None:
    """Measure, check, draw."""
    torch.manual_seed(0)
    spent: dict[str, Points] = {"plain sum": {}, "split-half sum": {}, "AIS": {}}
    memory: dict[str, Points] = {"plain sum": {}, "split-half sum": {}}
    exact = {bits: float(machine(bits).log_partition()) for bits in SPLIT}
    for bits in PLAIN:
        rbm = machine(bits)
        spent["plain sum"][bits] = seconds(lambda: plainly(rbm))  # noqa: B023
        memory["plain sum"][bits] = peak(lambda: plainly(rbm))  # noqa: B023
        if bits in exact:
            assert abs(float(plainly(rbm)) - exact[bits]) < 1e-9, bits
    for bits in SPLIT:
        spent["split-half sum"][bits] = seconds(lambda: machine(bits).log_partition())  # noqa: B023
        memory["split-half sum"][bits] = peak(lambda: machine(bits).log_partition())  # noqa: B023

    # AIS: the interval covers the exact value wherever there is one, but for one run in 100 000
    known = [bits for bits in SAMPLED if bits in exact]
    sampler = AIS(100, steps, sigmas=float(stats.norm.isf(0.5e-5 / len(known))))
    intervals = {}
    for bits in SAMPLED:
        begin = time.process_time()
        found = sampler.log_partition(machine(bits))
        spent["AIS"][bits] = time.process_time() - begin
        if bits in known:
            intervals[bits] = [float(value) - exact[bits] for value in (found.lower, found.log_z, found.upper)]
            assert intervals[bits][0] < 0 < intervals[bits][2], (bits, intervals[bits])

    # every bit doubles the plain table, to the byte; the split-half sum needs far less, and so does its clock
    table = memory["plain sum"]
    assert all(1.9 < table[bits + 1] / table[bits] < 2.1 for bits in range(8, max(PLAIN)))
    largest = max(set(PLAIN) & set(SPLIT))
    assert memory["split-half sum"][largest] < table[largest] / 4
    assert spent["split-half sum"][largest] < spent["plain sum"][largest]
    try:
        Exact().infer(*belief_net(64))
    except ValueError as refusal:
        print(f"64 bits are refused before they start: {str(refusal)[:150]} …")
    else:
        raise AssertionError("expected 64 bits to be refused")

    posterior: dict[str, Points] = {"program, all states": {}, "bilinear sum": {}, f"{SWEEPS} Gibbs sweeps": {}}
    ways = (
        (Exact(declared=False), range(4, 13, 2)),
        (Exact(), range(4, 19, 2)),
        (Gibbs(SWEEPS, 1, 0, max_bytes=0), (4, 8, 16, 32, 48, 64)),
    )
    for points, (method, sizes) in zip(posterior.values(), ways, strict=True):
        for bits in sizes:
            net, x = belief_net(bits)
            points[bits] = seconds(lambda: method.infer(net, x), 1)  # noqa: B023
    net, x = belief_net(12)
    assert torch.allclose(Exact().infer(net, x).log_evidence, Exact(declared=False).infer(net, x).log_evidence, atol=1e-9)

    for name, points in {**spent, **posterior}.items():
        bits = list(points)
        print(f"{name:<22}" + "  ".join(f"{b} bits {1e3 * points[b]:.1f} ms" for b in (bits[0], bits[-1])))
    picture(spent, memory, posterior, intervals, steps).savefig(output)
    print(f"AIS covers the exact log Z at {len(intervals)} sizes; picture in {output}")


def picture(
    spent: dict[str, Points],
    memory: dict[str, Points],
    posterior: dict[str, Points],
    intervals: dict[int, list[float]],
    steps: int,
) -> Figure:
    """Time and memory of log Z; the posterior; AIS beside the truth."""
    with matplotlib.style.context(Path(__file__).with_name("look.mplstyle")):
        figure = Figure(figsize=(9.6, 7.0))
        figure.text(0.02, 0.962, "Every bit doubles the sum", size=13, weight="bold")
        figure.text(
            0.02, 0.929, "196 visible units; dots are measured, dashes continue them at a factor of two a bit", color=SOFT
        )
        panels = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.08, right=0.97, top=0.86, bottom=0.08, hspace=0.42, wspace=0.24)
        _growth(panels[0, 0], spent, "log Z: processor time")
        _marks(panels[0, 0], {"a minute": 60, "a day": 86400, "a century": 3.2e9})
        _growth(panels[0, 1], memory, "log Z: peak memory of its tensors")
        _marks(panels[0, 1], {"1 MB": 2**20, "1 GB": 2**30, "1 TB": 2**40, "1 PB": 2**50})
        _growth(panels[1, 0], posterior, f"posterior of {ROWS} rows: processor time")
        _marks(panels[1, 0], {"a minute": 60, "a day": 86400, "a century": 3.2e9})
        axes = panels[1, 1]
        axes.axhline(0, color=INK, lw=1.6)
        for bits, (lower, value, upper) in intervals.items():
            axes.plot([bits, bits], [lower, upper], color=GREEN, lw=1.6)
            axes.plot(bits, value, "o", color=GREEN, ms=5)
        axes.set(xlabel="hidden bits", xticks=list(intervals))
        axes.set_title(f"AIS, {steps} temperatures: log Z − exact, nats")
        return figure


def _growth(axes: Axes, curves: dict[str, Points], title: str) -> None:
    """Measured points; exponential ones continued to 64 bits."""
    for (name, points), colour in zip(curves.items(), (ORANGE, BLUE, GREEN), strict=False):
        bits, values = list(points), list(points.values())
        axes.plot(bits, values, "o", color=colour, ms=4)
        doubling = bits[-1] < 30 and not (name == "split-half sum" and "memory" in title)
        if doubling:
            axes.plot([bits[-1], 64], [values[-1], values[-1] * 2.0 ** (64 - bits[-1])], color=colour, lw=1.2, ls=(0, (3, 3)))
        axes.plot(bits, values, color=colour, lw=1.2)
        ahead = 16 if doubling else 0  # where along the dashes the name stands
        left = colour == ORANGE or bits[-1] > 60
        place = bits[-1] + ahead + (-1.2 if left else 1.5), values[-1] * 2.0**ahead * (3 if bits[-1] > 60 else 1)
        axes.text(*place, name, color=colour, size=9, ha="right" if left else "left", va="center")
    axes.set(yscale="log", xlim=(2, 65), xlabel="hidden bits", title=title)


def _marks(axes: Axes, marks: dict[str, float]) -> None:
    """Horizontal lines that have names, for ticks."""
    low = min(float(value) for line in axes.lines for value in line.get_ydata())
    axes.set_ylim(low / 3, 20 * max(marks.values()))
    axes.set_yticks(list(marks.values()), list(marks))
    axes.minorticks_off()
    for value in marks.values():
        axes.axhline(value, color="#d8dce0", lw=0.8, zorder=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="temperatures of AIS")
    parser.add_argument("--output", type=Path, default=Path("intractability.png"), help="the picture")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output)
