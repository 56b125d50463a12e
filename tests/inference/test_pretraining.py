"""Greedy pretraining: its bound against the sum over all states, monotone from the tied start, and every refusal."""

import itertools
from functools import partial

import pytest
import torch
from brute_force import bits
from pyro import poutine
from torch import nn
from torch.nn.functional import logsigmoid

from pyrovae import data
from pyrovae.distributions import RBM
from pyrovae.guides import AmortizedMeanField, AmortizedStructured
from pyrovae.inference import ContrastiveDivergence, Exact, ExactLikelihood, GreedyPretraining, Variational
from pyrovae.inference.belief_nets import pretraining
from pyrovae.inference.belief_nets.pretraining import tied
from pyrovae.inference.belief_nets.stacked import Stack, aggregate, ascend
from pyrovae.models import DeepBeliefNet, SigmoidBeliefNet

STATES = {n: torch.stack(bits(n)) for n in range(1, 7)}


def patterns(n=60, visible=6):
    torch.manual_seed(4)
    centre = (torch.rand(3, visible) < 0.5).double()
    x = centre[torch.randint(0, 3, (n,))]
    return (x - (torch.rand_like(x) < 0.1).double()).abs()


def elbo_by_states(net, guide, x):
    """E_Q[log p(x, h) − log q(h | x)], mean over rows, by ordinary runs of both programs at every joint state."""
    sizes = {f"h{k + 1}": net.sizes[k + 1] for k in range(len(net.weights))}
    total = torch.zeros(len(x))
    for values in itertools.product(*(bits(n) for n in sizes.values())):
        z = {name: value.expand(len(x), -1) for name, value in zip(sizes, values, strict=True)}
        log_p, log_q = (_rows(poutine.trace(poutine.condition(f, data=z)).get_trace(x)) for f in (net, guide))
        total += log_q.exp() * (log_p - log_q)
    return float(total.mean())


def _rows(trace):
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site).detach()


@pytest.mark.parametrize("hidden", [[3, 6], [3, 8], [4, 3], [3, 4, 3], [2, 5, 2]])
def test_the_bound_is_that_of_all_states_and_never_falls(hidden):
    x, other = patterns(), patterns(10)[:, :6].flip(1)
    net = DeepBeliefNet(6, hidden)
    guide = AmortizedStructured(net)
    fit = GreedyPretraining(guide, num_iterations=25).fit(net, x, validation=other)
    for rows, found in ((x, fit.history[-1]["bound"]), (other, fit.history[-1]["validation"])):
        assert abs(elbo_by_states(net, guide, rows) - found) < 1e-10
        assert found <= float(Exact().infer(net, rows).log_evidence.mean()) + 1e-10
    with torch.no_grad():
        guide.encoders["h1"].bias.add_(0.1)
    assert abs(elbo_by_states(net, guide, x) - fit.history[-1]["bound"]) > 1e-6, "another Q is told apart"

    for before, after in itertools.pairwise(fit.history):
        if after["layer"] == before["layer"] or after["start"] == "tied":
            assert after["bound"] >= before["bound"] - 1e-12
        if after["layer"] != before["layer"] and after["start"] == "tied":
            assert abs(after["bound"] - before["bound"]) < 1e-10, "tied, the new RBM is the old prior"
    starts = [next(r["start"] for r in fit.history if r["layer"] == k + 1) for k in range(len(hidden))]
    below = [6, *hidden]
    assert starts == ["random", *("tied" if below[k + 2] >= below[k] else "truncated" for k in range(len(hidden) - 1))]
    assert fit.bound == "lower"
    assert set(fit.states) == {"model", "guide"}
    assert fit.history[-1]["bound"] > fit.history[0]["bound"] + 0.3
    assert fit.model_evaluations == len(x) * fit.history[-1]["step"]


def test_a_stack_of_one_is_the_likelihood():
    x = patterns()
    rbm = RBM(torch.randn(6, 3), torch.randn(6), torch.randn(3))
    stack = Stack(x, 16)
    stack.top(rbm)
    assert abs(stack.bound() - float(rbm.log_prob(x).mean())) < 1e-12
    stack.push()
    stack.top(RBM(*tied(rbm, 6, stack.levels[-1].mean())))
    assert abs(stack.bound() - float(rbm.log_prob(x).mean())) < 1e-10
    stack.top(RBM(*(t + 0.3 * torch.randn_like(t) for t in tied(rbm, 6, stack.levels[-1].mean()))))
    assert abs(stack.bound() - float(rbm.log_prob(x).mean())) > 1e-3
    small = Stack(x, 2)
    small.top(rbm)
    assert small.bound() is None


def test_tied_weights_keep_the_prior_of_the_layer():
    rbm = RBM(torch.randn(4, 3), torch.randn(4), torch.randn(3))
    h = STATES[3]
    both = torch.cat((STATES[4].repeat(8, 1), h.repeat_interleave(16, 0)), 1)
    prior = rbm.joint().log_prob(both).reshape(8, 16).logsumexp(1)
    for units in (4, 6):
        assert torch.allclose(RBM(*tied(rbm, units, torch.zeros(3))).log_prob(h), prior, atol=1e-12)
    truncated = RBM(*tied(rbm, 3, torch.full((3,), 0.5))).log_prob(h)
    assert not torch.allclose(truncated, prior, atol=1e-6)
    # what is left out is expanded about the mean: with weights that are small it changes p(h) by their square
    with torch.no_grad():
        rbm.W[1] *= 1e-4
    prior = rbm.joint().log_prob(both).reshape(8, 16).logsumexp(1)
    truncated = RBM(*tied(rbm, 3, torch.full((3,), 0.5))).log_prob(h)
    assert torch.allclose(truncated, prior, atol=1e-7)
    assert not torch.allclose(RBM(rbm.W[[0, 2, 3]].T, rbm.c, rbm.b[[0, 2, 3]]).log_prob(h), prior, atol=1e-7)


