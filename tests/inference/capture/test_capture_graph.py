"""A recorded run gives what the run gives, moves nothing while it is recorded, and refuses what values decide."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrovae.inference.capture.graph import CannotCapture, capture
from pyrovae.inference.capture.journal import undone
from pyrovae.ops.tracing import capturing


def noisy_square(weight: Tensor) -> Callable[[Tensor], tuple[Tensor | None, ...]]:
    """A function with a random draw, and the gradient of a closed-over leaf."""

    def run(x: Tensor) -> tuple[Tensor | None, ...]:
        weight.grad = None
        loss = ((x @ weight + torch.randn(len(x))) ** 2).sum()
        loss.backward()
        gradient, weight.grad = weight.grad, None
        return loss.detach(), gradient, None

    return run


def test_a_replay_has_the_bits_of_the_run_and_fresh_noise() -> None:
    weight, x = torch.randn(3, requires_grad=True), torch.randn(5, 3)
    run = noisy_square(weight)
    graph = capture(run, [x])
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = run(x)
        torch.manual_seed(seed)
        got = graph([x])
        assert got[2] is None
        assert all(torch.equal(a, b) for a, b in zip(got[:2], expected[:2], strict=True))
        seen.append(got[0])
    assert not torch.equal(*seen)


def test_a_replay_reads_parameters_and_inputs_as_they_are_now() -> None:
    weight, x = torch.randn(3, requires_grad=True), torch.randn(5, 3)
    run = noisy_square(weight)
    graph = capture(run, [x])
    with torch.no_grad():
        weight.mul_(2)
    other = torch.randn(5, 3)
    torch.manual_seed(0)
    expected = run(other)
    torch.manual_seed(0)
    assert torch.equal(graph([other])[1], expected[1])
    torch.manual_seed(0)
    assert not torch.equal(graph([x])[1], expected[1])


def test_the_first_outputs_alone_are_a_smaller_graph_with_the_same_numbers() -> None:
    x = torch.randn(4)
    graph = capture(lambda x: (x + 1, x.exp().sin().cos(), None), [x])
    first = graph.first(1)
    assert first.num_nodes == 1 < graph.num_nodes
    assert torch.equal(first([x])[0], x + 1)
    assert len(first([x])) == 1


def test_recording_moves_nothing() -> None:
    norm, count = nn.BatchNorm1d(3), torch.zeros(2)
    x = torch.randn(8, 3)

    def run(x: Tensor) -> tuple[Tensor]:
        count[0] += 1
        return (norm(x) + torch.rand(()),)

    before = [buffer.clone() for buffer in norm.buffers()]
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    graph = capture(run, [x])
    assert torch.equal(torch.rand(()), expected)
    assert count.tolist() == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before, strict=True))
    assert {id(tensor) for tensor in graph.state} == {id(count), *map(id, norm.buffers())}
    graph([x])
    assert count.tolist() == [1, 0]
    other = nn.BatchNorm1d(3)
    other(x)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), other.buffers(), strict=True))


def test_a_failing_run_moves_nothing_either() -> None:
    count = torch.zeros(())

    def run(x: Tensor) -> tuple[Tensor]:
        count.add_(1)
        raise ZeroDivisionError("seven")

    with pytest.raises(CannotCapture, match=r"ZeroDivisionError \(test_capture_graph.py, line \d+, in run\): seven"):
        capture(run, [torch.ones(1)])
    assert count == 0
    assert not capturing()
    assert pyro.distributions.Normal(0.0, 1.0)._validate_args


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (lambda x: x if x.sum() > 0 else -x, "bool"),
        (lambda x: x * int(x.long().sum()), "int"),
        (lambda x: x * x.long().sum().item(), "item"),
        (lambda x: x * float(x.sum()), "float"),
        (lambda x: x * sum((x * 2).tolist()), "tolist"),
        (lambda x: x + torch.from_numpy((x * 2).numpy()), "numpy"),
        (lambda x: x * len(f"{x.sum()}"), "format"),
        (lambda x: x * len(f"{x.sum().item()}"), "format"),
        (lambda x: x[x > 0], "mask"),
        (lambda x: torch.nonzero(x).float(), "nonzero"),
        (lambda x: torch.masked_select(x, x > 0), "masked_select"),
        (lambda x: torch.unique(x), "unique"),
        (lambda x: x * torch.equal(x, x + 1), "value"),
        (lambda x: torch.nn.functional.one_hot(x.abs().long()).float(), "num_classes"),
    ],
)
def test_what_values_decide_is_refused_with_its_place(statement: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(CannotCapture, match=words):
        capture(lambda x: (statement(x),), [torch.randn(4)])


def test_the_refusal_names_the_line() -> None:
    def branching(x: Tensor) -> tuple[Tensor]:
        return (x if x.sum() > 0 else -x,)

    line = branching.__code__.co_firstlineno + 1
    with pytest.raises(CannotCapture, match=f"test_capture_graph.py, line {line}, in branching"):
        capture(branching, [torch.randn(4)])


def test_item_of_a_float_is_a_tensor_of_the_same_number() -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        total = 0.0
        for k in range(3):
            total = total + (x * k).sum().item() / 3
        return (torch.as_tensor(total, dtype=torch.float64),)

    x = torch.randn(7)
    assert torch.equal(capture(run, [x])([x])[0], run(x)[0])


def test_one_hot_is_torchs() -> None:
    index = torch.randint(5, (4, 3))
    graph = capture(lambda i: (torch.nn.functional.one_hot(i, 5),), [index])
    other = torch.randint(5, (4, 3))
    got = graph([other])[0]
    expected = torch.nn.functional.one_hot(other, 5)
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype


def test_the_value_of_an_existing_tensor_may_decide_and_is_remembered() -> None:
    flag = torch.tensor(True)
    graph = capture(lambda x: (x + 1 if flag else x,), [torch.ones(2)])
    assert graph.read[0][0] is flag
    assert graph.read[0][1] == flag._version
    flag.fill_(False)
    assert graph.read[0][1] != flag._version


def test_a_program_under_vectorised_plates_and_masks() -> None:
    x = torch.randn(6)

    def run(x: Tensor) -> tuple[Tensor]:
        with pyro.plate("data", 6), pyro.poutine.mask(mask=x > 0):
            trace = pyro.poutine.trace(lambda: pyro.sample("z", dist.Normal(x, 1.0))).get_trace()
        return (trace.log_prob_sum(), trace.nodes["z"]["value"])

    graph = capture(run, [x])
    torch.manual_seed(0)
    expected = run(x)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(graph([x]), expected, strict=True))


def test_undone_puts_back_contents_through_views_and_generators() -> None:
    buffer, flat = torch.arange(6.0).view(2, 3), torch.zeros(3)
    state = torch.get_rng_state()
    with undone() as journal:
        buffer.t()[0].add_(10)
        torch.add(flat, 1, out=flat)
        made = torch.zeros(2)
        made.add_(torch.rand(2))
        assert journal.has(buffer)
        assert not journal.has(made)
    assert torch.equal(buffer, torch.arange(6.0).view(2, 3))
    assert flat.tolist() == [0, 0, 0]
    assert torch.equal(torch.get_rng_state(), state)
    assert (made > 0).all()
