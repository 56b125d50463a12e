"""Checkpoints: whole or absent, safe to load, and a resumed run is the run that never stopped, bit for bit."""

import contextlib
import json
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import nn
from torch.distributions import constraints
from torch.optim import lr_scheduler

from pyrovae import data
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Variational
from pyrovae.inference.variational import checkpoint, training
from pyrovae.models import GaussianVAE, toy

STEPS = 12


class Killed(BaseException):
    """As if the process ended here."""


def grey(rows=23):
    return torch.rand(rows, 6, generator=torch.Generator().manual_seed(5))


def run(folder, num_steps, *, resume=False, seed=0, sizes=3, x=None, **options):
    """A fit with everything that moves: random preprocessing, relaxed noise, schedules, clipping, an odd last batch."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    net = toy.belief_net(6, sizes)
    guide = AmortizedMeanField(net)
    given = {
        "optim": partial(torch.optim.Adam, lr=0.05),
        "num_steps": num_steps,
        "batch_size": 5,
        "temperature": lambda step: 1 / (1 + 0.1 * step),
        "beta": lambda step: min(1.0, (1 + step) / 6),
        "scheduler": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS),
        "clip_norm": 20.0,
        "preprocess": data.binarize,
        "log_every": 4,
        "checkpoint": folder,
        **options,
    }
    if resume:
        torch.manual_seed(99)  # what the new process happens to have drawn
        torch.rand(7)
    fit = Variational(guide, Trace_ELBO(), **given).fit(net, grey() if x is None else x, validation=grey(7), resume=resume)
    return {**net.state_dict(), **{f"guide.{k}": v for k, v in guide.state_dict().items()}}, fit


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


VARIANTS = {
    "one cycle": {},
    "step": {"scheduler": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.5)},
    "milestones": {"scheduler": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 7, 9])},
    "average": {"average": 0.8},
    "straight-through": {"straight_through": True},
    "reinmax": {"surrogate": "reinmax", "temperature": None},
    "pyro": {"scheduler": None, "optim": pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9})},
    "momentum": {"scheduler": None, "optim": partial(torch.optim.SGD, lr=1e-3, momentum=0.9)},
    "noise from NumPy and Python": {
        "preprocess": lambda x: ((x + random.random() / 2 + torch.as_tensor(np.random.rand(6)) / 2) > 1).to(x)
    },
    "all rows": {"batch_size": None},
    "patience": {"patience": 100},
}


@pytest.mark.parametrize(("name", "half"), [("one cycle", 8), *((name, 6) for name in VARIANTS)])  # an epoch has 4 steps
def test_resume_is_bit_for_bit(tmp_path, name, half):
    options = {"log_every": 2, **VARIANTS[name]}
    whole, fit = run(tmp_path / "whole", STEPS, **options)
    first, _ = run(tmp_path / "parts", half, **options)
    assert not equal(whole, first) or name == "patience"  # which puts the best back
    parts, resumed = run(tmp_path / "parts", STEPS, resume=True, seed=1, **options)
    assert equal(whole, parts)
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in f.history] for f in (fit, resumed)]
    assert timeless[0] == timeless[1]
    assert [record["step"] for record in timeless[0]] == list(range(0, STEPS + 1, 2))
    for name in ("seed", "best_step", "model_evaluations", "stopped"):
        assert getattr(resumed, name) == getattr(fit, name)
    times = [record["seconds"] for record in resumed.history]
    assert times == sorted(times)


@pytest.mark.parametrize("forgotten", ["random", "order", "optimizer", "scheduler"])
def test_what_is_forgotten_is_noticed(tmp_path, monkeypatch, forgotten):
    whole, _ = run(tmp_path / "whole", STEPS)
    run(tmp_path / "parts", 6)
    if forgotten == "random":
        monkeypatch.setattr(training.files, "set_random_states", lambda states, device: None)
    else:
        load = checkpoint.load

        def forget(folder, name="last"):
            found = load(folder, name)
            state = found.contents["run"]
            if forgotten == "order":
                state["batches"] = {"order": None, "start": 0}
            elif forgotten == "optimizer":
                for moments in state["optimizer"]["state"].values():
                    moments["exp_avg"].zero_()
            else:
                state["scheduler"]["last_epoch"] = 0
            return found

        monkeypatch.setattr(training.files, "load", forget)
    parts, _ = run(tmp_path / "parts", STEPS, resume=True, seed=1)
    assert not equal(whole, parts)


def plain_programs():
    """Plain functions, a bare constrained param in the store, and a baseline that belongs to the objective alone."""
    baseline = nn.Linear(6, 1)

    def model(x):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("prior", torch.zeros(2))).to_event(1))
            pyro.sample("x", dist.Normal(h @ torch.ones(2, 6), scale).to_event(1), obs=x)

    encoder = nn.Linear(6, 2)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.module("baseline", baseline)
        options = {"nn_baseline": lambda x: baseline(x).squeeze(-1), "nn_baseline_input": x, "use_decaying_avg_baseline": True}
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=encoder(x)).to_event(1), infer={"baseline": options})

    return model, guide, baseline


def run_plain(folder, num_steps, *, resume=False, seed=0):
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model, guide, baseline = plain_programs()
    options = {"batch_size": 5, "checkpoint": folder, "log_every": 3, "optim": partial(torch.optim.Adam, lr=0.1)}
    method = Variational(guide, TraceGraph_ELBO(), num_steps=num_steps, **options)
    fit = method.fit(model, grey(), resume=resume)
    average = pyro.get_param_store()["__baseline_avg_downstream_cost_h"].detach().clone()
    return {**fit.states["model"], **fit.states["guide"], **dict(baseline.named_parameters()), "average": average}


def test_resume_of_functions_with_params_in_the_store(tmp_path):
    whole = run_plain(tmp_path / "whole", STEPS)
    first = run_plain(tmp_path / "parts", 6)
    parts = run_plain(tmp_path / "parts", STEPS, resume=True, seed=3)
    assert equal(whole, parts)
    assert not any(torch.equal(whole[name], first[name]) for name in whole)
    assert {"scale", "prior", "encoder$$$weight", "average", "weight"} <= set(whole)


def test_a_run_that_is_killed_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole", STEPS)
    replace, calls = os.replace, []

    for kill_at in range(1, 5):  # last.pt, last.json, best.pt, best.json of the second record, if it is the best
        folder = tmp_path / f"parts{kill_at}"
        run(folder, 4)
        before = checkpoint.load(folder).account["step"]
        calls.clear()

        def dies(source, target, kill_at=kill_at):
            calls.append(target)
            if len(calls) == kill_at:
                raise Killed
            return replace(source, target)

        monkeypatch.setattr(checkpoint.os, "replace", dies)
        with contextlib.suppress(Killed):
            run(folder, STEPS, resume=True, seed=1)
        monkeypatch.setattr(checkpoint.os, "replace", replace)
        assert len(calls) >= kill_at
        found = checkpoint.load(folder)
        assert found.account["step"] == (before if kill_at == 1 else 8)
        checkpoint.load(folder, "best")
        parts, _ = run(folder, STEPS, resume=True, seed=2)
        assert equal(whole, parts)


def test_a_part_of_a_file_is_never_under_its_name(tmp_path, monkeypatch):
    run(tmp_path, 4)
    before = (tmp_path / "last.pt").read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, STEPS, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_damaged_files(tmp_path):
    run(tmp_path, 4)
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    assert checkpoint.load(tmp_path).account["step"] == 4
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"truncated or damaged, load 'best' from the same folder"):
            checkpoint.load(tmp_path)
        with pytest.raises(ValueError, match="expected a whole checkpoint"):
            run(tmp_path, STEPS, resume=True)
    weight = checkpoint.load(tmp_path, "best").contents["run"]["optimizer"]["state"][1]["exp_avg_sq"].numpy().tobytes()
    place = (tmp_path / "best.pt").read_bytes().find(weight)
    spoilt = bytearray((tmp_path / "best.pt").read_bytes())
    assert place > 0
    spoilt[place + 1] ^= 1  # one bit of one number
    path.write_bytes(bytes(spoilt))
    with pytest.raises(ValueError, match="expected a whole checkpoint"):
        checkpoint.load(tmp_path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="without a format"):
        checkpoint.load(tmp_path)
    for account in ({}, {"account": 3}):
        torch.save({"format": checkpoint.FORMAT, **account}, path)
        with pytest.raises(ValueError, match="expected a checkpoint with an account of the run"):
            checkpoint.load(tmp_path)
        torch.save({"format": checkpoint.FORMAT + 1, **account}, path)
        with pytest.raises(ValueError, match="written by pyrovae another version"):
            checkpoint.load(tmp_path)


def test_another_format(tmp_path):
    run(tmp_path, 4)
    path = tmp_path / "last.pt"
    found = torch.load(path, weights_only=True)
    torch.save({**found, "format": checkpoint.FORMAT + 1}, path)
    with pytest.raises(ValueError, match=r"format 1, got another .* written by pyrovae \d"):
        run(tmp_path, STEPS, resume=True)


def test_other_versions_warn(tmp_path, monkeypatch):
    run(tmp_path, 4)
    monkeypatch.setattr(training, "versions", lambda: {"torch": "9.9"})
    with pytest.warns(UserWarning, match="torch .* is now 9.9"):
        run(tmp_path, STEPS, resume=True)


def test_another_architecture(tmp_path):
    run(tmp_path, 4)
    with pytest.raises(ValueError, match=r"'prior' of the model is \[3\] in the checkpoint and \[4\] here; build"):
        run(tmp_path, STEPS, resume=True, sizes=4)
    net = toy.belief_net(6, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"'prior' of the model"):
        checkpoint.load(tmp_path).restore(net)
    assert equal(before, net.state_dict())
    with pytest.raises(ValueError, match="absent here"):
        checkpoint.load(tmp_path).restore(nn.Linear(2, 2))


def test_other_data(tmp_path):
    run(tmp_path, 4)
    other = grey()
    other[22, 5] += 1e-3
    for x in (other, grey(22), grey().float()):
        with pytest.raises(ValueError, match=r"expected the data that .* was made with, .*'shape': \[23, 6\]"):
            run(tmp_path, STEPS, resume=True, x=x)
    with pytest.raises(ValueError, match="batch_size=5 as in"):
        run(tmp_path, STEPS, resume=True, batch_size=4)


def test_optimizer_or_schedule_of_another_kind(tmp_path):
    run(tmp_path, 4)
    with pytest.raises(ValueError, match="expected the scheduler of the checkpoint, which has one, got none"):
        run(tmp_path, STEPS, resume=True, scheduler=None)
    with pytest.raises(ValueError, match=r"expected the options of .*, average=None, got average=0.9; pass the same"):
        run(tmp_path, STEPS, resume=True, average=0.9)
    with pytest.raises(ValueError, match=r"expected the optimizer of .*, optim='Adam', got optim='PyroOptim'"):
        run(tmp_path, STEPS, resume=True, scheduler=None, optim=pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match=r"expected the optimizer of .*, optim='Adam', got optim='SGD'"):
        run(tmp_path, STEPS, resume=True, optim=partial(torch.optim.SGD, lr=0.1))
    run(tmp_path, 8, resume=True, optim=partial(torch.optim.Adam, lr=7.0))  # settings are the checkpoint's


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ({"beta": 0.5}, {"beta": 0.3}, "beta=0.5, got beta=0.3"),
        ({"temperature": 0.5}, {"temperature": 1.0}, "temperature=0.5, got temperature=1.0"),
        ({"temperature": 0.5}, {}, r"temperature=0.5, got temperature='run.<locals>"),
        ({}, {"clip_norm": 2.0, "penalty": 0.1}, "clip_norm=20.0, penalty=0.0, got clip_norm=2.0, penalty=0.1"),
        ({"surrogate": "reinmax"}, {"surrogate": "straight_through"}, "surrogate='reinmax', got"),
        ({}, {"straight_through": True}, "straight_through=False, got straight_through=True"),
        ({"average": 0.5}, {"average": 0.6}, "average=0.5, got average=0.6"),
    ],
)
def test_options_that_would_make_another_run_are_refused_by_name(tmp_path, then, now, words):
    run(tmp_path, 4, x=grey().round(), **then)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, STEPS, resume=True, x=grey().round(), **now)
    run(tmp_path, 8, resume=True, x=grey().round(), **then)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"likelihood": "cross_entropy"}, "model's config of .*, likelihood='bernoulli', got likelihood='cross_entropy'"),
        ({"activation": "Tanh"}, "activation='ReLU', got activation='Tanh'"),
        ({"beta": 4.0}, "beta=1.0, got beta=4.0"),
    ],
)
def test_another_config_of_the_same_shapes_is_refused(tmp_path, change, words):
    def fit(num_steps, resume=False, **change):
        net = GaussianVAE(6, 2, (4,), **change)
        method = Variational(AmortizedMeanField(net), num_steps=num_steps, checkpoint=tmp_path)
        return method.fit(net, grey().round(), resume=resume), net

    fit(2)
    with pytest.raises(ValueError, match=words):
        fit(4, resume=True, **change)
    _, net = fit(4, resume=True)
    assert net.beta == 1


def test_a_program_of_another_class_is_refused(tmp_path):
    class Same(type(toy.belief_net(6, 3))):
        pass

    run(tmp_path, 4)
    net = toy.belief_net(6, 3)
    net.__class__ = Same
    method = Variational(AmortizedMeanField(net), num_steps=8, batch_size=5, preprocess=data.binarize, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"programs of .*, model='SigmoidBeliefNet', got model='Same'"):
        method.fit(net, grey(), validation=grey(7), resume=True)


def test_validation_data_come_and_go_with_the_run(tmp_path):
    def fit(folder, num_steps, validation, resume=False):
        net = toy.belief_net(6, 3)
        method = Variational(AmortizedMeanField(net), num_steps=num_steps, checkpoint=folder)
        return method.fit(net, grey().round(), validation=validation, resume=resume)

    for folder, first, second, words in (
        (tmp_path / "with", grey(7).round(), None, r"validation data as .* made with \(some\), got none"),
        (tmp_path / "without", None, grey(7).round(), r"validation data as .* made with \(none\), got some"),
    ):
        fit(folder, 2, first)
        before = (folder / "last.pt").read_bytes()
        with pytest.raises(ValueError, match=words):
            fit(folder, 4, second, resume=True)
        assert (folder / "last.pt").read_bytes() == before
        fit(folder, 4, first, resume=True)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, 4)
    with pytest.raises(FileExistsError, match="pass resume=True to go on"):
        run(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="train with Variational"):
        run(tmp_path / "nothing", 4, resume=True)
    with pytest.raises(ValueError, match="expected a checkpoint folder to resume from"):
        run(None, 4, resume=True)


def test_last_and_best_and_their_account(tmp_path):
    parameters, fit = run(tmp_path, STEPS, average=0.5)
    last, best = checkpoint.load(tmp_path), checkpoint.load(tmp_path, "best")
    assert best.account["step"] == fit.best_step
    assert equal({k: v for k, v in parameters.items() if not k.startswith("guide.")}, last.states["model"])  # the averages
    assert not equal(
        last.states["model"], dict(zip(last.states["model"], last.contents["run"]["average"]["leaves"], strict=False))
    )
    net = toy.belief_net(6, 3)
    guide = AmortizedMeanField(net)
    best.restore(net, guide)
    assert equal(net.state_dict(), best.states["model"])
    assert equal(guide.state_dict(), best.states["guide"])
    for name, found in (("last", last), ("best", best)):
        account = json.loads((tmp_path / f"{name}.json").read_text())
        assert account["digest"] == found.account["digest"]
        assert account["step"] == found.account["step"]
        assert account["architecture"]["model"]["prior"] == [3]
        assert account["settings"]["optim"] == "Adam(lr=0.05)"
        assert account["data"]["training"][0]["shape"] == [23, 6]
        assert account["versions"]["torch"] == torch.__version__
        assert [r["step"] for r in account["history"]] == [r["step"] for r in fit.history if r["step"] <= account["step"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "best.pt", "last.json", "last.pt"]


def test_a_finished_run_resumed_is_as_it_was(tmp_path):
    for options in ({}, {"average": 0.5}, {"patience": 50}):
        folder = tmp_path / str(len(options) and next(iter(options)))
        parameters, fit = run(folder, STEPS, **options)
        again, resumed = run(folder, STEPS, resume=True, seed=4, **options)
        assert equal(parameters, again)
        assert resumed.history == fit.history


def test_the_config_of_programs_is_kept_where_json_can_hold_it(tmp_path):
    for number, config in enumerate(({"sizes": (6, 3)}, {"activation": nn.ReLU}, "none")):
        net = toy.belief_net(6, 3)
        net.config = config
        Variational(AmortizedMeanField(net), num_steps=1, checkpoint=tmp_path / str(number)).fit(net, net.sample(5))
        kept = json.loads((tmp_path / str(number) / "last.json").read_text())["config"]
        assert kept == ({"model": {"sizes": [6, 3]}} if number == 0 else {})


def test_a_state_that_could_not_be_loaded_safely_is_refused(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "path": Path("x")}

    with pytest.raises(ValueError, match="plain values, got a PosixPath"):
        run(tmp_path, 4, optim=partial(Odd, lr=0.1), scheduler=None)


def test_a_checkpoint_executes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    torch.save({"format": 1, "account": Bomb()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_the_log_goes_on(tmp_path):
    log = tmp_path / "log.jsonl"

    def steps():
        return [json.loads(line)["step"] for line in log.read_text().splitlines()]

    run(tmp_path / "parts", 8, log=log)
    assert steps() == [0, 4, 8]
    with open(log, "a") as file:
        file.write('{"step": 9}\n{"st')  # after the checkpoint, and torn
    run(tmp_path / "parts", STEPS, log=log, resume=True)
    assert steps() == [0, 4, 8, 12]
    run(tmp_path / "other", 4, log=log)
    assert steps() == [0, 4]
