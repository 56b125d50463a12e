"""What a captured run is bound to, and the signature of its arguments."""

import functools
import warnings
from collections import OrderedDict, namedtuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.nn.modules import module as torch_module

from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import own_params, relax
from pyrovae.inference.capture.arguments import describe_change, flatten, process_flags
from pyrovae.inference.capture.watch import Watch
from pyrovae.models import CategoricalVAE

X = torch.arange(6, dtype=torch.float64).reshape(3, 2)
Pair = namedtuple("Pair", "a b")


class Net(nn.Module):
    """A module with everything that can be bound otherwise."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2)
        self.decoder = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.register_buffer("mean", torch.zeros(2))
        self.shift, self.beta, self.calls = torch.ones(2), 0.5, 0

    def forward(self, x):
        return self.decoder(self.encoder(x - self.mean) + self.shift)


def watched(*programs, run=None):
    with Watch.during(*programs) as watch:
        (run or programs[0])(X)
    return watch


# Arguments


CALLS = {
    "flat": ((X, X[0]), {}),
    "none": ((), {}),
    "numbers": ((X, 0.3, 1, True, None, "a", torch.Size([2]), torch.float32, 2j), {}),
    "keywords": ((X,), {"y": X[0], "beta": 0.5}),
    "nested": (([X, (X[0], 1)], {"a": X[1], 2: [X[2]]}, Pair(X, 3)), {"z": OrderedDict(q=X)}),
    "a parameter": ((nn.Parameter(X),), {}),
}


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS)
def test_arguments_come_back_as_they_were(args, kwargs):
    tensors, rebuild, _ = flatten(args, kwargs)
    assert _same(rebuild(tensors), (args, kwargs))


@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS)
def test_other_tensors_stand_in_their_places(args, kwargs):
    tensors, rebuild, signature = flatten(args, kwargs)
    others = [t.detach() + 1 for t in tensors]
    again, _, other_signature = flatten(*rebuild(others))
    assert all(a is b for a, b in zip(again, others, strict=True))
    assert hash(signature) == hash(flatten(args, kwargs)[2])
    if not any(t.requires_grad for t in tensors):
        assert signature == other_signature


def test_the_order_of_keywords_does_not_matter():
    assert flatten((), {"a": X, "b": 1})[2] == flatten((), {"b": 1, "a": X})[2]


def test_a_nan_is_itself_and_a_signed_zero_is_another():
    assert flatten((float("nan"),), {})[2] == flatten((float("nan"),), {})[2]
    assert flatten((0.0,), {})[2] != flatten((-0.0,), {})[2]


def test_methods_are_the_same_by_their_object():
    net, other = Net(), Net()
    assert flatten((net.forward,), {})[2] == flatten((net.forward,), {})[2]
    assert flatten((net.forward,), {})[2] != flatten((other.forward,), {})[2]


def test_what_is_compared_by_identity_is_kept_alive():
    signatures = {flatten((object(),), {})[2] for _ in range(100)}
    assert len(signatures) == 100


def first(value, other):
    return (value,), (other,)


CHANGES = {
    "float": (first(0.2, 0.3), "the first argument is the float 0.3 and was 0.2"),
    "type": (first(1, 1.0), "the first argument is the float 1.0 and was the int 1"),
    "bool": (first(1, True), "the first argument is the bool True and was the int 1"),
    "none": (first(None, 2), "the first argument is the int 2 and was None"),
    "string": (((X, "a"), (X, "b")), "the second argument is the str 'b' and was 'a'"),
    "shape": (first(torch.ones(100, 784), torch.ones(36, 784)), "the first argument has shape (36, 784) and had (100, 784)"),
    "strides": (first(torch.ones(3, 2), torch.ones(2, 3).T), "the first argument has strides (1, 3) and had (2, 1)"),
    "dtype": (first(X, X.float()), "the first argument has dtype torch.float32 and had torch.float64"),
    "grad": (first(X, X.clone().requires_grad_()), "the first argument requires a gradient and did not"),
    "no grad": (first(X.clone().requires_grad_(), X), "the first argument requires no gradient and did"),
    "tensor": (first(2, X), "the first argument is a tensor of shape (3, 2) and was the int 2"),
    "length": (first([X], [X, X]), "the first argument has length 2 and had 1"),
    "inner": (first({"a": [1, 2]}, {"a": [1, 3]}), "the entry ['a'][1] of the first argument is the int 3 and was 2"),
    "keys": (first({"a": X}, {"b": X}), "the first argument has keys 'b' and had 'a'"),
    "container": (first([X], (X,)), "the first argument is a tuple of length 1 and was a list of length 1"),
    "more": (((X,), (X, X)), "the call has 2 positional arguments and had 1"),
    "size": (first(torch.Size([2]), torch.Size([3])), "the first argument is the Size torch.Size([3]) and was torch.Size([2])"),
}


@pytest.mark.parametrize(("calls", "words"), CHANGES.values(), ids=CHANGES)
def test_a_changed_argument_is_named(calls, words):
    before, after = (flatten(args, {})[2] for args in calls)
    assert before != after
    assert describe_change(before, after) == words


def test_keywords_are_named():
    def change(a, b):
        return describe_change(flatten((X,), a)[2], flatten((X,), b)[2])

    assert change({"beta": 0.2}, {"beta": 0.3}) == "the argument 'beta' is the float 0.3 and was 0.2"
    assert change({}, {"beta": 0.3}) == "the argument 'beta' is new"
    assert change({"beta": 0.3}, {}) == "the argument 'beta' is gone"


def test_flags_of_the_process():
    before = process_flags()
    assert before == process_flags()
    with torch.no_grad():
        assert "gradients, is False and was True" in describe_change((0, before), (0, process_flags()))
    with torch.autocast("cpu"):
        assert "autocast on the cpu, is torch.bfloat16 and was None" in describe_change((0, before), (0, process_flags()))
    with poutine.scale(scale=2.0):
        inside = process_flags()
        assert inside == process_flags()
        assert "handlers around the step, is another" in describe_change((0, before), (0, inside))
    assert hash(before) == hash(process_flags())


# Bindings


def _set(place, key, value):
    return lambda net: setattr(functools.reduce(getattr, place.split(".") if place else [], net), key, value)


BINDINGS = {
    "parameter": (
        _set("encoder", "weight", nn.Parameter(torch.ones(2, 2))),
        "the parameter 'encoder.weight' is another tensor",
    ),
    "no parameter": (_set("encoder", "bias", None), "the parameter 'encoder.bias' is gone"),
    "buffer": (_set("", "mean", torch.ones(2)), "the buffer 'mean' is another tensor"),
    "inner buffer": (_set("decoder.0", "running_mean", torch.ones(2)), "the buffer 'decoder.0.running_mean' is another tensor"),
    "attribute": (_set("", "shift", torch.ones(2)), "the attribute 'shift' is another tensor"),
    "module": (_set("", "encoder", nn.Linear(2, 2)), "the module 'encoder' is another module"),
    "eval": (lambda net: net.decoder.eval(), "the module 'decoder' (Sequential) was training and is in evaluation mode"),
    "eval of all": (lambda net: net.eval(), "the module Net was training and is in evaluation mode"),
    "frozen": (lambda net: net.encoder.requires_grad_(False), "the parameter 'encoder.weight' requires no gradient now"),
    "dtype": (lambda net: net.encoder.float(), "the parameter 'encoder.weight' is torch.float32 and was torch.float64"),
    "float": (_set("decoder.0", "momentum", 0.2), "the attribute 'decoder.0.momentum' is 0.2 and was 0.1"),
    "a float no more": (_set("", "beta", torch.ones(())), "the attribute 'beta' is a tensor now"),
    "deleted": (lambda net: delattr(net, "mean"), "the buffer 'mean' is gone"),
}


@pytest.mark.parametrize(("act", "words"), BINDINGS.values(), ids=BINDINGS)
def test_a_changed_binding_is_named(act, words):
    net = Net()
    watch = watched(net)
    assert watch.change() is None
    act(net)
    assert watch.change() == words


def test_contents_may_change_in_place():
    net = Net()
    watch = watched(net)
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
    net.encoder.weight.data = torch.ones(2, 2)
    net.mean.fill_(3.0)
    net.beta, net.calls = float("0.5"), 3
    net.load_state_dict(Net().state_dict())
    assert watch.change() is None
    assert watch.rebound is None


class Holder:
    """No module itself."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


