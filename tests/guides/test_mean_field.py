"""Mean-field guides against enumeration and closed form."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from scipy import stats
from torch import nn

from pyrovae.guides import AmortizedMeanField, LocalMeanField
from pyrovae.handlers import relax
from pyrovae.models import SigmoidBeliefNet, toy

FALSE_ALARM = 1e-5


def largest_z_bound(tests):
    return stats.norm.isf(FALSE_ALARM / tests / 2)


def factorised_net(units=3):
    """A net whose unit i drives pixel i alone, so that its posterior is a product; and its posterior logits."""
    net = SigmoidBeliefNet(units, units)
    with torch.no_grad():
        net.prior.copy_(torch.randn(units))
        net.weights[0].copy_(torch.diag(torch.randn(units) * 2))
        net.biases[0].normal_()

    def logits(x):
        def likelihood(h):
            return dist.Bernoulli(logits=net.biases[0] + h * net.weights[0].diagonal()).log_prob(x)

        return (net.prior + likelihood(1.0) - likelihood(0.0)).detach()

    def evidence(x):
        one, zero = (
            dist.Bernoulli(logits=net.prior).log_prob(torch.tensor(h))
            + dist.Bernoulli(logits=net.biases[0] + h * net.weights[0].diagonal()).log_prob(x)
            for h in (1.0, 0.0)
        )
        return torch.logaddexp(one, zero).sum(-1).detach()

    return net, logits, evidence


def test_at_the_exact_posterior_every_draw_gives_the_evidence():
    net, logits, evidence = factorised_net()
    x = net.sample(7)
    guide = LocalMeanField(net, 7)
    guide.table["h1"].data.copy_(logits(x))
    for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)):
        assert abs(elbo.loss(net, guide, x) + float(evidence(x).sum())) < 1e-10
    guide.table["h1"].data.add_(0.1)
    assert abs(Trace_ELBO().loss(net, guide, x) + float(evidence(x).sum())) > 1e-3


@pytest.mark.parametrize("rows", [[2], [6, 0, 3], [3, 6, 5, 4, 2, 1, 0]])
def test_rows_follow_the_models_index(rows):
    """Also in an order of its own that is as long as the data."""
    net, logits, evidence = factorised_net()
    x, index = net.sample(7), torch.tensor(rows)
    guide = LocalMeanField(net, 7)
    guide.table["h1"].data.copy_(logits(x))
    loss = Trace_ELBO().loss(net, guide, x[index], index=index, num_data=7)
    assert abs(loss + float(evidence(x[index]).sum()) * 7 / len(rows)) < 1e-10


def test_amortised_logits_are_the_encoders():
    net, logits, evidence = factorised_net()
    x = net.sample(7)
    guide = AmortizedMeanField(net, lambda data: logits(data))
    assert abs(Trace_ELBO().loss(net, guide, x) + float(evidence(x).sum())) < 1e-10


def enumerate_elbo(net, guide, x):
    """E_q[log p − log q] and the variance of its integrand, by listing the joint states of one row."""
    sizes = [latent.components for latent in guide._pilot.latents]
    names = [latent.name for latent in guide._pilot.latents]
    weights, values = [], []
    for state in itertools.product([0.0, 1.0], repeat=sum(sizes)):
        z = dict(zip(names, torch.tensor(state).reshape(1, -1).split(sizes, -1), strict=True))
        log_q = poutine.trace(poutine.condition(guide, z)).get_trace(x).log_prob_sum()
        log_p = poutine.trace(poutine.condition(net, z)).get_trace(x).log_prob_sum()
        weights.append(log_q.exp())
        values.append(log_p - log_q)
    w, v = torch.stack(weights), torch.stack(values)
    assert abs(float(w.detach().sum()) - 1) < 1e-12
    mean = (w * v).sum()
    return mean, (w * (v - mean) ** 2).sum()


def net_and_guide(kind):
    net = toy.belief_net(4, [2, 1])
    x = net.sample(1)
    guide = AmortizedMeanField(net) if kind == "amortised" else LocalMeanField(net, 1)
    return net, guide, x


@pytest.mark.parametrize("kind", ["amortised", "local"])
def test_trace_elbo_estimates_the_enumerated_elbo(kind):
    net, guide, x = net_and_guide(kind)
    n = 4000
    exact, variance = enumerate_elbo(net, guide, x)
    estimate = -Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=1).loss(net, guide, x)
    z = (estimate - exact) / (variance / n).sqrt()
    assert abs(float(z)) < largest_z_bound(1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)  # another guide's ELBO is told apart
    other, _ = enumerate_elbo(net, guide, x)
    assert abs(float((estimate - other) / (variance / n).sqrt())) > largest_z_bound(1)


@pytest.mark.parametrize("kind", ["amortised", "local"])
def test_score_function_gradient_estimates_the_enumerated_gradient(kind):
    net, guide, x = net_and_guide(kind)
    parameters = [*guide.parameters(), *net.parameters()]
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-enumerate_elbo(net, guide, x)[0], parameters)])
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    draws = []
    for _ in range(200):
        for parameter in parameters:
            parameter.grad = None
        elbo.loss_and_grads(net, guide, x)
        draws.append(torch.cat([p.grad.flatten() for p in parameters]))
    draws = torch.stack(draws)

    def largest(target):
        error = (draws.mean(0) - target).abs()
        stderr = draws.std(0) / len(draws) ** 0.5
        rounding = 1e-12 * (1 + target.abs())
        return float(torch.where(error < rounding, 0.0, error / stderr).max())

    bound = stats.t.isf(FALSE_ALARM / len(exact) / 2, len(draws) - 1)
    assert largest(exact) < bound
    assert largest(1.5 * exact) > bound


def test_enumerated_categories_give_the_exact_elbo():
    """`config_enumerate` on the guide: TraceEnum_ELBO sums over q, and the loss has no noise."""
    net = toy.Mixture(4, 3)
    x = net(batch_size=5).detach()
    guide = LocalMeanField(net, 5)
    q = torch.softmax(guide.table["z"], -1).detach()
    log_p = torch.log_softmax(net.weights, -1) + dist.Bernoulli(logits=net.logits).to_event(1).log_prob(x.unsqueeze(1))
    exact = (q * (log_p - q.log())).sum()
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(net, config_enumerate(guide), x)
    assert abs(loss + float(exact)) < 1e-10


def test_the_decoder_never_runs():
    class Counted(nn.Linear):
        runs = 0

        def forward(self, z):
            Counted.runs += 1
            return super().forward(z)

    decoder = Counted(2, 3)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(pyro.module("decoder", decoder)(z), 1.0).to_event(1), obs=x)

    x = torch.randn(4, 3)
    guide = AmortizedMeanField(model, example=(x,))
    Counted.runs = 0
    guide(x)
    assert Counted.runs == 0
    Trace_ELBO().loss(model, guide, x)
    assert Counted.runs == 1


def test_pathwise_gradients_reach_the_guide_and_nothing_of_the_walk_reaches_the_model():
    upper = nn.Linear(2, 2)

    def model(x):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(upper(a), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x)

    x = torch.randn(4, 2)
    guide = LocalMeanField(model, 4, example=(x,))
    values = guide(x)
    (values["a"].sum() + values["b"].sum()).backward()
    assert all(bool((p.grad != 0).all()) for p in guide.parameters())
    assert upper.weight.grad is None
    with torch.no_grad():
        assert not guide(x)["a"].requires_grad
    assert torch.is_grad_enabled()


def test_a_failing_program_leaves_no_handler_behind():
    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("a", dist.Bernoulli(0.5))
            if x[0] < 0:
                raise RuntimeError("the program failed")
            pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = LocalMeanField(model, 2, example=(torch.ones(2),))
    with pytest.raises(RuntimeError, match="the program failed"):
        guide(-torch.ones(2))
    assert pyro.poutine.runtime._PYRO_STACK == []
    assert torch.is_grad_enabled()
    assert set(guide(torch.ones(2))) == {"a", "b"}


def test_scale_and_mask_of_the_prior_are_the_guides():
    mask = torch.tensor([True, False, True])

    def model(x, annealing):
        with pyro.plate("rows", 3), poutine.scale(scale=annealing):
            pyro.sample("a", dist.Bernoulli(0.4).mask(mask))
            pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.4)).mask(torch.tensor([True, False])).to_event(1))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.randn(3)
    guide = LocalMeanField(model, 3, example=(x, 1.0))
    trace = poutine.trace(guide).get_trace(x, 0.25)
    trace.compute_log_prob()
    a, b = trace.nodes["a"], trace.nodes["b"]
    assert a["scale"] == 0.25
    assert torch.equal(a["log_prob"] != 0, mask)
    one = dist.Bernoulli(logits=guide.table["b"][:, 0]).log_prob(b["value"][:, 0])
    assert torch.allclose(b["log_prob"], 0.25 * one, atol=1e-14)


def test_explicit_indices_are_not_overridden():
    """pyro #3468: a guide's plate replaces the rows that the model asked for."""
    net = SigmoidBeliefNet(3, 2)
    index = torch.tensor([4, 1])
    for guide in (AmortizedMeanField(net), LocalMeanField(net, 6)):
        q = poutine.trace(guide).get_trace(net.sample(2), index=index, num_data=6)
        p = poutine.trace(poutine.replay(net, q)).get_trace(net.sample(2), index=index, num_data=6)
        assert torch.equal(p.nodes["data"]["value"], index)


