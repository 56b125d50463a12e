"""Self-normalised importance sampling from a guide, per datum."""

from __future__ import annotations

import time
from typing import Any

import torch

from pyrovae.handlers.energy import warn_of_energies
from pyrovae.handlers.structure import check_whole_plates, common_scale
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.log_joint import LogJoint
from pyrovae.inference.posterior import Program
from pyrovae.inference.weighing import evidence, weigh


class Importance:
    """p(z | x) by draws from a guide, weighted per datum by p(x, z) / q(z | x).

    `log_evidence` is log (1/K) Σ_k w_k, in expectation a lower bound of log p(x) (the importance-weighted bound), with its
    standard error by the delta method. `diagnostics` holds, per datum, the effective sample size `ess [batch]` and the tail
    shape `pareto_k [batch]` of the weights (ArviZ's); where k > 0.7 the numbers of that datum should not be trusted.
    Expectations are biased by O(1/K). A datum none of whose draws has a weight above 0 has no estimate: its `log_evidence` is
    −inf with `stderr` inf, `ess` 0 and `pareto_k` inf, its draws are the guide's with equal weights, and `diagnostics["note"]`
    says how many rows are so. Costs K model evaluations a datum. Any program and any guide over its latents.

    Args:
        guide: a Pyro guide with the model's arguments.
        num_samples: K.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016)
        https://arxiv.org/abs/1509.00519
        Pareto smoothed importance sampling (Vehtari et al., 2024)
        https://arxiv.org/abs/1507.02646
    """

    def __init__(self, guide: Program, num_samples: int = 1000) -> None:
        if num_samples < 2:
            raise ValueError(f"expected num_samples >= 2, got {num_samples}")
        self.guide, self.num_samples = guide, num_samples

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> DrawsPosterior:
        """Draw and weigh.

        Args:
            model: a Pyro program.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: if the guide does not sample the model's latents; for unequal `poutine.scale`s, a subsampled plate with
                a latent outside it, and a program that mixes rows of the batch.
        """
        begin = time.perf_counter()
        log_joint = LogJoint(model, args, kwargs)
        common_scale(log_joint.structure, "Importance")
        check_whole_plates(log_joint.structure, "Importance")
        warn_of_energies(model, args, kwargs, log_joint.structure, learn=False)
        log_joint.check_rows("Importance")
        states, log_w = weigh(log_joint, self.guide, self.num_samples)
        lost, found = torch.isneginf(log_w).all(0), evidence(log_w)
        rows = log_joint.structure.batch_shape.numel()
        latents = log_joint.structure.latents
        return DrawsPosterior(
            structure=log_joint.structure,
            log_evidence=found.log_evidence,
            bound="lower",
            stderr=found.stderr,
            diagnostics={
                "model_evaluations": self.num_samples * rows,
                "ess": found.ess,
                "pareto_k": found.pareto_k,
                **({"note": _note(int(lost.sum()), lost.numel(), self.num_samples)} if bool(lost.any()) else {}),
            },
            seconds=time.perf_counter() - begin,
            log_joint=log_joint,
            codes={s.name: s.encode(states[s.name]).to(torch.int32) for s in latents if s.finite},
            values={s.name: states[s.name] for s in latents if not s.finite},
            log_weights=torch.log_softmax(torch.where(lost, 0.0, log_w), 0),
        )


def _note(lost: int, rows: int, num_samples: int) -> str:
    return (
        f"{lost} of {rows} rows have no draw of weight above 0 among {num_samples}: no estimate there; give a guide that "
        "covers the posterior, or more samples"
    )
