"""compare: hands off the caller's things, one start for all, hand-computed tables, blanks where nothing is defined."""

import copy
import json
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrovae import data
from pyrovae.compare import _verdict, compare, tie_factor
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import (
    EM,
    Exact,
    ExactLikelihood,
    Gibbs,
    Importance,
    MeanField,
    SaulJaakkolaJordan,
    Variational,
    WakeSleep,
)
from pyrovae.models import SigmoidBeliefNet, toy


def small_net():
    return toy.belief_net(visible=5, hidden=3)


def everything(net, guide=None):
    """All that a caller could see: parameters, gradients, store, random states."""
    modules = [m for m in (net, guide) if isinstance(m, nn.Module)]
    state = {key: dict(value) for key, value in pyro.get_param_store().get_state().items()}
    return {
        "parameters": [p.detach().clone() for m in modules for p in m.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()],
        "names": [n for m in modules for n, _ in m.named_parameters()],
        "store": {k: v.detach().clone() for k, v in state["params"].items()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def all_kinds(net, guide):
    return {
        "EM": EM(Exact(), 2),
        "gradient": Variational(None, ExactLikelihood(), num_steps=3),
        "score": Variational(guide, num_steps=3),
        "wake-sleep": WakeSleep(guide, num_steps=3),
        "exact": Exact(),
        "Gibbs": Gibbs(10, 2, 2),
        "importance": Importance(guide, 20),
    }


class TestHandsOff:
    def test_module(self):
        net = small_net()
        guide = AmortizedMeanField(net)
        x = net.sample(6)
        pyro.param("mine", torch.ones(2))
        next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
        before = everything(net, guide)
        compare(net, x, all_kinds(net, guide), x_test=net_rows(3), seeds=(0, 1))
        assert same(before, everything(net, guide))

    def test_negative_control(self):
        """The same look at a learner without compare sees the change."""
        net = small_net()
        x = net.sample(6)
        before = everything(net)
        EM(Exact(), 2).fit(net, x)
        assert not same(before, everything(net))

    def test_closure_over_a_module(self):
        layer = nn.Linear(2, 4)

        def model(x):
            pyro.module("decoder", layer)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=layer(z)).to_event(1), obs=x)

        x = torch.bernoulli(0.5 * torch.ones(6, 4))
        before = everything(layer)
        found = compare(model, x, {"EM": EM(Exact(), 4), "gradient": Variational(None, ExactLikelihood(), num_steps=5)})
        assert same(before, everything(layer))
        starts = [fit.history[0]["bound"] for fit in found.fits.values()]
        assert starts[0] == pytest.approx(starts[1], abs=1e-12)
        assert found.fits["EM"].history[-1]["bound"] > starts[0] + 0.1

    def test_bare_parameters(self):
        def model(x):
            weight = pyro.param("weight", torch.full((2, 4), 0.3))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

        x = torch.bernoulli(0.8 * torch.ones(6, 4))
        for prepare in (lambda: None, lambda: pyro.param("weight", torch.full((2, 4), -0.2))):
            pyro.clear_param_store()
            prepare()
            before = everything(None)
            methods = {"EM": EM(Exact(), 3), "gradient": Variational(None, ExactLikelihood(), num_steps=5), "exact": Exact()}
            found = compare(model, x, methods)
            assert same(before, everything(None))
            starts = [fit.history[0]["bound"] for fit in found.fits.values()]
            assert starts[0] == pytest.approx(starts[1], abs=1e-12)
            assert found.fits["EM"].history[-1]["bound"] > starts[0] + 0.05

    def test_after_an_error(self):
        net = small_net()

        class Breaks:
            def fit(self, model, *args, **kwargs):
                torch.rand(3)
                with torch.no_grad():
                    next(iter(model.parameters())).add_(1)
                pyro.param("left behind", torch.ones(1))
                raise RuntimeError("on purpose")

        before = everything(net)
        with pytest.raises(RuntimeError, match="on purpose"):
            compare(net, net_rows(4), {"breaks": Breaks()})
        assert same(before, everything(net))


