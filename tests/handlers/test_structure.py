"""What a pilot run tells of a program."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyrovae.handlers.structure import finite_latents, frozen_leaves, read_structure, run_sites
from pyrovae.models import toy


def _latent(fn):
    def model():
        return pyro.sample("z", fn)

    return read_structure(model, (), {}).latents[0]


@pytest.mark.parametrize(
    ("fn", "kind", "states"),
    [
        (lambda: dist.Bernoulli(0.5), "bit", 2),
        (lambda: dist.Bernoulli(torch.full((2, 3), 0.5)).to_event(2), "bit", 64),
        (lambda: dist.Categorical(torch.ones(5)), "integer", 5),
        (lambda: dist.Categorical(torch.ones(3, 4)).to_event(1), "integer", 64),
        (lambda: dist.OneHotCategorical(torch.ones(4)), "one_hot", 4),
        (lambda: dist.OneHotCategorical(torch.ones(2, 4)).to_event(1), "one_hot", 16),
        (lambda: dist.Binomial(3, 0.5), "integer", 4),
        (lambda: dist.Bernoulli(0.5).mask(False), "bit", 2),
    ],
)
def test_finite_sites_by_support(fn, kind, states):
    latent = _latent(fn())
    assert (latent.kind, latent.num_states, latent.finite) == (kind, states, True)
    draws = fn().sample((50,))
    codes = latent.encode(draws)
    assert codes.shape == (50, latent.components)
    assert torch.equal(latent.decode(codes), draws)
    assert not torch.equal(latent.decode((codes + 1) % latent.cardinality), draws)
    assert int(codes.max()) < latent.cardinality


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (lambda: dist.Normal(0.0, 1.0), "real"),
        (lambda: dist.Gamma(1.0, 1.0), "other"),
        (lambda: dist.Poisson(1.0), "other"),
        (lambda: dist.Geometric(0.5), "other"),
        (lambda: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=torch.zeros(2)).to_event(1), "relaxed_bit"),
        (lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(3)), "relaxed_one_hot"),
    ],
)
def test_other_sites(fn, kind):
    latent = _latent(fn())
    assert latent.kind == kind
    assert not latent.finite


def test_plates_batch_and_subsample():
    def model():
        g = pyro.sample("g", dist.Bernoulli(0.5))
        with pyro.plate("rows", 6, subsample_size=4, dim=-2):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(4, 3))

    structure = read_structure(model, (), {})
    assert [latent.name for latent in structure.latents] == ["g", "z"]
    assert structure.batch == ()
    assert structure.plate_depth == 2
    assert {(p.name, p.dim, p.size, p.full_size) for p in structure.plates} == {("rows", -2, 4, 6), ("columns", -1, 3, 3)}
    assert structure.random_plates == ("rows",)
    rows = structure.subsample["rows"]
    values = {"g": torch.tensor(1.0), "z": torch.zeros(4, 1)}
    sites = run_sites(model, (), {}, values, structure.subsample)
    assert torch.equal(structure.subsample["rows"], rows)
    assert sites["x"].user_scale == pytest.approx(1.0)
    assert float(sites["x"].scale) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="continuous or infinite site 'z'; use MCMC"):
        finite_latents(structure, "Gibbs", "MCMC")


def test_batch_shapes_there_and_back():
    def model():
        with pyro.plate("a", 2, dim=-3), pyro.plate("b", 4, dim=-1):
            pyro.sample("z", dist.Bernoulli(0.5))

    structure = read_structure(model, (), {})
    assert structure.batch_shape == (2, 4)
    values = torch.randn(5, 2, 4)
    wide = structure.from_batch(values)
    assert wide.shape == (5, 2, 1, 4)
    assert torch.equal(structure.to_batch(wide), values)
    assert structure.to_batch(torch.zeros(1, 1, 1)).shape == (2, 4)


def test_user_scale_without_the_plates():
    def model():
        with pyro.plate("rows", 6, subsample_size=4), poutine.scale(scale=0.3):
            pyro.sample("z", dist.Bernoulli(0.5))

    structure = read_structure(model, (), {})
    sites = run_sites(model, (), {}, {"z": torch.zeros(4)}, structure.subsample)
    assert float(sites["z"].user_scale) == pytest.approx(0.3)


def test_the_pilot_leaves_the_random_state_and_the_outer_trace_alone():
    before = torch.get_rng_state()
    with poutine.trace() as trace:
        structure = read_structure(toy.belief_net(4, 2), (), {"batch_size": 3})
    assert torch.equal(before, torch.get_rng_state())
    assert not [n for n, s in trace.trace.nodes.items() if s["type"] == "sample"]
    assert len(structure.leaves) == 3


def test_frozen_leaves_are_put_back_after_an_error():
    leaf = torch.nn.Parameter(torch.tensor(1.0))

    def fail():
        with frozen_leaves({"a": leaf}, {"a": torch.tensor(5.0)}):
            assert float(leaf) == 5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert float(leaf) == 1


def test_numpy_arrays_are_told_from_tensors():
    def model(x):
        with pyro.plate("rows", x.new_ones(3).shape[0]):
            pyro.sample("z", dist.Bernoulli(0.5))

    read_structure(model, (torch.ones(3),), {})
    with pytest.raises(ValueError, match=r"got numpy arrays .*torch.as_tensor"):
        read_structure(model, (torch.ones(3).numpy(),), {})
