"""A program whose undirected distribution has a log Z from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers.rewrite import innermost, rewrap


class WithLogPartition:
    """A program with a given log Z; see :func:`with_log_partition`."""

    def __init__(self, program: Callable[..., Any], log_partition: float | Tensor, site: str | None) -> None:
        self.program, self.log_partition, self.site = program, log_partition, site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        with _Give(self.log_partition, self.site) as giver:
            result = self.program(*args, **kwargs)
        if len(giver.sites) != 1:
            raise ValueError(
                f"expected a program with exactly one site drawn from an RBM or BoltzmannMachine, got {giver.sites or 'none'}; "
                "there is one log Z to give: name its site by site="
            )
        return result


def with_log_partition(program: Callable[..., Any], log_partition: float | Tensor, site: str | None = None) -> WithLogPartition:
    """Let the RBM or Boltzmann machine that a program draws from score with a given log Z.

    So that what needs a probability takes a program whose log Z cannot be enumerated. What comes out is as good as that log Z:
    one of :class:`pyrovae.inference.AIS` is too small in expectation, so that log p(x) and bounds of it come out too large.
    It holds at the present parameters only, and the program then says nothing of its structure to fast routes.

    Args:
        program: a Pyro program with exactly one site drawn from :class:`pyrovae.distributions.RBM` or `BoltzmannMachine`.
        log_partition: log Z.
        site: the site that it belongs to, where there are several.

    Returns:
        A program with the same arguments.

    Example:
        >>> import torch
        >>> from pyrovae.inference import AIS, Variational
        >>> from pyrovae.guides import AmortizedStructured
        >>> from pyrovae.models import DeepBeliefNet
        >>> net = DeepBeliefNet(5, [4, 3], max_bits=2)  # a small one that is not enumerated
        >>> x = (torch.rand(6, 5) < 0.5).to(net.top_bias)
        >>> log_z = AIS(num_chains=50, num_temperatures=100).log_partition(net).log_z
        >>> posterior = Variational(AmortizedStructured(net)).infer(with_log_partition(net, log_z), x)
        >>> tuple(posterior.log_evidence.shape)
        (6,)
    """
    return WithLogPartition(program, log_partition, site)


class _Give(Messenger):
    def __init__(self, log_partition: float | Tensor, site: str | None) -> None:
        super().__init__()
        self.log_partition, self.site = log_partition, site
        self.sites: list[str] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(innermost(msg["fn"]), Undirected) and self.site in (None, msg["name"]):
            self.sites.append(msg["name"])
            msg["fn"] = rewrap(msg["fn"], lambda fn: fn.with_log_partition(self.log_partition))
