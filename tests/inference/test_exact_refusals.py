"""Programs and data that Exact must refuse, each with its own sentence, and quickly."""

import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyrovae.inference import Exact, ExactLikelihood
from pyrovae.models import SigmoidBeliefNet, toy

REFUSALS = {}


def refused(sentence):
    """Register a function without arguments that returns `(program, *args)`, and what the refusal must say."""

    def register(build):
        REFUSALS[build.__name__] = (build, sentence)
        return build

    return register


def _bernoulli_net(x):
    return (toy.belief_net(4, 2), x)


@refused(r"expected x in \{0, 1\} for a Bernoulli likelihood, got 1 NaN; mask missing values")
def nan_data():
    x = torch.zeros(3, 4)
    x[1, 2] = float("nan")
    return _bernoulli_net(x)


@refused(r"expected x in \{0, 1\} for a Bernoulli likelihood, got values from 0 to 255; scale to \[0, 1\] and binarize")
def bytes_as_bits():
    return _bernoulli_net(torch.tensor([[0.0, 255.0, 0.0, 3.0]]))


@refused(r"expected x within .* for a Poisson likelihood, got values from -1 to 2")
def negative_counts():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Poisson(1 + z), obs=x)

    return model, torch.tensor([-1.0, 2.0])


@refused(r"expected data \[B, 4\] with at least one row, got \[3, 5\]; pass rows of 4")
def wrong_width():
    return _bernoulli_net(torch.zeros(3, 5))


@refused(r"expected x with rows of shape \(4,\), got \(3, 5\); pass data of the width")
def wrong_width_of_a_plain_function():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Bernoulli(0.5 + 0.1 * z.unsqueeze(-1).expand((*z.shape, 4))).to_event(1), obs=x)

    return model, torch.zeros(3, 5)


@refused(r"expected data \[B, 4\] with at least one row, got \[0, 4\]")
def empty_data():
    return _bernoulli_net(torch.zeros(0, 4))


@refused("expected at least one row, got a plate of size 0")
def empty_plate():
    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    return model, torch.zeros(0)


@refused("got the continuous or infinite site 'z'; use Variational, Importance or MCMC")
def continuous_latent():
    return toy.LinearGaussian(), torch.zeros(2, 3)


@refused("got the continuous or infinite site 'z'; use Variational")
def poisson_latent():
    def model():
        pyro.sample("z", dist.Poisson(2.0))

    return (model,)


@refused("got the relaxed site 'z'; use pyrovae.handlers.discretize")
def relaxed_latent():
    def model():
        pyro.sample("z", dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=torch.zeros(3)).to_event(1))

    return (model,)


@refused("got the relaxed site 'z'; use pyrovae.handlers.discretize")
def relaxed_one_hot_latent():
    def model():
        pyro.sample("z", dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(3)))

    return (model,)


@refused("expected a program with latent sites, got none")
def no_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return model, torch.zeros(2)


@refused(r"got 40 bits in a layer: to sum over 2\^40 codes takes about 4.4e\+13 bytes and .* seconds; use AIS .* Variational")
def forty_bits():
    return SigmoidBeliefNet(4, 40), torch.zeros(256, 4)


@refused(r"got 1,099,511,627,776 joint states for 256 rows.*bytes; use Gibbs, Variational or Importance")
def forty_bits_of_no_declared_net():
    net = SigmoidBeliefNet(4, 40)
    return lambda x: net(x), torch.zeros(256, 4)


@refused(r"got 1,099,511,627,776 joint states for 3 rows.*bytes")
def forty_scalar_bits():
    def model(x):
        with pyro.plate("data", len(x)):
            total = sum(pyro.sample(f"z{i}", dist.Bernoulli(0.5)) for i in range(40))
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    return model, torch.zeros(3)


@refused(r"joint states.*bytes|fewer than \d+ latent sites")
def seventy_scalar_bits():
    def model(x):
        with pyro.plate("data", len(x)):
            total = sum(pyro.sample(f"z{i}", dist.Bernoulli(0.5)) for i in range(70))
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    return model, torch.zeros(3)


@refused("got the sequential plate 'rows'; .* cannot follow a Python loop")
def sequential_plate():
    def model(x):
        for i in pyro.plate("rows", len(x)):
            z = pyro.sample(f"z{i}", dist.Bernoulli(0.5))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    return model, torch.zeros(2)


