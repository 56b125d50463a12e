"""The data sets against their own laws: generators enumerated by independent code, idx files written byte by byte."""

import builtins
import gzip
import itertools
import math
import os
import struct
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy import stats

from pyrovae import data

FALSE_ALARM = 1e-5
GENERATORS = [("bars_and_stripes", size) for size in (1, 2, 3, 4, 5)] + [("labelled_shifter", n) for n in (1, 2, 3, 6, 8)]


# --- An independent enumeration: plain Python, no tensors ------------------------------------------------------------


def law(name: str, size: int) -> dict[tuple[int, ...], float]:
    """Probability of each distinct row, by running through the generator's coins."""
    rows: Counter[tuple[int, ...]] = Counter()
    for bits in itertools.product((0, 1), repeat=size):
        if name == "bars_and_stripes":
            rows[tuple(bits[i] for i in range(size) for _ in range(size))] += 1
            rows[tuple(bits[j] for _ in range(size) for j in range(size))] += 1
        else:
            rows[bits + bits[1:] + bits[:1] + (1, 0, 0)] += 1
            rows[bits + bits + (0, 1, 0)] += 1
            rows[bits + bits[-1:] + bits[:-1] + (0, 0, 1)] += 1
    return {row: count / rows.total() for row, count in rows.items()}


def chi_square_p_value(x: torch.Tensor, expected: dict[tuple[int, ...], float]) -> float:
    """P-value of the rows' frequencies under a law; 0 for a row that the law excludes."""
    counts = Counter(map(tuple, x.int().tolist()))
    if counts.keys() - expected.keys():
        return 0.0
    statistic = sum((counts[row] - len(x) * p) ** 2 / (len(x) * p) for row, p in expected.items())
    return float(stats.chi2.sf(statistic, len(expected) - 1))


# --- Generators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), GENERATORS)
def test_patterns_and_entropy_equal_the_enumerated_law(name, size):
    expected = law(name, size)
    x, p = data.patterns(name, size=size, dtype=torch.float64)
    assert [tuple(row) for row in x.int().tolist()] == sorted(expected)
    assert p.tolist() == pytest.approx([expected[row] for row in sorted(expected)], abs=1e-15)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert data.entropy(name, size=size) == pytest.approx(-sum(q * math.log(q) for q in expected.values()), abs=1e-10)


@pytest.mark.parametrize(
    ("name", "size", "count", "nats", "sum_of_logs"),
    [
        ("bars_and_stripes", 2, 6, 1.73287, -11.09),
        ("bars_and_stripes", 3, 14, 2.59930, -37.43),
        ("bars_and_stripes", 4, 30, 3.37909, -102.59),  # the maximum quoted by Fischer and Igel (2010)
        ("bars_and_stripes", 5, 62, 4.11556, -256.46),
        ("labelled_shifter", 4, 48, 3.87120, -185.82),
        ("labelled_shifter", 6, 192, 5.25750, -1009.44),
        ("labelled_shifter", 8, 768, 6.64379, -5102.43),
    ],
)
def test_known_figures(name, size, count, nats, sum_of_logs):
    x, p = data.patterns(name, size=size, dtype=torch.float64)
    assert len(x) == count
    assert data.entropy(name, size=size) == pytest.approx(nats, abs=5e-6)
    assert p.log().sum().item() == pytest.approx(sum_of_logs, abs=5e-3)


@pytest.mark.parametrize(("name", "size"), [("bars_and_stripes", 3), ("bars_and_stripes", 4), ("labelled_shifter", 3)])
def test_rows_follow_the_law(name, size):
    expected = law(name, size)
    for split in ("train", "validation", "test"):
        x = data.load(name, split=split, size=size, num_rows=20_000, seed=3)
        assert chi_square_p_value(x, expected) > FALSE_ALARM / 9
    uniform = dict.fromkeys(expected, 1 / len(expected))
    if name == "bars_and_stripes":  # a law that is nearly right is caught ...
        assert chi_square_p_value(x, uniform) < FALSE_ALARM
    else:  # ... and so is a shift in the wrong direction
        swapped = torch.cat([x[:, :-3], x[:, -3:].flip(1)], dim=1)
        assert chi_square_p_value(swapped, expected) < FALSE_ALARM


