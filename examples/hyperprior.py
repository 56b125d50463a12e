"""A prior on the prior's mean and variance: eight latent values share a Gaussian prior that is itself unknown.

x_i ~ Normal(z_i, noise), z_i ~ Normal(mean, variance), with a Normal-inverse-gamma prior on (mean, variance). Where the
noise is a known fraction of the variance, everything has a closed form, and Pyro's NUTS on the whole hierarchy, latent
values included, can be held against it. What is learned about the prior pulls each latent value towards the others.

Run: python examples/hyperprior.py
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import NUTS
from scipy import stats
from torch import Tensor

from pyrovae.inference import MCMC

NOISE = 0.5  # the variance of x_i - z_i, as a fraction of the prior's variance
BLUE, ORANGE, INK, SOFT = "#0072B2", "#D55E00", "#1c1e21", "#5b6168"


@dataclass(frozen=True)
class NormalInverseGamma:
    """variance ~ InverseGamma(shape, rate), mean given variance ~ Normal(loc, variance / count)."""

    loc: float = 0.0
    count: float = 0.2
    shape: float = 2.0
    rate: float = 2.0

    def given(self, x: Tensor) -> "NormalInverseGamma":
        """The posterior after `x [n]`, each Normal(mean, (1 + NOISE) variance) once z is summed out."""
        n, scaled = len(x), 1 + NOISE
        count = self.count + n / scaled
        loc = (self.count * self.loc + float(x.sum()) / scaled) / count
        spread = float(((x - x.mean()) ** 2).sum()) / scaled
        pull = self.count * n / scaled / count * (float(x.mean()) - self.loc) ** 2
        return NormalInverseGamma(loc, count, self.shape + n / 2, self.rate + (spread + pull) / 2)

    def log_density(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Of a mean and a variance."""
        shape, rate = torch.tensor([self.shape, self.rate]).to(variance)
        given = dist.Normal(self.loc, (variance / self.count).sqrt())
        return dist.InverseGamma(shape, rate).log_prob(variance) + given.log_prob(mean)

    def moments(self) -> dict[str, float]:
        """Expectations in closed form."""
        second = self.rate / (self.shape - 1) / self.count + self.loc**2
        log_variance = math.log(self.rate) - float(torch.digamma(torch.tensor(self.shape, dtype=torch.float64)))
        return {"mean": self.loc, "mean²": second, "log variance": log_variance, "1 / variance": self.shape / self.rate}

    def density_of(self, what: str, line: Tensor) -> Tensor:
        """The density of the mean (a Student t) or of the scale, sqrt(variance)."""
        if what == "mean":
            return dist.StudentT(2 * self.shape, self.loc, (self.rate / self.shape / self.count) ** 0.5).log_prob(line).exp()
        return dist.InverseGamma(self.shape, self.rate).log_prob(line**2).exp() * 2 * line


def log_evidence(prior: NormalInverseGamma, x: Tensor) -> float:
    """Evidence: log p(x) = log p(x | mean, variance) + log prior - log posterior, at any one point."""
    mean, variance = torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    likelihood = dist.Normal(mean, ((1 + NOISE) * variance).sqrt()).log_prob(x).sum()
    return float(likelihood + prior.log_density(mean, variance) - prior.given(x).log_density(mean, variance))


def by_quadrature(prior: NormalInverseGamma, x: Tensor) -> tuple[float, dict[str, float]]:
    """Log evidence and posterior moments from a grid over (mean, log variance): nothing of the closed form is used."""
    mean = torch.linspace(-60, 60, 6001, dtype=torch.float64)
    log_variance = torch.linspace(-6, 9, 601, dtype=torch.float64)
    m, v = mean.unsqueeze(-1), log_variance.exp()
    log_joint = prior.log_density(m, v) + v.log()  # the Jacobian of the log
    for value in x:
        log_joint = log_joint + dist.Normal(m, ((1 + NOISE) * v).sqrt()).log_prob(value)
    weight = (log_joint - log_joint.max()).exp()
    total = weight.sum()
    evidence = math.log(total * (mean[1] - mean[0]) * (log_variance[1] - log_variance[0])) + float(log_joint.max())
    values = {"mean": m, "mean²": m**2, "log variance": v.log(), "1 / variance": 1 / v}
    return evidence, {name: float((weight * value).sum() / total) for name, value in values.items()}


def eight_values(x: Tensor, prior: NormalInverseGamma) -> None:
    """The program: a prior of the prior, the prior, the data."""
    variance = pyro.sample("variance", dist.InverseGamma(torch.tensor(prior.shape).to(x), prior.rate))
    mean = pyro.sample("mean", dist.Normal(prior.loc, (variance / prior.count).sqrt()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, variance.sqrt()))
        pyro.sample("x", dist.Normal(z, (NOISE * variance).sqrt()), obs=x)


