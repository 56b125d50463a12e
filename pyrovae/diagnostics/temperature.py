"""What a relaxation says of a fitted pair, beside what is true of it, as the temperature falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.diagnostics.bounds import clamped_note, log_weights, mean_weight, soft_weights
from pyrovae.guides.amortized import evaluating
from pyrovae.guides.pilot import innermost_program
from pyrovae.handlers import discretize, relax
from pyrovae.handlers.structure import read_structure
from pyrovae.inference.posterior import Program
from pyrovae.inference.weighing import split_rows
from pyrovae.ops import isolated_rng


@dataclass(frozen=True, eq=False, kw_only=True)
class TemperatureCurve:
    """The relaxed and the hard bound of one pair, averaged over rows, in nats.

    Attributes:
        temperatures: `[T]`, as they were given.
        relaxed: `[T]`, the bound of model and guide both relaxed (Maddison et al.): no bound of the discrete log p(x).
        relaxed_stderr: `[T]`, its standard error over rows.
        hard: the bound of the discrete programs, one number for all temperatures.
        hard_stderr: its standard error over rows.
        gap: `[T]`, relaxed − hard.
        gap_stderr: `[T]`, the standard error of the gap over rows, of differences row by row: smaller than those of its
            parts, since the rows are the same.
        relaxed_rows: `[T, batch]`, the relaxed bound per datum.
        hard_rows: `[batch]`, the hard bound per datum.
        num_particles: draws a datum for each of the T + 1 bounds.
        clamped: `[T]`, the share of relaxed values at an end of what their dtype can tell. The relaxed bound is that of the
            clamped draws, and with more of them nearer to the hard one.
    """

    temperatures: Tensor
    relaxed: Tensor
    relaxed_stderr: Tensor
    hard: float
    hard_stderr: float
    gap: Tensor
    gap_stderr: Tensor
    relaxed_rows: Tensor = field(repr=False)
    hard_rows: Tensor = field(repr=False)
    num_particles: int
    clamped: Tensor

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each temperature at which more than 0.1% of the relaxed values are clamped."""
        dtype = self.relaxed_rows.dtype
        pairs = zip(self.temperatures.tolist(), self.clamped.tolist(), strict=True)
        return tuple(note for t, share in pairs if (note := clamped_note(share, dtype, f" at temperature {t:g}")))

    def __str__(self) -> str:
        """A table, one line a temperature, and notes."""
        lines = ["temperature      relaxed         hard          gap (relaxed - hard, no bound of log p(x))"]
        for i, temperature in enumerate(self.temperatures):
            gap = f"{float(self.gap[i]):+.3f} ± {float(self.gap_stderr[i]):.3f}"
            lines.append(f"{float(temperature):11.3f} {float(self.relaxed[i]):12.3f} {self.hard:12.3f} {gap:>16}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@torch.no_grad()
def temperature_curve(
    model: Program,
    guide: Program,
    x: Tensor | tuple[Any, ...],
    temperatures: Sequence[float] | Tensor = (0.1, 0.2, 0.5, 1.0, 2.0),
    *,
    num_particles: int = 100,
    batch_size: int | None = None,
    **kwargs: Any,
) -> TemperatureCurve:
    """The relaxed and the hard bound side by side, as a function of the temperature, for one fitted pair.

    Both programs are made discrete and then relaxed at each temperature. Every temperature uses the same noise, so that the
    curve is smooth where the bound is. As the temperature falls the relaxed bound need not tend to the hard one: it is that
    of densities, whose ratio at draws near a corner tends to the ratio of masses, and whose middle parts vanish slowly.

    Modules run in evaluation mode.
    Cost: `num_particles` evaluations of the model a datum for each temperature, and as many for the hard bound.

    Args:
        model: a Pyro program with Bernoulli or OneHotCategorical latents, perhaps relaxed.
        guide: its guide, likewise.
        x: the data, or a tuple of positional arguments, the data first.
        temperatures: positive.
        num_particles: draws a datum.
        batch_size: rows of one run; None takes as many as memory and speed ask for.
        **kwargs: their keyword arguments.

    Raises:
        ValueError: if there is nothing to relax, no temperature, or one that is not positive.

    Example:
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net(4, 3)
        >>> temperature_curve(net, AmortizedMeanField(net), net.sample(5), [0.5, 1.0]).relaxed.shape
        torch.Size([2])

    References:
        The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (Maddison, Mnih, Teh, 2017)
        https://arxiv.org/abs/1611.00712
    """
    if num_particles < 2:
        raise ValueError(f"expected num_particles >= 2, got {num_particles}")
    values = torch.as_tensor(temperatures, dtype=torch.get_default_dtype()).reshape(-1)
    if not values.numel():
        raise ValueError("expected at least one temperature, got none; values from 0.1 to 1 are usual")
    args = (x,) if isinstance(x, Tensor) else tuple(x)
    hard = discretize(model), discretize(guide)
    rows = split_rows(*hard, args, kwargs, num_particles, batch_size)
    if not any(latent.finite for latent in read_structure(hard[0], *rows.calls[0]).latents):
        raise ValueError("expected Bernoulli or OneHotCategorical latents to relax, got none; use evaluate")
    pairs = [tuple(relax(program, float(value)) for program in hard) for value in values]
    seed = int(torch.randint(2**31, ()))
    relaxed_rows, clamped = [], []
    with evaluating(innermost_program(model)), evaluating(innermost_program(guide)):
        hard_rows, _ = mean_weight(log_weights(rows, *hard, num_particles))
        for of_model, of_guide in pairs:
            with isolated_rng(seed):
                log_w, share = soft_weights(rows, of_model, of_guide, num_particles)
            relaxed_rows.append(mean_weight(log_w)[0])
            clamped.append(share)
    relaxed = torch.stack(relaxed_rows)
    mean, stderr = _over_rows(relaxed)
    gap, gap_stderr = _over_rows(relaxed - hard_rows)
    of_hard, of_hard_stderr = _over_rows(hard_rows.unsqueeze(0))
    return TemperatureCurve(
        temperatures=values,
        relaxed=mean,
        relaxed_stderr=stderr,
        hard=float(of_hard),
        hard_stderr=float(of_hard_stderr),
        gap=gap,
        gap_stderr=gap_stderr,
        relaxed_rows=relaxed,
        hard_rows=hard_rows,
        num_particles=num_particles,
        clamped=torch.tensor(clamped),
    )


def _over_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means over rows of `[T, batch]` and their standard errors; inf for a single row, of which no spread is seen."""
    flat = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    if flat.shape[1] < 2:
        return flat.mean(1), torch.full_like(flat[:, 0], math.inf)
    return flat.mean(1), flat.std(1) / math.sqrt(flat.shape[1])
