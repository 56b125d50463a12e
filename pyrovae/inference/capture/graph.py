"""A run of tensor code, recorded once as a flat graph of aten operations: forward, backward and random draws alike.

The programs run as they are, under all their handlers; what is recorded are the operations that torch is asked for. Existing
tensors (parameters, buffers, 0-d schedules) enter by reference, so that a replay sees their present contents.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from pyrovae.inference.capture.journal import Journal, undone
from pyrovae.inference.capture.quiet import CannotCapture, place, quiet
from pyrovae.ops.opaque import kept

_DYNAMIC = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_SAME = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)


@dataclass(frozen=True, eq=False)
class Graph:
    """A recorded run.

    Attributes:
        module: `forward(*inputs, *constants)` gives a tuple of tensors and Nones; it has no attributes of its own.
        num_inputs: how many inputs there are.
        constants: the existing tensors that it reads.
        state: existing tensors that a run changes in place, such as BatchNorm's statistics or persistent chains.
        read: tensors whose value became a Python number in the recorded run, with their version then.
        opaque: computations that are one operation each, whose replay runs Python code; see :mod:`pyrovae.ops.opaque`.
    """

    module: fx.GraphModule = field(repr=False)
    num_inputs: int
    constants: tuple[Tensor, ...] = field(repr=False)
    state: tuple[Tensor, ...] = field(repr=False)
    read: tuple[tuple[Tensor, int], ...] = field(default=(), repr=False)
    opaque: tuple[Any, ...] = field(default=(), repr=False)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Replay, with inputs of the recorded shapes; draws come from torch's generator as in an eager run."""
        with torch.no_grad():
            return self.module.forward(*inputs, *self.constants)

    def first(self, count: int) -> Graph:
        """The graph of the first `count` outputs alone."""
        graph = fx.Graph()
        outputs = graph.graph_copy(self.module.graph, {})
        assert isinstance(outputs, (tuple, list))
        graph.output(tuple(outputs[:count]))
        return replace(self, **_pruned(graph, self.num_inputs, self.constants))

    @property
    def num_nodes(self) -> int:
        """Operations of a run."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


def capture(function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor]) -> Graph:
    """Record a run of a function of tensors; afterwards nothing has moved, random states included.

    Cost: one run, and about a millisecond an operation.

    Args:
        function: of the inputs; returns tensors and Nones.
        inputs: example inputs.

    Raises:
        CannotCapture: where the run takes Python numbers or shapes from values that it computes, or fails.
    """
    with undone() as journal, quiet() as mode, kept() as opaque:
        tracked: Any = None
        outputs: tuple[Tensor | None, ...] = ()

        def run(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            nonlocal tracked, outputs
            tracked = get_proxy_mode().tracer.tensor_tracker  # type: ignore[union-attr]
            outputs = tuple(function(*tensors))
            return outputs

        drawn = _other_generators()
        try:
            module = make_fx(run)(*(tensor.detach() for tensor in inputs))  # as tensors of their own, whatever they alias
            if _other_generators() != drawn:
                raise CannotCapture(
                    "expected draws from torch's generator, got some of NumPy's or Python's, which a replay would repeat; "
                    "draw with torch"
                )
            _check_static(module)
            graph, constants = _lifted(module)
            _check_gradients(constants, outputs, tracked, journal)
        except CannotCapture as error:
            raise CannotCapture(str(error).splitlines()[0]) from error  # Pyro adds a table of shapes to what passes through it
        except Exception as error:
            what = str(error).splitlines()[0] if str(error) else ""
            if "value out of a tracing tensor" in what:
                what = "an operation reads the value of a tensor that the run computes"
            raise CannotCapture(
                f"expected a program that can be recorded, got {type(error).__name__} ({place(error.__traceback__)}): {what}; "
                "run it eagerly"
            ) from error
        for k, tensor in enumerate(inputs):
            if journal.has(tensor):
                raise CannotCapture(
                    f"expected programs that leave their arguments as they are, got one that writes its tensor {k}, of shape "
                    f"{tuple(tensor.shape)}, in place; write a copy"
                )
        state = tuple(tensor for tensor in constants if journal.has(tensor))
    found = _pruned(graph, len(inputs), constants)
    read = tuple((journal.read | mode.read).values())
    return Graph(num_inputs=len(inputs), state=state, read=read, opaque=tuple(opaque), **found)


def _other_generators() -> tuple[Any, ...]:
    """The states of Python's and NumPy's generators."""
    name, key, *rest = np.random.get_state()
    return random.getstate(), name, np.asarray(key).tobytes(), rest


def _check_gradients(constants: Sequence[Tensor], outputs: Sequence[Tensor | None], tracked: Any, journal: Journal) -> None:
    """Refuse gradients of parameters that the function does not return."""
    returned = {id(output) for output in outputs}
    learning = [x for x in constants if x.is_leaf and x.requires_grad and x.grad is not None]
    outside = [leaf for leaf in learning if leaf.grad in tracked and id(leaf.grad) not in returned]
    for leaf in outside:
        if leaf.grad is not None and not journal.has(leaf.grad):  # else it was there before, and gets its contents back
            leaf.grad = None
    if outside:
        raise CannotCapture(
            f"expected gradients of parameters that the programs name, got one of a parameter of shape "
            f"{tuple(outside[0].shape)} that no pyro.param or pyro.module statement of theirs names; name "
            "it, or turn its requires_grad off"
        )


def _check_static(module: fx.GraphModule) -> None:
    """Refuse operations whose shapes, or Python results, depend on values."""
    for node in module.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if any(tag in tags for tag in _DYNAMIC) and node.target is not torch.ops.aten.index.Tensor:
            raise CannotCapture(
                f"expected shapes that do not depend on values, got the operation {node.target}, whose result's do; write the "
                "program with masks and torch.where, or run it eagerly"
            )


def _lifted(module: fx.GraphModule) -> tuple[fx.Graph, tuple[Tensor, ...]]:
    """The graph with what it reads by attribute as further inputs."""
    old, graph = module.graph, fx.Graph()
    found: dict[int, tuple[Tensor, fx.Node]] = {}
    copied: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in old.nodes if node.op == "placeholder"]
    for k, node in enumerate(placeholders):
        copied[node] = graph.placeholder(f"input_{k}")
        copied[node].meta = dict(node.meta)
    for node in old.nodes:
        if node.op != "get_attr":
            continue
        tensor: Any = operator.attrgetter(node.target)(module)
        if not isinstance(tensor, Tensor):
            raise CannotCapture(
                f"expected programs of tensors and draws from torch's own generator, got a {type(tensor).__name__}; leave "
                "it out"
            )
        if id(tensor) not in found:
            found[id(tensor)] = (tensor, graph.placeholder(f"constant_{len(found)}"))
            found[id(tensor)][1].meta = dict(node.meta)
        copied[node] = found[id(tensor)][1]
    for node in old.nodes:
        if node in copied:
            continue
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: copied[n]))
        elif node.target in _SAME:
            copied[node] = copied[node.args[0]]
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    return graph, tuple(tensor for tensor, _ in found.values())


def _pruned(graph: fx.Graph, num_inputs: int, constants: tuple[Tensor, ...]) -> dict[str, Any]:
    """Module and constants, without dead code and constants that nothing reads."""
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"][num_inputs:]
    used = tuple(tensor for tensor, node in zip(constants, placeholders, strict=True) if node.users)
    for node in placeholders:
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    return {"module": fx.GraphModule({}, graph), "constants": used}
