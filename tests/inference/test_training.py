"""Training that people can live with: epochs, true bounds, early stopping, schedules, named faults."""

import contextlib
import copy
import io
import itertools
import json
import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from stats import bound
from torch import nn
from torch.optim import lr_scheduler

from pyrovae import data
from pyrovae.guides import AmortizedMeanField, LocalMeanField
from pyrovae.handlers import discretize, relax, scale_kl, surrogate
from pyrovae.inference import Exact, ExactLikelihood, Variational
from pyrovae.inference.variational import checkpoint, true_bound
from pyrovae.inference.variational.batches import Batches, on_device
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.inference.variational.schedules import make_optimizer
from pyrovae.inference.variational.true_bound import TrueBound
from pyrovae.models import GaussianVAE, toy


def net_and_guide(rows=30, local=False):
    net = toy.belief_net(6, 3)
    x = net.sample(rows)
    guide = LocalMeanField(net, rows) if local else AmortizedMeanField(net)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    return net, guide, x


def elbo_by_enumeration(net, guide, x):
    """The ELBO per datum under a mean-field guide with the posterior's sites, by its 2^H states."""
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).unsqueeze(1).expand(-1, len(x), -1)
    exact = Exact().infer(net, x)
    log_q = Variational(guide, num_samples=2).infer(net, x).log_prob({"h1": states})
    return (log_q.exp() * (exact.log_prob({"h1": states}) + exact.log_evidence - log_q)).sum(0)


def plain(args):
    return args


# --- Minibatches ---


def test_epochs():
    net, guide, x = net_and_guide(23)
    for batch_size, steps in ((5, 8), (None, 2), (23, 2)):
        fit = Variational(guide, Trace_ELBO(), num_epochs=2, batch_size=batch_size, log_every=1).fit(net, x)
        assert fit.history[-1]["step"] == steps
        assert fit.history[-1]["epoch"] == 2
        assert fit.stopped == "num_steps"
    assert Variational(guide).num_steps == 1000
    with pytest.raises(ValueError, match="num_steps or num_epochs, got both"):
        Variational(guide, num_steps=3, num_epochs=2)
    with pytest.raises(ValueError, match="num_epochs >= 1"):
        Variational(guide, num_epochs=0)


def test_rows_left_over_take_turns():
    batches = Batches((torch.arange(23),), {}, 5, plain)
    assert batches.per_epoch == 4
    epochs = [torch.cat([batches.draw().args[0] for _ in range(4)]) for _ in range(40)]
    assert all(len(set(epoch.tolist())) == 20 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    times = torch.bincount(torch.cat(epochs), minlength=23).double()
    p = 20 / 23
    assert float(((times - 40 * p).abs() / (40 * p * (1 - p)) ** 0.5).max()) < bound(23)


def test_per_row_parameters_without_an_index_are_refused():
    net, _, x = net_and_guide(12)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x), 3))
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(logits=logits).to_event(1))

    def model(x):
        return net(x)

    with pytest.raises(ValueError, match=r"any number of rows for minibatches, .* ran with 4 and failed with 5"):
        Variational(guide, num_steps=2, batch_size=4).fit(model, x)
    assert "logits" not in pyro.get_param_store()
    Variational(guide, num_steps=2).fit(model, x)


# --- The true bound ---


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("numel", [2**22, 2000])
def test_bound_of_rows_a_few_at_a_time(monkeypatch, local, numel):
    net, guide, x = net_and_guide(local=local)
    monkeypatch.setattr(true_bound, "NUMEL", numel)
    exact = elbo_by_enumeration(net, guide, x).detach()
    judge = TrueBound(net, guide, (x,), {}, plain, num_samples=40, indexed=local)
    assert (judge.index is not None) == (numel == 2000)
    for max_rows in (None, 11):
        judge = TrueBound(net, guide, (x,), {}, plain, num_samples=400, max_rows=max_rows, indexed=local)
        found, stderr = judge()
        rows = slice(None) if judge.index is None else judge.index
        assert judge.rows == (max_rows or 30)
        assert judge.evaluations == 400 * judge.rows
        assert abs(found - float(exact[rows].mean())) < bound(1) * stderr
        assert abs(found - float(exact[rows].mean()) - 0.5) > bound(1) * stderr  # it could fail
        assert judge() == (found, stderr)  # the same draws
    if numel == 2000:
        assert judge.part < 11


