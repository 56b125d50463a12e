"""What a fit leaves to the chains that a model draws from, and R-hat of energies and units."""

import warnings
from functools import partial

import pytest
import stats
import torch

from pyrovae.distributions import RBM, PersistentChains
from pyrovae.distributions import BoltzmannMachine as Machine
from pyrovae.guides import AmortizedStructured
from pyrovae.inference import ContrastiveDivergence, GreedyPretraining, ParallelTempering, UpDown
from pyrovae.inference.arviz import split_rhat
from pyrovae.inference.undirected.block_chains import RBMChains, chains_of
from pyrovae.inference.undirected.settle import mixing, settle, state_of_chains
from pyrovae.models import BoltzmannMachine, DeepBeliefNet, RestrictedBoltzmannMachine
from pyrovae.ops import index_to_codes

BITS, CHAINS = 5, 4000


def codes(bits=BITS):
    return index_to_codes(torch.arange(2**bits), 2, bits).double()


def patterned(rows=600):
    """11100 or 00011 with noise: far from fair coins, and both modes within reach of Gibbs."""
    clean = torch.where(
        torch.rand(rows, 1) < 0.7, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    )
    return (clean != (torch.rand(rows, BITS) < 0.15)).double()


def counts(x):
    return torch.bincount((x @ (2.0 ** torch.arange(BITS - 1, -1, -1))).long(), minlength=2**BITS)


def law_of(model):
    if isinstance(model, DeepBeliefNet):
        h = codes(model.sizes[-2])
        top = RBM(model.top_weight, model.top_bias, model.top_hidden_bias).log_prob(h).exp()
        logits = model.biases[0] + h @ model.weights[0]
        x = codes()
        return top @ (x @ logits.T - torch.nn.functional.softplus(logits).sum(-1)).T.exp()
    p = model.distribution()
    p = Machine(p.J, p.b).marginal(BITS) if isinstance(p, Machine) and p.event_shape[0] > BITS else p
    if isinstance(p, RBM):
        p = RBM(p.W, p.b, p.c)
    return (-p.free_energy(codes()) - p.log_partition()).exp()


def check(model):
    """Draws have the model's law; fair coins, where chains began, do not."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        law, found = law_of(model), counts(model.sample(CHAINS))
    assert bool(model.chains.advanced)
    assert float(law.sum()) == pytest.approx(1)
    assert stats.frequencies_agree(found, CHAINS, law)
    assert not stats.frequencies_agree(counts((torch.rand(CHAINS, BITS) < 0.5).double()), CHAINS, law)


@pytest.mark.parametrize(
    "options",
    [
        {"num_chains": CHAINS},
        {"persistent": False},
        {"negative": ParallelTempering(3, CHAINS, warmup=10)},
        {"negative": "exact"},
    ],
    ids=["pcd", "cd", "tempered", "exact"],
)
@pytest.mark.parametrize("kind", [RestrictedBoltzmannMachine, BoltzmannMachine])
def test_draws_after_contrastive_divergence(kind, options):
    model = kind(BITS, 4, max_bits=2, num_chains=CHAINS)
    with pytest.warns(UserWarning, match="never advanced"):
        model.sample(2)
    method = ContrastiveDivergence(
        num_steps=150,
        optim=partial(torch.optim.SGD, lr=0.3),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / 150),
        **options,
    )
    fit = method.fit(model, patterned())
    assert torch.equal(fit.states["model"]["chains.states"], model.chains.states)
    check(model)
    again = kind(BITS, 4, max_bits=2, num_chains=CHAINS)
    again.load_state_dict(fit.states["model"])
    check(again)


@pytest.mark.filterwarnings("ignore:.*(have not mixed|log Z is unknown)")
@pytest.mark.parametrize("method", [None, ContrastiveDivergence(num_steps=150, optim=partial(torch.optim.SGD, lr=0.3))])
def test_draws_of_a_deep_belief_net(method):
    x, net = patterned(), DeepBeliefNet(BITS, [4, 4], max_bits=2, num_chains=CHAINS)
    guide = AmortizedStructured(net)
    with pytest.warns(UserWarning, match="never advanced"):
        net.sample(2)
    fit = GreedyPretraining(guide, method, num_iterations=15).fit(net, x)
    assert torch.equal(fit.states["model"]["chains.states"], net.chains.states)
    check(net)
    before = net.chains.states.clone()
    fit = UpDown(guide, num_steps=20).fit(net, x)
    assert not torch.equal(before, net.chains.states)
    assert torch.equal(fit.states["model"]["chains.states"], net.chains.states)
    check(net)


def two_modes(gap=14.0):
    """111000 and 000111 with the same energy, which Gibbs does not leave."""
    side = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    weight = (gap * side).unsqueeze(1)
    return RBM(weight, -weight[:, 0] / 2, torch.zeros(1))


def test_units_see_modes_of_equal_energy():
    p = two_modes()
    start = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]).repeat(20, 1)
    found = mixing(chains_of(p, start), p, 40)
    assert not found.energy > 1.1
    assert found.units > 1.1
    with pytest.warns(UserWarning, match="have not mixed|did not move"):
        found.warn("chains", "wait", stacklevel=1)


def test_unit_rhat_is_that_of_arviz():
    p = RBM(torch.randn(5, 3), torch.randn(5), torch.randn(3))
    chains = chains_of(p, p.sample((6,)))
    seen, inner = [], chains.sweep

    def sweep(*args):
        inner(*args)
        seen.append(state_of_chains(chains).clone())

    chains.sweep = sweep
    found = mixing(chains, p, 30)
    assert found.units == pytest.approx(float(split_rhat(torch.stack(seen, 1)).max()), abs=1e-6)
    assert found.moved
    assert found.rhat == max(found.energy, found.units)


def test_chains_that_stand_still_are_told():
    p = RBM(torch.zeros(3, 2), torch.full((3,), -100.0), torch.full((2,), -100.0))
    found = mixing(RBMChains(p, torch.zeros(4, 3)), p, 20)
    assert (found.moved, found.rhat) == (False, None)
    with pytest.warns(UserWarning, match="did not move at all in 20 sweeps"):
        found.warn("chains", "wait", stacklevel=1)
    with pytest.warns(UserWarning, match="did not move at all"):
        settle(RBM(*p.parameters, chains=PersistentChains(5, units=3)), torch.zeros(4, 3))
