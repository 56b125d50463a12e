"""Our guide in a program and a training loop that know nothing of this library: stock SVI, stock Trace_ELBO.

Run: python examples/our_guide_in_stock_svi.py
"""

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Exact, Variational

decoder = nn.Linear(2, 6, dtype=torch.float64)


def switches(x: Tensor) -> None:
    """Two hidden switches behind six lamps."""
    pyro.module("decoder", decoder)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5, dtype=torch.float64)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)


def main(steps: int) -> None:
    """Train by stock SVI, then ask Exact how far the bound is."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    patterns = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    x = patterns.double().repeat(16, 1)
    guide = AmortizedMeanField(switches, nn.Linear(6, 2, dtype=torch.float64), example=(x,))

    before = Exact().infer(switches, x).log_evidence.mean()
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True)
    svi = SVI(switches, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    for _ in range(steps):
        svi.step(x)

    exact = Exact().infer(switches, x)
    bound = Variational(guide, num_samples=2000).infer(switches, x)
    gap = float((exact.log_evidence - bound.log_evidence).mean())
    stderr = float(bound.stderr.square().sum().sqrt() / len(x))
    print(f"log p(x) per row: {before:.3f} before, {exact.log_evidence.mean():.3f} after; best possible {-math.log(4):.3f}")
    print(f"the bound falls short of it by {gap:.4f} ± {stderr:.4f} nats")

    # log p(x) by hand, from all four states of z
    z = torch.cartesian_prod(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).double()
    with torch.no_grad():
        by_hand = dist.Bernoulli(logits=decoder(z).unsqueeze(1)).log_prob(x).sum(-1).logsumexp(0) - math.log(4)
    assert torch.allclose(exact.log_evidence, by_hand, rtol=0, atol=1e-10)
    assert exact.log_evidence.mean() > before, "SVI trained the foreign program"
    assert gap > -6 * stderr, "a bound lies below"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="SVI steps")
    main(parser.parse_args().steps)
