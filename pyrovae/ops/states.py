"""The states of a finite vector, numbered: `n` components of `K` values each are the numbers 0 … K^n − 1.

The first component varies slowest, as in `itertools.product`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def index_to_codes(index: Tensor, cardinality: int, components: int) -> Tensor:
    """The digits of state numbers in base `cardinality`.

    Args:
        index: state numbers `[...]`, integers in [0, cardinality^components).
        cardinality: number of values K of one component.
        components: number of components n.

    Returns:
        Codes `[..., n]`, integers in [0, K).

    Example:
        >>> index_to_codes(torch.arange(4), 2, 2).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    if cardinality == 2:
        return index.unsqueeze(-1) >> torch.arange(components - 1, -1, -1, dtype=index.dtype, device=index.device) & 1
    return (index.unsqueeze(-1) // _place_values(cardinality, components, index.device)) % cardinality


def codes_to_index(codes: Tensor, cardinality: int) -> Tensor:
    """The state numbers of codes, the inverse of :func:`index_to_codes`.

    Args:
        codes: integers `[..., n]` in [0, cardinality).
        cardinality: number of values K of one component.

    Returns:
        State numbers `[...]`.

    Example:
        >>> codes_to_index(torch.tensor([[0, 2], [2, 1]]), 3).tolist()
        [2, 7]
    """
    return (codes.long() * _place_values(cardinality, codes.shape[-1], codes.device)).sum(-1)


def _place_values(cardinality: int, components: int, device: torch.device) -> Tensor:
    if cardinality**components > 2**62:
        raise ValueError(f"expected fewer than 2^62 states, got {cardinality}^{components}; they cannot be numbered in 64 bits")
    return torch.tensor([cardinality**j for j in reversed(range(components))], device=device)