@pytest.mark.parametrize("units", [1, 2, 5])
def test_aggregate_is_the_mixture_of_the_rows(units):
    logits, weights = torch.randn(7, units), torch.rand(7)
    h = STATES[units].unsqueeze(1)  # [2^H, 1, H]
    expected = ((h * logsigmoid(logits) + (1 - h) * logsigmoid(-logits)).sum(-1).exp() * weights).sum(1)
    assert torch.allclose(aggregate(logits, weights), expected, atol=1e-14)
    assert units == 1 or not torch.allclose(aggregate(logits.flip(1), weights), expected, atol=1e-3)


def test_ascent_never_falls_and_arrives():
    curvature = torch.tensor([1.0, 30.0, 1000.0])
    values = [v for v, _ in itertools.islice(ascend(lambda a: -(curvature * (a - 2) ** 2).sum(), (torch.zeros(3),)), 60)]
    assert all(b >= a for a, b in itertools.pairwise(values))
    assert values[-1] > -1e-6
    assert list(ascend(lambda a: -(a**2).sum(), (torch.zeros(2),))) == [], "at the maximum, no step is taken"


def test_a_bound_that_falls_is_an_error(monkeypatch):
    original = pretraining.ascend

    def descend(objective, start):
        for value, found in original(objective, start):
            yield value - 1, found

    monkeypatch.setattr(pretraining, "ascend", descend)
    with pytest.raises(RuntimeError, match="never to lower the bound"):
        GreedyPretraining(num_iterations=3).fit(DeepBeliefNet(6, [3, 6]), patterns())


@pytest.mark.parametrize(
    "method",
    [
        ContrastiveDivergence(5, num_epochs=60, batch_size=20, num_chains=20, optim=partial(torch.optim.SGD, lr=0.3)),
        Variational(None, ExactLikelihood(), num_steps=150, optim=partial(torch.optim.Adam, lr=0.05)),
    ],
)
def test_with_a_learner_of_rbms(method):
    x, net = patterns(200), DeepBeliefNet(6, [4, 6])
    guide = AmortizedStructured(net)
    fit = GreedyPretraining(guide, method).fit(net, x, validation=x[:20])
    assert [(r["layer"], r["start"]) for r in fit.history] == [(1, "random")] * 2 + [(2, "tied")] * 2
    assert abs(elbo_by_states(net, guide, x) - fit.history[-1]["bound"]) < 1e-10
    assert fit.history[1]["bound"] > fit.history[0]["bound"] + 0.2
    assert abs(fit.history[2]["bound"] - fit.history[1]["bound"]) < 1e-10
    assert fit.model_evaluations > 0
    beyond = GreedyPretraining(guide, method, max_bits=3).fit(net, x)
    assert [r["bound"] for r in beyond.history] == [None] * 4


def test_float32_nets():
    x = patterns().float()
    net = DeepBeliefNet(6, [3, 6]).float()
    guide = AmortizedStructured(net, example=(x,))
    fit = GreedyPretraining(guide, num_iterations=10).fit(net, x)
    assert all(p.dtype == torch.float32 for p in (*net.parameters(), *guide.parameters()))
    exact = float(Exact().infer(net, x).log_evidence.mean())
    assert fit.history[-1]["bound"] <= exact + 1e-5
    found = float(Variational(guide, num_samples=300).infer(net, x).log_evidence.mean())
    assert abs(found - fit.history[-1]["bound"]) < 0.05


def test_sixteen_bits():
    """As large as the assertion goes: 16 units in each enumerated layer."""
    x, _ = data.patterns("bars_and_stripes", size=4)
    net = DeepBeliefNet(16, [16, 16])
    fit = GreedyPretraining(num_iterations=3).fit(net, x)
    bounds = [r["bound"] for r in fit.history]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(bounds))


def test_refusals():
    x, net = patterns(), DeepBeliefNet(6, [3, 6])
    for wrong in ({"num_iterations": 0}, {"max_bits": 0}, {"max_bits": 25}, {"method": 3}, {"method": ContrastiveDivergence}):
        with pytest.raises(ValueError, match="expected"):
            GreedyPretraining(**wrong)
    for bad in (x[:, :4], x[:0], 255 * x, x * torch.nan, x[0]):
        with pytest.raises(ValueError, match="expected"):
            GreedyPretraining().fit(net, bad)
        with pytest.raises(ValueError, match="expected"):
            GreedyPretraining().fit(net, x, validation=bad)
    for model in (SigmoidBeliefNet(6, [3, 2]), lambda x: None):
        with pytest.raises(ValueError, match="under an RBM"):
            GreedyPretraining().fit(model, x)
    with pytest.raises(ValueError, match=r"bytes; pass method=ContrastiveDivergence"):
        GreedyPretraining().fit(DeepBeliefNet(6, [17, 6]), x)
    for guide in (AmortizedMeanField(net), AmortizedStructured(net, {"h1": nn.Sequential(nn.Linear(6, 3))})):
        with pytest.raises(ValueError, match="linear encoder of 'h1'"):
            GreedyPretraining(guide).fit(net, x)
