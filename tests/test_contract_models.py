"""What every model of this library keeps, one row a model."""

import copy
import json

import pyro
import pytest
import stats
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import relax
from pyrovae.inference import Exact, ExactLikelihood, Variational
from pyrovae.models import (
    DRAW,
    BernoulliMixture,
    BernoulliVAE,
    BoltzmannMachine,
    CategoricalVAE,
    DeepBeliefNet,
    GaussianMixture,
    GaussianVAE,
    HiddenMarkovModel,
    HierarchicalVAE,
    MixedVAE,
    RestrictedBoltzmannMachine,
    SigmoidBeliefNet,
    toy,
)

MODELS = {
    "SigmoidBeliefNet": (lambda: SigmoidBeliefNet(5, 3), 5, {"h1": (3,)}),
    "SigmoidBeliefNet, layers": (lambda: SigmoidBeliefNet(5, [3, 2]), 5, {"h2": (2,), "h1": (3,)}),
    "DeepBeliefNet": (lambda: DeepBeliefNet(5, [3, 2]), 5, {"h1": (3,)}),
    "DeepBeliefNet, layers": (lambda: DeepBeliefNet(5, [3, 2, 2]), 5, {"h2": (2,), "h1": (3,)}),
    "RestrictedBoltzmannMachine": (lambda: RestrictedBoltzmannMachine(5, 3), 5, {"h1": (3,)}),
    "RestrictedBoltzmannMachine, chains": (lambda: RestrictedBoltzmannMachine(5, 3, max_bits=2), 5, {"h1": (3,)}),
    "BoltzmannMachine": (lambda: BoltzmannMachine(4, 2), 4, {"h1": (2,)}),
    "BoltzmannMachine, chains": (lambda: BoltzmannMachine(4, 2, max_bits=2, num_chains=10), 4, {"h1": (2,)}),
    "belief_net": (lambda: toy.belief_net(4, 2), 4, {"h1": (2,)}),
    "Mixture": (lambda: toy.Mixture(5, 3), 5, {"z": ()}),
    "BernoulliMixture": (lambda: BernoulliMixture(5, 3), 5, {"z": ()}),
    "GaussianMixture": (lambda: GaussianMixture(5, 3), 5, {"z": ()}),
    "GaussianMixture, diagonal": (lambda: GaussianMixture(5, 3, "diagonal"), 5, {"z": ()}),
    "GaussianMixture, spherical": (lambda: GaussianMixture(5, 3, "spherical"), 5, {"z": ()}),
    "HiddenMarkovModel": (lambda: HiddenMarkovModel(2, 3, emission="bernoulli", length=4), (4, 3), {"z": (4,)}),
    "HiddenMarkovModel, gaussian": (lambda: HiddenMarkovModel(2, 3, emission="gaussian", length=4), (4, 3), {"z": (4,)}),
    "LinearGaussian": (lambda: toy.LinearGaussian(3, 2), 3, {"z": (2,)}),
    "GaussianVAE": (lambda: GaussianVAE(5, 2, (4,), activation="Tanh"), 5, {"z": (2,)}),
    "GaussianVAE, normal": (lambda: GaussianVAE(5, 2, 4, likelihood="normal"), 5, {"z": (2,)}),
    "GaussianVAE, normal_learned": (lambda: GaussianVAE(5, 2, likelihood="normal_learned"), 5, {"z": (2,)}),
    "GaussianVAE, categorical": (lambda: GaussianVAE(5, 2, (4,), likelihood="categorical", levels=3), 5, {"z": (2,)}),
    "GaussianVAE, cross_entropy": (lambda: GaussianVAE(5, 2, (4,), likelihood="cross_entropy"), 5, {"z": (2,)}),
    "CategoricalVAE": (lambda: CategoricalVAE(5, 2, 3, (6, 4), activation="Tanh"), 5, {"z": (2, 3)}),
    "BernoulliVAE": (lambda: BernoulliVAE(5, 3), 5, {"z": (3,)}),
    "MixedVAE": (lambda: MixedVAE(5, 2, 3, (8,)), 5, {"y": (3,), "z": (2,)}),
    "HierarchicalVAE, discrete": (
        lambda: HierarchicalVAE(5, [("categorical", (1, 3)), ("bernoulli", 2)], (4,), between=(), activation="Tanh"),
        5,
        {"h2": (2,), "h1": (1, 3)},
    ),
    "HierarchicalVAE, any mix": (
        lambda: HierarchicalVAE(5, [("normal", 3), ("bernoulli", 2), ("categorical", (2, 3))], (8,)),
        5,
        {"h3": (2, 3), "h2": (2,), "h1": (3,)},
    ),
    "DRAW": (lambda: DRAW(4, 2, 3, 2), 4, {"z_1": (2,), "z_2": (2,)}),
    "DRAW, attention": (lambda: DRAW(4, 2, 3, 2, attention=(2, 2)), 4, {"z_1": (2,), "z_2": (2,)}),
}
DISCRETE = [
    "SigmoidBeliefNet",
    "SigmoidBeliefNet, layers",
    "DeepBeliefNet",
    "DeepBeliefNet, layers",
    "RestrictedBoltzmannMachine",
    "BoltzmannMachine",
    "belief_net",
    "Mixture",
    "BernoulliMixture",
    "GaussianMixture",
    "GaussianMixture, diagonal",
    "GaussianMixture, spherical",
    "HiddenMarkovModel",
    "HiddenMarkovModel, gaussian",
    "CategoricalVAE",
    "BernoulliVAE",
    "HierarchicalVAE, discrete",
]
VAES = [name for name in MODELS if "VAE" in name]
each = pytest.mark.parametrize("name", MODELS)
each_vae = pytest.mark.parametrize("name", VAES)


