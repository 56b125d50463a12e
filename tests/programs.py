"""Small programs of many kinds that Exact must answer, each with the values of its latents, for the brute-force oracle."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from brute_force import bits, integers, one_hots
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints


@dataclass
class Case:
    """A program, its arguments, its latents' values, and what it is differentiated in."""

    program: Callable
    args: tuple
    values: dict
    batch: tuple = (-1,)
    parameters: list = field(default_factory=list)
    f: Callable | None = None  # of states [S, *plates, …]
    plates: int = 1  # rightmost plate dims of what f returns


CASES = {}


def case(build):
    CASES[build.__name__] = build
    return build


def leaf(*shape, scale=1.0):
    return nn.Parameter(scale * torch.randn(*shape))


def binary(*shape):
    return torch.bernoulli(torch.full(shape, 0.5))


@case
def one_bit_normal():
    a = leaf(2)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
            pyro.sample("x", dist.Normal(a[1] * z, 0.7), obs=x)

    return Case(model, (torch.randn(4),), {"z": bits()}, parameters=[a], f=lambda s: s["z"] + 2.0)


@case
def one_layer():
    w, b, c = leaf(3, 5), leaf(5), leaf(3)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            h = pyro.sample("h1", dist.Bernoulli(logits=c).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=b + h @ w).to_event(1), obs=x)

    return Case(
        model, (binary(4, 5),), {"h1": bits(3)}, parameters=[w, b, c], f=lambda s: s["h1"].prod(-1, keepdim=True) - s["h1"]
    )


@case
def two_layers_probs():
    w0, w1, c = leaf(3, 4), leaf(2, 3), leaf(2)

    def model(x):
        with pyro.plate("N", x.shape[0]):
            h2 = pyro.sample("h2", dist.Bernoulli(torch.sigmoid(c)).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(torch.sigmoid(h2 @ w1)).to_event(1))
            pyro.sample("x", dist.Bernoulli(torch.sigmoid(h1 @ w0)).to_event(1), obs=x)

    return Case(
        model,
        (binary(3, 4),),
        {"h2": bits(2), "h1": bits(3)},
        parameters=[w0, w1, c],
        f=lambda s: s["h1"][..., 0] * s["h2"][..., 1],
    )


@case
def three_layers_with_skip():
    w0, w1, w2, skip = leaf(2, 3), leaf(2, 2), leaf(2, 2), leaf(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            h3 = pyro.sample("h3", dist.Bernoulli(torch.full((2,), 0.4)).to_event(1))
            h2 = pyro.sample("h2", dist.Bernoulli(logits=h3 @ w2).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=h2 @ w1).to_event(1))
            pyro.sample("x", dist.Poisson((h1 @ w0 + h3 @ skip).exp()).to_event(1), obs=x)

    return Case(
        model,
        (torch.poisson(torch.full((3, 3), 2.0)),),
        {"h3": bits(2), "h2": bits(2), "h1": bits(2)},
        parameters=[w0, w1, w2, skip],
        f=lambda s: s["h1"][..., 0] + s["h2"][..., 1] * s["h3"][..., 0],
    )


@case
def categorical_multivariate_normal():
    p, loc = leaf(3), leaf(3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=p))
            pyro.sample("x", dist.MultivariateNormal(loc[z], torch.tensor([[1.0, 0.3], [0.3, 0.5]])), obs=x)

    return Case(model, (torch.randn(4, 2),), {"z": integers(3)}, parameters=[p, loc], f=lambda s: s["z"].double() ** 2)


@case
def categorical_vector():
    p, loc = leaf(2, 3), leaf(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.softmax(p, -1)).to_event(1))
            mean = (nn.functional.one_hot(z, 3) * loc).sum((-1, -2))
            pyro.sample("x", dist.Gamma(mean.exp(), 1.5), obs=x)

    return Case(
        model,
        (torch.rand(3) + 0.1,),
        {"z": integers(3, 2)},
        parameters=[p, loc],
        f=lambda s: 1.0 * (s["z"][..., 0] > s["z"][..., 1]),
    )


