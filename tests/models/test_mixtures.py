"""Mixtures: EM with closed-form M-steps and priors."""

import copy
import itertools
import json
import math
from functools import partial

import pyro
import pytest
import stats
import torch

from pyrovae.compare import compare
from pyrovae.inference import EM, Exact, ExactLikelihood, Gibbs, Variational
from pyrovae.models import BernoulliMixture, GaussianMixture

COVARIANCES = ["full", "diagonal", "spherical"]
KINDS = {
    "bernoulli": lambda **options: BernoulliMixture(4, 3, **options),
    "bernoulli, prior": lambda: BernoulliMixture(4, 3, concentration=1.5, pixel_concentration=2.5),
    **{name: partial(GaussianMixture, 4, 3, name) for name in COVARIANCES},
    **{
        f"{name}, prior": partial(GaussianMixture, 4, 3, name, concentration=2.0, prior_count=3.0, prior_variance=0.3)
        for name in COVARIANCES
    },
}
each = pytest.mark.parametrize("kind", KINDS)


def build(kind, rows=30):
    torch.manual_seed(4)
    model = KINDS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.7)
    return model, model.sample(rows)


def log_posterior(model, x):
    return float(Exact().infer(model, x).log_evidence.sum() + model.log_prior().detach())


@each
def test_evidence(kind):
    """The program, enumerated, is the sum over components that `log_prob` makes; and so is the density of a list of them."""
    model, x = build(kind)
    assert torch.allclose(model.log_prob(x).detach(), Exact().infer(model, x).log_evidence, atol=1e-10)
    p = torch.softmax(model.weights, -1)
    each = torch.stack([model.components.at(torch.tensor(k)).log_prob(x) for k in range(3)], -1)
    assert torch.allclose(model.log_prob(x), torch.logsumexp(p.log() + each, -1), atol=1e-10)
    assert torch.allclose(model.components.log_likelihood(x), each, atol=1e-10)


@pytest.mark.parametrize("kind", ["bernoulli", "full", "diagonal"])
def test_draws(kind):
    model, _ = build(kind)
    draws = model.sample(20000)
    if kind == "bernoulli":
        states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
        counts = (draws.unsqueeze(1) == states).all(-1).sum(0)
        assert stats.frequencies_agree(counts, 20000, model.log_prob(states).detach().exp())
        return
    p = torch.softmax(model.weights, -1).detach()
    assert stats.means_agree(draws, p @ model.components.loc.detach())
    assert not stats.means_agree(draws + 0.1, p @ model.components.loc.detach())


@each
def test_the_m_step_is_the_maximum_of_q_and_the_prior(kind):
    """Its gradient is 0 there, and Q with the prior is lower at any parameters nearby."""
    model, x = build(kind)
    posterior = Exact().infer(model, x)
    q = posterior.q_function(model)

    def objective():
        return q() + model.log_prior()

    before = objective().detach()
    model.m_step(posterior, x)
    best = objective()
    assert best > before + 1e-3
    for name, gradient in zip(dict(model.named_parameters()), torch.autograd.grad(best, model.parameters()), strict=True):
        assert float(gradient.abs().max()) < 1e-8, name
    for parameter in model.parameters():
        for _ in range(3):
            step = 1e-3 * torch.randn_like(parameter)
            step = step - step.mean() if parameter is model.weights else step  # a common shift of logits changes nothing
            with torch.no_grad():
                parameter.add_(step)
                assert objective() < best
                parameter.sub_(step)


