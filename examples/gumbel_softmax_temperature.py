"""The Gumbel-max trick, and what the temperature of its relaxation does to samples and to gradients.

Adding Gumbel noise to logits and taking the argmax draws a category exactly; the softmax at a temperature in place of the
argmax can be differentiated, at the price of a bias that falls and a variance that rises as the temperature goes to 0.

Run: python examples/gumbel_softmax_temperature.py
"""

import argparse
from pathlib import Path

import matplotlib.style
import pyro
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from pyrovae.distributions import RelaxedBernoulli, RelaxedOneHotCategorical

LOGITS = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
LOGIT = torch.tensor(0.4, dtype=torch.float64)  # of the coin whose gradient is looked at
BLUE, ORANGE, GREEN, INK, SOFT = "#0072B2", "#D55E00", "#009E73", "#1c1e21", "#5b6168"


def bound(count: int) -> float:
    """The |z| that none of `count` true hypotheses exceeds, but for one run in 100 000 (Bonferroni)."""
    return float(stats.norm.isf(0.5e-5 / count))


def f(z: Tensor) -> Tensor:
    """A function of the coin; the gradient of E[f(z)] with respect to the coin's logit is wanted."""
    return (z - 0.3) ** 2 + torch.sin(3 * z)


def exact_gradient() -> Tensor:
    """d/dlogit of (1 - p) f(0) + p f(1), by enumeration."""
    p = torch.sigmoid(LOGIT)
    zero, one = f(torch.tensor([0.0, 1.0], dtype=torch.float64))
    return p * (1 - p) * (one - zero)


