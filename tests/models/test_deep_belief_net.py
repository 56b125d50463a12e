"""DeepBeliefNet: its joint, evidence and draws against the sum over all states of all layers, the summed-out one included."""

import json

import pyro
import pytest
import torch
from brute_force import BruteForce, bits
from pyro import poutine
from stats import frequencies_agree
from torch.nn.functional import logsigmoid

from pyrovae.guides import AmortizedStructured
from pyrovae.handlers import declared
from pyrovae.inference import Exact, ExactLikelihood, Variational
from pyrovae.models import DeepBeliefNet


def net_of(visible, hidden, scale=1.5, **options):
    """A net with weights and biases large enough that layers matter."""
    torch.manual_seed(2)
    net = DeepBeliefNet(visible, hidden, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, scale)
    return net


def states(n):
    return torch.stack(bits(n))


def joint(net):
    """Log p of all (h_{L−1}, …, h_1, x), `[2^H_{L−1}, …, 2^D]`, by the energies of both top layers and nothing of the model."""
    sizes, layers = net.sizes, len(net.weights)
    u, t = states(sizes[-2]), states(sizes[-1])
    energy = (u @ net.top_bias)[:, None] + t @ net.top_hidden_bias + u @ net.top_weight @ t.T
    total = energy.logsumexp(1) - energy.logsumexp((0, 1))
    for layer in range(layers - 1, -1, -1):
        below, above = states(sizes[layer]), states(sizes[layer + 1])
        logits = net.biases[layer] + above @ net.weights[layer]
        given = below @ logsigmoid(logits).T + (1 - below) @ logsigmoid(-logits).T  # [2^below, 2^above]
        total = total.unsqueeze(-1) + given.T
    return total


@pytest.mark.parametrize("hidden", [[3, 2], [2, 4], [2, 3, 2]])
def test_evidence_is_the_sum_over_all_layers(hidden):
    net = net_of(4, hidden)
    table = joint(net).detach()
    evidence = table.logsumexp(tuple(range(table.dim() - 1)))
    assert torch.allclose(evidence.logsumexp(0), torch.zeros(()), atol=1e-12)
    x = states(4)
    sites = {f"h{layer}": bits(net.sizes[layer]) for layer in range(len(hidden) - 1, 0, -1)}
    listed = BruteForce(net, (x,), sites).solve()
    assert torch.allclose(listed.log_evidence, evidence, atol=1e-10)
    for method in (Exact(), Exact(declared=False)):
        posterior = method.infer(net, x)
        assert torch.allclose(posterior.log_evidence, evidence, atol=1e-10)
        for site in sites:
            assert torch.allclose(posterior.marginals[site], listed.marginal(site), atol=1e-10)
    with torch.no_grad():
        net.top_hidden_bias[0] += 0.3
    assert not torch.allclose(Exact().infer(net, x).log_evidence, evidence, atol=1e-3), "the summed-out layer is seen"


@pytest.mark.parametrize("hidden", [[3, 2], [2, 3, 2]])
def test_gradient_of_the_evidence(hidden):
    net, x = net_of(4, hidden), states(4)[[0, 3, 3, 9, 15]]
    table = joint(net)
    index = torch.tensor([0, 3, 3, 9, 15])
    expected = torch.autograd.grad(table.logsumexp(tuple(range(table.dim() - 1)))[index].sum(), list(net.parameters()))
    Variational(None, ExactLikelihood(), num_steps=1).fit(net_of(4, hidden), x)  # runs
    loss = ExactLikelihood().differentiable_loss(net, None, x)
    found = torch.autograd.grad(-loss, list(net.parameters()))
    for (name, _), a, b in zip(net.named_parameters(), found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10), name
        assert bool((b != 0).any()), name


