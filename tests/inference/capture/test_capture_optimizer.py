"""One optimizer for all parameters against Pyro's, which step parameter by parameter."""

import copy
import importlib
import warnings
from functools import partial

import pyro
import pyro.optim
import pytest
import torch
from pyro.optim.multi import Newton
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.inference.capture.clipped_adam import ClippedAdam
from pyrovae.inference.capture.optimizer import OneOptimizer
from pyrovae.inference.capture.together import FUSED, Together

SHAPES = {"net$$$layer.weight": (3, 4), "net$$$layer.bias": (4, 1), "scale": (2, 2)}
STEPS = 6
OPTIMIZERS = [
    name
    for name in pyro.optim.__all__
    if name in ("AdagradRMSProp", "ClippedAdam", "DCTAdam")
    or (isinstance(getattr(torch.optim, name, None), type) and name not in ("Optimizer", "SparseAdam"))
]
OPTIONS = {"AdagradRMSProp": {"eta": 0.1}, "ClippedAdam": {"lr": 0.05, "lrd": 0.9}, "DCTAdam": {"lr": 0.05, "lrd": 0.9}}
SCHEDULES = {
    "LambdaLR": {"lr_lambda": lambda step: 0.5**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.5},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {"total_iters": 3},
    "ExponentialLR": {"gamma": 0.7},
    "PolynomialLR": {"total_iters": 2 * STEPS},
    "CosineAnnealingLR": {"T_max": 2 * STEPS},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3},  # cycles the momentum too
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 2 * STEPS},  # likewise
    "ReduceLROnPlateau": {"patience": 0, "factor": 0.3},
}


def parameters():
    """Parameters in an empty store."""
    pyro.clear_param_store()
    generator = torch.Generator().manual_seed(1)
    for name, shape in SHAPES.items():
        pyro.param(name, torch.randn(shape, generator=generator))
    return dict(pyro.get_param_store().named_parameters())


def gradients(steps=STEPS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES.values()] for _ in range(steps)]


class Stock:
    """What SVI does with gradients, by the same interface."""

    def __init__(self, optim, leaves):
        self.optim, self.leaves = optim, list(leaves.values())

    def step(self, gradients):
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = None if gradient is None else gradient.clone()
        self.optim(self.leaves)
        for leaf in self.leaves:
            leaf.grad = None


def run(method, optim, given, after=lambda optim, step: None, leaves=None):
    """Parameters after each step, stacked."""
    leaves = parameters() if leaves is None else leaves
    stepper, path = method(optim, leaves), []
    for k, one in enumerate(given):
        stepper.step([None if gradient is None else gradient.clone() for gradient in one])
        after(optim, k)
        path.append(torch.cat([leaf.detach().flatten() for leaf in leaves.values()]))
    return torch.stack(path)


def check(make, given=None, after=lambda optim, step: None, *, rounding=False):
    """Both ways give one path, which moves at every step."""
    given = gradients() if given is None else given
    stock, one = run(Stock, make(), given, after), run(OneOptimizer, make(), given, after)
    assert (stock.diff(dim=0).abs().amax(1) > 0).all()
    torch.testing.assert_close(one, stock, rtol=1e-12 if rounding else 0, atol=1e-12 if rounding else 0)


def is_fused(name):
    return name in {kind.__name__ for kind in FUSED}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_pyro(name):
    check(lambda: getattr(pyro.optim, name)(dict(OPTIONS.get(name, {"lr": 0.05}))), rounding=is_fused(name))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_what_was_said_of_forms_is_kept(name):
    check(lambda: getattr(pyro.optim, name)({"lr": 0.05, "foreach": False}))
    for said, form in (({"foreach": False}, None), ({"fused": False}, False), ({}, True)):
        optim = getattr(pyro.optim, name)({"lr": 0.05, **said})
        one = OneOptimizer(optim, parameters())
        one.step(gradients(1)[0])
        assert one._together[0].optimizer.param_groups[0]["fused"] is form
        assert all(made.param_groups[0]["fused"] is said.get("fused") for made in optim.optim_objs.values())