@case
def one_hot_categorical_likelihood():
    p, w = leaf(3), leaf(3, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=p))
            pyro.sample("x", dist.Categorical(logits=z @ w), obs=x)

    return Case(
        model, (torch.tensor([0, 3, 2]),), {"z": one_hots(3)}, parameters=[p, w], f=lambda s: s["z"] * torch.arange(3.0)
    )


@case
def binomial_latent():
    a = leaf(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Binomial(3, torch.sigmoid(a[0])))
            pyro.sample("x", dist.Normal(z * a[1], 1.0), obs=x)

    return Case(
        model, (torch.randn(3),), {"z": [torch.tensor(float(k)) for k in range(4)]}, parameters=[a], f=lambda s: s["z"].exp()
    )


@case
def mixed_sites_mixture_likelihood():
    p, loc = leaf(2), leaf(2, 2)

    def model(x):
        with pyro.plate("rows", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(logits=p))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
            mix = dist.Categorical(torch.tensor([0.4, 0.6]))
            centre = loc[k] + b.unsqueeze(-1)
            pyro.sample("x", dist.MixtureSameFamily(mix, dist.Normal(centre, 0.5)), obs=x)

    return Case(
        model,
        (torch.randn(3),),
        {"k": integers(2), "b": bits()},
        parameters=[p, loc],
        f=lambda s: s["b"] * (s["k"] == 1),
    )


@case
def deterministic_and_factor():
    a = leaf(3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a).to_event(1))
            s = pyro.deterministic("s", z.sum(-1), event_dim=0)
            pyro.factor("energy", -0.5 * s**2 * a[0])
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    return Case(model, (torch.randn(3),), {"z": bits(3)}, parameters=[a], f=lambda s: s["z"].sum(-1))


@case
def nothing_observed():
    a = leaf(4)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=a[:2]).to_event(1))
            pyro.factor("energy", z[..., 0] * z[..., 1] * a[2] + a[3])

    return Case(model, (), {"z": bits(2)}, parameters=[a], f=lambda s: s["z"].prod(-1))


@case
def no_plate():
    a = leaf(3)

    def model(x):
        z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
        y = pyro.sample("y", dist.Categorical(logits=torch.stack([z, a[1] * z, a[2] + 0 * z], -1)))
        pyro.sample("x", dist.Normal((z - y).unsqueeze(-1) * torch.ones(2), 1.0).to_event(1), obs=x)

    return Case(
        model, (torch.randn(2),), {"z": bits(), "y": integers(3)}, (), parameters=[a], f=lambda s: s["z"] * s["y"], plates=0
    )


@case
def global_and_local():
    a = leaf(3)

    def model(x):
        g = pyro.sample("g", dist.Categorical(logits=a))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.sigmoid(a[0] + g)))
            pyro.sample("x", dist.Normal(z * (g - 1.0) * a[1], 0.8), obs=x)

    return Case(
        model,
        (torch.randn(3),),
        {"g": integers(3), "z": bits()},
        (),
        parameters=[a],
        f=lambda s: s["g"].unsqueeze(-1) * s["z"] + 1.0,
    )


@case
def two_globals_and_local():
    a = leaf(4)

    def model(x):
        g = pyro.sample("g", dist.Bernoulli(logits=a[0]))
        k = pyro.sample("k", dist.Categorical(logits=torch.stack([g, a[1] * g, a[2] + 0 * g], -1)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a[3] + g - k))
            pyro.sample("x", dist.Normal(z * k + g, 1.0), obs=x)

    return Case(
        model,
        (torch.randn(3),),
        {"g": bits(), "k": integers(3), "z": bits()},
        (),
        parameters=[a],
        f=lambda s: s["g"].unsqueeze(-1) * s["z"] + s["k"].unsqueeze(-1),
    )


@case
def globals_only():
    a = leaf(2)

    def model(x):
        g = pyro.sample("g", dist.Bernoulli(logits=a).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g.sum(-1), 1.0), obs=x)

    return Case(model, (torch.randn(5),), {"g": bits(2)}, (), parameters=[a], f=lambda s: s["g"].prod(-1), plates=0)


