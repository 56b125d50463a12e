"""Boltzmann machines, restricted and general, as programs: data from the visible marginal, then hidden units given data."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor, nn

from pyrovae import distributions
from pyrovae.distributions import RBM, PersistentChains
from pyrovae.handlers import Module
from pyrovae.models.nets import positive
from pyrovae.models.program import check_rows, data_plate
from pyrovae.ops import FactorialCode


class RestrictedBoltzmannMachine(Module):
    """p(x, h) ∝ exp(b·x + c·h + x W h) over binary x and h.

    The program draws x from the visible marginal p(x) = exp(−F(x)) / Z (:class:`pyrovae.distributions.RBM`), then the hidden
    units, which are independent given x: p(h_j = 1 | x) = σ(c_j + (x W)_j). The product is the joint. Sites `"x"` and `"h1"`,
    in the plate `"data"` at dim −1.

    Where the smaller layer has at most `max_bits` units, log Z and its gradient are exact in every run of the program. In a
    larger machine the program scores x by −F(x), no probability, with the gradient of persistent chains; learn it with
    `ContrastiveDivergence`, and evaluate it by `AIS`. :meth:`factorial_code` is exact up to 30 bits in any case.

    Args:
        visible: number of visible units D.
        hidden: number of hidden units H.
        num_chains: persistent chains of a machine beyond `max_bits`.
        num_sweeps: their sweeps at each run in grad mode.
        max_bits: the largest min(D, H) of which a run of the program sums all 2^min(D, H) states.

    Attributes:
        weight: W `[D, H]`.
        visible_bias: b `[D]`.
        hidden_bias: c `[H]`.
        chains: the persistent chains; None where log Z is exact.

    Raises:
        ValueError: for sizes below 1.

    Example:
        >>> rbm = RestrictedBoltzmannMachine(4, 3)
        >>> tuple(rbm.sample(5).shape)
        (5, 4)

    References:
        Information processing in dynamical systems: Foundations of harmony theory (Smolensky, 1986)
        https://apps.dtic.mil/sti/citations/ADA620727
    """

    capturable: ClassVar[bool] = True

    def __init__(self, visible: int, hidden: int, *, num_chains: int = 100, num_sweeps: int = 1, max_bits: int = 16) -> None:
        super().__init__()
        self.visible, self.hidden, self.max_bits = positive(visible, "visible"), positive(hidden, "hidden"), max_bits
        self._chains = {"num_chains": num_chains, "num_sweeps": num_sweeps}
        self.weight = nn.Parameter(torch.empty(visible, hidden))
        self.visible_bias = nn.Parameter(torch.empty(visible))
        self.hidden_bias = nn.Parameter(torch.empty(hidden))
        self.chains: PersistentChains | None = None
        self.reset_parameters()
        if min(visible, hidden) > max_bits:
            self.chains = PersistentChains(num_chains, num_sweeps, units=visible)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON."""
        return {"visible": self.visible, "hidden": self.hidden, **self._chains, "max_bits": self.max_bits}

    @property
    def normalized(self) -> bool:
        """Whether the program scores x by a log probability; else log Z is missing."""
        return self.chains is None

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 0.01²), set biases to 0, start the chains anew."""
        with torch.no_grad():
            self.weight.normal_(0, 0.01)
            self.visible_bias.zero_()
            self.hidden_bias.zero_()
        if self.chains is not None:
            self.chains.reset()

    def initialize_bias(self, x: Tensor) -> None:
        """Set the visible bias to the logits of the smoothed means (sum + 1) / (n + 2) of data `x [n, visible]` in {0, 1}."""
        _set_bias(self.visible_bias, x)

    def distribution(self) -> RBM:
        """The visible marginal at the present parameters: `W`, `b` and `c` are the model's own."""
        return RBM(self.weight, self.visible_bias, self.hidden_bias, chains=self.chains, max_bits=max(self.max_bits, _MAX_BITS))

    def forward(
        self,
        x: Tensor | None = None,
        *,
        batch_size: int = 1,
        index: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """Run the program.

        Args:
            x: data `[B, visible]` in {0, 1}; None draws from the model.
            batch_size: rows to draw where `x` is None.
            index: row numbers `[B]` of a minibatch in the data set.
            num_data: the size of that data set.

        Returns:
            The visible units `[..., B, visible]`.

        Raises:
            ValueError: if `x` has another width, or is empty; with Pyro's validation on, if it is not in {0, 1}.
        """
        rbm = self.distribution()
        with data_plate(x, self.visible, batch_size=batch_size, index=index, num_data=num_data):
            x = pyro.sample("x", rbm, obs=x)
            pyro.sample("h1", rbm.hidden_given(x))
        return x

    def factorial_code(self, x: Tensor | None = None, **_: Any) -> FactorialCode | None:
        """p(h | x) and, when asked for, log p(x): exact up to 30 units of the smaller layer. None without data."""
        if x is None:
            return None
        rbm = RBM(self.weight, self.visible_bias, self.hidden_bias, max_bits=max(self.max_bits, _MAX_BITS))
        logits = self.hidden_bias + x.to(self.weight.dtype) @ self.weight
        return FactorialCode("h1", logits, lambda: rbm.log_prob(x), num_states=2 ** min(self.visible, self.hidden))

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """`n` draws of the visible units, `[n, visible]`: exact, or states of copies of the persistent chains."""
        return self.distribution().sample(_rows(n))

    def mirror(self) -> nn.Linear:
        """An encoder in the shape of p(h | x), which is exact at the right weights; fresh ones at each call."""
        return nn.Linear(self.visible, self.hidden).to(self.weight)


class BoltzmannMachine(Module):
    """p(x, h) ∝ exp(½ sᵀJs + b·s) over s = (x, h), all units binary and coupled to one another.

    The program draws x from the visible marginal, then the hidden units given x, a Boltzmann machine with biases
    b_h + x J_vh. The product is the joint. Sites `"x"` and, with hidden units, `"h1"`, in the plate `"data"` at dim −1.

    Where there are at most `max_bits` units in all, log Z and its gradient are exact in every run of the program; in a larger
    machine x is scored without log Z, with the gradient of persistent chains. Hidden units are summed out by enumeration
    either way, 2^hidden states for each row: at most 30, beyond use `ContrastiveDivergence`.

    Args:
        visible: number of visible units.
        hidden: number of hidden units, 0 for none.
        num_chains: persistent chains of a machine beyond `max_bits`.
        num_sweeps: their sweeps at each run in grad mode.
        max_bits: the largest number of units of which a run of the program sums all states.

    Attributes:
        couplings: J above the diagonal, row by row, `[n (n − 1) / 2]` of n = visible + hidden units: each coupling once, so
            that J is symmetric with a zero diagonal after any step of an optimizer, and d log p = x_i x_j d J_ij − ….
        biases: b `[n]`, visible units first.
        chains: the persistent chains, of all units; None where log Z is exact.

    Raises:
        ValueError: for sizes below 1, or fewer than two units.

    Example:
        >>> machine = BoltzmannMachine(4, 2)
        >>> tuple(machine.sample(5).shape), tuple(machine.distribution().J.shape)
        ((5, 4), (6, 6))

    References:
        A Learning Algorithm for Boltzmann Machines (Ackley, Hinton, Sejnowski, 1985)
        https://doi.org/10.1207/s15516709cog0901_7
    """

    capturable: ClassVar[bool] = True

    def __init__(
        self, visible: int, hidden: int = 0, *, num_chains: int = 100, num_sweeps: int = 1, max_bits: int = 16
    ) -> None:
        super().__init__()
        self.visible, self.hidden, self.max_bits = positive(visible, "visible"), hidden, max_bits
        if not isinstance(hidden, int) or hidden < 0 or visible + hidden < 2:
            raise ValueError(f"expected hidden >= 0 and at least two units, got visible={visible} and hidden={hidden!r}")
        units = visible + hidden
        self._chains = {"num_chains": num_chains, "num_sweeps": num_sweeps}
        self.couplings = nn.Parameter(torch.empty(units * (units - 1) // 2))
        self.biases = nn.Parameter(torch.empty(units))
        self.chains: PersistentChains | None = None
        self.reset_parameters()
        if units > max_bits:
            self.chains = PersistentChains(num_chains, num_sweeps, units=units)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON."""
        return {"visible": self.visible, "hidden": self.hidden, **self._chains, "max_bits": self.max_bits}

    @property
    def normalized(self) -> bool:
        """Whether the program scores x by a log probability; else log Z is missing."""
        return self.chains is None

    def reset_parameters(self) -> None:
        """Draw couplings from N(0, 0.01²), set biases to 0, start the chains anew."""
        with torch.no_grad():
            self.couplings.normal_(0, 0.01)
            self.biases.zero_()
        if self.chains is not None:
            self.chains.reset()

    def initialize_bias(self, x: Tensor) -> None:
        """Set the visible biases to the logits of the smoothed means (sum + 1) / (n + 2) of data `x [n, visible]` in {0, 1}."""
        _set_bias(self.biases[: self.visible], x)

    def free_couplings(self) -> Tensor:
        """The parameter whose entries are J_ij, i < j, row by row, each as it is: what a centred gradient asks for."""
        return self.couplings

    def distribution(self) -> distributions.BoltzmannMachine:
        """The machine of all units at the present parameters, visible units first; J is laid out from `couplings`."""
        units = self.visible + self.hidden
        above, left = torch.triu_indices(units, units, 1, device=self.couplings.device)
        half = self.couplings.new_zeros(units, units).index_put((above, left), self.couplings)
        return distributions.BoltzmannMachine(
            half + half.T, self.biases, chains=self.chains, max_bits=max(self.max_bits, _MAX_BITS)
        )

    def forward(
        self,
        x: Tensor | None = None,
        *,
        batch_size: int = 1,
        index: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """Run the program.

        Args:
            x: data `[B, visible]` in {0, 1}; None draws from the model.
            batch_size: rows to draw where `x` is None.
            index: row numbers `[B]` of a minibatch in the data set.
            num_data: the size of that data set.

        Returns:
            The visible units `[..., B, visible]`.

        Raises:
            ValueError: if `x` has another width, or is empty; with Pyro's validation on, if it is not in {0, 1}.
        """
        machine = self.distribution()
        with data_plate(x, self.visible, batch_size=batch_size, index=index, num_data=num_data):
            x = pyro.sample("x", machine.marginal(self.visible) if self.hidden else machine, obs=x)
            if self.hidden:
                pyro.sample("h1", machine.given(x))
        return x

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """`n` draws of the visible units, `[n, visible]`: exact, or states of copies of the persistent chains."""
        return self.distribution().sample(_rows(n))[:, : self.visible]

    def mirror(self) -> nn.Sequential:
        """An encoder from data to a logit for every hidden unit, with one tanh layer; fresh weights at each call.

        Raises:
            ValueError: without hidden units.
        """
        if not self.hidden:
            raise ValueError("expected hidden units to encode, got hidden=0; a fully visible machine needs no guide")
        width = max(self.visible, self.hidden)
        return nn.Sequential(nn.Linear(self.visible, width), nn.Tanh(), nn.Linear(width, self.hidden)).to(self.biases)


@torch.no_grad()
def _set_bias(bias: Tensor, x: Tensor) -> None:
    check_rows(x, len(bias))
    x = x.to(bias)
    if not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(
            f"expected x in {{0, 1}}, got values from {float(x.min()):g} to {float(x.max()):g}; scale to [0, 1] and binarize, "
            "see pyrovae.data.binarize"
        )
    bias.copy_(((x.sum(0) + 1) / (len(x) + 2)).logit())


def _rows(n: int) -> tuple[int]:
    if n < 1:
        raise ValueError(f"expected n >= 1 draws, got {n}")
    return (n,)


_MAX_BITS = 30  # of the distribution, where asked for log Z, whatever a run of the program sums
