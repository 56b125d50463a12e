"""DRAW and its guide against the same net written by hand."""

import copy
import json
import math

import pyro
import pytest
import stats
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyrovae.guides import DRAWGuide
from pyrovae.handlers import own_params
from pyrovae.inference import Variational
from pyrovae.models import DRAW
from pyrovae.ops import isolated_rng

KINDS = {"plain": None, "attention": (3, 2)}
each = pytest.mark.parametrize("kind", KINDS)


def build(kind="plain", *, steps=3, visible=16, latent=2, hidden=4, rows=5, scale=0.7, **kwargs):
    """A model, its guide with another width, and data; weights large enough for every path to matter."""
    torch.manual_seed(3)
    model = DRAW(visible, latent, hidden, steps, attention=KINDS[kind], **kwargs)
    guide = DRAWGuide(model, hidden=hidden + 1)
    with torch.no_grad():
        for parameter in [*model.parameters(), *guide.parameters()]:
            parameter.normal_(0, scale)
    return model, guide, torch.bernoulli(torch.full((rows, visible), 0.4))


def leaves_of(module):
    return dict(module.named_parameters())


def lstm(weight, bias, inputs, hidden, cell):
    """Gates one by one, each with its own block of the weights."""
    n = hidden.shape[-1]
    joined = torch.cat([*inputs, hidden], -1)
    f, i, o, g = (joined @ weight[k * n : (k + 1) * n].T + bias[k * n : (k + 1) * n] for k in range(4))
    cell = cell / (1 + torch.exp(-f)) + torch.tanh(g) / (1 + torch.exp(-i))
    return torch.tanh(cell) / (1 + torch.exp(-o)), cell


def filters(raw, n, size):
    """F_Y, F_X and γ of square images, row by row of a batch."""
    pixels = torch.arange(size) + 1.0
    out = []
    for g_x, g_y, log_variance, log_stride, log_intensity in raw:
        rows = []
        for g in (g_y, g_x):
            bank = []
            for i in range(1, n + 1):
                mean = (size + 1) / 2 * (g + 1) + (i - n / 2 - 0.5) * (size - 1) / (n - 1) * log_stride.exp()
                row = torch.exp(-((pixels - mean) ** 2) / (2 * log_variance.exp()))
                bank.append(row / row.sum())
            rows.append(torch.stack(bank))
        out.append((*rows, log_intensity.exp()))
    return out


def draw_on(d, hidden, kind):
    drawn = hidden @ d["write.weight"].T + d["write.bias"]
    if kind == "plain":
        return drawn
    size, (_, n) = 4, KINDS[kind]
    raw = hidden @ d["attend.weight"].T + d["attend.bias"]
    return torch.stack(
        [(fy.T @ w.view(n, n) @ fx / gamma).flatten() for w, (fy, fx, gamma) in zip(drawn, filters(raw, n, size), strict=True)]
    )


def read_from(e, x, error, hidden, kind):
    if kind == "plain":
        return [x, error]
    size, (n, _) = 4, KINDS[kind]
    raw = hidden @ e["attend.weight"].T + e["attend.bias"]
    placed = filters(raw, n, size)
    return [
        torch.stack(
            [(gamma * fy @ i.view(size, size) @ fx.T).flatten() for i, (fy, fx, gamma) in zip(image, placed, strict=True)]
        )
        for image in (x, error)
    ]


def log_joint_by_hand(d, latents, x, kind):
    """Log p(x, z) of each row."""
    canvas, hidden, cell = (d[name].expand(len(x), -1) for name in ("canvas", "hidden", "cell"))
    total = torch.zeros(len(x))
    for z in latents:
        total = total - 0.5 * (z**2).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
        hidden, cell = lstm(d["gates.weight"], d["gates.bias"], [z], hidden, cell)
        canvas = canvas + draw_on(d, hidden, kind)
    p = 1 / (1 + torch.exp(-canvas))
    return total + (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)


