"""Training, run folders, draws and evaluation: every family, round trips, damaged files."""

import json
import math
import shutil

import pytest
import torch
from brute_force import bits
from stats import bound, largest_z, means_agree

from pyrovae import data, train_job
from pyrovae.diagnostics import temperature_curve
from pyrovae.inference.variational import checkpoint
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.report_evaluation import Judged
from pyrovae.train_job import Settings, job
from pyrovae.train_job import folder as folder_of_run
from pyrovae.train_job.families import FAMILIES, parse_layers
from pyrovae.train_job.settings import resolved, rows_of

SIZES = {
    "categorical": {"latent": 2, "categories": 3, "hidden": (6,)},
    "bernoulli": {"latent": 3, "hidden": (6,)},
    "gaussian": {"latent": 2, "hidden": (6,)},
    "mixed": {"latent": 2, "categories": 3, "hidden": (6,)},
    "hierarchical": {"layers": (("normal", 3), ("bernoulli", 2)), "hidden": (6,)},
    "draw": {"latent": 2, "hidden": (6,), "steps": 2},
    "autoencoder": {"latent": 2, "hidden": (6,)},
}


def tiny(model="bernoulli", **options):
    base = {"data": "bars_and_stripes", "rows": 24, "batch_size": 12, "epochs": 3, "sizes": SIZES[model]}
    return Settings(model=model, **{**base, **options})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of each family, made when asked for."""
    folder, before = tmp_path_factory.mktemp("runs"), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)

    def run(model):
        if not (folder / model).exists():
            train_job.train(tiny(model), folder / model)
        return folder / model

    yield run
    torch.set_default_dtype(before)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestFamilies:
    @pytest.mark.parametrize("model", FAMILIES)
    def test_round_trip(self, runs, model):
        folder = runs(model)
        expected = {"config.json", "log.jsonl", "curve.png", "reconstructions.png"}
        expected |= {f"checkpoints/{name}.{kind}" for name in ("best", "last") for kind in ("pt", "json")}
        assert files(folder) == expected | ({"samples.png"} if model != "autoencoder" else set())
        assert all((folder / name).stat().st_size > 2000 for name in files(folder) if name.endswith(".png"))
        run = train_job.load_run(folder)
        assert run.config["settings"]["model"] == model
        x = rows_of(tiny(model), "test")[:4]
        means = train_job.reconstructions(run, x)
        assert means.shape == x.shape
        assert ((means > 0) & (means < 1)).all()
        discrete = FAMILIES[model].discrete
        judged = train_job.evaluate_run(folder, num_particles=10, rows=6, temperatures=(0.5, 1.0) if discrete else None)
        if model == "autoencoder":
            assert run.guide is None
            assert judged.loss.shape == (6,)
            return
        assert train_job.sample(folder, 3).unique().tolist() in ([0.0], [1.0], [0.0, 1.0])
        assert judged.evaluation.hard_elbo.shape == (6,)
        assert (judged.curve is not None) == discrete
        assert set(judged.values) == {"y"} if model == "mixed" else True
        assert judged.evaluation.normalized

    def test_seed_and_random_state(self, runs, tmp_path):
        """One seed, one result; the caller's generators stay."""
        state = torch.get_rng_state()
        train_job.train(tiny(), tmp_path / "again")
        assert torch.equal(state, torch.get_rng_state())
        train_job.train(tiny(seed=1), tmp_path / "other")
        first, again, other = (
            checkpoint.load(folder / "checkpoints").states["model"]["decoder.0.weight"]
            for folder in (runs("bernoulli"), tmp_path / "again", tmp_path / "other")
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("gradient", ["relaxed", "straight-through", "score"])
    def test_gradients(self, tmp_path, monkeypatch, gradient):
        monkeypatch.setattr(job, "_write_pictures", lambda *args: None)
        fit = train_job.train(tiny("categorical", gradient=gradient, epochs=1), tmp_path)
        assert math.isfinite(fit.history[-1]["bound"])
        judged = train_job.evaluate_run(tmp_path, num_particles=10, rows=4, temperatures=())
        assert (judged.evaluation.relaxed_elbo is not None) == (gradient == "relaxed")
        assert not any("hard draws" in note for note in judged.notes), "no relaxed number is shown"
        judged = train_job.evaluate_run(tmp_path, num_particles=10, rows=4, temperatures=(0.5,))
        assert any("hard draws" in note for note in judged.notes) == (gradient != "relaxed")

    def test_the_curve_is_taken_in_double_precision(self, tmp_path, monkeypatch):
        monkeypatch.setattr(job, "_write_pictures", lambda *args: None)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            train_job.train(tiny("categorical", gradient="relaxed", temperature=0.02, epochs=1), tmp_path)
            judged = train_job.evaluate_run(tmp_path, num_particles=20, rows=4, temperatures=(0.02, 0.5))
            single = train_job.load_run(tmp_path)
            x = rows_of(tiny("categorical"), "test")[:4]
            cheap = temperature_curve(single.model, single.guide, x, (0.02, 0.5), num_particles=10)
        finally:
            torch.set_default_dtype(before)
        assert judged.evaluation.hard_elbo.dtype == torch.float32
        assert judged.curve.relaxed_rows.dtype == torch.float64
        assert float(judged.curve.clamped.max()) < 1e-3
        assert float(cheap.clamped[0]) > 0.1  # what float32 would have shown
        (note,) = (note for note in judged.notes if "end of float32" in note)
        assert note == judged.evaluation.clamped_notes[0]

    def test_grey_is_no_likelihood(self, tmp_path, monkeypatch):
        monkeypatch.setattr(job, "_write_pictures", lambda *args: None)
        train_job.train(tiny(data="digits", binarize="grey", epochs=1), tmp_path)
        judged = train_job.evaluate_run(tmp_path, num_particles=10, rows=4, temperatures=())
        assert not judged.evaluation.normalized
        assert any("no likelihood" in note for note in judged.notes)
        assert folder_of_run.read_config(tmp_path)["likelihood"] == "cross_entropy"


class TestTruth:
    def test_evaluation_against_enumeration(self, runs):
        """The loaded weights are the trained ones: log p(x) by all codes; and the check sees other weights."""
        folder = runs("bernoulli")
        model = train_job.load_run(folder).model
        x = rows_of(tiny(), "test")[:12]

        def exact(net):
            codes = torch.stack(bits(3))
            with torch.no_grad():
                logits = net.decoder(codes)  # [8, D]
            log_px = -torch.nn.functional.binary_cross_entropy_with_logits(
                logits[:, None].expand(-1, len(x), -1), x.expand(8, -1, -1), reduction="none"
            ).sum(-1)
            return torch.logsumexp(log_px, 0) - 3 * math.log(2)

        found = train_job.evaluate_run(folder, num_particles=400, rows=12, temperatures=()).evaluation
        truth = exact(model)
        most = bound(12, 399)
        assert largest_z(found.log_likelihood, truth, found.stderr) < most
        assert (found.hard_elbo - most * found.hard_stderr < truth).all()
        other = train_job.load_run(folder).model
        other.reset_parameters()
        assert largest_z(found.log_likelihood, exact(other), found.stderr) > most

    def test_autoencoder_bound_is_minus_its_loss(self, runs):
        folder = runs("autoencoder")
        run = train_job.load_run(folder, which="last")
        x = rows_of(tiny("autoencoder"), "validation")
        with torch.no_grad():
            loss = float(run.model.loss(x).mean())
        history = checkpoint.load(folder / "checkpoints", "last").account["history"]
        assert history[-1]["validation"] == pytest.approx(-loss, rel=1e-9)
        assert history[0]["validation"] < history[-1]["validation"], "it has learned"

    def test_beta_moves_training_alone(self, tmp_path, monkeypatch):
        """A heavy KL shuts the latents; the evaluation is with weight 1 whatever the training."""
        monkeypatch.setattr(job, "_write_pictures", lambda *args: None)
        kl = {}
        for beta in (0.0, 50.0):
            train_job.train(tiny("gaussian", beta=beta, epochs=20, lr=0.05), tmp_path / str(beta))
            found = train_job.evaluate_run(tmp_path / str(beta), num_particles=20, which="last").evaluation
            kl[beta] = float(found.kl["z"].sum(-1).mean())
            spread = found.hard_stderr + found.analytic_stderr
            assert largest_z(found.hard_elbo, found.analytic_elbo, spread) < bound(24, 19), "both have weight 1"
        assert kl[50.0] < 0.1 < kl[0.0]


class TestResume:
    def test_bit_for_bit(self, runs, tmp_path, monkeypatch):
        step, calls = Optimization.step, []

        def interrupted(self, number):
            calls.append(number)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return step(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(Optimization, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train_job.train(tiny(), tmp_path)
        assert train_job.has_checkpoint(tmp_path)
        assert not (tmp_path / "samples.png").exists()
        train_job.train(tiny(), tmp_path, resume=True)
        whole, resumed = (checkpoint.load(f / "checkpoints") for f in (runs("bernoulli"), tmp_path))
        for part in ("model", "guide"):
            for name, value in whole.states[part].items():
                assert torch.equal(value, resumed.states[part][name]), name
        assert files(tmp_path) == files(runs("bernoulli"))

    def test_other_settings(self, runs):
        with pytest.raises(ValueError, match=r"expected the settings of the run that is resumed, epochs=3, got 4"):
            train_job.train(tiny(epochs=4), runs("bernoulli"), resume=True)
        with pytest.raises(ValueError, match=r"sizes="):
            train_job.train(tiny(sizes={"latent": 4, "hidden": (6,)}), runs("bernoulli"), resume=True)

    def test_other_data(self, runs, tmp_path, monkeypatch):
        shutil.copytree(runs("bernoulli"), tmp_path / "run")
        load = data.load
        monkeypatch.setattr(data, "load", lambda *args, **options: 1 - load(*args, **options))
        with pytest.raises(ValueError, match="expected the data that"):
            train_job.train(tiny(), tmp_path / "run", resume=True)

    def test_fresh_over_old(self, runs):
        before = {name: (runs("bernoulli") / name).stat().st_mtime_ns for name in files(runs("bernoulli"))}
        with pytest.raises(FileExistsError, match="holds one; go on with it by --resume"):
            train_job.train(tiny(), runs("bernoulli"))
        assert before == {name: (runs("bernoulli") / name).stat().st_mtime_ns for name in before}


class TestNothingHalfWritten:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, ValueError])
    def test_before_the_first_checkpoint(self, tmp_path, monkeypatch, error):
        def fails(*args, **options):
            raise error("early")

        monkeypatch.setattr(checkpoint, "save", fails)
        monkeypatch.setattr("pyrovae.inference.variational.training.Training.__call__", fails)
        with pytest.raises(error, match="early"):
            train_job.train(tiny(), tmp_path / "new")
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "mine.txt").write_text("stays")
        with pytest.raises(error, match="early"):
            train_job.train(tiny(), tmp_path / "old")
        assert files(tmp_path) == {"old/mine.txt"}
        assert not (tmp_path / "new").exists()

    def test_bad_settings(self, tmp_path):
        with pytest.raises(ValueError, match="batch_size"):
            train_job.train(tiny(batch_size=1000), tmp_path / "new")
        with pytest.raises(ValueError, match="device"):
            train_job.train(tiny(), tmp_path / "new", device="cuda:77")
        assert not list(tmp_path.iterdir())


