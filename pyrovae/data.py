"""Small data sets with known answers, and the MNIST family read from local files.

``digits`` (scikit-learn's 8x8 scans) comes with the library's dependencies and needs no network. ``mnist`` and
``fashion_mnist`` are read from their idx files, without torchvision. ``bars_and_stripes`` and ``labelled_shifter``
are generators whose law is known: ``patterns`` lists it and ``entropy`` gives the best mean log-likelihood that any
model can reach (minus the entropy).

Nothing here reads or moves the global random state. Every tensor is made on the CPU.
"""

import gzip
import hashlib
import math
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from numbers import Integral
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

__all__ = ["NAMES", "SPLITS", "binarize", "entropy", "load", "load_labels", "patterns"]

NAMES = ("digits", "mnist", "fashion_mnist", "bars_and_stripes", "labelled_shifter")
SPLITS = ("train", "validation", "test", "all")


def load(
    name: str = "digits",
    *,
    split: str = "train",
    binarize: str | None = None,
    seed: int = 0,
    size: int | None = None,
    num_rows: int | None = None,
    download: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Loads one split of a data set, one flattened datum a row, values in [0, 1].

    - ``digits``, D = 64: 1437 / 180 / 180 of the 1797 scans, dealt out by the seed.
    - ``mnist``, ``fashion_mnist``, D = 784: 50000 / 10000 of the training file, dealt out by the seed; the test file.
      Looked for, plain or gzipped, in ``$PYROVAE_DATA/MNIST/raw`` and ``$PYROVAE_DATA/FashionMNIST/raw``; where the
      variable is not set, under ``~/.cache/pyrovae``.
    - ``bars_and_stripes``, D = size^2: a fair coin chooses rows or columns of an image, then each line is on with
      probability 1/2. Every split is ``num_rows`` independent draws from a stream of its own.
    - ``labelled_shifter``, D = 2 * size + 3: fair bits; the same bits shifted cyclically one place to the left, not
      at all, or one to the right, with probability 1/3 each; the one-hot label (left, none, right). Drawn likewise.

    For one seed, the splits share no scan and together are all of them. Another seed deals the scans out anew, so
    runs that are compared keep one seed. Where the seed deals, rows come shuffled. ``"all"`` is every scan in the
    order of the files, training before test; for a generator, the three splits joined.

    Args:
        name: One of ``NAMES``.
        split: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``.
        binarize: None keeps the intensities. ``"threshold"`` is 1 where the intensity is above 0.5. ``"fixed"`` draws
            each pixel once from Bernoulli(intensity) with the seed: a scan has the same bits at every call and in
            every split and dtype (for one release of torch). This is a seeded static binarization, not Larochelle's
            published files; likelihoods on the two do not compare. A generator's rows are binary already.
        seed: Deals out the splits, draws the bits of ``"fixed"`` and a generator's rows, each from its own stream.
        size: Of a generator only: side of ``bars_and_stripes`` (default 4), bits of ``labelled_shifter`` (default 8).
        num_rows: Of a generator only: rows drawn for each split (default 1000).
        download: Fetch missing MNIST or Fashion-MNIST files with torchvision's downloader.
        dtype: Floating type of the result; default ``torch.get_default_dtype()``.

    Returns:
        Rows ``[N, D]`` on the CPU.

    Raises:
        ValueError: An argument is unknown or out of range, or a file is damaged.
        FileNotFoundError: The files are not there and ``download`` is False.
        ImportError: ``download`` is True and torchvision does not import.
        ConnectionError: The download failed.

    References:
        Optical Recognition of Handwritten Digits (Alpaydin, Kaynak, 1998), as packed by scikit-learn
        https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html

        The MNIST database of handwritten digits (LeCun, Cortes, Burges)
        http://yann.lecun.com/exdb/mnist/

        Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms (Xiao, Rasul, Vollgraf, 2017)
        https://arxiv.org/abs/1708.07747

        Information Theory, Inference, and Learning Algorithms (MacKay, 2003), chapter 43
        https://www.inference.org.uk/mackay/itila/book.html

    Example:
        >>> x = load("digits", split="test", binarize="fixed")
        >>> x.shape, x.unique().tolist()
        (torch.Size([180, 64]), [0.0, 1.0])
        >>> load("bars_and_stripes", size=3, num_rows=5).shape
        torch.Size([5, 9])
    """
    _check_known("name", name, NAMES)
    _check_known("split", split, SPLITS)
    _check_known("binarize", binarize, (None, "threshold", "fixed"))
    seed, dtype = _check_integer("seed", seed, least=0), _check_floating(dtype)
    if name in _GENERATORS:
        size, num_rows = _check_size(name, size), _check_integer("num_rows", 1000 if num_rows is None else num_rows)
        streams = SPLITS[:3] if split == "all" else (split,)
        return torch.cat([_draw(name, size, num_rows, _stream(seed, name, stream)) for stream in streams]).to(dtype)
    if size is not None or num_rows is not None:
        raise ValueError(
            f"expected no size and no num_rows for {name!r}, whose scans are what they are, got size={size}, "
            f"num_rows={num_rows}; leave them out and index the result instead"
        )
    white = _SCANS[name].white
    rows = []
    for pool in _SCANS[name].pools_of(split):
        levels = _read(name, pool, "images", download=download).flatten(1)  # [pool, D], integers 0..white
        if binarize == "threshold":
            levels = levels > white // 2
        elif binarize == "fixed":  # P(uniform on 0..white-1 < level) = level / white, exactly
            stream = _stream(seed, name, pool.name, "bits")
            levels = torch.randint(white, levels.shape, generator=stream, dtype=torch.uint8, device="cpu") < levels
        rows.append(levels[pool.indices(name, split, seed)])
    x = torch.cat(rows).to(dtype)
    return x.div_(white) if binarize is None else x


def load_labels(name: str = "digits", *, split: str = "train", seed: int = 0, download: bool = False) -> Tensor:
    """Loads the class of each scan, in the order of ``load`` with the same name, split and seed.

    Args:
        name: ``"digits"``, ``"mnist"`` or ``"fashion_mnist"``. The labels of ``labelled_shifter`` are its last 3 bits.
        split: As in ``load``.
        seed: As in ``load``.
        download: As in ``load``.

    Returns:
        Classes 0..9, int64 ``[N]``, on the CPU.

    Raises:
        ValueError, FileNotFoundError, ImportError, ConnectionError: As in ``load``.

    Example:
        >>> load_labels("digits", split="all")[:12].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    """
    _check_known("name", name, _SCANS)
    _check_known("split", split, SPLITS)
    seed = _check_integer("seed", seed, least=0)
    labels = [
        _read(name, pool, "labels", download=download)[pool.indices(name, split, seed)] for pool in _SCANS[name].pools_of(split)
    ]
    return torch.cat(labels).long()


def patterns(name: str, *, size: int | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Lists the distinct rows of a generator with their exact probabilities.

    Time and memory are those of the list: up to ``2 * 2^size`` rows for ``bars_and_stripes``, ``3 * 2^size`` for
    ``labelled_shifter``. A list beyond 1 GiB is refused before it is made.

    Args:
        name: ``"bars_and_stripes"`` or ``"labelled_shifter"``.
        size: As in ``load``.
        dtype: Floating type of both results; default ``torch.get_default_dtype()``.

    Returns:
        Patterns ``[S, D]`` in lexicographic order and probabilities ``[S]``.

    Raises:
        ValueError: The name is not a generator's, the size is not a positive integer, or the list would not fit.

    Example:
        >>> x, p = patterns("bars_and_stripes", size=2)
        >>> [row.int().tolist() for row in x]
        [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
        >>> p.tolist()
        [0.25, 0.125, 0.125, 0.125, 0.125, 0.25]
    """
    _check_known("name", name, _GENERATORS)
    size, dtype = _check_size(name, size), _check_floating(dtype)
    generator = _GENERATORS[name]
    bits, num_codes = generator.num_bits(size), generator.num_choices * 2**size
    if num_codes * bits * dtype.itemsize > 2**30:
        raise ValueError(
            f"expected a list of patterns of at most 1 GiB, got {name!r} with size={size}: {num_codes} rows of {bits} "
            f"values, {num_codes * bits * dtype.itemsize} bytes; take a smaller size, or draw rows with load"
        )
    table = torch.arange(2**size, device="cpu")[:, None] >> torch.arange(size, device="cpu") & 1  # [2^size, size]
    choices = torch.arange(generator.num_choices, device="cpu").repeat_interleave(2**size)
    codes = generator.render(choices, table.to(torch.uint8).repeat(generator.num_choices, 1))  # equally likely rows
    distinct, counts = codes.unique(dim=0, return_counts=True)
    return distinct.to(dtype), (counts.double() / num_codes).to(dtype)


def entropy(name: str, *, size: int | None = None) -> float:
    """Computes the entropy of a generator, in nats; exact, in closed form.

    A model's mean log-likelihood falls short of ``-entropy`` by its KL divergence from the generator.

    Args:
        name: ``"bars_and_stripes"`` or ``"labelled_shifter"``.
        size: As in ``load``.

    Returns:
        The entropy, nats a row.

    Raises:
        ValueError: The name is not a generator's, or the size is not a positive integer.

    Example:
        >>> round(entropy("bars_and_stripes", size=4), 5), round(entropy("labelled_shifter", size=8), 5)
        (3.37909, 6.64379)
    """
    _check_known("name", name, _GENERATORS)
    return _GENERATORS[name].entropy(_check_size(name, size))


def binarize(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws every value afresh from Bernoulli(x): dynamic binarization, for each step of a fit.

    The check of the range waits for the device once a call.

    Args:
        x: Intensities in [0, 1], floating, any shape.
        generator: Source of the draws, on the device of ``x``; default torch's global one.

    Returns:
        Bits 0 and 1, in the shape, dtype and device of ``x``.

    Raises:
        ValueError: ``x`` is not floating or leaves [0, 1].

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015)
        https://arxiv.org/abs/1509.00519

    Example:
        >>> binarize(torch.tensor([0.0, 1.0, 1.0]))
        tensor([0., 1., 1.])
    """
    if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):  # a NaN is refused too
        low, high = (x.min().item(), x.max().item()) if x.numel() else (0, 0)
        raise ValueError(
            f"expected floating x with values in [0, 1], got {x.dtype} with values from {low:g} to {high:g}; "
            "divide grey levels by the largest possible (255)"
        )
    return torch.bernoulli(x.detach(), generator=generator)


# --- Generators: a choice and `size` fair bits make a row ------------------------------------------------------------


@dataclass(frozen=True)
class _Generator:
    num_choices: int  # equally likely
    default_size: int
    num_bits: Callable[[int], int]  # size -> D
    render: Callable[[Tensor, Tensor], Tensor]  # choices [N], fair bits [N, size] -> rows [N, D]
    entropy: Callable[[int], float]  # size -> nats


def _bars_and_stripes(choices: Tensor, bits: Tensor) -> Tensor:
    size = bits.shape[1]
    stripes = bits[:, :, None].expand(-1, size, size)  # constant along each row of the image
    return torch.where(choices[:, None, None].bool(), stripes.mT, stripes).reshape(len(bits), size**2)


def _labelled_shifter(choices: Tensor, bits: Tensor) -> Tensor:
    shifts = torch.stack([bits.roll(step, dims=1) for step in (-1, 0, 1)])  # [3, N, size]: left, none, right
    shifted = shifts[choices, torch.arange(len(bits), device=bits.device)]
    return torch.cat([bits, shifted, torch.nn.functional.one_hot(choices, 3).to(bits.dtype)], dim=1)


_GENERATORS = {
    "bars_and_stripes": _Generator(
        num_choices=2,
        default_size=4,
        num_bits=lambda size: size**2,
        render=_bars_and_stripes,
        # 2^(size+1) equally likely codes; the empty and the full image have two codes each, the others one
        entropy=lambda size: (size + 1 - 2.0 ** (1 - size)) * math.log(2),
    ),
    "labelled_shifter": _Generator(
        num_choices=3,
        default_size=8,
        num_bits=lambda size: 2 * size + 3,
        render=_labelled_shifter,
        entropy=lambda size: math.log(3) + size * math.log(2),  # the label tells the shift: one code a row
    ),
}


def _draw(name: str, size: int, num_rows: int, stream: torch.Generator) -> Tensor:
    choices = torch.randint(_GENERATORS[name].num_choices, (num_rows,), generator=stream, device="cpu")
    bits = torch.randint(2, (num_rows, size), generator=stream, dtype=torch.uint8, device="cpu")
    return _GENERATORS[name].render(choices, bits)


# --- Scans: pools of grey images, dealt out to splits ----------------------------------------------------------------

_FETCH_AGAIN = "delete the damaged file and fetch it again, for example with download=True"


@dataclass(frozen=True)
class _Pool:
    name: str
    splits: dict[str, int]  # split -> rows

    @property
    def num_rows(self) -> int:
        return sum(self.splits.values())

    def indices(self, name: str, split: str, seed: int) -> Tensor:
        """Rows of the pool that belong to a split; shuffled where the pool is shared by several splits."""
        if split == "all" or len(self.splits) == 1:
            return torch.arange(self.num_rows, device="cpu")
        order = torch.randperm(self.num_rows, generator=_stream(seed, name, self.name, "split"), device="cpu")
        return order.split(list(self.splits.values()))[list(self.splits).index(split)]


@dataclass(frozen=True)
class _Scans:
    white: int  # the level of intensity 1
    pools: tuple[_Pool, ...]
    dataset: str = ""  # torchvision's class, which is also the folder

    def pools_of(self, split: str) -> list[_Pool]:
        return [pool for pool in self.pools if split == "all" or split in pool.splits]


_IDX_POOLS = (_Pool("train", {"train": 50000, "validation": 10000}), _Pool("t10k", {"test": 10000}))
_SCANS = {
    "digits": _Scans(white=16, pools=(_Pool("scans", {"train": 1437, "validation": 180, "test": 180}),)),
    "mnist": _Scans(white=255, pools=_IDX_POOLS, dataset="MNIST"),
    "fashion_mnist": _Scans(white=255, pools=_IDX_POOLS, dataset="FashionMNIST"),
}


def _read(name: str, pool: _Pool, kind: str, *, download: bool) -> Tensor:
    """The ``"images"`` or ``"labels"`` of a pool, uint8 ``[pool, ...]``."""
    if name == "digits":
        state = random.getstate()  # scikit-learn imports rich, which draws from it when it is first imported
        from sklearn.datasets import load_digits

        random.setstate(state)
        scans = load_digits()
        return torch.from_numpy(scans.data if kind == "images" else scans.target).to(torch.uint8)
    shape = (pool.num_rows, 28, 28) if kind == "images" else (pool.num_rows,)
    return _read_idx(_find_idx(name, f"{pool.name}-{kind}-idx{len(shape)}-ubyte", download=download), shape)


def _find_idx(name: str, file: str, *, download: bool) -> Path:
    root = Path(os.environ.get("PYROVAE_DATA") or "~/.cache/pyrovae").expanduser()
    dataset = _SCANS[name].dataset
    folder = root / dataset / "raw"
    for path in (folder / file, folder / f"{file}.gz"):
        if path.is_file():
            return path
    if download:
        _download(dataset, root)
        return _find_idx(name, file, download=False)
    raise FileNotFoundError(
        f"expected {file} or {file}.gz in {folder}, got neither; set PYROVAE_DATA to the folder that holds "
        f"{dataset}/raw, or load with download=True"
    )


def _download(dataset: str, root: Path) -> None:
    by_hand = f"put its files in {root / dataset / 'raw'}"
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: operator torchvision::nms does not exist
        raise ImportError(
            f"expected torchvision for the download of {dataset}, got {error!r}; if it is installed, the builds of "
            f"torchvision and torch {torch.__version__} do not match: install both from one index, or {by_hand}"
        ) from error
    try:
        getattr(datasets, dataset)(root=str(root), download=True)
    except (RuntimeError, URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(f"expected to download {dataset}, got {error!r}; try again, or {by_hand}") from error


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An idx file: 0, 0, 8 (unsigned bytes), number of dimensions; each size, 4 bytes big-endian; the values."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".gz":
        try:
            content = bytearray(gzip.decompress(content))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"expected a whole gzip file in {path}, got {error!r}; {_FETCH_AGAIN}") from error
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    if len(content) != len(header) + math.prod(shape):
        raise ValueError(f"expected {len(header) + math.prod(shape)} bytes in {path}, got {len(content)}; {_FETCH_AGAIN}")
    if not content.startswith(header):
        raise ValueError(
            f"expected {path} to begin with {header.hex(' ')} (an idx file of bytes in shape {shape}), "
            f"got {content[: len(header)].hex(' ')}; {_FETCH_AGAIN}"
        )
    return torch.frombuffer(content, dtype=torch.uint8, offset=len(header)).reshape(shape)


# --- Arguments and random streams ------------------------------------------------------------------------------------


def _stream(seed: int, *purpose: str) -> torch.Generator:
    """A generator of its own for each seed and purpose. torch's CPU generator takes 32 bits of seed."""
    digest = hashlib.sha256("/".join((*purpose, str(seed))).encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:4], "big"))


def _check_known(argument: str, value: object, known: Iterable[object]) -> None:
    if value not in (known := tuple(known)):
        raise ValueError(f"expected {argument} to be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_integer(argument: str, value: object, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"expected {argument} to be an integer, at least {least}, got {value!r}")
    return int(value)


def _check_size(name: str, size: int | None) -> int:
    return _check_integer("size", _GENERATORS[name].default_size if size is None else size)


def _check_floating(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"expected a floating dtype, got {dtype}; convert the result instead")
    return dtype
