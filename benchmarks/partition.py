"""Exact log Z of an RBM by split-half enumeration, against chunked matmul + softplus + logsumexp and against `rbms` 0.5.0.

    pip install rbms==0.5.0
    python benchmarks/partition.py

All run in one process, in turn, on two threads; the plain method at the best of its chunk sizes. Memory is that of a fresh
process each, above its state before the job. Weights are N(0, 0.3²) and biases N(0, 1), float32 unless said.
"""

from __future__ import annotations

import sys
import time

import torch
from timing import in_fresh_process, in_turn, line, peak_growth, ratio
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae.ops import boltzmann_log_partition, rbm_log_partition, softplus_sums
from pyrovae.ops.partition import _Side

REPEATS = 9
CHUNKS = [2**k for k in (8, 10, 11, 12, 13)]


def rbm(visible: int, hidden: int, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [D, H], visible and hidden bias."""
    torch.manual_seed(0)
    parameters = torch.randn(visible, hidden) * scale, torch.randn(visible), torch.randn(hidden)
    weight, b, c = (p.to(dtype) for p in parameters)
    return weight, b, c


def plain(weight: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """Log Z by chunks of codes: matmul, softplus, sum, logsumexp."""
    place = torch.arange(len(c) - 1, -1, -1)
    parts = []
    for start in range(0, 2 ** len(c), chunk):
        h = (torch.arange(start, start + chunk)[:, None] >> place & 1).to(weight.dtype)
        x = torch.addmm(b, h, weight.T)
        parts.append((softplus(x, threshold=20.0 if x.dtype == torch.float32 else 40.0).sum(1) + h @ c).logsumexp(0))
    return torch.stack(parts).logsumexp(0)


def plain_gradient(weight: Tensor, b: Tensor, c: Tensor, chunk: int) -> list[Tensor]:
    """Log Z by chunks, then the gradient chunk by chunk: autograd in the memory of a chunk."""
    leaves = [p.detach().requires_grad_() for p in (weight, b, c)]
    with torch.no_grad():
        log_partition = plain(weight, b, c, chunk)
    place = torch.arange(len(c) - 1, -1, -1)
    for start in range(0, 2 ** len(c), chunk):
        h = (torch.arange(start, start + chunk)[:, None] >> place & 1).to(weight.dtype)
        logits = softplus(torch.addmm(leaves[1], h, leaves[0].T)).sum(1) + h @ leaves[2]
        (logits - log_partition).exp().sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def ours_gradient(weight: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """Log Z and its gradient."""
    leaves = [p.detach().requires_grad_() for p in (weight, b, c)]
    rbm_log_partition(*leaves).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def against_plain() -> None:
    """784 x 20: time and memory of log Z and of its gradient."""
    weight, b, c = rbm(784, 20)
    with torch.no_grad():
        seconds = in_turn({str(n): lambda n=n: plain(weight, b, c, n) for n in CHUNKS}, 1)
    best = int(min(seconds, key=lambda name: seconds[name]))
    print(f"\n784 x 20, float32; best chunk of the plain method among {CHUNKS}: {best}")
    with torch.no_grad():
        exact = float(rbm_log_partition(weight.double(), b.double(), c.double()))
        print(f"  log Z {exact:.6f}; ours {float(rbm_log_partition(weight, b, c)) - exact:+.1e}, ", end="")
        print(f"plain {float(plain(weight, b, c, best)) - exact:+.1e} nat")
        jobs = {
            "plain": lambda: plain(weight, b, c, best),
            "ours": lambda: rbm_log_partition(weight, b, c),
            "double": lambda: rbm_log_partition(weight.double(), b.double(), c.double()),
            "table": lambda: softplus_sums(weight.T, b),
        }
        seconds = in_turn(jobs, REPEATS)
    print(line("matmul + softplus + logsumexp", seconds["plain"]))
    print(line("rbm_log_partition", seconds["ours"]))
    print(f"  ratio {ratio(seconds['plain'], seconds['ours'])}")
    print(line("rbm_log_partition, float64", seconds["double"]))
    print(line("softplus_sums, 2^20 numbers", seconds["table"]))
    print(f"  peak memory of log Z: {int(in_fresh_process(__file__, 'ours', '20')) / 1e6:.0f} MB")
    pairs = zip(plain_gradient(weight, b, c, best), ours_gradient(weight, b, c), strict=True)
    worst = max(float((p - o).abs().max()) for p, o in pairs)
    seconds = in_turn(
        {"plain": lambda: plain_gradient(weight, b, c, best), "ours": lambda: ours_gradient(weight, b, c)}, max(3, REPEATS // 2)
    )
    print(line("log Z and gradient, plain, chunked autograd", seconds["plain"]))
    print(line("log Z and gradient, rbm_log_partition", seconds["ours"]))
    print(f"  ratio {ratio(seconds['plain'], seconds['ours'])}; largest difference of a gradient {worst:.1e}")
    print(f"  peak memory with gradient: {int(in_fresh_process(__file__, 'gradient', '20')) / 1e6:.0f} MB")


def one_thread() -> None:
    """784 x 20 in the processor's seconds of one thread, which other work on the machine lengthens least."""
    weight, b, c = rbm(784, 20)
    torch.set_num_threads(1)
    with torch.no_grad():
        seconds = in_turn({str(n): lambda n=n: plain(weight, b, c, n) for n in CHUNKS}, 1, time.process_time)
        best = int(min(seconds, key=lambda name: seconds[name]))
        jobs = {"plain": lambda: plain(weight, b, c, best), "ours": lambda: rbm_log_partition(weight, b, c)}
        seconds = in_turn(jobs, max(3, REPEATS // 2), time.process_time)
    print(f"\n784 x 20, float32, one thread, processor's seconds; best chunk {best}")
    print(line("matmul + softplus + logsumexp", seconds["plain"]))
    print(line("rbm_log_partition", seconds["ours"]))
    print(f"  ratio {ratio(seconds['plain'], seconds['ours'])}")
    jobs = {"plain": lambda: plain_gradient(weight, b, c, best), "ours": lambda: ours_gradient(weight, b, c)}
    seconds = in_turn(jobs, 3, time.process_time)
    print(line("log Z and gradient, plain, chunked autograd", seconds["plain"]))
    print(line("log Z and gradient, rbm_log_partition", seconds["ours"]))
    print(f"  ratio {ratio(seconds['plain'], seconds['ours'])}")
    torch.set_num_threads(2)


def accuracy() -> None:
    """784 x 16 against float64 brute force, over the scale of the weights."""
    print("\n784 x 16, error in nat against brute force in float64 (in float64 before and after rounding to the weights' type)")
    for scale in (0.05, 0.3, 1.0, 5.0):
        weight, b, c = rbm(784, 16, torch.float32, scale)
        exact = float(plain(weight.double(), b.double(), c.double(), 2**12))
        single, double = (_Side(weight.to(t), b.to(t), c.to(t), 2**28) for t in (torch.float32, torch.float64))
        errors = [float(side.log_partition(keep=False)[0]) - exact for side in (single, double)]
        returned = float(rbm_log_partition(weight, b, c)) - exact
        print(
            f"  weights N(0, {scale}²), log Z {exact:10.3f}: float32 {errors[0]:+.1e} ({returned:+.1e} rounded), "
            f"float64 {errors[1]:+.1e}"
        )


def against_rbms() -> None:
    """784 x 16: the exact routine of `rbms`."""
    from peers.rbms_partition import log_partition

    weight, b, c = rbm(784, 16)
    print("\n784 x 16, float32")
    try:
        difference = log_partition(weight, b, c) - float(rbm_log_partition(weight, b, c))
    except ImportError:
        print("  rbms is not installed; pip install rbms==0.5.0")
        return
    seconds = in_turn(
        {"rbms": lambda: log_partition(weight, b, c), "ours": lambda: rbm_log_partition(weight, b, c)}, max(3, REPEATS // 2)
    )
    print(line("rbms 0.5.0 compute_partition_function", seconds["rbms"]))
    print(line("rbm_log_partition", seconds["ours"]))
    print(f"  ratio {ratio(seconds['rbms'], seconds['ours'])}; rbms differs by {difference:+.1e} nat")
    for name in ("rbms", "ours"):
        print(f"  peak memory, {name}: {int(in_fresh_process(__file__, name, '16')) / 1e6:.0f} MB")


def large() -> None:
    """784 x 25, and general Boltzmann machines."""
    weight, b, c = rbm(784, 25)
    print("\n784 x 25, float32")
    print(line("rbm_log_partition", in_turn({"ours": lambda: rbm_log_partition(weight, b, c)}, 2)["ours"]))
    print(f"  peak memory: {int(in_fresh_process(__file__, 'ours', '25')) / 1e6:.0f} MB")
    torch.manual_seed(0)
    couplings = torch.randn(25, 25) * 0.3
    couplings = (couplings + couplings.T).fill_diagonal_(0.0)
    biases = torch.randn(25)
    print("\nBoltzmann machine of 25 units, float32 couplings, sums in float64")
    print(line("boltzmann_log_partition", in_turn({"ours": lambda: boltzmann_log_partition(couplings, biases)}, 3)["ours"]))
    couplings, biases = couplings[:12, :12].contiguous(), torch.randn(1000, 12)
    jobs = {
        "batch": lambda: boltzmann_log_partition(couplings, biases),
        "each": lambda: [boltzmann_log_partition(couplings, b) for b in biases],
    }
    seconds = in_turn(jobs, 3)
    print(line("1000 biases of 12 units, one matrix product", seconds["batch"]))
    print(line("1000 biases of 12 units, one by one", seconds["each"]))


def memory(what: str, hidden: int) -> int:
    """Bytes that one job takes above the state before it."""
    weight, b, c = rbm(784, hidden)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own buffers
    if what == "rbms":
        from peers.rbms_partition import log_partition

        return peak_growth(lambda: log_partition(weight, b, c))
    return peak_growth(lambda: ours_gradient(weight, b, c) if what == "gradient" else rbm_log_partition(weight, b, c))


if __name__ == "__main__":
    torch.set_num_threads(2)
    if len(sys.argv) > 1:
        print(memory(sys.argv[1], int(sys.argv[2])))
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        against_plain()
        one_thread()
        accuracy()
        against_rbms()
        large()
