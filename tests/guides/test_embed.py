"""embed and reconstruct: means of q and of the data, for any guide."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from stats import bound, largest_z
from torch import nn

from pyrovae.guides import AmortizedMeanField, AmortizedStructured, embed, reconstruct
from pyrovae.handlers import relax
from pyrovae.models import HierarchicalVAE, MixedVAE, toy


def plain(x):
    with pyro.plate("data", len(x)):
        pyro.sample("h1", dist.Bernoulli(torch.sigmoid(x[:, :3])).to_event(1))


def test_means_of_every_kind():
    model = MixedVAE(5, latent=2, categories=3, hidden=8)
    guide = AmortizedMeanField(model)
    x = model.sample(4)
    sizes = {"y": 3, "z": 4}
    parts = dict(zip(("y", "z"), guide.encoder(x).split([sizes["y"], sizes["z"]], -1), strict=True))
    for wrapped in (guide, relax(guide, 0.5)):
        state = torch.get_rng_state()
        pyro.clear_param_store()
        found = embed(wrapped, x)
        assert torch.equal(state, torch.get_rng_state())
        assert list(pyro.get_param_store()) == []
        assert torch.allclose(found["y"], torch.softmax(parts["y"], -1))
        assert torch.allclose(found["z"], parts["z"][:, :2])
        assert not found["z"].requires_grad
        assert torch.equal(found["y"], embed(wrapped, x)["y"])


def test_plain_functions_and_categories():
    x = torch.randn(5, 4)
    assert torch.allclose(embed(plain, x)["h1"], torch.sigmoid(x[:, :3]))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=x))

    assert torch.allclose(embed(guide, x)["c"], torch.softmax(x, -1))


def test_upper_layers_by_enumeration():
    model = HierarchicalVAE(6, [("bernoulli", 3), ("normal", 2)], hidden=8)
    guide = AmortizedStructured(model)
    x = model.sample(4)
    h1 = torch.sigmoid(guide.encoders["h1"](x)).detach()
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    weights = torch.where(states[:, None] > 0, h1, 1 - h1).prod(-1)  # [S, rows]
    means = guide.encoders["h2"](states)[:, :2].detach()
    exact = torch.einsum("sn,sd->nd", weights, means)
    spread = (torch.einsum("sn,sd->nd", weights, means**2) - exact**2).sqrt()
    found = embed(guide, x, num_samples=300)
    assert torch.allclose(found["h1"], h1)
    assert largest_z(found["h2"], exact, spread / 300**0.5) < bound(8)
    assert largest_z(found["h2"] + spread / 2, exact, spread / 300**0.5) > bound(8)
    assert torch.equal(found["h2"], embed(guide, x, num_samples=300)["h2"])


def test_reconstructions_by_enumeration():
    net = toy.belief_net(5, 3)
    x = net.sample(4)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    q = torch.sigmoid(x[:, :3])
    weights = torch.where(states[:, None] > 0, q, 1 - q).prod(-1)
    pixels = torch.sigmoid(net.biases[0] + states @ net.weights[0]).detach()
    exact = torch.einsum("sn,sd->nd", weights, pixels)
    spread = (torch.einsum("sn,sd->nd", weights, pixels**2) - exact**2).sqrt()
    for model, guide in ((net, plain), (relax(net, 0.5), relax(plain, 0.5))):
        found = reconstruct(model, guide, x, num_samples=300)
        assert found.shape == x.shape
        assert largest_z(found, exact, spread / 300**0.5) < bound(20)  # soft codes would give another mean
        assert largest_z(found + spread / 2, exact, spread / 300**0.5) > bound(20)
    one = reconstruct(net, plain, x)
    assert bool((one[:, None] - pixels).abs().sum(-1).min(-1).values.max() < 1e-12)  # that of a hard code
    assert list(pyro.get_param_store()) == []


def test_refusals():
    net = toy.belief_net(5, 3)
    x = net.sample(4)
    with pytest.raises(ValueError, match="expected num_samples >= 1, got 0"):
        reconstruct(net, plain, x, num_samples=0)
    with pytest.raises(ValueError, match="expected num_samples >= 2, got 1"):
        embed(plain, x, num_samples=1)

    def other(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h2", dist.Bernoulli(torch.zeros(3)).to_event(1))

    with pytest.raises(ValueError, match=r"expected the guide to sample the model's latents \['h1'\], got \['h2'\]"):
        reconstruct(net, other, x)
    with pytest.raises(ValueError, match=r"expected x in \{0, 1\}"):
        reconstruct(net, plain, 255 * x)

    def blind(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(torch.zeros(3)).to_event(1))

    with pytest.raises(ValueError, match="expected a model that observes its data"):
        reconstruct(blind, plain, x)


def test_a_foreign_encoder():
    model = toy.LinearGaussian()
    x = model(batch_size=3).detach()
    net = nn.Linear(3, 4)
    found = embed(AmortizedMeanField(model, net), x)
    assert torch.allclose(found["z"], net(x)[:, :2])
