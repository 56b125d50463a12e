"""Which backend runs a step, when it is compiled, and what the comparison with the programs decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyrovae.inference import CapturedSVI
from pyrovae.inference.capture import replay as module
from pyrovae.inference.capture.inductor import CannotCompile, find_compiler
from pyrovae.inference.capture.replay import FIRST_CHECKS, Replay
from pyrovae.inference.capture.self_check import alike, relative_error

CHECK_EVERY, FIRST_CHECK = module.CHECK_EVERY["cpu"], FIRST_CHECKS[-1]
LEARN = 1e-3


class Toy:
    """Loss and gradient of a noisy quadratic, and its step."""

    def __init__(self) -> None:
        self.weight = torch.ones(3, requires_grad=True)
        self.scale = 1.0
        self.runs = 0

    def run(self, args: tuple[Any, ...], _: Any) -> tuple[Tensor | None, ...]:
        self.runs += 1
        self.weight.grad = None
        z = pyro.sample("z", dist.Normal(torch.zeros(3), self.scale).to_event(1))
        loss = ((self.weight * args[0] + z) ** 2).sum()
        loss.backward()
        gradient, self.weight.grad = self.weight.grad, None
        return loss.detach().double(), gradient

    def apply(self, outputs: Sequence[Tensor | None]) -> None:
        assert outputs[1] is not None
        with torch.no_grad():
            self.weight.sub_(outputs[1], alpha=LEARN)

    def steps(self, replay: Replay, count: int, seed: int = 0) -> list[float]:
        torch.manual_seed(seed)
        return [float(replay.step((torch.full((3,), 1 + 0.1 * k),), {})) for k in range(count)]


def made(toy: Toy, **options: Any) -> Replay:
    return Replay(toy.run, toy.apply, (), **options)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for the compiler that costs what five steps save; the steps at which it was called."""
    calls: list[int] = []

    def compile_graph(graph: Any, _: Any) -> Callable[..., Any]:
        calls.append(1)
        return lambda inputs: graph(inputs)

    monkeypatch.setattr(module, "compile_graph", compile_graph)
    monkeypatch.setattr(module, "steps_to_pay", lambda _: 5)
    monkeypatch.setattr(module, "find_compiler", lambda: "c++")
    return calls


def test_steps_are_those_of_the_eager_run() -> None:
    found = []
    for backend in ("off", "fx"):
        toy = Toy()
        found.append((toy.steps(made(toy, backend=backend), 25), toy.weight.tolist()))
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 25


def test_a_dry_start_moves_nothing_before_the_first_step() -> None:
    found, toy = [], Toy()
    for dry in (False, True):
        toy = Toy()
        found.append((toy.steps(made(toy, backend="fx", dry=dry), 5), toy.weight.tolist()))
    assert found[0] == found[1]
    assert toy.runs == 3  # beside, recorded, and the first comparison


def test_auto_compiles_after_the_steps_that_pay(compiled: list[int]) -> None:
    toy = Toy()
    replay = made(toy)
    toy.steps(replay, 5)  # the first is eager
    assert not compiled
    toy.steps(replay, 1)
    assert len(compiled) == 1
    toy.steps(replay, 20)
    assert len(compiled) == 1


@pytest.mark.parametrize(("num_steps", "times"), [(5, 0), (6, 1)])
def test_auto_compiles_at_once_where_the_run_is_long(compiled: list[int], num_steps: int, times: int) -> None:
    toy = Toy()
    toy.steps(made(toy, num_steps=num_steps, dry=True), num_steps)
    assert len(compiled) == times


