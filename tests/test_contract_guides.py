"""What every guide owes to every program: a new guide or program is a new row."""

import copy
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from torch import nn

from pyrovae.guides import AmortizedMeanField, AmortizedStructured, LocalMeanField
from pyrovae.handlers import own_params
from pyrovae.models import SigmoidBeliefNet

N = 6


class Program:
    """A foreign program: a callable with a net that it registers by `pyro.module` under a name of its own."""

    count = 0

    def __init__(self, *sizes):
        self.net = nn.Linear(*sizes)
        self.name = f"net{Program.count}"
        Program.count += 1

    def linear(self, z):
        return pyro.module(self.name, self.net)(z)


class Rows(Program):
    def __init__(self):
        super().__init__(3, 4)

    def __call__(self, x):
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.linear(h)).to_event(1), obs=x)


class Documents(Program):
    """Documents at dim -2, words at dim -1: a bit a document, a category a word."""

    def __init__(self):
        super().__init__(1, 2)

    def __call__(self, x):
        with pyro.plate("docs", x.shape[0], dim=-2):
            t = pyro.sample("t", dist.Bernoulli(0.3))
            with pyro.plate("words", x.shape[1], dim=-1):
                c = pyro.sample("c", dist.Categorical(logits=torch.stack([t, -t, 0.5 * t], -1)))
                pyro.sample("x", dist.Normal(self.linear(c.to(x)[..., None]).sum(-1) + t, 1.0), obs=x)


class Global(Program):
    """A Normal outside the plate, a table of Normals in a plate of their own, and a one-hot for each row."""

    def __init__(self):
        super().__init__(3, 2)

    def __call__(self, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("clusters", 3):
            s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(probs=torch.tensor([0.2, 0.3, 0.5])))
            shift = (y * s.unsqueeze(-2)).sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(self.linear(y) + mu.unsqueeze(-2) + shift, 1.0).to_event(1), obs=x)


class Mixed(Program):
    """A category, one-hots, Normals and a bit for each row."""

    def __init__(self):
        super().__init__(10, 3)

    def __call__(self, x):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(2, 3)).to_event(1))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(logits=z[..., 0]))
            features = torch.cat([c.to(x)[..., None], y.flatten(-2), z, b[..., None]], -1)
            pyro.sample("x", dist.Normal(self.linear(features), 1.0).to_event(1), obs=x)


class Subsampled(Program):
    """A minibatch, its indices and the number of data."""

    def __init__(self):
        super().__init__(3, 4)

    def __call__(self, x, num_data, index):
        with pyro.plate("rows", num_data, subsample=index):
            h = pyro.sample("h", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.linear(h)).to_event(1), obs=x)


class RandomSubsample(Program):
    """All data, of which the program sees three random rows."""

    def __init__(self):
        super().__init__(3, 4)

    def __call__(self, x):
        with pyro.plate("rows", len(x), subsample_size=3) as rows:
            h = pyro.sample("h", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.linear(h)).to_event(1), obs=x[rows])


class Upwards(Program):
    """Undirected style: the observation comes before the latent."""

    def __init__(self):
        super().__init__(4, 3)

    def __call__(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(torch.full((4,), 0.4)).to_event(1), obs=x)
            pyro.sample("h", dist.Bernoulli(logits=self.linear(x)).to_event(1))


class TwoParameters:
    """A plain program with a bare `pyro.param`, in a prior and in the likelihood."""

    def __call__(self, x):
        a = pyro.param("bare", lambda: torch.randn(2))
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=a).to_event(1))
            pyro.sample("x", dist.Normal(h @ a, 1.0), obs=x)


def belief_net():
    return SigmoidBeliefNet(4, [3, 2])


@dataclass
class Row:
    """A program, its arguments for given rows of the data, and how it takes a minibatch."""

    make: Any
    data: Any
    example: bool = True
    minibatch: str = "none"  # "keywords", "arguments" or "none"
    layers: tuple = (("h", 4, 3),)  # site, inputs and outputs of the encoders of a structured guide, in sampling order

    def call(self, rows=None):
        x = self.data()
        if rows is None:
            return ((x, N, torch.arange(N)) if self.minibatch == "arguments" else (x,)), {}
        if self.minibatch == "keywords":
            return (x[rows],), {"index": rows, "num_data": N}
        if self.minibatch == "arguments":
            return (x[rows], N, rows), {}
        return (x[rows],), {}


