"""p(x | the decoder's outputs): what a pixel is, how many outputs it takes and which values it can have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.distributions.cross_entropy import CrossEntropy
from pyrovae.distributions.grey_levels import GreyLevels, level_of
from pyrovae.models.nets import positive


class Likelihood(nn.Module):
    """Independent pixels, given the outputs of a decoder.

    Attributes:
        per_pixel: outputs of the decoder for each pixel.
        normalized: whether exp(log_prob) sums, or integrates, to 1 over the images.
    """

    capturable: ClassVar[bool] = True
    per_pixel = 1
    normalized = True

    def forward(self, outputs: Tensor) -> Any:
        """The distribution of pixels `[..., visible]` given `outputs [..., visible · per_pixel]`; its `mean` is theirs."""
        raise NotImplementedError

    def bias(self, x: Tensor) -> Tensor:
        """Outputs `[visible · per_pixel]` at which pixels are as in `x [n, visible]` on average; finite for constant ones."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Check data `[..., visible]`.

        Raises:
            ValueError: where they cannot be pixels of this kind.
        """
        raise NotImplementedError


class BernoulliPixels(Likelihood):
    """Pixels in {0, 1}, given their logits."""

    def forward(self, outputs: Tensor) -> Any:
        """See :class:`Likelihood`."""
        return dist.Bernoulli(logits=outputs).to_event(1)

    def bias(self, x: Tensor) -> Tensor:
        """The logit of (sum + 1) / (n + 2)."""
        return torch.logit((x.sum(0) + 1) / (len(x) + 2))

    def check(self, x: Tensor) -> None:
        """Values are 0 or 1."""
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(f"expected pixels in {{0, 1}} for a Bernoulli likelihood, {_got(x, binarize=True)}")


class CrossEntropyPixels(BernoulliPixels):
    """Grey pixels in [0, 1] and their cross-entropy: no likelihood."""

    normalized = False

    def forward(self, outputs: Tensor) -> Any:
        """See :class:`Likelihood`."""
        return CrossEntropy(logits=outputs).to_event(1)

    def check(self, x: Tensor) -> None:
        """Values lie in [0, 1]."""
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError(f"expected pixels in [0, 1] for likelihood='cross_entropy', {_got(x)}")


class NormalPixels(Likelihood):
    """Real pixels, the outputs their means, with one fixed standard deviation for all."""

    scale: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"expected a finite scale > 0 of the pixels, got {scale}")
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, outputs: Tensor) -> Any:
        """See :class:`Likelihood`."""
        return dist.Normal(outputs, self.scale).to_event(1)

    def bias(self, x: Tensor) -> Tensor:
        """The means of the data."""
        return x.mean(0)

    def check(self, x: Tensor) -> None:
        """Values are finite, and do not look like bytes."""
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"expected finite pixels for a Normal likelihood, {_got(x)}")
        if bool(x.max() >= 128) and bool(x.min() >= 0) and bool((x == x.round()).all()):
            raise ValueError(f"expected pixels of order 1 for a Normal likelihood, {_got(x)}")


class LearnedNormalPixels(NormalPixels):
    """Real pixels with one learned variance for all.

    One number: with one a pixel, the likelihood of a pixel that never changes would have no bound.
    """

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.log_variance = nn.Parameter(2 * self.scale.log())

    def reset_parameters(self) -> None:
        """Set the variance to that of the constructor."""
        with torch.no_grad():
            self.log_variance.copy_(2 * self.scale.log())

    def forward(self, outputs: Tensor) -> Any:
        """See :class:`Likelihood`."""
        return dist.Normal(outputs, (0.5 * self.log_variance).exp()).to_event(1)


class CategoricalPixels(Likelihood):
    """Pixels on `levels` equally spaced values from 0 to 1, each value with its own logit."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.per_pixel = positive(levels, "levels", least=2)

    def forward(self, outputs: Tensor) -> Any:
        """See :class:`Likelihood`."""
        return GreyLevels(outputs.reshape((*outputs.shape[:-1], -1, self.per_pixel))).to_event(1)

    def bias(self, x: Tensor) -> Tensor:
        """The logarithm of (count + 1) / (n + levels) of each value."""
        pixel = torch.arange(x.shape[-1], device=x.device) * self.per_pixel
        counts = (pixel + level_of(x, self.per_pixel)).flatten().bincount(minlength=x.shape[-1] * self.per_pixel)
        return ((counts + 1) / (len(x) + self.per_pixel)).log()

    def check(self, x: Tensor) -> None:
        """Values are 0, 1/(levels − 1), …, 1."""
        grid = GreyLevels(x.new_zeros(self.per_pixel), validate_args=False).support
        if not bool(grid.check(x).all()):
            n = self.per_pixel - 1
            raise ValueError(
                f"expected pixels in {{0, 1/{n}, …, 1}} for a categorical likelihood of {n + 1} levels, {_got(x)}, and round "
                f"as in (x * {n}).round() / {n}"
            )


def make_likelihood(name: str, *, scale: float, levels: int) -> Likelihood:
    """The likelihood of a name.

    Args:
        name: "bernoulli", "normal", "normal_learned", "categorical" or "cross_entropy".
        scale: standard deviation of Normal pixels, fixed or at the start.
        levels: number of values of categorical pixels.

    Raises:
        ValueError: for another name, a scale that is not positive, fewer than two levels.
    """
    kinds: dict[str, Callable[[], Likelihood]] = {
        "bernoulli": BernoulliPixels,
        "normal": lambda: NormalPixels(scale),
        "normal_learned": lambda: LearnedNormalPixels(scale),
        "categorical": lambda: CategoricalPixels(levels),
        "cross_entropy": CrossEntropyPixels,
    }
    if name not in kinds:
        raise ValueError(f"expected likelihood to be one of {', '.join(map(repr, kinds))}, got {name!r}")
    return kinds[name]()


def _got(x: Tensor, *, binarize: bool = False) -> str:
    """What is wrong with pixels, and what to do."""
    if bool(x.isnan().any()):
        return f"got NaN in {int(x.isnan().flatten(1).any(1).sum())} of {len(x)} rows; drop or fill these"
    low, high = float(x.min()), float(x.max())
    if high > 1:
        step = f"got values up to {high:g}; divide by 255"
        return f"{step} and binarize, see pyrovae.data.binarize, or use likelihood='cross_entropy'" if binarize else step
    if low < 0:
        return f"got values down to {low:g}; bring them to [0, 1]"
    if not binarize:
        return "got values between these"
    return "got values between 0 and 1; binarize, see pyrovae.data.binarize, or use likelihood='cross_entropy'"
