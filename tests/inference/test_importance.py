"""Importance: unbiased weights, per-datum diagnostics, programs that run one state at a time."""

import itertools
import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from stats import bound, largest_z, means_agree
from torch import nn

from pyrovae.guides import AmortizedMeanField, LocalMeanField
from pyrovae.inference import Exact, Importance, Variational
from pyrovae.models import toy


def posterior_guide(net, x):
    """The exact posterior of a belief net of one layer as a guide, by a table of its states."""
    exact = Exact().infer(net, x)
    bits = net.sizes[1]
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=bits)))
    z = states.unsqueeze(1).expand(-1, len(x), -1)
    probabilities = exact.log_prob({"h1": z}).exp().T  # [N, S]

    class Joint(dist.TorchDistribution):
        arg_constraints = {}  # noqa: RUF012
        support = dist.constraints.independent(dist.constraints.boolean, 1)

        def __init__(self, shape=()):
            super().__init__(torch.Size(shape), torch.Size([bits]), validate_args=False)

        def expand(self, batch_shape, _instance=None):
            return Joint(batch_shape)

        def sample(self, sample_shape=()):
            index = dist.Categorical(probabilities).expand(self.batch_shape).sample(sample_shape)
            return states[index]

        def log_prob(self, value):
            index = (value * 2.0 ** torch.arange(bits - 1, -1, -1)).sum(-1).long()
            return probabilities.log().expand(*index.shape, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("h1", Joint((len(x),)))

    return guide


def test_unbiased_evidence_and_its_error():
    net = toy.belief_net(5, 3)
    x = net.sample(8)
    guide = LocalMeanField(net, num_data=8)
    exact = Exact().infer(net, x).log_evidence
    for k in (2, 7):
        runs = torch.stack([Importance(guide, k).infer(net, x).log_evidence for _ in range(150)])
        assert means_agree((runs - exact).exp(), torch.ones(8))
        assert not means_agree((runs - exact).exp() * 1.4, torch.ones(8))
    assert bool((runs.mean(0) < exact + 4 * runs.std(0) / 150**0.5).all())  # a lower bound in expectation
    posterior = Importance(guide, 20_000).infer(net, x)
    assert posterior.bound == "lower"
    assert largest_z(posterior.log_evidence, exact, posterior.stderr) < bound(8)
    assert largest_z(posterior.log_evidence + 0.5, exact, posterior.stderr) > bound(8)
    value, stderr = posterior.expectation(lambda z: z["h1"])
    assert largest_z(value, Exact().infer(net, x).marginals["h1"], stderr) < bound(24)
    assert torch.allclose(posterior.marginals["h1"], value)
    drawn = posterior.sample(4000)["h1"]
    assert means_agree(drawn, posterior.marginals["h1"])


def test_exact_guide_has_no_variance():
    net = toy.belief_net(5, 3)
    x = net.sample(6)
    posterior = Importance(posterior_guide(net, x), 50).infer(net, x)
    assert torch.allclose(posterior.log_evidence, Exact().infer(net, x).log_evidence, atol=1e-10)
    assert float(posterior.stderr.max()) < 1e-6
    assert torch.allclose(posterior.diagnostics["ess"], torch.full((6,), 50.0))
    assert bool(torch.isneginf(posterior.diagnostics["pareto_k"]).all())


def test_ess_by_its_formula():
    net = toy.belief_net(5, 3)
    x = net.sample(6)
    posterior = Importance(LocalMeanField(net, 6), 100).infer(net, x)
    w = posterior.log_weights.exp()
    assert torch.allclose(w.sum(0), torch.ones(6))
    assert torch.allclose(posterior.diagnostics["ess"], 1 / (w**2).sum(0))
    assert float(posterior.diagnostics["ess"].min()) >= 1


def _wide_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 0.4).to_event(1))


@pytest.mark.skipif(int(arviz.__version__.split(".")[0]) > 0, reason="the 0.x function")
def test_pareto_k_is_arviz_own():
    model = toy.LinearGaussian()
    x = model(batch_size=12).detach()
    posterior = Importance(_wide_guide, 800).infer(model, x)
    for n in range(12):
        k = float(arviz.psislw(posterior.log_weights[:, n].numpy())[1])
        assert math.isclose(float(posterior.diagnostics["pareto_k"][n]), k, rel_tol=1e-9, abs_tol=1e-9)
    assert float(posterior.diagnostics["pareto_k"].max()) > 0.5  # too narrow a guide is seen