@refused("got 'a' and 'b' in sibling plates|got 'b' and 'a' in sibling plates")
def sibling_plates():
    def model():
        with pyro.plate("i", 2, dim=-1):
            pyro.sample("a", dist.Bernoulli(0.5))
        with pyro.plate("j", 3, dim=-2):
            pyro.sample("b", dist.Bernoulli(0.5))

    return (model,)


@refused("got the sibling plates 'i' and 'j' both along dim -1")
def sibling_plates_in_one_dim():
    def model():
        with pyro.plate("i", 2):
            pyro.sample("a", dist.Bernoulli(0.5))
        with pyro.plate("j", 3):
            pyro.sample("b", dist.Bernoulli(0.5))

    return (model,)


@refused("got the sibling plates 'i' and 'j' both along dim -1")
def sibling_plates_of_one_size_in_one_dim():
    def model():
        with pyro.plate("i", 2):
            a = pyro.sample("a", dist.Bernoulli(0.5))
        with pyro.plate("j", 2):
            pyro.sample("b", dist.Bernoulli(0.3 + 0.1 * a))

    return (model,)


@refused("expected site 'x' to vary only along its own plates, got 3 values along dim -1")
def observed_outside_its_latents_plate():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.0))

    return (model,)


@refused("mixes rows of the batch")
def mean_over_the_plate():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=torch.tensor(0.0))

    return (model,)


@refused("expected site 'x' inside the plate 'data' of the latent 'z'")
def mean_over_the_plate_kept():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        mean = z.mean(-1, keepdim=True)
        pyro.sample("x", dist.Normal(mean.squeeze(-1) if mean.dim() == 1 else mean, 1.0), obs=torch.tensor(0.0))

    return (model,)


@refused("mixes rows of the batch")
def mean_over_the_plate_inside_it():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=torch.zeros(3))

    return (model,)


@refused("mixes rows of the batch")
def rows_shifted():
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal((z.roll(1, -2) @ torch.ones(2)), 1.0), obs=x)

    return model, torch.zeros(3)


@refused("mixes rows of the batch")
def latent_outside_its_parents_plate():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("g", dist.Bernoulli(torch.sigmoid(z.sum(-1))))

    return (model,)


@refused("the program branches on a latent's value, mixes rows of the batch or draws hidden noise")
def branch_on_any():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            mean = 2.0 if (z > 0).any() else 0.0
            pyro.sample("x", dist.Normal(mean + z, 1.0), obs=x)

    return model, torch.zeros(3)


@refused("do not branch on its value")
def branch_on_item():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2.0 if z.item() else 0.0, 1.0), obs=torch.tensor(0.0))

    return (model,)


@refused("expected the same sites at every value of the latents, got 'y' at some only|do not branch on its value")
def site_at_some_values_only():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        if (z > 0).all():
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    return (model,)


@refused("expected the same sites at every value of the latents|do not branch on its value")
def latent_site_at_some_values_only():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        if (z > 0).any():
            pyro.sample("y", dist.Bernoulli(0.3))

    return (model,)


@refused("mixes rows of the batch")
def batch_statistics():
    w = torch.randn(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            a = z @ w
            a = a - a.mean(0)
            pyro.sample("x", dist.Normal(a, 1.0).to_event(1), obs=x)

    return model, torch.randn(3, 3)


@refused("draws hidden noise")
def dropout():
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    return model, torch.randn(3, 3)


@refused(r"expected tensor code that broadcasts on the left.*not z.view\(N, -1\)")
def view_with_the_batch():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2, 2), 0.5)).to_event(2))
            pyro.sample("x", dist.Normal(z.view(len(x), -1).sum(-1), 1.0), obs=x)

    return model, torch.randn(5)


@refused("do not concatenate a latent with data")
def concatenates_with_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("y", dist.Normal(torch.cat([z, x], -1).sum(-1), 1.0), obs=x[:, 0])

    return model, torch.randn(3, 2)


