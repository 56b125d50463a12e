"""`Exact` against Pyro's own enumeration, `TraceEnum_ELBO` over scalar sites, on sigmoid belief nets.

    python benchmarks/exact.py

Both run in one process, in turn; memory is that of a fresh process each, above its state before the job. float64.
"""

from __future__ import annotations

import sys

import pyro
import pyro.distributions as dist
import torch
from peers import trace_enum
from timing import in_fresh_process, in_turn, line, peak_growth, ratio
from torch import Tensor

from pyrovae.inference import Exact, ExactLikelihood

VISIBLE, HIDDEN, ROWS, REPEATS = 64, 12, 256, 7


def net(visible: int, hidden: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight [H, D], bias [D], prior [H] and data [N, D] drawn from the net."""
    torch.manual_seed(0)
    weight, bias, prior = torch.randn(hidden, visible), 0.5 * torch.randn(visible), 0.5 * torch.randn(hidden)
    h = torch.bernoulli(torch.sigmoid(prior).expand(rows, hidden))
    return weight, bias, prior, torch.bernoulli(torch.sigmoid(bias + h @ weight))


def one_layer(weight: Tensor, bias: Tensor, prior: Tensor, sigma: float | None = None):  # noqa: ANN201
    """The same net as an ordinary Pyro program with one vector site."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
            mean = bias + h @ weight
            likelihood = dist.Bernoulli(logits=mean) if sigma is None else dist.Normal(mean, sigma)
            pyro.sample("x", likelihood.to_event(1), obs=x)

    return model


def against_trace_enum(sigma: float | None) -> None:
    """Evidence, gradient and memory against `TraceEnum_ELBO` with the same likelihood."""
    weight, bias, prior, x = net(VISIBLE, HIDDEN, ROWS)
    ours = one_layer(weight, bias, prior, sigma)
    theirs = trace_enum.belief_net_loss(weight, bias, prior, x, sigma=sigma)
    exact = Exact()
    likelihood = "Bernoulli" if sigma is None else "Normal"
    print(f"\n{VISIBLE}-{HIDDEN} belief net, {likelihood} likelihood, {ROWS} rows")
    difference = abs(float(exact.infer(ours, x).log_evidence.sum()) + theirs())
    print(f"  difference of the summed log evidence: {difference:.1e} of {theirs():.1f}")
    seconds = in_turn({"TraceEnum": theirs, "Exact": lambda: exact.infer(ours, x)}, REPEATS)
    print(line("TraceEnum_ELBO.loss", seconds["TraceEnum"]))
    print(line("Exact().infer (log evidence)", seconds["Exact"]))
    print(f"  ratio {ratio(seconds['TraceEnum'], seconds['Exact'])}")

    leaves = [t.clone().requires_grad_() for t in (weight, bias, prior)]
    learned = one_layer(*leaves, sigma)
    objective = ExactLikelihood()
    gradients = trace_enum.belief_net_loss_and_gradients(weight, bias, prior, x, sigma=sigma)

    def gradient() -> None:
        for leaf in leaves:
            leaf.grad = None
        objective.loss_and_grads(learned, None, x)

    gradient()
    worst = max(float((leaf.grad - g).abs().max()) for leaf, g in zip(leaves, gradients()[1].values(), strict=True))
    print(f"  largest difference of a gradient: {worst:.1e}")
    seconds = in_turn({"TraceEnum": gradients, "Exact": gradient}, max(3, REPEATS // 2))
    print(line("TraceEnum_ELBO.loss_and_grads", seconds["TraceEnum"]))
    print(line("ExactLikelihood().loss_and_grads", seconds["Exact"]))
    print(f"  ratio {ratio(seconds['TraceEnum'], seconds['Exact'])}")


def two_layers() -> None:
    """One dim a site against one joint dim, which a program that concatenates its latents forces."""
    torch.manual_seed(0)
    w1, w2, b1, b0, c = torch.randn(8, 64), torch.randn(8, 8), torch.randn(8), torch.randn(64), torch.randn(8)
    x = (torch.rand(ROWS, 64) < 0.5).double()

    def apart(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Bernoulli(logits=c).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=b1 + h2 @ w2).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=b0 + h1 @ w1).to_event(1), obs=x)

    wide = torch.cat((w1, torch.zeros(8, 64)))

    def together(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Bernoulli(logits=c).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=b1 + h2 @ w2).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=b0 + torch.cat((h1, h2), -1) @ wide).to_event(1), obs=x)

    print(f"\n64-[8, 8] belief net, {ROWS} rows")
    exact = Exact()
    gap = (exact.infer(apart, x).log_evidence - exact.infer(together, x).log_evidence).abs().max()
    print(f"  largest difference of log p(x): {float(gap):.1e}")
    seconds = in_turn({"joint": lambda: exact.infer(together, x), "site": lambda: exact.infer(apart, x)}, 5)
    print(line("one joint dim", seconds["joint"]))
    print(line("one dim a site", seconds["site"]))
    print(f"  ratio {ratio(seconds['joint'], seconds['site'])}")


def memory(side: str) -> None:
    """Print the peak memory of one job, in bytes."""
    weight, bias, prior, x = net(VISIBLE, HIDDEN, ROWS)
    if side == "TraceEnum":
        job = trace_enum.belief_net_loss(weight, bias, prior, x)
    else:
        model = one_layer(weight, bias, prior)
        job = lambda: Exact().infer(model, x)  # noqa: E731
    print(peak_growth(job))


def main() -> None:
    """All comparisons."""
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {torch.get_num_threads()} threads, float64")
    against_trace_enum(None)
    peak = {side: int(in_fresh_process(__file__, "memory", side)) for side in ("TraceEnum", "Exact")}
    for side, size in peak.items():
        print(f"  peak memory, {side:<12} {size / 1e6:8.0f} MB")
    print(f"  Exact takes {peak['Exact'] / peak['TraceEnum']:.3f} of it")
    against_trace_enum(0.7)
    two_layers()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    if sys.argv[1:2] == ["memory"]:
        memory(sys.argv[2])
    else:
        main()
