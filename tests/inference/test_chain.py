"""The posterior of a declared chain against the generic enumeration, which lists all paths."""

import dataclasses
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import stats
import torch
from torch import nn

from pyrovae.distributions import MarkovChain
from pyrovae.handlers import Module
from pyrovae.inference import EM, Exact, ExactLikelihood, Gibbs, Variational
from pyrovae.inference.exact.chain import ChainPosterior
from pyrovae.models import HiddenMarkovModel

LENGTHS = torch.tensor([4, 2, 1])
KINDS = ["categorical", "bernoulli", "gaussian", "gaussian, full"]
each = pytest.mark.parametrize("kind", KINDS)


def build(kind="categorical", *, rows=3, length=4, states=3):
    emission, _, covariance = kind.partition(", ")
    model = HiddenMarkovModel(states, 2, emission=emission, length=length, covariance=covariance or "diagonal")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, model.sample(rows)


def both(model, *args):
    fast, slow = Exact().infer(model, *args), Exact(declared=False).infer(model, *args)
    assert isinstance(fast, ChainPosterior)
    assert not isinstance(slow, ChainPosterior)
    return fast, slow


def close(a, b):
    assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-10, atol=1e-10)


@each
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_every_answer_is_that_of_the_enumeration(kind, lengths):
    model, x = build(kind)
    args = (x,) if lengths is None else (x, lengths)
    fast, slow = both(model, *args)
    close(fast.log_evidence, slow.log_evidence)
    close(fast.marginals["z"], slow.marginals["z"])
    close(fast.entropy, slow.entropy)
    close(fast.mean["z"], slow.mean["z"])
    close(fast.variance["z"], slow.variance["z"])
    assert torch.equal(fast.mode["z"], slow.mode["z"])
    for f in (lambda z: z["z"][..., 0] * z["z"][..., 1] + 0.5, lambda z: torch.stack([z["z"], 2.0 * z["z"]], -1)):
        close(fast.expectation(f)[0], slow.expectation(f)[0])
        assert float(fast.expectation(f)[1].abs().max()) == 0
    z = fast.sample(5)
    close(fast.log_prob(z), slow.log_prob(z))
    assert float(fast.log_prob({"z": z["z"] + 3}).max()) == -torch.inf
    other, _ = build(kind)
    for q in (model, other):
        ours, theirs = fast.expected_log_joint(q), slow.expected_log_joint(q)
        close(ours, theirs)
        for a, b in zip(*(torch.autograd.grad(v.sum(), q.parameters()) for v in (ours, theirs)), strict=True):
            close(a, b)
    # a slightly other model is told apart
    with torch.no_grad():
        model.transition.add_(1e-3 * torch.randn_like(model.transition))
    assert not torch.allclose(Exact().infer(model, *args).log_evidence, slow.log_evidence, rtol=1e-10, atol=1e-10)


@each
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_gradients_of_the_evidence(kind, lengths):
    model, x = build(kind)
    args = (x,) if lengths is None else (x, lengths)
    found = []
    for objective in (ExactLikelihood(), ExactLikelihood(declared=False)):
        loss = objective.differentiable_loss(model, None, *args)
        found.append((loss, torch.autograd.grad(loss, model.parameters())))
    close(found[0][0].detach(), found[1][0].detach())
    for a, b in zip(found[0][1], found[1][1], strict=True):
        close(a, b)


def test_q_is_that_of_the_counts():
    """Over seen times; with no lengths it is the expected log joint, and its maximum is the closed M-step's."""
    model, x = build("bernoulli")
    posterior = Exact().infer(model, x)
    close(posterior.q_function(model)().detach(), posterior.expected_log_joint(model).sum().detach())
    for args in ((x,), (x, LENGTHS)):
        posterior = Exact().infer(model, *args)
        q = posterior.q_function(model)
        model.m_step(posterior, *args)
        gradients = torch.autograd.grad(q(), list(model.parameters()))
        assert max(float(g.abs().max()) for g in gradients) < 1e-9


