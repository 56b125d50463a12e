"""The relaxed families against torch's formulas, quadrature, the Gumbel-max property and enumeration."""

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from stats import frequencies_agree, means_agree

from pyrovae.distributions import RelaxedBernoulli, RelaxedOneHotCategorical
from pyrovae.distributions.supports import lowest

FAMILIES = (RelaxedBernoulli, RelaxedOneHotCategorical)
STOCK = {RelaxedBernoulli: dist.RelaxedBernoulli, RelaxedOneHotCategorical: dist.RelaxedOneHotCategorical}
DISCRETE = {RelaxedBernoulli: dist.Bernoulli, RelaxedOneHotCategorical: dist.OneHotCategorical}
both_families = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_densities_integrate_to_one(k, temperature):
    """Quadrature over all of the simplex, in logits of the coordinates so that both ends are resolved."""
    nodes, weights = map(torch.as_tensor, np.polynomial.legendre.leggauss(300))
    u = torch.sigmoid(50 * nodes)
    du = 50 * u * torch.sigmoid(-50 * nodes) * weights
    not_u = torch.sigmoid(-50 * nodes)
    q = RelaxedOneHotCategorical(temperature, logits=torch.tensor([0.7, -0.4, 0.1])[:k])
    if k == 2:
        value, volume = torch.stack([u, not_u], -1), du
        bit = RelaxedBernoulli(temperature, logits=torch.tensor(1.1))
        inside = u < 1 - 1e-6  # 1 - u is rounded beyond
        assert torch.allclose(bit.log_prob(u[inside]), q.log_prob(value)[inside], atol=1e-8)
        assert abs(float((bit.log_prob(u[u < 1]).exp() * du[u < 1]).sum()) - 1) < 1e-5
    else:
        value = torch.stack([u[:, None].expand(300, 300), not_u[:, None] * u, not_u[:, None] * not_u], -1)
        volume = du[:, None] * not_u[:, None] * du
    assert abs(float((q.log_prob(value).exp() * volume).sum()) - 1) < 1e-4
    wrong = RelaxedOneHotCategorical(1.1 * temperature, logits=q.logits).log_prob(value) - (k - 1) * math.log(1.1)
    assert abs(float((wrong.exp() * volume).sum()) - 1) > 1e-2


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.2])
@both_families
def test_log_densities_are_torchs(family, temperature):
    """In float64, where torch's own formulas hold."""
    t, logits = torch.tensor(temperature), torch.randn(7, 5)
    q, oracle = family(t, logits=logits), STOCK[family](t, logits=logits, validate_args=False)
    value = oracle.sample((50,))
    oracle = oracle.log_prob(value)
    fine = torch.isfinite(oracle)
    if family is RelaxedBernoulli:
        fine &= torch.logit(value).abs() < 20  # beyond, torch's softplus is cut off
    assert float(fine.double().mean()) > 0.9
    assert torch.allclose(q.log_prob(value)[fine], oracle[fine], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(family(1.1 * t, logits=logits).log_prob(value)[fine], oracle[fine])


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_argmax_has_the_discrete_law(temperature, straight_through):
    """The Gumbel-max property, at every temperature and for hard values alike."""
    n, logits, bits = 20_000, torch.tensor([[1.0, -0.5, 0.2, 0.0], [0.0, 2.0, 0.3, -1.0]]), torch.tensor([-2.0, 0.0, 0.7])
    q = RelaxedOneHotCategorical(temperature, logits=logits, straight_through=straight_through)
    counts = torch.nn.functional.one_hot(q.sample((n,)).argmax(-1), 4).sum(0)
    ones = (RelaxedBernoulli(temperature, logits=bits, straight_through=straight_through).sample((n,)) > 0.5).sum(0)
    k = torch.cat([counts.flatten(), ones])
    p = torch.cat([torch.softmax(logits, -1).flatten(), torch.sigmoid(bits)])
    assert frequencies_agree(k.numpy(), n, p.numpy())
    assert not frequencies_agree(k.numpy(), n, p.roll(1).numpy())


@both_families
def test_gradients_are_finite_for_all_rows_at_a_thousand_categories(family):
    """Temperature 0.05 in float32 with validation on, where no row of Pyro's own scores finitely."""
    logits = (3 * torch.randn(200, 1000, dtype=torch.float32)).requires_grad_()
    t = torch.tensor(0.05, dtype=torch.float32, requires_grad=True)
    q, prior = family(t, logits=logits), family(t, logits=torch.zeros_like(logits))
    with pyro.validation_enabled():
        value = q.rsample()
        assert bool(q.support.check(value).all())
        loss = q.log_prob(value) - prior.log_prob(value)
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(loss).all())
    for gradient in torch.autograd.grad(loss.sum() + (value**2).sum(), (logits, t)):
        assert bool(torch.isfinite(gradient).all())
    if family is RelaxedOneHotCategorical:
        stock = dist.RelaxedOneHotCategorical(t.detach(), logits=logits.detach(), validate_args=False)
        assert not bool(torch.isfinite(stock.log_prob(stock.sample())).any())


