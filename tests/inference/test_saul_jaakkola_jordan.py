"""SaulJaakkolaJordan: a lower bound by enumeration, monotone, best in ξ, and what would not be a bound is caught."""

import copy
import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from torch.nn.functional import softplus

from pyrovae.inference import EM, Exact, MeanField, SaulJaakkolaJordan
from pyrovae.inference.mean_field.softplus_bound import SoftplusBound, bound_of_softplus
from pyrovae.models import DeepBeliefNet, SigmoidBeliefNet, toy

DEEP = [1, 5, [3, 2], [2, 3, 2]]


def random_net(visible, hidden, scale, seed):
    torch.manual_seed(seed)
    net = SigmoidBeliefNet(visible, hidden)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, scale)
    return net


def units(seed, bits=6, count=8, rows=3, scale=2.0):
    """Means of parents, weights and biases, and E[softplus(z)] `[rows, count]` by listing all states of the parents."""
    torch.manual_seed(seed)
    means, weight, bias = torch.rand(rows, bits), scale * torch.randn(bits, count), scale * torch.randn(count)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=bits)))
    q = torch.where(states.bool().unsqueeze(1), means, 1 - means).prod(-1)  # [S, rows]
    return means, weight, bias, torch.einsum("sn,sd->nd", q, softplus(bias + states @ weight, threshold=700.0))


def tightened(means, weight, bias):
    bound = SoftplusBound(weight, bias)
    bound.start(means.logit())
    bound.tighten(means.logit(), steps=100)
    return bound


def per_unit(means, tilt, weight, bias):
    """ξ E[z] + log E[e^{−ξz} + e^{(1−ξ)z}] of each unit by listing all states of the parents."""
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=means.shape[1])))
    log_q = torch.where(states.bool().unsqueeze(1), means, 1 - means).log().sum(-1)[..., None]  # [S, N, 1]
    z = (bias + states @ weight).unsqueeze(1)
    return tilt * (bias + means @ weight) + torch.logsumexp(log_q + torch.logaddexp(-tilt * z, (1 - tilt) * z), 0)


def is_upper_bound(value, exact):
    return bool((value >= exact - 1e-12).all())


@pytest.mark.parametrize("scale", [0.3, 2.0, 20.0])
def test_bound_of_softplus(scale):
    """Above E[softplus(z)] at every ξ; Newton finds the least of a grid; Jensen's ξ = 0 is looser."""
    for seed in range(3):
        means, weight, bias, exact = units(seed, scale=scale)
        bound = tightened(means, weight, bias)
        tilt = bound.tilt
        best = per_unit(means, tilt, weight, bias)
        assert torch.allclose(bound.value(), best.sum(-1), rtol=1e-12)
        assert torch.allclose(bound_of_softplus(means.logit(), tilt, weight, bias), best.sum(-1), rtol=1e-12)
        assert is_upper_bound(best, exact)
        assert bool(((tilt >= 0) & (tilt <= 1)).all())
        grid = torch.linspace(0, 1, 201)
        values = torch.stack([per_unit(means, torch.full_like(tilt, float(t)), weight, bias) for t in grid])
        assert is_upper_bound(values, exact)
        assert bool((best <= values.min(0).values + 1e-10).all())
        assert bool((best < values[0] - 1e-4).any()), "Jensen's bound is looser"
        assert float((values.argmin(0) - 200 * tilt).abs().max()) <= 1.0 + 1e-6
        # The check is sharp: E[z] inside the softplus lies on the other side.
        assert not is_upper_bound(softplus(bias + means @ weight), exact)