WAYS = {
    "the module": lambda net: net,
    "a method": lambda net: net.forward,
    "a partial": lambda net: functools.partial(net.forward),
    "a closure": lambda net: lambda x: net(x),
    "a closure of a closure": lambda net: (lambda inner: lambda x: inner(x))(lambda x: net(x)),
    "its own parameters": lambda net: own_params(net),
    "relaxed": lambda net: relax(net, 0.5),
    "relaxed method": lambda net: own_params(relax(net.forward, 0.5)),
    "scaled": lambda net: poutine.scale(net, scale=2.0),
    "scaled method": lambda net: poutine.scale(scale=2.0)(net.forward),
    "an object": lambda net: Holder(net),
    "its method": lambda net: Holder(net).__call__,
    "decorated": lambda net: functools.wraps(net.forward)(lambda *args: net.forward(*args)),
}


@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS)
def test_modules_are_found_under_programs(wrap):
    net = Net()
    with Watch.during(wrap(net)) as watch:
        pass  # nothing runs: no forward gives it away
    assert watch.change() is None
    net.encoder.weight = nn.Parameter(torch.ones(2, 2))
    assert watch.change().endswith("encoder.weight' is another tensor")
    assert watch.devices == {torch.device("cpu")}


HIDDEN = {"net": Net().double()}


