"""EM: monotone where the E-step is exact, at a stationary point in the end, with every E-step and M-step."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pyrovae.guides import LocalMeanField
from pyrovae.inference import EM, Exact, ExactLikelihood, Gibbs, Importance, MeanField, Variational
from pyrovae.inference.em import maximise
from pyrovae.models import BernoulliMixture, HiddenMarkovModel, toy


def learnable(scale=0.3, hidden=3):
    """A net far from its data, so that there is something to learn."""
    x = toy.belief_net(6, 3, seed=1).sample(40)
    net = toy.belief_net(6, hidden, seed=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    return net, x


def penalised(net, x, penalty):
    return ExactLikelihood().differentiable_loss(net, None, x) + penalty / 2 * sum((p**2).sum() for p in net.parameters())


@pytest.mark.parametrize("hidden", [3, [2, 2]])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_exact_em_never_falls(penalty, hidden):
    net, x = learnable(hidden=hidden)
    fit = EM(num_iterations=25, penalty=penalty).fit(net, x, validation=x[:5])
    losses = torch.tensor([record["loss"] for record in fit.history])
    assert float(losses.diff().max()) <= 40 * 1e-9
    assert float(losses[0] - losses[-1]) > 1
    assert math.isclose(fit.history[-1]["loss"], float(penalised(net, x, penalty).detach()), rel_tol=1e-12)
    assert math.isclose(fit.history[-1]["bound"], float(Exact().infer(net, x).log_evidence.mean()), rel_tol=1e-12)
    assert math.isclose(fit.history[-1]["validation"], float(Exact().infer(net, x[:5]).log_evidence.mean()), rel_tol=1e-12)
    assert [record["step"] for record in fit.history] == list(range(26))
    assert fit.bound == "exact"
    assert set(fit.history[0]) == {"step", "loss", "bound", "stderr", "validation", "seconds"}
    assert set(fit.states["model"]) == set(net.state_dict())
    assert all(torch.equal(value, fit.states["model"][name]) for name, value in net.state_dict().items())


def test_fixed_point_is_stationary_and_the_exact_gradient_agrees():
    penalty = 5.0
    net, x = learnable()

    def slope():
        return max(float(g.abs().max()) for g in torch.autograd.grad(penalised(net, x, penalty), list(net.parameters())))

    assert slope() > 1
    EM(num_iterations=100, m_steps=10, penalty=penalty).fit(net, x)
    assert slope() < 1e-4
    by_em = float(penalised(net, x, penalty).detach())
    other, _ = learnable()
    Variational(None, ExactLikelihood(), penalty=penalty, num_steps=300, optim=partial(torch.optim.Adam, lr=0.03)).fit(other, x)
    assert abs(float(penalised(other, x, penalty).detach()) - by_em) < 1e-3 * 40


def test_closed_form_m_step_is_the_numeric_one():
    x = torch.bernoulli(torch.full((30, 4), 0.5))
    mixture = toy.Mixture(4, 2)
    numeric = toy.Mixture(4, 2)
    numeric.load_state_dict(mixture.state_dict())
    posterior = Exact().infer(mixture, x)
    mixture.m_step(posterior, x)
    leaves = dict(numeric.named_parameters())
    for _ in range(5):
        maximise(posterior.q_function(numeric), leaves, 0.0, 200, len(x))
    assert torch.allclose(torch.softmax(mixture.weights, 0), torch.softmax(numeric.weights, 0), atol=1e-6)
    assert torch.allclose(torch.sigmoid(mixture.logits), torch.sigmoid(numeric.logits), atol=1e-6)
    assert torch.allclose(posterior.q_function(mixture)(), posterior.q_function(numeric)(), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_m_step_at_the_edges(dtype):
    """Columns that are constant, and a component that no row belongs to."""
    mixture = toy.Mixture(4, 3).to(dtype)
    x = torch.bernoulli(torch.full((30, 4), 0.5)).to(dtype)
    x[:, 0], x[:, 1] = 0, 1
    with torch.no_grad():
        mixture.logits[2] = torch.tensor([2000.0, -2000.0, 1.0, -1.0])
    kept = mixture.logits[2].detach().clone()
    assert float(Exact().infer(mixture, x).marginals["z"][:, 2].max()) == 0
    fit = EM(num_iterations=5).fit(mixture, x)
    assert torch.equal(mixture.logits[2].detach(), kept)
    assert all(bool(torch.isfinite(value).all()) for value in mixture.state_dict().values())
    assert all(math.isfinite(record["bound"]) for record in fit.history)
    assert fit.history[-1]["bound"] > fit.history[0]["bound"]


def test_own_m_step_is_used_without_a_penalty_only():
    x = torch.bernoulli(torch.full((30, 4), 0.5))
    calls = []

    class Counted(toy.Mixture):
        def m_step(self, posterior, x):
            calls.append(0)
            super().m_step(posterior, x)

    fit = EM(num_iterations=4).fit(Counted(4, 2), x)
    assert len(calls) == 4
    assert fit.model_evaluations == 5 * 30 * 2
    EM(num_iterations=4, penalty=0.1).fit(Counted(4, 2), x)
    assert len(calls) == 4


def test_an_m_step_that_lowers_q_is_an_error():
    class Wrong(toy.Mixture):
        def m_step(self, posterior, x):
            with torch.no_grad():
                self.logits.neg_()

    model = Wrong(4, 2)
    model.logits.grad = torch.ones_like(model.logits)
    x = torch.tensor([[1.0, 1, 0, 0], [1.0, 1, 0, 1]])
    with torch.no_grad():
        model.logits.copy_(torch.tensor([[2.0, 2, -2, -2]] * 2))
    with pytest.raises(RuntimeError, match="m_step does not raise Q"):
        EM(num_iterations=3).fit(model, x)
    assert torch.equal(model.logits.grad, torch.ones_like(model.logits))


def test_plain_function_with_constrained_params():
    def model(x):
        weight = pyro.param("weight", torch.tensor(0.4), constraint=constraints.unit_interval)
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        mean = pyro.param("mean", torch.tensor([2.0, -2.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(weight))
            pyro.sample("x", dist.Normal(mean[z.long()], scale), obs=x)

    x = torch.cat([torch.randn(30) - 3, torch.randn(20) + 3])
    fit = EM(num_iterations=30).fit(model, x)
    assert float(pyro.param("scale").detach()) < 1.5
    assert set(fit.states["model"]) == {"weight", "scale", "mean"}
    assert all(torch.equal(value, pyro.param(name).detach()) for name, value in fit.states["model"].items())
    assert 2 < float(pyro.param("mean").detach().abs().min()) < 4
    assert fit.history[-1]["bound"] > fit.history[0]["bound"]


@pytest.mark.parametrize("name", ["gibbs", "gibbs layers", "categories", "importance", "global"])
def test_distinct_states_equal_the_plain_average(name):
    """The M-step's objective over distinct states, its gradient too, against one evaluation a draw."""
    net, x = learnable()
    method = Gibbs(17, 3, 5)
    if name == "gibbs layers":
        net, _ = learnable(hidden=[2, 3])
    elif name == "categories":
        net = toy.Mixture(6, 3)
    elif name == "importance":
        method = Importance(LocalMeanField(net, 40), 30)
    elif name == "global":
        weight = nn.Parameter(torch.randn(2))

        def net(x):
            w = pyro.param("w", weight)
            g = pyro.sample("g", dist.Bernoulli(torch.sigmoid(w[0])))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(torch.sigmoid(g + w[1])))
                pyro.sample("x", dist.Normal(z * w[0], 1.0), obs=x)

        x = torch.randn(6)
    posterior = method.infer(net, x)
    parameters = [weight] if name == "global" else list(net.parameters())
    fast = posterior.q_function(net)()
    slow = posterior.expected_log_joint(net).sum()
    assert torch.allclose(fast, slow, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(fast, parameters), torch.autograd.grad(slow, parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3)
    moved = posterior.q_function(net)()
    assert not torch.allclose(moved, fast)
    assert torch.allclose(moved, posterior.expected_log_joint(net).sum(), rtol=1e-10)


def test_float32_draws():
    net, x = learnable()
    net, x = net.float(), x.float()
    for e_step in (Exact(), Gibbs(20, 2, 5), MeanField(2), Importance(LocalMeanField(net, 40), 20)):
        EM(e_step, num_iterations=2).fit(net, x)
        assert net.prior.dtype == torch.float32


@pytest.mark.parametrize(
    ("e_step", "told"), [(Gibbs(60, 3, 20), None), (MeanField(4), "lower"), ("variational", "lower"), ("importance", "lower")]
)
def test_other_e_steps_learn(e_step, told):
    net, x = learnable()
    if e_step == "variational":
        e_step = Variational(
            LocalMeanField(net, 40), num_guide_steps=15, num_samples=100, optim=partial(torch.optim.Adam, lr=0.1)
        )
    elif e_step == "importance":
        e_step = Importance(LocalMeanField(net, 40), 100)
    before = float(Exact().infer(net, x).log_evidence.mean())
    fit = EM(e_step, num_iterations=12).fit(net, x, validation=x)
    after = float(Exact().infer(net, x).log_evidence.mean())
    assert after > before + 0.01
    if told is None:
        assert [record["bound"] for record in fit.history] == [None] * 13
        assert [record["loss"] for record in fit.history] == [None] * 13
    else:
        assert fit.bound == told
        assert fit.history[-1]["bound"] > fit.history[0]["bound"]
        assert fit.history[-1]["bound"] < after + 5 * fit.history[-1]["stderr"] + 1e-9


def test_validation_does_not_change_the_training():
    ends, evaluations = [], []
    for held_out in (False, True):
        torch.manual_seed(5)
        net, x = learnable()
        fit = EM(Gibbs(10, 2, 2), num_iterations=3).fit(net, x, validation=x[:7] if held_out else None)
        ends.append(fit.states["model"])
        evaluations.append(fit.model_evaluations)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert evaluations[1] > evaluations[0]


def test_restored_if_q_fell():
    theta = nn.Parameter(torch.tensor(1.0))
    calls = []

    def q():
        calls.append(0)
        return -(theta**2) - 100.0 * (len(calls) > 1)

    count = maximise(q, {"theta": theta}, 0.0, 3, 1)
    assert float(theta.detach()) == 1.0
    assert count == len(calls)
    maximise(lambda: -((theta - 3) ** 2), {"theta": theta}, 0.0, 10, 1)
    assert abs(float(theta.detach()) - 3) < 1e-6
    maximise(lambda: -((theta - 3) ** 2), {"theta": theta}, 2.0, 10, 1)
    assert abs(float(theta.detach()) - 1.5) < 1e-6
    with pytest.warns(UserWarning, match="Q that is not finite"):
        maximise(lambda: theta * math.nan, {"theta": theta}, 0.0, 3, 1)
    assert abs(float(theta.detach()) - 1.5) < 1e-6


def test_gradients_of_the_caller_and_the_store():
    net, x = learnable()
    pyro.clear_param_store()
    net.prior.grad = torch.ones(3)
    state = torch.get_rng_state()
    EM(num_iterations=2).fit(net, x)
    assert torch.equal(net.prior.grad, torch.ones(3))
    assert net.weights[0].grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == []


def test_nothing_to_learn_and_numbers_out_of_range():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="nothing to learn"):
        EM().fit(model, torch.zeros(2))
    for arguments in ({"num_iterations": 0}, {"m_steps": 0}, {"penalty": -1.0}, {"penalty": math.nan}):
        with pytest.raises(ValueError, match="expected"):
            EM(**arguments)


