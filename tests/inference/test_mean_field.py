"""MeanField: coordinate ascent checked against the enumerated joint."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import BruteForce, bits
from programs import CASES

from pyrovae.inference import EM, Exact, MeanField
from pyrovae.inference.mean_field.layered_mean_field import LayeredMeanFieldPosterior
from pyrovae.models import DeepBeliefNet, toy

NAMES = [
    "one_bit_normal",
    "one_layer",
    "two_layers_probs",
    "three_layers_with_skip",
    "categorical_vector",
    "one_hot_categorical_likelihood",
    "binomial_latent",
    "mixed_sites_mixture_likelihood",
    "no_plate",
    "global_and_local",
    "two_globals_and_local",
    "nested_words_right",
    "nested_words_left",
    "explicit_dim_on_the_left",
    "two_batch_plates",
    "masked_rows_with_nan",
    "explicit_subsample",
    "concatenates_two_latents",
    "certain_and_impossible_probs",
    "infinite_logits",
    "impossible_between_layers",
    "function_with_pyro_module",
    "bare_param_with_constraint",
]


def build(name):
    case = CASES[name]()
    return case, BruteForce(case.program, case.args, case.values, case.batch).solve()


def log_q_of_states(posterior, brute):
    """Log q `[C, *batch]` of every joint state of the oracle."""
    z = {name: value.to(torch.get_default_dtype()) for name, value in brute.z.items()}
    return posterior.log_prob(z).reshape(brute.weights.shape)


@pytest.mark.parametrize("name", NAMES)
def test_bound_gap_and_monotonicity(name):
    case, brute = build(name)
    posterior = MeanField(3, tolerance=1e-13, max_iterations=1000).infer(case.program, *case.args)
    log_q = log_q_of_states(posterior, brute)
    q = log_q.exp()
    assert torch.allclose(q.sum(0), torch.ones_like(q[0]), atol=1e-10)
    inside = q > 1e-250
    bound = torch.where(inside, q * (torch.where(inside, brute.lj, 0.0) - log_q), 0.0).sum(0)
    evidence = posterior.log_evidence.reshape(bound.shape)
    assert torch.allclose(evidence, bound, atol=1e-10)
    log_posterior = brute.lj - brute.log_evidence
    kl = torch.where(inside, q * (log_q - torch.where(inside, log_posterior, 0.0)), 0.0).sum(0)
    assert torch.allclose(brute.log_evidence - evidence, kl, atol=1e-10)
    assert (kl > -1e-10).all()
    for history in posterior.diagnostics["bounds"]:
        steps = torch.tensor(history).diff()
        assert float(steps.min()) > -1e-11 * (1 + abs(history[-1]))
    # expected_log_joint + entropy = bound, and the entropy is that of q
    entropy = torch.where(inside, -q * log_q, 0.0).sum(0)
    assert torch.allclose(posterior.entropy.reshape(entropy.shape), entropy, atol=1e-10)
    assert torch.allclose(posterior.expected_log_joint(case.program) + posterior.entropy, posterior.log_evidence, atol=1e-10)
    assert torch.allclose(posterior.q_function(case.program)(), posterior.expected_log_joint(case.program).sum(), atol=1e-10)


@pytest.mark.parametrize("name", ["one_layer", "categorical_vector", "mixed_sites_mixture_likelihood", "two_layers_probs"])
def test_fixed_point_has_zero_gradient(name):
    """The ELBO by brute force as a function of free logits: its gradient is 0 at q, and not at another q."""
    case, brute = build(name)
    posterior = MeanField(2, tolerance=1e-14, max_iterations=5000).infer(case.program, *case.args)

    def gradient(shift):
        logits, log_q = [], 0.0
        for latent in posterior.structure.latents:
            p = posterior.marginals[latent.name]
            p = torch.stack((1 - p, p), -1) if latent.kind == "bit" else p
            p = p.reshape(*latent.batch_shape, latent.components, latent.cardinality)
            free = (p.log() + shift * torch.randn_like(p)).requires_grad_()
            logits.append(free)
            codes = latent.encode(brute.z[latent.name])  # [C, N, n]
            log_p = torch.log_softmax(free, -1).expand(len(codes), *free.shape)
            log_q = log_q + log_p.gather(-1, codes.unsqueeze(-1)).squeeze(-1).sum(-1)
        elbo = (log_q.exp() * (brute.lj - log_q)).sum()
        return max(float(g.abs().max()) for g in torch.autograd.grad(elbo, logits))

    assert gradient(0.0) < 1e-6
    assert gradient(0.3) > 1e-3


@pytest.mark.parametrize("name", ["one_layer", "global_and_local", "one_hot_categorical_likelihood", "nested_words_right"])
def test_marginals_are_those_of_q(name):
    case, brute = build(name)
    posterior = MeanField(2).infer(case.program, *case.args)
    q = log_q_of_states(posterior, brute).exp()
    brute.weights = q
    for site, p in posterior.marginals.items():
        assert torch.allclose(p, brute.marginal(site).to(p.dtype).reshape(p.shape), atol=1e-10)
    value, stderr = posterior.expectation(case.f)
    assert torch.allclose(value, brute.expectation(case.f, case.plates).reshape(value.shape), atol=1e-10)
    assert float(stderr.abs().max()) == 0
    z, limit = brute.largest_z(posterior.sample(4000))
    assert z < limit
    flat = q**0.2  # the wrong law
    brute.weights = flat / flat.sum(0)
    assert brute.largest_z(posterior.sample(4000))[0] > limit


@pytest.mark.parametrize("hidden", [1, 2, 5, [3, 2], [2, 3, 2]], ids=str)
def test_declared_layers_give_what_the_table_gives(hidden):
    """From the same starts, as the same random numbers lead to."""
    net = toy.belief_net(6, hidden)
    x = net.sample(7)
    found = []
    for declared in (True, False):
        torch.manual_seed(3)
        found.append(MeanField(3, 1000, tolerance=1e-14, declared=declared).infer(net, x))
    layers, table = found
    assert isinstance(layers, LayeredMeanFieldPosterior)
    assert not isinstance(table, LayeredMeanFieldPosterior)
    assert torch.allclose(layers.log_evidence, table.log_evidence, atol=1e-10)
    assert [len(history) for history in layers.diagnostics["bounds"]] == [len(h) for h in table.diagnostics["bounds"]]
    for a, b in zip(layers.diagnostics["bounds"], table.diagnostics["bounds"], strict=True):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-10)
    assert torch.allclose(layers.expected_log_joint(net) + layers.entropy, layers.log_evidence, atol=1e-10)
    for site, p in table.marginals.items():
        assert torch.allclose(layers.marginals[site], p, atol=1e-6)  # which of two equal starts is kept is rounding


@pytest.mark.parametrize("hidden", [3, [2, 3]], ids=str)
def test_answers_by_layers_are_those_of_a_sum_over_states(hidden):
    net, other = toy.belief_net(6, hidden), toy.belief_net(6, hidden, seed=1)
    x = net.sample(5)
    q = MeanField(2).infer(net, x)
    by_states = q.expectation(lambda z: q.log_joint(z, other))[0]
    assert torch.allclose(q.expected_log_joint(other), by_states, atol=1e-10)
    assert torch.allclose(q.q_function(other)(), by_states.sum(), atol=1e-10)
    assert torch.allclose(q.entropy, -q.expectation(lambda z: q.log_prob(z))[0], atol=1e-10)
    wrapped = lambda x: other(x)  # noqa: E731 declares nothing
    assert torch.allclose(q.expected_log_joint(wrapped), by_states, atol=1e-10)
    assert torch.allclose(q.q_function(wrapped)(), by_states.sum(), atol=1e-10)
    parameters = list(other.parameters())
    for a, b in zip(
        torch.autograd.grad(q.q_function(other)(), parameters), torch.autograd.grad(by_states.sum(), parameters), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-10)
    brute = BruteForce(net, (x,), {s.name: bits(s.components) for s in q.structure.latents}).solve()
    brute.weights = log_q_of_states(q, brute).exp()
    z, limit = brute.largest_z(q.sample(4000))
    assert z < limit


@pytest.mark.parametrize("hidden", [[4, 3], [3, 3, 2]], ids=str)
def test_under_a_top_rbm(hidden):
    torch.manual_seed(2)
    net = DeepBeliefNet(5, hidden)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 1.5)
    x = net.sample(6)
    found = []
    for declared in (True, False):
        torch.manual_seed(3)
        found.append(MeanField(3, 1000, tolerance=1e-14, declared=declared).infer(net, x))
    assert isinstance(found[0], LayeredMeanFieldPosterior)
    assert torch.allclose(found[0].log_evidence, found[1].log_evidence, atol=1e-10)
    assert bool((found[0].log_evidence <= Exact(declared=False).infer(net, x).log_evidence + 1e-10).all())


def test_twenty_bits_beyond_the_table():
    """The table of the joint would take 2^20 entries for every row."""
    net = toy.belief_net(12, 20)
    x = net.sample(40)
    with pytest.raises(ValueError, match="bytes"):
        MeanField(declared=False).infer(net, x)
    posterior = MeanField(1, 20).infer(net, x)
    assert float(torch.tensor(posterior.diagnostics["bounds"][0]).diff().min()) > -1e-11
    gap = Exact().infer(net, x).log_evidence - posterior.log_evidence
    assert bool((gap > -1e-9).all())
    assert float(gap.mean()) < 3
    assert bool(torch.isfinite(posterior.q_function(net)()))


def test_variational_em_by_layers_and_by_table():
    """The closed statistics lead EM where sums over states do."""
    data = toy.belief_net(5, 3).sample(60)
    ends = []
    for declared in (True, False):
        net = toy.belief_net(5, 3, seed=4)
        torch.manual_seed(0)
        fit = EM(MeanField(1, 500, tolerance=1e-12, declared=declared), num_iterations=3).fit(net, data)
        ends.append(fit.history[-1]["bound"])
    assert fit.history[-1]["bound"] > fit.history[0]["bound"] + 0.1
    assert abs(ends[0] - ends[1]) < 1e-5


def test_one_component_is_exact():
    case, brute = build("one_hot_categorical_likelihood")
    posterior = MeanField(1).infer(case.program, *case.args)
    assert torch.allclose(posterior.log_evidence, brute.log_evidence, atol=1e-10)


def test_restarts_are_kept_per_datum():
    """Two modes, x alike: some starts find the deep one for some data only."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((4,), 0.5)).to_event(1))
            ends = z.prod(-1) + 0.5 * (1 - z).prod(-1)
            pyro.factor("modes", 12 * ends + x)

    x = torch.zeros(200)
    single = MeanField(1).infer(model, x)
    many = MeanField(12).infer(model, x)
    exact = Exact().infer(model, x)
    assert float(single.log_evidence.max() - single.log_evidence.min()) > 1  # starts differ
    assert float(many.log_evidence.max() - many.log_evidence.min()) < 1e-4  # the best of 12 never does (0.5^12 x 200 rows)
    assert bool((many.log_evidence <= exact.log_evidence + 1e-10).all())
    assert len(many.diagnostics["bounds"]) == 12
    assert float(many.log_evidence.mean()) > max(h[-1] for h in many.diagnostics["bounds"])
    # what is kept is a bound of the q that is kept
    assert torch.allclose(many.expected_log_joint(model) + many.entropy, many.log_evidence, atol=1e-10)


