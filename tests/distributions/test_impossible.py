"""Categories and bits of probability 0: hard families score them as Pyro's do, with finite gradients."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyrovae.distributions import RelaxedBernoulli, RelaxedOneHotCategorical, SurrogateBernoulli, SurrogateOneHotCategorical
from pyrovae.handlers import relax, surrogate

INF = math.inf
ONE_HOT = {
    "reinmax": SurrogateOneHotCategorical,
    "reinmax, cool": lambda logits: SurrogateOneHotCategorical(logits, temperature=0.3),
    "surrogate straight-through": lambda logits: SurrogateOneHotCategorical(logits, "straight_through"),
    "relaxed straight-through": lambda logits: RelaxedOneHotCategorical(0.05, logits=logits, straight_through=True),
}
BIT = {
    "reinmax": SurrogateBernoulli,
    "surrogate straight-through": lambda logits: SurrogateBernoulli(logits, "straight_through"),
    "relaxed straight-through": lambda logits: RelaxedBernoulli(0.05, logits=logits, straight_through=True),
}
DTYPES = [torch.float32, torch.float64]


def finite(*tensors):
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_HOT)
def test_categories(name, dtype):
    logits = torch.tensor([[0.0, -INF, 1.0], [0.5, 0.2, -INF]], dtype=dtype, requires_grad=True)
    q, stock = ONE_HOT[name](logits), dist.OneHotCategorical(logits=logits.detach())
    draws = q.rsample((200,))
    assert bool((draws.sum(-1) == 1).all())
    assert float((draws * (logits == -INF)).sum()) == 0
    torch.testing.assert_close(q.log_prob(draws), stock.log_prob(draws))
    for value in torch.eye(3, dtype=dtype):
        torch.testing.assert_close(q.log_prob(value), stock.log_prob(value.expand(2, 3)))
    weight = torch.randn(3, dtype=dtype)
    objective = 600 * (q.log_prob(draws) + (draws * weight).sum(-1) ** 2).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    assert finite(gradient)
    assert float(gradient[logits == -INF].abs().max()) == 0


@pytest.mark.parametrize("name", ["reinmax", "surrogate straight-through"])
def test_the_gradient_is_that_of_the_possible_categories(name):
    """With the same noise, a category that cannot be drawn changes nothing."""
    free = torch.randn(5, 2, requires_grad=True)
    weight = torch.randn(3)
    found = []
    for pad in (True, False):
        torch.manual_seed(0)
        logits = torch.cat([free, torch.full((5, 1), -INF)], -1) if pad else free
        q = ONE_HOT[name](logits)
        hard = torch.eye(2)[torch.tensor([0, 1, 1, 0, 1])]
        q.sample = lambda *_, hard=hard, pad=pad: torch.cat([hard, torch.zeros(5, 1)], -1) if pad else hard
        draw = q.rsample()
        objective = (q.log_prob(draw) + (draw * weight[: draw.shape[-1]]).sum(-1) ** 3).sum()
        found.append((objective, *torch.autograd.grad(objective, free)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert float(found[0][1].abs().min()) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BIT)
def test_bits(name, dtype):
    logits = torch.tensor([INF, -INF, 0.3], dtype=dtype, requires_grad=True)
    q = BIT[name](logits)
    draws = q.rsample((200,))
    assert bool((draws[:, 0] == 1).all() & (draws[:, 1] == 0).all())
    ones, zeros = q.log_prob(torch.ones(3, dtype=dtype)), q.log_prob(torch.zeros(3, dtype=dtype))
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(ones, p.log())
    torch.testing.assert_close(zeros, (1 - p).log())
    (gradient,) = torch.autograd.grad(600 * (q.log_prob(draws) + draws**2).sum(), logits)
    assert finite(gradient)
    assert gradient[:2].tolist() == [0, 0]


def one_hot_kl(a, b):
    p, q = a.softmax(-1), b.softmax(-1)
    terms = [
        pk * (pk / qk).log() if pk > 0 and qk > 0 else pk.new_tensor(INF if pk > 0 else 0.0)
        for pk, qk in zip(p, q, strict=True)
    ]
    return sum(terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_HOT)
def test_divergences_of_categories(name, dtype):
    rows = [[0.0, -INF, 1.0], [0.4, -INF, -1.0], [-INF, 0.5, 0.1], [0.3, 0.2, 0.1]]
    for a in rows:
        for b in rows:
            x, y = (torch.tensor(row, dtype=dtype, requires_grad=True) for row in (a, b))
            found = kl_divergence(ONE_HOT[name](x), ONE_HOT[name](y))
            torch.testing.assert_close(found, one_hot_kl(x, y))
            if math.isfinite(float(found)):
                assert finite(*torch.autograd.grad(found, (x, y)))
    x, y = (torch.tensor(row, dtype=dtype, requires_grad=True) for row in (rows[0], rows[1]))
    possible = torch.tensor([True, False, True])
    found = torch.autograd.grad(kl_divergence(ONE_HOT[name](x), ONE_HOT[name](y)), (x, y))
    expected = torch.autograd.grad(one_hot_kl(x[possible], y[possible]), (x, y))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    stock = dist.OneHotCategorical(logits=y)
    torch.testing.assert_close(kl_divergence(ONE_HOT[name](x), stock), one_hot_kl(x, y))
    torch.testing.assert_close(kl_divergence(stock, ONE_HOT[name](x)), one_hot_kl(y, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BIT)
def test_divergences_of_bits(name, dtype):
    values = [-INF, -40.0, -0.5, 0.7, 40.0, INF]
    for a in values:
        for b in values:
            x, y = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in (a, b))
            found = kl_divergence(BIT[name](x), BIT[name](y))
            if math.isinf(b):
                expected = 0.0 if a == b else INF
            else:
                p = 1 / (1 + math.exp(-a)) if a > -INF else 0.0
                ones = p * (math.log1p(math.exp(-b)) - (math.log1p(math.exp(-a)) if p else 0)) if p else 0.0
                q = 1 / (1 + math.exp(a)) if a < INF else 0.0
                zeros = q * (math.log1p(math.exp(b)) - math.log1p(math.exp(a))) if q else 0.0
                expected = ones + zeros
            torch.testing.assert_close(float(found), expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
            if math.isfinite(expected):
                assert finite(*torch.autograd.grad(found, (x, y)))


def model(logits):
    z = pyro.sample("z", dist.OneHotCategorical(logits=logits))
    pyro.sample("x", dist.Normal(z @ torch.tensor([1.0, 2.0, -1.0]), 1.0), obs=torch.tensor(0.3))


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("wrap", [surrogate, lambda p: relax(p, 0.05, straight_through=True)])
def test_programs(wrap, objective):
    p, q = (torch.tensor([a, -INF, 0.2], requires_grad=True) for a in (0.5, -0.4))
    temperature = torch.tensor(0.3, requires_grad=True)
    cases = [(wrap(lambda: model(p)), wrap(lambda: pyro.sample("z", dist.OneHotCategorical(logits=q)))), None]
    cases[1] = tuple(relax(program.program, temperature, straight_through=True) for program in cases[0])
    for pair in cases:
        for _ in range(20):
            loss = objective().differentiable_loss(*pair)
            gradients = torch.autograd.grad(loss, (p, q, temperature), allow_unused=True)
            assert finite(loss.detach(), *(g for g in gradients if g is not None))


def test_what_is_refused():
    for family, bad in (
        (RelaxedOneHotCategorical, [0.0, INF]),
        (RelaxedOneHotCategorical, [0.0, math.nan]),
        (RelaxedBernoulli, [math.nan]),
    ):
        with pytest.raises(ValueError, match="expected"):
            family(0.5, logits=torch.tensor(bad), straight_through=True)
    for family in (RelaxedOneHotCategorical, RelaxedBernoulli):
        with pytest.raises(ValueError, match="expected finite logits"):
            family(0.5, logits=torch.tensor([0.0, -INF]))
