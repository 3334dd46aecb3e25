"""What `layercard run` ends with: `result.json`."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from layercard.errors import TrainingError
from layercard.records import Estimate, Part, Record


class Chosen(Part):
    """What was trained to the full length."""

    name: str
    layers: tuple[int, ...]
    modules: str
    learning_rate: float
    start: str = "zero"  # how the adapters begin: B is zero


class Measured(Part):
    """Held-out loss of the trained adapter, nats per labelled token."""

    loss_before: float
    loss_after: float
    loss_reduction: float
    interval: tuple[float, float] | None = None  # of the reduction, 95 %, over held-out records


class AllLayers(Part):
    """What all layers and modules would have reached: `measured` where they were what was trained."""

    loss_reduction: Estimate
    source: Literal["measured", "estimated", "unknown"]
    step_seconds: float | None = None
    peak_memory_bytes: int | None = None


class Seconds(Part):
    """Where the time went; `timing` is the short training that the plan is made from."""

    timing: float = 0.0
    profile: float = 0.0
    race: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    total: float = 0.0

    @property
    def search(self) -> float:
        """What came before the training itself."""
        return self.timing + self.profile + self.race


class Result(Record):
    """The result of a whole run."""

    error: ClassVar = TrainingError
    noun: ClassVar = "result"
    made_by: ClassVar = "layercard run"
    schema_: Literal["layercard-result/1"] = Field(default="layercard-result/1", alias="schema")
    model: dict[str, Any]
    data: dict[str, Any]
    valid: dict[str, Any]
    chosen: Chosen
    verdict: Literal["adapt", "all layers", "not worth training"]
    why: str
    measured: Measured
    all_layers: AllLayers
    steps: int  # that were trained
    planned_steps: int
    stopped: str = ""  # why training ended early; empty where it did not
    seconds: Seconds
    step_seconds: float
    peak_memory_bytes: int  # above the frozen model
    adapter_bytes: int
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """The run in one line."""
        count = len(self.chosen.layers)
        modules = "" if self.chosen.modules == "all" else f", {self.chosen.modules} modules"
        if self.verdict == "not worth training":
            return f"not worth training: the loss went from {self.measured.loss_before:.4f} to {self.measured.loss_after:.4f}"
        where = "all layers" if self.verdict == "all layers" else f"{count} layers{modules}"
        text = f"{where}, lr {self.chosen.learning_rate:.3g}: loss {self.measured.loss_before:.3f} → {self.measured.loss_after:.3f}"
        every = self.all_layers
        if every.source == "estimated":
            after = self.measured.loss_before - every.loss_reduction.value
            half = ((every.loss_reduction.high or 0) - (every.loss_reduction.low or 0)) / 2
            text += f" (all layers, estimated: {after:.3f} ± {half:.3f})"
            gains = []
            if every.step_seconds and every.step_seconds > 1.05 * self.step_seconds:
                gains.append(f"{every.step_seconds / self.step_seconds:.1f} times faster a step")
            if every.peak_memory_bytes and every.peak_memory_bytes > 1.05 * self.peak_memory_bytes:
                gains.append(f"{every.peak_memory_bytes / self.peak_memory_bytes:.1f} times less memory")
            text += "".join(f", {gain}" for gain in gains)
        return text
