"""What the page asks for and gets, as plain values: HTML, figures and lists. `pages` hangs these functions onto widgets.

They take what the page's widgets hold: the files that the visitor uploaded, the key of the open card, and the controls in the order in
which `wishes` takes them, then the measure over depth and the name of the front.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from layercard.card.card import LayerCard
from layercard.errors import CardError, LayercardError, OutputError
from layercard.report.app import library as files, views
from layercard.report.app.jobs import Jobs
from layercard.report.app.library import Choice, Entry, Library
from layercard.report.words import measured
from layercard.selection.pareto import Front, pareto
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
Value = TypeVar("Value")


class Explorer:
    """The app without a page. Uploads are read from `folder` alone, where the server puts them; half cards lie there too."""

    def __init__(self, library: Library, folder: Path | None = None) -> None:
        self.library, self.folder, self.jobs = library, folder, Jobs(library.folders[0], folder)
        self._fronts: dict[str, Front] = {}  # by the digest of the card
        self._making = threading.Lock()
        self._drawn: dict[tuple[str, ...], views.Figure] = {}

    def entries(self, uploaded: Sequence[Entry]) -> list[Entry]:
        """The files in the folders and those that the visitor uploaded."""
        return [*uploaded, *self.library.entries()]

    def cards(self, uploaded: Sequence[Entry]) -> list[tuple[str, str]]:
        """The cards that can be chosen: what the list shows, and the key."""
        return [(entry.label, entry.key) for entry in self.entries(uploaded) if entry.card is not None]

    def card(self, uploaded: Sequence[Entry], key: str | None) -> Entry | None:
        """The card of a key, if it is in the list."""
        return next((entry for entry in self.entries(uploaded) if entry.key == key and entry.card is not None), None)

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
                if self.folder is None or not files.inside(path, self.folder.resolve()):
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
        return views.roadmap(self.entries(uploaded), self.card(uploaded, key))

    def explore(self, uploaded: Sequence[Entry], key: str | None, *controls: Any, patient: bool = False) -> tuple[Any, ...]:
        """The `Choice` for what the controls say, its tiles, downloads and figures; `patient` searches as long as `layercard select`."""
        entry = self.card(uploaded, key)
        if entry is None:
            problem = "open a card, or make one on the tab Profile"
            return Choice(None, problem), views.note(problem), "", None, None
        started, asked = time.perf_counter(), files.wishes(*controls[:-2])
        choice = files.choose(card_of(entry), asked, PATIENT if patient else files.SECONDS)
        tiles = views.tiles(choice, time.perf_counter() - started)
        downloads = views.take_away(choice, files.command_line(asked, entry.place))
        return choice, tiles, downloads, *self._figures(entry, choice, None, controls)

    def by_hand(self, uploaded: Sequence[Entry], key: str | None, choice: Choice, layers: Sequence[str], *controls: Any) -> tuple[Any, ...]:
        """What changes with picked layers against the chosen ones, the downloads of their placement, and figures."""
        entry = self.card(uploaded, key)
        if entry is None:
            return views.note("open a card first"), "", None, None
        hand = files.by_hand(card_of(entry), layers)
        if hand.placement is None:
            words = views.note("pick layers, or start from a placement")
        elif choice.placement is None:
            words = views.tiles(hand)
        else:
            words = views.change_table(files.changes(choice.placement, hand.placement))
        return words, views.take_away(hand), *self._figures(entry, choice, hand, controls)

    def _figures(self, entry: Entry, choice: Choice, hand: Choice | None, controls: Sequence[Any]) -> tuple[views.Figure, views.Figure]:
        """The front with the choice on it, and a measure over depth with the layers marked; what does not move is drawn once."""
        *sliders, measure, front = controls
        value = self._fronts.get(entry.digest)
        name = front if front in views.FRONTS else views.FRONTS[0]
        names = [key for _, key in self.measures(entry)]
        shown = measure if measure in names else names[0]
        of_front = _once(self._drawn, (entry.digest, name, str(value is not None)), MOST_DRAWN, lambda: views.front(value, name))
        over_depth = _once(self._drawn, (entry.digest, "depth", shown), MOST_DRAWN, lambda: views.depth(card_of(entry), shown))
        layers = (hand or choice).layers
        return views.with_choice(of_front, name, choice, hand, files.wishes(*sliders)), views.with_layers(over_depth, layers)

    def front(self, entry: Entry, progress: Callable[[str, int, int], None] | None = None) -> Front:
        """The front of a card, made once; two who ask at once wait for one search."""
        with self._making:
            return _once(self._fronts, entry.digest, MOST_FRONTS, lambda: pareto(card_of(entry), progress=progress))

    def measures(self, entry: Entry) -> list[tuple[str, str]]:
        """The measures that a card has: title and name."""
        return [(measure.title, measure.key) for measure in measured(card_of(entry))]

    def start_from(self, uploaded: Sequence[Entry], key: str | None, choice: Choice, button: str) -> list[str]:
        """The layers to start picking from: those chosen, none, or a plain placement of as many, as the last word of a button says."""
        entry, name = self.card(uploaded, key), button.rpartition(" ")[2]
        layers: Sequence[int] = choice.layers if name == "chosen" else ()
        if entry is not None and name in PLAIN:
            layers = strategy_layers(name, card_of(entry).model.layers, len(choice.layers) or 1)
        return [] if entry is None else [str(layer) for layer in layers]

    def compare(self, uploaded: Sequence[Entry], first: str | None, second: str | None, k: float) -> str:
        """Whether the card of one data set serves another."""
        try:
            pair = [(entry.name, card_of(entry)) for key in (first, second) if (entry := self.card(uploaded, key))]
            if len(pair) < 2:
                raise CardError("this card is not in the list any more; choose another")
            if first == second:
                return views.note("choose two different cards of one model, on different data")
            depth = min(card.model.layers for _, card in pair)
            return views.verdict(transfer(pair, k=min(max(1, int(k)), depth)))
        except LayercardError as error:
            return views.note(str(error), "bad")

    def saves(
        self, uploaded: Sequence[Entry], key: str | None, choice: Choice, currency: str, *figures: float | str | None
    ) -> tuple[str, str]:
        """What a placement saves with the reader's figures: the headline and all of it."""
        entry = self.card(uploaded, key)
        if entry is None or not choice.layers:
            return views.note("choose a placement on the tab Select first"), ""
        try:
            return views.savings(files.saved(figures, currency or "USD", choice.layers, entry, self.entries(uploaded)))
        except LayercardError as error:
            return views.note(str(error), "bad"), ""

    def start(self, model: str | None, data: str | None, records: float) -> str:
        """Start to profile a model of the given folders; what is wrong is said in the same place."""
        try:
            models, sources = self.library.models(), {SYNTHETIC: SYNTHETIC, **self.library.data()}
            if model not in models:
                raise OutputError("choose a model of the list; models are folders with config.json and safetensors, or .gguf files")
            if data not in sources:
                raise OutputError("choose data of the list; data are .jsonl, .csv, .tsv or .parquet files")
            return views.job(self.jobs.start(models[model], str(sources[data]), max(4, int(records))).progress)
        except LayercardError as error:
            return views.note(str(error), "bad")

    def job(self) -> str:
        """How far the profile is."""
        return views.job(self.jobs.job.progress if self.jobs.job else None)

    def cancel(self) -> str:
        """End the running profile."""
        self.jobs.cancel()
        return self.job()


def _once(made: dict[Any, Value], key: Any, most: int, make: Callable[[], Value]) -> Value:
    """What is kept under a key, made where it is not there; the oldest of more than `most` go."""
    if key not in made:
        while len(made) >= most:
            made.pop(next(iter(made)), None)
        made[key] = make()
    return made[key]


def card_of(entry: Entry) -> LayerCard:
    """The card of an entry that is one."""
    assert entry.card is not None
    return entry.card
