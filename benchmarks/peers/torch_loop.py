"""The training loop that a careful user writes by hand in PyTorch, eager or under `torch.compile`.

One Adam for all parameters, gradients set to None, no number read from the device. Two losses of the categorical
autoencoder, both with one soft Gumbel-softmax draw a datum, in nats summed over the batch:

- `closed_form`: with the KL of the categories in closed form, as Jang et al. train and as the tutorials do. Cheaper than
  `Trace_ELBO` on relaxed programs: no density of a relaxed draw is computed.
- `densities`: with the difference of the two densities at the draw, which is what `Trace_ELBO` estimates (Maddison et al.).

References:
    Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017)
    https://arxiv.org/abs/1611.01144
    The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
    https://arxiv.org/abs/1611.00712
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gumbel_softmax

from peers.torch_categorical_vae import Autoencoder

__all__ = ["closed_form", "densities", "make_step"]


def closed_form(net: Autoencoder, x: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the pixels at a soft draw plus the KL of the categories."""
    logits = net.logits(x)
    return net.loss(x, gumbel_softmax(logits, tau=temperature), logits) * len(x)


def densities(net: Autoencoder, x: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the pixels at a soft draw plus log q - log p of that draw, both relaxed.

    log q(z) = c + sum_k (a_k - (t + 1) log z_k) - K logsumexp_k(a_k - t log z_k) with logits a at temperature t; the prior
    has a = 0, and what the two share cancels.
    """
    logits = net.logits(x)
    log_z = ((logits - torch.empty_like(logits).exponential_().log()) / temperature).log_softmax(-1)
    p, q = -temperature * log_z, logits - temperature * log_z
    kl = logits.sum() + net.categories * (p.logsumexp(-1) - q.logsumexp(-1)).sum()
    return binary_cross_entropy_with_logits(net.decoder(log_z.exp().flatten(1)), x, reduction="sum") + kl


def make_step(
    net: nn.Module, loss: Callable[[Tensor], Tensor], *, lr: float, fused: bool = False, compiled: bool = False
) -> Callable[[Tensor], Tensor]:
    """A function that takes one gradient step on a batch and returns its loss, unread.

    Args:
        net: whose parameters move.
        loss: of a batch, by those parameters.
        lr: of Adam.
        fused: Adam in one kernel; the default is the plain one on the CPU and a kernel a group of tensors on a GPU.
        compiled: the loss under `torch.compile`, on a GPU with `mode="reduce-overhead"`, that is as a CUDA graph.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True if fused else None)
    if compiled:
        on_gpu = next(net.parameters()).is_cuda
        loss = torch.compile(loss, mode="reduce-overhead" if on_gpu else "default")

    def step(x: Tensor) -> Tensor:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        value = loss(x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return step
