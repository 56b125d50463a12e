"""What every inference method's Posterior keeps, one row a method."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import NUTS
from torch import nn

from pyrovae.guides import AmortizedMeanField, LocalMeanField
from pyrovae.inference import (
    AIS,
    MCMC,
    Exact,
    Gibbs,
    GibbsKernel,
    Importance,
    MeanField,
    Posterior,
    SaulJaakkolaJordan,
    Variational,
    WakeSleep,
)
from pyrovae.models import HiddenMarkovModel, toy

ROWS = 5


@dataclass
class Row:
    method: Any  # from a model to a method
    bound: str
    evidence: bool
    sampled: bool
    chains: bool = False
    continuous: bool = False
    starts: bool = False  # at random
    only: tuple[str, ...] = ()  # models, where not all


METHODS = {
    "Exact": Row(lambda m: Exact(), "exact", True, False),
    "Exact by enumeration": Row(lambda m: Exact(declared=False), "exact", True, False),
    "Exact in chunks": Row(lambda m: Exact(max_bytes=3000, declared=False), "exact", True, False),
    "MeanField": Row(lambda m: MeanField(2), "lower", True, False, starts=True),
    "MeanField by table": Row(lambda m: MeanField(2, declared=False), "lower", True, False, starts=True),
    "SaulJaakkolaJordan": Row(lambda m: SaulJaakkolaJordan(2), "lower", True, False, starts=True, only=("bits", "layers")),
    "Gibbs": Row(lambda m: Gibbs(20, 2, 3), "estimate", False, True, chains=True),
    "Gibbs by layers": Row(lambda m: Gibbs(5, 2, 1, max_bytes=0), "estimate", False, True, chains=True),
    "Gibbs by program": Row(lambda m: Gibbs(5, 2, 1, max_bytes=0, declared=False), "estimate", False, True, chains=True),
    "GibbsKernel": Row(lambda m: MCMC(GibbsKernel, 10, 2, 1), "estimate", False, True, chains=True),
    "Importance": Row(lambda m: Importance(LocalMeanField(m, ROWS), 40), "lower", True, True, continuous=True),
    "AIS": Row(lambda m: AIS(40, 10, step_size=0.3, num_leapfrog=3), "lower", True, True, continuous=True),
    "Variational": Row(
        lambda m: Variational(LocalMeanField(m, ROWS), num_guide_steps=2, num_samples=40), "lower", True, True, continuous=True
    ),
    "Variational, amortised": Row(
        lambda m: Variational(AmortizedMeanField(m), num_samples=40), "lower", True, True, continuous=True
    ),
    "WakeSleep": Row(lambda m: WakeSleep(AmortizedMeanField(m), num_samples=40), "lower", True, True, continuous=True),
    "NUTS": Row(lambda m: MCMC(NUTS, 10, 2, 4), "estimate", False, True, chains=True, continuous=True),
}
MODELS = {
    "bits": (lambda: toy.belief_net(4, 3), {"h1": (3,)}, {"h1": (3,)}),
    "layers": (lambda: toy.belief_net(4, [2, 3]), {"h2": (3,), "h1": (2,)}, {"h2": (3,), "h1": (2,)}),
    "categories": (lambda: toy.Mixture(4, 3), {"z": ()}, {"z": (3,)}),
    "chain": (lambda: HiddenMarkovModel(3, 4, emission="bernoulli", length=2), {"z": (2,)}, {"z": (2, 3)}),
    "continuous": (lambda: toy.LinearGaussian(4, 2), {"z": (2,)}, {}),
}
CASES = [
    (method, model)
    for method, row in METHODS.items()
    for model in MODELS
    if ((model != "continuous" and method != "NUTS") or (model == "continuous" and row.continuous))
    if not row.only or model in row.only
]


def infer(name, model_name):
    row = METHODS[name]
    build, events, probabilities = MODELS[model_name]
    model = build()
    with torch.no_grad(), pyro.poutine.block():
        x = model(batch_size=ROWS).detach()
    method = row.method(model)
    pyro.clear_param_store()
    return row, model, x, method, events, probabilities


@pytest.mark.parametrize(("name", "model_name"), CASES)
def test_posterior(name, model_name):
    row, model, x, method, events, probabilities = infer(name, model_name)
    model.register_buffer("witness", torch.zeros(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    posterior = method.infer(model, x)

    # nothing of the caller's changed
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert list(pyro.get_param_store().keys()) == []

    # what it says of itself
    assert isinstance(posterior, Posterior)
    with pytest.raises(dataclasses.FrozenInstanceError):
        posterior.seconds = 0.0
    assert posterior.bound == row.bound
    assert posterior.seconds > 0
    assert isinstance(posterior.diagnostics["model_evaluations"], int)
    assert posterior.diagnostics["model_evaluations"] > 0
    if row.evidence:
        assert posterior.log_evidence.shape == (ROWS,)
        assert not posterior.log_evidence.requires_grad
        stderr = torch.as_tensor(posterior.stderr)
        assert bool((stderr.expand(ROWS) > 0).all()) if row.sampled else float(stderr) == 0
    else:
        assert posterior.log_evidence is None

    # shapes
    assert {k: tuple(v.shape) for k, v in posterior.marginals.items()} == {k: (ROWS, *s) for k, s in probabilities.items()}
    for k, p in posterior.marginals.items():
        assert bool(((p >= 0) & (p <= 1)).all())
        assert model_name != "categories" or torch.allclose(p.sum(-1), torch.ones(ROWS)), k
    for moments in (posterior.mean, posterior.variance):
        assert {k: tuple(v.shape) for k, v in moments.items()} == {k: (ROWS, *s) for k, s in events.items()}
    z = posterior.sample(7)
    assert {k: tuple(v.shape) for k, v in z.items()} == {k: (7, ROWS, *s) for k, s in events.items()}
    with pytest.raises(ValueError, match="expected n > 0"):
        posterior.sample(0)
    assert (posterior.draws is not None) == row.chains
    if row.chains:
        assert all(v.shape[2:] == (ROWS, *events[k]) for k, v in posterior.draws.items())
        assert all(len(v) == 2 for v in posterior.draws.values())
    log_prob = posterior.log_prob(z)
    assert log_prob is None or log_prob.shape == (7, ROWS)
    assert log_prob is None or not log_prob.requires_grad


@pytest.mark.parametrize(("name", "model_name"), CASES)
def test_expectations(name, model_name):
    row, model, x, method, events, _ = infer(name, model_name)
    posterior = method.infer(model, x)
    site, event = next(iter(events.items()))

    weight = nn.Parameter(torch.tensor(2.0))
    value, stderr = posterior.expectation(lambda z: weight * z[site])
    assert value.shape == stderr.shape == (ROWS, *event)
    assert torch.allclose(value, 2 * posterior.mean[site], atol=1e-8)
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert torch.allclose(gradient, posterior.mean[site].sum(), atol=1e-8)
    assert not stderr.requires_grad
    assert bool((stderr >= 0).all())
    assert row.sampled == bool((stderr > 0).any())
    second, _ = posterior.expectation(lambda z: z[site].to(torch.get_default_dtype()) ** 2)
    assert torch.allclose(second - posterior.mean[site] ** 2, posterior.variance[site], atol=1e-8)
    with pytest.raises(ValueError, match="expected f to return"):
        posterior.expectation(lambda z: z[site].sum())

    joint = posterior.expected_log_joint(model)
    assert joint.shape == (ROWS,)
    gradients = torch.autograd.grad(joint.sum(), list(model.parameters()))
    named = dict(model.named_parameters())
    dead = [name for name, g in zip(named, gradients, strict=True) if not bool((g != 0).any())]
    assert dead == []
    objective = posterior.q_function(model)
    assert torch.allclose(objective(), joint.sum(), atol=1e-9)
    for a, b in zip(torch.autograd.grad(objective(), list(model.parameters())), gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("name", [name for name, model in CASES if model == "categories"])
def test_expectation_of_integers(name):
    _, model, x, method, _, _ = infer(name, "categories")
    posterior = method.infer(model, x)
    value, _ = posterior.expectation(lambda z: z["z"])
    assert torch.allclose(value, posterior.mean["z"])


@pytest.mark.parametrize(("name", "model_name"), CASES)
def test_same_seed_same_posterior(name, model_name):
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        row, model, x, method, _, _ = infer(name, model_name)
        torch.manual_seed(seed)
        posterior = method.infer(model, x)
        answers.append({k: v.clone() for k, v in posterior.mean.items()})
        if not row.sampled and not row.starts:
            torch.manual_seed(1)
            state = torch.get_rng_state()
            method.infer(model, x)
            assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(answers[0][k], answers[1][k]) for k in answers[0])
    if row.sampled:
        assert not all(torch.equal(answers[0][k], answers[2][k]) for k in answers[0])


@pytest.mark.parametrize(("name", "model_name"), CASES)
def test_snapshot_of_the_parameters(name, model_name):
    row, model, x, method, events, _ = infer(name, model_name)
    posterior = method.infer(model, x)
    z = posterior.sample(3)
    before = posterior.log_prob(z)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    after = posterior.log_prob(z)
    assert before is None or torch.equal(before, after)
    fresh = row.method(model).infer(model, x)
    if before is not None and name in ("Exact", "Exact by enumeration", "Exact in chunks"):
        assert not torch.allclose(fresh.log_prob(z), before)
    for site in events:  # computed only now
        assert not bool(torch.isnan(posterior.mean[site]).any())


@pytest.mark.parametrize("name", METHODS)
def test_data_with_no_rows_are_refused(name):
    row = METHODS[name]
    model = toy.LinearGaussian(4, 2) if name == "NUTS" else toy.belief_net(4, 3)
    with pytest.raises(ValueError, match=r"expected .* got"):
        row.method(model).infer(model, torch.zeros(0, 4))


@pytest.mark.parametrize("name", METHODS)
def test_bad_data_are_refused(name):
    row = METHODS[name]
    model = toy.LinearGaussian(4, 2) if name == "NUTS" else toy.belief_net(4, 3)
    for x in (torch.zeros(ROWS, 7), torch.full((ROWS, 4), float("nan")), torch.full((ROWS, 4), 255.0)):
        if name == "NUTS" and float(x.flatten()[0]) == 255.0:
            continue
        with pytest.raises(ValueError, match=r"expected .* got"):
            row.method(model).infer(model, x)


@pytest.mark.parametrize("name", METHODS)
def test_to_arviz(name):
    model_name = "continuous" if name == "NUTS" else "layers"
    row, model, x, method, events, _ = infer(name, model_name)
    posterior = method.infer(model, x)
    data = posterior.to_arviz(num_draws=9)
    sizes = (2, posterior.shape[1]) if row.chains else (9,)
    dims = ("chain", "draw") if row.chains else ("sample",)
    for site, event in events.items():
        variable = data["posterior"][site]
        assert variable.shape == (*sizes, ROWS, *event)
        assert variable.dims[: len(dims)] == dims
    if row.evidence:
        assert data["evidence"]["log_evidence"].shape == (ROWS,)