def test_local_rows_in_another_order_are_noticed(monkeypatch):
    """Without the index, a guide of one set of parameters a row could not take a part of the rows."""
    net, guide, x = net_and_guide(local=True)
    monkeypatch.setattr(true_bound, "NUMEL", 2000)
    judge = TrueBound(net, guide, (x,), {}, plain, num_samples=400, indexed=True)
    found, stderr = judge()
    other = elbo_by_enumeration(net, guide, x.roll(1, 0)).detach().mean()
    assert abs(found - float(other)) > bound(1) * stderr
    assert TrueBound(net, guide, (x,), {}, plain, num_samples=400).index is None


def test_programs_whose_rows_are_not_independent_stay_whole():
    def model(x):
        w = pyro.param("w", torch.tensor(0.3))
        g = pyro.sample("g", dist.Normal(w, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    def guide(x):
        pyro.sample("g", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    fit = Variational(guide, Trace_ELBO(), num_steps=2, log_rows=5).fit(model, torch.randn(40))
    assert fit.history[-1]["rows"] == 40
    net, guide, x = net_and_guide()
    assert Variational(guide, num_steps=2, log_rows=5).fit(net, x).history[-1]["rows"] == 5
    assert Variational(guide, num_steps=1).fit(net, x.repeat(200, 1)).history[-1]["rows"] == 200 * len(x)
    fit = Variational(None, ExactLikelihood(), num_steps=1, log_rows=5).fit(net, x)
    assert fit.history[-1]["rows"] == 5


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"beta": lambda step: 0.0},
        {"temperature": 0.3},
        {"temperature": 0.3, "straight_through": True},
        {"surrogate": "reinmax"},
        {"surrogate": "straight_through", "temperature": lambda step: 0.7},
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_records_are_true_whatever_is_fitted(options, scaled):
    net, guide, x = net_and_guide()
    model, q = (poutine.scale(net, 0.2), poutine.scale(guide, 0.2)) if scaled else (net, guide)
    method = Variational(q, Trace_ELBO(num_particles=2), num_steps=3, log_every=1, num_log_samples=1000, **options)
    fit = method.fit(model, x, validation=x[:20])
    last = fit.history[-1]
    exact = elbo_by_enumeration(net, guide, x).detach()
    assert abs(last["bound"] - float(exact.mean())) < bound(1) * last["stderr"]
    assert abs(last["validation"] - float(exact[:20].mean())) < bound(1) * last["stderr"] * 1.5**0.5 * 2
    assert fit.history[0]["bound"] != last["bound"]  # it was trained


def test_programs_written_with_relaxed_sites_are_judged_hard():
    net, guide, x = net_and_guide()

    def model(x):
        return relax(net, 0.5)(x)

    def relaxed_guide(x):
        return relax(guide, 0.5)(x)

    fit = Variational(relaxed_guide, num_steps=2, num_log_samples=1000).fit(model, x)
    exact = float(elbo_by_enumeration(net, guide, x).mean())
    last = fit.history[-1]
    assert abs(last["bound"] - exact) < bound(1) * last["stderr"]
    assert abs(TrueBound(discretize(model), discretize(relaxed_guide), (x,), {}, plain, num_samples=1000)()[0] - exact) < (
        bound(1) * last["stderr"]
    )


def test_random_preprocessing_is_the_same_at_every_record():
    net, guide, _ = net_and_guide()
    grey = torch.rand(30, 6)
    method = Variational(guide, num_steps=4, log_every=2, preprocess=data.binarize, optim=partial(torch.optim.SGD, lr=0.0))
    records = method.fit(net, grey, validation=torch.rand(9, 6)).history
    assert len({record["validation"] for record in records}) == 1
    assert len({record["bound"] for record in records}) == 1
    losses = [record["loss"] for record in records[1:]]
    assert losses[0] != losses[1]


def test_records_are_in_evaluation_mode():
    net, _, x = net_and_guide()
    guide = AmortizedMeanField(net, nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)))
    norm = guide.encoder[0]
    method = Variational(guide, num_log_samples=500, num_steps=2, optim=partial(torch.optim.SGD, lr=0.0), log_every=1)
    first, *_, last = method.fit(net, x).history
    assert guide.encoder.training
    assert int(norm.num_batches_tracked) > 0
    before = norm.running_mean.clone()
    judge = TrueBound(net, guide, (x,), {}, plain, num_samples=500)
    found, stderr = judge()
    assert torch.equal(norm.running_mean, before)
    assert (found, stderr) == judge()
    guide.eval()
    assert abs(found - float(elbo_by_enumeration(net, guide, x).mean())) < bound(1) * stderr
    assert first["bound"] != last["bound"]  # by the running statistics


