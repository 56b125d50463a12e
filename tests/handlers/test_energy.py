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


def test_code_that_takes_no_gradients_is_run_without():
    def energy(x):
        pyro.factor("energy", pyro.param("J", torch.tensor(1.0)) * float(x.numpy().sum()))

    def penalty(x):
        assert x.numpy().sum() < 1e3
        pyro.factor("penalty", -(pyro.param("J", torch.tensor(1.0)) ** 2))

    def brittle(x):  # takes no data but these
        if x.detach().tolist() != given:
            raise RuntimeError("other data")
        pyro.factor("energy", pyro.param("J", torch.tensor(1.0)) * float(x.detach().sum()))

    given = x.tolist()

    assert found(energy, x) == found(brittle, x) == ["energy"]
    assert found(penalty, x) == []
    pyro.clear_param_store()


class Plain(nn.Module):
    """A program with couplings, a table of energies, a factor and data of any type."""

    def __init__(self, run):
        super().__init__()
        self.J, self.table, self.rows = (nn.Parameter(torch.randn(shape)) for shape in ((4, 4), (3,), (6,)))
        self.norm, self.run = nn.BatchNorm1d(4, dtype=torch.get_default_dtype()), run

    def forward(self, *args, **kwargs):
        pyro.module("plain", self)
        with pyro.plate("data", 6) as index:
            self.run(self, index, *args, **kwargs)


BITS = (torch.arange(24) * 7 % 5 % 2).reshape(6, 4)


def quadratic(m, x):
    x = x.to(m.J)
    return ((x @ m.J) * x).sum(-1)


def energy_of_code(family, code):
    def run(m, index):
        z = pyro.sample("z", family(torch.tensor([0.998, 0.001, 0.001])))  # the prior hardly ever draws another
        pyro.factor("energy", m.table[code(z)])
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.ones(6))

    return run


def network(m, index, x):
    pyro.factor("energy", m.norm(x.to(m.J)).sum(-1))


ENERGIES = {
    "whole numbers": (lambda m, index, x: pyro.factor("energy", quadratic(m, x)), (BITS,)),
    "booleans": (lambda m, index, x: pyro.factor("energy", quadratic(m, x)), (BITS.bool(),)),
    "rows alike": (lambda m, index, x: pyro.factor("energy", quadratic(m, x)), (torch.ones(6, 4).long(),)),
    "counts": (lambda m, index, x: pyro.factor("energy", m.table[0] * x), (torch.full((6,), 9),)),
    "cast inside": (lambda m, index, x: pyro.factor("energy", quadratic(m, x.round().long())), (BITS.double(),)),
    "a closure": (lambda m, index: pyro.factor("energy", quadratic(m, BITS)), ()),
    "batch normalisation": (network, (BITS,)),
    "Potts": (energy_of_code(dist.Categorical, lambda z: z), ()),
    "argmax": (energy_of_code(dist.OneHotCategorical, lambda z: z.argmax(-1)), ()),
}
PENALTIES = {
    "of each row": lambda m, index, x: pyro.factor("penalty", -(m.rows**2)),
    "of rows by index": lambda m, index, x: pyro.factor("penalty", -(m.rows[index] ** 2)),
    "repeated": lambda m, index, x: pyro.factor("penalty", -(m.J**2).sum() * torch.ones(6)),
    "of rows around their mean": lambda m, index, x: pyro.factor("penalty", -((m.rows - m.rows.mean() - m.J[0, 0]) ** 2)),
    "of a table": lambda m, index, x: pyro.factor("penalty", -m.table.logsumexp(0)),
    "no parameter": lambda m, index, x: pyro.factor("weight", x.sum(-1).double()),
}


@pytest.mark.parametrize("case", ENERGIES.values(), ids=ENERGIES)
def test_energies_without_a_graph_to_their_data_are_found(case):
    run, args = case
    model, state = Plain(run), torch.get_rng_state()
    structure = read_structure(model, args, {})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert learned_energies(model, args, {}, structure) == ["energy"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.requires_grad_(False)
    assert found(model, *args) == []


@pytest.mark.parametrize("run", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("data", [BITS, BITS.bool(), BITS.double()], ids=["long", "bool", "double"])
def test_penalties_are_no_energies(run, data):
    def program(m, index, x):
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        run(m, index, x)
        pyro.sample("x", dist.Normal(z.to(m.J), 1.0), obs=torch.ones(6))

    assert found(Plain(program), data) == []
    by_rows = Plain(lambda m, index, x, rows: program(m, index if rows is None else rows, x))
    for rows in (None, torch.arange(6).flip(0)):
        assert found(by_rows, data, rows) == []


def test_data_by_name_are_other_data_too():
    model = Plain(lambda m, index, *, x: pyro.factor("energy", quadratic(m, x)))
    kwargs = {"x": torch.ones(6, 4).long()}
    assert learned_energies(model, (), kwargs, read_structure(model, (), kwargs)) == ["energy"]
    model = Plain(lambda m, i, *, index: pyro.factor("penalty", -(m.rows[index] ** 2)))
    kwargs = {"index": torch.tensor([0, 3, 3, 1, 2, 5])}
    assert learned_energies(model, (), kwargs, read_structure(model, (), kwargs)) == []


def test_no_factor_costs_no_run():
    runs = []

    def model(x):
        runs.append(1)
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0).expand([3]).to_event(1), obs=x)

    structure = read_structure(model, (x,), {})
    warn_of_energies(model, (x,), {}, structure)
    assert len(runs) == 1
