"""Computations that are one operation of a recorded run."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.ops import isolated_rng, rbm_log_partition
from pyrovae.ops.opaque import apply_whole, run_whole
from pyrovae.ops.tracing import capturing, unrecorded


class _Power(torch.autograd.Function):
    """x² where it is small, |x| elsewhere, by a look at the values; times a number."""

    @staticmethod
    def forward(ctx, x, factor, other):
        ctx.save_for_backward(x)
        ctx.small, ctx.factor = bool(x.abs().max() < 1), factor
        return factor * (x.square() if ctx.small else x.abs()).sum() + 0 * other.sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.factor * (2 * x if ctx.small else x.sign()), None, torch.zeros_like(x)


def _value_and_gradient(x):
    x = x.detach().requires_grad_()
    value = apply_whole(_Power, x, 3.0, torch.ones(2))
    (gradient,) = torch.autograd.grad(2 * value, x)
    return value.detach(), gradient


def test_a_replay_looks_at_the_values_anew():
    small, large = torch.tensor([0.3, -0.5]), torch.tensor([3.0, -5.0])
    graph = make_fx(_value_and_gradient)(small)
    assert [str(node.target) for node in graph.graph.nodes].count("pyrovae.opaque.default") == 2
    for x in (small, large, small):
        for found, expected in zip(graph(x), _value_and_gradient(x), strict=True):
            assert torch.equal(found, expected)


def test_without_a_gradient_nothing_is_kept():
    graph = make_fx(lambda x: apply_whole(_Power, x, 3.0, torch.ones(2)))(torch.ones(2))
    assert torch.equal(graph(torch.full((2,), 2.0)), torch.tensor(12.0))


def test_a_backward_pass_belongs_to_its_forward_pass():
    graph = make_fx(_value_and_gradient)(torch.ones(2))
    nodes = [node for node in graph.graph.nodes if "opaque" in str(node.target)]
    forward, backward = (node.args[1:] for node in nodes)
    x = torch.ones(2)
    _, ticket = torch.ops.pyrovae.opaque([x, torch.ones(2)], *forward)
    torch.ops.pyrovae.opaque([x, torch.ones(2)], *forward)
    with pytest.raises(RuntimeError, match="one after another"):
        torch.ops.pyrovae.opaque([torch.tensor(1.0), ticket], *backward)


def test_outputs_are_known_without_a_run():
    """By which a compiler plans its memory; transposed ones, too."""
    graph = make_fx(lambda x: run_whole(lambda x: (x.T.clone(), x.sum(0).long()), x))(torch.ones(2, 3))
    (node,) = (node for node in graph.graph.nodes if "opaque" in str(node.target))
    with FakeTensorMode() as mode:
        found = node.target([mode.from_tensor(torch.ones(2, 3))], *node.args[1:])
    expected = graph(torch.ones(2, 3))
    assert [(t.shape, t.stride(), t.dtype) for t in found] == [(t.shape, t.stride(), t.dtype) for t in expected]
    assert not found[0].is_contiguous()


def test_draws_are_fresh_and_kept():
    def draw(x):
        run_whole(lambda x: (torch.rand_like(x),), x)  # not used, and yet drawn
        return run_whole(lambda x: (torch.rand_like(x),), x)[0]

    graph = make_fx(draw)(torch.zeros(3))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    torch.manual_seed(1)
    expected = draw(torch.zeros(3)), draw(torch.zeros(3))
    torch.manual_seed(1)
    found = graph(torch.zeros(3)), graph(torch.zeros(3))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not torch.equal(*found)


def test_what_is_not_recorded():
    seen = []

    def run(x):
        seen.append(capturing())
        with unrecorded():
            seen.append(capturing())
            largest = float((2 * x).max())  # a value that the run computes
            torch.rand(())
        return x * largest

    torch.manual_seed(0)
    with isolated_rng():
        expected = torch.rand(())
    graph = make_fx(run)(torch.tensor([1.0, 2.0]))
    assert torch.equal(torch.rand(()), expected)
    assert seen == [True, False]
    assert torch.equal(graph(torch.tensor([1.0, 3.0])), torch.tensor([4.0, 12.0]))
    assert not capturing()
    with unrecorded():
        first = torch.rand(())
    assert not torch.equal(first, torch.rand(()))


def test_what_an_enumeration_refuses_it_refuses_at_a_replay():
    weight, bias = torch.zeros(3, 2), torch.zeros(3)
    graph = make_fx(lambda weight: rbm_log_partition(weight, bias, torch.zeros(2)))(weight)
    assert torch.equal(graph(weight), rbm_log_partition(weight, bias, torch.zeros(2)))
    with pytest.raises(ValueError, match="expected finite weights, got 6 values that are not"):
        graph(weight / 0)


class _Kept(torch.autograd.Function):
    """x², whose backward pass looks at the very argument and value of the forward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.x, ctx.value = x, x.square()
        return ctx.value

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.value / ctx.x


def test_memory_may_be_used_again():
    """As compiled graphs do with an operation's arguments and outputs once nothing else needs them."""
    graph = make_fx(lambda x: torch.autograd.grad(apply_whole(_Kept, y := x.detach().requires_grad_()).sum(), y))(torch.ones(2))
    forward, backward = (node.args[1:] for node in graph.graph.nodes if "opaque" in str(node.target))
    x = torch.tensor([3.0, 5.0])
    value, ticket = torch.ops.pyrovae.opaque([x], *forward)
    x.zero_()
    value.zero_()
    (gradient,) = torch.ops.pyrovae.opaque([torch.ones(2), ticket], *backward)
    assert torch.equal(gradient, torch.tensor([6.0, 10.0]))
