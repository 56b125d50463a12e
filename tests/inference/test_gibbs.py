"""Gibbs: its transition kernel against one built by hand, its marginals, its refusals, and the draws it returns."""

import itertools
import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import BruteForce
from gibbs_kernel import kernel_agrees
from programs import CASES
from pyro import poutine
from stats import bound, chains_agree, frequencies_agree, largest_z
from torch import nn

from pyrovae.inference import Exact, Gibbs
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mcmc.gibbs import make_sweep, uniform_codes
from pyrovae.inference.mcmc.sweeps import ProgramSweep, TableSweep
from pyrovae.models import toy

NAMES = [
    "one_bit_normal",
    "one_layer",
    "two_layers_probs",
    "categorical_vector",
    "one_hot_categorical_likelihood",
    "binomial_latent",
    "mixed_sites_mixture_likelihood",
    "deterministic_and_factor",
    "no_plate",
    "global_and_local",
    "two_globals_and_local",
    "nested_words_right",
    "explicit_dim_on_the_left",
    "two_batch_plates",
    "masked_rows_with_nan",
    "uniform_scale",
    "explicit_subsample",
    "concatenates_two_latents",
    "per_row_parameters",
    "certain_and_impossible_probs",
    "infinite_logits",
    "impossible_between_layers",
    "function_with_pyro_module",
    "bare_param_with_constraint",
]


def table_or_program(case, chains, max_bytes):
    with torch.no_grad():
        log_joint = LogJoint(case.program, case.args, {})
        return make_sweep(log_joint, chains, max_bytes)[0]


