"""WakeSleep: the expectation of both phases' gradients against enumeration, what it learns, and what it refuses."""

import copy
import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import bits
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from stats import means_agree
from torch import nn

from pyrovae.guides import AmortizedMeanField, AmortizedStructured, LocalMeanField
from pyrovae.handlers import Module
from pyrovae.inference import Exact, Variational, WakeSleep
from pyrovae.inference.belief_nets.wake_sleep import TwoPhases, dream
from pyrovae.models import DeepBeliefNet, GaussianVAE, HiddenMarkovModel, SigmoidBeliefNet, toy


class Force(Messenger):
    """Lets draws come out as told."""

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"] and not msg["done"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def pair(kind):
    """A model, a guide, and the sizes of the latents."""
    torch.manual_seed(3)
    if kind == "layers":
        net = SigmoidBeliefNet(3, [2, 2])
        guide = AmortizedStructured(net, {"h1": nn.Linear(3, 2), "h2": nn.Linear(2, 2)})
        sizes = {"h1": 2, "h2": 2}
    elif kind == "deep":
        net = DeepBeliefNet(3, [2, 2])
        guide, sizes = AmortizedStructured(net), {"h1": 2}
    else:
        net = SigmoidBeliefNet(3, 2)
        guide, sizes = AmortizedMeanField(net, nn.Linear(3, 2)), {"h1": 2}
    for parameter in (*net.parameters(), *guide.parameters()):
        nn.init.normal_(parameter)
    return net, guide, sizes


def log_prob(program, x, values):
    """Log probability of one row at given values, by an ordinary run."""
    return poutine.trace(poutine.condition(program, data=values)).get_trace(x).log_prob_sum()


def states(sizes):
    """All joint states of some vectors of bits, each `[1, n]`."""
    found = [{}]
    for name, n in sizes.items():
        found = [{**state, name: value.unsqueeze(0)} for state in found for value in bits(n)]
    return found


def gradients(value, *modules):
    leaves = [p for module in modules for p in module.parameters()]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


KINDS = ["bits", "layers", "deep"]


