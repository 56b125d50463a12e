"""Every model and guide of the library under capture: replays are eager runs, to the bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from captured import check_replay
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyrovae.guides
import pyrovae.models
from pyrovae.distributions import RelaxedOneHotCategorical
from pyrovae.guides import AmortizedMeanField, AmortizedStructured, DRAWGuide, LocalMeanField
from pyrovae.handlers import declares_capturable, own_params, relax, scale_kl, surrogate, with_log_partition
from pyrovae.models import (
    DRAW,
    BernoulliMixture,
    BernoulliVAE,
    BoltzmannMachine,
    CategoricalVAE,
    DeepBeliefNet,
    GaussianMixture,
    GaussianVAE,
    HiddenMarkovModel,
    HierarchicalVAE,
    MixedVAE,
    RestrictedBoltzmannMachine,
    SigmoidBeliefNet,
    toy,
)

HIERARCHY = [("normal", 3), ("bernoulli", 2)]
CHAINS = {"num_chains": 5, "max_bits": 1}
MODELS = {
    "GaussianVAE": lambda: GaussianVAE(4, 2, 3),
    "GaussianVAE of grey levels": lambda: GaussianVAE(4, 2, 3, likelihood="categorical", levels=2),
    "GaussianVAE with a learned scale": lambda: GaussianVAE(4, 2, 3, likelihood="normal_learned"),
    "CategoricalVAE": lambda: CategoricalVAE(4, 2, 3, hidden=3),
    "BernoulliVAE": lambda: BernoulliVAE(4, 3, 3),
    "MixedVAE": lambda: MixedVAE(4, hidden=3),
    "HierarchicalVAE": lambda: HierarchicalVAE(4, HIERARCHY, hidden=3),
    "SigmoidBeliefNet": lambda: SigmoidBeliefNet(4, [3, 2]),
    "DeepBeliefNet": lambda: DeepBeliefNet(4, [3, 2]),
    "DeepBeliefNet with chains": lambda: DeepBeliefNet(4, [3, 2], **CHAINS),
    "RestrictedBoltzmannMachine": lambda: RestrictedBoltzmannMachine(4, 3),
    "RestrictedBoltzmannMachine with chains": lambda: RestrictedBoltzmannMachine(4, 3, **CHAINS),
    "BoltzmannMachine": lambda: BoltzmannMachine(4, 2),
    "BoltzmannMachine with chains": lambda: BoltzmannMachine(4, 2, **CHAINS),
    "BernoulliMixture": lambda: BernoulliMixture(4, 2),
    "GaussianMixture": lambda: GaussianMixture(4, 2, covariance="full"),
    "toy.belief_net": lambda: toy.belief_net(4, 2),
    "toy.Mixture": lambda: toy.Mixture(4, 2),
    "toy.LinearGaussian": lambda: toy.LinearGaussian(4, 2),
}


def _data(rows=3):
    return (torch.rand(rows, 4) < 0.4).to(torch.get_default_dtype())


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, x = MODELS[name](), _data()
    graph = check_replay(model, AmortizedMeanField(model, example=(x,)), Trace_ELBO(), x)
    assert bool(graph.state) == ("with chains" in name)
    assert declares_capturable(model)


@pytest.mark.parametrize("name", ["DeepBeliefNet", "DeepBeliefNet with chains"])
def test_draws_from_the_model(name):
    model, x = MODELS[name](), _data()
    objective = ReweightedWakeSleep(num_particles=2, insomnia=0.5, vectorize_particles=True, max_plate_nesting=1)
    check_replay(model, AmortizedMeanField(model, example=(x,)), objective, x)


@pytest.mark.parametrize("attention", [None, (1, 2)])
def test_draw(attention):
    model = DRAW(4, 2, 3, 2, attention=attention)
    guide = DRAWGuide(model, hidden=3)
    check_replay(model, guide, TraceMeanField_ELBO(), _data(), dial=model.beta)
    assert declares_capturable(model)
    assert declares_capturable(guide)


WRAPPERS = {
    "soft": lambda t: lambda program: relax(program, t),
    "straight-through": lambda t: lambda program: relax(program, t, straight_through=True),
    "reinmax": lambda t: lambda program: surrogate(program, "reinmax", t),
    "surrogate straight-through": lambda t: lambda program: surrogate(program, "straight_through", t),
    "beta": lambda t: lambda program: scale_kl(program, t),
    "all, and own parameters": lambda t: lambda program: own_params(scale_kl(relax(program, t), t)),
    "a number": lambda t: lambda program: scale_kl(surrogate(program, "reinmax", 1.5), t),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["CategoricalVAE", "BernoulliVAE"])
def test_wrapped(name, wrapper):
    model, x, dial = MODELS[name](), _data(), torch.tensor(0.9)
    wrap = WRAPPERS[wrapper](dial)
    pair = wrap(model), wrap(AmortizedMeanField(model, example=(x,)))
    check_replay(*pair, Trace_ELBO(), x, dial=dial)
    assert all(declares_capturable(program) for program in pair)


def test_beta_is_read_anew():
    model, x = MODELS["GaussianVAE"](), _data()
    check_replay(model, AmortizedMeanField(model), Trace_ELBO(), x, dial=model.beta)


def test_structured():
    model, x, dial = MODELS["HierarchicalVAE"](), _data(), torch.tensor(0.9)
    guide = AmortizedStructured(model)
    check_replay(model, guide, Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1), x)
    relaxed = AmortizedStructured(relax(model, dial), example=(x,))
    check_replay(relax(model, dial), relaxed, Trace_ELBO(), x, dial=dial)
    assert declares_capturable(guide)


def test_local():
    model, x = MODELS["HierarchicalVAE"](), _data()
    guide = LocalMeanField(model, 9)
    check_replay(model, guide, Trace_ELBO(), x, index=torch.tensor([7, 0, 3]), num_data=9)
    assert declares_capturable(guide)


def test_learned_temperature():
    pyro.param("temperature", torch.tensor(0.7), constraint=dist.constraints.positive)
    model, x = MODELS["CategoricalVAE"](), _data()
    pair = [relax(program, lambda: pyro.param("temperature")) for program in (model, AmortizedMeanField(model))]
    check_replay(*pair, Trace_ELBO(), x)
    assert not any(declares_capturable(program) for program in pair)


def test_batch_norm_moves_alike():
    model, x = MODELS["GaussianVAE"](), _data(5)
    encoder = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 4))
    guide = AmortizedMeanField(model, encoder, example=(x,))
    graph = check_replay(model, guide, Trace_ELBO(), x)
    assert {id(buffer) for buffer in encoder.buffers()} == {id(tensor) for tensor in graph.state}
    assert declares_capturable(guide)


def test_guide_without_marks():
    model, x = MODELS["CategoricalVAE"](), _data()

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 6)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                logits = self.net(x).reshape(-1, 2, 3)
                pyro.sample("z", RelaxedOneHotCategorical(torch.tensor(0.5), logits=logits).to_event(1))

    check_replay(relax(model, 0.5), Guide(), Trace_ELBO(), x)


def test_the_check_finds_what_a_replay_does_not_see():
    weight, number = nn.Parameter(torch.tensor(0.3)), [1.0]

    def model(x):
        pyro.module("weight", nn.ParameterList([weight]))
        number[0] += 1
        pyro.sample("x", dist.Normal(weight, number[0]).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(AssertionError, match="output 0 of replay 1"):
        check_replay(model, lambda x: None, Trace_ELBO(), torch.randn(3))


# ---- declarations ---------------------------------------------------------------------------------------------------


def test_every_class_declares():
    programs = {getattr(pyrovae.models, name) for name in pyrovae.models.__all__} - {pyrovae.models.AutoEncoder}
    guides = {getattr(pyrovae.guides, name) for name in pyrovae.guides.__all__ if name[0].isupper()}
    assert all(hasattr(cls, "capturable") for cls in programs | guides)
    assert declares_capturable(HiddenMarkovModel(2, 3))
    assert declares_capturable(with_log_partition(DeepBeliefNet(4, [3, 2], **CHAINS), 2.0))


class _Forward(GaussianVAE):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class _Repeated(_Forward):
    capturable = True


class _Code(GaussianVAE):
    def _code(self):
        return super()._code()


class _Constructed(GaussianVAE):
    def __init__(self):
        super().__init__(4, 2, 3)


class _Net(nn.Module):
    def forward(self, x):
        return x[..., :4]


class _DeclaredNet(_Net):
    capturable = True


def _function(x):
    return x[..., :4]


def _declared_function(x):
    return x[..., :4]


_declared_function.capturable = True


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (lambda: _Forward(4, 2, 3), False),
        (lambda: _Repeated(4, 2, 3), True),
        (lambda: _Code(4, 2, 3), False),
        (_Constructed, True),
        (lambda: AmortizedMeanField(_Constructed()), True),
        (lambda: AmortizedMeanField(_Forward(4, 2, 3)), False),
        (lambda: AmortizedMeanField(_Constructed(), _Net()), False),
        (lambda: AmortizedMeanField(_Constructed(), nn.Sequential(nn.Tanh(), _Net())), False),
        (lambda: AmortizedMeanField(_Constructed(), _DeclaredNet()), True),
        (lambda: AmortizedMeanField(_Constructed(), _function), False),
        (lambda: AmortizedMeanField(_Constructed(), _declared_function), True),
        (lambda: AmortizedStructured(MODELS["HierarchicalVAE"](), {"h1": lambda x: torch.cat([x, x[..., :2]], -1)}), False),
        (lambda: _function, False),
        (lambda: _declared_function, True),
        (lambda: relax(_declared_function, 0.5), True),
        (lambda: relax(_declared_function, lambda: 0.5), False),
    ],
)
def test_a_declaration_speaks_for_its_own_code(program, expected):
    assert declares_capturable(program()) == expected


def test_hooks_and_replaced_methods_are_not_declared():
    for change in (
        lambda model: model.decoder[0].register_forward_hook(lambda *_: None),
        lambda model: setattr(model, "forward", _function),
        lambda model: setattr(model, "capturable", False),
    ):
        model = MODELS["GaussianVAE"]()
        assert declares_capturable(model)
        change(model)
        assert not declares_capturable(model)
