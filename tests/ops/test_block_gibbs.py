"""Block Gibbs kernels against transition operators that are enumerated."""

import pytest
import torch
from stats import frequencies_agree

from pyrovae.ops import codes_to_index, index_to_codes
from pyrovae.ops.block_gibbs import boltzmann_sweep, colour_blocks, rbm_hidden, rbm_sweep

N = 200_000


def codes(bits):
    return index_to_codes(torch.arange(2**bits), 2, bits).double()


def rbm(visible=4, hidden=3, scale=1.5):
    return scale * torch.randn(visible, hidden), torch.randn(visible), torch.randn(hidden)


def bernoulli_table(logits, states):
    """p(state | row) `[rows, states]` of independent bits."""
    return torch.exp(logits @ states.T - torch.nn.functional.softplus(logits, threshold=1e9).sum(-1, keepdim=True))


def rbm_kernels(weight, b, c, beta=1.0, base=0.0):
    """p(h | v) `[2^D, 2^H]` and p(v | h) `[2^H, 2^D]`."""
    v, h = codes(len(b)), codes(len(c))
    up = bernoulli_table(beta * (c + v @ weight), h)
    return up, bernoulli_table(beta * (b + h @ weight.T) + (1 - beta) * base, v)


def rbm_law(weight, b, c, beta=1.0, base=0.0):
    """p(v, h) `[2^D, 2^H]`."""
    v, h = codes(len(b)), codes(len(c))
    energy = beta * ((v @ b)[:, None] + h @ c + v @ weight @ h.T) + (1 - beta) * (v * base).sum(-1, keepdim=True)
    return energy.flatten().softmax(0).view_as(energy)


def counts(states):
    return torch.bincount(codes_to_index(states, 2), minlength=2 ** states.shape[-1])


def one_sweep(weight, b, c, start, **options):
    """How often one sweep from the visible state `start` ends in each (v, h)."""
    v, h = start.expand(N, -1).clone(), torch.empty(N, len(c), dtype=start.dtype)
    beta = options.get("inverse_temperature")
    rbm_hidden(v, h, weight, c, inverse_temperature=beta)
    means = rbm_sweep(v, h, weight, b, c, **options)
    return counts(torch.cat([v, h], -1)), means, h


def test_one_sweep_of_an_rbm_is_its_transition_operator():
    weight, b, c = rbm()
    up, down = rbm_kernels(weight, b, c)
    law = rbm_law(weight, b, c)
    marginal = law.sum(1)
    operator = up @ down
    flow = marginal[:, None] * operator
    assert torch.allclose(flow, flow.T, atol=1e-14)  # v -> h -> v' is reversible
    joint = operator[5][:, None] * up  # of (v', h') from v = 5
    assert frequencies_agree(one_sweep(weight, b, c, codes(4)[5])[0], N, joint.flatten())
    assert not frequencies_agree(one_sweep(weight, b, c + 0.2, codes(4)[5])[0], N, joint.flatten())


def test_several_sweeps_and_conditional_means():
    weight, b, c = rbm()
    up, down = rbm_kernels(weight, b, c)
    found, (p_v, p_h), h = one_sweep(weight, b, c, codes(4)[9], num_sweeps=3)
    operator = torch.linalg.matrix_power(up @ down, 3)
    assert frequencies_agree(found, N, (operator[9][:, None] * up).flatten())
    assert p_v.shape == (N, 4)
    v = torch.zeros(N, 4)
    rbm_sweep(v, h.clone(), weight, b, c, probs=(p_v, p_h))
    assert torch.allclose(p_v, torch.sigmoid(b + h @ weight.T))
    assert torch.allclose(p_h, torch.sigmoid(c + v @ weight))


def test_every_row_has_its_own_temperature():
    weight, b, c = rbm()
    base = torch.randn(4)
    for beta in (0.0, 0.3):
        up, down = rbm_kernels(weight, b, c, beta, base)
        law = rbm_law(weight, b, c, beta, base)
        assert torch.allclose(law.sum(0) @ down @ up, law.sum(0), atol=1e-14)
        options = {"inverse_temperature": torch.full((N, 1), beta), "base_bias": base}
        joint = (up @ down)[5][:, None] * up
        assert frequencies_agree(one_sweep(weight, b, c, codes(4)[5], **options)[0], N, joint.flatten())
        assert not frequencies_agree(one_sweep(weight, b, c, codes(4)[5])[0], N, joint.flatten())
    betas = torch.tensor([[0.0], [1.0], [0.5]])
    h = torch.ones(3, 3)
    p_v, _ = rbm_sweep(torch.zeros(3, 4), h.clone(), weight, b, c, inverse_temperature=betas, base_bias=base)
    assert torch.allclose(p_v, torch.sigmoid(betas * (b + h @ weight.T) + (1 - betas) * base))
    for scale in (None, betas):
        v, fields = torch.zeros(3, 4), torch.zeros(3, 3)
        _, p_h = rbm_sweep(v, h.clone(), weight, b, c, inverse_temperature=scale, fields=fields)
        assert torch.allclose(fields, c + v @ weight)
        assert torch.allclose(p_h, torch.sigmoid((1.0 if scale is None else betas) * fields))


