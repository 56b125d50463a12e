"""What a target's undirected distribution is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

from pyrovae.distributions import RBM, BoltzmannMachine
from pyrovae.handlers import own_params
from pyrovae.inference import ContrastiveDivergence
from pyrovae.inference.undirected.energy import energy_of
from pyrovae.models import BoltzmannMachine as BoltzmannModel
from pyrovae.models import RestrictedBoltzmannMachine, toy


def rbm():
    return RBM(torch.randn(4, 3), torch.randn(4), torch.randn(3))


def test_a_distribution_and_models():
    p = rbm()
    assert energy_of(p) is p
    model = RestrictedBoltzmannMachine(4, 3)
    assert all(a is b for a, b in zip(energy_of(model).parameters, model.parameters(), strict=True))
    assert energy_of(own_params(model)).W is model.weight
    assert isinstance(energy_of(BoltzmannModel(3, 2)), BoltzmannMachine)


def test_a_program():
    p = rbm()

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p)
            pyro.sample("x", dist.Bernoulli(logits=z @ torch.ones(4, 5)).to_event(1), obs=x)

    state = torch.get_rng_state()
    assert energy_of(program, torch.zeros(6, 5)).W is p.W
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())

    class Net(PyroModule):
        def forward(self, x=None):
            with pyro.plate("data", 3):
                return pyro.sample("x", p, obs=x)

    assert energy_of(Net(), torch.zeros(3, 4)).W is p.W
    chained = RestrictedBoltzmannMachine(30, 20)
    before = chained.chains.states.clone()
    assert energy_of(lambda: chained()).W is chained.weight
    assert torch.equal(chained.chains.states, before)


def test_what_has_no_energy_is_refused():
    p = rbm()
    with pytest.raises(ValueError, match=r"exactly one site .* got none"):
        energy_of(toy.belief_net(4, 3))

    def two():
        pyro.sample("a", p)
        pyro.sample("b", p)

    with pytest.raises(ValueError, match="got 'a', 'b'"):
        energy_of(two)
    for wrong in (3.0, RBM):
        with pytest.raises(TypeError, match="expected an RBM"):
            energy_of(wrong)

    class Wrong(torch.nn.Module):
        def distribution(self):
            return dist.Normal(0, 1)

    with pytest.raises(TypeError, match="got Normal"):
        energy_of(Wrong())


def test_a_prior_is_not_what_the_data_are_drawn_from():
    """A latent machine of the data's width is not learned on the data."""
    p = RBM(*(torch.randn(shape).requires_grad_() for shape in ((4, 3), (4,), (3,))))

    def latent(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p)
            pyro.sample("x", dist.Bernoulli(logits=z @ torch.ones(4, 4)).to_event(1), obs=x)

    def observed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    x = (torch.rand(20, 4) < 0.5).double()
    method = ContrastiveDivergence(num_steps=2, batch_size=None, num_chains=5)
    before = p.W.detach().clone()
    with pytest.raises(ValueError, match=r"got the latent 'z', a prior; learn .* Variational"):
        method.fit(latent, x)
    assert torch.equal(p.W, before)
    method.fit(observed, x)
    assert not torch.equal(p.W, before)
