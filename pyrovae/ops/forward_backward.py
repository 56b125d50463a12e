"""The forward-backward algorithm on batches of sequences of unequal lengths: exact sums over all paths of a hidden chain.

With messages α_t = b_t ∘ (Aᵀ α_{t−1}) and ω_t = b_t ∘ (A ω_{t+1}), where b_t is the likelihood of what is seen at time t,

    p(z_t = i | x) ∝ α_t(i) (A ω_{t+1})(i),      p(z_t = i, z_{t+1} = j | x) ∝ α_t(i) A_ij ω_{t+1}(j),

with one and the same constant, so that messages may be rescaled at will: only the evidence needs the scales. A sum over
pairs is one matrix product; no table over times, states and states is ever stored. Everything runs in float64. Where scaled
messages come near the end of its range, logarithms are used instead, at several times the cost.

Unseen times have b = 1. Few long sequences are cut into about √L pieces that are walked side by side.

References:
    A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition (Rabiner, 1989)
    https://doi.org/10.1109/5.18626
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST = 1e-120  # a message that shrinks below this between two rescalings is computed anew in logarithms
_EVERY = 8  # steps between rescalings, or more where likelihoods differ little
_CHUNKED = 40_000  # rows x K^3 below which the products of K x K matrices cost less than the steps that they save


class Counts(NamedTuple):
    """Expected numbers over the seen times of all sequences: of first states `[K]`, and of transitions `[K, K]`."""

    initial: Tensor
    transition: Tensor


def forward_backward(
    log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, lengths: Tensor | None = None
) -> ForwardBackward:
    """Sum over all paths of a hidden chain; the forward pass is made at once, the backward pass when it is asked for.

    Exact, in float64. Time O(B L K²), in L steps (about 3 √L for few long sequences), memory O(B L K).

    Args:
        log_initial: log p(z_1), `[K]`.
        log_transition: log p(z_{t+1} = column | z_t = row), `[K, K]`, normalised rows; −inf where impossible.
        log_likelihood: log p(x_t | z_t = k), `[B, L, K]`.
        lengths: how many times of each sequence are seen, `[B]`; None for all.

    Example:
        >>> half = torch.full((2,), 0.5).log()
        >>> sums = forward_backward(half, half.expand(2, 2), torch.full((1, 3, 2), -1.5))
        >>> round(float(sums.log_evidence), 4)
        -4.5
    """
    log_likelihood, unseen = log_likelihood.detach(), None
    if lengths is not None:
        times = torch.arange(log_likelihood.shape[1], device=lengths.device)
        unseen = times.unsqueeze(-1) >= lengths  # [L, B]
        log_likelihood = log_likelihood.masked_fill(unseen.T.unsqueeze(-1), 0.0)
    chain = (log_initial.detach().double(), log_transition.detach().double(), log_likelihood, unseen)
    try:
        return Scaled(*chain)
    except FloatingPointError:
        return Logarithmic(*chain)


class ForwardBackward(ABC):
    """The posterior of a batch of paths. Times stand first: `[L, B, …]`.

    Attributes:
        log_evidence: log p(x), `[B]`; −inf where no path is possible.
    """

    log_evidence: Tensor

    def __init__(self, log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, unseen: Tensor | None) -> None:
        self.log_initial, self.log_transition = log_initial, log_transition
        self.given, self.unseen = log_likelihood, unseen
        self.transition = log_transition.exp()

    @cached_property
    def log_likelihood(self) -> Tensor:
        """Log p(x_t | z_t = k), `[L, B, K]` in float64."""
        return self.given.transpose(0, 1).double()

    @property
    @abstractmethod
    def marginals(self) -> Tensor:
        """p(z_t = k | x), `[L, B, K]`."""

    @cached_property
    def counts(self) -> Counts:
        """Expected numbers of first states and of transitions between seen times."""
        return self.weighted_counts(None)

    def weighted_counts(self, weights: Tensor | None) -> Counts:
        """The same with each sequence counting `weights [B]` times."""
        first = self.marginals[0]
        if self.unseen is not None:
            first = first.masked_fill(self.unseen[0].unsqueeze(-1), 0.0)
        return Counts(first.sum(0) if weights is None else weights @ first, self._transitions(weights))

    @abstractmethod
    def _transitions(self, weights: Tensor | None) -> Tensor:
        """Expected numbers of transitions between seen times, `[K, K]`."""

    @abstractmethod
    def pair_sum(self, table: Tensor) -> Tensor:
        """E[Σ_t table(z_t, z_{t+1})] over all times, unseen ones too, `[B]`; differentiable in the table `[K, K]`."""

    @abstractmethod
    def sample(self, n: int) -> Tensor:
        """`n` independent paths from p(z | x), `[n, B, L]`, walking back from the last time."""

    def path_log_prob(self, z: Tensor) -> Tensor:
        """Log p(z, x) of paths `[n, B, L]`, `[n, B]`."""
        log_prob = self.log_initial[z[..., 0]] + self.log_transition[z[..., :-1], z[..., 1:]].sum(-1)
        table = self.log_likelihood.permute(1, 0, 2).expand(z.shape + self.log_initial.shape)
        return log_prob + table.gather(-1, z.unsqueeze(-1)).squeeze(-1).sum(-1)

    def viterbi(self) -> Tensor:
        """The most probable path of each sequence, `[B, L]`; the first state of several equal ones."""
        length, rows, states = self.log_likelihood.shape
        score = self.log_initial + self.log_likelihood[0]
        back = torch.empty((length - 1, rows, states), dtype=torch.long, device=score.device)
        for t in range(1, length):
            best, back[t - 1] = (score.unsqueeze(-1) + self.log_transition).max(-2)
            score = best + self.log_likelihood[t]
        path = [score.argmax(-1)]
        for pointers in reversed(back.unbind(0)):
            path.append(pointers.gather(-1, path[-1].unsqueeze(-1)).squeeze(-1))
        return torch.stack(path[::-1], -1)

    def check_possible(self) -> None:
        """Refuse sequences that no path can have emitted: they have no posterior.

        Raises:
            ValueError: with the first of them.
        """
        if not bool((self.log_evidence > -math.inf).all()):
            row = int((self.log_evidence == -math.inf).int().argmax())
            raise ValueError(
                f"expected sequences that the chain can emit, got probability 0 for row {row}: it has no posterior; give "
                "impossible states or transitions a small probability"
            )


class Scaled(ForwardBackward):
    """Messages rescaled every few steps.

    Raises:
        FloatingPointError: if they leave the range of float64.
    """

    def __init__(self, log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, unseen: Tensor | None) -> None:
        super().__init__(log_initial, log_transition, log_likelihood, unseen)
        emission, shift, every = _likelihoods(self.log_likelihood)
        alpha, log_scale = _walk(log_initial.exp(), self.transition, emission, every)
        self.log_evidence = log_scale + shift
        into = self.transition.T.contiguous()
        self.omega, _ = _walk(torch.ones_like(log_initial), into, emission, every, reverse=True)
        # From here on the likelihoods' memory holds A ω, then the marginals; α is rescaled so that α · A ω = 1.
        joint = emission
        torch.mm(self.omega[1:].flatten(0, 1), into, out=joint[:-1].flatten(0, 1))
        joint[-1] = 1.0
        total = joint.mul_(alpha).sum(-1, keepdim=True)
        if not float(total.min()) >= _SMALLEST**2:
            raise FloatingPointError("scaled messages left the range of float64")
        self.alpha, self._marginals = alpha.div_(total), joint.div_(total)

    @property
    def marginals(self) -> Tensor:
        """p(z_t = k | x), `[L, B, K]`."""
        return self._marginals

    def _transitions(self, weights: Tensor | None) -> Tensor:
        alpha = self.alpha[:-1] if weights is None else self.alpha[:-1] * weights.unsqueeze(-1)
        if self.unseen is not None:
            alpha = alpha.masked_fill(self.unseen[1:].unsqueeze(-1), 0.0)
        return (alpha.flatten(0, 1).T @ self.omega[1:].flatten(0, 1)) * self.transition

    def pair_sum(self, table: Tensor) -> Tensor:
        """E[Σ_t table(z_t, z_{t+1})], `[B]`."""
        possible = torch.where(torch.isfinite(table), table, 0.0) * self.transition
        value = ((self.omega[1:] @ possible.T) * self.alpha[:-1]).sum((0, -1))
        lost = self.transition * (table == -math.inf)
        if bool(lost.any()):
            value = torch.where(((self.omega[1:] @ lost.T) * self.alpha[:-1]).sum((0, -1)) > 0, -math.inf, value)
        return value

    def sample(self, n: int) -> Tensor:
        """`n` paths, `[n, B, L]`."""
        into = self.transition.T.contiguous()
        z = [_draw(self.alpha[-1].expand(n, -1, -1))]
        for alpha in reversed(self.alpha[:-1].unbind(0)):
            z.append(_draw(alpha * into[z[-1]]))
        return torch.stack(z[::-1], -1)


class Logarithmic(ForwardBackward):
    """Messages in logarithms: nothing can be lost, at a cost of O(B K²) exponentials a step."""

    def __init__(self, log_initial: Tensor, log_transition: Tensor, log_likelihood: Tensor, unseen: Tensor | None) -> None:
        super().__init__(log_initial, log_transition, log_likelihood, unseen)
        alpha = [log_initial + self.log_likelihood[0]]
        for seen in self.log_likelihood[1:].unbind(0):
            alpha.append(torch.logsumexp(alpha[-1].unsqueeze(-1) + log_transition, -2) + seen)
        self.log_alpha = torch.stack(alpha)
        self.log_evidence = torch.logsumexp(alpha[-1], -1)

    @cached_property
    def log_omega(self) -> Tensor:
        """Log ω, `[L, B, K]`."""
        omega = [self.log_likelihood[-1]]
        for seen in reversed(self.log_likelihood[:-1].unbind(0)):
            omega.append(torch.logsumexp(self.log_transition + omega[-1].unsqueeze(-2), -1) + seen)
        return torch.stack(omega[::-1])

    @cached_property
    def marginals(self) -> Tensor:
        """p(z_t = k | x), `[L, B, K]`."""
        after = [torch.logsumexp(self.log_transition + omega.unsqueeze(-2), -1) for omega in self.log_omega[1:].unbind(0)]
        return torch.softmax(self.log_alpha + torch.stack([*after, torch.zeros_like(self.log_omega[0])]), -1)

    def _transitions(self, weights: Tensor | None) -> Tensor:
        pairs = self._pairs(seen=True)
        return pairs.sum(0) if weights is None else (pairs * weights[:, None, None]).sum(0)

    def pair_sum(self, table: Tensor) -> Tensor:
        """E[Σ_t table(z_t, z_{t+1})], `[B]`."""
        pairs = self._pairs(seen=False)
        return (pairs * torch.where(pairs > 0, table, 0.0)).sum((-1, -2))

    def sample(self, n: int) -> Tensor:
        """`n` paths, `[n, B, L]`."""
        into = self.log_transition.T.contiguous()
        z = [_draw(torch.softmax(self.log_alpha[-1], -1).expand(n, -1, -1))]
        for alpha in reversed(self.log_alpha[:-1].unbind(0)):
            z.append(_draw(torch.softmax(alpha + into[z[-1]], -1)))
        return torch.stack(z[::-1], -1)

    def _pairs(self, *, seen: bool) -> Tensor:
        """Σ_t p(z_t, z_{t+1} | x), over seen times only or all, `[B, K, K]`."""
        states = self.log_initial.numel()
        total = self.log_alpha.new_zeros((self.log_alpha.shape[1], states, states))
        for t in range(len(self.log_alpha) - 1):
            joint = self.log_alpha[t].unsqueeze(-1) + self.log_transition + self.log_omega[t + 1].unsqueeze(-2)
            pair = (joint - self.log_evidence[:, None, None]).exp()
            total += pair.masked_fill(self.unseen[t + 1][:, None, None], 0.0) if seen and self.unseen is not None else pair
        return total


def _likelihoods(log_likelihood: Tensor) -> tuple[Tensor, Tensor, int]:
    """Likelihoods up to factors, `[L, B, K]`; the log of the factors, `[B]` or 0-d; steps between rescalings.

    Where they differ little, one factor serves all, and α shrinks at most by e^−range a step.
    """
    low, high = log_likelihood.aminmax()
    spread = float(high - low)
    if spread <= -math.log(_SMALLEST) / _EVERY:
        every = min(4 * _EVERY, int(-math.log(_SMALLEST) / max(spread, 1e-3)))
        return (log_likelihood - high).exp_().contiguous(), high * len(log_likelihood), every
    largest = log_likelihood.amax(-1, keepdim=True).clamp_(min=torch.finfo(log_likelihood.dtype).min)  # [L, B, 1]
    return (log_likelihood - largest).exp_().contiguous(), largest.sum((0, -1)), _EVERY


def _walk(start: Tensor, matrix: Tensor, emission: Tensor, every: int, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Messages m_t = e_t ∘ (m_{t−1} M) from m_1 = e_1 ∘ start, each up to a factor, and log Σ m_L, `[B]`."""
    length, rows, states = emission.shape
    if length >= 256 and rows * states**3 < _CHUNKED:
        messages, log_total = _walk_pieces(start, matrix, emission.flip(0) if reverse else emission, every)
        return messages.flip(0) if reverse else messages, log_total
    return _walk_steps(start, matrix, emission, every, reverse=reverse)


