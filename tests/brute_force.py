"""The posterior of a small program by listing its joint states, one ordinary run of the program each.

Nothing of pyrovae is used: `poutine.condition` fixes the latents to one joint state, with the shapes of an ordinary run,
and `poutine.trace` tells the log probabilities. Everything else is a weighted sum over that list.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy import stats


class BruteForce:
    """All joint states of one row of the batch (the rows being independent), and log p(x, z) at each.

    Args:
        program: a Pyro program.
        args: its arguments.
        values: for each latent site, the values of one element of its plates.
        batch: dims (negative) of the plates around every site.
    """

    def __init__(self, program, args, values, batch=(-1,)):
        self.program, self.args, self.values, self.batch = program, args, values, batch
        self.rng = torch.get_rng_state()
        trace = self._trace({})
        self.shapes = {name: tuple(trace.nodes[name]["fn"].batch_shape) for name in values}
        self.sizes = {d: self._size(trace, d) for d in batch}
        self.states = list(self._list_states())
        self.z = {name: torch.stack([state[name] for state in self.states]) for name in values}

    def log_joint(self):
        """Log p(x, z) `[C, *batch]`, plate factors and scales left out; differentiable in the parameters."""
        return torch.stack([self._log_joint(self._trace(state)) for state in self.states])

    def solve(self):
        """Log joint, log evidence and posterior weights, detached."""
        with torch.no_grad():
            self.lj = self.log_joint()
        self.log_evidence = torch.logsumexp(self.lj, 0)
        self.weights = torch.softmax(self.lj, 0)
        return self

    def mean(self, values, weights=None):
        """Σ_C w · values, for values `[C, *plates, …]` of which the rightmost `plates` dims are the program's."""
        weights = self.weights if weights is None else weights
        return torch.where(weights > 0, weights * values, 0.0).sum(0)

    def wide_weights(self, plates, extra=0):
        """Weights `[C, *plates, 1…]` for a table whose plate dims are the `plates` rightmost dims of the program."""
        shape = [1] * plates
        for d in self.batch:
            shape[d] = self.sizes[d]
        return self.weights.reshape([len(self.states), *shape] + [1] * extra)

    def expectation(self, f, plates):
        """E[f(z)] where f returns `[C, *plates, …]`."""
        value = f(self.z)
        weights = self.wide_weights(plates, value.dim() - 1 - plates)
        return torch.where(weights > 0, weights * value, 0.0).sum(0)

    def marginal(self, name):
        values = self.values[name]
        first = values[0]
        plates = len(self.shapes[name])
        one_hot = (
            first.dim() > 0 and all(float(v.sum()) == 1 and float(v.max()) == 1 for v in values) and len(values) == len(first)
        )
        bits = first.is_floating_point() and all(bool(((v == 0) | (v == 1)).all()) for v in values)
        if one_hot or (bits and sum(1 for _ in values) == 2 ** first.numel()):
            return self.expectation(lambda z: z[name].to(self.weights.dtype), plates)
        low, high = min(int(v.min()) for v in values), max(int(v.max()) for v in values)
        return self.expectation(
            lambda z: torch.stack([(z[name] == k).to(self.weights.dtype) for k in range(low, high + 1)], -1), plates
        )

    def largest_z(self, draws):
        """The largest |z| of the frequencies of joint states among draws `{site: [n, …]}`, and its Bonferroni bound at 1e-5.

        From exact binomial tails, so that rare states count rightly; a state of probability 0 that was drawn gives inf.
        """
        counts = 0
        n = None
        rows = math.prod(self.sizes.values())
        match = None
        for name, z in draws.items():
            n = z.shape[0]
            equal = z.unsqueeze(1) == self.z[name].unsqueeze(0)  # [n, C, *plates, *event]
            events = self.values[name][0].dim()
            equal = equal.flatten(equal.dim() - events).all(-1) if events else equal
            keep = [equal.dim() + d for d in self.batch]
            others = [d for d in range(2, equal.dim()) if d not in keep]
            equal = equal.permute(0, 1, *keep, *others).reshape(n, len(self.states), rows, -1).all(-1)
            match = equal if match is None else match & equal
        counts = match.sum(0)  # [C, rows]
        assert int(counts.sum()) == n * rows, "a draw is no joint state"
        p = self.weights.reshape(len(self.states), rows)
        k, q = counts.numpy(), p.clamp(0, 1).numpy()
        tail = torch.as_tensor(2 * stats.binom.sf(k - 1, n, q)).minimum(torch.as_tensor(2 * stats.binom.cdf(k, n, q)))
        smallest = float(tail.clamp(max=1).min())
        return stats.norm.isf(smallest / 2), stats.norm.isf(1e-5 / p.numel() / 2)

    def _trace(self, state):
        with pyro.validation_enabled(is_validate=False), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.rng)  # a random subsample is the one that infer met
            return poutine.trace(poutine.condition(self.program, data=state)).get_trace(*self.args)

    def _log_joint(self, trace):
        total = torch.zeros([self.sizes[d] for d in self.batch])
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
                continue
            fn, mask = site["fn"], site["mask"]
            if name in self.values:
                mask = None  # the factor of a latent always integrates to 1
                while isinstance(fn, dist.MaskedDistribution):
                    fn = fn.base_dist
            table = fn.log_prob(site["value"])
            if mask is False:
                continue
            if isinstance(mask, torch.Tensor):
                table = torch.where(mask, table, 0.0)
            table = table.reshape((1,) * (-min(self.batch, default=0) - table.dim()) + tuple(table.shape))
            others = [d for d in range(-table.dim(), 0) if d not in self.batch]
            total = total + (table.sum(others) if others else table)
        return total

    def _list_states(self):
        free = {
            name: [1 if d - len(shape) in self.batch else n for d, n in enumerate(shape)] for name, shape in self.shapes.items()
        }
        spaces = [itertools.product(self.values[name], repeat=math.prod(free[name])) for name in self.values]
        for combination in itertools.product(*spaces):
            yield {
                name: torch.stack(list(elements))
                .reshape(free[name] + list(self.values[name][0].shape))
                .expand(self.shapes[name] + self.values[name][0].shape)
                for name, elements in zip(self.values, combination, strict=True)
            }

    def _size(self, trace, dim):
        return next(
            f.size
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for f in site.get("cond_indep_stack", ())
            if f.dim == dim and f.vectorized
        )


def bits(n=None):
    """Values of one bit, or of a vector of n bits."""
    if n is None:
        return [torch.tensor(0.0), torch.tensor(1.0)]
    return [torch.tensor(v) for v in itertools.product([0.0, 1.0], repeat=n)]


def integers(k, n=None):
    """Values of an integer in [0, k), or of a vector of n of them."""
    if n is None:
        return [torch.tensor(i) for i in range(k)]
    return [torch.tensor(v) for v in itertools.product(range(k), repeat=n)]


def one_hots(k):
    """The k one-hot vectors."""
    return list(torch.eye(k))
