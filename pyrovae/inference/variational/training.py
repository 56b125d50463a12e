"""A run of `Variational.fit`: steps, records of the true bound, early stopping, checkpoints, log."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.handlers.structure import read_structure
from pyrovae.inference.elbo.exact_likelihood import ExactLikelihood
from pyrovae.inference.fit import Fit, check_held_out, root_module, versions
from pyrovae.inference.posterior import Program
from pyrovae.inference.variational import checkpoint as files
from pyrovae.inference.variational.batches import check_device, on_device, take_index
from pyrovae.inference.variational.optimization import Optimization
from pyrovae.inference.variational.progress import Bar, in_floats
from pyrovae.inference.variational.saved import FIXED, Saved, settings
from pyrovae.inference.variational.true_bound import TrueBound

if TYPE_CHECKING:
    from pyrovae.inference.variational.variational import Variational


class Training:
    """One run; see :class:`pyrovae.inference.Variational` for its options.

    Args:
        method: the options.
        model: a Pyro program.
        args: its arguments, the data first.
        kwargs: its keyword arguments.
        validation: a tensor or a tuple of arguments, or None.
        resume: whether to go on from the method's checkpoint.
    """

    def __init__(
        self,
        method: Variational,
        model: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        validation: Any,
        *,
        resume: bool,
    ) -> None:
        self.begin, self.seed = time.perf_counter(), torch.initial_seed()
        self.method, self.model = method, model
        found = self._checkpoint() if resume else None
        if found is None and method.checkpoint is not None and (Path(method.checkpoint) / "last.pt").exists():
            raise FileExistsError(
                f"expected a folder without a checkpoint, got {method.checkpoint} with one; pass resume=True to go on from "
                "it, or name another folder"
            )
        check_held_out(args, kwargs, validation)
        args, kwargs, held_out = self._moved(args, kwargs, validation)
        self.data = (
            {}
            if method.checkpoint is None
            else {
                "training": files.fingerprint((args, kwargs)),
                **({} if held_out is None else {"validation": files.fingerprint(held_out)}),
            }
        )
        if found is not None:
            files.check_parts(found.account["data"], self.data, found.path)
            for name, prints in self.data.items():
                files.check_data(found.account["data"].get(name, []), prints, found.path)
        self.run = Optimization(method, model, args, kwargs, learn_model=True)
        self.num_steps = self.run.num_steps
        self.every = method.log_every or max(1, self.num_steps // 20)
        self.training = self._bound(args, kwargs, max_rows=method.log_rows, indexed=self._indexed(kwargs))
        self.validation = None if held_out is None else self._held_out(held_out, kwargs)
        self.bounded = not self.training.unnormalized
        if method.patience is not None and not self.bounded:
            raise ValueError(
                f"expected no patience where log Z is unknown, as at {self.training.unnormalized[0]!r}, got {method.patience}: "
                "no bound tells when to stop; leave it out"
            )
        if method.patience is not None and self.validation is None:
            raise ValueError(
                "expected validation data that the guide can take with patience, got none; pass validation=... to fit, with a "
                "guide that is not one of parameters for each training row"
            )
        self.history: list[dict[str, Any]] = []
        self.step = 0
        self.best: dict[str, Any] | None = None  # the programs at `best_step`, kept for `patience`
        self.saved = Saved(self.run)
        if found is not None:
            self._go_on(found)

    def __call__(self) -> Fit:
        """Train."""
        method, run, losses = self.method, self.run, list[Tensor]()
        stopped = "num_steps"
        self._write_log()
        bar = Bar(self.num_steps, self.step, shown=method.progress)
        run.tell = bar.say
        with run, bar:
            while True:
                if self._due():
                    run.check()
                    self._record(in_floats(losses))
                    losses = []
                if self._tired():
                    stopped = "patience"
                    break
                if self.step >= self.num_steps:
                    break
                loss = run.step(self.step)
                losses.append(loss)
                self.step += 1
                bar.tell(self.step, partial(self._shown, loss))
        if run.update is not None and run.update.average is not None:
            run.update.average.swap()
        if method.patience is not None and self.best is not None and self.best_step != self.step:
            self.saved.put(self.best)
        return Fit(
            history=tuple(self.history),
            bound=method._bound,
            states=run.states(),
            seconds=time.perf_counter() - self.begin,
            model_evaluations=self._evaluations(),
            seed=self.seed,
            penalty=method.penalty,
            versions=versions(),
            best_step=self.best_step,
            stopped=stopped,
        )

    @property
    def best_step(self) -> int | None:
        """The step of the first of the best records."""
        step, best = None, -math.inf
        for record in self.history:
            value = self._criterion(record)
            if value is not None and (step is None or value > best):
                step, best = record["step"], value
        return step

    def _criterion(self, record: Mapping[str, Any]) -> float | None:
        return record["bound"] if self.validation is None else record["validation"]

    def _due(self) -> bool:
        if self.history and self.history[-1]["step"] == self.step:
            return False  # of the run that this one resumes
        return self.step % self.every == 0 or self.step >= self.num_steps

    def _tired(self) -> bool:
        """Whether `patience` records have brought no improvement."""
        if self.method.patience is None:
            return False
        return sum(record["step"] > (self.best_step or 0) for record in self.history) >= self.method.patience

    def _record(self, losses: list[float]) -> None:
        run = self.run
        with run.averaged():
            bound, stderr = self.training() if self.bounded else (None, None)
            validation = self.validation()[0] if self.bounded and self.validation is not None else None
            groups = None if run.update is None else getattr(run.update.optimizer, "param_groups", None)
            self.history.append(
                {
                    "step": self.step,
                    "epoch": self.step / run.batches.per_epoch,
                    "loss": sum(losses) / len(losses) if losses else None,
                    "bound": bound,
                    "stderr": stderr,
                    "rows": self.training.rows,
                    "validation": validation,
                    "seconds": time.perf_counter() - self.begin,
                    "temperature": None if run.temperature is None else run.temperature.value,
                    "beta": 1.0 if run.beta is None else run.beta.value,
                    "learning_rate": float(groups[0]["lr"]) if groups else None,
                }
            )
            is_best = self.best_step == self.step
            programs = self.saved.take() if self.method.checkpoint is not None or self.method.patience is not None else {}
        if is_best and self.method.patience is not None:
            self.best = programs
        if self.method.checkpoint is not None:
            account, contents = self._account(), {**programs, **self._contents()}
            files.save(self.method.checkpoint, "last", account, contents)
            if is_best:  # after `last`: killed in between, `last` is itself the best
                files.save(self.method.checkpoint, "best", account, contents)
        self._write_log(self.history[-1])

    def _contents(self) -> dict[str, Any]:
        return {
            "run": self.saved.take_run(),
            "generators": files.random_states(self.run.device),
        }

    def _account(self) -> dict[str, Any]:
        method = self.method
        return {
            "step": self.step,
            "epoch": self.history[-1]["epoch"],
            "best_step": self.best_step,
            "seed": self.seed,
            "seconds": time.perf_counter() - self.begin,
            "evaluations": self._evaluations(),
            "settings": settings(method, self.run, self.num_steps),
            "versions": versions(),
            "data": self.data,
            "architecture": self.saved.architecture(),
            **self._programs(),
            "history": self.history,
        }

    def _programs(self) -> dict[str, Any]:
        """What the programs that are modules are called, and the constructors' arguments of those that declare them."""
        programs = {"model": root_module(self.model), "guide": root_module(self.method.guide)}
        configs = {name: files.config_of(module) for name, module in programs.items()}
        return {
            "programs": {name: type(module).__name__ for name, module in programs.items() if module is not None},
            "config": {name: config for name, config in configs.items() if config},
        }

    def _checkpoint(self) -> files.Checkpoint:
        if self.method.checkpoint is None:
            raise ValueError("expected a checkpoint folder to resume from, got none; pass Variational(..., checkpoint=folder)")
        return files.load(self.method.checkpoint, "last")

    def _go_on(self, found: files.Checkpoint) -> None:
        """Continue from a checkpoint: parameters, optimizer, schedules, minibatches, generators, history."""
        account, contents, run = found.account, found.contents, self.run
        then, now = account["settings"]["batch_size"], self.method.batch_size
        if then != now:
            raise ValueError(f"expected batch_size={then} as in {found.path}, got {now}; pass the same, or train anew")
        if (old := account["versions"]) != (new := versions()):
            changed = ", ".join(f"{name} {old.get(name)} is now {new[name]}" for name in new if old.get(name) != new[name])
            warnings.warn(
                f"the checkpoint was written with other versions ({changed}): the run goes on, but not bit for bit",
                stacklevel=4,
            )
        if contents["leaves"].get("objective"):
            run.discover()
        files.check_architecture(account["architecture"], self.saved.architecture(), found.path)
        self._check_same(found)
        self.saved.put({"states": found.states, **contents})
        self.saved.put_run(contents["run"])
        self.history, self.step, self.seed = list(account["history"]), account["step"], account["seed"]
        self.begin -= account["seconds"]
        if self.method.patience is not None:
            best = found if self.best_step == self.step else files.load(found.path.parent, "best")
            self.best = {"states": best.states, "leaves": best.contents["leaves"]}
        self.training.evaluations += account["evaluations"] - run.evaluations
        files.set_random_states(contents["generators"], run.device)

    def _check_same(self, found: files.Checkpoint) -> None:
        """Refuse programs and options that make another run than the checkpoint's."""
        account, programs = found.account, self._programs()
        files.check_same("programs", account["programs"], programs["programs"], found.path)
        for name in ("model", "guide"):
            then, now = (source["config"].get(name, {}) for source in (account, programs))
            files.check_same(f"{name}'s config", then, now, found.path)
        saved, here = account["settings"], settings(self.method, self.run, self.num_steps)
        both = [name for name in FIXED if not (callable(getattr(self.method, name, None)) and isinstance(saved[name], str))]
        then, now = ({name: source[name] for name in both} for source in (saved, here))
        files.check_same("options", then, now, found.path)
        then, now = ({"optim": str(source["optim"]).split("(")[0]} for source in (saved, here))
        if "<" not in str(then) + str(now):  # a function of the user's own says nothing of what it makes
            files.check_same("optimizer", then, now, found.path)

    def _evaluations(self) -> int:
        return self.run.evaluations + sum(b.evaluations for b in (self.training, self.validation) if b is not None)

    def _moved(self, args: Any, kwargs: Any, validation: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...] | None]:
        """Modules and tensors on the device."""
        held_out = validation if validation is None or isinstance(validation, tuple) else (validation,)
        device = check_device(self.method.device)
        if device is not None:
            for program in (self.model, self.method.guide):
                if (module := root_module(program)) is not None:
                    module.to(device)
        return on_device(args, device), on_device(kwargs, device), on_device(held_out, device)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> TrueBound:
        method = self.method
        if isinstance(method.elbo, ExactLikelihood):
            options["exact_bytes"] = method.elbo.max_bytes
        return TrueBound(
            self.model, method.guide, args, kwargs, method._prepared, num_samples=method.num_log_samples, **options
        )

    def _held_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TrueBound | None:
        """The bound of validation data; None where the guide has no parameters for other rows, but one set a datum."""
        try:
            return self._bound(args, kwargs)
        except ValueError:
            read_structure(self.model, self.method._prepared(args), kwargs)  # data that the model refuses are an error
            return None

    def _indexed(self, kwargs: dict[str, Any]) -> bool:
        run = self.run
        if self.method.batch_size is not None or run.rows < 2:
            return run.batches.indexed
        programs = (self.model,) if self.method.guide is None else (self.model, self.method.guide)
        return take_index(programs, run.first, kwargs, torch.arange(run.rows, device=run.device), run.rows)

    def _shown(self, loss: Tensor) -> dict[str, Any]:
        last = self.history[-1]
        shown = {"epoch": f"{self.step / self.run.batches.per_epoch:.1f}", "loss": f"{float(loss):.4g}"}
        name = "bound" if self.validation is None else "validation"
        return shown | ({name: f"{last[name]:.4f}"} if self.bounded else {})

    def _write_log(self, record: Mapping[str, Any] | None = None) -> None:
        """Append a record to the JSON-lines file; without one, start the file with the history so far."""
        if self.method.log is None:
            return
        path = Path(self.method.log)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(files.finite(r), allow_nan=False) + "\n" for r in (self.history if record is None else [record])]
        if record is None:
            files.write(path, "".join(lines).encode())
            return
        with open(path, "a") as file:  # closed, and so flushed, at every record
            file.writelines(lines)