def test_draws():
    model, x = build()
    fast, slow = both(model, x, LENGTHS)
    paths = torch.cartesian_prod(*[torch.arange(3)] * 4).unsqueeze(1).expand(-1, 3, -1)
    p = slow.log_prob({"z": paths}).exp()
    n = 20000
    counts = torch.zeros(81, 3)
    for row in range(3):
        index = (fast.sample(n)["z"][:, row] * torch.tensor([27, 9, 3, 1])).sum(-1)
        counts[:, row] = torch.bincount(index, minlength=81)
    assert stats.frequencies_agree(counts, n, p)
    assert not stats.frequencies_agree(counts, n, Exact().infer(build()[0], x).log_prob({"z": paths}).exp())
    with pytest.raises(ValueError, match="n > 0"):
        fast.sample(0)


def test_draws_in_parts():
    model, x = build(rows=2)
    posterior = Exact().infer(model, x)
    small = dataclasses.replace(posterior, max_bytes=64 * 2 * 3 * 4)  # four draws at a time
    assert small.sample(10)["z"].shape == (10, 2, 4)
    close(small.expectation(lambda z: z["z"] ** 2)[0], posterior.expectation(lambda z: z["z"] ** 2)[0])


def test_a_snapshot():
    model, x = build()
    posterior, other = Exact().infer(model, x, LENGTHS), Exact().infer(model, x, LENGTHS)
    answers = [
        other.log_evidence, other.marginals["z"], other.entropy, other.mode["z"], other.log_prob({"z": other.mode["z"][None]}),
        other.expected_counts.transition,
    ]  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        x.zero_()
    now = [
        posterior.log_evidence, posterior.marginals["z"], posterior.entropy, posterior.mode["z"],
        posterior.log_prob({"z": posterior.mode["z"][None]}), posterior.expected_counts.transition,
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(answers, now, strict=True))


def test_pyro_has_the_same_evidence():
    model, x = build("gaussian", rows=5, length=30)
    steps = torch.cat((model.initial.expand(3, 3).log_softmax(-1)[None], model.transition.log_softmax(-1).expand(29, 3, 3)))
    emission = dist.Normal(model.emission.loc, model.emission.log_scale.exp()).to_event(1)
    theirs = dist.DiscreteHMM(torch.zeros(3), steps, emission, duration=30).log_prob(x)
    close(Exact().infer(model, x).log_evidence, theirs.detach())


def test_what_is_too_big():
    model, x = build(length=20)
    posterior = Exact().infer(model, x)
    with pytest.raises(ValueError, match=r"3\^20.*sample\(n\)"):
        posterior.expectation(lambda z: z["z"])
    with pytest.raises(ValueError, match="evaluations of"):
        Exact(declared=False).infer(model, x)
    with pytest.raises(ValueError, match=r"max_bytes=1,000.*5,760 bytes"):
        Exact(max_bytes=1000).infer(model, x)


def test_bad_states_and_numbers():
    model, x = build()
    posterior = Exact().infer(model, x)
    with pytest.raises(ValueError, match=r"\[n, 3, 4\]"):
        posterior.log_prob({"z": torch.zeros(2, 3, 5)})
    with pytest.raises(ValueError, match="declares a chain"):
        posterior.expected_log_joint(lambda x: None)
    with torch.no_grad():
        model.emission.logits[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN|logits"):
        Exact().infer(model, x)


def test_impossible_sequences():
    """A symbol that no state emits has probability 0 and no posterior; states and transitions may be impossible."""
    model, _ = build()
    with torch.no_grad():
        model.emission.logits[:, 1] = -torch.inf
        model.transition[0, 1] = -torch.inf
        model.initial[2] = -torch.inf
    x = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]])
    posterior = Exact().infer(model, x)
    assert posterior.log_evidence[1] == -torch.inf
    with pytest.raises(ValueError, match="probability 0 for row 1"):
        posterior.marginals  # noqa: B018
    fast, slow = both(model, x[:1])
    close(fast.log_evidence, slow.log_evidence)
    close(fast.marginals["z"], slow.marginals["z"])
    close(fast.entropy, slow.entropy)
    assert float(fast.marginals["z"][0, 0, 2]) == 0
    EM(num_iterations=3).fit(model, x[:1])
    assert float(model.transition.detach()[0, 1]) == -torch.inf
    assert not any(bool(p.isnan().any()) for p in model.parameters())


