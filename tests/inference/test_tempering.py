"""Parallel tempering: its ladder is invariant, its exchanges are right, and it finds modes that plain Gibbs does not."""

import itertools
import warnings

import pytest
import torch
from stats import frequencies_agree, means_agree

from pyrovae.distributions import RBM, BoltzmannMachine
from pyrovae.inference import ParallelTempering
from pyrovae.inference.undirected.block_chains import BoltzmannChains, RBMChains
from pyrovae.inference.undirected.tempering import Ladder
from pyrovae.models import BoltzmannMachine as BoltzmannModel
from pyrovae.models import RestrictedBoltzmannMachine
from pyrovae.ops import codes_to_index, index_to_codes

N = 100_000
BETAS = (1.0, 0.6, 0.0)


def codes(bits):
    return index_to_codes(torch.arange(2**bits), 2, bits).double()


def rbm(visible=2, hidden=2, scale=2.0):
    return RBM(scale * torch.randn(visible, hidden), torch.randn(visible), torch.randn(hidden))


def laws(p, base=None, betas=BETAS):
    """p_β over all units, `[T, 2^n]`."""
    joint = p.joint() if isinstance(p, RBM) else p
    x = codes(joint.event_shape[0])
    energy = joint.free_energy(x)
    offset = torch.zeros(len(x)) if base is None else x[:, : len(base)] @ base
    return torch.stack([(-beta * energy + (1 - beta) * offset).softmax(0) for beta in betas])


def units(chains):
    return torch.cat([chains.visible, chains.hidden], 1) if isinstance(chains, RBMChains) else chains.states


def put(chains, states):
    if isinstance(chains, RBMChains):
        split = chains.visible.shape[1]
        chains.visible.copy_(states[:, :split])
        chains.hidden.copy_(states[:, split:])
    else:
        chains.states.copy_(states)


def equilibrium(p, method):
    """A ladder whose places hold independent exact draws of their laws."""
    ladder = Ladder(method, p)
    law = laws(p, method.base_bias, method.betas.tolist())
    n = units(ladder.chains).shape[1]
    states = [codes(n)[torch.multinomial(row, method.num_chains, replacement=True)] for row in law]
    put(ladder.chains, torch.cat(states))
    return ladder, law


def ladder_counts(ladder):
    """How often each joint state of all places was met."""
    index = codes_to_index(units(ladder.chains), 2)[ladder.row]  # [T, C]
    size = 2 ** units(ladder.chains).shape[1]
    joint = index[0]
    for place in index[1:]:
        joint = joint * size + place
    return torch.bincount(joint, minlength=size ** len(index))


def product(law):
    joint = law[0]
    for row in law[1:]:
        joint = (joint[:, None] * row).flatten()
    return joint


@pytest.mark.parametrize("machine", ["rbm", "boltzmann"])
@pytest.mark.parametrize("base", [False, True])
def test_the_whole_ladder_is_left_invariant(machine, base):
    """Draws of the product of all p_β are draws of it after three rounds: of 2^4 or 2^3 states at each of three places."""
    p = rbm() if machine == "rbm" else BoltzmannMachine(coupled(3, 2.0), torch.randn(3))
    bias = torch.randn(p.event_shape[0] - 1 if machine == "boltzmann" else 2) if base else None
    method = ParallelTempering(betas=BETAS, num_chains=N, base_bias=bias)
    ladder, law = equilibrium(p, method)
    for _ in range(3):
        ladder.round(p)
    assert frequencies_agree(ladder_counts(ladder), N, product(law))
    assert bool((ladder.swap_rates > 0.01).all())
    wrong = laws(p, None if base else torch.ones(2), BETAS)
    assert not frequencies_agree(ladder_counts(ladder), N, product(wrong))


def coupled(n, scale):
    j = (scale * torch.randn(n, n)).triu(1)
    return j + j.T