class TestDamage:
    @pytest.fixture
    def copy(self, runs, tmp_path):
        shutil.copytree(runs("bernoulli"), tmp_path / "run")
        return tmp_path / "run"

    def edit(self, folder, change):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    def test_missing(self, tmp_path, copy):
        with pytest.raises(FileNotFoundError, match=r"no folder of that name.*pyrovae train --output"):
            train_job.load_run(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"a folder without one"):
            train_job.load_run(tmp_path)
        shutil.rmtree(copy / "checkpoints")
        with pytest.raises(FileNotFoundError, match="interrupted before its first"):
            train_job.load_run(copy)

    def test_truncated(self, copy):
        path = copy / "checkpoints" / "best.pt"
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match="truncated or damaged"):
            train_job.load_run(copy)
        train_job.load_run(copy, which="last")

    def test_config(self, copy):
        (copy / "config.json").write_text('{"format": 1')
        with pytest.raises(ValueError, match="damaged file"):
            train_job.load_run(copy)

    def test_version(self, copy):
        self.edit(copy, lambda config: config.update(format=99, versions={"pyrovae": "9.9"}))
        with pytest.raises(ValueError, match=r"format 99 .* pyrovae 9.9; install that version"):
            train_job.load_run(copy)

    def test_family(self, copy):
        self.edit(copy, lambda config: config["settings"].update(model="gan"))
        with pytest.raises(ValueError, match="known family"):
            train_job.load_run(copy)

    def test_architecture(self, copy):
        self.edit(copy, lambda config: config["model"].update(latent=4))
        with pytest.raises(ValueError, match="expected the architecture of"):
            train_job.load_run(copy)

    def test_best_or_last(self, copy):
        with pytest.raises(ValueError, match="choose from: best, last"):
            train_job.load_run(copy, which="first")


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"model": "gan"}, "choose from: categorical"),
            ({"data": "cifar"}, "choose from: digits"),
            ({"binarize": "maybe"}, "choose from: dynamic"),
            ({"gradient": "magic"}, "choose from: reinmax"),
            ({"model": "gaussian", "gradient": "reinmax"}, "reparameterised"),
            ({"model": "gaussian", "temperature": 0.5}, "nothing is relaxed"),
            ({"gradient": "score", "temperature": 0.5}, "nothing is relaxed"),
            ({"temperature": 0.0}, "temperature above 0"),
            ({"temperature": -1.0}, "temperature above 0"),
            ({"temperature": math.nan}, "temperature above 0"),
            ({"lr": math.inf}, "lr above 0 and finite"),
            ({"beta": -1.0}, "beta of at least 0"),
            ({"epochs": 0}, "epochs of at least 1"),
            ({"rows": 1}, "rows of at least 2"),
            ({"sizes": {"steps": 3}}, "sizes of the categorical family, latent, categories, hidden, got steps"),
        ],
    )
    def test_refused(self, options, words):
        with pytest.raises(ValueError, match=words):
            Settings(**options)

    def test_defaults(self):
        """Written out once, they are settings that stay."""
        for model in FAMILIES:
            settings = resolved(Settings(model=model))
            assert resolved(settings) == settings
            assert settings.binarize == "threshold"
        assert resolved(Settings(data="mnist")).binarize == "dynamic"
        assert resolved(Settings()).gradient == "reinmax"
        assert resolved(Settings(gradient="relaxed")).temperature == 0.5

    def test_stored(self, runs):
        for model in ("hierarchical", "draw"):
            config = folder_of_run.read_config(runs(model))
            assert folder_of_run.settings_of(config) == resolved(tiny(model))

    @pytest.mark.parametrize(
        "text", ["", "normal", "normal:0", "normal:2x2", "categorical:5", "magic:3", "normal:3;bernoulli:2"]
    )
    def test_layers(self, text):
        with pytest.raises(ValueError, match="expected layers from the data upwards"):
            parse_layers(text)

    def test_draw_has_one_hidden_size(self, tmp_path):
        with pytest.raises(ValueError, match="one hidden size"):
            train_job.train(tiny("draw", sizes={"hidden": (4, 4)}), tmp_path / "new")
        assert not list(tmp_path.iterdir())


