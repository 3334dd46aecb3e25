"""What training and evaluation leave behind, for reports, tables and the app; nothing heavy is imported.

Losses are in nats per labelled token.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from layercard.errors import TrainingError
from layercard.records import Part, Record

Interval = tuple[float, float]


class Moment(Part):
    """A point of a loss curve: after `step` steps, `seconds` of which were spent within steps, the held-out loss was `loss`."""

    step: int
    seconds: float
    loss: float


class Run(Record):
    """One training run, `run.json` beside its adapter. What is held out is `None` throughout where nothing was."""

    error: ClassVar = TrainingError
    noun: ClassVar = "run record"
    made_by: ClassVar = "layercard train"

    schema_: Literal["layercard-run/1"] = Field(default="layercard-run/1", alias="schema")
    started: str  # ISO 8601 in UTC
    placement: dict[str, Any]
    settings: dict[str, Any]
    learning_rate_source: str = ""  # where the learning rate in the settings comes from, in words
    model: dict[str, Any]
    data: dict[str, Any]
    valid: dict[str, Any] | None = None  # the held-out records; their losses before and after, one by one, are in `per_record`
    loss_before: float | None = None
    loss_after: float | None = None
    loss_reduction: float | None = None
    loss_reduction_interval: Interval | None = None  # 95 % bootstrap interval over held-out records, paired before and after
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    steps: int
    tokens_seen: int
    positions_seen: int = 0  # padding counted; 0 in records of before this was counted
    losses: list[float]  # training loss of each step
    curve: list[Moment] = Field(default_factory=list)  # held-out loss before training, at the moments asked for, and at the end
    notes: list[str] = Field(default_factory=list)  # what else a user should know of the run, a line each
    train_seconds: float  # time within steps
    forward_seconds: float | None = None  # of it computing losses (and the head's gradient, where labels alone are computed)
    backward_seconds: float | None = None
    peak_memory_bytes: int  # above the frozen model: adapters, optimiser, gradients and activations
    layers_in_backward: str  # blocks from the lowest adapted one up, of all blocks: "5/30"
    fast: dict[str, Any] = Field(default_factory=lambda: {"did": {}})  # the `FastSettings`, and in `did` what each part did
    trainable_parameters: int
    adapter_bytes: int
    processes: int = 1
    phases: list[dict[str, Any]] = Field(default_factory=list)  # of the call that finished the run
    versions: dict[str, str] = Field(default_factory=dict)


class Evaluation(Record):
    """How good a model is on held-out records; intervals are 95 % bootstrap intervals over records."""

    error: ClassVar = TrainingError
    noun: ClassVar = "evaluation"
    made_by: ClassVar = "layercard eval"

    schema_: Literal["layercard-eval/1"] = Field(default="layercard-eval/1", alias="schema")
    model: dict[str, Any]
    data: dict[str, Any]
    loss: float
    loss_interval: Interval
    perplexity: float
    perplexity_interval: Interval
    accuracy: float | None = None  # of a classifier, 0 to 1
    accuracy_interval: Interval | None = None
    # Bleu, chrf, rouge_l (0 to 100) if there are references, exact_match (0 to 1) if answers; texts.
    generation: dict[str, Any] | None = None
    phases: list[dict[str, Any]] = Field(default_factory=list)
    adapter: str | None = None  # its folder; `None` for the base model
