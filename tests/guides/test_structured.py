"""AmortizedStructured: its density by hand, the exact posterior of a two-layer linear Gaussian, and where gradients flow."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, ReweightedWakeSleep, Trace_ELBO
from torch import nn

from pyrovae.diagnostics import evaluate
from pyrovae.guides import AmortizedStructured
from pyrovae.handlers import relax, scale_kl, surrogate
from pyrovae.models import HierarchicalVAE


class Chain:
    """h2 ~ N(0, I), h1 | h2 ~ N(A h2 + a, S), x | h1 ~ N(B h1 + b, T), S and T diagonal; the posterior goes upwards."""

    def __init__(self):
        self.A, self.a, self.s = torch.randn(2, 3), torch.randn(3), torch.rand(3) + 0.3
        self.B, self.b, self.t = torch.randn(3, 4), torch.randn(4), torch.rand(4) + 0.3

    def __call__(self, x, index=None, num_data=None):
        with pyro.plate("data", len(x) if num_data is None else num_data, subsample=index):
            h2 = pyro.sample("h2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            h1 = pyro.sample("h1", dist.Normal(h2 @ self.A + self.a, self.s).to_event(1))
            pyro.sample("x", dist.Normal(h1 @ self.B + self.b, self.t).to_event(1), obs=x)

    def log_evidence(self, x):
        prior = self.A.T @ self.A + torch.diag(self.s**2)
        covariance = self.B.T @ prior @ self.B + torch.diag(self.t**2)
        return torch.distributions.MultivariateNormal(self.a @ self.B + self.b, covariance).log_prob(x)


class DiagonalChain(Chain):
    """One number a layer, so that the layers' posteriors are products of Normals."""

    def __init__(self):
        self.A, self.a, self.s = torch.tensor([[0.8]]), torch.tensor([0.3]), torch.tensor([0.6])
        self.B, self.b, self.t = torch.tensor([[-1.2]]), torch.tensor([0.1]), torch.tensor([0.5])

    def __call__(self, x, index=None, num_data=None):
        with pyro.plate("data", len(x) if num_data is None else num_data, subsample=index):
            h2 = pyro.sample("h2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            h1 = pyro.sample("h1", dist.Normal(h2 @ self.A + self.a, self.s).to_event(1))
            pyro.sample("x", dist.Normal(h1 @ self.B + self.b, self.t).to_event(1), obs=x)

    def encoders(self):
        """The exact posterior: h1 | x from its marginal N(a, A² + s²), h2 | h1 from N(0, 1)."""
        v = float(self.A**2 + self.s**2)
        first = _posterior(float(self.a), v, float(self.B), float(self.b), float(self.t))
        second = _posterior(0.0, 1.0, float(self.A), float(self.a), float(self.s))
        return {"h1": first, "h2": second}


def _posterior(mean, variance, slope, offset, noise):
    """An affine net that gives mean and log scale of z | y for z ~ N(mean, variance), y = slope z + offset + noise ε."""
    precision = 1 / variance + slope**2 / noise**2
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[slope / noise**2 / precision], [0.0]]))
        net.bias.copy_(torch.tensor([(mean / variance - slope * offset / noise**2) / precision, -0.5 * math.log(precision)]))
    return net


def test_the_exact_posterior_has_no_gap():
    model = DiagonalChain()
    x = torch.randn(6, 1) * 2
    guide = AmortizedStructured(model, model.encoders(), example=(x,))
    exact = model.log_evidence(x)
    assert torch.allclose(torch.tensor(Trace_ELBO().loss(model, guide, x)), -exact.sum(), atol=1e-10)
    found = evaluate(model, guide, x, num_particles=20)
    assert torch.allclose(found.hard_elbo, exact, atol=1e-10)
    assert torch.allclose(found.log_likelihood, exact, atol=1e-10)
    for parameter in guide.parameters():
        with torch.no_grad():
            parameter.add_(0.3)
            lower = evaluate(model, guide, x, num_particles=500)
            parameter.sub_(0.3)
        assert bool((lower.hard_elbo < exact).all())