def bits(*shape):
    def draw():
        generator = torch.Generator().manual_seed(1)
        return torch.bernoulli(torch.full((N, *shape), 0.5), generator=generator)

    return draw


def reals(*shape):
    def draw():
        return torch.randn(N, *shape, generator=torch.Generator().manual_seed(1))

    return draw


PROGRAMS = {
    "belief net": Row(belief_net, bits(4), example=False, minibatch="keywords", layers=(("h1", 4, 3), ("h2", 3, 2))),
    "rows": Row(Rows, bits(4)),
    "documents": Row(Documents, reals(4), layers=(("t", 4, 1), ("c", 1, 3))),
    "global": Row(Global, reals(2), layers=(("y", 2, 3),)),
    "mixed": Row(Mixed, reals(3), layers=(("z", 3, 4), ("b", 2, 1), ("y", 1, 6), ("c", 6, 3))),
    "subsampled": Row(Subsampled, bits(4), minibatch="arguments"),
    "random subsample": Row(RandomSubsample, bits(4)),
    "upwards": Row(Upwards, bits(4)),
    "bare param": Row(TwoParameters, reals(), layers=(("h", 1, 2),)),
}


class Layer(nn.Module):
    """A linear encoder of one value, flattened: the data's rows, or what the layer before has drawn."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.net = nn.Linear(inputs, outputs)

    def forward(self, value):
        width = self.net.in_features
        if value.shape[-1] != width or value.dim() == 1:
            value = value.flatten(-2) if width == 6 else value.unsqueeze(-1)
        return self.net(value)


GUIDES = {
    "amortised": lambda row, model, example: AmortizedMeanField(model, example=example),
    "local": lambda row, model, example: LocalMeanField(model, N, example=example),
    "structured": lambda row, model, example: AmortizedStructured(
        model, {site: Layer(*sizes) for site, *sizes in row.layers}, example=example
    ),
}


@pytest.fixture(params=PROGRAMS)
def row(request):
    return PROGRAMS[request.param]


@pytest.fixture(params=GUIDES)
def kind(request):
    return request.param


def build(row, kind):
    model = row.make()
    return model, GUIDES[kind](row, model, row.call()[0] if row.example else None)


def parameters_of(model, guide):
    net = model if isinstance(model, nn.Module) else getattr(model, "net", nn.Module())
    return {f"model.{k}": v for k, v in net.named_parameters()} | {f"guide.{k}": v for k, v in guide.named_parameters()}


def without_gradient(model, guide, row, elbo=None):
    for parameter in parameters_of(model, guide).values():
        parameter.grad = None
    args, kwargs = row.call()
    (elbo or Trace_ELBO()).loss_and_grads(model, guide, *args, **kwargs)
    return [k for k, v in parameters_of(model, guide).items() if v.grad is None or not bool(v.grad.abs().sum() > 0)]


def test_every_parameter_receives_a_gradient(row, kind):
    assert without_gradient(*build(row, kind), row) == []


def test_graph_elbo_gives_every_parameter_a_gradient(row, kind):
    assert without_gradient(*build(row, kind), row, TraceGraph_ELBO()) == []


def test_gradient_check_notices_a_dead_parameter():
    row = PROGRAMS["rows"]
    model = row.make()
    guide = AmortizedMeanField(model, nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)), example=row.call()[0])
    guide.encoder[0].bias.data.fill_(-100)
    assert "guide.encoder.0.weight" in without_gradient(model, guide, row)


def moved(pair, row, steps=2):
    model, guide = pair
    before = {k: v.detach().clone() for k, v in parameters_of(model, guide).items()}
    args, kwargs = row.call()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args, **kwargs)
    return [k for k, v in parameters_of(model, guide).items() if torch.equal(v, before[k])]


def test_two_instances_trained_in_turn_both_move(row, kind):
    first, second = build(row, kind), build(row, kind)
    assert moved(first, row) == []
    assert moved(second, row) == []


def test_movement_check_notices_a_shared_name(kind):
    row = PROGRAMS["rows"]
    first, second = build(row, kind), build(row, kind)
    second[1]._pyro_name = first[1]._pyro_name
    moved(first, row)
    assert moved(second, row)


def param_names(program, row):
    args, kwargs = row.call()
    trace = poutine.trace(program).get_trace(*args, **kwargs)
    return {name for name, node in trace.nodes.items() if node["type"] == "param"}


def test_no_store_key_is_shared(row, kind):
    (model, guide), (_, other) = build(row, kind), build(row, kind)
    names = param_names(guide, row)
    assert len(names) == len(list(guide.parameters()))
    assert not names & param_names(model, row)
    assert not names & param_names(other, row)


def test_a_call_reads_and_writes_no_store(row, kind):
    _, guide = build(row, kind)
    pyro.clear_param_store()  # a bare pyro.param of the model came to live in it
    args, kwargs = row.call()
    with poutine.block():
        own_params(guide)(*args, **kwargs)
    assert list(pyro.get_param_store()) == []
    guide(*args, **kwargs)
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {guide._pyro_name}


def test_sites_are_the_models(row, kind):
    """Names, order, shapes, scales and plates of the guide's sites, also under particles and outside the model's own run."""
    model, guide = build(row, kind)
    args, kwargs = row.call()
    for particles in (None, 3):

        def run(program, *args, particles=particles, **kwargs):
            if particles is None:
                return program(*args, **kwargs)
            with pyro.plate("particles", particles, dim=-3):
                return program(*args, **kwargs)

        q = poutine.trace(run).get_trace(guide, *args, **kwargs)
        p = poutine.trace(poutine.replay(run, q)).get_trace(model, *args, **kwargs)
        q.compute_log_prob(), p.compute_log_prob()
        latent = [n for n, s in p.nodes.items() if s["type"] == "sample" and not s["is_observed"]]
        sampled = [n for n, s in q.nodes.items() if s["type"] == "sample"]
        assert sampled == latent or (isinstance(guide, AmortizedStructured) and sorted(sampled) == sorted(latent))
        for name in latent:
            a, b = q.nodes[name], p.nodes[name]
            assert a["log_prob"].shape == b["log_prob"].shape, name
            assert getattr(a["fn"], "event_dim", 0) == getattr(b["fn"], "event_dim", 0)
            assert a["value"] is b["value"]
            assert a["scale"] == b["scale"]
            assert a["cond_indep_stack"] == b["cond_indep_stack"]


def test_stock_objectives_warn_of_nothing(row, kind):
    model, guide = build(row, kind)
    args, kwargs = row.call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)):
            assert torch.isfinite(torch.tensor(elbo.loss(model, guide, *args, **kwargs)))
        Predictive(model, guide=guide, num_samples=3, parallel=True)(*args, **kwargs)


def test_other_batch_sizes(row, kind):
    model, guide = build(row, kind)
    for rows in (torch.tensor([4, 1, 2]), torch.tensor([5, 0, 3, 1])):
        args, kwargs = row.call(rows)
        elbo = Trace_ELBO()
        if kind == "local" and row.minibatch == "none":
            with pytest.raises(ValueError, match=r"expected index=\.\.\. because LocalMeanField\(num_data=6\) saw"):
                elbo.loss(model, guide, *args, **kwargs)
        else:
            elbo.loss(model, guide, *args, **kwargs)


def factors(guide, row):
    """The values of one draw and their log probabilities, from equal noise."""
    args, kwargs = row.call()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        with poutine.block():
            trace = poutine.trace(own_params(guide)).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return {n: (s["value"], s["log_prob"]) for n, s in trace.nodes.items() if s["type"] == "sample"}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


def test_state_dict_round_trip(row, kind):
    model, guide = build(row, kind)
    other = GUIDES[kind](row, model, row.call()[0] if row.example else None)
    assert not same(factors(guide, row), factors(other, row))
    other.load_state_dict(guide.state_dict())
    assert same(factors(guide, row), factors(other, row))
    assert not any(id(p) in {id(q) for q in guide.parameters()} for p in getattr(model, "net", nn.Module()).parameters())


def test_a_pair_is_copied_together(row, kind):
    model, guide = build(row, kind)
    before = factors(guide, row)
    model_copy, guide_copy = copy.deepcopy((model, guide))
    assert guide_copy._model[0] is model_copy
    assert same(before, factors(guide_copy, row))
    assert moved((model_copy, guide_copy), row) == []
    assert same(before, factors(guide, row))
    assert not same(before, factors(guide_copy, row))
    assert copy.deepcopy(guide)._model[0] is not copy.deepcopy(model)  # one at a time they part


def test_pickles(row, kind):
    model, guide = build(row, kind)
    if isinstance(model, nn.Module):  # stock Pyro leaves weak references on the parameters of a foreign net
        Trace_ELBO().loss_and_grads(model, guide, *row.call()[0], **row.call()[1])
    _, again = pickle.loads(pickle.dumps((model, guide)))
    assert same(factors(guide, row), factors(again, row))
