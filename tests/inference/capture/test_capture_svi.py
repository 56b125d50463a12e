"""CapturedSVI takes the steps that stock SVI takes, notices what it cannot have captured, and says so."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyrovae.inference import CapturedSVI
from pyrovae.inference.capture import replay as module
from pyrovae.inference.capture.graph import CannotCapture
from pyrovae.inference.capture.replay import FIRST_CHECKS, JITTER, MAX_GRAPHS

CHECK_EVERY, FIRST_CHECK = module.CHECK_EVERY["cpu"], FIRST_CHECKS[-1]
PLAIN = {"lr": 1e-2, "foreach": False}  # torch's plain form, whose bits stock SVI has


@pytest.fixture(autouse=True)
def _fresh_store() -> None:
    pyro.clear_param_store()


class Autoencoder:
    """A plain Pyro program as people write them: functions, pyro.module, pyro.param with a constraint."""

    def __init__(self, *, hard: bool = False) -> None:
        torch.manual_seed(0)
        self.decoder, self.encoder = nn.Linear(2, 6), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))
        self.hard, self.spread = hard, 1.0

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Bernoulli(0.5 * torch.ones(2)) if self.hard else dist.Normal(torch.zeros(2), self.spread)
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        widen = pyro.param("widen", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x).split(2, -1)
            q = dist.Bernoulli(logits=loc * widen) if self.hard else dist.Normal(loc, scale.exp() * widen)
            pyro.sample("z", q.to_event(1))


def bits(rows: int = 10) -> Tensor:
    return torch.bernoulli(torch.full((rows, 6), 0.4))


def losses(svi: Any, batches: list[Tensor], seed: int = 1) -> list[Any]:
    torch.manual_seed(seed)
    return [svi.step(batch) for batch in batches]


def trajectory(
    make: Callable[[Autoencoder], Any], batches: list[Tensor], *, hard: bool = False
) -> tuple[list[Any], list[Tensor]]:
    pyro.clear_param_store()
    program = Autoencoder(hard=hard)
    found = losses(make(program), batches)
    modules = (*program.decoder.parameters(), *program.encoder.parameters())
    return found, [*(p.detach().clone() for p in modules), pyro.param("widen").detach().clone()]


@pytest.mark.parametrize("backend", ["auto", "off"])  # a run this short is not compiled: "auto" is "fx"
@pytest.mark.parametrize(
    ("elbo", "hard"),
    [
        (Trace_ELBO, False),
        (partial(Trace_ELBO, num_particles=2), False),
        (partial(Trace_ELBO, num_particles=4, vectorize_particles=True), True),
        (TraceGraph_ELBO, True),
        (TraceMeanField_ELBO, False),
        (partial(RenyiELBO, alpha=0.0, num_particles=3, vectorize_particles=True), False),
        (partial(ReweightedWakeSleep, num_particles=3, vectorize_particles=True), False),
    ],
)
def test_steps_have_the_bits_of_stock_svi(elbo: Any, hard: bool, backend: Any) -> None:
    optim = pyro.optim.Adam(PLAIN)
    batches = [bits() for _ in range(FIRST_CHECK + 3)] + [bits(7)] * 3 + [bits()]
    stock, parameters = trajectory(lambda p: SVI(p.model, p.guide, optim, elbo()), batches, hard=hard)
    optim = pyro.optim.Adam(PLAIN)
    ours, mine = trajectory(lambda p: CapturedSVI(p.model, p.guide, optim, elbo(), backend=backend), batches, hard=hard)
    assert all(torch.equal(a, b) for a, b in zip(mine, parameters, strict=True))
    assert type(ours[0]) is type(stock[0])
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock), rtol=1e-6, atol=0)  # stock sums some losses in float32


@pytest.mark.parametrize("where", ["model", "guide"])
def test_enumeration_has_the_bits_of_stock_svi(where: str) -> None:
    def model(x: Tensor) -> None:
        means = pyro.param("means", torch.tensor([-1.0, 0.5, 2.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=torch.zeros(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        if where == "guide":
            logits = pyro.param("logits", torch.zeros(len(x), 3))
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    x, found = torch.randn(6), []
    for kind in (SVI, partial(CapturedSVI, backend="fx")):
        pyro.clear_param_store()
        svi = kind(model, guide, pyro.optim.Adam(PLAIN), TraceEnum_ELBO(max_plate_nesting=1))
        found.append((losses(svi, [x] * (FIRST_CHECK + 3)), pyro.param("means").detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert torch.equal(found[0][1], found[1][1])


def test_another_seed_makes_another_trajectory() -> None:
    program = Autoencoder()
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    batches = [bits()] * 5
    assert losses(svi, batches) == losses(svi, batches)
    assert losses(svi, batches) != losses(svi, batches, seed=2)
    assert len(set(losses(svi, batches))) == 5


def test_auto_guides_and_schedulers_of_pyro_work() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = 3 + torch.randn(20)
    found = []
    for kind in (SVI, partial(CapturedSVI, backend="fx")):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = AutoNormal(model)
        schedule = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": PLAIN, "gamma": 0.5})
        svi = kind(model, guide, schedule, Trace_ELBO())
        for _ in range(15):
            svi.step(x)
            schedule.step()
        found.append({name: value.detach().clone() for name, value in guide.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_torch_factory_keeps_its_state_over_a_late_parameter() -> None:
    program = Autoencoder()

    def guide(x: Tensor) -> None:
        program.guide(x)
        if len(x) == 7:
            pyro.param("late", torch.tensor(1.0)).sum()

    svi = CapturedSVI(program.model, guide, partial(torch.optim.Adam, lr=1e-2), Trace_ELBO(), backend="off")
    svi.step(bits())
    before = {leaf: int(state["step"]) for leaf, state in svi._optimizer.optimizer.state.items()}
    svi.step(bits(7))
    after = svi._optimizer.optimizer.state
    assert all(int(after[leaf]["step"]) == count + 1 for leaf, count in before.items())


def test_step_async_gives_the_loss_as_a_tensor() -> None:
    program = Autoencoder()
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    x = bits()
    expected = losses(svi, [x] * 3)
    torch.manual_seed(1)
    found = [svi.step_async(x) for _ in range(3)]
    assert [loss.shape for loss in found] == [torch.Size([])] * 3
    assert [float(loss) for loss in found] == expected
    assert not any(loss.requires_grad for loss in found)


def test_evaluate_loss_is_stock() -> None:
    program = Autoencoder()
    optim, x = pyro.optim.Adam({"lr": 0.0}), bits()
    stock, ours = (kind(program.model, program.guide, optim, Trace_ELBO()) for kind in (SVI, CapturedSVI))
    torch.manual_seed(0)
    expected = stock.evaluate_loss(x)
    torch.manual_seed(0)
    assert ours.evaluate_loss(x) == expected


def test_a_tensor_that_is_filled_is_seen_at_once() -> None:
    program = Autoencoder()
    program.spread = torch.tensor(1.0)
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    x = bits()
    for k in range(FIRST_CHECK + 3):
        program.spread.fill_(1.0 + k)
        found = losses(svi, [x])
        torch.manual_seed(1)
        assert found == [pytest.approx(svi.evaluate_loss(x), rel=1e-6)]
    assert not svi._replay.eager


def test_a_python_number_that_changes_is_found_and_named() -> None:
    program = Autoencoder()
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    x = bits()
    losses(svi, [x] * 5)
    program.spread = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stale = losses(svi, [x] * (FIRST_CHECK - 5))  # not yet compared
    with pytest.warns(UserWarning, match=r"the scale of the site 'z' \(Normal\) is 3.* and was 1.*fill_.*run eagerly"):
        found = losses(svi, [x])
    torch.manual_seed(1)
    assert found == [svi.evaluate_loss(x)]
    assert stale[0] != found[0]
    assert svi._replay.eager


def test_a_number_that_changes_late_is_found_at_the_next_comparison() -> None:
    program = Autoencoder()
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    x = bits()
    losses(svi, [x] * (FIRST_CHECK + 2))
    program.spread = 1.0001
    with pytest.warns(UserWarning, match="scale of the site 'z'"):
        losses(svi, [x] * (CHECK_EVERY + max(JITTER)))


def test_programs_that_stay_are_never_accused() -> None:
    program = Autoencoder()
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses(svi, [bits() for _ in range(2 * CHECK_EVERY + 5)])
    assert not svi._replay.eager
    assert svi._replay.steps == 2 * CHECK_EVERY + 4


def test_a_replaced_parameter_is_captured_anew() -> None:
    svi = CapturedSVI(plain, simple_guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO(), backend="fx")
    x = bits()[:, 0]
    losses(svi, [x] * 4)
    pyro.get_param_store()["loc"] = torch.tensor(5.0)
    expected = evaluated(svi, x)
    assert losses(svi, [x]) == [pytest.approx(expected, rel=1e-6)]
    losses(svi, [x] * 2)
    assert 0 < 5.0 - pyro.param("loc").item() < 1
    assert svi._replay._num_recorded == 2


def test_another_mode_is_captured_anew() -> None:
    program = Autoencoder()
    program.encoder.append(nn.Dropout(0.5))
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    x = bits()
    losses(svi, [x] * 3)
    program.encoder.eval()
    found = losses(svi, [x])
    with pytest.warns(UserWarning, match=r"evaluation mode: 'encoder' \(Sequential\).*train\(\)"):
        found += losses(svi, [x])
    assert found == [pytest.approx(evaluated(svi, x), rel=1e-6)] * 2


def test_kinds_that_alternate_are_compared_each() -> None:
    program = Autoencoder()
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    batches = [bits(), bits(7)]
    losses(svi, batches * (2 * FIRST_CHECK))
    program.spread = 2.0
    with pytest.warns(UserWarning, match="scale of the site 'z'"):
        losses(svi, batches[1:] * 2 + batches * (CHECK_EVERY // 2 + 10))


def test_a_periodic_number_is_found() -> None:
    program = Autoencoder()
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    x, calls = bits(), 0

    def steps() -> None:
        nonlocal calls
        for _ in range(5 * CHECK_EVERY):
            calls += 1
            program.spread = 3.0 if calls % 3 == 0 else 1.0
            svi.step_async(x)
            if svi._replay.eager:
                return

    with pytest.warns(UserWarning, match="scale of the site 'z'"):
        steps()


def test_a_tensor_that_is_given_twice_may_be_two() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 2.0), obs=y)

    svi = CapturedSVI(model, lambda x, _: simple_guide(x), pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    x, y = torch.randn(2, 5)
    for other in (x, x, x, y):
        torch.manual_seed(1)
        found = svi.step(x, other)
    torch.manual_seed(1)
    assert found == pytest.approx(svi.evaluate_loss(x, y), rel=1e-6)


def test_a_gradient_outside_the_store_is_refused_and_left_alone() -> None:
    program, net = Autoencoder(), nn.Linear(6, 6)

    def guide(x: Tensor) -> None:
        program.guide(net(x))  # which nobody names

    svi = CapturedSVI(program.model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    x = bits()
    svi.step(x)
    net.zero_grad()
    with pytest.warns(UserWarning, match=r"gradient.*of a parameter of shape \(6, 6\).*pyro.module"):
        svi.step(x)
    once = net.weight.grad
    assert once is not None
    net.zero_grad()
    svi.step(x)
    assert net.weight.grad is not None


def test_arguments_that_learn_or_are_written_are_refused() -> None:
    program = Autoencoder()

    def writing(x: Tensor) -> None:
        program.guide(x.clone())
        x.mul_(0.5)

    svi = CapturedSVI(program.model, program.guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO(), backend="fx")
    x = bits().requires_grad_()
    svi.step(x)
    with pytest.raises(CannotCapture, match="without requires_grad"):
        svi.step(x)
    svi = CapturedSVI(lambda x: program.model(x.bernoulli()), writing, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO(), backend="fx")
    x = bits()
    svi.step(x)
    before = x.clone()
    with pytest.raises(CannotCapture, match=r"writes its tensor 0, of shape \(10, 6\), in place"):
        svi.step(x)
    assert torch.equal(x, before)


def test_a_parameter_of_two_names_is_stepped_once() -> None:
    found = []
    for kind in (SVI, partial(CapturedSVI, backend="fx")):
        pyro.clear_param_store()
        program = Autoencoder()
        both = nn.ModuleList([program.decoder, program.encoder])

        def guide(x: Tensor, program: Autoencoder = program, both: nn.Module = both) -> None:
            pyro.module("all", both)
            program.guide(x)

        losses(kind(program.model, guide, pyro.optim.Adam(PLAIN), Trace_ELBO()), [bits()] * 5)
        found.append([p.detach().clone() for p in both.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["off", "auto", "fx"])
def test_a_parameter_that_is_visited_without_a_gradient_moves_by_momentum(backend: str) -> None:
    def model(x: Tensor) -> None:
        plain(x)

    def guide(x: Tensor) -> None:
        loc, other = pyro.param("loc", torch.tensor(0.0)), pyro.param("other", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc if len(x) == 5 else other, 1.0))

    x, y, found = torch.randn(5), torch.randn(4), []
    for kind in (SVI, partial(CapturedSVI, backend=backend)):
        pyro.clear_param_store()
        losses(kind(model, guide, pyro.optim.Adam(PLAIN), Trace_ELBO()), [x, y] * 6)
        found.append([pyro.param("loc").detach().clone(), pyro.param("other").detach().clone()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_refused_program_goes_on_as_stock_svi_does() -> None:
    def guide(x: Tensor) -> None:
        simple_guide(x)
        guide.calls += 1  # type: ignore[attr-defined]
        if guide.calls > 1:  # type: ignore[attr-defined]
            late = pyro.param("late", lambda: torch.randn(()))
            pyro.factor("f", late**2, has_rsample=False)

    found = []
    for kind in (SVI, CapturedSVI):
        pyro.clear_param_store()
        guide.calls = 0  # type: ignore[attr-defined]
        svi = kind(plain, guide, pyro.optim.SGD({"lr": 1e-2}), Trace_ELBO())
        x = torch.linspace(-1, 1, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses(svi, [x] * 4)
        found.append([pyro.param("loc").detach().clone(), pyro.param("late").detach().clone()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "statement",
    [
        lambda t: torch.full((), t),
        lambda t: torch.add(torch.zeros(()), torch.ones(()), alpha=t),
        lambda t: torch.ones(()) * float(t),
    ],
)
def test_a_number_read_inside_torch_is_captured_anew(statement: Callable[[Tensor], Tensor]) -> None:
    spread = torch.tensor(1.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), statement(spread)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = CapturedSVI(model, simple_guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    x = torch.randn(5)
    losses(svi, [x] * 4)
    spread.fill_(3.0)
    found = losses(svi, [x])
    assert found == [pytest.approx(evaluated(svi, x), rel=1e-6)]


def test_what_a_graph_cannot_repeat_is_found_at_the_first_replay() -> None:
    def model(x: Tensor) -> None:
        noise = torch.as_tensor(np.random.default_rng().standard_normal(len(x)), dtype=x.dtype)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(noise, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    svi = CapturedSVI(model, simple_guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    svi.step(x)
    with pytest.warns(UserWarning, match="first replay differs.*the loc of the site 'z'.*generator"):
        svi.step(x)
    svi = CapturedSVI(model, simple_guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    svi.step(x)
    with pytest.raises(CannotCapture, match="first replay differs"):
        svi.step(x)


class Counting(nn.Module):
    """A number that the program advances, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.seen = 0, [0]

    def forward(self, x: Tensor) -> None:
        self.count += 1
        self.seen[0] += 1
        plain(x + (1.0 if self.count > 3 else 0.0))


