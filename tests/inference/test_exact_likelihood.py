"""ExactLikelihood: its value and gradient against the list of joint states, and its place in stock Pyro."""

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from brute_force import BruteForce, bits
from programs import CASES
from pyro import poutine
from torch import nn

from pyrovae.inference import Exact, ExactLikelihood
from pyrovae.models import toy


def _truth(name, scale=1.0):
    torch.manual_seed(0)
    case = CASES[name]()
    oracle = BruteForce(case.program, case.args, case.values, case.batch)
    torch.set_rng_state(oracle.rng)
    loss = -scale * torch.logsumexp(oracle.log_joint(), 0).sum()
    return case, loss


@pytest.mark.parametrize("max_bytes", [2**30, "small"])
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("one_layer", 1.0),
        ("two_layers_probs", 1.0),
        ("global_and_local", 1.0),
        ("nested_words_left", 1.0),
        ("concatenates_two_latents", 1.0),
        ("uniform_scale", 0.5),
        ("explicit_subsample", 2.0),
        ("random_subsample", 2.0),
        ("function_with_pyro_module", 1.0),
    ],
)
def test_value_and_gradient(name, scale, max_bytes):
    case, loss = _truth(name, scale)
    state = torch.get_rng_state()
    if max_bytes == "small":
        max_bytes = _smallest(case)
    truth = torch.autograd.grad(loss, case.parameters)
    elbo = ExactLikelihood(max_bytes=max_bytes)
    for method in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        torch.set_rng_state(state)
        found = method(case.program, None, *case.args)
        assert found.shape == ()
        torch.testing.assert_close(found.detach(), loss.detach(), rtol=1e-10, atol=1e-10)
    for parameter, gradient in zip(case.parameters, truth, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(0.999 * parameter.grad, gradient, rtol=1e-10, atol=1e-10)  # a wrong scale would show


def _smallest(case):
    """The least max_bytes that is not refused, to a tenth: so the states are walked in as many chunks as may be."""
    state, size = torch.get_rng_state(), 2.0**30
    while True:
        try:
            torch.set_rng_state(state)
            Exact(max_bytes=int(size / 1.1)).infer(case.program, *case.args)
        except ValueError:
            torch.set_rng_state(state)
            return int(size)
        size /= 1.1 if size < 2**16 else 2


def test_chunks_give_the_same_gradient():
    net = toy.belief_net(6, 8)
    x = net.sample(5)
    gradients = []
    for max_bytes in (2**30, 20_000):
        net.zero_grad()
        ExactLikelihood(max_bytes=max_bytes).loss_and_grads(net, None, x)
        gradients.append([p.grad.clone() for p in net.parameters()])
    from pyrovae.inference.exact.enumeration import Enumeration

    assert len(Enumeration(net, (x,), {}, max_bytes=20_000).chunks) > 3
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def _param_model(x):
    mean = pyro.param("mean", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(z * mean, 1.0), obs=x)


@pytest.mark.parametrize("make", [lambda: toy.belief_net(6, 3), lambda: _param_model], ids=["module", "bare param"])
def test_stock_svi_learns(make):
    program = make()
    x = program.sample(20) if isinstance(program, nn.Module) else torch.randn(20) + 1
    svi = pyro.infer.SVI(program, None, pyro.optim.Adam({"lr": 0.05}), ExactLikelihood())
    start = ExactLikelihood().loss(program, None, x)
    before = list(pyro.get_param_store().keys())
    losses = [svi.step(x) for _ in range(20)]
    assert all(isinstance(loss, float) for loss in losses)
    assert losses[0] == pytest.approx(float(start), abs=1e-10)
    assert losses[-1] < losses[0] - 0.1
    assert list(pyro.get_param_store().keys()) == before
    assert isinstance(svi.evaluate_loss(x), float)


def test_two_instances_under_stock_svi_both_move():
    nets = [toy.belief_net(4, 2, seed=s) for s in range(2)]
    for net in nets:
        before = [p.detach().clone() for p in net.parameters()]
        pyro.infer.SVI(net, None, pyro.optim.Adam({"lr": 0.05}), ExactLikelihood()).step(torch.eye(4))
        assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_elbo_module():
    net, x = toy.belief_net(4, 2), torch.eye(4)
    module = ExactLikelihood()(net, None)
    loss = module(x)
    loss.backward()
    torch.testing.assert_close(loss.detach(), -Exact().infer(net, x).log_evidence.sum())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_batch_is_the_sum_of_its_rows():
    net = toy.belief_net(4, 2)
    x = net.sample(5)
    elbo = ExactLikelihood()
    rows = sum(elbo.loss(net, None, row) for row in x.split(1))
    torch.testing.assert_close(elbo.loss(net, None, x), rows)


def test_random_rows_change_from_call_to_call():
    data = torch.randn(30)

    def model():
        with pyro.plate("data", 30, subsample_size=3) as i:
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    losses = {float(ExactLikelihood().loss(model, None)) for _ in range(5)}
    assert len(losses) > 1
    before = torch.get_rng_state()
    ExactLikelihood().loss(toy.belief_net(4, 2), None, torch.eye(4))
    assert torch.equal(before, torch.get_rng_state())  # nothing random in the program, nothing drawn


def test_minibatches_are_unbiased():
    """The mean over all minibatches of N/B times their rows is the whole."""
    import itertools

    net = toy.belief_net(4, 2)
    x = net.sample(5)
    losses = (
        [
            ExactLikelihood().loss(net, None, x[list(i)], index=torch.tensor(i), num_data=5)
            for i in itertools.combinations(range(5), 2)
        ]
        if "index" in net.forward.__kwdefaults__
        else []
    )
    torch.testing.assert_close(torch.stack(losses).mean(), ExactLikelihood().loss(net, None, x))


def test_trace_enum_agrees():
    w = torch.randn(3, 4)

    @pyro.infer.config_enumerate
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = [pyro.sample(f"z{i}", dist.Bernoulli(0.2 + 0.2 * i)) for i in range(3)]
            drive = sum(z[i].unsqueeze(-1) * w[i] for i in range(3))
            pyro.sample("x", dist.Bernoulli(logits=drive).to_event(1), obs=x)

    x = torch.bernoulli(torch.full((6, 4), 0.5))
    for program in (model, poutine.scale(model, scale=0.5)):
        theirs = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(program, lambda x: None, x)
        assert float(ExactLikelihood().loss(program, None, x)) == pytest.approx(theirs, abs=1e-10)


def test_no_gradient_where_nothing_is_learned():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    loss = ExactLikelihood().loss_and_grads(model, None, torch.zeros(2))
    oracle = BruteForce(model, (torch.zeros(2),), {"z": bits()}).solve()
    torch.testing.assert_close(loss, -oracle.log_evidence.sum())