def elbo_by_hand(model, guide, x, noise, kind, *, formula=False):
    """The bound of each row with z_t = μ_t + σ_t noise_t: one pass, encoder and decoder in turn, as in the paper.

    With `formula` the paper's loss, its KL divergences by formula.
    """
    d, e = leaves_of(model.decoder), leaves_of(guide.encoder)
    gates = e["gates.weight"]
    if kind == "plain":
        gates = torch.cat([e["image.weight"], gates], -1)
    canvas, drawn, memory = (d[name].expand(len(x), -1) for name in ("canvas", "hidden", "cell"))
    hidden, cell = (e[name].expand(len(x), -1) for name in ("hidden", "cell"))
    latents, log_q, kl = [], torch.zeros(len(x)), torch.zeros(len(x))
    for eps in noise:
        seen = read_from(e, x, x - 1 / (1 + torch.exp(-canvas)), drawn, kind)
        hidden, cell = lstm(gates, e["gates.bias"], [*seen, drawn], hidden, cell)
        head = hidden @ e["head.weight"].T + e["head.bias"]
        loc, log_scale = head[:, : eps.shape[-1]], head[:, eps.shape[-1] :]
        latents.append(loc + log_scale.exp() * eps)
        kl = kl + 0.5 * (loc**2 + (2 * log_scale).exp() - 2 * log_scale - 1).sum(-1)
        log_q = log_q - (0.5 * eps**2 + log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)
        drawn, memory = lstm(d["gates.weight"], d["gates.bias"], [latents[-1]], drawn, memory)
        canvas = canvas + draw_on(d, drawn, kind)
    if formula:
        p = 1 / (1 + torch.exp(-canvas))
        return (x * p.log() + (1 - x) * (1 - p).log()).sum(-1) - kl
    return log_joint_by_hand(d, latents, x, kind) - log_q


def gradients(loss, *modules):
    parameters = {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def noise_of(x, steps, latent):
    return [torch.randn(len(x), latent) for _ in range(steps)]


def close(found, expected, tolerance=1e-10):
    return all(torch.allclose(found[k], expected[k], rtol=tolerance, atol=tolerance) for k in expected)


@each
def test_log_joint(kind):
    model, _, x = build(kind, steps=2)
    latents = noise_of(x, 2, 2)
    values = dict(zip(("z_1", "z_2"), latents, strict=True))
    with poutine.block():
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(x)
    trace.compute_log_prob()
    found = sum(trace.nodes[name]["log_prob"] for name in ("z_1", "z_2", "x"))
    assert torch.allclose(found, log_joint_by_hand(leaves_of(model.decoder), latents, x, kind), rtol=0, atol=1e-10)
    wrong = log_joint_by_hand(leaves_of(model.decoder), latents[::-1], x, kind)
    assert not torch.allclose(found, wrong, atol=1e-3)


@each
@pytest.mark.parametrize("own", [False, True], ids=["stock", "own_params"])
def test_elbo_and_its_gradient(kind, own):
    model, guide, x = build(kind)
    wrap = own_params if own else (lambda program: program)
    with isolated_rng(7):
        loss = Trace_ELBO().differentiable_loss(wrap(model), wrap(guide), x)
    with isolated_rng(7):
        noise = noise_of(x, 3, 2)
    expected = -elbo_by_hand(model, guide, x, noise, kind).sum()
    assert torch.allclose(loss, expected, rtol=0, atol=1e-10)
    exact = gradients(expected, model, guide)
    assert all(bool((g != 0).any()) for g in exact.values())
    assert close(gradients(loss, model, guide), exact)
    # without the path through the guide the decoder's gradient would be another
    with isolated_rng(7), poutine.block():
        latents = poutine.trace(guide).get_trace(x)
    latents = {name: latents.nodes[name]["value"].detach() for name in model.latents}
    with poutine.block():
        cut = -poutine.trace(poutine.condition(model, data=latents)).get_trace(x).log_prob_sum()
    assert not close(gradients(cut, model), {k: v for k, v in exact.items() if k.startswith("0.")}, 1e-3)


@each
def test_the_loss_of_the_paper(kind):
    model, guide, x = build(kind)
    with isolated_rng(7):
        loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    with isolated_rng(7):
        noise = noise_of(x, 3, 2)
    expected = -elbo_by_hand(model, guide, x, noise, kind, formula=True).sum()
    assert torch.allclose(loss, expected, rtol=0, atol=1e-10)
    assert close(gradients(loss, model, guide), gradients(expected, model, guide))
    assert not torch.allclose(loss, -elbo_by_hand(model, guide, x, noise, kind).sum(), atol=1e-3)


@each
def test_a_step_of_stock_svi(kind):
    model, guide, x = build(kind)
    before = {f"{i}.{k}": v.detach().clone() for i, m in enumerate((model, guide)) for k, v in m.named_parameters()}
    with isolated_rng(7):
        exact = gradients(-elbo_by_hand(model, guide, x, noise_of(x, 3, 2), kind).sum(), model, guide)
    with isolated_rng(7):
        SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO()).step(x)
    after = {f"{i}.{k}": v for i, m in enumerate((model, guide)) for k, v in m.named_parameters()}
    assert close(after, {k: before[k] - 0.01 * exact[k] for k in before}, 1e-12)
    names = list(pyro.get_param_store())
    assert len(names) == len(after)  # each once, the model's under its own name
    assert {name.split("$$$")[0] for name in names} == {f"{model._pyro_name}.decoder", f"{guide._pyro_name}.encoder"}


