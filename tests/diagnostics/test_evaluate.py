"""evaluate: every bound against enumeration, closed form or quadrature, and every check against a wrong value."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import BruteForce, bits, integers, one_hots
from pyro import poutine
from stats import bound, largest_z
from torch import nn

from pyrovae.diagnostics import evaluate
from pyrovae.distributions import CrossEntropy
from pyrovae.guides import AmortizedMeanField, AmortizedStructured, LocalMeanField, embed, reconstruct
from pyrovae.handlers import discretize, relax, scale_kl, surrogate
from pyrovae.inference import Exact, Importance
from pyrovae.inference.log_joint import LogJoint
from pyrovae.models import HierarchicalVAE, toy

N = 7
K = 4000


@pytest.fixture(scope="module")
def net():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    model = toy.belief_net(5, [3, 2])
    guide = LocalMeanField(model, N)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_()
    x = model.sample(N)
    return model, guide, x, enumerated(model, guide, x)


def enumerated(model, guide, x):
    """ELBO, evidence and KL of each bit by listing the states, for a factorised q of bits."""
    q = {name: site["fn"].base_dist.probs.detach() for name, site in sites_of(guide, x).items()}
    force = BruteForce(model, (x,), {"h2": bits(2), "h1": bits(3)}).solve()
    log_q = sum(bernoulli(force.z[name], q[name]).sum(-1) for name in q)
    weights = log_q.exp()
    kl = {}
    for name in q:
        priors = torch.sigmoid(model.prior.detach()).expand(2**5, N, 2)
        if name == "h1":
            priors = torch.sigmoid(model.biases[1] + force.z["h2"] @ model.weights[1]).detach()
        kl[name] = (weights.unsqueeze(-1) * (bernoulli(force.z[name], q[name]) - bernoulli(force.z[name], priors))).sum(0)
    given_above = torch.distributions.kl_divergence(dist.Bernoulli(q["h1"].expand(2**5, N, 3)), dist.Bernoulli(priors))
    return {
        "elbo": (weights * (force.lj - log_q)).sum(0),
        "evidence": force.log_evidence,
        "kl": kl,
        "spread": (weights.unsqueeze(-1) * (given_above - kl["h1"]) ** 2).sum(0).sqrt(),
        "q": q,
    }


def bernoulli(z, p):
    return torch.where(z > 0, p.log(), torch.log1p(-p))


def sites_of(guide, *args):
    with poutine.block():
        trace = poutine.trace(guide).get_trace(*args)
    return {k: v for k, v in trace.nodes.items() if v["type"] == "sample" and type(v["fn"]).__name__ != "_Subsample"}


@pytest.mark.parametrize("batch_size", [None, 3])
def test_bits_by_enumeration(net, batch_size):
    model, guide, x, exact = net
    found = evaluate(model, guide, x, num_particles=K, temperature=0.7, batch_size=batch_size)
    for value, error in ((found.hard_elbo, found.hard_stderr), (found.analytic_elbo, found.analytic_stderr)):
        assert largest_z(value, exact["elbo"], error) < bound(N, K - 1)
        assert largest_z(value + 8 * error, exact["elbo"], error) > bound(N, K - 1)
    kl = exact["kl"]["h1"].sum(-1) + exact["kl"]["h2"].sum(-1)
    assert largest_z(found.hard_elbo, exact["elbo"] + 0.7 * kl, found.hard_stderr) > bound(N)  # a KL weight of 0.3
    assert largest_z(found.relaxed_elbo, exact["elbo"], found.relaxed_stderr) > bound(N)  # the relaxed value is no hard one
    assert bool((found.analytic_stderr < found.hard_stderr).all())
    assert largest_z(found.log_likelihood, exact["evidence"], found.stderr) < bound(N)
    assert largest_z(found.log_likelihood, exact["elbo"], found.stderr) > bound(N)
    assert torch.allclose(found.kl["h2"], exact["kl"]["h2"])  # its prior looks at nothing
    assert largest_z(found.kl["h1"], exact["kl"]["h1"], exact["spread"] / K**0.5) < bound(3 * N)
    assert largest_z(1.1 * found.kl["h1"], exact["kl"]["h1"], exact["spread"] / K**0.5) > bound(3 * N)
    assert found.code_usage["h1"].shape == (3,)
    for name, q in exact["q"].items():
        assert found.active_units[name] == int((q.var(0) > 0.01).sum())
        average = q.mean(0)
        entropy = -(average * average.log() + (1 - average) * torch.log1p(-average))
        assert torch.allclose(found.code_usage[name], entropy.exp())
    assert found.normalized
    assert found.num_particles == K


def test_the_same_weights_as_importance(net):
    model, guide, x, _ = net
    torch.manual_seed(5)
    posterior = Importance(guide, 200).infer(model, x)
    torch.manual_seed(5)
    found = evaluate(model, guide, x, num_particles=200)
    assert torch.equal(found.log_likelihood, posterior.log_evidence)
    assert torch.equal(found.stderr, posterior.stderr)
    assert torch.equal(found.ess, posterior.diagnostics["ess"])
    assert torch.equal(found.pareto_k, posterior.diagnostics["pareto_k"])


WRAPPED = {
    "scaled": lambda p: scale_kl(p, 0.3),
    "relaxed": lambda p: relax(p, 0.5),
    "straight-through": lambda p: relax(p, 0.5, straight_through=True),
    "surrogate": surrogate,
    "relaxed and scaled": lambda p: scale_kl(relax(p, 0.5), 2.0),
    "twice": lambda p: discretize(relax(p, 0.5)),
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_hard_whatever_was_trained(net, wrap):
    """Relaxations and KL weights of training do not reach the hard bound."""
    model, guide, x, exact = net
    found = evaluate(WRAPPED[wrap](model), WRAPPED[wrap](guide), x, num_particles=K)
    assert largest_z(found.hard_elbo, exact["elbo"], found.hard_stderr) < bound(N, K - 1)
    assert largest_z(found.log_likelihood, exact["evidence"], found.stderr) < bound(N)
    assert (found.relaxed_elbo is None) == (wrap not in ("relaxed", "relaxed and scaled"))


def test_a_linear_gaussian_in_closed_form():
    model = toy.LinearGaussian(scale=1.5)
    x = model(batch_size=9).detach()
    loc, scale = torch.randn(9, 2) * 0.3, torch.tensor([0.5, 0.8])

    def guide(x, **_):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[: len(x)], scale).to_event(1))

    weight = model.weight.detach()
    mean, variance = loc @ weight, (scale**2) @ weight**2
    likelihood = -0.5 * ((x - mean) ** 2 + variance) / model.scale**2 - math.log(model.scale) - 0.5 * math.log(2 * math.pi)
    kl = 0.5 * (loc**2 + scale**2 - 1) - scale.log()
    elbo = likelihood.sum(-1) - kl.sum(-1)
    found = evaluate(model, guide, x, num_particles=K)
    assert torch.allclose(found.kl["z"], kl)
    assert found.active_units["z"] == int((loc.var(0) > 0.01).sum())
    assert "z" not in found.code_usage
    assert found.relaxed_elbo is None
    assert evaluate(model, guide, x, num_particles=2, temperature=0.5).relaxed_elbo is None  # nothing to relax
    for value, error in ((found.hard_elbo, found.hard_stderr), (found.analytic_elbo, found.analytic_stderr)):
        assert largest_z(value, elbo, error) < bound(9, K - 1)
        assert largest_z(value, elbo + 0.5 * kl.sum(-1), error) > bound(9, K - 1)

    posterior_mean, covariance = (t.detach() for t in model.posterior(x))

    def wide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(posterior_mean, 1.5 * covariance))

    found = evaluate(model, wide, x, num_particles=K)
    assert largest_z(found.log_likelihood, model.log_evidence(x), found.stderr) < bound(9)
    assert largest_z(found.log_likelihood, found.hard_elbo, found.stderr) > bound(9)
    assert found.kl["z"].shape == (9, 1)  # not independent: one component


def relaxed_bit(a, b, t, x):
    """E[log N(x; w z, s) + log p̃(z) − log q̃(z)] over z = σ((b + l) / t), l logistic, by the trapezoid rule."""
    noise = torch.linspace(-45, 45, 200_001)
    z = torch.sigmoid((b + noise) / t)

    def log_logistic(u):
        return nn.functional.logsigmoid(u) + nn.functional.logsigmoid(-u)

    value = dist.Normal(2 * z, 0.7).log_prob(x) + log_logistic(noise + b - a) - log_logistic(noise)
    return torch.trapezoid(log_logistic(noise).exp() * value, noise)


def bit_programs(a, b, family):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", family(a.expand(len(x))))
            pyro.sample("x", dist.Normal(2 * z, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(b + x))

    return model, guide


@pytest.mark.parametrize("form", ["temperature", "wrapped", "by hand"])
def test_the_relaxed_bound_by_quadrature(form):
    a, b, t, x = torch.tensor(0.4), torch.tensor(-0.3), 0.6, torch.tensor([0.2, 1.0, 2.5, -1.0])
    temperature = None
    if form == "by hand":
        model, guide = bit_programs(a, b, lambda logits: dist.RelaxedBernoulli(torch.tensor(t), logits=logits))
    else:
        model, guide = bit_programs(a, b, lambda logits: dist.Bernoulli(logits=logits))
    if form == "wrapped":
        model, guide = relax(model, t), relax(guide, t)
    elif form == "temperature":
        temperature = t
    found = evaluate(model, guide, x, num_particles=K, temperature=temperature)
    expected = torch.stack([relaxed_bit(a, b + v, t, v) for v in x])
    assert largest_z(found.relaxed_elbo, expected, found.relaxed_stderr) < bound(4, K - 1)
    other = torch.stack([relaxed_bit(a, b + v, 0.9 * t, v) for v in x])
    assert largest_z(found.relaxed_elbo, other, found.relaxed_stderr) > bound(4, K - 1)
    q = torch.sigmoid(b + x)
    terms = [
        p * (dist.Normal(2.0 * z, 0.7).log_prob(x) + dist.Bernoulli(logits=a).log_prob(torch.tensor(z)) - p.log())
        for z, p in ((0.0, 1 - q), (1.0, q))
    ]
    assert largest_z(found.hard_elbo, sum(terms), found.hard_stderr) < bound(4, K - 1)
    assert "relaxed_elbo (Maddison" in str(found)


def categories(x):
    """A category, then two one-hots given it."""
    tables = torch.tensor([[1.0, -1.0, 0.3], [0.0, 0.8, -0.6]])
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.stack((tables[c], -tables[c]), -2)).to_event(1))
        pyro.sample("x", dist.Normal(y[..., 0, :] @ torch.tensor([-1.0, 0.0, 2.0]) + y[..., 1, 1] + c, 0.8), obs=x)


def categories_guide(order):
    def guide(x):
        with pyro.plate("data", len(x)):
            for name in order:
                if name == "c":
                    pyro.sample("c", dist.Categorical(logits=torch.stack((x, -x), -1)))
                else:
                    logits = x[:, None, None] * torch.tensor([[0.3, 0.0, -0.2], [0.1, -0.5, 0.2]])
                    pyro.sample("y", dist.OneHotCategorical(logits=logits).to_event(1))

    return guide


@pytest.mark.parametrize("order", ["cy", "yc"])
def test_categories_by_enumeration(order):
    """Also where the guide draws first what the model draws last: no formula conditions on a value not yet drawn."""
    x = torch.tensor([0.4, -0.2, 1.1])
    pairs = [torch.stack(p) for p in itertools.product(one_hots(3), repeat=2)]
    force = BruteForce(categories, (x,), {"c": integers(2), "y": pairs}).solve()
    guide = categories_guide(order)
    sites = sites_of(guide, x)
    log_q = sum(sites[name]["fn"].log_prob(force.z[name]) for name in ("c", "y"))
    elbo = (log_q.exp() * (force.lj - log_q)).sum(0)
    tables = torch.tensor([[1.0, -1.0, 0.3], [0.0, 0.8, -0.6]])[force.z["c"]]
    prior = torch.log_softmax(torch.stack((tables, -tables), -2), -1)
    q = sites["y"]["fn"].base_dist.logits.log_softmax(-1)
    kl = (log_q.exp().unsqueeze(-1) * (force.z["y"] * (q - prior)).sum(-1)).sum(0)  # [rows, 2]
    found = evaluate(categories, guide, x, num_particles=K)
    for value, error in ((found.hard_elbo, found.hard_stderr), (found.analytic_elbo, found.analytic_stderr)):
        assert largest_z(value, elbo, error) < bound(3, K - 1)
    assert largest_z(found.log_likelihood, force.log_evidence, found.stderr) < bound(3)
    assert found.kl["c"].shape == (3, 1)
    repeats = torch.stack([evaluate(categories, guide, x, num_particles=100).kl["y"] for _ in range(40)])
    assert largest_z(repeats.mean(0), kl, repeats.std(0) / 40**0.5) < bound(6, 39)
    assert largest_z(1.3 * repeats.mean(0), kl, repeats.std(0) / 40**0.5) > bound(6, 39)
    average = torch.softmax(torch.stack((x, -x), -1), -1).mean(0)
    assert torch.allclose(found.code_usage["c"], torch.special.entr(average).sum().exp())
    assert found.active_units["c"] == int(torch.softmax(torch.stack((x, -x), -1), -1)[:, 0].var() > 0.01)


def test_formulas_are_not_used_out_of_order():
    """Sites of a guide that goes upwards: the KL of the upper one has a formula, that of the lower one none."""
    x = torch.tensor([0.4, -0.2])

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Bernoulli(0.4))
            low = pyro.sample("low", dist.Bernoulli(logits=3 * top - 1))
            pyro.sample("x", dist.Normal(low, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            low = pyro.sample("low", dist.Bernoulli(logits=x))
            pyro.sample("top", dist.Bernoulli(logits=4 * low - 2))

    force = BruteForce(model, (x,), {"top": bits(), "low": bits()}).solve()
    q_low = dist.Bernoulli(logits=x).log_prob(force.z["low"])
    q = q_low + dist.Bernoulli(logits=4 * force.z["low"] - 2).log_prob(force.z["top"])
    elbo = (q.exp() * (force.lj - q)).sum(0)
    kl_low = (q.exp() * (q_low - dist.Bernoulli(logits=3 * force.z["top"] - 1).log_prob(force.z["low"]))).sum(0)
    found = evaluate(model, guide, x, num_particles=50_000)
    for value, error in ((found.hard_elbo, found.hard_stderr), (found.analytic_elbo, found.analytic_stderr)):
        assert largest_z(value, elbo, error) < bound(2, 49_999)
    given_a_draw = sum(  # what a formula at a top drawn after low would give: it is another number
        w * torch.distributions.kl_divergence(dist.Bernoulli(logits=x), dist.Bernoulli(logits=torch.tensor(3.0 * t - 1)))
        for t, w in ((0, (q.exp() * (1 - force.z["top"])).sum(0)), (1, (q.exp() * force.z["top"]).sum(0)))
    )
    error = 3 / 50_000**0.5  # log q − log p lies within ±3
    assert largest_z(found.kl["low"][:, 0], kl_low, error) < bound(2)
    assert largest_z(found.kl["low"][:, 0], given_a_draw, error) > bound(2)


def test_a_global_latent_gives_one_number():
    x = torch.tensor([0.3, 1.2, -0.5, 0.7])

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5))

    evidence = torch.distributions.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1).log_prob(x)
    found = evaluate(model, guide, x, num_particles=50)
    assert found.hard_elbo.shape == ()
    assert torch.allclose(found.hard_elbo, evidence, atol=1e-10)
    assert torch.allclose(found.log_likelihood, evidence, atol=1e-10)
    assert found.kl["mu"].shape == (1,)
    assert found.active_units == {}
    assert "rows" in str(found)
    with pytest.raises(ValueError, match="expected programs whose rows can be split into batches of 2"):
        evaluate(model, guide, x, batch_size=2)


def test_plates_inside_the_batch_and_masks():
    x = torch.randn(4, 3)
    hidden = torch.tensor([[True], [True], [False], [True]])

    def program(x, masked=True, q=0.0):
        shown = poutine.mask(mask=hidden if masked else torch.tensor([[True]]))
        with pyro.plate("docs", x.shape[0], dim=-2), pyro.plate("words", x.shape[1], dim=-1), shown:
            return pyro.sample("z", dist.Normal(torch.full((2,), q), 1.0).to_event(1))

    def model(x):
        z = program(x)
        with pyro.plate("docs", x.shape[0], dim=-2), pyro.plate("words", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    found = evaluate(model, lambda x: program(x, q=0.5), x, num_particles=50)
    assert found.kl["z"].shape == (4, 3, 2)
    assert torch.allclose(found.kl["z"], 0.125 * hidden.unsqueeze(-1).expand(4, 3, 2))
    assert found.hard_elbo.shape == (4, 3)
    one_sided = evaluate(model, lambda x: program(x, masked=False, q=0.5), x, num_particles=50)
    assert torch.allclose(one_sided.kl["z"], torch.full((4, 3, 2), 0.125))


@pytest.mark.parametrize("outer", ["docs", "words"])
def test_batches_of_rows_at_any_plate(outer):
    """Rows of a plate that is not the last; results stand where the plates stand."""
    x = torch.randn(5, 4)
    data = x if outer == "docs" else x.T.contiguous()  # of which the first axis is split

    def program(name):
        def run(data):
            docs = pyro.plate("docs", 5, dim=-2) if outer == "words" else pyro.plate("docs", len(data), dim=-2)
            words = pyro.plate("words", 4, dim=-1) if outer == "docs" else pyro.plate("words", len(data), dim=-1)
            wide = data if outer == "docs" else data.T
            with docs, words:
                loc = torch.zeros(2) if name == "p" else torch.stack((wide, -wide), -1)
                z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
                if name == "p":
                    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=wide)

        return run

    model, guide = program("p"), program("q")
    parts = evaluate(model, guide, data, num_particles=K, batch_size=2)
    assert torch.allclose(parts.kl["z"], 0.5 * x.square().unsqueeze(-1).expand(5, 4, 2))
    elbo = dist.Normal(0.0, 1.0).log_prob(x) - 1.0 - x.square()  # the mean of x − z1 − z2 is x, its variance 2
    assert largest_z(parts.analytic_elbo, elbo, parts.analytic_stderr) < bound(20, K - 1)
    assert largest_z(parts.analytic_elbo.flip(0), elbo, parts.analytic_stderr) > bound(20, K - 1)


def test_programs_that_run_one_state_at_a_time(net):
    model, guide, x, exact = net

    def stubborn(program):
        def run(x, **kwargs):
            if len(pyro.poutine.runtime._PYRO_STACK) and any(
                getattr(m, "name", "") == "num_particles_vectorized" for m in pyro.poutine.runtime._PYRO_STACK
            ):
                raise RuntimeError("no particles")
            return program(x, **kwargs)

        return run

    found = evaluate(model, stubborn(guide), x, num_particles=100)
    assert largest_z(found.hard_elbo, exact["elbo"], found.hard_stderr) < bound(N, 99)

    def switching(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            loc = torch.ones(len(x)) if z.dim() == 1 else torch.zeros(len(x))
            pyro.sample("x", dist.Normal(loc * z, 1.0), obs=x)

    def q(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(len(x))))

    x = torch.tensor([0.1, 1.4])
    force = BruteForce(switching, (x,), {"z": bits()}).solve()
    found = evaluate(switching, q, x, num_particles=300)
    assert largest_z(found.log_likelihood, force.log_evidence, found.stderr) < bound(2)


def test_a_score_that_is_no_likelihood():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", CrossEntropy(logits=z @ torch.ones(2, 3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 0.9).to_event(1))

    found = evaluate(model, guide, torch.rand(5, 3), num_particles=20)
    assert not found.normalized
    assert found.summary()["notes"][0].startswith("the likelihood is not normalised")
    assert "log_likelihood" not in str(found)
    assert "log mean weight" in str(found)


def test_refusals(net):
    model, guide, x, _ = net

    def other(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))

    with pytest.raises(ValueError, match=r"expected the guide to sample the model's latents \['h1', 'h2'\], got \['h1'\]"):
        evaluate(model, other, x)
    with pytest.raises(ValueError, match="expected one measure for site"):
        evaluate(relax(model, 0.5), guide, x)
    with pytest.raises(ValueError, match="num_particles >= 2, got 1"):
        evaluate(model, guide, x, num_particles=1)
    with pytest.raises(ValueError, match=r"integer num_particles >= 2, got 2\.5"):
        evaluate(model, guide, x, num_particles=2.5)
    with pytest.raises(ValueError, match="the data, got Tensor and"):
        evaluate(x, model, guide)
    with pytest.raises(ValueError, match="the data, got Tensor first"):
        embed(x, guide)
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        evaluate(model, guide, x, batch_size=0)
    with pytest.raises(ValueError, match=r"expected x in \{0, 1\}"):
        evaluate(model, guide, 255 * x)
    with pytest.raises(ValueError, match="positive"):
        evaluate(model, guide, x, temperature=0.0)

    def mixing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z - z.mean(-2, keepdim=True), 1.0).to_event(1), obs=x)

    def q(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match="expected rows that are independent"):
        evaluate(mixing, q, torch.randn(5, 2))


def test_modules_run_in_evaluation_mode():
    """Batch statistics would mix the rows; the running ones do not, and stay."""
    model = toy.LinearGaussian()
    guide = AmortizedMeanField(model, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    x = model(batch_size=6).detach()
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    found = evaluate(model, guide, x, num_particles=20)
    same = partial(torch.allclose, rtol=1e-12, atol=1e-12)  # a product of matrices rounds by its size
    assert same(found.kl["z"][:2], evaluate(model, guide, x[:2], num_particles=20).kl["z"])
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())
    assert all(module.training for module in guide.modules())
    assert same(embed(guide, x)["z"][:2], embed(guide, x[:2])["z"])
    reconstruct(model, guide, x)
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())


def test_nothing_is_left_behind():
    model = HierarchicalVAE(6, [("normal", 4), ("categorical", (2, 3))], hidden=8).float()
    guide = AmortizedStructured(model)
    x = model.sample(9)
    pyro.clear_param_store()
    found = evaluate(model, guide, x, num_particles=10, batch_size=4)
    assert list(pyro.get_param_store()) == []
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])
    assert not found.hard_elbo.requires_grad
    assert found.summary()["rows"] == 9
    assert set(found.summary()) >= {"hard_elbo", "hard_elbo_stderr", "hard_elbo_monte_carlo", "log_likelihood"}


def test_single_precision_takes_one_run_for_many_particles():
    """A Normal's log density is computed in float64, and told in the program's dtype, whose tolerance it is checked at."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        model = HierarchicalVAE(20, [("normal", 4), ("normal", 3)], hidden=8)
        x = model.sample(30)
        log_joint = LogJoint(model, (x,), {})
        assert log_joint.broadcasts
        log_joint.check_rows("the test")
        assert evaluate(model, AmortizedStructured(model), x, num_particles=10).hard_elbo.dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_rows_of_a_program_that_takes_an_index(net):
    """A guide with parameters for each row sees the numbers of the rows of a batch."""
    model, guide, x, exact = net
    order = torch.tensor([6, 2, 0])
    found = evaluate(model, guide, x[order], num_particles=K, index=order, num_data=N)
    assert largest_z(found.hard_elbo, exact["elbo"][order], found.hard_stderr) < bound(3, K - 1)
    assert largest_z(found.hard_elbo, exact["elbo"][:3], found.hard_stderr) > bound(3, K - 1)