def farthest(draws: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """The largest |z| of the draws' moments `[chains, draws, ...]` by the means of 20 batches; and what it may be."""
    scores = []
    for name, value in draws.items():
        batches = torch.stack([part.mean(0) for chain in value for part in chain.chunk(20 // len(value))])
        scores.append(((batches.mean(0) - expected[name]).abs() / (batches.std(0) / len(batches) ** 0.5)).reshape(-1))
    z = torch.cat(scores)
    return float(z.max()), float(stats.t.isf(0.5e-5 / len(z), 19))


def main(steps: int, output: Path) -> None:
    """Closed form, quadrature and NUTS, side by side."""
    pyro.set_rng_seed(0)
    prior = NormalInverseGamma()
    x = torch.tensor([-0.9, 0.3, 1.1, 1.6, 2.0, 2.7, 3.1, 6.4], dtype=torch.float64)
    after = prior.given(x)
    evidence, moments = by_quadrature(prior, x)
    assert abs(evidence - log_evidence(prior, x)) < 1e-6
    for name, value in after.moments().items():
        assert abs(moments[name] - value) < 1e-5, name
        assert abs(moments[name] - prior.moments()[name]) > 1e-2, "the prior would not pass for the posterior"

    sampler = MCMC(NUTS(eight_values), num_samples=steps, num_chains=2, warmup_steps=max(50, steps // 2))
    draws = sampler.infer(eight_values, x, prior).draws  # {site: [chain, draw, ...]}
    mean, variance = draws["mean"], draws["variance"]
    sampled = {"mean": mean, "mean²": mean**2, "log variance": variance.log(), "1 / variance": 1 / variance, "z": draws["z"]}
    shrunk = (x + NOISE * after.loc) / (1 + NOISE)  # E[z | x]: linear in the mean, whatever the variance
    found, limit = farthest(sampled, {**after.moments(), "z": shrunk})
    assert found < limit, (found, limit)
    assert farthest(sampled, {**prior.moments(), "z": shrunk})[0] > limit, "the prior's moments would not pass"
    assert farthest(sampled, {**after.moments(), "z": x})[0] > limit, "nor would latent values that are not pulled in"
    print(f"log p(x) {log_evidence(prior, x):.6f}, by quadrature {evidence:.6f}")
    for name, value in after.moments().items():
        print(f"E[{name}]: prior {prior.moments()[name]:.3f}, posterior {value:.3f}, NUTS {float(sampled[name].mean()):.3f}")
    print(f"NUTS is off by {found:.1f} standard errors at most (bound {limit:.1f})")
    picture(prior, after, draws, x, shrunk).savefig(output)
    print(f"picture in {output}")


def picture(prior: NormalInverseGamma, after: NormalInverseGamma, draws: dict, x: Tensor, shrunk: Tensor) -> Figure:
    """Mean and scale before and after above; the latent values below."""
    with matplotlib.style.context(Path(__file__).with_name("look.mplstyle")):
        figure = Figure(figsize=(9.6, 6.4))
        grid = figure.add_gridspec(2, 2, left=0.03, right=0.97, top=0.83, bottom=0.09, hspace=0.5, wspace=0.08)
        figure.text(0.03, 0.955, "A prior on the prior: eight values teach what they have in common", size=13, weight="bold")
        figure.text(0.03, 0.917, "curves: closed form; bars: NUTS on the whole hierarchy", color=SOFT)
        for k, (name, title, low, high) in enumerate(
            (("mean", "the prior's mean", -5, 8), ("scale", "the prior's scale", 0, 5))
        ):
            axes = figure.add_subplot(grid[0, k])
            line = torch.linspace(low + 1e-3, high, 500, dtype=torch.float64)
            value = (draws["mean"] if k == 0 else draws["variance"].sqrt()).reshape(-1)
            axes.hist(value.numpy(), bins=60, range=(low, high), density=True, color=BLUE, alpha=0.25)
            for law, colour, label in ((prior, SOFT, "before"), (after, BLUE, "after")):
                density = law.density_of(name, line)
                axes.plot(line, density, color=colour)
                top = int(density.argmax())
                axes.annotate(
                    label,
                    (line[top], density[top]),
                    (0, 4),
                    textcoords="offset points",
                    ha="center",
                    color=colour,
                    weight="bold",
                )
            axes.set(xlim=(low, high), yticks=[], ylim=(0, 1.18 * float(after.density_of(name, line).max())), title=title)
            axes.spines["left"].set_visible(False)
        axes = figure.add_subplot(grid[1, :])
        low, high = draws["z"].flatten(0, 1).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), 0)
        axes.plot([after.loc] * 2, [-0.7, len(x) - 0.4], color=BLUE, lw=1.2, ls=(0, (3, 3)))
        axes.text(after.loc, len(x) - 0.25, "mean, after", color=BLUE, ha="center", size=9)
        for i in range(len(x)):
            axes.plot([low[i], high[i]], [i, i], color=ORANGE, lw=5, alpha=0.22, solid_capstyle="round")
            axes.annotate(
                "", (shrunk[i], i), (x[i], i), arrowprops={"arrowstyle": "-|>", "color": ORANGE, "shrinkA": 3, "shrinkB": 2}
            )
        axes.plot(x, range(len(x)), "o", mfc="white", color=INK, ms=6)
        axes.plot(shrunk, range(len(x)), "o", color=ORANGE, ms=6)
        axes.text(x[-1], len(x) - 0.65, "observed", color=INK, ha="center", size=9)
        axes.text(shrunk[-1], len(x) - 0.65, "E[z] and 90 %", color=ORANGE, ha="center", size=9)
        axes.set(yticks=[], ylim=(-0.7, len(x) + 0.3), title="each latent value is pulled towards the others")
        axes.spines["left"].set_visible(False)
        return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="draws of each of the two chains")
    parser.add_argument("--output", type=Path, default=Path("hyperprior.png"), help="the picture")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output)
