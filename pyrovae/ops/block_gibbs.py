"""Block Gibbs sweeps of restricted and general Boltzmann machines, in place, for many chains at once.

Chains are the rows of a matrix, units its columns, states 0 or 1 in the dtype of the weights. A bit is drawn as
`uniform < probability`, four times faster on a CPU than `torch.bernoulli`; a probability is thereby rounded up to a multiple
of 2^-24 in float32 (2^-53 in float64). Gradients are never recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def rbm_sweep(
    v: Tensor,
    h: Tensor,
    weight: Tensor,
    visible_bias: Tensor,
    hidden_bias: Tensor,
    *,
    num_sweeps: int = 1,
    inverse_temperature: Tensor | None = None,
    base_bias: Tensor | None = None,
    probs: tuple[Tensor, Tensor] | None = None,
    fields: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw v ~ p(v | h), then h ~ p(h | v), in place, for C chains of p(v, h) ∝ exp(bᵀv + cᵀh + vᵀWh).

    The state is h: what v holds before does not matter. A chain that starts from given v needs :func:`rbm_hidden` first.
    p(v, h) is left invariant, exactly. With β, each row has its own p_β(v, h) ∝ exp(β (bᵀv + cᵀh + vᵀWh) + (1 − β) b₀ᵀv).

    Cost of a sweep: two matrix products, 4 C D H operations, and C (D + H) uniform numbers; nothing is allocated with `probs`.

    Args:
        v: visible states `[C, D]`, overwritten.
        h: hidden states `[C, H]`, overwritten.
        weight: W `[D, H]`.
        visible_bias: b `[D]`.
        hidden_bias: c `[H]`.
        num_sweeps: how many.
        inverse_temperature: β of each chain, `[C, 1]`; None is 1.
        base_bias: b₀ `[D]` of the distribution at β = 0; None is 0, the uniform distribution.
        probs: buffers like `v` and `h`.
        fields: a buffer like `h`, which gets the hidden units' inputs c + vW of the last draw, at β = 1.
        generator: of the uniform numbers.

    Returns:
        The conditional means p(v = 1 | h) and p(h = 1 | v) of the last draws, in the buffers.

    References:
        An introduction to restricted Boltzmann machines (Fischer and Igel, 2012)
        https://doi.org/10.1007/978-3-642-33275-3_2
    """
    p_v, p_h = probs if probs is not None else (torch.empty_like(v), torch.empty_like(h))
    rest = None if inverse_temperature is None or base_bias is None else 1 - inverse_temperature
    for _ in range(num_sweeps):
        torch.addmm(visible_bias, h, weight.t(), out=p_v)
        if inverse_temperature is not None:
            p_v.mul_(inverse_temperature)
        if rest is not None and base_bias is not None:
            p_v.addcmul_(rest, base_bias)
        v.uniform_(generator=generator).lt_(p_v.sigmoid_())
        rbm_hidden(
            v, h, weight, hidden_bias, inverse_temperature=inverse_temperature, probs=p_h, fields=fields, generator=generator
        )
    return p_v, p_h


@torch.no_grad()
def rbm_hidden(
    v: Tensor,
    h: Tensor,
    weight: Tensor,
    hidden_bias: Tensor,
    *,
    inverse_temperature: Tensor | None = None,
    probs: Tensor | None = None,
    fields: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw h ~ p(h | v), in place; the arguments are those of :func:`rbm_sweep`.

    Returns:
        p(h = 1 | v) `[C, H]`, in the buffer `probs`.
    """
    probs = torch.empty_like(h) if probs is None else probs
    fields = probs if fields is None else fields
    torch.addmm(hidden_bias, v, weight, out=fields)
    if inverse_temperature is not None:
        torch.mul(fields, inverse_temperature, out=probs)
    elif fields is not probs:
        probs.copy_(fields)
    h.uniform_(generator=generator).lt_(probs.sigmoid_())
    return probs


@torch.no_grad()
def boltzmann_sweep(
    x: Tensor,
    couplings: Tensor,
    bias: Tensor,
    *,
    num_sweeps: int = 1,
    blocks: tuple[Tensor, ...] | None = None,
    inverse_temperature: Tensor | None = None,
    base_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Draw every unit of C chains of p(x) ∝ exp(½ xᵀJx + bᵀx) given the others, once a sweep, in place.

    Units that are not coupled are drawn together: one step for each colour of the graph of J, two for an RBM or a grid, n
    where J is dense. p(x) is left invariant, exactly.

    Cost of a sweep: C n² operations, C n uniform numbers, and one small step a colour.

    Args:
        x: states `[C, n]`, overwritten.
        couplings: J `[n, n]`, symmetric with a zero diagonal.
        bias: b `[n]`, or `[C, n]` with one for each chain (what clamped units add).
        num_sweeps: how many.
        blocks: what :func:`colour_blocks` returns, for calls with the same zeros in J; None finds them.
        inverse_temperature: β of each chain, `[C, 1]`, of p_β(x) ∝ exp(β (½ xᵀJx + bᵀx) + (1 − β) b₀ᵀx); None is 1.
        base_bias: b₀ `[n]` of the distribution at β = 0; None is 0, the uniform distribution.
        generator: of the uniform numbers.
    """
    if not x.shape[1]:
        return
    blocks = colour_blocks(couplings) if blocks is None else blocks
    order = torch.cat(blocks)
    sizes = [len(block) for block in blocks]
    rows = couplings[order][:, order].split(sizes)  # [block, n] each
    biases = bias.t()[order] if bias.dim() == 2 else bias[order].unsqueeze(-1)
    offsets = biases.split(sizes)  # [block, C or 1]
    scale = None if inverse_temperature is None else inverse_temperature.reshape(1, -1)
    state = x.t()[order].contiguous()  # [n, C]: a block is a run of rows
    rests: tuple[Tensor | None, ...] = (None,) * len(blocks)
    if scale is not None and base_bias is not None:
        rests = (base_bias[order].unsqueeze(-1) * (1 - scale)).split(sizes)  # [block, C]
    parts = state.split(sizes)
    for _ in range(num_sweeps):
        for part, row, offset, rest in zip(parts, rows, offsets, rests, strict=True):
            field = torch.addmm(offset, row, state)
            if scale is not None:
                field.mul_(scale)
            if rest is not None:
                field.add_(rest)
            part.uniform_(generator=generator).lt_(field.sigmoid_())
    x[:, order] = state.t()


@torch.no_grad()
def colour_blocks(couplings: Tensor) -> tuple[Tensor, ...]:
    """Blocks of units that are not coupled among themselves: a greedy colouring of the graph of J, largest degrees first.

    Args:
        couplings: J `[n, n]`.

    Returns:
        The units of each block, `[size]` integers; every unit is in one block. A bipartite graph whose sides are complete
        (an RBM's) gives two.

    Example:
        >>> J = torch.zeros(4, 4)
        >>> J[:2, 2:] = 1.0
        >>> [block.tolist() for block in colour_blocks(J + J.T)]
        [[0, 1], [2, 3]]
    """
    adjacent = (couplings != 0).cpu()
    degrees = adjacent.sum(0)
    taken: list[Tensor] = []  # per colour: the units that have a neighbour of it
    members: list[list[int]] = []
    for unit in degrees.argsort(descending=True, stable=True).tolist():
        colour = next((k for k, near in enumerate(taken) if not near[unit]), len(taken))
        if colour == len(taken):
            taken.append(torch.zeros_like(adjacent[0]))
            members.append([])
        taken[colour] |= adjacent[unit]
        members[colour].append(unit)
    return tuple(torch.tensor(sorted(block), device=couplings.device) for block in members)
