"""What a pixel is: masses that sum to one, a loss that does not, support, bias."""

import itertools
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from stats import frequencies_agree
from torch.nn.functional import softplus

from pyrovae.distributions import CrossEntropy, GreyLevels
from pyrovae.models.likelihood import make_likelihood


def pixels(name, **kwargs):
    return make_likelihood(name, **{"scale": 0.3, "levels": 4, **kwargs})


def images(values, width):
    return torch.tensor(list(itertools.product(values, repeat=width)), dtype=torch.get_default_dtype())


@pytest.mark.parametrize(("name", "values"), [("bernoulli", [0, 1]), ("categorical", [0, 1 / 3, 2 / 3, 1])])
def test_masses_sum_to_one(name, values):
    likelihood = pixels(name)
    outputs = 3 * torch.randn(5, 1, 3 * likelihood.per_pixel)
    x = images(values, 3)
    assert torch.allclose(likelihood(outputs).log_prob(x).logsumexp(-1), torch.zeros(5), atol=1e-12)
    assert likelihood.normalized
    assert not torch.allclose(likelihood(outputs).log_prob(x[1:]).logsumexp(-1), torch.zeros(5), atol=1e-12)


def legendre(low, high, n=200):
    import numpy as np

    x, w = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(n))
    return low + (high - low) * (x + 1) / 2, w * (high - low) / 2


@pytest.mark.parametrize("name", ["normal", "normal_learned"])
def test_densities_integrate_to_one(name):
    likelihood = pixels(name)
    outputs = torch.randn(5, 1, 1)
    x, w = legendre(-10, 10, 400)
    density = likelihood(outputs).log_prob(x.unsqueeze(-1)).exp()
    assert torch.allclose(density @ w, torch.ones(5), atol=1e-10)
    assert likelihood.normalized


def test_cross_entropy_does_not_integrate_to_one():
    likelihood = pixels("cross_entropy")
    outputs = torch.tensor([-30.0, -2.0, 0.5, 7.0])[:, None, None]
    x, w = legendre(0, 1)
    total = likelihood(outputs).log_prob(x.unsqueeze(-1)).exp() @ w
    logit = outputs.squeeze()
    assert torch.allclose(total, (logit / 2).tanh() / logit, atol=1e-12)  # the constant in closed form, at most 1/2
    assert bool((total <= 0.5).all())
    assert not likelihood.normalized
    assert not CrossEntropy.normalized


def test_log_probs_by_hand():
    outputs = torch.randn(2, 3)
    bits, reals, grey = torch.tensor([1.0, 0, 1]), torch.tensor([0.1, -2, 3]), torch.tensor([0.2, 1, 0.7])
    p = 1 / (1 + (-outputs).exp())
    expected = (bits * p.log() + (1 - bits) * (1 - p).log()).sum(-1)
    assert torch.allclose(pixels("bernoulli")(outputs).log_prob(bits), expected)
    assert torch.allclose(pixels("cross_entropy")(outputs).log_prob(grey), (grey * outputs - softplus(outputs)).sum(-1))
    assert torch.allclose(pixels("cross_entropy")(outputs).log_prob(bits), expected)  # on bits, they agree
    for name in ("normal", "normal_learned"):
        expected = -((reals - outputs) ** 2).sum(-1) / (2 * 0.09) - 3 * math.log(0.3) - 1.5 * math.log(2 * math.pi)
        assert torch.allclose(pixels(name)(outputs).log_prob(reals), expected)
    outputs = torch.randn(2, 12)
    logits = outputs.reshape(2, 3, 4)
    chosen = logits[:, [0, 1, 2], [3, 0, 1]] - logits.logsumexp(-1)
    assert torch.allclose(pixels("categorical")(outputs).log_prob(torch.tensor([1, 0, 1 / 3])), chosen.sum(-1))


def test_the_learned_variance_is_that_of_the_residuals():
    likelihood = pixels("normal_learned")
    x = torch.randn(500, 4) * 1.7
    with torch.no_grad():
        likelihood.log_variance.copy_(x.square().mean().log())
    likelihood(torch.zeros(4)).log_prob(x).sum().backward()
    assert abs(float(likelihood.log_variance.grad)) < 1e-9
    with torch.no_grad():
        likelihood.log_variance.add_(0.1)
    likelihood.log_variance.grad = None
    likelihood(torch.zeros(4)).log_prob(x).sum().backward()
    assert abs(float(likelihood.log_variance.grad)) > 1
    likelihood.reset_parameters()
    assert math.isclose(float(likelihood.log_variance), 2 * math.log(0.3))


