"""Gibbs sweeps of declared structures: one sweep is the product of the exact conditionals, and equals the table's in law."""

import pytest
import torch
from brute_force import BruteForce, bits
from gibbs_kernel import coordinates, kernel_agrees
from stats import bound, chains_agree, largest_z

from pyrovae.inference import MCMC, Exact, Gibbs, GibbsKernel
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.mcmc.gibbs import make_sweep
from pyrovae.inference.mcmc.layer_sweep import FactorialSweep, LayerSweep, _Children
from pyrovae.inference.mean_field.layered_net import LayeredNet, layered_net
from pyrovae.models import DeepBeliefNet, RestrictedBoltzmannMachine, SigmoidBeliefNet, toy

NETS = {
    "one unit": lambda: toy.belief_net(3, 1),
    "one layer": lambda: toy.belief_net(5, 3),
    "two layers": lambda: toy.belief_net(4, [2, 3]),
    "three layers": lambda: toy.belief_net(3, [2, 2, 1]),
    "under an RBM": lambda: deep(4, [3, 2]),
    "two layers under an RBM": lambda: deep(3, [2, 2, 3]),
}


def deep(visible, hidden, scale=1.5):
    torch.manual_seed(1)
    net = DeepBeliefNet(visible, hidden)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, scale)
    return net


def prepared(net, x, chains):
    """The brute-force posterior, and the sweep that Gibbs would take of a net without a table."""
    with torch.no_grad():
        log_joint = LogJoint(net, (x,), {})
        latents = log_joint.structure.latents
        brute = BruteForce(net, (x,), {latent.name: bits(latent.components) for latent in latents}).solve()
        states = len(brute.states)
        sweep, evaluations = make_sweep(log_joint, chains * states, 0)
    assert isinstance(sweep, LayerSweep)
    assert evaluations == 0
    return brute, sweep


@pytest.mark.parametrize("name", NETS)
def test_sweep_is_the_product_of_conditionals(name):
    net = NETS[name]()
    brute, sweep = prepared(net, net.sample(2), 300)
    # The sweep goes from the top layer down, as the program does.
    assert coordinates(brute, sweep.latents, (0,)).shape[1] == sum(latent.components for latent in sweep.latents)
    assert kernel_agrees(sweep, brute, sweep.latents, 300)


@pytest.mark.parametrize(("name", "wrong"), [("one layer", "children"), ("two layers", "parents"), ("under an RBM", "top")])
def test_a_wrong_conditional_is_caught(name, wrong, monkeypatch):
    """Without the normalisers of the children, without the parents' logits, or with the top RBM's sign turned."""
    net = NETS[name]()
    brute, sweep = prepared(net, net.sample(2), 300)
    if wrong == "children":
        monkeypatch.setattr(_Children, "difference", lambda self, received, j: torch.zeros(len(received)))
    elif wrong == "parents":
        layers = sweep.net.layers
        layers.weights[1].zero_()
    else:
        top = sweep._children[-1]
        top._pieces = [(part, 1) for part, _ in top._pieces]
    assert not kernel_agrees(sweep, brute, sweep.latents, 300)


