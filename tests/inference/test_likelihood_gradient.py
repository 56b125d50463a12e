"""Gradients written out by hand against autograd through the exact log likelihood, and against enumerated operators."""

import pytest
import torch
from stats import means_agree

from pyrovae.distributions import RBM, BoltzmannMachine
from pyrovae.inference.undirected.likelihood_gradient import BoltzmannGradient, RBMGradient
from pyrovae.inference.undirected.negative_phase import Persistent, Restarted, Tempered
from pyrovae.inference.undirected.tempering import Ladder, ParallelTempering
from pyrovae.ops import index_to_codes


def codes(bits):
    return index_to_codes(torch.arange(2**bits), 2, bits).double()


def rbm(visible=4, hidden=3):
    return RBM(*(p.requires_grad_() for p in (torch.randn(visible, hidden), torch.randn(visible), torch.randn(hidden))))


def machine(n=5, scale=1.0):
    j = (scale * torch.randn(n, n)).triu(1)
    return BoltzmannMachine((j + j.T).requires_grad_(), torch.randn(n).requires_grad_())


def data(rows=12, visible=4):
    return (torch.rand(rows, visible) < 0.4).double()


def centred(gradients, x, mean, lam):
    """Melchior et al.'s form, from the plain gradient of −log p."""
    weight, b, c = gradients
    weight = weight - torch.outer(b, lam) - torch.outer(mean, c)
    return weight, b - weight @ lam, c - weight.T @ mean


def test_exact_gradient_of_an_rbm():
    p, x = rbm(), data()
    plain = torch.autograd.grad(-p.log_prob(x).mean(), p.parameters)
    found = RBMGradient(x.mean(0), centered=False)(p, x, None)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, plain, strict=True))
    lam = torch.sigmoid(p.c + x @ p.W).mean(0).detach()
    found = RBMGradient(x.mean(0), centered=True)(p, x, None)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, centred(plain, x, x.mean(0), lam), strict=True))
    assert not torch.allclose(found[0], plain[0], atol=1e-3)
    # a direction of ascent with the same fixed points
    assert sum(float((a * b).sum()) for a, b in zip(found, plain, strict=True)) > 0


@pytest.mark.parametrize("centered", [False, True])
def test_samples_enter_as_moments_do(centered):
    """With every state in its exact proportion for a chain, the sampled form is the exact one."""
    p, x = rbm(3, 2), data(visible=3)
    v = codes(3)
    weights = p.log_prob(v).exp().detach()
    counts = (weights * 1000).round().long().clamp_min(1)
    v = v.repeat_interleave(counts, 0)
    probs = torch.sigmoid(p.c + v @ p.W).detach()
    first = RBMGradient(x.mean(0), centered=centered)
    second = RBMGradient(x.mean(0), centered=centered)
    for batch in (x[:6], x[6:]):  # the running mean moves alike

        def negative(*_):
            return v, probs

        sampled = first(p, batch, negative)
        moments = (v.T @ probs / len(v), v.mean(0), probs.mean(0))
        data_h = torch.sigmoid(p.c + batch @ p.W).detach()
        data_moments = (batch.T @ data_h / len(batch), batch.mean(0), data_h.mean(0))
        plain = [a - b for a, b in zip(moments, data_moments, strict=True)]
        second(p, batch, None)
        expected = centred(plain, batch, x.mean(0), second.lam) if centered else plain
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(sampled, expected, strict=True))


@pytest.mark.parametrize("k", [1, 3])
def test_expected_gradient_of_contrastive_divergence(k):
    """E[CD-k] = data − E under p_data T^k, T enumerated."""
    p, x = rbm(), data(6)
    v, h = codes(4), codes(3)

    def table(logits, states):
        return torch.exp(logits @ states.T - torch.nn.functional.softplus(logits).sum(-1, keepdim=True))

    with torch.no_grad():
        operator = table(p.c + v @ p.W, h) @ table(p.b + h @ p.W.T, v)
        start = (x[:, None] == v).all(-1).double().mean(0)
        end = start @ torch.linalg.matrix_power(operator, k)
        probs = torch.sigmoid(p.c + v @ p.W)

        def moments(law):
            return (v * law[:, None]).T @ probs, law @ v, law @ probs

        expected = [a - b for a, b in zip(moments(end), moments(start), strict=True)]
        plain = [a - b for a, b in zip(moments(p.log_prob(v).exp()), moments(start), strict=True)]
    gradient, phase = RBMGradient(x.mean(0), centered=False), Restarted(p, len(x), k)
    draws = [[g.clone() for g in gradient(p, x, phase)] for _ in range(4000)]
    for place, (right, wrong) in enumerate(zip(expected, plain, strict=True)):
        found = torch.stack([draw[place] for draw in draws])
        assert means_agree(found, right)
        if k == 1:
            assert not means_agree(found, wrong)  # biased: not the gradient of log p


@pytest.mark.parametrize("phase", ["persistent", "tempered"])
def test_chains_at_rest_give_the_exact_gradient_on_average(phase):
    p, x = rbm(), data()
    chains, gradient = 4000, RBMGradient(x.mean(0), centered=False)
    exact = [g.clone() for g in gradient(p, x, None)]
    if phase == "persistent":
        negative = Persistent(p, p.sample((chains,)), 2)
    else:
        ladder = Ladder(ParallelTempering(3, chains), p)
        ladder.run(p, 100)
        negative = Tempered(ladder, 1)
    gradient(p, x, negative)
    v, h = negative(p, x, torch.empty(0))
    assert means_agree(v[:, :, None] * h[:, None, :], exact[0] + x.T @ torch.sigmoid(p.c + x @ p.W).detach() / len(x))
    assert means_agree(v, exact[1] + x.mean(0))


@pytest.mark.parametrize("visible", [5, 3])
def test_exact_gradient_of_a_boltzmann_machine(visible):
    p, x = machine(), data(visible=visible)
    model = p if visible == 5 else p.marginal(visible)
    plain = torch.autograd.grad(-model.log_prob(x).mean(), p.parameters)
    found = BoltzmannGradient(x.mean(0), len(x), centered=False, k=1)(p, x, None)
    off = 1 - torch.eye(5)
    assert torch.allclose(found[0], plain[0] * off, atol=1e-12)
    assert torch.allclose(found[1], plain[1], atol=1e-12)
    found = BoltzmannGradient(x.mean(0), len(x), centered=True, k=1)(p, x, None)
    assert torch.equal(found[0], found[0].T)
    assert not bool(found[0].diagonal().any())
    assert not torch.allclose(found[1], plain[1], atol=1e-3)
    assert sum(float((a * b).sum()) for a, b in zip(found, plain, strict=True)) > 0


def test_clamped_chains_of_a_boltzmann_machine():
    """Above ten hidden units, data expectations come from clamped chains, one a row, which end at the exact ones."""
    p = machine(13, scale=0.4)
    x = data(1, 2).expand(20_000, 2)
    gradient = BoltzmannGradient(x.mean(0), len(x), centered=False, k=10)
    second, first, states = gradient._data_moments(p.J.detach(), p.b.detach(), x, None)
    for _ in range(3):
        second, first, states = gradient._data_moments(p.J.detach(), p.b.detach(), x, torch.arange(len(x)))
    with torch.no_grad():
        exact = p.given(x[:1]).mean[0]
    assert means_agree(states[:, 2:], exact)
    assert torch.equal(states[:, :2], x)
    assert torch.allclose(second, states.T @ states / len(x))
    assert torch.allclose(first, states.mean(0))
