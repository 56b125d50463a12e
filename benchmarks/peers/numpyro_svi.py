"""The two autoencoders under NumPyro's `SVI`, its `update` compiled by `jax.jit`, the state carried and given away.

The same nets, written as plain matrices (stax and flax would compile to the same), ReLU between layers, Bernoulli pixels,
`Trace_ELBO` with one particle, Adam, float32. NumPyro has no relaxed one-hot distribution: `Concrete` is one, with the draw
by `jax.random.gumbel` and the density of Maddison et al. XLA settles its number of threads when JAX starts: the processors
that the process may use, or `NPROC` in the environment.

References:
    Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro (Phan et al., 2019)
    https://arxiv.org/abs/1912.11554
    The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
    https://arxiv.org/abs/1611.00712
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpy.typing import NDArray
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

__all__ = ["Concrete", "Training"]

Layers = Sequence[tuple[NDArray[Any], NDArray[Any]]]
TINY = 1e-31


class Concrete(dist.Distribution):
    """A relaxed one-hot vector of the last dim, at one temperature."""

    arg_constraints: ClassVar = {"logits": constraints.real_vector}
    support = constraints.simplex
    reparametrized_params: ClassVar = ["logits"]

    def __init__(self, temperature: float, logits: jax.Array) -> None:
        self.temperature, self.logits = temperature, logits
        super().__init__(logits.shape[:-1], logits.shape[-1:])

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Values `[*sample_shape, *batch_shape, K]`."""
        noise = jax.random.gumbel(key, sample_shape + self.batch_shape + self.event_shape)
        return jax.nn.softmax((self.logits + noise) / self.temperature).clip(TINY)

    def log_prob(self, value: jax.Array) -> jax.Array:
        """The log density `[...]` of values `[..., K]`."""
        (k,), t, log_v = self.event_shape, self.temperature, jnp.log(value)
        score = self.logits - t * log_v
        constant = math.lgamma(k) + (k - 1) * math.log(t)
        return constant + (score - log_v).sum(-1) - k * jax.nn.logsumexp(score, -1)


class Training:
    """A run of SVI on an autoencoder.

    Args:
        encoder: weights `[out, in]` and biases `[out]` of its layers, as PyTorch has them.
        decoder: those of the decoder.
        x: a first batch `[B, visible]`.
        latent: shape of the latents: `[latent]`, or `[latents, categories]` for one-hot ones.
        temperature: of the one-hot ones.
        lr: of Adam.
        seed: of the draws.
    """

    def __init__(
        self,
        encoder: Layers,
        decoder: Layers,
        x: jax.Array,
        *,
        latent: tuple[int, ...],
        temperature: float | None = None,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        def draw(logits_or_loc: jax.Array, log_scale: jax.Array) -> jax.Array:
            if temperature is None:
                return numpyro.sample("z", dist.Normal(logits_or_loc, jnp.exp(log_scale)).to_event(1))
            return numpyro.sample("z", Concrete(temperature, logits_or_loc.reshape(-1, *latent)).to_event(1))

        def model(x: jax.Array) -> None:
            net, zero = _net("decoder", decoder), jnp.zeros((len(x), math.prod(latent)))
            with numpyro.plate("data", len(x), dim=-1):
                z = draw(zero, zero)
                numpyro.sample("x", dist.Bernoulli(logits=net(z.reshape(len(x), -1))).to_event(1), obs=x)

        def guide(x: jax.Array) -> None:
            net = _net("encoder", encoder)
            with numpyro.plate("data", len(x), dim=-1):
                outputs = net(x)
                draw(outputs if temperature is not None else outputs[:, : latent[0]], outputs[:, latent[0] :])

        svi = SVI(model, guide, numpyro.optim.Adam(lr), Trace_ELBO())
        self.state = svi.init(jax.random.key(seed), x)
        self._update = jax.jit(svi.update, donate_argnums=0)

    def step(self, x: jax.Array) -> jax.Array:
        """One gradient step; its loss, not yet computed perhaps."""
        self.state, loss = self._update(self.state, x)
        return loss

    def finish(self) -> None:
        """Return when all steps are done."""
        jax.block_until_ready(self.state)


def _net(name: str, layers: Layers) -> Callable[[jax.Array], jax.Array]:
    """A perceptron whose matrices are parameters of the program."""
    own = [
        (numpyro.param(f"{name}.{i}.weight", jnp.asarray(w.T)), numpyro.param(f"{name}.{i}.bias", jnp.asarray(b)))
        for i, (w, b) in enumerate(layers)
    ]

    def run(x: jax.Array) -> jax.Array:
        for i, (w, b) in enumerate(own):
            x = (jax.nn.relu(x) if i else x) @ w + b
        return x

    return run