def test_an_encoder_of_all_data_gives_the_rows_of_the_plate():
    def model(x):
        with pyro.plate("rows", len(x), subsample_size=3) as rows:
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[rows])

    x = torch.arange(9.0)
    guide = AmortizedMeanField(model, lambda x: torch.stack([x, torch.zeros_like(x)], -1), example=(x,))
    trace = poutine.trace(guide).get_trace(x)
    rows = trace.nodes["rows"]["value"]
    assert torch.equal(trace.nodes["z"]["fn"].loc, x[rows])
    assert trace.nodes["z"]["scale"] == 3.0


class Relaxed:
    """A program written with relaxed sites, at a temperature of its own."""

    def __init__(self):
        self.temperature = torch.tensor(0.7)

    def __call__(self, x):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.RelaxedBernoulli(self.temperature, logits=torch.zeros(2)).to_event(1))
            b = pyro.sample("b", dist.RelaxedOneHotCategorical(self.temperature, logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(a.sum(-1) + b @ torch.arange(3.0), 1.0), obs=x)


@pytest.mark.parametrize("kind", [AmortizedMeanField, lambda m, example: LocalMeanField(m, 5, example=example)])
def test_relaxed_sites_take_the_models_temperature_at_the_call(kind):
    model, x = Relaxed(), torch.randn(5)
    guide = kind(model, example=(x,))
    for temperature in (0.7, 0.3):
        model.temperature.fill_(temperature)
        trace = poutine.trace(guide).get_trace(x)
        bit, category = trace.nodes["a"]["fn"].base_dist, trace.nodes["b"]["fn"]
        assert isinstance(bit, dist.RelaxedBernoulli)
        assert isinstance(category, dist.RelaxedOneHotCategorical)
        assert float(bit.temperature) == float(category.temperature) == temperature
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    before = [p.detach().clone() for p in guide.parameters()]
    svi.step(x)
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_a_guide_of_the_relaxed_program_is_the_relaxed_guide():
    net = SigmoidBeliefNet(4, [3, 2])
    x = net.sample(5)
    direct, wrapped = LocalMeanField(relax(net, 0.5), 5), LocalMeanField(net, 5)
    wrapped.load_state_dict(direct.state_dict())
    losses = []
    for guide in (direct, relax(wrapped, 0.5)):
        torch.manual_seed(2)
        losses.append(Trace_ELBO().loss(relax(net, 0.5), guide, x))
    assert losses[0] == losses[1]


class TestEncoder:
    """What an encoder may take and return."""

    @staticmethod
    def model(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mu + z.sum(-1) + c, 1.0), obs=x)

    x = torch.randn(4)

    def names(self, guide):
        return {name for name, _ in guide.named_parameters()}

    def test_order_and_layout(self):
        def encoder(x):
            columns = torch.arange(7.0).expand(len(x), 7)
            return columns * x.unsqueeze(-1)

        x = self.x.to(torch.float64)
        guide = AmortizedMeanField(self.model, encoder, example=(x,))
        assert self.names(guide) == {"free.mu"}
        trace = poutine.trace(guide).get_trace(x)
        c, z = trace.nodes["c"]["fn"], trace.nodes["z"]["fn"].base_dist
        assert torch.allclose(c.logits, torch.log_softmax(torch.arange(3.0) * x[:, None], -1))
        assert torch.allclose(z.loc, torch.tensor([3.0, 4.0]) * x[:, None])
        assert torch.allclose(z.scale, (torch.tensor([5.0, 6.0]) * x[:, None]).exp())

    def test_dict_and_free_sites(self):
        guide = AmortizedMeanField(self.model, lambda x: {"z": torch.zeros(len(x), 4)}, example=(self.x,))
        assert self.names(guide) == {"free.mu", "free.c"}
        assert tuple(guide.free["c"].shape) == (1, 3)
        assert tuple(guide(torch.randn(9))["c"].shape) == (9,)

    def test_takes_as_many_tensors_as_it_has_arguments(self):
        seen = []

        def encoder(*data):
            seen.append(len(data))
            return torch.zeros(len(data[0]), 7)

        AmortizedMeanField(self.model, encoder, example=(self.x, self.x))
        AmortizedMeanField(self.model, lambda x: encoder(x), example=(self.x, self.x))
        assert seen == [2, 1]

    def test_data_by_keyword(self):
        net = SigmoidBeliefNet(4, 2)
        x = net.sample(3)
        guide = AmortizedMeanField(net)
        assert Trace_ELBO().loss(net, guide, x=x) > 0
        assert tuple(guide(x=x)["h1"].shape) == (3, 2)

    @pytest.mark.parametrize("example", [lambda: None, lambda: (torch.zeros(2, 4),)])
    def test_wrong_width_at_construction(self, example):
        with pytest.raises(ValueError, match=r"expected an encoder with 5 outputs \(h2: 2, h1: 3\), got 4"):
            AmortizedMeanField(SigmoidBeliefNet(4, [3, 2]), nn.Linear(4, 4), example=example())

    def test_wrong_width_at_the_first_call(self):
        net = SigmoidBeliefNet(4, 2)
        widths = iter([2, 3])
        guide = AmortizedMeanField(net, lambda x: torch.zeros(len(x), next(widths)))
        with pytest.raises(ValueError, match=r"expected an encoder with 2 outputs .*got 3"):
            guide(net.sample(3))

    def test_wrong_width_of_a_site(self):
        with pytest.raises(ValueError, match=r"expected an encoder with 4 outputs \(z: 4\), got 2"):
            AmortizedMeanField(self.model, lambda x: {"z": torch.zeros(len(x), 2)}, example=(self.x,))

    def test_unknown_site(self):
        with pytest.raises(ValueError, match=r"got also \['w'\]"):
            AmortizedMeanField(self.model, lambda x: {"w": torch.zeros(len(x), 2)}, example=(self.x,))

    def test_wrong_rows(self):
        net = SigmoidBeliefNet(4, 2)
        guide = AmortizedMeanField(net, lambda x: torch.zeros(3, 2))
        with pytest.raises(ValueError, match="got 3 rows for the 5 rows of plate 'data'"):
            guide(net.sample(5))

    def test_data_of_another_width(self):
        for encoder in (None, nn.Linear(4, 2)):
            guide = AmortizedMeanField(SigmoidBeliefNet(4, 2), encoder)
            with pytest.raises(ValueError, match=r"expected data of shape .*\[\[4\]\], got \[\[5\]\]"):
                guide(torch.zeros(3, 5))

    def test_an_error_of_the_encoder_itself_comes_through(self):
        def encoder(x):
            if len(x) > 1:
                raise RuntimeError("the encoder failed")
            return torch.zeros(1, 2)

        with pytest.raises(RuntimeError, match="the encoder failed"):
            AmortizedMeanField(SigmoidBeliefNet(4, 2), encoder)(torch.zeros(3, 4))

    def test_no_data(self):
        with pytest.raises(ValueError, match="expected data for the encoder"):
            AmortizedMeanField(SigmoidBeliefNet(4, 2))()

    def test_a_program_that_needs_arguments(self):
        for make in (AmortizedMeanField, lambda model: LocalMeanField(model, 3)):
            with pytest.raises(ValueError, match=r"pass example=\(x,\)"):
                make(self.model)

    def test_batch_statistics_are_not_touched_at_construction(self):
        net = SigmoidBeliefNet(4, 2)
        encoder = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        AmortizedMeanField(net, encoder)
        assert int(encoder[0].num_batches_tracked) == 0
        assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    "fn",
    [dist.Gamma(1.0, 1.0), dist.Poisson(2.0), dist.Beta(1.0, 1.0), dist.LogNormal(0.0, 1.0)],
    ids=lambda fn: type(fn).__name__,
)
def test_other_supports_are_refused_by_name(fn):
    def model(x):
        with pyro.plate("rows", len(x)):
            r = pyro.sample("rate", fn)
            pyro.sample("x", dist.Normal(r, 1.0), obs=x)

    for make in (AmortizedMeanField, lambda m, example: LocalMeanField(m, 3, example=example)):
        with pytest.raises(ValueError, match="'rate'"):
            make(model, example=(torch.zeros(3),))


