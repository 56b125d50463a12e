"""Checkpoints: one file of tensors and plain values that is whole or absent, and a readable account beside it.

`NAME.pt` holds everything, loads with `weights_only=True`, and carries a digest of its own content. It is written to
another name and then renamed, so that a killed process leaves the old file or the new one, never a part. `NAME.json` is
a copy of the account for people and other programs; it names the digest that it belongs to, and loading never reads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.inference.fit import root_module
from pyrovae.inference.variational.fault import generators, set_generators

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: of the `.pt` file.
        account: `step`, `epoch`, `history`, `best_step`, `seed`, `seconds`, `settings`, `versions`, `data` (fingerprints),
            `architecture` (names and shapes), `config` (the constructor's arguments of programs that declare them), `digest`.
        states: as :attr:`pyrovae.inference.Fit.states`, the averages where weights were averaged.
        contents: the rest, for `fit(..., resume=True)`.
    """

    path: Path
    account: Mapping[str, Any] = field(repr=False)
    states: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    contents: Mapping[str, Any] = field(repr=False)

    def restore(self, model: Any, guide: Any = None) -> None:
        """Put the parameters into modules, in place.

        Args:
            model: a module as the checkpoint's, perhaps wrapped by `relax` and the like.
            guide: likewise; None leaves it.

        Raises:
            ValueError: if a parameter has another name or shape, with the first that differs.
        """
        modules = {"model": root_module(model), "guide": root_module(guide)}
        here = {name: describe(module.state_dict()) for name, module in modules.items() if module is not None}
        saved = {name: describe(self.states.get(name, {})) for name in here}
        check_architecture(saved, here, self.path)
        for name, module in modules.items():
            if module is not None:
                module.load_state_dict(dict(self.states.get(name, {})))