def test_an_exchange_is_its_transition_operator():
    """One offer between two places, from a fixed pair of states: accepted with min(1, exp((β_0 − β_1)(U_0 − U_1)))."""
    p = rbm()
    method = ParallelTempering(betas=(1.0, 0.4), num_chains=N)
    x = codes(4)
    energy = p.joint().free_energy(x)
    for first, second in ((3, 12), (12, 3)):
        ladder = Ladder(method, p)
        put(ladder.chains, x[[first, second]].repeat_interleave(N, 0))
        ladder.exchange(energy[[first, second]].repeat_interleave(N))
        accept = float((0.6 * (energy[first] - energy[second])).exp().clamp(max=1))
        moved = int((ladder.row[0] >= N).sum())
        assert frequencies_agree([moved], N, [accept])
        assert torch.allclose(ladder.swap_rates, torch.tensor([moved / N], dtype=torch.float64))
        assert torch.equal(ladder.row.sort(0).values, torch.arange(2 * N).view(2, N))


def test_exchanges_by_the_marginal_energy_at_one_would_not_be_invariant():
    """The defect of rbms 0.5.0: exchanging by β F(v) with F at β = 1 moves the law, which this check sees."""
    p = rbm(scale=3.0)
    ladder, law = equilibrium(p, ParallelTempering(betas=BETAS, num_chains=N))
    for _ in range(3):
        ladder.chains.sweep(p, 1, torch.tensor(BETAS).repeat_interleave(N)[ladder.row.flatten().argsort()][:, None])
        ladder.exchange(p.free_energy(ladder.chains.visible))
    assert not frequencies_agree(ladder_counts(ladder), N, product(law))


@pytest.mark.parametrize("chains", [RBMChains, BoltzmannChains])
def test_energies_of_chains(chains):
    p = rbm(3, 2)
    if chains is BoltzmannChains:
        p = p.joint()
    base = torch.randn(3)
    found = chains(p, (torch.rand(20, 3) < 0.5).double(), base)
    for beta in (None, torch.rand(20, 1)):
        found.sweep(p, 2, beta)
        x = units(found)
        joint = p.joint() if isinstance(p, RBM) else p
        assert torch.allclose(found.energy(p), joint.free_energy(x) + x[:, :3] @ base, atol=1e-12)


def test_round_trips():
    """Of states that move one place a round, all exchanges accepted, the way to the other end and back takes 2 T rounds."""
    p = RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
    ladder = Ladder(ParallelTempering(4, 5), p)
    for _ in range(8):
        ladder.round(p)
    assert ladder.round_trips == 5
    assert ladder.swap_rates.tolist() == [1.0] * 3
    for _ in range(80):
        ladder.round(p)
    assert ladder.round_trips == 5 * (1 + 40)


def two_modes(depth=12.0):
    """Mass near 000000 and 111111, plain Gibbs all but never crosses; the exact share of the second is 0.3."""
    n = 6
    weight = torch.full((n, 1), depth)
    b = torch.full((n,), -depth / 2)
    p = RBM(weight, b, torch.tensor([-depth * n / 2]))
    gap = p.log_prob(torch.ones(n)) - p.log_prob(torch.zeros(n))
    return RBM(weight, b, torch.tensor([-depth * n / 2 - float(gap) + float(torch.logit(torch.tensor(0.3)))]))


def test_two_modes():
    p = two_modes()
    v = codes(6)
    exact = p.log_prob(v).exp() @ v
    method = ParallelTempering(12, 200, warmup=300)
    found = method.sample(p, 300)
    assert found.draws.shape == (200, 300, 6)
    assert found.samples.shape == (60_000, 6)
    assert found.round_trips > 1000
    assert means_agree(found.draws.mean(1), exact)
    assert float(found.rhat.max()) < 1.1
    plain = RBMChains(p, torch.zeros(200, 6))
    draws = []
    for _ in range(300):
        plain.sweep(p)
        draws.append(plain.visible.clone())
    stuck = torch.stack(draws[50:], 1).mean(1)
    assert not means_agree(stuck, exact)  # every chain stays where it began


def test_adaptation_evens_the_exchanges():
    p = two_modes()
    rates = {}
    for adapt in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = ParallelTempering(7, 200, warmup=400, adapt=adapt).sample(p, 400)
        rates[adapt] = found.swap_rates
        assert found.betas[0] == 1
        assert found.betas[-1] == 0
        assert bool((found.betas.diff() < 0).all())
    assert float(rates[True].min()) > float(rates[False].min())
    assert float(rates[True].std()) < float(rates[False].std()) / 2