@each
def test_em_raises_the_log_posterior(kind):
    model, x = build(kind)
    model.initialize(x)
    fit = EM(num_iterations=12).fit(model, x)
    losses = [record["loss"] for record in fit.history]
    assert losses[-1] == pytest.approx(-log_posterior(model, x), rel=1e-12)
    assert all(b <= a + 1e-9 * len(x) for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    assert fit.history[-1]["bound"] == pytest.approx(float(model.log_prob(x).mean().detach()))
    # a gradient M-step has the same objective
    again = copy.deepcopy(model)
    again.m_step = None
    by_gradient = EM(num_iterations=1).fit(again, x)
    assert by_gradient.history[0]["loss"] == pytest.approx(losses[-1], rel=1e-12)
    assert by_gradient.history[1]["loss"] <= losses[-1] + 1e-9 * len(x)


@pytest.mark.parametrize("kind", ["bernoulli, prior", "full, prior"])
def test_an_m_step_without_its_prior_is_caught(kind):
    model, x = build(kind)
    flat = BernoulliMixture(4, 3) if "bernoulli" in kind else GaussianMixture(4, 3, "full", prior_count=0.0)
    EM(num_iterations=40).fit(model, x)

    def wrong(posterior, x):
        flat.m_step(posterior, x)
        model.load_state_dict(flat.state_dict())

    model.m_step = wrong
    with pytest.raises(RuntimeError, match="never to lower"):
        EM(num_iterations=2).fit(model, x)


def test_by_hand():
    """The closed forms on responsibilities of 0 and 1, written out."""
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0], [5.0, 6.0], [5.0, 7.0]])
    own = torch.eye(2)[[0, 0, 1, 1, 1]].double()

    class Known:
        marginals = {"z": own}  # noqa: RUF012

    for covariance, expected in [
        ("full", [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2 / 3]]]),
        ("diagonal", [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2 / 3]]]),
        ("spherical", [[[0.5, 0.0], [0.0, 0.5]], [[1 / 3, 0.0], [0.0, 1 / 3]]]),
    ]:
        model = GaussianMixture(2, 2, covariance, concentration=2.0, prior_count=1.0, prior_variance=0.3)
        model.m_step(Known(), x)
        n = torch.tensor([2.0, 3.0])[:, None, None]
        wanted = (torch.tensor(expected) * n + 0.3 * torch.eye(2)) / (n + 1)
        tril = model.components.scale_tril
        assert torch.allclose(tril @ tril.mT, wanted)
        assert torch.allclose(model.components.loc, torch.tensor([[1.0, 1.0], [5.0, 6.0]]))
        assert torch.allclose(torch.softmax(model.weights, -1), torch.tensor([3 / 7, 4 / 7]))
    bits = BernoulliMixture(2, 2, pixel_concentration=2.0)
    bits.m_step(Known(), (x > 1).double())
    assert torch.allclose(torch.sigmoid(bits.components.logits), torch.tensor([[2 / 4, 1 / 4], [4 / 5, 4 / 5]]))


def test_far_from_the_origin():
    """Variances of 1e-4 around 1e4: sums of squares would cancel."""
    x = 1e4 + 1e-2 * torch.randn(200, 2) + torch.tensor([0.0, 50.0]) * (torch.arange(200) % 2).unsqueeze(-1)
    for covariance in COVARIANCES:
        model = GaussianMixture(2, 2, covariance, prior_count=0.0)
        model.initialize(x)
        EM(num_iterations=3).fit(model, x)
        scale = model.components.scale_tril.detach().diagonal(dim1=-2, dim2=-1)
        parts = torch.stack([x[0::2].var(0, unbiased=False), x[1::2].var(0, unbiased=False)]).sqrt()
        parts = parts.square().mean(-1, keepdim=True).sqrt().expand(2, 2) if covariance == "spherical" else parts
        order = [0, 1] if model.components.loc[0, 1] < model.components.loc[1, 1] else [1, 0]
        if covariance != "full":
            assert torch.allclose(scale[order], parts, rtol=1e-6)


def start_and_learn(model, x):
    model.initialize(x)
    EM(num_iterations=8).fit(model, x)


@pytest.mark.parametrize("kind", ["bernoulli", *COVARIANCES])
def test_empty_and_single_and_constant(kind):
    """One row a component, a component without rows, a constant pixel: numbers and a warning, never NaN."""
    bits = kind == "bernoulli"
    make = (lambda **_: BernoulliMixture(4, 3)) if bits else partial(GaussianMixture, 4, 3, kind)
    x = torch.tensor([[0.0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]])  # the first pixel is constant; a row a component
    model = make()
    model.initialize(x)
    EM(num_iterations=8).fit(model, x)
    assert math.isfinite(log_posterior(model, x))
    flat = make(prior_count=0.0)
    if bits:
        start_and_learn(flat, x)
    else:
        with pytest.warns(UserWarning, match="too few rows"):
            start_and_learn(flat, x)
    assert math.isfinite(log_posterior(flat, x))
    assert all(torch.isfinite(p).all() for p in flat.parameters())
    # a component that no row belongs to
    many = torch.bernoulli(torch.full((40, 4), 0.5)) if bits else torch.randn(40, 4)
    for options in ({}, {"prior_count": 0.0}):
        lost = make(**options)
        with torch.no_grad():
            for parameter in lost.parameters():
                parameter.normal_(0, 0.5)
            lost.weights[1] = -1e4
        kept = [p.detach()[1].clone() for p in lost.components.parameters()]
        if bits or not options:
            EM(num_iterations=4).fit(lost, many)
        else:
            with pytest.warns(UserWarning, match="component 1 has no data"):
                EM(num_iterations=4).fit(lost, many)
        assert all(torch.isfinite(p).all() for p in lost.parameters())
        assert torch.softmax(lost.weights, -1)[1] < 1e-300
        if bits or options:
            assert all(torch.allclose(p.detach()[1], k) for p, k in zip(lost.components.parameters(), kept, strict=True))
    alone = make() if bits else GaussianMixture(4, 1, kind)
    EM(num_iterations=2).fit(alone, many[:1])
    assert math.isfinite(log_posterior(alone, many[:1]))


