"""What every objective keeps, stock or ours, one row an objective."""

import copy
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
)

from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Exact, ExactLikelihood, Variational
from pyrovae.models import toy

OBJECTIVES = {
    "ExactLikelihood": (ExactLikelihood, False),
    "ExactLikelihood in little memory": (lambda: ExactLikelihood(max_bytes=4000), False),
    "ExactLikelihood in chunks": (lambda: ExactLikelihood(max_bytes=4000, declared=False), False),
    "Trace_ELBO": (lambda: Trace_ELBO(num_particles=3), True),
    "Trace_ELBO vectorized": (lambda: Trace_ELBO(num_particles=3, vectorize_particles=True), True),
    "TraceGraph_ELBO": (TraceGraph_ELBO, True),
    "RenyiELBO": (lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True), True),
    "ReweightedWakeSleep": (lambda: ReweightedWakeSleep(num_particles=3), True),
    "ReweightedWakeSleep, one after the other": (
        lambda: ReweightedWakeSleep(num_particles=3, vectorize_particles=False),
        True,
    ),
}
OURS = [name for name in OBJECTIVES if "Exact" in name]
DECLARED = 2**3 + 6 * (2**1 + 2**2)  # the codes of 3 units, and 6 rows x those of either half of the units
each = pytest.mark.parametrize("name", OBJECTIVES)
ours = pytest.mark.parametrize("name", OURS)


def build(name):
    net = toy.belief_net(5, 3)
    with poutine.block():
        x = net.sample(6)
    pyro.clear_param_store()
    make, guided = OBJECTIVES[name]
    return make(), net, AmortizedMeanField(net) if guided else None, x


@each
def test_fits_under_variational(name):
    elbo, net, guide, x = build(name)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    settings = vars(elbo).copy()
    fit = Variational(guide, elbo, num_steps=2).fit(net, x)
    assert [k for k, v in net.state_dict().items() if torch.equal(v, before[k])] == []
    assert vars(elbo) == settings  # the caller's objective keeps no trace of the run
    steps = 2 * (6 * elbo.num_particles if guide else elbo.model_evaluations(net, x))
    records = 3 * (6 * 10 if guide else DECLARED)
    assert fit.model_evaluations == steps + records
    assert all(math.isfinite(record["loss"]) for record in fit.history[1:])
    assert list(pyro.get_param_store()) == []


@each
def test_serves_stock_svi(name):
    elbo, net, guide, x = build(name)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    svi = SVI(net, guide or (lambda x: None), pyro.optim.Adam({"lr": 0.01}), elbo)
    for loss in (svi.step(x), svi.evaluate_loss(x)):
        assert all(isinstance(part, float) for part in (loss if isinstance(loss, tuple) else (loss,)))
    assert [k for k, v in net.state_dict().items() if torch.equal(v, before[k])] == []


def test_several_losses_are_added():
    class Fixed(ReweightedWakeSleep):
        def loss_and_grads(self, *args, **kwargs):
            super().loss_and_grads(*args, **kwargs)
            return 2.0, 3.5

    _, net, guide, x = build("ReweightedWakeSleep")
    assert Variational(guide, Fixed(), num_steps=1).fit(net, x).history[-1]["loss"] == 5.5


@pytest.mark.parametrize("elbo", [JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO])
def test_compiled_objectives_are_refused(elbo):
    _, _, guide, _ = build("Trace_ELBO")
    with pytest.raises(ValueError, match=f"got {elbo.__name__}, .* use {elbo.__name__[3:]}$"):
        Variational(guide, elbo(ignore_jit_warnings=True))


@ours
def test_three_ways_agree(name):
    elbo, net, _, x = build(name)
    expected = -Exact().infer(net, x).log_evidence.sum()
    plain = elbo.loss(net, None, x)
    loss = elbo.differentiable_loss(net, None, x)
    assert plain.dim() == loss.dim() == 0
    assert not plain.requires_grad
    gradient = torch.autograd.grad(loss, list(net.parameters()))
    dead = [k for (k, _), g in zip(net.named_parameters(), gradient, strict=True) if not bool((g != 0).any())]
    assert dead == []
    both = elbo.loss_and_grads(net, None, x)
    assert both.dim() == 0
    assert not both.requires_grad
    for value in (plain, loss, both):
        assert torch.allclose(value, expected, atol=1e-10)
    for parameter, g in zip(net.parameters(), gradient, strict=True):
        assert torch.allclose(parameter.grad, g, atol=1e-10)
    elbo.loss_and_grads(net, None, x)  # gradients add up, as in torch
    assert torch.allclose(net.prior.grad, 2 * gradient[0], atol=1e-10)


@ours
def test_module_form(name):
    elbo, net, _, x = build(name)
    module = elbo(net, lambda x: None)
    loss = module(x)
    loss.backward()
    assert torch.allclose(loss.detach(), -Exact().infer(net, x).log_evidence.sum())
    assert len(list(module.parameters())) == len(list(net.parameters()))
    assert bool((net.prior.grad != 0).any())


@ours
def test_a_batch_is_the_sum_over_its_rows(name):
    elbo, net, _, x = build(name)
    rows = [elbo.differentiable_loss(net, None, x[i : i + 1]) for i in range(6)]
    whole = elbo.differentiable_loss(net, None, x)
    assert torch.allclose(torch.stack(rows).sum(), whole, atol=1e-10)
    parts = [torch.autograd.grad(loss, net.prior)[0] for loss in rows]
    assert torch.allclose(torch.stack(parts).sum(0), torch.autograd.grad(whole, net.prior)[0], atol=1e-10)
    # plate factors and a common scale multiply it
    index = torch.tensor([1, 4])
    part = elbo.loss(net, None, x[index], index=index, num_data=6)
    assert torch.allclose(part, 3 * (rows[1] + rows[4]), atol=1e-10)
    assert torch.allclose(elbo.loss(poutine.scale(net, scale=0.25), None, x), whole / 4, atol=1e-10)


@ours
def test_gradient_by_finite_differences(name):
    elbo, net, _, x = build(name)
    (gradient,) = torch.autograd.grad(elbo.differentiable_loss(net, None, x), net.prior)
    for j in range(3):
        shifted = []
        for sign in (1, -1):
            other = copy.deepcopy(net)
            with torch.no_grad():
                other.prior[j] += sign * 1e-5
            shifted.append(float(elbo.loss(other, None, x)))
        assert abs((shifted[0] - shifted[1]) / 2e-5 - float(gradient[j])) < 1e-7


@ours
def test_says_what_it_is(name):
    elbo, net, _, x = build(name)
    assert elbo.unbiased is True
    assert elbo.objective == "log_evidence"
    assert elbo.model_evaluations(net, x) == (DECLARED if elbo.declared else 6 * 8)