def test_a_module_that_only_runs_is_named_as_pyro_module_names_it():
    def program(x):
        pyro.module("vae", HIDDEN["net"])
        return HIDDEN["net"](x)

    watch = watched(program)
    assert watch.change() is None
    HIDDEN["net"].decoder.eval()
    assert watch.change() == "the module 'vae.decoder' (Sequential) was training and is in evaluation mode"
    HIDDEN["net"].decoder.train()
    HIDDEN["net"].mean = torch.ones(2)
    assert watch.change() == "the buffer 'vae.mean' is another tensor"


def test_a_part_that_only_runs_is_named_as_pyro_module_names_it():
    def program(x):
        pyro.module("vae", HIDDEN["net"])
        return HIDDEN["net"].decoder(x)

    watch = watched(program)
    HIDDEN["net"].decoder[0].running_mean = torch.ones(2)
    assert watch.change() == "the buffer 'vae.decoder.0.running_mean' is another tensor"


def test_a_module_that_only_runs_is_named_by_its_class_otherwise():
    watch = watched(lambda x: HIDDEN["net"](x))
    HIDDEN["net"].encoder.eval()
    assert watch.change() == "the module 'Net.encoder' (Linear) was training and is in evaluation mode"
    HIDDEN["net"].encoder.train()


def test_entries_of_the_store():
    def program(x):
        scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
        return pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), scale))

    pyro.param("other", torch.ones(()))
    watch = watched(program)
    store = pyro.get_param_store()
    store["other"] = torch.zeros(())
    store._params["scale"].data.fill_(3.0)
    assert watch.change() is None
    store["scale"] = torch.ones(())
    assert watch.change() == "the parameter 'scale' of Pyro's store is another tensor"
    watch = watched(program)
    del store["loc"]
    assert watch.change() == "the parameter 'loc' of Pyro's store is gone"
    watch = watched(program)
    pyro.clear_param_store()
    assert watch.change() == "Pyro's param store was cleared"


class Block(PyroModule):
    """A PyroModule with a parameter under a constraint."""

    def __init__(self):
        super().__init__("block")
        self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)

    def forward(self, x):
        return x * self.scale