def test_log_q_by_hand():
    model = Chain()
    x = torch.randn(5, 4)
    nets = {"h1": nn.Linear(4, 6), "h2": nn.Linear(3, 4)}
    guide = AmortizedStructured(model, nets, example=(x,))
    trace = poutine.trace(guide).get_trace(x)
    assert [n for n, s in trace.nodes.items() if n.startswith("h")] == ["h1", "h2"]
    trace.compute_log_prob()
    h1, h2 = trace.nodes["h1"]["value"], trace.nodes["h2"]["value"]
    for name, net, given, value in (("h1", nets["h1"], x, h1), ("h2", nets["h2"], h1, h2)):
        loc, log_scale = net(given).chunk(2, -1)
        expected = dist.Normal(loc, log_scale.exp()).log_prob(value).sum(-1)
        assert torch.allclose(trace.nodes[name]["log_prob"], expected)
        assert not torch.allclose(trace.nodes[name]["log_prob"], expected * 1.01)


def test_the_path_through_the_first_layer():
    """The gradient of the second layer's terms reaches the first encoder."""
    model = Chain()
    x = torch.randn(5, 4)
    guide = AmortizedStructured(model, {"h1": nn.Linear(4, 6), "h2": nn.Linear(3, 4)}, example=(x,))
    trace = poutine.trace(guide).get_trace(x)
    trace.nodes["h2"]["value"].sum().backward()
    gradient = guide.encoders["h1"].weight.grad
    assert gradient is not None
    assert bool((gradient.abs() > 0).all())
    detached = AmortizedStructured(model, {"h1": nn.Linear(4, 6), "h2": lambda h: torch.ones(len(h), 4)}, example=(x,))
    value = poutine.trace(detached).get_trace(x).nodes["h2"]["value"]
    assert not value.requires_grad


