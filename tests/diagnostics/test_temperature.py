"""temperature_curve: each point by quadrature, the gap by paired rows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from stats import bound, largest_z
from torch import nn

from pyrovae.diagnostics import evaluate, temperature_curve
from pyrovae.handlers import relax
from pyrovae.models import toy

T = [0.2, 0.7, 1.5]
K = 4000


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.full((len(x),), 0.4)))
        pyro.sample("x", dist.Normal(2 * z, 0.7), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=x - 0.3))


def exact(x, t):
    noise = torch.linspace(-45, 45, 200_001)
    z = torch.sigmoid((x - 0.3 + noise) / t)

    def log_logistic(u):
        return nn.functional.logsigmoid(u) + nn.functional.logsigmoid(-u)

    value = dist.Normal(2 * z, 0.7).log_prob(x) + log_logistic(noise + x - 0.7) - log_logistic(noise)
    return torch.trapezoid(log_logistic(noise).exp() * value, noise)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: relax(p, 3.0)])
def test_both_bounds_side_by_side(wrap):
    x = torch.tensor([0.2, 1.0, 2.5, -1.0])
    found = temperature_curve(wrap(model), wrap(guide), x, T, num_particles=K, batch_size=3)
    q = torch.sigmoid(x - 0.3)
    hard = sum(
        p
        * (dist.Normal(2.0 * z, 0.7).log_prob(x) + dist.Bernoulli(logits=torch.tensor(0.4)).log_prob(torch.tensor(z)) - p.log())
        for z, p in ((0.0, 1 - q), (1.0, q))
    )
    assert largest_z(found.hard_rows, hard, evaluate(model, guide, x, num_particles=K).hard_stderr) < bound(4, K - 1)
    for i, t in enumerate(T):
        expected = torch.stack([exact(v, t) for v in x])
        error = evaluate(model, guide, x, num_particles=K, temperature=t).relaxed_stderr
        assert largest_z(found.relaxed_rows[i], expected, error) < bound(12, K - 1)
        assert largest_z(found.relaxed_rows[i], hard, error) > bound(12, K - 1)  # the relaxed value is no hard one
    assert torch.allclose(found.relaxed, found.relaxed_rows.mean(1))
    assert math.isclose(found.hard, float(found.hard_rows.mean()))
    assert torch.allclose(found.gap, found.relaxed - found.hard)
    assert torch.allclose(found.gap_stderr, (found.relaxed_rows - found.hard_rows).std(1) / 2)
    assert torch.equal(found.temperatures, torch.tensor(T))
    assert len(str(found).splitlines()) == 4 + len(found.notes)


def test_one_noise_for_all_temperatures():
    x = torch.tensor([0.2, 1.0])
    found = temperature_curve(model, guide, x, [0.7, 0.7, 0.7001], num_particles=50)
    assert torch.equal(found.relaxed_rows[0], found.relaxed_rows[1])
    assert torch.allclose(found.relaxed_rows[0], found.relaxed_rows[2], atol=0.01)
    other = temperature_curve(model, guide, x, [0.7], num_particles=50)
    assert not torch.allclose(found.relaxed_rows[0], other.relaxed_rows[0], atol=0.01)


def test_refusals():
    x = torch.tensor([0.2, 1.0])
    with pytest.raises(ValueError, match="positive"):
        temperature_curve(model, guide, x, [0.5, 0.0])
    with pytest.raises(ValueError, match="expected at least one temperature"):
        temperature_curve(model, guide, x, [])
    linear = toy.LinearGaussian()
    data = linear(batch_size=5).detach()

    def normal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="expected Bernoulli or OneHotCategorical latents to relax, got none"):
        temperature_curve(linear, normal, data, [0.5])


def test_clamped_values_are_told_by_temperature():
    def sharp(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=8 * x))

    def prior(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([1.0, 1.5, -1.0])
    found = temperature_curve(prior, sharp, x.float(), [0.1, 20.0], num_particles=100)
    assert found.clamped[0] > 0.5
    assert found.clamped[1] == 0
    assert len(found.notes) == 1
    assert f"{float(found.clamped[0]):.0%} of the relaxed values at temperature 0.1 lie at the end of float32" in str(found)
    assert "take float64" in found.notes[0]
    double = temperature_curve(prior, sharp, x.double(), [0.1], num_particles=100)
    assert 0 < double.clamped[0] < found.clamped[0]
    assert "end of float64" in double.notes[0]
    assert "take a higher temperature" in double.notes[0]
