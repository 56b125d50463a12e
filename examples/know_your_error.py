"""Your own Pyro program before Exact, Gibbs and mean field: the same posterior three times, and how wrong each is.

Run: python examples/know_your_error.py
"""

import argparse
import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.compare import compare
from pyrovae.inference import Exact, Gibbs, MeanField

# Two diseases and a faulty gene behind four symptoms: an ordinary Pyro program, with sites and plates of its own.
CAUSES = torch.tensor([[3.0, 2.5, 0.0, 0.5], [0.0, 2.5, 3.0, 0.0], [1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)


def clinic(symptoms: Tensor) -> None:
    """Three causes, each present or not, behind four symptoms."""
    with pyro.plate("patients", len(symptoms)):
        ill = pyro.sample("ill", dist.Bernoulli(torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64)).to_event(1))
        pyro.sample("symptoms", dist.Bernoulli(logits=ill @ CAUSES - 2.0).to_event(1), obs=symptoms)


def by_hand(symptoms: Tensor) -> tuple[Tensor, Tensor]:
    """P(ill | symptoms) and log p(symptoms) by adding up all eight states."""
    total, weighted = torch.zeros(len(symptoms)), torch.zeros(len(symptoms), 3)
    for bits in itertools.product([0.0, 1.0], repeat=3):
        ill = torch.tensor(bits, dtype=torch.float64)
        prior = dist.Bernoulli(torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64)).log_prob(ill).sum()
        p = (prior + dist.Bernoulli(logits=ill @ CAUSES - 2.0).log_prob(symptoms).sum(-1)).exp()
        total, weighted = total + p, weighted + p.unsqueeze(-1) * ill
    return weighted / total.unsqueeze(-1), total.log()


def main(steps: int) -> None:
    """Compare the three methods, and each with the sum by hand."""
    torch.manual_seed(0)
    symptoms = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    found = compare(clinic, symptoms, {"exact": Exact(), "Gibbs": Gibbs(steps), "mean field": MeanField()})
    print(found.to_markdown())

    marginals, evidence = by_hand(symptoms)
    exact = found.posteriors["exact"]
    assert torch.allclose(exact.marginals["ill"], marginals, rtol=0, atol=1e-10)
    assert torch.allclose(exact.log_evidence, evidence, rtol=0, atol=1e-10)

    # mean field is a bound, its distance is what the table says, and Gibbs agrees within its own standard error
    field = found.posteriors["mean field"]
    assert (field.log_evidence <= evidence + 1e-10).all()
    table = found.inference.set_index("method")
    assert abs(table["gap"]["mean field"] - float((evidence - field.log_evidence).mean())) < 1e-10
    mean, stderr = found.posteriors["Gibbs"].expectation(lambda states: states["ill"])
    z = (mean - marginals).abs() / stderr.clamp_min(1 / steps)
    assert z.max() < 8, z.max()
    print(f"all as by hand; mean field is {table['gap']['mean field']:.3f} nats off, Gibbs at most {float(z.max()):.1f} s.e.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="draws of each of the four chains")
    main(parser.parse_args().steps)