@pytest.mark.parametrize("name", ["bars_and_stripes", "labelled_shifter"])
def test_generators_draw_from_streams_of_the_seed(name):
    splits = {split: data.load(name, split=split, num_rows=200) for split in data.SPLITS}
    assert torch.equal(splits["train"], data.load(name, num_rows=200))
    assert torch.equal(splits["all"], torch.cat([splits[split] for split in ("train", "validation", "test")]))
    others = [*splits.values()][:3] + [data.load(name, num_rows=200, seed=1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(others, 2))
    assert len(data.load(name)) == 1000


def test_large_sizes_draw_but_do_not_list():
    assert data.load("labelled_shifter", size=100, num_rows=3).shape == (3, 203)
    assert data.entropy("bars_and_stripes", size=2000) == pytest.approx(2001 * math.log(2))
    with pytest.raises(ValueError, match=r"at most 1 GiB, got 'labelled_shifter' with size=40: \d+ rows .* load"):
        data.patterns("labelled_shifter", size=40)


# --- Scans -----------------------------------------------------------------------------------------------------------


def test_digits_are_the_scans_of_scikit_learn():
    from sklearn.datasets import load_digits

    scans = load_digits()
    x = data.load("digits", split="all", dtype=torch.float64)
    assert torch.equal(x, torch.from_numpy(scans.data) / 16)
    assert torch.equal(data.load_labels("digits", split="all"), torch.from_numpy(scans.target).long())
    assert x.min() == 0
    assert x.max() == 1
    assert torch.equal(data.load("digits", split="all", binarize="threshold"), (x > 0.5).to(torch.get_default_dtype()))


def tagged_rows(name: str, split: str, seed: int = 0) -> list[tuple[float, ...]]:
    """Rows with their labels attached: equal lists mean equal scans in equal order."""
    x, labels = data.load(name, split=split, seed=seed), data.load_labels(name, split=split, seed=seed)
    return [(*row, label) for row, label in zip(x.tolist(), labels.tolist(), strict=True)]


def test_digit_splits_are_disjoint_and_cover_with_their_labels():
    everything = tagged_rows("digits", "all")
    assert len(set(everything)) == len(everything) == 1797  # so that rows can stand for themselves
    parts = {split: tagged_rows("digits", split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [1437, 180, 180]
    assert sorted(itertools.chain(*parts.values())) == sorted(everything)
    assert parts["train"] == tagged_rows("digits", "train")
    assert set(parts["test"]) != set(tagged_rows("digits", "test", seed=1))
    assert parts["train"] != [row for row in everything if row in set(parts["train"])]  # shuffled


def test_fixed_binarization_is_a_draw_from_the_intensities():
    p = data.load("digits", split="all", dtype=torch.float64)
    bits = data.load("digits", split="all", binarize="fixed", seed=5, dtype=torch.float64)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(bits[(p == 0) | (p == 1)], p[(p == 0) | (p == 1)])
    levels = [level / 16 for level in range(1, 16)]

    def largest_z(draw: torch.Tensor) -> float:
        z = [(draw[p == q].mean() - q) / math.sqrt(q * (1 - q) / (p == q).sum()) for q in levels]
        return max(abs(float(value)) for value in z)

    limit = stats.norm.isf(FALSE_ALARM / 2 / len(levels))
    assert largest_z(bits) < limit
    assert largest_z(data.load("digits", split="all", binarize="threshold", dtype=torch.float64)) > limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_bits_belong_to_the_scan(dtype):
    torch.manual_seed(1)
    everything = data.load("digits", split="all", binarize="fixed", dtype=torch.float32)
    torch.manual_seed(2)
    assert torch.equal(everything.to(dtype), data.load("digits", split="all", binarize="fixed", dtype=dtype))
    assert not torch.equal(everything, data.load("digits", split="all", binarize="fixed", seed=1, dtype=torch.float32))
    grey = data.load("digits", split="all", dtype=dtype)
    place = {tuple(row): index for index, row in enumerate(grey.tolist())}
    for split in ("train", "validation", "test"):
        rows = [place[tuple(row)] for row in data.load("digits", split=split, dtype=dtype).tolist()]
        assert torch.equal(data.load("digits", split=split, binarize="fixed", dtype=dtype), everything[rows].to(dtype))


# --- The idx files ---------------------------------------------------------------------------------------------------

SMALL = (data._Pool("train", {"train": 5, "validation": 2}), data._Pool("t10k", {"test": 3}))


def idx_bytes(values: torch.Tensor) -> bytes:
    """An idx file of unsigned bytes, as the format's page spells it."""
    sizes = b"".join(struct.pack(">I", n) for n in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().tolist())


@pytest.fixture(params=["plain", "gzip"])
def folder(request, tmp_path, monkeypatch):
    """Ten scans in four small files, whose grey levels tell the rows apart."""
    for name in ("mnist", "fashion_mnist"):
        small = data._Scans(white=255, pools=SMALL, dataset=data._SCANS[name].dataset)
        monkeypatch.setitem(data._SCANS, name, small)
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    for dataset in ("MNIST", "FashionMNIST"):
        raw = tmp_path / dataset / "raw"
        raw.mkdir(parents=True)
        for part, rows, first in (("train", 7, 0), ("t10k", 3, 7)):
            images = (torch.arange(rows * 784).reshape(rows, 28, 28) * 7 + 13 * first) % 256
            for kind, values in (("images-idx3", images), ("labels-idx1", torch.arange(first, first + rows))):
                content, file = idx_bytes(values), f"{part}-{kind}-ubyte"
                if request.param == "gzip":
                    content, file = gzip.compress(content), f"{file}.gz"
                (raw / file).write_bytes(content)
    return tmp_path / "MNIST" / "raw"


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_read_back(folder, name):
    train = (torch.arange(7 * 784).reshape(7, 784) * 7) % 256
    test = (torch.arange(3 * 784).reshape(3, 784) * 7 + 91) % 256
    everything = data.load(name, split="all", dtype=torch.float64)
    assert torch.equal(everything, torch.cat([train, test]).double() / 255)
    assert torch.equal(data.load_labels(name, split="all"), torch.arange(10))
    assert torch.equal(data.load(name, split="test", dtype=torch.float64), everything[7:])
    labels = {split: data.load_labels(name, split=split, seed=4) for split in ("train", "validation", "test")}
    assert [len(rows) for rows in labels.values()] == [5, 2, 3]
    assert sorted(torch.cat(list(labels.values())).tolist()) == list(range(10))
    bits = data.load(name, split="all", binarize="fixed", seed=4, dtype=torch.float64)
    for split, rows in labels.items():  # here a label is the scan's place in the file
        assert torch.equal(data.load(name, split=split, seed=4, dtype=torch.float64), everything[rows])
        assert torch.equal(data.load(name, split=split, binarize="fixed", seed=4, dtype=torch.float64), bits[rows])
    threshold = data.load(name, split="all", binarize="threshold", dtype=torch.float64)
    assert torch.equal(threshold, (everything > 0.5).double())


def damage(folder: Path, change) -> None:
    (path,) = folder.glob("t10k-images*")
    content = path.read_bytes()
    path.write_bytes(gzip.compress(change(gzip.decompress(content))) if path.suffix == ".gz" else change(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"", r"expected 2368 bytes in .*, got 0; delete"),
        (lambda c: c[:9], r"expected 2368 bytes in .*, got 9; delete"),
        (lambda c: c[:-1], r"expected 2368 bytes in .*, got 2367; delete"),
        (lambda c: c + b"\0", r"expected 2368 bytes in .*, got 2369; delete"),
        (lambda c: b"<html>404</html>", r"expected 2368 bytes in .*, got 16; delete"),
        (lambda c: b"\1" + c[1:], r"begin with 00 00 08 03 .*, got 01 00 08 03"),
        (lambda c: c[:2] + b"\x0d" + c[3:], r"begin with 00 00 08 03 .*, got 00 00 0d 03"),  # floats
        (lambda c: c[:4] + struct.pack(">I", 4) + c[8:], r"begin with .* 00 00 00 03 .*, got .* 00 00 00 04"),
        (lambda c: c[:8] + struct.pack("<2I", 28, 28) + c[16:], r"begin with .* 00 00 00 1c .*, got .* 1c 00 00 00"),
    ],
)
def test_damaged_idx_files_are_refused(folder, change, message):
    damage(folder, lambda content: content)
    data.load("mnist", split="test")  # whole: no error
    damage(folder, change)
    with pytest.raises(ValueError, match=message):
        data.load("mnist", split="test")
    data.load("mnist", split="train")  # its files are untouched


@pytest.mark.parametrize("folder", ["gzip"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        lambda c: c[:-20],
        lambda c: c[:-4],
        lambda c: c[:10] + b"\xff" * 30 + c[40:],
        lambda c: c[:-8] + bytes(8),
        lambda c: b"no gzip" + c,
    ],
)
def test_damaged_gzip_files_are_refused(folder, change):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"expected a whole gzip file in .*t10k-images-idx3-ubyte.gz, got .*; delete"):
        data.load("mnist", split="test")


@pytest.mark.parametrize("root", ["unset", "empty", "set"])
def test_missing_files_name_the_folder_and_the_ways_out(tmp_path, monkeypatch, root):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    if root != "unset":
        monkeypatch.setenv("PYROVAE_DATA", str(tmp_path) if root == "set" else "")
    expected = (tmp_path if root == "set" else tmp_path / "home" / ".cache" / "pyrovae") / "FashionMNIST" / "raw"
    for read in (data.load, data.load_labels):
        with pytest.raises(FileNotFoundError) as caught:
            read("fashion_mnist")
        for part in (str(expected), "PYROVAE_DATA", "download=True"):
            assert part in str(caught.value)


@pytest.mark.skipif(
    not (Path(os.environ.get("PYROVAE_DATA") or "/nonexistent") / "MNIST" / "raw").is_dir(),
    reason="PYROVAE_DATA holds no MNIST; the logic is tested above on small files",
)
def test_the_real_mnist_files():
    assert data.load_labels("mnist", split="test")[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    labels = [data.load_labels("mnist", split=split) for split in ("train", "validation", "test")]
    assert [len(part) for part in labels] == [50_000, 10_000, 10_000]
    counts = data.load_labels("mnist", split="all").bincount()
    assert torch.equal(torch.cat(labels).bincount(), counts)
    train = data.load("mnist", split="train", dtype=torch.float32)
    validation = data.load("mnist", split="validation", dtype=torch.float32)
    mean = (train.double().sum() + validation.double().sum()) / (60_000 * 784)
    assert mean.item() == pytest.approx(0.1307, abs=5e-5)  # the figure that everybody normalises with


# --- The download, without a network ---------------------------------------------------------------------------------


@pytest.fixture
def torchvision_import(monkeypatch):
    """Lets a test decide what ``import torchvision`` does."""
    real_import = builtins.__import__

    def install(outcome: Exception | types.ModuleType) -> None:
        def fake_import(name: str, *args, **kwargs):
            if name.split(".")[0] != "torchvision":
                return real_import(name, *args, **kwargs)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(builtins, "__import__", fake_import)

    return install


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        ImportError("undefined symbol"),
        ModuleNotFoundError("no"),
    ],
)
def test_a_torchvision_that_does_not_import_is_explained(tmp_path, monkeypatch, torchvision_import, error):
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    torchvision_import(error)
    with pytest.raises(ImportError, match=r"torchvision and torch \S+ do not match: install both from one index") as caught:
        data.load("mnist", download=True)
    assert str(error) in str(caught.value)
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_download_fetches_what_is_missing_and_only_that(folder, torchvision_import):
    calls = []
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    class MNIST:
        def __init__(self, root: str, download: bool) -> None:
            calls.append((root, download))
            for file, content in whole.items():
                (folder / file).write_bytes(content)

    torchvision_import(types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=MNIST)))
    before = data.load("mnist", download=True)
    assert calls == []
    for path in folder.iterdir():
        path.unlink()
    assert torch.equal(data.load("mnist", download=True), before)
    assert calls == [(str(folder.parent.parent), True)]


