"""Six ways to learn one belief net on the binarized digits, over five seeds.

    python benchmarks/digits.py

Judged by the exact log p(x) of what was learned; differences to exact EM are paired by seed.
"""

from __future__ import annotations

import sys

import torch

from pyrovae import data
from pyrovae.compare import compare
from pyrovae.main_job import learning_methods
from pyrovae.models import SigmoidBeliefNet


def main(num_seeds: int) -> None:
    """Learn, compare and print."""
    train, test = (data.load("digits", split=split, binarize="threshold") for split in ("train", "test"))
    torch.manual_seed(2026)
    net = SigmoidBeliefNet(train.shape[1], 8)
    found = compare(
        net,
        train,
        learning_methods(net, len(train), 1.0, 0.1),
        x_test=test,
        seeds=range(num_seeds),
        progress=lambda name, done, total: print(f"{done}/{total} {name}", file=sys.stderr),
    )
    print(found.to_markdown())
    table = found.learning
    assert table is not None
    em, gradient = (table.set_index("method").loc[name] for name in ("exact EM", "exact gradient"))
    print(
        f"\nexact EM {em.log_p_train:.4f} ± {em.log_p_train_se:.4f}, exact gradient {gradient.log_p_train:.4f} ± "
        f"{gradient.log_p_train_se:.4f} nats of training log p(x) per datum"
    )


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
