"""The autoencoders' log joints by hand, their evidence by enumeration and in closed form, and the weight of the KL."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import nn

from pyrovae.guides import AmortizedMeanField, AmortizedStructured
from pyrovae.inference import Exact
from pyrovae.models import BernoulliVAE, CategoricalVAE, GaussianVAE, HierarchicalVAE, MixedVAE, toy


def enlarged(model):
    """Weights of order one, so that a mistake in any of them shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1)
    return model


def by_hand(net, value):
    """A tanh perceptron."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        value = (value @ layer.weight.T + layer.bias).tanh()
    return value @ layers[-1].weight.T + layers[-1].bias


def bernoulli(x, logits):
    p = 1 / (1 + (-logits).exp())
    return (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)


def normal(x, loc, scale):
    return (-0.5 * ((x - loc) / scale) ** 2 - torch.as_tensor(scale).log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def log_joint(model, x, **values):
    t = poutine.trace(poutine.condition(model, data=values)).get_trace(x)
    t.compute_log_prob()
    return sum(t.nodes[name]["log_prob"] for name in [*values, "x"])


def one_hots(n, k):
    codes = torch.tensor(list(itertools.product(range(k), repeat=n)))
    return nn.functional.one_hot(codes, k).to(torch.get_default_dtype())


def bits(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


X = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)


def test_gaussian_by_hand():
    z = torch.randn(3, 2)
    model = enlarged(GaussianVAE(4, 2, (5, 3), activation="Tanh"))
    assert [layer.out_features for layer in model.decoder if isinstance(layer, nn.Linear)] == [3, 5, 4]
    prior = normal(z, 0.0, 1.0)
    assert torch.allclose(log_joint(model, X, z=z), prior + bernoulli(X, by_hand(model.decoder, z)))
    for name in ("normal", "normal_learned"):
        model = enlarged(GaussianVAE(4, 2, (5,), likelihood=name, scale=0.4, activation="Tanh"))
        scale = 0.4 if name == "normal" else (model.likelihood.log_variance / 2).exp()
        assert torch.allclose(log_joint(model, X, z=z), prior + normal(X, by_hand(model.decoder, z), scale))
    model = enlarged(GaussianVAE(4, 2, (5,), likelihood="categorical", levels=3, activation="Tanh"))
    logits = by_hand(model.decoder, z).reshape(3, 4, 3).log_softmax(-1)
    level = (2 * X).long()
    picked = sum(logits[:, d][torch.arange(3), level[:, d]] for d in range(4))
    assert torch.allclose(log_joint(model, X, z=z), prior + picked)
    grey = torch.rand(3, 4)
    model = enlarged(GaussianVAE(4, 2, (5,), likelihood="cross_entropy", activation="Tanh"))
    assert torch.allclose(log_joint(model, grey, z=z), prior + bernoulli(grey, by_hand(model.decoder, z)))


def test_discrete_by_hand():
    model = enlarged(CategoricalVAE(4, 2, 3, (5,), activation="Tanh"))
    z = one_hots(2, 3)[[0, 4, 7]]
    assert torch.allclose(log_joint(model, X, z=z), bernoulli(X, by_hand(model.decoder, z.reshape(3, 6))) - 2 * math.log(3))
    model = enlarged(BernoulliVAE(4, 3))
    z = bits(3)[[0, 3, 6]]
    (layer,) = model.decoder
    assert torch.allclose(log_joint(model, X, z=z), bernoulli(X, z @ layer.weight.T + layer.bias) - 3 * math.log(2))


def test_mixed_by_hand():
    model = enlarged(MixedVAE(4, 2, 3, (5,), activation="Tanh"))
    y, z = torch.eye(3), torch.randn(3, 2)
    expected = bernoulli(X, by_hand(model.decoder, torch.cat([y, z], -1))) - math.log(3) + normal(z, 0.0, 1.0)
    assert torch.allclose(log_joint(model, X, y=y, z=z), expected)


def test_hierarchical_by_hand():
    layers = [("normal", 2), ("categorical", (2, 3)), ("bernoulli", 3), ("normal", 2)]
    model = enlarged(HierarchicalVAE(4, layers, (5,), between=(4,), activation="Tanh"))
    h4, h3, h2, h1 = torch.randn(3, 2), bits(3)[[1, 2, 7]], one_hots(2, 3)[[0, 5, 8]], torch.randn(3, 2)
    expected = normal(h4, 0.0, 1.0) + bernoulli(h3, by_hand(model.nets[2], h4))
    expected = expected + (h2 * by_hand(model.nets[1], h3).reshape(3, 2, 3).log_softmax(-1)).sum((-1, -2))
    loc, log_scale = by_hand(model.nets[0], h2.reshape(3, 6)).split(2, -1)
    expected = expected + normal(h1, loc, log_scale.exp()) + bernoulli(X, by_hand(model.decoder, h1))
    assert torch.allclose(log_joint(model, X, h1=h1, h2=h2, h3=h3, h4=h4), expected)


@pytest.mark.parametrize(
    ("model", "states"),
    [
        (lambda: CategoricalVAE(4, 2, 3, (5,), activation="Tanh"), lambda: {"z": one_hots(2, 3)}),
        (lambda: CategoricalVAE(4, 1, 4, (), likelihood="normal"), lambda: {"z": one_hots(1, 4)}),
        (lambda: CategoricalVAE(4, 2, 2, (), likelihood="categorical", levels=3), lambda: {"z": one_hots(2, 2)}),
        (lambda: BernoulliVAE(4, 3), lambda: {"z": bits(3)}),
        (
            lambda: HierarchicalVAE(4, [("categorical", (1, 3)), ("bernoulli", 2)], (5,), activation="Tanh"),
            lambda: {"h2": bits(2).repeat_interleave(3, 0), "h1": one_hots(1, 3).repeat(4, 1, 1)},
        ),
    ],
)
def test_evidence_by_enumeration(model, states):
    model = enlarged(model())
    table = states()
    rows = []
    for x in X:
        n = len(next(iter(table.values())))
        rows.append(log_joint(model, x.expand(n, 4), **table).logsumexp(0))
    solution = Exact().infer(model, X)
    assert torch.allclose(solution.log_evidence, torch.stack(rows))
    with torch.no_grad():
        model.decoder[-1].bias[0] += 0.1
    assert not torch.allclose(Exact().infer(model, X).log_evidence, torch.stack(rows))
    with torch.no_grad():
        model.beta.fill_(0.5)
    with pytest.raises(ValueError, match="expected one poutine"):  # a weighted KL has no evidence
        Exact().infer(model, X)


@pytest.mark.parametrize("likelihood", ["normal", "normal_learned"])
def test_a_linear_gaussian_vae_is_probabilistic_pca(likelihood):
    model = GaussianVAE(4, 2, (), likelihood=likelihood, scale=0.5)
    twin = toy.LinearGaussian(4, 2, scale=0.5)
    with torch.no_grad():
        twin.weight.copy_(model.decoder[0].weight.T)
        twin.bias.copy_(model.decoder[0].bias)
    z = torch.randn(3, 2)
    mean, covariance = twin.posterior(X)
    q = torch.distributions.MultivariateNormal(mean, covariance).log_prob(z)
    assert torch.allclose(log_joint(model, X, z=z) - q, twin.log_evidence(X))
    assert not torch.allclose(log_joint(model, X, z=z + 0.1) - q, twin.log_evidence(X))


def test_a_class_can_be_summed_over():
    model = enlarged(MixedVAE(4, 2, 3, (5,), activation="Tanh"))
    z = torch.randn(3, 2)

    def guide(x):
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Delta(z).to_event(1))

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(model), guide, X)
    by_class = [log_joint(model, X, y=row.expand(3, 3), z=z) for row in torch.eye(3)]
    assert loss == pytest.approx(-torch.stack(by_class).logsumexp(0).sum().item())


LITERATURE = {
    # likelihood, scale, loss(outputs, x, kl per image, weight), beta of the weight for 4 pixels and 3 images
    "squared, mean of pixels": ("normal", 0.7, lambda o, x, kl, w: (x - o).square().mean() + w * kl.mean(), 4 / (2 * 0.49)),
    "squared, sum of pixels": (
        "normal",
        0.7,
        lambda o, x, kl, w: (x - o).square().sum(-1).mean() + w * kl.mean(),
        1 / (2 * 0.49),
    ),
    "entropy, mean of pixels": (
        "cross_entropy",
        1.0,
        lambda o, x, kl, w: nn.functional.binary_cross_entropy_with_logits(o, x) + w * kl.mean(),
        4.0,
    ),
    "entropy, sum of pixels": (
        "bernoulli",
        1.0,
        lambda o, x, kl, w: (
            nn.functional.binary_cross_entropy_with_logits(o, x, reduction="none").sum(-1).mean() + w * kl.mean()
        ),
        1.0,
    ),
    "entropy, sum of all": (
        "bernoulli",
        1.0,
        lambda o, x, kl, w: nn.functional.binary_cross_entropy_with_logits(o, x, reduction="sum") + w * kl.mean(),
        1 / 3,
    ),
}


@pytest.mark.parametrize("name", LITERATURE)
def test_the_equivalent_beta_of_a_weight_in_the_literature(name):
    likelihood, scale, loss, factor = LITERATURE[name]
    weight = 0.3
    model = enlarged(GaussianVAE(4, 2, (5,), likelihood=likelihood, scale=scale, activation="Tanh"))
    guide = AmortizedMeanField(model)
    leaves = [*model.parameters(), *guide.parameters()]

    def ours(beta):
        with torch.no_grad():
            model.beta.fill_(beta)
        torch.manual_seed(3)
        return torch.autograd.grad(TraceMeanField_ELBO().differentiable_loss(model, guide, X), leaves)

    def theirs():
        torch.manual_seed(3)
        z = guide(X)["z"]
        loc, log_scale = guide.encoder(X).chunk(2, -1)
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 2 * log_scale - 1).sum(-1)
        return torch.autograd.grad(loss(model.decoder(z), X, kl, weight), leaves)

    def cosine(a, b):
        a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (a, b))
        return float(a @ b / (a.norm() * b.norm()))

    assert cosine(ours(weight * factor), theirs()) == pytest.approx(1, abs=1e-12)
    assert cosine(ours(weight * factor * 1.5), theirs()) < 1 - 1e-6


def test_a_larger_beta_is_a_looser_bound():
    model = enlarged(CategoricalVAE(4, 2, 3, (5,), activation="Tanh"))
    guide = AmortizedMeanField(model, nn.Linear(4, 6))
    evidence = Exact().infer(model, X).log_evidence
    q = guide.encoder(X).reshape(3, 2, 3).log_softmax(-1)
    z = one_hots(2, 3)
    log_q = torch.einsum("snk,bnk->sb", z, q)
    log_p = torch.stack([log_joint(model, X, z=row.expand(3, 2, 3)) for row in z])
    expected = {}
    for beta in (0.0, 1.0, 4.0):
        with torch.no_grad():
            model.beta.fill_(beta)
        prior = -2 * math.log(3)
        expected[beta] = (log_q.exp() * (log_p - prior + beta * (prior - log_q))).sum(0)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        loss = elbo.loss(model, config_enumerate(guide_by_components(guide)), X)
        assert loss == pytest.approx(-expected[beta].sum().item())
    assert bool((expected[4.0] < expected[1.0]).all())
    assert bool((expected[1.0] <= evidence).all())
    assert bool((expected[0.0] > expected[1.0]).all())


def guide_by_components(guide):
    """The same q, its components as one categorical site that can be enumerated, then written as the model's one-hot z."""

    def program(x):
        q = guide.encoder(x).reshape(3, 2, 3).log_softmax(-1)
        joint = torch.einsum("snk,bnk->bs", one_hots(2, 3), q)
        (model,) = guide._model
        with pyro.plate("data", 3, dim=-1), poutine.scale(scale=model.beta.clamp_min(1e-300)):
            code = pyro.sample("code", dist.Categorical(logits=joint), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(one_hots(2, 3)[code]).to_event(2))

    return program


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_beta_in_a_structured_guide(beta):
    model = enlarged(HierarchicalVAE(4, [("normal", 2), ("bernoulli", 3)], (5,)))
    guide = AmortizedStructured(model)
    t = poutine.trace(guide).get_trace(X)
    t.compute_log_prob()
    once = {name: t.nodes[name]["log_prob"] for name in ("h1", "h2")}
    with torch.no_grad():
        model.beta.fill_(beta)
    again = poutine.trace(poutine.replay(guide, trace=t)).get_trace(X)
    again.compute_log_prob()
    for name, log_prob in once.items():
        assert torch.allclose(again.nodes[name]["log_prob"], beta * log_prob)
        assert bool((log_prob != 0).all())