def net_rows(n):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return torch.bernoulli(0.5 * torch.ones(n, 5))


class TestStart:
    def test_same_for_all_learners(self):
        net, x = small_net(), net_rows(8)
        methods = {"EM": EM(Exact(), 2), "again": EM(Exact(), 2), "gradient": Variational(None, ExactLikelihood(), num_steps=2)}
        found = compare(net, x, methods, seeds=(0, 1, 2))
        for number in range(3):
            starts = {name: fits[number].history[0]["bound"] for name, fits in found.runs.items()}
            assert max(starts.values()) - min(starts.values()) < 1e-12
        first = [fits.history[0]["bound"] for fits in found.runs["EM"]]
        assert len({round(value, 6) for value in first}) == 3, "each seed has a start of its own"
        assert first[0] == pytest.approx(float(Exact().infer(net, x).log_evidence.mean()), abs=1e-12)

    def test_repeats(self):
        net, x = small_net(), net_rows(8)
        ends = []
        for extra in (0, 5):
            torch.rand(extra)
            guide = copy.deepcopy(AmortizedMeanField(net, nn.Linear(5, 3)))
            with torch.no_grad():
                for p in guide.parameters():
                    p.fill_(0.1)
            found = compare(net, x, {"score": Variational(guide, num_steps=5)}, seeds=(3,))
            ends.append(found.learning["log_p_train"][0])
        assert ends[0] == ends[1]
        other = compare(net, x, {"score": Variational(guide, num_steps=5)}, seeds=(4,))
        assert other.learning["log_p_train"][0] != ends[0]


class TestLearningTable:
    def test_by_hand(self):
        net, x, t = small_net(), net_rows(9), net_rows(5).flip(0)
        guide = AmortizedMeanField(net)
        found = compare(net, x, {"EM": EM(Exact(), 3), "score": Variational(guide, num_steps=6)}, x_test=t)
        table = found.learning.set_index("method")
        exact = {name: {d: Exact().infer(m, d).log_evidence for d in (x, t)} for name, m in found.models.items()}
        for name in table.index:
            assert table["log_p_train"][name] == pytest.approx(float(exact[name][x].mean()), abs=1e-10)
            assert table["log_p_test"][name] == pytest.approx(float(exact[name][t].mean()), abs=1e-10)
        difference = exact["score"][t] - exact["EM"][t]
        assert table["difference"]["score"] == pytest.approx(float(difference.mean()), abs=1e-10)
        assert table["difference_se"]["score"] == pytest.approx(float(difference.std() / math.sqrt(5)), abs=1e-10)
        unpaired = float((exact["score"][t].var() / 5 + exact["EM"][t].var() / 5).sqrt())
        assert abs(unpaired - table["difference_se"]["score"]) > 1e-3, "the unpaired error is another number"
        own = found.fits["score"].history[-1]["bound"]
        assert table["gap"]["score"] == pytest.approx(float(exact["score"][x].mean()) - own, abs=1e-10)
        assert table["gap_se"]["score"] == found.fits["score"].history[-1]["stderr"] > 0
        assert table["gap"]["EM"] == pytest.approx(0, abs=1e-10)

    def test_over_seeds(self):
        net, x = small_net(), net_rows(9)
        methods = {"EM": EM(Exact(), 3), "gradient": Variational(None, ExactLikelihood(), num_steps=3)}
        found = compare(net, x, methods, seeds=(0, 1, 2))
        ends = {name: torch.tensor([fit.history[-1]["bound"] for fit in fits]) for name, fits in found.runs.items()}
        row = found.learning.set_index("method").loc["gradient"]
        assert row["log_p_train"] == pytest.approx(float(ends["gradient"].mean()), abs=1e-10)
        assert row["log_p_train_se"] == pytest.approx(float(ends["gradient"].std() / math.sqrt(3)), abs=1e-10)
        difference = ends["gradient"] - ends["EM"]
        assert row["difference"] == pytest.approx(float(difference.mean()), abs=1e-10)
        assert row["difference_se"] == pytest.approx(float(difference.std() / math.sqrt(3)), abs=1e-10)

    def test_blanks_are_not_zero(self):
        net, x = small_net(), net_rows(6)
        table = compare(net, x, {"EM": EM(Exact(), 2), "Monte-Carlo EM": EM(Gibbs(5, 1, 2), 2)}).learning.set_index("method")
        blank = [("Monte-Carlo EM", c) for c in ("own_bound", "gap", "gap_se")]
        blank += [("EM", "difference"), ("EM", "difference_se"), ("EM", "log_p_test"), ("EM", "log_p_train_se")]
        for name, column in blank:
            assert pd.isna(table[column][name]), (name, column)
        assert table["own_bound"]["EM"] == table["log_p_train"]["EM"]
        assert "no bound of its own" in table["note"]["Monte-Carlo EM"]

    def test_reference_that_does_not_fit(self):
        net = SigmoidBeliefNet(4, 30)
        x = torch.bernoulli(0.5 * torch.ones(3, 4))
        guide = AmortizedMeanField(net)
        found = compare(net, x, {"score": Variational(guide, num_steps=2)})
        row = found.learning.loc[0]
        assert all(pd.isna(row[c]) for c in ("log_p_train", "log_p_test", "gap", "difference"))
        assert not pd.isna(row["own_bound"])
        assert "does not fit" in row["note"]


