"""The three variational gaps, each against sums over listed states."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import BruteForce, bits
from stats import bound, largest_z

from pyrovae.diagnostics import variational_gaps
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Exact, MeanField, SaulJaakkolaJordan
from pyrovae.models import toy


def prepared(hidden=3, rows=6):
    net = toy.belief_net(6, hidden)
    return net, AmortizedMeanField(net), net.sample(rows)


def elbo_by_states(net, guide, x):
    """Σ_z q (log p − log q), one ordinary run of either program a state."""
    latents = Exact(declared=False).infer(net, x).structure.latents
    of = {latent.name: bits(latent.components) for latent in latents}
    p, q = (BruteForce(program, (x,), of).solve().lj for program in (net, guide))
    return (q.exp() * (p - q)).sum(0).detach()


@pytest.mark.parametrize("hidden", [3, [2, 3]], ids=str)
def test_gaps_by_enumeration(hidden):
    net, guide, x = prepared(hidden)
    found = variational_gaps(net, x, guide)
    assert torch.allclose(found.log_evidence, Exact(declared=False).infer(net, x).log_evidence, atol=1e-10)
    assert torch.allclose(found.amortised, elbo_by_states(net, guide, x), atol=1e-10)
    assert float(found.amortised_stderr.max()) == 0
    assert bool((found.mean_field <= found.log_evidence + 1e-10).all())
    best = MeanField(40, 500, declared=False).infer(net, x).log_evidence
    assert torch.allclose(found.mean_field, best, atol=1e-5)
    closed = SaulJaakkolaJordan(40, 500).infer(net, x).log_evidence
    assert torch.allclose(found.closed_form, closed, atol=1e-5)
    # an untrained guide and a closed form are both below the best factorised q, and the three add up
    for gap in (found.approximation, found.amortisation, found.slack):
        assert gap.shape == (6,)
        assert bool((gap > -1e-5).all())
    assert float(found.amortisation.min()) > 0.1
    assert torch.allclose(found.approximation + found.amortisation, found.log_evidence - found.amortised)
    assert not torch.allclose(found.amortised, found.mean_field, atol=1e-2)


def test_sampled_where_states_are_too_many():
    net, guide, x = prepared()
    exact = variational_gaps(net, x, guide)
    sampled = variational_gaps(net, x, guide, max_evaluations=1, num_particles=4000)
    assert float(sampled.amortised_stderr.min()) > 0
    assert largest_z(sampled.amortised, exact.amortised, sampled.amortised_stderr) < bound(6, 3999)
    assert largest_z(sampled.amortised, exact.mean_field, sampled.amortised_stderr) > bound(6, 3999)


def test_the_posterior_as_guide_has_no_gap_but_of_mean_field():
    """Then amortisation is minus the approximation gap: the guide is better than any factorised q."""
    net, _, x = prepared(2)
    p = Exact().infer(net, x)
    joint = p.log_prob({"h1": torch.stack(bits(2)).unsqueeze(1).expand(-1, len(x), -1)}).exp()  # [4, N]
    first = joint[2:].sum(0)
    second = torch.stack((joint[1] / joint[:2].sum(0), joint[3] / joint[2:].sum(0)))

    class Chain(dist.TorchDistribution):
        """p(a, b) = p(a) p(b | a) as one site of two bits."""

        support = dist.constraints.independent(dist.constraints.boolean, 1)
        arg_constraints: ClassVar = {}

        def __init__(self):
            super().__init__(torch.Size([len(x)]), torch.Size([2]), validate_args=False)

        def expand(self, batch_shape, _instance=None):
            return self

        def sample(self, sample_shape=()):
            a = torch.bernoulli(first.expand((*sample_shape, len(x))))
            return torch.stack((a, torch.bernoulli(torch.where(a > 0, second[1], second[0]))), -1)

        def log_prob(self, value):
            a, b = value.unbind(-1)
            p_b = torch.where(a > 0, second[1], second[0])
            return torch.where(a > 0, first, 1 - first).log() + torch.where(b > 0, p_b, 1 - p_b).log()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", Chain())

    found = variational_gaps(net, x, guide)
    assert torch.allclose(found.amortised, found.log_evidence, atol=1e-10)
    assert torch.allclose(found.amortisation, -found.approximation, atol=1e-10)


def test_without_guide_and_without_layers():
    net, _, x = prepared()
    found = variational_gaps(net, x)
    assert found.amortised is None
    assert found.amortisation is None
    assert "amortised" not in found.summary()
    mixture = toy.Mixture(4, 3)
    other = variational_gaps(mixture, torch.ones(5, 4))
    assert other.closed_form is None
    assert other.slack is None
    assert torch.allclose(other.approximation, torch.zeros(5), atol=1e-8), "one component is its own factorisation"


def test_told():
    net, guide, x = prepared()
    found = variational_gaps(net, x, guide)
    summary = found.summary()
    assert summary["rows"] == 6
    assert summary["approximation"] == pytest.approx(float(found.approximation.mean()))
    text = str(found)
    for word in ("log p(x), exact", "approximation", "amortisation", "slack", "Saul-Jaakkola-Jordan"):
        assert word in text
    assert "Monte Carlo" not in text
    assert "Monte Carlo" in str(variational_gaps(net, x, guide, max_evaluations=1, num_particles=20))
    assert "±" not in str(variational_gaps(net, x[:1], guide)).split("\n", 2)[1]


def test_nothing_of_the_callers_changes():
    net, guide, x = prepared()
    net.train()
    guide.train()
    before = {k: v.clone() for k, v in (*net.state_dict().items(), *guide.state_dict().items())}
    variational_gaps(net, x, guide)
    assert all(torch.equal(v, before[k]) for k, v in (*net.state_dict().items(), *guide.state_dict().items()))
    assert net.training
    assert guide.training
    assert list(pyro.get_param_store().keys()) == []


def test_refusals():
    net, guide, x = prepared()
    with pytest.raises(ValueError, match="expected num_particles >= 2"):
        variational_gaps(net, x, guide, num_particles=1)
    with pytest.raises(ValueError, match=r"expected .* got"):
        variational_gaps(toy.LinearGaussian(4, 2), torch.zeros(2, 4))
