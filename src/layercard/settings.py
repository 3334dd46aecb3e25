"""How adapters are trained: checked settings, without anything heavy to import."""

import difflib
import math
from dataclasses import asdict, dataclass
from typing import Any

from layercard.errors import TrainingError

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt")
"""Learning rate schedules of transformers that need no settings of their own."""

_LOW_RANK = ("rank", "alpha", "dropout")
METHODS: dict[str, tuple[str, ...]] = {
    "lora": _LOW_RANK,
    "rslora": _LOW_RANK,
    "dora": _LOW_RANK,
    "pissa": ("rank", "alpha"),
    "olora": ("rank", "alpha"),
    "eva": _LOW_RANK,
    "adalora": _LOW_RANK,
    "loha": ("rank", "alpha"),
    "lokr": ("rank", "alpha"),
    "vera": ("rank", "dropout"),
    "randlora": _LOW_RANK,
    "delora": ("rank",),
    "hira": ("rank", "dropout"),
    "hra": ("rank",),
    "miss": ("rank", "dropout"),
    "ia3": (),
    "oft": (),
    "boft": ("dropout",),
}
"""Methods by name, and which of rank, alpha and dropout each has; the others are at their defaults and mean nothing to it."""


@dataclass(frozen=True)
class TrainSettings:
    """How adapters are trained.

    Attributes:
        method: One of `METHODS`: what kind of adapter, or how LoRA begins.
        rank: Rank of each adapter.
        alpha: Scale; the update is `alpha / rank` times the product of the adapter's two matrices.
        dropout: Dropout on the adapter's input.
        learning_rate: Peak learning rate of AdamW.
        steps: Number of updates; or give `epochs`. One epoch when neither is given.
        epochs: Passes over the data, rounded up to whole steps.
        batch_size: Records that go through the model at once, in all processes together: each of W processes takes `batch_size / W`.
        accumulation: Batches in one update.
        warmup_ratio: Share of the steps in which the learning rate rises.
        scheduler: One of `SCHEDULERS`.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them alone.
        seed: Of the adapters' first weights, the order of the records, and dropout.
        bf16: Whether to compute in bfloat16 where autocast does; adapters stay float32.
        report_to: Where transformers logs to ("none", "tensorboard", "wandb", "tensorboard,wandb", "all").
        save_steps: A checkpoint after every so many steps; 0 for none.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    learning_rate: float = 2e-3
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    accumulation: int = 1
    warmup_ratio: float = 0.05
    scheduler: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    bf16: bool = False
    report_to: str = "none"
    save_steps: int = 100

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise TrainingError(f"both steps ({self.steps}) and epochs ({self.epochs:g}) are given; give one of them")
        at_least_one = ("rank", "batch_size", "accumulation", *(("steps",) if self.steps is not None else ()))
        for name in at_least_one:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TrainingError(f"{name} is {value!r}; give a whole number of at least 1")
        for name, low, high in (
            ("alpha", 1e-9, math.inf),
            ("dropout", 0.0, 0.99),
            ("learning_rate", 1e-12, math.inf),
            ("warmup_ratio", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
            ("max_grad_norm", 0.0, math.inf),
            ("save_steps", 0, math.inf),
            *((("epochs", 1e-9, math.inf),) if self.epochs is not None else ()),
        ):
            value = getattr(self, name)
            if not low <= value <= high or value == math.inf:
                raise TrainingError(f"{name} is {value!r}; give a number {'above 0' if low > 0 else f'from {low:g}'}{_up_to(high)}")
        for name, known in (("scheduler", SCHEDULERS), ("method", tuple(METHODS))):
            value = getattr(self, name)
            if value not in known:
                close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
                raise TrainingError(f"{name} {value!r} is unknown; did you mean {close!r}? Choose one of {', '.join(known)}")
        for name, usual in (("rank", 8), ("alpha", 16.0), ("dropout", 0.0)):
            if name not in METHODS[self.method] and getattr(self, name) != usual:
                raise TrainingError(f"method {self.method!r} has no {name}, but {name} is {getattr(self, name):g}; leave it out")

    def total_steps(self, records: int) -> int:
        """Number of updates on `records` records.

        >>> TrainSettings(epochs=2, batch_size=4).total_steps(9)
        5
        """
        if self.steps is not None:
            return self.steps
        epochs = 1.0 if self.epochs is None else self.epochs
        return max(1, math.ceil(epochs * records / (self.batch_size * self.accumulation) - 1e-9))

    def reporters(self) -> list[str]:
        """`report_to` as a list.

        >>> TrainSettings(report_to="tensorboard, wandb").reporters()
        ['tensorboard', 'wandb']
        """
        return [name.strip() for name in self.report_to.split(",") if name.strip()] or ["none"]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide about the result; where it is logged and how often it is saved do not."""
        return {name: value for name, value in asdict(self).items() if name not in ("report_to", "save_steps")}


def _up_to(high: float) -> str:
    return "" if high == math.inf else f" to {high:g}"


@dataclass(frozen=True)
class FastSettings:
    """Which work training spares itself; none of it changes a loss or a gradient beyond rounding.

    Attributes:
        cut: Nothing below the lowest adapted layer takes part in backward, also under gradient checkpointing.
        prefix_cache: Hidden states that enter the lowest adapted layer are computed once a record and kept.
        unpadded: Padding goes through no block.
        labels_only: Final norm, head and loss run on labelled positions only.
        fused_lora: A frozen map and its adapter are computed as one function.
        cache_folder: Where the hidden states are kept, for later runs too; in memory where it is not given.
        cache_bytes: What they may take; a share of the free memory or disk where it is not given.
    """

    cut: bool = True
    prefix_cache: bool = True
    unpadded: bool = True
    labels_only: bool = True
    fused_lora: bool = True
    cache_folder: str | None = None
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise TrainingError(f"cache_bytes is {self.cache_bytes}; give a number of at least 1, or turn the prefix cache off")
        if not self.prefix_cache and (self.cache_folder is not None or self.cache_bytes is not None):
            raise TrainingError("the prefix cache is off, but a folder or size is given for it; leave one of them out")

    @classmethod
    def stock(cls) -> "FastSettings":
        """Nothing spared: what the libraries do by themselves.

        >>> FastSettings.stock().cut
        False
        """
        return cls(cut=False, prefix_cache=False, unpadded=False, labels_only=False, fused_lora=False)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def whole(alpha: float) -> float:
    """An integer where it can be: other tools read alpha as one.

    >>> whole(16.0), whole(2.5)
    (16, 2.5)
    """
    return int(alpha) if alpha == int(alpha) else alpha