def build(name, rows=6):
    torch.manual_seed(1)
    make, width, latents = MODELS[name]
    model = make()
    with torch.no_grad(), poutine.block():
        x = model(batch_size=rows)
    pyro.clear_param_store()
    return model, x, width if isinstance(width, tuple) else (width,), latents


def trace(model, *args, **kwargs):
    with poutine.block():
        return poutine.trace(model).get_trace(*args, **kwargs)


def log_joint(model, x, values, **kwargs):
    t = trace(poutine.condition(model, data=values), x, **kwargs)
    t.compute_log_prob()
    return {name: site for name, site in t.nodes.items() if site["type"] == "sample" and "log_prob" in site}


@each
def test_prior_predictive_and_the_sites(name):
    model, x, width, latents = build(name)
    for rows in (1, 4):
        t = trace(model, batch_size=rows)
        assert {k: tuple(t.nodes[k]["value"].shape) for k in [*latents, "x"]} == {
            k: (rows, *s) for k, s in {**latents, "x": width}.items()
        }
        assert not t.nodes["x"]["is_observed"]
        assert tuple(t.nodes["_RETURN"]["value"].shape) == (rows, *width)
        frames = t.nodes["x"]["cond_indep_stack"]
        assert [(f.name, f.dim, f.size) for f in frames] == [("data", -1, rows)]
    t = trace(model, x)
    assert t.nodes["x"]["is_observed"]
    assert torch.equal(t.nodes["x"]["value"], x)
    assert set(trace(model).stochastic_nodes) == {*latents, "x", "data"} or set(trace(model).stochastic_nodes) == {
        *latents,
        "x",
    }


@each
def test_a_minibatch_is_scaled(name):
    model, x, _, latents = build(name)
    index = torch.tensor([4, 0, 2])
    full = trace(model, x)
    values = {k: full.nodes[k]["value"] for k in latents}
    rows = log_joint(model, x, values)
    part = log_joint(model, x[index], {k: v[index] for k, v in values.items()}, index=index, num_data=6)
    for site in [*latents, "x"]:
        assert part[site]["scale"] == 2.0
        # the batch's objective is the sum over its rows
        assert torch.allclose(part[site]["log_prob"], 2 * rows[site]["log_prob"][index])
    with pytest.raises(ValueError, match="expected index"):
        model(x, index=index)
    with pytest.raises(ValueError, match="expected index"):
        model(x[:2], index=index, num_data=6)


@each
def test_bad_data(name):
    model, _, width, _ = build(name)
    for bad in (torch.zeros(3, *width[:-1], width[-1] + 1), torch.zeros(0, *width), torch.zeros(*width)):
        with pytest.raises(ValueError, match="expected data"):
            model(bad)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        model(batch_size=0)


@each
def test_predictive_takes_it(name):
    model, _, width, latents = build(name)
    for parallel in (False, True):
        drawn = Predictive(model, num_samples=7, parallel=parallel)(batch_size=3)
        assert {k: tuple(v.shape) for k, v in drawn.items() if k in latents or k == "x"} == {
            k: (7, 3, *s) for k, s in {**latents, "x": width}.items()
        }


@each
def test_every_parameter_has_a_gradient(name):
    model, x, _, _ = build(name)
    t = trace(model, x)
    t.log_prob_sum().backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert dead == []


