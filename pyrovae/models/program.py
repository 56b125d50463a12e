"""What the programs of this package share: the plate of the data, and the frame of those that decode latents to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from pyrovae.handlers import Module
from pyrovae.handlers.anneal import ScaleLatents
from pyrovae.models.likelihood import Likelihood, make_likelihood
from pyrovae.models.nets import Activation, Centre, named_activation, perceptron, positive, reset, sizes_of


class VAE(Module):
    """p(latents) p(x | latents): a decoder from the code, that is the latents in one row, to the outputs of a likelihood.

    The base of the autoencoders. A subclass draws its latents in `_code`, and gives its encoder in `mirror`.

    Attributes:
        visible: width of the data.
        hidden: hidden sizes from the data to the latents; the decoder has them reversed.
        beta: 0-d buffer, the weight of the latents' log probabilities in the model and in guides of this library, hence of
            the KL; changes in place are seen at the next run. A guide of your own knows nothing of it: with β ≠ 1 wrap it,
            `scale_kl(guide, model.beta)` (:func:`pyrovae.handlers.scale_kl`). Unwrapped, `Trace_ELBO` estimates
            E_q[log p(x|z) + β log p(z) − log q(z)], which is E_q[log p(x|z)] − β KL(q‖p) + (1 − β) H(q) with the entropy H
            of q: neither that of β nor that of 1. `TraceMeanField_ELBO` weighs an analytic KL by the guide alone: by 1.
        centre: buffer `[visible]`, which encoders of `mirror` subtract; 0 until :meth:`initialize_bias`.
        decoder: a net from the code to the outputs.
        likelihood: the distribution of the pixels given the outputs.
    """

    capturable: ClassVar[bool] = True
    beta: Tensor
    centre: Tensor

    def __init__(
        self,
        visible: int,
        code: int,
        hidden: int | Sequence[int],
        *,
        likelihood: str,
        beta: float,
        scale: float,
        levels: int,
        activation: Activation,
        **config: Any,
    ) -> None:
        super().__init__()
        if not 0 <= beta < float("inf"):
            raise ValueError(f"expected a finite beta >= 0, got {beta}")
        self.visible, self.hidden = positive(visible, "visible"), sizes_of(hidden)
        self._activation = named_activation(activation)
        self._config = {"likelihood": likelihood, "beta": float(beta), "scale": float(scale), "levels": levels, **config}
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.register_buffer("centre", torch.zeros(self.visible))
        self.likelihood: Likelihood = make_likelihood(likelihood, scale=scale, levels=levels)
        outputs = visible * self.likelihood.per_pixel
        self.decoder = perceptron([code, *reversed(self.hidden), outputs], self._activation)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON: `type(model)(**model.config)` has the same architecture and the first beta.

        Raises:
            ValueError: for an activation that is not in `torch.nn`.
        """
        name = self._activation.__name__
        if getattr(nn, name, None) is not self._activation:
            raise ValueError(f"expected an activation of torch.nn to write down, got {self._activation}")
        return {"visible": self.visible, "hidden": list(self.hidden), **self._config, "activation": name}

    @property
    def normalized(self) -> bool:
        """Whether p(x | latents) sums or integrates to 1; if not, no bound of this model is one on a log probability."""
        return self.likelihood.normalized

    def reset_parameters(self) -> None:
        """Draw all nets anew, by torch's own rules for a linear layer; beta stays."""
        reset(self)

    @torch.no_grad()
    def initialize_bias(self, x: Tensor) -> None:
        """Set the decoder's last bias so that zero outputs of its last weights mean the average image; and the centre.

        Encoders that :meth:`mirror` makes from then on subtract the average image: call this before the guide is built.

        Bits count as (sum + 1) / (n + 2), levels as (count + 1) / (n + levels): a pixel that never changes gets a finite bias.

        Args:
            x: data `[n, visible]`.

        Raises:
            ValueError: for another shape, or values that are no pixels of the likelihood.
        """
        check_rows(x, self.visible)
        last = self.decoder[-1].bias
        assert isinstance(last, Tensor)
        x = x.to(last)
        self.likelihood.check(x)
        last.copy_(self.likelihood.bias(x))
        self.centre.copy_(x.mean(0))

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
            The pixels `[..., B, visible]`.

        Raises:
            ValueError: if `x` has another width or is empty; while Pyro's validation is on, if its values are no pixels of
                the likelihood, or beta is negative or not finite.
        """
        with data_plate(x, self.visible, batch_size=batch_size, index=index, num_data=num_data):
            if is_validation_enabled():
                check_run(x, self.beta, self.likelihood)
            with ScaleLatents(self.beta):
                code = self._code()
            return pyro.sample("x", self.likelihood(self.decoder(code)), obs=x)

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """Draws from the model, `[n, visible]`.

        Args:
            n: how many.
            mean: give the means of the pixels, given latents from the prior.
        """
        with pyro.poutine.block(), data_plate(None, self.visible, batch_size=n, index=None, num_data=None):
            pixels = self.likelihood(self.decoder(self._code()))
            return pixels.mean if mean else pixels.sample()

    def mirror(self) -> Any:
        """An encoder for `AmortizedMeanField`: the decoder's hidden sizes from the data to the latents, fresh at each call."""
        raise NotImplementedError

    def _code(self) -> Tensor:
        """Sample the latents; they, in one row `[..., B, code]`."""
        raise NotImplementedError

    def _encoder(self, outputs: int) -> nn.Sequential:
        net = perceptron([self.visible, *self.hidden, outputs], self._activation)
        return nn.Sequential(Centre(self.centre), *net).to(self.beta)


