"""Gibbs sweeps of a declared Markov chain: products of exact conditionals, even times first."""

import pytest
import torch
from brute_force import BruteForce
from gibbs_kernel import kernel_agrees
from stats import chains_agree

from pyrovae.inference import Exact, Gibbs
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mcmc.chain_sweep import ChainSweep
from pyrovae.inference.mcmc.gibbs import make_sweep
from pyrovae.models import HiddenMarkovModel


def chain(states=3, length=5):
    torch.manual_seed(2)
    model = HiddenMarkovModel(states, 3, emission="bernoulli", length=length)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.5)
    return model


@pytest.mark.parametrize("wrong", [None, "forward", "backward"])
def test_sweep_is_the_product_of_conditionals(wrong):
    """Of two times, the first is drawn first, as in the program."""
    model = chain(length=2)
    x = model.sample(2)
    with torch.no_grad():
        log_joint = LogJoint(model, (x,), {})
        values = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        brute = BruteForce(model, (x,), {"z": values}).solve()
        sweep, evaluations = make_sweep(log_joint, 300 * len(brute.states), 0)
        assert isinstance(sweep, ChainSweep)
        assert evaluations == 0
        if wrong is not None:
            setattr(sweep, wrong, -getattr(sweep, wrong))
        assert kernel_agrees(sweep, brute, (sweep.latent,), 300) == (wrong is None)


@pytest.mark.parametrize("length", [1, 4, 5])
def test_draws_agree_with_forward_backward(length):
    model = chain(length=length)
    x = model.sample(4)
    found = Gibbs(60, 200, 20).infer(model, x)
    assert found.diagnostics["route"] == "chain"
    p = Exact().infer(model, x).marginals["z"]
    one_hot = torch.nn.functional.one_hot(found.draws["z"].long(), 3).to(p)
    assert chains_agree(one_hot, p)
    assert not chains_agree(one_hot, p.roll(1, -1))


def test_lengths_and_impossible_transitions():
    """Unseen times follow the chain; a chain that starts at an impossible path leaves it."""
    model = chain()
    with torch.no_grad():
        model.transition[0, 2] = -torch.inf
    x, lengths = model.sample(3), torch.tensor([5, 2, 1])
    found = Gibbs(60, 200, 20).infer(model, x, lengths)
    p = Exact().infer(model, x, lengths).marginals["z"]
    one_hot = torch.nn.functional.one_hot(found.draws["z"].long(), 3).to(p)
    assert chains_agree(one_hot, p)
    assert not ((found.draws["z"][..., :-1] == 0) & (found.draws["z"][..., 1:] == 2)).any()
    assert not chains_agree(one_hot, Exact().infer(model, x).marginals["z"])
