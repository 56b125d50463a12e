"""Boltzmann machines, restricted and general, as models: exact likelihoods, learning to the maximum, bad input."""

import itertools
import json
from functools import partial

import pyro
import pytest
import stats
import torch
from pyro import poutine

from pyrovae.data import entropy, load, patterns
from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import declared
from pyrovae.inference import EM, Exact, ExactLikelihood, Gibbs, Importance, MeanField, Variational
from pyrovae.models import BoltzmannMachine, RestrictedBoltzmannMachine


def states(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def brute_log_joint(model):
    """log p(x, h) of all states, `[2^D, 2^H]`, from the energy alone."""
    v, h = states(model.visible), states(model.hidden)
    if isinstance(model, RestrictedBoltzmannMachine):
        minus_energy = (v @ model.visible_bias)[:, None] + h @ model.hidden_bias + v @ model.weight @ h.T
    else:
        s = torch.cat((v.repeat_interleave(len(h), 0), h.repeat(len(v), 1)), 1)
        pairs = itertools.combinations(range(s.shape[1]), 2)
        couplings = torch.stack([s[:, i] * s[:, j] for i, j in pairs], 1)
        minus_energy = (s @ model.biases + couplings @ model.couplings).reshape(len(v), len(h))
    return minus_energy - minus_energy.logsumexp((0, 1))


MACHINES = {
    "RBM": lambda **o: RestrictedBoltzmannMachine(5, 3, **o),
    "RBM, wide": lambda **o: RestrictedBoltzmannMachine(3, 6, **o),
    "BM": lambda **o: BoltzmannMachine(4, 3, **o),
}
each = pytest.mark.parametrize("name", MACHINES)


def build(name, **options):
    model = MACHINES[name](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, states(model.visible)


@each
def test_log_evidence_and_posterior_are_exact(name):
    model, x = build(name)
    joint = brute_log_joint(model)
    expected, posterior = joint.logsumexp(1), joint.softmax(1)
    marginals = posterior @ states(model.hidden)
    for method in (Exact(), Exact(declared=False)):
        found = method.infer(model, x)
        assert torch.allclose(found.log_evidence, expected, rtol=0, atol=1e-10)
        assert torch.allclose(found.marginals["h1"], marginals, rtol=0, atol=1e-10)
        assert not torch.allclose(found.log_evidence, expected + 1e-6, rtol=0, atol=1e-10)
    exact = torch.autograd.grad(-expected.sum(), list(model.parameters()))
    for objective in (ExactLikelihood(), ExactLikelihood(declared=False)):
        loss = objective.differentiable_loss(model, None, x)
        assert torch.allclose(loss, -expected.sum(), rtol=0, atol=1e-10)
        for a, e in zip(torch.autograd.grad(loss, list(model.parameters())), exact, strict=True):
            assert torch.allclose(a, e, rtol=0, atol=1e-10)
    with torch.no_grad():
        t = poutine.trace(poutine.block(model)).get_trace(x)
    assert t.nodes["_RETURN"]["value"] is x


@each
def test_approximate_methods(name):
    model, x = build(name)
    x = x[:4]
    joint = brute_log_joint(model).detach()[:4]
    expected, marginals = joint.logsumexp(1), joint.softmax(1) @ states(model.hidden)
    assert stats.chains_agree(Gibbs(num_samples=400).infer(model, x).draws["h1"], marginals)
    field = MeanField().infer(model, x).log_evidence
    assert bool((field <= expected + 1e-10).all())
    if name != "BM":  # whose hidden units are independent given the data
        assert torch.allclose(field, expected, atol=1e-6)
    guide = AmortizedMeanField(model)
    assert bool((Variational(guide, num_samples=200).infer(model, x).log_evidence < expected).all())
    found = Importance(guide, num_samples=2000).infer(model, x)
    assert stats.largest_z(found.log_evidence, expected, found.stderr) < 10


def test_the_guide_reaches_the_posterior_of_an_rbm():
    model, x = build("RBM")
    guide = AmortizedMeanField(model, encoder=model.mirror())
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    Variational(guide, num_steps=250, optim=partial(torch.optim.Adam, lr=0.05)).fit(model, x)
    exact = Exact().infer(model, x).log_evidence
    bound = Variational(guide, num_samples=50).infer(model, x).log_evidence
    assert 0 <= float((exact - bound).mean()) < 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())


@each
def test_em_raises_the_likelihood(name):
    model, _ = build(name)
    truth, _ = build(name)
    x = truth.sample(30)
    losses = [record["loss"] for record in EM(Exact(), num_iterations=3).fit(model, x).history]
    assert losses == sorted(losses, reverse=True)  # also checked by EM
    assert losses[-1] < losses[0] - 1


def test_maximum_likelihood_of_a_fully_visible_machine():
    """The log likelihood is concave: at its maximum, the moments of model and data agree."""
    model, x = BoltzmannMachine(4), torch.cat((states(4), load("bars_and_stripes", size=2, num_rows=40)))
    fit = Variational(None, ExactLikelihood(), num_steps=50, optim=partial(torch.optim.Adam, lr=0.05)).fit(model, x)
    assert fit.bound == "exact"
    assert fit.history[-1]["bound"] == pytest.approx(float(model.distribution().log_prob(x).mean().detach()))
    assert fit.history[-1]["bound"] > fit.history[0]["bound"]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        return ExactLikelihood().loss_and_grads(model, None, x)

    optimizer.step(closure)
    p = brute_log_joint(model).detach().exp().squeeze(1)
    second = (states(4).T * p) @ states(4)
    assert torch.allclose(second, x.T @ x / len(x), atol=1e-6)
    assert not torch.allclose(torch.full_like(second, 0.25), x.T @ x / len(x), atol=1e-2)  # where it started


@pytest.mark.parametrize(("size", "make"), [(3, lambda: RestrictedBoltzmannMachine(9, 9)), (2, lambda: BoltzmannMachine(4, 3))])
def test_bars_and_stripes_are_learned_to_the_entropy(size, make):
    x, p = patterns("bars_and_stripes", size=size)
    rows = x.repeat_interleave((p * 16 + 0.5).long(), 0)  # each as often as it is drawn
    assert torch.allclose(rows.mean(0), p @ x)
    model = make()
    model.initialize_bias(rows)
    with torch.no_grad():
        next(model.parameters()).normal_(0, 0.3)  # weights that differ between hidden units
    best = -entropy("bars_and_stripes", size=size)
    start = float(Exact().infer(model, rows).log_evidence.mean())
    optim = partial(torch.optim.Adam, lr=0.1)
    Variational(None, ExactLikelihood(), num_steps=250, optim=optim, log_every=250).fit(model, rows)
    end = float(Exact().infer(model, rows).log_evidence.mean())
    assert start < best - 0.5
    assert best - 0.05 < end < best


@each
def test_initialize_bias(name):
    model, _ = build(name)
    x = (torch.rand(50, model.visible) < 0.3).double()
    x[:, 0] = 1.0  # a constant pixel gets a finite bias
    model.initialize_bias(x)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in ("weight", "couplings"):
                parameter.zero_()
    joint = brute_log_joint(model).detach().exp().sum(1)
    assert torch.allclose(joint @ states(model.visible), (x.sum(0) + 1) / 52, rtol=0, atol=1e-10)
    for bad, message in (
        (x[:, 1:], "expected data"),
        (x[:0], "expected data"),
        (x * 255, r"expected x in \{0, 1\}, got values from"),
    ):
        with pytest.raises(ValueError, match=message):
            model.initialize_bias(bad)


@each
def test_samples(name):
    model, x = build(name)
    index = (2.0 ** torch.arange(model.visible)).flip(0)
    counts = torch.bincount((model.sample(5000) @ index).long(), minlength=len(x))
    p = brute_log_joint(model).detach().exp().sum(1)
    assert stats.frequencies_agree(counts, 5000, p)
    assert not stats.frequencies_agree(counts, 5000, p.flip(0))
    with pytest.raises(ValueError, match="expected n >= 1 draws"):
        model.sample(0)


@each
def test_config_state_and_chains(name):
    model, x = build(name, max_bits=1, num_chains=7, num_sweeps=2)
    again = type(model)(**json.loads(json.dumps(model.config)))
    assert again.config == model.config
    assert model.chains.states.shape == (7, model.visible if "RBM" in name else 7)
    assert not model.normalized
    pyro.poutine.trace(model).get_trace(x).log_prob_sum().backward()  # moves the chains
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.chains.states, model.chains.states)
    before = model.chains.states.clone()
    Gibbs(num_samples=3).infer(model, x)
    model.sample(4)
    assert torch.equal(model.chains.states, before)
    if "RBM" in name:  # what it declares is exact, chains or not
        assert torch.allclose(Exact().infer(model, x).log_evidence, brute_log_joint(model).logsumexp(1), rtol=0, atol=1e-10)
        assert torch.equal(model.chains.states, before)
    with pytest.raises(ValueError, match="expected sites with a known log Z for Exact"):
        Exact(**({"declared": False} if "RBM" in name else {})).infer(model, x)
    small = type(model)(**{**model.config, "max_bits": 10})
    assert small.chains is None
    assert small.normalized


