"""check_measures: which pairs of sites are scored by the same measure; which programs are as they were written."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrovae.distributions import RelaxedBernoulli, RelaxedOneHotCategorical, SurrogateOneHotCategorical
from pyrovae.guides import AmortizedMeanField
from pyrovae.handlers import check_measures, discretize, relax, surrogate
from pyrovae.handlers.measures import check_bare, check_changes
from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import read_structure
from pyrovae.models import SigmoidBeliefNet

T, ZERO = torch.tensor(0.5), torch.zeros(3)
MASSES = {
    "one-hot": dist.OneHotCategorical(logits=ZERO),
    "straight-through, Pyro's discrete one": dist.OneHotCategoricalStraightThrough(logits=ZERO),
    "straight-through, ours": RelaxedOneHotCategorical(T, logits=ZERO, straight_through=True),
    "surrogate": SurrogateOneHotCategorical(ZERO),
    "bits": dist.Bernoulli(logits=ZERO).to_event(1),
    "bits, ours": RelaxedBernoulli(T, logits=ZERO, straight_through=True).to_event(1),
    "counts": dist.Poisson(torch.ones(3)).to_event(1),
}
DENSITIES = {
    "relaxed": RelaxedOneHotCategorical(T, logits=ZERO),
    "relaxed, Pyro's": dist.RelaxedOneHotCategorical(T, logits=ZERO),
    "bits": RelaxedBernoulli(T, logits=ZERO).to_event(1),
    "bits, masked": RelaxedBernoulli(T, logits=ZERO).mask(torch.tensor([True, False, True])).to_event(1),
    "real": dist.Normal(ZERO, 1.0).to_event(1),
}
QUANTIZED = {
    "one-hot": dist.RelaxedOneHotCategoricalStraightThrough(T, logits=ZERO),
    "bits": dist.RelaxedBernoulliStraightThrough(T, logits=ZERO).to_event(1),
}
POINTS = {"point": dist.Delta(torch.tensor([1.0, 0.0, 0.0]), event_dim=1)}
GROUPS = [MASSES, DENSITIES, QUANTIZED]


def structure(fn):
    return read_structure(lambda: pyro.sample("z", fn), (), {})


@pytest.mark.parametrize("p", range(3))
@pytest.mark.parametrize("q", range(3))
def test_every_pair(p, q):
    for one in GROUPS[p].values():
        for other in GROUPS[q].values():
            if p == q:
                check_measures(structure(one), structure(other))
                continue
            with pytest.raises(ValueError, match="expected one measure for site 'z'") as error:
                check_measures(structure(one), structure(other))
            assert ("straight_through=True" in str(error.value)) is (2 in (p, q))
    for point in POINTS.values():
        check_measures(structure(next(iter(GROUPS[p].values()))), structure(point))


def test_programs():
    net = SigmoidBeliefNet(3, 2)
    guide, x = AmortizedMeanField(net), net.sample(4)

    def read(program):
        return read_structure(program, (x,), {})

    soft, hard = (lambda p: relax(p, 0.5)), (lambda p: relax(p, 0.5, straight_through=True))
    for wrap in (soft, hard, surrogate, lambda p: p):
        check_measures(read(wrap(net)), read(wrap(guide)))
    check_measures(read(net), read(hard(guide)))
    check_measures(read(surrogate(net)), read(guide))
    check_measures(read(net), read(discretize(soft(guide))))
    for p, q in ((net, soft(guide)), (soft(net), guide), (soft(net), hard(guide)), (hard(net), soft(guide))):
        with pytest.raises(ValueError, match="'h1'"):
            check_measures(read(p), read(q))


def test_sites_of_one_side_are_left_to_others():
    check_measures(structure(MASSES["one-hot"]), read_structure(lambda: pyro.sample("y", DENSITIES["real"]), (), {}))


def test_wrapped_programs_are_told_from_bare_ones():
    net = SigmoidBeliefNet(3, 2)
    x = net.sample(4)
    bare = [net, AmortizedMeanField(net)]
    for program in bare:
        check_bare(read_structure(program, (x,), {}), "temperature")
    soft, hard, carried = relax(net, 0.5), relax(net, 0.5, straight_through=True), surrogate(net)
    for wrapped, word in ((soft, "already relaxed"), (hard, "already relaxed"), (carried, "already with a surrogate")):
        for program in (wrapped, AmortizedMeanField(wrapped)):
            with pytest.raises(ValueError, match=f"written for temperature=.*'h1' {word}.*leave temperature out"):
                check_bare(read_structure(program, (x,), {}), "temperature")
    for fn in [*MASSES.values(), *DENSITIES.values(), *QUANTIZED.values()]:
        if any(word in type(innermost(fn)).__name__ for word in ("Relaxed", "Surrogate")):
            with pytest.raises(ValueError, match="expected programs as written for surrogate="):
                check_bare(structure(fn), "surrogate")
        else:
            check_bare(structure(fn), "surrogate")


def test_a_model_in_which_nothing_would_change():
    for fn in (MASSES["one-hot"], MASSES["bits"]):
        check_changes(structure(fn), "temperature")
    for fn in (DENSITIES["real"], MASSES["counts"]):
        with pytest.raises(ValueError, match=r"expected a Bernoulli or OneHotCategorical latent for surrogate=.*'z'"):
            check_changes(structure(fn), "surrogate")
    with pytest.raises(ValueError, match="got latents none"):
        check_changes(read_structure(lambda: None, (), {}), "temperature")