def test_a_number_that_the_program_advances_is_refused() -> None:
    count = 0

    def closing(x: Tensor) -> None:
        nonlocal count
        count += 1
        plain(x + (1.0 if count > 3 else 0.0))

    x, module = torch.randn(5), Counting()
    said = {module: "the attribute 'count' of Counting, from 1 to 2", closing: "'count', which closing closes"}
    for model, words in said.items():
        found = []
        for kind in (SVI, CapturedSVI):
            count = module.count = 0
            pyro.clear_param_store()
            svi = kind(model, simple_guide, pyro.optim.Adam(PLAIN), Trace_ELBO())
            losses(svi, [x])
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                losses(svi, [x] * 5)
            found.append(pyro.param("loc").detach().clone())
        assert [words in str(warning.message) for warning in told] == [True]
        assert torch.equal(*found)


def test_draws_of_numpys_global_generator_are_refused() -> None:
    def model(x: Tensor) -> None:
        plain(x + float(np.random.standard_normal()))

    svi = CapturedSVI(model, simple_guide, pyro.optim.Adam(PLAIN), Trace_ELBO())
    x = torch.randn(5)
    svi.step(x)
    with pytest.warns(UserWarning, match="some of NumPy's or Python's"):
        svi.step(x)


def test_sparse_gradients_step_as_in_stock_svi() -> None:
    found = []
    for kind in (SVI, partial(CapturedSVI, backend="off")):
        pyro.clear_param_store()
        torch.manual_seed(0)
        table = nn.Embedding(4, 1, sparse=True)

        def model(x: Tensor, table: nn.Embedding = table) -> None:
            pyro.module("table", table)
            plain(x + table(torch.arange(len(x)) % 3)[:, 0])

        losses(kind(model, simple_guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO()), [torch.ones(5)] * 3)
        found.append(table.weight.detach().clone())
    assert torch.allclose(*found, atol=1e-12)


