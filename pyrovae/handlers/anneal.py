"""The weight of the KL divergence, for warm-up and for beta-VAEs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.handlers.rewrite import RewrittenProgram, is_latent


def scale_kl(program: Callable[..., Any], beta: float | Tensor) -> RewrittenProgram:
    """A model or guide with the log probability of every latent multiplied by `beta`.

    With model and guide both wrapped, an ELBO becomes E_q[log p(x|z)] − beta·KL(q‖p), also under `TraceMeanField_ELBO`.
    Build guides for the bare model, not for the wrapped one. With the model alone wrapped, `Trace_ELBO` leaves the entropy of
    q at weight 1: β E_q[log p(z)] + H(q) in the place of −β·KL.

    Bias: with beta < 1 the objective is no lower bound on log p(x), with beta > 1 a looser one; report beta = 1.
    Cost: that of the program.

    Args:
        program: a Pyro program; also a guide.
        beta: 0 or more; a float, or a 0-d tensor that is read at every run, so that a schedule may change it in place.

    Returns:
        A callable with the program's arguments and the attribute `program`.

    Raises:
        ValueError: if beta is negative, not finite, or has dims.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> model = lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> trace = pyro.poutine.trace(scale_kl(model, 0.5)).get_trace()
        >>> float(trace.nodes["z"]["scale"])
        0.5

    References:
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Higgins et al., 2017)
        https://openreview.net/forum?id=Sy2fzU9gl
    """
    if isinstance(beta, Tensor) and beta.dim():
        raise ValueError(f"expected beta as a float or a 0-d tensor, got a tensor of shape {tuple(beta.shape)}")
    if not (math.isfinite(float(beta)) and float(beta) >= 0):
        raise ValueError(f"expected a finite beta of 0 or more, got {float(beta):g}; 1 is the ELBO")
    return RewrittenProgram(program, _Weight(beta))


class _Weight:
    def __init__(self, beta: float | Tensor) -> None:
        self.beta = beta

    def handler(self) -> Messenger:
        return ScaleLatents(self.beta)


class ScaleLatents(Messenger):
    """Multiplies the log probabilities of latents, as `poutine.scale` does those of all sites; 0 is allowed."""

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_latent(msg):
            msg["scale"] = msg["scale"] * self.beta