class TestInferenceTable:
    def test_gap_and_kl(self):
        """The gap of a guide whose weights are all equal to those of the exact posterior is 0; of another, KL(q‖p)."""
        net, x = small_net(), net_rows(6)

        class Known:
            """q = the prior: its bound by enumeration, nothing sampled."""

            def infer(self, model, *args):
                posterior = Exact().infer(model, *args)
                return Shifted(posterior, q_bound(model, *args))

        found = compare(net, x, {"exact": Exact(), "prior": Known()}).inference.set_index("method")
        evidence = Exact().infer(net, x).log_evidence
        assert found["gap"]["exact"] == pytest.approx(0, abs=1e-10)
        assert found["kl"]["exact"] == pytest.approx(0, abs=1e-10)
        expected = float((evidence - q_bound(net, x)).mean())
        assert expected > 0.1
        assert found["gap"]["prior"] == pytest.approx(expected, abs=1e-10)
        assert found["kl"]["prior"] == pytest.approx(expected, abs=1e-10)
        assert "nats from the posterior" in found["note"]["prior"]

    def test_variational_kl_within_noise(self):
        """The gap of a sampled bound, against KL(q‖p) of that guide by enumeration."""
        net, x = small_net(), net_rows(6)
        guide = AmortizedMeanField(net)
        found = compare(net, x, {"VI": Variational(guide, num_samples=4000)}, learn=False)
        row = found.inference.loc[0]
        states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).unsqueeze(1).expand(8, 6, 3)
        log_q = found.posteriors["VI"].log_prob({"h1": states})
        log_p = Exact().infer(net, x).log_prob({"h1": states})
        kl = float((log_q.exp() * (log_q - log_p)).sum(0).mean())
        assert abs(row["kl"] - kl) < 4.5 * row["gap_se"]
        assert kl > 9 * row["gap_se"], "a blank or a zero would fail"
        exact = Exact().infer(net, x).marginals["h1"]
        error = float((found.posteriors["VI"].marginals["h1"] - exact).abs().max())
        assert row["marginal_error"] == pytest.approx(error, abs=1e-12)

    def test_blanks(self):
        net, x = small_net(), net_rows(6)
        guide = AmortizedMeanField(net)
        methods = {"exact": Exact(), "Gibbs": Gibbs(50, 2, 5), "importance": Importance(guide, 50)}
        table = compare(net, x, methods).inference.set_index("method")
        for column in ("log_evidence", "log_evidence_se", "gap", "gap_se", "kl", "pareto_k"):
            assert pd.isna(table[column]["Gibbs"]), column
        assert pd.isna(table["kl"]["importance"]), "an importance-weighted bound has no such KL"
        assert pd.isna(table["rhat"]["importance"])
        assert pd.isna(table["rhat"]["exact"])
        assert table["rhat"]["Gibbs"] > 0.9
        assert table["ess"]["Gibbs"] > 1
        assert table["marginal_error"]["exact"] == 0
        assert table["marginal_error"]["Gibbs"] > 0

    def test_without_a_reference(self):
        net = SigmoidBeliefNet(4, 30)
        x = torch.bernoulli(0.5 * torch.ones(3, 4))
        found = compare(net, x, {"VI": Variational(AmortizedMeanField(net), num_samples=10)}, learn=False)
        assert found.reference is None
        assert all(pd.isna(found.inference[c][0]) for c in ("gap", "kl", "marginal_error"))


