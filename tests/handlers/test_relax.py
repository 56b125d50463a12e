"""relax and discretize against torch's formulas, finite differences and the discrete program."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy import stats
from torch import nn

from pyrovae.distributions import RelaxedBernoulli, RelaxedOneHotCategorical
from pyrovae.guides import AmortizedMeanField, LocalMeanField
from pyrovae.handlers import discretize, own_params, relax
from pyrovae.inference import Exact
from pyrovae.models import SigmoidBeliefNet, toy

FALSE_ALARM = 1e-5


class Mixed:
    """Bits, one-hots and a Normal, under `.to_event`, `.mask` and `.expand`, with a subsampled plate."""

    def __init__(self):
        self.net = nn.Linear(6, 4)

    def __call__(self, x):
        pyro.module("mixed", self.net)
        g = pyro.sample("g", dist.Bernoulli(logits=torch.tensor(0.3)))
        with pyro.plate("rows", len(x), subsample_size=3) as rows:
            a = pyro.sample("a", dist.Bernoulli(logits=torch.tensor([0.2, -1.0])).to_event(1))
            b = pyro.sample("b", dist.OneHotCategorical(logits=torch.tensor([0.5, -0.3, 0.0])).mask(rows > 0))
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            features = torch.cat([a, b, c[..., None]], -1)
            logits = self.net(features) + g.unsqueeze(-1).unsqueeze(-1)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x[rows])


def sites(program, *args):
    trace = poutine.trace(program).get_trace(*args)
    trace.compute_log_prob()
    return {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}


def data(rows=5):
    return torch.bernoulli(torch.full((rows, 4), 0.5))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.2])
def test_log_densities_are_torchs(temperature):
    """In float64 at temperatures where torch's own formulas hold."""
    t = torch.tensor(temperature)
    logits = torch.randn(7, 5)
    for ours, stock in (
        (RelaxedBernoulli, torch.distributions.RelaxedBernoulli),
        (RelaxedOneHotCategorical, torch.distributions.RelaxedOneHotCategorical),
    ):
        q, oracle = ours(t, logits=logits), stock(t, logits=logits)
        value = oracle.sample((50,))
        finite = torch.isfinite(oracle.log_prob(value))
        if ours is RelaxedBernoulli:
            finite &= torch.logit(value).abs() < 20  # beyond, torch's softplus is cut off
        assert float(finite.double().mean()) > 0.9
        assert torch.allclose(q.log_prob(value)[finite], oracle.log_prob(value)[finite], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(ours(1.1 * t, logits=logits).log_prob(value)[finite], oracle.log_prob(value)[finite])


def test_densities_integrate_to_one():
    """Quadrature over the interval, and over the simplex of three categories."""
    t = torch.tensor(0.8)
    nodes, weights = map(torch.as_tensor, __import__("numpy").polynomial.legendre.leggauss(400))
    u = torch.sigmoid(12 * nodes)  # substitution that resolves both ends
    du = 12 * u * (1 - u) * weights
    p = RelaxedBernoulli(t, logits=torch.tensor(0.7)).log_prob(u).exp()
    assert abs(float((p * du).sum()) - 1) < 1e-3
    s = RelaxedOneHotCategorical(t, logits=torch.tensor([0.4, -0.2, 0.1]))
    first, rest = u[:, None], (1 - u)[:, None]
    value = torch.stack([first.expand(400, 400), rest * u, rest * (1 - u)], -1)
    total = (s.log_prob(value).exp() * rest * du[:, None] * du).sum()
    assert abs(float(total) - 1) < 1e-3


def test_rounded_values_have_the_discrete_law():
    """The Gumbel-max property: argmax of a relaxed category is an exact draw, at every temperature."""
    n, logits = 20_000, torch.tensor([[1.0, -0.5, 0.2, 0.0], [0.0, 2.0, 0.3, -1.0]])
    draws = RelaxedOneHotCategorical(torch.tensor(0.4), logits=logits).sample((n,)).argmax(-1)
    p = torch.softmax(logits, -1)
    counts = torch.nn.functional.one_hot(draws, 4).sum(0)
    bits = torch.tensor([-2.0, 0.0, 0.7])
    ones = (RelaxedBernoulli(torch.tensor(0.4), logits=bits).sample((n,)) > 0.5).sum(0)
    k, q = torch.cat([counts.flatten(), ones]), torch.cat([p.flatten(), torch.sigmoid(bits)])

    def smallest_tail(q):
        return 2 * min(stats.binom.sf(k.numpy() - 1, n, q.numpy()).min(), stats.binom.cdf(k.numpy(), n, q.numpy()).min())

    assert smallest_tail(q) > FALSE_ALARM / len(q)
    assert smallest_tail(q.roll(1)) < FALSE_ALARM / len(q)


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
def test_float32_values_score_finitely(temperature):
    """50 categories: no row fails, where stock Pyro has rows that do at the lowest temperature."""
    t = torch.tensor(temperature, dtype=torch.float32)
    logits = torch.randn(4000, 50, dtype=torch.float32).requires_grad_()
    for ours in (RelaxedBernoulli, RelaxedOneHotCategorical):
        q = ours(t, logits=logits, validate_args=False)
        value = q.rsample()
        assert value.dtype == torch.float32
        assert bool(((value > 0) & (value < 1)).all()) or ours is RelaxedOneHotCategorical
        log_prob = q.log_prob(value)
        prior = ours(t, logits=torch.zeros_like(logits), validate_args=False).log_prob(value)
        (gradient,) = torch.autograd.grad((log_prob - prior).sum(), logits)
        assert bool(torch.isfinite(log_prob).all() & torch.isfinite(prior).all() & torch.isfinite(gradient).all())
    if temperature == 0.1:
        stock = dist.RelaxedOneHotCategorical(t, logits=logits.detach(), validate_args=False)
        assert not bool(torch.isfinite(stock.log_prob(stock.sample())).all())


def test_values_at_the_ends_score_finitely():
    t = torch.tensor(0.5)
    for value in (torch.zeros(3), torch.ones(3)):
        assert bool(torch.isfinite(RelaxedBernoulli(t, logits=torch.randn(3), validate_args=False).log_prob(value)).all())
    one_hot = torch.eye(3)
    assert bool(torch.isfinite(RelaxedOneHotCategorical(t, logits=torch.randn(3), validate_args=False).log_prob(one_hot)).all())


def test_sites_keep_shapes_and_the_rest_is_untouched():
    model, x = Mixed(), data()
    before = sites(model, x)
    after = sites(relax(model, 0.5), x)
    assert list(before) == list(after)
    for name in before:
        if name == "rows":
            continue
        assert before[name]["fn"].batch_shape == after[name]["fn"].batch_shape
        assert before[name]["fn"].event_shape == after[name]["fn"].event_shape
        assert before[name]["log_prob"].shape == after[name]["log_prob"].shape
    assert isinstance(after["a"]["fn"].base_dist, dist.RelaxedBernoulli)
    assert isinstance(after["b"]["fn"], dist.MaskedDistribution)
    assert isinstance(after["b"]["fn"].base_dist, dist.RelaxedOneHotCategorical)
    assert isinstance(after["g"]["fn"], dist.RelaxedBernoulli)
    assert type(after["c"]["fn"]) is type(before["c"]["fn"])
    assert isinstance(after["x"]["fn"].base_dist, dist.Bernoulli)
    assert torch.equal(after["a"]["fn"].base_dist.logits, before["a"]["fn"].base_dist.logits)


def test_expanded_distributions_are_seen_through():
    fn = dist.torch_distribution.ExpandedDistribution(dist.Bernoulli(logits=torch.tensor([0.3])), torch.Size([4, 2]))

    def model():
        with pyro.plate("a", 2), pyro.plate("b", 4):
            return pyro.sample("z", fn)

    z = relax(model, 0.5)()
    assert tuple(z.shape) == (4, 2)
    assert bool(((z > 0) & (z < 1)).all())


def test_relaxed_elbo_gradient_is_the_finite_difference():
    """At fixed noise the relaxed loss is a smooth function of every parameter of model and guide."""
    net = toy.belief_net(4, [2, 2])
    x = net.sample(3)
    guide = AmortizedMeanField(net)
    p, q = relax(net, 0.7), relax(guide, 0.7)
    parameters = [*net.parameters(), *guide.parameters()]

    def loss():
        torch.manual_seed(5)
        return Trace_ELBO().differentiable_loss(p, q, x)

    gradients = torch.autograd.grad(loss(), parameters)
    step = 1e-6
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for i in range(flat.numel()):
            centre = float(flat[i])
            ends = []
            for sign in (1, -1):
                flat[i] = centre + sign * step
                ends.append(float(loss().detach()))
            flat[i] = centre
            difference = (ends[0] - ends[1]) / (2 * step)
            # rounding of a central difference: eps |loss| / step
            assert abs(difference - float(gradient.reshape(-1)[i])) < 1e-9 * abs(ends[0]) + 1e-6 * abs(difference)
    hard = torch.autograd.grad(Trace_ELBO().differentiable_loss(net, guide, x), parameters)
    assert any(not torch.allclose(a, b) for a, b in zip(gradients, hard, strict=True))


def test_discretize_undoes_relax():
    """The log joint of the discrete program, at every site and the same values."""
    model, x = Mixed(), data()
    trace = poutine.trace(model).get_trace(x)
    for program, equal in ((discretize(relax(model, 0.5)), True), (relax(model, 0.5), False)):
        with pyro.validation_enabled(equal):  # validation refuses hard values of soft sites
            again = poutine.trace(poutine.replay(program, trace)).get_trace(x)
            trace.compute_log_prob(), again.compute_log_prob()
        same = all(
            torch.allclose(again.nodes[n]["log_prob"], s["log_prob"], rtol=0, atol=1e-13)
            for n, s in trace.nodes.items()
            if s["type"] == "sample" and n != "rows"
        )
        assert same is equal


STOCK = {
    "soft": (dist.RelaxedBernoulli, dist.RelaxedOneHotCategorical),
    "straight-through": (dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough),
}


@pytest.mark.parametrize("families", STOCK)
def test_a_program_written_relaxed_goes_before_exact(families):
    bit, category = STOCK[families]
    a, b, w = torch.randn(2), torch.randn(3), torch.randn(5, 4)

    def program(bit, category, x):
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", bit(logits=a).to_event(1))
            y = pyro.sample("y", category(logits=b))
            pyro.sample("x", dist.Bernoulli(logits=torch.cat([h, y], -1) @ w).to_event(1), obs=x)

    def written_relaxed(x):
        t = torch.tensor(0.5)
        program(lambda logits: bit(t, logits=logits), lambda logits: category(t, logits=logits), x)

    def written_discrete(x):
        program(dist.Bernoulli, dist.OneHotCategorical, x)

    x = data(4)
    evidence = Exact().infer(discretize(written_relaxed), x).log_evidence
    assert torch.allclose(evidence, Exact().infer(written_discrete, x).log_evidence, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="discretize"):
        Exact().infer(written_relaxed, x)


def test_observed_relaxed_values_stay_densities():
    def model(v):
        with pyro.plate("rows", len(v)):
            pyro.sample("v", dist.RelaxedBernoulli(torch.tensor(0.5), logits=torch.tensor(0.0)), obs=v)

    assert isinstance(sites(discretize(model), torch.full((3,), 0.4))["v"]["fn"], dist.RelaxedBernoulli)


@pytest.mark.parametrize("fn", [dist.Categorical(torch.ones(3)), dist.Poisson(2.0), dist.Binomial(3, 0.5)])
def test_other_discrete_latents_are_refused(fn):
    def model():
        pyro.sample("counts", fn)

    hint = "OneHotCategorical" if isinstance(fn, dist.Categorical) else "Bernoulli"
    with pytest.raises(ValueError, match=f"{type(fn).__name__} site 'counts'.*"):
        relax(model, 0.5)()
    with pytest.raises(ValueError, match=hint):
        relax(model, 0.5)()
    discretize(model)()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, [0.5, 0.5]])
