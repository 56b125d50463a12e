"""Bounds with a log Z from elsewhere: with the true one they are the ordinary ones, and move with it nat by nat."""

import copy
from types import SimpleNamespace

import pyro
import pytest
import torch

from pyrovae.diagnostics import bound_with_partition
from pyrovae.distributions import RBM, BoltzmannMachine
from pyrovae.guides import AmortizedStructured
from pyrovae.handlers import with_log_partition
from pyrovae.inference import AIS, Exact, Gibbs, Importance, Variational
from pyrovae.models import DeepBeliefNet, RestrictedBoltzmannMachine, SigmoidBeliefNet


def nets():
    """The same net, enumerated and not, a guide and data."""
    exact, chained = DeepBeliefNet(6, [4, 3]), DeepBeliefNet(6, [4, 3], max_bits=2)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.normal_()
    chained.load_state_dict(exact.state_dict(), strict=False)
    return exact, chained, AmortizedStructured(exact), exact.sample(20)


def test_with_the_true_log_z_it_is_the_ordinary_bound():
    exact, chained, guide, x = nets()
    log_z = float(exact.top().log_partition().detach())
    method = Variational(guide, num_samples=50)
    torch.manual_seed(1)
    expected = method.infer(exact, x)
    torch.manual_seed(1)
    found = bound_with_partition(method, chained, x, partition=log_z)
    assert torch.allclose(found.log_evidence, expected.log_evidence, atol=1e-10)
    assert found.lower == found.value == found.upper
    assert abs(found.stderr - float(expected.stderr.norm()) / 20) < 1e-12
    assert found.bound == "estimate"
    torch.manual_seed(1)
    about = bound_with_partition(
        method, chained, x, partition=SimpleNamespace(log_z=torch.tensor(log_z - 1), lower=log_z - 3.0, upper=log_z + 2.0)
    )
    assert abs(about.value - found.value - 1) < 1e-10, "a log Z that is a nat too small gives a nat too much"
    assert abs(about.upper - found.value - 3) < 1e-10
    assert abs(about.lower - found.value + 2) < 1e-10


def test_with_annealed_importance_sampling():
    exact, chained, guide, x = nets()
    partition = AIS(num_chains=200, num_temperatures=300).log_partition(chained)
    found = bound_with_partition(Importance(guide, 200), chained, x, partition=partition)
    truth = Exact().infer(exact, x).log_evidence.mean()
    slack = 6 * found.stderr + float(partition.upper - partition.lower)
    assert found.value < float(truth) + slack
    assert found.value > float(truth) - 1.0
    assert found.lower < found.value < found.upper


def test_exact_inference_takes_the_given_log_z():
    exact, chained, _, x = nets()
    given = with_log_partition(chained, exact.top().log_partition().detach())
    assert torch.allclose(Exact().infer(given, x).log_evidence, Exact().infer(exact, x).log_evidence, atol=1e-10)
    with pytest.raises(ValueError, match="log Z"):
        Exact(declared=False).infer(chained, x)
    with pyro.poutine.block():
        assert given(batch_size=3).shape == (3, 6)


def test_nothing_changes():
    _, chained, guide, x = nets()
    before = copy.deepcopy(chained.state_dict())
    bound_with_partition(Variational(guide, num_samples=5), chained, x, partition=3.0)
    assert all(torch.equal(v, before[k]) for k, v in chained.state_dict().items())
    assert chained.top().partition_is == "unknown"
    rbm = RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
    other = rbm.with_log_partition(7.0)
    assert (rbm.partition_is, other.partition_is) == ("exact", "given")
    assert torch.allclose(other.log_prob(torch.ones(3)), rbm.log_prob(torch.ones(3)) + rbm.log_partition() - 7)


def test_refusals():
    _, chained, guide, x = nets()
    method = Variational(guide, num_samples=5)
    net = SigmoidBeliefNet(6, 4)
    with pytest.raises(ValueError, match="exactly one site drawn from an RBM"):
        bound_with_partition(Variational(AmortizedStructured(net, {"h1": torch.nn.Linear(6, 4)})), net, x, partition=1.0)
    for bad in (float("nan"), float("inf"), SimpleNamespace(log_z=torch.tensor(float("-inf")), lower=0.0, upper=0.0)):
        with pytest.raises(ValueError, match="finite log Z"):
            bound_with_partition(method, chained, x, partition=bad)
    with pytest.raises(ValueError, match="gives evidence"):
        bound_with_partition(Gibbs(5, 1, 1), chained, x, partition=1.0)
    with pytest.raises(ValueError, match="finite log_partition"):
        RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2)).with_log_partition(float("nan"))


def test_a_given_log_z_has_the_shape_of_the_batch():
    for bad in (torch.zeros(7), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"log_partition that broadcasts to the batch shape \[\], got shape \[[71]\]"):
            RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2), log_partition=bad)
        with pytest.raises(ValueError, match="broadcasts to the batch shape"):
            RBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2)).with_log_partition(bad)
    machine = BoltzmannMachine(torch.zeros(3, 3), torch.zeros(4, 3), log_partition=torch.zeros(4))
    assert machine.with_log_partition(torch.ones(4)).log_prob(torch.ones(3)).tolist() == [-1.0] * 4
    assert machine.with_log_partition(1.0).log_prob(torch.ones(3)).tolist() == [-1.0] * 4
    with pytest.raises(ValueError, match=r"batch shape \[4\], got shape \[5\]"):
        machine.with_log_partition(torch.zeros(5))


WRAPPERS = {
    "mask": lambda fn: fn.mask(torch.tensor([True, False, True])),
    "event": lambda fn: fn.expand([3, 2]).to_event(1),
    "expand": lambda fn: pyro.distributions.torch_distribution.ExpandedDistribution(fn, torch.Size([3])),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_log_z_is_given_inside_of_wrappers(wrap):
    rbm = RBM(torch.randn(4, 2), torch.randn(4), torch.randn(2))
    x = torch.ones(wrap(rbm).shape())

    def program(x):
        with pyro.plate("data", 3):
            pyro.sample("x", wrap(rbm), obs=x)

    log_prob = {}
    for name, run in {"exact": program, "given": with_log_partition(program, rbm.log_partition() - 2.0)}.items():
        trace = pyro.poutine.trace(run).get_trace(x)
        trace.compute_log_prob()
        log_prob[name] = trace.nodes["x"]["log_prob"]
    assert log_prob["exact"].shape == log_prob["given"].shape == (3,)
    seen = torch.tensor([1.0, 0.0, 1.0]) if wrap is WRAPPERS["mask"] else torch.ones(3)
    units = 2.0 if wrap is WRAPPERS["event"] else 1.0
    assert torch.allclose(log_prob["given"] - log_prob["exact"], 2.0 * units * seen)


def test_an_rbm_as_a_whole():
    rbm = RestrictedBoltzmannMachine(4, 3)
    x = rbm.sample(5)
    scored = pyro.poutine.trace(with_log_partition(rbm, 2.0)).get_trace(x)
    scored.compute_log_prob()
    expected = -rbm.distribution().free_energy(x) - 2
    assert torch.allclose(scored.nodes["x"]["log_prob"], expected)
