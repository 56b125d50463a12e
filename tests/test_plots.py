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


class TestGrids:
    """What make_grid lays out, in the look of the other plots."""

    def canvas(self, figure):
        return torch.as_tensor(figure.axes[0].images[0].get_array().filled(float("nan")))

    def test_images(self):
        x = torch.rand(5, 9)
        canvas = self.canvas(plots.image_grid(x, columns=3))
        assert canvas.shape == (7, 11), "3x3 images, gaps of 1, none around"
        assert torch.equal(canvas[:3, :3], x[0].reshape(3, 3))
        assert torch.equal(canvas[4:, 4:7], x[4].reshape(3, 3))
        assert not torch.equal(canvas[:3, 4:7], x[4].reshape(3, 3))
        assert (canvas[3] == plots.GAP).all()
        assert (canvas[4:, 8:] == plots.GAP).all(), "no sixth image"

    def test_one_image_strips_and_shapes(self):
        x = torch.rand(1, 16)
        assert torch.equal(self.canvas(plots.image_grid(x)), x.reshape(4, 4))
        assert self.canvas(plots.image_grid(torch.rand(3, 7))).shape == (5, 7), "strips lie beneath one another"
        assert self.canvas(plots.image_grid(torch.rand(2, 3, 5))).shape == (3, 11)

    def test_pairs(self):
        x, y = torch.rand(4, 4), torch.rand(4, 4)
        canvas = self.canvas(plots.reconstruction_grid(x, y, columns=2))
        assert torch.equal(canvas[:2, 3:5], x[1].reshape(2, 2))
        assert torch.equal(canvas[3:5, 3:5], y[1].reshape(2, 2))
        assert canvas[5:9].isnan().all(), "paper between the pairs"
        assert torch.equal(canvas[9:11, :2], x[2].reshape(2, 2))

    @pytest.mark.parametrize("dark", [False, True])
    def test_files(self, tmp_path, dark):
        figure = plots.image_grid(torch.rand(9, 64), title="A title", subtitle="beneath it", dark=dark)
        figure.savefig(tmp_path / "grid.png", dpi=160)
        assert (tmp_path / "grid.png").stat().st_size > 3000
        assert "A title" in words(figure)
        assert "its reconstruction" in words(plots.reconstruction_grid(torch.rand(3, 64), torch.rand(3, 64), dark=dark))

    @pytest.mark.parametrize(
        ("x", "said"),
        [
            (torch.full((2, 9), 255.0), r"values from 255 to 255; divide grey levels by the largest possible \(255\)"),
            (torch.full((2, 9), -0.1), r"values in \[0, 1\]"),
            (torch.full((2, 9), float("nan")), r"values in \[0, 1\]"),
            (torch.rand(0, 9), r"shape \(0, 9\)"),
            (torch.rand(9), r"shape \(9,\)"),
        ],
    )
    def test_refused(self, x, said):
        with pytest.raises(ValueError, match=said):
            plots.image_grid(x)
        with pytest.raises(ValueError, match="one reconstruction"):
            plots.reconstruction_grid(torch.rand(2, 9), torch.rand(3, 9))

    def test_without_torchvision(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision.utils", None)
        with pytest.raises(ImportError, match="expected torchvision for grids of images"):
            plots.image_grid(torch.rand(2, 9))


class TestTrained:
    """Plots of one trained model."""

    def test_training_curve(self):
        history = [{"step": 10 * k, "bound": -9.0 / (k + 1), "validation": -10.0 / (k + 1)} for k in range(5)]
        history[2]["validation"] = None
        history[3]["validation"] = -float("inf")
        figure = plots.training_curve(history, steps_per_epoch=5)
        drawn = {tuple(map(float, point)) for line in figure.axes[0].lines for point in line.get_xydata()}
        assert (2.0, -5.0) in drawn
        assert (2.0, -4.5) in drawn
        assert not [point for point in drawn if point[0] == 4.0 and point[1] != -3.0], "None is left out"
        assert "epoch" in words(figure)
        assert plots.training_curve(history[:1]) is None
        assert "no bound of any log p(x)" in words(plots.training_curve(history, normalized=False))
        assert "unrelaxed ELBO" in words(figure)
        assert "unrelaxed" not in words(plots.training_curve(history, what="bound"))
        assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())

    def test_a_loss_falls_and_is_no_bound(self):
        history = [{"step": k, "bound": -9.0 / (k + 1), "validation": -10.0 / (k + 1)} for k in range(5)]
        figure = plots.training_curve(history, what="loss", normalized=False)
        drawn = {tuple(map(float, point)) for line in figure.axes[0].lines for point in line.get_xydata()}
        assert (4.0, 2.0) in drawn
        low, high = figure.axes[0].get_ylim()
        assert low < 1.8 < high
        assert not {"bound", "unrelaxed", "KL", "ELBO"} & set(words(figure).replace(":", "").split())

    @pytest.mark.parametrize("base", [-0.001, -11.1013, -123456.789])
    def test_labels_stay_on_the_page(self, base):
        """However long the numbers at the left are."""
        history = [{"step": k, "bound": base + 1e-4 * k, "validation": base - 1e-4 * k} for k in range(5)]
        figure = plots.training_curve(history)
        figure.draw_without_rendering()
        page = figure.bbox
        for label in (figure.axes[0].yaxis.label, figure.axes[0].xaxis.label, *figure.axes[0].texts):
            box = label.get_window_extent()
            assert box.x0 >= page.x0, label.get_text()
            assert box.x1 <= page.x1, label.get_text()

    def test_temperature_curve(self):
        from pyrovae.diagnostics import temperature_curve

        net = toy.belief_net(visible=4, hidden=2)
        curve = temperature_curve(net, AmortizedMeanField(net), net.sample(6), [1.0, 0.2], num_particles=10)
        for dark in (False, True):
            figure = plots.temperature_curve(curve, dark=dark)
            drawn = {tuple(map(float, point)) for line in figure.axes[0].lines for point in line.get_xydata()}
            for t, relaxed in zip(curve.temperatures.tolist(), curve.relaxed.tolist(), strict=True):
                assert (t, relaxed) in drawn
                assert (t, curve.hard) in drawn
            said = words(figure).replace("\n", " ")
            assert plots.RELAXED in said
            assert "unrelaxed ELBO (≥)" in said
            gaps = {tuple(map(float, point)) for line in figure.axes[1].lines for point in line.get_xydata()}
            assert {(t, gap) for t, gap in zip(curve.temperatures.tolist(), curve.gap.tolist(), strict=True)} <= gaps
        assert "≥" not in words(plots.temperature_curve(curve, normalized=False))

    def test_latents(self):
        kl, usage = {"h1": torch.tensor([0.5, 0.001, 0.2]), "z": torch.rand(70)}, {"h1": torch.tensor([1.0, 4.0, 3.0])}
        figure = plots.latents(kl, usage, values={"h1": 4})
        heights = [round(float(bar.get_height()), 6) for bar in figure.axes[0].patches]
        assert heights == [round(float(v), 6) for v in kl["h1"]]
        bars = figure.axes[1].patches
        assert [float(bar.get_height()) for bar in bars] == [1.0, 4.0, 3.0]
        assert bars[0].get_facecolor() == bars[2].get_facecolor() != bars[1].get_facecolor(), "grey: it says nothing"
        assert "grey or hollow: says nothing" in words(figure)
        assert len(figure.axes[2].patches) == 70
        assert len(figure.axes) == 3, "a Normal has no values to count, and its panel takes the whole width"
        figure.draw_without_rendering()
        assert figure.axes[2].get_position().width > 1.8 * figure.axes[0].get_position().width
        assert "grey" not in words(plots.latents({"z": torch.ones(3)}))
        many = plots.latents({f"h{k}": torch.full((5,), float(k)) for k in range(8)})
        assert [float(bar.get_height()) for bar in many.axes[0].patches] == [5.0 * k for k in range(8)]

    def test_steps_are_one_panel(self):
        figure = plots.latents({f"z_{k}": torch.full((5,), float(k)) for k in (1, 2, 3)})
        (panel,) = figure.axes
        assert [float(bar.get_height()) for bar in panel.patches] == [5.0, 10.0, 15.0]
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["z_1", "z_2", "z_3"]
        assert len(plots.latents({"h1": torch.ones(2), "h2": torch.ones(2)}).axes) == 2, "layers are no steps"

    def test_one_bar_is_not_huge(self):
        (panel,) = plots.latents({"y": torch.ones(1)}).axes
        low, high = panel.get_xlim()
        assert panel.patches[0].get_width() < 0.2 * (high - low)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (10, 5), (13, 4), (30, 6), (60, 10), (64, 8), (100, 10)])
def test_columns(count, columns):
    """No gap in the last line where a divisor is near the root."""
    figure = plots.image_grid(torch.rand(count, 9))
    assert figure.axes[0].images[0].get_array().shape[1] == 4 * columns - 1


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
