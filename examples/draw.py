"""DRAW: digits painted in four steps, each with a Normal latent of its own, by stock SVI."""

import argparse

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyrovae.data import load
from pyrovae.diagnostics import evaluate
from pyrovae.guides import DRAWGuide
from pyrovae.models import DRAW
from pyrovae.plots import image_grid

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
parser.add_argument("--steps", type=int, default=400, help="SVI steps on batches of 100 images")
parser.add_argument("--output", default="draw.png", help="images drawn from the prior")
args = parser.parse_args()
pyro.set_rng_seed(0)
x, test = (load(args.data, split=split, binarize="fixed") for split in ("train", "test"))
model = DRAW(x.shape[1], latent=4, hidden=64, steps=4)
guide = DRAWGuide(model)
before = evaluate(model, guide, test, num_particles=20)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO())
for step in range(args.steps):
    model.beta.fill_(min(1.0, 2 * (step + 1) / args.steps))  # the KL comes in over the first half
    svi.step(x[torch.randint(len(x), (100,))])
found = evaluate(model, guide, test, num_particles=100)
print(found)
image_grid(model.sample(60, mean=True), columns=12).savefig(args.output)
independent = torch.distributions.Bernoulli((x.sum(0) + 1) / (len(x) + 2)).log_prob(test).sum(-1)
for bound, better in ((before.hard_elbo, False), (found.hard_elbo, True)):  # a net that ignores its code would not pass
    gain = bound - independent
    assert (gain.mean() > 5 * gain.std() / len(test) ** 0.5) == better, gain.mean()
