"""Forward-backward against the list of all paths, and its routes against one another."""

import itertools
import math

import pytest
import torch

from pyrovae.ops import forward_backward as module
from pyrovae.ops.forward_backward import Logarithmic, Scaled, forward_backward


def chain(rows=3, length=5, states=3, spread=1.0):
    torch.manual_seed(2)
    initial, transition = torch.randn(states).log_softmax(-1), torch.randn(states, states).log_softmax(-1)
    return initial, transition, spread * torch.randn(rows, length, states)


class Listed:
    """Everything by the list of all paths."""

    def __init__(self, log_initial, log_transition, log_likelihood, lengths=None):
        rows, length, states = log_likelihood.shape
        lengths = torch.full((rows,), length) if lengths is None else lengths
        self.paths = torch.tensor(list(itertools.product(range(states), repeat=length)))
        prior = log_initial[self.paths[:, 0]] + log_transition[self.paths[:, :-1], self.paths[:, 1:]].sum(-1)
        seen = torch.arange(length) < lengths.unsqueeze(-1)
        emitted = torch.stack([log_likelihood[:, t, self.paths[:, t]].T for t in range(length)], -1)  # [S, B, L]
        self.joint = prior.unsqueeze(-1) + torch.where(seen, emitted, 0.0).sum(-1)
        self.log_evidence = torch.logsumexp(self.joint, 0)
        self.weights = torch.softmax(self.joint, 0)
        is_state = (self.paths.unsqueeze(-1) == torch.arange(states)).double()  # [S, L, K]
        self.marginals = torch.einsum("sb,slk->lbk", self.weights, is_state)
        self.initial = self.marginals[0].sum(0)
        self.transition = torch.einsum(
            "sb,bt,sti,stj->ij", self.weights, seen[:, 1:].double(), is_state[:, :-1], is_state[:, 1:]
        )
        self.pairs = torch.einsum("sb,sti,stj->bij", self.weights, is_state[:, :-1], is_state[:, 1:])


def agree(sums, listed, tolerance=1e-10):
    pairs = [
        (sums.log_evidence, listed.log_evidence),
        (sums.marginals, listed.marginals),
        (sums.counts.initial, listed.initial),
        (sums.counts.transition, listed.transition),
        (sums.pair_sum(sums.transition), (listed.pairs * sums.transition).sum((-1, -2))),
    ]
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


@pytest.mark.parametrize("lengths", [None, [5, 1, 3]])
@pytest.mark.parametrize("spread", [0.5, 30.0])
@pytest.mark.parametrize("route", [Scaled, Logarithmic])
def test_all_paths(lengths, spread, route, monkeypatch):
    given = chain(spread=spread)
    lengths = None if lengths is None else torch.tensor(lengths)
    if route is Logarithmic:
        monkeypatch.setattr(module, "_SMALLEST", 1.0)
    sums = forward_backward(*given, lengths)
    assert type(sums) is route
    listed = Listed(*given, lengths)
    assert agree(sums, listed)
    # and each of these notices another chain, other data, other lengths
    initial, transition, seen = given
    assert not agree(sums, Listed(initial, transition.T.log_softmax(-1), seen, lengths))
    assert not agree(sums, Listed(initial, transition, seen + 1e-6 * torch.randn_like(seen), lengths))
    assert not agree(sums, Listed(initial, transition, seen, torch.tensor([4, 1, 3])))


def test_weighted_counts():
    given = chain()
    weights = torch.tensor([0.0, 2.0, -1.0])
    for route in (Scaled, Logarithmic):
        sums = route(*given, None)
        parts = [forward_backward(*given[:2], given[2][i : i + 1]).counts for i in range(3)]
        counts = sums.weighted_counts(weights)
        assert torch.allclose(counts.initial, sum(w * c.initial for w, c in zip(weights, parts, strict=True)))
        assert torch.allclose(counts.transition, sum(w * c.transition for w, c in zip(weights, parts, strict=True)))


def test_paths():
    given = chain()
    for route in (Scaled, Logarithmic):
        sums, listed = route(*given, None), Listed(*given)
        assert torch.equal(sums.viterbi(), listed.paths[listed.joint.argmax(0)])
        z = listed.paths.unsqueeze(1).expand(-1, 3, -1)
        assert torch.allclose(sums.path_log_prob(z), listed.joint)
        assert sums.sample(4).shape == (4, 3, 5)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 300, 1025])
def test_pieces(length):
    """Few long sequences walked in pieces, against the logarithms, at unequal lengths."""
    initial, transition, seen = chain(2, length)
    lengths = torch.tensor([length, (length + 1) // 2])
    sums = forward_backward(initial, transition, seen, lengths)
    other = Logarithmic(initial, transition, torch.where(sums.unseen.T.unsqueeze(-1), 0.0, seen), sums.unseen)
    assert type(sums) is Scaled
    for a, b in [
        (sums.log_evidence, other.log_evidence),
        (sums.marginals, other.marginals),
        (sums.counts.transition, other.counts.transition),
    ]:
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_out_of_range():
    """A left-to-right chain whose data speak for its last state from the start: no scaled message survives."""
    states, length = 4, 30
    transition = torch.full((states, states), -math.inf)
    for k in range(states):
        transition[k, k : k + 2] = math.log(0.5) if k < states - 1 else 0.0
    initial = torch.tensor([0.0] + [-math.inf] * (states - 1))
    seen = torch.zeros(2, length, states)
    seen[:, :20, 0] = -500.0
    sums = forward_backward(initial, transition, seen)
    assert type(sums) is Logarithmic
    short = forward_backward(initial, transition, seen[:, 15:22])
    assert agree(short, Listed(initial, transition, seen[:, 15:22]), 1e-8)
    assert torch.isfinite(sums.log_evidence).all()
    assert torch.allclose(sums.marginals.sum(-1), torch.ones(length, 2))
    far = torch.full((1, 3, 2), -5000.0)
    far[0, 1, 0] = 0.0
    assert agree(forward_backward(torch.zeros(2).log_softmax(0), torch.zeros(2, 2).log_softmax(-1), far),
                 Listed(torch.zeros(2).log_softmax(0), torch.zeros(2, 2).log_softmax(-1), far))  # fmt: skip


def test_impossible():
    half = torch.full((2,), 0.5).log()
    seen = torch.zeros(2, 3, 2)
    seen[1, 1] = -math.inf
    sums = forward_backward(half, half.expand(2, 2), seen)
    assert sums.log_evidence.tolist() == [0.0, -math.inf]
    with pytest.raises(ValueError, match="probability 0 for row 1"):
        sums.check_possible()


def test_no_table_of_pairs():
    """Neither route makes a tensor of times, states and states."""
    initial, transition, seen = chain(2, 40, 30)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    for route in (Scaled, Logarithmic):
        with Watch():
            sums = route(initial, transition, seen, None)
            sums.marginals, sums.counts, sums.pair_sum(transition), sums.viterbi(), sums.sample(1)
        assert largest <= seen.numel()