def test_parameters_are_those_of_the_distribution():
    rbm, machine = RestrictedBoltzmannMachine(4, 2), BoltzmannMachine(3, 2)
    found = rbm.distribution()
    assert found.W is rbm.weight
    assert found.b is rbm.visible_bias
    assert found.c is rbm.hidden_bias
    found = machine.distribution()
    assert found.b is machine.biases
    assert torch.equal(found.J, found.J.T)
    assert torch.equal(found.J[0, 1:], machine.couplings[:4])
    assert bool((found.J.diagonal() == 0).all())


def test_declared_code():
    model, x = build("RBM")
    code = declared(model, "factorial_code", (x,))
    assert code.site == "h1"
    assert torch.allclose(code.logits, model.hidden_bias + x @ model.weight)
    assert declared(model, "factorial_code") is None
    large = RestrictedBoltzmannMachine(50, 45)
    with pytest.raises(ValueError, match=r"45.*seconds.*bytes"):
        Exact().infer(large, large.sample(3))


def test_bad_arguments():
    for sizes in ((0, 3), (3, 0), (3, -1), (2.5, 3)):
        with pytest.raises(ValueError, match=r"expected .* an integer >= 1"):
            RestrictedBoltzmannMachine(*sizes)
    for sizes in ((1,), (3, -1), (3, 1.5)):
        with pytest.raises(ValueError, match="expected hidden >= 0 and at least two units"):
            BoltzmannMachine(*sizes)
    with pytest.raises(ValueError, match="expected an integer num_chains >= 1"):
        RestrictedBoltzmannMachine(4, 3, num_chains=0, max_bits=2)
    with pytest.raises(ValueError, match="expected hidden units to encode"):
        BoltzmannMachine(3).mirror()
    model, _ = build("RBM")
    with pytest.raises(ValueError, match="expected data"):
        Exact().infer(model, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"expected x in \{0, 1\} for a RBM likelihood, got values from 0 to 255"):
        Exact().infer(model, 255 * torch.eye(5))
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite W for RBM, got 1 infinite or NaN of 15"):
        Exact().infer(model, torch.eye(5))


def test_what_a_run_sums_its_distribution_sums():
    """A machine that says it is normalized has a distribution that does not refuse."""
    for model in (RestrictedBoltzmannMachine(35, 35, max_bits=40), BoltzmannMachine(30, 5, max_bits=40)):
        assert model.normalized
        assert (model.distribution().partition_is, model.distribution().max_bits) == ("exact", 40)
    for model in (RestrictedBoltzmannMachine(8, 8, max_bits=4), BoltzmannMachine(4, 4, max_bits=4)):
        assert not model.normalized
        assert bool(torch.isfinite(model.distribution().log_partition()))
