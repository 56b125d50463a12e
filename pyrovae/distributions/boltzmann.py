"""Boltzmann machines over bits, whole and with some of their units summed out."""

from __future__ import annotations

import itertools

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyrovae.distributions.chains import PersistentChains
from pyrovae.distributions.undirected import INSTEAD, Undirected
from pyrovae.ops import boltzmann_log_partition, boltzmann_moments, boltzmann_sweep, check_enumerable, sample_boltzmann
from pyrovae.ops.boltzmann import allowed_asymmetry
from pyrovae.ops.opaque import run_whole
from pyrovae.ops.states import index_to_codes
from pyrovae.ops.tracing import capturing


class BoltzmannMachine(Undirected):
    """p(x) ∝ exp(½ xᵀJx + bᵀx) over x in {0, 1}^n, that is exp(Σ_{i<j} J_ij x_i x_j + Σ_i b_i x_i).

    log Z is exact by enumeration of 2^n states (for each of a batch of biases), up to `max_bits` units; beyond, give
    `log_partition` (a number, as AIS estimates it) or `chains`, which give learning its gradient (see
    :class:`pyrovae.distributions.undirected.Undirected`). Draws are then states of the chains. Where it is a latent site, it
    has no relaxed twin.

    Gradients for J are symmetric and have a zero diagonal, so that J may be a parameter: steps of an optimizer keep its form.

    Args:
        J: couplings `[n, n]`, symmetric with a zero diagonal.
        b: biases `[*batch, n]`.
        log_partition: log Z, a number or a tensor `[*batch]`, where it is known from elsewhere.
        chains: for the gradient of log Z and for draws, instead of enumeration; for biases `[n]`.
        max_bits: the largest number of units that are enumerated, here, in marginals and in conditionals.
        validate_args: check parameters and values; None takes Pyro's setting.

    Raises:
        ValueError: for shapes that do not agree; where validated, for infinite or NaN parameters, and for couplings that are
            not symmetric or have a diagonal.

    Example:
        >>> machine = BoltzmannMachine(torch.zeros(3, 3), torch.zeros(3))
        >>> round(float(machine.log_prob(torch.ones(3)).exp()), 4), tuple(machine.sample((5,)).shape)
        (0.125, (5, 3))

    References:
        A Learning Algorithm for Boltzmann Machines (Ackley, Hinton, Sejnowski, 1985)
        https://doi.org/10.1207/s15516709cog0901_7
    """

    arg_constraints = {"J": constraints.independent(constraints.real, 2), "b": constraints.real_vector}  # noqa: RUF012

    def __init__(
        self,
        J: Tensor,
        b: Tensor,
        *,
        log_partition: float | Tensor | None = None,
        chains: PersistentChains | None = None,
        max_bits: int = 30,
        validate_args: bool | None = None,
    ) -> None:
        if J.dim() != 2 or b.dim() < 1 or J.shape != (b.shape[-1], b.shape[-1]) or J.shape[0] == 0:
            raise ValueError(f"expected J [n, n] and b [*batch, n] of the same n >= 1, got {list(J.shape)} and {list(b.shape)}")
        if chains is not None and b.dim() > 1:
            raise ValueError(f"expected biases [n] with chains, got {list(b.shape)}; chains serve one distribution")
        self.J, self.b = J, b
        self._begin(b.shape[:-1], J.shape[0], (J.shape[0], 1), log_partition, chains, max_bits, validate_args)
        if self._validate_args:
            _check_couplings(J)

    def free_energy(self, value: Tensor) -> Tensor:
        """The energy −½ xᵀJx − bᵀx, `[...]` of `[..., n]`: nothing is hidden."""
        value = value.to(self.J.dtype)
        return -((value @ self.couplings) * value).sum(-1) / 2 - (value * self.b).sum(-1)

    @property
    def couplings(self) -> Tensor:
        """J, in such a way that its gradient is symmetric with a zero diagonal."""
        if not (self.J.requires_grad and torch.is_grad_enabled()):
            return self.J
        half = (self.J + self.J.T) / 2
        return half - half.diagonal().diag()

    def given(self, x: Tensor) -> BoltzmannMachine:
        """The units after the first k given these, `x [..., k]`: a Boltzmann machine of n − k units with biases `[..., n − k]`.

        Raises:
            ValueError: unless 0 < k < n.
        """
        k, J = self._part(x.shape[-1]), self.couplings
        biases = self.b[..., k:] + x.to(J.dtype) @ J[:k, k:]
        return BoltzmannMachine(J[k:, k:], biases, max_bits=self.max_bits, validate_args=False)

    def marginal(self, k: int) -> BoltzmannMarginal:
        """The first k units, the others summed out by enumeration.

        Raises:
            ValueError: unless 0 < k < n.
        """
        return BoltzmannMarginal(self, k)

    @property
    def mean(self) -> Tensor:
        """E[x], exact by enumeration, `[*batch_shape, n]`; without a gradient, a second one of log Z."""
        self._check_enumerable()
        return boltzmann_moments(self.J, self.b, max_bits=self.max_bits)[1].expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Var[x_i], exact by enumeration, `[*batch_shape, n]`; without a gradient, as `mean`."""
        mean = self.mean
        return mean * (1 - mean)

    @property
    def chain_units(self) -> int:
        """Units of one state of its chains: all."""
        return self.J.shape[0]

    @torch.no_grad()
    def sweep(self, states: Tensor, num_sweeps: int) -> None:
        """Move states `[C, n]` on by Gibbs, units that are not coupled together, in place."""

        def swept(x: Tensor, J: Tensor, b: Tensor) -> tuple[Tensor]:
            boltzmann_sweep(x := x.clone(), J, b, num_sweeps=num_sweeps)
            return (x,)

        if capturing():  # which units are drawn together depends on J
            states.copy_(run_whole(swept, states, self.J, self.b)[0])
        else:
            boltzmann_sweep(states, self.J, self.b, num_sweeps=num_sweeps)

    def _exact_log_partition(self) -> Tensor:
        self._check_enumerable()
        return boltzmann_log_partition(self.couplings, self.b, max_bits=self.max_bits)

    def _exact_sample(self, sample_shape: Size) -> Tensor:
        self._check_enumerable()
        batch = self.b.shape[:-1]
        own = (1,) * (len(self.batch_shape) - len(batch)) + tuple(batch)
        repeats = [full if part == 1 else 1 for full, part in zip(self.batch_shape, own, strict=True)]
        n = sample_shape.numel() * Size(repeats).numel()
        draws = self._draw(n).reshape((*sample_shape, *repeats, *own, *self.event_shape))
        first, depth = len(sample_shape), len(own)
        pairs = itertools.chain.from_iterable((first + d, first + depth + d) for d in range(depth))
        return draws.permute(*range(first), *pairs, draws.dim() - 1).reshape(self._extended_shape(sample_shape))

    def _draw(self, n: int) -> Tensor:
        """Independent draws `[n, *batch of b, units]`."""
        units, rows = self.J.shape[0], self.b[..., 0].numel()
        if rows == 1 or units > _TABLE_BITS:
            return sample_boltzmann(self.J, self.b, n, max_bits=self.max_bits)
        x = index_to_codes(torch.arange(2**units, device=self.b.device), 2, units).to(self.J)
        pairs = ((x @ self.J) * x).sum(-1) / 2
        parts = []
        for b in self.b.reshape(-1, units).split(2 ** (_CHUNK_BITS - units)):  # tables of all states of some rows
            cumulative = (pairs + b @ x.T).double().softmax(-1).cumsum(-1)
            u = torch.rand(len(b), n, dtype=torch.float64, device=b.device) * cumulative[:, -1:]
            parts.append(x[torch.searchsorted(cumulative, u, right=True).clamp_(max=len(x) - 1)])
        return torch.cat(parts).transpose(0, 1).reshape(n, *self.b.shape)

    def _energy(self, states: Tensor) -> Tensor:
        return self.free_energy(states)

    def _check_enumerable(self) -> None:
        check_enumerable(self.J.shape[0], 1, self.J.dtype, INSTEAD, max_bits=self.max_bits)

    def _part(self, k: int) -> int:
        n = self.J.shape[0]
        if not 0 < k < n:
            raise ValueError(f"expected between 1 and {n - 1} of the {n} units, got {k}")
        return k


class BoltzmannMarginal(Undirected):
    """The first k units of a Boltzmann machine, the others summed out: F(v) = −½ vᵀJ_vv v − b_v·v − log Z(J_hh, b_h + v J_vh).

    Exact. Costs an enumeration of the 2^(n − k) hidden states for every v; log Z is that of the machine.

    Args:
        machine: the Boltzmann machine; its `log_partition` and chains serve here, too.
        k: how many units are visible.
        validate_args: check values; None takes the machine's setting.

    Raises:
        ValueError: unless 0 < k < n.

    Example:
        >>> machine = BoltzmannMachine(torch.zeros(3, 3), torch.zeros(3))
        >>> round(float(BoltzmannMarginal(machine, 2).log_prob(torch.ones(2)).exp()), 4)
        0.25
    """

    arg_constraints = BoltzmannMachine.arg_constraints

    def __init__(self, machine: BoltzmannMachine, k: int, *, validate_args: bool | None = None) -> None:
        self.machine, self.J, self.b = machine, machine.J, machine.b
        units, check = machine.J.shape[0], machine._validate_args if validate_args is None else validate_args
        self._begin(machine.batch_shape, machine._part(k), (units, 1), machine._given, machine.chains, machine.max_bits, check)

    def free_energy(self, value: Tensor) -> Tensor:
        """F(v), `[...]` of `[..., k]`.

        Raises:
            ValueError: for more than `max_bits` hidden units.
        """
        value, k, J = value.to(self.J.dtype), self.event_shape[0], self.machine.couplings
        check_enumerable(
            J.shape[0] - k, 1, J.dtype, "ContrastiveDivergence, which draws the hidden units,", max_bits=self.max_bits
        )
        visible = ((value @ J[:k, :k]) * value).sum(-1) / 2 + (value * self.b[..., :k]).sum(-1)
        biases = self.b[..., k:] + value @ J[:k, k:]
        return -visible - boltzmann_log_partition(J[k:, k:], biases, max_bits=self.max_bits)

    def hidden_given(self, v: Tensor) -> BoltzmannMachine:
        """p(h | v), a Boltzmann machine with biases `[..., n − k]`, of `v [..., k]`."""
        return self.machine.given(v)

    @property
    def mean(self) -> Tensor:
        """E[v], exact by enumeration, `[*batch_shape, k]`; without a gradient, a second one of log Z."""
        return self.machine.mean[..., : self.event_shape[0]].expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Var[v_i], exact by enumeration, `[*batch_shape, k]`; without a gradient, as `mean`."""
        mean = self.mean
        return mean * (1 - mean)

    @property
    def chain_units(self) -> int:
        """Units of one state of its chains: all, hidden ones too."""
        return self.machine.chain_units

    def sweep(self, states: Tensor, num_sweeps: int) -> None:
        """Move states `[C, n]` of all units on by Gibbs, in place."""
        self.machine.sweep(states, num_sweeps)

    def _exact_log_partition(self) -> Tensor:
        return self.machine._exact_log_partition()

    def _exact_sample(self, sample_shape: Size) -> Tensor:
        draws: Tensor = self.machine.expand(self.batch_shape)._exact_sample(sample_shape)
        return self._visible(draws)

    def _energy(self, states: Tensor) -> Tensor:
        return self.machine.free_energy(states)

    def _visible(self, states: Tensor) -> Tensor:
        return states[..., : self.event_shape[0]]


_TABLE_BITS = 14
_CHUNK_BITS = 21


def _check_couplings(J: Tensor) -> None:
    """Couplings are symmetric, up to rounding, and have no diagonal."""
    asymmetry, diagonal = (J - J.T).abs().max(), J.diagonal().abs().max()
    if bool((diagonal > 0) | (asymmetry > allowed_asymmetry(J))):
        raise ValueError(
            f"expected symmetric couplings J with a zero diagonal, got asymmetries up to {float(asymmetry):.3g} and a diagonal "
            f"up to {float(diagonal):.3g}; symmetrise, J = (A + A.T) / 2, and move the diagonal into b: b + J.diagonal() / 2"
        )
