"""DRAW: an image painted in T steps, each driven by a Normal latent of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from pyrovae.handlers import Module
from pyrovae.handlers.anneal import ScaleLatents
from pyrovae.models.likelihood import Likelihood, make_likelihood
from pyrovae.models.nets import positive
from pyrovae.models.program import check_rows, check_run, data_plate
from pyrovae.ops.attention import RAW, attention_window
from pyrovae.ops.lstm import lstm_step

PIXELS = ("bernoulli", "cross_entropy")


class DRAW(Module):
    """A recurrent net that paints on a canvas, and a Bernoulli pixel for every number on it.

    z_t ~ N(0, I),   h_t = LSTM(z_t, h_{t−1}),   c_t = c_{t−1} + write(h_t),   x ~ Bern(σ(c_T)),   t = 1, …, T.

    Sites: `"z_1"`, …, `"z_T"` and `"x"`, in the plate `"data"` at dim −1. c_0 and the LSTM's first state are learned. Without
    attention, `write` is a linear map; with it, a patch of N×N numbers placed by a grid of Gaussian filters. The guide of
    the paper is :class:`pyrovae.guides.DRAWGuide`. Cost a row: T·4·hidden·(latent + hidden) multiplications for the LSTM,
    and hidden·visible for the canvas, which is painted in one product (T of them with attention).

    Args:
        visible: number of pixels; with attention a square number, the images being square.
        latent: components of each z_t.
        hidden: width of the LSTM.
        steps: T.
        attention: None, or (N of read, N of write). The model itself writes; the guide reads.
        likelihood: `"bernoulli"`, or `"cross_entropy"` for grey pixels in [0, 1], which is no density (`normalized` False).
        beta: weight >= 0 of the latents' log probabilities in model and guide, hence of the KL; 1 is the bound on log p(x).

    Attributes:
        beta: a 0-d buffer; changes in place are seen.
        decoder: the LSTM and the write operation; see `decoder.start`, `decoder.step` and `decoder.decode`.

    Raises:
        ValueError: for sizes below 1, a `visible` that is no square number with attention, an unknown likelihood, beta < 0.

    Example:
        >>> model = DRAW(16, 2, 8, 3, attention=(2, 2))
        >>> tuple(model.sample(5).shape)
        (5, 16)

    References:
        DRAW: A Recurrent Neural Network For Image Generation (Gregor, Danihelka, Graves, Rezende, Wierstra, 2015)
        https://arxiv.org/abs/1502.04623
    """

    capturable: ClassVar[bool] = True
    beta: Tensor

    def __init__(
        self,
        visible: int = 784,
        latent: int = 100,
        hidden: int = 256,
        steps: int = 10,
        *,
        attention: tuple[int, int] | None = None,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"visible": visible, "latent": latent, "hidden": hidden, "steps": steps}
        self.visible, self.latent, self.hidden, self.steps = (positive(size, name) for name, size in sizes.items())
        self.attention = None if attention is None else _window_sizes(attention, visible)
        if likelihood not in PIXELS:
            raise ValueError(f"expected likelihood to be one of {', '.join(map(repr, PIXELS))}, got {likelihood!r}")
        if not 0 <= beta < math.inf:
            raise ValueError(f"expected a finite beta >= 0, got {beta}")
        self._config = {**sizes, "attention": attention and list(attention), "likelihood": likelihood, "beta": float(beta)}
        self.likelihood: Likelihood = make_likelihood(likelihood, scale=1.0, levels=2)
        self.decoder = Decoder(visible, latent, hidden, None if self.attention is None else self.attention[1])
        self.register_buffer("beta", torch.tensor(float(beta)))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON: `DRAW(**model.config)` has the same architecture and the first beta."""
        return dict(self._config)

    @property
    def normalized(self) -> bool:
        """Whether p(x | latents) sums to 1 over the images; if not, no bound of this model is one on a log probability."""
        return self.likelihood.normalized

    @property
    def latents(self) -> tuple[str, ...]:
        """The sites' names, in order."""
        return tuple(f"z_{step}" for step in range(1, self.steps + 1))

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.decoder.reset_parameters()

    @torch.no_grad()
    def initialize_bias(self, x: Tensor) -> None:
        """Set the empty canvas so that strokes of zero weights leave the average image, that of (sum + 1) / (n + 2).

        Args:
            x: data `[n, visible]`.

        Raises:
            ValueError: for another shape, or values that are no pixels of the likelihood.
        """
        check_rows(x, self.visible)
        decoder = self.decoder
        x = x.to(decoder.canvas)
        self.likelihood.check(x)
        decoder.canvas.copy_(self.likelihood.bias(x))
        if decoder.attend is None:
            decoder.canvas.sub_(self.steps * decoder.write.bias)

    def plate(
        self, x: Tensor | None, *, batch_size: int = 1, index: Tensor | None = None, num_data: int | None = None
    ) -> pyro.plate:
        """The plate `"data"` that a call with these arguments has; for guides."""
        return data_plate(x, self.visible, batch_size=batch_size, index=index, num_data=num_data)

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
        decoder = self.decoder
        zeros = decoder.canvas.new_zeros(self.latent)
        with self.plate(x, batch_size=batch_size, index=index, num_data=num_data):
            if is_validation_enabled():
                check_run(x, self.beta, self.likelihood)
            with ScaleLatents(self.beta):
                prior = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
                latents = [pyro.sample(name, prior) for name in self.latents]
            return pyro.sample("x", self.likelihood(decoder.decode(latents)), obs=x)

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """Draws from the model, `[n, visible]`.

        Args:
            n: how many.
            mean: give the means of the pixels, given latents from the prior.
        """
        noise = torch.randn(self.steps, positive(n, "n"), self.latent).to(self.decoder.canvas)
        pixels = self.likelihood(self.decoder.decode(noise.unbind()))
        return pixels.mean if mean else pixels.sample()


