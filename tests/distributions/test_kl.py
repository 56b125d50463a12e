"""The registered divergences against sums over all values, and the two objectives that they tell apart."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyrovae.distributions import RelaxedBernoulli, RelaxedOneHotCategorical, SurrogateBernoulli, SurrogateOneHotCategorical

ONE_HOT = {
    "soft": lambda logits: RelaxedOneHotCategorical(0.4, logits=logits),
    "straight-through": lambda logits: RelaxedOneHotCategorical(0.7, logits=logits, straight_through=True),
    "pyro": lambda logits: dist.OneHotCategorical(logits=logits),
    "torch": lambda logits: torch.distributions.OneHotCategorical(logits=logits),
    "pyro, straight-through": lambda logits: dist.OneHotCategoricalStraightThrough(logits=logits),
    "surrogate": SurrogateOneHotCategorical,
}
BIT = {
    "soft": lambda logits: RelaxedBernoulli(0.4, logits=logits),
    "straight-through": lambda logits: RelaxedBernoulli(0.7, logits=logits, straight_through=True),
    "pyro": lambda logits: dist.Bernoulli(logits=logits),
    "torch": lambda logits: torch.distributions.Bernoulli(logits=logits),
    "surrogate": SurrogateBernoulli,
}


def brute_force(p, q, values):
    log_p, log_q = p.log_prob(values), q.log_prob(values)
    return (log_p.exp() * (log_p - log_q)).sum(0)


@pytest.mark.parametrize("p", ONE_HOT)
@pytest.mark.parametrize("q", ONE_HOT)
def test_categories(p, q):
    a, b = torch.randn(4, 2, 3), torch.randn(2, 3)
    values = torch.eye(3)[:, None, None]
    expected = brute_force(dist.OneHotCategorical(logits=a), dist.OneHotCategorical(logits=b), values)
    found = kl_divergence(ONE_HOT[p](a), ONE_HOT[q](b))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    wrapped = kl_divergence(dist.Independent(ONE_HOT[p](a), 1), dist.Independent(ONE_HOT[q](b).expand((4, 2)), 1))
    assert torch.allclose(wrapped, expected.sum(-1), rtol=0, atol=1e-12)
    assert not torch.allclose(found, brute_force(dist.OneHotCategorical(logits=b), dist.OneHotCategorical(logits=a), values))


@pytest.mark.parametrize("p", BIT)
@pytest.mark.parametrize("q", BIT)
def test_bits(p, q):
    a, b = 3 * torch.randn(4, 2), torch.randn(2).expand(4, 2)  # torch's own does not broadcast
    values = torch.tensor([0.0, 1.0])[:, None, None]
    expected = brute_force(dist.Bernoulli(logits=a), dist.Bernoulli(logits=b), values)
    assert torch.allclose(kl_divergence(BIT[p](a), BIT[q](b)), expected, rtol=0, atol=1e-12)
    wrapped = kl_divergence(dist.Independent(BIT[p](a), 1), dist.Independent(BIT[q](b), 1))
    assert torch.allclose(wrapped, expected.sum(-1), rtol=0, atol=1e-12)


def test_large_logits_and_gradients():
    a = torch.tensor([-90.0, 0.0, 90.0], requires_grad=True)
    kl = kl_divergence(RelaxedBernoulli(0.5, logits=a), RelaxedBernoulli(0.5, logits=-a.detach()))
    assert torch.allclose(kl, torch.tensor([90.0, 0.0, 90.0]), atol=1e-9)
    (gradient,) = torch.autograd.grad(kl.sum(), a)
    assert bool(torch.isfinite(gradient).all())
    assert torch.autograd.gradcheck(
        lambda x, y: kl_divergence(RelaxedOneHotCategorical(0.5, logits=x), RelaxedOneHotCategorical(0.5, logits=y)),
        (torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)),
    )


def test_stock_pairs_are_left_alone():
    """Nothing is registered for pairs without a family of ours."""
    t = torch.tensor(0.5)
    with pytest.raises(NotImplementedError):
        kl_divergence(dist.RelaxedOneHotCategorical(t, logits=torch.zeros(3)), dist.OneHotCategorical(logits=torch.zeros(3)))
    with pytest.raises(NotImplementedError):
        kl_divergence(dist.RelaxedBernoulli(t, logits=torch.zeros(3)), RelaxedBernoulli(t, logits=torch.zeros(3)))


class Pair:
    """A model and a guide with relaxed sites in a plate of 5 rows, of which 3 are seen."""

    def __init__(self, *, straight_through):
        self.family = lambda logits: RelaxedOneHotCategorical(0.6, logits=logits, straight_through=straight_through)
        self.a, self.b, self.w = torch.randn(5, 2, 3), torch.randn(2, 3), torch.randn(6, 4)
        self.x = torch.bernoulli(torch.full((5, 4), 0.5))

    def model(self):
        with pyro.plate("rows", 5, subsample=torch.tensor([0, 1, 4])) as rows:
            z = pyro.sample("z", self.family(self.b).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z.flatten(-2) @ self.w).to_event(1), obs=self.x[rows])

    def guide(self):
        with pyro.plate("rows", 5, subsample=torch.tensor([0, 1, 4])) as rows:
            pyro.sample("z", self.family(self.a[rows]).to_event(1))


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_objectives_by_hand(objective, straight_through):
    """Trace_ELBO scores the sampled value; TraceMeanField_ELBO takes the sum over categories; rows scaled by 5/3."""
    pair = Pair(straight_through=straight_through)
    torch.manual_seed(7)
    loss = objective().loss(pair.model, pair.guide)
    torch.manual_seed(7)
    rows = torch.tensor([0, 1, 4])
    q, p = pair.family(pair.a[rows]), pair.family(pair.b)
    z = q.rsample()
    recon = dist.Bernoulli(logits=z.flatten(-2) @ pair.w).log_prob(pair.x[rows]).sum()
    sampled = (q.log_prob(z) - p.log_prob(z)).sum()
    categories = torch.eye(3)[:, None, None]
    exact = brute_force(dist.OneHotCategorical(logits=pair.a[rows]), dist.OneHotCategorical(logits=pair.b), categories).sum()
    by_hand = {Trace_ELBO: sampled, TraceMeanField_ELBO: exact}
    assert loss == pytest.approx(float(5 / 3 * (by_hand.pop(objective) - recon)), rel=1e-12)
    assert loss != pytest.approx(float(5 / 3 * (by_hand.popitem()[1] - recon)), rel=1e-3)
