"""Exact against a list of all joint states, on programs of every kind that it accepts, whole and in chunks."""

import functools

import pytest
import torch
from brute_force import BruteForce
from programs import CASES

from pyrovae.inference import Exact
from pyrovae.inference.enumeration import Enumeration

NO_NUMBER = {"masked_rows_with_nan", "all_masked", "masked_pixels_with_nan"}  # plain log_prob has NaN gradients there
WALKS = ["whole", "first axis by 1", "last axis by 1", "middle axis by 2"]


@functools.cache
def _oracle(name):
    torch.manual_seed(hash_of(name))
    case = CASES[name]()
    oracle = BruteForce(case.program, case.args, case.values, case.batch).solve()
    return case, oracle


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
    lj = torch.where(oracle.weights > 0, oracle.log_joint(), 0.0)
    truth = torch.autograd.grad((lj * oracle.weights).sum(), case.parameters, allow_unused=True)
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