def test_without_a_compiler_the_graph_is_replayed(compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_compiler", lambda: None)
    toy = Toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.steps(made(toy), 12)
    assert not compiled


def test_a_failing_compiler_is_said_under_auto_and_refused_when_asked_for(
    compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise CannotCompile("no luck")

    monkeypatch.setattr(module, "compile_graph", fails)
    toy, expected = Toy(), Toy().steps(made(Toy(), backend="off"), 1)
    with pytest.warns(UserWarning, match="not compiled, and replayed as it is: no luck"):
        found = toy.steps(made(toy, num_steps=100, dry=True), 1)
    assert found == expected
    with pytest.raises(CannotCompile, match="no luck"):
        Toy().steps(made(toy, backend="inductor", dry=True), 1)
    assert not compiled


def test_a_compiled_graph_with_other_gradients_is_not_used(compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda graph, _: lambda inputs: (graph(inputs)[0], 1.001 * graph(inputs)[1])  # noqa: E731
    monkeypatch.setattr(module, "compile_graph", wrong)
    toy, other = Toy(), Toy()
    with pytest.warns(UserWarning, match="does not give the gradients of the captured one"):
        found = toy.steps(made(toy, backend="inductor", dry=True), 12)
    assert found == other.steps(made(other, backend="off"), 12)
    assert not compiled


def test_rounding_alone_accuses_nobody(compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def compile_graph(graph: Any, _: Any) -> Callable[..., Any]:
        def run(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            loss, gradient = graph(inputs)
            return loss, gradient * (1.01 if calls > 5 else 1 + 1e-7)  # as after a draw that has crossed a threshold

        return run

    monkeypatch.setattr(module, "compile_graph", compile_graph)
    toy = Toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.steps(made(toy, backend="inductor", dry=True), FIRST_CHECK + 1)
    assert not compiled


def test_a_stale_program_is_found_behind_a_compiled_graph(compiled: list[int]) -> None:
    toy = Toy()
    replay = made(toy, backend="inductor", dry=True)
    toy.steps(replay, 3)
    toy.scale = 1.1
    toy.steps(replay, FIRST_CHECK - 4)
    with pytest.warns(UserWarning, match="the scale of the site 'z'"):
        toy.steps(replay, 1)
    assert compiled


def test_the_programs_run_only_at_comparisons() -> None:
    toy = Toy()
    toy.steps(made(toy, backend="fx", dry=True), CHECK_EVERY + 1)
    assert toy.runs == 4  # beside, recorded, and two comparisons


def test_a_program_that_is_rebound_at_every_step_is_given_up() -> None:
    net = nn.Linear(1, 1)

    def run(args: tuple[Any, ...], _: Any) -> tuple[Tensor | None, ...]:
        loss = net(args[0]).sum()
        loss.backward()
        gradient = net.weight.grad
        net.zero_grad()
        return loss.detach().double(), gradient

    replay = Replay(run, lambda _: None, (net,), backend="fx", dry=True)

    def steps() -> None:
        for _ in range(20):
            net.weight = nn.Parameter(torch.ones(1, 1))
            replay.step((torch.ones(1, 1),), {})

    with pytest.warns(UserWarning, match=r"captured 16 times, the last time because .*'weight'.*run eagerly"):
        steps()
    assert replay.eager


def test_tell_says_what_takes_time(compiled: list[int]) -> None:
    told: list[str] = []
    toy = Toy()
    toy.steps(made(toy, backend="inductor", dry=True, tell=told.append), 2)
    assert told[0] == "compiling"
    assert told[1].startswith("compiled in ")
    assert compiled


def test_alike_is_exact_or_relative_in_norm() -> None:
    a = torch.tensor([1.0, 2.0])
    assert alike([a, None], [a.clone(), None], exact=True)
    assert not alike([a], [torch.nextafter(a, a + 1)], exact=True)
    assert alike([a], [torch.nextafter(a, a + 1)], exact=False)
    assert not alike([a], [a * 1.0001], exact=False)
    assert not alike([a], [None], exact=False)
    assert not alike([a], [a, a], exact=False)
    assert not alike([a], [a[:1]], exact=False)
    nan = torch.tensor([float("nan"), 1.0])
    assert alike([nan], [nan.clone()], exact=True)
    assert alike([nan], [nan.clone()], exact=False)
    assert not alike([nan], [a], exact=False)
    assert relative_error([(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))]) == pytest.approx(0.5 / (9 + 20.25) ** 0.5)


@pytest.mark.skipif(find_compiler() is None, reason="Inductor needs a C++ compiler, and this machine has none")
def test_compiled_steps_follow_stock_svi() -> None:
    def trajectory(make: Callable[..., Any]) -> list[float]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        decoder, encoder = nn.Linear(2, 6), nn.Linear(6, 4)

        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                loc, log_scale = encoder(x).split(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        svi = make(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        torch.manual_seed(1)
        return [svi.step(torch.bernoulli(torch.full((10, 6), 0.4))) for _ in range(FIRST_CHECK + 10)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = trajectory(partial(CapturedSVI, backend="inductor"))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(trajectory(SVI)), rtol=1e-5, atol=0)
