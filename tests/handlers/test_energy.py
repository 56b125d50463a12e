"""Energies without log Z: what is warned of, and what is not."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import Module
from pyrovae.handlers.energy import learned_energies, warn_of_energies
from pyrovae.handlers.structure import read_structure
from pyrovae.inference import EM, Exact, ExactLikelihood, Variational


class Bits(Module):
    """Two bits z, data x, and a factor made by `energy(self, z, x)`."""

    def __init__(self, energy, observe=True):
        super().__init__()
        self.energy, self.observe = energy, observe
        self.J = nn.Parameter(torch.tensor(0.7))
        self.loc = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.factor("energy", self.energy(self, z, x))
            if self.observe:
                pyro.sample("x", dist.Normal(self.loc + z.sum(-1), 1.0), obs=x)


WARNED = {
    "of latents": lambda m, z, x: m.J * z[..., 0] * z[..., 1],
    "of data": lambda m, z, x: m.J * x,
    "of both": lambda m, z, x: (m.J * z.sum(-1) * x).tanh(),
}
SILENT = {
    "no parameter": lambda m, z, x: 0.3 * z[..., 0] * z[..., 1] + x,
    "detached": lambda m, z, x: m.J.detach() * z[..., 0],
    "a penalty": lambda m, z, x: -0.5 * m.J**2,
    "a number": lambda m, z, x: torch.tensor(0.5),
}
x = torch.tensor([0.2, 1.1, 2.0])


def found(model, *args):
    return learned_energies(model, args, {}, read_structure(model, args, {}))


@pytest.mark.parametrize("energy", WARNED.values(), ids=WARNED)
def test_learned_energies_are_warned_of(energy):
    model = Bits(energy)
    assert found(model, x) == ["energy"]
    for method in (
        EM(Exact(), num_iterations=1),
        Variational(AmortizedMeanField(model, example=(x,)), num_steps=1),
        Variational(None, ExactLikelihood(), num_steps=2),
    ):
        with pytest.warns(
            UserWarning, match=r"site 'energy' is a pyro.factor.*lacks -log Z.*RBM or BoltzmannMachine"
        ) as record:
            method.fit(model, x)
        assert len([w for w in record if "energy" in str(w.message)]) == 1  # once a fit
    with pytest.warns(UserWarning, match="site 'energy'"):
        ExactLikelihood().differentiable_loss(model, None, x)


@pytest.mark.parametrize("energy", SILENT.values(), ids=SILENT)
def test_what_is_no_learned_energy(energy):
    model = Bits(energy)
    assert found(model, x) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EM(Exact(), num_iterations=1).fit(model, x)
        ExactLikelihood().differentiable_loss(model, None, x)


def test_frozen_parameters_and_inference_are_silent():
    model = Bits(WARNED["of latents"])
    guide = AmortizedMeanField(model, example=(x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Exact().infer(model, x)
        Variational(guide, num_guide_steps=2, num_samples=5).infer(model, x)
        model.J.requires_grad_(False)
        EM(Exact(), num_iterations=1).fit(model, x)


def test_plain_functions_subsamples_and_masks():
    weight = torch.tensor(0.5)

    def model(x):
        J = pyro.param("J", weight)
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=torch.tensor([True, False])), poutine.scale(scale=2.0):
                pyro.factor("energy", J * z * x[index])

    assert found(model, x) == ["energy"]
    pyro.clear_param_store()
    state = torch.get_rng_state()
    assert found(lambda x: pyro.factor("f", pyro.param("J", weight) * 2.0), x) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_code_that_takes_no_gradients_is_left_alone():
    def model(x):
        J = pyro.param("J", torch.tensor(1.0))
        pyro.factor("energy", J * float(x.numpy().sum()))

    assert found(model, x) == []


def test_no_factor_costs_no_run():
    runs = []

    def model(x):
        runs.append(1)
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0).expand([3]).to_event(1), obs=x)

    structure = read_structure(model, (x,), {})
    warn_of_energies(model, (x,), {}, structure)
    assert len(runs) == 1
