"""The declared route of independent hidden units: every answer equals the generic enumeration, for any number of units."""

import math

import pytest
import torch
from stats import bound

from pyrovae.inference import Exact, ExactLikelihood, ExactPosterior
from pyrovae.inference.exact.factorial import FactorialPosterior
from pyrovae.models import RestrictedBoltzmannMachine

ROWS = 5


def machine(visible=4, hidden=3, seed=0):
    torch.manual_seed(seed)
    rbm = RestrictedBoltzmannMachine(visible, hidden)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.normal_()
    return rbm


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture
def pair():
    """A machine, its data, and both posteriors."""
    rbm = machine()
    x = torch.bernoulli(torch.full((ROWS, 4), 0.5))
    fast, slow = Exact().infer(rbm, x), Exact(declared=False).infer(rbm, x)
    assert isinstance(fast, FactorialPosterior)
    assert isinstance(slow, ExactPosterior)
    return rbm, x, fast, slow


def test_every_answer(pair):
    rbm, _, fast, slow = pair
    close(fast.log_evidence, slow.log_evidence)
    for a, b in (
        (fast.marginals, slow.marginals),
        (fast.mean, slow.mean),
        (fast.variance, slow.variance),
        (fast.mode, slow.mode),
    ):
        close(a["h1"], b["h1"])
    close(fast.entropy, slow.entropy)
    z = slow.sample(20)
    close(fast.log_prob(z), slow.log_prob(z))
    weight = torch.randn(3, requires_grad=True)
    for f in (lambda s: s["h1"] @ weight, lambda s: s["h1"].prod(-1), lambda s: s["h1"] > 0.5):
        for a, b in zip(fast.expectation(f), slow.expectation(f), strict=True):
            close(a, b)
    small = Exact(max_bytes=1100).infer(rbm, pair[1])
    close(small.expectation(lambda s: s["h1"].prod(-1))[0], fast.expectation(lambda s: s["h1"].prod(-1))[0])
    for model in (rbm, machine(seed=7)):
        parameters, w = list(model.parameters()), torch.randn(ROWS)
        for objective in (lambda p, m=model, w=w: p.expected_log_joint(m) @ w, lambda p, m=model: p.q_function(m)()):
            close(objective(fast), objective(slow))
            found = [torch.autograd.grad(objective(p), parameters) for p in (fast, slow)]
            for a, b in zip(*found, strict=True):
                close(a, b)
    close(fast.expected_log_joint(lambda x: rbm(x)), slow.expected_log_joint(rbm))


def test_gradient_of_the_evidence(pair):
    rbm, x, _, _ = pair
    losses = [ExactLikelihood(declared=d).differentiable_loss(rbm, None, x) for d in (True, False)]
    close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, list(rbm.parameters())) for loss in losses), strict=True):
        close(a, b)
    index = torch.tensor([4, 1])
    close(*(ExactLikelihood(declared=d).loss(rbm, None, x[:2], index=index, num_data=30) for d in (True, False)))


def test_a_wrong_answer_is_noticed(pair):
    rbm, x, fast, _ = pair
    with torch.no_grad():
        rbm.hidden_bias[0] += 1e-6
    with pytest.raises(AssertionError):
        close(fast.entropy, Exact(declared=False).infer(rbm, x).entropy)


def test_five_hundred_units():
    rbm = machine(6, 500)
    x = torch.bernoulli(torch.full((ROWS, 6), 0.5))
    posterior = Exact().infer(rbm, x)
    assert isinstance(posterior, FactorialPosterior)
    n, p = 4000, posterior.marginals["h1"]
    z = posterior.sample(n)["h1"]
    assert z.shape == (n, ROWS, 500)
    error = (p * (1 - p) / n).sqrt()
    assert float(torch.where(p * (1 - p) * n > 10, (z.mean(0) - p) / error, 0.0).abs().max()) < bound(p.numel())
    average = -posterior.log_prob({"h1": z})
    assert float(((average.mean(0) - posterior.entropy) / (average.std(0) / n**0.5)).abs().max()) < bound(ROWS)
    total = torch.cat([rbm.factorial_code(row[None]).log_evidence() for row in x])
    close(posterior.log_evidence, total.detach())
    close(posterior.log_prob({k: v[None] for k, v in posterior.mode.items()})[0], torch.maximum(p, 1 - p).log().sum(-1))
    with pytest.raises(ValueError, match=r"2\^500 states.*bytes.*seconds; average f over posterior.sample\(n\)"):
        posterior.expectation(lambda z: z["h1"])
    assert math.isfinite(float(posterior.q_function(rbm)()))


def test_refusals(pair):
    rbm, _, fast, _ = pair
    with pytest.raises(ValueError, match="expected n > 0"):
        fast.sample(0)
    with pytest.raises(ValueError, match="got none of"):
        fast.log_prob({})
    with pytest.raises(ValueError, match="of shape"):
        fast.log_prob({"h1": torch.zeros(1, 2, 3)})
    assert float(fast.log_prob({"h1": torch.full((1, ROWS, 3), 0.5)})[0, 0]) == -math.inf
    with pytest.raises(ValueError, match=r"expected x in \{0, 1\}"):
        Exact().infer(rbm, torch.full((2, 4), 0.5))
    with torch.no_grad():
        rbm.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite|NaN|nan"):
        Exact().infer(rbm, torch.zeros(2, 4))