def test_draws():
    net = net_of(3, [2, 3])
    p = joint(net).detach().exp()
    n = 20_000
    with poutine.block():
        drawn = poutine.trace(net).get_trace(batch_size=n)
    place = lambda z: (z @ 2.0 ** torch.arange(z.shape[-1] - 1, -1, -1.0)).long()  # noqa: E731
    code = place(torch.cat((drawn.nodes["h1"]["value"], drawn.nodes["x"]["value"]), -1))
    assert frequencies_agree(torch.bincount(code, minlength=32), n, p.flatten())
    assert not frequencies_agree(torch.bincount(code, minlength=32), n, p.roll(1, 0).flatten())
    x = torch.bincount(place(net.sample(n)), minlength=8)
    assert frequencies_agree(x, n, p.sum(0))


def test_the_declaration_is_the_program():
    net = net_of(4, [3, 2, 5])
    record = declared(net, "layers")
    assert record.sites == ("h1", "h2")
    assert {id(p) for p in (*record.weights, *record.biases, record.top_bias, record.top_weight, record.top_hidden_bias)} == {
        id(p) for p in net.parameters()
    }
    h1, h2, x = states(3)[[5]], states(2)[[1]], states(4)[[6]]
    t = poutine.trace(poutine.condition(net, data={"h1": h1, "h2": h2})).get_trace(x)
    by_record = sum(
        torch.distributions.Bernoulli(logits=b + above @ w).log_prob(below).sum()
        for w, b, above, below in zip(record.weights, record.biases, (h1, h2), (x, h1), strict=True)
    )
    top = [
        h @ record.top_bias + (record.top_hidden_bias + h @ record.top_weight).exp().log1p().sum(-1) for h in (h2, states(2))
    ]
    assert torch.allclose(t.log_prob_sum(), by_record + top[0].sum() - top[1].logsumexp(0))


def test_a_top_too_large_to_enumerate():
    exact, chained = net_of(4, [3, 2]), net_of(4, [3, 2], max_bits=1)
    chained.load_state_dict(exact.state_dict(), strict=False)
    assert exact.normalized
    assert exact.chains is None
    assert not chained.normalized
    x, h1 = states(4)[:3], states(3)[[1, 4, 6]]
    scores = [
        poutine.trace(poutine.condition(net, data={"h1": h1})).get_trace(x).log_prob_sum().detach() for net in (exact, chained)
    ]
    assert torch.allclose(scores[1] - scores[0], 3 * exact.top().log_partition()), "log Z is missing, and nothing else"
    before = chained.chains.states.clone()
    poutine.trace(poutine.condition(chained, data={"h1": h1})).get_trace(x).log_prob_sum()
    assert not torch.equal(before, chained.chains.states), "learning moves the chains"
    assert chained.sample(7).shape == (7, 4)
    pyro.clear_param_store()
    for net in (exact, chained):
        again = DeepBeliefNet(**json.loads(json.dumps(net.config)))
        again.load_state_dict(net.state_dict())
        assert again.config == net.config


def test_its_mirror_is_a_guide():
    net = DeepBeliefNet(5, [4, 3, 2])
    guide = AmortizedStructured(net)
    assert {name: tuple(value.shape) for name, value in guide(net.sample(6)).items()} == {"h1": (6, 4), "h2": (6, 3)}
    assert {type(encoder) for encoder in guide.encoders.values()} == {torch.nn.Linear}


def test_bias_of_the_data():
    net, x = DeepBeliefNet(3, [2, 2]), torch.tensor([[1.0, 0, 1], [1, 1, 0]])
    net.initialize_bias(x)
    assert torch.allclose(net.biases[0].sigmoid(), torch.tensor([3 / 4, 2 / 4, 2 / 4]))
    for bad in (x[:, :2], x[:0], 255 * x, x * torch.nan):
        with pytest.raises(ValueError, match="expected"):
            net.initialize_bias(bad)


@pytest.mark.parametrize(
    ("visible", "hidden"), [(4, 3), (4, [3]), (4, []), (0, [2, 2]), (4, [2, 0]), (4, [2.0, 2]), (4, [2, -1])]
)
def test_bad_sizes(visible, hidden):
    with pytest.raises(ValueError, match="at least two hidden layers"):
        DeepBeliefNet(visible, hidden)


def test_weights_that_are_no_numbers():
    net = net_of(4, [3, 2])
    with torch.no_grad():
        net.top_weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        Exact().infer(net, states(4))
