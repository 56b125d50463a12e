"""Contrastive divergence: what it learns, what it says of it, what it leaves alone, what it refuses."""

import json
import warnings
from functools import partial

import pyro
import pytest
import torch

from pyrovae import data
from pyrovae.compare import compare
from pyrovae.distributions import RBM
from pyrovae.inference import ContrastiveDivergence, ExactLikelihood, ParallelTempering, Variational
from pyrovae.models import BoltzmannMachine, RestrictedBoltzmannMachine

SGD = torch.optim.SGD
STEPS = 400


def bars(rows=400, size=2):
    patterns, p = data.patterns("bars_and_stripes", size=size, dtype=torch.float64)
    return patterns[torch.multinomial(p.double(), rows, replacement=True)]


def blocks(rows=400):
    """1100 or 0011, each pixel flipped with probability 0.05: uncorrelated pixels are far from it."""
    side = torch.rand(rows, 1) < 0.5
    clean = torch.where(side, torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    return (clean != (torch.rand(rows, 4) < 0.05)).double()


def log_likelihood(model, x):
    with torch.no_grad():
        p = model.distribution()
        if x.shape[1] < p.event_shape[0]:
            p = p.marginal(x.shape[1])
        return float(p.log_prob(x).mean())


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(persistent chains|round trips)")
        yield


def best(x):
    """The entropy of the rows seen: no model's mean log likelihood is above its negative."""
    counts = torch.unique(x, dim=0, return_counts=True)[1] / len(x)
    return float((counts * counts.log()).sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 3, "centered": False},
        {"persistent": False, "k": 10},
        {"negative": ParallelTempering(3, 50)},
        {"negative": "exact"},
        {"batch_size": None},
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("make", [lambda: RestrictedBoltzmannMachine(4, 4), lambda: BoltzmannMachine(4, 2)], ids=["rbm", "bm"])
def test_it_learns(make, options):
    x, model = blocks(), make()
    method = ContrastiveDivergence(
        num_steps=STEPS,
        num_chains=200,
        optim=partial(SGD, lr=0.5),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / STEPS),
        **options,
    )
    fit = method.fit(model, x, validation=x[:100])
    start, end = fit.history[0], fit.history[-1]
    assert start["bound"] < best(x) - 0.5
    assert best(x) - 0.1 < end["bound"] < best(x)
    assert end["bound"] == pytest.approx(log_likelihood(model, x), abs=1e-9)
    assert end["validation"] == pytest.approx(log_likelihood(model, x[:100]), abs=1e-9)
    assert fit.bound == "exact"
    assert fit.exact_learning == (options.get("negative") == "exact")
    assert end["learning_rate"] == 0
    assert fit.model_evaluations > STEPS * (method.batch_size or 400)
    if isinstance(model, BoltzmannMachine):
        J = model.distribution().J
        assert torch.equal(J, J.T)
        assert not bool(J.diagonal().any())


def test_exact_steps_are_those_of_exact_likelihood():
    """The negative phase by enumeration, plain gradient: the same parameters as exact gradient learning through autograd."""
    x = bars(50)
    for make in (lambda: RestrictedBoltzmannMachine(4, 3), lambda: BoltzmannMachine(4, 2), lambda: BoltzmannMachine(4)):
        torch.manual_seed(3)
        ours = make()
        torch.manual_seed(3)
        theirs = make()
        # λ θ / N here and λ θ for the sum over data there
        ContrastiveDivergence(
            num_steps=5, batch_size=None, centered=False, negative="exact", penalty=2.0, optim=partial(SGD, lr=0.3)
        ).fit(ours, x)
        Variational(None, ExactLikelihood(), num_steps=5, penalty=2.0, optim=partial(SGD, lr=0.3 / 50)).fit(theirs, x)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-10)