def test_refusal_names_the_route_and_the_bytes():
    net = toy.belief_net(10, 40)
    with pytest.raises(ValueError, match=r"bytes.*LocalMeanField|LocalMeanField.*bytes"):
        MeanField().infer(net, net.sample(2))
    net = toy.belief_net(10, 12)
    with pytest.raises(ValueError, match=r"expected .* got .*bytes.*LocalMeanField"):
        MeanField(max_bytes=2**14).infer(net, net.sample(20))


def test_continuous_latent_is_refused():
    with pytest.raises(ValueError, match=r"finitely many values .* got"):
        MeanField().infer(toy.LinearGaussian(), torch.zeros(2, 3))


@pytest.mark.parametrize("arguments", [{"num_restarts": 0}, {"max_iterations": 0}, {"tolerance": -1.0}, {"max_bytes": 0}])
def test_numbers_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected num_restarts >= 1"):
        MeanField(**arguments)


def test_snapshot():
    net = toy.belief_net()
    x = net.sample(4)
    posterior = MeanField(2).infer(net, x)
    z = posterior.sample(5)
    before = posterior.log_prob(z)
    marginals = posterior.marginals["h1"].clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert torch.equal(posterior.log_prob(z), before)
    assert torch.equal(posterior.marginals["h1"], marginals)


def test_float32_at_large_weights():
    """The bound is that of q, summed in float64: it does not pass log p(x) by what float32 rounds off large terms."""
    for seed in range(10):
        torch.manual_seed(seed)
        net = toy.belief_net(8, 5).float()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(0, 300.0)
        x = net.sample(20)
        found = MeanField(4).infer(net, x)
        wide = copy.deepcopy(net).double()
        exact = Exact().infer(wide, x.double()).log_evidence
        assert found.log_evidence.dtype == torch.float32
        assert bool((found.log_evidence <= (exact + 1e-10).float()).all())


def test_float32():
    net = toy.belief_net().float()
    x = net.sample(4)
    posterior = MeanField(4).infer(net, x)
    assert posterior.log_evidence.dtype == torch.float32
    assert torch.allclose(posterior.log_evidence, posterior.expected_log_joint(net) + posterior.entropy, atol=1e-5)