def test_a_failed_download_is_explained(tmp_path, monkeypatch, torchvision_import):
    def no_network(root: str, download: bool) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    torchvision_import(types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=no_network)))
    with pytest.raises(ConnectionError, match=r"download MNIST, got .*Error downloading.*put its files in"):
        data.load("mnist", download=True)


# --- Dynamic binarization --------------------------------------------------------------------------------------------


def test_binarize_draws_afresh_from_the_intensities():
    p = torch.linspace(0, 1, 9, dtype=torch.float64).repeat(40_000, 1)
    stream = torch.Generator().manual_seed(0)
    first, second = data.binarize(p, generator=stream), data.binarize(p, generator=stream)
    limit = stats.norm.isf(FALSE_ALARM / 2 / (3 * 7))

    def z(draw: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return ((draw.mean(0) - mean) / (mean * (1 - mean) / len(draw)).sqrt())[1:-1].abs().max()

    assert torch.equal(first[:, [0, 8]], p[:, [0, 8]])
    assert z(first, p[0]) < limit
    assert z(second, p[0]) < limit
    assert z(first * second, p[0] ** 2) < limit  # the two draws are independent
    assert z(first * first, p[0] ** 2) > limit  # a draw that repeats would be seen
    assert z(first, p[0] + 0.02) > limit
    assert (first.dtype, first.shape) == (p.dtype, p.shape)


def test_binarize_uses_the_generator_or_the_global_state():
    p = torch.full((64,), 0.5)
    torch.manual_seed(0)
    a = data.binarize(p)
    torch.manual_seed(0)
    assert torch.equal(a, data.binarize(p))
    state = torch.get_rng_state()
    b = data.binarize(p, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(b, data.binarize(p, generator=torch.Generator().manual_seed(1)))
    assert data.binarize(torch.zeros(0, 4)).shape == (0, 4)
    assert not data.binarize(p.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([0.0, 255.0]), r"got torch.float\d+ with values from 0 to 255; divide"),
        (torch.tensor([-0.1, 1.0]), r"values from -0.1 to 1; divide"),
        (torch.tensor([0.5, math.nan]), r"values from nan to nan"),
        (torch.tensor([0, 255], dtype=torch.uint8), r"got torch.uint8 with values from 0 to 255"),
        (torch.tensor([True, False]), r"got torch.bool"),
        (torch.zeros(0, dtype=torch.long), r"got torch.int64"),
    ],
)
def test_binarize_refuses_what_is_no_probability(x, message):
    with pytest.raises(ValueError, match=message):
        data.binarize(x)