@pytest.mark.parametrize("probability", [0.0, 1.0, 1e-3, 0.5])
def test_bits_have_their_probability(probability):
    v, h = torch.zeros(1000, 200, dtype=torch.float32), torch.zeros(1000, 1, dtype=torch.float32)
    b = torch.logit(torch.full((200,), probability, dtype=torch.float32))
    rbm_sweep(v, h, torch.zeros(200, 1, dtype=torch.float32), b, torch.zeros(1, dtype=torch.float32))
    assert set(v.unique().tolist()) <= {0.0, 1.0}
    assert frequencies_agree([int(v.sum())], v.numel(), [probability])


def machine(n, *, zeros=()):
    j = torch.randn(n, n).triu(1) * 1.5
    for i, k in zeros:
        j[i, k] = 0.0
    return j + j.T, torch.randn(n)


def boltzmann_operator(j, b, blocks, beta=1.0, base=0.0):
    """One sweep `[2^n, 2^n]`, block by block, from conditionals that are enumerated."""
    states = codes(len(b))
    operator = torch.eye(len(states))
    for block in blocks:
        p = torch.sigmoid(beta * (b + states @ j) + (1 - beta) * base)  # [2^n, n]
        same = torch.ones(len(states), len(states), dtype=torch.bool)
        step = torch.ones(len(states), len(states))
        for unit in range(len(b)):
            on = states[:, unit] == 1
            if unit in block.tolist():
                step *= torch.where(on, p[:, unit, None], 1 - p[:, unit, None])
            else:
                same &= on[:, None] == on
        operator = operator @ (step * same)
    return operator


@pytest.mark.parametrize("zeros", [(), ((0, 1), (0, 3), (2, 3)), ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))])
@pytest.mark.parametrize("beta", [None, 0.4])
def test_one_sweep_of_a_boltzmann_machine_is_its_transition_operator(zeros, beta):
    j, b = machine(4, zeros=zeros)
    blocks = colour_blocks(j)
    operator = boltzmann_operator(j, b, blocks, beta or 1.0)
    law = ((beta or 1.0) * (0.5 * ((codes(4) @ j) * codes(4)).sum(-1) + codes(4) @ b)).softmax(0)
    assert torch.allclose(law @ operator, law, atol=1e-14)
    x = codes(4)[6].expand(N, -1).clone()
    scale = None if beta is None else torch.full((N, 1), beta)
    boltzmann_sweep(x, j, b, inverse_temperature=scale)
    assert frequencies_agree(counts(x), N, operator[6])
    assert not frequencies_agree(counts(x), N, boltzmann_operator(j, b + 0.2, blocks, beta or 1.0)[6])


def test_a_boltzmann_machine_between_its_base_and_itself():
    j, b = machine(3)
    base, betas = torch.randn(3), torch.tensor([0.0, 0.3])
    x = torch.ones(2 * N, 3)
    boltzmann_sweep(x, j, b, inverse_temperature=betas.repeat_interleave(N)[:, None], base_bias=base)
    for part, beta in zip(x.split(N), betas.tolist(), strict=True):
        assert frequencies_agree(counts(part), N, boltzmann_operator(j, b, colour_blocks(j), beta, base)[7])
        assert not frequencies_agree(counts(part), N, boltzmann_operator(j, b, colour_blocks(j), beta)[7])


def test_biases_of_each_chain():
    j, _ = machine(3)
    biases = torch.randn(2, 3)
    x = torch.zeros(2 * N, 3)
    boltzmann_sweep(x, j, biases.repeat_interleave(N, 0), num_sweeps=2, blocks=colour_blocks(j))
    for part, b in zip(x.split(N), biases, strict=True):
        operator = boltzmann_operator(j, b, colour_blocks(j))
        assert frequencies_agree(counts(part), N, (operator @ operator)[0])


def test_blocks():
    j, _ = machine(5)
    assert sorted(torch.cat(colour_blocks(j)).tolist()) == list(range(5))
    assert len(colour_blocks(j)) == 5
    grid = torch.zeros(36, 36)
    for i in range(36):
        for k in (i + 1, i + 6):
            if k < 36 and (k != i + 1 or k % 6):
                grid[i, k] = grid[k, i] = 1.0
    blocks = colour_blocks(grid)
    assert sorted(torch.cat(blocks).tolist()) == list(range(36))
    assert all(not bool(grid[block][:, block].any()) for block in blocks)
    assert len(blocks) <= 4
    assert [len(block) for block in colour_blocks(torch.zeros(3, 3))] == [3]
    boltzmann_sweep(torch.zeros(2, 0), torch.zeros(0, 0), torch.zeros(0))


def test_nothing_is_recorded_and_the_generator_is_obeyed():
    weight, b, c = (p.requires_grad_() for p in rbm())
    state = torch.get_rng_state()
    found = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        v, h = torch.zeros(5, 4), torch.zeros(5, 3)
        rbm_sweep(v, h, weight, b, c, num_sweeps=4, generator=generator)
        x = torch.zeros(5, 4)
        boltzmann_sweep(x, weight @ weight.T, b, generator=generator)
        assert not v.requires_grad
        found.append((v, h, x))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
