"""Gibbs sampling of a one-layer net of hidden bits by NumPyro's `DiscreteGibbs`, as fast as it could be made.

`DiscreteGibbs` (NumPyro 0.22 or later) updates one bit at a time, in a random order, each by evaluating the whole log
joint of the program. On a program over all data that is N times too much work for one bit of one datum; so the program
here is that of one datum, and the kernel's step is put under `jax.vmap` over the data and again over the chains. A
`fori_loop` over the sweeps is compiled as one function. Float64 is switched on within the call only.

What is left to choose is how the program writes its likelihood, see `datum_sweeps_per_second`. Of JAX's generators the
default one (threefry) was the fastest, and of the kernel's proposals its default (the exact conditional).

XLA settles its number of threads when JAX starts: the processors that the process may use, or `NPROC` in the
environment. One thread was faster than two on this job.

References:
    Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro (Phan et al., 2019)
    https://arxiv.org/abs/1912.11554
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpy.typing import ArrayLike, NDArray
from numpyro.infer.gibbs import DiscreteGibbs

__all__ = ["Likelihood", "datum_sweeps_per_second"]

Likelihood: TypeAlias = Literal["bernoulli", "softplus", "code_table", "joint_table"]


def datum_sweeps_per_second(
    weight: ArrayLike,
    bias: ArrayLike,
    prior: ArrayLike,
    x: ArrayLike,
    num_chains: int,
    num_sweeps: int,
    *,
    likelihood: Likelihood = "joint_table",
    num_runs: int = 5,
    seed: int = 0,
) -> tuple[float, NDArray[np.float64]]:
    """Time Gibbs sweeps on h ~ Bernoulli(logits=prior), x ~ Bernoulli(logits=bias + h W).

    One datum-sweep: every bit of one datum updated once in one chain. The first run of `num_sweeps` sweeps compiles,
    serves as burn-in, and is neither timed nor counted, nor is the making of a table; then `num_runs` runs of
    `num_sweeps` sweeps are timed and the median is taken. The chains start at draws from the prior.

    The four spellings of the likelihood have the same law, and with one seed the same draws but for rounding:

    - `"bernoulli"`: the program as anyone would write it, a `Bernoulli(logits)` observed. O(H D) a bit.
    - `"softplus"`: a factor with the softplus spelt so that XLA computes it fast. O(H D) a bit.
    - `"code_table"`: a factor x.b + h.(W x) - A(h), with the A of all `2**H` codes computed before. O(H) a bit.
    - `"joint_table"`: log p(x | h) of all `2**H` codes and all data computed before. O(1) a bit, 8 * 2^H * N bytes.

    Args:
        weight: Weights from hidden to visible, `[H, D]`.
        bias: Bias of the visibles, `[D]`.
        prior: Logits of the hidden bits, `[H]`.
        x: Data in {0, 1}, `[N, D]`.
        num_chains: Chains of every datum, all advanced together.
        num_sweeps: Sweeps of one run.
        likelihood: How the program evaluates log p(x | h), see above.
        num_runs: Timed runs.
        seed: Seed of the draws.

    Returns:
        The rate in datum-sweeps per second, `num_chains * N * num_sweeps` by the median seconds of a run, and the
        estimate of E[h | x] `[N, H]`, the mean over all chains and all sweeps of the timed runs.

    Raises:
        ValueError: If `likelihood` is none of the four.
    """
    with jax.enable_x64(True):  # noqa: FBT003
        model, rows = _program(*(jnp.asarray(np.asarray(a), jnp.float64) for a in (weight, bias, prior, x)), likelihood)
        num_data, num_hidden = len(rows), len(np.asarray(prior))
        kernel = DiscreteGibbs(model)
        keys = jax.random.split(jax.random.key(seed), (num_chains, num_data))
        states = jax.jit(_over_chains_and_data(lambda key, row: kernel.init(key, 0, None, (row,), {})))(keys, rows)
        kernel.init(keys[0, 0], 0, None, (rows[0],), {})  # else the kernel keeps tracers of the line above
        sweep = _over_chains_and_data(lambda state, row: kernel.sample(state, (row,), {}))

        @jax.jit
        def run(states: Any) -> tuple[Any, jax.Array]:
            def body(_: int, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
                states, total = carry
                states = sweep(states, rows)
                return states, total + states.z["h"].sum(0)

            return jax.lax.fori_loop(0, num_sweeps, body, (states, jnp.zeros((num_data, num_hidden))))

        states, _ = jax.block_until_ready(run(states))
        seconds, total = [], np.zeros((num_data, num_hidden))
        for _ in range(num_runs):
            start = time.perf_counter()
            states, bits = jax.block_until_ready(run(states))
            seconds.append(time.perf_counter() - start)
            total += np.asarray(bits)
    rate = num_chains * num_data * num_sweeps / statistics.median(seconds)
    return rate, total / (num_runs * num_sweeps * num_chains)


def _over_chains_and_data(function: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function of (state, row of one datum) over states `[C, N]` and rows `[N]`."""
    return jax.vmap(jax.vmap(function), in_axes=(0, None))


def _program(
    weight: jax.Array, bias: jax.Array, prior: jax.Array, x: jax.Array, likelihood: Likelihood
) -> tuple[Callable[[jax.Array], None], jax.Array]:
    """The program of one datum, and the rows `[N, ...]` whose n-th is its argument for datum n."""
    if likelihood not in get_args(Likelihood):
        raise ValueError(f"expected likelihood to be one of {get_args(Likelihood)}, got {likelihood!r}")
    num_hidden = len(prior)
    place = 2 ** jnp.arange(num_hidden)
    rows, code_table = x, jnp.zeros(0)
    if likelihood in ("code_table", "joint_table"):
        codes = (jnp.arange(2**num_hidden)[:, None] // place) % 2  # [2^H, H]
        mean = bias + codes @ weight  # [2^H, D]
        code_table = jnp.logaddexp(mean, 0.0).sum(-1)  # A(h), [2^H]
        if likelihood == "joint_table":
            rows = x @ mean.T - code_table  # log p(x | h), [N, 2^H]

    def model(row: jax.Array) -> None:
        with numpyro.plate("bits", num_hidden):  # not `to_event`: an `Independent` cannot be enumerated in NumPyro
            h = numpyro.sample("h", dist.Bernoulli(logits=prior))
        if likelihood == "bernoulli":
            numpyro.sample("x", dist.Bernoulli(logits=bias + h @ weight).to_event(1), obs=row)
        elif likelihood == "softplus":
            mean = bias + h @ weight
            softplus = jnp.maximum(mean, 0.0) + jnp.log(1.0 + jnp.exp(-jnp.abs(mean)))  # faster than logaddexp, log1p
            numpyro.factor("x", row @ mean - softplus.sum())
        elif likelihood == "code_table":
            numpyro.factor("x", row @ bias + h @ (weight @ row) - code_table[h @ place])
        else:
            numpyro.factor("x", row[h @ place])

    return model, rows