@pytest.mark.parametrize("kind", KINDS)
def test_expectation_of_the_wake_phase(kind):
    """Σ_z q(z|x) (gradient of the estimate at z) is the gradient of E_q[log p(x, z)] for the model, none for the guide."""
    model, guide, sizes = pair(kind)
    x = torch.tensor([[1.0, 0, 1]])
    elbo, total = TwoPhases(), [0.0] * sum(1 for m in (model, guide) for _ in m.parameters())
    expected = 0.0
    for z in states(sizes):
        q = log_prob(guide, x, z).exp().detach()
        with Force(**z):
            loss, _ = elbo._wake(model, guide, (x,), {})
        total = [a - q * g for a, g in zip(total, gradients(loss, model, guide), strict=True)]
        expected = expected + q * log_prob(model, x, z)
    wanted = gradients(expected, model, guide)
    for a, b in zip(total, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert all(bool((g == 0).all()) for g in total[-len(list(guide.parameters())) :])
    assert all(bool((g != 0).any()) for g in total[: len(list(model.parameters()))])
    # and so, of the ELBO
    elbo_of = sum(log_prob(guide, x, z).exp().detach() * (log_prob(model, x, z) - log_prob(guide, x, z)) for z in states(sizes))
    for a, b in zip(total, gradients(elbo_of, model), strict=False):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_expectation_of_the_sleep_phase(kind):
    """Σ_{z,x} p(z, x) (gradient of the estimate) is that of −E_p(x)[KL(p(z|x) ‖ q(z|x))] for the guide, none for the model."""
    model, guide, sizes = pair(kind)
    elbo, total, kl, mass = TwoPhases(), None, 0.0, 0.0
    for x in bits(3):
        x = x.unsqueeze(0)
        joint = torch.stack([log_prob(model, x, z) for z in states(sizes)]).detach()
        for z, log_p in zip(states(sizes), joint, strict=True):
            with Force(**z, x=x):
                loss = elbo._sleep(model, guide, (torch.zeros(1, 3),), {}, {})
            found = [-log_p.exp() * g for g in gradients(loss, model, guide)]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
            kl = kl + log_p.exp() * (log_p - joint.logsumexp(0) - log_prob(guide, x, z))
            mass = mass + log_p.exp()
    assert math.isclose(mass, 1.0, rel_tol=1e-12)
    for a, b in zip(total, gradients(-kl, model, guide), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    count = len(list(model.parameters()))
    assert all(bool((g == 0).all()) for g in total[:count])
    assert all(bool((g != 0).any()) for g in total[count:])


def test_the_draws_are_those_of_the_programs():
    """Many independent steps average to the enumerated gradients of both phases, minibatches scaled by N/B."""
    model, guide, sizes = pair("bits")
    x = torch.tensor([[1.0, 0, 1], [0.0, 0, 1]])
    wake = sum(log_prob(guide, row, z).exp().detach() * log_prob(model, row, z) for row in x.split(1) for z in states(sizes))
    sleep = sum(
        log_prob(model, v.unsqueeze(0), z).exp().detach() * log_prob(guide, v.unsqueeze(0), z)
        for v in bits(3)
        for z in states(sizes)
    )
    expected = gradients(wake, model) + [2 * g for g in gradients(sleep, guide)]
    elbo, samples = TwoPhases(2), []
    for _ in range(400):
        index = torch.randint(0, 2, (1,))
        loss = elbo.differentiable_loss(model, guide, x[index], index=index, num_data=2)
        samples.append(torch.cat([-g.flatten() for g in gradients(loss, model, guide)]))
    expected = torch.cat([g.flatten() for g in expected])
    assert means_agree(torch.stack(samples), expected)
    assert not means_agree(torch.stack(samples), 0.5 * expected)


def test_it_learns_model_and_guide():
    truth = toy.belief_net(6, 3, seed=1)
    x = truth.sample(300)
    net = SigmoidBeliefNet(6, 3)
    guide = AmortizedMeanField(net, nn.Linear(6, 3))
    before = Exact().infer(net, x).log_evidence.mean()
    fit = WakeSleep(guide, num_steps=150, optim=partial(torch.optim.Adam, lr=0.05), num_log_samples=30, log_every=50).fit(
        net, x, validation=truth.sample(50)
    )
    after = Exact().infer(net, x).log_evidence.mean()
    assert after > before + 0.1
    assert fit.bound == "lower"
    assert set(fit.states) == {"model", "guide"}
    last = fit.history[-1]
    assert last["bound"] < float(after) + 6 * last["stderr"]
    assert last["bound"] > fit.history[0]["bound"] + 6 * (last["stderr"] + fit.history[0]["stderr"])
    assert last["validation"] is not None
    posterior = WakeSleep(guide).infer(net, x)
    assert abs(float(posterior.log_evidence.mean()) - last["bound"]) < 6 * (last["stderr"] + float(posterior.stderr.mean()))


def test_sleep_alone_finds_the_posterior():
    """With a model that does not move and a guide that can be exact, dreams lead to p(z | x)."""
    net = SigmoidBeliefNet(3, 1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 2)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    guide = AmortizedMeanField(net, nn.Linear(3, 1))  # one bit's logit is linear in the data
    x = torch.stack(bits(3))
    schedule = lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.01, 400)  # noqa: E731
    before = {k: v.clone() for k, v in net.state_dict().items()}
    WakeSleep(guide, num_steps=400, optim=partial(torch.optim.Adam, lr=0.05), scheduler=schedule).fit(net, x.repeat(64, 1))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    exact = Exact().infer(net, x)
    weights = exact.log_evidence.exp()
    found = guide.encoder(x).sigmoid()
    error = (weights * (found - exact.marginals["h1"]).abs().squeeze(-1)).sum()
    assert error < 0.03
    assert (weights * (0.5 - exact.marginals["h1"]).abs().squeeze(-1)).sum() > 0.1, "where it began"


def plain():
    decoder, encoder = nn.Linear(2, 4), nn.Linear(5, 2)

    def model(x, label):
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.4)).to_event(1))
            mean = pyro.deterministic("mean", decoder(z) + label.unsqueeze(-1))
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x, label):
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(torch.cat((x, label.unsqueeze(-1)), -1))).to_event(1))

    return model, guide, decoder, encoder