@pytest.mark.parametrize("path", ["table", "program"])
@pytest.mark.parametrize("name", NAMES)
def test_sweep_is_the_product_of_conditionals(name, path):
    case = CASES[name]()
    brute = BruteForce(case.program, case.args, case.values, case.batch).solve()
    n = max(200, 10_000 // len(brute.states) ** 2)
    sweep = table_or_program(case, n * len(brute.states), 2**28 if path == "table" else 0)
    latents = sweep.latents
    if path == "program":
        assert isinstance(sweep, ProgramSweep)
    elif len({latent.plate_dims for latent in latents}) == 1:
        assert isinstance(sweep, TableSweep)
    assert kernel_agrees(sweep, brute, latents, n)


@pytest.mark.parametrize("path", ["table", "program"])
def test_posterior_is_invariant_and_a_wrong_conditional_is_caught(path):
    case = CASES["one_layer"]()
    brute = BruteForce(case.program, case.args, case.values, case.batch).solve()
    n = 8_000
    posterior = Exact().infer(case.program, *case.args)
    starts = {"h1": posterior.structure.latents[0].encode(posterior.sample(n)["h1"])}

    def after(sweep):
        sweep.start(starts)
        sweep.sweep()
        return {"h1": sweep.latents[0].decode(sweep.present()["h1"].long())}

    sweep = table_or_program(case, n, 2**28 if path == "table" else 0)
    z, limit = brute.largest_z(after(sweep))
    assert z < limit
    if path == "table":
        sweep.table = sweep.table**0.2
    else:
        with torch.no_grad():
            case.parameters[0].mul_(0.2)
    z, limit = brute.largest_z(after(sweep))
    assert z > limit
    assert not kernel_agrees_of(sweep, case, brute)


def kernel_agrees_of(sweep, case, brute):
    n = 1000
    fresh = table_or_program(case, n * len(brute.states), 2**28 if isinstance(sweep, TableSweep) else 0)
    if isinstance(fresh, TableSweep):
        fresh.table = sweep.table
    return kernel_agrees(fresh, brute, fresh.latents, n)


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_program_sweep_carries_the_log_joint_of_its_state(name, chains):
    case = CASES[name]()
    with torch.no_grad():
        sweep = table_or_program(case, chains, 0)
        sweep.start({latent.name: uniform_codes(latent, chains) for latent in sweep.latents})
        for _ in range(5):
            sweep.sweep()
            fresh = sweep._terms(sweep.codes)
            for site, term in sweep.current.items():
                assert torch.allclose(
                    *torch.broadcast_tensors(term.table, fresh[site].table), rtol=1e-12, atol=1e-12, equal_nan=True
                ), site


@pytest.mark.parametrize("max_bytes", [2**28, 0])
@pytest.mark.parametrize("name", ["one_layer", "impossible_between_layers", "categorical_vector", "global_and_local"])
def test_marginals_against_exact(name, max_bytes):
    case = CASES[name]()
    exact = Exact().infer(case.program, *case.args)
    # Many chains, each one estimate: their spread is the Monte-Carlo error, whatever the autocorrelation.
    posterior = Gibbs(40, 200, 30, max_bytes=max_bytes).infer(case.program, *case.args)
    for latent in posterior.structure.latents:
        draws = posterior.draws[latent.name]
        if latent.kind == "integer":
            draws = nn.functional.one_hot(draws.long() - latent.low, latent.cardinality)
        if name == "impossible_between_layers":  # its two modes are not connected by single changes
            assert ((exact.marginals[latent.name] == 0) <= (posterior.marginals[latent.name] == 0)).all()
            continue
        assert chains_agree(draws, exact.marginals[latent.name])
        assert not chains_agree(draws, 0.9 * exact.marginals[latent.name])
        assert torch.allclose(posterior.marginals[latent.name], draws.double().mean((0, 1)), atol=1e-12)
        mean, stderr = posterior.expectation(lambda z: z[latent.name])  # noqa: B023
        assert torch.allclose(mean, posterior.mean[latent.name])
        assert stderr.shape == mean.shape


def test_draws_their_shapes_and_codes():
    net = toy.belief_net(5, [3, 2])
    x = net.sample(7)
    posterior = Gibbs(11, 3, 2).infer(net, x)
    assert posterior.log_evidence is None
    assert posterior.bound == "estimate"
    assert {k: tuple(v.shape) for k, v in posterior.draws.items()} == {"h2": (3, 11, 7, 2), "h1": (3, 11, 7, 3)}
    assert {v.dtype for v in posterior.codes.values()} == {torch.uint8}
    assert posterior.draws["h1"].dtype == torch.get_default_dtype()
    assert {k: tuple(v.shape) for k, v in posterior.sample(4).items()} == {"h2": (4, 7, 2), "h1": (4, 7, 3)}
    assert tuple(posterior.rhat["h1"].shape) == (7, 3)
    chain_by_chain = posterior.codes["h1"].reshape(3, 11, 7, 3)
    assert torch.equal(chain_by_chain.double(), posterior.draws["h1"])


@pytest.mark.parametrize("max_bytes", [2**28, 0])
def test_chain_by_chain(max_bytes):
    """A chain that cannot move stays where it began: chains are not mixed up with draws."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("b", dist.Categorical(torch.eye(2)[a.long()]))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    posterior = Gibbs(9, 12, 3, max_bytes=max_bytes).infer(model, torch.zeros(5))
    draws = posterior.draws
    assert torch.equal(draws["a"], draws["b"].double())
    assert bool((draws["a"] == draws["a"][:, :1]).all())
    assert 0 < float(draws["a"].mean()) < 1


def test_rhat_and_ess_are_arviz_own():
    net = toy.belief_net(6, 3)
    posterior = Gibbs(100, 4, 5).infer(net, net.sample(3))
    array = posterior.draws["h1"].numpy()
    for n, j in itertools.product(range(3), range(3)):
        assert math.isclose(float(posterior.rhat["h1"][n, j]), float(arviz.rhat(array[:, :, n, j])), rel_tol=1e-12)
        assert math.isclose(float(posterior.ess["h1"][n, j]), float(arviz.ess(array[:, :, n, j])), rel_tol=1e-12)


def test_diagnostics_of_what_never_changes_are_nan():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.0, 0.5, 1.0])).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    posterior = Gibbs(30, 2, 5).infer(model, torch.zeros(2))
    assert torch.equal(torch.isnan(posterior.rhat["z"]), torch.tensor([[True, False, True]] * 2))
    assert torch.equal(torch.isnan(posterior.ess["z"]), torch.tensor([[True, False, True]] * 2))


def test_same_seed_same_draws():
    net = toy.belief_net()
    x = net.sample(4)
    for max_bytes in (2**28, 0):
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(Gibbs(20, 2, 1, max_bytes=max_bytes).infer(net, x).draws["h1"])
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])


def test_table_and_program_paths_are_told():
    net = toy.belief_net()
    x = net.sample(4)
    table = Gibbs(3, 2, 1).infer(net, x)
    program = Gibbs(3, 2, 1, max_bytes=0, declared=False).infer(net, x)
    assert (table.diagnostics["route"], program.diagnostics["route"]) == ("table", "program")
    assert (table.diagnostics["tabulated"], program.diagnostics["tabulated"]) == (True, False)
    assert table.diagnostics["model_evaluations"] == 8 * 4
    assert program.diagnostics["model_evaluations"] == 3 * 2 * 4 * 4  # bits x chains x rows x sweeps


def test_forty_bits_run():
    net = toy.belief_net(10, 40)
    x = net.sample(3)
    posterior = Gibbs(4, 2, 1).infer(net, x)
    assert not posterior.diagnostics["tabulated"]
    assert posterior.expected_log_joint(net).shape == (3,)
    assert torch.isfinite(posterior.q_function(net)())


def test_float32_far_from_the_mode():
    """States hundreds of nats below the best one are still told apart: a chain that starts there climbs."""
    with torch.no_grad():
        net = toy.belief_net(700, 8).float()
        for parameter in net.parameters():
            parameter.mul_(3)
        x = net.sample(3)
        exact = Exact().infer(net, x)
        best = exact.log_prob(exact.sample(20)) + exact.log_evidence
        for max_bytes in (2**28, 0):
            posterior = Gibbs(1, 20, 10, max_bytes=max_bytes).infer(net, x)
            reached = posterior.log_joint(posterior._at(slice(None)))  # [K, rows]
            assert float((best.mean(0) - reached.mean(0)).max()) < 100


def _continuous(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _branches(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
        shift = 3.0 if (z > 0).all() else 0.0
        pyro.sample("x", dist.Normal(z.sum(-1) + shift, 1.0), obs=x)


def _rows_mix(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
        centred = z - z.mean(-2, keepdim=True)
        pyro.sample("x", dist.Normal(centred.sum(-1), 1.0), obs=x)


def _outside(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.sum())


def _dropout(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(3)).to_event(1))
        pyro.sample("x", dist.Normal(nn.functional.dropout(z, 0.5, training=True).sum(-1), 1.0), obs=x)


@pytest.mark.parametrize("max_bytes", [2**28, 0])
@pytest.mark.parametrize("model", [_continuous, _branches, _rows_mix, _outside, _dropout])
def test_refusals(model, max_bytes):
    with pytest.raises(ValueError, match=r"expected .* got"):
        Gibbs(3, 2, 1, max_bytes=max_bytes).infer(model, torch.randn(4))


@pytest.mark.parametrize("max_bytes", [2**28, 0])
def test_a_log_joint_that_is_no_number_is_refused(max_bytes):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(1e-9))
            pyro.factor("energy", torch.log(0.5 - z))

    with pytest.raises(ValueError, match=r"expected log p\(x, z\) .* got NaN"):
        Gibbs(3, 2, 1, max_bytes=max_bytes).infer(model, torch.zeros(2))


def test_impossible_data_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Categorical(logits=torch.tensor([0.0, -math.inf])), obs=x)

    with pytest.raises(ValueError, match="probability 0"):
        Gibbs(3, 2, 1).infer(model, torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize("arguments", [{"num_samples": 0}, {"num_chains": 0}, {"warmup_steps": -1}, {"max_bytes": -1}])
def test_numbers_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected num_samples >= 1"):
        Gibbs(**arguments)


def test_scale_and_subsample_do_not_enter():
    net = toy.belief_net()
    x = net.sample(5)
    plain = Gibbs(400, 100, 20).infer(net, x)
    other = Gibbs(400, 100, 20).infer(poutine.scale(net, scale=0.1), x, index=torch.arange(5), num_data=50)
    exact = Exact().infer(net, x).mean["h1"]
    assert chains_agree(plain.draws["h1"], exact)
    assert chains_agree(other.draws["h1"], exact)


def test_helpers_are_sharp():
    z = torch.randn(10_000, 3)
    assert largest_z(z.mean(0), torch.zeros(3), 0.01) < bound(3)
    assert largest_z(z.mean(0) + 0.1, torch.zeros(3), 0.01) > bound(3)
    assert frequencies_agree([5000, 5000], 10_000, [0.5, 0.5])
    assert not frequencies_agree([5400, 4600], 10_000, [0.5, 0.5])
    assert not frequencies_agree([1, 9999], 10_000, [0.0, 1.0])