@each
def test_a_step_of_own_params_keeps_the_store_empty(kind):
    model, guide, x = build(kind)
    owned = own_params(guide)
    own_params(model)(x)
    owned(x)
    assert {id(leaf) for leaf in owned.leaves.values()} == {id(p) for p in guide.parameters()}
    assert list(pyro.get_param_store()) == []


@each
def test_sites_plates_and_particles(kind):
    model, guide, x = build(kind)
    index = torch.tensor([4, 0, 2])
    with poutine.block():
        for program in (model, guide):
            full, part = (
                poutine.trace(program).get_trace(*args, **kwargs)
                for args, kwargs in (((x,), {}), ((x[index],), {"index": index, "num_data": 10}))
            )
            for name in model.latents:
                assert tuple(full.nodes[name]["value"].shape) == (5, 2)
                assert [(f.name, f.dim, f.size) for f in full.nodes[name]["cond_indep_stack"]] == [("data", -1, 5)]
                assert float(part.nodes[name]["scale"]) == pytest.approx(10 / 3)
        assert set(full.stochastic_nodes) <= {*model.latents, "data"}
    for vectorized in (False, True):
        loss = Trace_ELBO(num_particles=7, vectorize_particles=vectorized, max_plate_nesting=1)
        assert math.isfinite(loss.loss(model, guide, x))
    drawn = Predictive(model, num_samples=6, parallel=True)(batch_size=3)
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {"x": (6, 3, 16), **{f"z_{t}": (6, 3, 2) for t in (1, 2, 3)}}
    drawn = Predictive(model, guide=guide, num_samples=6, parallel=True)(x)
    assert tuple(drawn["z_2"].shape) == (6, 5, 2)
    again = guide(observations={"x": x})
    assert set(again) == set(model.latents)


@each
def test_vectorized_particles_are_the_same_bound(kind):
    """Each of many particles at once is what the by-hand bound gives for its own noise."""
    model, guide, x = build(kind)
    with isolated_rng(7):
        loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1).differentiable_loss(model, guide, x)
    with isolated_rng(7):
        noise = torch.stack([torch.randn(4, *x.shape[:1], 2) for _ in range(3)], 1)
    by_hand = torch.stack([elbo_by_hand(model, guide, x, particle, kind).sum() for particle in noise])
    assert by_hand.std() > 1e-3
    assert torch.allclose(loss, -by_hand.mean(), rtol=0, atol=1e-10)


@each
def test_step_by_step_is_decode(kind):
    model, _, x = build(kind)
    latents = noise_of(x, 3, 2)
    state = model.decoder.start()
    for z in latents:
        state = model.decoder.step(state, z)
    assert torch.allclose(state.canvas, model.decoder.decode(latents), rtol=0, atol=1e-12)
    assert not torch.allclose(state.canvas, model.decoder.decode(latents[:2]), atol=1e-3)


