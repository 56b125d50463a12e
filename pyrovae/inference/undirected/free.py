"""Whether couplings and biases are learned each by itself: then the centred gradient is zero where the plain one is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pyrovae.distributions.rbm import RBM
from pyrovae.distributions.undirected import Undirected
from pyrovae.inference.fit import root_module


def all_free(model: Any, distribution: Undirected, leaves: Collection[Tensor]) -> bool:
    """Whether W, b and c, or J and b, are themselves what is learned, or J is laid out from its upper half.

    Args:
        model: a target; with a method `free_couplings()`, the parameter `[n (n − 1) / 2]` of which each entry is one coupling
            J_ij, i < j, row by row. What it says is checked against the distribution.
        distribution: of the target, with its graph.
        leaves: what is learned.
    """
    learned = {id(leaf) for leaf in leaves if leaf.requires_grad}
    tensors = distribution.parameters
    if len({id(t) for t in tensors}) < len(tensors):
        return False
    if all(id(t) in learned for t in tensors):
        return True
    couplings = getattr(root_module(model), "free_couplings", None)
    if isinstance(distribution, RBM) or not callable(couplings) or id(tensors[1]) not in learned:
        return False
    leaf = couplings()
    return id(leaf) in learned and _laid_out(tensors[0], leaf, [t for t in leaves if t is not leaf])


def _laid_out(J: Tensor, leaf: Tensor, others: list[Tensor]) -> bool:
    """Whether J has the entries of `leaf` above its diagonal and, transposed, below, and nothing of other leaves."""
    row, column = torch.triu_indices(len(J), len(J), 1, device=J.device)
    if not J.requires_grad or leaf.shape != row.shape or not torch.equal(J.detach()[row, column], leaf.detach()):
        return False
    weights = torch.arange(1, len(row) + 1, device=J.device).remainder(97).to(J)  # another for each neighbour, exact in floats
    seed = torch.zeros_like(J)
    seed[row, column] = seed[column, row] = weights
    found, *rest = torch.autograd.grad(J, [leaf, *others], seed, retain_graph=True, allow_unused=True)
    return found is not None and torch.equal(found, 2 * weights) and all(g is None or not bool(g.any()) for g in rest)
