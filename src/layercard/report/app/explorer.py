"""What the page asks for and gets, as plain values: HTML, figures and lists. `pages` hangs these functions onto widgets."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercard.card.card import LayerCard
from layercard.errors import LayercardError, OutputError
from layercard.report.app import choice as choosing, drawing, money, views
from layercard.report.app.choice import Choice, Fronts, Wishes
from layercard.report.app.jobs import Jobs
from layercard.report.app.library import Entry, Library, find, inside, read_upload
from layercard.report.frames import measured
from layercard.selection.solver import SECONDS as PATIENT
from layercard.selection.strategies import strategy_layers
from layercard.selection.transfer import transfer

MOST_UPLOADS = 20
"""Files that one visitor may upload."""
MOST_DRAWN = 64
"""Figures that are kept."""
SYNTHETIC = "synthetic"
"""The data set that layercard's own generator writes."""
PLAIN = ("last", "middle", "uniform", "first", "all")
"""Plain placements to start from when picking layers."""


@dataclass(frozen=True)
class Shown:
    """A placement as the page shows it.

    Attributes:
        choice: The placement, or why there is none.
        tiles: What is predicted, HTML.
        take_away: Downloads, command and reasons, HTML.
        seconds: How long the search took.
    """

    choice: Choice
    tiles: str
    take_away: str
    seconds: float