def test_bad_temperatures(temperature):
    value = torch.tensor(temperature) if isinstance(temperature, list) else temperature
    with pytest.raises(ValueError, match="expected a positive, finite temperature"):
        relax(Mixed(), value)


def test_a_tensor_temperature_is_read_at_every_run():
    t = torch.tensor(0.5)
    program = relax(Mixed(), t)
    for value in (0.5, 0.2):
        t.fill_(value)
        assert float(sites(program, data())["g"]["fn"].temperature) == value


@pytest.mark.parametrize("particles", [None, 4])
@pytest.mark.parametrize("kind", ["amortised", "local"])
def test_model_and_guide_relaxed_train_together(kind, particles):
    """A guide made for the discrete model, also with an explicit subsample and inside blocked runs."""
    net = SigmoidBeliefNet(4, [3, 2])
    guide = AmortizedMeanField(net) if kind == "amortised" else LocalMeanField(net, 6)
    x, rows = net.sample(6), torch.tensor([4, 0, 5])
    elbo = Trace_ELBO() if particles is None else Trace_ELBO(num_particles=particles, vectorize_particles=True)
    svi = SVI(relax(net, 0.5), relax(guide, 0.5), pyro.optim.Adam({"lr": 0.01}), elbo)
    parameters = [*net.parameters(), *guide.parameters()]
    before = [p.detach().clone() for p in parameters]
    assert math.isfinite(svi.step(x))
    assert math.isfinite(svi.step(x[rows], index=rows, num_data=6))
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    draws = Predictive(relax(net, 0.5), guide=relax(guide, 0.5), num_samples=3, parallel=True)(x)
    assert tuple(draws["h2"].shape) == (3, 6, 2)
    assert bool(((draws["h2"] > 0) & (draws["h2"] < 1)).all())


