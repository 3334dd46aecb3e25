"""What training and evaluation leave behind, for reports, tables and the app; nothing heavy is imported.

Losses are in nats per labelled token.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from layercard.errors import TrainingError
from layercard.records import Record

Interval = tuple[float, float]


class Run(Record):
    """One training run, `run.json` beside its adapter. What is held out is `None` throughout where nothing was.

    Attributes:
        started: When, as ISO 8601 in UTC.
        valid: The held-out records, with their losses before and after one by one in `per_record`.
        loss_reduction_interval: 95 % bootstrap interval over held-out records, which are paired before and after.
        losses: The training loss of each step.
        train_seconds: Time within steps.
        peak_memory_bytes: What training takes above the frozen model: adapters, optimiser, gradients and activations.
        layers_in_backward: Blocks from the lowest adapted one up, of all blocks ("5/30").
        fast: The `FastSettings`, and in `did` what each part did.
        phases: Time and memory of each phase of the call that finished the run.
    """

    error: ClassVar = TrainingError
    noun: ClassVar = "run record"
    made_by: ClassVar = "layercard train"

    schema_: Literal["layercard-run/1"] = Field(default="layercard-run/1", alias="schema")
    started: str
    placement: dict[str, Any]
    settings: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    valid: dict[str, Any] | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    loss_reduction: float | None = None
    loss_reduction_interval: Interval | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    steps: int
    tokens_seen: int
    losses: list[float]
    train_seconds: float
    peak_memory_bytes: int
    layers_in_backward: str
    fast: dict[str, Any] = Field(default_factory=lambda: {"did": {}})
    trainable_parameters: int
    adapter_bytes: int
    processes: int = 1
    phases: list[dict[str, Any]] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)


class Evaluation(Record):
    """How good a model is on held-out records; intervals are 95 % bootstrap intervals over records.

    Attributes:
        accuracy: Of a classifier, 0 to 1; `None` for a language model.
        generation: `None`, or `bleu`, `chrf` and `rouge_l` (0 to 100) where there are references, `exact_match` (0 to 1) where there
            are answers, and the `texts`.
        phases: Time and memory of each phase.
        adapter: Folder of the adapter; `None` for the base model.
    """

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
    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    generation: dict[str, Any] | None = None
    phases: list[dict[str, Any]] = Field(default_factory=list)
    adapter: str | None = None
