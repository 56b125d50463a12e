"""relax, discretize and RelaxReparam against finite differences, the discrete program and objectives by hand."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from stats import means_agree
from torch import nn
from torch.distributions import constraints, kl_divergence

from pyrovae.distributions import RelaxedBernoulli, RelaxedOneHotCategorical
from pyrovae.guides import AmortizedMeanField, AmortizedStructured, LocalMeanField
from pyrovae.handlers import RelaxReparam, discretize, own_params, relax, rewrite, surrogate
from pyrovae.inference import Exact
from pyrovae.models import BernoulliVAE, HierarchicalVAE, SigmoidBeliefNet, toy


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
    for program, equal in ((discretize(relax(model, 0.5)), True), (discretize(relax(Mixed(), 0.5)), False)):
        again = poutine.trace(poutine.replay(program, trace)).get_trace(x)
        trace.compute_log_prob(), again.compute_log_prob()
        same = all(
            torch.allclose(again.nodes[n]["log_prob"], s["log_prob"], rtol=0, atol=1e-13)
            for n, s in trace.nodes.items()
            if s["type"] == "sample" and n != "rows"
        )
        assert same is equal
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="one kind at site"):
        poutine.replay(relax(model, 0.5), trace)(x)


STOCK = {
    "soft": (dist.RelaxedBernoulli, dist.RelaxedOneHotCategorical),
    "straight-through": (dist.RelaxedBernoulliStraightThrough, dist.RelaxedOneHotCategoricalStraightThrough),
    "ours": (RelaxedBernoulli, RelaxedOneHotCategorical),
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


def hand_written(straight_through=None):
    """A model with bits and categories in a plate of 5 rows, and its guide; relaxed sites written out where asked."""
    b, c, a, d, w = torch.randn(2), torch.randn(3), torch.randn(5, 2), torch.randn(5, 3), torch.randn(5, 4)
    x = data()

    def bit(logits):
        if straight_through is None:
            return dist.Bernoulli(logits=logits)
        return RelaxedBernoulli(0.6, logits=logits, straight_through=straight_through)

    def category(logits):
        if straight_through is None:
            return dist.OneHotCategorical(logits=logits)
        return RelaxedOneHotCategorical(0.6, logits=logits, straight_through=straight_through)

    def model():
        with pyro.plate("rows", 5, subsample=torch.tensor([0, 1, 4])) as rows:
            h = pyro.sample("h", bit(b).to_event(1))
            y = pyro.sample("y", category(c))
            pyro.sample("x", dist.Bernoulli(logits=torch.cat([h, y], -1) @ w).to_event(1), obs=x[rows])

    def guide():
        h_logits, y_logits = pyro.param("a", a), pyro.param("d", d)
        with pyro.plate("rows", 5, subsample=torch.tensor([0, 1, 4])) as rows:
            pyro.sample("h", bit(h_logits[rows]).to_event(1))
            pyro.sample("y", category(y_logits[rows]))

    return model, guide


REPARAM = {"h": 0.6, "y": 0.6}


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("how", ["relax", "reparam"])
def test_a_relaxed_program_is_the_one_written_relaxed(how, objective, particles, straight_through):
    """Loss and gradients, at the same noise, in a subsampled plate and for vectorised particles."""

    def relaxed(program):
        if how == "relax":
            return relax(program, 0.6, straight_through)
        config = {name: RelaxReparam(t, straight_through) for name, t in REPARAM.items()}
        return poutine.reparam(program, config=config)

    found = []
    for form in (None, straight_through):
        torch.manual_seed(1)
        model, guide = hand_written(form)
        if form is None:
            model, guide = relaxed(model), relaxed(guide)
        elbo = objective(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
        pyro.clear_param_store()
        loss = elbo.loss_and_grads(model, guide)
        store = pyro.get_param_store()
        found.append((loss, *(store[name].grad for name in ("a", "d"))))
        assert all(bool(g[[0, 1, 4]].abs().sum() > 0) for g in found[-1][1:])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-13)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)


def test_straight_through_is_the_true_discrete_bound():
    """The loss of the discrete pair at the values drawn; the soft one is another number."""
    model, guide = hand_written()
    for straight_through in (True, False):
        p, q = relax(model, 0.6, straight_through), relax(guide, 0.6, straight_through)
        torch.manual_seed(2)
        loss = Trace_ELBO().loss(p, q)
        torch.manual_seed(2)
        values = poutine.trace(q).get_trace()
        if straight_through:
            drawn = {name: values.nodes[name]["value"].detach() for name in ("h", "y")}
        log_p = poutine.trace(poutine.condition(model, drawn)).get_trace().log_prob_sum()
        log_q = poutine.trace(poutine.condition(guide, drawn)).get_trace().log_prob_sum()
        assert (loss == pytest.approx(float((log_q - log_p).detach()), rel=1e-12)) is straight_through


def test_the_gradient_vanishes_on_average_where_the_guide_is_the_prior():
    """Row by row; Pyro's straight-through relaxation against a discrete prior is drawn away from it."""
    n, prior = 4000, torch.tensor([1.0, 0.0, -1.0, 0.5])

    def gradients(model, guide):
        logits = prior.repeat(n, 1).requires_grad_()
        Trace_ELBO().differentiable_loss(model, lambda: guide(logits)).backward()
        return logits.grad

    def program(logits, family=dist.OneHotCategorical):
        with pyro.plate("rows", n):
            pyro.sample("z", family(logits=logits))

    def quantized_family(logits):
        return dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=logits, validate_args=False)

    for wrap in (lambda p: relax(p, 0.5, straight_through=True), surrogate, lambda p: relax(p, 0.5)):
        assert means_agree(gradients(wrap(lambda: program(prior)), wrap(program)), torch.zeros(4))
    assert not means_agree(gradients(lambda: program(prior), lambda logits: program(logits, quantized_family)), torch.zeros(4))


