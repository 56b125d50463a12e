"""Every objective under capture: replays are eager runs, to the bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from captured import check_replay
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import nn

from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import Module, own_params, relax
from pyrovae.inference import ExactLikelihood
from pyrovae.inference.capture.graph import CannotCapture
from pyrovae.inference.log_prior import log_prior_of
from pyrovae.models import (
    BernoulliMixture,
    BoltzmannMachine,
    CategoricalVAE,
    DeepBeliefNet,
    GaussianMixture,
    GaussianVAE,
    HiddenMarkovModel,
    RestrictedBoltzmannMachine,
    SigmoidBeliefNet,
    toy,
)

MANY = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
OBJECTIVES = {
    "Trace_ELBO": Trace_ELBO,
    "Trace_ELBO, particles in turn": lambda: Trace_ELBO(num_particles=2),
    "Trace_ELBO, particles together": lambda: Trace_ELBO(**MANY),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "RenyiELBO": lambda: RenyiELBO(alpha=0.0, num_particles=2),
    "RenyiELBO, particles together": lambda: RenyiELBO(alpha=0.5, **MANY),
    "ReweightedWakeSleep": lambda: ReweightedWakeSleep(insomnia=0.5, **MANY),
    "TraceTailAdaptive_ELBO": lambda: TraceTailAdaptive_ELBO(**MANY),
}
REPARAMETERISED = ("TraceMeanField_ELBO", "TraceTailAdaptive_ELBO")


def _bits(*shape):
    return (torch.rand(*shape) < 0.4).to(torch.get_default_dtype())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("latents", ["Normal", "one-hot", "relaxed"])
def test_objectives(name, latents):
    if latents == "one-hot" and name in REPARAMETERISED:
        pytest.skip("needs reparameterised draws")
    model, x, dial = GaussianVAE(4, 2, 3) if latents == "Normal" else CategoricalVAE(4, 2, 3, hidden=3), _bits(3, 4), None
    pair = model, AmortizedMeanField(model)
    if latents == "relaxed":
        dial = torch.tensor(0.8)
        pair = relax(pair[0], dial), relax(pair[1], dial)
    check_replay(*pair, OBJECTIVES[name](), x, dial=dial)


def test_a_plate_that_draws_its_rows():
    x = torch.randn(6)
    net = nn.Linear(1, 1)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x[rows])

    guide = AmortizedMeanField(model, lambda x: torch.zeros(2, 2), example=(x,))
    check_replay(model, guide, Trace_ELBO(), x)


def _moved(model):
    """With weights of order one, so that no sum over states is one of equal terms."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


DECLARED = {
    "SigmoidBeliefNet": lambda: (SigmoidBeliefNet(4, 3), _bits(3, 4)),
    "SigmoidBeliefNet of two layers": lambda: (SigmoidBeliefNet(4, [3, 2]), _bits(3, 4)),
    "DeepBeliefNet": lambda: (DeepBeliefNet(4, [3, 2]), _bits(3, 4)),
    "RestrictedBoltzmannMachine": lambda: (RestrictedBoltzmannMachine(4, 3), _bits(3, 4)),
    "HiddenMarkovModel": lambda: (HiddenMarkovModel(2, 3), torch.randint(3, (3, 4))),
    "HiddenMarkovModel of bits": lambda: (HiddenMarkovModel(2, 3, emission="bernoulli"), _bits(3, 4, 3)),
    "HiddenMarkovModel of vectors": lambda: (HiddenMarkovModel(2, 3, emission="gaussian"), torch.randn(3, 4, 3)),
}
PLAIN = {
    "BoltzmannMachine": lambda: (BoltzmannMachine(4, 2), _bits(3, 4)),
    "BoltzmannMachine without hidden units": lambda: (BoltzmannMachine(4), _bits(3, 4)),
    "BernoulliMixture": lambda: (BernoulliMixture(4, 2), _bits(3, 4)),
    "GaussianMixture": lambda: (GaussianMixture(4, 2), torch.randn(3, 4)),
    "GaussianMixture, full": lambda: (GaussianMixture(4, 2, covariance="full"), torch.randn(3, 4)),
    "toy.Mixture": lambda: (toy.Mixture(4, 2), _bits(3, 4)),
}


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "enumerated"])
@pytest.mark.parametrize("name", DECLARED)
def test_exact_likelihood(name, declared):
    model, x = DECLARED[name]()
    check_replay(_moved(model), None, ExactLikelihood(declared=declared), x)


