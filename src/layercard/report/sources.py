"""The files of a report: each path or folder is read, told apart by its schema, and checked to be of one model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercard.card.card import LayerCard
from layercard.card.numbers import Json
from layercard.errors import PlacementError, ReportError
from layercard.files import read_json, shown
from layercard.report.frames import read_comparison
from layercard.report.trials import Trial, compared, of_bench, of_comparison, of_run
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement

MOST_FILES = 5_000
"""JSON files that a folder may hold; more is taken for a mistake."""
_TABLE = {"title", "columns", "rows"}
_TIMING = {"task", "layers", "share_of_all"}
_BY_THE_WAY = ("layercard-plan/1", "layercard-cost/1", "layercard-roi/1", "layercard-set/1")
"""Schemas that belong to other files and are passed over."""


@dataclass
class Sources:
    """What was read.

    Attributes:
        cards: Cards by name, the report's own first.
        placements: Placements by name, the report's own first.
        trials: Training runs, compared with all layers where these were trained too.
        front: A cost and performance front.
        transfer: A comparison of cards.
        comparisons: Files of `layercard compare`, whole.
        tables: Result tables, as they are.
        used: How many files of each kind were read.
        passed: How many JSON files in folders were of no use.
        notes: What could not be done, in sentences.
    """

    cards: dict[str, Json] = field(default_factory=dict)
    placements: dict[str, Json] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    front: Json | None = None
    transfer: Json | None = None
    comparisons: list[Json] = field(default_factory=list)
    tables: list[Json] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)
    passed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def card(self) -> Json:
        """The card that the report is about."""
        return next(iter(self.cards.values()))

    @property
    def placement(self) -> Json | None:
        """The placement that the report is about."""
        return next(iter(self.placements.values()), None)


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read files and folders, in the order given; the first card and the first placement are what the report is about.

    Raises:
        ReportError: Nothing is named, there is no card, a folder holds nothing to show, a file is of no known kind, or the files are of
            several models.
        CardError, PlacementError, TrainingError, SelectionError: A file of a known kind is truncated or of another schema.
    """
    if not paths:
        raise ReportError("a report needs a card; name one that `layercard profile` wrote")
    found = Sources()
    models: dict[str, tuple[str, str]] = {}
    shares: dict[Any, float] = {}
    for path in paths:
        useful = 0
        for file, value, comparison_near in _values(path):
            kind = _take(found, file, value, shares, explicit=file == path, comparison_near=comparison_near)
            if kind is None:
                found.passed += 1
                continue
            useful += 1
            found.used[kind] = found.used.get(kind, 0) + 1
            model = _model_of(value)
            if model is not None:
                models[str(file)] = model
        if not useful:
            raise ReportError(f"{path} holds no card, placement or run; name a folder of `layercard train`, `compare` or `bench`")
    if not found.cards:
        raise ReportError(f"there is no card in {', '.join(map(str, paths[:3]))}; make one with `layercard profile` and name it too")
    _check_models(models)
    found.trials = compared(found.trials, shares)
    return found


def _values(path: Path) -> Iterator[tuple[Path, Json, bool]]:
    """The JSON objects of a file or folder, and whether a comparison or run lies beside or above each, whose part it then is."""
    if not path.is_dir():
        yield path, read_json(path, ReportError, "card, placement or run"), False
        return
    files = sorted(path.rglob("*.json"), key=lambda file: (len(file.parts), str(file)))
    if len(files) > MOST_FILES:
        raise ReportError(f"{path} holds {len(files):,} JSON files, over {MOST_FILES:,}; name the folder of the runs themselves")
    compared_in = {file.parent for file in files if file.name == "compare.json"}
    run_in = {file.parent for file in files if file.name == "run.json"}
    for file in files:
        part = any(folder in compared_in for folder in file.parents if folder != file.parent) or (
            file.parent in run_in and file.name != "run.json"
        )
        value = _quiet(file)
        if value is not None:
            yield file, value, part


def _quiet(file: Path) -> Json | None:
    """A JSON object of a folder, `None` for a list or a number; a file that is not whole is an error."""
    try:
        return read_json(file, ReportError, "run")
    except ReportError as problem:
        if "expected a JSON object" in str(problem):
            return None
        raise


def _take(found: Sources, file: Path, value: Json, shares: dict[Any, float], *, explicit: bool, comparison_near: bool) -> str | None:
    """Put a value where it belongs; gives its kind, or `None` where it is of no use."""
    schema = value.get("schema")
    if schema is None and value.keys() >= _TABLE:
        found.tables.append(_table(file, value))
        return "table"
    if schema is None and value.keys() >= _TIMING:
        place, share = _whole(file, _timing, dict(value))
        shares[place] = share
        return "timing"
    if comparison_near:
        return None
    take = _TAKERS.get(str(schema).partition("/")[0])
    if take is not None:
        return take(found, file, dict(value))
    if explicit and schema not in _BY_THE_WAY:
        raise ReportError(f"{file}: schema {shown(schema)} is none of a report's; name cards, placements, runs, fronts or tables")
    return None


