"""`pyrovae train`, `sample` and `evaluate`: a round trip, what is printed, what is refused."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from pyrovae import train_job
from pyrovae.cli import app
from pyrovae.inference.optimization import Optimization

TINY = ["--data", "bars_and_stripes", "--rows", "24", "--batch-size", "12", "--epochs", "2", "--hidden", "6"]
CODES = ["--latent", "2", "--categories", "3"]


@pytest.fixture(scope="module")
def runner():
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def plain(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def trained(runner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    before = torch.get_default_dtype(), torch.get_num_threads()
    result = runner.invoke(app, ["train", *TINY, *CODES, "--output", str(folder)])
    assert before == (torch.get_default_dtype(), torch.get_num_threads())
    return result, folder


@pytest.fixture(scope="module")
def judged(runner, trained):
    _, folder = trained
    return runner.invoke(app, ["evaluate", str(folder), "--num-particles", "30", "--rows", "10"])


class TestRoundTrip:
    def test_train(self, trained):
        result, folder = trained
        assert result.exit_code == 0, result.output
        words = plain(result.stdout)
        assert "VAE with categorical latents, on bars and stripes" in words
        assert "latent 2, categories 3, hidden 6" in words
        assert re.search(r"unrelaxed bound on validation rows: ≥ -\d+\.\d+ nats per datum", words)
        assert f"pyrovae evaluate {folder}" in words
        assert result.stdout.rstrip().splitlines()[-1] == f"Run: {folder}"
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
        assert not list(folder.glob(".*"))

    def test_sample(self, runner, trained, tmp_path):
        _, folder = trained
        result = runner.invoke(app, ["sample", str(folder), "--n", "5", "--mean", "--output", str(tmp_path / "s.png")])
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == f"Picture: {tmp_path / 's.png'}"
        assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "s.png").stat().st_size > 500
        assert len(list(tmp_path.iterdir())) == 1

    def test_evaluate(self, trained, judged):
        _, folder = trained
        assert judged.exit_code == 0, judged.output
        words = plain(judged.stdout)
        for name in ("unrelaxed ELBO ≥ -", "the same, KL by formula ≥ -", "log p(x), 30 particles ≥ -", "Pareto k > 0.7 ≈ "):
            assert name in words
        assert "effective sample size ≈" in words
        assert "values in use" in words
        assert "Relaxed beside unrelaxed" in words
        assert "10 test rows, binary as generated" in words
        assert "≥ lower bound" in words
        assert max(map(len, judged.stdout.splitlines()[:-2])) <= 80
        assert "…" not in judged.stdout
        assert " nan" not in judged.stdout.lower()
        assert judged.stdout.rstrip().splitlines()[-1] == f"Report: {folder / 'report.html'}"

    def test_report(self, trained, judged):
        _, folder = trained
        text = (folder / "report.html").read_text()
        assert "http" not in text
        assert "<script" not in text
        assert text.count("data:image/png;base64,") == 2 * 5
        for words in ("Relaxed and unrelaxed", "Latents", "Reconstructions", "Samples", "Training", "float32", "pyro-ppl"):
            assert words in text
        assert 'class="m lower"' in text
        assert "Trained with hard draws" in text
        found = json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
        assert found["summary"]["rows"] == 10
        assert len(found["temperature_curve"]["relaxed"]) == 6
        lines = (folder / "evaluation.csv").read_text().splitlines()
        assert len(lines) == 11
        mean = sum(float(line.split(",")[1]) for line in lines[1:]) / 10
        assert lines[0].split(",")[1] == "hard_elbo"
        assert mean == pytest.approx(found["summary"]["hard_elbo"], rel=1e-5)
        assert not list(folder.glob(".*"))

    def test_resume(self, runner, trained, tmp_path):
        """A whole run ends at once; the options of the run need not be said again."""
        shutil.copytree(trained[1], tmp_path / "run")
        before = (tmp_path / "run" / "checkpoints" / "last.json").read_text()
        result = runner.invoke(app, ["train", "--resume", "--output", str(tmp_path / "run"), "-q"])
        assert result.exit_code == 0, result.output
        after = json.loads((tmp_path / "run" / "checkpoints" / "last.json").read_text())
        assert after["step"] == json.loads(before)["step"]

    def test_autoencoder(self, runner, tmp_path):
        folder = str(tmp_path / "run")
        assert runner.invoke(app, ["train", "--model", "autoencoder", *TINY, "-q", "--output", folder]).exit_code == 0
        result = runner.invoke(app, ["evaluate", folder])
        assert result.exit_code == 0, result.output
        assert "reconstruction error ≈ " in plain(result.stdout)
        assert "no prior, no draws, no bound" in plain(result.stdout)
        refused = runner.invoke(app, ["sample", folder, "--output", str(tmp_path / "s.png")])
        assert refused.exit_code == 2
        assert not (tmp_path / "s.png").exists()


class TestInterrupted:
    def test_resumes(self, runner, tmp_path, monkeypatch):
        step, calls = Optimization.step, []

        def interrupted(self, number):
            calls.append(number)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step(self, number)

        folder = str(tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(Optimization, "step", interrupted)
            result = runner.invoke(app, ["train", *TINY, *CODES, "--output", folder])
        assert result.exit_code == 130, result.output
        assert f"Go on with: pyrovae train --resume --output {folder}" in plain(result.stderr)
        result = runner.invoke(app, ["train", "--resume", "--output", folder])
        assert result.exit_code == 0, result.output
        assert len(calls) == 4

    def test_nothing_kept(self, runner, tmp_path, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("pyrovae.inference.Variational.fit", interrupted)
        result = runner.invoke(app, ["train", *TINY, "--output", str(tmp_path / "run")])
        assert result.exit_code == 130
        assert "nothing was kept" in result.stderr
        assert not list(tmp_path.iterdir())

    def test_report(self, runner, trained, tmp_path, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        shutil.copytree(trained[1], tmp_path / "run")
        (tmp_path / "run" / "report.html").unlink(missing_ok=True)
        monkeypatch.setattr("pyrovae.plots.latents", interrupted)
        result = runner.invoke(app, ["evaluate", str(tmp_path / "run"), "--num-particles", "4", "--rows", "4"])
        assert result.exit_code == 130
        assert "nothing was written" in result.stderr
        assert not (tmp_path / "run" / "report.html").exists()


def refused(result, words):
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert re.search(r"Error: expected .*, got .*[;:] .*", result.stderr), "what was expected, what came, what to do"
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gan"], "choose from: categorical"),
        (["--data", "cifar"], "choose from: digits"),
        (["--binarize", "maybe"], "choose from: dynamic"),
        (["--gradient", "magic"], "choose from: reinmax"),
        (["--temperature", "0"], "temperature above 0"),
        (["--temperature", "nan"], "temperature above 0"),
        (["--lr", "-1"], "lr above 0"),
        (["--beta", "-1"], "beta of at least 0"),
        (["--epochs", "0"], "epochs of at least 1"),
        (["--latent", "0"], "latent"),
        (["--categories", "1"], "categories"),
        (["--hidden", "eight"], "--hidden"),
        (["--steps", "3"], "sizes of the categorical family"),
        (["--model", "hierarchical", "--layers", "normal"], "layers from the data upwards"),
        (["--model", "draw", "--attention", "2"], "attention"),
        (["--model", "gaussian", "--gradient", "reinmax"], "reparameterised"),
        (["--threads", "0"], "--threads"),
        (["--device", "cuda:77"], "device"),
        (["--rows", "5"], "batch_size of at most the 5 training rows"),
        (["--resume"], "a run folder with a config.json"),
    ],
)
def test_bad_training(runner, tmp_path, arguments, words):
    result = runner.invoke(app, ["train", "--batch-size", "50", "--output", str(tmp_path / "out"), *arguments])
    refused(result, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "500"], "rows from 1 to the 24"),
        (["--num-particles", "1"], "num_particles of at least 2"),
        (["--split", "all"], "choose from: train"),
        (["--temperatures", "0,1"], "--temperatures above 0"),
        (["--temperatures", "hot"], "--temperatures above 0"),
        (["--checkpoint", "first"], "choose from: best"),
    ],
)
def test_bad_evaluation(runner, trained, arguments, words):
    refused(runner.invoke(app, ["evaluate", str(trained[1]), *arguments]), words)


class TestBadRuns:
    def test_missing(self, runner, tmp_path):
        for command in ("sample", "evaluate"):
            refused(runner.invoke(app, [command, str(tmp_path / "nowhere")]), "no folder of that name")
        assert not list(tmp_path.iterdir())

    def test_not_overwritten(self, runner, trained):
        before = (trained[1] / "config.json").read_text()
        refused(runner.invoke(app, ["train", *TINY, "--output", str(trained[1])]), "holds one; go on with it by --resume")
        assert (trained[1] / "config.json").read_text() == before

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            (["--epochs", "9"], "epochs=2, got 9"),
            (["--data", "digits"], "data='bars_and_stripes', got 'digits'"),
            (["--model", "gaussian"], "model='categorical', got 'gaussian'"),
            (["--latent", "3"], "sizes="),
            (["--gradient", "score"], "gradient='reinmax', got 'score'"),
        ],
    )
    def test_resume_with_others(self, runner, trained, option, words):
        refused(runner.invoke(app, ["train", "--resume", *option, "--output", str(trained[1])]), words)

    def test_truncated(self, runner, trained, tmp_path):
        shutil.copytree(trained[1], tmp_path / "run")
        for name in ("best", "last"):
            path = tmp_path / "run" / "checkpoints" / f"{name}.pt"
            path.write_bytes(path.read_bytes()[:100])
        refused(runner.invoke(app, ["evaluate", str(tmp_path / "run")]), "truncated or damaged")
        refused(runner.invoke(app, ["sample", str(tmp_path / "run"), "--output", str(tmp_path / "s.png")]), "truncated")
        refused(runner.invoke(app, ["train", "--resume", "--output", str(tmp_path / "run")]), "truncated")
        assert not (tmp_path / "s.png").exists()

    def test_picture(self, runner, trained, tmp_path):
        for options, words in ((["--n", "0"], "at least 1 image"), (["--columns", "0"], "columns")):
            result = runner.invoke(app, ["sample", str(trained[1]), *options, "--output", str(tmp_path / "s.png")])
            refused(result, words)
        refused(runner.invoke(app, ["sample", str(trained[1]), "--output", str(tmp_path / "s.doc")]), ".png, .pdf or .svg")
        assert not list(tmp_path.iterdir())

    def test_missing_files(self, runner, tmp_path, monkeypatch):
        monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
        result = runner.invoke(app, ["train", "--data", "mnist", "--output", str(tmp_path / "out")])
        refused(result, "pyrovae.data.load('mnist', download=True) in Python")
        assert not list(tmp_path.iterdir())

    def test_without_torchvision(self, runner, trained, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision.utils", None)
        result = runner.invoke(app, ["sample", str(trained[1]), "--output", str(tmp_path / "s.png")])
        assert result.exit_code == 2
        assert "expected torchvision for grids of images" in result.stderr
        assert not list(tmp_path.iterdir())


def test_help(runner):
    words = plain(runner.invoke(app, ["--help"]).stdout)
    assert all(command in words for command in ("train", "sample", "evaluate", "compare"))
    words = plain(runner.invoke(app, ["train", "--help"]).stdout)
    for option in (*train_job.OPTIONS, "gradient", "temperature", "beta", "patience", "resume", "binarize"):
        assert f"--{option}" in words
    for family in train_job.FAMILIES:
        assert family in words


def test_torchvision_waits():
    code = "import sys, pyrovae.cli, pyrovae.train_job; assert not {'torchvision', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
