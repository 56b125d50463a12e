"""The RBM as a distribution, against sums over all of its states."""

import copy
import itertools

import pyro
import pyro.distributions as dist
import pytest
import stats
import torch
from pyro.infer import Predictive, TraceEnum_ELBO

from pyrovae.distributions import RBM, PersistentChains


def states(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def parameters(d=4, h=3, scale=1.5):
    return [(scale * torch.randn(shape)).requires_grad_() for shape in ((d, h), (d,), (h,))]


def brute_log_prob(W, b, c):
    """log p(v, h) of all states, `[2^D, 2^H]`, from the definition."""
    v, h = states(len(b)), states(len(c))
    minus_energy = (v @ b)[:, None] + h @ c + v @ W @ h.T
    return minus_energy - minus_energy.logsumexp((0, 1))


@pytest.mark.parametrize(("d", "h"), [(4, 3), (3, 5), (1, 1)])
def test_log_prob_and_its_gradient(d, h):
    W, b, c = parameters(d, h)
    rbm, joint = RBM(W, b, c), brute_log_prob(W, b, c)
    v = states(d)
    expected = joint.logsumexp(1)
    assert rbm.partition_is == "exact"
    assert rbm.normalized
    assert torch.allclose(rbm.log_prob(v), expected, rtol=0, atol=1e-10)
    assert torch.allclose(-rbm.free_energy(v) - rbm.log_partition(), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(RBM(W, b + 0.01, c).log_prob(v), expected, atol=1e-6)
    weights = torch.randn(2**d)
    ours = torch.autograd.grad((rbm.log_prob(v) * weights).sum(), (W, b, c))
    for a, e in zip(ours, torch.autograd.grad((expected * weights).sum(), (W, b, c)), strict=True):
        assert torch.allclose(a, e, rtol=0, atol=1e-10)


def test_log_prob_is_differentiable_in_the_value():
    rbm = RBM(*parameters())
    v = states(4).requires_grad_()
    (grad,) = torch.autograd.grad(rbm.log_prob(v).sum(), v)
    expected = rbm.b + torch.sigmoid(rbm.c + v @ rbm.W) @ rbm.W.T
    assert torch.allclose(grad, expected, rtol=0, atol=1e-12)


def test_moments_conditionals_and_the_joint():
    W, b, c = parameters()
    rbm, p = RBM(W, b, c), brute_log_prob(W, b, c).detach().exp()
    v, h = states(4), states(3)
    mean = p.sum(1) @ v
    assert torch.allclose(rbm.mean, mean, rtol=0, atol=1e-10)
    assert torch.allclose(rbm.variance, mean - mean**2, rtol=0, atol=1e-10)
    hidden = torch.stack([rbm.hidden_given(v).log_prob(row) for row in h], 1)
    assert torch.allclose(hidden, (p / p.sum(1, keepdim=True)).log(), rtol=0, atol=1e-10)
    visible = torch.stack([rbm.visible_given(h).log_prob(row) for row in v])
    assert torch.allclose(visible, (p / p.sum(0)).log(), rtol=0, atol=1e-10)
    both = torch.cat((v.repeat_interleave(8, 0), h.repeat(16, 1)), 1)
    assert torch.allclose(rbm.joint().log_prob(both).reshape(16, 8), p.log(), rtol=0, atol=1e-10)
    assert torch.allclose(rbm.joint().marginal(4).log_prob(v), rbm.log_prob(v), rtol=0, atol=1e-10)


def test_shapes_and_expansion():
    W, b, c = parameters()
    rbm = RBM(W, b, c)
    wide = rbm.expand((3, 2))
    assert wide.W is W
    assert wide.b is b
    assert (rbm.batch_shape, wide.batch_shape, wide.event_shape) == ((), (3, 2), (4,))
    assert wide.sample((5,)).shape == (5, 3, 2, 4)
    assert wide.log_prob(torch.ones(4)).shape == (3, 2)
    assert wide.log_prob(wide.sample((5,))).shape == (5, 3, 2)
    assert wide.mean.shape == wide.variance.shape == (3, 2, 4)
    assert wide.enumerate_support().shape == (16, 3, 2, 4)
    assert wide.enumerate_support(expand=False).shape == (16, 1, 1, 4)
    assert torch.equal(rbm.enumerate_support(), states(4))
    assert wide.unexpanded().batch_shape == ()
    assert rbm.log_prob(torch.ones(4, dtype=torch.long)) == rbm.log_prob(torch.ones(4))


def test_exact_draws():
    rbm = RBM(*parameters())
    n, index = 20000, torch.tensor([8, 4, 2, 1])
    counts = torch.bincount((rbm.sample((n,)) @ index.double()).long(), minlength=16)
    p = rbm.log_prob(states(4)).detach().exp()
    assert stats.frequencies_agree(counts, n, p)
    assert not stats.frequencies_agree(counts, n, p.flip(0))


def test_draws_from_chains_keep_the_law_and_leave_the_chains():
    W, b, c = parameters()
    exact, chains = RBM(W, b, c), PersistentChains(20000, 2)
    chains.states = exact.sample((20000,))  # in equilibrium
    before = chains.states.clone()
    draws = RBM(W, b, c, chains=chains).sample((20000,))
    assert torch.equal(chains.states, before)
    assert not torch.equal(draws, before)
    counts = torch.bincount((draws @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long(), minlength=16)
    p = exact.log_prob(states(4)).detach().exp()
    assert stats.frequencies_agree(counts, 20000, p)
    assert not stats.frequencies_agree(counts, 20000, p.flip(0))
    assert RBM(W, b, c, chains=PersistentChains(3)).sample((7,)).shape == (7, 4)  # fewer chains than draws, no states yet


def test_chains_give_the_gradient_of_log_partition():
    W, b, c = parameters()
    chains = PersistentChains(50, 3, units=4)
    rbm, v = RBM(W, b, c, chains=chains), states(4)[5:9]
    assert (rbm.partition_is, rbm.normalized) == ("unknown", False)
    value = rbm.log_prob(v)
    assert torch.allclose(value, -rbm.free_energy(v), rtol=0, atol=1e-12)  # log Z is left out
    after = chains.states.clone()
    ours = torch.autograd.grad(value.mean(), (W, b, c))
    expected = torch.autograd.grad(rbm.free_energy(after).mean() - rbm.free_energy(v).mean(), (W, b, c))
    for a, e in zip(ours, expected, strict=True):
        assert torch.allclose(a, e, rtol=0, atol=1e-12)
    exact = torch.autograd.grad(RBM(W, b, c).log_prob(v).mean(), W)[0]
    # with all states as often as the law has them, that is the exact gradient
    p = RBM(W, b, c).log_prob(states(4)).detach().exp()
    by_law = torch.autograd.grad((p * rbm.free_energy(states(4))).sum() - rbm.free_energy(v).mean(), W)[0]
    assert torch.allclose(by_law, exact, rtol=0, atol=1e-10)
    assert not torch.allclose(ours[0], exact, atol=1e-3)


def test_chains_move_only_where_something_is_learned():
    W, b, c = parameters()
    chains = PersistentChains(5, units=4)
    rbm, v, start = RBM(W, b, c, chains=chains), torch.ones(4), chains.states.clone()
    with torch.no_grad():
        rbm.log_prob(v)
    rbm.sample((3,))
    RBM(W.detach(), b.detach(), c.detach(), chains=chains).log_prob(v.clone().requires_grad_())
    assert torch.equal(chains.states, start)
    for _ in range(5):
        rbm.log_prob(v)
    assert not torch.equal(chains.states, start)


def test_two_evaluations_before_one_backward_pass():
    rbm = RBM(*parameters(), chains=PersistentChains(5))
    (rbm.log_prob(torch.ones(4)) + rbm.log_prob(torch.zeros(4))).backward()
    assert bool(torch.isfinite(rbm.W.grad).all())


def test_chains_are_saved_moved_and_copied():
    W, b, c = parameters()
    chains = PersistentChains(5)
    RBM(W, b, c, chains=chains).log_prob(torch.ones(4)).backward()
    assert chains.states.shape == (5, 4)
    for again in (PersistentChains(5), PersistentChains(5, units=4), copy.deepcopy(chains)):
        again.load_state_dict(chains.state_dict())
        assert torch.equal(again.states, chains.states)
    assert chains.float().states.dtype == torch.float32
    W32, b32, c32 = (p.detach().float().requires_grad_() for p in (W, b, c))
    assert RBM(W32, b32, c32, chains=chains).sample((3,)).dtype == torch.float32
    chains.states.fill_(2.0)
    chains.reset()
    assert bool(((chains.states == 0) | (chains.states == 1)).all())


def test_given_log_partition():
    W, b, c = parameters()
    v = states(4)
    for given in (3.5, torch.tensor(3.5)):
        rbm = RBM(W, b, c, log_partition=given)
        assert (rbm.partition_is, rbm.normalized) == ("given", True)
        assert float(rbm.log_partition()) == 3.5
        assert torch.allclose(rbm.log_prob(v), -rbm.free_energy(v) - 3.5)
        with pytest.raises(ValueError, match="expected a log_partition with a gradient"):
            rbm.log_prob(v).sum().backward()
        rbm.log_prob(v).sum().detach()
    # the gradient comes from chains, or from the given tensor
    chains = PersistentChains(5, units=4)
    rbm = RBM(W, b, c, log_partition=3.5, chains=chains)
    value = rbm.log_prob(v)
    assert torch.allclose(value, -rbm.free_energy(v) - 3.5)
    ours = torch.autograd.grad(value.mean(), W)[0]
    assert torch.allclose(ours, torch.autograd.grad(rbm.free_energy(chains.states).mean() - rbm.free_energy(v).mean(), W)[0])
    exact = RBM(W, b, c)
    rbm = RBM(W, b, c, log_partition=exact.log_partition())
    for a, e in zip(*(torch.autograd.grad(r.log_prob(v[:3]).sum(), (W, b, c)) for r in (rbm, exact)), strict=True):
        assert torch.allclose(a, e, rtol=0, atol=1e-12)


def test_float32():
    W, b, c = parameters()
    rbm = RBM(W.float(), b.float(), c.float())
    v = states(4).float()
    assert rbm.log_prob(v).dtype == rbm.sample((2,)).dtype == rbm.mean.dtype == torch.float32
    assert torch.allclose(rbm.log_prob(v).double(), RBM(W, b, c).log_prob(v.double()), atol=1e-4)


def test_in_programs():
    W, b, c = parameters()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", RBM(W, b, c), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = torch.tensor([0.3, 2.2, 1.0])
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda x: None, x)
    z = states(4)
    expected = (RBM(W, b, c).log_prob(z) + dist.Normal(z.sum(-1), 1.0).log_prob(x[:, None])).logsumexp(1).sum()
    assert torch.allclose(-loss, expected, rtol=0, atol=1e-10)
    for parallel in (False, True):
        assert Predictive(model, num_samples=6, parallel=parallel)(x)["z"].shape == (6, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda W, b, c: (W.T, b, c), r"expected W \[D, H\], b \[D\] and c \[H\], got \[3, 4\], \[4\] and \[3\]"),
        (lambda W, b, c: (W, b[:1], c), r"expected W \[D, H\]"),
        (lambda W, b, c: (W, b, c[:, None]), r"expected W \[D, H\]"),
        (lambda W, b, c: (W[:0], b[:0], c), r"expected W \[D, H\]"),
        (lambda W, b, c: (W.log(), b, c), "expected finite W for RBM, got .* infinite or NaN of 12"),
        (lambda W, b, c: (W, b / 0, c), "expected finite b for RBM, got 4 infinite"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        RBM(*change(*(p.detach() for p in parameters())))


def test_bad_values_and_options():
    W, b, c = parameters()
    rbm = RBM(W, b, c)
    with pytest.raises(ValueError, match=r"expected values in \{0, 1\} for RBM, got values from 0 to 255; .*binarize"):
        rbm.log_prob(torch.tensor([0.0, 255.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="got 1 NaN"):
        rbm.log_prob(torch.tensor([0.0, torch.nan, 1.0, 0.0]))
    with pytest.raises(ValueError, match=r"expected values \[..., 4\] of 4 units for RBM, got \[3\]"):
        rbm.log_prob(torch.ones(3))
    with pytest.raises(ValueError, match="expected a finite log_partition"):
        RBM(W, b, c, log_partition=float("nan"))
    with pytest.raises(ValueError, match="expected chains=PersistentChains"):
        RBM(W, b, c, chains=10)
    with pytest.raises(ValueError, match="expected chains of 4 units for RBM, got states"):
        RBM(W, b, c, chains=PersistentChains(5, units=3)).sample()
    for arguments in ({"num_chains": 0}, {"num_sweeps": 0}, {"units": 1.5}):
        with pytest.raises(ValueError, match=f"expected an integer {next(iter(arguments))} >= 1"):
            PersistentChains(**arguments)
    # where validation is off, nothing is looked at
    with pyro.validation_enabled(False):
        RBM(W, b / 0, c).free_energy(torch.full((4,), 0.5))
    RBM(W, b, c, validate_args=False).log_prob(torch.full((4,), 0.5))


def test_45_bits_are_refused():
    W, b, c = torch.zeros(50, 45, requires_grad=True), torch.zeros(50), torch.zeros(45)
    rbm, v = RBM(W, b, c), torch.ones(50)
    assert not rbm.normalized
    for call in (rbm.log_partition, rbm.sample, lambda: rbm.log_prob(v), lambda: rbm.mean):
        with pytest.raises(ValueError, match=r"45.*seconds.*bytes.*chains=PersistentChains.*AIS") as error:
            call()
        assert "2^45" in str(error.value)
    with pytest.raises(ValueError, match=r"at most 20 units to list the states of, got 50"):
        rbm.enumerate_support()
    assert bool(torch.isfinite(RBM(W, b, c, chains=PersistentChains(4)).log_prob(v)))
    given = RBM(W, b, c, log_partition=95 * torch.tensor(2.0).log())
    assert float(given.log_prob(v).detach().exp()) == pytest.approx(2.0**-50)