@pytest.mark.parametrize("kind", ["amortised", "local"])
def test_plain_programs_train_relaxed(kind):
    model, x = Mixed(), data()
    example = (x,)
    guide = AmortizedMeanField(model, example=example) if kind == "amortised" else LocalMeanField(model, 5, example=example)
    svi = SVI(relax(model, 0.5), relax(guide, 0.5), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = [p.detach().clone() for p in guide.parameters()]
    for _ in range(3):
        assert math.isfinite(svi.step(x))
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_relaxed_training_comes_nearer_to_the_exact_posterior():
    """KL(q‖p) of a net whose posterior is a product, in closed form; the discrete optimum has KL 0."""
    net = SigmoidBeliefNet(2, 2)
    with torch.no_grad():
        net.weights[0].copy_(torch.diag(torch.tensor([2.0, -3.0])))
        net.biases[0].copy_(torch.tensor([-1.0, 1.0]))
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    guide = LocalMeanField(net, 4)
    p1 = Exact().infer(net, x).marginals["h1"]

    def kl():
        q = torch.sigmoid(guide.table["h1"].detach())
        return float((q * (q / p1).log() + (1 - q) * ((1 - q) / (1 - p1)).log()).sum())

    start = kl()
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    optimizer = torch.optim.Adam(guide.parameters(), 0.1)
    p, q = relax(net, 0.3), relax(guide, 0.3)
    for _ in range(150):
        optimizer.zero_grad()
        elbo.differentiable_loss(p, q, x).backward()
        optimizer.step()
    assert kl() < start


def test_copies_pickles_and_parameters():
    net = SigmoidBeliefNet(3, 2)
    guide = AmortizedMeanField(net)
    t = torch.tensor(0.5)
    p, q = relax(net, t), relax(guide, t)
    p2, q2 = copy.deepcopy((p, q))
    assert p2.program is not net
    assert q2.program._model[0] is p2.program
    assert q2.temperature is p2.temperature
    assert p2.temperature is not t
    leaves = own_params(p)
    with poutine.block():
        leaves(net.sample(2))
    assert {id(v) for v in leaves.leaves.values()} == {id(v) for v in net.parameters()}
    again = pickle.loads(pickle.dumps(p))
    assert float(again.temperature) == 0.5
    assert tuple(again(net.sample(2)).shape) == (2, 3)
