"""to_arviz on either generation of ArviZ: names, dims and values, so that nothing is silently wrong."""

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrovae.guides import LocalMeanField
from pyrovae.inference import Exact, Gibbs, Importance, Variational
from pyrovae.inference.arviz import effective_sample_size, pareto_k, split_rhat
from pyrovae.models import toy

FIRST = int(arviz.__version__.split(".")[0]) == 0


def variables(group):
    return sorted(str(name) for name in group.data_vars)


def test_chains():
    net = toy.belief_net(5, [3, 2])
    posterior = Gibbs(13, 3, 2).infer(net, net.sample(4))
    data = posterior.to_arviz()
    group = data["posterior"]
    assert variables(group) == ["h1", "h2"]
    assert group["h1"].dims[:2] == ("chain", "draw")
    assert group["h1"].shape == (3, 13, 4, 3)
    assert np.array_equal(group["h1"].values, posterior.draws["h1"].numpy())
    assert group["h1"].dtype.kind == "f"
    assert group.attrs["bound"] == "estimate"
    names = data.groups() if FIRST else list(data.children)
    assert "evidence" not in names


@pytest.mark.parametrize("method", ["exact", "variational", "importance"])
def test_independent_draws(method):
    net = toy.belief_net(5, 3)
    x = net.sample(4)
    guide = LocalMeanField(net, 4)
    method = {"exact": Exact(), "variational": Variational(guide, num_samples=9), "importance": Importance(guide, 9)}[method]
    posterior = method.infer(net, x)
    data = posterior.to_arviz(num_draws=17)
    group = data["posterior"]
    assert variables(group) == ["h1"]
    assert group["h1"].dims[0] == "sample"
    assert "chain" not in group["h1"].dims
    assert group["h1"].shape == (17, 4, 3)
    assert set(np.unique(group["h1"].values)) <= {0.0, 1.0}
    assert group.attrs["bound"] == posterior.bound
    assert np.array_equal(data["evidence"]["log_evidence"].values, posterior.log_evidence.numpy())


def test_one_evidence_for_the_data_set():
    def model(x):
        g = pyro.sample("g", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    data = Exact().infer(model, torch.randn(3)).to_arviz(num_draws=5)
    assert data["evidence"]["log_evidence"].shape == ()
    assert data["posterior"]["g"].shape == (5,)


def test_summaries_of_arviz_take_it():
    net = toy.belief_net(4, 2)
    posterior = Gibbs(50, 2, 2).infer(net, net.sample(2))
    table = arviz.summary(posterior.to_arviz())
    assert len(table) == 4
    rhat = np.asarray(table["r_hat"], dtype=float)
    assert np.allclose(rhat, posterior.rhat["h1"].numpy().flatten(), atol=0.011, equal_nan=True)


def test_netcdf(tmp_path):
    pytest.importorskip("h5netcdf")
    pytest.importorskip("h5py")
    net = toy.belief_net(4, 2)
    posterior = Gibbs(5, 2, 2).infer(net, net.sample(2))
    path = tmp_path / "posterior.nc"
    posterior.to_arviz().to_netcdf(path, engine="h5netcdf")
    read = arviz.from_netcdf(path)
    assert np.array_equal(read["posterior"]["h1"].values, posterior.draws["h1"].numpy())


def test_statistics_of_chains():
    draws = torch.randn(4, 100, 3, 2)
    draws[..., 1, 0] = 7.0
    draws[:2, :, 2, 1] += 5.0
    ess, rhat = effective_sample_size(draws), split_rhat(draws)
    assert ess.shape == rhat.shape == (3, 2)
    assert torch.equal(torch.isnan(ess), torch.isnan(rhat))
    assert torch.equal(torch.isnan(ess).nonzero(), torch.tensor([[1, 0]]))
    assert float(rhat[2, 1]) > 1.5 > 1.1 > float(rhat[0, 0])
    assert float(ess[2, 1]) < 20 < 100 < float(ess[0, 0])


@pytest.mark.parametrize(("chains", "draws"), [(1, 100), (1, 3), (4, 3), (4, 1)])
def test_too_few_for_rhat(chains, draws, caplog, capsys):
    """NaN, and no word of ArviZ's in the log or on the screen."""
    states = torch.randn(chains, draws, 5)
    assert bool(torch.isnan(split_rhat(states)).all())
    assert bool(torch.isnan(effective_sample_size(states)).all()) == (draws < 4)
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_pareto_k():
    """A generalised Pareto tail of known shape is found; equal weights have none; zero weights are no draws."""
    torch.manual_seed(2)
    k = torch.tensor([0.2, 0.9])
    u = torch.rand(20_000, 2)
    found = pareto_k(-k * torch.log(u))
    assert float((found - k).abs().max()) < 0.25
    assert float(found[1] - found[0]) > 0.4
    assert bool(torch.isneginf(pareto_k(torch.full((50, 3), -4.0))).all())
    assert bool(torch.isposinf(pareto_k(torch.full((50, 1), -torch.inf))).all())
    assert pareto_k(torch.randn(50)).shape == ()