@pytest.mark.parametrize("scale", [1.0, 4.0, 60.0, 900.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_of_normalisers(scale, dtype):
    """By products and by softplus, against float64: also where e^w is beyond the dtype, and over many units."""
    torch.manual_seed(0)
    net = SigmoidBeliefNet(300, 5)
    with torch.no_grad():
        net.weights[0].mul_(0).add_(torch.randn_like(net.weights[0]).clamp(-1, 1) * scale)
    h = (torch.rand(7, 5) < 0.5).double()
    exact = _exact_differences(net, h)
    net = net.to(dtype)
    layered = LayeredNet(net.layers(), net.sample(7)).snapshot()
    children = _Children(layered, 0)
    assert children._products == (scale <= 4.0)
    for j in range(5):
        rest = h.clone()
        rest[:, j] = 0
        found = children.difference(children.receive(rest.to(dtype)), j)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        assert torch.allclose(found.double(), exact[:, j], rtol=tolerance, atol=tolerance * max(scale, 1.0))


def _exact_differences(net, h):
    layers, found = net.layers(), []
    for j in range(h.shape[1]):
        zero, one = h.clone(), h.clone()
        zero[:, j], one[:, j] = 0, 1
        a, b = (torch.nn.functional.softplus(layers.biases[0] + c @ layers.weights[0], threshold=700.0) for c in (zero, one))
        found.append((b - a).sum(-1))
    return torch.stack(found, -1).detach()


@pytest.mark.parametrize("name", ["one layer", "three layers", "two layers under an RBM"])
def test_equal_in_law_to_table_sweeps(name):
    net = NETS[name]()
    x = net.sample(3)
    by_layers = Gibbs(60, 200, 20, max_bytes=0).infer(net, x)
    by_table = Gibbs(60, 200, 20, declared=False).infer(net, x)
    assert (by_layers.diagnostics["route"], by_table.diagnostics["route"]) == ("layers", "table")
    exact = Exact(declared=False).infer(net, x).marginals
    for site, p in exact.items():
        a, b = by_layers.draws[site].mean(1), by_table.draws[site].mean(1)  # [chain, N, H]
        assert chains_agree(by_layers.draws[site], p)
        stderr = ((a.var(0) + b.var(0)) / 200).sqrt()
        assert largest_z(a.mean(0), b.mean(0), stderr) < bound(p.numel(), 199)


def test_the_route_is_the_faster_one():
    small, wide = toy.belief_net(6, 3), toy.belief_net(6, 40)
    assert Gibbs(100, 4, 10).infer(small, small.sample(20)).diagnostics["route"] == "table"
    assert Gibbs(2, 2, 1).infer(wide, wide.sample(3)).diagnostics["route"] == "layers"
    assert Gibbs(2, 2, 1, declared=False).infer(wide, wide.sample(3)).diagnostics["route"] == "program"
    # a table of 2^16 states that would serve two sweeps is not made
    medium = toy.belief_net(100, 16)
    assert Gibbs(2, 1, 0).infer(medium, medium.sample(3)).diagnostics["route"] == "layers"


def test_float32_and_another_program():
    net = toy.belief_net(30, 25).float()
    x = net.sample(2)
    posterior = Gibbs(3, 2, 1).infer(net, x)
    assert posterior.draws["h1"].dtype == torch.float32
    assert posterior.diagnostics["route"] == "layers"
    with torch.no_grad():
        structure = LogJoint(net, (x,), {}).structure
        assert layered_net(net, (), {"x": x}, structure) is None
        assert layered_net(lambda x: net(x), (x,), {}, structure) is None


def test_the_hidden_units_of_an_rbm_are_drawn_at_once():
    torch.manual_seed(0)
    net = RestrictedBoltzmannMachine(6, 4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 1)
        x = net.sample(5)
        log_joint = LogJoint(net, (x,), {})
        sweep, _ = make_sweep(log_joint, 4000, 2**28)
        assert isinstance(sweep, FactorialSweep)
        latents = log_joint.structure.latents
        brute = BruteForce(net, (x,), {latent.name: bits(latent.components) for latent in latents}).solve()
        start = {latent.name: torch.zeros(4000, 5, latent.components, dtype=torch.long) for latent in latents}
        sweep.start(start)
        sweep.sweep()
        drawn = {latent.name: latent.decode(sweep.present()[latent.name]) for latent in latents}
    z, limit = brute.largest_z(drawn)
    assert z < limit
    flat = brute.weights**0.3  # the wrong law
    brute.weights = flat / flat.sum(0)
    assert brute.largest_z(drawn)[0] > limit
    posterior = Gibbs(50, 20, 0).infer(net, x)
    assert posterior.diagnostics["route"] == "independent"
    assert chains_agree(posterior.draws[latents[0].name], torch.sigmoid(net.factorial_code(x).logits).detach())


def test_as_a_kernel_of_pyros_mcmc():
    torch.manual_seed(0)
    net = toy.belief_net(6, 30)
    x = net.sample(2)
    posterior = MCMC(GibbsKernel, 5, 2, 1).infer(net, x)
    assert tuple(posterior.draws["h1"].shape) == (2, 5, 2, 30)
    kernel = GibbsKernel(net)
    kernel.setup(0, x)
    assert isinstance(kernel._sweep, LayerSweep)


def test_starts_are_left_as_they_were():
    torch.manual_seed(0)
    net = RestrictedBoltzmannMachine(4, 3)
    with torch.no_grad():
        log_joint = LogJoint(net, (net.sample(2),), {})
        for program in (log_joint, LogJoint(deep(4, [3, 2]), (torch.ones(2, 4),), {})):
            sweep, _ = make_sweep(program, 5, 0)
            start = {s.name: torch.ones(5, 2, s.components, dtype=torch.long) for s in program.structure.latents}
            sweep.start(start)
            for _ in range(3):
                sweep.sweep()
            assert all(bool((value == 1).all()) for value in start.values())