def save(folder: str | Path, name: str, account: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
    """Write `NAME.pt` and `NAME.json`, each in one piece.

    Args:
        folder: made where it is missing.
        name: "last" or "best".
        account: plain values.
        contents: `states`, and whatever else of tensors and plain values.

    Raises:
        ValueError: if a value is neither, which `weights_only=True` would refuse.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = on_cpu({"account": account, **contents})
    whole["account"]["digest"] = digest(whole)
    whole["format"] = FORMAT
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    write(folder / f"{name}.pt", buffer.getvalue())
    text = json.dumps(finite({"format": FORMAT, **whole["account"]}), indent=1, allow_nan=False)
    write(folder / f"{name}.json", text.encode())


def load(folder: str | Path, name: str = "last") -> Checkpoint:
    """Read a checkpoint; nothing in it is executed (`weights_only=True`).

    Args:
        folder: that `Variational(checkpoint=folder)` wrote.
        name: "last" or "best".

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is truncated, damaged, no checkpoint of this library, or of another format.

    Example:
        >>> import tempfile
        >>> from pyrovae.guides import AmortizedMeanField
        >>> from pyrovae.inference import Variational
        >>> from pyrovae.models import toy
        >>> net = toy.belief_net()
        >>> guide = AmortizedMeanField(net)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fit = Variational(guide, num_steps=4, checkpoint=folder).fit(net, net.sample(8))
        ...     load(folder, "best").restore(net, guide)
    """
    path = Path(folder) / f"{name}.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a checkpoint {path}, got no such file; train with Variational(..., checkpoint={str(folder)!r}) first"
        )
    other = "best" if name == "last" else "last"
    remedy = f"load {other!r} from the same folder, or train anew in another"
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader's errors are of many kinds
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise ValueError(
            f"expected a whole checkpoint, got {path}, which cannot be read ({reason}); it is truncated or damaged, {remedy}"
        ) from error
    if not isinstance(whole, dict) or "format" not in whole:
        raise ValueError(f"expected a checkpoint of pyrovae, got {path} without a format; {remedy}")
    if whole.pop("format") != FORMAT:
        account = whole.get("account")
        versions = account.get("versions") if isinstance(account, dict) else None
        written = versions.get("pyrovae", "another version") if isinstance(versions, dict) else "another version"
        raise ValueError(
            f"expected a checkpoint of format {FORMAT}, got another in {path}, written by pyrovae {written}; load it with that "
            "version, or train anew in another folder"
        )
    if not isinstance(whole.get("account"), dict):
        raise ValueError(f"expected a checkpoint with an account of the run, got {path} without one; {remedy}")
    found = whole["account"].pop("digest", None)
    if found is None or found != digest(whole):
        raise ValueError(f"expected a whole checkpoint, got {path}, whose content does not match its digest; {remedy}")
    account = {**whole.pop("account"), "digest": found}
    return Checkpoint(path, account, whole.pop("states"), whole)


def check_architecture(saved: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """Refuse programs whose parameters are not those of a checkpoint.

    Args:
        saved: `{"model": {name: shape}, …}` of the checkpoint.
        here: of the programs.
        path: of the checkpoint.

    Raises:
        ValueError: with the first parameter that differs, and both shapes.
    """
    for part in [*saved, *(part for part in here if part not in saved)]:
        a, b = saved.get(part, {}), here.get(part, {})
        for name in [*a, *(name for name in b if name not in a)]:
            if list(a.get(name, ())) != list(b.get(name, ())) or (name in a) != (name in b):
                then, now = (str(list(x[name])) if name in x else "absent" for x in (a, b))
                raise ValueError(
                    f"expected the architecture of {path}, got another: {name!r} of the {part} is {then} in the checkpoint and "
                    f"{now} here; build the programs with the sizes of the checkpoint (its .json names them), or train anew in "
                    "another folder"
                )


def describe(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Shapes by name."""
    return {name: list(value.shape) for name, value in state.items()}


def fingerprint(value: Any) -> list[dict[str, Any]]:
    """Shape, dtype and checksum of every tensor in arguments, in order; costs one pass over the data."""
    if isinstance(value, Tensor):
        check = 0
        for part in value.detach().reshape(-1).split(2**24):
            check = zlib.crc32(part.cpu().contiguous().view(torch.uint8).numpy(), check)
        return [{"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "crc32": f"{check:08x}"}]
    if isinstance(value, Mapping):
        return [found for key in value for found in fingerprint(value[key])]
    return [found for item in value for found in fingerprint(item)] if isinstance(value, (list, tuple)) else []


def check_data(saved: Sequence[Any], here: Sequence[Any], path: Path) -> None:
    """Refuse other data than a checkpoint was made with.

    Raises:
        ValueError: with both fingerprints.
    """
    if list(saved) != list(here):
        then, now = next(
            (pair for pair in zip(saved, here, strict=False) if pair[0] != pair[1]),
            (f"{len(saved)} tensors", f"{len(here)}"),
        )
        raise ValueError(
            f"expected the data that {path} was made with, {then}, got {now}; pass the same data, or train anew in another "
            "folder"
        )


def check_parts(saved: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with validation data where a checkpoint had none, or without where it had some.

    Raises:
        ValueError: saying which.
    """
    for name in sorted(set(saved) ^ set(here)):
        then, now = ("some", "none") if name in saved else ("none", "some")
        raise ValueError(
            f"expected {name} data as {path} was made with ({then}), got {now}: the best step would be judged otherwise; pass "
            "the same, or train anew in another folder"
        )


def check_same(what: str, saved: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """Refuse settings that differ from those of a checkpoint, whose run would go on as another.

    Args:
        what: for the message.
        saved: plain values of the checkpoint, by name.
        here: those of now.
        path: of the checkpoint.

    Raises:
        ValueError: with all that differ.
    """
    names = [*saved, *(name for name in here if name not in saved)]
    differ = [name for name in names if saved.get(name, "absent") != here.get(name, "absent")]
    if differ:
        then = ", ".join(f"{name}={saved.get(name, 'absent')!r}" for name in differ)
        now = ", ".join(f"{name}={here.get(name, 'absent')!r}" for name in differ)
        raise ValueError(
            f"expected the {what} of {path}, {then}, got {now}; pass the same, or train anew in another folder (from these "
            "weights, by checkpoint.load(folder).restore(model, guide))"
        )


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's generators, as tensors and plain values."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    known = numpy["bit_generator"] == "MT19937"
    return {
        "torch": generators(device),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        }
        if known
        else None,
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of :func:`random_states`."""
    set_generators(states["torch"], device)
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if numpy is not None:
        key = numpy["key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))


def digest(value: Any) -> str:
    """A digest of tensors and plain values, nested."""
    whole = hashlib.blake2b(digest_size=16)
    _feed(whole, value)
    return whole.hexdigest()


def on_cpu(value: Any) -> Any:
    """Tensors, nested, as detached copies on the CPU; each of its own storage, so that no more is written than it holds.

    Raises:
        ValueError: for a value that `weights_only=True` would refuse.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        mapping = Counter if isinstance(value, Counter) else dict  # the milestones of MultiStepLR
        return mapping({key: on_cpu(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(item) for item in value) if type(value) in (list, tuple) else list(map(on_cpu, value))
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # without a subclass, such as that of torch.__version__
    raise ValueError(
        f"expected optimizer, scheduler and objective states of tensors and plain values, got a {type(value).__name__}; a "
        "checkpoint could not be loaded safely, take another optimizer or scheduler or leave out checkpoint"
    )


def config_of(program: Any) -> dict[str, Any] | None:
    """The constructor's arguments, where a program declares them as `config` and JSON can hold them."""
    try:
        config = getattr(program, "config", None)
        return json.loads(json.dumps(config)) if isinstance(config, dict) else None
    except (TypeError, ValueError):  # such as an activation of the user's own
        return None


def finite(value: Any) -> Any:
    """Plain values, nested, with None for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _feed(whole: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        whole.update(f"{value.dtype}{list(value.shape)}".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            whole.update(f"{{{key!r}".encode())
            _feed(whole, item)
        whole.update(b"}")
    elif isinstance(value, (list, tuple)):
        whole.update(b"[")
        for item in value:
            _feed(whole, item)
        whole.update(b"]")
    else:
        whole.update(f"{type(value).__name__}{value!r},".encode())


def write(path: Path, content: bytes) -> None:
    """Write a file in one piece: to another name, to the disk, then renamed."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