def test_amortised_pairs_agree_with_exact():
    model = toy.belief_net(5, 3)
    guide = AmortizedMeanField(model)
    x = model.sample(20)
    found = evaluate(model, guide, x, num_particles=K, batch_size=6)
    assert largest_z(found.log_likelihood, Exact().infer(model, x).log_evidence, found.stderr) < bound(20)


def test_expanded_parameters_of_a_program_that_runs_one_state_at_a_time():
    x = torch.randn(5)

    def pair(prior, posterior, sure=False):
        def program(x):
            z = pyro.sample("z", prior())
            assert not sure or z.shape == (3,), "one state at a time"
            total = float(z[0]) + float(z[1]) + float(z[2])
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(total, 5.0), obs=x)

        def q(x):
            assert pyro.sample("z", posterior()).shape == (3,) or not sure

        return program, q

    def expand(fn):
        return lambda: fn.expand([3]).to_event(1)

    def elbo(mean, variance, kl):
        return float(dist.Normal(mean, 5.0).log_prob(x).sum()) - 0.1 * variance - 3 * kl

    for sure in (False, True):
        normal = pair(expand(dist.Normal(0.0, 1.0)), expand(dist.Normal(torch.tensor(1.0), 0.5)), sure)
        kl = 0.5 * (1 + 0.25 - 1) - math.log(0.5)
        found = evaluate(*normal, x, num_particles=60)
        assert torch.allclose(found.kl["z"], torch.full((3,), kl))
        assert largest_z(found.analytic_elbo, torch.tensor(elbo(3.0, 0.75, kl)), found.analytic_stderr) < bound(1, 59)
        assert largest_z(found.analytic_elbo, torch.tensor(elbo(3.0, 0.75, kl / 3)), found.analytic_stderr) > bound(1, 59)
    bit = pair(expand(dist.Bernoulli(torch.tensor(0.5))), expand(dist.Bernoulli(torch.tensor(0.2))))
    kl = 0.2 * math.log(0.4) + 0.8 * math.log(1.6)
    found = evaluate(*bit, x, num_particles=60)
    assert torch.allclose(found.kl["z"], torch.full((3,), kl))
    assert found.code_usage["z"].shape == (3,)
    assert largest_z(found.hard_elbo, torch.tensor(elbo(0.6, 0.48, kl)), found.hard_stderr) < bound(1, 59)