def test_counts_of_steps_are_where_the_fused_form_has_them():
    optim, leaves = pyro.optim.Adam({"lr": 0.1}), parameters()
    Stock(optim, leaves).step(gradients(1)[0])
    states = [next(iter(made.state.values())) for made in optim.optim_objs.values()]
    assert {state["step"].dtype for state in states} == {torch.float64}
    OneOptimizer(optim, leaves).step(gradients(1)[0])
    assert {state["step"].dtype for state in states} == {torch.float32}
    assert [state["step"].item() for state in states] == [2] * 3


@pytest.mark.parametrize("options", [{"dampening": 0.5}, {"nesterov": True}, {"weight_decay": 0.1}, {"maximize": True}])
def test_momentum(options):
    given = gradients()
    given[0][1] = None  # whose momentum starts later
    check(lambda: pyro.optim.SGD({"lr": 0.05, "momentum": 0.9, **options}), given, rounding=True)


def test_learning_rates_that_are_tensors():
    def make():
        return pyro.optim.RMSprop(lambda name: {"lr": torch.tensor(0.1)})

    def after(optim, step):
        next(iter(optim.optim_objs.values())).param_groups[0]["lr"].mul_(0.5)

    check(make, after=after)
    assert not torch.equal(run(OneOptimizer, make(), gradients(), after), run(OneOptimizer, make(), gradients()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_gradients_stay(name):
    given = gradients()
    for k in (0, 1, 4):
        given[k][0] = None
    given[2][2] = None
    options = {"lr": 0.05, "momentum": 0.9} if name == "SGD" else dict(OPTIONS.get(name, {"lr": 0.05}))
    check(lambda: getattr(pyro.optim, name)(dict(options)), given, rounding=is_fused(name))


def test_the_rate_that_a_step_lowers_is_the_owners():
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.5})
    run(OneOptimizer, optim, gradients(3))
    assert [made.param_groups[0]["lr"] for made in optim.optim_objs.values()] == pytest.approx([0.1 / 8] * 3)


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.1}, {"weight_decay": 0.5}, {"centered_variance": True}, {"betas": (0.5, 0.6)}]
)
def test_clipped_adam_for_many(options):
    given = gradients()
    given[3][1][0] = torch.nan  # which clipping leaves
    check(lambda: pyro.optim.ClippedAdam({"lr": 0.05, **options}), given[:3] + given[4:])
    nan, stock = (run(method, pyro.optim.ClippedAdam({"lr": 0.05, **options}), given) for method in (OneOptimizer, Stock))
    assert nan[3].isnan().any()
    torch.testing.assert_close(nan, stock, rtol=0, atol=0, equal_nan=True)
    one = OneOptimizer(pyro.optim.ClippedAdam({"lr": 0.05, **options}), parameters())
    one.prepare()
    assert type(one._together[0].optimizer) is ClippedAdam
    plain = run(OneOptimizer, pyro.optim.ClippedAdam({"lr": 0.05}), given[:3])
    assert not torch.equal(plain, stock[:3])


