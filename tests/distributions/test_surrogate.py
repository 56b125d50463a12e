"""The surrogates' mean gradients by enumeration of all draws; nothing is sampled but their law and form."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from stats import frequencies_agree
from torch import Tensor

from pyrovae.distributions import SurrogateBernoulli, SurrogateOneHotCategorical

K = 4


class OneHotAt(SurrogateOneHotCategorical):
    """A surrogate whose draw is given."""

    at: Tensor

    def sample(self, sample_shape=()):
        return self.at


class BitAt(SurrogateBernoulli):
    """Likewise."""

    at: Tensor

    def sample(self, sample_shape=()):
        return self.at


def gradients(family, logits, values, f, estimator, temperature=1.0):
    """The estimator's gradient of f at each of `values`, their mean under q, and the exact gradient of E[f]."""
    leaf = logits.clone().requires_grad_()
    found = []
    for value in values:
        q = family(leaf, estimator, temperature)
        q.at = value
        draw = q.rsample()
        assert torch.equal(draw.detach(), value)
        found.append(torch.autograd.grad(f(draw), leaf)[0])
    found = torch.stack(found)
    q = (dist.OneHotCategorical if family is OneHotAt else dist.Bernoulli)(logits=leaf)
    log_prob = q.log_prob(torch.stack(values))
    log_prob = log_prob if log_prob.dim() == 1 else log_prob.squeeze(-1)
    weight = log_prob.exp()
    (exact,) = torch.autograd.grad((weight * torch.stack([f(v) for v in values])).sum(), leaf)
    return found, (weight.detach()[:, None] * found).sum(0), exact


@pytest.fixture
def functions():
    c, m, t = torch.randn(K), torch.randn(K, K), torch.randn(K, K, K)
    return {
        "linear": lambda z: z @ c,
        "quadratic": lambda z: z @ m @ z + z @ c,
        "cubic": lambda z: torch.einsum("i,j,k,ijk->", z, z, z, t),
    }


@pytest.mark.parametrize(
    ("estimator", "name", "unbiased"),
    [
        ("reinmax", "linear", True),
        ("reinmax", "quadratic", True),
        ("reinmax", "cubic", False),
        ("straight_through", "linear", True),
        ("straight_through", "quadratic", False),
    ],
)
def test_what_is_exact_and_what_is_not(functions, estimator, name, unbiased):
    """The mean over all one-hot draws; ReinMax is exact for quadratic functions at temperature 1."""
    logits = torch.randn(K)
    _, mean, exact = gradients(OneHotAt, logits, list(torch.eye(K)), functions[name], estimator)
    error = float((mean - exact).norm() / exact.norm())
    assert (error < 1e-10) if unbiased else (error > 1e-2)
    _, warm, _ = gradients(OneHotAt, logits, list(torch.eye(K)), functions[name], estimator, 1.3)
    assert float((warm - exact).norm() / exact.norm()) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 1.4, torch.tensor(0.8)])
def test_the_formulas(functions, temperature):
    """2 J((π_t + D)/2) g − J(π) g / 2 and J(π_t) g / t, with Jacobians by autograd."""
    logits, f = torch.randn(K), functions["cubic"]
    pi, soft = torch.softmax(logits, -1), torch.softmax(logits / temperature, -1)

    def jacobian(p):
        return torch.autograd.functional.jacobian(lambda a: torch.softmax(a, -1), p.log())

    for estimator in ("reinmax", "straight_through"):
        found, _, _ = gradients(OneHotAt, logits, list(torch.eye(K)), f, estimator, temperature)
        for value, gradient in zip(torch.eye(K), found, strict=True):
            g = torch.autograd.functional.jacobian(f, value)
            reinmax = 2 * jacobian((soft + value) / 2) @ g - jacobian(pi) @ g / 2
            expected = reinmax if estimator == "reinmax" else jacobian(soft) @ g / temperature
            assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("estimator", ["reinmax", "straight_through"])
def test_a_bit_is_two_categories(estimator, temperature):
    """The logit of a bit moves the second of two logits, the first being 0."""

    def f(b):
        return (b**3).sum() + torch.sin(b).sum()

    for logit in (-1.3, 0.4):
        values = [torch.tensor([0.0]), torch.tensor([1.0])]
        found, _, _ = gradients(BitAt, torch.tensor([logit]), values, f, estimator, temperature)
        two, _, _ = gradients(
            OneHotAt, torch.tensor([0.0, logit]), list(torch.eye(2)), lambda z: f(z[1:]), estimator, temperature
        )
        assert torch.allclose(found[:, 0], two[:, 1], rtol=1e-12, atol=1e-14)
        if estimator == "reinmax" and temperature == 1:
            for b, gradient in zip(values, found, strict=True):
                g = torch.autograd.functional.jacobian(f, b)
                half = (b - torch.sigmoid(torch.tensor(logit))).abs() / 2 * g
                assert torch.allclose(gradient, half, rtol=1e-10, atol=1e-14)
            _, mean, exact = gradients(BitAt, torch.tensor([logit]), values, lambda b: (3 * b * b - b).sum(), estimator)
            assert torch.allclose(mean, exact, rtol=1e-10)


def test_draws_have_the_discrete_law_and_take_no_gradient():
    n, logits = 20_000, torch.tensor([[1.0, -0.5, 0.2], [0.0, 2.0, -6.0]])
    draws = SurrogateOneHotCategorical(logits, temperature=5.0).rsample((n,))
    assert bool(((draws == 0) | (draws == 1)).all())
    counts, p = draws.sum(0).numpy().ravel(), torch.softmax(logits, -1).numpy().ravel()
    assert frequencies_agree(counts, n, p)
    assert not frequencies_agree(counts, n, p[::-1])
    assert not SurrogateBernoulli(logits.requires_grad_()).sample().requires_grad
    assert not SurrogateOneHotCategorical(logits).sample().requires_grad


def test_log_probs_are_pyros_and_differentiable_in_the_value():
    logits = torch.randn(5, 3)
    for ours, stock in ((SurrogateOneHotCategorical, dist.OneHotCategorical), (SurrogateBernoulli, dist.Bernoulli)):
        value = stock(logits=logits).sample()
        assert torch.allclose(ours(logits).log_prob(value), stock(logits=logits).log_prob(value), atol=1e-12)
        v = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ours(logits).log_prob(v).sum(), v)
        assert torch.allclose(gradient, torch.log_softmax(logits, -1) if ours is SurrogateOneHotCategorical else logits)
        with pytest.raises(ValueError, match="support"):
            ours(logits).log_prob(torch.full((5, 3), 0.4))


@pytest.mark.parametrize("family", [SurrogateOneHotCategorical, SurrogateBernoulli])
def test_expand_copies_and_refusals(family):
    q = family(torch.randn(2, 3), "straight_through", 0.7).expand((4, 2) if family is SurrogateOneHotCategorical else (4, 2, 3))
    for again in (q, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert type(again) is family
        assert (again.estimator, again.surrogate_temperature) == ("straight_through", 0.7)
        assert tuple(again.rsample((5,)).shape) == (5, 4, 2, 3)
    assert q.to_event(1).has_rsample
    with pytest.raises(ValueError, match="reinmax"):
        family(torch.zeros(3), "rebar")
    for temperature in (0.0, float("nan"), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="temperature"):
            family(torch.zeros(3), temperature=temperature)