def test_values_at_the_end_of_a_dtype_are_counted():
    logits = 4 * torch.randn(6, 20)

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(20, dtype=x.dtype)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def q(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits.to(x.dtype)).to_event(1))

    x = torch.randn(6)
    single = evaluate(program, q, x.float(), num_particles=200, temperature=0.3)
    u = (torch.rand(200, 6, 20, dtype=torch.float64).logit() + logits) / 0.3
    low, high = (torch.tensor(v, dtype=torch.float64).logit() for v in (2.0**-103, 1 - 2.0**-23))
    expected = float(((u <= low) | (u >= high)).double().mean())
    error = (2 * expected / 24_000) ** 0.5 * 20**0.5
    assert abs(single.clamped - expected) < bound(1) * error < expected / 2
    assert f"{expected:.0%}"[0] in single.summary()["notes"][1]
    assert "lie at the end of float32: the relaxed objective is that of the clamped draws" in str(single)
    assert single.summary()["clamped"] == single.clamped
    double = evaluate(program, q, x.double(), num_particles=200, temperature=0.3)
    assert double.clamped < single.clamped / 2
    assert evaluate(program, q, x.double(), num_particles=20, temperature=1.0).clamped_notes == ()
    assert "clamped" not in evaluate(program, q, x, num_particles=20).summary()