def test_parameters_under_a_constraint():
    block = Block()
    watch = watched(block)
    assert watch.change() is None
    block.scale = PyroParam(torch.ones(2), constraint=constraints.positive)
    assert watch.change() == "the parameter 'scale_unconstrained' is another tensor"


def test_what_an_automatic_guide_makes_when_it_first_runs():
    def model(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoNormal(model)
    watch = watched(guide, model)
    assert watch.change() is None
    guide.locs.z.requires_grad_(False)
    assert watch.change() == "the parameter 'locs.z_unconstrained' requires no gradient now"


def test_a_library_program_stays_what_it_is_over_steps():
    model = CategoricalVAE(2, latents=2, categories=3, hidden=4)
    guide = AmortizedMeanField(model)
    programs = own_params(relax(model, 0.5)), own_params(relax(guide, 0.5))
    elbo = pyro.infer.Trace_ELBO()
    bits = (X > 2).double()
    with Watch.during(*programs) as watch:
        elbo.loss_and_grads(*programs, bits)
    elbo.loss_and_grads(*programs, bits)
    assert watch.change() is None
    assert watch.rebound is None
    assert watch.evaluating == ()


class Average(nn.Module):
    """Keeps a running average, by assignment or in place."""

    def __init__(self, *, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        new = 0.9 * self.mean + 0.1 * x.mean(0)
        if self.in_place:
            self.mean.copy_(new)
        else:
            self.mean = new
        return x - self.mean


def test_a_buffer_that_the_run_assigns_anew_is_named():
    assert watched(Average(in_place=True)).rebound is None
    program = nn.Sequential(Average(in_place=False))
    mean = program[0].mean
    watch = watched(program)
    assert watch.rebound == "the buffer '0.mean' is another tensor"
    watch.restore()
    assert program[0].mean is mean


class Keeper(nn.Module):
    """Keeps a plain tensor from run to run."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.state = torch.zeros(3, 2)

    def forward(self, x):
        self.hidden = self.net(x) + self.state
        self.state = self.hidden.detach()
        return self.hidden


def test_a_plain_tensor_that_the_run_assigns_anew_is_named():
    keeper = Keeper()
    assert watched(keeper).rebound == "the attribute 'state' is another tensor"
    watch = watched(keeper)
    keeper(X)
    assert watch.change() is None  # told by `rebound`, once


def test_an_activation_that_is_kept_is_no_state():
    class Stash(Keeper):
        def forward(self, x):
            self.hidden = self.net(x)
            return self.hidden

    stash = Stash()
    stash(X)
    watch = watched(stash)
    assert watch.rebound is None
    stash(X)
    assert watch.change() is None


def test_a_float_that_the_run_itself_changes_is_left_out():
    class Timer(nn.Module):
        def __init__(self):
            super().__init__()
            self.seconds = 0.0

        def forward(self, x):
            self.seconds += 1.5
            return x

    timer = Timer()
    watch = watched(timer)
    timer(X)
    assert watch.change() is None
    assert watch.rebound is None


def test_scripted_modules_are_passed_over():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(nn.Linear(2, 2).double())
    assert watched(nn.Sequential(scripted)).change() is None


def test_modules_that_ran_in_evaluation_mode():
    net = Net()
    assert watched(net).evaluating == ()
    net.decoder.eval()
    assert watched(net).evaluating == ("'decoder' (Sequential)",)
    net.eval()
    assert watched(net).evaluating == ("Net",)
    assert watched(net, run=net.encoder).evaluating == ("'encoder' (Linear)",)


def test_hooks_and_handlers_are_gone_after_an_error():
    hooks = dict(torch_module._global_forward_pre_hooks)
    stack = list(pyro.poutine.runtime._PYRO_STACK)
    with pytest.raises(ZeroDivisionError), Watch.during(Net()):
        raise ZeroDivisionError
    assert dict(torch_module._global_forward_pre_hooks) == hooks
    assert list(pyro.poutine.runtime._PYRO_STACK) == stack
