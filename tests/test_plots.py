"""Plots: figures without global state, that show what the tables say."""

import subprocess
import sys

import pytest
import torch

from pyrovae import plots
from pyrovae.compare import compare
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import EM, Exact, ExactLikelihood, Gibbs, Variational
from pyrovae.models import toy


@pytest.fixture(scope="module")
def both():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    net = toy.belief_net(visible=4, hidden=2)
    torch.manual_seed(1)
    x = net.sample(10)
    guide = AmortizedMeanField(net)
    learners = {
        "exact EM": EM(Exact(), 4),
        "exact gradient": Variational(None, ExactLikelihood(), num_steps=4),
        "Monte-Carlo EM": EM(Gibbs(5, 1, 2), 2),
        "VI": Variational(guide, num_steps=4),
    }
    learning = compare(net, x, learners, x_test=x[:5])
    inference = compare(net, x, {"exact": Exact(), "Gibbs": Gibbs(60, 2, 5), "VI": Variational(guide)}, learn=False)
    torch.set_default_dtype(before)
    return learning, inference


def words(figure):
    from matplotlib.text import Text

    figure.canvas.draw()
    return " ".join(t.get_text() for t in figure.findobj(Text) if t.get_visible())


@pytest.mark.parametrize("dark", [False, True])
def test_all(both, dark, tmp_path):
    learning, inference = both
    figures = [
        plots.learning_curves(learning, dark=dark),
        plots.learned(learning, dark=dark),
        plots.inference_errors(inference, dark=dark),
        plots.marginals(inference, dark=dark),
        plots.samples_grid({"data": torch.ones(5, 9), "a strip": torch.zeros(5, 7)}, dark=dark),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 3000
    said = [words(figure) for figure in figures]
    assert "VI (bound)" in said[0]
    assert "exact EM (bound)" not in said[0]
    assert "Monte-Carlo EM" not in said[0], "it has no bound to show"
    assert all(name in said[1] for name in learning.fits)
    assert "gives no evidence" in said[2]
    assert "0: exact" in said[2]
    assert "data" in said[4]


def test_unit_and_error_bars(both):
    """The unit of the comparison stands at the axes; with several seeds the bars are Student's."""
    from dataclasses import replace

    learning, inference = both
    assert "2 s.e. over rows" in words(plots.learned(learning))
    whole = {"unit": "nats, whole data set", "seeds": [0, 1, 2]}
    learning = replace(learning, metadata={**learning.metadata, **whole})
    inference = replace(inference, metadata={**inference.metadata, **whole})
    said = [
        words(figure)
        for figure in (plots.learning_curves(learning), plots.learned(learning), plots.inference_errors(inference))
    ]
    assert all("nats, whole data set" in text and "per datum" not in text for text in said)
    assert "4.3 s.e. over seeds" in said[1]


def test_values(both):
    """The filled and hollow markers stand where the table says."""
    learning, _ = both
    row = learning.learning.set_index("method").loc["VI"]
    figure = plots.learned(learning)
    drawn = {round(float(x), 9) for line in figure.axes[0].lines for x in line.get_xdata()}
    assert round(row["log_p_train"], 9) in drawn
    assert round(row["own_bound"], 9) in drawn
    assert round(row["difference"], 9) not in drawn


def test_nothing_to_show():
    net = toy.belief_net(visible=4, hidden=2)
    only = compare(net, net.sample(4), {"Monte-Carlo EM": EM(Gibbs(5, 1, 2), 2)})
    assert plots.learning_curves(only) is None
    assert plots.learned(only) is not None
    only = compare(net, net.sample(4), {"exact": Exact()})
    assert plots.marginals(only) is None


def test_no_pyplot():
    code = (
        "import sys, torch, pyrovae.plots as p, pyrovae.report, pyrovae.compare; assert 'matplotlib' not in sys.modules;"
        "p.samples_grid({'data': torch.ones(2, 4)}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
