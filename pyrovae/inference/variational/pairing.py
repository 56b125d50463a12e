"""Whether programs can be learned so: model and guide of the same latents, on the same scale, and of any number of rows."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pyro
import torch

from pyrovae.handlers.structure import Structure, read_structure
from pyrovae.inference.posterior import Program
from pyrovae.inference.rows import take

if TYPE_CHECKING:
    from pyrovae.inference.variational.optimization import Optimization


def check_sites(model: Structure, guide: Structure) -> None:
    """Refuse a guide whose sites are not the model's latents."""
    ours, theirs = ({latent.name: latent for latent in structure.latents} for structure in (guide, model))
    if set(ours) != set(theirs):
        raise ValueError(
            f"expected the guide to sample the model's latents {sorted(theirs)}, got {sorted(ours)}; give both the same "
            "site names"
        )
    for name, latent in theirs.items():
        if ours[name].event_shape != latent.event_shape:
            raise ValueError(
                f"expected the guide's {name!r} with the model's event shape {tuple(latent.event_shape)}, got "
                f"{tuple(ours[name].event_shape)}; declare a vector with .to_event(1), and give the guide the model's "
                "sizes"
            )


def warn_of_scales(model: Structure, guide: Structure) -> None:
    """Say so where a latent counts otherwise in the model than in the guide: the two make no KL divergence then."""
    for latent in model.latents:
        p, q = (torch.as_tensor(s.scales[latent.name], dtype=torch.double).cpu() for s in (model, guide))
        if not bool(torch.isclose(p, q).all()):
            shown = [f"{float(scale):g}" if scale.numel() == 1 else "several" for scale in (p, q)]
            warnings.warn(
                f"the log probability of {latent.name!r} is scaled by {shown[0]} in the model and by {shown[1]} in the guide, "
                "so that the loss is no evidence bound and weighs no KL divergence; where the model has a beta, wrap the guide "
                "in pyrovae.handlers.scale_kl(guide, model.beta)",
                stacklevel=5,
            )
            return


def warn_of_quantized(model: Structure, guide: Structure) -> None:
    """Say what Pyro's straight-through relaxations on both sides score."""
    theirs = {latent.name for latent in guide.latents if latent.measure == "quantized"}
    for latent in model.latents:
        if latent.measure == "quantized" and latent.name in theirs:
            warnings.warn(
                f"site {latent.name!r} is Pyro's straight-through relaxation in model and guide: the program sees hard values, "
                "but the loss scores the soft ones behind them by their densities, and is no bound of log p(x); use "
                "pyrovae.distributions.RelaxedOneHotCategorical (RelaxedBernoulli) with straight_through=True, which scores "
                "what the program sees, or write the site discrete and pass temperature=... and straight_through=True",
                stacklevel=5,
            )
            return


def check_scalable(structure: Structure) -> None:
    """Refuse minibatches, without `index`, of a program with a latent outside all plates.

    Raises:
        ValueError: with the latent.
    """
    outside = [latent.name for latent in structure.latents if not latent.plates]
    if outside:
        raise ValueError(
            f"expected a program that takes index and num_data for minibatches with the latent {outside[0]!r} outside "
            "all plates, got one that takes neither: its loss times N/B would count that latent N/B times; open the "
            "plate as pyro.plate(name, num_data, subsample=index)"
        )


def check_other_rows(run: Optimization, programs: tuple[Program, ...]) -> None:
    """Refuse programs with parameters for each row that no `index` reaches: minibatches would share them by place.

    Raises:
        ValueError: saying with how many rows they fail.
    """
    index = torch.arange(len(run.first[0]) + 1, device=run.device)
    args, kwargs = take(run.args, run.kwargs, index, run.batches.keys)
    args = run.method._prepared(args)
    for program in programs:
        try:
            read_structure(program, args, kwargs)
        except (ValueError, RuntimeError, IndexError) as error:
            store = pyro.get_param_store()
            for name in [name for leaves in run.leaves.values() for name in leaves if name in store._params]:
                if name not in run.known:
                    del store[name]
            raise ValueError(
                f"expected programs that take any number of rows for minibatches, got one that ran with "
                f"{len(run.first[0])} and failed with {len(args[0])} ({str(error).splitlines()[0]}); parameters for "
                "each row need index and num_data, as LocalMeanField takes them"
            ) from error
