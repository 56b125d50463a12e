"""A captured graph compiled by Inductor, PyTorch's compiler: elementwise operations fused, less Python between them.

The graph is flat aten code already, so TorchDynamo, its guards and its checks of every call are left out. Draws stay eager's
(`fallback_random`): for the same seed, outputs equal the graph's up to rounding.

PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation,
    Jason Ansel and others (2024), https://doi.org/10.1145/3620665.3640366
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from pyrovae.inference.capture.graph import Graph

Run = Callable[[Sequence[Tensor]], tuple[Tensor | None, ...]]

# The model of `steps_to_pay`: chosen near times of VAEs on a two-core CPU, not derived.
_COMPILE = 5.0, 0.015  # seconds: to begin with (15 for the first graph on a machine, 1 with a full cache), and an operation
_SAVED = 12e-6, 1e10  # seconds for each fused operation, and the bytes a second at which its result is no longer moved


class CannotCompile(RuntimeError):
    """A graph that Inductor does not compile; the message says why, and what to do."""


class CompilerMissing(CannotCompile):
    """No compiler for the code that Inductor writes: C++ on CPUs, Triton on GPUs."""


def compile_graph(graph: Graph, inputs: Sequence[Tensor]) -> Run:
    """A function of inputs that does what `graph` does, faster.

    Constants and state are read and written by reference. Outputs have the strides that the graph's have. Inputs must have the
    examples' shapes, strides, dtypes and devices. The code is for the present `torch.get_num_threads()`.

    Cost: some ten seconds for the first graph on a machine, then a few seconds for hundreds of operations; about one second
    where torch's cache on disk has the same graph. A call takes some 35 µs on top of the operations.

    Args:
        graph: a recorded run.
        inputs: example inputs.

    Raises:
        CompilerMissing: if there is no compiler for the tensors' devices.
        CannotCompile: if Inductor fails.
    """
    examples = [tensor.detach() for tensor in (*inputs, *graph.constants)]
    _check_compiler({tensor.device.type for tensor in examples})
    try:
        compiled = _compiled(graph.module, examples)
    except Exception as error:
        raise CannotCompile(
            f"expected a graph that Inductor compiles, got {_reason(error)}; use backend='fx', which needs no compiler"
        ) from error
    constants = graph.constants

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            return tuple(compiled(*inputs, *constants))

    return run


def find_compiler() -> str | None:
    """The C++ compiler that Inductor uses, None where there is none."""
    try:
        with _hushed():
            from torch._inductor.cpp_builder import get_cpp_compiler

            return get_cpp_compiler()
    except Exception:  # of a torch without Inductor, of a compiler that does not start
        return None


def steps_to_pay(graph: Graph) -> int:
    """Replays after which compiling has taken less time than it saves, by the counts of operations and bytes alone.

    An estimate that is the same on every machine and in every run: choices that follow from it can be repeated.
    """
    operations = [node for node in graph.module.graph.nodes if node.op == "call_function"]
    fused = [node for node in operations if torch.Tag.pointwise in getattr(node.target, "tags", ())]
    start, each = _COMPILE
    saved, speed = _SAVED
    gain = sum(saved + 2 * _num_bytes(node) / speed for node in fused)
    return math.ceil((start + each * len(operations)) / gain) if fused else 10**9


def _compiled(module: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    """The function that Inductor writes for a flat graph."""
    with _hushed():
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # Static shapes, yet with an environment of shapes: without one Inductor leaves out its cache on disk.
        fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
        patch = {"fallback_random": True, "triton.cudagraphs": False}
        with config.patch(patch), tracing(TracingContext(fake)), torch.no_grad():
            fakes = [fake.from_tensor(tensor, static_shapes=True) for tensor in examples]
            run: Any = compile_fx(_copy(module), fakes)
            return run


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy for Inductor, which changes its graph; without notes of where operations come from, which its cache would heed.

    Inductor draws `bernoulli` by comparing float32 uniforms, `bernoulli_` as eager torch does: the one is written as the other.
    """
    aten = torch.ops.aten
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        node.meta.clear()
        if node.target is aten.bernoulli.default:
            with graph.inserting_before(node):
                place = graph.call_function(aten.empty_like.default, node.args[:1])
                draw = graph.call_function(aten.bernoulli_.Tensor, (place, *node.args), node.kwargs)
            node.replace_all_uses_with(draw)
            graph.erase_node(node)
    return fx.GraphModule({}, graph)


def _check_compiler(devices: set[str]) -> None:
    if "cpu" in devices and find_compiler() is None:
        raise CompilerMissing(
            "expected a C++ compiler for Inductor, got none; install one such as g++ or name it in the environment variable "
            "CXX, or use backend='fx', which needs none"
        )
    if devices & {"cuda", "xpu"}:
        with _hushed():
            from torch.utils._triton import has_triton

            if not has_triton():
                raise CompilerMissing(
                    "expected Triton for Inductor on a GPU, got none that works; install the triton package of this torch, "
                    "or use backend='fx', which needs none"
                )


def _reason(error: Exception) -> str:
    """An error in a line: the compiler's first complaint, if it is one of those."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaints = [line for line in lines if "error:" in line]
    return f"{type(error).__name__}: {(complaints or lines or ['no message'])[0]}"


def _num_bytes(node: fx.Node) -> int:
    """Bytes of an operation's result; 0 where the graph does not know."""
    meta = node.meta.get("tensor_meta", node.meta.get("val"))
    shape, dtype = getattr(meta, "shape", None), getattr(meta, "dtype", None)
    return 0 if shape is None or dtype is None else math.prod(shape) * dtype.itemsize


@contextmanager
def _hushed() -> Iterator[None]:
    """Keeps the warnings and log lines of torch's compilers, which are for their authors, from the user."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
