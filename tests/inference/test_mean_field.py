"""MeanField: coordinate ascent checked against the enumerated joint."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import BruteForce
from programs import CASES

from pyrovae.inference import Exact, MeanField
from pyrovae.models import toy

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


def test_float32():
    net = toy.belief_net().float()
    x = net.sample(4)
    posterior = MeanField(4).infer(net, x)
    assert posterior.log_evidence.dtype == torch.float32
    assert torch.allclose(posterior.log_evidence, posterior.expected_log_joint(net) + posterior.entropy, atol=1e-5)