def test_bias():
    x = torch.tensor([[0.0, 1, 1], [0, 1, 0], [0, 1, 1]])
    assert torch.allclose(pixels("bernoulli").bias(x).sigmoid(), torch.tensor([1 / 5, 4 / 5, 3 / 5]))
    assert torch.allclose(pixels("normal").bias(x), x.mean(0))
    probs = pixels("categorical").bias(torch.tensor([[0.0, 1 / 3], [1, 1 / 3]])).reshape(2, 4).softmax(-1)
    assert torch.allclose(probs, torch.tensor([[2.0, 1, 1, 2], [1, 3, 1, 1]]) / 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_divided_by_255_are_levels(dtype):
    x = torch.arange(256).to(dtype) / 255
    pixels("categorical", levels=256).check(x.expand(2, -1))
    fn = GreyLevels(torch.arange(256).to(dtype).log(), validate_args=True)
    expected = torch.arange(256).to(dtype) / (255 * 128)
    assert torch.allclose(fn.log_prob(x).exp(), expected)
    with pytest.raises(ValueError, match="expected pixels in"):
        pixels("categorical", levels=128).check(x.expand(2, -1))
    for wrong in (0.5, -1 / 255, 256 / 255, math.nan):
        with pytest.raises(ValueError, match="support"):
            fn.log_prob(torch.tensor(wrong, dtype=dtype))


def test_grey_levels_draws_and_shapes():
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    fn = GreyLevels(probs.log())
    draws = fn.expand([4, 2]).sample((2500,)).reshape(-1, 2)
    counts = torch.stack([(draws == level).sum(0) for level in (0, 0.5, 1)], -1)
    assert frequencies_agree(counts, 10_000, probs)
    assert not frequencies_agree(counts, 10_000, probs.flip(-1))
    assert torch.allclose(fn.mean, probs @ torch.tensor([0, 0.5, 1]))
    assert fn.log_prob(torch.zeros(7, 1, 2)).shape == (7, 1, 2)
    assert fn.to_event(1).expand([3]).log_prob(torch.zeros(5, 3, 2)).shape == (5, 3)
    assert fn.mask(torch.tensor([True, False])).log_prob(torch.zeros(2))[1] == 0
    again = pickle.loads(pickle.dumps(fn))
    assert torch.equal(again.log_prob(torch.ones(2)), fn.log_prob(torch.ones(2)))
    with pytest.raises(ValueError, match="L >= 2"):
        GreyLevels(torch.zeros(3, 1))


def test_cross_entropy_draws_and_shapes():
    logits = torch.tensor([-1.0, 0.3])
    fn = CrossEntropy(logits=logits)
    draws = fn.expand([4, 2]).sample((2500,)).reshape(-1, 2)
    assert frequencies_agree(draws.sum(0), 10_000, logits.sigmoid())
    assert not frequencies_agree(draws.sum(0), 10_000, logits.flip(0).sigmoid())
    assert torch.equal(fn.mean, logits.sigmoid())
    assert fn.to_event(1).expand([3]).log_prob(torch.zeros(5, 3, 2)).shape == (5, 3)
    assert torch.isfinite(CrossEntropy(logits=torch.tensor([-1e4, 1e4])).log_prob(torch.tensor([0.5, 0.5]))).all()
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="support"):
            CrossEntropy(logits=logits, validate_args=True).log_prob(torch.tensor(wrong))
    assert isinstance(fn, dist.TorchDistribution)
    assert torch.equal(pickle.loads(pickle.dumps(fn)).logits, logits)


def test_bad_arguments():
    for kwargs, message in [
        ({"name": "gauss"}, "'bernoulli', 'normal'"),
        ({"name": "normal", "scale": 0.0}, "scale > 0"),
        ({"name": "normal", "scale": math.nan}, "scale > 0"),
        ({"name": "categorical", "levels": 1}, "levels"),
    ]:
        with pytest.raises(ValueError, match=message):
            pixels(**kwargs)