def test_importance_sampling_agrees_with_quadrature():
    model, guide, x = build(steps=2, visible=4, latent=1, hidden=3, rows=3)
    line = torch.linspace(-9, 9, 721)
    step = float(line[1] - line[0])
    grid = torch.cartesian_prod(line, line)
    evidence = torch.stack(
        [
            torch.logsumexp(
                log_joint_by_hand(leaves_of(model.decoder), grid.split(1, -1), row.expand(len(grid), 4), "plain"), 0
            )
            for row in x
        ]
    ) + 2 * math.log(step)
    n = 40_000
    with torch.no_grad(), poutine.block():
        guided = poutine.trace(guide).get_trace(x.repeat(n, 1))
        scored = poutine.trace(poutine.replay(model, guided)).get_trace(x.repeat(n, 1))
    guided.compute_log_prob()
    scored.compute_log_prob()
    weights = sum(scored.nodes[k]["log_prob"] - (guided.nodes[k]["log_prob"] if k != "x" else 0) for k in ("z_1", "z_2", "x"))
    ratio = (weights.view(n, 3) - evidence).exp().detach()
    assert stats.means_agree(ratio, torch.ones(3))
    assert not stats.means_agree(ratio * 1.1, torch.ones(3))


@each
def test_training_raises_the_bound(kind):
    """From below what independent pixels reach, 16 times the entropy of 1/4, to far above it; the best is −log 4."""
    model = DRAW(16, 2, 16, 2, attention=KINDS[kind] and (4, 4))
    guide = DRAWGuide(model, hidden=16)
    x = torch.eye(4).view(4, 2, 1, 2, 1).expand(4, 2, 2, 2, 2).reshape(4, 16).repeat(8, 1)  # one quadrant of each is bright
    independent = 16 * (0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    elbo = Trace_ELBO()

    def bound():
        return -sum(elbo.loss(model, guide, x) for _ in range(20)) / 20 / len(x)

    model.initialize_bias(x)
    assert bound() < independent
    parameters = [*model.parameters(), *guide.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for step in range(180):
        model.beta.fill_(0.1 if step < 100 else 1.0)
        optimizer.zero_grad()
        (elbo.differentiable_loss(model, guide, x) / len(x)).backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
    assert independent + 2 < bound() < -math.log(4)


def test_variational_learns_both():
    model, guide, x = build()
    before = {k: v.clone() for k, v in [*model.named_parameters(), *guide.named_parameters()]}
    Variational(guide, num_steps=3).fit(model, x)
    assert not [k for k, v in [*model.named_parameters(), *guide.named_parameters()] if torch.equal(v, before[k])]
    assert list(pyro.get_param_store()) == []


@each
def test_copies(kind):
    model, guide, x = build(kind)
    other, other_guide = copy.deepcopy((model, guide))
    assert other_guide._model[0] is other
    assert other._pyro_name != model._pyro_name
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    with isolated_rng(7):
        a = Trace_ELBO().loss(model, guide, x)
    with isolated_rng(7):
        b = Trace_ELBO().loss(other, other_guide, x)
    assert abs(a - b) > 1e-3
    other.load_state_dict(model.state_dict())
    with isolated_rng(7):
        assert Trace_ELBO().loss(other, other_guide, x) == a


@each
def test_config(kind):
    model, guide, x = build(kind, beta=0.5, likelihood="cross_entropy")
    assert model.normalized is False
    other = DRAW(**json.loads(json.dumps(model.config)))
    other.load_state_dict(model.state_dict())
    other_guide = DRAWGuide(other, **guide.config)
    other_guide.load_state_dict(guide.state_dict())
    with isolated_rng(7):
        a = Trace_ELBO().loss(model, guide, x * 0.3)
    with isolated_rng(7):
        assert Trace_ELBO().loss(other, other_guide, x * 0.3) == a


def test_beta_weighs_both_programs():
    model, guide, x = build()
    with isolated_rng(7):
        latents = poutine.trace(guide).get_trace(x)

    def loss():
        with isolated_rng(7):
            return Trace_ELBO().loss(model, guide, x)

    terms = {}
    for name, program in (("p", poutine.replay(model, latents)), ("q", poutine.replay(guide, latents))):
        trace = poutine.trace(program).get_trace(x)
        trace.compute_log_prob()
        terms[name] = float(sum(trace.nodes[k]["log_prob_sum"].detach() for k in model.latents))
        if name == "p":
            pixels = float(trace.nodes["x"]["log_prob_sum"].detach())
    for beta in (1.0, 3.0, 0.0):
        model.beta.fill_(beta)
        assert loss() == pytest.approx(-(pixels + beta * (terms["p"] - terms["q"])), abs=1e-9)
    assert abs(terms["p"] - terms["q"]) > 1e-3


@each
def test_sample_and_bias(kind):
    model, _, x = build(kind)
    drawn = model.sample(9)
    assert tuple(drawn.shape) == (9, 16)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    means = model.sample(9, mean=True)
    assert 0 < means.min() < means.max() < 1
    with torch.no_grad():
        model.decoder.write.weight.zero_()
        if kind == "attention":
            model.decoder.write.bias.zero_()
    model.initialize_bias(x)
    assert torch.allclose(model.sample(4, mean=True), ((x.sum(0) + 1) / (len(x) + 2)).expand(4, -1))
    with pytest.raises(ValueError, match=r"expected data \[n, 16\]"):
        model.initialize_bias(x[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each
def test_types(kind, dtype):
    model, guide, x = build(kind)
    model, guide = model.to(dtype), guide.to(dtype)
    values = guide(x.to(dtype))
    assert {v.dtype for v in values.values()} == {dtype}
    assert model(x.to(dtype)).dtype == dtype
    assert DRAWGuide(model).encoder.hidden.dtype == dtype


def test_short_products_leave_sums_in_full():
    """Under autocast the states, latents and pixels stay float32, and the bound stays near."""
    model, guide, x = build(scale=0.2)
    model, guide, x = model.float(), guide.float(), x.float()
    with isolated_rng(7):
        exact = Trace_ELBO().loss(model, guide, x)
    with isolated_rng(7), torch.autocast("cpu", torch.bfloat16):
        trace = poutine.trace(guide).get_trace(x)
        loss = Trace_ELBO().differentiable_loss(model, guide, x)
    assert {trace.nodes[k]["value"].dtype for k in model.latents} == {torch.float32}
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) / exact - 1) < 2**-8  # one rounding of that type


BAD = {
    "no square": (lambda: DRAW(15, attention=(2, 2)), "expected a square number of pixels"),
    "one window": (lambda: DRAW(16, attention=(2,)), "expected attention=None or"),
    "no window": (lambda: DRAW(16, attention=(2, 0)), "expected the N of write to be an integer >= 1"),
    "steps": (lambda: DRAW(16, steps=0), "expected steps to be an integer >= 1"),
    "likelihood": (lambda: DRAW(16, likelihood="normal"), "expected likelihood to be one of"),
    "beta": (lambda: DRAW(16, beta=-1.0), "expected a finite beta >= 0"),
    "grey": (lambda: DRAW(16, 2, 3, 2)(torch.full((2, 16), 0.3)), "expected pixels in {0, 1}"),
    "width": (lambda: DRAW(16, 2, 3, 2)(torch.zeros(2, 15)), "expected data"),
    "another model": (lambda: DRAWGuide(nn.Linear(2, 2)), "expected a pyrovae.models.DRAW"),
    "hidden": (lambda: DRAWGuide(DRAW(16, 2, 3, 2), hidden=0), "expected hidden >= 1"),
    "no data": (lambda: DRAWGuide(DRAW(16, 2, 3, 2))(), "expected data x"),
    "guide's width": (lambda: DRAWGuide(DRAW(16, 2, 3, 2))(torch.zeros(2, 15)), "expected data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        call()
