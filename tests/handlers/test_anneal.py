"""scale_kl against reconstruction and KL computed apart."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import relax, scale_kl
from pyrovae.models import GaussianVAE, SigmoidBeliefNet


class Pair:
    """A Normal and a relaxed latent in a subsampled plate, with a mask and an auxiliary site left alone."""

    def __init__(self):
        self.x, self.loc = torch.randn(5, 2), torch.randn(5, 2)

    def model(self):
        with pyro.plate("rows", 5, subsample=torch.tensor([0, 3])) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z, event_dim=1)
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=self.x[rows])

    def guide(self):
        with pyro.plate("rows", 5, subsample=torch.tensor([0, 3])) as rows:
            pyro.sample("z", dist.Normal(self.loc[rows], 0.7).to_event(1))

    def parts(self):
        """Reconstruction and KL (sampled, analytic), rows scaled by 5/2."""
        rows = torch.tensor([0, 3])
        q, p = dist.Normal(self.loc[rows], 0.7), dist.Normal(torch.zeros(2), 1.0)
        z = q.rsample()
        recon = dist.Normal(z, 0.5).log_prob(self.x[rows]).sum()
        analytic = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(2, 2), 1.0)).sum()
        return 2.5 * recon, {Trace_ELBO: 2.5 * (q.log_prob(z) - p.log_prob(z)).sum(), TraceMeanField_ELBO: 2.5 * analytic}


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_loss_is_reconstruction_plus_beta_kl(objective):
    """With beta changed in place between runs; the model or the guide alone is not enough."""
    pair, beta = Pair(), torch.tensor(1.0)
    p, q = scale_kl(pair.model, beta), scale_kl(pair.guide, beta)
    for value in (0.0, 0.3, 1.0, 4.0):
        beta.fill_(value)
        torch.manual_seed(1)
        loss = objective().loss(p, q)
        torch.manual_seed(1)
        recon, kl = pair.parts()
        expected = float(-recon + value * kl[objective])
        assert loss == pytest.approx(expected, rel=1e-12)
        torch.manual_seed(1)
        alone = objective().loss(pair.model, q)
        if objective is Trace_ELBO:
            assert (alone == pytest.approx(expected, rel=1e-6)) is (value == 1.0)


def test_one_is_no_change():
    pair = Pair()
    torch.manual_seed(1)
    plain = Trace_ELBO().loss(pair.model, pair.guide)
    for one in (1, 1.0, torch.tensor(1.0)):
        torch.manual_seed(1)
        assert Trace_ELBO().loss(scale_kl(pair.model, one), scale_kl(pair.guide, one)) == plain


def test_only_latents_are_scaled():
    trace = poutine.trace(scale_kl(Pair().model, 0.25)).get_trace()
    scales = {name: float(s["scale"]) for name, s in trace.nodes.items() if s["type"] == "sample"}
    assert scales.pop("z") == 2.5 * 0.25
    assert set(scales.values()) <= {2.5, 1.0}


def test_it_goes_with_relax_and_particles():
    """In either order, with vectorised particles; gradients reach model and guide."""
    net = SigmoidBeliefNet(4, [3, 2])
    guide, x, beta = AmortizedMeanField(net), net.sample(6), torch.tensor(0.5)
    losses = []
    orders = (lambda p: scale_kl(relax(p, 0.5), beta), lambda p: relax(scale_kl(p, beta), 0.5))
    for wrap in orders:
        torch.manual_seed(0)
        losses.append(Trace_ELBO(num_particles=3, vectorize_particles=True).loss(wrap(net), wrap(guide), x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for wrap in orders:
        parameters = [*net.parameters(), *guide.parameters()]
        before = [parameter.detach().clone() for parameter in parameters]
        assert math.isfinite(SVI(wrap(net), wrap(guide), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x))
        assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_copies_and_refusals():
    net, beta = SigmoidBeliefNet(3, 2), torch.tensor(0.5)
    p, q = copy.deepcopy((scale_kl(net, beta), scale_kl(AmortizedMeanField(net), beta)))
    assert p.program is not net
    assert p.rule.beta is q.rule.beta
    assert p.temperature is None
    assert float(pickle.loads(pickle.dumps(p)).rule.beta) == 0.5
    for bad in (-0.1, math.nan, math.inf, torch.tensor(-1.0), torch.ones(2)):
        with pytest.raises(ValueError, match="beta"):
            scale_kl(net, bad)


@pytest.mark.parametrize("beta", [0.25, 3.0])
def test_a_guide_of_ones_own_needs_the_models_beta(beta):
    """Unwrapped, the entropy of q keeps the weight 1 under Trace_ELBO, and an analytic KL is not weighed at all."""
    net, x = GaussianVAE(4, 2, (3,), beta=beta), torch.bernoulli(torch.full((3, 4), 0.5))
    loc, scale = torch.randn(3, 2), 0.6

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def loss(guide, objective):
        torch.manual_seed(1)
        return objective().loss(net, guide, x)

    torch.manual_seed(1)
    q, prior = dist.Normal(loc, scale), dist.Normal(0.0, 1.0)
    z = q.rsample()
    error = -net.likelihood(net.decoder(z)).log_prob(x).sum()
    sampled, analytic = (q.log_prob(z) - prior.log_prob(z)).sum(), torch.distributions.kl_divergence(q, prior).sum()
    entropy = -q.log_prob(z).sum()
    wrapped = scale_kl(guide, net.beta)
    for objective, kl in ((Trace_ELBO, sampled), (TraceMeanField_ELBO, analytic)):
        assert loss(wrapped, objective) == pytest.approx(float(error + beta * kl), rel=1e-9)
    assert loss(guide, Trace_ELBO) == pytest.approx(float(error + beta * sampled - (1 - beta) * entropy), rel=1e-9)
    assert loss(guide, TraceMeanField_ELBO) == pytest.approx(float(error + analytic), rel=1e-9)
