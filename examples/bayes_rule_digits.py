"""Bayes' rule as a classifier: the probability that an image shows a 3, before and after looking at its pixels.

Given the digit, pixels are independent bits. Each pixel's rate has a uniform Beta prior, so the rate to predict a new image
with is (ones + 1) / (images + 2) of the training images of that digit: the product over pixels is then the exact
likelihood. The digit is a Categorical latent of an ordinary Pyro program, and Exact answers it.

Run: python examples/bayes_rule_digits.py
"""

import argparse
from pathlib import Path

import matplotlib.style
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyrovae.data import load, load_labels
from pyrovae.inference import Exact

BLUE, ORANGE, INK, SOFT = "#0072B2", "#D55E00", "#1c1e21", "#5b6168"


def rates(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The prior of each digit `[10]` and the rate of each pixel `[10, D]`, both with a uniform prior of their own."""
    shows = torch.nn.functional.one_hot(labels, 10).to(x)  # [N, 10]
    count = shows.sum(0)
    return (count + 1) / (count.sum() + 10), (shows.T @ x + 1) / (count.unsqueeze(-1) + 2)


def shows_a_digit(x: Tensor, seen: Tensor, prior: Tensor, rate: Tensor) -> None:
    """A digit, then its pixels `x [B, D]`, of which those `seen [B, D]` count."""
    with pyro.plate("images", len(x)):
        y = pyro.sample("digit", dist.Categorical(prior))
        pyro.sample("pixels", dist.Bernoulli(rate[y]).mask(seen).to_event(1), obs=x)


def by_hand(x: Tensor, seen: Tensor, prior: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Log likelihood of each digit `[B, 10]` and its posterior probability `[B, 10]`."""
    log_likelihood = (x * seen) @ rate.log().T + ((1 - x) * seen) @ (1 - rate).log().T
    joint = prior * (log_likelihood - log_likelihood.amax(-1, keepdim=True)).exp()
    return log_likelihood, joint / joint.sum(-1, keepdim=True)


def calibration(posterior: Tensor, labels: Tensor) -> float:
    """Expected calibration error: |confidence - accuracy|, averaged over ten equal bins of confidence."""
    confidence, guess = posterior.max(-1)
    bins = (10 * confidence).long().clamp_max(9)
    gaps = [(confidence - (guess == labels).double())[bins == b].sum().abs() for b in range(10)]
    return float(torch.stack(gaps).sum()) / len(labels)


def main(data: str, steps: int, output: Path) -> None:
    """Count, ask, check and draw."""
    split = {name: load(data, split=name, binarize="threshold", dtype=torch.float64) for name in ("train", "test")}
    labels = {name: load_labels(data, split=name) for name in split}
    prior, rate = rates(split["train"], labels["train"])
    x, y = split["test"][:steps], labels["test"][:steps]
    everything = torch.ones_like(x, dtype=torch.bool)
    posterior = Exact().infer(shows_a_digit, x, everything, prior, rate).marginals["digit"]  # [B, 10]

    log_likelihood, expected = by_hand(x, everything, prior, rate)
    evidence = (prior.log() + log_likelihood).logsumexp(-1)
    assert torch.allclose(posterior, expected, rtol=0, atol=1e-10)
    assert torch.allclose(Exact().infer(shows_a_digit, x, everything, prior, rate).log_evidence, evidence, rtol=1e-10)
    without = by_hand(x, everything, torch.full_like(prior, 0.1), rate)[1]
    assert not torch.allclose(posterior, without, rtol=0, atol=1e-10), "another prior would be told apart"
    blind = Exact().infer(shows_a_digit, x, ~everything, prior, rate).marginals["digit"]
    assert torch.allclose(blind, prior.expand_as(blind), rtol=0, atol=1e-10), "no pixel seen: the prior stays"
    # the rates are the posterior means of the Beta priors: one pixel's by quadrature
    line = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    pixels = split["train"][labels["train"] == 3]
    pixel = int((pixels.mean(0) - 0.5).abs().argmin())
    log_weight = dist.Bernoulli(line.unsqueeze(-1)).log_prob(pixels[:, pixel]).sum(-1)
    weight = (log_weight - log_weight.max()).exp()
    assert abs(float((weight * line).sum() / weight.sum() - rate[3, pixel])) < 1e-6

    right = posterior.argmax(-1) == y
    error = calibration(posterior, y)
    assert right.double().mean() > 0.7, "chance is 0.1"
    assert (posterior[:, 3][y == 3].mean() > prior[3] > posterior[:, 3][y != 3].mean()).all()
    print(f"{data}: {len(x)} test images, accuracy {float(right.double().mean()):.3f}, calibration error {error:.3f}")
    print(
        f"mean confidence {float(posterior.amax(-1).mean()):.3f}: pixels are not independent, so the posterior is overconfident"
    )

    side = round(x.shape[-1] ** 0.5)
    upper = (torch.arange(x.shape[-1]) < x.shape[-1] // 2).expand_as(x)
    half = by_hand(x, upper, prior, rate)[1]
    doubt = -(posterior.clamp_min(1e-300).log() * posterior).sum(-1)
    doubt_of_half = -(half.clamp_min(1e-300).log() * half).sum(-1)
    clear = int((doubt_of_half - 10 * (doubt + (~right).double())).argmax())  # sure whole, unsure by its upper half
    unsure = int((doubt - 10 * (~right).double()).argmax())
    wrong = int((posterior.amax(-1) - 10 * right.double()).argmax())
    rows = [
        (f"a {int(y[clear])}, its upper half", clear, upper),
        ("the same, whole", clear, everything),
        (f"a {int(y[unsure])}, in doubt", unsure, everything),
        (f"a {int(y[wrong])}, and mistaken", wrong, everything),
    ]
    rows = [(title, x[i], seen[i], *(t[i] for t in by_hand(x, seen, prior, rate)), int(y[i])) for title, i, seen in rows]
    picture(rows, prior, side).savefig(output)
    print(f"picture in {output}")


def picture(rows: list, prior: Tensor, side: int) -> Figure:
    """A row an image: what is seen of it, the prior, the likelihood and the posterior of each digit."""
    with matplotlib.style.context(Path(__file__).with_name("look.mplstyle")):
        figure = Figure(figsize=(9.6, 7.2))
        panels = figure.subplots(4, 4, gridspec_kw={"width_ratios": (0.62, 1, 1, 1), "hspace": 0.42, "wspace": 0.24})
        figure.subplots_adjust(left=0.02, right=0.98, top=0.82, bottom=0.06)
        figure.text(0.02, 0.955, "Which digit does the image show? Prior times likelihood, normalised", size=13, weight="bold")
        figure.text(0.02, 0.922, "orange: the digit it does show; grey pixels are not seen", color=SOFT)
        for axes_row, (title, x, seen, log_likelihood, posterior, digit) in zip(panels, rows, strict=True):
            shown = torch.where(seen, x, 0.25).reshape(side, side)
            axes_row[0].imshow(shown, vmin=0, vmax=1)
            axes_row[0].set_title(title, loc="center", weight="normal")
            axes_row[0].set(xticks=[], yticks=[])
            axes_row[0].spines[:].set_visible(True)
            relative = log_likelihood - log_likelihood.max()
            colours = [ORANGE if k == digit else BLUE for k in range(10)]
            for axes, bars in zip(axes_row[1:], (prior, relative, posterior), strict=True):
                low = -20.0 if bars is relative else 0.0
                axes.bar(range(10), bars.clamp_min(low) - low, bottom=low, color=colours, width=0.7)
                axes.set(xticks=range(10), ylim=(low, 1.0 if low == 0 else 0.0), yticks=[0, 1] if low == 0 else [-20, -10, 0])
                axes.tick_params(axis="x", length=0)
            best = int(posterior.argmax())
            axes_row[3].text(best, posterior[best] + 0.03, f"{float(posterior[best]):.2f}", ha="center", color=SOFT, size=9)
        for axes, title in zip(panels[0, 1:], ("prior", "log likelihood, less the best", "posterior"), strict=True):
            axes.set_title(title, pad=14)
        return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits", help="8x8 scans, or MNIST from $PYROVAE_DATA")
    parser.add_argument("--steps", type=int, default=2000, help="test images at most")
    parser.add_argument("--output", type=Path, default=Path("bayes_rule_digits.png"), help="the picture")
    arguments = parser.parse_args()
    main(arguments.data, arguments.steps, arguments.output)
