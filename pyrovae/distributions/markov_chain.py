"""A Markov chain over finitely many states, as a distribution over whole paths."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyrovae.ops.states import index_to_codes
from pyrovae.ops.tracing import capturing

_MAX_STATES = 2**20  # of paths that `enumerate_support` lists
_MAX_TABLE = 2**22  # of numbers that sampling holds at once to save time


class MarkovChain(TorchDistribution):
    """p(z_1, …, z_L) = π(z_1) Π_t A(z_t, z_{t+1}) over states 0 … K − 1, one event of L integers.

    `log_prob` is exact, at O(L) a path; `sample` walks along the chain, all paths at once; marginals, mean and variance take
    O(L K²). States and transitions of probability 0 are allowed. The number of paths is K^L: `enumerate_support` lists them
    up to 2^20; where one latent chain emits the data, :class:`pyrovae.inference.Exact` sums over all paths in O(L K²) for the
    models that declare a chain (:class:`pyrovae.models.HiddenMarkovModel`).

    Args:
        initial: probabilities π of the first state, `[*batch, K]`, normalised over the last dim; or None with `initial_logits`.
        transition: `[*batch, K, K]`, row i the probabilities of the state that follows i; or None with `transition_logits`.
        length: number of times L.
        initial_logits: unnormalised log probabilities instead, `[*batch, K]`; −inf is probability 0.
        transition_logits: likewise, `[*batch, K, K]`.
        validate_args: as in torch.

    Raises:
        ValueError: if a parameter is given twice or not at all, shapes do not agree, `length` < 1, or a row is negative, NaN
            or sums to 0.

    Example:
        >>> chain = MarkovChain(torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), 3)
        >>> round(float(chain.log_prob(torch.tensor([0, 0, 1])).exp()), 4)
        0.045

    References:
        A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition (Rabiner, 1989)
        https://doi.org/10.1109/5.18626
    """

    arg_constraints = {  # noqa: RUF012  as torch writes it
        "initial": constraints.simplex,
        "transition": constraints.independent(constraints.simplex, 1),
        "initial_logits": constraints.independent(constraints.real, 1),
        "transition_logits": constraints.independent(constraints.real, 2),
    }
    has_enumerate_support = True
    log_initial: Tensor
    log_transition: Tensor

    def __init__(
        self,
        initial: Tensor | None = None,
        transition: Tensor | None = None,
        length: int = 1,
        *,
        initial_logits: Tensor | None = None,
        transition_logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (initial is None) == (initial_logits is None) or (transition is None) == (transition_logits is None):
            raise ValueError(
                "expected each of initial and transition once, as probabilities or as logits (initial_logits, "
                "transition_logits), got one of them twice or not at all"
            )
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"expected a length >= 1, got {length!r}")
        self.length = length
        self.log_initial = _log_rows(initial, initial_logits, "initial")
        self.log_transition = _log_rows(transition, transition_logits, "transition")
        states = self.log_initial.shape[-1]
        if self.log_transition.dim() < 2 or self.log_transition.shape[-2:] != (states, states):
            raise ValueError(
                f"expected initial [*batch, K] and transition [*batch, K, K], got {list(self.log_initial.shape)} and "
                f"{list(self.log_transition.shape)}"
            )
        batch = torch.broadcast_shapes(self.log_initial.shape[:-1], self.log_transition.shape[:-2])
        super().__init__(batch, Size((length,)), validate_args=False)  # rows were checked above
        self._validate_args = torch.distributions.Distribution._validate_args if validate_args is None else validate_args

    @property
    def num_states(self) -> int:
        """K."""
        return self.log_initial.shape[-1]

    @property
    def support(self) -> Any:
        """Vectors of L integers in 0 … K − 1."""
        return constraints.independent(constraints.integer_interval(0, self.num_states - 1), 1)

    @property
    def initial(self) -> Tensor:
        """π, `[*batch, K]`."""
        return self.log_initial.exp().expand(self.batch_shape + (self.num_states,))

    @property
    def transition(self) -> Tensor:
        """A, `[*batch, K, K]`."""
        return self.log_transition.exp().expand(self.batch_shape + (self.num_states, self.num_states))

    @property
    def initial_logits(self) -> Tensor:
        """Log π, `[*batch, K]`."""
        return self.log_initial.expand(self.batch_shape + (self.num_states,))

    @property
    def transition_logits(self) -> Tensor:
        """Log A, `[*batch, K, K]`."""
        return self.log_transition.expand(self.batch_shape + (self.num_states, self.num_states))

    @lazy_property
    def marginals(self) -> Tensor:
        """p(z_t = k), `[*batch, L, K]`, differentiable."""
        probs, transition = [self.initial], self.log_transition.exp()
        for _ in range(self.length - 1):
            probs.append((probs[-1].unsqueeze(-2) @ transition).squeeze(-2))
        return torch.stack(probs, -2)

    @property
    def mean(self) -> Tensor:
        """E[z_t], `[*batch, L]`."""
        marginals: Tensor = self.marginals
        return marginals @ torch.arange(self.num_states, dtype=marginals.dtype, device=marginals.device)

    @property
    def variance(self) -> Tensor:
        """Var[z_t], `[*batch, L]`."""
        marginals: Tensor = self.marginals
        states = torch.arange(self.num_states, dtype=marginals.dtype, device=marginals.device)
        return (marginals * (states - self.mean.unsqueeze(-1)) ** 2).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p of paths `[..., L]`, `[...]`; differentiable."""
        if self._validate_args:
            self._validate_sample(value)
        z, k = value.long(), self.num_states
        if self.log_initial.dim() == 1 and self.log_transition.dim() == 2:
            steps = self.log_transition.flatten()[z[..., :-1] * k + z[..., 1:]]
            return (self.log_initial[z[..., 0]] + steps.sum(-1)).expand(torch.broadcast_shapes(self.batch_shape, z.shape[:-1]))
        shape = torch.broadcast_shapes(self.batch_shape, z.shape[:-1])
        z = z.expand(shape + z.shape[-1:])
        first = self.log_initial.expand((*shape, k)).gather(-1, z[..., :1]).squeeze(-1)
        table = self.log_transition.expand((*shape, k, k)).flatten(-2)
        return first + table.gather(-1, z[..., :-1] * k + z[..., 1:]).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent paths, `[*sample, *batch, L]`, by the inverse of the cumulative probabilities at each time."""
        shape = Size(sample_shape) + self.batch_shape
        first, following = _cumulative(self.log_initial), _cumulative(self.log_transition)
        u = torch.rand((self.length, *shape), dtype=first.dtype, device=first.device)
        z = [(first <= u[0].unsqueeze(-1)).sum(-1)]
        if following.dim() == 2 and u.numel() * self.num_states <= _MAX_TABLE:
            # What follows each state at each time, looked up at once: the walk is one gather a step.
            after = torch.searchsorted(following, u[1:].reshape(1, -1).expand(self.num_states, -1).contiguous(), right=True)
            after = after.reshape((self.num_states, self.length - 1, *shape)).movedim(0, -1)
            for table in after.unbind(0):
                z.append(table.gather(-1, z[-1].unsqueeze(-1)).squeeze(-1))
            return torch.stack(z, -1)
        for now in u[1:].unbind(0):
            row = following[z[-1]] if following.dim() == 2 else _rows(following, z[-1])
            z.append((row <= now.unsqueeze(-1)).sum(-1))
        return torch.stack(z, -1)

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002  torch's signature
        """All K^L paths, `[K^L, *batch, L]`, or with 1 for every batch dim; the first time varies slowest.

        Raises:
            ValueError: for more than 2^20 paths.
        """
        count = self.num_states**self.length
        if count > _MAX_STATES:
            raise ValueError(
                f"expected at most {_MAX_STATES:,} paths to list, got {self.num_states}^{self.length}, "
                f"{8 * count * self.length:.3g} bytes; sums over paths of a declared chain "
                "take O(length K^2), see pyrovae.models.HiddenMarkovModel and pyrovae.inference.Exact"
            )
        index = torch.arange(count, device=self.log_initial.device)
        paths = index_to_codes(index, self.num_states, self.length)
        paths = paths.reshape((count,) + (1,) * len(self.batch_shape) + (self.length,))
        return paths.expand((count, *self.batch_shape, self.length)) if expand else paths

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovChain:
        """The same chains over another batch shape; parameters are shared."""
        new: MarkovChain = self._get_checked_instance(MarkovChain, _instance)
        batch_shape = Size(batch_shape)
        torch.broadcast_shapes(batch_shape, self.batch_shape)
        new.length, new.log_initial, new.log_transition = self.length, self.log_initial, self.log_transition
        super(MarkovChain, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        return f"MarkovChain(num_states={self.num_states}, length={self.length}, batch_shape={tuple(self.batch_shape)})"


def _log_rows(probs: Tensor | None, logits: Tensor | None, name: str) -> Tensor:
    """Normalised log probabilities along the last dim; where a probability is 0, −inf, with no NaN in its gradient."""
    given = probs if logits is None else logits
    if not isinstance(given, Tensor) or given.dim() < 1 or given.shape[-1] < 1:
        raise ValueError(f"expected {name} as a tensor [..., K], got {given!r}")
    if not capturing():
        _check_rows(given.detach(), name, logits=logits is not None)
    if probs is None:
        assert logits is not None
        return torch.log_softmax(logits, -1)
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.where(probs > 0, torch.where(probs > 0, probs, 1.0).log(), -torch.inf)


def _check_rows(given: Tensor, name: str, *, logits: bool) -> None:
    with torch.no_grad():
        total = given.amax(-1) if logits else given.sum(-1)
        bad = ~torch.isfinite(total)
        bad |= given.isnan().any(-1) if logits else (given < 0).any(-1) | (total <= 0)
        if bool(bad.any()):
            what = "logits with a finite largest one" if logits else "probabilities >= 0 with a positive sum"
            raise ValueError(f"expected {name} rows of {what}, got {int(bad.sum())} of {bad.numel()} rows that are not")


def _cumulative(log_rows: Tensor) -> Tensor:
    """Cumulative probabilities whose last is 1 exactly, so that no state of probability 0 is ever drawn."""
    total = log_rows.exp().cumsum(-1)
    return total / total[..., -1:]


def _rows(table: Tensor, state: Tensor) -> Tensor:
    """The rows `[..., K]` of tables `[*batch, K, K]` at states `[..., *batch]`."""
    wide = table.expand(state.shape + table.shape[-2:])
    return wide.gather(-2, state[..., None, None].expand(state.shape + (1, table.shape[-1]))).squeeze(-2)
