"""What the page asks for and gets, as plain values: HTML, figures and lists. `pages` hangs these functions onto widgets."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from layercard.card.card import LayerCard
from layercard.card.numbers import Json
from layercard.errors import LayercardError, OutputError
from layercard.report.app import library as files, views
from layercard.report.app.jobs import Jobs
from layercard.report.app.library import Choice, Entry, Library, Wishes
from layercard.report.words import measured
from layercard.selection.pareto import pareto
from layercard.selection.solver import SECONDS as PATIENT
from layercard.selection.strategies import strategy_layers
from layercard.selection.transfer import transfer

MOST_UPLOADS = 20
"""Files that one visitor may upload."""
MOST_DRAWN = 64
"""Figures that are kept."""
MOST_FRONTS = 16
"""Fronts that are kept."""
SYNTHETIC = "synthetic"
"""The data set that layercard's own generator writes."""
PLAIN = ("last", "middle", "uniform", "first", "all")
"""Plain placements to start from when picking layers."""


class Explorer:
    """The app without a page; nothing but what lies in the folder `uploads`, where the server puts it, is read as an upload."""

    def __init__(self, library: Library, uploads: Path | None = None) -> None:
        self.library, self.uploads, self.jobs = library, uploads, Jobs(library.folders[0])
        self._fronts: dict[str, Json] = {}  # by the digest of the card
        self._making = threading.Lock()
        self._drawn: dict[tuple[str, ...], views.Figure] = {}

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
        return files.find(self.entries(uploaded), key)

    def sibling(self, uploaded: Sequence[Entry], entry: Entry) -> str | None:
        """The key of another card to compare one with: of the same model, if there is one."""
        others = [other for other in self.entries(uploaded) if other.card is not None and other.digest != entry.digest]
        others.sort(key=lambda other: card_of(other).model.fingerprint != card_of(entry).model.fingerprint)
        return others[0].key if others else None

    def upload(self, uploaded: Sequence[Entry], paths: Sequence[str]) -> tuple[list[Entry], list[str]]:
        """The uploads with the new ones among them, and for each file that was refused why."""
        entries, refused = list(uploaded), []
        for path in map(Path, paths):
            try:
                if self.uploads is None or not files.inside(path, self.uploads.resolve()):
                    raise OutputError(f"{path.name} was not uploaded here")
                if len(entries) >= MOST_UPLOADS:
                    more = "files are enough, put more into a folder given with --cards"
                    raise OutputError(f"{path.name} was left out: {MOST_UPLOADS} {more}")
                entries.append(files.read_upload(path.name, path.stat().st_size, path.read_bytes, len(entries)))
                refused += [entries[-1].problem] if entries[-1].problem is not None else []
            except LayercardError as error:
                refused.append(str(error))
            except OSError:
                refused.append(f"{path.name} cannot be read")
        return entries, refused

    def roadmap(self, uploaded: Sequence[Entry], key: str | None) -> str:
        """Where the model of a card stands; the start of the way without one."""
        entries = self.entries(uploaded)
        return views.roadmap(entries, next((entry for entry in entries if entry.key == key and entry.card is not None), None))

    def explore(self, entry: Entry, asked: Wishes, *, patient: bool = False) -> tuple[Choice, str, str]:
        """The placement for what the controls say, its tiles and its downloads; `patient` searches as long as `layercard select`."""
        started = time.perf_counter()
        choice = files.choose(card_of(entry), asked, PATIENT if patient else files.SECONDS)
        tiles = views.tiles(choice, time.perf_counter() - started)
        return choice, tiles, views.take_away(choice, files.command_line(asked, entry.place))

    def front(self, entry: Entry, progress: Callable[[str, int, int], None] | None = None) -> Json:
        """The front of a card, made once; two who ask at once wait for one search."""
        with self._making:
            if entry.digest not in self._fronts:
                self._fronts[entry.digest] = pareto(card_of(entry), progress=progress).to_json()
                while len(self._fronts) > MOST_FRONTS:
                    self._fronts.pop(next(iter(self._fronts)))
            return self._fronts[entry.digest]

    def figures(
        self, entry: Entry, asked: Wishes, choice: Choice, measure: str, front: str, hand: Choice | None = None
    ) -> tuple[views.Figure, views.Figure]:
        """The front with the choice on it, and a measure over depth with the chosen layers marked; what does not move is drawn once."""

        def once(key: tuple[str, ...], draw: Callable[[], views.Figure]) -> views.Figure:
            if key not in self._drawn:
                while len(self._drawn) >= MOST_DRAWN:
                    self._drawn.pop(next(iter(self._drawn)), None)
                self._drawn[key] = draw()
            return self._drawn[key]

        value = self._fronts.get(entry.digest)
        name = front if front in views.FRONTS else views.FRONTS[0]
        names = [key for _, key in self.measures(entry)]
        shown = measure if measure in names else names[0]
        of_front = once((entry.digest, name, str(value is not None)), lambda: views.front(value, name))
        over_depth = once((entry.digest, "depth", shown), lambda: views.depth(entry.value, shown))
        layers = choice.layers if hand is None else hand.layers
        return views.with_choice(of_front, name, choice, hand, asked.limits, asked.min_performance), views.with_layers(over_depth, layers)

    def measures(self, entry: Entry) -> list[tuple[str, str]]:
        """The measures that a card has: title and name."""
        return [(measure.title, measure.key) for measure in measured(entry.value)]

    def by_hand(self, entry: Entry, choice: Choice, layers: Sequence[str]) -> tuple[Choice, str, str]:
        """The placement of picked layers, what changes against the chosen one, and its downloads."""
        hand = files.by_hand(card_of(entry), layers)
        if hand.placement is None:
            return hand, views.note("pick layers, or start from a placement", "info"), ""
        if choice.placement is None:
            return hand, views.tiles(hand), views.take_away(hand)
        table = views.change_table(files.changes(choice.placement.to_json(), hand.placement.to_json()))
        return hand, table, views.take_away(hand)

    def start_from(self, entry: Entry, choice: Choice, name: str) -> list[str]:
        """The layers to start picking from: those chosen, none, or a plain placement of as many."""
        layers: Sequence[int] = choice.layers if name == "chosen" else ()
        if name in PLAIN:
            layers = strategy_layers(name, card_of(entry).model.layers, len(choice.layers) or 1)
        return [str(layer) for layer in layers]

    def compare(self, uploaded: Sequence[Entry], first: str | None, second: str | None, k: float) -> str:
        """Whether the card of one data set serves another."""
        try:
            a, b = self.card(uploaded, first), self.card(uploaded, second)
            if a.key == b.key:
                return views.note("choose two different cards of one model, on different data")
            depth = min(card_of(a).model.layers, card_of(b).model.layers)
            named = [(entry.name, card_of(entry)) for entry in (a, b)]
            return views.verdict(transfer(named, k=min(max(1, int(k)), depth)).to_json())
        except LayercardError as error:
            return views.note(str(error), "bad")

    def saves(
        self, uploaded: Sequence[Entry], entry: Entry, layers: Sequence[int], currency: str, figures: Sequence[float | str | None]
    ) -> tuple[str, str]:
        """What a placement saves with the reader's figures: the headline and all of it."""
        try:
            result = files.saved(figures, currency or "USD", layers, entry, self.entries(uploaded))
            return views.roi_headline(result), views.roi(result)
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


def card_of(entry: Entry) -> LayerCard:
    """The card of an entry that is one."""
    assert entry.card is not None
    return entry.card
