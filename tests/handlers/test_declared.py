"""What counts as a declaration: a method of the class that wrote the program, with room for the arguments, and its record."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyrovae.distributions import MarkovChain
from pyrovae.handlers import declared, own_params
from pyrovae.handlers.declared import method_of_program, takes
from pyrovae.inference import AIS, EM, Exact, ExactLikelihood, Gibbs, MeanField, SaulJaakkolaJordan
from pyrovae.inference.log_prior import log_prior_of
from pyrovae.models import BernoulliMixture, HiddenMarkovModel, RestrictedBoltzmannMachine, SigmoidBeliefNet
from pyrovae.ops import Chain, FactorialCode

X = torch.tensor([[0.0, 1, 1, 0], [1.0, 1, 0, 0], [1.0, 0, 0, 1]])


class Plain(PyroModule):
    """A program that declares nothing, whatever its attributes are called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = PyroModule[nn.Linear](3, 4)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.3)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


def with_attribute(name, value):
    if isinstance(value, nn.Module) or not callable(value):
        model = Plain()
        setattr(model, name, value)
        return model
    return type("Named", (Plain,), {name: value, "forward": Plain.forward})()


STRANGERS = {
    "layers, a submodule": ("layers", nn.Sequential(nn.Linear(1, 1))),
    "layers, a list": ("layers", nn.ModuleList([nn.Linear(1, 1)])),
    "layers, sizes": ("layers", lambda self: [3, 4]),
    "layers, with arguments": ("layers", lambda self, depth: depth),
    "chain, with arguments": ("chain", lambda self, a, b, c: a),
    "chain, another": ("chain", lambda self, x: x),
    "factorial_code, a number": ("factorial_code", lambda self, x: 3),
    "log_prior, of latents": ("log_prior", lambda self, z: z.sum()),
    "log_prior, no tensor": ("log_prior", lambda self: dist.Normal(0.0, 1.0)),
    "log_prior, a vector": ("log_prior", lambda self: torch.zeros(3)),
    "m_step, a number": ("m_step", 0),
    "m_step, with arguments": ("m_step", lambda self, a, b, c: None),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_attributes_of_the_same_name_are_the_models_own(name):
    model, plain = with_attribute(*STRANGERS[name]), Plain()
    expected = Exact(declared=False).infer(plain, X).log_evidence
    for method in (Exact(), MeanField(1), AIS(3, 5)):
        assert method.infer(model, X).log_evidence.shape == (3,)
    assert torch.equal(Exact().infer(model, X).log_evidence, expected)
    assert torch.allclose(-ExactLikelihood().loss(model, None, X), expected.sum())
    assert Gibbs(3, 2, 1).infer(model, X).diagnostics["route"] == "table"
    with pytest.raises(ValueError, match="declares layers"):
        SaulJaakkolaJordan().infer(model, X)
    by_own, by_plain = (EM(num_iterations=2).fit(m, X).history[-1]["loss"] for m in (model, plain))
    assert by_own == by_plain
    assert log_prior_of(model) is None


class OtherNet(SigmoidBeliefNet):
    def forward(self, x=None, **_):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h1", dist.Bernoulli(logits=self.prior).to_event(1))
            logits = 2 * torch.tanh(self.biases[0] + h @ self.weights[0])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class OtherChain(HiddenMarkovModel):
    def forward(self, x=None, lengths=None, **_):
        with pyro.plate("data", len(x)):
            chain = MarkovChain(length=x.shape[1], initial_logits=self.initial, transition_logits=2 * self.transition)
            z = pyro.sample("z", chain)
            pyro.sample("x", self.emission.at(z).to_event(1), obs=x)


class OtherMixture(BernoulliMixture):
    def forward(self, x=None, **_):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=3 * self.weights))
            pyro.sample("x", self.components.at(z), obs=x)


@pytest.mark.parametrize(
    ("make", "x", "name"),
    [
        (lambda: OtherNet(4, 3), X, "layers"),
        (lambda: OtherChain(2, 3), torch.tensor([[0, 1, 2], [2, 2, 1]]), "chain"),
        (lambda: OtherMixture(4, 3), X, "m_step"),
    ],
)
def test_a_subclass_with_its_own_program_inherits_no_declaration(make, x, name):
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert method_of_program(model, name) is None
    expected = Exact(declared=False).infer(model, x).log_evidence
    assert torch.equal(Exact().infer(model, x).log_evidence, expected)
    assert Gibbs(3, 2, 1).infer(model, x).diagnostics["route"] == "table"
    losses = [record["loss"] for record in EM(num_iterations=5).fit(model, x).history]
    assert losses == sorted(losses, reverse=True)


def test_a_declaration_with_the_program_or_below_it_counts():
    class Same(SigmoidBeliefNet):
        pass

    class Both(OtherNet):
        def layers(self):
            return SigmoidBeliefNet.layers(self)

    assert declared(Same(4, 3), "layers") is not None
    assert declared(own_params(own_params(Same(4, 3))), "layers") is not None
    assert declared(Both(4, 3), "layers") is not None
    instance = Same(4, 3)
    instance.forward = lambda x: None
    assert declared(instance, "layers") is None


class WrongNet(SigmoidBeliefNet):
    def layers(self):
        record = super().layers()
        return type(record)(record.sites, tuple(w * 1.01 for w in record.weights), record.biases, record.top_bias)


class WrongCode(RestrictedBoltzmannMachine):
    def factorial_code(self, x=None, **_):
        record = super().factorial_code(x)
        return FactorialCode(record.site, record.logits + 0.01, record.log_evidence, record.num_states)


class WrongChain(HiddenMarkovModel):
    def chain(self, x=None, lengths=None, **_):
        record = super().chain(x, lengths)
        return Chain(record.site, record.log_initial, 1.01 * record.log_transition, record.log_likelihood, record.lengths)


WRONG = {
    "layers": (SigmoidBeliefNet, WrongNet, (4, 3), (X,)),
    "factorial_code": (RestrictedBoltzmannMachine, WrongCode, (4, 3), (X,)),
    "chain": (HiddenMarkovModel, WrongChain, (2, 3), (torch.tensor([[0, 1, 2], [2, 2, 1]]), torch.tensor([3, 2]))),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_a_declaration_that_contradicts_the_program_is_an_error(name, dtype, rows):
    right, wrong, sizes, args = WRONG[name]
    args = tuple(a[:rows].to(dtype) if a.is_floating_point() else a[:rows] for a in args)
    methods = [Exact(), Gibbs(2, 2, 1, max_bytes=0)] + [MeanField(1), SaulJaakkolaJordan()] * (name == "layers")
    for cls in (right, wrong):
        model = cls(*sizes).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        for method in methods:
            if cls is right:
                method.infer(model, *args)
                continue
            with pytest.raises(ValueError, match=rf"expected {wrong.__name__}\.{name}\(\) to declare"):
                method.infer(model, *args)
        if cls is wrong:
            with pytest.raises(ValueError, match=rf"mend {name}\(\)"):
                ExactLikelihood().loss(model, None, *args)
            assert bool(torch.isfinite(Exact(declared=False).infer(model, *args).log_evidence).all())


def test_takes():
    assert takes(lambda a, *, b=1: a, (1,), {"b": 2})
    assert not takes(lambda a, *, b=1: a, (1, 2))
    assert not takes(lambda a: a, (), {"c": 1})