class DRAWState(NamedTuple):
    """What the decoder knows between two steps; without a batch's dims before the first latent.

    Attributes:
        canvas: logits of the pixels so far, `[..., visible]`.
        hidden: output of the LSTM, `[..., hidden]`.
        cell: its memory, `[..., hidden]`.
    """

    canvas: Tensor
    hidden: Tensor
    cell: Tensor


class Decoder(nn.Module):
    """The decoder's LSTM and its write operation; the first state is learned."""

    capturable: ClassVar[bool] = True

    def __init__(self, visible: int, latent: int, hidden: int, count: int | None) -> None:
        super().__init__()
        self.count = count
        self.side = math.isqrt(visible)
        self.gates = nn.utils.skip_init(nn.Linear, latent + hidden, 4 * hidden)
        self.write = nn.utils.skip_init(nn.Linear, hidden, visible if count is None else count**2)
        self.attend = None if count is None else nn.utils.skip_init(nn.Linear, hidden, RAW)
        self.canvas = nn.Parameter(torch.empty(visible))
        self.hidden = nn.Parameter(torch.empty(hidden))
        self.cell = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform within ±1/√hidden; biases of the forget gates 1 higher."""
        width = self.hidden.shape[0]
        for parameter in self.parameters():
            parameter.uniform_(-(width**-0.5), width**-0.5)
        self.gates.bias[:width] += 1.0

    def start(self) -> DRAWState:
        """The state before the first step."""
        return DRAWState(self.canvas, self.hidden, self.cell)

    def step(self, state: DRAWState, z: Tensor) -> DRAWState:
        """One step: the LSTM takes `z [..., latent]`, and its output is drawn onto the canvas."""
        hidden, cell = lstm_step(self.gates, [z], state.hidden, state.cell)
        return DRAWState(state.canvas + self.stroke(hidden), hidden, cell)

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """The canvas `[..., visible]` after the steps of `latents`; all of it is drawn at the end, in fewer products."""
        canvas, hidden, cell = self.start()
        outputs = []
        for z in latents:
            hidden, cell = lstm_step(self.gates, [z], hidden, cell)
            outputs.append(hidden)
        if self.attend is not None:
            return canvas + self.stroke(torch.stack(torch.broadcast_tensors(*outputs))).sum(0)
        total = torch.stack(torch.broadcast_tensors(*outputs)).sum(0)
        return canvas + F.linear(total, self.write.weight).to(canvas) + len(outputs) * self.write.bias

    def stroke(self, hidden: Tensor) -> Tensor:
        """What an output `[..., hidden]` of the LSTM adds to the canvas, `[..., visible]`."""
        drawn = self.write(hidden).to(hidden)
        if self.attend is None or self.count is None:
            return drawn
        window = attention_window(self.attend(hidden).to(hidden), count=self.count, height=self.side, width=self.side)
        return window.write(drawn.unflatten(-1, (self.count, self.count))).flatten(-2)


def _window_sizes(attention: Sequence[int], visible: int) -> tuple[int, int]:
    if len(attention) != 2:
        raise ValueError(f"expected attention=None or (N of read, N of write), got {attention!r}")
    if math.isqrt(visible) ** 2 != visible:
        raise ValueError(
            f"expected a square number of pixels with attention, got visible={visible}; pad the images to a square, or pass "
            "attention=None"
        )
    read, write = attention
    return positive(read, "the N of read"), positive(write, "the N of write")
