"""Variational: every objective and optimizer that it takes, minibatches, penalty, hard bounds, snapshots."""

import copy
import itertools
import math
from functools import partial
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from stats import bound, largest_z, means_agree
from torch import nn
from torch.distributions import constraints

from pyrovae import data
from pyrovae.guides import AmortizedMeanField, LocalMeanField
from pyrovae.handlers import own_params, relax
from pyrovae.inference import Exact, ExactLikelihood, Variational
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.models import toy

SGD = partial(torch.optim.SGD, lr=1.0)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def elbo_by_enumeration(net, guide, x):
    """The ELBO per datum of a net of one layer under a mean-field guide, by its 2^H states."""
    bits = net.sizes[1]
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=bits))).unsqueeze(1).expand(-1, len(x), -1)
    exact = Exact().infer(net, x)
    posterior = Variational(guide, num_samples=2).infer(net, x)
    log_q = posterior.log_prob({"h1": states})
    assert torch.allclose(log_q.exp().sum(0), torch.ones(len(x)))
    return (log_q.exp() * (exact.log_prob({"h1": states}) + exact.log_evidence - log_q)).sum(0)


@pytest.mark.parametrize(
    "elbo",
    [
        None,
        Trace_ELBO(num_particles=4),
        Trace_ELBO(num_particles=30, vectorize_particles=True),
        TraceGraph_ELBO(num_particles=4),
        "enum",
    ],
)
def test_stock_objectives_learn(elbo):
    net = toy.belief_net(6, 3, seed=1)
    x = net.sample(60)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.1)
    guide = AmortizedMeanField(net)
    if elbo == "enum":

        def net_of_scalars(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                z = [pyro.sample(f"z{j}", dist.Bernoulli(logits=net.prior[j])) for j in range(3)]
                pyro.sample(
                    "x",
                    dist.Bernoulli(
                        logits=net.biases[0] + torch.stack(torch.broadcast_tensors(*z), -1) @ net.weights[0]
                    ).to_event(1),
                    obs=x,
                )

        encoder = nn.Linear(6, 3)

        @config_enumerate
        def guide(x):
            pyro.module("encoder", encoder)
            logits = encoder(x)
            with pyro.plate("data", len(x)):
                for j in range(3):
                    pyro.sample(f"z{j}", dist.Bernoulli(logits=logits[:, j]))

        model, elbo = net_of_scalars, TraceEnum_ELBO(max_plate_nesting=1)
    else:
        model = net
    fit = Variational(guide, elbo, num_steps=150, optim=partial(torch.optim.Adam, lr=0.05), num_log_samples=200).fit(model, x)
    first, last = fit.history[0], fit.history[-1]
    assert fit.bound == "lower"
    assert last["bound"] - first["bound"] > 6 * (first["stderr"] + last["stderr"])
    assert last["bound"] < float(Exact().infer(net, x).log_evidence.mean()) + 5 * last["stderr"]
    assert set(fit.states) == {"model", "guide"}
    assert fit.model_evaluations > 0


def test_exact_likelihood_learns():
    net = toy.belief_net(6, 3, seed=1)
    x = net.sample(60)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.1)
    fit = Variational(None, ExactLikelihood(), num_steps=60, optim=partial(torch.optim.Adam, lr=0.05)).fit(net, x, validation=x)
    assert fit.bound == "exact"
    assert fit.history[-1]["bound"] > fit.history[0]["bound"] + 0.1
    assert math.isclose(fit.history[-1]["bound"], float(Exact().infer(net, x).log_evidence.mean()), rel_tol=1e-12)
    assert fit.history[-1]["validation"] == fit.history[-1]["bound"]
    assert fit.history[-1]["stderr"] == 0
    evaluations = 2**3 + 60 * (2**1 + 2**2)  # the codes of 3 units, and rows x those of either half of the units
    assert fit.model_evaluations == (60 + 2 * 21) * evaluations  # the steps, and the records on both data sets
    assert evaluations == ExactLikelihood().model_evaluations(net, x) < 60 * 8


