"""MarkovChain against the list of all its paths."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import stats
import torch
from pyro.infer import SVI, TraceEnum_ELBO

from pyrovae.distributions import MarkovChain
from pyrovae.handlers import relax
from pyrovae.inference import Exact


def tables(k=3, *batch):
    return torch.randn(*batch, k).softmax(-1), torch.randn(*batch, k, k).softmax(-1)


def by_hand(initial, transition, path):
    p = initial[path[0]]
    for a, b in itertools.pairwise(path):
        p = p * transition[a, b]
    return p


def test_log_prob_is_the_product():
    initial, transition = tables()
    chain = MarkovChain(initial, transition, 4)
    paths = list(itertools.product(range(3), repeat=4))
    expected = torch.stack([by_hand(initial, transition, path) for path in paths])
    listed = chain.enumerate_support()
    assert listed.tolist() == [list(path) for path in paths]
    assert torch.allclose(chain.log_prob(listed).exp(), expected, atol=1e-14)
    assert torch.allclose(chain.log_prob(listed).exp().sum(), torch.tensor(1.0))
    wrong = MarkovChain(initial, transition.T / transition.T.sum(-1, keepdim=True), 4)
    assert not torch.allclose(wrong.log_prob(listed).exp(), expected, atol=1e-3)


def test_logits_and_probabilities_are_one():
    initial, transition = tables()
    a = MarkovChain(initial, transition, 5)
    b = MarkovChain(length=5, initial_logits=initial.log() + 3, transition_logits=transition.log() - torch.randn(3, 1))
    c = MarkovChain(2 * initial, transition_logits=transition.log(), length=5)
    z = a.sample((7,))
    assert torch.allclose(a.log_prob(z), b.log_prob(z))
    assert torch.allclose(a.log_prob(z), c.log_prob(z))
    assert torch.allclose(b.initial, initial)
    assert torch.allclose(b.transition, transition)
    assert torch.allclose(b.transition_logits, transition.log())
    assert torch.allclose(b.initial_logits, initial.log())


def test_moments():
    chain = MarkovChain(*tables(3, 2), 4)
    paths = chain.enumerate_support()
    assert paths.shape == (81, 2, 4)
    p = chain.log_prob(paths).exp()
    for k in range(3):
        assert torch.allclose(chain.marginals[..., k], (p.unsqueeze(-1) * (paths == k)).sum(0))
    mean = (p.unsqueeze(-1) * paths).sum(0)
    assert torch.allclose(chain.mean, mean)
    assert torch.allclose(chain.variance, (p.unsqueeze(-1) * (paths - mean) ** 2).sum(0))


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("table", [2**22, 0])
def test_draws(batch, table, monkeypatch):
    monkeypatch.setattr("pyrovae.distributions.markov_chain._MAX_TABLE", table)
    chain = MarkovChain(*tables(3, *batch), 3)
    n = 20000
    paths, draws = chain.enumerate_support(), chain.sample((n,))
    assert draws.shape == (n, *batch, 3)
    counts = (draws.unsqueeze(1) == paths).all(-1).sum(0)
    assert int(counts.sum()) == n * max(1, len(batch) * 2)
    assert stats.frequencies_agree(counts, n, chain.log_prob(paths).exp())
    other = MarkovChain(*tables(3, *batch), 3)
    assert not stats.frequencies_agree(counts, n, other.log_prob(paths).exp())


@pytest.mark.parametrize("table", [2**22, 0])
def test_impossible_states_and_transitions(table, monkeypatch):
    monkeypatch.setattr("pyrovae.distributions.markov_chain._MAX_TABLE", table)
    initial = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    transition = torch.tensor([[0.0, 0.5, 0.5], [0.3, 0.7, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    chain = MarkovChain(initial, transition, 6)
    draws = chain.sample((5000,))
    log_prob = chain.log_prob(draws)
    assert bool((log_prob > -torch.inf).all())
    assert float(chain.log_prob(torch.tensor([0, 1, 0, 1, 0, 1])).detach()) == -torch.inf
    log_prob.sum().backward()
    assert torch.isfinite(initial.grad).all()
    assert torch.isfinite(transition.grad).all()
    assert torch.isfinite(chain.mean).all()


def test_shapes():
    chain = MarkovChain(*tables(4), 5)
    assert (chain.batch_shape, chain.event_shape, chain.event_dim) == ((), (5,), 1)
    wide = chain.expand((3, 2))
    assert wide.sample((6,)).shape == (6, 3, 2, 5)
    assert wide.log_prob(chain.sample()).shape == (3, 2)
    assert wide.enumerate_support(expand=False).shape == (1024, 1, 1, 5)
    assert wide.expand((7, 3, 2)).mean.shape == (7, 3, 2, 5)
    mixed = MarkovChain(tables(4)[0], tables(4, 3, 1)[1], 5)
    assert mixed.batch_shape == (3, 1)
    assert mixed.log_prob(mixed.sample((2,))).shape == (2, 3, 1)
    assert mixed.expand((3, 2)).sample().shape == (3, 2, 5)
    assert MarkovChain(*tables(4), 1).sample((3,)).shape == (3, 1)
    assert chain.support.check(chain.sample((9,))).all()
    assert not chain.support.check(torch.tensor([0, 1, 4, 0, 0]))
    assert "num_states=4" in repr(chain)
    row = mixed.log_prob(z := mixed.sample())[2, 0]
    alone = MarkovChain(mixed.initial[2, 0], mixed.transition[2, 0], 5)
    assert torch.allclose(alone.log_prob(z[2, 0]), row)


def test_gradients():
    logits = [torch.randn(3, requires_grad=True), torch.randn(3, 3, requires_grad=True)]
    z = torch.randint(3, (4, 5))

    def log_prob(initial, transition):
        return MarkovChain(length=5, initial_logits=initial, transition_logits=transition).log_prob(z)

    assert torch.autograd.gradcheck(log_prob, logits)


def test_bad_arguments():
    initial, transition = tables()
    for arguments, message in [
        ((initial, transition, 0), "length >= 1"),
        ((initial, transition[:2], 3), "K, K"),
        ((initial, None, 3), "each of initial and transition once"),
        ((-initial, transition, 3), "initial rows"),
        ((initial, torch.zeros(3, 3), 3), "3 of 3 rows"),
        ((initial * torch.nan, transition, 3), "initial rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            MarkovChain(*arguments)
    with pytest.raises(ValueError, match="largest one"):
        MarkovChain(initial, length=3, transition_logits=torch.full((3, 3), -torch.inf))
    with pytest.raises(ValueError, match="paths to list"):
        MarkovChain(initial, transition, 20).enumerate_support()
    with pytest.raises(ValueError, match="support"):
        MarkovChain(initial, transition, 2, validate_args=True).log_prob(torch.tensor([0, 3]))


def program(initial, transition, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", MarkovChain(initial, transition, x.shape[1]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z.to(x), 0.7).to_event(1), obs=x)


def test_the_generic_engine_and_pyro_sum_over_paths():
    """Any program with such a site is enumerated, by Exact and by Pyro's own TraceEnum_ELBO; Pyro's DiscreteHMM agrees."""
    initial, transition = tables()
    x = torch.randn(4, 4)
    evidence = Exact().infer(program, initial, transition, x).log_evidence
    steps = torch.stack([initial.expand(3, 3), *[transition] * 3])  # Pyro's first state comes before the first time
    theirs = dist.DiscreteHMM(torch.zeros(3), steps.log(), dist.Normal(torch.arange(3.0), 0.7), duration=4)
    assert torch.allclose(theirs.log_prob(x), evidence, atol=1e-10)
    svi = SVI(program, lambda *_: None, pyro.optim.Adam({}), TraceEnum_ELBO(max_plate_nesting=1))
    assert abs(svi.evaluate_loss(initial, transition, x) + float(evidence.sum())) < 1e-9


def test_no_relaxed_twin():
    with pytest.raises(ValueError, match="MarkovChain site 'z'"):
        relax(program, 0.5)(*tables(), torch.randn(2, 3))