def test_a_bit_by_hand():
    """One parent, z = b + hW: E[e^{tz}] = e^{tb}(1 − μ + μe^{tW}); with two values the best ξ is exact."""
    mean, weight, bias = 0.3, 2.5, -1.2
    means, w, b = torch.tensor([[mean]]), torch.tensor([[weight]]), torch.tensor([bias])
    exact = (1 - mean) * math.log1p(math.exp(bias)) + mean * math.log1p(math.exp(bias + weight))
    tilt = 0.4
    low = math.exp(-tilt * bias) * (1 - mean + mean * math.exp(-tilt * weight))
    high = math.exp((1 - tilt) * bias) * (1 - mean + mean * math.exp((1 - tilt) * weight))
    by_hand = tilt * (bias + mean * weight) + math.log(low + high)
    assert math.isclose(float(bound_of_softplus(means.logit(), torch.tensor([[tilt]]), w, b)), by_hand, rel_tol=1e-14)
    assert by_hand > exact + 1e-4
    assert math.isclose(float(tightened(means, w, b).value()), exact, rel_tol=1e-10)


def test_slope_and_moves_are_those_of_the_bound():
    means, weight, bias, _ = units(0)
    bound = tightened(means, weight, bias)
    free = means.clone().requires_grad_()
    bound_of_softplus(free.logit(), bound.tilt, weight, bias).sum().backward()
    for j in range(means.shape[1]):
        assert torch.allclose(bound.slope(j, means[:, j].logit()), free.grad[:, j], atol=1e-12)
    for j in range(means.shape[1]):
        bound.slope(j, means[:, j].logit())
        means[:, j] = torch.rand(len(means))
        bound.move(j, means[:, j].logit())
    bound.mean = bias + means @ weight
    assert torch.allclose(bound.value(), bound_of_softplus(means.logit(), bound.tilt, weight, bias), atol=1e-12)


@pytest.mark.parametrize("hidden", DEEP, ids=str)
def test_lower_bound_by_enumeration(hidden):
    for seed, scale in itertools.product(range(2), (0.5, 2.0, 6.0)):
        net = random_net(5, hidden, scale, seed)
        x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
        found = SaulJaakkolaJordan(2, 500).infer(net, x)
        exact = Exact(declared=False).infer(net, x).log_evidence
        assert bool((found.log_evidence <= exact + 1e-10).all())
        # The ELBO of the same q, by enumeration, lies between.
        elbo = found.expectation(lambda z: found.log_joint(z, net))[0] + found.entropy  # noqa: B023
        assert bool((elbo <= exact + 1e-10).all())
        assert bool((found.log_evidence <= elbo + 1e-10).all())
        assert float((elbo - found.log_evidence).detach().max()) > 1e-4 or hidden == 1, "a slack that would be seen"


def test_the_plug_in_is_no_bound():
    """Mean field with softplus(E[z]) in place of a bound overshoots log p(x): the check above tells."""
    net = random_net(5, 5, 2.0, 0)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
    found = SaulJaakkolaJordan(2).infer(net, x)
    mean, layers = found.marginals["h1"], net.layers()
    received = layers.biases[0] + mean @ layers.weights[0]
    value = (x * received - softplus(received)).sum(-1) + found.entropy
    value = value + mean @ layers.top_bias - softplus(layers.top_bias).sum()
    assert not bool((value <= Exact(declared=False).infer(net, x).log_evidence + 1e-10).all())


@pytest.mark.parametrize("hidden", DEEP, ids=str)
def test_monotone_converged_and_accounted(hidden):
    net = random_net(6, hidden, 2.0, 1)
    x = net.sample(9)
    found = SaulJaakkolaJordan(3, 3000, tolerance=1e-12).infer(net, x)
    for history in found.diagnostics["bounds"]:
        assert float(torch.tensor(history).diff().min()) > -1e-11
    assert bool(found.diagnostics["converged"].all())
    assert torch.allclose(found.expected_log_joint(net) + found.entropy, found.log_evidence, atol=1e-10)
    assert found.bound == "lower"
    few = SaulJaakkolaJordan(1, 1, tolerance=0.0).infer(net, x)
    assert few.diagnostics["iterations"] == 1
    assert not bool(few.diagnostics["converged"].all())