def test_baseline_of_the_objective_is_trained():
    """A net that belongs to the objective alone, not to model or guide."""
    net = toy.belief_net(5, 2)
    baseline = nn.Linear(5, 1)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", len(x)):
            options = {"baseline": {"nn_baseline": lambda x: baseline(x).squeeze(-1), "nn_baseline_input": x}}
            pyro.module("baseline", baseline)
            pyro.sample("h1", dist.Bernoulli(logits=logits).to_event(1), infer=options)

    before = state(baseline)
    Variational(guide, TraceGraph_ELBO(), num_steps=3).fit(net, net.sample(9))
    assert not same(baseline, before)


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given, and moves nothing."""

    seen: ClassVar[list] = []

    def step(self, closure=None):
        Recorder.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


def gradients(method_arguments, model, *args, guide=None, elbo=None, steps=1):
    Recorder.seen = []
    elbo = ExactLikelihood() if elbo is None else elbo
    Variational(guide, elbo, optim=partial(Recorder, lr=1.0), num_steps=steps, **method_arguments).fit(model, *args)
    return Recorder.seen


def _foreign(net):
    """A net as a program that knows nothing of minibatches."""

    def program(x):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h1", dist.Bernoulli(logits=net.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net.biases[0] + h @ net.weights[0]).to_event(1), obs=x)

    return program


def _hands_on(net):
    def program(x, **kwargs):
        return _foreign(net)(x, **kwargs)

    return program


def _ignores(net):
    def program(x, index=None, num_data=None):
        return _foreign(net)(x)

    return program


@pytest.mark.parametrize("wrap", [lambda net: net, _foreign, _hands_on, _ignores])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_minibatch_gradients_average_to_the_full_gradient(wrap, penalty):
    net = toy.belief_net(5, 3)
    x = net.sample(12)
    model = wrap(net)
    (full,) = gradients({"penalty": penalty}, model, x)
    parts = gradients({"batch_size": 4, "penalty": penalty}, model, x, steps=3)  # one epoch, a partition
    assert len(parts) == 3
    for j, whole in enumerate(full):
        assert torch.allclose(torch.stack([p[j] for p in parts]).mean(0), whole, atol=1e-10)
        assert not torch.allclose(parts[0][j], whole, atol=1e-3)
    names = [name for name, _ in net.named_parameters()]
    loss = -Exact().infer(net, x).log_evidence.sum()
    plain = torch.autograd.grad(ExactLikelihood().differentiable_loss(net, None, x), list(net.parameters()))
    for name, gradient, parameter in zip(names, plain, net.parameters(), strict=True):
        found = next(g for g in full if g.shape == gradient.shape and torch.allclose(g, gradient + penalty * parameter))
        assert found is not None, name
    fit = Variational(None, ExactLikelihood(), num_steps=1, penalty=penalty, optim=partial(Recorder, lr=1.0)).fit(model, x)
    norm = sum(float((p.detach() ** 2).sum()) for p in net.parameters())
    assert math.isclose(fit.history[-1]["loss"], float(loss) + penalty / 2 * norm, rel_tol=1e-10)


def test_minibatches_that_would_miscount_a_global_latent_are_refused():
    def model(x):
        w = pyro.param("w", torch.tensor(0.3))
        g = pyro.sample("g", dist.Bernoulli(torch.sigmoid(w)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    with pytest.raises(ValueError, match="'g' outside all plates"):
        Variational(None, ExactLikelihood(), num_steps=1, batch_size=2).fit(model, torch.randn(4))


def test_minibatches_take_the_same_rows_of_every_argument():
    seen = []

    def model(x, y, constant, *, z=None, index=None, num_data=None):
        seen.append((x, y, constant, z, index))
        w = pyro.param("w", torch.tensor(0.3))
        with pyro.plate("data", num_data or len(x), subsample=index):
            h = pyro.sample("h", dist.Bernoulli(torch.sigmoid(w)))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    x = torch.arange(6.0)
    Variational(None, ExactLikelihood(), num_steps=2, batch_size=2).fit(model, x, x + 10, torch.zeros(3), z=x + 20)
    for a, b, constant, c, index in seen:
        assert torch.equal(a + 10, b)
        assert torch.equal(a + 20, c)
        assert len(constant) == 3
        assert index is None or torch.equal(a, index.double())
    assert any(index is not None for *_, index in seen)


@pytest.mark.parametrize(
    "optim",
    [
        partial(torch.optim.Adam, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        pyro.optim.Adam({"lr": 0.1}),
        pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}),
        pyro.optim.ClippedAdam({"lr": 0.1}),
        pyro.optim.Adam(lambda name: {"lr": 0.1 if "prior" in name else 0.0}),
    ],
)
def test_optimizers(optim):
    net = toy.belief_net(5, 2)
    before, x = state(net), net.sample(10)
    pyro.clear_param_store()
    Variational(None, ExactLikelihood(), optim=optim, num_steps=3).fit(net, x)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == ({"prior"} if callable(getattr(optim, "pt_optim_args", None)) else set(before))
    if isinstance(optim, pyro.optim.PyroOptim):
        assert optim.optim_objs == {}
    assert list(pyro.get_param_store().keys()) == []
    assert pyro.get_param_store()._param_to_name == {}


def test_temperature_float_and_schedule():
    net = toy.belief_net(6, 3)
    x = net.sample(40)
    asked = []

    def schedule(step):
        asked.append(step)
        return 1.0 / (1 + step)

    for temperature in (0.5, schedule):
        guide = AmortizedMeanField(net)
        fit = Variational(guide, temperature=temperature, num_steps=4, num_log_samples=2000).fit(net, x)
        hard = elbo_by_enumeration(net, guide, x).mean()
        last = fit.history[-1]
        assert abs(last["bound"] - float(hard)) < bound(1) * last["stderr"]
        drawn = guide(x)["h1"]
        assert torch.equal(drawn, drawn.round())
    assert {0, 1, 2, 3} <= set(asked)


def test_records_are_hard_bounds():
    net = toy.belief_net(6, 3)
    x = net.sample(30)
    guide = AmortizedMeanField(net)
    fit = Variational(guide, num_steps=2, log_every=1, num_log_samples=3000).fit(net, x, validation=x[:7])
    assert [record["step"] for record in fit.history] == [0, 1, 2]
    exact = elbo_by_enumeration(net, guide, x).mean()
    last = fit.history[-1]
    assert abs(last["bound"] - float(exact)) < bound(1) * last["stderr"]
    assert abs(last["bound"] + 0.3 - float(exact)) > bound(1) * last["stderr"]
    assert fit.history[0]["loss"] is None
    assert last["validation"] != last["bound"]
    posterior = Variational(guide, num_samples=5000).infer(net, x)
    assert largest_z(posterior.log_evidence, elbo_by_enumeration(net, guide, x), posterior.stderr) < bound(30)


def test_preprocess_is_applied_at_every_step():
    net = toy.belief_net(6, 2)
    grey = torch.rand(20, 6)
    torch.manual_seed(3)
    fit = Variational(AmortizedMeanField(net), num_steps=3, preprocess=data.binarize, batch_size=5).fit(net, grey)
    assert all(math.isfinite(record["bound"]) for record in fit.history)
    with pytest.raises(ValueError, match="binarize"):
        Variational(AmortizedMeanField(net), num_steps=3).fit(net, grey)


def test_infer_applies_preprocess():
    net = toy.belief_net(6, 2)
    grey = torch.rand(20, 6)
    guide = AmortizedMeanField(net)
    method = Variational(guide, num_samples=4000, preprocess=lambda x: (x > 0.5).to(x))
    posterior = method.infer(net, grey)
    assert torch.equal(posterior.log_joint.args[0], (grey > 0.5).double())
    exact = elbo_by_enumeration(net, guide, (grey > 0.5).double())
    assert largest_z(posterior.log_evidence, exact, posterior.stderr) < bound(20)
    drawn = Variational(guide, num_samples=10, num_guide_steps=2, preprocess=data.binarize).infer(net, grey)
    assert bool(((drawn.log_joint.args[0] == 0) | (drawn.log_joint.args[0] == 1)).all())
    fit = Variational(guide, num_steps=1, num_log_samples=4000, preprocess=lambda x: (x > 0.5).to(x)).fit(net, grey)
    assert abs(fit.history[-1]["bound"] - float(elbo_by_enumeration(net, guide, (grey > 0.5).double()).mean())) < (
        bound(1) * fit.history[-1]["stderr"]
    )


def test_logging_does_not_change_the_training():
    ends = []
    for seed, log_every, held_out in ((1, 1, True), (1, 100, False), (2, 100, False)):
        torch.manual_seed(0)
        net = toy.belief_net(6, 3)
        grey = torch.rand(16, 6)
        guide = AmortizedMeanField(net)
        torch.manual_seed(seed)
        method = Variational(guide, num_steps=6, batch_size=4, log_every=log_every, preprocess=data.binarize)
        fit = method.fit(net, grey, validation=grey[:4] if held_out else None)
        ends.append({**fit.states["model"], **fit.states["guide"]})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not all(torch.equal(value, ends[2][name]) for name, value in ends[0].items())


def _viewed(x):
    """A program that takes one state at a time."""
    shift = pyro.param("shift", torch.tensor(2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.view(len(x), 2).sum(-1) + shift, 1.0), obs=x)


def _viewed_guide(x):
    m = pyro.param("m", torch.zeros(len(x), 2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(m, 0.6).to_event(1))


def test_programs_that_do_not_broadcast():
    x = torch.randn(5)
    fit = Variational(_viewed_guide, num_steps=100, num_log_samples=100).fit(_viewed, x)
    assert fit.history[-1]["bound"] > fit.history[0]["bound"] + 0.3
    assert Variational(_viewed_guide, num_samples=20, num_guide_steps=2).infer(_viewed, x).log_evidence.shape == (5,)
    vectorised = Trace_ELBO(num_particles=4, vectorize_particles=True)
    with pytest.raises(ValueError, match=r"expected programs that broadcast .* 4 particles .*; give the objective vectorize"):
        Variational(_viewed_guide, vectorised, num_steps=2).fit(_viewed, x)
    method = Variational(_viewed_guide)
    Optimization(method, _viewed, (x,), {}, learn_model=True)
    assert method.elbo.vectorize_particles  # the choice is one of the run
    net = toy.belief_net(5, 2)
    run = Optimization(Variational(AmortizedMeanField(net)), net, (net.sample(3),), {}, learn_model=True)
    assert run.elbo.vectorize_particles


def test_an_error_of_the_program_itself_stays():
    def broken(x):
        _viewed_guide(x)
        raise RuntimeError("mine")

    net = toy.LinearGaussian(1, 2)
    with pytest.raises(RuntimeError, match=r"^mine$"):
        Variational(broken, num_steps=1).fit(net, torch.zeros(3, 1))


def test_infer_leaves_the_model_bitwise():
    net = toy.belief_net(6, 2)
    x = net.sample(10)
    guide = LocalMeanField(net, 10)
    net.prior.grad = torch.ones(2)
    guide_before, before = state(guide), state(net)
    posterior = Variational(guide, num_guide_steps=5, num_samples=50, penalty=1.0).infer(net, x)
    assert same(net, before)
    assert torch.equal(net.prior.grad, torch.ones(2))
    assert net.weights[0].grad is None
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert not same(guide, guide_before)
    assert len(posterior.diagnostics["losses"]) == 5
    assert posterior.diagnostics["model_evaluations"] == 5 * 10 * 10 + 50 * 10
    quiet = state(guide)
    Variational(guide, num_samples=50).infer(net, x)
    assert same(guide, quiet)


def test_snapshot_stays_when_the_guide_is_trained_further():
    net = toy.belief_net(6, 3)
    x = net.sample(8)
    guide = LocalMeanField(net, 8)
    posterior = Variational(guide, num_samples=1000).infer(net, x)
    z = posterior.sample(20)
    before = posterior.log_prob(z)
    logits = next(iter(guide.table.values())).detach().clone()
    assert torch.allclose(before, dist.Bernoulli(logits=logits).to_event(1).log_prob(z["h1"]))
    Variational(guide, num_guide_steps=100, optim=partial(torch.optim.Adam, lr=0.3)).infer(net, x)
    assert torch.equal(posterior.log_prob(z), before)
    assert means_agree(posterior.sample(4000)["h1"], torch.sigmoid(logits))
    assert not means_agree(posterior.sample(4000)["h1"], torch.sigmoid(next(iter(guide.table.values())).detach()))


def test_a_parameter_created_late_is_an_error_by_name():
    calls = []

    def model(x):
        calls.append(0)
        w = pyro.param("w", torch.tensor(0.3))
        if len(calls) > 8:
            w = w + pyro.param("late", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, 1.0))

    with pytest.raises(ValueError, match="'late' later"):
        Variational(guide, Trace_ELBO(), num_steps=20).fit(model, torch.randn(4))
    assert pyro.get_param_store()["w"].unconstrained().grad is None


def test_a_loss_that_is_no_number():
    net = toy.belief_net(5, 2)
    x = net.sample(6)
    steps = []

    class Breaks(ExactLikelihood):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
            steps.append(state(net))
            return loss * math.nan if len(steps) == 3 else loss

    with pytest.raises(FloatingPointError, match="finite loss, got nan at step 2"):
        Variational(None, Breaks(), num_steps=10).fit(net, x)
    assert same(net, steps[-1])
    assert all(parameter.grad is None for parameter in net.parameters())


def test_local_mean_field_with_minibatches():
    net = toy.belief_net(6, 3)
    x = net.sample(20)
    guide = LocalMeanField(net, 20)
    before = state(guide)
    fit = Variational(guide, num_steps=40, batch_size=5, optim=partial(torch.optim.Adam, lr=0.1), num_log_samples=300).fit(
        net, x, validation=x[:3]
    )
    moved = torch.cat([(value - before[name]).abs().flatten(1).amax(1) for name, value in guide.state_dict().items()])
    assert float(moved.min()) > 0  # every row
    assert fit.history[-1]["bound"] > fit.history[0]["bound"]
    assert fit.history[-1]["validation"] is None  # the guide knows these rows only
    with pytest.raises(ValueError, match=r"expected data \[B, 6\]"):
        Variational(LocalMeanField(net, 20), num_steps=1).fit(net, x, validation=torch.zeros(20, 9))


def test_program_with_a_bare_param():
    def model(x):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        m = pyro.param("m", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, 1.0))

    fit = Variational(guide, num_steps=30).fit(model, 3 * torch.randn(10))
    assert float(pyro.param("scale").detach()) != 0.5
    assert set(fit.states["model"]) == {"scale"}
    assert torch.equal(fit.states["model"]["scale"], pyro.param("scale").detach())
    assert not torch.equal(fit.states["model"]["scale"], pyro.param("scale").unconstrained().detach())
    assert torch.equal(fit.states["guide"]["m"], pyro.param("m").detach())


def test_states_are_state_dicts():
    class Counted(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.net(x)

    net = toy.belief_net(6, 3)
    x, guide = net.sample(8), AmortizedMeanField(net)
    for model in (net, own_params(net), Counted(net), relax(net, 0.5)):
        q = relax(guide, 0.5) if hasattr(model, "temperature") else guide
        fit = Variational(q, num_steps=2).fit(model, x)
        module = getattr(model, "program", model)
        other, other_guide = copy.deepcopy((module, guide))
        with torch.no_grad():
            for parameter in (*other.parameters(), *other_guide.parameters(), *other.buffers()):
                parameter.add_(1.0)
        assert not same(other, state(module))
        other.load_state_dict(fit.states["model"])
        other_guide.load_state_dict(fit.states["guide"])
        assert same(other, state(module))
        assert same(other_guide, state(guide))
        held = {name: value.clone() for name, value in fit.states["model"].items()}
        Variational(guide, num_steps=1).fit(net, x)
        assert all(torch.equal(value, held[name]) for name, value in fit.states["model"].items())
        assert not any(value.requires_grad for value in fit.states["model"].values())


def test_copies_and_two_instances_in_turn():
    net = toy.belief_net(6, 3)
    x = net.sample(15)
    guide = AmortizedMeanField(net)
    before = state(net), state(guide)
    other, other_guide = copy.deepcopy((net, guide))
    third = toy.belief_net(6, 3)
    third_guide = AmortizedMeanField(third)
    for n in range(2):
        for model, q in ((other, other_guide), (third, third_guide)):
            started = state(model), state(q)
            Variational(q, num_steps=2).fit(model, x)
            assert not any(torch.equal(v, started[0][k]) for k, v in model.state_dict().items()), n
            assert not any(torch.equal(v, started[1][k]) for k, v in q.state_dict().items()), n
    assert same(net, before[0])
    assert same(guide, before[1])


def test_posterior_of_a_global_latent():
    def model(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    def guide(x):
        pyro.sample("g", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.7))

    x = torch.randn(4)
    posterior = Variational(guide, num_samples=4000).infer(model, x)
    assert posterior.log_evidence.shape == ()
    assert largest_z(posterior.mean["g"], 0.2, 0.7 / 4000**0.5) < bound(1)
    z = posterior.sample(7)
    assert z["g"].shape == (7,)
    assert torch.allclose(posterior.log_prob(z), dist.Normal(0.2, 0.7).log_prob(z["g"]))


def test_same_seed_same_fit():
    fits = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        net = toy.belief_net(6, 3)
        x, guide = net.sample(15), AmortizedMeanField(net)
        torch.manual_seed(seed)
        fits.append(Variational(guide, num_steps=5, batch_size=4).fit(net, x))
    assert [r["loss"] for r in fits[0].history] == [r["loss"] for r in fits[1].history]
    assert [r["loss"] for r in fits[0].history] != [r["loss"] for r in fits[2].history]
    assert fits[0].seed == 1


def test_nothing_to_learn():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="nothing to learn"):
        Variational(None, ExactLikelihood()).fit(model, torch.randn(3))


def test_out_of_range():
    net = toy.belief_net()
    guide = AmortizedMeanField(net)
    for arguments in ({"num_steps": 0}, {"num_guide_steps": -1}, {"num_samples": 1}, {"batch_size": 0}, {"penalty": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            Variational(guide, **arguments)
    with pytest.raises(ValueError, match="batch_size <= the 5 rows"):
        Variational(guide, batch_size=6).fit(net, net.sample(5))
    with pytest.raises(ValueError, match="expected a guide"):
        Variational(None)
    with pytest.raises(ValueError, match="no temperature without a guide"):
        Variational(None, ExactLikelihood(), temperature=0.5)
    with pytest.raises(ValueError, match="expected a guide to infer with"):
        Variational(None, ExactLikelihood()).infer(net, net.sample(2))


def test_optimization_is_a_context():
    net = toy.belief_net(5, 2)
    net.prior.grad = torch.ones(2)
    method = Variational(None, ExactLikelihood(), optim=SGD)
    with Optimization(method, net, (net.sample(4),), {}, learn_model=True) as run:
        assert math.isfinite(run.step(0))
        assert not torch.equal(net.prior.grad, torch.ones(2))
    assert torch.equal(net.prior.grad, torch.ones(2))
