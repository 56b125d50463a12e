"""Two causes, one effect: once the alarm rings, a burglary and an earthquake compete, and no factorised posterior can say so.

A priori both are rare and independent. Given the alarm, one of them is likely, and news of one explains the other away: the
posterior is nearly an exclusive or. Mean field must take sides, and pays about log 2 nats for it; the closed-form bound of
Saul, Jaakkola and Jordan pays a little more; Gibbs visits both sides.

Run: python examples/explaining_away.py
"""

import argparse
import math
from functools import partial
from pathlib import Path

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from pyrovae.diagnostics import VariationalGaps, variational_gaps
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Exact, Gibbs, MeanField, SaulJaakkolaJordan, Variational
from pyrovae.models import SigmoidBeliefNet

BLUE, ORANGE, GREEN, INK, SOFT = "#0072B2", "#D55E00", "#009E73", "#1c1e21", "#5b6168"
PRIOR, WEIGHT, BIAS = -4.0, 10.0, -7.0  # logits: of a cause, what it adds to the alarm's, the alarm's alone
STATES = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)  # burglary, earthquake
ALARM = torch.ones(1, 1, dtype=torch.float64)


def alarm_net() -> SigmoidBeliefNet:
    """Burglary and earthquake above an alarm."""
    net = SigmoidBeliefNet(1, 2).double()
    with torch.no_grad():
        net.prior.fill_(PRIOR)
        net.weights[0].fill_(WEIGHT)
        net.biases[0].fill_(BIAS)
    return net


def by_hand() -> Tensor:
    """p(burglary, earthquake | alarm) by Bayes' rule, state by state."""
    joint = []
    for burglary, earthquake in STATES.tolist():
        prior = math.prod(1 / (1 + math.exp(-PRIOR if cause else PRIOR)) for cause in (burglary, earthquake))
        joint.append(prior / (1 + math.exp(-BIAS - WEIGHT * (burglary + earthquake))))
    return torch.tensor(joint, dtype=torch.float64) / sum(joint)


def factorised(means: Tensor) -> Tensor:
    """The four states under q, `[..., 4]`, for means `[..., 2]`."""
    wide = means.unsqueeze(-2)
    return torch.where(STATES > 0, wide, 1 - wide).prod(-1)


def kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) over the last dim."""
    return torch.where(q > 0, q * (q.clamp_min(1e-300) / p).log(), 0.0).sum(-1)


def saddle(p: Tensor) -> Tensor:
    """The best q that treats both causes alike."""
    grid = torch.linspace(0.001, 0.999, 9999, dtype=torch.float64)
    both = torch.stack((grid, grid), -1)
    return both[kl(factorised(both), p).argmin()]


def coordinate_ascent(p: Tensor, start: Tensor, sweeps: int = 30) -> Tensor:
    """Means along the way of mean field, `[steps, 2]`, one coordinate at a time."""
    log_p = p.log().reshape(2, 2)
    path, (a, b) = [start], start.tolist()
    for _ in range(sweeps):
        a = float(torch.sigmoid((log_p[1] - log_p[0]) @ torch.tensor([1 - b, b], dtype=torch.float64)))
        path.append(torch.tensor([a, b], dtype=torch.float64))
        b = float(torch.sigmoid((log_p[:, 1] - log_p[:, 0]) @ torch.tensor([1 - a, a], dtype=torch.float64)))
        path.append(torch.tensor([a, b], dtype=torch.float64))
    return torch.stack(path)


def main(steps: int, output: Path) -> None:
    """Infer five ways, check, draw."""
    torch.manual_seed(0)
    net, p = alarm_net(), by_hand()
    exact = Exact().infer(net, ALARM)
    states = {"h1": STATES.unsqueeze(1)}
    assert torch.allclose(exact.log_prob(states)[:, 0].exp(), p, rtol=0, atol=1e-10)

    # explaining away: the alarm makes a burglary likely, news of an earthquake takes that back
    prior = 1 / (1 + math.exp(-PRIOR))
    alarmed, explained = float(p[2] + p[3]), float(p[3] / (p[1] + p[3]))
    assert alarmed > 5 * prior
    assert explained < 1.5 * prior
    print(f"p(burglary) {prior:.3f}; given the alarm {alarmed:.3f}; given the alarm and an earthquake {explained:.3f}")

    # mean field takes sides, and is better off so than even-handed
    field = MeanField(16, tolerance=1e-12).infer(net, ALARM)
    taken, even = field.marginals["h1"][0], saddle(p)
    assert taken.max() > 0.9
    assert taken.min() < 0.1
    assert kl(factorised(even), p) > kl(factorised(taken), p) + 0.1
    closed = SaulJaakkolaJordan(16, tolerance=1e-12).infer(net, ALARM)

    # an encoder for both answers of the alarm, trained by score-function gradients
    guide, data = AmortizedMeanField(net).double(), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    Variational(guide, optim=partial(torch.optim.Adam, lr=0.02), num_guide_steps=steps).infer(net, data)
    amortised = torch.sigmoid(guide.encoder(ALARM))[0].detach()
    gaps = variational_gaps(net, ALARM, guide, max_iterations=2000)
    print(gaps)
    for gap, q in ((gaps.approximation, taken), (gaps.log_evidence - gaps.amortised, amortised)):
        assert abs(float(gap) - float(kl(factorised(q), p))) < 1e-6, "a gap is the KL that the picture shows"
    assert float(gaps.slack) > 0
    assert float(gaps.amortisation) > -1e-6

    # Gibbs needs no side: its frequencies are the posterior's
    chains, sweeps = 200, 2 * steps
    draws = Gibbs(sweeps, chains, 50).infer(net, ALARM).draws
    assert draws is not None
    number = (2 * draws["h1"][..., 0, 0] + draws["h1"][..., 0, 1]).long()  # [chain, draw]
    shares = torch.stack([(number == k).double().mean(1) for k in range(4)], -1)  # of each chain, one independent estimate
    z = (shares.mean(0) - p).abs() / (shares.std(0) / chains**0.5)
    bound = float(stats.t.isf(0.5e-5 / 4, chains - 1))  # four states, one false alarm in 100 000 runs
    assert z.max() < bound, z
    assert ((shares.mean(0) - factorised(even)).abs() / (shares.std(0) / chains**0.5)).max() > bound, "the check is sharp"
    print(f"Gibbs within {float(z.max()):.1f} standard errors (bound {bound:.1f})")

    named = {
        "exact": p,
        "Gibbs": shares.mean(0),
        "mean field": factorised(taken),
        "closed form (SJJ)": factorised(closed.marginals["h1"][0]),
        "amortised": factorised(amortised),
        "even-handed": factorised(even),
    }
    news = {"before": prior, "alarm": alarmed, "alarm and\nearthquake": explained}
    picture(p, named, news, gaps).savefig(output)
    print(f"picture in {output}")


def picture(p: Tensor, named: dict[str, Tensor], news: dict[str, float], gaps: VariationalGaps) -> Figure:
    """What the news do, the landscape of mean field, and six posteriors."""
    with matplotlib.style.context(Path(__file__).with_name("look.mplstyle")):
        figure = Figure(figsize=(9.6, 6.4))
        figure.text(0.02, 0.955, "Explaining away: two causes compete for one alarm", size=13, weight="bold")
        figure.text(0.02, 0.917, "the posterior is nearly an exclusive or; a factorised one must take sides", color=SOFT)
        grid = figure.add_gridspec(2, 24, left=0.08, right=0.98, top=0.82, bottom=0.05, hspace=0.42, height_ratios=(1.25, 1))
        _news(figure.add_subplot(grid[0, :6]), news)
        _landscape(figure.add_subplot(grid[0, 8:15]), p)
        _gaps(figure.add_subplot(grid[0, 18:]), gaps, float(kl(named["even-handed"], p)))
        for k, (name, q) in enumerate(named.items()):
            _table(figure.add_subplot(grid[1, 4 * k : 4 * k + 4]), name, q, p, labels=k == 0)
        return figure


def _news(axes: Axes, news: dict[str, float]) -> None:
    bars = axes.bar(list(news), list(news.values()), color=(SOFT, ORANGE, BLUE), width=0.62)
    axes.bar_label(bars, [f"{value:.2f}" for value in news.values()], padding=2, color=SOFT, size=9)
    axes.set(ylim=(0, 0.62), yticks=[0, 0.25, 0.5], title="p(burglary | news)")
    axes.tick_params(axis="x", length=0)


def _landscape(axes: Axes, p: Tensor) -> None:
    line = torch.linspace(0.002, 0.998, 201, dtype=torch.float64)
    means = torch.cartesian_prod(line, line)
    height = kl(factorised(means), p).reshape(201, 201)
    axes.contourf(line, line, height.T, levels=[0, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6], cmap="Greys", alpha=0.75, extend="max")
    for start in ([0.62, 0.93], [0.93, 0.68], [0.4, 0.1], [0.1, 0.34]):
        path = coordinate_ascent(p, torch.tensor(start, dtype=torch.float64), 6)
        axes.plot(*path.T, color=ORANGE, lw=1.3, alpha=0.9)
        axes.plot(*path[0], "o", ms=3.5, color=ORANGE)
    for end in (coordinate_ascent(p, torch.tensor(start, dtype=torch.float64))[-1] for start in ([0.9, 0.1], [0.1, 0.9])):
        axes.plot(*end, "*", ms=11, color=ORANGE, mec="white", clip_on=False)
    middle = saddle(p)
    axes.plot(*middle, "X", ms=8, color=INK, mec="white")
    axes.text(middle[0] + 0.06, middle[1] + 0.02, "even-handed:\na saddle", va="bottom", color=INK, size=9)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 1], yticks=[0, 1], xlabel="q(burglary)", ylabel="q(earthquake)")
    axes.set_title("coordinate ascent on −KL(q || p)")


def _gaps(axes: Axes, gaps: VariationalGaps, even: float) -> None:
    assert gaps.amortised is not None
    assert gaps.closed_form is not None
    below = {
        "even-handed": even,
        "amortised": float(gaps.log_evidence - gaps.amortised),
        "closed form": float(gaps.log_evidence - gaps.closed_form),
        "mean field": float(gaps.approximation),
    }
    bars = axes.barh(list(below), list(below.values()), color=(SOFT, GREEN, BLUE, ORANGE), height=0.6)
    axes.bar_label(bars, [f"{value:.3f}" for value in below.values()], padding=3, color=SOFT, size=9)
    axes.set(xlim=(0, 1.35), ylim=(-0.5, 3.5), xticks=[0, 0.5, 1], xlabel="nats")
    axes.set_title("gap to log p(alarm)")
    axes.tick_params(axis="y", length=0)


def _table(axes: Axes, name: str, q: Tensor, p: Tensor, *, labels: bool) -> None:
    axes.imshow(q.reshape(2, 2), cmap="Greys" if name in ("exact", "Gibbs") else "Oranges", vmin=0, vmax=1.25)
    for (i, j), value in zip(((0, 0), (0, 1), (1, 0), (1, 1)), q.tolist(), strict=True):
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", size=9, color="white" if value > 0.7 else INK)
    axes.set(xticks=[0, 1], yticks=[0, 1], xticklabels=["no", "quake"], yticklabels=["no", "burglary"] if labels else [])
    axes.tick_params(length=0)
    axes.set_title(name, loc="center", size=9.5, pad=16)
    told = "" if name == "exact" else f"KL {float(kl(q, p)):.3f}"
    axes.text(0.5, 1.04, told, transform=axes.transAxes, ha="center", color=SOFT, size=9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=1000, help="gradient steps of the encoder; Gibbs makes two sweeps for each"
    )
    parser.add_argument("--output", type=Path, default=Path("explaining_away.png"), help="the picture")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output)