def expected_log_joint_by_listing(net, x, logits):
    """E_q[log p(x, h)] in float64, over all joint states."""
    net, x = copy.deepcopy(net).double(), x.double()
    q = torch.cat([value.double() for value in logits.values()], -1)
    codes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=q.shape[-1]))).unsqueeze(1)
    states = codes.split([value.shape[-1] for value in logits.values()], -1)
    total, below = 0.0, x
    for weight, bias, h in zip(net.weights, net.biases, states, strict=True):
        z = bias + h @ weight
        total = total + (below * z - softplus(z, threshold=700.0)).sum(-1)
        below = h
    total = total + (below * net.prior - softplus(net.prior, threshold=700.0)).sum(-1)
    log_q = -softplus(torch.where(codes > 0, -q, q), threshold=700.0).sum(-1)
    return (log_q.exp() * total).sum(0).detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [20.0, 100.0, 300.0])
def test_saturated_units_under_large_weights(scale, dtype):
    """Where μ rounds to 1, 1 − μ decides: the bound stays one, its gradient a number, and EM's objective is `infer`'s."""
    hidden = [3, 2]
    rounding = 10 * 40 * scale * torch.finfo(dtype).eps  # of a dozen sums of all 39 terms
    for seed in range(3):
        net = random_net(5, hidden, 1.0, seed).to(dtype)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(scale * parameter.sign())
        x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)), dtype=dtype)
        found = SaulJaakkolaJordan(2, 50).infer(net, x)
        assert bool((found.log_evidence <= Exact(declared=False).infer(net, x).log_evidence + rounding).all())
        assert torch.allclose(found.expected_log_joint(net) + found.entropy, found.log_evidence, rtol=0, atol=rounding)
        for size in (1.0, 20.0, 200.0):
            logits = {site: size * torch.randn_like(value) for site, value in found.logits.items()}
            tilts = tuple(torch.rand_like(tilt) for tilt in found.tilts)
            other = replace(found, logits=logits, tilts=tilts)
            value = other.expected_log_joint(net)
            exact = expected_log_joint_by_listing(net, x, logits)
            assert bool((value <= exact + rounding).all())
            assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value.sum(), list(net.parameters())))


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_monotone_at_large_weights(scale):
    for seed in range(6):
        net = random_net(6, [5, 3], scale, seed)
        found = SaulJaakkolaJordan(3, 60).infer(net, net.sample(5))
        for history in found.diagnostics["bounds"]:
            assert float(torch.tensor(history).diff().min()) >= -1e-13 * 100 * scale


def test_learning_where_weights_grow():
    """Data that a net can tell apart for sure: weights rise without limit, and the bound goes on rising."""
    x = torch.zeros(40, 8)
    x[:20, :4], x[20:, 4:6], x[::2, 7] = 1, 1, 1
    for dtype in (torch.float64, torch.float32):
        net = random_net(8, 3, 20.0, 0).to(dtype)
        bounds = [record["bound"] for record in EM(SaulJaakkolaJordan(2, 50), num_iterations=6).fit(net, x.to(dtype)).history]
        assert all(math.isfinite(bound) for bound in bounds)
        assert bounds[-1] > bounds[0]
        assert all(bool(parameter.isfinite().all()) for parameter in net.parameters())


def test_fixed_point_has_zero_gradient():
    net = random_net(6, [3, 2], 2.0, 2)
    found = SaulJaakkolaJordan(1, 20000, tolerance=0.0).infer(net, net.sample(4))

    def gradient(shift):
        logits = {k: (v + shift * torch.randn_like(v)).requires_grad_() for k, v in found.logits.items()}
        other = type(found)(**{**vars_of(found), "logits": logits})
        bound = (other.expected_log_joint(net) + other.entropy).sum()
        return max(float(g.abs().max()) for g in torch.autograd.grad(bound, list(logits.values())))

    assert gradient(0.0) < 1e-5
    assert gradient(0.3) > 1e-3


def vars_of(posterior):
    return {item.name: getattr(posterior, item.name) for item in fields(posterior)}


