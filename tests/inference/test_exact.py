"""Exact against a list of all joint states, on programs of every kind that it accepts, whole and in chunks."""

import copy
import functools
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import BruteForce, bits
from programs import CASES
from pyro import poutine

from pyrovae.inference import Exact
from pyrovae.inference.exact.enumeration import Enumeration
from pyrovae.models import toy

NO_NUMBER = {"masked_rows_with_nan", "all_masked", "masked_pixels_with_nan"}  # plain log_prob has NaN gradients there
WALKS = ["whole", "first axis by 1", "last axis by 1", "middle axis by 2"]


@functools.cache
def _oracle(name):
    torch.manual_seed(hash_of(name))
    case = CASES[name]()
    oracle = BruteForce(case.program, case.args, case.values, case.batch).solve()
    return case, oracle


@functools.cache
def _gradient(name):
    case, oracle = _oracle(name)
    lj = torch.where(oracle.weights > 0, oracle.log_joint(), 0.0)
    return torch.autograd.grad((lj * oracle.weights).sum(), case.parameters, allow_unused=True)


def hash_of(name):
    return sum(map(ord, name))


def _walk(monkeypatch, walk):
    """Make every Enumeration walk its states in the given way."""
    if walk == "whole":
        return
    which, by = walk.split(" axis by ")

    def plan(self, *_):
        axis = {"first": self.axes[0], "last": self.axes[-1], "middle": self.axes[len(self.axes) // 2]}[which]
        return axis, int(by)

    monkeypatch.setattr(Enumeration, "_plan", plan)


@pytest.fixture(params=CASES)
def solved(request):
    """A case, its oracle, and the exact posterior inferred from the same random state."""
    case, oracle = _oracle(request.param)
    torch.set_rng_state(oracle.rng)
    return request.param, case, oracle


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("walk", WALKS)
def test_against_all_joint_states(solved, walk, monkeypatch):
    _, case, oracle = solved
    _walk(monkeypatch, walk)
    posterior = Exact().infer(case.program, *case.args)
    assert posterior.bound == "exact"
    assert posterior.stderr == 0
    close(posterior.log_evidence, oracle.log_evidence)
    assert list(posterior.marginals) == list(case.values)
    for site, marginal in posterior.marginals.items():
        close(marginal, oracle.marginal(site))
    entropy = -torch.where(oracle.weights > 0, oracle.weights * oracle.weights.log(), 0.0).sum(0)
    close(posterior.entropy, entropy)
    value, stderr = posterior.expectation(case.f)
    close(value, oracle.expectation(case.f, case.plates))
    assert not stderr.any()
    close(posterior.expected_log_joint(case.program).detach(), oracle.mean(oracle.lj))
    close(posterior.q_function(case.program)().detach(), oracle.mean(oracle.lj).sum())
    close(posterior.log_prob(oracle.z), oracle.lj - oracle.log_evidence)
    mode = posterior.log_prob({site: z.unsqueeze(0) for site, z in posterior.mode.items()})[0]
    close(mode, (oracle.lj - oracle.log_evidence).amax(0))
    draws = posterior.sample(2000)
    z, bound = oracle.largest_z(draws)
    assert z < bound


@pytest.mark.parametrize("walk", ["whole", "last axis by 1"])
def test_gradients(solved, walk, monkeypatch):
    """Of the evidence and of Q, against autograd through the list of joint states."""
    name, case, oracle = solved
    if not case.parameters or name in NO_NUMBER:
        pytest.skip("no parameter, or no number to compare with")
    _walk(monkeypatch, walk)
    space = Enumeration(case.program, case.args, {}, max_bytes=2**30)
    exact = torch.autograd.grad(space.log_evidence().sum(), case.parameters, allow_unused=True)
    torch.set_rng_state(oracle.rng)
    posterior = Exact().infer(case.program, *case.args)
    q = torch.autograd.grad(posterior.q_function(case.program)(), case.parameters, allow_unused=True)
    expected = torch.autograd.grad(posterior.expected_log_joint(case.program).sum(), case.parameters, allow_unused=True)
    truth = _gradient(name)
    for parameter, *found, true in zip(case.parameters, exact, q, expected, truth, strict=True):
        true = torch.zeros_like(parameter) if true is None else true
        for gradient in found:
            close(torch.zeros_like(parameter) if gradient is None else gradient, true)


@pytest.mark.parametrize("name", sorted(NO_NUMBER))
@pytest.mark.parametrize("walk", ["whole", "last axis by 1"])
def test_gradients_are_finite_under_a_mask(name, walk, monkeypatch):
    case, _ = _oracle(name)
    _walk(monkeypatch, walk)
    space = Enumeration(case.program, case.args, {}, max_bytes=2**30)
    q = Exact().infer(case.program, *case.args).q_function(case.program)
    for objective in (space.log_evidence().sum(), q()):
        for gradient in torch.autograd.grad(objective, case.parameters, allow_unused=True):
            assert gradient is None or torch.isfinite(gradient).all()


def test_the_plain_route_agrees(solved):
    _, case, oracle = solved
    for plain in (True, False):
        torch.set_rng_state(oracle.rng)
        space = Enumeration(case.program, case.args, {}, max_bytes=2**30, plain=plain)
        close(space.log_evidence().detach(), oracle.log_evidence)


@pytest.mark.parametrize("spoil", ["parameter", "data", "prior"])
def test_the_oracle_tells_wrong_from_right(spoil):
    """The comparison fails on a slightly wrong parameter, on other data and on a forgotten factor."""
    torch.manual_seed(3)
    case = CASES["one_layer"]()
    oracle = BruteForce(case.program, case.args, case.values).solve()
    right = Exact().infer(case.program, *case.args)
    close(right.log_evidence, oracle.log_evidence)
    if spoil == "prior":
        wrong = Exact().infer(poutine.block(case.program, hide=["nothing"]), *case.args).log_evidence + math.log(2)
    else:
        with torch.no_grad():
            case.parameters[0][0, 0] += 1e-6 if spoil == "parameter" else 0
        x = case.args[0].clone()
        x[0, 0] = 1 - x[0, 0] if spoil == "data" else x[0, 0]
        wrong = Exact().infer(case.program, x).log_evidence
    with pytest.raises(AssertionError):
        close(wrong, oracle.log_evidence)


def test_wrong_draws_are_noticed():
    _case, oracle = _oracle("one_layer")
    z, bound = oracle.largest_z({"h1": torch.bernoulli(torch.full((2000, 4, 3), 0.5))})
    assert z > bound


def _snapshot(posterior, f):
    return [
        posterior.log_evidence,
        *posterior.marginals.values(),
        posterior.entropy,
        posterior.expectation(f)[0],
        *posterior.mode.values(),
        posterior.log_prob({name: z.unsqueeze(0) for name, z in posterior.mode.items()}),
    ]


@pytest.mark.parametrize("walk", ["whole", "first axis by 1"])
@pytest.mark.parametrize("name", ["one_layer", "nested_words_right", "per_row_parameters", "deterministic_and_factor"])
def test_a_posterior_is_a_snapshot(name, walk, monkeypatch):
    """Parameters and data that change in place after infer change no answer."""
    _walk(monkeypatch, walk)
    torch.manual_seed(1)
    case = CASES[name]()

    def program(*args):
        for i, parameter in enumerate(case.parameters):
            pyro.param(f"parameter_{i}", parameter)  # what Pyro is not told of, no snapshot can hold
        return case.program(*args)

    before = Exact().infer(program, *case.args)
    after = Exact().infer(program, *case.args)
    truth = _snapshot(before, case.f)
    with torch.no_grad():
        for parameter in case.parameters:
            parameter.add_(1.0)
        for arg in case.args:
            arg.copy_(1 - arg)
    for a, b in zip(_snapshot(after, case.f), truth, strict=True):
        assert torch.equal(a, b)
    changed = Exact().infer(program, *case.args)
    assert not torch.allclose(changed.log_evidence, before.log_evidence)


@pytest.mark.parametrize("walk", ["first axis by 1"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_infer_changes_nothing_of_the_users(name, walk, monkeypatch):
    _walk(monkeypatch, walk)
    torch.manual_seed(1)
    case = CASES[name]()
    module = case.program if isinstance(case.program, torch.nn.Module) else None
    poutine.trace(case.program).get_trace(*case.args)  # a bare pyro.param is in the store from its first run on
    store, values = list(pyro.get_param_store().keys()), {k: v.clone() for k, v in pyro.get_param_store().items()}
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]
    parameters = [p.detach().clone() for p in case.parameters]
    attributes = None if module is None else {k: set(m.__dict__) for k, m in module.named_modules()}
    posterior = Exact().infer(case.program, *case.args)
    _ = posterior.marginals, posterior.entropy, posterior.mode, posterior.q_function(case.program)()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert list(pyro.get_param_store().keys()) == store
    for k, v in pyro.get_param_store().items():
        assert torch.equal(v, values[k])
    for old, new in zip(parameters, case.parameters, strict=True):
        assert torch.equal(old, new)
        assert new.grad is None
    if module is not None:
        assert attributes == {k: set(m.__dict__) for k, m in module.named_modules()}


def test_small_memory_walks_in_chunks_and_agrees():
    net = toy.belief_net(6, [5, 4])
    x = net.sample(7)
    whole, parts = (Exact(max_bytes=size, declared=False).infer(net, x) for size in (2**30, 12_000))
    assert len(whole.enumeration.chunks) == 1
    assert len(parts.enumeration.chunks) > 3
    for a, b in zip(_snapshot(parts, lambda s: s["h1"].sum(-1)), _snapshot(whole, lambda s: s["h1"].sum(-1)), strict=True):
        close(a, b)
    close(parts.expected_log_joint(net), whole.expected_log_joint(net))


def test_many_scalar_sites_share_an_axis_where_memory_is_short():
    case = CASES["many_scalar_bits"]()
    whole, parts = Exact().infer(case.program, *case.args), Exact(max_bytes=3_000).infer(case.program, *case.args)
    assert len(whole.enumeration.axes) == 6
    assert len(parts.enumeration.axes) == 1
    assert len(parts.enumeration.chunks) > 2
    close(parts.log_evidence, whole.log_evidence)
    close(parts.expectation(case.f)[0], whole.expectation(case.f)[0])


def test_memory_of_weights_is_bounded():
    """Marginals of a deep layer need [h1, h2, rows] at a time: walked in pieces, not made at once."""
    net = toy.belief_net(4, [6, 6])
    x = net.sample(64)
    posterior = Exact(max_bytes=2**21, declared=False).infer(net, x)
    assert len(posterior.enumeration.chunks) == 1
    sizes = [max(w.numel() for w in weights.values()) * 8 for _, weights in posterior.site_weights()]
    assert len(sizes) > 1
    assert max(sizes) < 2**21
    close(posterior.marginals["h2"], Exact().infer(net, x).marginals["h2"])


def test_log_prob_outside_the_support():
    posterior = Exact().infer(toy.Mixture(4, 3), torch.zeros(2, 4))
    inside = posterior.log_prob({"z": torch.tensor([[0, 2]])})
    assert torch.isfinite(inside).all()
    assert (posterior.log_prob({"z": torch.tensor([[3, -1]])}) == -math.inf).all()
    posterior = Exact().infer(toy.belief_net(4, 2), torch.zeros(2, 4))
    z = torch.tensor([[[0.0, 1.0], [0.5, 1.0]]])
    assert torch.isfinite(posterior.log_prob({"h1": z})).tolist() == [[True, False]]


def test_float32():
    net = toy.belief_net(6, 4)
    x = net.sample(5)
    double = Exact().infer(net, x)
    single = Exact().infer(net.float(), x.float())
    assert single.log_evidence.dtype == torch.float32
    assert single.marginals["h1"].dtype == torch.float32
    close(single.log_evidence.double(), double.log_evidence, 1e-4)
    close(single.marginals["h1"].double(), double.marginals["h1"], 1e-4)
    assert single.sample(3)["h1"].dtype == torch.float32


def test_expectation_is_differentiable_in_what_f_closes_over():
    posterior = Exact().infer(toy.belief_net(4, 2), torch.zeros(2, 4))
    a = torch.tensor(2.0, requires_grad=True)
    value, _ = posterior.expectation(lambda z: a * z["h1"])
    close(torch.autograd.grad(value.sum(), a)[0], posterior.marginals["h1"].sum())


def test_moments():
    case, oracle = _oracle("binomial_latent")
    posterior = Exact().infer(case.program, *case.args)
    close(posterior.mean["z"], oracle.expectation(lambda s: s["z"], 1))
    second = oracle.expectation(lambda s: s["z"] ** 2, 1)
    close(posterior.variance["z"], second - posterior.mean["z"] ** 2)


def test_two_instances_and_deep_copies_stay_apart():
    """Also for a net with a PyroParam, where stock Pyro overwrites the second instance by the first."""
    from programs import ParamNet

    first, second = ParamNet(), ParamNet()
    second.scale = torch.tensor(2.5)
    with torch.no_grad():
        second.loc.add_(1)
    x = torch.randn(3)
    answers = []
    for _ in range(2):
        answers.append([Exact().infer(net, x).log_evidence for net in (first, second, copy.deepcopy(second))])
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(answers[0][0], answers[0][1])
    assert torch.equal(answers[0][1], answers[0][2])
    assert second.scale.item() == pytest.approx(2.5)
    assert float(first.scale) == pytest.approx(0.7)
    assert not list(pyro.get_param_store().keys())


def test_argument_kinds():
    def model(data, *, gain=1.0):
        with pyro.plate("data", len(data["x"])):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(gain * z, 1.0), obs=data["x"])

    x = torch.randn(3)
    posterior = Exact().infer(model, {"x": x}, gain=2.0)
    oracle = BruteForce(lambda x: model({"x": x}, gain=2.0), (x,), {"z": bits()}).solve()
    close(posterior.log_evidence, oracle.log_evidence)


def _chain(length, states, rows):
    transition = torch.softmax(torch.randn(states, states), -1)
    means = torch.randn(states)

    def program(x):
        with pyro.plate("rows", rows):
            z = pyro.sample("z0", dist.Categorical(torch.ones(states) / states))
            for t in range(1, length):
                z = pyro.sample(f"z{t}", dist.Categorical(transition[z]))
                pyro.sample(f"x{t}", dist.Normal(means[z], 1.0), obs=x[:, t])

    return program, transition, means


def test_a_long_chain_of_sites_is_summed_and_drawn_one_after_another():
    """3^30 joint states: evidence, marginals and pairs against the forward-backward recursions."""
    length, states, rows = 30, 3, 4
    program, transition, means = _chain(length, states, rows)
    x = torch.randn(rows, length)
    posterior = Exact().infer(program, x)
    seen = [torch.zeros(rows, states)] + [dist.Normal(means, 1.0).log_prob(x[:, t, None]) for t in range(1, length)]
    forward, backward = [torch.full((rows, states), 1 / states).log()], [torch.zeros(rows, states)]
    for t in range(1, length):
        forward.append(torch.logsumexp(forward[-1][:, :, None] + transition.log(), 1) + seen[t])
        backward.insert(0, torch.logsumexp(transition.log() + (seen[-t] + backward[0])[:, None, :], -1))
    close(posterior.log_evidence, forward[-1].logsumexp(-1))
    for t in (0, 7, length - 1):
        close(posterior.marginals[f"z{t}"], torch.softmax(forward[t] + backward[t], -1))
    pair = forward[6][:, :, None] + transition.log() + (seen[7] + backward[7])[:, None, :]
    pair = torch.softmax(pair.flatten(1), -1).reshape(rows, states, states)
    equal = pair.diagonal(dim1=1, dim2=2).sum(-1)
    close(posterior.expectation(lambda z: (z["z6"] == z["z7"]).double())[0], equal)
    draws, n = posterior.sample(4000), 4000
    frequency = (draws["z6"] == draws["z7"]).double().mean(0)
    z = ((frequency - equal) / (equal * (1 - equal) / n).sqrt()).abs().max()
    assert z < torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - 1e-5 / rows / 2))
    best = posterior.log_prob({name: value.unsqueeze(0) for name, value in posterior.mode.items()})[0]
    assert (best >= posterior.log_prob(draws).amax(0) - 1e-10).all()
    with pytest.raises(ValueError, match="average it over posterior"):
        posterior.expectation(lambda z: sum(z.values()).double())
