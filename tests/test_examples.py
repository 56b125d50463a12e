"""Every example and every Python block of the README runs; each example checks its own result."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from pyrovae.inference import EM, Exact, Gibbs
from pyrovae.models import toy

ROOT = Path(__file__).parent.parent
STEPS = {
    "autoencoder_against_vae": 1000,
    "bayes_rule_digits": 60,
    "captured_svi": 60,
    "explaining_away": 100,
    "deep_belief_net": 12,
    "forward_and_reverse_kl": 100,
    "gumbel_softmax_temperature": 1000,
    "hyperprior": 40,
    "intractability": 300,
    "know_your_error": 300,
    "nuts_on_your_program": 60,
}
TRAINED = {
    "bernoulli_vae": 250,
    "categorical_vae": 250,
    "draw": 120,
    "gaussian_vae": 150,
    "hierarchical_vae": 250,
    "mixed_vae": 150,
    "our_guide_in_stock_svi": 60,
    "relaxed_by_hand": 250,
}


@pytest.fixture
def single():
    """float32, as a user's process begins."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example(path, monkeypatch, capsys, tmp_path):
    """It runs to its own checks, leaves nothing behind in the working directory, and draws its picture where it is told."""
    draws = "--output" in path.read_text(encoding="utf-8")
    picture = tmp_path / "pictures" / "picture.png"
    picture.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", [str(path), "--steps", str((STEPS | TRAINED)[path.stem]), *(["--output", str(picture)] if draws else [])]
    )
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [picture.parent]
    if draws:
        image = imread(picture)  # [height, width, channels]
        assert min(image.shape[:2]) > 200
        assert 0.02 < (image[..., :3].min(-1) < 0.9).mean() < 0.9, "ink on a light ground"


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_short_and_stock(name):
    """Under 40 lines of code, with Pyro's own loop and objective."""
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert sum(bool(line.strip()) for line in source.splitlines()) < 40
    assert "from pyro.infer import SVI, Trace_ELBO\n" in source
    assert "svi.step(" in source


def blocks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.usefixtures("single")
def test_readme(capsys, tmp_path, monkeypatch):
    """The blocks run one after another in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)  # a report is written
    found = blocks()
    assert found
    namespace = {"__name__": "readme"}
    for number, block in enumerate(found):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    assert "| exact |" in capsys.readouterr().out
    assert (tmp_path / "ward-report" / "report.html").exists()
    assert list(namespace["beside"].inference["bound"]) == ["exact", "lower"]
    learned = namespace["learned"]
    kept = dict(learned.models["EM"].named_parameters())
    assert all(torch.equal(leaf, kept[name]) for name, leaf in namespace["net"].named_parameters())


def test_who_leaves_the_random_state():
    """As the README says: Exact and exact EM do, Gibbs does not."""
    net = toy.belief_net(4, 2)
    x = net.sample(5)
    for method, stays in ((Exact().infer, True), (EM(num_iterations=1).fit, True), (Gibbs(3, 1, 1).infer, False)):
        before = torch.get_rng_state()
        method(net, x)
        assert torch.equal(before, torch.get_rng_state()) == stays


def test_readme_opens_short():
    assert len(blocks()[0].strip().splitlines()) <= 20


def test_readme_links():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
