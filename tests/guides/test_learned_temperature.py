"""A learned temperature of a relaxed model: its gradient through a guide that was made of that model."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyrovae.guides import AmortizedMeanField, AmortizedStructured, LocalMeanField, factor
from pyrovae.handlers import relax
from pyrovae.models import BernoulliVAE, CategoricalVAE, HierarchicalVAE

STEP = 1e-5
X = (torch.arange(24).reshape(4, 6) % 5 < 2).double()


class Written(PyroModule):
    """A model written relaxed, whose temperature is its parameter; PyroParam, nn.Parameter or a statement."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        if how == "PyroParam":
            self.t = PyroParam(torch.tensor(0.6), constraint=constraints.positive)
        if how == "module":
            self.log_t = nn.Parameter(torch.tensor(0.6).log())
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x=None):
        if self.how == "PyroParam":
            t = self.t
        elif self.how == "module":
            t = self.log_t.exp()
        else:
            t = pyro.param("t", torch.tensor(0.6), constraint=constraints.positive)
        with pyro.plate("data", 2 if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.RelaxedOneHotCategorical(t, logits=torch.tensor([0.0, 1.0, 2.0])))
            return pyro.sample("x", dist.Bernoulli(logits=z @ self.weight).to_event(1), obs=x)

    @property
    def leaf(self):
        if self.how == "PyroParam":
            return self.t_unconstrained
        return self.log_t if self.how == "module" else pyro.get_param_store()._params["t"]


def tensor_of(net):
    t = torch.tensor(0.6, requires_grad=True)
    return relax(net, t), lambda: t


def function_of(net):
    def t():
        return pyro.param("t", torch.tensor(0.6), constraint=constraints.positive)

    return relax(net, t), lambda: t().unconstrained()


def written(how):
    def make(_):
        model = Written(how)
        return model, lambda: model.leaf

    return make


def hierarchical():
    return HierarchicalVAE(6, [("categorical", (2, 3)), ("normal", 2), ("bernoulli", 2)], hidden=5)


def mean_field_of(model):
    return AmortizedMeanField(model, nn.Linear(6, 3)) if isinstance(model, Written) else AmortizedMeanField(model)


CASES = {
    f"{name}, {how}": (net, make, guide)
    for name, net, guide in (
        ("mean field", lambda: CategoricalVAE(6, 2, 3, (5,)), AmortizedMeanField),
        ("bits", lambda: BernoulliVAE(6, 2, (5,)), AmortizedMeanField),
        ("local", lambda: CategoricalVAE(6, 2, 3, (5,)), lambda model: LocalMeanField(model, 4)),
        ("structured", hierarchical, AmortizedStructured),
    )
    for how, make in (("tensor", tensor_of), ("function", function_of))
} | {f"written, {how}": (lambda: None, written(how), mean_field_of) for how in ("PyroParam", "module", "statement")}


def slopes(model, guide, leaf):
    """The gradient by autograd and by central differences, with the same noise."""

    def loss():
        torch.manual_seed(1)
        return Trace_ELBO().differentiable_loss(model, guide, X)

    at_once = loss()  # from an empty store
    (slope,) = torch.autograd.grad(at_once, leaf())
    with torch.no_grad():
        leaf().add_(STEP)
        up = loss()
        leaf().sub_(2 * STEP)
        down = loss()
        leaf().add_(STEP)
    return slope, (up - down) / (2 * STEP)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_finite_difference(case):
    net, make, guide_of = CASES[case]
    model, leaf = make(net())
    guide = guide_of(model)
    pyro.clear_param_store()
    got, expected = slopes(model, guide, leaf)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)  # as torch.autograd.gradcheck


def test_a_detached_temperature_would_be_seen(monkeypatch):
    monkeypatch.setattr(factor, "_relaxed", lambda prior, logits: type(prior)(prior.temperature.detach(), logits=logits))
    model, leaf = tensor_of(CategoricalVAE(6, 2, 3, (5,)))
    got, expected = slopes(model, AmortizedMeanField(model), leaf)
    assert (got - expected).abs() > 100 * (1e-5 + 1e-3 * expected.abs())


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("structured", [False, True])
def test_both_ways_of_wrapping_agree(structured, straight_through):
    net, t = hierarchical(), torch.tensor(0.6, requires_grad=True)
    model = relax(net, t, straight_through)
    kind = AmortizedStructured if structured else lambda m: AmortizedMeanField(m, nn.Linear(6, 12))
    torch.manual_seed(3)
    inside = kind(model)
    torch.manual_seed(3)
    outside = relax(kind(net), t, straight_through)
    outside.program.load_state_dict(inside.state_dict())
    found = []
    for guide in (inside, outside):
        torch.manual_seed(1)
        loss = Trace_ELBO().differentiable_loss(model, guide, X)
        found.append(torch.autograd.grad(loss, [t, *net.parameters()], allow_unused=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert float(found[0][0]) != 0


def test_no_parameter_of_the_model_but_the_temperature_reaches_the_draws():
    net, t = hierarchical(), torch.tensor(0.6, requires_grad=True)
    for guide in (AmortizedStructured(relax(net, t)), AmortizedMeanField(relax(net, t), nn.Linear(6, 12))):
        values = guide(X)
        total = sum(value.sum() for value in values.values())
        slope, *others = torch.autograd.grad(total, [t, *net.parameters()], allow_unused=True)
        assert slope.abs() > 0
        assert all(other is None for other in others)
        with torch.no_grad():
            assert not any(value.requires_grad for value in guide(X).values())


def test_stock_svi_learns_the_same_temperature_either_way():
    learned = []
    for inside in (True, False):
        torch.manual_seed(0)
        pyro.clear_param_store()
        net = CategoricalVAE(6, 2, 3, (5,))
        model, leaf = function_of(net)
        guide = AmortizedMeanField(model) if inside else relax(AmortizedMeanField(net), model.temperature)
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        torch.manual_seed(1)
        for _ in range(5):
            svi.step(X)
        learned.append(leaf().item())
    assert learned[0] == pytest.approx(learned[1], rel=1e-9)
    assert learned[0] != pytest.approx(torch.tensor(0.6).log().item())