@pytest.mark.parametrize("name", ["weights", "components.logits", "transition"])
def test_frozen_parameters_stay(name):
    """The model's own M-step writes them all, so it is left aside."""
    torch.manual_seed(0)
    model, x = BernoulliMixture(4, 3), torch.bernoulli(torch.full((20, 4), 0.5))
    if name == "transition":
        model, x = HiddenMarkovModel(2, 3), torch.randint(3, (6, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    frozen = dict(model.named_parameters())[name].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit = EM(num_iterations=4).fit(model, x)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before) - {name}
    assert not frozen.requires_grad
    losses = [record["loss"] for record in fit.history]
    assert losses[-1] < losses[0]
    assert losses == sorted(losses, reverse=True)


def test_validation_takes_no_rows_of_the_training_data():
    model, x, lengths = HiddenMarkovModel(2, 3), torch.randint(3, (4, 5)), torch.tensor([5, 2, 3, 4])
    other, other_lengths = torch.randint(3, (4, 5)), torch.tensor([1, 5, 5, 2])
    for method in (EM(num_iterations=1), Variational(None, ExactLikelihood(), num_steps=1)):
        for validation in (other, (other,)):
            with pytest.raises(ValueError, match=r"got lengths with an entry for each of the 4 rows.*lengths_validation"):
                method.fit(model, x, lengths=lengths, validation=validation)
        fit = method.fit(model, x, lengths, validation=(other, other_lengths))
        expected = float(Exact().infer(model, other, other_lengths).log_evidence.mean())
        assert math.isclose(fit.history[-1]["validation"], expected, rel_tol=1e-6)
        fit = method.fit(model, x, lengths=lengths, validation=x)  # the same rows
        assert math.isclose(fit.history[-1]["validation"], fit.history[-1]["bound"], rel_tol=1e-6)


def test_minibatches_are_refused():
    net, x = learnable()
    with pytest.raises(ValueError, match=r"expected all rows for EM, got 40 of 400 in plate 'data'.*Variational"):
        EM().fit(net, x, index=torch.arange(40), num_data=400)
    EM(num_iterations=1).fit(net, x, index=torch.arange(40), num_data=40)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, None])
def test_put_back_if_q_cannot_be_told(error):
    """As where a step of the line search leaves the program's range."""
    theta = nn.Parameter(torch.tensor(1.0))

    def q():
        if float(theta.detach()) != 1 and error is not None:
            raise error("out of range")
        return -(theta**2) if float(theta.detach()) == 1 else theta * math.nan

    with pytest.warns(UserWarning, match="put back"):
        maximise(q, {"theta": theta}, 0.0, 3, 1)
    assert float(theta.detach()) == 1

    def broken():
        raise ValueError("at the start")

    with pytest.raises(ValueError, match="at the start"):
        maximise(broken, {"theta": theta}, 0.0, 3, 1)
    assert float(theta.detach()) == 1