def test_plain_functions_and_arguments_that_are_no_data():
    model, guide, decoder, encoder = plain()
    x, label = torch.randn(40, 4), torch.arange(40.0)
    before = [copy.deepcopy(m.state_dict()) for m in (decoder, encoder)]
    fit = WakeSleep(guide, num_epochs=3, batch_size=8).fit(model, x, label=label)
    for module, old in zip((decoder, encoder), before, strict=True):
        assert not any(torch.equal(v, old[k]) for k, v in module.state_dict().items())
    assert list(pyro.get_param_store()) == []
    assert fit.history[-1]["epoch"] == 3
    with poutine.block():
        trace, args, kwargs = dream(model, (x,), {"label": label}, {})
    assert kwargs["label"] is label
    assert args[0] is trace.nodes["x"]["value"]
    residual = trace.nodes["x"]["value"] - trace.nodes["mean"]["value"]
    assert means_agree(residual, torch.zeros(4)), "the dream is drawn around what the program computed"
    assert not means_agree(residual, torch.ones(4))


class PathGuide(Module):
    """q(z | x): each time's state from its own observation."""

    def __init__(self, symbols, states):
        super().__init__()
        self.logits = nn.Parameter(0.01 * torch.randn(symbols, states))

    def forward(self, x, lengths=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.logits[x]).to_event(1))


def test_sequences_of_unequal_lengths():
    """What is drawn takes the place of padded data, the lengths stay; the guide learns what a symbol tells."""
    torch.manual_seed(0)
    model, guide = HiddenMarkovModel(2, 3), PathGuide(3, 2)
    lengths = torch.tensor([6, 1, 3, 2] * 10)
    x = model.sample(40, length=6) * (torch.arange(6) < lengths.unsqueeze(-1))
    trace, (drawn, same), _ = dream(model, (x, lengths), {}, {})
    assert drawn is trace.nodes["x"]["value"]
    assert same is lengths
    before = copy.deepcopy(model.state_dict())
    fit = WakeSleep(guide, num_steps=150).fit(model, x, lengths)
    assert fit.history[-1]["bound"] > fit.history[0]["bound"]
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert bool((guide.logits.abs() > 0.1).any())
    bound = WakeSleep(guide, num_steps=1).infer(model, x, lengths)
    assert float(bound.log_evidence.mean()) < float(Exact().infer(model, x, lengths).log_evidence.mean())


def test_in_stock_svi():
    net, guide, _ = pair("bits")
    x = net.sample(10)
    trained = [*net.named_parameters(prefix="model"), *guide.named_parameters(prefix="guide")]
    before = {k: v.detach().clone() for k, v in trained}
    SVI(net, guide, pyro.optim.Adam({"lr": 0.01}), TwoPhases()).step(x)
    assert [k for k, v in trained if torch.equal(v, before[k])] == []


def test_continuous_latents():
    net = GaussianVAE(4, 2, (3,))
    guide = AmortizedMeanField(net)
    fit = WakeSleep(guide, num_steps=3, num_particles=2).fit(net, net.sample(6))
    assert fit.model_evaluations >= 3 * 2 * 6


