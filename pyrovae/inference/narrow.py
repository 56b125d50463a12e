"""What merely repeats along the particles: a guide's parameters, computed from the data once, are told and drawn from once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.handlers.rewrite import innermost, is_latent

_PARAMETERS: dict[type, tuple[str, ...]] = {
    dist.Normal: ("loc", "scale"),
    dist.Bernoulli: ("logits", "probs"),
    dist.Categorical: ("logits", "probs"),
    dist.OneHotCategorical: ("logits", "probs"),
}


def narrow(*fns: Any) -> tuple[Any, ...]:
    """Distributions of size 1 along their first dim, where none of them varies there; else as they are.

    Args:
        *fns: bare distributions, of which the one with the most batch dims has one of particles first; those with fewer do
            not vary.
    """
    depth = max(len(fn.batch_shape) for fn in fns)
    found = []
    for fn in fns:
        if len(fn.batch_shape) < depth or fn.batch_shape[:1] in ((), (1,)):
            found.append(fn)
            continue
        source = getattr(fn, "_categorical", fn).__dict__
        own = {name: source[name] for name in _PARAMETERS.get(type(fn), ()) if name in source}
        still = {name: value[:1] for name, value in own.items() if value.stride(0) == 0}
        if not still or (isinstance(fn, dist.Normal) and len(still) < 2):
            return fns
        if not isinstance(fn, dist.Normal):
            still = dict(list(still.items())[:1])
        found.append(type(fn)(**still, validate_args=False))
    return tuple(found)


class NarrowDraws:
    """A program whose latent bits and categories are drawn by one uniform number each, from probabilities computed once.

    Draws have the distribution of the program's own; Pyro's would first expand the probabilities to every particle.
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        self.program = program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        with _Draws():
            return self.program(*args, **kwargs)


class _Draws(Messenger):
    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not is_latent(msg) or msg["done"] or msg["value"] is not None:
            return
        value = _drawn(innermost(msg["fn"]), msg["fn"].batch_shape + msg["fn"].event_shape)
        if value is not None:
            msg["value"], msg["done"] = value, True


def _drawn(fn: Any, shape: torch.Size) -> Tensor | None:
    """A draw of shape `shape`; None of another family than those whose parameters :func:`narrow` knows, and of Normals."""
    if type(fn) not in _PARAMETERS or isinstance(fn, dist.Normal):
        return None
    (thin,) = narrow(fn)
    probs: Tensor = getattr(thin, "_categorical", thin).probs
    if isinstance(fn, dist.Bernoulli):
        return (torch.rand(shape, dtype=probs.dtype, device=probs.device) < probs).to(probs.dtype)
    lead = shape if isinstance(fn, dist.Categorical) else shape[:-1]
    total = probs.cumsum(-1)
    total = (total / total[..., -1:])[..., :-1]  # 1 from the last possible category on: an impossible one is never drawn
    above = torch.rand((*lead, 1), dtype=probs.dtype, device=probs.device) >= total
    if isinstance(fn, dist.Categorical):
        return above.sum(-1)
    first = torch.ones((*lead, 1), dtype=torch.bool, device=probs.device)
    return (torch.cat((first, above), -1) & ~torch.cat((above, ~first), -1)).to(probs.dtype)