# --- Early stopping ---


def test_patience_stops_and_puts_the_best_back(tmp_path):
    torch.manual_seed(1)
    net, guide, x = net_and_guide(8)
    other = torch.rand(60, 6).round()
    options = {"optim": partial(torch.optim.Adam, lr=0.2), "num_steps": 400, "log_every": 5, "num_log_samples": 100}
    fit = Variational(guide, Trace_ELBO(), patience=4, checkpoint=tmp_path, **options).fit(net, x, validation=other)
    bounds = [record["validation"] for record in fit.history]
    assert fit.stopped == "patience"
    assert fit.history[-1]["step"] < 400
    best = max(range(len(bounds)), key=bounds.__getitem__)
    assert fit.best_step == fit.history[best]["step"]
    assert len(bounds) - 1 - best == 4
    assert TrueBound(net, guide, (other,), {}, plain, num_samples=100)()[0] == bounds[best]
    for name, states in (("best", fit.states), ("last", None)):
        held = checkpoint.load(tmp_path, name).states
        assert all(torch.equal(v, held["model"][k]) for k, v in net.state_dict().items()) == (states is not None)
    again = Variational(guide, Trace_ELBO(), patience=4, checkpoint=tmp_path, **options).fit(
        net, x, validation=other, resume=True
    )
    assert again.stopped == "patience"
    assert again.history[-1]["step"] == fit.history[-1]["step"]
    assert all(torch.equal(v, fit.states["model"][k]) for k, v in again.states["model"].items())


def test_patience_needs_validation():
    net, guide, x = net_and_guide()
    with pytest.raises(ValueError, match="expected validation data that the guide can take with patience"):
        Variational(guide, patience=2).fit(net, x)
    with pytest.raises(ValueError, match="expected validation data"):
        Variational(LocalMeanField(net, 30), patience=2).fit(net, x, validation=x[:7])


# --- What moves ---


class Watched(torch.optim.SGD):
    """Keeps the gradients and learning rates that it is given."""

    def step(self, closure=None):
        group = self.param_groups[0]
        self.seen.append((group["lr"], torch.cat([p.grad.flatten() for p in group["params"]])))
        return super().step(closure)


def watched(model, guide, x, elbo=None, **options):
    seen = []

    def optim(parameters):
        made = Watched(parameters, lr=1.0)
        made.seen = seen
        return made

    fit = Variational(guide, elbo or Trace_ELBO(), optim=optim, **options).fit(model, x)
    return seen, fit


def test_scheduler_steps_at_every_gradient_step():
    net, guide, x = net_and_guide()
    seen, fit = watched(
        net, guide, x, num_steps=4, scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step), log_every=1
    )
    assert [lr for lr, _ in seen] == [1, 0.5, 0.25, 0.125]
    assert [record["learning_rate"] for record in fit.history] == [None, 0.5, 0.25, 0.125, 0.0625]
    with pytest.raises(ValueError, match="steps every gradient step, got ReduceLROnPlateau"):
        watched(net, guide, x, num_steps=1, scheduler=lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match="expected a torch optimizer with a scheduler"):
        Variational(guide, optim=pyro.optim.Adam({}), scheduler=lambda o: lr_scheduler.StepLR(o, 1))