def test_the_learned_scale_is_trained_by_stock_svi():
    model = GaussianVAE(4, 2, (5,), likelihood="normal_learned", scale=2.0)
    guide = AmortizedMeanField(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(12):
        svi.step(X)
    assert model.likelihood.log_variance.item() < 2 * math.log(2.0) - 0.5


def test_defaults_are_those_of_the_literature():
    def sizes(net):
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        return [linear[0].in_features] + [layer.out_features for layer in linear]

    model = CategoricalVAE()
    assert sizes(model.mirror()) == [784, 512, 256, 300]
    assert sizes(model.decoder) == [300, 256, 512, 784]
    assert any(isinstance(layer, nn.ReLU) for layer in model.decoder)
    model = BernoulliVAE()
    assert sizes(model.mirror()) == [784, 200]
    assert sizes(model.decoder) == [200, 784]
    assert sizes(GaussianVAE().mirror()) == [784, 400, 40]


def test_encoders_subtract_the_average_image():
    model = CategoricalVAE(4, 2, 3, (5,))
    before = model.mirror()
    assert torch.equal(before[1:](X), before(X))
    model.initialize_bias(X)
    after = model.mirror()
    assert torch.allclose(after(X), after[1:](X - X.mean(0)))
    assert not torch.allclose(after(X), after[1:](X))
    assert torch.equal(before[1:](X), before(X))  # made earlier: as it was


class Doubling(nn.Module):
    def forward(self, value):
        return 2 * value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianVAE(0), "visible"),
        (lambda: GaussianVAE(4, 0), "latent"),
        (lambda: GaussianVAE(4, 2, (3, -1)), "hidden size"),
        (lambda: GaussianVAE(4, 2, likelihood="poisson"), "likelihood to be one of"),
        (lambda: GaussianVAE(4, 2, beta=-1.0), "beta"),
        (lambda: GaussianVAE(4, 2, beta=math.nan), "beta"),
        (lambda: GaussianVAE(4, 2, activation="Rectifier"), "activation of torch.nn"),
        (lambda: GaussianVAE(4, 2, activation=Doubling).config, "to write down"),
        (lambda: CategoricalVAE(4, 2, 1), "categories"),
        (lambda: CategoricalVAE(4, 0, 3), "latents"),
        (lambda: MixedVAE(4, 2, 1), "categories"),
        (lambda: HierarchicalVAE(4, []), "at least one layer"),
        (lambda: HierarchicalVAE(4, [("gaussian", 3)]), "expected a layer"),
        (lambda: HierarchicalVAE(4, [("categorical", 3)]), "expected a layer"),
        (lambda: HierarchicalVAE(4, [("categorical", (3, 1))]), ">= 2"),
        (lambda: HierarchicalVAE(4, [("normal", (3, 2))]), "expected a layer"),
        (lambda: HierarchicalVAE(4, ["normal"]), "expected a layer"),
        (lambda: HierarchicalVAE(4, [("normal", 0)]), ">= 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
