"""The guide of DRAW: an encoder that looks at the image, at what the canvas lacks, and at the decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.guides.pilot import innermost_program
from pyrovae.handlers import Module, declares_capturable
from pyrovae.handlers.anneal import ScaleLatents
from pyrovae.ops.attention import RAW, attention_window
from pyrovae.ops.lstm import lstm_step


class DRAWGuide(Module):
    """q(z_t | x, z_<t) of DRAW.

    x̂_t = x − σ(c_{t−1}),   r_t = read(x, x̂_t, h^dec_{t−1}),   h_t = LSTM(r_t, h^dec_{t−1}, h_{t−1}),
    z_t ~ N(μ(h_t), σ²(h_t)) with linear μ and log σ.

    Without attention, `read` is (x, x̂_t) itself, and with it two N×N patches under the filters that h^dec_{t−1} places. The
    canvas c and the decoder's output h^dec are those of the model's own decoder, so that the gradient reaches the model's
    parameters through the guide as well, as in the paper. They stay the model's: they are not among the parameters of the
    guide, and it makes no statement of them.

    With `pyro.infer.TraceMeanField_ELBO` the loss is that of the paper, the KL(q(z_t | x, z_<t) || N(0, I)) of each step by
    formula; with `Trace_ELBO` it is the same bound with the KL by draws.

    Plates, indices and beta are the model's. Cost a row: T steps of the decoder, and T·4·hidden·(visible + …)
    multiplications; x itself is multiplied once.

    Args:
        model: a :class:`pyrovae.models.DRAW`, or such a model in a handler; the guide keeps it, but does not own it.
        hidden: width of the encoder's LSTM.

    Raises:
        ValueError: for another model, or `hidden` below 1.

    Example:
        >>> from pyrovae.models import DRAW
        >>> model = DRAW(16, 2, 8, 3)
        >>> guide = DRAWGuide(model, hidden=8)
        >>> {name: tuple(value.shape) for name, value in guide(model.sample(5)).items()}
        {'z_1': (5, 2), 'z_2': (5, 2), 'z_3': (5, 2)}

    References:
        DRAW: A Recurrent Neural Network For Image Generation (Gregor, Danihelka, Graves, Rezende, Wierstra, 2015)
        https://arxiv.org/abs/1502.04623
    """

    def __init__(self, model: Any, *, hidden: int = 256) -> None:
        super().__init__()
        program = innermost_program(model)
        if not all(hasattr(program, name) for name in ("decoder", "attention", "latents", "plate")):
            raise ValueError(f"expected a pyrovae.models.DRAW, got {type(program).__name__}; other models need another guide")
        if hidden < 1:
            raise ValueError(f"expected hidden >= 1, got {hidden}")
        self._model = (model,)  # in a tuple: an attribute would make the model a submodule of its guide
        count = None if program.attention is None else program.attention[0]
        self.encoder = Encoder(program.visible, program.latent, program.hidden, hidden, count).to(program.decoder.canvas)

    @property
    def capturable(self) -> bool:
        """Whether the model declares so; see :func:`pyrovae.handlers.declares_capturable`."""
        return declares_capturable(self._model[0])

    @property
    def config(self) -> dict[str, Any]:
        """Arguments beside the model that build such a guide: `DRAWGuide(model, **guide.config)`."""
        return {"hidden": self.encoder.hidden.shape[0]}

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.encoder.reset_parameters()

    def forward(
        self,
        x: Tensor | None = None,
        *,
        batch_size: int = 1,
        index: Tensor | None = None,
        num_data: int | None = None,
        observations: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Draw the latents of one call.

        Args:
            x: data `[B, visible]`.
            batch_size: not used; the model's argument.
            index: row numbers `[B]` of a minibatch in the data set.
            num_data: the size of that data set.
            observations: `{"x": x}` takes the place of `x`: the convention of `pyro.infer.ReweightedWakeSleep`.

        Returns:
            The latents by site, each `[..., B, latent]`.

        Raises:
            ValueError: without data, or where the plate does not fit.
        """
        x = x if observations is None else observations.get("x", x)
        if x is None:
            raise ValueError("expected data x, got None; a guide is conditioned on data: pass x, or draw with model.sample")
        (model,) = self._model
        program, encoder = innermost_program(model), self.encoder
        decoder, names = program.decoder, program.latents
        values: dict[str, Tensor] = {}
        with program.plate(x, batch_size=batch_size, index=index, num_data=num_data), ScaleLatents(program.beta):
            drawing, state = decoder.start(), encoder.start(x.to(decoder.canvas))
            for name in names:
                state = encoder.step(state, drawing.canvas, drawing.hidden)
                values[name] = pyro.sample(name, encoder.latent(state))
                if name != names[-1]:
                    drawing = decoder.step(drawing, values[name])
        return values


class EncoderState:
    """x, what it gives the LSTM at every step, and the LSTM's output and memory."""

    __slots__ = ("cell", "constant", "hidden", "x")

    def __init__(self, x: Tensor, constant: Tensor, hidden: Tensor, cell: Tensor) -> None:
        self.x, self.constant, self.hidden, self.cell = x, constant, hidden, cell


class Encoder(nn.Module):
    """The encoder's LSTM, its read operation and the head of q; the first state is learned."""

    capturable: ClassVar[bool] = True

    def __init__(self, visible: int, latent: int, decoder: int, hidden: int, count: int | None) -> None:
        super().__init__()
        self.count = count
        self.side = math.isqrt(visible)
        seen = visible if count is None else 2 * count**2
        self.image = nn.utils.skip_init(nn.Linear, visible, 4 * hidden, bias=False) if count is None else None
        self.gates = nn.utils.skip_init(nn.Linear, seen + decoder + hidden, 4 * hidden)
        self.attend = None if count is None else nn.utils.skip_init(nn.Linear, decoder, RAW)
        self.head = nn.utils.skip_init(nn.Linear, hidden, 2 * latent)
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

    def start(self, x: Tensor) -> EncoderState:
        """The state before the first step, for images `[..., visible]`."""
        constant = x.new_zeros(()) if self.image is None else self.image(x).to(x)
        return EncoderState(x, constant, self.hidden, self.cell)

    def step(self, state: EncoderState, canvas: Tensor, drawn: Tensor) -> EncoderState:
        """One step, given the canvas so far and the decoder's output `drawn`."""
        x = state.x
        seen = x - torch.sigmoid(canvas)
        if self.attend is not None and self.count is not None:
            window = attention_window(self.attend(drawn).to(drawn), count=self.count, height=self.side, width=self.side)
            both = torch.stack(torch.broadcast_tensors(x, seen)).unflatten(-1, (self.side, self.side))
            seen = torch.cat(window.read(both).flatten(-2).unbind(), -1)
        return EncoderState(x, state.constant, *lstm_step(self.gates, [seen, drawn], state.hidden, state.cell, state.constant))

    def latent(self, state: EncoderState) -> dist.TorchDistribution:
        """q(z_t | x, z_<t)."""
        loc, log_scale = self.head(state.hidden).to(state.hidden).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