def test_the_schedule_of_fit_is_not_that_of_infer():
    net, guide, x = net_and_guide()
    seen = []

    def scheduler(optimizer):
        seen.append(optimizer)
        return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3)

    method = Variational(guide, num_steps=3, num_guide_steps=5, num_samples=10, scheduler=scheduler, average=0.5)
    method.infer(net, x)
    assert not seen
    method.fit(net, x)
    assert len(seen) == 1


def test_clip_norm():
    net, guide, x = net_and_guide()
    start = copy.deepcopy((net, guide))
    (_, free), *_ = watched(*start, x, ExactLikelihood(), num_steps=1)[0]
    (_, clipped), *_ = watched(net, guide, x, ExactLikelihood(), num_steps=1, clip_norm=0.5)[0]
    assert float(free.norm()) > 1
    assert math.isclose(float(clipped.norm()), 0.5, rel_tol=1e-5)
    assert torch.allclose(clipped, free * 0.5 / free.norm(), rtol=1e-5)
    (_, loose), *_ = watched(net, guide, x, ExactLikelihood(), num_steps=1, clip_norm=1e6)[0]
    assert float(loose.norm()) > 0.5


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("scheduled", [False, True])
def test_beta_weighs_the_kl_divergence(beta, scheduled):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        m = pyro.param("m", torch.tensor(0.7))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, 0.5))

    x, losses = torch.randn(6), []
    for schedule in ((lambda step: beta) if scheduled else beta, 1.0):
        pyro.clear_param_store()
        torch.manual_seed(4)
        method = Variational(guide, TraceMeanField_ELBO(), beta=schedule, num_steps=1)
        losses.append(method.fit(model, x).history[-1]["loss"])
    divergence = 6 * float(torch.distributions.kl_divergence(dist.Normal(0.7, 0.5), dist.Normal(0.0, 1.0)))
    assert math.isclose(losses[1] - losses[0], (1 - beta) * divergence, rel_tol=1e-9)


def test_schedules_are_checked():
    net, guide, x = net_and_guide()
    with pytest.raises(ValueError, match=r"temperature > 0, got 0.0 at step 2"):
        Variational(guide, temperature=lambda step: 2.0 - step, num_steps=5).fit(net, x)
    with pytest.raises(ValueError, match=r"beta >= 0, got -0.5 at step 1"):
        Variational(guide, beta=lambda step: -step / 2, num_steps=5).fit(net, x)
    for options, words in (
        ({"beta": -1.0}, "beta >= 0"),
        ({"temperature": math.nan}, "temperature > 0"),
        ({"straight_through": True}, "straight_through with a temperature"),
        ({"straight_through": True, "temperature": 1.0, "surrogate": "reinmax"}, "no surrogate"),
        ({"surrogate": "rebar"}, "expected surrogate"),
        ({"clip_norm": 0.0}, "clip_norm > 0"),
        ({"average": 1.0}, "average"),
        ({"patience": 0}, "patience >= 1"),
        ({"log_rows": 0}, "log_rows >= 1"),
        ({"batch_size": 2.5}, "integer batch_size >= 1"),
        ({"optim": torch.optim.SGD(net.parameters(), lr=0.1)}, "got one that is made, SGD"),
    ):
        with pytest.raises(ValueError, match=words):
            Variational(guide, **options)
    with pytest.raises(ValueError, match="no KL divergence"):
        Variational(None, ExactLikelihood(), beta=0.5)


def test_schedules_are_in_the_records():
    net, guide, x = net_and_guide()
    fit = Variational(guide, temperature=lambda s: 1 / (1 + s), beta=lambda s: s / 10, num_steps=3, log_every=1).fit(net, x)
    assert [record["beta"] for record in fit.history] == [0.0, 0.0, 0.1, 0.2]  # of the step before
    assert [record["temperature"] for record in fit.history] == [1.0, 1.0, 0.5, 1 / 3]


