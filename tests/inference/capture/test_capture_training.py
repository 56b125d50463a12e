"""Captured steps of `Variational` against eager ones with the same seed; guards that leave their flag on the device."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

from pyrovae.guides import AmortizedMeanField, LocalMeanField
from pyrovae.inference import ExactLikelihood, Variational, WakeSleep
from pyrovae.inference.capture import replay
from pyrovae.inference.capture.inductor import find_compiler
from pyrovae.inference.capture.quiet import CannotCapture
from pyrovae.inference.variational import capturing, progress, update
from pyrovae.inference.variational.capturing import chosen
from pyrovae.inference.variational.guard import EVERY, Guard, skips
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.inference.variational.training import Training
from pyrovae.inference.variational.update import Update
from pyrovae.models import BernoulliMixture, DeepBeliefNet, toy

SCHEDULE = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=12)


class Regression(nn.Module):
    """A latent mean, with dropout and BatchNorm in the guide."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))

    def forward(self, x):
        pyro.param("scale", self.scale)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.scale.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


def belief_net(guide=AmortizedMeanField):
    net = toy.belief_net()
    return net, guide(net), net.sample(16)


def mixture():
    net = BernoulliMixture(4, 3, concentration=2.0, pixel_concentration=3.0)
    return net, None, net.sample(16)


def deep():
    net = DeepBeliefNet(4, [3, 2], max_bits=1)
    return net, AmortizedMeanField(net), torch.bernoulli(torch.full((16, 4), 0.5))


def regression():
    net = Regression()
    return net, net.guide, torch.randn(16, 2)


def plain():
    def model(x):
        mean = pyro.param("mean", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(mean, 1.0)), scale), obs=x)

    def guide(x):
        scale = pyro.param("scale of z", torch.tensor(0.3), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, scale))

    return model, guide, torch.randn(16)


CASES = {
    "defaults": (belief_net, {}),
    "schedules": (
        belief_net,
        {
            "elbo": Trace_ELBO(),
            "temperature": lambda step: 1 - 0.02 * step,
            "beta": lambda step: min(1.0, 0.1 + step / 10),
            "batch_size": 5,
            "clip_norm": 1.0,
            "average": 0.9,
        },
    ),
    "surrogate": (
        belief_net,
        {
            "elbo": TraceMeanField_ELBO(),
            "surrogate": "reinmax",
            "penalty": 0.1,
            "batch_size": 4,
            "scheduler": SCHEDULE,
        },
    ),
    "exact": (belief_net, {"elbo": ExactLikelihood(), "guide": None, "penalty": 0.3, "batch_size": 5}),
    "a prior": (mixture, {"elbo": ExactLikelihood(), "batch_size": 5}),
    "score function": (belief_net, {"elbo": TraceGraph_ELBO()}),
    "two losses": (belief_net, {"elbo": ReweightedWakeSleep(num_particles=3), "optim": partial(torch.optim.SGD, lr=0.01)}),
    "a row's own": (partial(belief_net, partial(LocalMeanField, num_data=16)), {"batch_size": 4, "average": 0.99}),
    "a Pyro optimizer": (belief_net, {"optim": pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 1.0})}),
    "patience": (belief_net, {"patience": 1, "optim": partial(torch.optim.SGD, lr=5.0)}),
    "buffers": (regression, {"elbo": Trace_ELBO(), "batch_size": 6}),
    "functions": (plain, {"batch_size": 6, "preprocess": lambda x: x + 0.1 * torch.randn_like(x)}),
}


