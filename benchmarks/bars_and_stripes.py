"""4x4 bars and stripes, an RBM with 16 hidden units: exact and tempered learning reach the entropy, CD-1 does not.

    python benchmarks/bars_and_stripes.py

All learn from the 30 patterns at their exact frequencies (each step sees all, at weight p), from the same start, by the
centred gradient, SGD at a rate that falls linearly to 0 over the second half. log p(x) is exact, in nats per datum; it cannot
exceed minus the entropy.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from functools import partial
from pathlib import Path

import torch

from pyrovae import data
from pyrovae.inference import ContrastiveDivergence, Fit, ParallelTempering
from pyrovae.models import RestrictedBoltzmannMachine

SEEDS, STEPS, RATE, TOLERANCE = 2, 15_000, 0.2, 0.05
RESULTS = Path(__file__).parent / "results"
METHODS = {
    "tempered, 10 temperatures": {"negative": ParallelTempering(10, 32)},
    "CD-1": {"persistent": False},
    "exact gradient": {"negative": "exact", "num_steps": 2_000},
    "PCD-1": {"num_chains": 320},
}
EXACT_RATE = 1.0


def patterns() -> torch.Tensor:
    """The patterns, each as often as its probability says: 2 twice, 28 once, of 32 rows."""
    x, p = data.patterns("bars_and_stripes", size=4, dtype=torch.float64)
    return x.repeat_interleave((32 * p).round().long(), 0)


def run(name: str, start: RestrictedBoltzmannMachine, x: torch.Tensor) -> Fit:
    """One learning run from a copy of `start`."""
    options = {"num_steps": STEPS} | METHODS[name]
    steps = int(options["num_steps"])  # type: ignore[call-overload]
    rate = EXACT_RATE if name == "exact gradient" else RATE
    return ContrastiveDivergence(
        batch_size=None,
        optim=partial(torch.optim.SGD, lr=rate),
        scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: min(1.0, 2 - 2 * step / steps)),
        log_every=steps // 50,
        **options,  # type: ignore[arg-type]
    ).fit(copy.deepcopy(start), x)


def main() -> None:
    """All methods and seeds; a picture and a table, renewed after every seed."""
    warnings.filterwarnings("ignore", message=".*persistent chains have not mixed")
    x = patterns()
    found: dict[str, list[Fit]] = {name: [] for name in METHODS}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        start = RestrictedBoltzmannMachine(16, 16)
        for name in METHODS:
            found[name].append(run(name, start, x))
            last = found[name][-1].history[-1]
            print(f"seed {seed}  {name:<28} {last['bound']:9.4f}  {last['seconds']:6.1f} s", flush=True)
        draw(found)
        write(found)


def draw(found: dict[str, list[Fit]]) -> None:
    """The curves of all runs, one colour a method."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for place, (name, fits) in enumerate(found.items()):
        for fit in fits:
            steps = [record["step"] for record in fit.history]
            axes.plot(
                steps, [r["bound"] for r in fit.history], color=f"C{place}", lw=1.2, label=name if fit is fits[0] else None
            )
    entropy = data.entropy("bars_and_stripes", size=4)
    axes.axhline(-entropy, color="black", ls="--", lw=1, label=f"minus the entropy, {-entropy:.3f}")
    axes.set_xscale("symlog", linthresh=100)
    axes.set(xlim=(0, STEPS), ylim=(-11.5, -3), xlabel="step", ylabel="exact log p(x), nats per datum")
    axes.set_title("4x4 bars and stripes, 16 hidden units")
    axes.legend(loc="upper left", fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "bars_and_stripes.png", dpi=130)
    plt.close(figure)


def write(found: dict[str, list[Fit]]) -> None:
    """The table of the ends."""
    entropy = data.entropy("bars_and_stripes", size=4)
    lines = [
        "# 4x4 bars and stripes, 16 hidden units",
        "",
        f"Exact log p(x), nats per datum, of the 30 patterns at their probabilities; the best possible is {-entropy:.4f}. "
        f"{len(next(iter(found.values())))} seeds; full batches, centred gradient, SGD at {RATE} ({EXACT_RATE} for the exact "
        "gradient), from half way linearly to 0; 320 chains (tempered: 10 temperatures x 32).",
        "",
        "| method | steps | at the end, seeds | mean ± s.e. | best on the way | short of the best by (worst seed) | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, fits in found.items():
        ends = [fit.history[-1]["bound"] for fit in fits]
        tops = [max(record["bound"] for record in fit.history) for fit in fits]
        error = f" ± {statistics.stdev(ends) / len(ends) ** 0.5:.3f}" if len(ends) > 1 else ""
        lines.append(
            f"| {name} | {fits[0].history[-1]['step']} | {', '.join(f'{end:.3f}' for end in ends)} | "
            f"{statistics.mean(ends):.3f}{error} | {max(tops):.3f} | {-entropy - min(ends):.3f} | "
            f"{statistics.median(fit.seconds for fit in fits):.0f} |"
        )
    within = {name: -entropy - min(fit.history[-1]["bound"] for fit in fits) < TOLERANCE for name, fits in found.items()}
    verdict = ", ".join(f"{name}: {'yes' if ok else 'no'}" for name, ok in within.items())
    lines += [
        "",
        f"Within {TOLERANCE} nat of the entropy at every seed: {verdict}.",
        "",
        "`python benchmarks/bars_and_stripes.py`",
    ]
    (RESULTS / "bars_and_stripes.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    main()
