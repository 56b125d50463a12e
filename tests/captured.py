"""Eager runs of an objective beside replays of a captured one, from the same random state: the oracle of the capture tests."""

import pyro
import torch
from torch import Tensor, nn

from pyrovae.inference.capture.graph import Graph, capture


def check_replay(model, guide, objective, *args, dial: Tensor | None = None, **kwargs) -> Graph:
    """Capture loss and gradients, and compare three replays with eager runs to the bit.

    The second replay comes after a change of all parameters, the third after one of `dial`, a 0-d tensor; every other replay
    starts from another seed. Buffers and random states must end where eager ones do.
    """
    leaves = _leaves(model, guide, objective, args, kwargs)
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

    def run(*tensors):
        left = iter(tensors)
        some = [next(left) if isinstance(value, Tensor) else value for value in args]
        named = {name: next(left) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        _clear(leaves)
        losses = objective.loss_and_grads(model, guide, *some, **named)
        found = [torch.as_tensor(loss, dtype=torch.double) for loss in (losses if isinstance(losses, tuple) else (losses,))]
        return *found, *(leaf.grad for leaf in leaves)

    before = [buffer.clone() for buffer in _buffers(model, guide)]
    graph = capture(run, given)
    _clear(leaves)
    assert _same(before, _buffers(model, guide)), "the capture has moved a buffer"
    _compare(run, graph, given, (model, guide), 1)
    with torch.no_grad():
        for leaf in leaves:
            leaf.add_(0.1 * torch.randn_like(leaf))
    _compare(run, graph, given, (model, guide), 2)
    if dial is not None:
        dial.fill_(0.6)
        _compare(run, graph, given, (model, guide), 3)
    _clear(leaves)
    return graph


def _compare(run, graph, given, programs, seed):
    before = [buffer.clone() for buffer in _buffers(*programs)]
    torch.manual_seed(seed)
    expected = run(*given)
    ends = [buffer.clone() for buffer in _buffers(*programs)], torch.get_rng_state()
    with torch.no_grad():
        for buffer, content in zip(_buffers(*programs), before, strict=True):
            buffer.copy_(content)
    torch.manual_seed(seed)
    found = graph(given)
    assert any(value is not None and bool(value.abs().sum() > 0) for value in expected[1:]), "no gradient"
    for place, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert (a is None) == (b is None), f"output {place} of replay {seed}"
        assert a is None or torch.equal(a, b), f"output {place} of replay {seed} is off by {float((a - b).abs().max()):g}"
    assert _same(ends[0], _buffers(*programs)), "another buffer"
    assert torch.equal(ends[1], torch.get_rng_state()), "another number of draws"


def _leaves(model, guide, objective, args, kwargs):
    with pyro.poutine.trace(param_only=True) as used:
        objective.loss_and_grads(model, guide, *args, **kwargs)
    values = [site["value"] for site in used.trace.nodes.values()]
    leaves = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]
    assert leaves, "the objective used no parameter"
    return list({id(leaf): leaf for leaf in leaves}.values())


def _clear(leaves):
    for leaf in leaves:
        leaf.grad = None


def _buffers(*programs):
    found = []
    for program in programs:
        while hasattr(program, "program"):
            program = program.program
        found += list(program.buffers()) if isinstance(program, nn.Module) else []
    return found


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