@each
def test_state_dict_round_trip(name):
    model, x, _, latents = build(name)
    other = MODELS[name][0]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    values = {k: v["value"] for k, v in trace(model, x).nodes.items() if k in latents}
    expected = log_joint(model, x, values)["x"]["log_prob"]
    assert not torch.allclose(log_joint(other, x, values)["x"]["log_prob"], expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(log_joint(other, x, values)["x"]["log_prob"], expected)


@each
def test_copies_stay_apart(name):
    model, x, _, _ = build(name)
    other = copy.deepcopy(model)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    assert model._pyro_name != other._pyro_name
    trace(model, x)
    trace(other, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    trace(other, x)
    trace(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert not any(torch.equal(v, before[k]) for k, v in other.named_parameters())


@each
def test_two_instances_trained_in_turn_by_stock_svi(name):
    make = MODELS[name][0]
    models = [make(), make()]
    _, x, _, _ = build(name)
    guides = [AmortizedMeanField(model) for model in models]
    for model, guide in zip(models, guides, strict=True):
        trained = [*model.named_parameters(prefix="model"), *guide.named_parameters(prefix="guide")]
        before = {k: v.detach().clone() for k, v in trained}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2))
        for _ in range(2):
            svi.step(x)
        assert [k for k, v in trained if torch.equal(v, before[k])] == []
    keys = [{k for k in pyro.get_param_store() if k.startswith(m._pyro_name + ".")} for m in [*models, *guides]]
    assert all(keys)
    assert len(set.union(*keys)) == sum(len(k) for k in keys)


@pytest.mark.parametrize("name", DISCRETE)
def test_two_instances_learned_in_turn(name):
    make = MODELS[name][0]
    _, x, _, _ = build(name)
    for model in (make(), make()):
        before = {k: v.detach().clone() for k, v in model.named_parameters()}
        Variational(None, ExactLikelihood(), num_steps=2).fit(model, x)
        assert [k for k, v in model.named_parameters() if torch.equal(v, before[k])] == []
    assert list(pyro.get_param_store()) == []


@pytest.mark.parametrize("name", DISCRETE)
def test_rows_are_independent(name):
    model, x, _, _ = build(name)
    whole = Exact().infer(model, x).log_evidence
    parts = torch.cat([Exact().infer(model, x[i : i + 1]).log_evidence for i in range(6)])
    assert torch.allclose(whole, parts, atol=1e-12)


@each
def test_reset_parameters(name):
    model, _, _, _ = build(name)
    ends = []
    for seed in (3, 4, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(9.0)
        torch.manual_seed(seed)
        model.reset_parameters()
        ends.append({k: v.detach().clone() for k, v in model.named_parameters()})
        assert [k for k, v in ends[-1].items() if bool((v == 9).any())] == []
    assert all(torch.equal(v, ends[2][k]) for k, v in ends[0].items())
    assert not all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    torch.manual_seed(3)
    fresh = MODELS[name][0]()
    if name != "belief_net":  # whose own parameters are larger
        assert all(torch.equal(v, ends[0][k]) for k, v in fresh.named_parameters())


def test_closed_forms_of_linear_gaussian():
    model, x, _, _ = build("LinearGaussian")
    mean, covariance = model.posterior(x)
    z = torch.randn(6, 2)
    joint = log_joint(model, x, {"z": z})
    q = torch.distributions.MultivariateNormal(mean, covariance).log_prob(z)
    assert torch.allclose(joint["z"]["log_prob"] + joint["x"]["log_prob"] - q, model.log_evidence(x), atol=1e-10)


@each_vae
def test_config_and_state_make_the_model_again(name):
    model, x, _, latents = build(name)
    written = json.dumps(model.config)
    with torch.no_grad():
        model.beta.fill_(0.5)
    again = type(model)(**json.loads(written))
    assert json.dumps(again.config) == written
    assert float(again.beta) == 1
    values = {k: v["value"] for k, v in trace(model, x).nodes.items() if k in latents}
    expected = {k: v["log_prob"] for k, v in log_joint(model, x, values).items()}
    assert not torch.allclose(log_joint(again, x, values)["x"]["log_prob"], expected["x"])
    again.load_state_dict(model.state_dict())
    assert float(again.beta) == 0.5
    for k, site in log_joint(again, x, values).items():
        assert torch.equal(site["log_prob"], expected[k])


@each_vae
def test_samples_and_means(name):
    model, x, width, _ = build(name)
    draws, means = model.sample(4), model.sample(4, mean=True)
    assert draws.shape == means.shape == (4, *width)
    assert not draws.requires_grad
    assert not means.requires_grad
    model.likelihood.check(draws)
    if "normal" not in name:
        assert bool(((means > 0) & (means < 1)).all())
    assert list(pyro.get_param_store()) == []
    with pytest.raises(ValueError, match="batch_size >= 1"):
        model.sample(0)
    # the mean of the pixels is that of many draws at the same latents
    with torch.no_grad():
        t = trace(model, x)
    many = t.nodes["x"]["fn"].sample((20000,))
    assert stats.means_agree(many, t.nodes["x"]["fn"].mean)
    assert not stats.means_agree(many, t.nodes["x"]["fn"].mean + 0.1)


@each_vae
def test_the_bias_fits_the_data(name):
    model, x, _, _ = build(name)
    x[:, 0] = 1.0  # a pixel that is always on
    model.initialize_bias(x)
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
    bits = not ("normal" in name or "categorical" in name)
    smoothed = (x.sum(0) + 1) / 8 if bits else (x.sum(0) + 1.5) / 9 if "categorical" in name else x.mean(0)
    for row in model.sample(3, mean=True):
        assert torch.allclose(row, smoothed)
    assert torch.isfinite(model.decoder[-1].bias).all()
    with pytest.raises(ValueError, match="expected data"):
        model.initialize_bias(x[:, 1:])
    with pytest.raises(ValueError, match="expected data"):
        model.initialize_bias(x[:0])


@each_vae
def test_beta_weighs_the_latents_of_model_and_guide(name):
    model, x, _, latents = build(name)
    guide = AmortizedMeanField(model)
    values = {k: v["value"] for k, v in trace(guide, x).nodes.items() if k in latents}
    once = [log_joint(program, x, values) for program in (model, guide)]
    with torch.no_grad():
        model.beta.fill_(2.5)
    now = [log_joint(program, x, values) for program in (model, guide)]
    for before, after in zip(once, now, strict=True):
        for site in latents:
            assert torch.allclose(after[site]["log_prob"], 2.5 * before[site]["log_prob"])
    assert torch.equal(now[0]["x"]["log_prob"], once[0]["x"]["log_prob"])
    with torch.no_grad():
        model.beta.fill_(0.0)
    assert all(log_joint(model, x, values)[site]["log_prob_sum"].item() == 0 for site in latents)
    for bad in (-1.0, float("nan"), float("inf")):
        with torch.no_grad():
            model.beta.fill_(bad)
        with pytest.raises(ValueError, match="expected a finite beta"):
            model(x)


@each_vae
def test_the_relaxed_program_runs(name):
    model, x, _, latents = build(name)
    relaxed = relax(model, 0.5)
    guide = AmortizedMeanField(relaxed)
    for vectorized in (False, True):
        svi = SVI(relaxed, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(2, vectorize_particles=vectorized))
        assert torch.isfinite(torch.tensor(svi.step(x)))
    drawn = trace(guide, x)
    for site, shape in latents.items():
        assert drawn.nodes[site]["value"].shape == (6, *shape)
        assert drawn.nodes[site]["fn"].has_rsample


@each_vae
def test_bad_pixels(name):
    model, x, _, _ = build(name)
    nan, negative, grey = x.clone(), x.clone(), x.clone()
    nan[1, 2], negative[0, 0], grey[2, 1] = torch.nan, -0.3, 0.3
    grey_fits, real = "cross_entropy" in name, "normal" in name
    for bad, message in [
        (nan, "NaN in 1 of 6 rows"),
        (255 * (x != 0).double(), "values up to 255; divide by 255"),
        (negative, None if real else "values down to -0.3"),
        (grey, None if real or grey_fits else "values between"),
    ]:
        if message is None:
            model(bad)
            continue
        with pytest.raises(ValueError, match=rf"expected .*pixels.*{message}"):
            model(bad)
        with pytest.raises(ValueError, match=message):
            model.initialize_bias(bad)
    # the guide runs first, but the message is the model's
    svi = SVI(model, AmortizedMeanField(model), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with pytest.raises(ValueError, match="NaN in 1 of 6 rows"):
        svi.step(nan)
    with pytest.raises(ValueError, match="floating pixels, got"):
        model(x.byte())
    # without validation, nothing is checked
    with pyro.validation_enabled(False):
        model(negative)


@each_vae
def test_float32(name):
    model = MODELS[name][0]().float()
    x = model.sample(6)
    assert x.dtype == torch.float32
    relaxed = relax(model, 0.5)
    guide = AmortizedMeanField(relaxed, example=(x,))
    loss = Trace_ELBO().differentiable_loss(relaxed, guide, x)
    assert loss.dtype == torch.float32
    assert {p.dtype for p in guide.parameters()} == {torch.float32}


@each_vae
def test_the_encoder_mirrors_the_decoder(name):
    model, x, _, _ = build(name)
    first, second = model.mirror(), model.mirror()
    nets = first if isinstance(first, dict) else {"": first}
    assert list(nets) == ([f"h{i + 1}" for i in range(len(model.layers))] if isinstance(first, dict) else [""])
    value = x
    for site, net in nets.items():
        sizes = [layer.out_features for layer in net if isinstance(layer, torch.nn.Linear)]
        assert tuple(sizes[:-1]) == (model.hidden if site in ("", "h1") else model.between)
        other = second[site] if site else second
        assert not torch.equal(net[-1].weight, other[-1].weight)
        out = net(value.expand(3, *value.shape))  # under particles, too
        if site:
            layer = model.layers[int(site[1:]) - 1]
            assert out.shape == (3, 6, layer.outputs)
            value = torch.zeros(6, *layer.shape)