def test_straight_through_programs_are_finite():
    """Exact enumeration takes a straight-through program as it is, and a factor guide keeps its kind and temperature."""

    def plain(x):
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.tensor([0.4, -1.0])).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=h @ torch.tensor([[1.0, -2.0], [0.5, 3.0]])).to_event(1), obs=x)

    x = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    hard = relax(plain, 0.5, straight_through=True)
    exact = Exact().infer(plain, x).log_evidence
    assert torch.allclose(Exact().infer(hard, x).log_evidence, exact, rtol=0, atol=1e-12)
    guide = AmortizedMeanField(hard, example=(x,))
    site = sites(guide, x)["h"]["fn"].base_dist
    assert isinstance(site, RelaxedBernoulli)
    assert site.straight_through
    assert float(site.temperature) == 0.5
    assert math.isfinite(Trace_ELBO().loss(hard, guide, x))
    soft = relax(plain, 0.5)
    site = sites(AmortizedMeanField(soft, example=(x,)), x)["h"]["fn"].base_dist
    assert (type(site), site.straight_through) == (RelaxedBernoulli, False)


@pytest.mark.parametrize("straight_through", [False, True])
def test_a_temperature_is_learned_by_stock_svi(straight_through):
    """Through `pyro.param`, in the store, positive; and it moves."""
    model, guide = hand_written()

    def temperature():
        return pyro.param("t", torch.tensor(0.5), constraint=constraints.positive)

    p, q = relax(model, temperature, straight_through), relax(guide, temperature, straight_through)
    svi = SVI(p, q, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    path = []
    for _ in range(4):
        assert math.isfinite(svi.step())
        path.append(float(pyro.param("t")))
    assert len(set(path)) == 4
    assert min(path) > 0
    assert set(pyro.get_param_store().keys()) == {"a", "d", "t"}


def test_a_temperature_is_a_number_or_a_function():
    for bad in ("hot", None, [0.5]):
        with pytest.raises(ValueError, match="number, a 0-d tensor or a function"):
            relax(Mixed(), bad)


def test_functions_of_bad_temperatures():
    model, _ = hand_written()
    for bad in (lambda: 0.0, lambda: torch.tensor(-1.0), lambda: torch.tensor([0.5, 0.5]), lambda: math.nan):
        with pytest.raises(ValueError, match="temperature"):
            relax(model, bad)()
        with pytest.raises(ValueError, match="temperature"):
            poutine.reparam(model, config={"h": RelaxReparam(bad)})()
    with pytest.raises(ValueError, match="temperature"):
        RelaxReparam(-1.0)


def test_reparam_takes_single_sites_and_leaves_others():
    model, _ = hand_written()
    found = sites(poutine.reparam(model, config={"h": RelaxReparam(torch.tensor(0.3))}))
    assert isinstance(found["h"]["fn"].base_dist, RelaxedBernoulli)
    assert not found["h"]["is_observed"]
    assert isinstance(found["y"]["fn"], dist.OneHotCategorical)
    everything = sites(poutine.reparam(Mixed(), config=lambda msg: RelaxReparam(0.3)), data())
    assert isinstance(everything["b"]["fn"].base_dist, RelaxedOneHotCategorical)
    assert isinstance(everything["c"]["fn"], dist.Normal)
    assert isinstance(everything["x"]["fn"].base_dist, dist.Bernoulli)
    with pytest.raises(ValueError, match="OneHotCategorical"):
        poutine.reparam(lambda: pyro.sample("k", dist.Categorical(torch.ones(3))), config={"k": RelaxReparam(0.3)})()


def test_a_mass_met_by_a_density_is_refused():
    """By the marks that relax leaves, which a replay carries, with validation off; by the values otherwise."""
    model, guide = hand_written()
    soft, hard = (lambda p: relax(p, 0.6)), (lambda p: relax(p, 0.6, True))
    wrong = [(soft, hard), (hard, soft), (soft, surrogate), (surrogate, soft)]
    for p, q in ((one(model), other(guide)) for one, other in wrong):
        for validate in (False, True):
            with (
                pyro.validation_enabled(validate),
                pytest.raises(ValueError, match=r"values of one kind at site .* a density would meet a mass"),
            ):
                Trace_ELBO().loss(p, q)
    unmarked = [(soft(model), guide), (hard(model), hand_written(straight_through=False)[1])]
    unmarked += [(surrogate(model), unmarked[1][1]), (discretize(soft(model)), unmarked[1][1])]
    for p, q in unmarked:
        for validate in (False, True):
            for objective in (Trace_ELBO(), TraceMeanField_ELBO()):
                with (
                    pyro.validation_enabled(validate),
                    pytest.raises(ValueError, match=r"values of one kind at site .* a density would meet a mass"),
                ):
                    objective.loss(p, q)
    for one, other in ((soft, soft), (hard, hard), (surrogate, hard), (hard, surrogate)):
        assert math.isfinite(Trace_ELBO().loss(one(model), other(guide)))
    assert math.isfinite(Trace_ELBO().loss(hard(model), hand_written(straight_through=True)[1]))


@pytest.mark.parametrize("structured", [False, True])
def test_our_guides_tell_what_they_draw(structured, monkeypatch):
    """Also where nobody looks at the values, as on a GPU."""
    monkeypatch.setattr(rewrite, "_kind", lambda *_: None)
    net = HierarchicalVAE(4, [("categorical", (2, 3)), ("normal", 1)], hidden=3)
    guide = AmortizedStructured(net) if structured else AmortizedMeanField(net, nn.Linear(4, 8))
    x = net.sample(3)
    soft, hard = (lambda p: relax(p, 0.6)), (lambda p: relax(p, 0.6, True))
    of_soft = AmortizedStructured(soft(net)) if structured else AmortizedMeanField(soft(net), nn.Linear(4, 8))
    with pyro.validation_enabled(False):
        for p, q in ((soft(net), guide), (hard(net), of_soft), (surrogate(net), of_soft), (soft(net), discretize(of_soft))):
            with pytest.raises(ValueError, match=r"'h1' in model and guide"):
                Trace_ELBO().loss(p, q, x)
        right = [(soft(net), of_soft), (soft(net), soft(guide)), (hard(net), guide), (hard(net), hard(guide)), (net, guide)]
        for p, q in [*right, (surrogate(net), guide), (surrogate(net), surrogate(guide)), (net, discretize(of_soft))]:
            assert math.isfinite(Trace_ELBO().loss(p, q, x))


def test_a_single_category_is_soft_and_hard_at_once():
    program = relax(lambda: pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(2, 1)).to_event(1)), 0.5)
    fn = RelaxedOneHotCategorical(0.5, logits=torch.zeros(2, 1))
    assert math.isfinite(Trace_ELBO().loss(program, lambda: pyro.sample("z", fn.to_event(1))))