@dataclass
class Explorer:
    """The app without a page.

    Attributes:
        library: The files.
        fronts: Fronts that were made.
        uploads: Folder in which the server puts uploaded files; nothing else is read as an upload.
    """

    library: Library
    fronts: Fronts = field(default_factory=Fronts)
    uploads: Path | None = None

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.library.folders[0])
        self._drawn: dict[tuple[str, ...], drawing.Figure] = {}

    def entries(self, uploaded: Sequence[Entry]) -> list[Entry]:
        """The files in the folders and those that the visitor uploaded."""
        return [*uploaded, *self.library.entries()]

    def cards(self, uploaded: Sequence[Entry]) -> list[tuple[str, str]]:
        """The cards that can be chosen: what the list shows, and the key."""
        return [(entry.label, entry.key) for entry in self.entries(uploaded) if entry.card is not None]

    def card(self, uploaded: Sequence[Entry], key: str | None) -> Entry:
        """The card of a key.

        Raises:
            CardError: There is none.
        """
        return find(self.entries(uploaded), key)

    def sibling(self, uploaded: Sequence[Entry], entry: Entry) -> str | None:
        """The key of another card to compare one with: of the same model, if there is one."""
        others = [other for other in self.entries(uploaded) if other.card is not None and other.digest != entry.digest]
        alike = [other for other in others if _card(other).model.fingerprint == _card(entry).model.fingerprint]
        return next((other.key for other in [*alike, *others]), None)

    def upload(self, uploaded: Sequence[Entry], paths: Sequence[str]) -> tuple[list[Entry], list[str]]:
        """The uploads with the new ones among them, and for each file that was refused why."""
        found, refused = list(uploaded), []
        for path in map(Path, paths):
            read = self._uploaded(path, len(found))
            if isinstance(read, Entry):
                found.append(read)
            problem = read.problem if isinstance(read, Entry) else read
            refused += [problem] if problem is not None else []
        return found, refused

    def _uploaded(self, path: Path, taken: int) -> Entry | str:
        """The entry of an uploaded file, or why there is none."""
        try:
            if self.uploads is None or not inside(path, (self.uploads.resolve(),)):
                raise OutputError(f"{path.name} was not uploaded here")
            if taken >= MOST_UPLOADS:
                raise OutputError(f"{path.name} was left out: {MOST_UPLOADS} files are enough, put more into a folder given with --cards")
            return read_upload(path.name, path.stat().st_size, path.read_bytes, taken)
        except LayercardError as error:
            return str(error)
        except OSError:
            return f"{path.name} cannot be read"

    def roadmap(self, uploaded: Sequence[Entry], key: str | None) -> str:
        """Where the model of a card stands; the start of the way without one."""
        entries = self.entries(uploaded)
        return views.roadmap(entries, next((entry for entry in entries if entry.key == key and entry.card is not None), None))

    def explore(self, entry: Entry, wanted: Wishes, *, patient: bool = False) -> Shown:
        """The placement for what the controls say.

        Args:
            entry: The card.
            wanted: The controls.
            patient: Search as long as `layercard select` does.
        """
        started = time.perf_counter()
        found = choosing.choose(_card(entry), wanted, PATIENT if patient else choosing.SECONDS)
        seconds = time.perf_counter() - started
        return Shown(found, views.tiles(found, seconds), views.take_away(found, choosing.command_line(wanted, entry.place)), seconds)

    def front(self, entry: Entry, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
        """The front of a card, made once."""
        return self.fronts.of(entry.digest, _card(entry), progress)

    def figures(
        self, entry: Entry, wanted: Wishes, found: Choice, measure: str, front: str, hand: Choice | None = None
    ) -> tuple[drawing.Figure, drawing.Figure]:
        """The front with the choice on it, and a measure over depth with the chosen layers marked."""
        known = self.fronts.known(entry.digest)
        name = front if front in drawing.FRONTS else drawing.FRONTS[0]
        of_front = self._once((entry.digest, name, str(known is not None)), lambda: drawing.front(known, name))
        names = [key for _, key in self.measures(entry)]
        shown = measure if measure in names else names[0]
        over_depth = self._once((entry.digest, "depth", shown), lambda: drawing.depth(entry.value, shown))
        layers = found.layers if hand is None else hand.layers
        return drawing.with_choice(of_front, name, found, hand, wanted.limits, wanted.kept), drawing.with_layers(over_depth, layers)

    def _once(self, key: tuple[str, ...], draw: Callable[[], drawing.Figure]) -> drawing.Figure:
        """A figure that does not move, drawn when it is first asked for."""
        if key not in self._drawn:
            while len(self._drawn) >= MOST_DRAWN:
                self._drawn.pop(next(iter(self._drawn)), None)
            self._drawn[key] = draw()
        return self._drawn[key]

    def measures(self, entry: Entry) -> list[tuple[str, str]]:
        """The measures that a card has: title and name."""
        return [(measure.title, measure.key) for measure in measured(entry.value)]

    def by_hand(self, entry: Entry, found: Choice, layers: Sequence[str]) -> tuple[Choice, str, str]:
        """The placement of picked layers, what changes against the chosen one, and its downloads."""
        hand = choosing.by_hand(_card(entry), layers)
        if hand.placement is None:
            return hand, views.note("pick layers, or start from a placement", "info"), ""
        if found.placement is None:
            return hand, views.tiles(hand), views.take_away(hand)
        table = views.change_table(choosing.changes(found.placement.to_json(), hand.placement.to_json()))
        return hand, table, views.take_away(hand)

    def start_from(self, entry: Entry, found: Choice, name: str) -> list[str]:
        """The layers to start picking from: those chosen, none, or a plain placement of as many."""
        if name in PLAIN:
            count = len(found.layers) or 1
            return choosing.picked(strategy_layers(name, _card(entry).model.layers, count))
        return choosing.picked(found.layers) if name == "chosen" else []

    def compare(self, uploaded: Sequence[Entry], one: str | None, two: str | None, k: float) -> str:
        """Whether the card of one data set serves another."""
        try:
            a, b = self.card(uploaded, one), self.card(uploaded, two)
            if a.key == b.key:
                return views.note("choose two different cards of one model, on different data")
            depth = min(_card(a).model.layers, _card(b).model.layers)
            return views.verdict(transfer([(a.name, _card(a)), (b.name, _card(b))], k=min(max(1, int(k)), depth)).to_json())
        except LayercardError as error:
            return views.note(str(error), "bad")

    def saves(
        self, uploaded: Sequence[Entry], entry: Entry, layers: Sequence[int], currency: str, figures: Sequence[float | str | None]
    ) -> tuple[str, str]:
        """What a placement saves with the reader's figures: the headline and all of it."""
        try:
            found = money.saved(figures, currency or "USD", layers, entry, self.entries(uploaded))
            return views.roi_headline(found), views.roi(found)
        except LayercardError as error:
            return views.note(str(error), "bad"), ""

    def start(self, model: str | None, data: str | None, records: float) -> str:
        """Start to profile a model of the given folders; what is wrong is said in the same place."""
        try:
            models, sources = self.library.models(), self.library.data()
            if model not in models:
                raise OutputError("choose a model of the list; models are folders with config.json and safetensors, or .gguf files")
            if data != SYNTHETIC and data not in sources:
                raise OutputError("choose data of the list; data are .jsonl, .csv, .tsv or .parquet files")
            source = SYNTHETIC if data == SYNTHETIC else str(sources[str(data)])
            return views.job(self.jobs.start(models[model], source, max(4, int(records))).progress)
        except LayercardError as error:
            return views.note(str(error), "bad")

    def job(self) -> tuple[str, bool]:
        """How far the profile is, and whether it still runs."""
        job = self.jobs.job
        return views.job(job.progress if job else None), bool(job and job.running)

    def cancel(self) -> str:
        """End the running profile."""
        progress = self.jobs.cancel()
        return views.job(progress) if progress else self.job()[0]


def _card(entry: Entry) -> LayerCard:
    assert entry.card is not None
    return entry.card
