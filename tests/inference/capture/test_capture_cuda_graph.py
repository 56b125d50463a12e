"""Recorded steps against a loop of ordinary ones, from the same seed: on the CPU with a tape in the graph's place."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrovae.inference.capture.cuda_graph import WARM_UP, CudaGraphStep
from pyrovae.inference.capture.graph import capture
from pyrovae.inference.capture.journal import undone


class Tape(TorchDispatchMode):
    """Does what a CUDA graph does: runs nothing when recorded; a replay repeats the operations on the recorded tensors."""

    def __init__(self):
        super().__init__()
        self.calls, self.warmed, self.replays = [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def warm_up(self, step):
        self.warmed += 1
        return step().clone()

    def record(self, step):
        with undone(), self:
            return step()

    def replay(self):
        self.replays += 1
        given = lambda args, kwargs: {id(x) for x in tree_leaves((args, kwargs))}  # noqa: E731
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and id(old) not in given(args, kwargs):
                        old.copy_(new)


class Program:
    """A regression with noise, a running mean and an optimizer."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.weight = torch.randn(3).requires_grad_()
        self.mean = torch.zeros(3)
        self.rate = torch.tensor(0.1)
        self.optimizer = make([self.weight], self.rate)
        self.steps = 0

    def loss_and_gradient(self, x):
        self.mean.mul_(0.9).add_(x.mean(0))
        loss = ((x @ self.weight + torch.randn(x.shape[0]) - 1) ** 2).sum() + self.mean @ self.weight
        return loss.detach(), *torch.autograd.grad(loss, [self.weight])

    def apply(self, outputs):
        self.weight.grad = outputs[1] * torch.clamp(1 / outputs[1].norm(), max=1)
        self.optimizer.step()

    def prepare(self):
        self.steps += 1
        self.rate.fill_(0.1 / self.steps)

    def eager(self, x):
        self.prepare()
        outputs = self.loss_and_gradient(x)
        self.apply(outputs)
        return outputs[0]

    def everything(self):
        return [self.weight, self.mean, *tree_leaves(self.optimizer.state_dict()["state"])]


def _adam(parameters, rate):
    return torch.optim.Adam(parameters, lr=rate, fused=True)


def _momentum(parameters, rate):
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, dampening=0.5, fused=True)  # the first step differs from others


def _data(num=8):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(4, 3, generator=generator) for _ in range(num)]


def _step(program, x, recorder):
    graph = capture(program.loss_and_gradient, [x])
    return CudaGraphStep(graph, program.apply, [x], state=graph.state, prepare=program.prepare, recorder=recorder)


@pytest.mark.parametrize("make", [_adam, _momentum])
def test_goes_the_way_of_ordinary_steps_bit_for_bit(make):
    theirs, ours, data = Program(make), Program(make), _data()
    torch.manual_seed(1)
    expected = [theirs.eager(x) for x in data]
    after = torch.get_rng_state()
    tape = Tape()
    step = _step(ours, data[0], tape)
    torch.manual_seed(1)
    losses = [step([x]) for x in data]
    assert (tape.warmed, tape.replays, step.recorded) == (WARM_UP, len(data) - WARM_UP, True)
    assert all(map(torch.equal, losses, expected))
    assert all(map(torch.equal, ours.everything(), theirs.everything()))
    assert torch.equal(torch.get_rng_state(), after)
    assert len({float(loss) for loss in losses}) == len(losses)


def test_the_tape_would_show_a_tensor_that_is_replaced():
    theirs, ours, data = Program(_adam), Program(_adam), _data()

    def replace(program):
        def apply(outputs):
            with torch.no_grad():
                program.weight = (program.weight - outputs[1]).requires_grad_()

        return apply

    theirs.apply, ours.apply = replace(theirs), replace(ours)
    torch.manual_seed(1)
    expected = [theirs.eager(x) for x in data]
    step = _step(ours, data[0], Tape())
    torch.manual_seed(1)
    losses = [step([x]) for x in data]
    assert not all(map(torch.equal, losses, expected))


def test_losses_are_the_callers():
    program, data = Program(_adam), _data()
    step = _step(program, data[0], Tape())
    losses = [step([x]) for x in data]
    assert len({loss.data_ptr() for loss in losses}) == len(losses)


def test_an_input_that_the_run_changes_is_changed():
    data, chain, total = _data(), torch.zeros(4, 3), torch.zeros(())

    def run(inputs):
        x, chain = inputs
        chain.add_(x)
        return (chain.sum(),)

    step = CudaGraphStep(run, lambda outputs: total.add_(outputs[0]), [data[0], chain], state=(), prepare=int, recorder=Tape())
    expected = torch.zeros(4, 3)
    for x in data:
        assert step([x, chain]) == (expected := expected + x).sum()
        assert torch.equal(chain, expected)
    assert total != 0


class Broken(Tape):
    def record(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_step_that_cannot_be_recorded_goes_on_with_a_warning():
    theirs, ours, data = Program(_adam), Program(_adam), _data()
    torch.manual_seed(1)
    expected = [theirs.eager(x) for x in data]
    step = _step(ours, data[0], Broken())
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="got operation not permitted when stream is capturing; steps stay ordinary") as told:
        losses = [step([x]) for x in data]
    assert len(told) == 1
    assert not step.recorded
    assert all(map(torch.equal, losses, expected))


def test_tensors_on_the_cpu_are_not_recorded():
    program, data = Program(_adam), _data()
    with pytest.warns(UserWarning, match="expected a step that a CUDA graph can hold, got tensors on cpu"):
        step = _step(program, data[0], None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in data:
            step([x])
    assert program.steps == len(data)
    assert not step.recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device, and there is none")
def test_on_a_gpu_goes_the_way_of_ordinary_steps():
    data = [x.cuda() for x in _data()]
    theirs, ours = (Program(lambda p, rate: torch.optim.Adam(p, lr=rate, capturable=True)) for _ in range(2))
    for program in (theirs, ours):
        program.weight.data = program.weight.data.cuda()
        program.mean = program.mean.cuda()
        program.rate = program.optimizer.param_groups[0]["lr"] = program.rate.cuda()
    torch.manual_seed(1)
    expected = [theirs.eager(x) for x in data]
    step = _step(ours, data[0], None)
    torch.manual_seed(1)
    losses = [step([x]) for x in data]
    assert step.recorded
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.everything(), theirs.everything(), rtol=1e-6, atol=1e-6)
