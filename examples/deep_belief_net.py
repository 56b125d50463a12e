"""A deep belief net on 8x8 digits, with no likelihood left to belief: greedy pretraining, then up-down, judged exactly.

The greedy bound never falls, from the first RBM through the tied start of the second: where the layers can be enumerated
that is a theorem, and is checked at every step. What the bound misses of log p(x), and what up-down fine-tuning changes, is
known exactly, too: the sum over all states of the first hidden layer is taken for every image.

Run: python examples/deep_belief_net.py
"""

import argparse
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib.style
import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.data import load
from pyrovae.guides import AmortizedStructured
from pyrovae.inference import Exact, GreedyPretraining, UpDown, Variational
from pyrovae.models import DeepBeliefNet

BLUE, ORANGE, GREEN, SOFT = "#0072B2", "#D55E00", "#009E73", "#5b6168"


def main(steps: int, hidden: int, output: Path) -> None:
    """Learn, judge, check and draw."""
    pyro.set_rng_seed(0)
    x, test = (load("digits", split=split, binarize="threshold") for split in ("train", "test"))
    if steps < 20:
        x = x[:200]
    net = DeepBeliefNet(64, [hidden, 64])
    guide = AmortizedStructured(net)

    greedy = GreedyPretraining(guide, num_iterations=steps).fit(net, x, validation=test)
    history = greedy.history
    first = [record for record in history if record["layer"] == 1]
    samples = {"greedy": net.sample(10)}
    after_greedy, guided = exact(net, x, test), bound(net, guide, x, test)
    up_down = UpDown(
        guide,
        num_sweeps=5,
        num_epochs=steps,
        batch_size=min(100, len(x)),
        optim=partial(torch.optim.Adam, lr=2e-3),
        log_every=10**6,
    ).fit(net, x)
    samples["up-down"] = net.sample(10)
    after = exact(net, x, test)
    rates = (x.sum(0) + 1) / (len(x) + 2)
    pixels = tuple(float(torch.distributions.Bernoulli(rates).log_prob(rows).sum(-1).mean()) for rows in (x, test))

    print(f"{len(x)} digits, {hidden} + 64 hidden units; nats per image, training and test")
    for name, (train, held_out) in {
        "independent pixels, log p(x)": pixels,
        f"RBM with {hidden} hidden units, log p(x)": (first[-1]["bound"], first[-1]["validation"]),
        "deep belief net, greedy: bound": (history[-1]["bound"], history[-1]["validation"]),
        "deep belief net, greedy: log p(x)": after_greedy,
        "deep belief net, up-down: log p(x)": after,
    }.items():
        print(f"  {name:42} {train:8.3f} {held_out:8.3f}")
    print(f"greedy {greedy.seconds:.1f} s, up-down {up_down.seconds:.1f} s")

    for before, now in pairwise(history):
        assert now["bound"] >= before["bound"] - 1e-9 * abs(before["bound"]), "the bound never falls"
    second = next(record for record in history if record["layer"] == 2)
    assert abs(second["bound"] - first[-1]["bound"]) < 1e-6, "tied to the first, the second RBM changes nothing"
    assert after_greedy[0] > history[-1]["bound"] - 1e-3, "a bound lies below"
    assert abs(guided[0] - history[-1]["bound"]) < 0.3, "the guide is the Q of the bound"
    assert history[-1]["bound"] > pixels[0], "and above what independent pixels reach"
    assert after[1] > pixels[1], "on test data, too"
    picture(history, after_greedy[0], after[0], samples).savefig(output)
    print(f"picture in {output}")


def exact(net: DeepBeliefNet, *splits: Tensor) -> tuple[float, ...]:
    """The exact mean log p(x) of each split."""
    return tuple(float(Exact().infer(net, rows).log_evidence.mean()) for rows in splits)


def bound(net: DeepBeliefNet, guide: AmortizedStructured, *splits: Tensor) -> tuple[float, ...]:
    """The ELBO of the recognition guide, by draws."""
    return tuple(float(Variational(guide, num_samples=20).infer(net, rows).log_evidence.mean()) for rows in splits)


def picture(history: list, greedy: float, up_down: float, samples: dict[str, Tensor]) -> Figure:
    """The bound layer by layer, the exact log p(x) at both ends, and draws of the net."""
    with matplotlib.style.context(Path(__file__).with_name("look.mplstyle")):
        figure = Figure(figsize=(9.6, 5.6))
        axes = figure.add_axes((0.08, 0.42, 0.89, 0.42))
        figure.text(0.02, 0.955, "Greedy pretraining never lowers the bound; exact sums tell the rest", size=13, weight="bold")
        figure.text(
            0.02, 0.912, "nats per training image; the tied start of the second layer is the end of the first", color=SOFT
        )
        for layer, colour in ((1, BLUE), (2, ORANGE)):
            records = [record for record in history if record["layer"] == layer]
            line = [record["bound"] for record in records]
            axes.plot([record["step"] for record in records], line, color=colour, label=f"bound, RBM {layer} on top")
        end = history[-1]["step"]
        axes.plot([end], [greedy], "o", color=ORANGE, label="log p(x), greedy, exact")
        axes.plot([end * 1.02], [up_down], "D", color=GREEN, label="log p(x), up-down, exact")
        axes.set(xlabel="steps", ylim=(history[len(history) // 20]["bound"], None))
        axes.legend(loc="lower right")
        for row, (name, draws) in enumerate(samples.items()):
            for column, image in enumerate(draws):
                small = figure.add_axes((0.13 + 0.084 * column, 0.17 - 0.145 * row, 0.075, 0.12))
                small.imshow(image.reshape(8, 8), vmin=0, vmax=1)
                small.set(xticks=[], yticks=[])
            figure.text(0.02, 0.22 - 0.145 * row, f"draws,\n{name}", color=SOFT)
        return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of each RBM, and epochs of up-down")
    parser.add_argument("--hidden", type=int, default=12, help="units of the first hidden layer, at most 16")
    parser.add_argument("--output", type=Path, default=Path("deep_belief_net.png"), help="the picture")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.hidden, arguments.output)
