"""The bound that training reports: of the programs as written and discrete, with the same draws at every record."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.handlers import discretize
from pyrovae.handlers.measures import check_measures
from pyrovae.handlers.structure import Structure, read_structure
from pyrovae.inference.exact.exact import Exact
from pyrovae.inference.fit import root_module
from pyrovae.inference.log_joint import LogJoint, log_likelihood
from pyrovae.inference.posterior import Program
from pyrovae.inference.rows import NUMEL, row_wise, take_some
from pyrovae.inference.variational.batches import num_rows
from pyrovae.inference.weighing import weigh
from pyrovae.ops import isolated_rng

_SEED = 0x5EED


class TrueBound:
    """The mean of log p(x, z) − log q(z) per datum: discrete latents, KL weight 1, no scale, modules in evaluation mode.

    Draws, those of a random `prepare` included, are the same at every call: two calls differ by the parameters alone. Rows
    are taken a few at a time, in bounded memory, where the programs' rows are independent: every latent in the plate of the
    data, and the programs able to run on a part of the rows. Otherwise all rows are taken at once.

    Args:
        model: the model as the user wrote it.
        guide: the guide as the user wrote it; None for the exact log p(x).
        args: the programs' arguments, the data first.
        kwargs: keyword arguments.
        prepare: applied to the arguments of every part, such as a binarization.
        num_samples: draws per datum.
        max_rows: look at this many fixed, random rows where there are more and they are independent.
        indexed: whether the programs get `index` and `num_data` with a part of the rows.
        exact_bytes: memory for the exact log p(x).

    Attributes:
        unnormalized: sites of the model whose log Z is unknown: where there are some, there is no bound.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]],
        *,
        num_samples: int,
        max_rows: int | None = None,
        indexed: bool = False,
        exact_bytes: int = 2**30,
    ) -> None:
        self.args, self.kwargs, self.prepare, self.num_samples = args, dict(kwargs), prepare, num_samples
        self.indexed, self.exact_bytes, self.evaluations = indexed, exact_bytes, 0
        self.modules = [module for program in (model, guide) for module in modules_of(program)]
        programs = (model,) if guide is None else (model, guide)
        total = self.rows = num_rows(args)
        self.index: Tensor | None = None
        self.guided, self.max_rows, self.part = guide is not None, max_rows, total
        with evaluating(self.modules):
            split = row_wise(programs, args, kwargs, total, indexed=indexed, prepare=prepare, needed=self._parted)
        self.split = split
        if split is None:
            structures = tuple(self._structure(program, None) for program in programs)
        else:
            structures = split.structures
            self.rows = total if max_rows is None else min(total, max_rows)
            if self._parted(split.numel):
                order = torch.randperm(total, generator=torch.Generator().manual_seed(_SEED))
                self.index = order[: self.rows].sort().values.to(args[0].device)
        self._all_seen, self.unnormalized = not structures[0].latents, structures[0].unnormalized
        hard = [_hard(program, structure) for program, structure in zip(programs, structures, strict=True)]
        if len(hard) == 2:
            check_measures(*(self._structure(program, 2 if self.index is not None else None) for program in hard))
        self.model, self.guide = hard[0], hard[1] if len(hard) == 2 else None

    def __call__(self) -> tuple[float, float]:
        """The bound per datum in nats and its standard error; (−inf, inf) where the guide draws what the model excludes."""
        with evaluating(self.modules), isolated_rng(_SEED):
            if self.guide is None:
                return self._exact(), 0.0
            sums, variances, count, broadcasts = [], [], 0, None
            for args, kwargs in self._parts():
                log_joint = LogJoint(self.model, args, kwargs, broadcasts=broadcasts)
                log_w = weigh(log_joint, self.guide, self.num_samples)[1].double()
                broadcasts = log_joint.broadcasts
                self.evaluations += log_w.numel()
                count += max(1, log_w[0].numel())
                sums.append(log_w.mean(0).sum())
                variances.append((log_w.var(0) / len(log_w)).sum())
            mean = float(torch.stack(sums).sum()) / count
            if math.isinf(mean):
                return -math.inf, math.inf
            return mean, float(torch.stack(variances).sum().sqrt()) / count

    def _exact(self) -> float:
        parts = []
        for args, kwargs in self._parts():
            structure = read_structure(self.model, args, kwargs) if self._all_seen else None
            if structure is not None:
                parts.append(log_likelihood(self.model, args, kwargs, structure).detach().reshape(-1))
                self.evaluations += parts[-1].numel()
                continue
            posterior = Exact(max_bytes=self.exact_bytes).infer(self.model, *args, **kwargs)
            self.evaluations += int(posterior.diagnostics["model_evaluations"])
            assert posterior.log_evidence is not None
            parts.append(posterior.log_evidence.reshape(-1))
        return float(torch.cat(parts).mean())

    def _parts(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        if self.index is None:
            yield self._prepared(self.args, 0), self.kwargs
            return
        for start in range(0, self.rows, self.part):
            args, kwargs = self._rows(self.index[start : start + self.part])
            yield self._prepared(args, start), kwargs

    def _rows(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.split is not None
        return take_some(self.args, self.kwargs, index, self.split, num_rows(self.args))

    def _prepared(self, args: tuple[Any, ...], start: int) -> tuple[Any, ...]:
        with isolated_rng(_SEED + 1 + start):  # draws of its own, which those of the guide do not move
            return self.prepare(args)

    def _structure(self, program: Program, size: int | None) -> Structure:
        """What a program is made of with its first rows, or all."""
        args, kwargs = self.args, self.kwargs
        if size is not None:
            args, kwargs = self._rows(torch.arange(size, device=self.args[0].device))
        with evaluating(self.modules):
            return read_structure(program, self._prepared(args, 0), kwargs)

    def _parted(self, numel: int) -> bool:
        """Whether some rows are taken at a time, or some in all, by the elements of a row."""
        total = num_rows(self.args)
        if self.guided:
            self.part = max(1, NUMEL // (self.num_samples * numel))
        return min(self.part, total if self.max_rows is None else self.max_rows) < total


def modules_of(program: Any) -> list[nn.Module]:
    """All modules of a program that is a module, perhaps wrapped by `relax` and the like."""
    root = root_module(program)
    return [] if root is None else list(root.modules())


@contextlib.contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Run modules in evaluation mode, and put their modes back."""
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def _hard(program: Program, structure: Structure) -> Program:
    relaxed = any(latent.kind.startswith("relaxed") or latent.measure == "quantized" for latent in structure.latents)
    return discretize(program) if relaxed else program