@pytest.mark.parametrize("name", PLAIN)
def test_exact_likelihood_by_enumeration(name):
    model, x = PLAIN[name]()
    check_replay(own_params(_moved(model)), None, ExactLikelihood(), x)


def test_exact_likelihood_in_chunks_that_are_recomputed():
    model, x = _moved(SigmoidBeliefNet(4, [3, 2])), _bits(3, 4)
    whole = check_replay(model, None, ExactLikelihood(declared=False), x)
    chunks = check_replay(model, None, ExactLikelihood(declared=False, max_bytes=2000), x)
    assert chunks.num_nodes > 1.5 * whole.num_nodes


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "enumerated"])
@pytest.mark.parametrize("emission", ["categorical", "bernoulli", "gaussian"])
def test_sequences_of_unequal_lengths(emission, declared):
    model = HiddenMarkovModel(2, 3, emission=emission)
    x = torch.randint(3, (3, 4)) if emission == "categorical" else _bits(3, 4, 3)
    x[0, 2:] = -1 if emission == "categorical" else torch.nan  # of no sequence
    check_replay(model, None, ExactLikelihood(declared=declared), x, torch.tensor([2, 4, 3]))


def test_lengths_are_an_input():
    model, x = HiddenMarkovModel(2, 3), torch.randint(3, (3, 4))
    objective = ExactLikelihood()
    graph = check_replay(model, None, objective, x, torch.tensor([2, 4, 3]))
    other = torch.tensor([4, 1, 1])
    assert torch.equal(graph([x, other])[0], objective.loss(model, None, x, other))


def test_impossible_messages_take_the_other_way_at_a_replay():
    """The chain is summed in logarithms where scaled messages leave the floats: found out at each replay."""
    model, x = HiddenMarkovModel(2, 3, emission="gaussian"), torch.randn(2, 6, 3)
    objective = ExactLikelihood()
    graph = check_replay(model, None, objective, x)
    far = x + 300 * torch.randn_like(x)
    expected = objective.loss(model, None, far)
    assert bool(expected.isfinite())
    assert torch.equal(graph([far])[0], expected)


class _WithPrior:
    def loss_and_grads(self, model, guide, *args):
        loss = ExactLikelihood().differentiable_loss(model, guide, *args) - log_prior_of(model)()
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("covariance", ["full", "diagonal", "spherical"])
def test_log_prior(covariance):
    check_replay(_moved(GaussianMixture(4, 2, covariance=covariance)), None, _WithPrior(), torch.randn(3, 4))
    model = HiddenMarkovModel(2, 3, emission="gaussian", covariance=covariance, concentration=2.0)
    check_replay(model, None, _WithPrior(), torch.randn(3, 4, 3))


def test_minibatches():
    model, x = _moved(SigmoidBeliefNet(4, 3)), _bits(3, 4)
    check_replay(model, None, ExactLikelihood(), x, index=torch.tensor([5, 0, 2]), num_data=8)


class _Rows(Module):
    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        with pyro.plate("rows", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Bernoulli(logits=self.logit))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def test_exact_likelihood_refuses_to_freeze_what_should_change():
    with pytest.raises(CannotCapture, match="plate 'rows' draws its rows"):
        check_replay(_Rows(), None, ExactLikelihood(), torch.randn(4))
    model = pyro.poutine.scale(toy.Mixture(4, 2), scale=torch.tensor(2.0))
    with pytest.raises(CannotCapture, match=r"poutine\.scale has a tensor"):
        check_replay(model, None, ExactLikelihood(), _bits(3, 4))
