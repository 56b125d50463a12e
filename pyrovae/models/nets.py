"""The networks of the models and their encoders: plain perceptrons."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

Activation = str | type[nn.Module]


def perceptron(sizes: Sequence[int], activation: Activation = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them and none after the last.

    Args:
        sizes: of the input, the hidden layers and the output.
        activation: a module class, or the name of one in `torch.nn`.

    Example:
        >>> perceptron([4, 3, 2], "Tanh")
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): Tanh()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    between = named_activation(activation)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), between()]
    return nn.Sequential(*layers[:-1])


class Centre(nn.Module):
    """Takes the mean image away, so that an encoder's first layer sees inputs around zero; the mean is not learned."""

    capturable: ClassVar[bool] = True
    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The difference, in the shape of `x [..., visible]`."""
        return x - self.mean


def named_activation(activation: Activation) -> type[nn.Module]:
    """The class of a name in `torch.nn`; a class stays.

    Raises:
        ValueError: for another name.
    """
    found = getattr(nn, activation, None) if isinstance(activation, str) else activation
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"expected an activation of torch.nn, such as nn.ReLU or 'Tanh', got {activation!r}")
    return found


def sizes_of(hidden: int | Sequence[int]) -> tuple[int, ...]:
    """Hidden sizes as a tuple; one number is one layer.

    Raises:
        ValueError: for a size below 1.
    """
    return tuple(positive(n, "every hidden size") for n in ((hidden,) if isinstance(hidden, int) else hidden))


def positive(number: int, name: str, *, least: int = 1) -> int:
    """The number, where it is an integer, at least `least`.

    Raises:
        ValueError: if not.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"expected {name} to be an integer >= {least}, got {number!r}")
    return number


def reset(module: nn.Module) -> None:
    """Draw every layer's parameters anew, by the layers' own rules."""
    for part in module.modules():
        redraw = getattr(part, "reset_parameters", None)
        if part is not module and callable(redraw):
            redraw()
