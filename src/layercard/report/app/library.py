"""What the app knows: the files in its folders, the placement that the controls come to, and what a placement saves.

The page names a file by a key that this list gave it, never by a path: what is not listed cannot be asked for.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from layercard.card.card import LayerCard
from layercard.card.numbers import Json, listed, percent, short
from layercard.cost.model import CostModel
from layercard.errors import CardError, LayercardError, OutputError, ReportError, visible
from layercard.files import parse_json
from layercard.records import Estimate, Record
from layercard.report.roi import FIGURES, Roi, RoiInputs, ratios_of, roi, with_labels
from layercard.report.sources import read_runs
from layercard.report.trials import Trial, compared, grouped
from layercard.selection.budgets import Budgets, option_of
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement
from layercard.selection.select import given, select
from layercard.selection.transfer import Transfer
from layercard.training.records import Evaluation, Run
from layercard.trials.records import Comparison, Race, TrialRecord
from layercard.trials.result import Result

# ---- files

LARGEST = 20 * 2**20
"""Bytes of a file that is still read."""
DEEPEST_CARD = 256
"""Layers of a card that can still be explored while sliders move."""
MOST_FILES = 400
"""Files that are looked at."""
MOST_FOLDERS = 4
"""Folders below a given one that are looked into."""
DATA_ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
KINDS: dict[str, type[Record]] = {
    record.schema_name(): record
    for record in (LayerCard, Placement, Run, Comparison, Transfer, Front, Evaluation, CostModel, TrialRecord, Result, Race)
}
"""The class of a file by its schema."""
RUN_KINDS = {"run record": "run", "comparison": "comparison"}
"""Files with training runs, and what reports call them."""
UNFINISHED = ("layercard-plan", "layercard-probe", "layercard-bench")
"""Schemas of files that belong to unfinished work, which nobody opens."""


@dataclass(frozen=True)
class Entry:
    """A file: a card, a placement, a run, or one that cannot be used."""

    key: str  # what the page calls it by
    name: str  # where it lies in the given folder, for people
    kind: str  # the noun of its class, or `unreadable`
    value: Json  # its JSON object; empty where there is a problem
    card: LayerCard | None = None
    trials: Sequence[Trial] = ()  # training runs in it
    problem: str | None = None  # why it cannot be used, in one line
    place: str = ""  # where it lies as a command line can name it
    digest: str = ""  # hash of its content

    @property
    def label(self) -> str:
        """How a list shows it: for a card also the model and the data."""
        if self.card is None:
            return self.name
        model, data = (text if len(text) <= 40 else f"…{text[-39:]}" for text in (self.card.model.name, self.card.data.source))
        return visible(f"{self.name} · {model} · {data}")

    @property
    def says(self) -> str:
        """Its model, and the data of a card or the layers of a placement."""
        words = [str((self.value.get("model") or {}).get("name", ""))]
        if self.card is not None:
            words += [f"{self.card.model.layers} layers", f"{self.card.data.records:,} records of {self.card.data.source}"]
        elif self.kind == "placement":
            words.append(f"layers {listed(sorted(self.value['layers']))}")
        return ", ".join(words)


def read_entry(key: str, name: str, data: bytes, place: str = "") -> Entry | None:
    """What a file holds; `None` for JSON of other programs. What is not JSON, or says it is ours and is not whole, has a `problem`."""
    try:
        value: Json = parse_json(data, name, CardError, "JSON file")
        schema = value.get("schema")
        if not isinstance(schema, str) or not schema.startswith("layercard") or schema.partition("/")[0] in UNFINISHED:
            return None
        if schema not in KINDS:
            raise CardError(f"{name}: schema {schema[:40]!r} is not read; make the file again")
        record = KINDS[schema].from_json(value, name)
        trials = read_runs(RUN_KINDS[record.noun], value, name) if record.noun in RUN_KINDS else ()
        card = record if isinstance(record, LayerCard) else None
        if card is not None and card.model.layers > DEEPEST_CARD:
            raise CardError(f"{name}: {card.model.layers} layers; up to {DEEPEST_CARD} can be explored here, use `layercard select`")
    except LayercardError as error:
        return _broken(key, name, str(error))
    return Entry(key, visible(name), record.noun, value, card, trials, place=place or name, digest=hashlib.sha256(data).hexdigest())


def _broken(key: str, name: str, problem: str) -> Entry:
    return Entry(key, visible(name), "unreadable", {}, problem=problem[:300])


class Library:
    """The files in the given folders: cards, placements and run records in `folders`, models and data in `models` (else in `folders` too).

    New cards go into the first folder.

    Raises:
        OutputError: One of them is not a folder.
    """

    def __init__(self, folders: Sequence[Path], models: Sequence[Path] = ()) -> None:
        for path in (*folders, *models):
            if not path.expanduser().is_dir():
                raise OutputError(f"{path} is not a folder; name one that is there")
        self.folders = tuple(path.expanduser().resolve() for path in folders)
        self.model_folders = tuple(path.expanduser().resolve() for path in models) or self.folders
        self._read: dict[Path, tuple[tuple[int, int], Entry | None]] = {}

    def entries(self) -> list[Entry]:
        """All files of ours, and those that should be and cannot be read; what did not change since the last time is not read again."""
        entries = [self._entry(root, path) for root, path in self._files((".json",), self.folders)]
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: (entry.problem is not None, entry.name))

    def models(self) -> dict[str, Path]:
        """Model folders (a `config.json` beside safetensors) and GGUF files, by the names that the page shows."""
        models = list(self._files((".gguf",), self.model_folders))
        for root, path in self._files(("config.json",), self.model_folders):
            if path.name == "config.json" and any(path.parent.glob("*.safetensors")):
                models.append((root, path.parent))
        return {self._name(root, path): path for root, path in sorted(models)}

    def data(self) -> dict[str, Path]:
        """Files with records, by the names that the page shows."""
        return {self._name(root, path): path for root, path in self._files(DATA_ENDINGS, self.model_folders)}

    def _files(self, endings: tuple[str, ...], folders: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
        """Files of the given endings with the folder they belong to; no hidden ones, and none that a link leads out of the folders."""
        seen = 0
        for root in folders:
            for folder, below, names in os.walk(root):
                depth = len(Path(folder).relative_to(root).parts)
                below[:] = sorted(name for name in below if not name.startswith(".") and depth < MOST_FOLDERS)
                for name in sorted(names):
                    if name.startswith(".") or not name.lower().endswith(endings):
                        continue
                    if (seen := seen + 1) > MOST_FILES:
                        return
                    if inside(Path(folder) / name, root):
                        yield root, Path(folder) / name

    def _entry(self, root: Path, path: Path) -> Entry | None:
        name, key = self._name(root, path), f"file:{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if path in self._read and self._read[path][0] == stamp:
                return self._read[path][1]
            if not path.is_file():
                raise OSError("not a regular file")
            if stat.st_size > LARGEST:
                entry: Entry | None = _broken(key, name, f"{name} has {stat.st_size / 2**20:.0f} MiB; up to {LARGEST // 2**20} are read")
            else:
                # A command line names it from the current folder where it lies below that.
                place = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
                entry = read_entry(key, name, path.read_bytes(), str(place))
        except OSError as error:
            return _broken(key, name, f"{name}: {error.strerror or error}; make it readable")
        self._read[path] = (stamp, entry)
        return entry

    def _name(self, root: Path, path: Path) -> str:
        shown = visible(str(path.relative_to(root)) if path != root else path.name)
        return shown if len({*self.folders, *self.model_folders}) == 1 else f"{root.name}/{shown}"


def inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, lies in a folder."""
    return path.resolve().is_relative_to(folder)