@refused("expected the whole plate 'data' with the latent 'g' outside it, got 2 of 4 rows")
def subsample_under_a_global_latent():
    def model(x):
        g = pyro.sample("g", dist.Bernoulli(0.5))
        with pyro.plate("data", 4, subsample_size=2) as i:
            pyro.sample("x", dist.Normal(g, 1.0), obs=x[i])

    return model, torch.randn(4)


@refused("expected one poutine.scale for all sites, got different ones at 'z' and 'x'")
def unequal_scales():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model, torch.randn(4)


@refused("got the name 'z' twice")
def duplicate_names():
    def model():
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Bernoulli(0.5))

    return (model,)


@refused(r"expected every batch dim of site 'z' in a plate, got batch shape \(3,\)")
def undeclared_batch_dim():
    def model():
        pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))

    return (model,)


@refused(r"expected every batch dim of site 'x' in a plate")
def undeclared_batch_dim_of_a_value():
    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model, torch.randn(3)


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name):
    build, sentence = REFUSALS[name]
    torch.manual_seed(0)
    program, *args = build()
    before = torch.get_rng_state()
    methods = [lambda: Exact().infer(program, *args)]
    if build is not no_latents:  # which has a likelihood all the same
        methods.append(lambda: ExactLikelihood().loss(program, None, *args))
    for method in methods:
        start = time.process_time()
        with pytest.raises(ValueError, match=sentence):
            method()
        assert time.process_time() - start < 10  # CPU seconds on a loaded machine; half a second on an idle one
    assert torch.equal(before, torch.get_rng_state())


def test_the_likelihood_of_a_program_without_latents():
    program, x = no_latents()
    x, J = x + 0.3, torch.tensor(1.5, requires_grad=True)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum()
    assert torch.allclose(ExactLikelihood().loss(program, None, x), -expected)
    assert torch.allclose(ExactLikelihood().loss(poutine.scale(program, scale=2.0), None, x), -2 * expected)

    def learned(x):
        with pyro.plate("data", 10, subsample=torch.tensor([0, 3])):
            pyro.sample("x", dist.Normal(J, 1.0), obs=x)

    loss = ExactLikelihood().differentiable_loss(learned, None, x)
    assert torch.allclose(loss, -5 * dist.Normal(1.5, 1.0).log_prob(x).sum())  # 2 of 10 rows
    assert torch.allclose(torch.autograd.grad(loss, J)[0], -5 * (x - 1.5).sum())


def test_the_sentences_tell_programs_apart():
    """A sound program is not refused, and no sentence is so loose that another refusal satisfies it."""
    assert Exact().infer(toy.belief_net(4, 2), torch.zeros(3, 4)).bound == "exact"
    said = {}
    for name, (build, _) in REFUSALS.items():
        program, *args = build()
        with pytest.raises(ValueError, match="expected") as error:
            Exact().infer(program, *args)
        said[name] = str(error.value)
        assert len(said[name]) < 700
        assert said[name].startswith("expected ")
    import re

    assert not re.search(REFUSALS["unequal_scales"][1], said["duplicate_names"])


@pytest.mark.parametrize(("visible", "hidden"), [(0, 2), (3, 0), (3, -1), (3, []), (3, [2, 0]), (-2, 2), (3, 1.5)])
def test_sizes(visible, hidden):
    with pytest.raises((ValueError, TypeError), match="expected visible >= 1 and hidden >= 1"):
        SigmoidBeliefNet(visible, hidden)


def test_arguments_of_the_method():
    with pytest.raises(ValueError, match="expected max_bytes > 0"):
        Exact(max_bytes=0)
    posterior = Exact().infer(toy.belief_net(4, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="expected n > 0"):
        posterior.sample(0)
    with pytest.raises(ValueError, match=r"expected values of every latent site, got none of 'h1'"):
        posterior.log_prob({})
    with pytest.raises(ValueError, match=r"expected 'h1' of shape \[n, 3, 2\], got \(2, 2\)"):
        posterior.log_prob({"h1": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="f must treat rows apart"):
        posterior.expectation(lambda z: z["h1"].sum())


def test_too_little_memory():
    net, x = toy.belief_net(64, 8), torch.zeros(100, 64)
    with pytest.raises(
        ValueError, match=r"expected Exact to fit in max_bytes=1,000, got 256 joint states for 100 rows.*raise max_bytes"
    ):
        Exact(max_bytes=1000).infer(net, x)
