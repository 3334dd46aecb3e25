"""What trials leave behind: one record for a training of a benchmark, of a comparison and of a race, and what a race decided.

Nothing heavy is imported.
"""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from layercard.errors import BenchmarkError, TrainingError
from layercard.records import Estimate, Part, Record
from layercard.training.records import Moment


class TrialRecord(Record):
    """One training: what was trained, how, on what, and what came of it; losses are in nats per labelled token.

    `settings`, `model`, `data`, `valid` (with the loss of each held-out record in `per_record`), `curve` and the sizes are as in `Run`.
    """

    error: ClassVar = BenchmarkError
    noun: ClassVar = "trial"
    made_by: ClassVar = "layercard bench"
    schema_: Literal["layercard-trial/1"] = Field(default="layercard-trial/1", alias="schema")
    name: str = ""  # what the placement is called; empty where it has no name
    task: str = ""
    split: str = ""
    layers: tuple[int, ...]
    modules: str = "all"
    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    valid: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    status: Literal["success", "diverged"] = "success"
    loss_before: float | None = None
    loss_after: float | None = None  # `None` where training diverged
    loss_reduction: Estimate | None = None  # against the frozen base
    curve: tuple[Moment, ...] = ()
    performance_kept: Estimate | None = None  # % of all layers; only in a comparison that trained these
    time_share: float | None = None  # % of all layers, likewise
    train_seconds: float | None = None  # within steps; `None` where these compare with nothing
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    adapter_bytes: int | None = None
    layers_in_backward: str = ""
    accuracy: float | None = None  # share of the labelled tokens that come first, 0 to 1
    forgetting: float | None = None  # how much the loss on plain English rises
    generated: dict[str, Any] | None = None
    fast: dict[str, Any] = Field(default_factory=dict)
    phases: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    machine: str = ""
    started: str = ""

    @property
    def loss(self) -> float:
        """The loss after training; infinite where it diverged."""
        return float("inf") if self.loss_after is None else self.loss_after


class Comparison(Record):
    """Several placements on one model and data set, a row each in the order given; `loss_before` is that of the frozen base."""

    error: ClassVar = TrainingError
    noun: ClassVar = "comparison"
    made_by: ClassVar = "layercard compare"
    schema_: Literal["layercard-compare/1"] = Field(default="layercard-compare/1", alias="schema")
    model: dict[str, Any]
    data: dict[str, Any]
    valid: dict[str, Any]
    settings: dict[str, Any]
    loss_before: float
    rows: tuple[TrialRecord, ...]
    versions: dict[str, str]


class Entrant(Part):
    """What takes part: layers, the set of modules in them, and the peak learning rate that it would have in the long run."""

    name: str
    layers: tuple[int, ...]
    modules: str = "all"
    learning_rate: float


class Heat(Part):
    """One entrant after `steps` steps; losses are in nats per labelled token of the held-out records, bytes above the frozen model."""

    entrant: Entrant
    steps: int
    learning_rate: float  # that it ran at
    loss: float | None  # `None` where it diverged
    nats: tuple[float, ...]  # of each held-out record
    step_seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    seconds: float  # all of it, measuring included

    @property
    def result(self) -> float:
        """The loss; infinite where it diverged."""
        return math.inf if self.loss is None else self.loss


class Race(Record):
    """All heats and what they decided, `race.json`."""

    error: ClassVar = BenchmarkError
    noun: ClassVar = "race"
    made_by: ClassVar = "layercard tune"
    schema_: Literal["layercard-race/1"] = Field(default="layercard-race/1", alias="schema")
    model: dict[str, Any]
    data: dict[str, Any]
    held_out_records: int
    labelled: tuple[int, ...]  # labelled tokens of each held-out record
    loss_before: float
    steps: int  # of the run that it decides for
    objective: str
    tolerance: float
    heats: tuple[Heat, ...]
    chosen: Entrant
    why: str
    seconds: float
    left_out: tuple[str, ...] = ()  # entrants that did not take part, and why
