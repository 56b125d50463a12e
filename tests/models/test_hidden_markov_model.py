"""HiddenMarkovModel: the program, Baum-Welch with priors, unequal lengths, and what may go wrong."""

import copy
import itertools
import json
import math

import pyro
import pytest
import torch
from pyro import poutine

from pyrovae.compare import compare
from pyrovae.inference import EM, Exact, ExactLikelihood, Variational
from pyrovae.models import HiddenMarkovModel

KINDS = ["categorical", "bernoulli", "gaussian", "gaussian, full", "gaussian, spherical"]
PRIORS = {
    "flat": {},
    "prior": {"concentration": 1.7, "emission_concentration": 2.2, "prior_count": 3.0, "prior_variance": 0.4},
}
each = pytest.mark.parametrize("kind", KINDS)


def build(kind="categorical", prior="flat", *, rows=12, length=6, states=3):
    torch.manual_seed(6)
    emission, _, covariance = kind.partition(", ")
    model = HiddenMarkovModel(states, 2, emission=emission, length=length, covariance=covariance or "diagonal", **PRIORS[prior])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    lengths = torch.arange(rows) % length + 1
    return model, model.sample(rows), lengths


def log_posterior(model, *args):
    return float(Exact().infer(model, *args).log_evidence.sum() + model.log_prior().detach())


@each
@pytest.mark.parametrize("prior", PRIORS)
def test_baum_welch_raises_the_log_posterior(kind, prior):
    model, x, lengths = build(kind, prior)
    model.initialize(x, lengths)
    fit = EM(num_iterations=12).fit(model, x, lengths)
    losses = [record["loss"] for record in fit.history]
    assert losses[-1] == pytest.approx(-log_posterior(model, x, lengths), rel=1e-12)
    assert all(b <= a + 1e-9 * len(x) for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 1e-3
    by_name = copy.deepcopy(model)
    EM(num_iterations=1).fit(by_name, x, lengths=lengths)
    EM(num_iterations=1).fit(model, x, lengths)
    for a, b in zip(model.parameters(), by_name.parameters(), strict=True):
        assert torch.equal(a, b)


@each
@pytest.mark.parametrize("prior", PRIORS)
def test_the_m_step_is_the_maximum(kind, prior):
    model, x, lengths = build(kind, prior)
    posterior = Exact().infer(model, x, lengths)
    q = posterior.q_function(model)
    before = float((q() + model.log_prior()).detach())
    model.m_step(posterior, x, lengths)
    best = q() + model.log_prior()
    assert float(best.detach()) > before + 1e-3
    for gradient in torch.autograd.grad(best, model.parameters()):
        assert float(gradient.abs().max()) < 1e-8
    wrong = copy.deepcopy(model)
    wrong.m_step(posterior, x)  # which takes the padding for data
    assert not all(torch.allclose(a, b) for a, b in zip(model.parameters(), wrong.parameters(), strict=True))


@pytest.mark.parametrize("spoil", ["prior", "rolled"])
def test_a_wrong_m_step_is_caught(spoil):
    model, x, lengths = build("gaussian", "prior")
    EM(num_iterations=60).fit(model, x, lengths)
    right = model.m_step
    flat = build("gaussian", "flat")[0]

    def wrong(posterior, x, lengths):
        if spoil == "prior":
            flat.m_step(posterior, x, lengths)
            model.load_state_dict(flat.state_dict())
        else:
            right(posterior, x, lengths)
            with torch.no_grad():
                model.transition.copy_(model.transition.roll(1, 0))

    model.m_step = wrong
    with pytest.raises(RuntimeError, match="never to lower"):
        EM(num_iterations=3).fit(model, x, lengths)


@each
def test_padding_is_not_looked_at(kind):
    model, x, lengths = build(kind)
    spoilt = x.clone()
    beyond = torch.arange(6) >= lengths.unsqueeze(-1)
    spoilt[beyond] = -7 if kind == "categorical" else math.nan
    for method in (Exact(), Exact(declared=False)):
        a, b = method.infer(model, x[:6], lengths[:6]), method.infer(model, spoilt[:6], lengths[:6])
        assert torch.equal(a.log_evidence, b.log_evidence)
        assert torch.equal(a.marginals["z"], b.marginals["z"])
    other = copy.deepcopy(model)
    fits = [EM(num_iterations=3).fit(m, data, lengths) for m, data in ((model, x), (other, spoilt))]
    assert fits[0].history[-1]["loss"] == fits[1].history[-1]["loss"]
    # a sequence alone, cut to its length, is the same sequence
    alone = torch.cat([Exact().infer(model, x[i : i + 1, : int(n)]).log_evidence for i, n in enumerate(lengths)])
    assert torch.allclose(Exact().infer(model, x, lengths).log_evidence, alone, atol=1e-10)
    loss = ExactLikelihood().differentiable_loss(model, None, spoilt, lengths)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, model.parameters()))


@each
def test_padding_that_can_be_scored_is_left(kind):
    """The site observes the argument itself, so that what replaces arguments by draws finds it."""
    model, x, lengths = build(kind)
    assert model(x, lengths) is x
    spoilt = x.clone()
    beyond = torch.arange(6) >= lengths.unsqueeze(-1)
    spoilt[beyond] = -7 if kind == "categorical" else math.nan
    shown = model(spoilt, lengths)
    assert torch.equal(shown[~beyond], x[~beyond])
    assert bool((shown[beyond] == x[0, 0]).all())
    if kind == "gaussian":  # a square that overflows, masked, still makes a gradient NaN
        model, x = model.float(), x.float()
        x[beyond] = 1e30
        loss = ExactLikelihood().differentiable_loss(model, None, x, lengths)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, model.parameters()))


