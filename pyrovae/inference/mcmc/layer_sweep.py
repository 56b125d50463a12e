"""Gibbs sweeps of what a model declares of itself: layers of sigmoid units, and bits that are independent given the data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrovae.handlers.structure import Latent, Structure
from pyrovae.inference.mcmc.sweeps import Codes, code_dtype
from pyrovae.inference.mean_field.layered_net import LayeredNet
from pyrovae.ops import FactorialCode


class LayerSweep:
    """Sweeps of declared layers, with what every child receives kept at hand.

    logit p(h_j = 1 | rest) = (what its parents send) + W_j · (its children) − Σ_i [softplus(z_i + W_ji) − softplus(z_i)],

    z being what the children i receive with h_j = 0. Under a top RBM its hidden side is summed out, and each of those units
    adds such a difference with the other sign. A bit costs a few operations for each child, chain and row, where the program
    would cost a pass through all weights; the bits of a layer are updated in turn, chains and rows together.

    Args:
        net: the declared layers, a snapshot.
        structure: of the program.
        chains: number of chains C.

    Attributes:
        power: the exponent of p(x | h_1) in the density that the sweeps leave invariant; 1 for the posterior.

    References:
        Connectionist learning of belief networks (Neal, 1992)
        https://doi.org/10.1016/0004-3702(92)90065-6
    """

    def __init__(self, net: LayeredNet, structure: Structure, chains: int) -> None:
        self.net, self.latents, self.chains = net, structure.latents, chains
        self._below = net.x.repeat(chains, 1)  # [C rows, D]
        self._children = [_Children(net, layer) for layer in range(net.depth)]
        self.states: list[Tensor] = []
        self.power = 1.0

    def start(self, codes: Codes) -> None:
        """Set the chains to a state."""
        self.states = [codes[site].to(self.net.x.dtype).flatten(0, 1) for site in self.net.layers.sites]

    def sweep(self) -> None:
        """Draw every bit of every row and chain once from its conditional, in the order of the program: the top first."""
        for layer in reversed(range(self.net.depth)):
            self._update(layer)

    def snapshot(self) -> Codes:
        """The present codes, uint8."""
        return {latent.name: self.present()[latent.name].to(code_dtype(latent)) for latent in self.latents}

    def present(self) -> Codes:
        """The present codes `{site: [C, rows, components]}`."""
        shape = (self.chains, len(self.net.x), -1)
        return {site: h.long().reshape(shape) for site, h in zip(self.net.layers.sites, self.states, strict=True)}

    def log_likelihood(self) -> Tensor:
        """Log p(x | h_1) at the present states, `[C, rows]`."""
        sent = torch.addmm(self.net.bias(0), self.states[0], self.net.layers.weights[0])
        return (self._below * sent + logsigmoid(-sent)).sum(-1).reshape(self.chains, -1)

    @property
    def evaluations_per_sweep(self) -> int:
        """Conditionals that one sweep of all chains computes: bits x chains x rows."""
        return self.chains * len(self.net.x) * sum(self.net.sizes)

    def _update(self, layer: int) -> None:
        net, h = self.net, self.states[layer]
        below = self._below if layer == 0 else self.states[layer - 1]
        power = self.power if layer == 0 else 1.0
        logits = torch.addmm(net.bias(layer + 1), below, net.layers.weights[layer].T, alpha=power)
        if layer + 1 < net.depth:
            logits += self.states[layer + 1] @ net.layers.weights[layer + 1]
        children = self._children[layer]
        children.power = power
        received = children.receive(h)
        uniform = torch.rand((h.shape[1], len(h)), dtype=h.dtype, device=h.device)
        for j in range(h.shape[1]):
            received.addcmul_(h[:, j : j + 1], children.weight[j], value=-1)  # with h_j = 0
            logit = logits[:, j] - children.difference(received, j)
            h[:, j] = uniform[j] < logit.sigmoid_()
            received.addcmul_(h[:, j : j + 1], children.weight[j])


class _Children:
    """The units whose normalisers a layer's code enters: its children and, at the top, the hidden side of an RBM.

    What they receive is kept halved, y = z/2, since e^{softplus(z + w) − softplus(z)} = 1 + σ(z)(e^w − 1) =
    (e^w + 1)/2 + tanh(y) (e^w − 1)/2: one tanh for each unit, and one logarithm for the product over many of them. Where
    weights are so large that the sum would lose digits, softplus itself (−log σ(−z)) is taken.
    """

    def __init__(self, net: LayeredNet, layer: int) -> None:
        weight, bias = net.layers.weights[layer], net.bias(layer)
        self._widths = [len(bias)]  # of the units that count with + and, under a top RBM, with −
        if layer + 1 == net.depth and net.layers.top_weight is not None and net.layers.top_hidden_bias is not None:
            weight = torch.cat([weight, net.layers.top_weight], 1)
            bias = torch.cat([bias, net.layers.top_hidden_bias])
            self._widths.append(len(net.layers.top_hidden_bias))
        self.power = 1.0
        self.weight, self._bias = weight / 2, bias / 2
        limits, largest = torch.finfo(weight.dtype), float(weight.abs().max())
        self._products = limits.eps * math.exp(min(largest, 700.0)) < 1e-4
        growth = weight.expm1() / 2
        self._offset, self._slope = 1 + growth, growth
        self._pieces = self._split(0.7 * math.log(limits.max)) if self._products else []

    def receive(self, h: Tensor) -> Tensor:
        """Half of what each unit receives from states `[R, H]`, `[R, D]`."""
        return torch.addmm(self._bias, h, self.weight)

    def difference(self, received: Tensor, j: int) -> Tensor:
        """Σ_i ± [softplus(z_i + W_ji) − softplus(z_i)] where z/2 = `received`, `[R]`; the children's share times `power`."""
        if not self._products:
            z, w = 2 * received, 2 * self.weight[j]
            change = (logsigmoid(-z) - logsigmoid(-z - w)).split(self._widths, -1)
            return self.power * change[0].sum(-1) - (change[1].sum(-1) if len(change) > 1 else 0.0)
        ratio = torch.tanh(received).mul_(self._slope[j]).add_(self._offset[j])
        total = torch.zeros_like(received[:, 0])
        for part, sign in self._pieces:
            total.add_(ratio[:, part].prod(-1).log_(), alpha=self.power if sign > 0 else -1.0)
        return total

    def _split(self, limit: float) -> list[tuple[slice, int]]:
        """Runs of units over which no product leaves the range of the dtype, and their signs."""
        found, start = [], 0
        for width, sign in zip(self._widths, (1, -1), strict=False):
            exponents = 2 * self.weight[:, start : start + width].abs()
            count = 1
            while max(float(part.sum(-1).max()) for part in exponents.tensor_split(count, -1) if part.shape[-1]) > limit:
                count *= 2
            for part in torch.arange(start, start + width).tensor_split(count):
                if len(part):
                    found.append((slice(int(part[0]), int(part[-1]) + 1), sign))
            start += width
        return found