# --- Arguments and global state --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.load("cifar"), r"name to be one of 'digits', 'mnist', .*, got 'cifar'"),
        (lambda: data.load(split="dev"), r"split to be one of 'train', 'validation', 'test', 'all', got 'dev'"),
        (lambda: data.load(binarize="dynamic"), r"binarize to be one of None, 'threshold', 'fixed', got 'dynamic'"),
        (lambda: data.load("bars_and_stripes", binarize="dynamic"), r"binarize to be one of"),
        (lambda: data.load(binarize=True), r"binarize to be one of"),
        (lambda: data.load(seed=-1), r"seed to be an integer, at least 0, got -1"),
        (lambda: data.load(seed=0.5), r"seed to be an integer, at least 0, got 0.5"),
        (lambda: data.load(seed=None), r"seed to be an integer, at least 0, got None"),
        (lambda: data.load("bars_and_stripes", size=0), r"size to be an integer, at least 1, got 0"),
        (lambda: data.load("bars_and_stripes", size=2.0), r"size to be an integer, at least 1, got 2.0"),
        (lambda: data.load("bars_and_stripes", num_rows=0), r"num_rows to be an integer, at least 1, got 0"),
        (lambda: data.load("bars_and_stripes", num_rows=True), r"num_rows to be an integer, at least 1, got True"),
        (lambda: data.load(size=8), r"no size and no num_rows for 'digits'.*size=8"),
        (lambda: data.load(num_rows=8), r"no size and no num_rows for 'digits'.*num_rows=8"),
        (lambda: data.load(dtype=torch.uint8), r"floating dtype, got torch.uint8"),
        (lambda: data.load_labels("labelled_shifter"), r"one of 'digits', 'mnist', 'fashion_mnist', got"),
        (lambda: data.load_labels(split="dev"), r"split to be one of"),
        (lambda: data.load_labels(seed=True), r"seed to be an integer"),
        (lambda: data.patterns("digits"), r"one of 'bars_and_stripes', 'labelled_shifter', got 'digits'"),
        (lambda: data.entropy("mnist"), r"one of 'bars_and_stripes', 'labelled_shifter', got 'mnist'"),
        (lambda: data.entropy("labelled_shifter", size=-1), r"size to be an integer, at least 1, got -1"),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_names_are_those_of_the_tables():
    assert set(data.NAMES) == {*data._SCANS, *data._GENERATORS}


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_default_dtype_is_followed_on_the_cpu(default):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):  # stands for any other default device
            loaded = [data.load(binarize="fixed"), data.load("bars_and_stripes"), *data.patterns("labelled_shifter")]
            assert data.load_labels().device.type == "cpu"
    finally:
        torch.set_default_dtype(before)
    assert {(x.dtype, x.device.type) for x in loaded} == {(default, "cpu")}
    assert data.load(dtype=torch.float16).dtype == torch.float16


IN_A_FRESH_PROCESS = """
import random, sys
import numpy, torch
heavy = {"torchvision", "sklearn", "matplotlib"}
from pyrovae import data
assert not heavy & set(sys.modules), heavy & set(sys.modules)

def state():
    arrays = torch.get_rng_state(), numpy.random.get_state()[1]
    return [array.tolist() for array in arrays], random.getstate(), torch.get_default_dtype()

before = state()
small = (data._Pool("train", {"train": 5, "validation": 2}), data._Pool("t10k", {"test": 3}))
data._SCANS["mnist"] = data._Scans(white=255, pools=small, dataset="MNIST")
for binarize in (None, "threshold", "fixed"):
    assert data.load("mnist", split="all", binarize=binarize).shape == (10, 784)
data.load_labels("mnist"), data.load("labelled_shifter"), data.patterns("bars_and_stripes")
assert not heavy & set(sys.modules), heavy & set(sys.modules)
data.load("digits", binarize="fixed"), data.load_labels("digits")
assert "torchvision" not in sys.modules and "matplotlib" not in sys.modules
assert state() == before
torch.rand(1)
assert state() != before
"""


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def test_loading_imports_nothing_heavy_and_moves_no_global_state(folder):
    root = Path(data.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
