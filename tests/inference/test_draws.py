"""DrawsPosterior and LogJoint by themselves, and the Fit that learning methods return."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import BruteForce
from programs import CASES
from stats import bound, means_agree

from pyrovae.guides import LocalMeanField
from pyrovae.inference import EM, Exact, Gibbs, Importance
from pyrovae.inference import draws as draws_module
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.fit import check_penalty, snapshot, squared_norm
from pyrovae.inference.log_joint import LogJoint
from pyrovae.models import toy


@pytest.mark.parametrize("name", [name for name in CASES if name != "random_subsample"])
def test_log_joint_against_brute_force(name):
    case = CASES[name]()
    brute = BruteForce(case.program, case.args, case.values, case.batch).solve()
    with torch.no_grad():
        log_joint = LogJoint(case.program, case.args, {})
        latents = {latent.name for latent in log_joint.structure.latents}
        z = {k: v for k, v in brute.z.items() if k in latents}
        value = log_joint(z)
    assert torch.allclose(value, brute.lj.reshape(value.shape), atol=1e-10)


@pytest.mark.parametrize("name", ["one_layer", "global_and_local", "nested_words_right", "function_with_pyro_module"])
def test_log_joint_is_differentiable(name):
    case = CASES[name]()
    brute = BruteForce(case.program, case.args, case.values, case.batch)
    log_joint = LogJoint(case.program, case.args, {})
    expected = torch.autograd.grad(brute.log_joint().sum(), case.parameters)
    for a, b in zip(torch.autograd.grad(log_joint(brute.z).sum(), case.parameters), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_program_that_is_run_state_by_state():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3)).to_event(1))
            if (z > 0).all():
                pyro.factor("bonus", torch.ones(len(x)))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = torch.randn(2)
    log_joint = LogJoint(model, (x,), {})
    assert not log_joint.broadcasts
    z = torch.bernoulli(torch.full((20, 2, 2), 0.6))
    z[0] = 1.0
    expected = dist.Bernoulli(0.3).log_prob(z).sum(-1) + dist.Normal(z.sum(-1), 1.0).log_prob(x)
    expected = expected + (z > 0).all(-1).all(-1, keepdim=True).double()
    assert torch.allclose(log_joint({"z": z}), expected)


def test_pieces_do_not_change_the_answers(monkeypatch):
    net = toy.belief_net(5, 3)
    x = net.sample(4)
    for posterior in (Gibbs(9, 3, 2).infer(net, x), Importance(LocalMeanField(net, 4), 27).infer(net, x)):
        answers = []
        for size in (2**28, 2000):
            monkeypatch.setattr(draws_module, "_MAX_BYTES", size)
            mean, stderr = posterior.expectation(lambda z: z["h1"])
            answers.append((mean, stderr, posterior.expected_log_joint(net)))
        assert len(list(posterior._pieces())) > 1
        for a, b in zip(*answers, strict=True):
            assert torch.allclose(a, b)
        assert torch.allclose(posterior.q_function(net)(), answers[0][2].sum())


def _chains(draws):
    """Draws `[chain, draw, batch]` of one bit as a posterior."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    joint = LogJoint(model, (torch.zeros(draws.shape[2]),), {})
    return DrawsPosterior(
        structure=joint.structure,
        log_evidence=None,
        bound="estimate",
        log_joint=joint,
        codes={},
        values={"z": draws.flatten(0, 1)},
        shape=tuple(draws.shape[:2]),
    )


def test_standard_error_of_correlated_chains():
    """AR(1) with a correlation of 0.8: the error is three times that of independent draws, and batch means find it."""
    chains, length, rho = 4, 4900, 0.8
    noise = torch.randn(chains, length, 60) * math.sqrt(1 - rho**2)
    z = [torch.randn(chains, 60)]
    for t in range(1, length):
        z.append(rho * z[-1] + noise[:, t])
    posterior = _chains(torch.stack(z, 1))
    mean, stderr = posterior.expectation(lambda s: s["z"])
    # Of a batch of b draws: 1/b ((1 + ρ)/(1 − ρ) − 2ρ (1 − ρ^b) / (b (1 − ρ)²)); without the last term, of all draws.
    batch = math.isqrt(length)
    of_batch = (1 + rho) / (1 - rho) - 2 * rho * (1 - rho**batch) / (batch * (1 - rho) ** 2)
    assert means_agree(stderr**2 * chains * length, torch.tensor(of_batch))
    assert not means_agree(stderr**2 * chains * length, torch.tensor(1.0))  # of independent draws
    score = mean / stderr * math.sqrt(of_batch * (1 - rho) / (1 + rho))
    assert float(score.abs().max()) < bound(60, chains * batch - 1)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 1, 3), (1, 5, 3), (3, 7, 3)])
def test_standard_errors_of_few_draws(shape):
    posterior = _chains(torch.randn(shape))
    mean, stderr = posterior.expectation(lambda s: s["z"])
    assert torch.allclose(mean, posterior.draws["z"].mean((0, 1)))
    assert stderr.shape == (3,)
    assert bool(torch.isnan(stderr).all()) == (shape[:2] == (1, 1))


def test_samples_of_draws_are_draws():
    posterior = _chains(torch.arange(12.0).reshape(2, 3, 2))
    drawn = posterior.sample(500)["z"]
    assert {tuple(row) for row in drawn.tolist()} == {(2.0 * k, 2.0 * k + 1) for k in range(6)}  # rows stay together
    assert means_agree(posterior.sample(4000)["z"], posterior.mean["z"])


def test_impossible_states_carry_no_weight():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.0, 0.0, -math.inf])))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(3) / 3))

    x = torch.tensor([0.2, 1.0])
    posterior = Importance(guide, 300).infer(model, x)
    assert bool(torch.isfinite(posterior.expected_log_joint(model)).all())
    assert float(posterior.marginals["z"][:, 2].max()) == 0
    assert bool(torch.isfinite(posterior.expectation(lambda z: posterior.log_joint(z))[0]).all())
    assert torch.allclose(posterior.log_evidence, Exact().infer(model, x).log_evidence, atol=0.3)


def test_fit_is_frozen_and_detached():
    net = toy.belief_net(4, 2)
    fit = EM(num_iterations=1).fit(net, net.sample(5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.seconds = 0.0
    assert fit.seed == torch.initial_seed()
    assert {"python", "torch", "pyro-ppl", "pyrovae"} <= set(fit.versions)
    assert fit.seconds > 0
    states = {k: v.clone() for k, v in fit.states["model"].items()}
    assert not any(v.requires_grad for v in states.values())
    with torch.no_grad():
        net.prior.add_(1.0)
    assert all(torch.equal(v, states[k]) for k, v in fit.states["model"].items())
    leaves = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    assert float(squared_norm(leaves)) == 14
    copy = snapshot(leaves)
    leaves["a"].zero_()
    assert float(squared_norm(copy)) == 14
    assert check_penalty(2) == 2.0
