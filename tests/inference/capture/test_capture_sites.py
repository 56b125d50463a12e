"""Records of sample sites, and what they say two runs differ in."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.distributions import RBM, CrossEntropy, PersistentChains
from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import relax, scale_kl, surrogate
from pyrovae.inference.capture.graph import capture
from pyrovae.inference.capture.sites import At, Site, SiteRecorder, numerical_difference, structural_change
from pyrovae.models import CategoricalVAE

WHEN = "when the program was captured"


def recorded(program, *args, seed=0):
    torch.manual_seed(seed)
    with SiteRecorder() as recorder:
        program(*args)
    return recorder


def difference(before, after, **kwargs):
    """What two runs with one random state differ in, in structure or in numbers."""
    a, b = recorded(before), recorded(after)
    return structural_change(a.sites, b.sites) or numerical_difference(a.sites, a.tensors, b.sites, b.tensors, **kwargs)


def held(recorder, name):
    """What the record of a site holds, by label."""
    site = next(site for site in recorder.sites if site.name == name)
    return {label: recorder.tensors[x] if isinstance(x, At) else x for label, x in site.entries}


def sampled(fn, name="z", **kwargs):
    return lambda: pyro.sample(name, fn() if not isinstance(fn, dist.Distribution) else fn, **kwargs)


# Records


def test_a_site():
    loc = torch.randn(3, 2)

    def program():
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("z", dist.Normal(loc, 0.5))

    recorder = recorded(program)
    *_, site = recorder.sites
    plates = (("rows", 3, -2), ("columns", 2, -1))
    assert (site.name, site.observed, site.family) == ("z", False, "Normal")
    assert (site.batch_shape, site.event_shape, site.plates) == ((3, 2), (), plates)
    got = held(recorder, "z")
    assert list(got) == ["loc", "scale", "log-probability scale", "log-probability mask", "value"]
    assert torch.equal(got["loc"], loc)
    assert got["log-probability scale"] == 1.0
    assert got["log-probability mask"] is None
    assert [other.family for other in recorder.sites] == ["_Subsample", "_Subsample", "Normal"]
    assert hash(site) == hash(recorded(program).sites[-1])


def test_sequential_plates_and_subsamples():
    def program():
        for i in pyro.plate("times", 2):
            pyro.sample(f"a{i}", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5, subsample_size=3) as index:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(5)[index])

    recorder = recorded(program)
    assert [site.name for site in recorder.sites] == ["times", "a0", "a1", "data", "x"]
    assert recorder.sites[1].plates == (("times", 2, None),)
    assert recorder.sites[4].plates == (("data", 3, -1),)
    assert recorder.sites[4].observed
    assert held(recorder, "data")["value"].shape == (3,)


VALUES = torch.tensor([0.2, 0.3, 0.5])
TRANSFORMS = [dist.transforms.AffineTransform(1.0, torch.tensor(2.0)), dist.transforms.ExpTransform()]
AFFINE_TWICE = [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.AffineTransform(3.0, 4.0)]
MIXTURE = lambda: dist.MixtureSameFamily(dist.Categorical(VALUES), dist.Normal(torch.arange(3.0), 1.5))  # noqa: E731
W = torch.ones(3, 2)
FAMILIES = {
    "wrapped": (
        lambda: dist.Normal(0.0, 0.5).expand([4, 3]).mask(torch.ones(4, 3).bool()).to_event(1),
        "Normal",
        {"scale": 0.5},
    ),
    "expanded": (lambda: dist.MultivariateNormal(torch.ones(2), torch.eye(2)).expand([4]), "MultivariateNormal", {"loc": 1.0}),
    "masked": (lambda: dist.Normal(0.0, 0.5).mask(mask=False), "Normal", {"mask": False}),
    "logits": (lambda: dist.Bernoulli(logits=torch.tensor(0.7)), "Bernoulli", {"logits": 0.7}),
    "probs": (lambda: dist.OneHotCategorical(VALUES), "OneHotCategorical", {"probs": VALUES}),
    "beta": (lambda: dist.Beta(2.0, 3.0), "Beta", {"concentration": torch.tensor([2.0, 3.0])}),
    "delta": (lambda: dist.Delta(torch.tensor(3.0), 0.5), "Delta", {"v": 3.0, "log density": 0.5}),
    "log normal": (lambda: dist.LogNormal(0.0, 0.5), "LogNormal", {"scale": 0.5}),
    "transformed": (
        lambda: dist.TransformedDistribution(dist.Normal(0.0, 0.5), TRANSFORMS),
        "Normal through AffineTransform, ExpTransform",
        {"loc": 0.0, "scale": 0.5, "loc of the AffineTransform": 1.0, "scale of the AffineTransform": 2.0},
    ),
    "composed": (
        lambda: dist.TransformedDistribution(dist.Normal(0.0, 0.5), [dist.transforms.ComposeTransform(AFFINE_TWICE)]),
        "Normal through AffineTransform, AffineTransform",
        {"loc of the AffineTransform": 1.0, "loc of the AffineTransform 2": 3.0},
    ),
    "mixture": (MIXTURE, "MixtureSameFamily", {"probs": VALUES, "loc": torch.arange(3.0), "scale": 1.5}),
    "cross entropy": (lambda: CrossEntropy(torch.tensor(0.7)), "CrossEntropy", {"logits": 0.7}),
    "rbm": (lambda: RBM(W.double(), torch.zeros(3), torch.zeros(2)), "RBM", {"W": W}),
}


@pytest.mark.parametrize(("fn", "family", "numbers"), FAMILIES.values(), ids=FAMILIES)
def test_families_and_what_they_hold(fn, family, numbers):
    recorder = recorded(sampled(fn()))
    assert recorder.sites[0].family == family
    got = held(recorder, "z")
    for label, number in numbers.items():
        wanted = torch.as_tensor(number)
        assert torch.equal(
            torch.as_tensor(got[label]), wanted.to(torch.as_tensor(got[label])).expand_as(torch.as_tensor(got[label]))
        )


def test_nothing_lazy_is_computed():
    for fn in (dist.Categorical(probs=VALUES), dist.Bernoulli(logits=VALUES), dist.MultivariateNormal(VALUES, torch.eye(3))):
        before = set(vars(fn))
        recorded(sampled(fn, obs=torch.ones(())))
        assert set(vars(fn)) == before


def test_chains_stay_where_they_are():
    chains = PersistentChains(5, units=3)
    fn = RBM(W.double().requires_grad_(), torch.zeros(3), torch.zeros(2), chains=chains)
    before = chains.states.clone()
    recorded(sampled(fn, obs=torch.ones(3)))
    assert torch.equal(chains.states, before)


def test_a_parameter_that_was_cached_between_two_runs_is_no_difference():
    fn = dist.Categorical(probs=VALUES)
    a = recorded(sampled(fn))
    assert fn.logits.shape == (3,)
    b = recorded(sampled(fn))
    assert structural_change(a.sites, b.sites) is None
    assert numerical_difference(a.sites, a.tensors, b.sites, b.tensors) is None


# Differences of structure


def two(second=lambda: pyro.sample("x", dist.Normal(0.0, 1.0))):
    def program():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        second()

    return program


def in_plate(name, size, shape=(), dim=-1):
    def program():
        with pyro.plate(name, size, dim=dim):
            pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0))

    return program


STRUCTURE = {
    "family": (sampled(dist.Laplace(0.0, 1.0)), sampled(dist.Normal(0.0, 1.0)), "'z' is a Normal now and was a Laplace"),
    "vowel": (sampled(dist.Normal(0.0, 1.0)), sampled(dist.Exponential(1.0)), "'z' is an Exponential now and was a Normal"),
    "observed": (
        sampled(dist.Normal(0.0, 1.0)),
        sampled(dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)),
        "'z' is observed now and was latent",
    ),
    "batch": (in_plate("d", 50), in_plate("d", 100), "'z' has batch shape (100,) now and had (50,)"),
    "event": (
        sampled(dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        sampled(dist.Normal(torch.zeros(3), 1.0).to_event(1)),
        "'z' has event shape (3,) now and had (2,)",
    ),
    "plates": (
        in_plate("d", 5),
        in_plate("d", 5, dim=-2),
        "'z' has batch shape (5, 1) now and had (5,)",
    ),
    "gone": (two(), two(lambda: None), "'x' is gone"),
    "more": (two(lambda: None), two(), "'x' is new"),
}


@pytest.mark.parametrize(("before", "after", "words"), STRUCTURE.values(), ids=STRUCTURE)
def test_a_change_of_structure_is_named(before, after, words):
    assert structural_change(recorded(before).sites, recorded(after).sites) == f"the site {words}"
    assert structural_change(recorded(before).sites, recorded(before).sites) is None


def test_plates_are_named_as_such():
    assert difference(in_plate("d", 5), in_plate("e", 5)) == "the plate 'e' is new"
    assert difference(in_plate("d", 5, (5,)), in_plate("d", 5, (5,))) is None
    plates = (("d", 5, -1),), (("d", 6, -1),)
    old, new = (Site("z", False, "Normal", (), (), plate, ()) for plate in plates)
    words = "the site 'z' is in the plate 'd' (size 6, dim -1) now and was in the plate 'd' (size 5, dim -1)"
    assert structural_change([old], [new]) == words


def _sites(*names):
    return [Site(name, False, "Normal", (), (), (), ()) for name in names]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("zzx", "zyzx", "the site 'y' is new"),
        ("zyzx", "zzx", "the site 'y' is gone"),
        ("zx", "xz", "the site 'x' stands where the site 'z' stood"),
        ("zx", "zzx", "the site 'z' occurs 2 times now and did once"),
        ("zzx", "zx", "the site 'z' occurs once now and did 2 times"),
        ("zzx", "zzx", None),
    ],
)
def test_sites_that_come_go_or_move(before, after, words):
    assert structural_change(_sites(*before), _sites(*after)) == words


def test_guide_and_model_are_compared_in_order():
    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.5)), 1.0))

    def model(scale):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    runs = [recorded(Trace_ELBO().loss_and_grads, lambda: model(s), guide) for s in (1.0, 1.0, 2.0)]  # noqa: B023
    assert [site.name for site in runs[0].sites] == ["z", "z", "x"]
    first, again, other = runs
    assert numerical_difference(first.sites, first.tensors, again.sites, again.tensors) is None
    words = numerical_difference(first.sites, first.tensors, other.sites, other.tensors)
    assert words == f"the scale of the site 'z' (Normal) is 2 and was 1 {WHEN}"


# Differences of numbers


def scaled(scale):
    return poutine.scale(sampled(dist.Normal(0.0, 1.0)), scale=scale)


def masked(mask):
    return poutine.mask(sampled(dist.Normal(torch.zeros(2), 1.0)), mask=mask)


NUMBERS = {
    "scalar": (sampled(dist.Normal(0.0, 0.5)), sampled(dist.Normal(0.0, 0.45)), "scale", "Normal", "is 0.45 and was 0.5"),
    "constant": (
        sampled(lambda: dist.Normal(torch.zeros(3), 0.5)),
        sampled(lambda: dist.Normal(torch.ones(3), 0.5)),
        "loc",
        "Normal",
        "is 1 and was 0",
    ),
    "element": (
        sampled(lambda: dist.Normal(torch.zeros(2, 2), 1.0)),
        sampled(lambda: dist.Normal(torch.tensor([[0.0, 0.0], [0.25, 3.0]]), 1.0)),
        "loc",
        "Normal",
        "is 0.25 at [1, 0] and was 0",
    ),
    "scale": (scaled(2.0), scaled(3.0), "log-probability scale", "Normal", "is 3.0 and was 2.0"),
    "scale tensor": (scaled(torch.tensor(2.0)), scaled(torch.tensor(3.0)), "log-probability scale", "Normal", "is 3 and was 2"),
    "kind": (
        scaled(2.0),
        scaled(torch.tensor(2.0)),
        "log-probability scale",
        "Normal",
        "is a tensor of shape () and was 2.0",
    ),
    "mask": (
        masked(torch.tensor([True, True])),
        masked(torch.tensor([True, False])),
        "log-probability mask",
        "Normal",
        "is False at [1] and was True",
    ),
    "value": (
        sampled(dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)),
        sampled(dist.Normal(0.0, 1.0), obs=torch.tensor(1.5)),
        "value",
        "Normal",
        "is 1.5 and was 1",
    ),
    "shape of the value": (
        sampled(dist.Normal(0.0, 1.0), obs=torch.zeros(2)),
        sampled(dist.Normal(0.0, 1.0), obs=torch.zeros(3)),
        "value",
        "Normal",
        "has shape (3,) and had (2,)",
    ),
    "dtype": (
        sampled(lambda: dist.Normal(torch.zeros(2), 1.0)),
        sampled(lambda: dist.Normal(torch.zeros(2).float(), 1.0)),
        "loc",
        "Normal",
        "has dtype torch.float32 and had torch.float64",
    ),
    "transform": (
        sampled(lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(0.0, 2.0))),
        sampled(lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(0.0, 2.5))),
        "scale of the AffineTransform",
        "Normal through AffineTransform",
        "is 2.5 and was 2.0",
    ),
}


@pytest.mark.parametrize(("before", "after", "label", "family", "words"), NUMBERS.values(), ids=NUMBERS)
def test_a_changed_number_is_named(before, after, label, family, words):
    assert difference(before, after) == f"the {label} of the site 'z' ({family}) {words} {WHEN}"
    assert difference(before, before) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_written_with_the_digits_of_their_dtype(dtype):
    before, after = (sampled(dist.Delta(torch.tensor(x, dtype=dtype))) for x in (0.5, 0.45))
    assert difference(before, after) == f"the v of the site 'z' (Delta) is 0.45 and was 0.5 {WHEN}"


def observed(*numbers):
    return sampled(lambda: dist.Delta(torch.tensor(numbers)))


def delta(log_density):
    return sampled(lambda: dist.Delta(torch.tensor(1.0), log_density, validate_args=False))


def test_nan_is_equal_to_nan_and_to_nothing_else():
    assert difference(observed(math.nan, 1.0), observed(math.nan, 1.0)) is None
    assert difference(observed(math.nan, 1.0), observed(2.0, 1.0)).startswith(
        "the v of the site 'z' (Delta) is 2 at [0] and was nan"
    )
    assert "is nan at [0] and was 2" in difference(observed(2.0, 1.0), observed(math.nan, 1.0), tolerance=1e-3)
    assert difference(delta(math.nan), delta(math.nan)) is None
    assert difference(delta(math.nan), delta(0.5)).endswith(f"is 0.5 and was nan {WHEN}")


def test_the_tolerance_is_relative_to_the_largest_element():
    a, b = observed(1000.0, 1.0, math.inf), observed(1000.0, 1.009, math.inf)
    assert difference(a, b) is not None
    assert difference(a, b, tolerance=1e-5) is None
    assert "is 1.009 at [1] and was 1" in difference(a, b, tolerance=8e-6)
    assert "is inf at [0] and was 1" in difference(observed(1.0, 2.0), observed(math.inf, 2.0), tolerance=0.1)
    assert difference(scaled(1.0), scaled(1.0 + 1e-7), tolerance=1e-5) is None
    assert difference(scaled(1.0), scaled(1.0 + 1e-7)) is not None


def test_a_tensor_that_was_not_kept_is_passed_over():
    a, b = recorded(observed(1.0)), recorded(observed(2.0))
    assert numerical_difference(a.sites, [None] * len(a.tensors), b.sites, b.tensors) is None


# Within objectives and tracing


X = torch.bernoulli(torch.full((4, 6), 0.5, dtype=torch.float64))


def vae():
    model = CategoricalVAE(6, latents=2, categories=3, hidden=4)
    return model, AmortizedMeanField(model)


def plain():
    def model(x):
        with pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


def automatic(family):
    def make():
        model, _ = plain()
        return model, family(model)

    return make


def rewritten(change):
    def make():
        return tuple(change(program) for program in vae())

    return make


def enumerated():
    def model(x):
        with pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    @pyro.infer.config_enumerate
    def guide(x):
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(()))))

    return model, guide


PARTICLES = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
OBJECTIVES = {
    "plain": (plain, Trace_ELBO()),
    "particles": (plain, Trace_ELBO(num_particles=2)),
    "vectorised": (plain, Trace_ELBO(**PARTICLES)),
    "auto": (automatic(AutoNormal), Trace_ELBO()),
    "auto multivariate": (automatic(AutoMultivariateNormal), Trace_ELBO()),
    "discrete": (vae, Trace_ELBO()),
    "enumerated": (enumerated, TraceEnum_ELBO(max_plate_nesting=1)),
    "relaxed": (rewritten(lambda p: relax(p, 0.5)), Trace_ELBO(**PARTICLES)),
    "straight through": (rewritten(lambda p: relax(p, 0.5, straight_through=True)), Trace_ELBO()),
    "surrogate": (rewritten(surrogate), Trace_ELBO()),
    "scaled": (rewritten(lambda p: scale_kl(relax(p, 0.5), torch.tensor(0.5))), Trace_ELBO()),
    "blocked": (rewritten(lambda p: poutine.block(p, hide=["z"])), Trace_ELBO()),
}


@pytest.mark.parametrize(("make", "elbo"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_record_changes_nothing_and_repeats_itself(make, elbo):
    torch.manual_seed(1)
    programs = make()
    elbo.loss(*programs, X)  # automatic guides set up

    def run():
        torch.manual_seed(2)
        with poutine.trace(param_only=True) as trace:
            loss = elbo.loss_and_grads(*programs, X)
        leaves = [site["value"].unconstrained() for site in trace.trace.nodes.values()]
        grads = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
        for leaf in leaves:
            leaf.grad = None
        return loss, grads

    loss, grads = run()
    with SiteRecorder() as first:
        recorded_loss, recorded_grads = run()
    with SiteRecorder() as second:
        run()
    assert recorded_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(grads, recorded_grads, strict=True))
    assert first.sites == second.sites
    assert len(first.sites) > 1
    assert structural_change(first.sites, second.sites) is None
    assert numerical_difference(first.sites, first.tensors, second.sites, second.tensors) is None
    assert not any(t.requires_grad for t in first.tensors)


@pytest.mark.parametrize("make", [plain, vae, rewritten(lambda p: relax(p, 0.5)), rewritten(surrogate)])
def test_a_record_within_tracing_is_that_of_an_eager_run(make):
    model, guide = make()
    guide(X)
    sites = []

    def run(x):
        with SiteRecorder() as recorder:
            trace = poutine.trace(guide).get_trace(x)
            poutine.replay(model, trace)(x)
        sites[:] = recorder.sites
        return tuple(recorder.tensors)

    graph = capture(run, [X])
    captured = list(sites)
    torch.manual_seed(5)
    before = graph([X])
    torch.manual_seed(5)
    after = run(X)
    assert structural_change(captured, sites) is None
    assert [site.name for site in captured] == [site.name for site in sites]
    assert numerical_difference(captured, before, sites, after) is None
    torch.manual_seed(6)
    assert "the value of the site 'z" in numerical_difference(captured, graph([X]), sites, after)


def test_a_number_in_a_closure_is_found():
    number = {"scale": 0.5}

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, number["scale"]), obs=x)

    sites = []

    def run(x):
        with SiteRecorder() as recorder:
            model(x)
        sites[:] = recorder.sites
        return tuple(recorder.tensors)

    with pyro.validation_enabled(False):
        graph = make_fx(run)(X[0, 0])
        captured = list(sites)
        number["scale"] = 0.45
        torch.manual_seed(5)
        before = graph(X[0, 0])
        torch.manual_seed(5)
        after = run(X[0, 0])
    words = numerical_difference(captured, before, sites, after)
    assert words == f"the scale of the site 'x' (Normal) is 0.45 and was 0.5 {WHEN}"
