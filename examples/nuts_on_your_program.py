"""Pyro's own NUTS as an inference method: a regression whose posterior is known in closed form.

Run: python examples/nuts_on_your_program.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import NUTS
from torch import Tensor

from pyrovae.inference import MCMC

NOISE = 0.5


def line(x: Tensor, y: Tensor) -> None:
    """A straight line with Gaussian noise."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(weights[0] + weights[1] * x, NOISE), obs=y)


def closed_form(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the weights: a Gaussian."""
    features = torch.stack([torch.ones_like(x), x], -1)
    precision = torch.eye(2, dtype=x.dtype) + features.T @ features / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ features.T @ y / NOISE**2, covariance


def main(steps: int) -> None:
    """Run two chains and compare them with the closed form."""
    pyro.set_rng_seed(0)
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    y = 0.3 - 0.8 * x + NOISE * torch.randn(20, dtype=torch.float64)
    posterior = MCMC(NUTS(line), num_samples=steps, num_chains=2, warmup_steps=max(20, steps // 4)).infer(line, x, y)
    mean, covariance = closed_form(x, y)
    found, stderr = posterior.expectation(lambda states: states["weights"])
    z = (found - mean).abs() / stderr
    print(f"closed form {mean.tolist()}\nNUTS        {found.tolist()}  ± {stderr.tolist()}")
    print(f"R-hat {posterior.rhat['weights'].tolist()}, effective draws {posterior.ess['weights'].tolist()}")
    assert z.max() < 8, z.max()
    assert (posterior.variance["weights"] / covariance.diagonal() - 1).abs().max() < 8 * (2 / (2 * steps)) ** 0.5
    assert (mean.abs() / stderr).max() > 8, "a posterior at 0 would be told apart"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="draws of each of the two chains")
    main(parser.parse_args().steps)