class TestSorting:
    def test_two_tables(self):
        net, x = small_net(), net_rows(6)
        found = compare(net, x, {"exact": Exact(), "EM": EM(Exact(), 1)})
        assert list(found.learning["method"]) == ["EM"]
        assert list(found.inference["method"]) == ["exact"]
        assert list(found.table["task"]) == ["learning", "inference"]
        assert set(found.fits) == {"EM"}
        assert set(found.posteriors) == {"exact"}

    def test_one_table(self):
        found = compare(small_net(), net_rows(6), {"exact": Exact()})
        assert found.learning is None
        assert found.table is found.inference

    def test_learn_false(self):
        net, x = small_net(), net_rows(6)
        methods = {"VI": Variational(AmortizedMeanField(net), num_guide_steps=3, num_samples=20)}
        assert list(compare(net, x, methods, learn=False).inference["method"]) == ["VI"]
        assert list(compare(net, x, methods, learn=True).learning["method"]) == ["VI"]
        with pytest.raises(ValueError, match="infer, got EM"):
            compare(net, x, {"EM": EM()}, learn=False)
        with pytest.raises(ValueError, match="fit, got Exact"):
            compare(net, x, {"exact": Exact()}, learn=True)

    @pytest.mark.parametrize(
        ("methods", "seeds", "words"),
        [({}, (0,), "at least one method"), ({"it": object()}, (0,), "fit or infer.*'it'"), ({"e": Exact()}, (), "one seed")],
    )
    def test_refused(self, methods, seeds, words):
        with pytest.raises(ValueError, match=words):
            compare(small_net(), net_rows(3), methods, seeds=seeds)

    def test_wrong_kinds(self):
        with pytest.raises(TypeError, match=r"expected a dict of methods by name, got list; pass \{'exact'"):
            compare(small_net(), net_rows(3), [Exact()])
        with pytest.raises(TypeError, match=r"expected x to be a tensor .*, got ndarray; write torch.as_tensor\(x\)"):
            compare(small_net(), net_rows(3).numpy(), {"exact": Exact()})
        with pytest.raises(TypeError, match="expected x_test to be"):
            compare(small_net(), net_rows(3), {"exact": Exact()}, x_test=[0, 1])

    def test_untrained_guide(self):
        net, x = small_net(), net_rows(6)
        with torch.no_grad():
            for leaf in net.parameters():
                leaf.mul_(5)
        methods = {n: Variational(AmortizedMeanField(net), num_guide_steps=n, num_samples=50) for n in (0, 2)}
        table = compare(net, x, methods, learn=False).inference
        assert all(table["kl"] > 0.1)
        assert ["guide taken as given" in note for note in table["note"]] == [True, False]

    def test_progress(self):
        calls = []
        compare(
            small_net(),
            net_rows(3),
            {"exact": Exact(), "EM": EM(Exact(), 1)},
            seeds=(0, 1),
            progress=lambda *a: calls.append(a),
        )
        assert calls == [("EM", 0, 4), ("exact", 1, 4), ("EM", 2, 4), ("exact", 3, 4), ("", 4, 4)]


def one_cause(x):
    """A latent outside the plate: one evidence for all rows."""
    g = pyro.sample("g", dist.Bernoulli(0.3))
    mean = pyro.param("mean", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(g * mean, 1.0), obs=x)