def test_sparse_gradients():
    given = [[gradient.to_sparse(1) for gradient in one] for one in gradients()]
    check(lambda: pyro.optim.SparseAdam({"lr": 0.05}), given)
    with pytest.raises(RuntimeError, match="dense"):
        run(OneOptimizer, pyro.optim.SparseAdam({"lr": 0.05}), gradients(1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", [{"foreach": False}, {}], ids=["plain", "fused"])
def test_schedulers(name, form):
    rates = []

    def after(optim, step):
        optim.step(*([float(step)] if name == "ReduceLROnPlateau" else []))
        rates.append(next(iter(optim.optim_objs.values())).optimizer.param_groups[0]["lr"])

    def make():
        options = {"lr": 0.1, "momentum": 0.9, **form}
        return getattr(pyro.optim, name)({"optimizer": torch.optim.SGD, "optim_args": options, **SCHEDULES[name]})

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a scheduler went before its optimizer
        check(make, after=after, rounding=not form)
    assert len(set(rates)) > 1


def test_every_scheduler_of_pyro_is_tested():
    impossible = {"LRScheduler", "SequentialLR", "ChainedScheduler", "_LRScheduler"}  # which Pyro cannot make
    kinds = {name: getattr(torch.optim.lr_scheduler, name, None) for name in pyro.optim.__all__}
    here = {
        name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, (LRScheduler, ReduceLROnPlateau))
    }
    assert here - impossible == set(SCHEDULES)


def test_schedulers_that_move_moments_of_adam():
    def make():
        options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "max_lr": 0.2, "total_steps": 2 * STEPS}
        return pyro.optim.OneCycleLR(options)

    check(make, after=lambda optim, step: optim.step(), rounding=True)


@pytest.mark.parametrize(
    "clip_args",
    [
        {"clip_norm": 0.5},
        {"clip_value": 0.1},
        {"clip_norm": 0.5, "clip_value": 0.1},
        lambda module, name: {"clip_norm": 0.5} if name == "scale" else {},
        lambda module, name: {"clip_value": 0.1 if module == "net" else 0.2},
    ],
)
def test_clipping(clip_args):
    given = gradients()
    for one in given[::2]:
        one[2] *= 1e-3  # too small to be clipped
    check(lambda: pyro.optim.SGD({"lr": 0.1, "foreach": False}, clip_args), given)
    free = run(OneOptimizer, pyro.optim.SGD({"lr": 0.1, "foreach": False}), given)
    assert not torch.equal(free, run(OneOptimizer, pyro.optim.SGD({"lr": 0.1, "foreach": False}, clip_args), given))