def check_run(x: Tensor | None, beta: Tensor, likelihood: Likelihood) -> None:
    """Refuse data that are no pixels of a likelihood, and a weight of the KL that is none.

    Raises:
        ValueError: saying which.
    """
    if not bool((beta >= 0) & (beta < float("inf"))):
        raise ValueError(f"expected a finite beta >= 0, got {float(beta)}; set it with model.beta.fill_(1.0)")
    if x is None:
        return
    if not x.is_floating_point():
        raise ValueError(f"expected floating pixels, got {x.dtype}; convert, and divide bytes by 255")
    likelihood.check(x)


def check_rows(x: Tensor, visible: int) -> None:
    """Refuse data that are no rows of a width.

    Raises:
        ValueError: with the shape.
    """
    if x.dim() != 2 or x.shape[1] != visible or len(x) == 0:
        raise ValueError(f"expected data [n, {visible}] with at least one row, got {list(x.shape)}")


def data_plate(x: Tensor | None, width: int, *, batch_size: int, index: Tensor | None, num_data: int | None) -> pyro.plate:
    """The plate `"data"` at dim −1: as long as `x`, or, with `index`, a subsample of `num_data` rows.

    Args:
        x: data `[B, width]`, or None.
        width: the width that the model was built for.
        batch_size: rows where `x` and `index` are None.
        index: row numbers `[B]` of a minibatch.
        num_data: the number of rows that the minibatch is taken from.

    Raises:
        ValueError: if `x` has another width or no rows, or `index` comes without `num_data`.
    """
    if x is not None and (x.dim() < 2 or x.shape[-1] != width or x.shape[-2] == 0):
        raise ValueError(f"expected data [B, {width}] with at least one row, got {list(x.shape)}; pass rows of {width}")
    if index is None:
        rows = batch_size if x is None else x.shape[-2]
        if rows < 1:
            raise ValueError(f"expected batch_size >= 1, got {rows}")
        return pyro.plate("data", rows, dim=-1)
    if num_data is None or num_data < len(index) or (x is not None and x.shape[-2] != len(index)):
        raise ValueError(
            f"expected index [B] with num_data >= B and x [B, {width}], got {len(index)} indices, num_data={num_data} and "
            f"x {None if x is None else list(x.shape)}"
        )
    return pyro.plate("data", num_data, subsample=index, dim=-1)
