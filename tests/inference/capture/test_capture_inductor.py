"""Compiled graphs against the graphs themselves, for the same seed; and what is left behind: nothing."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch

from pyrovae.inference.capture.graph import capture
from pyrovae.inference.capture.inductor import CannotCompile, CompilerMissing, compile_graph, find_compiler, steps_to_pay

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="Inductor needs a C++ compiler, and there is none")


def _program():
    """A step with all that matters: draws of several kinds, a state, a leaf without a gradient, views and equal outputs."""
    weight = torch.randn(3, 5).requires_grad_()
    idle = torch.randn(2).requires_grad_()
    count = torch.zeros(5)

    def step(x):
        a = torch.rand(4, 5)
        b = torch.randn(4, 5)
        c = torch.bernoulli(torch.full((4, 5), 0.5))
        d = torch.empty(4, 5).exponential_()
        hidden = torch.tanh(x @ weight) * c + d.log() * a - b  # used in another order than drawn
        loss = (hidden**2).sum() + weight[0, 0]
        (gradient,) = torch.autograd.grad(loss, [weight])
        count.add_(hidden.detach().sum(0))
        return loss.detach(), gradient, None, count, weight.detach()[1:], gradient.t(), idle.detach()

    return step, weight, count


@pytest.fixture(scope="module")
def compiled():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    step, weight, count = _program()
    x = torch.randn(4, 3)
    graph = capture(step, [x])
    run = compile_graph(graph, [x])
    torch.set_default_dtype(default)
    return graph, run, weight, count, x


def _from(run, x, count, seed):
    torch.manual_seed(seed)
    count.zero_()
    return [None if out is None else out.clone() for out in run([x])], count.clone()


@needs_compiler
def test_equals_the_graph_draw_for_draw(compiled):
    graph, run, _, count, x = compiled
    for seed in range(3):
        outputs, after = _from(run, x, count, seed)
        expected, expected_after = _from(graph, x, count, seed)
        assert outputs[2] is None
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after, expected_after, rtol=1e-12, atol=1e-12)
        assert after.abs().sum() > 0
    assert not torch.allclose(_from(run, x, count, 0)[0][0], _from(run, x, count, 1)[0][0])


@needs_compiler
def test_leaves_the_generator_where_the_graph_does(compiled):
    graph, run, _, _, x = compiled
    torch.manual_seed(3)
    run([x])
    after = torch.get_rng_state()
    torch.manual_seed(3)
    graph([x])
    assert torch.equal(after, torch.get_rng_state())


@needs_compiler
def test_reads_parameters_and_writes_state_by_reference(compiled):
    graph, run, weight, count, x = compiled
    before, _ = _from(run, x, count, 0)
    with torch.no_grad():
        weight.mul_(2)
    outputs, _ = _from(run, x, count, 0)
    torch.testing.assert_close(outputs, _from(graph, x, count, 0)[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs[1], before[1])
    count.zero_()
    run([x])
    once = count.clone()
    run([x])
    assert not torch.equal(count, once)
    assert not torch.equal(once, torch.zeros(5))


@needs_compiler
def test_outputs_have_the_strides_of_the_graphs(compiled):
    graph, run, weight, _, x = compiled
    outputs, expected = run([x]), graph([x])
    assert [out.stride() for out in outputs if out is not None] == [out.stride() for out in expected if out is not None]
    assert outputs[1].stride() == weight.stride()


_ELSEWHERE = """
import torch
from pyrovae.inference.capture.graph import capture
from pyrovae.inference.capture.inductor import compile_graph
torch.set_num_threads(1)
x = torch.ones(3, 5)
run = compile_graph(capture(lambda x: (torch.sin(x + torch.rand_like(x)),), [x]), [x])
assert run([x])[0].shape == (3, 5)
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@needs_compiler
def test_the_next_process_finds_it_on_disk_and_neither_says_a_word():
    command = [sys.executable, "-W", "error:::pyrovae", "-c", _ELSEWHERE]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=False) for _ in range(2)]
    assert [run.stderr for run in runs] == ["", ""]
    assert runs[1].stdout == "1\n"


@needs_compiler
def test_leaves_nothing_behind():
    config = pytest.importorskip("torch._inductor.config")
    before = config.save_config(), logging.getLogger("torch").level, list(warnings.filters)
    x = torch.ones(3)
    graph = capture(lambda x: (x + 1,), [x])
    nodes = str(graph.module.graph)
    compile_graph(graph, [x])
    assert (config.save_config(), logging.getLogger("torch").level, list(warnings.filters)) == before
    assert str(graph.module.graph) == nodes


def test_no_compiler_is_said():
    config = pytest.importorskip("torch._inductor.config")
    x = torch.ones(3)
    graph = capture(lambda x: (x + 1,), [x])
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert find_compiler() is None
        with pytest.raises(CompilerMissing, match=r"expected a C\+\+ compiler.*backend='fx'"):
            compile_graph(graph, [x])


@needs_compiler
def test_a_failure_is_one_line():
    graph = capture(lambda x: (x @ x,), [torch.ones(3, 3)])
    with pytest.raises(CannotCompile, match=r"expected a graph that Inductor compiles, got .*; use backend='fx'") as raised:
        compile_graph(graph, [torch.ones(2, 3)])
    assert not isinstance(raised.value, CompilerMissing)
    assert "\n" not in str(raised.value)


def test_larger_and_longer_graphs_pay_sooner():
    def graph(size, length):
        def run(x):
            for _ in range(length):
                x = torch.sin(x)
            return (x,)

        return capture(run, [torch.zeros(size)])

    assert steps_to_pay(graph(10, 30)) == steps_to_pay(graph(10, 30)) > steps_to_pay(graph(10, 60))
    assert steps_to_pay(graph(10, 30)) > steps_to_pay(graph(10**6, 30))
    assert steps_to_pay(graph(10, 0)) > 10**8  # nothing to fuse