@both_families
def test_soft_samples_of_float32_are_in_the_support_at_every_size(family):
    for k in (1, 2, 10, 1000):
        for temperature in (0.02, 0.3, 1.0, 5.0):
            q = family(temperature, logits=4 * torch.randn(500, k, dtype=torch.float32))
            assert bool(q.support.check(q.sample((3,))).all())
            hard = family(temperature, logits=4 * torch.randn(500, k, dtype=torch.float32), straight_through=True)
            assert bool(hard.support.check(hard.sample((3,))).all())


@both_families
@pytest.mark.parametrize("straight_through", [False, True])
def test_a_batch_of_temperatures_is_one_by_one(family, straight_through):
    logits, t = torch.randn(4, 3, 5), torch.tensor([0.3, 0.9, 2.0])
    wide = family(t if family is RelaxedOneHotCategorical else t[:, None], logits=logits, straight_through=straight_through)
    kept = family(t.expand(4, 3).unsqueeze(-1), logits=logits, straight_through=straight_through)
    torch.manual_seed(0)
    value = wide.rsample((6,))
    torch.manual_seed(0)
    assert torch.equal(kept.rsample((6,)), value)
    torch.manual_seed(0)
    together = wide.sample((6,))
    for i in range(3):
        single = family(float(t[i]), logits=logits[:, i], straight_through=straight_through)
        expected = single.log_prob(together[:, :, i])
        assert torch.allclose(wide.log_prob(together)[:, :, i], expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(kept.log_prob(together)[:, :, i], expected, rtol=1e-12, atol=1e-12)
    assert tuple(wide.log_prob(together).shape) == (6, *wide.batch_shape)
    assert float(wide.temperature.flatten()[0]) == pytest.approx(0.3)


def test_shapes_of_temperatures():
    """[n] is a batch, [n, 1] keeps the event dim; logits may be without a batch."""
    logits = torch.randn(4, 3)
    for t, batch in ((torch.full((4,), 0.5), (4,)), (torch.full((4, 1), 0.5), (4,)), (torch.full((2, 4), 0.5), (2, 4))):
        q = RelaxedOneHotCategorical(t, logits=logits)
        assert tuple(q.batch_shape) == batch
        assert tuple(q.log_prob(q.sample((7,))).shape) == (7, *batch)
        assert tuple(q.sample().shape) == (*batch, 3)
    assert tuple(RelaxedOneHotCategorical(torch.full((4,), 0.5), logits=logits[0]).batch_shape) == (4,)
    assert tuple(RelaxedOneHotCategorical(torch.tensor([0.5]), logits=logits[0]).batch_shape) == ()
    assert tuple(RelaxedBernoulli(torch.full((4, 1), 0.5), logits=logits).batch_shape) == (4, 3)


def test_log_ratios_do_not_depend_on_the_temperature():
    """Temperature is a change of variables: at the same noise log q − log p is the same at every shared temperature.

    Exact in float64; in float32 until values fall below tiny/eps, where the ratio of clamped draws lies between those of the
    categories and of the densities.
    """
    logits = torch.randn(2000, 10)

    def ratio(temperature, dtype):
        torch.manual_seed(1)
        q = RelaxedOneHotCategorical(temperature, logits=logits.to(dtype))
        p = RelaxedOneHotCategorical(temperature, logits=torch.zeros(10, dtype=dtype))
        value = q.sample()
        return (q.log_prob(value) - p.log_prob(value)).double()

    exact = ratio(1.0, torch.float64)
    for temperature in (0.05, 0.1, 0.3, 3.0):
        assert torch.allclose(ratio(temperature, torch.float64), exact, rtol=1e-9, atol=1e-9)
    single = ratio(1.0, torch.float32)
    assert torch.allclose(ratio(0.3, torch.float32), single, rtol=1e-4, atol=1e-4)
    categories = torch.softmax(logits, -1)
    of_categories = (categories * (categories.log() - math.log(0.1))).sum(-1)
    clamped = [float(ratio(t, torch.float32).mean()) for t in (0.2, 0.1, 0.05, 0.02, 1e-5)]
    assert clamped == sorted(clamped, reverse=True)
    assert means_agree(ratio(1e-5, torch.float32) - of_categories, 0.0)
    assert not means_agree(ratio(0.1, torch.float32) - of_categories, 0.0)


@both_families
def test_clamped_draws_are_scored_by_their_law(family):
    """E_p[q / p] = 1 holds for the probabilities of clamped draws, and fails for densities taken at the clamp."""
    n, logits = 40_000, torch.tensor([1.0, 0.3, -0.2, 0.0, 0.5], dtype=torch.float32)
    q, p = family(0.04, logits=logits), family(0.04, logits=torch.zeros_like(logits))
    value = p.sample((n,))
    at = (value <= lowest(value.dtype)) | (value >= 1 - torch.finfo(value.dtype).eps)
    assert 0.05 < float(at.double().mean()) < 0.95
    weight = (q.log_prob(value) - p.log_prob(value)).double().exp()
    assert means_agree(weight, torch.ones(weight.shape[1:]))
    stock = [STOCK[family](r.temperature, logits=r._logits, validate_args=False) for r in (q, p)]
    wrong = (stock[0].log_prob(value) - stock[1].log_prob(value)).double().exp()
    assert not means_agree(wrong, torch.ones(wrong.shape[1:]))


def test_masses_at_the_clamp_in_closed_form():
    """Two categories, and a bit: the chance that a value lies at the clamp is a logistic function."""
    t, logits, dtype = 0.1, torch.tensor([0.4, -0.7]), torch.float32
    low = lowest(dtype)
    q = RelaxedOneHotCategorical(t, logits=logits.to(dtype))
    corner = torch.tensor([1.0, low], dtype=dtype)
    expected = torch.nn.functional.logsigmoid(logits[0] - logits[1] + t * math.log(low))
    assert float(q.log_prob(corner)) == pytest.approx(float(expected), rel=1e-5)
    b = RelaxedBernoulli(t, logits=logits.to(dtype))
    high = 1 - torch.finfo(dtype).eps
    above = torch.nn.functional.logsigmoid(logits - t * (math.log(high) - math.log1p(-high)))
    below = torch.nn.functional.logsigmoid(t * math.log(low) - logits)
    assert torch.allclose(b.log_prob(torch.full((2,), high, dtype=dtype)).double(), above, rtol=1e-5)
    assert torch.allclose(b.log_prob(torch.full((2,), low, dtype=dtype)).double(), below, rtol=1e-5)


@both_families
@pytest.mark.parametrize("straight_through", [False, True])
def test_expand_to_event_mask_and_copies(family, straight_through):
    logits = torch.randn(3, 4)
    q = family(torch.tensor(0.5), logits=logits, straight_through=straight_through)
    wide = q.expand((5, *q.batch_shape))
    assert type(wide) is family
    assert wide.straight_through is straight_through
    value = wide.sample()
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(wide.to_event(1).log_prob(value), q.log_prob(value).sum(-1), rtol=1e-12, atol=1e-14)
    mask = torch.tensor([True, False, True]) if family is RelaxedOneHotCategorical else torch.tensor([True, False, True, True])
    assert torch.equal(q.mask(mask).log_prob(value), torch.where(mask, q.log_prob(value), 0.0))
    value.requires_grad_()
    assert q.has_rsample
    q.log_prob(value)
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), copy.copy(q)):
        assert type(again) is family
        assert again.straight_through is straight_through
        assert torch.equal(again.log_prob(value), q.log_prob(value))
    leaf = family(0.5, logits=logits.clone().requires_grad_(), straight_through=straight_through)
    leaf.log_prob(leaf.sample())
    copy.deepcopy(leaf)
    assert isinstance(q, (torch.distributions.RelaxedBernoulli, torch.distributions.RelaxedOneHotCategorical))
    assert torch.allclose(q.base_dist.logits, q.logits)
    assert family.__name__ in repr(q)