class OffBy:
    """Exact learning that reports a bound too low by so much."""

    def __init__(self, gap):
        self.gap = gap

    def fit(self, model, *args):
        fit = EM(Exact(), 1).fit(model, *args)
        return replace(fit, bound="lower", history=[{**entry, "bound": entry["bound"] - self.gap} for entry in fit.history])


class TestUnit:
    def test_global_latent(self):
        x = torch.randn(30)
        pyro.clear_param_store()
        methods = {"EM": EM(Exact(), 1), "near": OffBy(2.9), "far": OffBy(3.1), "exact": Exact(), "Gibbs": Gibbs(20, 2, 2)}
        found = compare(one_cause, x, methods)
        assert found.metadata["unit"] == "nats, whole data set"
        assert "per datum" not in found.to_markdown()
        assert "per datum" not in found._repr_html_()
        assert "Learning, nats, whole data set" in found.to_markdown()
        notes = found.learning.set_index("method")["note"]
        assert "understates" not in notes["near"], "2.9 nats over 30 rows are less than 0.1 a row"
        assert "understates" in notes["far"]

    def test_local_latents(self):
        found = compare(small_net(), net_rows(30), {"EM": EM(Exact(), 1), "far": OffBy(2.9), "exact": Exact()})
        assert found.metadata["unit"] == "nats per datum"
        assert "whole data set" not in found.to_markdown()
        assert "understates" in found.learning["note"][1]


class Moved:
    """Exact learning, then `shift` drawn anew each run."""

    def __init__(self, spread):
        self.spread = spread

    def fit(self, model, *args):
        fit = EM(Exact(), 1).fit(model, *args)
        with torch.no_grad():
            model.prior.add_(self.spread * torch.randn(()))
        return fit


class TestTies:
    def test_factor(self):
        """The quantiles of Student's t from tables."""
        for seeds, quantile in ((1, 2.0), (2, 12.706), (3, 4.303), (5, 2.776), (1000, 1.962)):
            assert tie_factor(seeds) == pytest.approx(quantile, abs=1e-3)

    def test_words(self):
        net, x = small_net(), net_rows(20)
        one = compare(net, x, {"EM": EM(Exact(), 1), "moved": Moved(1e-4)}).learning["note"][1]
        other = compare(net, x, {"EM": EM(Exact(), 1), "moved": Moved(1e-4)}, x_test=x[:9]).learning["note"][1]
        assert one == "tie with EM (within 2 s.e. over training rows, one run)" or "tie" not in one
        assert other == "tie with EM (within 2 s.e. over test rows, one run)" or "tie" not in other
        assert "tie" in one + other
        both = compare(net, x, {"EM": EM(Exact(), 1), "again": Moved(0.5)}, seeds=range(3)).learning
        row = both.loc[1]
        within = abs(row["difference"]) < 4.303 * row["difference_se"]
        assert ("tie with EM (within 4.3 s.e. over seeds)" in row["note"]) == within

    @pytest.mark.parametrize(
        ("difference", "stderr", "seeds", "words"),
        [
            (-0.71, 0.14, 1, "worse than EM by 0.71 nats (beyond 2 s.e. over test rows, one run)"),
            (0.5, 0.1, 3, "better than EM by 0.5 nats (beyond 4.3 s.e. over seeds)"),
            (-0.5, 0.2, 3, "tie with EM (within 4.3 s.e. over seeds)"),
            (0.0, 0.0, 1, "tie with EM (within 2 s.e. over test rows, one run)"),
            (-0.5, None, 1, "worse than EM by 0.5 nats, no error known"),
            (0.0, None, 2, "equal to EM"),
        ],
    )
    def test_verdict(self, difference, stderr, seeds, words):
        assert _verdict(difference, stderr, "EM", seeds, "test") == words

    def test_neither(self):
        """Gibbs as E-step where no table fits: nothing judges it."""
        net = SigmoidBeliefNet(4, 30)
        found = compare(net, torch.bernoulli(torch.full((3, 4), 0.5)), {"MCEM": EM(Gibbs(3, 1, 1), 1)})
        assert found.learning["note"][0] == "neither exact log p(x) nor a bound of its own"


