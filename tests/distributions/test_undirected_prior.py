"""An RBM or Boltzmann machine as the prior of a decoder: learned by enumeration, score function and surrogates."""

import itertools
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import stats
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyrovae.diagnostics import evaluate
from pyrovae.distributions import RBM, BoltzmannMachine, PersistentChains, SurrogateBernoulli
from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import Module, relax
from pyrovae.inference import EM, Exact, ExactLikelihood, Gibbs, Importance, MeanField, Variational


def states(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


class PriorVAE(Module):
    """z ~ RBM or Boltzmann machine over 4 bits, x ~ Bernoulli of a linear decoder to 5 pixels."""

    def __init__(self, machine=False, chains=None):
        super().__init__()
        self.machine, self.chains = machine, chains
        self.W = nn.Parameter(torch.randn(4, 3))
        self.b, self.c = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
        half = torch.randn(4, 4).triu(1)
        self.J = nn.Parameter(half + half.T)
        self.decoder = nn.Linear(4, 5)

    def prior(self):
        if self.machine:
            return BoltzmannMachine(self.J, self.b, chains=self.chains)
        return RBM(self.W, self.b, self.c, chains=self.chains)

    def forward(self, x=None, batch_size=6):
        with pyro.plate("data", batch_size if x is None else len(x)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def log_joint(self, x):
        """log p(x, z) of all z, `[16, N]`."""
        z = states(4)
        likelihood = dist.Bernoulli(logits=self.decoder(z)[:, None]).to_event(1).log_prob(x)
        prior = -self.prior().free_energy(z)
        return (prior - prior.logsumexp(0))[:, None] + likelihood


def build(**options):
    model = PriorVAE(**options)
    with torch.no_grad():
        return model, model(batch_size=8)


@pytest.mark.parametrize("machine", [False, True])
def test_enumeration_is_exact(machine):
    model, x = build(machine=machine)
    joint = model.log_joint(x)
    expected = joint.logsumexp(0)
    posterior = Exact().infer(model, x)
    assert torch.allclose(posterior.log_evidence, expected, rtol=0, atol=1e-10)
    assert torch.allclose(posterior.marginals["z"], joint.softmax(0).T @ states(4), rtol=0, atol=1e-10)
    used = [p for p in model.parameters() if not (p is model.J if not machine else p is model.W or p is model.c)]
    loss = ExactLikelihood().differentiable_loss(model, None, x)
    assert torch.allclose(loss, -expected.sum(), rtol=0, atol=1e-10)
    exact = torch.autograd.grad(-expected.sum(), used)
    for a, e in zip(torch.autograd.grad(loss, used), exact, strict=True):
        assert torch.allclose(a, e, rtol=0, atol=1e-10)
    assert any(not torch.allclose(e, torch.zeros_like(e), atol=1e-3) for e in exact)
    gibbs = Gibbs(num_samples=300).infer(model, x).draws["z"]
    assert stats.chains_agree(gibbs, posterior.marginals["z"])
    assert bool((MeanField().infer(model, x).log_evidence <= expected + 1e-10).all())
    guide = AmortizedMeanField(model)
    found = Importance(guide, num_samples=500).infer(model, x)
    assert stats.largest_z(found.log_evidence, expected.detach(), found.stderr) < 10


@pytest.mark.parametrize("machine", [False, True])
def test_em_is_monotone(machine):
    model, x = build(machine=machine)
    losses = [record["loss"] for record in EM(Exact(), num_iterations=2).fit(model, x).history]
    assert losses[-1] < losses[0] - 0.1  # EM itself checks that none is higher than the one before


@pytest.mark.parametrize("machine", [False, True])
def test_the_score_function_gradient_is_unbiased(machine):
    model, x = build(machine=machine)
    guide = AmortizedMeanField(model)
    net = [p for p in guide.parameters() if p.requires_grad]
    of_prior = [model.J, model.b] if machine else [model.W, model.b, model.c]
    estimates = []
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    for _ in range(100):
        loss = elbo.differentiable_loss(model, guide, x)
        estimates.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*net, *of_prior])]))
    logits = pyro.poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base_dist.logits  # [8, 4]
    q = dist.Bernoulli(logits=logits).to_event(1).log_prob(states(4)[:, None])
    bound = (q.exp() * (model.log_joint(x) - q)).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-bound, [*net, *of_prior])])
    moving = exact.abs() > 1e-12  # J has no gradient on its diagonal
    assert stats.means_agree(torch.stack(estimates)[:, moving], exact[moving])
    assert not stats.means_agree(torch.stack(estimates)[:, moving], exact[moving] + 1.0)