# ---- choices

SECONDS = 0.06
"""Time limit of each search while a slider moves; the placement says how far it may be from the best."""
COSTS = {
    "Step time": ("step_time", "seconds", "max_time"),
    "Peak memory": ("peak_memory", "bytes", "max_training_memory"),
    "Adapter weights": ("parameters", "count", "max_params"),
    "Added latency": ("latency", "seconds", "max_latency"),
}
"""Costs as the page calls them: name in a placement's prediction, its unit there, and the budget that has a slider."""
WORDS = {option_of(budget): title.lower() for title, (_, _, budget) in COSTS.items()}
WORDS |= {"--min-performance": "performance kept", "--k": "number of layers"}
"""Options of the command line as the page calls them."""


class Wishes(NamedTuple):
    """What the controls say: `None` for as many layers as are best, and budgets in % of all layers."""

    objective: str
    k: int | None
    budgets: Budgets


def wishes(objective: str, k: float, min_performance: float, *limits: float) -> Wishes:
    """The controls as they stand: 0 layers or 0 % kept means not given, 100 % of a cost (in the order of `COSTS`) no limit.

    >>> wishes("balanced", 0, 90, 100, 60, 100, 100).budgets.given()
    {'min_performance': '90%', 'max_training_memory': '60%'}
    """
    shares = {budget: value for (_, _, budget), value in zip(COSTS.values(), limits, strict=True) if value is not None and value < 100}
    shares |= {"min_performance": min_performance} if min_performance else {}
    given: dict[str, Any] = {name: f"{value:g}%" for name, value in shares.items()}
    return Wishes(objective, int(k) or None, Budgets(**given))


class Choice(NamedTuple):
    """A placement, or in words why there is none."""

    placement: Placement | None
    problem: str = "no placement"

    @property
    def layers(self) -> tuple[int, ...]:
        """The chosen layers; none where nothing meets the wishes."""
        return self.placement.layers if self.placement else ()