def _walk_steps(start: Tensor, matrix: Tensor, emission: Tensor, every: int, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """One time after another; `start` is `[K]` or `[B, K]`."""
    messages = torch.empty_like(emission)
    times = list(zip(messages.unbind(0), emission.unbind(0), strict=True))
    if reverse:
        times.reverse()
    before, seen = times[0]
    torch.mul(start, seen, out=before)
    scales = []
    for t, (message, seen) in enumerate(times[1:], 1):
        torch.mm(before, matrix, out=message).mul_(seen)
        before = message
        if t % every == 0:
            scales.append(message.sum(-1, keepdim=True))
            message.div_(scales[-1])
    scales.append(before.sum(-1, keepdim=True))
    scale = torch.stack(scales)
    if not float(scale.min()) >= _SMALLEST:
        raise FloatingPointError("scaled messages left the range of float64")
    return messages, scale.log_().sum((0, -1))


def _walk_pieces(start: Tensor, matrix: Tensor, emission: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """About √L pieces side by side: their products of matrices, then the messages at their starts, then all others."""
    length, rows, states = emission.shape
    steps = math.isqrt(length - 1) + 1
    pieces = -(-length // steps)
    padding = emission.new_ones((steps * pieces - length, rows, states))  # M keeps sums, or ones, where nothing is seen
    e = torch.cat((emission, padding)).reshape(pieces, steps, rows, states).transpose(0, 1)  # [T, C, B, K]
    firsts = torch.cat((torch.eye(states, dtype=e.dtype, device=e.device).unsqueeze(0), matrix.expand(pieces - 1, -1, -1)))
    wide = e.unsqueeze(3).expand(-1, -1, -1, states, -1)
    product, scale = _product(firsts.unsqueeze(1).expand(-1, rows, -1, -1), matrix, wide, every)  # [C, B, K, K], [C, B, K]
    entry, log_entry = [start.expand(rows, -1)], [emission.new_zeros(rows)]
    for p, s in zip(product[:-1].unbind(0), scale[:-1].unbind(0), strict=True):
        log_weight = entry[-1].log() + s
        shift = log_weight.amax(-1, keepdim=True)
        after = ((log_weight - shift).exp().unsqueeze(-2) @ p).squeeze(-2)
        total = after.sum(-1, keepdim=True)
        entry.append(after / total)
        log_entry.append(log_entry[-1] + (shift + total.log()).squeeze(-1))
    starts = torch.cat((entry[0].unsqueeze(0), torch.stack(entry[1:]) @ matrix)) if pieces > 1 else entry[0].unsqueeze(0)
    messages, log_total = _walk_steps(starts.flatten(0, 1), matrix, e.flatten(1, 2), every)
    messages = messages.reshape(steps, pieces, rows, states).transpose(0, 1).flatten(0, 1)[:length]
    return messages, log_entry[-1] + log_total.reshape(pieces, rows)[-1]


def _product(first: Tensor, matrix: Tensor, emission: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Rows of products of the pieces' matrices, each up to a factor, and its log."""
    message = (first * emission[0]).flatten(0, -2)
    log_scale = message.new_zeros((len(message), 1))
    shape = emission.shape[1:]
    for t in range(1, len(emission)):
        message = (message @ matrix).reshape(shape).mul_(emission[t]).flatten(0, -2)
        if t % every == 0 or t == len(emission) - 1:
            scale = message.sum(-1, keepdim=True)
            message.div_(scale.clamp_min(torch.finfo(scale.dtype).tiny))
            log_scale += scale.log()  # −inf for a row that is impossible
    return message.reshape(shape), log_scale.reshape(shape[:-1])


def _draw(weights: Tensor) -> Tensor:
    """One state a row from weights `[..., K]`, `[...]`; never one of weight 0."""
    total = weights.cumsum(-1)
    u = torch.rand(total.shape[:-1], dtype=total.dtype, device=total.device).unsqueeze(-1)
    return (total / total[..., -1:] <= u).sum(-1)