class TestEqualStarts:
    def test_without_reset(self):
        def model(x):
            weight = pyro.param("weight", torch.tensor([[0.3, -0.2, 0.1, 0.4], [0.0, 0.5, -0.3, 0.2]]))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

        pyro.clear_param_store()
        x = torch.bernoulli(0.5 * torch.ones(9, 4))
        methods = {
            "EM": EM(Exact(), 2),
            "gradient": Variational(None, ExactLikelihood(), num_steps=2),
            "MC": EM(Gibbs(3, 1, 1), 2),
        }
        table = compare(model, x, methods, seeds=(0, 1, 2)).learning.set_index("method")
        for name in methods:
            assert "all seeds start alike: the model has no reset_parameters" in table["note"][name]
        for name in ("EM", "gradient"):
            for column in ("log_p_train_se", "own_bound_se", "gap_se", "difference_se"):
                assert pd.isna(table[column][name]), (name, column)
        assert "tie" not in table["note"]["gradient"]
        assert table["log_p_train_se"]["MC"] > 0, "a learner that samples has a spread all the same"
        assert "alike" not in compare(model, x, {"EM": EM(Exact(), 2)}).learning["note"][0]

    def test_with_reset(self):
        table = compare(small_net(), net_rows(9), {"EM": EM(Exact(), 2)}, seeds=(0, 1)).learning
        assert "alike" not in table["note"][0]
        assert table["log_p_train_se"][0] > 0

    def test_drawn_start(self):
        """A plain function whose parameters are drawn at their first use starts anew each seed."""

        def model(x):
            weight = pyro.param("weight", lambda: torch.randn(2, 4))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

        pyro.clear_param_store()
        found = compare(model, torch.bernoulli(0.5 * torch.ones(9, 4)), {"EM": EM(Exact(), 1)}, seeds=(0, 1))
        starts = [fit.history[0]["bound"] for fit in found.runs["EM"]]
        assert ("alike" in found.learning["note"][0]) == (starts[0] == starts[1])


class TestRefusedData:
    """Grey rows: the exact evaluation refuses them, a learner that binarizes takes them."""

    @pytest.mark.parametrize("function", [False, True])
    def test_blank_with_reason(self, function):
        net = small_net()
        grey = net_rows(8) * 0.6 + 0.2
        model = (lambda x: net(x)) if function else net
        methods = {"VI": Variational(AmortizedMeanField(net), num_steps=3, preprocess=data.binarize)}
        before = everything(net)
        row = compare(model, grey, methods, x_test=grey[:3]).learning.loc[0]
        assert same(before, everything(net))
        assert all(pd.isna(row[c]) for c in ("log_p_train", "log_p_test", "gap", "difference"))
        assert not pd.isna(row["own_bound"])
        assert "exact log p(x) not computed: expected " in row["note"]
        assert "divide" not in row["note"], "the first clause alone"
        judged = compare(model, grey, methods, x_test=net_rows(3)).learning.loc[0]
        assert pd.isna(judged["log_p_train"])
        assert not pd.isna(judged["log_p_test"])

    def test_nobody_takes_them(self):
        net = small_net()
        grey = net_rows(8) * 0.6 + 0.2
        for method in (EM(Exact(), 1), Variational(AmortizedMeanField(net), num_steps=2), Exact()):
            with pytest.raises(ValueError, match="expected"):
                compare(net, grey, {"it": method})

    def test_test_width_is_refused_before_learning(self):
        class Runs:
            preprocess = staticmethod(data.binarize)

            def fit(self, model, *args):
                pytest.fail("work began")

        with pytest.raises(ValueError, match="expected"):
            compare(small_net(), net_rows(8), {"it": Runs()}, x_test=net_rows(8)[:, :4])


def test_a_class_is_no_method():
    with pytest.raises(ValueError, match=r"expected an instance of a method, got the class EM for 'e'; write EM\(...\)"):
        compare(small_net(), net_rows(3), {"e": EM})


