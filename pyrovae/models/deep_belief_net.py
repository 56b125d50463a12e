"""Deep belief nets: directed layers of binary units under a restricted Boltzmann machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.distributions import RBM, PersistentChains
from pyrovae.handlers import Module, own_params
from pyrovae.models.program import check_rows, data_plate
from pyrovae.ops import SigmoidLayers


class DeepBeliefNet(Module):
    """A net of binary units whose top two layers are a restricted Boltzmann machine.

    p(h_{L−1}, h_L) ∝ exp(b·h_{L−1} + c·h_L + h_{L−1} W h_L),   p(h_l | h_{l+1}) = Bern(σ(b_l + h_{l+1} W_l)),
    p(x | h_1) = Bern(σ(b_0 + h_1 W_0)).

    The top layer h_L is summed out: the program draws h_{L−1} from the RBM's visible marginal
    (:class:`pyrovae.distributions.RBM`), then the layers below. Sites: `"h1"` (next to the data), …, `"h{L−1}"` and `"x"`, in
    the plate `"data"` at dim −1.

    Where the smaller of the top two layers has at most `max_bits` units, log Z and its gradient are exact in every run of the
    program. In a larger net h_{L−1} is scored without log Z, by no probability, with the gradient of persistent chains. Then
    no method's log p(x) or bound is one before log Z is known: see
    :func:`pyrovae.diagnostics.bound_with_partition`. `Exact` takes up to 20 units of h_1 where there are two hidden layers.

    Args:
        visible: number of visible units D.
        hidden: numbers of hidden units from the data upwards, at least two; the last is the RBM's hidden side.
        num_chains: persistent chains of a net beyond `max_bits`.
        num_sweeps: their sweeps at each run in grad mode.
        max_bits: the largest min(H_{L−1}, H_L) of which a run of the program sums all states.

    Attributes:
        sizes: units of all layers, from the data upwards.
        weights: W_0, …, `[units of h_{l+1}, units of h_l]`, of the directed layers.
        biases: b_0, …, `[units of h_l]`.
        top_weight: W `[H_{L−1}, H_L]`.
        top_bias: b `[H_{L−1}]`.
        top_hidden_bias: c `[H_L]`.
        chains: the persistent chains; None where log Z is exact.

    Raises:
        ValueError: for sizes below 1, or fewer than two hidden layers.

    Example:
        >>> net = DeepBeliefNet(4, [3, 2])
        >>> tuple(net.sample(5).shape)
        (5, 4)

    References:
        A Fast Learning Algorithm for Deep Belief Nets (Hinton, Osindero, Teh, 2006)
        https://doi.org/10.1162/neco.2006.18.7.1527
    """

    capturable: ClassVar[bool] = True

    def __init__(
        self, visible: int, hidden: Sequence[int], *, num_chains: int = 100, num_sweeps: int = 1, max_bits: int = 16
    ) -> None:
        super().__init__()
        sizes = [visible, *(hidden if isinstance(hidden, Sequence) else [hidden])]
        if len(sizes) < 3 or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(
                f"expected visible >= 1 and at least two hidden layers of >= 1 units, got {visible} and {hidden}; with one "
                "hidden layer it is a RestrictedBoltzmannMachine"
            )
        self.sizes, self.max_bits = tuple(sizes), max_bits
        self._chains = {"num_chains": num_chains, "num_sweeps": num_sweeps}
        directed = sizes[:-1]
        self.weights = nn.ParameterList(torch.empty(above, n) for n, above in itertools.pairwise(directed))
        self.biases = nn.ParameterList(torch.empty(n) for n in directed[:-1])
        self.top_weight = nn.Parameter(torch.empty(sizes[-2], sizes[-1]))
        self.top_bias = nn.Parameter(torch.empty(sizes[-2]))
        self.top_hidden_bias = nn.Parameter(torch.empty(sizes[-1]))
        self.chains: PersistentChains | None = None
        self.reset_parameters()
        if min(sizes[-2:]) > max_bits:
            self.chains = PersistentChains(num_chains, num_sweeps, units=sizes[-2])

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for JSON."""
        return {"visible": self.sizes[0], "hidden": list(self.sizes[1:]), **self._chains, "max_bits": self.max_bits}

    @property
    def normalized(self) -> bool:
        """Whether the program scores h_{L−1} by a log probability; else log Z is missing."""
        return self.chains is None

    def reset_parameters(self) -> None:
        """Draw directed weights from N(0, 1/units above), the RBM's from N(0, 0.01²); biases 0, chains anew."""
        with torch.no_grad():
            for weight, bias in zip(self.weights, self.biases, strict=True):
                weight.normal_(0, weight.shape[0] ** -0.5)
                bias.zero_()
            self.top_weight.normal_(0, 0.01)
            self.top_bias.zero_()
            self.top_hidden_bias.zero_()
        if self.chains is not None:
            self.chains.reset()

    @torch.no_grad()
    def initialize_bias(self, x: Tensor) -> None:
        """Set the visible bias to the logits of the smoothed means (sum + 1) / (n + 2) of data `x [n, visible]` in {0, 1}.

        Raises:
            ValueError: for another width, no rows, or values outside {0, 1}.
        """
        check_rows(x, self.sizes[0])
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                f"expected x in {{0, 1}}, got values from {float(x.min()):g} to {float(x.max()):g}; scale to [0, 1] and "
                "binarize, see pyrovae.data.binarize"
            )
        self.biases[0].copy_(((x.to(self.top_bias).sum(0) + 1) / (len(x) + 2)).logit())

    def top(self) -> RBM:
        """The distribution of h_{L−1} at the present parameters: `W`, `b` and `c` are the net's own."""
        return RBM(
            self.top_weight, self.top_bias, self.top_hidden_bias, chains=self.chains, max_bits=max(self.max_bits, _MAX_BITS)
        )

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
            x: data `[B, visible]` in {0, 1}; None draws from the prior.
            batch_size: rows to draw where `x` is None.
            index: row numbers `[B]` of a minibatch in the data set.
            num_data: the size of that data set.

        Returns:
            The visible units `[..., B, visible]`.

        Raises:
            ValueError: if `x` has another width, or is empty.
        """
        with data_plate(x, self.sizes[0], batch_size=batch_size, index=index, num_data=num_data):
            above = pyro.sample(f"h{len(self.weights)}", self.top())
            for layer in range(len(self.weights) - 1, 0, -1):
                above = pyro.sample(f"h{layer}", self._layer(layer, above))
            return pyro.sample("x", self._layer(0, above), obs=x)

    def layers(self) -> SigmoidLayers:
        """What Exact, Gibbs, the bounds and pretraining need to know of this net."""
        sites = tuple(f"h{layer + 1}" for layer in range(len(self.weights)))
        return SigmoidLayers(
            sites, tuple(self.weights), tuple(self.biases), self.top_bias, self.top_weight, self.top_hidden_bias
        )

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """`n` draws `[n, visible]`: exact, or from copies of the persistent chains where log Z is not."""
        if self.chains is not None:
            self.chains.warn_if_fresh(stacklevel=3)
        with pyro.poutine.block():
            return own_params(self)(batch_size=n)

    def mirror(self) -> dict[str, nn.Module]:
        """Encoders for `AmortizedStructured`: q(h_{l+1} | h_l) of independent units, logistic in h_l, from the data upwards.

        At the transposed weights of a stack of RBMs they are the RBMs' own conditionals. Fresh weights at each call.
        """
        pairs = itertools.pairwise(self.sizes[:-1])
        return {f"h{layer + 1}": nn.Linear(*pair).to(self.top_bias) for layer, pair in enumerate(pairs)}

    def _layer(self, layer: int, above: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.biases[layer] + above @ self.weights[layer]).to_event(1)


_MAX_BITS = 30  # of the top RBM's distribution, where asked for log Z, whatever a run of the program sums
