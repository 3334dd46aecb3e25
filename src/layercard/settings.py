"""Settings of profiling, training and benchmarks: each is described once, for the command line, for Python and for records.

A settings class is a frozen dataclass whose fields are made with `setting`: default, what it means, and the values it may take. The
command line makes its options from these fields, `help()` shows them, and what lies outside is refused in one line.
"""

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from layercard.errors import TrainingError
from layercard.files import shown

MOST = 2**31 - 1
"""The greatest whole number that a setting may be, where it does not say otherwise."""

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt")
"""Learning rate schedules of transformers that need no settings of their own."""
PROBES = ("none", "step", "train")
"""What profiling can measure on held-out records."""

LEARNING_RATE = 2e-3
"""Peak learning rate where neither the settings nor the placement has one."""

_LOW_RANK = ("rank", "alpha", "dropout")
METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lora", "rslora", "dora", "eva", "adalora", "randlora"), _LOW_RANK),
    **dict.fromkeys(("pissa", "olora", "loha", "lokr"), ("rank", "alpha")),
    **dict.fromkeys(("vera", "hira", "miss"), ("rank", "dropout")),
    **dict.fromkeys(("delora", "hra"), ("rank",)),
    **dict.fromkeys(("ia3", "oft"), ()),
    "boft": ("dropout",),
}
"""Methods by name, and which of rank, alpha and dropout each has; the others are at their defaults and mean nothing to it."""


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    option: str | None = None,
    unit: float | None = None,
    argument: bool = False,
    envvar: str | None = None,
    auto: bool = False,
) -> Any:
    """A field of a settings class, or a parameter of a command.

    Args:
        default: Its value where none is given; `...` where one must be.
        help: What it means, in one sentence or two.
        low: The least value; a number that is not whole and has a `low` above 0 may be anything above 0.
        high: The greatest value; numbers are finite and whole numbers at most `MOST` in any case.
        choices: The words it may be.
        metavar: What the help text calls its value; `N`, `X`, `FILE` or `NAME` after its type where empty.
        option: Its name on the command line (`--rank` for `rank` where not given); empty: it is not on the command line.
        unit: How many of the field's units are one of the command line's, as 1e9 for bytes given in GB.
        argument: On the command line it has no name, only a place.
        envvar: The environment variable that holds it where the command line does not give it.
        auto: `None`, which leaves the number to the program, is `auto` on the command line.
    """
    described = locals()
    return dataclasses.field(default=dataclasses.MISSING if default is ... else default, metadata=described)