def _timing(value: dict[str, Any]) -> tuple[Any, float]:
    """Task, layers and rank of a step time, and its share of that of all layers, %."""
    place = str(value["task"]), tuple(value["layers"]), value.get("rank")
    hash(place)
    return place, 100 * float(value["share_of_all"])


def _card(found: Sources, file: Path, value: dict[str, Any]) -> str:
    found.cards[_fresh(found.cards, file)] = LayerCard.from_json(value, str(file)).to_json()
    return "card"


def _placement(found: Sources, file: Path, value: dict[str, Any]) -> str:
    found.placements[_fresh(found.placements, file)] = Placement.from_json(value, str(file)).to_json()
    return "placement"


def _run(found: Sources, file: Path, value: dict[str, Any]) -> str:
    _expect(file, value, "layercard-run/1", "layercard train")
    found.trials.append(_whole(file, of_run, value))
    return "run"


def _bench(found: Sources, file: Path, value: dict[str, Any]) -> str | None:
    if value["schema"] == "layercard-bench/1":
        tables = _whole(file, lambda whole: list(whole["tables"].items()), value)
        found.tables += [_table(file, {"title": str(name).replace("_", " "), **table}) for name, table in tables if isinstance(table, dict)]
        return "table"
    _expect(file, value, "layercard-bench-run/1", "layercard bench")
    trial = _whole(file, of_bench, value)
    if trial is None:
        return None
    found.trials.append(trial)
    return "run"


def _comparison(found: Sources, file: Path, value: dict[str, Any]) -> str:
    found.comparisons.append(read_comparison(file))
    found.trials += _whole(file, of_comparison, value)
    return "comparison"


def _front(found: Sources, file: Path, value: dict[str, Any]) -> str:
    found.front = Front.load(file).to_json()
    return "front"


def _transfer(found: Sources, file: Path, value: dict[str, Any]) -> str:
    _expect(file, value, "layercard-transfer/1", "layercard transfer")
    found.transfer = value
    return "transfer"


_TAKERS: Mapping[str, Callable[[Sources, Path, dict[str, Any]], str | None]] = {
    "layercard": _card,
    "layercard-placement": _placement,
    "layercard-run": _run,
    "layercard-bench": _bench,
    "layercard-bench-run": _bench,
    "layercard-compare": _comparison,
    "layercard-front": _front,
    "layercard-transfer": _transfer,
}


def _table(file: Path, value: Json) -> Json:
    """A table whose rows are as long as its head.

    Raises:
        ReportError: It is none.
    """
    columns, rows = value.get("columns"), value.get("rows")
    whole = isinstance(columns, list) and isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(columns) for row in rows)
    if not whole:
        raise ReportError(f"{file} is no table: each of its rows must have a value for every column; make it again")
    return value


def _expect(file: Path, value: Json, schema: str, command: str) -> None:
    if value.get("schema") != schema:
        raise ReportError(f"{file}: schema {shown(value.get('schema'))} is not {schema!r}; make the file again with `{command}`")


def _whole(file: Path, make: Callable[[dict[str, Any]], Any], value: dict[str, Any]) -> Any:
    try:
        return make(value)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, PlacementError) as problem:
        kind = value.get("schema", "step time")
        raise ReportError(f"{file} is no whole {kind} ({type(problem).__name__}: {problem}); make it again") from None


def _fresh(taken: Mapping[str, Json], file: Path) -> str:
    """A name that is not taken: the file's own, with its folder where two files have one name."""
    return file.stem if file.stem not in taken else str(file)


def _model_of(value: Json) -> tuple[str, str] | None:
    """Fingerprint and name of the model that a file is of, where it says so."""
    model = value.get("model") or (value.get("meta_info") or {}).get("model_info") or (value.get("placement") or {}).get("model")
    if not isinstance(model, Mapping) or "fingerprint" not in model:
        return None
    return str(model["fingerprint"]), str(model.get("name"))


def _check_models(models: Mapping[str, tuple[str, str]]) -> None:
    first = next(iter(models.items()))
    for file, (fingerprint, name) in models.items():
        if fingerprint != first[1][0]:
            raise ReportError(
                f"{file} is of {name} ({fingerprint}), {first[0]} of {first[1][1]} ({first[1][0]}); a report is of one model with one set "
                "of weights, so make one for each"
            )