class Syncs(TorchDispatchMode):
    """Counts what would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_clipping_waits_for_nothing():
    optim = pyro.optim.SGD({"lr": 0.1}, {"clip_norm": 0.5, "clip_value": 0.1})
    one = OneOptimizer(optim, parameters())
    one.prepare()
    given = gradients(1)[0]
    with Syncs() as syncs:
        one.step(given)
    assert syncs.count == 0
    with Syncs() as syncs:
        float(given[0].norm())
    assert syncs.count == 1


@pytest.mark.parametrize(
    "options",
    [
        lambda name: {"lr": 0.3 if name == "net.layer.bias" else 0.05},
        lambda module, name: {"lr": 0.3 if (module, name) == ("net", "layer.bias") else 0.05},
    ],
)
def test_options_by_name(options):
    check(lambda: pyro.optim.RMSprop(options))
    one = OneOptimizer(pyro.optim.RMSprop(options), parameters())
    one.prepare()
    assert [len(group.members) for group in one._together[0].groups] == [2, 1]


def test_names_of_parameters_that_are_not_in_the_store():
    leaves = {name: torch.zeros(2, requires_grad=True) for name in ("fast", "slow")}
    one = OneOptimizer(pyro.optim.SGD(lambda name: {"lr": 2.0 if name == "fast" else 1.0}), leaves)
    one.step([torch.ones(2), torch.ones(2)])
    assert [leaf.tolist() for leaf in leaves.values()] == [[-2.0, -2.0], [-1.0, -1.0]]
    assert pyro.get_param_store().param_name(leaves["fast"]) is None


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "SGD", "Adagrad", "AdagradRMSProp", "ClippedAdam"])
@pytest.mark.parametrize("before", [Stock, OneOptimizer])
@pytest.mark.parametrize("then", [Stock, OneOptimizer])
def test_saved_and_loaded(name, before, then, tmp_path):
    def make():
        extra = {"momentum": 0.9} if name == "SGD" else {}
        return getattr(pyro.optim, name)({**OPTIONS.get(name, {"lr": 0.05}), **extra})

    given = gradients()
    whole = run(Stock, make(), given)
    first, leaves = make(), parameters()
    run(before, first, given[:3], leaves=leaves)
    first.save(tmp_path / "optim.pt")
    second = make()
    second.load(tmp_path / "optim.pt")
    rest = run(then, second, given[3:], leaves=leaves)
    torch.testing.assert_close(rest, whole[3:], rtol=1e-12, atol=1e-12)
    without = run(then, make(), given[3:], leaves=leaves)
    assert name == "AdagradRMSProp" or not torch.allclose(without, whole[3:])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stock_svi_goes_on_and_comes_back(name):
    def make():
        extra = {"momentum": 0.9} if name == "SGD" else {}
        return getattr(pyro.optim, name)({**OPTIONS.get(name, {"lr": 0.05}), **extra})

    given, leaves, optim = gradients(), parameters(), make()
    one, stock = OneOptimizer(optim, leaves), Stock(optim, leaves)
    path = []
    for k, gradient in enumerate(given):
        (stock if k in (0, 3, 4) else one).step([x.clone() for x in gradient])
        path.append(torch.cat([leaf.detach().flatten() for leaf in leaves.values()]))
    tolerance = 1e-12 if is_fused(name) else 0
    torch.testing.assert_close(torch.stack(path), run(Stock, make(), given), rtol=tolerance, atol=tolerance)


def test_state_set_while_running_waits_as_in_pyro():
    def after(optim, step):
        if step == 1:
            kept.append(copy.deepcopy(optim.get_state()))
        if step == 2:  # Pyro keeps it for parameters that it has not met
            optim.set_state(copy.deepcopy(kept[-1]))
        if step == 3:
            optim.optim_objs.clear()

    kept = []
    check(lambda: pyro.optim.RMSprop({"lr": 0.05, "momentum": 0.9}), after=after)
    plain = run(OneOptimizer, pyro.optim.RMSprop({"lr": 0.05, "momentum": 0.9}), gradients())
    waited = run(OneOptimizer, pyro.optim.RMSprop({"lr": 0.05, "momentum": 0.9}), gradients(), after)
    assert torch.equal(plain[:4], waited[:4])
    assert not torch.equal(plain[4], waited[4])


def test_state_loaded_into_an_owner_while_running():
    def after(optim, step):
        made = next(iter(optim.optim_objs.values()))
        if step == 0:
            kept.append(copy.deepcopy(made.state_dict()))
        if step == 3:
            made.load_state_dict(kept[-1])

    kept = []
    check(lambda: pyro.optim.Adam({"lr": 0.05}), after=after, rounding=True)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop"])
def test_a_torch_factory(name):
    kind = getattr(torch.optim, name)
    given, leaves = gradients(), parameters()
    path = run(OneOptimizer, partial(kind, lr=0.05), given, leaves=leaves)
    stock = run(Stock, getattr(pyro.optim, name)({"lr": 0.05}), given)
    torch.testing.assert_close(path, stock, rtol=1e-12, atol=1e-12)


def test_a_torch_factory_with_groups_a_scheduler_and_saved_state():
    def factory(leaves):
        return torch.optim.RMSprop([{"params": leaves[:1], "lr": 0.2}, {"params": leaves[1:]}], lr=0.05)

    given, ours, theirs = gradients(), parameters(), parameters()
    one, other = OneOptimizer(factory, ours), factory(list(theirs.values()))
    schedules = [StepLR(optimizer, 2) for optimizer in (one.optimizer, other)]
    for k, gradient in enumerate(given):
        one.step(gradient)
        for leaf, x in zip(theirs.values(), gradient, strict=True):
            leaf.grad = x
        other.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for schedule in schedules:
                schedule.step()
        if k == 2:
            state = copy.deepcopy(one.optimizer.state_dict())
            one = OneOptimizer(factory, ours)
            schedules[0] = StepLR(one.optimizer, 2, last_epoch=-1)
            one.optimizer.load_state_dict(state)
            schedules[0].load_state_dict(schedules[1].state_dict())
    for name, leaf in ours.items():
        assert torch.equal(leaf, theirs[name]), name


class Shrinking(torch.optim.SGD):
    """A class of a user's, with memory outside of `state`."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.total = 0.0

    def step(self, closure=None):
        for group in self.param_groups:
            for leaf in group["params"]:
                self.total += leaf.grad.abs().sum()
                leaf.data.sub_(leaf.grad, alpha=group["lr"] / float(self.total))