def test_earlier_values_and_the_data_too():
    seen = {}

    class Net(nn.Module):
        def __init__(self, name, width):
            super().__init__()
            self.name, self.bias = name, nn.Parameter(torch.zeros(width))

        def forward(self, *inputs):
            seen[self.name] = inputs
            return self.bias + sum(value.sum(-1, keepdim=True) for value in inputs)

    model = Chain()
    x = torch.randn(5, 4)
    guide = AmortizedStructured(model, {"h1": Net("h1", 6), "h2": Net("h2", 4)}, example=(x,))
    values = guide(x)
    assert seen["h2"][0] is values["h1"]
    assert torch.equal(seen["h2"][1], x)
    with pyro.plate("particles", 3, dim=-2):
        values = guide(x)
    assert [v.shape for v in seen["h2"]] == [(3, 5, 3), (3, 5, 4)]
    assert values["h2"].shape == (3, 5, 2)

    def random_rows(x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            h2 = pyro.sample("h2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            h1 = pyro.sample("h1", dist.Normal(h2 @ model.A, model.s).to_event(1))
            pyro.sample("x", dist.Normal(h1 @ model.B, 1.0).to_event(1), obs=x[rows])

    guide = AmortizedStructured(random_rows, {"h1": Net("h1", 6), "h2": Net("h2", 4)}, example=(x,))
    trace = poutine.trace(guide).get_trace(x)
    assert torch.equal(seen["h2"][1], x[trace.nodes["data"]["value"]])
    replayed = poutine.trace(poutine.replay(random_rows, trace)).get_trace(x)
    assert torch.equal(replayed.nodes["data"]["value"], trace.nodes["data"]["value"])


def hierarchical(**kwargs):
    layers = kwargs.pop("layers", [("normal", 4), ("bernoulli", 3), ("categorical", (2, 3))])
    return HierarchicalVAE(6, layers, hidden=8, **kwargs)


WRAPS = {
    "plain": lambda p: p,
    "relaxed": lambda p: relax(p, 0.5),
    "straight-through": lambda p: relax(p, 0.5, straight_through=True),
    "surrogate": surrogate,
    "scaled": lambda p: scale_kl(p, 0.5),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("particles", [1, 3])
def test_every_parameter_learns_under_stock_svi(wrap, particles):
    model = hierarchical()
    guide = AmortizedStructured(model)
    x = model.sample(7)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    parameters = [*model.parameters(), *guide.parameters()]
    before = [p.detach().clone() for p in parameters]
    svi = SVI(WRAPS[wrap](model), WRAPS[wrap](guide), pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(2):
        svi.step(x)
    svi.step(x[:3], index=torch.tensor([6, 0, 3]), num_data=7)
    assert not [k for k, (p, b) in enumerate(zip(parameters, before, strict=True)) if torch.equal(p, b)]


def test_scales_of_the_models_own_beta():
    model = hierarchical(beta=0.25)
    guide = AmortizedStructured(model)
    x = model.sample(7)
    rows = torch.tensor([6, 0, 3])
    for call in ({}, {"index": rows, "num_data": 7}):
        data = x[rows] if call else x
        q = poutine.trace(guide).get_trace(data, **call)
        p = poutine.trace(poutine.replay(model, q)).get_trace(data, **call)
        for name in ("h1", "h2", "h3"):
            assert torch.allclose(torch.as_tensor(q.nodes[name]["scale"]), torch.as_tensor(p.nodes[name]["scale"]))
            assert float(q.nodes[name]["scale"]) == pytest.approx(0.25 * (7 / 3 if call else 1))


@pytest.mark.parametrize("wrap", ["relaxed", "straight-through", "surrogate"])
def test_of_a_model_that_is_wrapped_itself(wrap):
    model = hierarchical()
    x = model.sample(5)
    wrapped = WRAPS[wrap](model)
    guide = AmortizedStructured(wrapped)
    other = AmortizedStructured(model)
    other.load_state_dict(guide.state_dict())
    torch.manual_seed(2)
    first = Trace_ELBO().loss(wrapped, guide, x)
    torch.manual_seed(2)
    assert Trace_ELBO().loss(wrapped, WRAPS[wrap](other), x) == pytest.approx(first)


def test_predictive_and_copies():
    model = hierarchical()
    guide = AmortizedStructured(model)
    x = model.sample(7)
    found = Predictive(model, guide=guide, num_samples=3, parallel=True)(x)
    assert found["h3"].shape == (3, 7, 2, 3)
    other_model, other = copy.deepcopy((model, guide))
    assert other._model[0] is other_model
    assert other._pyro_name != guide._pyro_name
    again = pickle.loads(pickle.dumps(guide))
    torch.manual_seed(1)
    first = guide(x)
    torch.manual_seed(1)
    assert all(torch.equal(v, first[k]) for k, v in again(x).items())


def test_wake_sleep_observes_in_the_guide():
    model = hierarchical(layers=[("bernoulli", 4), ("bernoulli", 3)])
    guide = AmortizedStructured(model)
    loss = ReweightedWakeSleep(num_particles=2, vectorize_particles=False, model_has_params=True).loss(
        model, guide, model.sample(5)
    )
    assert all(math.isfinite(value) for value in loss)


def test_a_global_site_is_drawn_first():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(4, 2)
    guide = AmortizedStructured(model, {"z": nn.Linear(2, 4)}, example=(x,))
    trace = poutine.trace(guide).get_trace(x)
    assert [n for n, s in trace.nodes.items() if n in ("mu", "z")] == ["mu", "z"]
    assert list(guide.free) == ["mu"]
    assert math.isfinite(Trace_ELBO().loss(model, guide, x[:2]))


def test_refusals():
    model = hierarchical()
    x = model.sample(3)
    nets = model.mirror()
    with pytest.raises(ValueError, match=r"expected encoders by site, some of \['h1', 'h2', 'h3'\], got \['h1', 'h9'\]"):
        AmortizedStructured(model, {"h1": nets["h1"], "h9": nets["h2"]})
    with pytest.raises(ValueError, match="expected an encoder of 'h2' with 3 outputs, got 5"):
        AmortizedStructured(model, nets | {"h2": nn.Linear(4, 5)}, example=(x,))
    with pytest.raises(ValueError, match="expected an encoder of 'h2' as wide as its inputs"):
        AmortizedStructured(model, nets | {"h2": nn.Linear(7, 3)}, example=(x,))
    with pytest.raises(ValueError, match=r"expected a model whose mirror\(\) gives an encoder for each site, got none"):
        AmortizedStructured(Chain(), example=(torch.randn(3, 4),))