def _nested(doc_dim, word_dim):
    a, w = leaf(3), leaf(3, 2)

    def model(x):
        docs = pyro.plate("docs", 2, dim=doc_dim)
        words = pyro.plate("words", 3, dim=word_dim)
        with docs:
            t = pyro.sample("topic", dist.Categorical(logits=a))
            pyro.sample("length", dist.Poisson(1.0 + t), obs=torch.tensor([[1.0], [2.0]]).reshape([2] + [1] * (-1 - doc_dim)))
            with words:
                z = pyro.sample("z", dist.Bernoulli(logits=w[t, 0]))
                pyro.sample("x", dist.Normal(z * w[t, 1], 1.0), obs=x)

    topic_shape = (2, 1) if doc_dim < word_dim else (1, 2)
    x = torch.randn(2, 3) if doc_dim < word_dim else torch.randn(3, 2)
    return Case(
        model,
        (x,),
        {"topic": integers(3), "z": bits()},
        (doc_dim,),
        parameters=[a, w],
        f=lambda s: s["z"] * (s["topic"].reshape(-1, *topic_shape) + 1.0),
        plates=2,
    )


@case
def nested_words_right():
    return _nested(-2, -1)


@case
def nested_words_left():
    return _nested(-1, -2)


@case
def nested_with_global():
    a, w = leaf(2), leaf(2, 2)

    def model(x):
        g = pyro.sample("g", dist.Bernoulli(logits=a[0]))
        with pyro.plate("docs", 2, dim=-2):
            t = pyro.sample("t", dist.Bernoulli(logits=a[1] * g))
            with pyro.plate("words", 2, dim=-1):
                z = pyro.sample("z", dist.Categorical(logits=torch.stack([g + t, 0.5 * t + 0 * g], -1)))
                pyro.sample("x", dist.Normal(w[z, t.long()] * 1.0 + g, 1.0), obs=x)

    return Case(
        model,
        (torch.randn(2, 2),),
        {"g": bits(), "t": bits(), "z": integers(2)},
        (),
        parameters=[a, w],
        f=lambda s: s["z"] * s["t"] + s["g"].reshape(-1, 1, 1),
        plates=2,
    )


@case
def explicit_dim_on_the_left():
    a = leaf(2)

    def model(x):
        with pyro.plate("rows", 3, dim=-2):
            z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
            pyro.sample("x", dist.Normal(z * a[1], 1.0), obs=x)

    return Case(model, (torch.randn(3, 1),), {"z": bits()}, (-2,), parameters=[a], f=lambda s: 3 * s["z"], plates=2)


@case
def pixels_in_a_plate():
    a = leaf(2, 3)

    def model(x):
        with pyro.plate("rows", 3, dim=-2):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            with pyro.plate("pixels", 3, dim=-1):
                pixel = torch.arange(3)
                pyro.sample("x", dist.Bernoulli(logits=a[z, pixel]), obs=x)

    return Case(model, (binary(3, 3),), {"z": integers(2)}, (-2,), parameters=[a], f=lambda s: 1.0 * s["z"], plates=2)


@case
def two_batch_plates():
    a = leaf(2)

    def model(x):
        with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
            pyro.sample("x", dist.Normal(z * a[1], 1.0), obs=x)

    return Case(model, (torch.randn(2, 3),), {"z": bits()}, (-2, -1), parameters=[a], f=lambda s: 3 * s["z"], plates=2)


@case
def masked_rows_with_nan():
    a = leaf(2)

    def model(x):
        seen = ~torch.isnan(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z * a[1], 1.0), obs=x)

    x = torch.tensor([0.3, float("nan"), -1.0])
    return Case(model, (x,), {"z": bits()}, parameters=[a], f=lambda s: s["z"] + 0)


@case
def mask_method_and_masked_latent():
    a, w = leaf(2), leaf(2, 3)
    seen = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Bernoulli(logits=a).to_event(1).mask(seen))
            pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1).mask(torch.tensor([True, True, False])), obs=x)

    return Case(model, (binary(3, 3),), {"z": bits(2)}, parameters=[a, w], f=lambda s: s["z"].sum(-1))


