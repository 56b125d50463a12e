"""The visible marginal of a restricted Boltzmann machine, as a distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrovae.distributions.chains import PersistentChains
from pyrovae.distributions.parameters import EXACT_SOFTPLUS
from pyrovae.distributions.undirected import INSTEAD, Undirected
from pyrovae.ops import check_enumerable, rbm_hidden, rbm_log_partition, rbm_moments, sample_rbm

if TYPE_CHECKING:
    from pyrovae.distributions.boltzmann import BoltzmannMachine


class RBM(Undirected):
    """p(v) = exp(−F(v)) / Z, with F(v) = −b·v − Σ_j softplus(c_j + (v W)_j): the hidden units are summed out.

    p(v, h) ∝ exp(b·v + c·h + v W h) over v in {0, 1}^D and h in {0, 1}^H.

    log Z is exact by enumeration of the smaller side, 2^min(D, H) · max(D, H) operations, up to `max_bits`; beyond, give
    `log_partition` (a number, as AIS estimates it) or `chains`, which give learning its gradient (see
    :class:`pyrovae.distributions.undirected.Undirected`). Draws are then states of the chains.

    In a program it is an ordinary discrete site: methods that enumerate take it, score-function gradients take it, and under
    :func:`pyrovae.handlers.surrogate` log p(v) passes the gradient of −F on to v; it has no relaxed twin.

    Args:
        W: weights `[D, H]`.
        b: visible biases `[D]`.
        c: hidden biases `[H]`.
        log_partition: log Z, a number or 0-d tensor, where it is known from elsewhere.
        chains: for the gradient of log Z and for draws, instead of enumeration.
        max_bits: the largest min(D, H) that is enumerated, if that takes less than about two minutes; above 30, however long.
        validate_args: check parameters and values; None takes Pyro's setting.

    Raises:
        ValueError: for shapes that do not agree; where validated, for infinite or NaN parameters.

    Example:
        >>> rbm = RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
        >>> round(float(rbm.log_prob(torch.ones(3)).exp()), 4), tuple(rbm.sample((5,)).shape)
        (0.125, (5, 3))

    References:
        Information processing in dynamical systems: Foundations of harmony theory (Smolensky, 1986)
        https://apps.dtic.mil/sti/citations/ADA620727
        Training Products of Experts by Minimizing Contrastive Divergence (Hinton, 2002)
        https://doi.org/10.1162/089976602760128018
    """

    arg_constraints = {  # noqa: RUF012
        "W": constraints.independent(constraints.real, 2),
        "b": constraints.real_vector,
        "c": constraints.real_vector,
    }

    def __init__(
        self,
        W: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        log_partition: float | Tensor | None = None,
        chains: PersistentChains | None = None,
        max_bits: int = 30,
        validate_args: bool | None = None,
    ) -> None:
        if W.dim() != 2 or b.shape != W.shape[:1] or c.shape != W.shape[1:] or 0 in W.shape:
            raise ValueError(
                f"expected W [D, H], b [D] and c [H], got {list(W.shape)}, {list(b.shape)} and {list(c.shape)}; W has a row "
                "for each visible unit"
            )
        self.W, self.b, self.c = W, b, c
        self._begin(Size(), W.shape[0], (min(W.shape), max(W.shape)), log_partition, chains, max_bits, validate_args)

    def free_energy(self, value: Tensor) -> Tensor:
        """F(v) = −b·v − Σ_j softplus(c_j + (v W)_j), `[...]` of `[..., D]`."""
        value = value.to(self.W.dtype)
        return -(value @ self.b) - softplus(self.c + value @ self.W, threshold=EXACT_SOFTPLUS).sum(-1)

    def hidden_given(self, v: Tensor) -> dist.TorchDistribution:
        """p(h | v): independent bits with logits c + v W, batch `[...]` of `[..., D]`."""
        return dist.Bernoulli(logits=self.c + v.to(self.W.dtype) @ self.W).to_event(1)

    def visible_given(self, h: Tensor) -> dist.TorchDistribution:
        """p(v | h): independent bits with logits b + W h, batch `[...]` of `[..., H]`."""
        return dist.Bernoulli(logits=self.b + h.to(self.W.dtype) @ self.W.T).to_event(1)

    def joint(self) -> BoltzmannMachine:
        """p(v, h), the Boltzmann machine of both layers, visible units first."""
        from pyrovae.distributions.boltzmann import BoltzmannMachine

        d, h = self.W.shape
        J = torch.cat((torch.cat((self.W.new_zeros(d, d), self.W), 1), torch.cat((self.W.T, self.W.new_zeros(h, h)), 1)))
        return BoltzmannMachine(
            J, torch.cat((self.b, self.c)), log_partition=self._given, max_bits=self.max_bits, validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        """E[v], exact by enumeration, `[*batch_shape, D]`; without a gradient, a second one of log Z."""
        self._check_enumerable()
        return rbm_moments(self.W, self.b, self.c, max_bits=self.max_bits)[1].expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Var[v_i], exact by enumeration, `[*batch_shape, D]`; without a gradient, as `mean`."""
        mean = self.mean
        return mean * (1 - mean)

    @property
    def chain_units(self) -> int:
        """Units of one state of its chains: the visible ones."""
        return self.W.shape[0]

    @torch.no_grad()
    def sweep(self, states: Tensor, num_sweeps: int) -> None:
        """Move states `[C, D]` on by block Gibbs, h | v and v | h, in place."""
        h = states.new_empty(len(states), len(self.c))
        for _ in range(num_sweeps):
            rbm_hidden(states, h, self.W, self.c)
            rbm_hidden(h, states, self.W.T, self.b)

    def _exact_log_partition(self) -> Tensor:
        self._check_enumerable()
        return rbm_log_partition(self.W, self.b, self.c, max_bits=self.max_bits)

    def _exact_sample(self, sample_shape: Any) -> Tensor:
        self._check_enumerable()
        shape = self._extended_shape(sample_shape)
        return sample_rbm(self.W, self.b, self.c, shape[:-1].numel(), max_bits=self.max_bits)[0].reshape(shape)

    def _energy(self, states: Tensor) -> Tensor:
        return self.free_energy(states)

    def _check_enumerable(self) -> None:
        check_enumerable(min(self.W.shape), max(self.W.shape), self.W.dtype, INSTEAD, max_bits=self.max_bits)
