"""`pyrovae train`, `sample` and `evaluate`: a round trip, what is printed, what is refused."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from typing import Annotated, get_origin, get_type_hints

import pytest
import torch
from typer.testing import CliRunner

from pyrovae import train_job
from pyrovae.cli import app
from pyrovae.cli_train import train_command
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.models import HierarchicalVAE
from pyrovae.train_job.settings import RECIPES, TEMPERATURES

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
        assert re.search(r"unrelaxed ELBO on validation rows: ≥ -\d+\.\d+ nats per datum", words)
        assert f"pyrovae evaluate {folder}" in words
        assert result.stdout.rstrip().splitlines()[-1] == f"Run: {folder}"
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
        assert not list(folder.glob(".*"))
        told = result.stderr.splitlines()
        assert (
            told[0]
            == "VAE with categorical latents, on bars and stripes: 24 training and 24 validation rows, 2 epochs, 4 steps"
        )
        assert re.fullmatch(r"step 4 of 4: unrelaxed ELBO on validation rows -\d+\.\d{3}, \d+ s", told[-1])

    def test_quiet(self, runner, tmp_path):
        result = runner.invoke(app, ["train", *TINY, *CODES, "-q", "--output", str(tmp_path / "run")])
        assert (result.stderr, result.stdout.strip()) == ("", f"Run: {tmp_path / 'run'}")

    def test_sample(self, runner, trained, tmp_path):
        _, folder = trained
        result = runner.invoke(app, ["sample", str(folder), "--n", "5", "--mean", "--output", str(tmp_path / "s.png")])
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == f"Picture: {tmp_path / 's.png'}"
        assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "s.png").stat().st_size > 500
        assert len(list(tmp_path.iterdir())) == 1

    def test_sample_overwrites_nothing(self, runner, trained, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        _, folder = trained
        result = runner.invoke(app, ["sample", str(folder), "--n", "2"])
        assert result.stdout.strip() == "Picture: run-samples.png"
        before = (tmp_path / "run-samples.png").read_bytes()
        refused(runner.invoke(app, ["sample", str(folder), "--n", "3"]), "which exists; name another, or add --overwrite")
        assert (tmp_path / "run-samples.png").read_bytes() == before
        assert runner.invoke(app, ["sample", str(folder), "--n", "3", "--overwrite"]).exit_code == 0
        assert (tmp_path / "run-samples.png").read_bytes() != before

    def test_few_particles(self, runner, trained, tmp_path):
        """The tail of fewer than 25 weights has no shape: a blank, in words and in the files."""
        shutil.copytree(trained[1], tmp_path / "run")
        for count, words in (("24", "Pareto k > 0.7: needs 25 draws or more, got 24"), ("25", "Pareto k > 0.7 ≈ ")):
            result = runner.invoke(app, ["evaluate", str(tmp_path / "run"), "--num-particles", count, "--rows", "6"])
            assert words in plain(result.stdout)
            assert ("needs 25" in result.stdout) == (count == "24")
            found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
            assert (found["summary"]["pareto_k_above_0.7"] is None) == (count == "24")
            header = (tmp_path / "run" / "evaluation.csv").read_text().splitlines()[0]
            assert ("pareto_k" in header) == (count == "25")

    def test_evaluate(self, trained, judged):
        _, folder = trained
        assert judged.exit_code == 0, judged.output
        words = plain(judged.stdout)
        for name in ("unrelaxed ELBO ≥ -", "the same, KL by formula ≥ -", "log p(x), 30 particles ≥ -", "Pareto k > 0.7 ≈ "):
            assert name in words
        assert "effective sample size ≈" in words
        assert re.search(r"\d of 2 latents say nothing of the data \(KL < 0.01 nats\)|values in use", words)
        assert "relaxed objective" in words
        assert "unfinished" not in words
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
        result = runner.invoke(app, ["train", "--resume", "--output", str(tmp_path / "run")])
        assert result.exit_code == 0, result.output
        assert "the run was finished already, at step 4 of 4: nothing was trained" in plain(result.stdout)
        assert "was finished already" not in trained[0].stdout
        after = json.loads((tmp_path / "run" / "checkpoints" / "last.json").read_text())
        assert after["step"] == json.loads(before)["step"]

    def test_autoencoder(self, runner, tmp_path):
        folder = str(tmp_path / "run")
        assert runner.invoke(app, ["train", "--model", "autoencoder", *TINY, "-q", "--output", folder]).exit_code == 0
        result = runner.invoke(app, ["evaluate", folder])
        assert result.exit_code == 0, result.output
        assert "reconstruction error ≈ " in plain(result.stdout)
        assert "and so no prior to draw images from" in plain(result.stdout)
        page = re.sub(r"base64,[^\"]*|<style>.*?</style>", "", (tmp_path / "run" / "report.html").read_text(), flags=re.DOTALL)
        for word in ("bound", "relaxed", "KL", "hard", "latents drawn", "beta", "ELBO"):
            assert word not in page, word
            assert word not in result.stdout, word
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
        result = runner.invoke(app, ["evaluate", folder, "--num-particles", "4", "--rows", "4"])
        assert "unfinished: step 2 of 4" in plain(result.stdout)
        found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert (found["training"]["step"], found["training"]["num_steps"], found["training"]["finished"]) == (2, 4, False)
        assert "Unfinished: step 2 of 4" in (tmp_path / "run" / "report.html").read_text()
        result = runner.invoke(app, ["train", "--resume", "--output", folder])
        assert result.exit_code == 0, result.output
        assert "finished already" not in result.stdout
        assert len(calls) == 4

    def test_nothing_kept(self, runner, tmp_path, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("pyrovae.inference.variational.training.Training.__call__", interrupted)
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
        (["--steps", "3"], "--steps does not apply to --model categorical, leave it out"),
        (["--model", "gaussian", "--layers", "normal:3"], "--layers does not apply to --model gaussian, leave it out"),
        (["--model", "hierarchical", "--layers", "normal"], "layers from the data upwards"),
        (["--model", "draw", "--attention", "2"], "attention"),
        (["--model", "gaussian", "--gradient", "reinmax"], "reparameterised"),
        (["--threads", "0"], "--threads"),
        (["--device", "cuda:77"], "got 'cuda:77'; leave it out for cpu"),
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
        run = tmp_path / "run"
        shutil.copytree(trained[1], run)
        whole = (run / "checkpoints" / "last.pt").read_bytes()
        (run / "checkpoints" / "last.pt").write_bytes(whole[:100])
        resume = ["train", "--resume", "--output", str(run)]
        best = json.loads((run / "checkpoints" / "best.json").read_text())["step"]
        result = runner.invoke(app, resume)
        refused(result, f"truncated or damaged; judge or draw from the other, of step {best}: pyrovae evaluate {run}")
        assert f"--checkpoint best; or copy best.pt over it and go on from there: pyrovae train --resume --output {run}" in (
            plain(result.stderr)
        )
        assert runner.invoke(app, ["evaluate", str(run), "--num-particles", "4", "--rows", "4"]).exit_code == 0
        shutil.copy(run / "checkpoints" / "best.pt", run / "checkpoints" / "last.pt")
        assert runner.invoke(app, resume).exit_code == 0
        (run / "checkpoints" / "last.pt").write_bytes(whole)
        (run / "checkpoints" / "best.pt").write_bytes(whole[:100])
        sample = ["sample", str(run), "--output", str(tmp_path / "s.png")]
        for command in (["evaluate", str(run)], sample):
            result = runner.invoke(app, command)
            refused(result, f"pyrovae evaluate {run} --checkpoint last")
            assert "PytorchStream" not in result.stderr
        assert (
            runner.invoke(app, ["evaluate", str(run), "--checkpoint", "last", "--num-particles", "4", "--rows", "4"]).exit_code
            == 0
        )
        (run / "checkpoints" / "last.pt").write_bytes(whole[:100])
        refused(runner.invoke(app, ["evaluate", str(run)]), "no other is left, so train again in another folder")
        refused(runner.invoke(app, sample), "no other is left")
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
        refused(result, "set PYROVAE_DATA to the folder that holds MNIST/raw, or add --download")
        assert not list(tmp_path.iterdir())

    def test_download(self, runner, tmp_path, monkeypatch):
        monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
        asked = []
        monkeypatch.setattr("pyrovae.data._download", lambda dataset, root: asked.append((dataset, root)))
        result = runner.invoke(app, ["train", "--data", "mnist", "--download", "--output", str(tmp_path / "out")])
        refused(result, "expected train-images-idx3-ubyte")
        assert asked == [("MNIST", tmp_path)]

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


def test_help_tells_the_defaults(runner):
    """What it says by hand is what the families and the recipes have."""
    kinds = get_type_hints(train_command, include_extras=True)
    said = {name: kinds[name].__metadata__[0].help.split("Default: ")[1].rstrip(".") for name in kinds if "Default: " in
            getattr(kinds[name].__metadata__[0] if get_origin(kinds[name]) is Annotated else None, "help", "")}  # fmt: skip
    small, large = RECIPES["small"], RECIPES["large"]
    assert said["epochs"] == f"{small['epochs']}; MNIST {large['epochs']}"
    assert said["lr"] == f"{small['lr']:g}; MNIST {large['lr']:g}"
    assert said["batch_size"] == f"{small['batch_size']}" == f"{large['batch_size']}"
    assert said["gradient"] == small["gradient"] == large["gradient"]
    t = TEMPERATURES
    assert said["temperature"] == f"reinmax {t['reinmax']:g}; relaxed and straight-through {t['relaxed']:g}"
    assert t["relaxed"] == t["straight-through"]
    families = train_job.FAMILIES
    sized = [name for name in families if "latent" in families[name].options]
    few, many = ([getattr(families[n], size)[families[n].options["latent"]] for n in sized] for size in ("small", "large"))
    assert re.findall(r"(\w+) (\d+)", said["latent"].split(";")[0]) == [(n, str(k)) for n, k in zip(sized, few, strict=True)]
    assert said["latent"].split("MNIST ")[1] == ", ".join(map(str, many))
    assert {families[n].small["categories"] for n in ("categorical", "mixed")} == {int(said["categories"])}
    assert said["steps"] == f"{families['draw'].small['steps']}; MNIST {families['draw'].large['steps']}"
    layers = [train_job.parse_layers(text) for text in said["layers"].split("; MNIST ")]
    assert layers == [families["hierarchical"].small["layers"], families["hierarchical"].large["layers"]]
    own = ",".join(map(str, inspect.signature(HierarchicalVAE).parameters["hidden"].default))
    hidden = [",".join(map(str, getattr(families["gaussian"], size)["hidden"])) for size in ("small", "large")]
    drawn = [getattr(families["draw"], size)["hidden"] for size in ("small", "large")]
    assert plain(kinds["hidden"].__metadata__[0].help).endswith(
        f"Default: {hidden[0]}; MNIST {hidden[1]}. Of draw {drawn[0]}; MNIST {drawn[1]}. Of hierarchical {own}."
    )


def test_torchvision_waits():
    code = "import sys, pyrovae.cli, pyrovae.train_job; assert not {'torchvision', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