def test_a_generator_of_ones_own_and_a_graph_that_fails_are_refused() -> None:
    generator, lstm = torch.Generator(), nn.LSTM(1, 2).float()

    def drawing(x: Tensor) -> None:
        plain(x + torch.randn(len(x), generator=generator))

    def recurrent(x: Tensor) -> None:
        pyro.module("lstm", lstm)
        plain(x + lstm(x[:, None].float())[0].sum(-1))

    x = torch.randn(5)
    for model, words in ((drawing, "Generator"), (recurrent, "first replay differs|cannot be captured")):
        svi = CapturedSVI(model, simple_guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
        svi.step(x)
        with pytest.warns(UserWarning, match=words):
            svi.step(x)
        assert math.isfinite(svi.step(x))


def test_validated_priors_sequential_plates_and_constant_masks_are_captured() -> None:
    prior = dist.Normal(torch.zeros(()), torch.ones(()), validate_args=True)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", prior)
        rows = torch.ones(2, 2).tril()[torch.ones(2, 2).tril() > 0].sum()
        for k in pyro.plate("sequence", 3):
            pyro.sample(f"x{k}", dist.Normal(z * rows, 1.0), obs=x[k])

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    found, x = [], torch.randn(3)
    for kind in (SVI, partial(CapturedSVI, backend="fx")):
        pyro.clear_param_store()
        losses(kind(model, guide, pyro.optim.Adam(PLAIN), Trace_ELBO()), [x] * 5)
        found.append(pyro.param("loc").detach().clone())
    assert torch.equal(*found)


def test_a_cleared_store_begins_anew() -> None:
    svi = CapturedSVI(plain, simple_guide, pyro.optim.Adam(PLAIN), Trace_ELBO(), backend="fx")
    x = torch.randn(5)
    losses(svi, [x] * 4)
    first = pyro.param("loc").detach().clone()
    pyro.clear_param_store()
    losses(svi, [x] * 4)
    assert torch.equal(pyro.param("loc").detach(), first)


def test_the_optimizer_may_be_exchanged() -> None:
    svi = CapturedSVI(plain, simple_guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    x = torch.randn(5)
    losses(svi, [x] * 3)
    before = pyro.param("loc").detach().clone()
    svi.optim = pyro.optim.SGD({"lr": 0.1})
    losses(svi, [x])
    assert not torch.equal(pyro.param("loc").detach(), before)


def test_a_function_may_be_the_objective() -> None:
    def loss(model: Any, guide: Any, x: Tensor) -> Tensor:
        q = pyro.poutine.trace(guide).get_trace(x)
        p = pyro.poutine.trace(pyro.poutine.replay(model, trace=q)).get_trace(x)
        return q.log_prob_sum() - p.log_prob_sum()

    found, x = [], torch.randn(5)
    for kind in (SVI, partial(CapturedSVI, backend="fx")):
        pyro.clear_param_store()
        svi = kind(plain, simple_guide, pyro.optim.Adam(PLAIN), loss)
        found.append((losses(svi, [x] * 4), pyro.param("loc").detach().clone(), svi.loss(plain, simple_guide, x).shape))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_item_in_a_program_is_captured() -> None:
    def model(x: Tensor) -> None:
        spread = 1 + abs(pyro.param("spread", torch.tensor(0.5)).item())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, spread))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = CapturedSVI(model, simple_guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(), backend="fx")
    x = torch.randn(5)
    losses(svi, [x] * 3)
    pyro.param("spread").unconstrained().data.fill_(2.0)
    expected = evaluated(svi, x)
    assert losses(svi, [x]) == [pytest.approx(expected, rel=1e-6)]
    assert "1 graphs, 0 compiled, 3 steps replayed" in repr(svi)


