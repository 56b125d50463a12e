"""The centred gradient ends where the plain one does: with a penalty, and with parameters that are not all free."""

from functools import partial

import pytest
import torch

from pyrovae.distributions import RBM
from pyrovae.distributions import BoltzmannMachine as Machine
from pyrovae.inference import ContrastiveDivergence
from pyrovae.inference.undirected import free, likelihood_gradient
from pyrovae.models import BoltzmannMachine, RestrictedBoltzmannMachine

MASK = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
PENALTY = 10.0  # strong enough that steps contract fast
CHAIN = torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)


def skewed(rows=40):
    """Bits with means far from ½, the second like the first: centring moves the gradient much."""
    x = (torch.rand(rows, 4) < torch.tensor([0.9, 0.8, 0.7, 0.9])).double()
    x[:, 1] = torch.where(torch.rand(rows) < 0.8, x[:, 0], x[:, 1])
    return x


def learn(model, x, steps=300, **options):
    options = {"optim": partial(torch.optim.SGD, lr=0.5)} | options
    method = ContrastiveDivergence(negative="exact", batch_size=None, num_steps=steps, log_every=steps, exact_bits=0, **options)
    return method.fit(model, x).history[-1]


def slope(model, x, penalty=0.0):
    """The norm of the gradient of what should be at its maximum, through autograd."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    objective = model.distribution().log_prob(x).mean() - penalty / 2 / len(x) * sum(p.square().sum() for p in leaves)
    return float(torch.cat([g.flatten() for g in torch.autograd.grad(objective, leaves)]).norm())


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: RestrictedBoltzmannMachine(4, 2), lambda: BoltzmannMachine(4), lambda: Leaves()], ids=["rbm", "bm", "J"]
)
def test_a_penalty_is_centred_too(make, centered):
    x, model = skewed(), make()
    with torch.no_grad():
        next(iter(model.parameters())).normal_(0, 0.3)
        if isinstance(model, Leaves):
            model.J.copy_((model.J + model.J.T) / 2 * (1 - torch.eye(4)))
    record = learn(model, x, 700, penalty=PENALTY, centered=centered)
    assert record["centered"] == centered
    assert slope(model, x, PENALTY) < 1e-6


def test_that_test_sees_a_penalty_added_afterwards(monkeypatch):
    x, model = skewed(), RestrictedBoltzmannMachine(4, 2)
    with torch.no_grad():
        model.weight.normal_(0, 0.3)
    centred = likelihood_gradient.RBMGradient.__call__

    def afterwards(self, p, x, *args):
        decay, self.decay = self.decay, 0.0
        found = [g + decay * t.detach() for g, t in zip(centred(self, p, x, *args), p.parameters, strict=True)]
        self.decay = decay
        return found

    monkeypatch.setattr(likelihood_gradient.RBMGradient, "__call__", afterwards)
    learn(model, x, penalty=PENALTY)
    assert slope(model, x, PENALTY) > 1e-3


class Leaves(torch.nn.Module):
    """J and b are parameters."""

    def __init__(self):
        super().__init__()
        self.J, self.b = torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(4))

    def distribution(self):
        return Machine(self.J, self.b)


class FrozenCouplings(Leaves):
    """Only b is learned."""

    def __init__(self):
        super().__init__()
        self.J.data.copy_(-CHAIN)
        self.J.requires_grad_(False)


class Symmetrised(Leaves):
    """A user's J, all of A's entries free, some masked."""

    def distribution(self):
        return Machine((self.J + self.J.T) / 2 * CHAIN, self.b)


class MaskedRBM(torch.nn.Module):
    """A sparse W."""

    def __init__(self):
        super().__init__()
        self.A, self.b, self.c = (torch.nn.Parameter(0.3 * torch.randn(shape)) for shape in ((4, 2), (4,), (2,)))

    def distribution(self):
        return RBM(self.A * MASK, self.b, self.c)


class FrozenRBM(RestrictedBoltzmannMachine):
    """Random weights that stay."""

    def __init__(self):
        super().__init__(4, 2)
        self.weight.data.normal_()
        self.weight.requires_grad_(False)


class TiedBiases(torch.nn.Module):
    """One parameter is both biases."""

    def __init__(self):
        super().__init__()
        self.W, self.b = torch.nn.Parameter(0.3 * torch.randn(4, 4)), torch.nn.Parameter(torch.zeros(4))

    def distribution(self):
        return RBM(self.W, self.b, self.b)


class MaskedHalf(BoltzmannMachine):
    """Still says that its couplings are free."""

    def __init__(self):
        super().__init__(4)

    def distribution(self):
        p = super().distribution()
        return Machine(p.J * CHAIN, p.b)


@pytest.mark.parametrize("make", [FrozenCouplings, Symmetrised, MaskedRBM, FrozenRBM, MaskedHalf])
def test_parameters_that_are_not_all_free(make, monkeypatch):
    x, model = skewed(), make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert learn(model, x, penalty=PENALTY)["centered"] is False
    assert slope(model, x, PENALTY) < 1e-6
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    monkeypatch.setattr("pyrovae.inference.undirected.contrastive.all_free", lambda *_: True)
    assert learn(model, x, penalty=PENALTY)["centered"] is True
    assert slope(model, x, PENALTY) > 1e-3


def test_frozen_couplings_without_a_penalty():
    x, model = skewed(), FrozenCouplings()
    assert learn(model, x, 800, optim=partial(torch.optim.SGD, lr=2.0))["centered"] is False
    assert slope(model, x) < 1e-6


def test_what_is_free():
    def of(model):
        return free.all_free(model, model.distribution(), list(model.parameters()))

    assert of(RestrictedBoltzmannMachine(4, 2))
    assert of(BoltzmannMachine(3, 2))
    assert of(Leaves())
    for make in (FrozenCouplings, Symmetrised, MaskedRBM, FrozenRBM, TiedBiases, MaskedHalf):
        assert not of(make()), make


def test_weight_decay_of_an_optimizer_is_not_centred():
    x, model = skewed(), RestrictedBoltzmannMachine(4, 2)
    with torch.no_grad():
        model.weight.normal_(0, 0.3)
    record = learn(model, x, optim=partial(torch.optim.SGD, lr=0.5, weight_decay=PENALTY / len(x)))
    assert record["centered"] is False
    assert slope(model, x, PENALTY) < 1e-6
