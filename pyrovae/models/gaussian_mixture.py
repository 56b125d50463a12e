"""Mixtures of Gaussians."""

from __future__ import annotations

from pyrovae.models.gaussian_components import Covariance, GaussianComponents
from pyrovae.models.mixture import Mixture, check_sizes


class GaussianMixture(Mixture):
    """z ~ Cat(π), x ~ N(μ_z, Σ_z).

    Its likelihood is a sum over K components, so `Exact` is exact, at O(B K D²) for full covariances, and EM has closed forms
    (`m_step`). The likelihood alone has no maximum, for a component may shrink onto one row: the default prior counts as one
    more row at each component's mean, with variance 0.01. Give a `prior_variance` small beside the variances of your data.

    Args:
        visible: width D of the data.
        components: number of components K.
        covariance: "full", "diagonal" or "spherical".
        concentration: of the symmetric Dirichlet prior on π; 1 is flat.
        prior_count: rows that the prior of a covariance counts for, ν; 0 is maximum likelihood, with variances kept above
            the precision of the dtype, and a warning where one reaches it.
        prior_variance: their variance s²: Σ = (scatter + ν s² I) / (N + ν).

    Raises:
        ValueError: for sizes below 1, a concentration below 1, an unknown covariance or negative numbers.

    Example:
        >>> model = GaussianMixture(2, 3, "diagonal")
        >>> tuple(model.sample(5).shape)
        (5, 2)

    References:
        Pattern Recognition and Machine Learning, section 9.2 (Bishop, 2006)
        https://www.microsoft.com/en-us/research/people/cmbishop/prml-book/
        Bayesian Regularization for Normal Mixture Estimation and Model-Based Clustering (Fraley and Raftery, 2007)
        https://doi.org/10.1007/s00357-007-0004-5
    """

    def __init__(
        self,
        visible: int,
        components: int,
        covariance: Covariance = "full",
        *,
        concentration: float = 1.0,
        prior_count: float = 1.0,
        prior_variance: float = 0.01,
    ) -> None:
        check_sizes(visible, components)
        parts = GaussianComponents(components, visible, covariance, prior_count, prior_variance)
        super().__init__(
            components,
            parts,
            concentration=concentration,
            covariance=covariance,
            prior_count=parts.prior_count,
            prior_variance=parts.prior_variance,
        )
