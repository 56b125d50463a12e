"""What the mixtures share: a categorical latent, then a component; EM in closed form."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from pyrovae.handlers import Module, own_params
from pyrovae.models.components import Components, at_least_one, k_means, log_dirichlet, log_proportions
from pyrovae.models.program import check_rows, data_plate


class Mixture(Module):
    """p(x) = Σ_k π_k p(x | z = k). The base of the mixtures.

    Sites: `"z"`, a component's number, and `"x"`, in the plate `"data"` at dim −1.

    Attributes:
        weights: logits of π, `[K]`.
        components: p(x | z = k).
    """

    capturable: ClassVar[bool] = True

    def __init__(self, components: int, parts: Components, *, concentration: float, **config: Any) -> None:
        super().__init__()
        self.concentration = at_least_one(concentration, "concentration")
        self.weights = nn.Parameter(torch.empty(components))
        self.components = parts
        self._config = {"visible": parts.width, "components": components, "concentration": self.concentration, **config}
        self.reset_parameters()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON."""
        return dict(self._config)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make π uniform and draw the components anew."""
        self.weights.zero_()
        self.components.reset_parameters()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start from k-means clusters of the data, softened; seeded by torch.

        Args:
            x: data `[n, visible]`.

        Raises:
            ValueError: for another shape, values that no component can have, or fewer rows than components.
        """
        check_rows(x, self.components.width)
        self.components.check(x)
        self._set(k_means(x, len(self.weights)), x)

    initialize_bias = initialize

    def forward(
        self,
        x: Tensor | None = None,
        *,
        batch_size: int = 1,
        index: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """Run the program.

        Args:
            x: data `[B, visible]`; None draws from the prior.
            batch_size: rows to draw where `x` is None.
            index: row numbers `[B]` of a minibatch in the data set.
            num_data: the size of that data set.

        Returns:
            The observation `[..., B, visible]`.

        Raises:
            ValueError: if `x` has another width, or is empty.
        """
        with data_plate(x, self.components.width, batch_size=batch_size, index=index, num_data=num_data):
            z = pyro.sample("z", dist.Categorical(logits=self.weights))
            return pyro.sample("x", self.components.at(z), obs=x)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """`n` draws from the model, `[n, visible]`."""
        with pyro.poutine.block():
            return own_params(self)(batch_size=n)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log p(x) `[B]`, exact, differentiable; O(B K visible), times visible with full covariances.

        Args:
            x: data `[B, visible]`.

        Raises:
            ValueError: for another shape; where Pyro's validation is on, for values that no component can have.
        """
        check_rows(x, self.components.width)
        if is_validation_enabled():
            self.components.check(x)
        return torch.logsumexp(torch.log_softmax(self.weights, -1) + self.components.log_likelihood(x), -1)

    def m_step(self, posterior: Any, x: Tensor) -> None:
        """Set the parameters to their maximisers of E_q[log p(x, z)] + log prior.

        Args:
            posterior: needs `marginals["z"]`, `[B, K]`.
            x: data `[B, visible]`.
        """
        self._set(posterior.marginals["z"].double(), x)

    def log_prior(self) -> Tensor:
        """Log density of the priors of weights and components, up to a constant; 0-d."""
        return log_dirichlet(self.weights, self.concentration) + self.components.log_prior()

    @torch.no_grad()
    def _set(self, responsibilities: Tensor, x: Tensor) -> None:
        self.weights.copy_(log_proportions(responsibilities.sum(0), self.concentration, self.weights))
        self.components.m_step(responsibilities, x)


def check_sizes(visible: int, components: int) -> None:
    """Refuse sizes below 1.

    Raises:
        ValueError: with the sizes.
    """
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in (visible, components)):
        raise ValueError(f"expected visible >= 1 and components >= 1, got {visible} and {components}")
