"""A plain Pyro script, CapturedSVI in the place of SVI: the same parameters in less time; a stale number that is found."""

import argparse
import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from pyrovae import data
from pyrovae.inference import CapturedSVI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600, help="steps of each")
steps = parser.parse_args().steps
x = data.load("digits", split="train", binarize="threshold")
spread = 1.0  # of the prior: a Python number that the model closes over


def fit(kind: type) -> tuple[list[float], torch.nn.Module, float]:
    """Losses, the decoder and the seconds of a run; nothing in it knows of this library."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), spread).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            loc, log_scale = encoder(x).split(8, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    svi = kind(model, guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO())
    losses = [svi.step(x[:100]) for _ in range(20)]  # validated, and recorded where it is captured
    begin = time.perf_counter()
    losses += [svi.step(x[torch.randint(len(x), (100,))]) for _ in range(steps)]
    return losses, decoder, time.perf_counter() - begin


stock, decoder, seconds = fit(SVI)
captured, same, fewer = fit(CapturedSVI)
furthest = max(((a - b).norm() / a.norm()).item() for a, b in zip(decoder.parameters(), same.parameters(), strict=True))
print(f"loss per image: {captured[0] / 100:.1f} at first, {sum(captured[-50:]) / 5000:.1f} over the last 50 steps")
print(f"{1e3 * seconds / steps:.2f} ms by stock SVI, {1e3 * fewer / steps:.2f} captured ({seconds / fewer:.1f} times)")
print(f"relative difference of the parameters: {furthest:.1e}")
assert captured[0] == stock[0], "the first step is the eager one"
assert furthest < 1e-2, "only the rounding of the fused optimizer lies between the two runs"

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    pyro.clear_param_store()

    def model() -> None:
        """One latent."""
        pyro.sample("z", dist.Normal(0.0, spread))

    def guide() -> None:
        """Its location is learned."""
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0))

    svi = CapturedSVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), Trace_ELBO())
    for step in range(20):
        spread = 1.0 + step / 10  # a schedule that the graph cannot see, and that the comparison finds
        svi.step()
print("\n".join(str(warning.message) for warning in told))
assert len(told) == 1, "one warning"
assert "scale of the site 'z'" in str(told[0].message), "which names the number"
