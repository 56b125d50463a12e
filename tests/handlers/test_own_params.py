"""Parameters that live in their modules, whatever Pyro's store holds."""

import copy
import pickle

import pyro
import pytest
import torch
from programs import ParamNet
from pyro import poutine
from torch import nn
from torch.distributions import constraints

from pyrovae.handlers import Module, own_params
from pyrovae.models import toy


def test_a_module_is_answered_with_its_own_parameters():
    net = toy.belief_net(4, [3, 2])
    program = own_params(net)
    with poutine.block():
        program(torch.zeros(2, 4))
    assert {id(leaf) for leaf in program.leaves.values()} == {id(p) for p in net.parameters()}
    assert not list(pyro.get_param_store().keys())


def test_a_second_holder_of_a_name_uses_its_own():
    """Under stock Pyro the second is given the first's parameters; here not."""
    nets = [nn.Linear(2, 1), nn.Linear(2, 1)]

    def program(net):
        pyro.module("net", net)
        return pyro.param("net$$$weight", net.weight)

    with poutine.block():
        found = [own_params(program)(net) for net in nets]
    assert found[0] is nets[0].weight
    assert found[1] is nets[1].weight
    assert not list(pyro.get_param_store().keys())


def test_a_bare_param_lives_in_the_store_and_its_leaf_is_unconstrained():
    def program():
        return pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)

    wrapped = own_params(program)
    assert float(wrapped()) == pytest.approx(2.0)
    assert list(pyro.get_param_store().keys()) == ["scale"]
    assert float(wrapped.leaves["scale"]) == pytest.approx(torch.tensor(2.0).log().item())
    assert wrapped.leaves["scale"] is pyro.get_param_store()._params["scale"]


def test_a_constrained_param_that_starts_at_a_parameter_keeps_its_constraint():
    start = nn.Parameter(torch.tensor(2.0))
    leaves = {}
    value = own_params(lambda: pyro.param("scale", start, constraint=constraints.positive), leaves)()
    assert float(value) == pytest.approx(2.0)
    assert float(leaves["scale"]) == pytest.approx(torch.tensor(2.0).log().item())


def test_a_pyro_param_is_lent_and_the_store_put_back():
    first, second = ParamNet(), ParamNet()
    second.scale = torch.tensor(2.5)
    with poutine.trace() as trace:
        first(torch.zeros(2))  # stock Pyro: the store now holds the first's
    assert "scale" in trace.trace.nodes or list(pyro.get_param_store().keys())
    names = list(pyro.get_param_store().keys())
    held = {name: pyro.get_param_store()._params[name] for name in names}
    program = own_params(second)
    with poutine.block(), poutine.trace() as trace:
        program(torch.zeros(2))
    assert float(trace.trace.nodes["x"]["fn"].scale[0]) == pytest.approx(2.5)
    assert list(pyro.get_param_store().keys()) == names
    assert all(pyro.get_param_store()._params[name] is held[name] for name in names)


def test_an_error_in_the_program_puts_the_store_back():
    net = ParamNet()
    with poutine.block(), pytest.raises(TypeError):
        own_params(net)(None)
    assert not list(pyro.get_param_store().keys())


class Net(Module):
    """A program with a part of its own."""

    def __init__(self):
        super().__init__()
        self.part = toy.belief_net(3, 2)

    def forward(self, x):
        return self.part(x)


def test_names_are_unique_and_renewed_by_deepcopy():
    a, b = toy.belief_net(3, 2), toy.belief_net(3, 2)
    c = copy.deepcopy(a)
    names = set()
    for net in (a, b, c):
        with poutine.trace() as trace:
            net(torch.zeros(1, 3))
        mine = {n for n, site in trace.trace.nodes.items() if site["type"] == "param"}
        assert mine
        assert not names & mine
        names |= mine
    for p, q in zip(a.parameters(), c.parameters(), strict=True):
        assert p is not q
        assert torch.equal(p, q)


def test_deepcopy_of_a_pair_keeps_what_they_share():
    net = Net()
    pair = copy.deepcopy((net, net.part))
    assert pair[0].part is pair[1]


def test_pickle_and_state_dict_round_trip():
    net = toy.belief_net(3, 2)
    other = toy.belief_net(3, 2, seed=5)
    other.load_state_dict(net.state_dict())
    x = torch.eye(3)
    from pyrovae.inference import Exact

    truth = Exact().infer(net, x).log_evidence
    for twin in (other, pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert torch.equal(Exact().infer(twin, x).log_evidence, truth)
    assert not torch.equal(Exact().infer(toy.belief_net(3, 2, seed=5), x).log_evidence, truth)


def test_deep_copies_train_apart_under_stock_svi():
    net = toy.belief_net(3, 2)
    twin = copy.deepcopy(net)
    for module in (net, twin):
        before = [p.detach().clone() for p in module.parameters()]
        guide = poutine.block(lambda x: None)

        def model(x, module=module):
            return poutine.condition(module, data={"h1": torch.ones(3, 2)})(x)

        pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO()).step(torch.eye(3))
        assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_programs_of_every_form_report_their_leaves():
    net = toy.belief_net(3, 2)
    for program in (net, poutine.scale(net, scale=0.5), lambda x: net(x)):
        wrapped = own_params(program)
        with poutine.block():
            wrapped(torch.eye(3))
        assert {id(leaf) for leaf in wrapped.leaves.values()} == {id(p) for p in net.parameters()}
