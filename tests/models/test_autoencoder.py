"""The plain autoencoder: its loss by hand, and the linear one against principal components."""

import json

import pytest
import torch
from torch import nn

from pyrovae.models import AutoEncoder


def test_loss_by_hand():
    x = torch.rand(4, 5)
    net = AutoEncoder(5, 2, (7, 3), activation="Tanh")
    layers = [layer for layer in [*net.encoder, *net.decoder] if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers] == [7, 3, 2, 3, 7, 5]
    value = x
    for i, layer in enumerate(layers):
        value = value @ layer.weight.T + layer.bias
        if i == 2:
            assert torch.allclose(net.encode(x), value)
        elif i < 5:
            value = value.tanh()
    p = 1 / (1 + (-value).exp())
    assert torch.allclose(net(x), p)
    assert torch.allclose(net.decode(net.encode(x)), p)
    assert torch.allclose(net.loss(x), -(x * p.log() + (1 - x) * (1 - p).log()).sum(-1))
    squared = AutoEncoder(5, 2, (7, 3), loss="squared", activation=nn.Tanh)
    squared.load_state_dict(net.state_dict())
    assert torch.allclose(squared(x), value)
    assert torch.allclose(squared.loss(x), (x - value).square().sum(-1))
    assert squared.loss(x.expand(3, 4, 5)).shape == (3, 4)


def test_a_linear_net_is_optimal_at_the_principal_components():
    x = torch.randn(200, 5) @ torch.randn(5, 5) + 1
    centre = x.mean(0)
    values, vectors = torch.linalg.eigh((x - centre).T @ (x - centre))
    net = AutoEncoder(5, 2, (), loss="squared")
    residuals = {}
    for name, axes in {"first": vectors[:, -2:], "others": vectors[:, 1:3], "none": torch.eye(5)[:, :2]}.items():
        with torch.no_grad():
            net.encoder[0].weight.copy_(axes.T)
            net.encoder[0].bias.copy_(-centre @ axes)
            net.decoder[0].weight.copy_(axes)
            net.decoder[0].bias.copy_(centre)
        net.zero_grad()
        loss = net.loss(x).sum()
        loss.backward()
        residuals[name] = float(loss.detach()), max(float(p.grad.abs().max()) for p in net.parameters())
    assert residuals["first"][0] == pytest.approx(float(values[:3].sum()))
    assert residuals["first"][1] < 1e-9
    assert residuals["others"][0] > residuals["first"][0]
    assert residuals["none"][1] > 1e-3  # axes that are no eigenvectors are no stationary point


def test_bias_config_and_reset():
    x = torch.tensor([[0.0, 1, 1], [0, 1, 0]])
    for loss, mean in [("cross_entropy", (x.sum(0) + 1) / 4), ("squared", x.mean(0))]:
        net = AutoEncoder(3, 1, 2, loss=loss, activation="ELU")
        net.initialize_bias(x)
        with torch.no_grad():
            net.decoder[-1].weight.zero_()
        assert torch.allclose(net(x), mean.expand(2, 3))
        again = AutoEncoder(**json.loads(json.dumps(net.config)))
        assert again.config == net.config
        again.load_state_dict(net.state_dict())
        assert torch.equal(again.loss(x), net.loss(x))
        net.reset_parameters()
        assert not (net.decoder[-1].weight == 0).any()


def test_bad_arguments():
    for kwargs, message in [
        ({"visible": 0}, "visible"),
        ({"latent": 0}, "latent"),
        ({"hidden": (3, 0)}, "hidden size"),
        ({"loss": "mse"}, "'cross_entropy' or 'squared'"),
        ({"activation": "relu"}, "activation of torch.nn"),
    ]:
        with pytest.raises(ValueError, match=message):
            AutoEncoder(**kwargs)
