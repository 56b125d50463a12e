"""Mixtures of products of Bernoullis."""

from __future__ import annotations

from pyrovae.models.components import BernoulliComponents
from pyrovae.models.mixture import Mixture, check_sizes


class BernoulliMixture(Mixture):
    """z ~ Cat(π), x_d ~ Bern(μ_zd): latent classes of binary data.

    Its likelihood is a sum over K components, so `Exact` is exact at O(B K D), and EM has closed forms (`m_step`). Means are
    kept off 0 and 1 by the precision of their dtype; a component that loses all rows keeps its means, with a weight of
    almost 0. Call :meth:`initialize` with the data first: components that start alike stay alike.

    Args:
        visible: number of binary variables D.
        components: number of components K.
        concentration: of the symmetric Dirichlet prior on π; 1 is flat.
        pixel_concentration: a of the Beta(a, a) prior on every mean; 1 is flat, so that EM is maximum likelihood, under which
            a pixel that is constant within a component makes the other value impossible in effect; 2 is Laplace's rule
            (n + 1) / (N + 2), the better choice for held-out data.

    Raises:
        ValueError: for sizes or concentrations below 1.

    Example:
        >>> model = BernoulliMixture(4, 2)
        >>> tuple(model.sample(5).shape)
        (5, 4)

    References:
        Pattern Recognition and Machine Learning, section 9.3.3 (Bishop, 2006)
        https://www.microsoft.com/en-us/research/people/cmbishop/prml-book/
    """

    def __init__(self, visible: int, components: int, *, concentration: float = 1.0, pixel_concentration: float = 1.0) -> None:
        check_sizes(visible, components)
        parts = BernoulliComponents(components, visible, pixel_concentration)
        super().__init__(components, parts, concentration=concentration, pixel_concentration=parts.concentration)
