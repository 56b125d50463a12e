"""The declared route of belief nets: every answer equals the generic enumeration, and large nets are served or refused."""

import math
import time

import pytest
import torch
from stats import bound

from pyrovae.inference import EM, Exact, ExactLikelihood, ExactPosterior
from pyrovae.inference.exact.linear_code import LinearCodePosterior
from pyrovae.models import DeepBeliefNet, SigmoidBeliefNet, toy

NETS = {"one unit": [1], "one layer": [3], "two layers": [3, 2], "three layers": [2, 3, 2], "rbm on top": None}
ROWS = 6


def make(name, seed=0):
    if NETS[name] is not None:
        return toy.belief_net(5, NETS[name], seed=seed)
    torch.manual_seed(seed)
    net = DeepBeliefNet(5, [3, 2, 4])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=NETS)
def pair(request):
    """A net, its data, and both posteriors."""
    net = make(request.param)
    x = net.sample(ROWS)
    fast, slow = Exact().infer(net, x), Exact(declared=False).infer(net, x)
    assert isinstance(fast, LinearCodePosterior)
    assert isinstance(slow, ExactPosterior)
    return request.param, net, x, fast, slow


def test_every_answer(pair):
    name, net, _, fast, slow = pair
    assert fast.bound == "exact"
    close(fast.log_evidence, slow.log_evidence)
    assert list(fast.marginals) == list(slow.marginals)
    for site, p in slow.marginals.items():
        close(fast.marginals[site], p)
        close(fast.mean[site], slow.mean[site])
        close(fast.variance[site], slow.variance[site])
        assert torch.equal(fast.mode[site], slow.mode[site])
    close(fast.entropy, slow.entropy)
    z = slow.sample(20)
    close(fast.log_prob(z), slow.log_prob(z))
    weight = torch.randn(fast.marginals["h1"].shape[-1], requires_grad=True)
    for f in (lambda s: s["h1"] @ weight, lambda s: s["h1"].prod(-1), lambda s: s[min(s)] * s[max(s)].sum(-1, keepdim=True)):
        for a, b in zip(fast.expectation(f), slow.expectation(f), strict=True):
            close(a, b)
    (found,) = torch.autograd.grad(fast.expectation(lambda s: s["h1"] @ weight)[0].sum(), weight)
    close(found, fast.marginals["h1"].sum(0))
    other = make(name, seed=7)
    for model in (net, other):
        parameters = list(model.parameters())
        weights = torch.randn(ROWS)
        for objective in (lambda p, m=model, w=weights: p.expected_log_joint(m) @ w, lambda p, m=model: p.q_function(m)()):
            close(objective(fast), objective(slow))
            for a, b in zip(
                torch.autograd.grad(objective(fast), parameters), torch.autograd.grad(objective(slow), parameters), strict=True
            ):
                close(a, b)


def test_a_wrong_answer_is_noticed(pair):
    _, net, x, fast, _ = pair
    with torch.no_grad():
        net.biases[0][0] += 1e-6
    with pytest.raises(AssertionError):
        close(fast.log_evidence, Exact(declared=False).infer(net, x).log_evidence)


def test_draws(pair):
    """Frequencies of joint states, against their exact probabilities."""
    _, _, _, fast, _ = pair
    n = 3000
    z = fast.sample(n)
    p = fast.log_prob(z).exp()  # of what was drawn; its mean is Σ p², whose error is measured
    for site in z:
        mean, exact = z[site].mean(0), fast.marginals[site]
        assert float(((mean - exact) / (exact * (1 - exact) / n).sqrt()).abs().max()) < bound(exact.numel())
    average, stderr = -fast.log_prob(z).mean(0), fast.log_prob(z).std(0) / n**0.5
    assert float(((average - fast.entropy) / stderr).abs().max()) < bound(ROWS)
    assert not torch.allclose(p.mean(0), p.mean(0).roll(1))


def test_gradient_of_the_evidence(pair):
    name, net, x, _, _ = pair
    parameters = list(net.parameters())
    losses = [ExactLikelihood(declared=d).differentiable_loss(net, None, x) for d in (True, False)]
    close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        close(a, b)
    part, index = x[:2], torch.tensor([4, 1])
    losses = [ExactLikelihood(declared=d).loss(net, None, part, index=index, num_data=30).detach() for d in (True, False)]
    close(*losses)
    assert name != "one unit" or not torch.allclose(losses[0], ExactLikelihood().loss(net, None, part))


def test_small_memory_takes_chunks_of_rows_or_the_generic_way():
    net = toy.belief_net(6, 8)
    x = net.sample(40)
    whole = Exact().infer(net, x)
    parts = Exact(max_bytes=11_000).infer(net, x)
    assert isinstance(parts, LinearCodePosterior)
    assert isinstance(Exact(max_bytes=9_000).infer(net, x[:3]), ExactPosterior)
    close(parts.log_evidence, whole.log_evidence)
    close(parts.marginals["h1"], whole.marginals["h1"])
    close(parts.q_function(net)(), whole.q_function(net)())
    f = lambda s: s["h1"].prod(-1)  # noqa: E731
    close(parts.expectation(f)[0], whole.expectation(f)[0])