def test_pareto_k_with_impossible_draws():
    """Weights of 0 are not taken for a tail without spread."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("half", torch.where(z > 0, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 0.2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    torch.manual_seed(1)
    posterior = Importance(guide, 400).infer(model, torch.tensor([0.1, 4.0]))
    assert bool(torch.isfinite(posterior.diagnostics["pareto_k"]).all())
    assert float(posterior.diagnostics["pareto_k"][1]) > float(posterior.diagnostics["pareto_k"][0])
    assert bool(torch.isfinite(posterior.expected_log_joint(model)).all())


def test_rows_without_any_weight():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.factor("allowed", torch.where((x < 0) & (z < 2), -math.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.4))

    x = torch.tensor([0.1, -1.0, 4.0])
    posterior = Importance(guide, 50).infer(model, x)
    diagnostics = posterior.diagnostics
    assert diagnostics["note"].startswith("1 of 3 rows")
    assert torch.equal(diagnostics["ess"] == 0, x < 0)
    assert torch.equal(torch.isposinf(diagnostics["pareto_k"]), x < 0)
    assert torch.equal(torch.isneginf(posterior.log_evidence), x < 0)
    assert torch.equal(torch.isposinf(posterior.stderr), x < 0)
    assert torch.equal(torch.isneginf(posterior.expected_log_joint(model)), x < 0)
    value, stderr = posterior.expectation(lambda s: s["z"])
    for found in (
        posterior.log_weights,
        value,
        stderr,
        posterior.marginals["z"],
        posterior.mean["z"],
        posterior.sample(9)["z"],
    ):
        assert not bool(torch.isnan(found).any())
    assert torch.allclose(posterior.log_weights.exp().sum(0), torch.ones(3))
    usual = Importance(guide, 50).infer(model, x[::2])
    assert "note" not in usual.diagnostics
    bounded = Variational(guide, num_samples=50).infer(model, x)
    assert torch.equal(torch.isneginf(bounded.log_evidence), x < 0)
    assert torch.equal(torch.isposinf(bounded.stderr), x < 0)


def test_closed_form_evidence_of_a_continuous_program():
    model = toy.LinearGaussian()
    x = model(batch_size=5).detach()
    mean, covariance = (t.detach() for t in model.posterior(x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    posterior = Importance(guide, 20).infer(model, x)
    assert torch.allclose(posterior.log_evidence, model.log_evidence(x), atol=1e-9)
    assert torch.allclose(posterior.mean["z"], posterior.expectation(lambda s: s["z"])[0])


def test_guides_with_other_sites_are_refused():
    net = toy.belief_net(5, [3, 2])
    x = net.sample(3)

    def missing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))

    def extra(x):
        missing(x)
        with pyro.plate("data", len(x)):
            pyro.sample("h2", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("h3", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))

    for guide in (missing, extra):
        with pytest.raises(ValueError, match=r"latents \['h1', 'h2'\], got"):
            Importance(guide, 5).infer(net, x)

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            pyro.sample("h2", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"'h2' .*\(2,\), got"):
        Importance(narrow, 5).infer(net, x)


def _guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.4)).to_event(1))


def _plain(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def _viewed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(z.view(len(x), 2).sum(-1), 1.0), obs=x)


def _branching(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        shift = 1.0 if bool((z > 0).all()) else 0.0
        pyro.sample("x", dist.Normal(z.sum(-1) + 0 * shift, 1.0), obs=x)


def test_programs_that_run_one_state_at_a_time():
    x = torch.randn(3)
    exact = Exact().infer(_plain, x)
    for model in (_plain, _viewed, _branching):
        posterior = Importance(_guide, 400).infer(model, x)
        assert largest_z(posterior.log_evidence, exact.log_evidence, posterior.stderr) < bound(3)
        assert posterior.log_joint.broadcasts == (model is not _viewed)
        states = posterior._at(slice(0, 5))
        expected = exact.log_prob(states) + exact.log_evidence
        assert torch.allclose(posterior.log_joint(states), expected)
        assert torch.allclose(posterior.q_function(model)(), posterior.expected_log_joint(model).sum())


def test_global_latents_give_one_evidence():
    def model(x):
        g = pyro.sample("g", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * g))
            pyro.sample("x", dist.Normal(2 * z + g, 1.0), obs=x)

    def guide(x):
        pyro.sample("g", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor([0.5, 0.6, 0.4])))

    x = torch.tensor([0.3, 2.0, -1.0])
    exact = Exact().infer(model, x)
    posterior = Importance(guide, 5000).infer(model, x)
    assert posterior.log_evidence.shape == ()
    assert largest_z(posterior.log_evidence, exact.log_evidence, posterior.stderr) < bound(1)
    value, stderr = posterior.expectation(lambda s: s["z"])
    assert largest_z(value, exact.marginals["z"], stderr) < bound(3)
    assert torch.allclose(posterior.marginals["z"], value)
    assert means_agree(posterior.sample(3000)["g"], posterior.marginals["g"])


def test_integer_values_are_averaged():
    net = toy.Mixture(4, 3)
    x = torch.bernoulli(torch.full((5, 4), 0.5))
    guide = AmortizedMeanField(net, nn.Linear(4, 3))
    posterior = Importance(guide, 3000).infer(net, x)
    value, stderr = posterior.expectation(lambda s: s["z"])  # long
    assert largest_z(value, Exact().infer(net, x).mean["z"], stderr) < bound(5)
    assert torch.allclose(value, posterior.mean["z"])


@pytest.mark.parametrize("k", [0, 1])
def test_numbers_out_of_range(k):
    with pytest.raises(ValueError, match="expected num_samples >= 2"):
        Importance(_guide, k)
