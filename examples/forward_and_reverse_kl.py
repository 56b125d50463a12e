"""Which way round the KL divergence is fitted: forward KL covers every mode, reverse KL settles on one.

KL(p || q) is infinite where q leaves mass of p uncovered, so its best Gaussian has the moments of p (zero-avoiding).
KL(q || p), which SVI minimises, is infinite where q puts mass that p lacks, so q shuns the gap (zero-forcing). Once the
family holds p, here with two components, both lead to p.

Run: python examples/forward_and_reverse_kl.py
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import Tensor

BLUE, ORANGE, GREEN, SOFT = "#0072B2", "#D55E00", "#009E73", "#5b6168"


@dataclass(frozen=True)
class Normals:
    """A mixture of K mean-field Gaussians over D coordinates."""

    logits: Tensor  # [K]
    loc: Tensor  # [K, D]
    log_scale: Tensor  # [K, D]

    def law(self) -> dist.MixtureSameFamily:
        """As a distribution."""
        parts = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts)


class Grid:
    """Quadrature over D coordinates: the trapezoid rule, exact to rounding for Gaussians as wide as two steps."""

    def __init__(self, dims: int) -> None:
        line = torch.linspace(-8, 8, (1601, 121)[dims - 1], dtype=torch.float64)
        self.line, self.points = line, torch.cartesian_prod(*[line] * dims).reshape(-1, dims)
        self.cell = (line[1] - line[0]) ** dims

    def mean(self, q: Normals, values: Tensor) -> Tensor:
        """E_q[values] of `values [M, ...]` at the points."""
        return torch.tensordot(q.law().log_prob(self.points).exp() * self.cell, values, 1)

    def kl(self, a: Normals, b: Normals) -> Tensor:
        """KL(a || b)."""
        return self.mean(a, a.law().log_prob(self.points) - b.law().log_prob(self.points))


def target(dims: int) -> Normals:
    """Two modes, the right one wider and heavier."""
    loc, scale = [[-2.4, -1.5], [2.4, 1.0]], [[0.5, 0.7], [0.8, 0.5]]
    columns = [torch.tensor(rows, dtype=torch.float64)[:, :dims] for rows in (loc, scale)]
    return Normals(torch.tensor([0.35, 0.65], dtype=torch.float64).log(), columns[0], columns[1].log())


def moments(p: Normals, grid: Grid) -> Normals:
    """The forward fit of one Gaussian: the mean and the variances of p, by quadrature."""
    mean = grid.mean(p, grid.points)
    variance = grid.mean(p, (grid.points - mean) ** 2)
    return Normals(torch.zeros(1, dtype=torch.float64), mean.unsqueeze(0), 0.5 * variance.log().unsqueeze(0))


def by_svi(p: Normals, start: Tensor, steps: int) -> tuple[Normals, Tensor]:
    """The reverse fit of one Gaussian by stock SVI; and 200 estimates of KL(q || p) by its ELBO at the end."""

    def model() -> None:
        pyro.sample("z", p.law())

    def guide() -> None:
        loc = pyro.param("loc", start.clone())
        log_scale = pyro.param("log_scale", torch.zeros_like(start))
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.003 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step()
    losses = torch.tensor([svi.evaluate_loss() for _ in range(200)], dtype=torch.float64)
    found = [pyro.param(name).detach().unsqueeze(0) for name in ("loc", "log_scale")]
    return Normals(torch.zeros(1, dtype=torch.float64), *found), losses


def minimize(divergence: Callable[[Normals], Tensor], start: Normals) -> Normals:
    """A local minimum of a divergence given by quadrature, from a start, by L-BFGS."""
    free = [leaf.clone().requires_grad_() for leaf in (start.logits, start.loc, start.log_scale)]
    optimizer = torch.optim.LBFGS(
        free, max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = divergence(Normals(*free))
        loss.backward()
        return loss

    optimizer.step(closure)
    return Normals(*(leaf.detach() for leaf in free))


def fits(dims: int, steps: int) -> tuple[Normals, dict[str, Normals]]:
    """Fit every way round, and check each fit."""
    grid, p = Grid(dims), target(dims)
    covering = moments(p, grid)
    weights, scale = p.logits.exp().unsqueeze(-1), p.log_scale.exp()
    mean = (weights * p.loc).sum(0)
    variance = (weights * (scale**2 + p.loc**2)).sum(0) - mean**2
    assert torch.allclose(covering.loc[0], mean, rtol=0, atol=1e-6)
    assert torch.allclose(covering.log_scale[0].exp() ** 2, variance, rtol=0, atol=1e-6)
    settled = minimize(lambda q: grid.kl(p, q), Normals(covering.logits, covering.loc + 0.5, covering.log_scale - 0.5))
    assert torch.allclose(settled.loc, covering.loc, rtol=0, atol=1e-5), "moments are where the forward KL is least"

    found = {"forward": covering}
    for k, name in enumerate(("left", "right")):
        q, losses = by_svi(p, 0.6 * p.loc[k], steps)
        kl, stderr = float(grid.kl(q, p)), float(losses.std()) / len(losses) ** 0.5
        near = float(stats.t.isf(0.5e-5 / 4, len(losses) - 1)) * stderr  # four fits, one false alarm in 100 000 runs
        assert abs(kl - float(losses.mean())) < near, "the ELBO says what the quadrature says"
        assert abs(float(grid.kl(p, q)) - float(losses.mean())) > near, "and would not pass for the other divergence"
        best = minimize(lambda q: grid.kl(q, p), q)
        flat = torch.cat([best.loc[0], best.log_scale[0]])
        bends = torch.autograd.functional.hessian(
            lambda v: grid.kl(Normals(covering.logits, v[None, :dims], v[None, dims:]), p), flat
        )
        assert torch.linalg.eigvalsh(bends).min() > 0, "a minimum, not a saddle"
        assert 0 <= kl - float(grid.kl(best, p)) < 1e-2, "and SVI stands at it"
        assert ((q.loc - p.loc[k]).abs() < 0.5 * scale[k]).all(), "on one mode"
        assert (q.log_scale.exp() < 0.7 * covering.log_scale.exp()).all()
        assert grid.kl(covering, p) > grid.kl(q, p), "the covering fit is worse, judged this way round"
        assert grid.kl(p, covering) < grid.kl(p, q), "and better, judged the other"
        print(f"{dims}-D, {name} mode: KL(q || p) = {kl:.4f}, by the ELBO {float(losses.mean()):.4f} ± {stderr:.4f}")
        found[name] = q

    start = Normals(torch.zeros(2, dtype=torch.float64), 0.6 * p.loc, torch.zeros_like(p.loc))
    for name, divergence in (("two, forward", lambda q: grid.kl(p, q)), ("two, reverse", lambda q: grid.kl(q, p))):
        found[name] = minimize(divergence, start)
        assert divergence(start) > 0.1
        assert max(grid.kl(p, found[name]), grid.kl(found[name], p)) < 1e-6, name
        assert torch.allclose(found[name].loc, p.loc, rtol=0, atol=1e-3), name
    print(f"{dims}-D: forward KL {float(grid.kl(p, covering)):.4f}; two components reach 0 either way")
    return p, found


PANELS = (
    ("forward KL covers both modes", {"forward": (BLUE, "-")}),
    ("reverse KL settles on one", {"left": (ORANGE, "-"), "right": (ORANGE, (0, (3, 2)))}),
    ("two components: both are exact", {"two, forward": (BLUE, "-"), "two, reverse": (ORANGE, (0, (3, 3)))}),
)


def picture(results: dict[int, tuple[Normals, dict[str, Normals]]]) -> Figure:
    """One and two dimensions, a row each; the target in grey."""
    with matplotlib.style.context(Path(__file__).with_name("look.mplstyle")):
        figure = Figure(figsize=(9.6, 6.2))
        panels = figure.subplots(2, 3, gridspec_kw={"height_ratios": (1, 1.35), "hspace": 0.12, "wspace": 0.06})
        figure.subplots_adjust(left=0.02, right=0.98, top=0.83, bottom=0.02)
        figure.text(0.02, 0.955, "A Gaussian fitted to two modes: the divergence decides what it sees", size=13, weight="bold")
        figure.text(0.02, 0.915, "grey: the target; colour: the mean-field fit, in one dimension and in two", color=SOFT)
        for dims, row in zip((1, 2), panels, strict=True):
            (p, found), grid = results[dims], Grid(dims)
            for axes, (title, lines) in zip(row, PANELS, strict=True):
                shape = (len(grid.line),) * dims
                density = {n: q.law().log_prob(grid.points).exp().reshape(shape).t() for n, q in {**found, "": p}.items()}
                if dims == 1:
                    axes.set_title(title, loc="center")
                    axes.fill_between(grid.line, density[""], color="#d5d9de", lw=0)
                    axes.set(xlim=(-7, 7), ylim=(0, 0.95))
                else:
                    axes.imshow(
                        density[""], extent=(-8, 8, -8, 8), origin="lower", cmap="Greys", alpha=0.75, interpolation="bicubic"
                    )
                    axes.set(xlim=(-7, 7), ylim=(-4.9, 4.9), aspect="auto")
                for name, (colour, dashes) in lines.items():
                    q = found[name]
                    kl = grid.kl(p, q) if "forward" in name else grid.kl(q, p)
                    label = f"KL({'p || q' if 'forward' in name else 'q || p'}) = {float(kl.abs()):.2f}"
                    if dims == 1:
                        axes.plot(grid.line, density[name], color=colour, ls=dashes)
                        places = {"forward": (0, 0.42), "left": (-2.4, 0.83), "right": (2.4, 0.54)}
                        up = 0.5 if "forward" in name else 0.43
                    else:
                        levels = [float(density[name].max()) * level for level in (0.05, 0.3, 0.7)]
                        axes.contour(grid.line, grid.line, density[name], levels=levels, colors=colour, linestyles=[dashes])
                        places = {"forward": (0, 4.0), "left": (-2.4, -4.3), "right": (2.4, 2.7)}
                        up = 4.0 if "forward" in name else 3.2
                    axes.text(
                        *places.get(name, (-6.6 if dims == 2 else -2.0, up)),
                        label,
                        ha="left" if "," in name else "center",
                        color=colour,
                    )
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(dims == 2)
                axes.spines["bottom"].set_visible(True)
        return figure


def main(steps: int, output: Path) -> None:
    """Fit, check and draw."""
    pyro.set_rng_seed(0)
    results = {dims: fits(dims, steps) for dims in (1, 2)}
    picture(results).savefig(output)
    print(f"picture in {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="SVI steps of each reverse fit")
    parser.add_argument("--output", type=Path, default=Path("forward_and_reverse_kl.png"), help="the picture")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output)
