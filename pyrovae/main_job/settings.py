"""What `pyrovae compare` is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pyrovae import data
from pyrovae.main_job.families import FAMILIES, Family

BUDGETS: Mapping[str, float] = {"small": 0.2, "default": 1.0, "large": 4.0}
GENERATED = ("bars_and_stripes", "labelled_shifter")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the main job is to do.

    Attributes:
        family: a name of `FAMILIES`.
        data: a name of `pyrovae.data.NAMES`; pixels are 1 where the intensity is above 0.5. None takes the family's own.
        hidden: the family's sizes: units of each hidden layer from the data upwards, components, or states; None takes its own.
        methods: names of the family's learners and inference methods; None takes all that fit.
        budget: multiplies the number of steps, iterations and draws of every method.
        seeds: one run of each learner a seed.
        penalty: λ, the precision of a Gaussian prior on every parameter, shared by all learners; None takes the family's own.
        rows: the most rows of each split; None takes all.

    Raises:
        ValueError: for an unknown family, or sizes that are none of it.
    """

    family: str = "sbn"
    data: str | None = None
    hidden: tuple[int, ...] | None = None
    methods: tuple[str, ...] | None = None
    budget: float = 1.0
    seeds: tuple[int, ...] = (0,)
    penalty: float | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        family = family_of(self.family)
        for name in ("data", "hidden", "penalty"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(family, name))
        assert self.hidden is not None
        least, most = family.layers
        if not least <= len(self.hidden) <= most:
            count = f"{least} number{'s' * (least > 1)}" if least == most else f"{least} or more numbers"
            raise ValueError(
                f"expected {count} as --hidden for {self.family} ({family.sizes}), got "
                f"{','.join(map(str, self.hidden))}; its default is {','.join(map(str, family.hidden))}"
            )
        if self.penalty and not family.takes_penalty:
            raise ValueError(
                f"expected no penalty for {self.family}, got {self.penalty:g}; its model has priors of its own: --penalty 0"
            )


def family_of(name: str) -> Family:
    """A family by its name.

    Raises:
        ValueError: for an unknown one.
    """
    if name not in FAMILIES:
        raise ValueError(f"expected --model to be a known family, got {name!r}; choose from: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def load(settings: Settings) -> tuple[Tensor, Tensor]:
    """Training and test rows as the family's program takes them, values in {0, 1}."""
    assert settings.data is not None
    binarize = None if settings.data in GENERATED else "threshold"
    arranged = family_of(settings.family).arranged
    train, test = (data.load(settings.data, split=split, binarize=binarize)[: settings.rows] for split in ("train", "test"))
    return (train, test) if arranged is None else (arranged(train), arranged(test))


def parse_methods(text: str | Sequence[str] | None, family: str = "sbn") -> tuple[str, ...] | None:
    """Names of a family's methods from a comma list; case, hyphens and underscores do not matter. None or 'all' is every one.

    Raises:
        ValueError: for an unknown name, or none at all.
    """
    names = text.split(",") if isinstance(text, str) else list(text or ["all"])
    names = [name.strip() for name in names if name.strip()]
    known = {_plain(name): name for name in family_of(family).methods}
    listed = ", ".join(known.values())
    if not names:
        raise ValueError(f"expected at least one method, got none; choose from: {listed}")
    if [_plain(name) for name in names] == ["all"]:
        return None
    for name in names:
        if _plain(name) not in known:
            raise ValueError(f"expected names of methods of {family}, got {name!r}; choose from: {listed}")
    return tuple(known[_plain(name)] for name in names)


def describe_data(settings: Settings, train: Tensor, test: Tensor) -> str:
    """The data in words."""
    assert settings.data is not None
    generated = settings.data in GENERATED
    how = "binary as generated" if generated else "a pixel is 1 above half intensity"
    words = f"Data: {settings.data}, {len(train)} training and {len(test)} test rows of {train[0].numel()} pixels; {how}."
    if train.dim() == 3:
        words += f" Each image is a sequence of its {train.shape[1]} rows of {train.shape[2]} pixels."
    if generated:
        words += f" No model can reach more than {-data.entropy(settings.data):.3f} nats per datum in expectation."
    return words


def _plain(name: str) -> str:
    return name.lower().replace("-", " ").replace("_", " ").strip()