def test_no_relaxed_bound_of_hard_values_scored_by_densities():
    def program(x):
        with pyro.plate("data", len(x)):
            logits = torch.zeros(3)
            z = pyro.sample("z", dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=logits))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def q(x):
        with pyro.plate("data", len(x)):
            logits = torch.tensor([1.0, 0.0, 0.0])
            pyro.sample("z", dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=logits))

    x = torch.randn(4)
    found = evaluate(program, q, x, num_particles=400)
    assert found.relaxed_elbo is None
    p = torch.tensor([1.0, 0.0, 0.0]).softmax(-1)
    elbo = dist.Normal(0.0, 1.0).log_prob(x) * (1 - p[0]) + dist.Normal(1.0, 1.0).log_prob(x) * p[0]
    elbo = elbo - (p * (p.log() + math.log(3))).sum()
    assert largest_z(found.hard_elbo, elbo, found.hard_stderr) < bound(4, 399)
    assert bool(evaluate(program, q, x, num_particles=20, temperature=0.5).relaxed_elbo.isfinite().all())


@pytest.mark.parametrize("weight", [3.0, 0.2])
def test_scales_of_one_program_alone_are_left_out(net, weight):
    model, guide, x, exact = net
    found = evaluate(scale_kl(model, weight), guide, x, num_particles=K)
    assert largest_z(found.analytic_elbo, exact["elbo"], found.analytic_stderr) < bound(N, K - 1)


def test_what_is_not_evaluated():
    """A model that observes nothing, as the guide is when the two are swapped, and one that draws which rows it sees."""
    net = toy.belief_net(4, 2)
    guide, x = AmortizedMeanField(net), net.sample(6)
    with pytest.raises(ValueError, match=r"observes nothing.*the model before the guide"):
        evaluate(guide, guide, x, num_particles=5)

    def some(x):
        with pyro.plate("scans", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide_of_some(x):
        with pyro.plate("scans", len(x), subsample_size=2):
            pyro.sample("z", dist.Bernoulli(0.5))

    for method in (evaluate, reconstruct):
        with pytest.raises(ValueError, match="'scans', which draws 2 of 6"):
            method(some, guide_of_some, x[:, 0])


def test_few_particles_have_no_pareto_k():
    net = toy.belief_net(4, 2)
    guide, x = AmortizedMeanField(net), net.sample(6)
    few, enough = (evaluate(net, guide, x, num_particles=k) for k in (24, 25))
    assert bool(few.pareto_k.isnan().all())
    assert few.summary()["pareto_k_above_0.7"] is None
    assert "needs 25 particles" in str(few)
    assert not bool(enough.pareto_k.isnan().any())
    assert "hard_elbo ≥" in str(enough)