def test_float32_agrees_with_float64():
    net = toy.belief_net(6, [4, 3])
    x = net.sample(5)
    double = Exact().infer(net, x)
    single = Exact().infer(net.float(), x.float())
    assert isinstance(single, LinearCodePosterior)
    for a, b in (
        (single.log_evidence, double.log_evidence),
        (single.entropy, double.entropy),
        *((single.marginals[s], double.marginals[s]) for s in double.marginals),
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert single.sample(2)["h1"].dtype == torch.float32
    assert single.log_prob(single.sample(2)).dtype == torch.float32
    assert single.q_function(net)().dtype == torch.float32


def test_large_weights_do_not_underflow():
    torch.manual_seed(0)
    net = toy.belief_net(30, 6)
    with torch.no_grad():
        net.weights[0].mul_(200)
    x = torch.bernoulli(torch.full((10, 30), 0.5))
    fast, slow = Exact().infer(net, x), Exact(declared=False).infer(net, x)
    assert fast.diagnostics["groups"][0] > 1
    assert Exact().infer(toy.belief_net(30, [6, 3]), x).diagnostics["groups"] == (1, 1)
    close(fast.log_evidence, slow.log_evidence)
    close(fast.marginals["h1"], slow.marginals["h1"])


@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("hidden", [4, [3, 2]])
def test_em_never_falls_and_meets_the_generic_one(hidden, penalty):
    """From the same start, far in the end, a stationary point of the same objective."""
    x = toy.belief_net(6, 3, seed=1).sample(60)
    net = toy.belief_net(6, hidden, seed=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.3)
    fit = EM(Exact(), 150 if penalty == 0 else 400, penalty=penalty).fit(net, x)
    losses = torch.tensor([record["loss"] for record in fit.history])
    assert float(losses.diff().max()) <= 60 * 1e-9
    assert float(losses[0] - losses[-1]) > 1
    if penalty:
        total = ExactLikelihood(declared=False).differentiable_loss(net, None, x)
        total = total + penalty / 2 * sum((p**2).sum() for p in net.parameters())
        assert max(float(g.abs().max()) for g in torch.autograd.grad(total, list(net.parameters()))) < 1e-2


def test_em_keeps_to_parameters_that_learn():
    """A frozen weight, or a parameter outside the layers, sends the M-step to the generic one."""
    x = toy.belief_net(6, 3, seed=1).sample(30)
    net = toy.belief_net(6, 3, seed=2)
    net.weights[0].requires_grad_(False)
    kept = net.weights[0].clone()
    fit = EM(Exact(), 5).fit(net, x)
    assert torch.equal(net.weights[0], kept)
    assert fit.history[-1]["bound"] > fit.history[0]["bound"]


def test_twenty_bits():
    """2^20 codes of 200 rows in seconds; samples and marginals agree, log_prob of the mode is the largest."""
    torch.manual_seed(0)
    net = SigmoidBeliefNet(30, 20).double()
    x = net.sample(200).double()
    start = time.process_time()
    posterior = Exact().infer(net, x)
    assert isinstance(posterior, LinearCodePosterior)
    n = 400
    z = posterior.sample(n)["h1"]
    mean = posterior.marginals["h1"]
    assert time.process_time() - start < 60
    assert float(((z.mean(0) - mean) / (mean * (1 - mean) / n).sqrt()).abs().max()) < bound(mean.numel())
    ratio = (posterior.log_prob({"h1": z}) + posterior.log_evidence) - (
        torch.distributions.Bernoulli(logits=net.prior).log_prob(z).sum(-1)
        + torch.distributions.Bernoulli(logits=net.biases[0] + z @ net.weights[0]).log_prob(x).sum(-1)
    )
    assert float(ratio.abs().max()) < 1e-9


def test_refusals():
    with pytest.raises(ValueError, match=r"45 bits.*bytes.*seconds.*AIS.*Variational"):
        Exact().infer(SigmoidBeliefNet(4, 45), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"45 bits.*bytes.*seconds.*AIS.*Variational"):
        ExactLikelihood().loss(SigmoidBeliefNet(4, 45), None, torch.zeros(2, 4))
    net = toy.belief_net(4, 3)
    for bad in (math.nan, math.inf):
        spoilt = toy.belief_net(4, 3)
        with torch.no_grad():
            spoilt.weights[0][1, 2] = bad
        for method in (
            lambda m: Exact().infer(m, torch.zeros(2, 4)),
            lambda m: ExactLikelihood().loss(m, None, torch.zeros(2, 4)),
        ):
            with pytest.raises(ValueError, match=r"expected finite parameters, got NaN or infinity in weights\[0\]"):
                method(spoilt)
    with pytest.raises(ValueError, match=r"expected x in \{0, 1\}"):
        Exact().infer(net, torch.full((2, 4), 0.5))
    posterior = Exact().infer(net, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got none of"):
        posterior.log_prob({})
    with pytest.raises(ValueError, match="of shape"):
        posterior.log_prob({"h1": torch.zeros(1, 3, 3)})
    assert float(posterior.log_prob({"h1": torch.full((1, 2, 3), 0.5)})[0, 0]) == -math.inf
    large = Exact(max_bytes=2**26).infer(SigmoidBeliefNet(4, 20), torch.zeros(10_000, 4))
    with pytest.raises(ValueError, match=r"seconds; average f over posterior.sample\(n\)"):
        large.expectation(lambda z: z["h1"])


def test_wrapped_programs_are_enumerated():
    from pyro import poutine

    net = toy.belief_net(4, 3)
    x = net.sample(3)
    assert isinstance(Exact().infer(poutine.scale(net, scale=0.5), x), ExactPosterior)
    with poutine.scale(scale=0.5):
        scaled = ExactLikelihood().loss(net, None, x)
    assert torch.isfinite(scaled)
    close(Exact().infer(lambda x: net(x), x).log_evidence, Exact().infer(net, x).log_evidence)
    conditioned = poutine.condition(net, data={"h1": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="latent sites"):
        Exact().infer(conditioned, x)