def test_classes_of_users_are_stepped_one_by_one():
    check(lambda: pyro.optim.PyroOptim(Shrinking, {"lr": 0.1}))
    path = run(OneOptimizer, partial(Shrinking, lr=0.1), gradients())
    assert not torch.equal(path, run(Stock, pyro.optim.PyroOptim(Shrinking, {"lr": 0.1}), gradients()))  # one for all, as asked


@pytest.mark.parametrize("kind", [torch.optim.Adam, pyro.optim.clipped_adam.ClippedAdam, Shrinking])
def test_hooks_of_an_optimizer_are_called(kind):
    one, called = OneOptimizer(partial(kind, lr=0.1), parameters()), []
    one.optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    one.optimizer.register_step_post_hook(lambda *_: called.append("after"))
    for gradient in gradients(2):
        one.step(gradient)
    assert called == ["before", "after"] * 2


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_gradients_of_other_strides(kind):
    """The fused forms take both for the same order in memory, and say nothing."""
    start, gradient = torch.randn(3, 4), torch.randn(4, 3).t()
    paths = []
    for form in ({}, {"foreach": False}):
        leaf = start.clone().requires_grad_()
        one = OneOptimizer(partial(kind, lr=0.1, **form), {"x": leaf})
        one.step([gradient])
        paths.append(leaf.detach())
    torch.testing.assert_close(*paths, rtol=1e-12, atol=1e-12)
    wrong = start.clone().requires_grad_()
    wrong.grad = gradient
    kind([wrong], lr=0.1, fused=True).step()
    assert not torch.allclose(wrong, paths[0])


def test_parameters_with_gaps_and_of_other_dtypes():
    def leaves():
        return {
            "gaps": torch.ones(3, 4)[:, ::2].requires_grad_(),
            "single": torch.ones(3, dtype=torch.float32, requires_grad=True),
        }

    paths = []
    for form in ({}, {"foreach": False}):
        these = leaves()
        one = OneOptimizer(partial(torch.optim.Adam, lr=0.1, **form), these)
        one.step([torch.arange(6.0).reshape(3, 2), torch.arange(3.0, dtype=torch.float32)])
        paths.append([leaf.detach().double() for leaf in these.values()])
    torch.testing.assert_close(*paths, rtol=1e-6, atol=1e-7)


def test_the_flag_by_which_fused_steps_are_skipped():
    leaves, flag = parameters(), torch.zeros((), dtype=torch.float32)
    one, before = (
        OneOptimizer(partial(torch.optim.Adam, lr=0.1, fused=True), leaves),
        [leaf.clone() for leaf in leaves.values()],
    )
    one.optimizer.found_inf, one.optimizer.grad_scale = flag, None
    flag.fill_(1.0)
    one.step(gradients(1)[0])
    assert all(torch.equal(leaf, start) for leaf, start in zip(leaves.values(), before, strict=True))
    flag.fill_(0.0)
    one.step(gradients(1)[0])
    assert not any(torch.equal(leaf, start) for leaf, start in zip(leaves.values(), before, strict=True))


def test_gradients_are_gone_afterwards():
    leaves = parameters()
    one = OneOptimizer(pyro.optim.Adam({"lr": 0.1}), leaves)
    one.step(gradients(1)[0])
    assert all(leaf.grad is None for leaf in leaves.values())
    with pytest.raises(ValueError, match="zip"):
        one.step(gradients(1)[0][:2])


