"""The fast routes of a factor against plain log_prob, and variable elimination against one big sum."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrovae.handlers.structure import Site
from pyrovae.inference.exact.elimination import Term, amax, eliminate, elimination_numel, sum_plates
from pyrovae.inference.exact.factors import dot, site_factor


def _site(fn, value, mask=None):
    return Site("x", fn, value, True, (), 1.0, mask)


def _leaf(*shape):
    return nn.Parameter(torch.randn(*shape))


# states along dim -2, rows along dim -1; events after
FAMILIES = {
    "bernoulli": (lambda: dist.Bernoulli(logits=_leaf(8, 1, 3)).expand((8, 5, 3)).to_event(1), lambda: torch.ones(5, 3)),
    "bernoulli probs": (
        lambda: dist.Bernoulli(torch.sigmoid(_leaf(8, 1, 3))).expand((8, 5, 3)).to_event(1),
        lambda: torch.eye(5)[:, :3],
    ),
    "bernoulli two event dims": (
        lambda: dist.Bernoulli(logits=_leaf(8, 1, 2, 3)).expand((8, 5, 2, 3)).to_event(2),
        lambda: torch.ones(5, 2, 3),
    ),
    "categorical": (lambda: dist.Categorical(logits=_leaf(8, 1, 4)).expand((8, 5)), lambda: torch.arange(5) % 4),
    "categorical probs": (
        lambda: dist.Categorical(torch.softmax(_leaf(8, 1, 4), -1)).expand((8, 5)),
        lambda: torch.arange(5) % 4,
    ),
    "one hot": (
        lambda: dist.OneHotCategorical(logits=_leaf(8, 1, 4)).expand((8, 5)),
        lambda: torch.eye(4)[torch.arange(5) % 4],
    ),
    "normal": (lambda: dist.Normal(_leaf(8, 1, 3), 0.3).expand((8, 5, 3)).to_event(1), lambda: torch.randn(5, 3)),
    "normal scales": (lambda: dist.Normal(0.0, _leaf(8, 1).exp()).expand((8, 5)), lambda: torch.randn(5)),
    "poisson": (
        lambda: dist.Poisson(_leaf(8, 1, 3).exp()).expand((8, 5, 3)).to_event(1),
        lambda: torch.arange(15.0).reshape(5, 3),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_matrix_product(name):
    make_fn, make_value = FAMILIES[name]
    fn, value = make_fn(), make_value()
    factor = site_factor(_site(fn, value), 2)
    assert factor.bilinear is not None
    assert factor.bilinear.eta.shape[1] == 1  # thin along rows
    plain = fn.log_prob(value)
    torch.testing.assert_close(factor.table(), plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(factor.table() + 1e-6, plain, rtol=1e-12, atol=1e-12)
    weights = torch.rand(8, 5)
    q = factor.statistics(weights)(site_factor(_site(fn, value), 2))
    torch.testing.assert_close(q, (weights * plain).sum(), rtol=1e-12, atol=1e-12)


def test_a_normal_far_from_zero_does_not_cancel():
    loc = torch.randn(8, 1)
    value = 1e4 + torch.randn(5)
    fn = dist.Normal((1e4 + loc).expand(8, 5), 0.3)
    torch.testing.assert_close(site_factor(_site(fn, value), 2).table(), fn.log_prob(value), rtol=1e-9, atol=1e-9)
    fn32 = dist.Normal((1e4 + loc).float().expand(8, 5), torch.tensor(0.3, dtype=torch.float32))
    table = site_factor(_site(fn32, value.float()), 2).table()
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, fn32.log_prob(value.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (dist.Gamma(_leaf(8, 1).exp().expand(8, 5), 1.0), torch.rand(5) + 0.1),
        lambda: (dist.Bernoulli(logits=_leaf(8, 5)), torch.ones(5)),
        lambda: (dist.Normal(_leaf(8, 1).expand(8, 5), 1.0), torch.randn(8, 5)),
        lambda: (dist.Binomial(4, logits=_leaf(8, 1).expand(8, 5)), torch.arange(5.0)),
        lambda: (dist.ContinuousBernoulli(torch.full((8, 1), 0.5001).expand(8, 5), lims=(0.4, 0.6)), torch.rand(5)),
        lambda: (dist.LogNormal(_leaf(8, 1).expand(8, 5), 1.0), torch.rand(5) + 0.1),
        lambda: (dist.Poisson(torch.tensor([0.0, 1.0]).unsqueeze(-1).expand(2, 5)), torch.zeros(5)),
        lambda: (dist.Categorical(torch.tensor([[0.0, 1.0], [0.5, 0.5]]).unsqueeze(1).expand(2, 5, 2)), torch.ones(5)),
        lambda: (dist.Multinomial(3, torch.rand(8, 1, 2).expand(8, 5, 2)), torch.tensor([1.0, 2.0]).expand(5, 2)),
        lambda: (dist.ZeroInflatedPoisson(_leaf(8, 1).exp().expand(8, 5), gate=torch.tensor(0.2)), torch.arange(5.0)),
    ],
)
def test_any_other_family_or_shape(make):
    fn, value = make()
    table = site_factor(_site(fn, value), 2).table()
    plain = fn.log_prob(value)
    torch.testing.assert_close(table.expand(plain.shape), plain, rtol=1e-10, atol=1e-10)


def test_gradient_of_a_thin_parameter():
    logits = _leaf(8, 3)
    value = torch.eye(5)[:, :3]

    def fn(p):
        return dist.Bernoulli(logits=p.unsqueeze(1).expand(8, 5, 3)).to_event(1)

    weights = torch.rand(8, 5)
    fast = torch.autograd.grad((weights * site_factor(_site(fn(logits), value), 2).table()).sum(), logits)[0]
    plain = torch.autograd.grad((weights * fn(logits).log_prob(value)).sum(), logits)[0]
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", ["site", "outside", "inside"])
def test_masks(where):
    value = torch.randn(5, 3)
    value[1, 2] = float("nan")
    loc = _leaf(8, 1, 3)
    fn = dist.Normal(loc.expand(8, 5, 3), 1.0)
    rows = torch.tensor([True, False, True, True, True])
    elements = ~torch.isnan(value)
    site = {
        "site": lambda: _site(fn.to_event(1), value, rows),
        "outside": lambda: _site(fn.to_event(1).mask(rows), value),
        "inside": lambda: _site(fn.mask(elements).to_event(1), value),
    }[where]()
    table = site_factor(site, 2).table()
    each = torch.distributions.Normal(loc, 1.0, validate_args=False).log_prob(value)
    hide = rows.unsqueeze(-1) if where != "inside" else elements
    torch.testing.assert_close(table, torch.where(hide, each, 0.0).sum(-1))
    assert torch.isfinite(torch.autograd.grad(table.sum(), loc)[0]).all()


def test_dot_counts_impossible_states_of_no_weight_as_nothing():
    table = torch.tensor([-1.0, -torch.inf])
    assert dot(torch.tensor([2.0, 0.0]), table).tolist() == [-2, 0]
    assert dot(torch.tensor([2.0, 0.1]), table)[1] == -torch.inf


TABLES = [(4, 1, 1), (4, 3, 1), (1, 3, 2), (1, 1, 2)]


def test_elimination():
    tables = [torch.randn(shape) for shape in TABLES]
    full = sum(tables)
    torch.testing.assert_close(eliminate(tables, [-2, -3]), torch.logsumexp(full, (0, 1), keepdim=True))
    torch.testing.assert_close(eliminate(tables, [-2, -3], amax), full.amax((0, 1), keepdim=True))
    assert not torch.allclose(eliminate(tables[1:], [-2, -3]), torch.logsumexp(full, (0, 1), keepdim=True))
    made = elimination_numel(TABLES, [-2, -3])
    assert [4, 3, 2] not in made  # the cheap order never makes the joint table
    assert [4, 3, 1] in made


def test_an_axis_that_nothing_depends_on_counts_its_states():
    table = torch.randn(4, 1, 2)
    # an axis of size 1 everywhere has one state
    torch.testing.assert_close(eliminate([table], [-2]), table)


def test_sum_over_plates():
    table = torch.randn(4, 1, 5)
    term = Term(table, frozenset({-1, -2}), 0)
    summed = sum_plates(term, frozenset({-2}), {-1: 5, -2: 3})
    torch.testing.assert_close(summed.table, table.sum(-1, keepdim=True))
    assert summed.plate_dims == {-2}
    torch.testing.assert_close(sum_plates(term, frozenset({-1}), {-1: 5, -2: 3}).table, 3 * table)