def test_wrapped_programs_take_the_generic_route():
    model, x = build()
    wrapped = pyro.poutine.scale(model, scale=2.0)
    assert not isinstance(Exact().infer(wrapped, x), ChainPosterior)


class Twisted(Module):
    """A program of one's own that declares its chain."""

    def __init__(self, wrong=False):
        super().__init__()
        self.loc, self.wrong = nn.Parameter(torch.randn(3)), wrong

    def forward(self, x):
        half = torch.full((3,), 1 / 3)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("path", MarkovChain(half, torch.eye(3) * 0.7 + 0.1, x.shape[1]))
            pyro.sample("x", dist.Normal(self.loc[z], 1.0).to_event(1), obs=x)

    def chain(self, x):
        from pyrovae.ops import Chain

        log_likelihood = dist.Normal(self.loc, 1.0).log_prob(x.unsqueeze(-1))
        name = "other" if self.wrong else "path"
        return Chain(name, torch.full((3,), 1 / 3).log(), (torch.eye(3) * 0.7 + 0.1).log(), log_likelihood)


def test_a_program_of_ones_own():
    x = torch.randn(4, 5)
    model = Twisted()
    fast, slow = both(model, x)
    close(fast.log_evidence, slow.log_evidence)
    fit = EM(num_iterations=10).fit(model, x)  # by L-BFGS on the counts
    losses = [record["loss"] for record in fit.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    assert not isinstance(Exact().infer(Twisted(wrong=True), x), ChainPosterior)


def test_float32():
    model, x = build("gaussian", rows=2, length=50)
    wide = Exact().infer(model, x)
    narrow = Exact().infer(model.float(), x.float())
    assert narrow.log_evidence.dtype == narrow.marginals["z"].dtype == torch.float32
    assert torch.allclose(narrow.log_evidence.double(), wide.log_evidence, rtol=1e-5)
    assert torch.allclose(narrow.marginals["z"].double(), wide.marginals["z"], atol=1e-4)


def test_gradients_and_em_have_one_objective():
    """The log posterior: equal losses, and where EM ends the gradient that learning by gradient takes is 0."""
    model, x = build("gaussian", rows=10, length=15, states=2)
    model = HiddenMarkovModel(2, 2, emission="gaussian", concentration=2.0, prior_count=3.0, prior_variance=0.5)
    model.initialize(x)
    steps = []
    for iterations in (2, 500):
        loss = EM(num_iterations=iterations).fit(model, x, LENGTHS.repeat(4)[:10] + 10).history[-1]["loss"]
        before = [p.detach().clone() for p in model.parameters()]
        method = Variational(None, ExactLikelihood(), optim=partial(torch.optim.SGD, lr=1e-8), num_steps=1)
        assert method.fit(model, x, LENGTHS.repeat(4)[:10] + 10).history[-1]["loss"] == pytest.approx(loss, rel=1e-12)
        steps.append(max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), before, strict=True)))
    assert steps[0] > 1e-10
    assert steps[1] < 1e-13  # a gradient below 1e-5


def test_monte_carlo_em():
    model, x = build("bernoulli", rows=10, length=3, states=2)
    before = float(Exact().infer(model, x).log_evidence.sum())
    EM(Gibbs(50, 4, 20), num_iterations=5).fit(model, x, lengths=torch.full((10,), 3))
    assert float(Exact().infer(model, x).log_evidence.sum()) > before