@both_families
def test_probs_logits_and_constants_agree(family):
    p = torch.tensor([0.2, 0.5, 0.3])
    q = family(0.5, probs=p)
    assert torch.allclose(q.probs, p, rtol=1e-12)
    assert torch.allclose(q.logits, DISCRETE[family](probs=p).logits)
    value = q.sample()
    assert torch.allclose(family(0.5, logits=q.logits).log_prob(value), q.log_prob(value))
    if family is RelaxedOneHotCategorical:  # logits are free of a constant
        for straight_through in (False, True):
            a = RelaxedOneHotCategorical(0.5, logits=q.logits, straight_through=straight_through)
            b = RelaxedOneHotCategorical(0.5, logits=q.logits + 7, straight_through=straight_through)
            value = a.sample()
            assert torch.allclose(a.log_prob(value), b.log_prob(value), rtol=1e-11, atol=1e-11)


@both_families
def test_straight_through_values_are_exact_and_scored_by_their_mass(family):
    logits = torch.randn(50, 6, dtype=torch.float32).requires_grad_()
    q = family(0.3, logits=logits, straight_through=True)
    value = q.rsample()
    assert bool(((value == 0) | (value == 1)).all())
    discrete = DISCRETE[family](logits=logits)
    assert torch.allclose(q.log_prob(value), discrete.log_prob(value.detach()), atol=1e-6)
    assert torch.allclose(q.mean, discrete.mean)
    v = value.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(q.log_prob(v).sum(), v)
    assert torch.allclose(gradient, q.logits.detach() if family is RelaxedOneHotCategorical else logits.detach())
    with pytest.raises(NotImplementedError):
        _ = family(0.3, logits=logits).mean