def test_starts():
    model, x = build("full", rows=200)
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.initialize(x)
        ends.append(model.components.loc.detach().clone())
    assert torch.equal(ends[0], ends[1])
    better = log_posterior(model, x)
    model.reset_parameters()
    assert better > log_posterior(model, x)
    with pytest.raises(ValueError, match="as many rows as the 3"):
        model.initialize(x[:2])
    with pytest.raises(ValueError, match="finite numbers"):
        model.initialize(x / 0)
    bits = BernoulliMixture(4, 3)
    with pytest.raises(ValueError, match="x in"):
        bits.initialize(x)
    with pytest.raises(ValueError, match="expected data"):
        bits.initialize(x[:, 1:])


def test_log_prob_refuses_what_no_component_has():
    bits, real = BernoulliMixture(4, 3), GaussianMixture(4, 3)
    for model, x, message in [
        (bits, torch.full((2, 4), 0.5), r"expected x in \{0, 1\} .* got values from 0.5 to 0.5"),
        (bits, torch.full((2, 4), math.nan), r"expected x in \{0, 1\} .* got NaN"),
        (real, torch.full((2, 4), math.nan), "expected finite numbers"),
        (bits, torch.zeros(2, 3), r"expected data \[n, 4\] .* got \[2, 3\]"),
        (real, torch.zeros(4), r"expected data \[n, 4\] .* got \[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.log_prob(x)
    with pyro.validation_enabled(False):
        assert bool(bits.log_prob(torch.full((2, 4), 0.5)).isfinite().all())


@each
def test_data_of_another_dtype(kind):
    """All that a float32 model is asked of float64 data, and the other way about."""
    for own, given in itertools.permutations((torch.float32, torch.float64)):
        model, x = build(kind)
        model, x = model.to(own), x.to(given)
        model.initialize(x)
        EM(num_iterations=2).fit(model, x)
        exact = Exact().infer(model, x).log_evidence
        assert model.log_prob(x).dtype == exact.dtype == own
        assert torch.allclose(model.log_prob(x), exact, rtol=1e-4)


def test_bad_arguments():
    for make, message in [
        (lambda: BernoulliMixture(0, 2), "visible >= 1"),
        (lambda: BernoulliMixture(2, 2.0), "components >= 1"),
        (lambda: BernoulliMixture(2, 2, concentration=0.5), "concentration >= 1"),
        (lambda: BernoulliMixture(2, 2, pixel_concentration=math.nan), "pixel_concentration >= 1"),
        (lambda: GaussianMixture(2, 2, "tied"), 'covariance in "full"'),
        (lambda: GaussianMixture(2, 2, prior_count=-1.0), "prior_count >= 0"),
        (lambda: GaussianMixture(2, 2, prior_variance=0.0), "prior_variance > 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


@each
def test_config(kind):
    model, x = build(kind)
    again = type(model)(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    assert torch.equal(again.log_prior(), model.log_prior())


def test_other_e_steps_and_comparison():
    model, x = build("bernoulli, prior")
    before = log_posterior(model, x)
    EM(Gibbs(50, 2, 10), num_iterations=10).fit(copy.deepcopy(model), x)
    table = compare(model, x, {"EM": EM(num_iterations=20), "gradient": Variational(None, ExactLikelihood(), num_steps=50)})
    assert {"EM", "gradient"} <= set(str(table).replace("|", " ").split())
    assert log_posterior(model, x) == before


def test_float32():
    for kind in KINDS:
        model, x = build(kind)
        model, x = model.float(), x.float()
        model.initialize(x)
        fit = EM(num_iterations=10).fit(model, x)
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())
        assert fit.history[-1]["loss"] < fit.history[0]["loss"]
