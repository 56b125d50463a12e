"""Which arguments are rows: tensors that all rows share, as long as the data by chance, are never cut."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from stats import bound, largest_z
from torch import nn

from pyrovae.diagnostics import evaluate
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Variational, weighing
from pyrovae.inference.rows import readings, row_wise
from pyrovae.inference.variational import true_bound
from pyrovae.inference.variational.true_bound import TrueBound
from pyrovae.models import toy

N, K = 7, 4000


def shared(x, w):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(z * w.sum(), 1.0), obs=x)


def per_row(x, w):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(z * w, 1.0), obs=x)


def guide(x, w):
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Bernoulli(0.5))


def evidence(x, loc):
    ones, noughts = dist.Normal(loc, 1.0).log_prob(x), dist.Normal(0.0, 1.0).log_prob(x)
    return torch.logaddexp(math.log(0.4) + ones, math.log(0.6) + noughts)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("model", "keys"), [(shared, 1), (per_row, 2)])
@pytest.mark.parametrize("split", ["batch_size", "memory"])
def test_evaluate_cuts_rows_only(monkeypatch, model, keys, split, by_name):
    x, w = torch.randn(N), torch.randn(N)
    exact = {name: evidence(x, loc) for name, loc in (("shared", w.sum()), ("per_row", w))}
    args, kwargs = ((x,), {"w": w}) if by_name else ((x, w), {})
    found = row_wise((model, guide), args, kwargs, N, indexed=False)
    assert len(found.keys) == keys
    if split == "memory":
        monkeypatch.setattr(weighing, "NUMEL", 100)
    batch_size = 3 if split == "batch_size" else None
    assert len(weighing.split_rows(model, guide, args, kwargs, K, batch_size).calls) > 1
    found = evaluate(model, guide, *args, num_particles=K, batch_size=batch_size, **kwargs)
    assert largest_z(found.log_likelihood, exact.pop(model.__name__), found.stderr) < bound(N)
    assert largest_z(found.log_likelihood, *exact.values(), found.stderr) > bound(N)


def pixels(x, y, w):
    """Labels and weights, both as long as the data."""
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(y, 1.0))
        pyro.sample("x", dist.Normal(z * w.norm(), 1.0), obs=x)


def of_pixels(x, y, w):
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(x, w.norm()))


def test_each_of_several_tensors_is_read_for_itself():
    x, y, w = torch.randn(3, N)
    assert row_wise((pixels, of_pixels), (x, y), {"w": w}, N, indexed=False).keys == (0, 1)
    assert list(readings((0, 1, "w"))) == [(0, 1, "w"), (0, "w"), (0, 1), (0,)]
    assert len(list(readings(tuple(range(7))))) == 1 + 6 + 1


def mixed(x, w):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
        pyro.sample("x", dist.Normal(z * w.sum(), 1.0), obs=x)


def of_mixed(x, w=None):
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_rows_that_look_at_one_another_stay_together():
    x, w = torch.randn(2, N)
    assert row_wise((mixed, of_mixed), (x, w), {}, N, indexed=False) is None
    assert len(weighing.split_rows(mixed, of_mixed, (x, w), {}, 10**9).calls) == 1
    with pytest.raises(ValueError, match=r"argument 1 \[7\], as long as the 7 rows of the data, fits neither"):
        evaluate(mixed, of_mixed, x, w, num_particles=10, batch_size=3)
    with pytest.raises(ValueError, match=r"score a row alike in any minibatch.*argument 1 \[7\]"):
        Variational(of_mixed_with_param, num_steps=2, batch_size=3).fit(mixed, x, w)


def of_mixed_with_param(x, w=None):
    loc = pyro.param("loc of mixed", torch.tensor(0.0))
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


@pytest.mark.parametrize("model", [shared, per_row])
def test_records_cut_rows_only(monkeypatch, model):
    rows = 40
    x, w = torch.randn(rows), torch.randn(rows) + 0.3
    exact = {}
    for name, loc in (("shared", w.sum()), ("per_row", w)):
        log_p = torch.stack([dist.Normal(z * loc, 1.0).log_prob(x) for z in (0.0, 1.0)])
        exact[name] = (log_p + torch.tensor([[1.2], [0.8]]).log()).mean(0)  # p(z) / q(z)
    monkeypatch.setattr(true_bound, "NUMEL", 2 * 400 * 5)
    for max_rows in (None, 11):
        judge = TrueBound(model, guide, (x, w), {}, lambda args: args, num_samples=400, max_rows=max_rows)
        assert judge.index is not None
        found, stderr = judge()
        means = {name: float(value[judge.index].mean()) for name, value in exact.items()}
        assert abs(found - means.pop(model.__name__)) < bound(1) * stderr
        assert abs(found - next(iter(means.values()))) > bound(1) * stderr


@pytest.mark.parametrize("indexed", [False, True])
def test_minibatches_cut_rows_only(indexed):
    rows, seen = 12, []

    def model(x, w, y, index=None, num_data=None):
        seen.append((len(x), len(w), len(y)))
        scale = pyro.param("scale of rows", torch.tensor(1.0))
        size = len(x) if num_data is None or not indexed else num_data
        g = pyro.sample("g", dist.Normal(0.0, 1.0)) if indexed else 0.0
        with pyro.plate("d", size, subsample=index if indexed else None):
            z = pyro.sample("z", dist.Normal(y + g, 1.0))
            pyro.sample("x", dist.Normal(z * w.sum() * scale, 1.0), obs=x)

    def plain(x, w, y):
        return model(x, w, y)

    def of_model(x, w, y, index=None, num_data=None):
        loc = pyro.param("loc of rows", torch.tensor(0.0))
        if indexed:
            pyro.sample("g", dist.Normal(loc + x.mean(), 1.0))
        with pyro.plate("d", len(x) if not indexed or num_data is None else num_data, subsample=index if indexed else None):
            pyro.sample("z", dist.Normal(loc, 1.0))

    x, w, y = torch.randn(3, rows)
    method = Variational(of_model, Trace_ELBO(), num_steps=3, batch_size=4, num_log_samples=2)
    method.fit(model if indexed else plain, x, w, y)
    assert seen.count((4, rows, 4)) >= 3
    pyro.clear_param_store()


def test_a_network_in_training_mode_still_takes_labels_in_minibatches():
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def model(x, y):
        pyro.module("net of labels", net)
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def of_model(x, y):
        loc = pyro.param("loc of labels", torch.tensor(0.0))
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(y + loc, 1.0))

    x, y = torch.randn(2, 12)
    Variational(of_model, Trace_ELBO(), num_steps=2, batch_size=4).fit(model, x, y)
    pyro.clear_param_store()


def test_nothing_is_compared_where_rows_stay_together():
    net = toy.belief_net(4, 3)
    x, runs = net.sample(9), []

    def model(x):
        runs.append(len(x))
        return net(x)

    encoder = AmortizedMeanField(net)
    assert len(weighing.split_rows(model, encoder, (x,), {}, 10).calls) == 1
    assert set(runs) == {2, 3}
    assert len(weighing.split_rows(model, encoder, (x,), {}, 10, 4).calls) == 3
    assert set(runs) == {2, 3, 9}