def relaxed_moments(temperature: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pathwise gradient d f(z)/dlogit, z = sigmoid(y), y = (logit + logistic) / temperature.

    Quadrature in y by the trapezoid rule, whose error falls exponentially for such integrands.
    """
    y = torch.linspace(-60, 60, 24_001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(f(torch.sigmoid(y)).sum(), y)
    gradient = slope / temperature
    noise = temperature * y.detach() - LOGIT
    density = temperature * torch.sigmoid(noise) * torch.sigmoid(-noise)
    mean, square = (torch.trapezoid(gradient**k * density, y.detach()) for k in (1, 2))
    return mean, (square - mean**2).sqrt()


def sampled_gradients(temperature: float, n: int) -> Tensor:
    """`n` pathwise gradients through the library's relaxed coin."""
    logits = LOGIT.expand(n).clone().requires_grad_()
    z = RelaxedBernoulli(torch.tensor(temperature, dtype=torch.float64), logits=logits).rsample()
    return torch.autograd.grad(f(z).sum(), logits)[0]


def deviation(draws: Tensor, logits: Tensor) -> float:
    """The largest distance of the argmax frequencies from softmax(logits), in standard errors."""
    p, n = logits.softmax(-1), len(draws)
    frequencies = torch.bincount(draws, minlength=len(p)) / n
    return float(((frequencies - p).abs() / (p * (1 - p) / n).sqrt()).max())


def main(steps: int, output: Path) -> None:
    """Sample, integrate, draw and check."""
    pyro.set_rng_seed(0)
    n = 50 * steps
    gumbel = -torch.empty(n, 3, dtype=torch.float64).exponential_().log()
    argmax = (LOGITS + gumbel).argmax(-1)
    simplex = {t: RelaxedOneHotCategorical(torch.tensor(t).double(), logits=LOGITS).sample((n,)) for t in (5.0, 1.0, 0.5, 0.1)}
    temperatures = [float(t) for t in torch.logspace(-1.3, 0.7, 41)]
    moments = {t: relaxed_moments(t) for t in temperatures}
    measured = {t: sampled_gradients(t, n) for t in (0.1, 0.3, 1.0, 3.0)}
    picture(argmax, simplex, moments, measured).savefig(output)

    # the argmax is an exact draw, at every temperature too; a softmax at temperature 2 is told apart
    for draws in (argmax, *(z.argmax(-1) for z in simplex.values())):
        assert deviation(draws, LOGITS) < bound(3), deviation(draws, LOGITS)
        assert deviation(draws, LOGITS / 2) > bound(3)
    # our pathwise gradients have the mean and the second moment of the quadrature, and the mean is not the exact gradient
    for t, g in measured.items():
        mean, std = relaxed_moments(t)
        assert abs(g.mean() - mean) < bound(8) * g.std() / n**0.5, t
        square = g**2
        assert abs(square.mean() - (mean**2 + std**2)) < bound(8) * square.std() / n**0.5, t
    warm = measured[3.0]
    assert abs(warm.mean() - exact_gradient()) > bound(1) * warm.std() / n**0.5, "the bias at temperature 3 shows"
    # the limits: bias of order temperature, standard deviation of order temperature^(-1/2)
    low = [relaxed_moments(t) for t in (0.1, 0.05)]
    ratio = float((low[0][0] - exact_gradient()) / (low[1][0] - exact_gradient()))
    assert abs(ratio - 2) < 0.1, ratio
    assert abs(float(low[1][1] / low[0][1]) - 2**0.5) < 0.1
    print(f"argmax frequencies within {deviation(argmax, LOGITS):.1f} standard errors of softmax (bound {bound(3):.1f})")
    for t in (0.1, 1.0, 5.0):
        mean, std = relaxed_moments(t)
        bias = abs(float(mean - exact_gradient()))
        print(f"temperature {t:g}: bias {bias:.4f}, standard deviation {float(std):.3f} of one gradient")
    print(f"exact gradient {float(exact_gradient()):.4f}; picture in {output}")


def picture(argmax: Tensor, simplex: dict, moments: dict, measured: dict) -> Figure:
    """Samples on the triangle above; frequencies, bias and standard deviation below."""
    with matplotlib.style.context(Path(__file__).with_name("look.mplstyle")):
        figure = Figure(figsize=(9.6, 6.0))
        grid = figure.add_gridspec(2, 12, left=0.07, right=0.975, top=0.84, bottom=0.1, hspace=0.38, height_ratios=(1, 1.15))
        figure.text(
            0.015, 0.965, "Gumbel-max draws a category exactly; its softmax can be differentiated", size=13, weight="bold"
        )
        figure.text(0.015, 0.925, "1000 relaxed draws of one three-way choice; colour: where the argmax is", color=SOFT)
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
        for k, (t, z) in enumerate(simplex.items()):
            axes = figure.add_subplot(grid[0, 3 * k : 3 * k + 3])
            axes.fill(*corners.T, fc="#f5f6f7", ec="#d8dce0", lw=1)
            place = z[:1000] @ corners
            axes.scatter(
                *place.T, s=5, lw=0, alpha=0.5, clip_on=False, c=[(BLUE, ORANGE, GREEN)[i] for i in z[:1000].argmax(-1)]
            )
            axes.set(aspect="equal", xlim=(-0.08, 1.08), ylim=(-0.05, 0.97))
            axes.set_title(f"temperature {t:g}", loc="center", pad=9, weight="normal")
            axes.set_axis_off()
            for (across, up), name, colour in zip(
                ((-0.06, -0.03), (1.06, -0.03), (0.5, 0.9)), "ABC", (BLUE, ORANGE, GREEN), strict=True
            ):
                axes.text(
                    across, up, name, ha="center", va="bottom" if up > 0 else "center", color=colour, size=9, clip_on=False
                )

        axes = figure.add_subplot(grid[1, :3])
        p, seen = LOGITS.softmax(-1), torch.bincount(argmax, minlength=3) / len(argmax)
        axes.bar(range(3), seen, color=(BLUE, ORANGE, GREEN), width=0.62, alpha=0.85)
        for i in range(3):
            axes.plot([i - 0.4, i + 0.4], [p[i], p[i]], color=INK, lw=1.6)
            axes.text(i, max(p[i], seen[i]) + 0.02, f"{float(seen[i]):.3f}", ha="center", color=SOFT, size=9)
        axes.set(xticks=range(3), xticklabels="ABC", ylim=(0, 0.68), yticks=[0, 0.25, 0.5], title="argmax frequencies")
        axes.text(2.45, 0.6, "line: softmax", ha="right", color=INK, size=9)

        t = list(moments)
        x = list(measured)
        n = len(next(iter(measured.values())))
        axes = figure.add_subplot(grid[1, 4:8])
        exact = float(exact_gradient())
        axes.axhline(exact, color=INK, lw=1.6)
        axes.plot(t, [float(m) for m, _ in moments.values()], color=BLUE)
        error = [2 * float(g.std()) / n**0.5 for g in measured.values()]
        axes.errorbar(x, [float(g.mean()) for g in measured.values()], error, fmt="o", color=BLUE, ms=5, lw=1.4)
        axes.annotate("", (3, float(measured[3.0].mean()) + 0.005), (3, exact), arrowprops={"arrowstyle": "<->", "color": SOFT})
        axes.text(2.7, 0.09, "bias", ha="right", color=SOFT)
        axes.text(6, exact + 0.002, "exact, by enumeration", ha="right", va="bottom", color=INK, size=9)
        axes.set(ylim=(0, 0.145), yticks=[0, 0.05, 0.1])
        axes.set_title("mean of the gradient of f(coin)")
        axes.text(0.05, 0.004, "line: quadrature\ndots: sampled, ± 2 s.e.", color=BLUE, size=9)
        other = figure.add_subplot(grid[1, 9:])
        other.plot(t, [float(s) for _, s in moments.values()], color=BLUE)
        other.plot(x, [float(g.std()) for g in measured.values()], "o", color=BLUE, ms=5)
        other.set(
            yscale="log", yticks=[0.03, 0.1, 0.3, 1], yticklabels=["0.03", "0.1", "0.3", "1"], title="its standard deviation"
        )
        for panel in (axes, other):
            panel.set(xscale="log", xticks=x, xticklabels=[f"{v:g}" for v in x], xlabel="temperature")
            panel.minorticks_off()
        return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="fifty draws each")
    parser.add_argument("--output", type=Path, default=Path("gumbel_softmax_temperature.png"), help="the picture")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output)