@pytest.mark.parametrize("backend", ["fx", "off"])
def test_a_loss_that_is_nan_is_refused_as_stock_svi_does(backend: Any) -> None:
    svi = CapturedSVI(plain, simple_guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(), backend=backend)
    for _ in range(3):
        svi.step(torch.ones(5))
    before = pyro.param("loc").detach().clone()
    with pytest.raises(ValueError, match="support"):
        svi.step(torch.full((5,), math.nan))
    assert torch.equal(pyro.param("loc").detach(), before)
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="NaN"):
        svi.step(torch.full((5,), math.nan))


def evaluated(svi: CapturedSVI, x: Tensor) -> float:
    torch.manual_seed(1)
    return svi.evaluate_loss(x)


def branching(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z.sum() > 0:
            z = z + 1
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def simple_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


def test_what_cannot_be_captured_is_said_with_its_line() -> None:
    x = torch.randn(5)
    line = branching.__code__.co_firstlineno + 3
    svi = CapturedSVI(branching, simple_guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    svi.step(x)
    with pytest.warns(UserWarning, match=f"cannot be captured: .*bool.* line {line}, in branching.*torch.where.* run eagerly"):
        svi.step(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = losses(svi, [x])
    torch.manual_seed(1)
    assert found == [svi.evaluate_loss(x)]
    asked = CapturedSVI(branching, simple_guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    asked.step(x)
    with pytest.raises(CannotCapture, match=f"line {line}, in branching"):
        asked.step(x)


def sequential(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    for k in pyro.plate("sequence", 1 + int(z.sum().abs())):
        pyro.factor(f"f{k}", z.sum() * 0)


def late_parameter(x: Tensor) -> None:
    sequential.calls = getattr(sequential, "calls", 0) + 1
    simple_guide(x)
    if sequential.calls > 1:
        pyro.param("late", torch.tensor(0.0))


CALLS = itertools.count()


def random_structure(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        family = dist.Laplace if next(CALLS) % 2 else dist.Normal
        z = pyro.sample("z", family(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Rebinding(nn.Module):
    """A buffer that is bound anew at every run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + self.mean, 1.0), obs=x)


def plain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        (sequential, simple_guide, "int"),
        (plain, late_parameter, "parameter at the first step, got 'late'"),
        (random_structure, simple_guide, "'z' is a Laplace"),
        (Rebinding(), simple_guide, "replaced one: .*'mean'.*copy_"),
    ],
)
def test_programs_of_changing_structure_are_refused(model: Any, guide: Any, words: str) -> None:
    x = torch.randn(5)
    svi = CapturedSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(x)
    with pytest.warns(UserWarning, match=words):
        svi.step(x)
    assert math.isfinite(svi.step(x))


def test_a_refused_program_keeps_what_it_had_bound() -> None:
    model, x = Rebinding(), torch.ones(5)
    svi = CapturedSVI(model, simple_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), backend="fx")
    svi.step(x)
    before = model.mean
    with pytest.raises(CannotCapture, match="copy_"):
        svi.step(x)
    assert model.mean is before


def test_many_kinds_of_arguments_run_eagerly_and_the_argument_is_named() -> None:
    def model(x: Tensor, spread: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, spread))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = CapturedSVI(model, lambda x, _: simple_guide(x), pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    x = torch.randn(5)
    for k in range(MAX_GRAPHS):
        svi.step(x, 1.0 + k)
    with pytest.warns(UserWarning, match="the second argument is the float 20.0 and was 8.0"):
        svi.step(x, 20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(x, 21.0)
        svi.step(x, 1.0)
        svi.step(x, torch.tensor(21.0).item())
    assert svi._replay.steps == 1


def test_a_number_as_a_tensor_argument_needs_one_graph() -> None:
    def model(x: Tensor, spread: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), spread))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = CapturedSVI(model, lambda x, _: simple_guide(x), pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="fx")
    x = torch.randn(5)
    for k in range(2 * FIRST_CHECK):
        torch.manual_seed(1)
        found = svi.step(x, torch.tensor(1.0 + k))
        torch.manual_seed(1)
        assert found == pytest.approx(svi.evaluate_loss(x, torch.tensor(1.0 + k)), rel=1e-6)
    assert svi._replay._num_recorded == 1


def test_bad_input_is_refused_with_what_was_expected() -> None:
    program = Autoencoder()
    adam = pyro.optim.Adam({"lr": 1e-3})
    with pytest.raises(ValueError, match=r"expected a backend among 'auto'.*got 'jit'"):
        CapturedSVI(program.model, program.guide, adam, Trace_ELBO(), backend="jit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LBFGS.*closure"):
        CapturedSVI(program.model, program.guide, partial(torch.optim.LBFGS, lr=1), Trace_ELBO())
    made = torch.optim.Adam(program.decoder.parameters())
    with pytest.raises(ValueError, match=r"made already.*partial"):
        CapturedSVI(program.model, program.guide, made, Trace_ELBO())
    with pytest.raises(ValueError, match=r"expected an objective.*got the class Trace_ELBO; write Trace_ELBO\(\)"):
        CapturedSVI(program.model, program.guide, adam, Trace_ELBO)
    with pytest.raises(ValueError, match=r"got 'cuda'; the device is that of data and parameters"):
        CapturedSVI(program.model, program.guide, adam, Trace_ELBO(), backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Jit.*Trace_ELBO"):
        CapturedSVI(program.model, program.guide, adam, JitTrace_ELBO())
    svi = CapturedSVI(program.model, program.guide, adam, Trace_ELBO(), backend="cudagraph")
    svi.step(bits())
    with pytest.raises(ValueError, match=r"expected data and parameters on CUDA.*got cpu"):
        svi.step(bits())


def test_mixed_devices_are_named() -> None:
    program = Autoencoder()
    svi = CapturedSVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with pytest.raises(ValueError, match="one device, got data on meta and parameters or buffers on cpu"):
        svi.step(bits().to("meta"))