class FactorialSweep:
    """Independent draws of bits that are independent given the data: every sweep forgets the one before.

    Args:
        code: what the model declares.
        structure: of the program.
        chains: number of chains C.
    """

    def __init__(self, code: FactorialCode, structure: Structure, chains: int) -> None:
        self.latents, self.chains = structure.latents, chains
        self.probs: Mapping[str, Tensor] = {code.site: code.logits.detach().sigmoid()}
        self._codes: Codes = {}

    def start(self, codes: Codes) -> None:
        """Set the chains to a state, which no draw depends on."""
        self._codes = dict(codes)

    def sweep(self) -> None:
        """Draw every bit of every row and chain."""
        for site, p in self.probs.items():
            self._codes[site] = torch.rand((self.chains, *p.shape), dtype=p.dtype, device=p.device) < p

    def snapshot(self) -> Codes:
        """The present codes, uint8."""
        return {latent.name: self._codes[latent.name].to(code_dtype(latent)) for latent in self.latents}

    def present(self) -> Codes:
        """The present codes `{site: [C, rows, components]}`."""
        return {site: codes.long() for site, codes in self._codes.items()}

    @property
    def evaluations_per_sweep(self) -> int:
        """Conditionals that one sweep of all chains computes: bits x chains x rows."""
        return self.chains * sum(p.numel() for p in self.probs.values())


def faster_than_table(net: LayeredNet, latents: tuple[Latent, ...], chains: int, sweeps: int) -> bool:
    """Whether layer sweeps take less time than making a table of the joint and sweeping on it (measured on a CPU).

    A value of the table costs about 3 ns a unit, a look-up 40 ns, an update of a layer 1.5 ns a child.
    """
    states, rows, bits = math.prod(latent.num_states for latent in latents), len(net.x), sum(net.sizes)
    units = net.x.shape[1] + bits
    children = sum(weight.numel() for weight in net.layers.weights)
    updates = chains * rows * sweeps
    return 1.5 * children * updates + 1e4 * bits * sweeps < 3.0 * states * rows * units + 40.0 * bits * updates
