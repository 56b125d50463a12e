"""The house: direction of imports, what an import may do, names and their docstrings."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyrovae"
ORDER = [
    {"ops"},
    {"distributions"},
    {"handlers"},
    {"models", "guides"},
    {"inference"},
    {"diagnostics"},
    {"compare", "report", "report_evaluation", "plots"},  # one layer: they may import one another
    {"main_job", "train_job"},
    {"console"},
    {"cli_train"},
    {"cli"},
    {"__main__"},
]
LAYER = {part: k for k, parts in enumerate(ORDER) for part in parts}
FREE = {"data", "__init__"}  # data sets stand beside the parts and import none but ops
HEAVY = ["arviz", "matplotlib", "sklearn", "torchvision", "pandas", "rich", "typer"]
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
SUBPACKAGES = sorted({"pyrovae"} | {f"pyrovae.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py")})


def _part(path):
    return path.parts[1].removesuffix(".py")


def _imported_parts(source, part):
    """The parts of pyrovae that a file imports, its own apart, imports within functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [node.module] if node.module != "pyrovae" else [f"pyrovae.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("pyrovae.")}
    return found - {part}


def _wrong(source, part):
    """Imported parts that do not lie below a part."""
    found = {p for p in _imported_parts(source, part) if p != "__version__"}
    if part == "data":
        return found - {"ops"}
    if part == "__init__":
        return found
    layer = LAYER[part]
    wrong = {p for p in found - FREE if LAYER[p] > layer or (LAYER[p] == layer and layer != LAYER["compare"])}
    if part == "inference":
        wrong |= found & {"models"}  # they meet in the contracts
    return wrong | (found & FREE if layer < LAYER["compare"] else set())


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_downwards(path):
    assert _part(path) in LAYER.keys() | FREE, f"{path} is no part of the house"
    assert not _wrong((ROOT / path).read_text(), _part(path))


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("from pyrovae.models import toy", "inference"),
        ("def f():\n    import pyrovae.inference.exact.exact", "models"),
        ("from pyrovae import guides", "models"),
        ("from pyrovae.handlers import relax", "ops"),
        ("from pyrovae.data import load", "models"),
    ],
)
def test_a_wrong_import_is_noticed(source, part):
    assert _wrong(source, part)


def test_no_utils_and_no_relative_targets():
    assert not [path for path in MODULES if path.stem in ("utils", "util", "helpers", "misc")]


def test_the_two_links_at_the_root():
    for name in ("models", "inference"):
        link = ROOT / name
        assert link.is_symlink()
        assert os.readlink(link) == f"pyrovae/{name}"
        assert link.resolve() == (PACKAGE / name).resolve()


_STATE = """
import json, logging, random, sys, warnings
import numpy, torch, pyro
def state():
    return dict(
        dtype=str(torch.get_default_dtype()), threads=torch.get_num_threads(), grad=torch.is_grad_enabled(),
        validate=torch.distributions.Distribution._validate_args, settings=repr(sorted(pyro.settings.get().items())),
        store=len(pyro.get_param_store()._params), deterministic=torch.are_deterministic_algorithms_enabled(),
        handlers=repr(logging.getLogger().handlers), level=logging.getLogger().level,
        warnings=repr(warnings.filters), torch=torch.get_rng_state().tolist(), python=repr(random.getstate()),
        numpy=repr(numpy.random.get_state()), stack=len(pyro.poutine.runtime._PYRO_STACK), hook=repr(sys.excepthook),
    )
before = state(); names = set(sys.modules)
{statement}
after = state()
changed = [k for k in before if before[k] != after[k]]
new = sorted({{m.split('.')[0] for m in set(sys.modules) - names}})
print(json.dumps([changed, new]))
"""


def _effects(statement):
    code = _STATE.format(statement=statement).replace("{{", "{").replace("}}", "}")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(run.stdout.splitlines()[-1])


def test_import_changes_nothing_and_loads_nothing_heavy():
    changed, new = _effects("\n".join(f"import {name}" for name in [*SUBPACKAGES, "pyrovae.data"]))
    assert changed == []
    assert not set(new) & set(HEAVY)


@pytest.mark.parametrize(
    ("statement", "what"),
    [("torch.manual_seed(1)", "torch"), ("random.random()", "python"), ("pyro.enable_validation(False)", "validate")],
)
def test_a_change_of_state_is_noticed(statement, what):
    assert what in _effects(statement)[0]


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        thing = getattr(module, public)
        if inspect.ismodule(thing) or not callable(thing):
            continue
        assert (thing.__doc__ or "").strip(), f"{name}.{public} has no docstring"
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if not method.startswith("_") and inspect.isfunction(function):
                    assert inspect.getdoc(getattr(thing, method)), f"{name}.{public}.{method} has no docstring"
