"""UpDown: the expectation of its gradients, with k sweeps at the top, against enumeration of all states."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import bits
from pyro import poutine
from pyro.poutine.messenger import Messenger
from stats import means_agree
from torch import nn

from pyrovae.distributions import RBM, BoltzmannMachine
from pyrovae.guides import AmortizedMeanField, AmortizedStructured
from pyrovae.inference import Exact, GreedyPretraining, UpDown, Variational
from pyrovae.inference.belief_nets.wake_sleep import TwoPhases
from pyrovae.models import DeepBeliefNet, SigmoidBeliefNet

X = torch.tensor([[1.0, 0, 1]], dtype=torch.float64)


class Force(Messenger):
    """Lets draws come out as told."""

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"] and not msg["done"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def pair(**options):
    torch.manual_seed(6)
    net = DeepBeliefNet(3, [2, 2], **options)
    guide = AmortizedStructured(net)
    for parameter in (*net.parameters(), *guide.parameters()):
        nn.init.normal_(parameter, std=1.5)
    return net, guide


def states(n):
    return [value.unsqueeze(0) for value in bits(n)]


def gradients(value, *modules):
    leaves = [p for module in modules for p in module.parameters()]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


def tables(net, guide, k):
    """q(h | X), T^k(h' | h) and p(x | h), each from the definition."""
    h, t = (torch.cat(states(2)) for _ in range(2))
    joint = ((h @ net.top_bias)[:, None] + t @ net.top_hidden_bias + h @ net.top_weight @ t.T).exp()
    step = (joint / joint.sum(1, keepdim=True)) @ (joint / joint.sum(0, keepdim=True)).T  # h -> t -> h'
    q = dist.Bernoulli(logits=guide.encoders["h1"](X)).log_prob(h).sum(-1).exp()
    x = torch.cat(states(3))
    given = dist.Bernoulli(logits=net.biases[0] + h @ net.weights[0])  # [4, 3]
    return h, q.detach(), torch.linalg.matrix_power(step, k).detach(), given.log_prob(x.unsqueeze(1)).sum(-1).T


def enumerated(net, guide, k):
    """The gradients that UpDown should have, for the model and the guide, of minus the loss."""
    h, q, step, log_given = tables(net, guide, k)
    moved = q @ step
    free = -net.top().free_energy(h)
    x = torch.cat(states(3))
    seen = int((X @ torch.tensor([4.0, 2, 1])).long())
    wake = (q * (log_given[:, seen] + free)).sum() - (moved * free).sum()
    dreams = moved[:, None] * log_given.exp().detach()  # [4, 8]
    log_q = dist.Bernoulli(logits=guide.encoders["h1"](x)).log_prob(h.unsqueeze(1)).sum(-1)
    return gradients(wake, net) + gradients((dreams * log_q).sum(), guide)


@pytest.mark.parametrize("k", [1, 3])
def test_expectation(monkeypatch, k):
    net, guide = pair()
    h, q, step, log_given = tables(net, guide, k)
    elbo, total = TwoPhases(num_sweeps=k), None
    for i in range(4):
        for j in range(4):

            def sweep(self, found, number, j=j):
                assert number == k
                found.copy_(h[j : j + 1])

            monkeypatch.setattr(RBM, "sweep", sweep)
            for x, log_p in zip(states(3), log_given[j].detach(), strict=True):
                with Force(h1=h[i : i + 1], x=x):
                    loss = elbo.differentiable_loss(net, guide, X)
                weight = q[i] * step[i, j] * log_p.exp()
                found = [-weight * g for g in gradients(loss, net, guide)]
                total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    names = [name for module in (net, guide) for name, _ in module.named_parameters()]
    for name, a, b in zip(names, total, enumerated(net, guide, k), strict=True):
        assert torch.allclose(a, b, atol=1e-12), name
        assert bool((a != 0).any()), name


def test_its_draws_are_k_sweeps():
    net, guide = pair()
    samples = []
    elbo = TwoPhases(num_sweeps=2)
    for _ in range(60):
        loss = elbo.differentiable_loss(net, guide, X.expand(50, 3)) / 50
        samples.append(torch.cat([-g.flatten() for g in gradients(loss, net, guide)]))
    samples = torch.stack(samples)
    expected, other = (torch.cat([g.flatten() for g in enumerated(net, guide, k)]) for k in (2, 0))
    assert means_agree(samples, expected)
    assert not means_agree(samples, other), "no sweeps are told apart"


def test_many_sweeps_are_maximum_likelihood_of_the_top():
    net, guide = pair()
    h, q, _, _ = tables(net, guide, 1)
    found = dict(zip([n for n, _ in net.named_parameters()], enumerated(net, guide, 200), strict=False))
    for name, g in zip(["top_weight", "top_bias"], gradients((q * net.top().log_prob(h)).sum(), net)[2:4], strict=True):
        wanted = torch.autograd.grad((q * net.top().log_prob(h)).sum(), getattr(net, name))[0]
        assert torch.allclose(found[name], wanted, atol=1e-10), g
        assert not torch.allclose(dict(zip(found, enumerated(net, guide, 1), strict=False))[name], wanted, atol=1e-4)


def test_it_learns_from_the_greedy_end():
    torch.manual_seed(8)
    centre = (torch.rand(4, 8) < 0.5).double()
    x = centre[torch.randint(0, 4, (200,))]
    x = (x - (torch.rand_like(x) < 0.05).double()).abs()
    net = DeepBeliefNet(8, [3, 4])
    guide = AmortizedStructured(net)
    GreedyPretraining(guide, num_iterations=8).fit(net, x)
    before = Exact().infer(net, x).log_evidence.mean()
    fit = UpDown(guide, num_sweeps=5, num_steps=150, optim=partial(torch.optim.Adam, lr=0.03), log_every=150).fit(net, x)
    after = Exact().infer(net, x).log_evidence.mean()
    assert after > before + 0.1
    last = fit.history[-1]
    assert last["bound"] < float(after) + 6 * last["stderr"]
    assert set(fit.states) == {"model", "guide"}
    assert torch.equal(fit.states["guide"]["encoders.h1.weight"], guide.encoders["h1"].weight)
    found = UpDown(guide).infer(net, x).log_evidence.mean()
    assert abs(float(found) - last["bound"]) < 0.1


def test_log_z_is_not_needed():
    net, guide = pair(max_bits=1)
    x = torch.cat(states(3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.warns(UserWarning, match="log Z is unknown"):
        fit = UpDown(guide, num_steps=5, batch_size=4).fit(net, x)
    assert all(record["bound"] is None for record in fit.history)
    assert not any(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "parameters, and chains begun at the data"


def test_any_program_with_an_rbm_prior():
    decoder, encoder = nn.Linear(2, 5), nn.Linear(5, 2)
    prior = nn.ParameterList([torch.randn(2, 3), torch.randn(2), torch.randn(3)])

    def model(x):
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", RBM(*prior))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    before = [p.detach().clone() for p in (*decoder.parameters(), *encoder.parameters(), *prior)]
    fit = UpDown(guide, num_steps=5).fit(model, torch.randn(20, 5))
    assert fit.bound == "lower"
    assert not any(
        torch.equal(a, b) for a, b in zip(before, (*decoder.parameters(), *encoder.parameters(), *prior), strict=True)
    )


def test_refusals():
    net = SigmoidBeliefNet(3, 2)
    with pytest.raises(ValueError, match="latent drawn from an RBM"):
        UpDown(AmortizedMeanField(net)).fit(net, net.sample(4))
    deep, guide = pair()
    for wrong in ({"num_sweeps": 0}, {"num_sweeps": 2.5}, {"num_particles": 0}, {"elbo": None}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="expected"):
            UpDown(guide, **wrong)
    with pytest.raises(ValueError, match="expected"):
        UpDown(guide).fit(deep, torch.full((4, 3), 255.0))
    machine = BoltzmannMachine(torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]]), torch.zeros(3))
    weight = nn.Parameter(torch.randn(2, 3))

    def with_hidden_units(x):
        w = pyro.param("w", weight)
        with pyro.plate("data", len(x)):
            z = pyro.sample("h1", machine.marginal(2))
            pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=x)

    with pytest.raises(ValueError, match="without hidden units"):
        UpDown(guide, num_steps=1).fit(with_hidden_units, X)


def test_the_guide_can_be_judged():
    net, guide = pair()
    x = torch.cat(states(3))
    UpDown(guide, num_steps=3).fit(net, x)
    posterior = Variational(guide, num_samples=200).infer(net, x)
    gap = Exact().infer(net, x).log_evidence - posterior.log_evidence
    assert bool((gap > -6 * posterior.stderr - 1e-12).all())
    with poutine.block():
        assert guide(x)["h1"].shape == (8, 2)