def test_average_of_the_weights():
    net, _, x = net_and_guide()
    raw, values = copy.deepcopy(net), []

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            leaves = self.param_groups[0]["params"]
            if not values:
                values.append([p.detach().clone() for p in leaves])
            super().step(closure)
            values.append([p.detach().clone() for p in leaves])

    method = partial(Variational, None, ExactLikelihood(), optim=partial(Recorded, lr=0.001), num_steps=5)
    fit = method(average=0.3).fit(net, x)
    expected, *present = values
    for t, value in enumerate(present, 1):
        decay = min(0.3, (1 + t) / (10 + t))
        expected = [decay * mean + (1 - decay) * new for mean, new in zip(expected, value, strict=True)]
    assert all(any(a.shape == b.shape and torch.allclose(a, b, rtol=1e-10) for b in expected) for a in net.parameters())
    assert fit.history[-1]["bound"] == pytest.approx(float(Exact().infer(net, x).log_evidence.mean()), rel=1e-12)
    values.clear()
    method().fit(raw, x)
    assert all(any(torch.equal(a, b) for b in values[-1]) for a in raw.parameters())
    assert not torch.allclose(raw.prior, net.prior, rtol=1e-6)


def test_fused_adam_is_adam():
    parameters = [nn.Parameter(torch.randn(5)) for _ in range(3)]
    fused = make_optimizer(partial(torch.optim.Adam, lr=0.1), parameters)
    assert fused.param_groups[0]["fused"]
    for said in ({"fused": False}, {"foreach": True}):
        assert not make_optimizer(partial(torch.optim.Adam, lr=0.1, **said), parameters).param_groups[0]["fused"]
    ends = []
    for said in ({}, {"fused": False}):
        torch.manual_seed(0)
        net, guide, x = net_and_guide()
        Variational(guide, Trace_ELBO(), optim=partial(torch.optim.Adam, lr=0.1, **said), num_steps=3).fit(net, x)
        ends.append(net.prior.detach().clone())
    assert torch.allclose(*ends, rtol=1e-9)


def test_device():
    net, guide, x = net_and_guide()
    other, other_guide = copy.deepcopy((net, guide))
    for model, q, device in ((net, guide, None), (other, other_guide, "cpu")):
        torch.manual_seed(0)
        Variational(q, num_steps=2, device=device).fit(model, x, validation=x[:3])
    assert torch.equal(net.prior, other.prior)
    assert Variational(guide, device=torch.device("cpu"), num_samples=10).infer(net, x).log_evidence.shape == (30,)
    for device in ("meta", "no such", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ValueError, match=f"a device of this machine, got '{device}'.*use device='cpu'"):
            Variational(guide, device=device).fit(net, x)
    moved = on_device((x, [x], {"a": x, "b": 3}), torch.device("meta"))
    assert moved[0].device == moved[1][0].device == moved[2]["a"].device == torch.device("meta")
    assert moved[2]["b"] == 3


# --- What the programs must be ---


def test_a_guide_that_does_not_match_is_refused_before_the_first_step():
    net, guide, x = net_and_guide()
    before = net.prior.detach().clone()

    def renamed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=pyro.param("l", torch.zeros(3))).to_event(1))

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(logits=pyro.param("n", torch.zeros(2))).to_event(1))

    def dense(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Normal(pyro.param("d", torch.zeros(3)), 1.0).to_event(1))

    for wrong, words in (
        (renamed, r"latents \['h1'\], got \['h'\]"),
        (narrow, r"event shape \(3,\), got \(2,\)"),
        (dense, "one measure for site 'h1'"),
        (relax(guide, 0.5), "one measure for site 'h1'"),
    ):
        with pytest.raises(ValueError, match=words):
            Variational(wrong, num_steps=1).fit(net, x)
    assert torch.equal(net.prior, before)
    Variational(guide, num_steps=1).fit(net, x)


