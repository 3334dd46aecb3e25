"""The files of a report: each path or folder is read, told apart by its schema, and checked to be of one model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercard.card.card import LayerCard
from layercard.card.numbers import Json
from layercard.errors import OutputError, PlacementError, ReportError
from layercard.files import json_text, read_json, shown
from layercard.records import Record
from layercard.report.trials import Trial, compared, of_comparison, of_run, of_trial, task_word
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement
from layercard.selection.transfer import Transfer
from layercard.training.records import Run
from layercard.trials.records import Comparison, Race, TrialRecord
from layercard.trials.result import Result

TIMING = "timing"
"""Folder of a run with the few steps that it times first."""
MOST_FILES = 5_000
"""JSON files that a folder may hold; more is taken for a mistake."""
RECORDS: dict[str, type[Record]] = {
    "card": LayerCard,
    "placement": Placement,
    "front": Front,
    "transfer": Transfer,
    "result": Result,
    "race": Race,
}
RUNS: dict[str, tuple[type[Record], Callable[[Any], list[Trial]]]] = {
    "run": (Run, lambda run: [of_run(run)]),
    "benchmark run": (TrialRecord, of_trial),
    "comparison": (Comparison, of_comparison),
}
"""Files with training runs: their class, and how their runs are read."""
_CLASSES = RECORDS | {kind: record for kind, (record, _) in RUNS.items()}
_KINDS = {record.schema_name().partition("/")[0]: kind for kind, record in _CLASSES.items()}
_OF_OTHERS = ("layercard-plan/1", "layercard-cost/1", "layercard-roi/1", "layercard-set/1")
"""Schemas that belong to other files and are passed over."""


@dataclass
class Sources:
    """What was read."""

    cards: dict[str, LayerCard] = field(default_factory=dict)  # by name, the report's own first
    result: Result | None = None  # of `layercard run`, which may have had no time for a card
    race: Race | None = None
    placements: dict[str, Placement] = field(default_factory=dict)  # by name, the report's own first
    trials: list[Trial] = field(default_factory=list)  # compared with all layers where these were trained too
    curves: list[Trial] = field(default_factory=list)  # runs that say the loss of each step, those of a comparison too
    front: Front | None = None
    transfer: Transfer | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    tables: list[Json] = field(default_factory=list)  # result tables, as they are
    used: dict[str, int] = field(default_factory=dict)  # how many files of each kind were read
    passed: int = 0  # JSON files in folders that were of no use
    notes: list[str] = field(default_factory=list)  # what could not be done, in sentences

    @property
    def card(self) -> LayerCard | None:
        """The card that the report is about."""
        return next(iter(self.cards.values()), None)

    @property
    def model(self) -> Json:
        """Name, fingerprint and number of layers of the model."""
        if self.card is not None:
            return self.card.model.model_dump()
        assert self.result is not None
        return self.result.model

    @property
    def chosen(self) -> tuple[tuple[int, ...], str] | None:
        """Layers of the report's placement and the set of modules in them."""
        if self.placement is not None:
            return self.placement.layers, self.placement.modules or "all"
        return (self.result.chosen.layers, self.result.chosen.modules) if self.result is not None else None

    @property
    def own_result(self) -> Result | None:
        """The result of the run that chose the report's placement."""
        result = self.result
        return result if result is not None and self.chosen == (result.chosen.layers, result.chosen.modules) else None

    @property
    def task(self) -> str:
        """The task of the card, or of the run, in a word."""
        source = self.card.data.source if self.card is not None else str(self.result.data["source"]) if self.result is not None else ""
        return task_word(source)

    @property
    def placement(self) -> Placement | None:
        """The placement that the report is about."""
        return next(iter(self.placements.values()), None)


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read files and folders, in the order given; the first card and the first placement are what the report is about.

    Raises:
        ReportError: Nothing is named, there is no card, a folder holds nothing to show, a file is of no known kind, or the files are of
            several models.
        CardError, PlacementError, SelectionError, TrainingError: A file of a known kind is truncated or of another schema.
    """
    if not paths:
        raise ReportError("a report needs a card; name one that `layercard profile` wrote")
    sources = Sources()
    models: dict[str, tuple[str, str]] = {}
    shares: dict[Any, float] = {}
    for path in paths:
        useful = 0
        for file, value, counted_elsewhere in _values(path):
            try:
                json_text(value)
            except OutputError:
                raise ReportError(f"{file} holds NaN or an infinite number, which nothing measured is; make it again") from None
            kind = _take(sources, file, value, shares, named=file == path, counted_elsewhere=counted_elsewhere)
            if kind is None:
                sources.passed += 1
                continue
            useful += 1
            sources.used[kind] = sources.used.get(kind, 0) + 1
            model = value.get("model") or (value.get("placement") or {}).get("model")
            if isinstance(model, Mapping) and "fingerprint" in model:
                models[str(file)] = str(model["fingerprint"]), str(model.get("name"))
        if not useful:
            raise ReportError(f"{path} holds no card, placement or run; name a folder of `layercard train`, `compare` or `bench`")
    if not sources.cards and sources.result is None:
        raise ReportError(
            f"there is no card in {', '.join(map(str, paths[:3]))}, and no finished run; make one with `layercard profile` and name it too"
        )
    first, (expected, model_name) = next(iter(models.items()))
    for other, (fingerprint, name) in models.items():
        if fingerprint != expected:
            raise ReportError(
                f"{other} is of {name} ({fingerprint}), {first} of {model_name} ({expected}); a report is of one model with one set of "
                "weights, so make one for each"
            )
    sources.trials = compared(sources.trials, shares)
    return sources


def read_runs(kind: str, value: Json, source: str) -> list[Trial]:
    """The runs of a file whose kind is in `RUNS`; `source` names it in messages.

    Raises:
        TrainingError, BenchmarkError: It has another schema, or a part is missing or of the wrong kind.
        ReportError: Its parts do not fit together.
    """
    record, runs_of = RUNS[kind]
    checked = record.from_json(value, source)
    return _checked(source, record.noun, lambda: runs_of(checked))


def called(name: str, placement: Placement) -> str:
    """What a placement is called: its file and what it was chosen for."""
    return name if name == placement.objective else f"{name} ({placement.objective})"


def _checked(source: str, noun: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, PlacementError) as problem:
        raise ReportError(f"{source} is not a whole {noun} ({type(problem).__name__}: {problem}); make it again") from None


def _values(path: Path) -> Iterator[tuple[Path, dict[str, Any], bool]]:
    """The JSON objects of a file or folder, and whether a comparison above or a run beside each has counted it already."""
    if not path.is_dir():
        yield path, read_json(path, ReportError, "card, placement or run"), False
        return
    files = sorted(path.rglob("*.json"), key=lambda file: (len(file.parts), str(file)))
    if len(files) > MOST_FILES:
        raise ReportError(f"{path} holds {len(files):,} JSON files, over {MOST_FILES:,}; name the folder of the runs themselves")
    comparisons = {file.parent for file in files if file.name == "compare.json"}
    runs = {file.parent for file in files if file.name == "run.json"}
    timings = {file.parent / TIMING for file in files if file.name == "result.json"}  # a few steps of `layercard run`, which train nothing
    for file in files:
        if file.parent in timings:
            continue
        below_comparison = not comparisons.isdisjoint(file.parent.parents)
        try:
            value = read_json(file, ReportError, "run")
        except ReportError as problem:
            if "expected a JSON object" in str(problem):  # a list or a number is of no use; a truncated file is an error
                continue
            raise
        yield file, value, below_comparison or (file.parent in runs and file.name != "run.json")


def _take(
    sources: Sources, file: Path, value: dict[str, Any], shares: dict[Any, float], *, named: bool, counted_elsewhere: bool
) -> str | None:
    """Put a value where it belongs; gives its kind, or `None` where it is of no use."""
    schema, source = value.get("schema"), str(file)
    kind = _KINDS.get(str(schema).partition("/")[0])
    if schema is None and value.keys() >= {"title", "columns", "rows"}:
        sources.tables.append(_table(file, value))
        return "table"
    if schema is None and value.keys() >= {"task", "layers", "share_of_all"}:
        # A step time that was measured apart: task, layers and rank, and its share of that of all layers, %.
        timing = _checked(source, "step time", lambda: (str(value["task"]), tuple(map(int, value["layers"])), value.get("rank")))
        shares[timing] = 100 * _checked(source, "step time", lambda: float(value["share_of_all"]))
        return "timing"
    runs = read_runs(kind, value, source) if kind in RUNS and (kind == "run" or not counted_elsewhere) else []
    sources.curves += [run for run in runs if run.curve_points[0]]
    if counted_elsewhere:
        return None
    if schema == "layercard-bench/1":
        for name, table in _checked(source, schema, lambda: list(value["tables"].items())):
            if isinstance(table, dict):
                sources.tables.append(_table(file, {"title": str(name).replace("_", " "), **table}))
        return "table"
    if kind in RECORDS:
        record = RECORDS[kind].from_json(value, source)
        if isinstance(record, LayerCard | Placement):
            records: dict[str, Any] = sources.cards if isinstance(record, LayerCard) else sources.placements
            records[file.stem if file.stem not in records else source] = record
        else:
            setattr(sources, kind, record)
        return kind
    if kind in RUNS:
        sources.trials += runs
        if kind == "comparison":
            sources.comparisons.append(Comparison.from_json(value, source))
        return {"benchmark run": "run" if runs else None}.get(kind, kind)
    if named and schema not in _OF_OTHERS:
        raise ReportError(f"{file}: schema {shown(schema)} is not one of a report's; name cards, placements, runs, fronts or tables")
    return None


def _table(file: Path, value: dict[str, Any]) -> Json:
    """A table, checked to have rows as long as its head."""
    columns, rows = value.get("columns"), value.get("rows")
    if isinstance(columns, list) and isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        return value
    raise ReportError(f"{file} is not a table: each of its rows must have a value for every column; make it again")