@pytest.mark.parametrize("estimator", ["reinmax", "straight_through"])
def test_bias_of_surrogate_gradients(estimator, monkeypatch):
    """E_q[surrogate gradient of log p(z)] by the sum over all z, against the gradient of E_q[log p(z)]."""
    model, _ = build()
    theta = torch.randn(4, requires_grad=True)
    q = SurrogateBernoulli(theta, estimator).to_event(1)
    log_q = dist.Bernoulli(logits=theta).to_event(1).log_prob(states(4))

    def bias(prior):
        monkeypatch.setattr(SurrogateBernoulli, "sample", lambda *_: states(4))
        z = q.rsample()
        estimate = torch.autograd.grad((log_q.exp().detach() * prior.log_prob(z)).sum(), theta)[0]
        monkeypatch.undo()
        exact = torch.autograd.grad((log_q.exp() * prior.log_prob(states(4)).detach()).sum(), theta, retain_graph=True)[0]
        return float((estimate - exact).abs().max())

    assert bias(BoltzmannMachine(model.J, model.b)) < 1e-12  # linear in each unit
    biases = [bias(RBM(scale * model.W, model.b, model.c)) for scale in (0.02, 0.01)]
    assert biases[1] > 1e-9
    order = 3 if estimator == "reinmax" else 2
    assert biases[0] / biases[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize(
    ("machine", "options"),
    [(False, {}), (False, {"surrogate": "reinmax"}), (True, {"surrogate": "straight_through"})],
)
def test_training_raises_the_exact_likelihood(machine, options):
    truth, _ = build(machine=machine)
    with torch.no_grad():
        x = truth(batch_size=200)
    model = PriorVAE(machine=machine)
    start = float(Exact().infer(model, x).log_evidence.mean())
    guide = AmortizedMeanField(model)
    Variational(guide, num_steps=150, optim=partial(torch.optim.Adam, lr=0.03), **options).fit(model, x)
    end = float(Exact().infer(model, x).log_evidence.mean())
    assert end > start + 0.1
    prior = model.prior()
    assert torch.allclose(prior.log_prob(states(4)).exp().sum(), torch.tensor(1.0))  # J has kept its form


def test_stock_svi():
    """By score function, with the gradient of log Z by enumeration."""
    truth, _ = build()
    with torch.no_grad():
        x = truth(batch_size=200)
    model = PriorVAE()
    start = float(Exact().infer(model, x).log_evidence.mean())
    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, AmortizedMeanField(model), pyro.optim.Adam({"lr": 0.03}), elbo)
    for _ in range(150):
        svi.step(x)
    assert float(Exact().infer(model, x).log_evidence.mean()) > start + 0.05


def test_stock_svi_with_persistent_chains():
    """An RBM over data, learned by PCD through its log_prob alone, comes near what the exact gradient reaches."""
    truth = RBM(*(1.5 * torch.randn(shape) for shape in ((4, 3), (4,), (3,))))
    x, ends = truth.sample((300,)), []
    start = [0.1 * torch.randn(shape) for shape in ((4, 3), (4,), (3,))]
    for chains in (None, PersistentChains(300, 2)):
        net = nn.ParameterList(p.clone() for p in start)

        def model(x, net=net, chains=chains):
            pyro.module(f"rbm {chains is None}", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", RBM(*net, chains=chains), obs=x)

        svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        for _ in range(300):
            svi.step(x)
        ends.append(float(RBM(*net).log_prob(x).mean().detach()))
    first = float(RBM(*start).log_prob(x).mean())
    assert ends[0] > first + 0.2
    assert abs(ends[1] - ends[0]) < 0.1 * (ends[0] - first)


def test_unknown_log_partition_is_told():
    model, x = build(chains=PersistentChains(10, units=4))
    guide = AmortizedMeanField(model)
    exact = partial(ExactLikelihood().differentiable_loss, model, None)
    for call in (*(partial(method.infer, model) for method in (Exact(), MeanField())), partial(EM(Gibbs()).fit, model), exact):
        with pytest.raises(ValueError, match=r"expected sites with a known log Z for .*'z'.*AIS"):
            call(x)
    with pytest.warns(UserWarning, match="'z' is drawn from an undirected distribution whose log Z is unknown"):
        fit = Variational(guide, num_steps=2, log_every=1, progress=True).fit(model, x, validation=x[:3])
    assert [r["bound"] for r in fit.history] == [r["validation"] for r in fit.history] == [r["stderr"] for r in fit.history]
    assert fit.history[0]["bound"] is None  # free energies without log Z bound nothing
    assert fit.best_step is None
    assert fit.history[-1]["loss"] is not None
    refused = pytest.raises(ValueError, match="expected no patience where log Z is unknown, as at 'z', got 2")
    with refused, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Variational(guide, num_steps=2, patience=2).fit(model, x, validation=x)
    before = model.chains.states.clone()
    evaluation = evaluate(model, guide, x, num_particles=20)
    assert not evaluation.normalized
    for method in (Variational(guide, num_samples=5, num_guide_steps=2), Importance(guide, num_samples=5)):
        with pytest.warns(UserWarning, match="every reported bound lacks -log Z"):
            method.infer(model, x)
    Gibbs(num_samples=5).infer(model, x)  # needs no log Z
    assert torch.equal(model.chains.states, before)
    assert all(p.requires_grad for p in model.parameters())


def test_relax_refuses_and_names_what_to_do():
    model, x = build()
    for program in (relax(model, 0.5), relax(model, 0.5, straight_through=True)):
        with pytest.raises(ValueError, match=r"RBM site 'z', which has no relaxed twin; .*surrogate.*score function"):
            program(x)
    with pytest.raises(ValueError, match="no relaxed twin"):
        Variational(AmortizedMeanField(model), temperature=0.5, num_steps=2).fit(model, x)