class TestChainNotes:
    def test_constant(self):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(torch.tensor([0.5, 1.0])).to_event(1))

        note = compare(model, torch.zeros(3), {"Gibbs": Gibbs(40, 2, 2)}).inference["note"][0]
        assert "3 of 6 quantities constant in every chain" in note
        assert "never moved" not in note

    def test_one_chain(self):
        note = compare(small_net(), net_rows(4), {"Gibbs": Gibbs(200, 1, 2)}).inference["note"][0]
        assert "one chain: no R-hat" in note
        assert "constant" not in note

    def test_sampled_bound(self):
        net = small_net()
        guide = AmortizedMeanField(net)
        table = compare(net, net_rows(4), {"VI": Variational(guide, num_samples=20)}, learn=False, max_evaluations=0).inference
        assert table["note"][0] == "lower bound in expectation"


def test_metadata():
    net, x = small_net(), net_rows(6)
    methods = {"EM": EM(Gibbs(7, 2, 1), 1, penalty=0.5), "VI": Variational(AmortizedMeanField(net), num_steps=2)}
    found = compare(net, x, methods, x_test=x[:2], seeds=(4,))
    about = found.metadata
    assert about["seeds"] == [4]
    assert (about["rows"], about["test_rows"]) == (6, 2)
    assert {"python", "torch", "pyro-ppl", "pyrovae"} <= set(about["versions"])
    assert about["methods"]["EM"]["class"] == "EM"
    assert about["methods"]["EM"]["penalty"] == 0.5
    assert about["methods"]["EM"]["e_step"]["num_samples"] == 7
    assert about["methods"]["VI"]["elbo"]["num_particles"] == 10
    assert about["methods"]["VI"]["optim"] == {"class": "Adam", "lr": 0.01}
    json.dumps(about)


class Shifted:
    """An exact posterior that says another evidence, as a lower bound."""

    bound = "lower"
    stderr = 0.0

    def __init__(self, posterior, evidence):
        self.posterior, self.log_evidence = posterior, evidence

    def __getattr__(self, name):
        return getattr(self.posterior, name)


def q_bound(net, x):
    """E_q[log p(x, h) − log q(h)] with q the prior: E_prior[log p(x | h)], by enumeration, `[B]`."""
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    with torch.no_grad():
        prior = dist.Bernoulli(logits=net.prior).log_prob(states).sum(-1).exp()
        logits = net.biases[0] + states @ net.weights[0]
        return prior @ dist.Bernoulli(logits=logits.unsqueeze(1)).log_prob(x).sum(-1)


def test_a_bound_of_some_rows_has_no_gap():
    """By default a learner's own bound is that of all rows; of a part of them it is not set beside exact values."""
    net = toy.belief_net(4, 2)
    x = net.sample(1100)
    learners = {
        "all": Variational(None, ExactLikelihood(), num_steps=2),
        "some": Variational(None, ExactLikelihood(), num_steps=2, log_rows=50),
    }
    table = compare(net, x, learners).learning.set_index("method")
    assert table.loc["all", "own_bound"] == pytest.approx(table.loc["all", "log_p_train"], abs=1e-12)
    assert abs(table.loc["all", "gap"]) < 1e-12
    assert table.loc["some", "own_bound"] != pytest.approx(table.loc["some", "log_p_train"], abs=1e-6)
    assert np.isnan(table.loc["some", "gap"]) or table.loc["some", "gap"] is None
    assert "its bound is that of 50 rows" in table.loc["some", "note"]


def test_a_bound_that_is_no_elbo_has_no_divergence():
    """What Saul, Jaakkola and Jordan's bound lacks is more than KL(q‖p)."""
    net = toy.belief_net(5, 3)
    found = compare(net, net.sample(6), {"exact": Exact(), "MF": MeanField(), "SJJ": SaulJaakkolaJordan()}).inference
    kl = found.set_index("method")["kl"]
    assert kl["exact"] == 0
    assert kl["MF"] > 0
    assert kl.isna()["SJJ"]
