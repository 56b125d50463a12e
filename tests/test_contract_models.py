"""What every model of this library keeps, one row a model."""

import copy

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Exact, ExactLikelihood, Variational
from pyrovae.models import SigmoidBeliefNet, toy

MODELS = {
    "SigmoidBeliefNet": (lambda: SigmoidBeliefNet(5, 3), 5, {"h1": (3,)}),
    "SigmoidBeliefNet, layers": (lambda: SigmoidBeliefNet(5, [3, 2]), 5, {"h2": (2,), "h1": (3,)}),
    "belief_net": (lambda: toy.belief_net(4, 2), 4, {"h1": (2,)}),
    "Mixture": (lambda: toy.Mixture(5, 3), 5, {"z": ()}),
    "LinearGaussian": (lambda: toy.LinearGaussian(3, 2), 3, {"z": (2,)}),
}
DISCRETE = [name for name in MODELS if name != "LinearGaussian"]
each = pytest.mark.parametrize("name", MODELS)


def build(name, rows=6):
    torch.manual_seed(1)
    make, width, latents = MODELS[name]
    model = make()
    with torch.no_grad(), poutine.block():
        x = model(batch_size=rows)
    pyro.clear_param_store()
    return model, x, width, latents


def trace(model, *args, **kwargs):
    with poutine.block():
        return poutine.trace(model).get_trace(*args, **kwargs)


def log_joint(model, x, values, **kwargs):
    t = trace(poutine.condition(model, data=values), x, **kwargs)
    t.compute_log_prob()
    return {name: site for name, site in t.nodes.items() if site["type"] == "sample" and "log_prob" in site}


@each
def test_prior_predictive_and_the_sites(name):
    model, x, width, latents = build(name)
    for rows in (1, 4):
        t = trace(model, batch_size=rows)
        assert {k: tuple(t.nodes[k]["value"].shape) for k in [*latents, "x"]} == {
            k: (rows, *s) for k, s in {**latents, "x": (width,)}.items()
        }
        assert not t.nodes["x"]["is_observed"]
        assert tuple(t.nodes["_RETURN"]["value"].shape) == (rows, width)
        frames = t.nodes["x"]["cond_indep_stack"]
        assert [(f.name, f.dim, f.size) for f in frames] == [("data", -1, rows)]
    t = trace(model, x)
    assert t.nodes["x"]["is_observed"]
    assert torch.equal(t.nodes["x"]["value"], x)
    assert set(trace(model).stochastic_nodes) == {*latents, "x", "data"} or set(trace(model).stochastic_nodes) == {
        *latents,
        "x",
    }


@each
def test_a_minibatch_is_scaled(name):
    model, x, _, latents = build(name)
    index = torch.tensor([4, 0, 2])
    full = trace(model, x)
    values = {k: full.nodes[k]["value"] for k in latents}
    rows = log_joint(model, x, values)
    part = log_joint(model, x[index], {k: v[index] for k, v in values.items()}, index=index, num_data=6)
    for site in [*latents, "x"]:
        assert part[site]["scale"] == 2.0
        # the batch's objective is the sum over its rows
        assert torch.allclose(part[site]["log_prob"], 2 * rows[site]["log_prob"][index])
    with pytest.raises(ValueError, match="expected index"):
        model(x, index=index)
    with pytest.raises(ValueError, match="expected index"):
        model(x[:2], index=index, num_data=6)


@each
def test_bad_data(name):
    model, _, width, _ = build(name)
    for bad in (torch.zeros(3, width + 1), torch.zeros(0, width), torch.zeros(width)):
        with pytest.raises(ValueError, match="expected data"):
            model(bad)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        model(batch_size=0)


@each
def test_predictive_takes_it(name):
    model, _, width, latents = build(name)
    for parallel in (False, True):
        drawn = Predictive(model, num_samples=7, parallel=parallel)(batch_size=3)
        assert {k: tuple(v.shape) for k, v in drawn.items() if k in latents or k == "x"} == {
            k: (7, 3, *s) for k, s in {**latents, "x": (width,)}.items()
        }


@each
def test_every_parameter_has_a_gradient(name):
    model, x, _, _ = build(name)
    t = trace(model, x)
    t.log_prob_sum().backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert dead == []


@each
def test_state_dict_round_trip(name):
    model, x, _, latents = build(name)
    other = MODELS[name][0]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    values = {k: v["value"] for k, v in trace(model, x).nodes.items() if k in latents}
    expected = log_joint(model, x, values)["x"]["log_prob"]
    assert not torch.allclose(log_joint(other, x, values)["x"]["log_prob"], expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(log_joint(other, x, values)["x"]["log_prob"], expected)


@each
def test_copies_stay_apart(name):
    model, x, _, _ = build(name)
    other = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert model._pyro_name != other._pyro_name
    trace(model, x)
    trace(other, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    trace(other, x)
    trace(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@each
def test_two_instances_trained_in_turn_by_stock_svi(name):
    make = MODELS[name][0]
    models = [make(), make()]
    _, x, _, _ = build(name)
    guides = [AmortizedMeanField(model) for model in models]
    for model, guide in zip(models, guides, strict=True):
        before = {k: v.clone() for k, v in [*model.state_dict().items(), *guide.state_dict().items()]}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2))
        for _ in range(2):
            svi.step(x)
        now = {**model.state_dict(), **guide.state_dict()}
        assert [k for k, v in now.items() if torch.equal(v, before[k])] == []
    keys = [{k for k in pyro.get_param_store() if k.startswith(m._pyro_name + ".")} for m in [*models, *guides]]
    assert all(keys)
    assert len(set.union(*keys)) == sum(len(k) for k in keys)


@pytest.mark.parametrize("name", DISCRETE)
def test_two_instances_learned_in_turn(name):
    make = MODELS[name][0]
    _, x, _, _ = build(name)
    for model in (make(), make()):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        Variational(None, ExactLikelihood(), num_steps=2).fit(model, x)
        assert [k for k, v in model.state_dict().items() if torch.equal(v, before[k])] == []
    assert list(pyro.get_param_store()) == []


@pytest.mark.parametrize("name", DISCRETE)
def test_rows_are_independent(name):
    model, x, _, _ = build(name)
    whole = Exact().infer(model, x).log_evidence
    parts = torch.cat([Exact().infer(model, x[i : i + 1]).log_evidence for i in range(6)])
    assert torch.allclose(whole, parts, atol=1e-12)


@each
def test_reset_parameters(name):
    model, _, _, _ = build(name)
    ends = []
    for seed in (3, 4, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(9.0)
        torch.manual_seed(seed)
        model.reset_parameters()
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
        assert [k for k, v in ends[-1].items() if bool((v == 9).any())] == []
    assert all(torch.equal(v, ends[2][k]) for k, v in ends[0].items())
    assert not all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    torch.manual_seed(3)
    fresh = MODELS[name][0]()
    if name != "belief_net":  # whose own parameters are larger
        assert all(torch.equal(v, ends[0][k]) for k, v in fresh.state_dict().items())


def test_closed_forms_of_linear_gaussian():
    model, x, _, _ = build("LinearGaussian")
    mean, covariance = model.posterior(x)
    z = torch.randn(6, 2)
    joint = log_joint(model, x, {"z": z})
    q = torch.distributions.MultivariateNormal(mean, covariance).log_prob(z)
    assert torch.allclose(joint["z"]["log_prob"] + joint["x"]["log_prob"] - q, model.log_evidence(x), atol=1e-10)