@pytest.mark.parametrize("hidden", [[4, 3], [3, 4, 2]], ids=str)
def test_under_a_top_rbm(hidden):
    for seed in range(2):
        torch.manual_seed(seed)
        net = DeepBeliefNet(5, hidden)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(0, 1.5)
        x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
        found = SaulJaakkolaJordan(2, 500, tolerance=1e-10).infer(net, x)
        exact = Exact(declared=False).infer(net, x).log_evidence
        assert bool((found.log_evidence <= exact + 1e-10).all())
        assert float((exact - found.log_evidence).mean()) < 2.0
        assert all(float(torch.tensor(h).diff().min()) > -1e-11 for h in found.diagnostics["bounds"])
        assert torch.allclose(found.expected_log_joint(net) + found.entropy, found.log_evidence, atol=1e-10)


def test_a_top_that_cannot_be_summed_is_refused():
    net = DeepBeliefNet(5, [40, 50])
    with pytest.raises(ValueError, match=r"expected at most 30 bits .* AIS"):
        SaulJaakkolaJordan().infer(net, torch.zeros(2, 5))


def test_learning_by_em_raises_the_bound():
    """The paper's learning: EM on the bound; from one start its M-steps never lower what they are given."""
    data = toy.belief_net(6, 3).sample(200)
    net = random_net(6, 3, 0.5, 3)
    fit = EM(SaulJaakkolaJordan(2), num_iterations=8).fit(net, data)
    bounds = [record["bound"] for record in fit.history]
    assert bounds[-1] > bounds[0] + 0.05
    assert bounds[-1] <= float(Exact().infer(net, data).log_evidence.mean())


def test_a_wide_net():
    """784-200, which nothing enumerates: expectations are draws of q, and the bound is below what importance sampling sees."""
    torch.manual_seed(0)
    net = SigmoidBeliefNet(784, 200).float()
    x = net.sample(3)
    found = SaulJaakkolaJordan(1, 3).infer(net, x)
    assert found.log_evidence.dtype == torch.float32
    assert bool(found.log_evidence.isfinite().all())
    value, stderr = found.expectation(lambda z: z["h1"])
    assert bool((stderr > 0).any())
    assert torch.allclose(value, found.marginals["h1"], atol=0.2)
    first, *_, last = found.diagnostics["bounds"][0]
    assert last > first


def test_jensen_in_whole():
    """With ξ = 0 everywhere the bound of log p(x) is Jensen's, and lower."""
    net = random_net(6, 4, 2.0, 5)
    x = net.sample(5)
    found = SaulJaakkolaJordan(2).infer(net, x)
    jensen = type(found)(**{**vars_of(found), "tilts": tuple(torch.zeros_like(tilt) for tilt in found.tilts)})
    assert bool((jensen.expected_log_joint(net) + jensen.entropy < found.log_evidence - 1e-3).all())
    assert bool((MeanField(8).infer(net, x).log_evidence >= found.log_evidence - 1e-6).all())


def test_refusals():
    with pytest.raises(ValueError, match=r"expected a model that declares layers .* MeanField"):
        SaulJaakkolaJordan().infer(toy.Mixture(4, 3), torch.zeros(2, 4))
    net = toy.belief_net(4, 3)
    with torch.no_grad():
        net.weights[0][0, 0] = 700.0
    with pytest.raises(ValueError, match="expected weights of at most 600, got 700"):
        SaulJaakkolaJordan().infer(net, torch.zeros(2, 4))
    with torch.no_grad():
        net.weights[0][0, 0] = 0.0
        net.prior[0] = math.inf
    with pytest.raises(ValueError, match="expected finite weights"):
        SaulJaakkolaJordan().infer(net, torch.zeros(2, 4))


@pytest.mark.parametrize("arguments", [{"num_restarts": 0}, {"max_iterations": 0}, {"tolerance": -1.0}, {"num_draws": 1}])
def test_numbers_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected num_restarts >= 1"):
        SaulJaakkolaJordan(**arguments)