def check(name: str, value: Any, kind: Any, described: Mapping[str, Any]) -> None:
    """Refuse a value that is not of its kind, or outside of what `setting` said of it.

    Raises:
        TrainingError: `name` is not that.
    """
    kinds = kind.__args__ if isinstance(kind, UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return
    choices, low, high = described["choices"], described["low"], described["high"]
    if choices and value not in choices:
        close = difflib.get_close_matches(shown(value), choices, n=1, cutoff=0.0)[0]
        raise TrainingError(f"{name} {shown(value)} is unknown; did you mean {close!r}? Choose one of {', '.join(choices)}")
    if int in kinds or float in kinds:
        is_whole = float not in kinds
        greatest = high if high is not None else MOST if is_whole else sys.float_info.max
        right_kind = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
        # The ends are compared first of all: NaN is in no range, and Python cannot even print the largest of its integers.
        if not right_kind or not (-greatest if low is None else low) <= value <= greatest:
            lower = "" if low is None else " above 0" if low > 0 and not is_whole else f" from {low:g}"
            too_large = is_whole and right_kind and value > greatest
            upper = f" to {greatest:,}".removesuffix(".0") if high is not None or too_large else ""
            raise TrainingError(f"{name} is {shown(value)}; give a {'whole ' if is_whole else ''}number{lower}{upper}")
    elif (bool in kinds and not isinstance(value, bool)) or (str in kinds and not isinstance(value, str)):
        raise TrainingError(f"{name} is {shown(value)}; give {'True or False' if bool in kinds else 'a text'}")


class Settings:
    """Base of the settings classes: adds the fields to the docstring, checks values, and gives a JSON object."""

    group = "Options"
    """Heading of the help text under which the fields stand."""

    def __init_subclass__(cls, group: str = "Options") -> None:
        cls.group = group
        fields = {name: value for name, value in vars(cls).items() if isinstance(value, dataclasses.Field)}
        lines = [f"    {name}: {field.metadata['help']}" for name, field in fields.items()]
        cls.__doc__ = "\n".join([f"{cls.__doc__}\n\nAttributes:", *lines])

    def __post_init__(self) -> None:
        for field in self.fields():
            check(field.name, getattr(self, field.name), field.type, field.metadata)

    @classmethod
    def fields(cls) -> "list[dataclasses.Field[Any]]":
        """The fields, each with what `setting` said of it as its metadata."""
        return list(dataclasses.fields(cls))  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {field.name: getattr(self, field.name) for field in self.fields()}


_SEED = "Seed of everything that is drawn at random."
_RANK = "Rank of each adapter."
_BATCH_SIZE = "Records that go through the model at once, in all processes together."
_DEVICE = "auto, cpu, cuda or mps."
_DTYPE = "float32, bfloat16, float16 or auto (as stored)."


@dataclass(frozen=True)
class LoadSettings(Settings, group="Model"):
    """Where and how a model is loaded."""

    device: str = setting("auto", _DEVICE)
    dtype: str = setting("float32", _DTYPE)
    trust_remote_code: bool = setting(False, "Let code that comes with the model run.")


@dataclass(frozen=True)
class DataSettings(Settings, group="Data"):
    """How records are read."""

    max_length: int = setting(1024, "Cut longer records to N tokens.", low=2)
    on_long: str = setting("cut", "What is done with longer records: cut, skip or fail.", choices=("cut", "skip", "fail"))
    on_bad: str = setting("skip", "What is done with records that cannot be used: skip or fail.", choices=("skip", "fail"))
    columns: str | None = setting(
        None, "Which columns hold the fields, if not the usual ones: prompt=instruction,completion=output.", metavar="LIST"
    )
    separator: str = setting(r"\n", "Put between prompt and completion.", metavar="TEXT")


@dataclass(frozen=True)
class ProfileSettings(Settings, group="Profile"):
    """How a card is made. Times differ from call to call, so a card that must come out the same again has `cost` off."""

    rank: int = setting(8, _RANK, low=1)
    ridge: float = setting(1.0, "Regularisation of each input's covariance, as a share of its usual energy.", low=0, high=1e6)
    batch_size: int = setting(8, _BATCH_SIZE, low=1)
    label_samples: int = setting(
        1, "Samples of labels from the model for the coupling; each is one more backward pass.", low=1, metavar="N"
    )
    probe: str = setting(
        "step",
        "What is measured on held-out records: step (each layer's own step, without training), train (that, then a few training "
        "steps of each layer alone, the worse half stopped at each rung) or none.",
        choices=PROBES,
    )
    probe_steps: int = setting(48, "Training steps of --probe train for the best layers.", low=1)
    probe_records: int = setting(
        12, "Records that the step probe measures on, half of them with the steps of the other half.", low=2, option=""
    )
    probe_layers: int = setting(
        8, "Layers that the step probe measures, with two forward passes each; those between are interpolated.", low=2, option=""
    )
    cost: bool = setting(True, "Time a few training steps on this machine, for what placements cost.")
    seed: int = setting(0, _SEED, low=0, high=2**32 - 1)


@dataclass(frozen=True)
class TrainSettings(Settings, group="Training"):
    """How adapters are trained."""

    method: str = setting("lora", f"Kind of adapter, or how LoRA begins: {', '.join(METHODS)}.", choices=tuple(METHODS))
    rank: int = setting(8, _RANK, low=1)
    alpha: float = setting(16.0, "Scale of the adapters; the update is alpha / rank times their product.", low=1e-9, high=1e6)
    dropout: float = setting(0.0, "Dropout on the adapters' inputs.", low=0, high=0.99)
    learning_rate: float | None = setting(
        None,
        "Peak learning rate of AdamW; auto: that of the placement, moved to the steps of the run, or that of the rule (docs/run.md).",
        low=1e-12,
        auto=True,
    )
    steps: int | None = setting(None, "Number of updates; or give --epochs. One epoch when neither is given.", low=1)
    epochs: float | None = setting(None, "Passes over the data.", low=1e-9, high=1e6)
    batch_size: int = setting(4, _BATCH_SIZE, low=1)
    accumulation: int = setting(1, "Batches in one update.", low=1)
    warmup_ratio: float = setting(0.05, "Share of the steps in which the learning rate rises.", low=0, high=1, option="")
    scheduler: str = setting("linear", f"How the learning rate falls: {', '.join(SCHEDULERS)}.", choices=SCHEDULERS, option="")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", low=0, option="")
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this norm; 0 leaves them alone.", low=0, option="")
    seed: int = setting(0, _SEED, low=0, high=2**32 - 1)
    bf16: bool = setting(False, "Compute in bfloat16 where it is safe; adapters stay float32.")
    report_to: str = setting(
        "none", "Where the trainer logs to: tensorboard, wandb or trackio, several with commas between.", metavar="NAMES"
    )
    save_steps: int = setting(100, "A checkpoint after every so many steps; 0 for none.", low=0, option="")
    patience: int | None = setting(
        None,
        "Measure the held-out loss ten times in the run, on as many records as a tenth of its time allows, keep the adapter of the lowest, "
        "and stop when N in a row were no better.",
        low=1,
    )

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise TrainingError(f"both steps ({self.steps}) and epochs ({self.epochs:g}) are given; give one of them")
        super().__post_init__()
        for field in self.fields():
            value = getattr(self, field.name)
            if field.name in _LOW_RANK and field.name not in METHODS[self.method] and value != field.default:
                raise TrainingError(f"method {self.method!r} has no {field.name}, but {field.name} is {value:g}; leave it out")

    def total_steps(self, records: int) -> int:
        """Number of updates on `records` records.

        >>> TrainSettings(epochs=2, batch_size=4).total_steps(9)
        5
        """
        if self.steps is not None:
            return self.steps
        epochs = 1.0 if self.epochs is None else self.epochs
        return max(1, math.ceil(epochs * records / (self.batch_size * self.accumulation) - 1e-9))

    @property
    def rate(self) -> float:
        """The peak learning rate, with `LEARNING_RATE` where none is set and no rule knows one."""
        return LEARNING_RATE if self.learning_rate is None else self.learning_rate

    def reporters(self) -> list[str]:
        """`report_to` as a list.

        >>> TrainSettings(report_to="tensorboard, wandb").reporters()
        ['tensorboard', 'wandb']
        """
        return [name.strip() for name in self.report_to.split(",") if name.strip()] or ["none"]

    def deciding(self) -> dict[str, Any]:
        """The settings that decide about the result; where it is logged and how often it is saved do not."""
        return {name: value for name, value in self.to_json().items() if name not in ("report_to", "save_steps")}


@dataclass(frozen=True)
class FastSettings(Settings, group="Faster training"):
    """Which work training leaves out; none of it changes a loss or a gradient beyond rounding."""

    cut: bool = setting(True, "Keep layers below the lowest adapted one out of backward.")
    prefix_cache: bool = setting(True, "Compute what enters the lowest adapted layer once a record.")
    unpadded: bool = setting(True, "Let no padding through the layers.")
    labels_only: bool = setting(True, "Run head and loss on labelled positions only.")
    fused_lora: bool = setting(True, "Compute each module and its adapter as one function.")
    cache_folder: str | None = setting(
        None, "Keep the prefix cache there, for later runs too; in memory when not given.", option="--cache", metavar="DIR"
    )
    cache_bytes: int | None = setting(
        None,
        "What the prefix cache may take; a share of free memory or disk when not given.",
        low=1,
        high=2**62,
        option="--cache-gb",
        unit=1e9,
        metavar="GB",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prefix_cache and (self.cache_folder is not None or self.cache_bytes is not None):
            raise TrainingError("the prefix cache is off, but a folder or size is given for it; leave one of them out")

    @classmethod
    def baseline(cls) -> "FastSettings":
        """Nothing is left out: training as the libraries do it by themselves.

        >>> FastSettings.baseline().cut
        False
        """
        return cls(cut=False, prefix_cache=False, unpadded=False, labels_only=False, fused_lora=False)


@dataclass(frozen=True)
class RunSettings(Settings, group="Choice"):
    """How `layercard run` chooses, and within what limits."""

    objective: str = setting(
        "time",
        "What the choice is cheap in, among all that are as good: time, memory, or quality (the best, whatever it costs).",
        choices=("time", "memory", "quality"),
    )
    tolerance: str = setting("1%", "How far above the best loss is as good, as a share of it.", metavar="SHARE")
    search: str = setting("20%", "Share of the training time that card and race may take.", metavar="SHARE")
    max_time: str | None = setting(None, "The whole run may take so long: 90s, 30m, 2h.", metavar="TIME")
    max_memory: str | None = setting(None, "Memory of training above the frozen model: 500MB, 8GB.", metavar="SIZE")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_seconds(), self.max_memory_bytes(), self.search_share(), self.tolerance_share()

    def search_share(self) -> float:
        """`search` from 0 on.

        >>> RunSettings(search="150%").search_share()
        1.5
        """
        return _amount("search", self.search, {"%": 0.01}, "20% or 100%", least=0.0) or 0.0

    def tolerance_share(self) -> float:
        """`tolerance` from 0 on."""
        return _amount("tolerance", self.tolerance, {"%": 0.01}, "1% or 0.5%", least=0.0) or 0.0

    def max_seconds(self) -> float | None:
        """`max_time` in seconds.

        >>> RunSettings(max_time="30m").max_seconds()
        1800.0
        """
        return _amount("max_time", self.max_time, {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}, "90s, 30m or 2h")

    def max_memory_bytes(self) -> float | None:
        """`max_memory` in bytes."""
        units = {"mb": 1e6, "gb": 1e9, "mib": 2.0**20, "gib": 2.0**30}
        return _amount("max_memory", self.max_memory, units, "500MB or 8GB")


def _amount(name: str, text: str | None, units: dict[str, float], forms: str, least: float = 1e-9) -> float | None:
    """An amount with its unit, which it must have: a bare number could be any."""
    if text is None:
        return None
    match = re.fullmatch(r"([\d.]+)\s*([a-z]+|%)", str(text).strip().lower())
    try:
        number = float(match[1]) if match else -1.0
    except ValueError:
        number = -1.0
    if not match or match[2] not in units or not least <= number < 1e12:
        raise TrainingError(f"{name} {str(text)[:40]!r} cannot be read; give a number with its unit, such as {forms}")
    return number * units[match[2]]


@dataclass(frozen=True)
class BenchSettings(Settings, group="Runs"):
    """What all runs of a benchmark share; a folder of results belongs to one such value."""

    model: str = setting(..., "Name of the base model.", option="")
    data: str | None = setting(None, "Folder with a sub-folder for each task: train.jsonl, valid.jsonl and test.jsonl.", metavar="DIR")
    dtype: str = setting("bfloat16", _DTYPE)
    device: str = setting("auto", _DEVICE)
    rank: int = setting(8, _RANK, low=1)
    steps: int = setting(32, "Updates of each run.", low=2)
    batch_tokens: int = setting(280, "Tokens in a step, about.", low=1)
    max_length: int = setting(256, "Cut longer records to N tokens.", low=2)
    train_records: int = setting(1536, "The pool of training records that seeds draw from.", low=1, option="")
    valid_tokens: int = setting(3000, "Held-out tokens to choose learning rates on.", low=1)
    test_tokens: int = setting(4000, "Held-out tokens to compare on.", low=1)
    card_records: int = setting(64, "Records that cards are made from.", low=4)
    learning_rate: float = setting(4e-3, "Where the search for a learning rate starts.", low=1e-12, option="")
    generate: int = setting(0, "Test records to write answers for and score.", low=0)
    probe: str = setting("step", "What cards measure, as in `layercard profile`: step, train or none.", choices=PROBES)


def integer_if_whole(alpha: float) -> float:
    """An integer where it can be: other tools read alpha as one.

    >>> integer_if_whole(16.0), integer_if_whole(2.5)
    (16, 2.5)
    """
    return int(alpha) if alpha == int(alpha) else alpha