@pytest.mark.parametrize("num_data", [0, -1, 2.0, True])
def test_num_data_must_be_a_count(num_data):
    with pytest.raises(ValueError, match="expected num_data >= 1"):
        LocalMeanField(SigmoidBeliefNet(3, 2), num_data)


def test_local_guide_wants_its_index():
    net = SigmoidBeliefNet(3, 2)
    guide = LocalMeanField(net, 6)
    with pytest.raises(ValueError, match=r"expected index=\.\.\. because LocalMeanField\(num_data=6\) saw 2 rows"):
        guide(net.sample(2))
    with pytest.raises(ValueError, match="saw 9 rows"):
        guide(net.sample(2), index=torch.tensor([0, 1]), num_data=9)


def test_reset_parameters():
    guide = LocalMeanField(SigmoidBeliefNet(3, 2), 6)
    parameter = guide.table["h1"]
    before = parameter.detach().clone()
    guide.reset_parameters()
    assert guide.table["h1"] is parameter
    assert not torch.equal(before, parameter)
    assert float(parameter.abs().max()) < 1  # N(0, 0.1²): beyond 10 standard deviations


def test_inner_plates_have_outputs_for_every_row():
    """The default encoder tells the words of a document apart."""

    def model(x):
        with pyro.plate("docs", x.shape[0], dim=-2), pyro.plate("words", x.shape[1], dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def nested(x):
        with pyro.plate("docs", x.shape[0], dim=-2):
            pyro.sample("t", dist.Bernoulli(0.5))
            with pyro.plate("words", x.shape[1], dim=-1):
                c = pyro.sample("c", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    x = torch.randn(5, 3)
    for program in (model, nested):
        trace = poutine.trace(AmortizedMeanField(program, example=(x,))).get_trace(x)
        logits = trace.nodes["c"]["fn"].logits
        assert tuple(logits.shape) == (5, 3)
        assert len(set(logits.flatten().tolist())) == 15
    guide = AmortizedMeanField(nested, example=(x,))
    assert len(guide(torch.randn(2, 3))["t"]) == 2
    with pytest.raises(ValueError, match=r"expected data of shape .* got \[\[4\]\]"):
        guide(torch.randn(5, 4))


@pytest.mark.parametrize("kind", ["amortised", "local"])
def test_predictive_and_wake_sleep(kind):
    net, guide, _ = net_and_guide(kind)
    x = net.sample(1)
    draws = Predictive(net, guide=guide, num_samples=7, parallel=True)(x)
    assert tuple(draws["h1"].shape) == (7, 1, 2)
    elbo = ReweightedWakeSleep(num_particles=3, insomnia=0.5, vectorize_particles=True, max_plate_nesting=1)
    losses = SVI(net, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(x)
    assert len(losses) == 2


def test_observations_take_the_place_of_the_data():
    net = SigmoidBeliefNet(4, 2)
    guide = AmortizedMeanField(net)
    x, y = torch.zeros(3, 4), torch.ones(3, 4)
    logits = [
        poutine.trace(guide).get_trace(*args, **kwargs).nodes["h1"]["fn"].base_dist.logits
        for args, kwargs in (((x,), {"observations": {"x": y}}), ((y,), {}), ((x,), {}))
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    with pytest.raises(ValueError, match="expected observations of a site"):
        guide(x, observations={"w": y})


def test_mirror_has_the_shape_of_the_net():
    net = SigmoidBeliefNet(4, [3, 2])
    assert [tuple(p.shape) for p in net.mirror().parameters()] == [(5, 4), (5,), (5, 5), (5,)]
    guide = AmortizedMeanField(net)
    p = torch.sigmoid(guide.encoder(net.sample(8)))
    assert float((p - 0.5).abs().min()) > 0


def test_an_encoder_of_the_wrong_input_width_is_refused_with_the_shapes():
    net = toy.belief_net(6, 3)
    with pytest.raises(ValueError, match=r"expected an encoder whose input width .* rows of \[\[6\]\]"):
        AmortizedMeanField(net, torch.nn.Linear(5, 3), example=(torch.ones(4, 6),))


def test_an_example_may_be_a_bare_tensor():
    net = toy.belief_net(6, 3)
    assert AmortizedMeanField(net, torch.nn.Linear(6, 3), example=torch.ones(4, 6))(torch.ones(4, 6))["h1"].shape == (4, 3)