def test_impossible_categories_are_named():
    """OneHotCategorical takes a logit of -inf; a density has no place for it."""
    logits = torch.tensor([0.0, 1.0, -math.inf])
    with pytest.raises(ValueError, match=r"at site 'k': expected finite logits .* 1 infinite .* -30"):
        relax(lambda: pyro.sample("k", dist.OneHotCategorical(logits=logits)), 0.5)()


def test_the_callers_infer_is_left_alone():
    mine = {"is_auxiliary": True}
    fn = dist.Bernoulli(0.5)
    trace = poutine.trace(relax(lambda: pyro.sample("z", fn, infer=mine), 0.5)).get_trace()
    assert mine == {"is_auxiliary": True}
    assert trace.nodes["z"]["infer"]["is_auxiliary"]
    assert isinstance(fn, dist.Bernoulli)


@pytest.mark.parametrize("straight_through", [False, True])
def test_predictive_and_analytic_kl_of_our_models(straight_through):
    net = SigmoidBeliefNet(4, [3, 2])
    guide = AmortizedMeanField(net)
    x = net.sample(6)
    p, q = relax(net, 0.5, straight_through), relax(guide, 0.5, straight_through)
    draws = Predictive(p, guide=q, num_samples=3, parallel=True)(x)
    assert bool(((draws["h2"] == 0) | (draws["h2"] == 1)).all()) is straight_through
    svi = SVI(p, q, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO(num_particles=2, vectorize_particles=True))
    rows = torch.tensor([4, 0, 5])
    assert math.isfinite(svi.step(x[rows], index=rows, num_data=6))
    top = poutine.trace(p).get_trace(x).nodes["h2"]["fn"]
    mine = poutine.trace(q).get_trace(x).nodes["h2"]["fn"]
    assert torch.allclose(
        kl_divergence(mine, top),
        kl_divergence(
            dist.Bernoulli(logits=mine.base_dist.logits),
            dist.Bernoulli(logits=top.base_dist.logits.expand_as(mine.base_dist.logits)),
        ).sum(-1),
    )


