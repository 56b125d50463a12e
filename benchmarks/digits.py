"""Ways to learn one belief net on the binarized digits, over five seeds.

    python benchmarks/digits.py [seeds] [budget] [method,method,…]

Judged by the exact log p(x) of what was learned; differences to exact EM are paired by seed. A budget of 1 is that of the main
job; at 5 the two exact learners have converged.
"""

from __future__ import annotations

import math
import sys

import torch

from pyrovae import data
from pyrovae.compare import compare
from pyrovae.main_job import FAMILIES, Task
from pyrovae.models import SigmoidBeliefNet


def main(num_seeds: int = 5, budget: float = 1.0, names: str = "") -> None:
    """Learn, compare and print."""
    train, test = (data.load("digits", split=split, binarize="threshold") for split in ("train", "test"))
    torch.manual_seed(2026)
    net = SigmoidBeliefNet(train.shape[1], 8)
    task = Task(net, len(train), budget, 0.1)
    methods = {name: make(task) for name, make in FAMILIES["sbn"].learners.items()}
    found = compare(
        net,
        train,
        {name: method for name, method in methods.items() if not names or name in names.split(",")},
        x_test=test,
        seeds=range(num_seeds),
        progress=lambda name, done, total: print(f"{done}/{total} {name}", file=sys.stderr),
    )
    print(found.to_markdown())
    table = found.learning
    assert table is not None
    em, gradient = (table.set_index("method").loc[name] for name in ("exact EM", "exact gradient"))
    gap, error = em.log_p_train - gradient.log_p_train, math.hypot(em.log_p_train_se, gradient.log_p_train_se)
    print(
        f"\ntraining log p(x): exact EM minus exact gradient {gap:.4f} ± {error:.4f} nats per datum; standard deviations over "
        f"seeds {em.log_p_train_se * num_seeds**0.5:.4f} and {gradient.log_p_train_se * num_seeds**0.5:.4f}"
    )


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    main(*(convert(a) for convert, a in zip((int, float, str), sys.argv[1:], strict=False)))