@each
def test_data_of_another_dtype(kind):
    for own, given in itertools.permutations((torch.float32, torch.float64)):
        model, x, lengths = build(kind)
        model, x = model.to(own), x if kind == "categorical" else x.to(given)
        model.initialize(x, lengths)
        EM(num_iterations=2).fit(model, x, lengths)
        assert Exact().infer(model, x, lengths).log_evidence.dtype == own


@each
def test_the_program(kind):
    model, x, lengths = build(kind)
    assert x.shape == ((12, 6) if kind == "categorical" else (12, 6, 2))
    with poutine.block():
        trace = poutine.trace(model).get_trace(x, lengths)
        assert trace.nodes["z"]["value"].shape == (12, 6)
        assert model(batch_size=2, length=9).shape[:2] == (2, 9)
        assert model().shape[:2] == (1, 6)
    assert model.sample(3, length=4).shape[:2] == (3, 4)
    index = torch.tensor([3, 0])
    with poutine.block():
        part = poutine.trace(model).get_trace(x[index], lengths[index], index=index, num_data=12)
    assert part.nodes["x"]["scale"] == 6.0
    pyro.clear_param_store()
    whole = Exact().infer(model, x, lengths).log_evidence
    minibatch = Exact().infer(model, x[index], lengths[index], index=index, num_data=12).log_evidence
    assert torch.allclose(minibatch, whole[index])
    assert list(pyro.get_param_store()) == []


@each
def test_starts(kind):
    model, x, _ = build(kind, rows=40)
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.initialize(x, lengths=torch.arange(40) % 6 + 1)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    again = HiddenMarkovModel(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert log_posterior(again, x) == log_posterior(model, x)


def test_bad_data():
    model, x, lengths = build()
    vectors = build("gaussian")[0]
    for call, message in [
        (lambda: model(x.unsqueeze(-1)), r"expected data \[B, L\]"),
        (lambda: model(x[:0]), "at least one row"),
        (lambda: model(x[:, :0]), "one time"),
        (lambda: model(x + 1), "symbols from 0 to 1, got"),
        (lambda: model(x + 0.5), "fractions"),
        (lambda: model(x, lengths[:3]), r"lengths as integers \[12\]"),
        (lambda: model(x, lengths.double()), "lengths as integers"),
        (lambda: model(x, lengths - 1), "lengths from 1 to 6, got 0 to 5"),
        (lambda: model(x, lengths + 1), "lengths from 1 to 6"),
        (lambda: model(x, index=torch.arange(3), num_data=20), "expected index"),
        (lambda: model(batch_size=0), "batch_size >= 1"),
        (lambda: model(length=0), "length >= 1"),
        (lambda: vectors(torch.zeros(2, 6)), r"expected data \[B, L, 2\]"),
        (lambda: vectors(torch.full((2, 6, 2), math.nan)), "finite numbers"),
        (lambda: HiddenMarkovModel(2, 2, emission="poisson"), 'emission in "categorical"'),
        (lambda: HiddenMarkovModel(0, 2), "components >= 1"),
        (lambda: HiddenMarkovModel(2, 2, length=0), "length >= 1"),
        (lambda: HiddenMarkovModel(2, 2, concentration=0.0), "concentration >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_states_that_are_never_visited():
    """A state of probability 0 keeps its rows; nothing becomes NaN, and the rest learns as if it were not there."""
    model, x, lengths = build("bernoulli")
    with torch.no_grad():
        model.initial[1] = -math.inf
        model.transition[:, 1] = -math.inf
    small = HiddenMarkovModel(2, 2, emission="bernoulli")
    with torch.no_grad():
        small.initial.copy_(model.initial[[0, 2]])
        small.transition.copy_(model.transition[[0, 2]][:, [0, 2]])
        small.emission.logits.copy_(model.emission.logits[[0, 2]])
    kept = model.emission.logits.detach()[1].clone()
    ends = [EM(num_iterations=8).fit(m, x, lengths).history[-1]["loss"] for m in (model, small)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)
    assert torch.equal(model.emission.logits.detach()[1], kept)
    assert torch.isfinite(model.emission.logits).all()
    assert not bool(model.transition.isnan().any())


def test_one_time_and_one_row():
    for kind in KINDS:
        model, _, _ = build(kind, length=1)
        x = model.sample(1)
        EM(num_iterations=4).fit(model, x)
        assert math.isfinite(log_posterior(model, x))


def test_comparison():
    model, x, _ = build("bernoulli", "prior")
    methods = {"EM": EM(num_iterations=10), "gradient": Variational(None, ExactLikelihood(), num_steps=30)}
    table = compare(model, x, methods)
    assert {"EM", "gradient"} <= set(str(table).replace("|", " ").split())


def test_float32():
    model, x, lengths = build("gaussian")
    model, x = model.float(), x.float()
    model.initialize(x, lengths)
    fit = EM(num_iterations=10).fit(model, x, lengths)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())
    assert fit.history[-1]["loss"] < fit.history[0]["loss"]
