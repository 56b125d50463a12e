"""What the relaxed families share: parameters, shapes, copies and the messages of validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor


class Relaxed:
    """A mixin that stands before Pyro's family; temperature and logits are kept as they are given."""

    has_rsample = True  # pathwise, or straight-through
    straight_through: bool
    rsample: Callable[..., Tensor]
    _batch_shape: Size
    _event_shape: Size
    _validate_args: bool
    _get_checked_instance: Callable[..., Any]
    _torch_base: Any
    _hard_name: str
    _is_hard: Callable[[Tensor], bool]

    def _set(self, temperature: Tensor, logits: Tensor, batch_shape: Size, *, straight_through: bool) -> None:
        shape = batch_shape + self._event_shape
        self._temperature = temperature
        self._logits = logits if logits.shape == shape else logits.expand(shape)
        self._batch_shape = batch_shape
        self.straight_through = straight_through

    @property
    def temperature(self) -> Tensor:
        """Temperature, 0-d or broadcastable to the batch shape."""
        return self._temperature

    @property
    def base_dist(self) -> Any:
        """Torch's distribution of the logarithms (logits), for code that takes the family as a transformed distribution."""
        return self._torch_base(self._temperature, logits=self._logits, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """A draw without gradient, `[*sample_shape, *batch_shape, *event_shape]`."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002
        """Refuse: soft values are not finitely many, and straight-through ones have no place for their gradient here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"expected a site with values that can be enumerated, got a {type(self).__name__}; enumerate the discrete program: "
            "take it as it was written, or wrap it in pyrovae.handlers.discretize"
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape; no memory is taken."""
        new = self._get_checked_instance(type(self), _instance)
        new._event_shape = self._event_shape
        new._set(self._temperature, self._logits, Size(batch_shape), straight_through=self.straight_through)
        new._validate_args = self._validate_args
        return new

    def _validate_sample(self, value: Tensor) -> None:
        """Torch's check, with an explanation where a soft value meets a mass, or a hard one a density."""
        try:
            super()._validate_sample(value)  # type: ignore[misc]
        except ValueError as error:
            if not isinstance(value, Tensor) or not str(error).startswith("Expected value argument"):
                raise
            raise ValueError(self._explain(value)) from error

    def _explain(self, value: Tensor) -> str:
        name = type(self).__name__
        if bool(torch.isnan(value).any()):
            return f"expected values of {name} without NaN, got {int(torch.isnan(value).sum())}; check what drew them"
        outside = bool((value < 0).any() | (value > 1).any())
        if outside:
            return f"expected values of {name} in [0, 1], got {float(value.min()):g} to {float(value.max()):g}"
        if self.straight_through:
            return (
                f"expected {self._hard_name} values for the straight-through {name}, which scores them by a mass, got soft "
                "ones; relax model and guide alike (straight_through on both, or on neither)"
            )
        if self._is_hard(value):
            return (
                f"expected soft values for the density of {name}, got exact {self._hard_name} ones: a mass has no density "
                "here, and the difference of the two log probabilities means nothing; relax model and guide alike, or "
                "score hard values with the discrete program"
            )
        return f"expected values of {name} that sum to 1, got sums from {float(value.sum(-1).min()):g} to " + (
            f"{float(value.sum(-1).max()):g}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_normalized"}

    def __repr__(self) -> str:
        t = self._temperature
        shown = f"{float(t):g}" if t.dim() == 0 else f"of shape {tuple(t.shape)}"
        kind = ", straight_through=True" if self.straight_through else ""
        return f"{type(self).__name__}(temperature {shown}, logits of shape {tuple(self._logits.shape)}{kind})"
