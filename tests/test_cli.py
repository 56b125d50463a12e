"""The command line, at a tiny budget."""

import logging
import random
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from pyrovae import __version__, main_job
from pyrovae.cli import app
from pyrovae.models import SigmoidBeliefNet

TINY = ["--data", "bars_and_stripes", "--hidden", "3", "--rows", "30", "--budget", "0.005"]


@pytest.fixture(scope="module")
def runner():
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "out"
    before = torch.get_default_dtype(), torch.get_num_threads(), logging.getLogger("pyro").level
    result = runner.invoke(app, ["compare", *TINY, "--output", str(folder)])
    assert before == (torch.get_default_dtype(), torch.get_num_threads(), logging.getLogger("pyro").level)
    return result, folder


class TestWhole:
    def test_output(self, whole):
        result, folder = whole
        assert result.exit_code == 0, result.output
        for name in main_job.FAMILIES["sbn"].methods:
            assert name in result.stdout
        assert all(mark in result.stdout for mark in ("= -", "≥ -", "≈ "))
        assert result.stdout.rstrip().splitlines()[-1] == f"Report: {folder / 'report.html'}"
        assert max(map(len, result.stdout.rstrip().splitlines()[:-1])) <= 80
        assert "…" not in result.stdout, "nothing is cut off at 80 columns"
        assert "Guessed" not in result.output
        assert "hold in expectation" in result.stdout
        assert " nan" not in result.stdout.lower()

    def test_folder(self, whole):
        _, folder = whole
        names = {p.name for p in folder.iterdir()}
        assert {"report.html", "learning.csv", "inference.csv", "comparison.json", "comparison.md", "samples.png"} <= names
        family = main_job.FAMILIES["sbn"]
        assert len(list((folder / "posteriors").iterdir())) == len(family.inferers) + len(family.guided)
        text = (folder / "report.html").read_text()
        assert "penalty" in text
        assert "float64" in text