def training(make, options, *, resume=False, seed=0, **more):
    """A run that is to be called before the next one is made, which draws from the same generator."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, x = make()
    torch.manual_seed(seed)
    options = {"guide": guide, "num_steps": 12, "log_every": 5} | options | more
    held_out = x[:4] if options["guide"] is None or "patience" in options else None
    return Training(Variational(**options), model, (x,), {}, held_out, resume=resume)


def same(a, b):
    """Whether two fits are equal in every bit."""
    records = [[{k: v for k, v in r.items() if k != "seconds"} for r in fit.history] for fit in (a, b)]
    states = [[(part, name, value) for part in f.states for name, value in f.states[part].items()] for f in (a, b)]
    return (
        records[0] == records[1]
        and [s[:2] for s in states[0]] == [s[:2] for s in states[1]]
        and all(torch.equal(x[2], y[2]) for x, y in zip(*states, strict=True))
        and a.model_evaluations == b.model_evaluations
    )


# Whole fits


@pytest.mark.parametrize("name", CASES)
def test_the_graph_gives_the_bits_of_eager_steps(name):
    make, options = CASES[name]
    eager = training(make, options, capture="off")
    fit = eager()
    captured = training(make, options, capture="fx")
    assert same(captured(), fit)
    assert eager.run.replay.steps == 0
    assert captured.run.replay.steps == captured.step - 1 > 0
    drawn = name not in ("exact", "a prior") or "batch_size" in options
    assert drawn != same(training(make, options, capture="fx", seed=1)(), fit)


@pytest.mark.parametrize("name", ["schedules", "a prior", "buffers", "functions"])
def test_every_step_comes_from_the_graph_where_it_may_be_compiled(name, monkeypatch):
    monkeypatch.setattr(capturing, "MIN_STEPS", 0)
    make, options = CASES[name]
    fit = training(make, options, capture="off")()
    captured = training(make, options, capture="auto")
    assert same(captured(), fit)
    assert captured.run.replay.steps == 12


@pytest.mark.filterwarnings("ignore:site 'h1' is drawn from an undirected distribution")
def test_persistent_chains_move_in_the_graph():
    fits, moved = [], []
    for capture in ("off", "fx"):
        run = training(deep, {"elbo": Trace_ELBO(), "batch_size": 5}, capture=capture)
        before = run.model.chains.states.clone()
        fits.append(run())
        moved.append(not torch.equal(before, run.model.chains.states))
    assert same(*fits)
    assert all(moved)


def test_guides_are_fitted_alone():
    found = []
    for capture in ("off", "fx"):
        torch.manual_seed(0)
        net, guide, x = belief_net()
        held = [parameter.clone() for parameter in net.parameters()]
        posterior = Variational(guide, num_guide_steps=8, num_samples=10, capture=capture).infer(net, x)
        assert all(map(torch.equal, held, net.parameters()))
        found.append((posterior.diagnostics["losses"], [p.detach() for p in guide.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(isinstance(loss, float) for loss in found[0][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_wake_sleep_is_captured():
    fits = []
    for capture in ("off", "fx"):
        torch.manual_seed(0)
        net, guide, x = belief_net()
        fits.append(WakeSleep(guide, num_steps=8, batch_size=5, capture=capture).fit(net, x))
    assert same(*fits)


# Checkpoints


@pytest.mark.parametrize("capture", ["fx", "auto"])
def test_a_resumed_run_has_the_bits_of_a_whole_one(capture, tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "MIN_STEPS", 0)
    make, options = CASES["schedules"]
    whole = training(make, options, capture=capture)()
    assert same(_interrupted(make, options, tmp_path, capture), whole)


def test_a_run_goes_on_under_another_backend(tmp_path):
    make, options = CASES["schedules"]
    _interrupted(make, options, tmp_path, "off", go_on=False)
    resumed = training(make, options, checkpoint=tmp_path, capture="fx", resume=True, seed=5)()
    assert same(resumed, training(make, options)())


@pytest.mark.skipif(find_compiler() is None, reason="no compiler")
def test_compiled_runs(tmp_path, capsys, monkeypatch):
    make, options = CASES["schedules"]
    eager = training(make, options, capture="off")()
    whole = training(make, options, capture="inductor", progress=True)
    fit = whole()
    assert "compiled in" in capsys.readouterr().err
    assert whole.run.replay.steps == 12
    for mine, theirs in zip(fit.history, eager.history, strict=True):
        assert mine["bound"] == pytest.approx(theirs["bound"], rel=1e-4)
    assert fit.history[1]["loss"] == pytest.approx(eager.history[1]["loss"], rel=1e-5)
    assert same(_interrupted(make, options, tmp_path, "inductor"), fit)
    monkeypatch.setattr(capturing, "MIN_STEPS", 0)
    compiled, compile_graph = [], replay.compile_graph
    monkeypatch.setattr(replay, "compile_graph", lambda *args: compiled.append(1) or compile_graph(*args))
    for price, times, expected in ((12, 0, eager), (11, 1, fit)):  # by the number of steps of the whole run
        monkeypatch.setattr(replay, "steps_to_pay", lambda _, price=price: price)
        assert same(training(make, options, capture="auto")(), expected)
        assert len(compiled) == times


def _interrupted(make, options, folder, capture, *, go_on=True):
    """A run that is broken off at step 8, and goes on from the record at step 5."""
    run = training(make, options, checkpoint=folder, capture=capture)
    step = run.run.step

    def breaks(number):
        if number == 8:
            raise KeyboardInterrupt
        return step(number)

    run.run.step = breaks
    with pytest.raises(KeyboardInterrupt):
        run()
    return training(make, options, checkpoint=folder, capture=capture, resume=True, seed=5)() if go_on else None


# What is chosen, and what cannot be captured


def test_declared_programs_are_captured_in_long_runs():
    net, guide, _ = belief_net()
    many = capturing.MIN_STEPS
    assert chosen(None, (net, guide), Trace_ELBO(), many) == "auto"
    assert chosen(None, (net, guide), Trace_ELBO(), many - 1) == "off"
    assert chosen(None, (net, lambda x: guide(x)), Trace_ELBO(), many) == "off"
    assert chosen(None, (net, guide), type("Own", (Trace_ELBO,), {})(), many) == "off"
    assert chosen("fx", (plain()[:2]), Trace_ELBO(), 1) == "fx"
    assert chosen("off", (net, guide), Trace_ELBO(), many) == "off"
    run = Optimization(Variational(guide, num_epochs=many), net, (net.sample(4),), {}, learn_model=True)
    assert run.replay.backend == "auto"
    with pytest.raises(ValueError, match=r"expected a backend among 'auto', 'off', 'fx'.*got 'jit'"):
        Variational(guide, capture="jit")


def branching():
    def model(x):
        z = pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
        z = z if z.sum() > 0 else 2 * z
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(z.shape + x.shape).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("mean of z", torch.tensor(0.5)), 1.0))

    return model, guide, torch.randn(4)


@pytest.mark.parametrize("particles", [1, 2])
def test_what_cannot_be_captured(particles, monkeypatch):
    monkeypatch.setattr(capturing, "MIN_STEPS", 0)
    options = {"elbo": Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)}
    eager = training(branching, options)()
    with pytest.warns(UserWarning, match=r"cannot be captured.*test_capture_training.*eagerly") as told:
        fit = training(branching, options, capture="auto")()
    assert len(told) == 1
    assert same(fit, eager)
    with pytest.raises(CannotCapture, match="depend on values"):
        training(branching, options, capture="fx")()
    with pytest.raises(ValueError, match=r"on CUDA for a CUDA graph, got cpu"):
        training(belief_net, {}, capture="cudagraph")()


def test_a_number_that_changes_is_noticed():
    def make():
        def model(x):
            z = pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, model.scale).expand([len(x)]).to_event(1), obs=x)

        def guide(x):
            pyro.sample("z", dist.Normal(pyro.param("mean of z", torch.tensor(0.5)), 1.0))

        model.scale = 1.0
        return model, guide, torch.randn(4)

    run = training(make, {"elbo": Trace_ELBO()}, num_steps=20, log_every=20, capture="fx")

    def turn(step, taken=run.run.step):
        run.model.scale = 1.0 if step < 5 else 1.5
        return taken(step)

    run.run.step = turn
    with pytest.warns(UserWarning, match=r"site 'x'.*scale|scale.*site 'x'"):
        run()
    assert run.run.replay.eager


# Numbers that are none


def failing(at):
    """A model whose data are nan from a step on; they are changed by the schedule of beta, which is asked before a step."""

    def make():
        mean, mean_of_z, data = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.5)), torch.zeros(4)

        def model(x):
            pyro.param("mean", mean)
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)

        def guide(x):
            pyro.sample("z", dist.Normal(pyro.param("mean of z", mean_of_z), 1.0))

        def beta(step):
            with torch.no_grad():
                data.fill_(math.nan if step >= at else 0.0)
            return 1.0

        make.beta, make.mean = beta, mean
        return model, guide, data

    return make


def start(at, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    make = failing(at)
    model, guide, x = make()
    method = Variational(guide, Trace_ELBO(), beta=make.beta, **({"num_steps": 20, "log_every": 10} | options))
    return Training(method, model, (x,), {}, None, resume=False), make.mean


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("capture", ["off", "fx"])
@pytest.mark.parametrize("validate", [True, False])
def test_a_step_that_fails_moves_nothing(capture, validate):
    with pyro.validation_enabled(validate):
        reference, moved = start(99, num_steps=12)
        reference()
        run, mean = start(12, capture=capture)
        with pytest.raises(FloatingPointError, match=r"at step 12: the .* of the model's site 'x' \(Normal\) is nan"):
            run()
    assert torch.equal(mean, moved)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("capture", ["off", "fx"])
@pytest.mark.parametrize("optim", [torch.optim.Adam, partial(torch.optim.SGD, fused=True)])
def test_a_flag_on_the_device_stops_all_updates(capture, optim, monkeypatch):
    monkeypatch.setattr(update, "Guard", partial(Guard, deferred=True))
    looks = []
    monkeypatch.setattr(Guard, "read", lambda self, read=Guard.read: looks.append(1) or read(self))
    optim = partial(optim, lr=0.01)
    with pyro.validation_enabled(is_validate=False):
        reference, moved = start(99, num_steps=12, optim=optim, clip_norm=1.0)
        reference()
        del looks[:]
        run, mean = start(12, capture=capture, optim=optim, clip_norm=1.0)
        with pytest.raises(
            FloatingPointError, match=r"loss, got nan at step 12: the .* of the model's site 'x' \(Normal\) is nan"
        ):
            run()
    assert run.step == 20
    assert len(looks) == 2  # at the records, of steps 10 and 20; the first has no optimizer yet
    assert torch.equal(mean, moved)


def test_a_flag_that_stays_down_changes_no_bit(monkeypatch):
    make, options = CASES["schedules"]
    fit = training(make, options)()
    monkeypatch.setattr(update, "Guard", partial(Guard, deferred=True))
    assert same(training(make, options)(), fit)


def test_the_optimizer_of_a_cuda_graph_steps_as_the_one_that_owns_its_state(monkeypatch):
    make, options = belief_net, CASES["schedules"][1] | {"scheduler": SCHEDULE}
    fit = training(make, options)()
    run = training(make, options)
    assert run.run.update is None
    monkeypatch.setattr(update, "Guard", partial(Guard, deferred=True))
    move = Update.move
    monkeypatch.setattr(Update, "move", lambda self, norm: (self.recordable(), move(self, norm)))
    assert same(run(), fit)
    assert run.run.update.recordable() is not None
    with torch.no_grad():
        before = [leaf.clone() for leaf in run.run.update.leaves]
        run.run.update.guard.see(torch.tensor(math.nan), torch.tensor(1.0))
        run.run.update.take([torch.ones_like(leaf) for leaf in before])
        run.run.update.move(torch.tensor(1.0))
    assert all(map(torch.equal, before, run.run.update.leaves))


def test_guards():
    leaf = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([leaf], fused=True)
    assert skips(optimizer)
    assert not skips(torch.optim.Adam([leaf]))
    assert not skips(torch.optim.RMSprop([leaf]))
    assert not Guard(optimizer, torch.device("cpu")).deferred
    guard = Guard(optimizer, torch.device("cpu"), deferred=True)
    numbers = [(1.0, 1.0), (2.0, math.inf), (math.nan, math.nan), (3.0, 3.0)]
    due = []
    for loss, norm in numbers:
        guard.see(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
        due.append(guard.due())
    assert not any(due)
    fault = guard.read()
    assert (fault.loss, fault.ago) == (2.0, 2)  # of the first that failed
    assert float(optimizer.found_inf) == 1
    assert [guard.due() for _ in range(EVERY)].count(True) == 1
    healthy = Guard(optimizer, torch.device("cpu"), deferred=True)
    healthy.see(torch.tensor(1.0), torch.tensor(1.0))
    assert healthy.read() is None


# What is read


def test_losses_are_tensors_until_they_are_logged():
    net, guide, x = belief_net()
    with Optimization(Variational(guide), net, (x,), {}, learn_model=True) as run:
        loss = run.step(0)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert progress.in_floats([loss, 2 * loss]) == [float(loss), 2 * float(loss)]
    assert progress.in_floats([]) == []


def test_the_bar_looks_ten_times_a_second(monkeypatch, capsys):
    now, looks = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Bar(1000, shown=True) as bar:
        for step in range(1000):
            now[0] += 0.001
            bar.tell(step + 1, lambda: looks.append(1) or {})
    assert 9 <= len(looks) <= 10
    assert "1000/1000" in capsys.readouterr().err
    with progress.Bar(10, shown=False) as bar:
        bar.tell(1, lambda: looks.append(1) or {})
        bar.say("compiling")
    assert len(looks) <= 10