def test_no_bound_without_log_z():
    net = DeepBeliefNet(4, [3, 2], max_bits=1)
    x = net.sample(10)
    guide = AmortizedStructured(net)
    with pytest.warns(UserWarning, match="log Z is unknown"):
        fit = WakeSleep(guide, num_steps=2).fit(net, x, validation=x)
    assert all(r["bound"] is None and r["validation"] is None and r["stderr"] is None for r in fit.history)
    assert fit.best_step is None
    refused = pytest.raises(ValueError, match="no patience where log Z is unknown")
    with refused, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WakeSleep(guide, num_steps=2, patience=3).fit(net, x, validation=x)


def test_refusals():
    net, guide, _ = pair("bits")
    x = net.sample(8)
    with pytest.raises(ValueError, match="does not depend on them"):
        WakeSleep(LocalMeanField(net, 8), num_steps=1).fit(net, x)

    def fixed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(x[:, :2] * 0.2 + 0.3).to_event(1))

    with pytest.raises(ValueError, match="guide with parameters"):
        WakeSleep(fixed, num_steps=1).fit(net, x)

    def with_factor(x):
        net(x)
        pyro.factor("more", x.sum())

    with pytest.raises(ValueError, match=r"pyro\.factor 'more'"):
        WakeSleep(guide, num_steps=1).fit(with_factor, x)

    def transformed(x):
        net(1 - x)

    with pytest.raises(ValueError, match="arguments of the program as they come, got 'x'"):
        WakeSleep(guide, num_steps=1).fit(transformed, x)

    class NoDraws(dist.Bernoulli):
        def sample(self, sample_shape=None):
            raise NotImplementedError("no draws")

        def expand(self, batch_shape, _instance=None):
            return NoDraws(logits=self.logits.expand(batch_shape))

    def undrawable(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h1", dist.Bernoulli(logits=net.prior).to_event(1))
            pyro.sample("x", NoDraws(logits=net.biases[0] + h @ net.weights[0]).to_event(1), obs=x)

    with pytest.raises(ValueError, match="sites can be drawn, got 'x'"):
        WakeSleep(guide, num_steps=1).fit(undrawable, x)
    for wrong in ({"elbo": TwoPhases()}, {"temperature": 0.5}, {"surrogate": "reinmax"}, {"beta": 2.0}):
        with pytest.raises(ValueError, match=f"expected no {next(iter(wrong))}"):
            WakeSleep(guide, **wrong)
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="num_particles >= 1"):
            WakeSleep(guide, num_particles=wrong)
    with pytest.raises(ValueError, match="expected a guide"):
        WakeSleep(None)


def test_zero_weights_are_not_blindness():
    net, guide, _ = pair("bits")
    nn.init.zeros_(guide.encoder.weight)
    WakeSleep(guide, num_steps=1).fit(net, net.sample(4))
    assert bool((guide.encoder.weight != 0).any())


def test_same_as_a_variational_loop_but_for_the_objective():
    """Records, minibatches and the end state are those of Variational."""
    ends = []
    for make in (
        lambda g: WakeSleep(g, num_steps=6, batch_size=3),
        lambda g: Variational(g, TwoPhases(), num_steps=6, batch_size=3),
    ):
        net, guide, _ = pair("layers")
        x = net.sample(7)
        torch.manual_seed(5)
        fit = make(guide).fit(net, x)
        ends.append((fit, net.state_dict()))
    (a, first), (b, second) = ends
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert [r["bound"] for r in a.history] == [r["bound"] for r in b.history]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_resumed_it_is_the_same_run(tmp_path, device):
    ends = []
    for parts in ((6,), (3, 6)):
        net, guide, _ = pair("bits")
        x = net.sample(8)
        torch.manual_seed(2)
        for number, steps in enumerate(parts):
            folder = tmp_path / str(len(parts))
            method = WakeSleep(guide, num_steps=steps, batch_size=3, checkpoint=folder, log_every=3, device=device)
            method.fit(net, x, resume=number > 0)
        ends.append(net.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