def test_bad_rows_that_come_late_are_explained():
    net, guide, x = net_and_guide(12)
    judged = TrueBound(net, guide, (x,), {}, plain, num_samples=2, max_rows=1).index
    bad = next(row for row in range(4, 12) if row not in judged)
    x[bad] *= 255
    x[bad, 0] = 255
    with pytest.raises(ValueError, match=r"expected x in \{0, 1\} .* got values from 0 to 255; scale"):
        Variational(guide, num_epochs=2, batch_size=4, log_rows=1, log_every=100).fit(net, x)


# --- Numbers that are none ---


def blowing_up(at, kind):
    """A model of two observed sites, one of which goes wrong at the run in which `armed` is set."""
    armed = []
    w = nn.Parameter(torch.tensor(1.0))

    def model(x):
        pyro.param("w", w)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            for name in ("first", "second", "third"):
                wrong = bool(armed) and name == at
                loc = z * math.nan if wrong and kind == "nan" else z
                if wrong and kind == "inf":
                    loc = z + 1e200  # its square overflows
                pyro.sample(name, dist.Normal(loc, 1.0), obs=x)

    v = nn.Parameter(torch.tensor(0.0))

    def guide(x):
        pyro.param("v", v)
        with pyro.plate("data", len(x)):
            loc = v * math.nan if armed and at == "z" else v
            pyro.sample("z", dist.Normal(loc, 1.0))

    return model, guide, armed, (w, v)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("at", "kind", "words"),
    [
        ("second", "nan", "log probability of the model's site 'second' (Normal) is nan"),
        ("first", "nan", "log probability of the model's site 'first' (Normal) is nan"),
        ("third", "inf", "log probability of the model's site 'third' (Normal) is -inf"),
        ("z", "nan", "value of the guide's site 'z' (Normal) is nan"),
    ],
)
def test_a_loss_that_is_no_number_names_the_site(validate, at, kind, words):
    model, guide, armed, parameters = blowing_up(at, kind)
    held = []

    def optim(leaves):
        class Arming(torch.optim.SGD):
            def step(self, closure=None):
                super().step(closure)
                held[:] = [p.detach().clone() for p in parameters]
                self.count = getattr(self, "count", 0) + 1
                if self.count == 3:
                    armed.append(True)

        return Arming(leaves, lr=0.01)

    with pyro.validation_enabled(validate), pytest.raises(FloatingPointError) as caught:
        Variational(guide, Trace_ELBO(num_particles=2), optim=optim, num_steps=10, log_every=100).fit(model, torch.randn(4))
    assert words in str(caught.value)
    assert "step 3" in str(caught.value)
    assert all(torch.equal(p, before) for p, before in zip(parameters, held, strict=True))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_parameter_that_is_no_number_is_named():
    net, guide, x = net_and_guide()
    method = Variational(guide, Trace_ELBO(), num_steps=1)
    run = Optimization(method, net, (x,), {}, learn_model=True)
    with torch.no_grad():
        net.biases[0][2] = math.inf
    with run, pytest.raises(FloatingPointError, match=r"parameter '.*biases.*0' of the model is inf"):
        run.step(0)


def test_a_gradient_that_is_no_number_names_the_parameter():
    healthy, root = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(0.0))

    def model(x):
        pyro.param("healthy", healthy)
        pyro.param("root", root)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(healthy, 1.0))
            pyro.sample("x", dist.Normal(z + root.sqrt(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with pytest.raises(
        FloatingPointError, match=r"finite gradients, got -?(inf|nan) in that of the parameter 'root' of the model"
    ):
        Variational(guide, Trace_ELBO(), num_steps=1).fit(model, torch.ones(3))
    assert float(root.detach()) == 0
    assert math.isclose(float(healthy.detach()), 0.2, rel_tol=1e-6)


def test_large_gradients_are_no_fault():
    """Their norm overflows; they do not."""
    w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float32))

    def model(x):
        pyro.param("w", w)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 0 * w.sum(), 1.0), obs=x)
        pyro.factor("large", 1e25 * (w - w.detach()).sum())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    Variational(guide, Trace_ELBO(), num_steps=1, optim=partial(torch.optim.SGD, lr=1e-26)).fit(model, torch.ones(3))
    assert float(w[0].detach()) != 1


