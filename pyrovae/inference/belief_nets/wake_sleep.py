"""Wake-sleep learning: the model learns from the guide's draws given data, the guide from the model's own draws."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.distributions.undirected import Undirected
from pyrovae.handlers.rewrite import innermost
from pyrovae.handlers.structure import is_subsample
from pyrovae.inference.draws import DrawsPosterior
from pyrovae.inference.fit import Fit
from pyrovae.inference.posterior import Program
from pyrovae.inference.variational.schedules import Optimizer
from pyrovae.inference.variational.variational import Variational
from pyrovae.ops import isolated_rng


class WakeSleep:
    """Learn a model and its recognition guide in two phases, each by the gradient of a log probability.

    * Wake: latents are drawn from the guide given the data, and the model is changed to raise log p(x, z) of both. In
      expectation this is the gradient of the ELBO for the model's parameters.
    * Sleep: latents and data are drawn from the model, and the guide is changed to raise log q(z | x) of both. This lowers
      KL(p(z | x) ‖ q(z | x)) on data of the model's own, x ~ p(x): the other direction of the divergence that the ELBO
      lowers, on other data. It needs neither reparameterisation nor a score function.

    The two phases descend on no common function: nothing here is monotone, neither log p(x) nor the ELBO nor the losses.
    `Fit.history` has the true ELBO of the guide beside them; a log p(x) whose log Z is unknown gives none there.

    Any Pyro program with a guide that computes q(z | x) from the data is learned so, at one run of each program in each
    phase. The program dreams by `poutine.uncondition`: its observed sites are drawn, and take the place of the arguments that
    they came from; other arguments (labels, lengths, masks) stay those of the minibatch, and a plate's N/B counts in both
    phases. A site must observe an argument as it comes: a program that observes a changed copy is refused (so is a
    :class:`pyrovae.models.HiddenMarkovModel` whose padding is NaN or −1, or whose data have another dtype: pad with zeros).
    Parameters that model and guide share get both gradients.

    Args:
        guide: a Pyro guide with the model's arguments and parameters.
        num_particles: draws of either phase for each datum, one run after another.
        num_steps: gradient steps; default 1000.
        num_epochs: instead of `num_steps`: passes over the data.
        batch_size: rows of a minibatch; None takes all.
        optim: a function from parameters to a torch optimizer; default Adam with lr 1e-2. The delta rule of the original is
            `partial(torch.optim.SGD, lr=...)`.
        **options: those of :class:`pyrovae.inference.Variational` of minibatches, records, checkpoints and so on; not those
            of its objective (`elbo`, `temperature`, `straight_through`, `surrogate`, `beta`).

    Raises:
        ValueError: for numbers out of range, or options of another objective.

    Example:
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.models import SigmoidBeliefNet
        >>> net = SigmoidBeliefNet(4, 3)
        >>> guide = AmortizedMeanField(net, torch.nn.Linear(4, 3))
        >>> fit = WakeSleep(guide, num_steps=10).fit(net, net.sample(20))
        >>> fit.bound, sorted(fit.states)
        ('lower', ['guide', 'model'])

    References:
        The "Wake-Sleep" Algorithm for Unsupervised Neural Networks (Hinton, Dayan, Frey, Neal, 1995)
        https://doi.org/10.1126/science.7761831
    """

    def __init__(
        self,
        guide: Program,
        *,
        num_particles: int = 1,
        num_steps: int | None = None,
        num_epochs: int | None = None,
        batch_size: int | None = None,
        optim: Optimizer | None = None,
        **options: Any,
    ) -> None:
        steps = {"num_steps": num_steps, "num_epochs": num_epochs, "batch_size": batch_size, "optim": optim}
        self.guide = guide
        self._variational = learner(type(self).__name__, guide, TwoPhases(num_particles), steps | options)
        self.preprocess = self._variational.preprocess

    def fit(self, model: Program, *args: Any, validation: Any = None, resume: bool = False, **kwargs: Any) -> Fit:
        """Learn model and guide, in place.

        Args:
            model: a Pyro program whose prior and observations can be drawn.
            *args: its arguments, the data first.
            validation: other data (a tensor, or a tuple of arguments) whose bound is recorded.
            resume: go on from the last checkpoint.
            **kwargs: its keyword arguments.

        Returns:
            The fit; `loss` is the sum of both phases, −log p(x, z) − log q(z | x) over all rows.

        Raises:
            ValueError: for a guide without parameters or one that does not look at the data (one set of parameters a row
                cannot know the model's draws), a model whose prior or observations cannot be drawn, and what
                :meth:`pyrovae.inference.Variational.fit` refuses.
        """
        return self._variational.fit(model, *args, validation=validation, resume=resume, **kwargs)

    def infer(self, model: Program, *args: Any, **kwargs: Any) -> DrawsPosterior:
        """Draws from the guide as it is, with their ELBO; see :meth:`pyrovae.inference.Variational.infer`."""
        return self._variational.infer(model, *args, **kwargs)


class TwoPhases(pyro.infer.ELBO):
    """−log p(x, z) with z ~ q(z | x) held fixed, plus −log q(z | x) with (z, x) ~ p held fixed.

    The value is no bound; its gradient is that of the wake phase for the model and that of the sleep phase for the guide.

    Args:
        num_particles: draws of either phase.
        num_sweeps: None, or k of contrastive wake-sleep (:class:`pyrovae.inference.UpDown`): latents drawn from an RBM are
            scored by F(h′) − F(h), with h′ from k sweeps begun at the guide's h, and dreams begin at h′.

    Raises:
        ValueError: for numbers below 1.

    References:
        A Fast Learning Algorithm for Deep Belief Nets (Hinton, Osindero, Teh, 2006), appendix B
        https://doi.org/10.1162/neco.2006.18.7.1527
    """

    def __init__(self, num_particles: int = 1, *, num_sweeps: int | None = None) -> None:
        for name, number in (("num_particles", num_particles), ("num_sweeps", 1 if num_sweeps is None else num_sweeps)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"expected an integer {name} >= 1, got {number!r}")
        super().__init__(num_particles=num_particles)
        self.num_sweeps, self._checked = num_sweeps, False

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, 0-d."""
        if not self._checked:
            check_guide(model, guide, args, kwargs)
            self._checked = True
        total = None
        for _ in range(self.num_particles):
            wake, moved = self._wake(model, guide, args, kwargs)
            loss = (wake + self._sleep(model, guide, args, kwargs, moved)) / self.num_particles
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss without its gradient, 0-d."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, 0-d; the gradients of both phases are added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.detach()

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError  # Pyro's own estimators take one; there are two here

    def _wake(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """−log p(x, z) at the guide's z; and where k sweeps have moved the latents of undirected sites to."""
        with torch.no_grad():
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
        moved: dict[str, Tensor] = {}
        energies = []
        for name, site in undirected_latents(scored).items() if self.num_sweeps is not None else ():
            fn, h = innermost(site["fn"]).unexpanded(), site["value"]
            if fn.chain_units != h.shape[-1]:
                raise ValueError(
                    f"expected an RBM, or a Boltzmann machine without hidden units, at {name!r}, got one with "
                    f"{fn.chain_units} units of which the site has {h.shape[-1]}; use WakeSleep"
                )
            states = h.reshape(-1, h.shape[-1]).clone()
            assert self.num_sweeps is not None
            fn.sweep(states, self.num_sweeps)
            moved[name] = states.reshape(h.shape)
            difference = fn.free_energy(moved[name]) - fn.free_energy(h)
            energies.append(scale_and_mask(difference, site["scale"], site["mask"]).sum())
        if self.num_sweeps is not None and not moved:
            raise ValueError(
                "expected a model with a latent drawn from an RBM for UpDown, got none; use WakeSleep, which needs none"
            )
        log_p = scored.log_prob_sum(lambda name, site: name not in moved)
        return -log_p - sum(energies), moved

    def _sleep(self, model: Program, guide: Program, args: Any, kwargs: Any, moved: dict[str, Tensor]) -> Tensor:
        """−log q(z | x) at the model's z and x."""
        dreamed, others, named = dream(model, args, kwargs, moved)
        scored = poutine.trace(poutine.replay(guide, trace=dreamed)).get_trace(*others, **named)
        return torch.as_tensor(-scored.log_prob_sum())


def learner(method: str, guide: Program, elbo: TwoPhases, options: dict[str, Any]) -> Variational:
    """The loop that a wake-sleep method runs in.

    Raises:
        ValueError: for options of another objective.
    """
    wrong = sorted({"elbo", "temperature", "straight_through", "surrogate", "beta"} & set(options))
    if wrong:
        raise ValueError(f"expected no {wrong[0]} for {method}, whose two phases are its objective; leave it out")
    if guide is None:
        raise ValueError(f"expected a guide for {method}, got None; pass AmortizedMeanField(model) or a guide of your own")
    return Variational(guide, elbo, **options)


def dream(
    model: Program, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Tensor]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Draw latents and data from a model; the trace, and the arguments with the drawn data in the place of the given ones.

    Args:
        model: a Pyro program.
        args: its arguments, which tell the sizes.
        kwargs: its keyword arguments.
        given: values that some latents take.

    Raises:
        ValueError: for a site that cannot be drawn, a factor, or an observed value that is no argument.
    """
    with torch.no_grad(), _Dream(given) as dreamer:
        try:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        except NotImplementedError as error:
            raise ValueError(
                f"expected a model whose sites can be drawn, got {dreamer.asked}, which cannot ({error}); without draws of the "
                "model there is no sleep phase, use Variational"
            ) from error
    if not dreamer.drawn:
        raise ValueError("expected a model with observed sites to dream of, got none; pass data")
    replaced = dict[int, Tensor]()
    for name, observed in dreamer.observed.items():
        if not any(observed is value for value in (*args, *kwargs.values())):
            raise ValueError(
                f"expected observed sites that are arguments of the program as they come, got {name!r}, which is none: the "
                "guide cannot be shown what the model draws there; pass as an argument what the site observes (obs=x), "
                "transformed before"
            )
        replaced[id(observed)] = dreamer.drawn[name]
    others = tuple(replaced.get(id(value), value) for value in args)
    return trace, others, {key: replaced.get(id(value), value) for key, value in kwargs.items()}


def check_guide(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a guide that cannot learn from dreams: without parameters, or blind to the data.

    Raises:
        ValueError: saying which.
    """
    with isolated_rng(), poutine.block(), torch.enable_grad():
        trace, others, named = dream(model, args, kwargs, {})
        old = {id(value) for value in (*args, *kwargs.values())}

        def score(change: Any) -> Tensor:
            shown = tuple(value if id(value) in old else change(value) for value in others)
            options = {key: value if id(value) in old else change(value) for key, value in named.items()}
            scored = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(*shown, **options)
            return torch.as_tensor(scored.log_prob_sum())

        leaves: list[Tensor] = []

        def watched(value: Tensor) -> Tensor:
            if value.is_floating_point():
                leaves.append(value.clone().requires_grad_())
                return leaves[-1]
            return value

        if not score(lambda value: value).requires_grad:
            raise ValueError(
                "expected a guide with parameters, got none that its log q depends on; there is nothing to dream for"
            )
        with pyro.validation_enabled(is_validate=False):
            log_q = score(watched)
            seen = bool(leaves) and any(g is not None for g in torch.autograd.grad(log_q, leaves, allow_unused=True))
            seen = seen or bool(score(lambda value: value.flip(0)) != log_q)
    if not seen:
        raise ValueError(
            "expected a guide that computes q(z | x) from the data, got one whose log q does not depend on them: parameters "
            "of its own for each row, as LocalMeanField has, say nothing of what the model dreams; use AmortizedMeanField or "
            "AmortizedStructured, or Variational"
        )


def undirected_latents(trace: Any) -> dict[str, Any]:
    """The latent sites of a trace that are drawn from an RBM or Boltzmann machine."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and isinstance(innermost(site["fn"]), Undirected)
    }


class _Dream(Messenger):
    """Draws observed sites, and remembers what was observed there."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.given = given
        self.observed: dict[str, Any] = {}
        self.drawn: dict[str, Tensor] = {}
        self.asked = ""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_subsample(msg):
            return
        fn = innermost(msg["fn"])
        if msg["name"] in self.given:
            msg["value"], msg["done"] = self.given[msg["name"]], True
        elif msg["is_observed"] and isinstance(fn, dist.Unit):
            raise ValueError(
                f"expected sites that can be drawn, got the pyro.factor {msg['name']!r}, which no draw of the model follows; "
                "write it as a distribution, or use Variational"
            )
        elif msg["is_observed"] and not isinstance(fn, dist.Delta):  # as pyro.deterministic
            self.observed[msg["name"]] = msg["value"]
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        self.asked = f"{msg['name']!r} ({type(fn).__name__})"

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.observed:
            self.drawn[msg["name"]] = msg["value"]
