"""Our guide in a program and a training loop that know nothing of this library: stock SVI, stock Trace_ELBO."""

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import Exact, Variational

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600, help="SVI steps")
steps = parser.parse_args().steps
pyro.set_rng_seed(0)
decoder = torch.nn.Linear(2, 6)


def switches(x: torch.Tensor) -> None:
    """Two hidden switches behind six lamps."""
    pyro.module("decoder", decoder)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)


x = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).repeat(16, 1)
guide = AmortizedMeanField(switches, torch.nn.Linear(6, 2), example=(x,))
before = Exact().infer(switches, x).log_evidence.mean()
svi = SVI(switches, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(num_particles=10, vectorize_particles=True))
for _ in range(steps):
    svi.step(x)
exact, bound = Exact().infer(switches, x), Variational(guide, num_samples=2000).infer(switches, x)
gap, stderr = float((exact.log_evidence - bound.log_evidence).mean()), float(bound.stderr.norm() / len(x))
print(f"log p(x) per row: {before:.3f} before, {exact.log_evidence.mean():.3f} after; best possible {-math.log(4):.3f}")
print(f"the bound falls short of it by {gap:.4f} ± {stderr:.4f} nats")
z = torch.cartesian_prod(*2 * [torch.tensor([0.0, 1.0])]).unsqueeze(1)  # log p(x) by hand, from all four states of z
by_hand = dist.Bernoulli(logits=decoder(z)).log_prob(x).sum(-1).logsumexp(0) - math.log(4)
assert torch.allclose(exact.log_evidence, by_hand, rtol=0, atol=1e-5)
assert exact.log_evidence.mean() > before, "SVI trained the foreign program"
assert gap > -6 * stderr, "a bound lies below"
