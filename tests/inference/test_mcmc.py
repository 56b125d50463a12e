"""GibbsKernel inside Pyro's MCMC, and MCMC around Pyro's kernels."""

import copy
import pickle
import warnings

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, NUTS
from pyro.infer import MCMC as PyroMCMC
from stats import bound, chains_agree, means_agree

from pyrovae.inference import MCMC, Exact, GibbsKernel
from pyrovae.models import toy

needs_from_pyro = pytest.mark.skipif(not hasattr(arviz, "from_pyro"), reason="ArviZ 1.x has no from_pyro")


def run(kernel, x, num_samples=30, num_chains=1, **kwargs):
    mcmc = PyroMCMC(kernel, num_samples, 5, num_chains=num_chains, disable_progbar=True, mp_context=None, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run(x)
    return mcmc


@pytest.mark.parametrize("max_bytes", [2**28, 0])
def test_kernel_samples_the_posterior(max_bytes):
    """Independent chains of few sweeps each, from exact draws: their means are i.i.d."""
    net = toy.belief_net(5, 3)
    x = net.sample(20)
    exact = Exact().infer(net, x)
    kernel = GibbsKernel(net, max_bytes=max_bytes)
    kernel.setup(0, x)
    after = {}
    for k in range(60):
        start = {"h1": exact.sample(1)["h1"][0]}
        after[k] = kernel.sample(kernel.sample(start))["h1"]
    draws = torch.stack(list(after.values()))  # [60, 20, 3]
    assert means_agree(draws.mean(1), exact.marginals["h1"].mean(0))
    assert not means_agree(draws.mean(1), exact.marginals["h1"].mean(0) + 0.15)
    moved = torch.stack([kernel.sample({"h1": torch.zeros(20, 3)})["h1"] for _ in range(3)])
    assert float(moved.std(0).max()) > 0


@pytest.mark.parametrize("chains", [1, 2])
def test_inside_pyro_mcmc(chains):
    net = toy.belief_net(5, [3, 2])
    x = net.sample(4)
    mcmc = run(GibbsKernel(net), x, num_chains=chains)
    assert {k: tuple(v.shape) for k, v in mcmc.get_samples().items()} == {"h1": (30 * chains, 4, 3), "h2": (30 * chains, 4, 2)}
    grouped = mcmc.get_samples(group_by_chain=True)["h1"]
    assert tuple(grouped.shape) == (chains, 30, 4, 3)
    assert grouped.is_floating_point()
    assert set(grouped.unique().tolist()) == {0.0, 1.0}
    diagnostics = mcmc.diagnostics()
    assert diagnostics["divergences"] == {f"chain {i}": [] for i in range(chains)}
    assert tuple(diagnostics["h1"]["n_eff"].shape) == (4, 3)
    if chains == 2:
        assert not torch.equal(grouped[0], grouped[1])


def test_summary_prints(capsys):
    net = toy.belief_net(5, 2)
    run(GibbsKernel(net), net.sample(2)).summary()
    assert "h1[0,0]" in capsys.readouterr().out


@needs_from_pyro
@pytest.mark.parametrize("chains", [1, 2])
def test_from_pyro(chains):
    net = toy.belief_net(5, 3)
    mcmc = run(GibbsKernel(net), net.sample(4), num_chains=chains)
    data = arviz.from_pyro(mcmc)
    assert data.posterior["h1"].shape == (chains, 30, 4, 3)
    assert {"posterior", "log_likelihood", "sample_stats", "observed_data"} <= set(data.groups())


def test_initial_params_are_honoured():
    """A program that cannot leave its start."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("b", dist.Categorical(torch.eye(2)[a.long()]))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    start = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    initial = {"a": start[0], "b": start[0]}
    samples = run(GibbsKernel(model), torch.zeros(3), initial_params=initial).get_samples()
    assert bool((samples["a"] == start[0]).all())
    initial = {"a": start, "b": start}
    samples = run(GibbsKernel(model), torch.zeros(3), num_chains=2, initial_params=initial).get_samples(group_by_chain=True)
    assert bool((samples["b"] == start.unsqueeze(1)).all())


def test_incomplete_initial_params_are_refused():
    net = toy.belief_net(5, [3, 2])
    x = net.sample(2)
    with pytest.raises(ValueError, match=r"expected initial_params .* 'h2'"):
        run(GibbsKernel(net), x, initial_params={"h1": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"expected initial_params .* \(2, 2\)"):
        run(GibbsKernel(net), x, initial_params={"h1": torch.zeros(2, 3), "h2": torch.zeros(2)})


def test_cleanup_twice_then_again():
    net = toy.belief_net()
    x = net.sample(3)
    kernel = GibbsKernel(net)
    first = run(kernel, x).get_samples()["h1"]
    kernel.cleanup()
    kernel.cleanup()
    second = run(kernel, net.sample(5)).get_samples()["h1"]
    assert (tuple(first.shape), tuple(second.shape)) == ((30, 3, 3), (30, 5, 3))


def test_kernel_pickles_and_copies():
    net = toy.belief_net()
    x = net.sample(3)
    kernel = GibbsKernel(net)
    torch.manual_seed(1)
    expected = run(kernel, x).get_samples()["h1"]
    for other in (pickle.loads(pickle.dumps(kernel)), copy.deepcopy(kernel)):
        torch.manual_seed(1)
        assert torch.equal(run(other, x).get_samples()["h1"], expected)
    kernel.setup(0, x)  # as `MCMC` pickles it to its workers
    pickle.loads(pickle.dumps(kernel))


def test_kernel_refuses_continuous_latents():
    with pytest.raises(ValueError, match="finitely many values"):
        run(GibbsKernel(toy.LinearGaussian()), torch.zeros(3, 3))


def _linear_gaussian():
    torch.manual_seed(5)
    model = toy.LinearGaussian()
    return model, model(batch_size=2).detach()


@pytest.mark.parametrize("kernel", [NUTS, "instance", lambda m: HMC(m, trajectory_length=1.0)])
def test_closed_form_posterior(kernel):
    model, x = _linear_gaussian()
    mean, covariance = (t.detach() for t in model.posterior(x))
    kernel = NUTS(model) if kernel == "instance" else kernel
    posterior = MCMC(kernel, num_samples=256, num_chains=2, warmup_steps=100).infer(model, x)
    assert tuple(posterior.draws["z"].shape) == (2, 256, 2, 2)
    assert posterior.log_evidence is None
    value, stderr = posterior.expectation(lambda s: s["z"])
    # Batch means: 2 x 16 batches.
    z = (value - mean) / stderr
    assert float(z.abs().max()) < bound(z.numel(), 31)
    assert float(((value - mean - 1.0) / stderr).abs().max()) > bound(z.numel(), 31)
    assert torch.allclose(posterior.mean["z"], value)
    squares, stderr = posterior.expectation(lambda s: (s["z"] - mean) ** 2)
    assert float(((squares - covariance.diagonal()) / stderr).abs().max()) < bound(z.numel(), 31)
    assert tuple(posterior.rhat["z"].shape) == (2, 2)
    assert posterior.diagnostics["model_evaluations"] > 256 * 2 * 2
    assert torch.isfinite(posterior.expected_log_joint(model)).all()
    assert posterior.marginals == {}


def test_gibbs_kernel_inside_our_mcmc():
    net = toy.belief_net(5, 2)
    x = net.sample(2)
    posterior = MCMC(GibbsKernel, num_samples=5, num_chains=40, warmup_steps=4).infer(net, x)
    assert chains_agree(posterior.draws["h1"], Exact().infer(net, x).marginals["h1"])
    kernel = GibbsKernel(net, max_bytes=0)
    posterior = MCMC(kernel, num_samples=4, num_chains=2, warmup_steps=1).infer(net, x)
    assert tuple(posterior.draws["h1"].shape) == (2, 4, 2, 2)
    assert kernel.model is net


def test_kernel_of_another_model_is_refused():
    model, x = _linear_gaussian()
    with pytest.raises(ValueError, match="made for another program"):
        MCMC(NUTS(toy.LinearGaussian()), 2, 1, 2).infer(model, x)
    with pytest.raises(ValueError, match="made for another program"):
        MCMC(NUTS(potential_fn=lambda z: z["z"].sum()), 2, 1, 2).infer(model, x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_short_chains(samples):
    model, x = _linear_gaussian()
    posterior = MCMC(NUTS, samples, 2, 2).infer(model, x)
    assert tuple(posterior.draws["z"].shape) == (2, samples, 2, 2)


def test_discrete_sites_that_nuts_sums_out():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(m + 2 * z, 1.0), obs=x)

    posterior = MCMC(NUTS, 8, 1, 8).infer(model, torch.randn(3))
    assert list(posterior.draws) == ["m"]
    assert tuple(posterior.draws["m"].shape) == (1, 8)
    assert posterior.marginals == {}
    with pytest.raises(ValueError, match=r"'z'.* summed out"):
        posterior.expected_log_joint(model)


def test_store_and_parameters_untouched():
    model, x = _linear_gaussian()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.weight.grad = torch.ones_like(model.weight)
    pyro.clear_param_store()
    MCMC(NUTS, 5, 1, 5).infer(model, x)
    assert list(pyro.get_param_store().keys()) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    assert model.bias.grad is None


@pytest.mark.parametrize("arguments", [{"num_samples": 0}, {"num_chains": 0}, {"warmup_steps": -1}])
def test_numbers_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected num_samples >= 1"):
        MCMC(NUTS, **arguments)