def test_a_ladder_that_does_not_exchange_is_told():
    weight = torch.full((40, 1), 30.0)
    p = RBM(weight, torch.full((40,), -15.0), torch.tensor([-600.0]))
    with pytest.warns(UserWarning, match=r"0 round trips .* lowest swap rate is 0"):
        ParallelTempering(2, 4, warmup=5).sample(p, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ParallelTempering(4, 4).sample(rbm(), 50)


def test_targets_and_state():
    torch.manual_seed(0)
    for model in (RestrictedBoltzmannMachine(4, 3), BoltzmannModel(3, 2)):
        before = [parameter.clone() for parameter in model.parameters()]
        found = ParallelTempering(3, 5).sample(model, 10)
        assert found.draws.shape == (5, 10, model.distribution().event_shape[0])
        assert set(found.draws.unique().tolist()) <= {0.0, 1.0}
        assert not found.draws.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(parameter.grad is None for parameter in model.parameters())
    joint = BoltzmannModel(3, 2).distribution()
    assert ParallelTempering(3, 5).sample(joint.marginal(3), 20).draws.shape == (5, 20, 3)
    same = [ParallelTempering(3, 5).sample(p, 20).draws for p in itertools.repeat(seeded(), 2) if torch.manual_seed(1)]
    assert torch.equal(*same)


def seeded():
    with torch.random.fork_rng():
        return rbm()


@pytest.mark.parametrize(
    "options",
    [
        {"num_temperatures": 1},
        {"num_chains": 0},
        {"num_sweeps": 0},
        {"warmup": -1},
        {"betas": [1.0]},
        {"betas": [0.9, 0.0]},
        {"betas": [1.0, 0.5, 0.5]},
        {"betas": [1.0, -0.1]},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=r"expected .* got"):
        ParallelTempering(**options)


def test_bad_draws_are_refused():
    with pytest.raises(ValueError, match="num_draws >= 1, got 0"):
        ParallelTempering(3, 2).sample(rbm(), 0)
    biases = BoltzmannMachine(torch.zeros(3, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected one machine"):
        ParallelTempering(3, 2).sample(biases, 5)


@pytest.mark.parametrize("betas", [[1.0, float("nan")], [1.0, float("nan"), 0.0], [float("nan"), 0.0]])
def test_ladders_with_nan_are_refused(betas):
    with pytest.raises(ValueError, match="expected betas that decrease"):
        ParallelTempering(num_chains=2, betas=betas)


def test_bad_base_biases_are_refused():
    for wrong in (torch.tensor([0.0, float("nan"), 0.0]), torch.tensor([float("inf")] * 3), torch.zeros(1, 3), 0.5):
        with pytest.raises(ValueError, match="expected a finite base_bias"):
            ParallelTempering(2, 2, base_bias=wrong)
    p = RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
    for size in (1, 2, 4):
        with pytest.raises(ValueError, match=rf"expected base_bias \[3\], got \[{size}\]"):
            ParallelTempering(2, 2, base_bias=torch.zeros(size)).sample(p, 1)


def test_learning_warms_up_and_adapts_the_ladder():
    from pyrovae.inference import ContrastiveDivergence
    from pyrovae.inference.undirected import contrastive

    x = (torch.rand(50, 8) < 0.5).double()
    p = RBM((3 * torch.randn(8, 6)).requires_grad_(), torch.randn(8).requires_grad_(), torch.randn(6).requires_grad_())
    for adapt in (False, True):
        tempering = ParallelTempering(4, 20, warmup=7, adapt=adapt)
        method = ContrastiveDivergence(num_steps=40, batch_size=None, negative=tempering)
        run = contrastive._Run(method, p, x, None)
        rounds, ladder = [], run.negative.ladder
        inner = ladder.round
        ladder.round = lambda *args, inner=inner, rounds=rounds: (rounds.append(1), inner(*args))
        run()
        assert len(rounds) == 7 + 40
        assert torch.equal(ladder.betas, tempering.betas) != adapt
        assert bool((ladder.betas.diff() < 0).all())