def test_ready_for_a_recorded_graph():
    optim = pyro.optim.Adam({"lr": 0.1})
    one, given = OneOptimizer(optim, parameters()), gradients(1)[0]
    assert not one.prepare()
    one.step(given)
    before = one.version
    assert one.prepare()
    for made in optim.optim_objs.values():
        made.param_groups[0]["lr"] = 0.2
    assert one.prepare()
    assert one.version == before
    next(iter(optim.optim_objs.values())).param_groups[0]["betas"] = (0.5, 0.9)
    assert not one.prepare()
    assert not one.prepare()
    assert one.version == before + 1
    one.step(given)
    assert one.prepare()
    assert one.version == before + 1


def test_rates_that_a_recorded_graph_reads():
    owners = [torch.optim.Adam([torch.ones(2, requires_grad=True)], lr=0.1) for _ in range(2)]
    together = Together(owners, in_graph=True)
    group = together.optimizer.param_groups[0]
    rate = group["lr"]
    assert group["capturable"]
    assert rate.item() == pytest.approx(0.1)
    for owner in owners:
        owner.param_groups[0]["lr"] = 0.02
    assert together.follow()
    assert group["lr"] is rate
    assert rate.item() == pytest.approx(0.02)
    for owner in owners:
        owner.param_groups[0]["betas"] = (0.5, 0.9)
    assert together.follow() is False
    owners[0].param_groups[0]["lr"] = 0.5
    assert together.follow() is None
    assert not owners[0].param_groups[0]["capturable"]


def test_not_capturable_on_the_cpu():
    one = OneOptimizer(pyro.optim.Adam({"lr": 0.1}), parameters())
    assert not one.capturable
    with pytest.raises(ValueError, match="on one GPU"):
        one.make_capturable()


CAPTURABLE = ["Adam", "AdamW", "RMSprop", "Rprop", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "SGD"]


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """Torch's forms for CUDA graphs, on the CPU."""
    for name in CAPTURABLE:
        module = importlib.import_module(f"torch.optim.{name.lower()}")
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"], raising=False)
    monkeypatch.setattr(OneOptimizer, "capturable", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", CAPTURABLE)
def test_steps_for_a_recorded_graph(name):
    """No number is read from a tensor, and rates change by tensors alone."""
    given, leaves, syncs = gradients(), parameters(), Syncs()
    optim = getattr(pyro.optim, name)({"lr": 0.05} if name == "SGD" else {"lr": 0.05, "foreach": True})
    one, path = OneOptimizer(optim, leaves), []
    one.step(given[0])
    one.make_capturable()
    for k, gradient in enumerate(given):
        if k:
            with syncs:
                one.step(gradient)
        for made in optim.optim_objs.values():
            made.param_groups[0]["lr"] *= 0.5
        path.append(torch.cat([leaf.detach().flatten() for leaf in leaves.values()]))
        one.prepare()
        rates = [group["lr"] for together in one._together for group in together.optimizer.param_groups]
        assert [rate.item() for rate in rates] == pytest.approx([0.05 / 2 ** (k + 1)])
    assert syncs.count == 0

    def after(optim, step):
        for made in optim.optim_objs.values():
            made.param_groups[0]["lr"] *= 0.5

    stock = run(Stock, getattr(pyro.optim, name)({"lr": 0.05, "foreach": False}), given, after)
    torch.testing.assert_close(torch.stack(path), stock, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_state_is_not_made_inside_of_a_recording(monkeypatch):
    one = OneOptimizer(pyro.optim.Adam({"lr": 0.1}), parameters())
    one.make_capturable()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="take a step outside first"):
        one.step(gradients(1)[0])


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_nothing_is_taken_over_inside_of_a_recording(monkeypatch):
    one = OneOptimizer(partial(torch.optim.Adam, lr=0.1), parameters())
    one.make_capturable()
    one.step(gradients(1)[0])
    version, rate = one.version, one._together[0].optimizer.param_groups[0]["lr"]
    one.optimizer.param_groups[0]["lr"] = 0.2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    one.step(gradients(1)[0])
    assert rate.item() == pytest.approx(0.1)
    one.make_capturable()
    assert one.prepare()
    assert one.version == version
    assert rate.item() == pytest.approx(0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["Adam", "RMSprop", "SGD"])
def test_a_recorded_graph_steps_as_the_owner(name):
    start, given = torch.randn(3, device="cuda"), torch.randn(8, 3, device="cuda")
    theirs, ours = start.clone().requires_grad_(), start.clone().requires_grad_()
    other, one = (
        getattr(torch.optim, name)([theirs], lr=0.1),
        OneOptimizer(partial(getattr(torch.optim, name), lr=0.1), {"x": ours}),
    )
    one.make_capturable()
    version = one.version
    one.make_capturable()
    assert one.version == version
    gradient, graph = torch.zeros_like(start), None
    for k, value in enumerate(given):
        gradient.copy_(value)
        if not one.prepare():
            one.step([gradient])
        elif graph is None:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                one.step([gradient])
            graph.replay()
        else:
            graph.replay()
        theirs.grad = value
        other.step()
        torch.testing.assert_close(ours.detach(), theirs.detach())
        for optimizer in (other, one.optimizer):
            optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)


