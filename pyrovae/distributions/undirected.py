"""What the undirected distributions over bits share: p(x) = exp(−F(x)) / Z, and what stands for log Z and its gradient."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyrovae.distributions.chains import PersistentChains
from pyrovae.ops import is_enumerable
from pyrovae.ops.states import index_to_codes
from pyrovae.ops.tracing import capturing

PartitionIs = Literal["exact", "given", "unknown"]


class Undirected(TorchDistribution):
    """p(x) = exp(−F(x)) / Z over x in {0, 1}^n.

    What `log_prob` uses for log Z is told by `partition_is`: "exact", an enumeration; "given", a number from elsewhere;
    "unknown", then log p(x) is −F(x), `normalized` is False, and the number is no log probability. The gradient for the
    parameters is that of log p(x) in every case: by enumeration, from the given log Z where that has one, or from persistent
    chains; where there is neither, a backward pass into the parameters is refused.
    """

    support = constraints.independent(constraints.boolean, 1)
    has_enumerate_support = True
    chains: PersistentChains | None
    partition_is: PartitionIs
    max_bits: int
    _given: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that the distribution was made of."""
        return tuple(getattr(self, name) for name in self.arg_constraints)

    @property
    def normalized(self) -> bool:
        """Whether `log_prob` is a log probability: log Z is exact or given."""
        return self.partition_is != "unknown"

    def free_energy(self, value: Tensor) -> Tensor:
        """F(x) = −log Σ_hidden exp(−E), up to no constant: log p(x) = −F(x) − log Z; `[...]` of `[..., n]`."""
        raise NotImplementedError

    def log_partition(self) -> Tensor:
        """Log Z: the given one, else by enumeration; differentiable.

        Raises:
            ValueError: if too many units would have to be enumerated, with bytes and seconds and what to use instead.
        """
        return self._exact_log_partition() if self._given is None else self._given

    def log_prob(self, value: Tensor) -> Tensor:
        """−F(x) − log Z, `[...]` of bits `[..., n]`; without log Z where `normalized` is False.

        With chains, a call in grad mode advances them if a parameter requires a gradient, and the gradient is
        −∂F(x) + mean over chains of ∂F: persistent contrastive divergence, biased as far as the chains lag behind.

        Raises:
            ValueError: for values outside {0, 1} (where validated), and where log Z is neither given nor within reach nor
                replaced by chains.
        """
        if self._validate_args:
            self._validate_sample(value)
        log_prob = -self.free_energy(value) - self._log_normalizer()
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Bits `[*sample_shape, *batch_shape, n]`: independent exact draws, or, with chains, from copies of them.

        Without chains the cost is one enumeration. With chains, each draw is the state of one of them, advanced by
        `num_sweeps` sweeps; the chains themselves stay where they are, and more draws than chains are dependent.

        Raises:
            ValueError: without chains, if too many units would have to be enumerated.
        """
        return self._drawn(sample_shape, quiet=False)

    def __call__(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        """A draw at a site of a program: as `sample`, without a warning where chains are fresh, as they are before learning."""
        with torch.no_grad():
            return self._drawn(sample_shape, quiet=True)

    def _drawn(self, sample_shape: Any, *, quiet: bool) -> Tensor:
        if self.chains is not None:
            shape = self._extended_shape(Size(sample_shape))
            return self._visible(self.chains.draw(self, math.prod(shape[:-1]), quiet=quiet)).reshape(shape)
        return self._exact_sample(Size(sample_shape))

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002
        """All 2^n values, `[2^n, *batch_shape, n]`, or with batch dims of size 1; the first unit varies slowest.

        Raises:
            ValueError: for more than 20 units.
        """
        n = self.event_shape[0]
        if n > _MAX_SUPPORT:
            raise ValueError(
                f"expected at most {_MAX_SUPPORT} units to list the states of, got {n}: 2^{n} states, "
                f"{2.0**n * n * self._like.element_size():.1e} bytes; draw them with sample"
            )
        states = index_to_codes(torch.arange(2**n, device=self._like.device), 2, n).to(self._like.dtype)
        states = states.reshape((-1,) + (1,) * len(self.batch_shape) + (n,))
        return states.expand((-1, *self.batch_shape, n)) if expand else states

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same at a larger batch shape; the parameters stay the same tensors."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_batch_shape", "_event_shape")})
        super(Undirected, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def unexpanded(self) -> Any:
        """The same with the batch shape of its parameters, before any plate expanded it."""
        return self.expand(self.parameters[-1].shape[:-1])

    def with_log_partition(self, log_partition: float | Tensor) -> Any:
        """The same with a log Z from elsewhere, such as an estimate of :class:`pyrovae.inference.AIS`.

        Args:
            log_partition: log Z, a number or a tensor that broadcasts to the batch shape.

        Raises:
            ValueError: for one that is not finite, or of another shape.
        """
        value = torch.as_tensor(log_partition).to(self._like)
        if not capturing() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"expected a finite log_partition, got {log_partition}; is it that of these parameters?")
        _check_shape(value, self.batch_shape)
        new = self.expand(self.batch_shape)
        new._given, new.partition_is = value, "given"
        return new

    # ---- what a family gives ----------------------------------------------------------------------------------------

    def _exact_log_partition(self) -> Tensor:
        raise NotImplementedError

    def _exact_sample(self, sample_shape: Size) -> Tensor:
        raise NotImplementedError

    def _energy(self, states: Tensor) -> Tensor:
        """The energy of states of the chains `[C, units]`, whose mean gradient is −∂ log Z."""
        raise NotImplementedError

    def _visible(self, states: Tensor) -> Tensor:
        """Values of this distribution within states of the chains."""
        return states

    # ---- shared -----------------------------------------------------------------------------------------------------

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and device of all."""
        return self.parameters[0]

    def _begin(
        self,
        batch_shape: Size,
        units: int,
        enumerated: tuple[int, int],
        log_partition: Any,
        chains: PersistentChains | None,
        max_bits: int,
        validate_args: bool | None,  # noqa: FBT001
    ) -> None:
        """The part of construction that comes after the parameters are set and their shapes checked.

        `enumerated` are the bits to enumerate for log Z, and the units to sum out for each of their states.
        """
        super().__init__(batch_shape, Size([units]), validate_args=False)
        if validate_args is not None:
            self._validate_args = validate_args
        else:
            self._validate_args = bool(torch.distributions.Distribution._validate_args)
        if self._validate_args:
            self._check_finite()
        if log_partition is not None and not isinstance(log_partition, Tensor):
            log_partition = self._like.new_tensor(float(log_partition))
        if log_partition is not None:
            _check_shape(log_partition, batch_shape)
        if log_partition is not None and self._validate_args and not bool(torch.isfinite(log_partition).all()):
            raise ValueError(f"expected a finite log_partition, got {log_partition}; is it that of these parameters?")
        if chains is not None and not isinstance(chains, PersistentChains):
            raise ValueError(f"expected chains=PersistentChains(num_chains, num_sweeps), got {type(chains).__name__}")
        self._given, self.chains, self.max_bits = log_partition, chains, max_bits
        exact = chains is None and is_enumerable(*enumerated, self._like.dtype, max_bits=max_bits)
        self.partition_is = "given" if log_partition is not None else "exact" if exact else "unknown"

    def _check_finite(self) -> None:
        for name in self.arg_constraints:
            value = getattr(self, name).detach()
            if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):  # the sum alone is faster
                raise ValueError(
                    f"expected finite {name} for {type(self).__name__}, got {int((~torch.isfinite(value)).sum())} infinite or "
                    f"NaN of {value.numel()}; if this came up while learning, lower the step size"
                )

    def _log_normalizer(self) -> Tensor | float:
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters)
        if self.partition_is == "exact":
            return self._exact_log_partition()
        if self._given is None and self.chains is None:
            return self._exact_log_partition()  # refuses, with bytes and seconds
        value: Tensor | float = 0.0 if self._given is None else self._given
        if not learning or (isinstance(value, Tensor) and value.requires_grad):
            return value
        if self.chains is None:
            assert isinstance(value, Tensor)
            return _WithoutGradient.apply(value, *self.parameters)  # type: ignore[no-any-return]
        energy = self._energy(self.chains.advance(self)).mean(0)
        return value - (energy - energy.detach())

    def _validate_sample(self, value: Tensor) -> None:
        n = self.event_shape[0]
        if not isinstance(value, Tensor) or value.dim() < 1 or value.shape[-1] != n:
            got = str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected values [..., {n}] of {n} units for {type(self).__name__}, got {got}")
        if not bool(((value == 0) | (value == 1)).all()):
            nan = int(torch.isnan(value).sum()) if value.is_floating_point() else 0
            got = f"{nan} NaN" if nan else f"values from {float(value.min()):g} to {float(value.max()):g}"
            raise ValueError(
                f"expected values in {{0, 1}} for {type(self).__name__}, got {got}; scale to [0, 1] and binarize, see "
                "pyrovae.data.binarize"
            )


def _check_shape(log_partition: Tensor, batch_shape: Size) -> None:
    """A given log Z is one number, or one for each element of the batch."""
    try:
        fits = torch.broadcast_shapes(log_partition.shape, batch_shape) == batch_shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"expected a log_partition that broadcasts to the batch shape {list(batch_shape)}, got shape "
            f"{list(log_partition.shape)}; give one number for each distribution"
        )


class _WithoutGradient(torch.autograd.Function):
    """A log Z that came as a number: its value may be used, a gradient through it would be missing −∂ log Z."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *_: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise ValueError(
            "expected a log_partition with a gradient to learn the parameters, got a number; pass "
            "chains=PersistentChains(num_chains, num_sweeps), or no log_partition where it can be enumerated, or detach the "
            "parameters"
        )


INSTEAD = (
    "chains=PersistentChains(num_chains, num_sweeps) to learn and to draw, or "
    "log_partition=AIS(num_chains, num_temperatures).log_partition(...).log_z to evaluate,"
)
_MAX_SUPPORT = 20