# --- What people see ---


def test_progress_and_log(tmp_path):
    net, guide, x = net_and_guide()
    log, shown = tmp_path / "runs" / "log.jsonl", io.StringIO()
    with contextlib.redirect_stderr(shown):
        fit = Variational(guide, num_steps=6, log_every=2, progress=True, log=log).fit(net, x, validation=x[:5])
    assert all(word in shown.getvalue() for word in ("epoch=", "loss=", "validation="))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == [dict(record) for record in fit.history]
    assert list(lines[0])[:3] == ["step", "epoch", "loss"]


def test_the_log_is_strict_json(tmp_path):
    def model(x):
        w = pyro.param("w", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-1.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(9.0)), 0.1))  # where the model has no mass

    log = tmp_path / "log.jsonl"
    with pytest.raises(FloatingPointError, match="log probability of the model's site 'z'"):
        Variational(guide, Trace_ELBO(), num_steps=1, log=log).fit(model, torch.zeros(3))
    (record,) = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in log.read_text().splitlines()]
    assert record["bound"] is None


# --- Options that would do nothing, and pairs that make no bound ---


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"temperature": lambda step: 1.0}, {"surrogate": "reinmax"}])
def test_a_relaxation_that_would_change_nothing_is_refused(options):
    net, guide, x = net_and_guide()
    soft = relax(net, 0.5)
    of_soft = AmortizedMeanField(soft)
    what = next(iter(options))
    for model, q in ((soft, of_soft), (soft, guide), (net, of_soft), (surrogate(net), guide)):
        with pytest.raises(ValueError, match=f"expected programs as written for {what}=.*'h1' already"):
            Variational(q, Trace_ELBO(), num_steps=2, **options).fit(model, x)
    normal = GaussianVAE(6, 2, (3,))
    with pytest.raises(ValueError, match=f"expected a Bernoulli or OneHotCategorical latent for {what}="):
        Variational(AmortizedMeanField(normal), num_steps=2, **options).fit(normal, x)
    Variational(of_soft, Trace_ELBO(), num_steps=1).fit(soft, x)
    Variational(guide, Trace_ELBO(), num_steps=1, **options).fit(net, x)


def test_a_beta_that_the_guide_lacks_is_told():
    net = GaussianVAE(6, 2, (3,), beta=3.0)
    x = net.sample(8).detach()

    def guide(x=None, **kwargs):
        loc = pyro.param("loc of beta", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.warns(UserWarning, match=r"'z' is scaled by 3 in the model and by 1 in.*scale_kl\(guide, model.beta\)"):
        Variational(guide, num_steps=1).fit(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Variational(scale_kl(guide, net.beta), num_steps=1).fit(net, x)
        Variational(AmortizedMeanField(net), num_steps=1).fit(net, x)
        Variational(AmortizedMeanField(net), num_steps=1, batch_size=4, beta=0.5).fit(net, x)


def test_stock_straight_through_on_both_sides_is_told():
    def program(x):
        with pyro.plate("data", len(x)):
            fn = dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=torch.zeros(3))
            z = pyro.sample("z", fn)
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits of stock", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=logits))

    with pytest.warns(UserWarning, match="'z' is Pyro's straight-through relaxation in model and guide.*straight_through=True"):
        Variational(guide, Trace_ELBO(), num_steps=1).fit(program, torch.randn(5))


@pytest.mark.parametrize("optim", [torch.optim.LBFGS, partial(torch.optim.LBFGS, lr=0.1), lambda p: torch.optim.LBFGS(p)])
def test_optimizers_with_a_closure_are_refused(optim):
    net, guide, x = net_and_guide()
    with pytest.raises(ValueError, match="expected an optimizer that steps by one gradient, got LBFGS"):
        Variational(guide, optim=optim, num_steps=2).fit(net, x)