class Proud(pyro.optim.PyroOptim):
    def __call__(self, params, *args, **kwargs):
        super().__call__(params, *args, **kwargs)


@pytest.mark.parametrize(
    ("optim", "match"),
    [
        (partial(torch.optim.LBFGS, lr=1), "LBFGS, which evaluates the loss by a closure"),
        (lambda leaves: torch.optim.LBFGS(leaves), "LBFGS"),
        (pyro.optim.PyroOptim(torch.optim.LBFGS, {"lr": 1}), "LBFGS"),
        (torch.optim.Adam([torch.ones(1, requires_grad=True)]), "made already; pass partial"),
        (Newton({"x": 0.1}), "differentiates the loss"),
        (pyro.optim.HorovodOptimizer(pyro.optim.Adam({"lr": 0.1})), "HorovodOptimizer with its own __call__"),
        (Proud(torch.optim.Adam, {"lr": 0.1}), "Proud with its own __call__"),
        (0.1, "got float"),
        (pyro.optim.Adam, "Adam without its options"),
        (lambda leaves: None, "returned NoneType"),
    ],
)
def test_refusals(optim, match):
    with pytest.raises(ValueError, match=match):
        OneOptimizer(optim, {"x": torch.ones(1, requires_grad=True)})


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"amsgrad": True}, {"betas": (0.5, 0.9)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_direct_step_has_the_bits_of_torchs_fused_one(kind, options, dtype):
    ours, theirs = ([torch.linspace(-1, 1, n, dtype=dtype).requires_grad_() for n in (5, 40_000)] for _ in range(2))
    one = OneOptimizer(partial(kind, lr=0.1, **options), dict(zip("ab", ours, strict=True)))
    stock = kind(theirs, lr=0.1, fused=True, **options)
    for step in range(STEPS):
        found = [torch.randn_like(ours[0]), None if step == 3 else torch.randn_like(ours[1])]
        one.step(found)
        for leaf, gradient in zip(theirs, found, strict=True):
            leaf.grad = gradient
        stock.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        mine, state = one.optimizer.state[a], stock.state[b]
        assert mine.keys() == state.keys()
        assert all(torch.equal(mine[name], state[name]) for name in state)


def test_the_direct_step_is_taken_once_there_is_state(monkeypatch):
    leaf = torch.ones(3, requires_grad=True)
    one = OneOptimizer(partial(torch.optim.Adam, lr=0.1), {"a": leaf})
    one.step([torch.ones(3)])
    monkeypatch.setattr(torch.optim.Adam, "step", None)
    one.step([torch.ones(3)])
    torch.testing.assert_close(leaf.detach(), torch.full((3,), 0.8))