@case
def all_masked():
    a = leaf(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
            with poutine.mask(mask=torch.zeros(len(x), dtype=torch.bool)):
                pyro.sample("x", dist.Normal(z * a[1], 1.0), obs=x)

    return Case(model, (torch.full((2,), float("nan")),), {"z": bits()}, parameters=[a], f=lambda s: s["z"] + 0)


@case
def masked_pixels_with_nan():
    a, w = leaf(2), leaf(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, 1.0).mask(~torch.isnan(x)).to_event(1), obs=x)

    x = torch.tensor([[0.3, float("nan"), -1.0], [float("nan")] * 3])
    return Case(model, (x,), {"z": bits(2)}, parameters=[a, w], f=lambda s: s["z"].sum(-1))


@case
def obs_mask():
    a = leaf(2)
    seen = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
            x = pyro.sample("x", dist.Bernoulli(logits=z * a[1]), obs=x, obs_mask=seen)
            pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.tensor([0.3, -1.0, 2.0]))

    return Case(
        model,
        (binary(3),),
        {"z": bits(), "x_unobserved": bits()},
        parameters=[a],
        f=lambda s: s["z"] * s["x_unobserved"],
    )


@case
def uniform_scale():
    case = one_layer()
    case.program = poutine.scale(case.program, scale=0.5)
    return case


@case
def explicit_subsample():
    a = leaf(2)
    data, index = torch.randn(6), torch.tensor([4, 1, 2])

    def model(index):
        with pyro.plate("data", 6, subsample=index) as i:
            z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
            pyro.sample("x", dist.Normal(z * a[1], 1.0), obs=data[i])

    return Case(model, (index,), {"z": bits()}, parameters=[a], f=lambda s: s["z"] + 0)


@case
def random_subsample():
    a = leaf(2)
    data = torch.randn(6)

    def model():
        with pyro.plate("data", 6, subsample_size=3) as i:
            z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
            pyro.sample("x", dist.Normal(z * a[1], 1.0), obs=data[i])

    return Case(model, (), {"z": bits()}, parameters=[a], f=lambda s: s["z"] + 0)


@case
def concatenates_two_latents():
    w = leaf(4, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(torch.full((2,), 0.3)).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=torch.cat([a, b], -1) @ w).to_event(1), obs=x)

    return Case(
        model, (binary(3, 3),), {"a": bits(2), "b": bits(2)}, parameters=[w], f=lambda s: s["a"][..., 0] * s["b"][..., 1]
    )


@case
def concatenates_with_expanded_data():
    w = leaf(4, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3)).to_event(1))
            both = torch.cat([z, x.expand((*z.shape[:-1], 2))], -1)
            pyro.sample("y", dist.Normal(both @ w, 1.0).to_event(1), obs=x.flip(-1))

    return Case(model, (torch.randn(3, 2),), {"z": bits(2)}, parameters=[w], f=lambda s: s["z"].sum(-1))


@case
def global_and_concatenated_locals():
    w = leaf(3, 2)

    def model(x):
        g = pyro.sample("g", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(torch.full((2,), 0.3)).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(1)).to_event(1))
            both = torch.cat([a, b], -1) @ w
            pyro.sample("x", dist.Normal(both * g.unsqueeze(-1), 1.0).to_event(1), obs=x)

    return Case(
        model,
        (torch.randn(2, 2),),
        {"g": bits(), "a": bits(2), "b": bits(1)},
        (),
        parameters=[w],
        f=lambda s: s["g"].unsqueeze(-1) * s["a"][..., 0] * s["b"][..., 0],
    )


@case
def per_row_parameters():
    a, w = leaf(3, 2), leaf(2, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ w + a[:, :1]).to_event(1), obs=x)

    return Case(model, (binary(3, 4),), {"z": bits(2)}, parameters=[a, w], f=lambda s: s["z"] * torch.arange(3.0)[:, None])


@case
def per_row_values_and_labels():
    w = leaf(2, 3)

    def model(x, y):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.tensor([0.2, 0.8])), obs=y)
            z = pyro.sample("z", dist.Bernoulli(logits=y @ w[:, :2]).to_event(1))
            pyro.sample("x", dist.Normal((z + y) @ w, 1.0).to_event(1), obs=x)

    y = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    return Case(model, (torch.randn(3, 3), y), {"z": bits(2)}, parameters=[w], f=lambda s: s["z"].sum(-1))


