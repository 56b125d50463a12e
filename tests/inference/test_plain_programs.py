"""Plain Pyro programs with masks, scales, sibling plates and deterministic sites, put to every method."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Exact, ExactLikelihood, Gibbs, Importance, MeanField, Variational
from pyrovae.models import toy

X = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)


def bits(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def prior_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.3)))


def evidence(x):
    """log p(x) of `bits`, row by row, in closed form."""
    lit = dist.Bernoulli(torch.tensor(0.3))
    joint = [lit.log_prob(torch.tensor(z)) + dist.Normal(z, 1.0).log_prob(x) for z in (0.0, 1.0)]
    return torch.logsumexp(torch.stack(joint), 0)


def within(posterior, exact):
    """Whether the evidence lies within the bound on |z| at a false-alarm rate of 1e-5."""
    z = (posterior.log_evidence - exact).abs() / torch.as_tensor(posterior.stderr)
    return bool((z < 4.9).all())


@pytest.mark.parametrize("method", [Exact(), MeanField(), Importance(prior_guide, 4000)])
def test_a_deterministic_site_outside_the_plate_leaves_the_batch(method):
    def program(x):
        pyro.deterministic("width", torch.tensor(1.0))
        bits(x)

    posterior = method.infer(program, X)
    assert posterior.log_evidence.shape == (3,)
    if isinstance(posterior.stderr, torch.Tensor):
        assert within(posterior, evidence(X))
    else:
        assert torch.allclose(posterior.log_evidence, evidence(X), atol=1e-9)


def test_a_factor_outside_the_plate_is_one_evidence_for_all():
    def program(x):
        pyro.factor("known", torch.tensor(1.5))
        bits(x)

    assert torch.allclose(Exact().infer(program, X).log_evidence, evidence(X).sum() + 1.5)


def test_a_latent_that_model_and_guide_mask_counts_in_neither():
    def program(x):
        with poutine.mask(mask=False):
            pyro.sample("mu", dist.Normal(0.0, 0.01))
        bits(x)

    def guide(x):
        with poutine.mask(mask=False):
            pyro.sample("mu", dist.Normal(5.0, 3.0))
        prior_guide(x)

    def unmasked(x):
        pyro.sample("mu", dist.Normal(0.0, 0.01))
        prior_guide(x)

    exact = evidence(X).sum()
    assert within(Importance(guide, 20000).infer(program, X), exact)
    assert within(Importance(unmasked, 20000).infer(program, X), exact)  # masked by one alone: counts in both


def test_a_missing_row_has_evidence_one():
    seen = torch.tensor([True, False, True])

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    guide = AmortizedMeanField(program, example=(X,))
    posterior = Importance(guide, 20000).infer(program, X)
    assert within(posterior, torch.where(seen, evidence(X), 0.0))


def test_plates_beside_each_other_are_summed_by_their_own_sizes():
    def program(x):
        with pyro.plate("others", 5):
            pyro.sample("y", dist.Bernoulli(0.25), obs=torch.tensor(1.0))
        bits(x)

    exact = evidence(X).sum() + 5 * torch.tensor(0.25).log()
    assert within(Importance(prior_guide, 20000).infer(program, X), exact)


def test_gibbs_refuses_latents_in_plates_beside_each_other():
    def program(x):
        with pyro.plate("others", 5):
            pyro.sample("y", dist.Bernoulli(0.25))
        bits(x)

    with pytest.raises(ValueError, match="sibling plates 'others' and 'rows' both along dim -1"):
        Gibbs(10).infer(program, X)


def test_a_scale_for_each_datum_multiplies_its_own_evidence():
    scale = torch.tensor([[1.0], [2.0], [3.0]])

    def program(x):
        with pyro.plate("rows", len(x), dim=-2), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, None])

    assert torch.isclose(ExactLikelihood().loss(program, None, X), -(evidence(X) * scale[:, 0]).sum())


def subsampled(x):
    g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.5)))
    with pyro.plate("rows", 10, subsample=torch.arange(3)):
        pyro.sample("x", dist.Normal(g, 1.0), obs=x)


def unequal(x):
    with pyro.plate("rows", len(x)):
        with poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_guide(x):
    pyro.sample("g", dist.Bernoulli(torch.tensor(0.5)))


@pytest.mark.parametrize("name", ["Exact", "MeanField", "Gibbs", "Gibbs without a table", "Importance"])
@pytest.mark.parametrize(
    ("program", "guide", "sentence"),
    [(subsampled, global_guide, "the whole plate 'rows'"), (unequal, prior_guide, "one poutine.scale for all sites")],
)
def test_what_has_no_posterior_is_refused_by_all(name, program, guide, sentence):
    methods = {
        "Exact": Exact(),
        "MeanField": MeanField(),
        "Gibbs": Gibbs(10),
        "Gibbs without a table": Gibbs(10, max_bytes=0),
        "Importance": Importance(guide, 10),
    }
    with pytest.raises(ValueError, match=sentence):
        methods[name].infer(program, X)


@pytest.mark.parametrize(
    "method", [Exact(), MeanField(), Gibbs(20), Importance(prior_guide, 20), Variational(prior_guide, num_samples=20)]
)
def test_a_posterior_keeps_the_data_that_it_saw(method):
    x = X.clone()
    posterior = method.infer(bits, x)
    before = posterior.expected_log_joint(bits)
    x.add_(9.0)
    assert torch.equal(posterior.expected_log_joint(bits), before)


def test_data_of_a_coarser_type_agree_to_that_type():
    net = toy.belief_net(4, 2)
    x = net.sample(3)
    found = Exact().infer(net, x.float()).log_evidence
    assert torch.allclose(found, Exact().infer(net, x).log_evidence, rtol=1e-6)


def test_bits_as_booleans_are_told_from_numbers():
    with pytest.raises(ValueError, match=r"expected floating x in \{0, 1\}, got torch.bool; pass x.float\(\)"):
        Exact().infer(toy.belief_net(4, 2), torch.ones(2, 4).bool())


def test_f_may_read_states_in_any_way():
    posterior = Exact().infer(bits, X)
    ones = posterior.expectation(lambda s: s["z"] == 1)[0]
    assert torch.allclose(ones, posterior.marginals["z"])
    assert torch.allclose(posterior.expectation(lambda s: s.get("z"))[0], ones)
    assert torch.allclose(posterior.expectation(lambda s: dict(**s)["z"])[0], ones)


def test_mean_field_on_a_long_chain():
    def chain(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z0", dist.Bernoulli(torch.tensor(0.3)))
            for t in range(1, 55):
                z = pyro.sample(f"z{t}", dist.Bernoulli(0.2 + 0.6 * z))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = Exact().infer(chain, X)
    assert (MeanField(1, 3).infer(chain, X).log_evidence <= exact.log_evidence + 1e-9).all()
    assert exact.diagnostics["model_evaluations"] < 1000


def test_a_guide_that_does_not_broadcast_is_run_one_draw_at_a_time():
    def guide(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("first", dist.Bernoulli(torch.full((len(x),), 0.5)))
            pyro.sample("z", dist.Bernoulli(0.3 + 0.4 * z.view(len(x))))

    def program(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("first", dist.Bernoulli(0.5))
        bits(x)

    assert within(Importance(guide, 3000).infer(program, X), evidence(X))


def test_importance_refuses_rows_that_are_mixed():
    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 0.3), obs=x)

    with pytest.raises(ValueError, match="mixes rows of the batch"):
        Importance(prior_guide, 100).infer(program, X)


def test_mean_field_tries_the_states_of_a_global_latent():
    """No start may be caught in a mode of little weight: a factorised q by hand reaches what ascent must reach."""
    weights, scales = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]]), torch.tensor([0.5, 1.5])

    def program(x):
        mode = pyro.sample("mode", dist.Categorical(torch.tensor([0.6, 0.4])))
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(weights[mode]))
            pyro.sample("x", dist.Normal(torch.tensor([-2.0, 0.0, 2.0])[k], scales[mode]), obs=x)

    x = torch.tensor([0.992, 0.4004, 0.0925, 0.932, -0.6779, -0.2492, -2.2842, 0.5725])
    exact, found = Exact().infer(program, x), MeanField().infer(program, x)
    likely = exact.marginals["mode"].argmax()
    # q(mode) certain and q(k) = p(k | x, mode): its bound is log p(x, mode).
    by_hand = exact.log_evidence + exact.marginals["mode"][likely].log()
    assert by_hand - 1e-9 <= found.log_evidence <= exact.log_evidence