def test_only_the_parameters_change():
    x, model = bars(), RestrictedBoltzmannMachine(4, 3)
    model.register_buffer("witness", torch.ones(2))
    model.weight.grad = torch.full_like(model.weight, 7.0)
    before = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    fit = ContrastiveDivergence(num_steps=10).fit(model, x)
    for name, leaf in model.named_parameters():
        assert not torch.equal(leaf, before[name]), name
        assert torch.equal(fit.states["model"][name], leaf)
    assert torch.equal(model.weight.grad, torch.full_like(model.weight, 7.0))
    assert model.hidden_bias.grad is None
    assert torch.equal(model.witness, torch.ones(2))
    assert not list(pyro.get_param_store())
    frozen = RestrictedBoltzmannMachine(4, 3)
    frozen.weight.requires_grad_(False)
    kept = frozen.weight.clone()
    ContrastiveDivergence(num_steps=10).fit(frozen, x)
    assert torch.equal(frozen.weight, kept)
    assert bool(frozen.visible_bias.any())


def test_records_do_not_change_the_training_and_seeds_repeat_it():
    x, ends = bars(), []
    for every, seed in ((1, 1), (50, 1), (50, 2)):
        torch.manual_seed(seed)
        model = RestrictedBoltzmannMachine(4, 3)
        fit = ContrastiveDivergence(num_steps=50, log_every=every, preprocess=data.binarize).fit(model, x, validation=x[:9])
        assert fit.seed == seed
        assert len(fit.history) == (51 if every == 1 else 2)
        ends.append(model.weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


def test_the_history():
    seen = []
    x, model = bars(), RestrictedBoltzmannMachine(4, 3)
    fit = ContrastiveDivergence(num_epochs=2, batch_size=100, log_rows=30, callback=seen.append).fit(model, x)
    assert list(fit.history) == seen
    json.dumps(seen)
    assert [r["step"] for r in seen] == list(range(9))
    assert seen[-1]["epoch"] == 2
    assert {"loss", "bound", "stderr", "validation", "seconds", "rows", "reconstruction", "learning_rate"} < set(seen[0])
    assert all(r["loss"] is None and r["stderr"] == 0 and r["rows"] == 30 and r["validation"] is None for r in seen)
    assert "rhat" in seen[-1]
    assert "rhat" not in seen[0]
    fit = ContrastiveDivergence(num_steps=20, negative=ParallelTempering(3, 10)).fit(model, x)
    assert 0 < fit.history[-1]["swap_rate"] <= 1
    assert fit.history[-1]["round_trips"] > 0
    x = x[:100]
    fit = ContrastiveDivergence(num_steps=2, exact_bits=2).fit(model, x)
    assert fit.bound == "estimate"
    assert [r["bound"] for r in fit.history] == [None] * 3
    with torch.no_grad():
        h = torch.sigmoid(model.hidden_bias + x @ model.weight)
        error = (torch.sigmoid(model.visible_bias + h @ model.weight.T) - x).square().mean()
    assert fit.history[-1]["reconstruction"] == pytest.approx(float(error))


def test_chains_that_do_not_mix_are_told():
    model = RestrictedBoltzmannMachine(6, 1)
    with torch.no_grad():
        model.weight.fill_(14.0)
        model.visible_bias.fill_(-7.0)
        model.hidden_bias.fill_(-41.0)
    x = torch.zeros(100, 6, dtype=torch.float64)
    x[:50] = 1
    with pytest.warns(UserWarning, match=r"persistent chains have not mixed: R-hat .* is \d"):
        fit = ContrastiveDivergence(num_steps=2, optim=partial(SGD, lr=1e-6)).fit(model, x)
    assert fit.history[-1]["rhat"] > 1.1
    with pytest.warns(UserWarning, match="0 round trips"):
        ContrastiveDivergence(num_steps=2, negative=ParallelTempering(2, 4), optim=partial(SGD, lr=1e-6)).fit(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ContrastiveDivergence(num_steps=30).fit(RestrictedBoltzmannMachine(4, 3), bars())


def test_targets():
    x = bars()
    parts = [torch.zeros(4, 3, requires_grad=True), torch.zeros(4, requires_grad=True), torch.zeros(3, requires_grad=True)]
    fit = ContrastiveDivergence(num_steps=20).fit(RBM(*parts), x)
    assert bool(parts[1].any())
    assert set(fit.states["model"]) == {"0", "1", "2"}
    model = RestrictedBoltzmannMachine(4, 3)

    class Twice(torch.nn.Module):
        """Weights that are computed: a sum of what is learned."""

        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Parameter(torch.zeros(4, 3))
            self.inner = model

        def distribution(self):
            return RBM(self.inner.weight + 2 * self.extra, self.inner.visible_bias, self.inner.hidden_bias)

    twice, weight = Twice(), model.weight.detach().clone()
    ContrastiveDivergence(num_steps=20).fit(twice, x)
    assert torch.allclose(twice.extra, 2 * (model.weight - weight), atol=1e-12)
    assert bool(twice.extra.any())
    with pytest.raises(ValueError, match="none to learn"):
        ContrastiveDivergence().fit(RBM(*(part.detach() for part in parts)), x)


def test_other_dtypes():
    model = RestrictedBoltzmannMachine(4, 3).float()
    ContrastiveDivergence(num_steps=3).fit(model, bars().bool())
    assert model.weight.dtype == torch.float32


def test_constant_pixels_get_finite_biases():
    x = bars()
    x = torch.cat([x, torch.zeros(len(x), 1), torch.ones(len(x), 1)], 1).double()
    for options in ({}, {"persistent": False}, {"negative": ParallelTempering(3, 20)}):
        model = RestrictedBoltzmannMachine(6, 3)
        model.initialize_bias(x)
        ContrastiveDivergence(num_steps=300, optim=partial(SGD, lr=0.5), **options).fit(model, x)
        assert float(model.visible_bias.detach().abs().max()) < 20
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_compare_and_clamped_chains():
    x = bars(100)
    methods = {
        "PCD": ContrastiveDivergence(num_steps=50),
        "exact": Variational(None, ExactLikelihood(), num_steps=20),
    }
    found = compare(RestrictedBoltzmannMachine(4, 3), x, methods)
    assert list(found.learning["bound"]) == ["exact", "exact"]
    assert found.learning["log_p_train"].notna().all()
    assert found.learning["note"][1].startswith("the reference")
    assert "exact" in found.learning["note"][0]
    model = BoltzmannMachine(4, 12)
    ContrastiveDivergence(num_steps=20, exact_bits=0).fit(model, x)
    assert bool(model.couplings.any())


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"k": 1.5},
        {"num_chains": 0},
        {"batch_size": 0},
        {"num_epochs": 0},
        {"num_steps": 0},
        {"num_steps": 5, "num_epochs": 2},
        {"log_every": 0},
        {"log_rows": 0},
        {"exact_bits": -1},
        {"penalty": -1.0},
        {"negative": "gibbs"},
        {"negative": ParallelTempering(3, 2), "persistent": False},
        {"optim": SGD([torch.zeros(1, requires_grad=True)], lr=0.1)},
    ],
    ids=", ".join,
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=r"expected .* got|expected persistent=True"):
        ContrastiveDivergence(**options)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.full((200, 4), 0.5), r"expected x in \{0, 1\}, got values from 0.5"),
        (torch.full((200, 4), float("nan")), "400 NaN"),
        (torch.zeros(200, 3), r"expected data \[N, 4\]"),
        (torch.zeros(0, 4), "at least one row"),
        (torch.zeros(200), r"got \[200\]"),
        (torch.zeros(50, 4), "expected batch_size <= the 50 rows"),
        ([[0.0]], "got list"),
    ],
)
def test_bad_data_are_refused(x, what):
    with pytest.raises(ValueError, match=what):
        ContrastiveDivergence(num_steps=2).fit(RestrictedBoltzmannMachine(4, 3), x)


def test_bad_validation_and_bad_steps_are_refused():
    x = bars()
    with pytest.raises(ValueError, match=r"expected data \[N, 4\]"):
        ContrastiveDivergence(num_steps=2).fit(RestrictedBoltzmannMachine(4, 3), x, validation=x[:, :3])
    with pytest.raises(ValueError, match="got values from 3"):
        ContrastiveDivergence(num_steps=2).fit(RestrictedBoltzmannMachine(4, 3), x, validation=torch.full((5, 4), 3.0))
    with pytest.raises(ValueError, match=r"got 45: .*ParallelTempering"):
        ContrastiveDivergence(num_steps=2, negative="exact").fit(RestrictedBoltzmannMachine(50, 45), torch.zeros(200, 50))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        ContrastiveDivergence(num_steps=40, optim=partial(SGD, lr=float("inf"))).fit(RestrictedBoltzmannMachine(4, 3), x)
