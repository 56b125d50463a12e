"""PCD by rbms 0.5.0 without its command line and files: its own functions in its own order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def epoch(x: Tensor, hidden: int, batch: int, chains: int, k: int, *, rate: float = 0.01) -> Callable[[], object]:
    """A job that runs ⌊N/batch⌋ centred PCD-k updates; its gradients have unit norm.

    Args:
        x: bits `[N, D]`, float32.
        hidden: units.
        batch: rows of a minibatch.
        chains: persistent chains.
        k: Gibbs steps an update.
        rate: of its SGD.
    """
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.dataset.dataset_class import RBMDataset
    from rbms.training.pcd import fit_batch_pcd

    n = len(x)
    dataset = RBMDataset(
        x.numpy(),
        np.zeros(n),
        np.ones(n, "float32"),
        np.arange(n),
        "mnist",
        is_binary=True,
        device="cpu",
    )

    def run() -> None:
        machine = BBRBM.init_parameters(hidden, dataset, torch.device("cpu"), torch.float32)
        machine.init_grad()
        state = machine.init_chains(chains)
        optimizer = torch.optim.SGD(machine.parameters(), lr=rate, maximize=True)
        with torch.no_grad():
            for _ in range(n // batch):
                index = torch.randperm(n)[:batch]
                optimizer.zero_grad(set_to_none=False)
                rows = (dataset.data[index], dataset.weights[index])
                state, _ = fit_batch_pcd(rows, state, machine, gibbs_steps=k, beta=1.0, centered=True)
                optimizer.step()

    return run