def choose(card: LayerCard, asked: Wishes, seconds: float = SECONDS) -> Choice:
    """The placement that the selection gives, or what it says where there is none, with the page's words for options."""
    try:
        return Choice(select(card, objective=asked.objective, k=asked.k, budgets=asked.budgets, seconds=seconds))
    except LayercardError as error:
        return Choice(None, re.sub(r"--[a-z-]+", lambda option: WORDS.get(option[0], option[0]), str(error)))


def by_hand(card: LayerCard, layers: Iterable[Any]) -> Choice:
    """The placement of the layers that were picked, or what is wrong with them."""
    try:
        return Choice(given(card, [int(layer) for layer in layers]))
    except (LayercardError, ValueError) as error:
        return Choice(None, str(error))


def command_line(asked: Wishes, card_name: str) -> str:
    """The `layercard select` command that makes the same choice."""
    options = ["--objective", asked.objective, *(["--k", str(asked.k)] if asked.k else [])]
    for name, value in asked.budgets.given().items():
        options += [option_of(name), value]
    return shlex.join(["layercard", "select", card_name, *options, "-o", "placement.json"])


def rows(placement: Placement) -> dict[str, tuple[str, float]]:
    """What is predicted of a placement that was chosen from a card: in words, and as a number (shares in % of all layers)."""
    predicted = placement.predicted
    performance = Estimate(**predicted["performance_kept"])
    table = {"Performance kept": (percent(performance), 100 * performance.value)}
    for title, (key, unit, _) in COSTS.items():
        amount, share = predicted[key][unit], 100 * predicted[key]["share"]
        size = "" if amount is None else {"bytes": f"{amount / 2**20:,.0f} MiB", "count": f"{amount:,}"}.get(unit, f"{short(amount)} s")
        table[title] = f"{share:.0f}% · {size}" if size else f"{share:.0f}%", share
    backward, _, depth = predicted["layers_in_backward"].partition("/")
    table["Layers"] = f"{len(placement.layers)} of {depth}", len(placement.layers)
    return table | {"Layers in backward": (f"{backward} of {depth}", int(backward))}


def changes(chosen: Placement, other: Placement) -> list[tuple[str, str, str, str]]:
    """Rows of a table: measure, the chosen placement, the other one, and the difference in points or numbers."""
    table, after = [], rows(other)
    for name, (words, number) in rows(chosen).items():
        difference = after[name][1] - number
        amount = f"{abs(difference):.0f}" if name.startswith("Layers") else f"{abs(difference):.1f} points"
        text = "same" if abs(difference) < 0.05 else f"{'+' if difference > 0 else '−'}{amount}"
        table.append((name, words, after[name][0], text))
    return table


# ---- savings


def saved(figures: Sequence[float | str | None], currency: str, placement: Placement, card: Entry, entries: Sequence[Entry]) -> Roi:
    """What a placement saves, from the runs of the card's model among all files, and from the card's cost where no run says the same.

    The figures are the fields in the order of `FIGURES`, as they were typed. Empty ones and untouched examples count as not given. A
    decimal comma is refused, since the page is in English, where `1,900` is a thousand times `1.9`.

    Raises:
        ReportError: A figure is not a number, or out of range.
    """
    values: dict[str, Any] = {"currency": currency}
    for (name, field), typed in zip(FIGURES.items(), figures, strict=True):
        value = typed.strip() if isinstance(typed, str) else typed
        if value not in (None, "", field.default, shown(field.default)):
            values[name] = value
    try:
        inputs = RoiInputs.of(values)
    except ReportError as error:
        raise ReportError(with_labels(str(error))) from None
    # Runs of the card's model, from run records and comparisons; those that a comparison has are not counted twice.
    fingerprint = card.value["model"]["fingerprint"]
    ours = [entry for entry in entries if entry.trials and entry.value["model"].get("fingerprint") == fingerprint]
    covered = {PurePath(entry.place).parent for entry in ours if entry.kind == "comparison"}
    counted = [entry for entry in ours if entry.kind == "comparison" or covered.isdisjoint(PurePath(entry.place).parent.parents)]
    trials = [trial for entry in counted for trial in entry.trials]
    modules, results = placement.modules or "all", (entry.value for entry in entries if entry.kind == Result.noun)
    chosen = [Result.from_json(value) for value in results if value["model"].get("fingerprint") == fingerprint]
    result = next((each for each in chosen if (each.chosen.layers, each.chosen.modules) == (placement.layers, modules)), None)
    return roi(inputs, ratios_of(placement.layers, card.card, grouped(compared(trials)), modules, result))


def shown(figure: float | None) -> str:
    """A figure as its field on the page begins with."""
    return "" if figure is None else f"{figure:.15g}"