@case
def certain_and_impossible_probs():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.0, 0.3, 0.7])))
            p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.0]])[z]
            pyro.sample("x", dist.Bernoulli(p).to_event(1), obs=x)

    return Case(model, (torch.tensor([[1.0, 0], [0, 0]]),), {"z": integers(3)}, f=lambda s: 1.0 * s["z"])


@case
def infinite_logits():
    # torch's own Bernoulli(logits=inf) is NaN: in a latent's Categorical, -inf is a state of probability 0.
    a = leaf(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.5, -float("inf"), 0.0])))
            y = pyro.sample("y", dist.Categorical(logits=torch.tensor([[0.0, -float("inf")], [1.0, 0.3], [0.2, 0.1]])[z]))
            pyro.sample("x", dist.Normal(a[0] * z + a[1] * y, 1.0), obs=x)

    return Case(
        model, (torch.randn(2),), {"z": integers(3), "y": integers(2)}, parameters=[a], f=lambda s: s["z"] + s["y"] * 1.0
    )


@case
def impossible_between_layers():
    w = leaf(2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            table = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
            z = pyro.sample("z", dist.Categorical(table[k]))
            p = torch.tensor([0.0, 0.4, 0.9])[z]
            pyro.sample("x", dist.Bernoulli(p), obs=x)
            pyro.sample("y", dist.Normal(w[k, 0] + w[1, 1] * z, 1.0), obs=x)

    return Case(
        model, (torch.tensor([1.0, 0.0]),), {"k": integers(2), "z": integers(3)}, parameters=[w], f=lambda s: s["k"] + 0.0
    )


@case
def markov_chain_of_scalar_sites():
    t, e = leaf(2, 2), leaf(2)

    def model(x):
        with pyro.plate("data", x.shape[0]):
            z = None
            for i in pyro.markov(range(4)):
                z = pyro.sample(f"z{i}", dist.Categorical(logits=t[0] if z is None else t[z]))
                pyro.sample(f"x{i}", dist.Normal(e[z], 1.0), obs=x[:, i])

    return Case(
        model,
        (torch.randn(2, 4),),
        {f"z{i}": integers(2) for i in range(4)},
        parameters=[t, e],
        f=lambda s: s["z0"] * 1.0 * s["z3"],
    )


@case
def many_scalar_bits():
    w = leaf(6, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = [pyro.sample(f"z{i}", dist.Bernoulli(0.2 + 0.1 * i)) for i in range(6)]
            drive = sum(z[i].unsqueeze(-1) * w[i] for i in range(6))
            pyro.sample("x", dist.Bernoulli(logits=drive).to_event(1), obs=x)

    return Case(
        model, (binary(2, 2),), {f"z{i}": bits() for i in range(6)}, parameters=[w], f=lambda s: s["z0"] * s["z5"] + s["z3"]
    )


@case
def function_with_pyro_module():
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    return Case(model, (torch.randn(3, 3),), {"z": bits(2)}, parameters=list(net.parameters()), f=lambda s: s["z"].sum(-1))


@case
def bare_param_with_constraint():
    def model(x):
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        mean = pyro.param("mean", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z * mean, scale), obs=x)

    return Case(model, (torch.randn(3),), {"z": bits()}, f=lambda s: s["z"] + 0)


class ParamNet(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(2))
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.inner = PyroModule[nn.Linear](1, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(self.inner(z.unsqueeze(-1)).squeeze(-1) + self.loc[0] * z, self.scale), obs=x)


@case
def pyro_module_with_pyro_param():
    return Case(ParamNet(), (torch.randn(3),), {"z": bits()}, f=lambda s: s["z"] + 0)


@case
def own_belief_net():
    from pyrovae.models import toy

    net = toy.belief_net(5, [3, 2])
    return Case(
        net, (net.sample(3),), {"h2": bits(2), "h1": bits(3)}, parameters=list(net.parameters()), f=lambda s: s["h1"].sum(-1)
    )


@case
def own_mixture():
    from pyrovae.models import toy

    net = toy.Mixture(4, 3)
    return Case(net, (binary(3, 4),), {"z": integers(3)}, parameters=list(net.parameters()), f=lambda s: s["z"] * 1.0)