@both_families
def test_the_straight_through_gradient_is_that_of_the_soft_value(family):
    """At the same noise, for a linear function; by hand through the softmax (sigmoid) at the same draws."""
    logits, t, w = torch.randn(9, 4, requires_grad=True), torch.tensor(0.7, requires_grad=True), torch.randn(9, 4)
    found = []
    for straight_through in (True, False):
        torch.manual_seed(3)
        value = family(t, logits=logits, straight_through=straight_through).rsample()
        found.append(torch.autograd.grad((w * value).sum(), (logits, t)))
    for hard, soft in zip(*found, strict=True):
        assert torch.allclose(hard, soft, rtol=1e-12, atol=1e-12)
    y = value.detach()
    jw = y * (w - (y * w).sum(-1, keepdim=True)) if family is RelaxedOneHotCategorical else y * (1 - y) * w
    assert torch.allclose(found[1][0], jw / t.detach(), rtol=1e-9, atol=1e-12)


@both_families
def test_hard_values_are_refused_by_a_density_and_soft_ones_by_a_mass(family):
    logits = torch.zeros(5, 3)
    soft, hard = family(0.5, logits=logits), family(0.5, logits=logits, straight_through=True)
    with pytest.raises(ValueError, match="expected soft values for the density"):
        soft.log_prob(hard.sample())
    with pytest.raises(ValueError, match=r"straight-through .* got soft ones"):
        hard.log_prob(soft.sample())
    with pytest.raises(ValueError, match="NaN"):
        soft.log_prob(torch.full((5, 3), math.nan))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        soft.log_prob(torch.full((5, 3), 2.0))
    with pytest.raises(ValueError, match=r"event_shape|broadcast"):
        soft.log_prob(torch.full((5, 7), 0.5))
    if family is RelaxedOneHotCategorical:
        with pytest.raises(ValueError, match="sum to 1"):
            soft.log_prob(torch.full((5, 3), 0.5))
    unchecked = family(0.5, logits=logits, validate_args=False)
    assert bool(torch.isfinite(unchecked.log_prob(hard.sample())).all())


@both_families
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperatures(family, temperature):
    for validate in (None, False):
        with pytest.raises(ValueError, match="positive, finite temperature"):
            family(temperature, logits=torch.zeros(3), validate_args=validate)
    with pytest.raises(ValueError, match="positive, finite temperature"):
        family(torch.tensor(temperature), logits=torch.zeros(3))
    with pytest.raises(ValueError, match="positive, finite temperature"):
        family(torch.tensor([0.5, temperature, 1.0]).unsqueeze(-1), logits=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="number or a tensor"):
        family("hot", logits=torch.zeros(3))


@both_families
def test_bad_parameters(family):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="finite logits"):
            family(0.5, logits=torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match="either probs or logits"):
        family(0.5)
    with pytest.raises(ValueError, match="either probs or logits"):
        family(0.5, probs=torch.tensor([0.5, 0.5]), logits=torch.zeros(2))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        family(0.5, probs=torch.tensor([1.5, -0.5]))
    if family is RelaxedOneHotCategorical:
        with pytest.raises(ValueError, match=r"sum to 1.*normalise"):
            family(0.5, probs=torch.tensor([0.5, 0.7]))
        with pytest.raises(ValueError, match="last dim of categories"):
            family(0.5, logits=torch.tensor(0.0))


def test_numbers_are_parameters_of_a_bit():
    assert float(RelaxedBernoulli(1, probs=0.5).logits) == 0.0
    assert tuple(RelaxedBernoulli(0.5, logits=0).sample((3,)).shape) == (3,)


@both_families
def test_autoguides_know_the_supports(family):
    def model():
        with pyro.plate("rows", 2):
            return pyro.sample("z", family(0.5, logits=torch.zeros(2, 3)).to_event(family is RelaxedBernoulli))

    guide = AutoNormal(model)
    value = guide()["z"]
    assert bool(((value > 0) & (value < 1)).all())
    if family is RelaxedOneHotCategorical:
        assert torch.allclose(value.sum(-1), torch.ones(2))
