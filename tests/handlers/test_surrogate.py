"""surrogate: values and objectives of the program, gradients by enumeration of every draw."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO

from pyrovae.distributions import SurrogateBernoulli, SurrogateOneHotCategorical
from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import surrogate
from pyrovae.models import SigmoidBeliefNet


class Category:
    """One category with a prior, and an observation that is linear in it: log p(x, z) is linear in z."""

    def __init__(self):
        self.prior, self.phi = torch.randn(4), torch.randn(4, requires_grad=True)
        self.reward = torch.randn(4)

    def model(self):
        z = pyro.sample("z", dist.OneHotCategorical(logits=self.prior))
        pyro.factor("x", z @ self.reward)

    def guide(self):
        pyro.sample("z", dist.OneHotCategorical(logits=self.phi))

    def exact(self):
        """The gradient of the ELBO, by the sum over categories."""
        log_q = torch.log_softmax(self.phi, -1)
        bound = (log_q.exp() * (torch.log_softmax(self.prior, -1) + self.reward - log_q)).sum()
        return -torch.autograd.grad(bound, self.phi)[0]

    def mean(self, model, guide, monkeypatch, objective=Trace_ELBO):
        """The mean gradient of the loss over all draws."""
        q = torch.softmax(self.phi, -1).detach()
        total = torch.zeros(4)
        for k in range(4):
            monkeypatch.setattr(SurrogateOneHotCategorical, "sample", lambda self, shape=(), k=k: torch.eye(4)[k])
            loss = objective().differentiable_loss(model, guide)
            total += q[k] * torch.autograd.grad(torch.as_tensor(loss), self.phi)[0]
        return total


@pytest.mark.parametrize("estimator", ["reinmax", "straight_through"])
def test_the_gradient_of_a_linear_bound_is_exact_with_both_wrapped(monkeypatch, estimator):
    """The prior's part is there where the model is wrapped, and missing where it is not: the negative control."""
    pair = Category()
    p, q = surrogate(pair.model, estimator), surrogate(pair.guide, estimator)
    assert torch.allclose(pair.mean(p, q, monkeypatch), pair.exact(), rtol=1e-10, atol=1e-12)
    wrong = pair.mean(pair.model, q, monkeypatch) - pair.exact()
    pi = torch.softmax(pair.phi, -1).detach()
    log_prior = torch.log_softmax(pair.prior, -1)
    missing = pi * (log_prior - pi @ log_prior)
    assert torch.allclose(wrong, missing, rtol=1e-9, atol=1e-11)
    assert float(missing.norm()) > 1e-2
    # with the KL in closed form the model need not be wrapped
    found = pair.mean(pair.model, q, monkeypatch, TraceMeanField_ELBO)
    assert torch.allclose(found, pair.exact(), rtol=1e-10, atol=1e-12)


class Everything:
    """Sites of all kinds under wrappers, in a plate."""

    def __call__(self, x):
        with pyro.plate("rows", len(x)) as rows:
            a = pyro.sample("a", dist.Bernoulli(logits=torch.tensor([0.2, -1.0])).to_event(1))
            b = pyro.sample("b", dist.OneHotCategorical(logits=torch.tensor([0.5, -0.3, 0.0])).mask(rows > 0))
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            logits = torch.stack([a.sum(-1), b[..., 0], c], -1)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def test_the_log_joint_is_that_of_the_program():
    model, x = Everything(), torch.ones(4, 3)
    trace = poutine.trace(model).get_trace(x)
    again = poutine.trace(poutine.replay(surrogate(model), trace)).get_trace(x)
    trace.compute_log_prob(), again.compute_log_prob()
    for name in ("a", "b", "c", "x"):
        assert torch.allclose(again.nodes[name]["log_prob"], trace.nodes[name]["log_prob"], rtol=0, atol=1e-13)
    assert isinstance(again.nodes["a"]["fn"].base_dist, SurrogateBernoulli)
    assert isinstance(again.nodes["b"]["fn"], dist.MaskedDistribution)
    assert isinstance(again.nodes["b"]["fn"].base_dist, SurrogateOneHotCategorical)
    assert type(again.nodes["x"]["fn"].base_dist) is dist.Bernoulli
    assert type(again.nodes["c"]["fn"]) is dist.Normal


@pytest.mark.parametrize("estimator", ["reinmax", "straight_through"])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_our_models_train(objective, estimator):
    """Also with vectorised particles and an explicit subsample; every parameter moves."""
    net = SigmoidBeliefNet(4, [3, 2])
    guide, x, rows = AmortizedMeanField(net), net.sample(6), torch.tensor([4, 0, 5])
    p, q = surrogate(net, estimator), surrogate(guide, estimator)
    svi = SVI(p, q, pyro.optim.Adam({"lr": 0.01}), objective(num_particles=3, vectorize_particles=True))
    parameters = [*net.parameters(), *guide.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    assert math.isfinite(svi.step(x))
    assert math.isfinite(svi.step(x[rows], index=rows, num_data=6))
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    draws = Predictive(p, guide=q, num_samples=3, parallel=True)(x)
    assert bool(((draws["h1"] == 0) | (draws["h1"] == 1)).all())


def test_a_factor_guide_takes_the_surrogate_of_the_prior():
    """A model written with surrogates, or wrapped before its guide is made."""
    net = SigmoidBeliefNet(4, 2)
    guide = AmortizedMeanField(surrogate(net, "straight_through", 0.7))
    fn = poutine.trace(guide).get_trace(net.sample(3)).nodes["h1"]["fn"].base_dist
    assert type(fn) is SurrogateBernoulli
    assert (fn.estimator, fn.surrogate_temperature) == ("straight_through", 0.7)
    plain = poutine.trace(AmortizedMeanField(net)).get_trace(net.sample(3)).nodes["h1"]["fn"].base_dist
    assert type(plain) is dist.Bernoulli


def test_temperatures_are_read_at_every_run():
    pair, t = Category(), torch.tensor(1.0)
    for temperature in (t, lambda: t):
        program = surrogate(pair.guide, temperature=temperature)
        for value in (1.0, 2.0):
            t.fill_(value)
            fn = poutine.trace(program).get_trace().nodes["z"]["fn"]
            assert float(fn.surrogate_temperature) == value
    assert surrogate(pair.guide, temperature=1.5).temperature == 1.5


def test_copies_and_refusals():
    net = SigmoidBeliefNet(3, 2)
    program = pickle.loads(pickle.dumps(copy.deepcopy(surrogate(net, "straight_through", 0.7))))
    assert program.program is not net
    assert tuple(program(net.sample(2)).shape) == (2, 3)
    with pytest.raises(ValueError, match="reinmax"):
        surrogate(net, "rebar")
    for temperature in (0.0, math.nan, torch.tensor([1.0, 1.0])):
        with pytest.raises(ValueError, match="temperature"):
            surrogate(net, temperature=temperature)
    for fn, hint in ((dist.Categorical(torch.ones(3)), "z @ table"), (dist.Poisson(2.0), "score-function")):
        with pytest.raises(ValueError, match=f"{type(fn).__name__} site 'k'.*{hint}"):
            surrogate(lambda fn=fn: pyro.sample("k", fn))()