class TestRemarks:
    @pytest.mark.parametrize(
        ("judged", "step", "said"), [(0, 8, "weights of step 0"), (4, 8, None), (4, 4, "Unfinished: step 4 of 8")]
    )
    def test_training(self, judged, step, said):
        """Weights that were never trained, and a run that has not ended, are told."""
        progress = {"step": step, "num_steps": 8, "finished": step == 8, "best_step": judged, "judged_step": judged}
        notes = Judged(title="", facts={}, training=progress).all_notes
        assert len(notes) == (said is not None)
        assert said is None or said in notes[0]

    def test_patience_is_an_end(self, tmp_path):
        train_job.train(tiny("gaussian", epochs=30, lr=1.0, patience=1), tmp_path)
        progress = train_job.progress_of(tmp_path)
        assert progress["step"] < progress["num_steps"]
        assert progress["finished"]


class TestAsking:
    def test_sample(self, runs):
        with pytest.raises(ValueError, match="prior to draw from"):
            train_job.sample(runs("autoencoder"))
        with pytest.raises(ValueError, match="at least 1 image"):
            train_job.sample(runs("bernoulli"), 0)
        means = train_job.sample(runs("bernoulli"), 4000, mean=True, seed=1)
        draws = train_job.sample(runs("bernoulli"), 4000, seed=2)
        assert torch.equal(train_job.sample(runs("bernoulli"), 4000, seed=2), draws)
        assert not torch.equal(train_job.sample(runs("bernoulli"), 4000, seed=3), draws)
        assert means_agree(draws - means, 0.0)
        assert not means_agree(draws - 0.85 * means, 0.0)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"split": "all"}, "choose from: train, validation, test"),
            ({"num_particles": 1}, "num_particles of at least 2"),
            ({"rows": 25}, "rows from 1 to the 24 of the test split"),
            ({"rows": 0}, "rows from 1"),
        ],
    )
    def test_evaluate(self, runs, options, words):
        with pytest.raises(ValueError, match=words):
            train_job.evaluate_run(runs("bernoulli"), **options)

    def test_nothing_to_relax(self, runs):
        with pytest.raises(ValueError, match="nothing to relax"):
            train_job.evaluate_run(runs("gaussian"), temperatures=(0.5,))