def test_some_methods(runner, tmp_path):
    arguments = [
        "compare",
        *TINY,
        "--methods",
        "Exact-EM, monte_carlo em,gibbs",
        "--seeds",
        "2",
        "-q",
        "--output",
        str(tmp_path),
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == f"Report: {tmp_path / 'report.html'}"
    text = (tmp_path / "comparison.md").read_text()
    assert "seeds: 0, 1" in text
    assert "score function" not in text


TINY_FAMILIES = {
    "dbn": ["--hidden", "3,4"],
    "rbm": ["--hidden", "3"],
    "bm": ["--hidden", "2"],
    "mixture": ["--hidden", "3"],
    "hmm": ["--hidden", "2"],
}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_families(runner, tmp_path, family):
    tiny = ["--data", "bars_and_stripes", "--rows", "30", "--budget", "0.003", *TINY_FAMILIES[family]]
    result = runner.invoke(app, ["compare", "--model", family, *tiny, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    known = main_job.FAMILIES[family]
    for name in known.methods:
        assert name in result.stdout
    assert f"on the model that {known.reference} learned" in " ".join(result.stdout.split())
    assert " nan" not in result.stdout.lower()
    assert max(map(len, result.stdout.rstrip().splitlines()[:-1])) <= 80
    page = (tmp_path / "report.html").read_text()
    assert known.title.lower() in page.lower()


def test_inference_alone(runner, tmp_path):
    result = runner.invoke(app, ["compare", *TINY, "--methods", "mean field", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Learning" not in result.stdout
    assert "on the model that exact EM learned" in " ".join(result.stdout.split())


def test_one_seed_one_result():
    settings = main_job.Settings(data="bars_and_stripes", hidden=(3,), rows=30, budget=0.005)
    found = []
    for extra in (1, 4):
        torch.rand(extra)
        found.append(main_job.run(settings))
    for task in ("learning", "inference"):
        tables = [getattr(getattr(job, task), task).drop(columns=["seconds"]) for job in found]
        assert tables[0].equals(tables[1])
    other = main_job.run(main_job.Settings(data="bars_and_stripes", hidden=(3,), rows=30, budget=0.005, seeds=(1,)))
    assert not (other.learning.learning["log_p_train"] == found[0].learning.learning["log_p_train"]).any()


def test_help(runner):
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "compare" in result.stdout
    result = runner.invoke(app, ["compare", "--help"])
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    for option in ("--data", "--hidden", "--methods", "--budget", "--seeds", "--penalty", "--rows", "--output", "--quiet"):
        assert option in words
    for name in ("bars_and_stripes", *main_job.FAMILIES, *(name for f in main_job.FAMILIES.values() for name in f.methods)):
        assert name in words, name


def test_the_note_on_penalties_is_true():
    """Greedy pretraining takes none."""
    settings = main_job.Settings(
        family="dbn", data="bars_and_stripes", hidden=(3, 4), rows=30, budget=0.003, methods=("greedy", "Monte-Carlo EM")
    )
    found = main_job.run(settings)
    assert {name: fit.penalty for name, fit in found.learning.fits.items()} == {"greedy": 0.0, "Monte-Carlo EM": 0.1}
    assert any("All learners but greedy share" in note for note in found.notes)


def test_version_and_missing_word(runner):
    assert runner.invoke(app, ["--version"]).stdout.strip() == f"pyrovae {__version__}"
    assert runner.invoke(app, ["--data", "digits"]).exit_code == 2, "the word compare is needed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "cifar"], "choose from: digits"),
        (["--model", "vae"], "choose from: sbn"),
        (["--model", "rbm", "--hidden", "4,3"], "expected 1 number as --hidden for rbm"),
        (["--model", "dbn", "--hidden", "4"], "expected 2 or more numbers as --hidden for dbn"),
        (["--model", "mixture", "--penalty", "0.1"], "priors of its own"),
        (["--model", "rbm", "--methods", "exact EM"], "of rbm, got 'exact EM'; choose from: exact gradient"),
        (["--hidden", "0"], "--hidden"),
        (["--hidden", "eight"], "--hidden"),
        (["--methods", "exact EM,magic"], "got 'magic'; choose from: exact EM"),
        (["--methods", ","], "at least one method"),
        (["--budget", "huge"], "--budget"),
        (["--budget", "-1"], "--budget"),
        (["--seeds", "0"], "--seeds"),
        (["--seeds", "1,1"], "--seeds"),
        (["--penalty", "-1"], "--penalty"),
        (["--penalty", "nan"], "--penalty"),
        (["--rows", "0"], "--rows"),
        (["--threads", "0"], "--threads"),
        (["--data", "bars_and_stripes", "--hidden", "40", "--methods", "exact"], "2^40 codes"),
    ],
)
def test_bad_input(runner, tmp_path, arguments, words):
    result = runner.invoke(app, ["compare", "--output", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert re.search(r"Error: expected .*, got .*; .*", result.stderr), "what was expected, what came, what to do"
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_missing_files(runner, tmp_path, monkeypatch):
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    result = runner.invoke(app, ["compare", "--data", "mnist", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "PYROVAE_DATA" in result.stderr
    assert "pyrovae.data.load('mnist', download=True) in Python" in result.stderr


@pytest.mark.parametrize(
    ("hidden", "words"),
    [(22, "evaluations of log p.x, z., more than 8,388,608.*--methods"), (40, "do not fit and were left out")],
)
def test_left_out(hidden, words):
    """Waiting is advised only where it would help."""
    settings = main_job.Settings(data="digits", hidden=(hidden,))
    train, _ = main_job.load(settings)
    methods, (note,) = main_job.choose(settings, SigmoidBeliefNet(64, hidden), train)
    assert "exact EM" not in methods
    assert re.search(words, note)
    assert ("--methods" in note) == (hidden == 22)


def test_unwritable(runner, tmp_path, monkeypatch):
    """Refused before any work."""
    monkeypatch.setattr(main_job, "run", lambda *a, **k: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, ["compare", *TINY, "--output", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "expected a folder" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_interrupted(runner, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for target in ("pyrovae.main_job.job._trained_guide", "pyrovae.plots.marginals"):
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupted)
            result = runner.invoke(app, ["compare", *TINY, "--output", str(tmp_path / "out")])
        assert result.exit_code == 130, result.output
        assert "nothing was written" in result.stderr
        assert not list(tmp_path.iterdir())


def test_import_keeps_the_random_state():
    code = "import random; random.seed(1); s = random.getstate(); import pyrovae.cli; assert random.getstate() == s"
    subprocess.run([sys.executable, "-c", code], check=True)
    control = "import random; random.seed(1); s = random.getstate(); random.random(); assert random.getstate() != s"
    subprocess.run([sys.executable, "-c", control], check=True)
    assert random.getstate() is not None


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "pyrovae", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"pyrovae {__version__}"
