"""Draws from probabilities computed once, and distributions narrowed to one particle."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from stats import frequencies_agree
from torch.distributions import kl_divergence

from pyrovae.inference.narrow import NarrowDraws, narrow

K, N = 4000, 3
PROBS = torch.tensor(
    [[[0.1, 0.6, 0.3], [0.0, 1.0, 0.0]], [[0.5, 0.0, 0.5], [0.2, 0.8, 0.0]], [[0.0, 0.4, 0.6], [0.3, 0.3, 0.4]]]
)


def many(make, shape):
    def program():
        with pyro.plate("particles", K, dim=-2), pyro.plate("rows", N):
            return pyro.sample("z", make().to_event(shape))

    return program


FAMILIES = {
    "one-hot": (lambda p: dist.OneHotCategorical(p), 1, lambda z: z),
    "one-hot by logits": (lambda p: dist.OneHotCategorical(logits=(p + 1e-300).log()), 1, lambda z: z),
    "categorical": (lambda p: dist.Categorical(p), 1, lambda z: torch.nn.functional.one_hot(z, 3)),
    "bits": (lambda p: dist.Bernoulli(p), 2, lambda z: z),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("varies", [False, True])
def test_draws_have_the_distributions_of_the_program(family, varies):
    make, events, codes = FAMILIES[family]
    probs = PROBS.to(torch.get_default_dtype())
    wide = probs.expand(K, *probs.shape).clone() if varies else probs
    program = many(lambda: make(wide), events)
    drawn, plain = NarrowDraws(program)(), program()
    assert drawn.shape == plain.shape
    assert drawn.dtype == plain.dtype
    counts = codes(drawn).sum(0)
    assert frequencies_agree(counts, K, probs)
    assert not frequencies_agree(counts, K, probs.flip(0))
    trace = poutine.trace(NarrowDraws(program)).get_trace()
    trace.compute_log_prob()
    if family != "one-hot by logits":
        assert bool(torch.isfinite(trace.nodes["z"]["log_prob"]).all())  # nothing impossible


def test_values_set_from_outside_stay():
    program = many(lambda: dist.OneHotCategorical(PROBS.to(torch.get_default_dtype())), 1)
    z = program()
    assert NarrowDraws(poutine.condition(program, data={"z": z}))() is z


def test_narrowed_divergences():
    p, q = torch.rand(N, 2), torch.rand(N, 2)
    for a, b in (
        (dist.Bernoulli(p), dist.Bernoulli(logits=q)),
        (dist.Normal(p, 1 + q), dist.Normal(q, 1.0 + p)),
        (dist.OneHotCategorical(p), dist.OneHotCategorical(logits=q)),
    ):
        wide = tuple(fn.expand((K, *fn.batch_shape)) for fn in (a, b))
        assert [fn.batch_shape[0] for fn in narrow(*wide)] == [1, 1]
        assert torch.allclose(kl_divergence(*narrow(*wide))[0], kl_divergence(a, b))
        varying = type(a)(torch.rand(K, *p.shape)) if not isinstance(a, dist.Normal) else dist.Normal(torch.rand(K, N, 2), 1.0)
        assert narrow(varying, wide[1])[0] is varying
