"""AIS against sums over all states and closed forms; a wrong weight, base or reverse start is noticed."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from stats import bound, chains_agree, means_agree

from pyrovae import models
from pyrovae.compare import compare
from pyrovae.distributions import RBM, BoltzmannMachine
from pyrovae.inference import AIS, Exact, Gibbs
from pyrovae.inference.ais.interval import normal_interval
from pyrovae.inference.ais.posterior import make_path
from pyrovae.inference.weighing import draw
from pyrovae.models import DeepBeliefNet, RestrictedBoltzmannMachine, toy

BETAS = (0.0, 0.2, 0.6, 1.0)
CHAINS = 3000


def rbm(visible=6, hidden=4, scale=1.0):
    return RBM(torch.randn(visible, hidden) * scale, torch.randn(visible) * scale, torch.randn(hidden) * scale)


def skewed(x=None, *, batch_size=1):
    """A positive and a real latent with closed evidence: log u + v + noise."""
    with pyro.plate("data", batch_size if x is None else len(x)):
        u = pyro.sample("u", dist.LogNormal(0.0, 1.0))
        with pyro.plate("two", 2, dim=-2):
            v = pyro.sample("v", dist.Normal(0.0, 0.5))
        return pyro.sample("x", dist.Normal(u.log() + v.sum(-2, keepdim=True), 0.7), obs=x)


def mixed(x=None, *, batch_size=1):
    """A category, a point on a segment and their sum."""
    with pyro.plate("data", batch_size if x is None else len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(2.0 * k + z, 0.6), obs=x)


def mixed_evidence(x):
    parts = [math.log(p) + dist.Normal(2.0 * k, math.sqrt(1.36)).log_prob(x) for k, p in enumerate((0.2, 0.3, 0.5))]
    return torch.logsumexp(torch.stack(parts), 0)


def cases():
    net, layers, mixture, linear = (
        toy.belief_net(4, 3),
        toy.belief_net(3, [2, 2]),
        toy.Mixture(4, 3),
        toy.LinearGaussian(3, 2, scale=2.0),
    )
    exact, deep = Exact(), DeepBeliefNet(4, [3, 2])
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.normal_()
    return {
        "bits": (net, net.sample(3), lambda x: exact.infer(net, x).log_evidence),
        "layers": (layers, layers.sample(3), lambda x: exact.infer(layers, x).log_evidence),
        "deep": (deep, deep.sample(3), lambda x: exact.infer(deep, x).log_evidence),
        "categories": (mixture, mixture(batch_size=3).detach(), lambda x: exact.infer(mixture, x).log_evidence),
        "continuous": (linear, linear(batch_size=3).detach(), lambda x: linear.log_evidence(x).detach()),
        "positive, in plates": (skewed, torch.tensor([-1.0, 0.5, 2.0]), lambda x: dist.Normal(0.0, 1.99**0.5).log_prob(x)),
        "mixed": (mixed, torch.tensor([0.1, 2.5, 7.0]), mixed_evidence),
    }


NAMES = ["bits", "layers", "deep", "categories", "continuous", "positive, in plates", "mixed"]


def path_of(model, x, *, num_leapfrog=3, step_size=0.4, declared=True):
    return make_path(AIS(num_leapfrog=num_leapfrog, step_size=step_size, declared=declared), model, (x,), {})


def weights(model, x, *, after=False, declared=True):
    """Weights of few temperatures, or, wrongly, those of the states after each move."""
    with torch.no_grad():
        path = path_of(model, x, declared=declared)
        path.start(draw(model, path.log_joint, CHAINS).states)
        if not after:
            return path.forward(BETAS)
        log_w = torch.zeros(CHAINS, len(x))
        for low, high in itertools.pairwise(BETAS):
            path._move(high)
            log_w += (high - low) * path._likelihood
        return log_w


ROUTES = [(name, True) for name in NAMES] + [("bits", False), ("layers", False), ("deep", False)]


@pytest.mark.parametrize(("name", "declared"), ROUTES)
def test_the_mean_weight_is_the_evidence(name, declared):
    with pyro.poutine.block():
        model, x, evidence = cases()[name]
        assert means_agree(torch.exp(weights(model, x, declared=declared) - evidence(x)), torch.ones(3))
        assert not means_agree(torch.exp(weights(model, x, after=True, declared=declared) - evidence(x)), torch.ones(3))


@pytest.mark.parametrize(("name", "declared"), [route for route in ROUTES if "plates" not in route[0]])
def test_moves_leave_the_posterior_invariant(name, declared):
    """At β = 1, from exact draws (a model's own latents and data), the moves keep E[z z'], and data stay as likely."""
    with pyro.poutine.block(), torch.no_grad():
        model, _, _ = cases()[name]
        trace = pyro.poutine.trace(model).get_trace(batch_size=CHAINS)
        x = trace.nodes["x"]["value"]
        path = path_of(model, x, declared=declared)
        path.start({s.name: trace.nodes[s.name]["value"][None] for s in path.structure.latents})
        before = path._likelihood[0].clone()
        for _ in range(3):
            path._move(1.0)
        assert not torch.equal(before, path._likelihood[0])
        assert means_agree(path._likelihood[0] - before, 0.0)
        for _ in range(6):
            path._move(0.3)  # another density is left towards
        assert not means_agree(path._likelihood[0] - before, 0.0)


def test_posterior_of_weighted_draws():
    model = toy.LinearGaussian(3, 2)
    x = model(batch_size=4).detach()
    posterior = AIS(300, 12, num_leapfrog=3).infer(model, x)
    mean, covariance = (t.detach() for t in model.posterior(x))
    value, stderr = posterior.expectation(lambda z: z["z"])
    assert float(((value - mean).abs() / stderr).max()) < 6
    assert float((posterior.variance["z"] - covariance.diagonal()).abs().max()) < 0.25
    assert bool((posterior.log_evidence - model.log_evidence(x)).abs().lt(6 * posterior.stderr).all())
    assert posterior.diagnostics["acceptance"].shape == (4,)
    assert bool((posterior.diagnostics["acceptance"] - 0.65).abs().lt(0.25).all())
    few = AIS(300, 2, num_leapfrog=3).infer(model, x)  # plain importance sampling from the prior
    assert bool((few.diagnostics["ess"] < posterior.diagnostics["ess"]).all())


@pytest.mark.parametrize("name", ["bits", "continuous", "mixed"])
def test_reverse_weights_of_simulated_data_bound_from_above(name):
    with pyro.poutine.block(), torch.no_grad():
        model, _, evidence = cases()[name]
        found = AIS(2, schedule=torch.tensor(BETAS), step_size=0.4, num_leapfrog=3).sandwich_simulated(model, 1500)
        exact = evidence(found.data)
        assert means_agree(torch.exp(found.forward - exact), 1.0)
        assert means_agree(torch.exp(exact - found.reverse), 1.0)
        assert float((found.reverse - exact).mean()) > 0 > float((found.forward - exact).mean())
        outside = (exact < found.lower) | (exact > found.upper)
        assert float(outside.double().mean()) <= 1 - found.confidence
        if name == "continuous":  # chains that hardly move, from a state of no interest
            path = path_of(model, found.data[:3], num_leapfrog=1, step_size=1e-3)
            latents = path.log_joint.structure.latents
            path.start({s.name: torch.zeros(CHAINS, *s.batch_shape, *s.event_shape) for s in latents})
            assert not means_agree(torch.exp(exact[:3] - path.backward(BETAS)), torch.ones(3))


@pytest.mark.parametrize("base", [None, "uniform", "tensor", "data"])
def test_log_partition(base):
    target = rbm()
    data = (torch.rand(30, 6) < 0.3).double() if base == "data" else None
    found = AIS(500, 30, base=torch.ones(6) if base == "tensor" else base if base != "data" else None).log_partition(
        target, data
    )
    exact = target.log_partition()
    assert found.log_weights.shape == (500,)
    assert found.log_weights.dtype == found.log_z.dtype == torch.float64
    assert abs(float(found.log_z - exact)) < 6 * float(found.stderr)
    assert float(found.lower) < float(found.log_z) < float(found.upper)
    assert float(found.lower_bound(0.999)) < float(found.lower_bound(0.9)) < float(found.log_z)
    assert 1 < float(found.ess) <= 500
    assert found.num_temperatures == 30
    assert (found.bound, found.bound_on_log_prob) == ("lower", "upper")


def test_targets():
    j = torch.randn(5, 5).triu(1)
    machine = BoltzmannMachine(j + j.T, torch.randn(3, 5))
    found = AIS(300, 40).log_partition(machine)
    assert found.log_z.shape == found.ess.shape == (3,)
    assert bool((found.log_z - machine.log_partition()).abs().lt(6 * found.stderr).all())
    both = AIS(300, 40).sandwich(machine, num_exact=200)
    assert bool((both.lower <= machine.log_partition()).all())
    assert bool((both.upper >= machine.log_partition()).all())
    assert bool((both.upper - both.lower < 0.5).all())
    model = RestrictedBoltzmannMachine(6, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    estimate = AIS(300, 20).log_partition(model)
    assert abs(float(estimate.log_z - model.distribution().log_partition().detach())) < 6 * float(estimate.stderr) + 1e-9
    assert not estimate.log_z.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for wrong in (torch.zeros(3), 3, AIS):
        with pytest.raises(TypeError, match="expected an RBM"):
            AIS(10, 10).log_partition(wrong)


def test_sandwich_of_an_rbm_and_where_it_is_refused():
    target = rbm(8, 5)
    both = AIS(200, 100).sandwich(target)
    exact = float(target.log_partition())
    assert float(both.lower) < exact < float(both.upper)
    assert float(both.upper - both.lower) < 0.5
    assert torch.allclose(both.gap, both.reverse - both.forward)
    with pytest.raises(ValueError, match=r"expected at most 30 bits .* bytes; use AIS\.log_partition .* raise max_bits"):
        AIS(10, 10).sandwich(RBM(torch.zeros(40, 45), torch.zeros(40), torch.zeros(45)))
    with pytest.raises(ValueError, match="expected num_exact >= 1"):
        AIS(10, 10).sandwich(target, num_exact=0)


def test_intervals_of_skewed_weights():
    log_w = 1.5 * torch.randn(100, 1500) - 1.125  # E[w] = 1
    lower, upper = normal_interval(log_w, 3.0)
    misses = float(((lower > 0) | (upper < 0)).double().mean())
    top = log_w.amax(0)
    w = torch.exp(log_w - top)
    plain = float((top + (w.mean(0) + 3 * w.std(0) / 10).log() < 0).double().mean())
    assert misses < 0.02 < plain  # nominal 0.0027
    wild = torch.tensor([0.0, -50.0, -60.0, -70.0])
    lower, upper = normal_interval(wild, 3.0)
    assert math.isfinite(float(lower))
    assert float(upper) >= float(torch.logsumexp(wild, 0)) - math.log(4)


def test_untrustworthy_estimates_warn():
    with pytest.warns(UserWarning, match=r"effective sample size down to \d\.\d of 100 chains"):
        AIS(100, 2).log_partition(rbm(30, 20, 3.0))
    model = toy.LinearGaussian(30, 6, scale=0.1)
    with pytest.warns(UserWarning, match=r"effective sample size down to .* for \d of 3"):
        AIS(60, 2, step_size=0.1).infer(model, model(batch_size=3).detach())


def test_data_of_the_visible_units_alone_set_the_base_of_a_boltzmann_machine():
    model, data = models.BoltzmannMachine(6, 2), (torch.rand(50, 6) < 0.3).double()
    found, machine = AIS(200, 100).log_partition(model, data), model.distribution()
    truth = float(machine.log_partition().detach())
    assert float(found.lower) - 1e-9 <= truth <= float(found.upper) + 1e-9
    logits = torch.cat((torch.logit((data.sum(0) + 5) / 60), model.distribution().parameters[-1].detach()[6:]))
    assert torch.allclose(found.log_z_base, torch.nn.functional.softplus(logits).sum(), rtol=0, atol=1e-10)
    for width in (9, 0):
        with pytest.raises(ValueError, match=r"expected data \[N, <= 8\] within"):
            AIS(10, 10).log_partition(model, torch.ones(5, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_interval_is_never_narrower_than_rounding(dtype):
    tensors = [torch.full(shape, 0.3, dtype=dtype) for shape in ((6, 4), (6,), (4,))]
    tensors[0].zero_()  # the base is the model: all weights agree
    found = AIS(50, 20).log_partition(RBM(*tensors))
    width, ulp = float(found.upper - found.lower), torch.finfo(dtype).eps * float(found.log_z)
    assert 2 * ulp < width < 100 * ulp
    truth = 10 * math.log1p(math.exp(float(tensors[1][0])))
    assert float(found.lower) < truth < float(found.upper)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_chains_are_of_the_type_and_device_of_the_latents(device):
    def model(x=None, *, batch_size=1):
        like = torch.zeros(batch_size if x is None else len(x), dtype=torch.float32, device=device)
        with pyro.plate("data", len(like), device=device):
            z = pyro.sample("z", dist.Normal(like, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(3, device=device, dtype=torch.float32)
    path = make_path(AIS(4, 3), model, (x,), {})
    path.prepare((0.0, 0.5, 1.0), 4)
    assert {(step.dtype, step.device.type) for _, step in path._steps} == {(torch.float32, device)}
    posterior = AIS(20, 10).infer(model, x)
    assert posterior.log_evidence.device.type == device


def test_bad_settings():
    for settings, message in (
        ({"num_chains": 1}, "num_chains >= 2"),
        ({"num_temperatures": 1}, "num_temperatures >= 2"),
        ({"schedule": "cubic"}, "schedule 'linear'"),
        ({"schedule": torch.tensor([0.0, 0.5, 0.5, 1.0])}, "increases strictly from 0 to 1"),
        ({"schedule": torch.tensor([0.1, 1.0])}, "increases strictly from 0 to 1"),
        ({"schedule": torch.tensor([0.0, float("nan"), 1.0])}, "increases strictly from 0 to 1"),
        ({"schedule": torch.tensor([0.0, 1.0]), "num_temperatures": 3}, "num_temperatures=2"),
        ({"step_size": 0.0}, "step_size > 0"),
        ({"sigmas": 0.0}, "sigmas > 0"),
        ({"num_leapfrog": 0}, "num_leapfrog >= 1"),
    ):
        with pytest.raises(ValueError, match=f"expected .*{message}"):
            AIS(**settings)
    for base in ("data", torch.zeros(3)):
        with pytest.raises(ValueError, match="expected base"):
            AIS(10, 10, base=base).log_partition(rbm())
    with pytest.raises(ValueError, match="expected data"):
        AIS(10, 10).log_partition(rbm(), torch.full((5, 6), 255.0))
    with pytest.raises(ValueError, match=r"expected data \[N, 6\]"):
        AIS(10, 10).log_partition(rbm(), torch.ones(5, 4))
    with pytest.raises(ValueError, match="expected data or a base"):
        AIS(10, 10, base="uniform").log_partition(rbm(), torch.ones(5, 6))
    broken = RBM(torch.full((3, 2), math.nan), torch.zeros(3), torch.zeros(2), validate_args=False)
    with pytest.raises(ValueError, match="expected finite W"):
        AIS(10, 10).log_partition(broken)
    huge = RBM(torch.full((3, 2), 1e308), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="expected finite log weights"):
        AIS(10, 10).log_partition(huge)


def test_bad_programs():
    def empty(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def together(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.mean(-1, keepdim=True), 1.0), obs=x)

    with pytest.raises(ValueError, match="expected a program with latent and observed sites"):
        AIS(10, 5).infer(empty, torch.zeros(3))
    with pytest.raises(ValueError, match="rows"):
        AIS(10, 5).infer(together, torch.zeros(3))
    deep = DeepBeliefNet(4, [3, 2], max_bits=1)
    with pytest.raises(ValueError, match="expected a prior that can be drawn from exactly"):
        AIS(10, 5).infer(deep, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="expected a site 'y'"):
        AIS(10, 5).sandwich_simulated(mixed, 3, observation="y")


def test_schedules():
    assert AIS().num_temperatures == 1000
    betas = torch.tensor(AIS(num_temperatures=101, schedule="sigmoid").betas)
    steps = betas.diff()
    assert float(betas[0]) == 0
    assert float(betas[-1]) == 1
    assert bool((steps > 0).all())
    assert torch.allclose(steps, steps.flip(0))
    assert float(steps[0]) < float(steps[50])
    assert AIS(schedule=torch.tensor(BETAS)).num_temperatures == 4


def test_compare_says_what_it_is():
    net = toy.belief_net(4, 2)
    found = compare(net, net.sample(5), {"AIS": AIS(300, 10), "exact": Exact()})
    row = found.table.set_index("method").loc["AIS"]
    assert row["bound"] == "lower"
    assert row["note"] == "lower bound in expectation"
    assert abs(row["gap"]) < 6 * row["gap_se"]


@pytest.mark.parametrize("make", [lambda: RestrictedBoltzmannMachine(6, 4), lambda: models.BoltzmannMachine(4, 3)])
def test_an_undirected_model_has_its_partition_annealed(make):
    """log p(x) by log Ẑ, the same error for all rows; the posterior is the exact one."""
    torch.manual_seed(3)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.0)
    x = model.sample(5)
    exact, found = Exact(declared=False).infer(model, x), AIS(200, 200).infer(model, x)
    assert found.bound == "upper"
    error = found.log_evidence - exact.log_evidence
    assert torch.allclose(error, error[:1].expand(5), atol=1e-10)
    assert float(error[0].abs() / found.stderr[0]) < bound(1, 199)
    assert float(error[0].abs()) > 0
    assert torch.allclose(found.marginals["h1"], exact.marginals["h1"], atol=1e-10)


def test_a_large_machine_has_an_upper_bound_and_a_posterior():
    model = RestrictedBoltzmannMachine(50, 45)
    with torch.no_grad():
        model.weight.normal_(0, 0.3)
    x = model.sample(4)
    found = AIS(20, 50).infer(model, x)
    assert torch.isfinite(found.log_evidence).all()
    assert found.diagnostics["partition"].log_z > 0
    p = torch.sigmoid(model.hidden_bias + x @ model.weight).detach()
    assert torch.allclose(found.marginals["h1"], p)
    assert chains_agree(Gibbs(200, 10).infer(model, x).draws["h1"], p)
