"""Up-down learning: wake-sleep whose dreams begin near the data, by a few sweeps of the top RBM."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyro
import torch

from pyrovae.handlers import own_params
from pyrovae.handlers.rewrite import innermost
from pyrovae.inference.belief_nets.wake_sleep import TwoPhases, learner, undirected_latents
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.fit import Fit, root_module, snapshot
from pyrovae.inference.posterior import Program
from pyrovae.inference.undirected.settle import settle
from pyrovae.inference.variational.batches import check_device, on_device
from pyrovae.inference.variational.schedules import Optimizer
from pyrovae.inference.variational.variational import Variational
from pyrovae.ops import isolated_rng


class UpDown:
    """Contrastive wake-sleep, the fine-tuning of a deep belief net.

    * Up: all latents are drawn from the recognition guide given the data; the directed layers are changed to raise their log
      probability of the layer below (the delta rule).
    * Top: from the top state h that the data led to, `num_sweeps` sweeps of block Gibbs in the RBM lead to h′, and its
      parameters go along ∂F(h′) − ∂F(h): contrastive divergence, the gradient of log p(h) as the number of sweeps grows.
      log Z is never needed.
    * Down: the layers below are drawn from h′, and the guide is changed to raise log q(z | x) of these dreams.

    Against :class:`pyrovae.inference.WakeSleep`, the guide learns from dreams near the data instead of any that the model
    has, and the RBM is never drawn from exactly. The phases descend on no common function: nothing is monotone. `Fit.history`
    has the ELBO of the guide where log Z is known, else None; :func:`pyrovae.diagnostics.bound_with_partition` judges the end.

    Any program with a latent drawn from :class:`pyrovae.distributions.RBM` is learned so, an autoencoder with an RBM prior
    too. Begin where :class:`pyrovae.inference.GreedyPretraining` ended.

    Args:
        guide: a Pyro guide with parameters, such as `AmortizedStructured(net)`.
        num_sweeps: sweeps at the top, k of CD-k; 3 to 10 are usual.
        num_particles: draws of either phase for each datum, one run after another.
        num_steps: gradient steps; default 1000.
        num_epochs: instead of `num_steps`: passes over the data.
        batch_size: rows of a minibatch; None takes all.
        optim: a function from parameters to a torch optimizer; default Adam with lr 1e-2. The original is
            `partial(torch.optim.SGD, lr=...)`; the loss is summed over the data.
        **options: as for :class:`pyrovae.inference.WakeSleep`.

    Raises:
        ValueError: for numbers out of range, or options of another objective.

    Example:
        >>> from pyrovae.guides import AmortizedStructured
        >>> from pyrovae.models import DeepBeliefNet
        >>> net = DeepBeliefNet(4, [3, 2])
        >>> fit = UpDown(AmortizedStructured(net), num_steps=10).fit(net, net.sample(20))
        >>> fit.bound, sorted(fit.states)
        ('lower', ['guide', 'model'])

    References:
        A Fast Learning Algorithm for Deep Belief Nets (Hinton, Osindero, Teh, 2006)
        https://doi.org/10.1162/neco.2006.18.7.1527
    """

    def __init__(
        self,
        guide: Program,
        *,
        num_sweeps: int = 3,
        num_particles: int = 1,
        num_steps: int | None = None,
        num_epochs: int | None = None,
        batch_size: int | None = None,
        optim: Optimizer | None = None,
        **options: Any,
    ) -> None:
        steps = {"num_steps": num_steps, "num_epochs": num_epochs, "batch_size": batch_size, "optim": optim}
        self.guide, elbo = guide, TwoPhases(num_particles, num_sweeps=num_sweeps)
        self._variational: Variational = learner("UpDown", guide, elbo, steps | options)
        self.preprocess = self._variational.preprocess

    def fit(self, model: Program, *args: Any, validation: Any = None, resume: bool = False, **kwargs: Any) -> Fit:
        """Learn model and guide, in place.

        Args:
            model: a Pyro program with a latent drawn from an RBM.
            *args: its arguments, the data first.
            validation: other data (a tensor, or a tuple of arguments) whose bound is recorded.
            resume: go on from the last checkpoint.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: without such a latent, and for what :meth:`pyrovae.inference.WakeSleep.fit` refuses.
        """
        fit = self._variational.fit(model, *args, validation=validation, resume=resume, **kwargs)
        self._leave_chains(model, args, kwargs)
        inner = root_module(model)
        if inner is None:
            return fit
        return dataclasses.replace(fit, states={**fit.states, "model": snapshot(inner.state_dict())})

    @torch.no_grad()
    def _leave_chains(self, model: Program, args: Any, kwargs: Any) -> None:
        """Start the persistent chains of the model's machine at its latents given data, and sweep."""
        device = check_device(self._variational.device)
        args, kwargs = on_device(args, device), on_device(kwargs, device)
        args = self._variational._prepared(args)
        with isolated_rng(), pyro.poutine.block():
            drawn = pyro.poutine.trace(own_params(self.guide)).get_trace(*args, **kwargs)
            trace = pyro.poutine.trace(pyro.poutine.replay(own_params(model), trace=drawn)).get_trace(*args, **kwargs)
            for site in undirected_latents(trace).values():
                distribution = innermost(site["fn"])
                settle(distribution, site["value"].reshape(-1, site["value"].shape[-1]))

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> DrawsPosterior:
        """Draws from the guide as it is, with their ELBO; see :meth:`pyrovae.inference.Variational.infer`."""
        return self._variational.infer(model, *args, **kwargs)