def test_discretize_undoes_straight_through():
    model, x = Mixed(), data()
    before, after = sites(model, x), sites(discretize(relax(model, 0.5, straight_through=True)), x)
    for name in ("g", "a", "b"):
        assert type(after[name]["fn"]) is type(before[name]["fn"])


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_relaxed_sites_are_not_enumerated(inside, straight_through):
    def model():
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.tensor([0.0, 1.0, 2.0])))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=torch.tensor(0.5))

    def empty():
        pass

    relaxed = relax(model, 0.5, straight_through)
    program = relax(config_enumerate(model), 0.5, straight_through) if inside else config_enumerate(discretize(relaxed))
    objective = TraceEnum_ELBO(max_plate_nesting=0)
    if inside:
        with pytest.raises(NotImplementedError, match=r"can be enumerated, got a RelaxedOneHotCategorical; .*discretize"):
            objective.loss(program, empty)
    else:
        assert objective.loss(program, empty) == pytest.approx(objective.loss(config_enumerate(model), empty))


@pytest.mark.parametrize("wrap", [lambda p: relax(p, 0.5), lambda p: relax(p, 0.5, True), surrogate])
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "cross_entropy", "normal"])
def test_every_kind_of_pixel_runs_without_data(wrap, likelihood):
    net = BernoulliVAE(4, 2, likelihood=likelihood, levels=3)
    x = net.sample(3)
    assert tuple(wrap(net)(batch_size=3).shape) == (3, 4)
    guide = AmortizedMeanField(wrap(net))
    assert math.isfinite(Trace_ELBO().loss(wrap(net), guide, x))
    if likelihood == "categorical":
        drawn = wrap(net)(batch_size=50) * 2
        assert torch.equal(drawn, drawn.round())


def test_what_is_relaxed_keeps_its_temperature():
    def model():
        return pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))

    for outer in (relax(relax(model, 0.3), 0.8), relax(relax(model, 0.3), 0.8, True), surrogate(relax(model, 0.3))):
        fn = poutine.trace(outer).get_trace().nodes["z"]["fn"].base_dist
        assert float(fn.temperature) == 0.3
        assert not fn.straight_through
