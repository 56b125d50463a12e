"""EM of hidden Markov models against hmmlearn 0.3.3: the same parameters, time, memory; one long sequence.

    pip install hmmlearn
    OMP_NUM_THREADS=1 python benchmarks/hmm.py

Both start from the same parameters and run ten iterations, in turn, in one process, in float64. Ours is
`EM(num_iterations=10).fit(model, x)` as a whole: reading and checking the program, eleven E-steps, the records and the check
that the log posterior never falls. Memory is the peak of a process of its own above its state before the fit.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pyro.distributions as dist
import torch
from peers import hmmlearn_em
from timing import in_fresh_process, in_turn, line, peak_growth, ratio
from torch import Tensor

from pyrovae.inference import EM, Exact
from pyrovae.models import HiddenMarkovModel

STATES, SYMBOLS, SEQUENCES, LENGTH, ITERATIONS, REPEATS = 10, 16, 100, 200, 10, 9


def problem(emission: str, sequences: int, length: int) -> tuple[HiddenMarkovModel, Tensor]:
    """A start, and data from another model with sharper tables."""
    torch.manual_seed(0)
    width = SYMBOLS if emission == "categorical" else 3
    options = {"emission": emission, "prior_count": 0.0}
    truth, start = HiddenMarkovModel(STATES, width, **options), HiddenMarkovModel(STATES, width, **options)
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.mul_(2.0)
    return start, truth.sample(sequences, length=length)


def ours(start: HiddenMarkovModel, *args: Tensor) -> Callable[[], HiddenMarkovModel]:
    """Ten iterations from the start."""

    def fit() -> HiddenMarkovModel:
        model = copy.deepcopy(start)
        EM(num_iterations=ITERATIONS).fit(model, *args)
        return model

    return fit


def tables(model: HiddenMarkovModel) -> dict[str, Tensor]:
    """The model's parameters as hmmlearn names them."""
    with torch.no_grad():
        found = {"startprob_": model.initial.softmax(-1), "transmat_": model.transition.softmax(-1)}
        if model.config["emission"] == "categorical":
            return found | {"emissionprob_": model.emission.logits.softmax(-1)}
        return found | {"means_": model.emission.loc.clone(), "_covars_": (2 * model.emission.log_scale).exp()}


def theirs(start: HiddenMarkovModel, x: Tensor, lengths: Tensor) -> Callable[[], object]:
    """The same by hmmlearn."""
    names = tables(start)
    if "emissionprob_" in names:
        emission = {"probs": names["emissionprob_"]}
    else:
        emission = {"loc": names["means_"], "variance": names["_covars_"]}
    return hmmlearn_em.fitter(names["startprob_"], names["transmat_"], emission, x, lengths, ITERATIONS)


def same_parameters() -> None:
    """The largest difference of any parameter after ten iterations, with and without unequal lengths."""
    print(f"\nlargest difference of a parameter after {ITERATIONS} iterations from the same start")
    for emission in ("categorical", "gaussian"):
        start, x = problem(emission, SEQUENCES, LENGTH)
        for lengths in (torch.full((SEQUENCES,), LENGTH), torch.randint(1, LENGTH + 1, (SEQUENCES,))):
            args = (x,) if bool((lengths == LENGTH).all()) else (x, lengths)
            mine, other = tables(ours(start, *args)()), theirs(start, x, lengths)()
            worst = max(float((torch.as_tensor(getattr(other, name)) - value).abs().max()) for name, value in mine.items())
            moved = max(float((value - tables(start)[name]).abs().max()) for name, value in mine.items())
            what = "equal lengths" if len(args) == 1 else "lengths 1 to 200"
            print(f"  {emission:<12} {what:<18} {worst:.1e}   (parameters moved by up to {moved:.2f})")


def pyro_evidence() -> None:
    """Log p(x) against Pyro's `DiscreteHMM`."""
    start, x = problem("gaussian", SEQUENCES, LENGTH)
    names = tables(start)
    steps = torch.cat((names["startprob_"].expand(1, STATES, STATES), names["transmat_"].expand(LENGTH - 1, STATES, STATES)))
    emission = dist.Normal(names["means_"], names["_covars_"].sqrt()).to_event(1)
    other = dist.DiscreteHMM(torch.zeros(STATES), steps.log(), emission, duration=LENGTH)
    exact = Exact()
    worst = float((exact.infer(start, x).log_evidence - other.log_prob(x)).abs().max())
    one = float(other.log_prob(x)[0])
    print(f"\nlog p(x), Gaussian emissions: largest difference from Pyro's DiscreteHMM {worst:.1e} of {one:.1f}")
    with torch.no_grad():
        seconds = in_turn({"Pyro": lambda: other.log_prob(x), "Exact": lambda: exact.infer(start, x)}, 3)
    print(line("DiscreteHMM.log_prob", seconds["Pyro"]))
    print(line("Exact().infer (evidence and all messages)", seconds["Exact"]))
    print(f"  ratio {ratio(seconds['Pyro'], seconds['Exact'])}")


def timing(emission: str, sequences: int, length: int, repeats: int, clock: Callable[[], float]) -> None:
    """Ten iterations of each, in turn."""
    start, x = problem(emission, sequences, length)
    jobs = {"hmmlearn": theirs(start, x, torch.full((sequences,), length)), "pyrovae": ours(start, x)}
    seconds = in_turn(jobs, repeats, clock)
    print(f"  {emission}, {sequences} x {length}, {STATES} states; an iteration takes")
    for name, found in seconds.items():
        print(line(f"  {name}", [s / ITERATIONS for s in found]))
    print(f"    ratio {ratio(seconds['hmmlearn'], seconds['pyrovae'], 2)}")


def memory(states: int) -> None:
    """Print the peak memory of three iterations on 20 sequences of length 500, in bytes."""
    torch.manual_seed(0)
    model = HiddenMarkovModel(states, SYMBOLS)
    x = model.sample(20, length=500)
    small = HiddenMarkovModel(2, SYMBOLS)
    EM(num_iterations=1).fit(small, x[:2, :5])  # what a first call loads
    print(peak_growth(lambda: EM(num_iterations=3).fit(model, x)))


def main() -> None:
    """All comparisons."""
    try:
        peer = version("hmmlearn")
    except PackageNotFoundError:
        sys.exit("expected hmmlearn for this comparison, got none; pip install hmmlearn")
    print(f"torch {torch.__version__}, hmmlearn {peer} (scaling), float64")
    torch.set_num_threads(1)
    same_parameters()
    pyro_evidence()
    for clock, what in ((time.perf_counter, "wall time"), (time.process_time, "the processor's seconds")):
        print(f"\n1 thread, {what}; the machine's load is {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        timing("categorical", SEQUENCES, LENGTH, REPEATS, clock)
        timing("gaussian", SEQUENCES, LENGTH, REPEATS, clock)
    print("\none long sequence, 1 thread, the processor's seconds")
    timing("categorical", 1, 20_000, 3, time.process_time)
    print("\npeak memory of EM above the data, 20 sequences x 500")
    for states in (20, 160):
        size = int(in_fresh_process(__file__, "memory", str(states)))
        messages = 8 * 20 * 500 * states / 1e6
        print(
            f"  {states:>3} states {size / 1e6:8.1f} MB; a table of times x states {messages:6.1f} MB, of "
            f"times x states x states {messages * states:8.1f} MB"
        )


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    if sys.argv[1:2] == ["memory"]:
        memory(int(sys.argv[2]))
    else:
        main()
