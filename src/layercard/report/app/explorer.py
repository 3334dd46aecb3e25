"""What the page asks for and gets, as plain values: HTML, figures and lists. `pages` hangs these functions onto widgets.

They take what the page's widgets hold: the files that the visitor uploaded, the key of the open card, what the sliders came to
(`choice`), what is picked (`picked`: that, or layers by hand), and the sliders in the order in which `wishes` takes them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layercard.errors import CardError, LayercardError, OutputError
from layercard.files import json_text
from layercard.report.app import library as files, views
from layercard.report.app.jobs import Job, start
from layercard.report.app.library import Choice, Entry, Library
from layercard.report.words import measured
from layercard.selection.pareto import Front, pareto
from layercard.selection.solver import SECONDS as PATIENT
from layercard.selection.strategies import strategy_layers
from layercard.selection.transfer import transfer

MOST_UPLOADS = 20
"""Files that one visitor may upload."""
MOST_FRONTS = 16
"""Fronts that are kept."""
SYNTHETIC = "synthetic"
"""The data set that layercard's own generator writes."""
HELD_OUT = "synthetic:valid"
"""Its held-out part."""
NONE = "none"
SLIDERS = "the sliders"
PLAIN = ("last", "middle", "uniform", "first", "all")
"""Plain placements to start from when picking layers."""


class Explorer:
    """The app without a page. Uploads are read from `folder` alone, where the server puts them; half cards lie there too."""

    def __init__(self, library: Library, folder: Path | None = None) -> None:
        self.library, self.folder = library, folder
        self.job: Job | None = None  # what runs or ran last; one at a time
        self._starting, self._making = threading.Lock(), threading.Lock()
        self._fronts: dict[str, Front] = {}  # by the digest of the card

    # ---- files

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
        others.sort(key=lambda other: other.value["model"]["fingerprint"] != entry.value["model"]["fingerprint"])
        return others[0].key if others else None

    def upload(self, uploaded: Sequence[Entry], paths: Sequence[str]) -> tuple[list[Entry], list[str]]:
        """The uploads with the new ones among them, and for each file that was refused why."""
        entries, refused = list(uploaded), []
        for path in map(Path, paths):
            try:
                if self.folder is None or not files.inside(path, self.folder.resolve()):
                    raise OutputError(f"{path.name} was not uploaded here")
                if len(entries) >= MOST_UPLOADS:
                    raise OutputError(f"{path.name} was left out: up to {MOST_UPLOADS} files; put more into a folder given with --cards")
                entry = files.read_entry(f"upload:{len(entries)}", f"{path.name} (uploaded)", path.read_bytes(), path.name)
                if entry is None:
                    raise OutputError(f"{path.name} is not a file of layercard; upload a card, a placement, a run record or a comparison")
                entries.append(entry)
                refused += [entry.problem] if entry.problem else []
            except (LayercardError, OSError) as error:
                refused.append(str(error) if isinstance(error, LayercardError) else f"{path.name} cannot be read")
        return entries, refused

    def roadmap(self, uploaded: Sequence[Entry], key: str | None) -> str:
        """Where the model of a card stands; the start of the way without one."""
        return views.roadmap(self.entries(uploaded), self.card(uploaded, key))

    def card_tab(self, uploaded: Sequence[Entry], key: str | None, picked: Choice, measure: str | None) -> tuple[Any, ...]:
        """The open card itself: what it is of, the picture of all measures, one measure over depth, coupling, and the table."""
        entry = self.card(uploaded, key)
        if entry is None or entry.card is None:
            return views.note("no card is open; make one on the tab Run, or upload one"), None, None, None, ""
        names, layers = [name for _, name in self.measures(entry)], picked.layers
        over_depth = views.depth(entry.card, measure if measure in names else names[0], layers)
        pictures = (views.heat_map(entry.card, layers), over_depth, views.coupling(entry.card, layers))
        return views.card(entry), *pictures, views.card_table(entry.card, layers)

    # ---- placements

    def explore(self, uploaded: Sequence[Entry], key: str | None, *controls: Any, patient: bool = False) -> tuple[Any, ...]:
        """The `Choice` for what the sliders say, its tiles, downloads and layers; `patient` searches as long as `layercard select`."""
        entry = self.card(uploaded, key)
        if entry is None or entry.card is None:
            problem = "open a card, or make one on the tab Run"
            return Choice(None, problem), views.note(problem), "", []
        started, asked = time.perf_counter(), files.wishes(*controls)
        choice = files.choose(entry.card, asked, PATIENT if patient else files.SECONDS)
        tiles = views.tiles(choice, time.perf_counter() - started)
        return choice, tiles, views.take_away(choice, files.command_line(asked, entry.place)), list(map(str, choice.layers))

    def by_hand(self, uploaded: Sequence[Entry], key: str | None, choice: Choice, layers: Sequence[str]) -> tuple[Any, ...]:
        """The `Choice` of picked layers, what changes with it against that of the sliders, and its downloads."""
        entry = self.card(uploaded, key)
        if entry is None or entry.card is None:
            return Choice(None), views.note("open a card first"), ""
        hand = files.by_hand(entry.card, layers)
        if hand.placement is None:
            return hand, views.note("pick at least one layer"), ""
        words = views.tiles(hand)
        if choice.placement is not None and choice.layers != hand.layers:
            words += views.change_table(files.changes(choice.placement, hand.placement))
        return hand, words, views.take_away(hand)

    def figures(
        self, uploaded: Sequence[Entry], key: str | None, choice: Choice, picked: Choice, cost: str, *controls: Any
    ) -> tuple[Any, Any]:
        """The front with the choice on it, and the gain estimate over depth with the layers marked."""
        entry = self.card(uploaded, key)
        if entry is None or entry.card is None:
            return None, None
        hand = picked if picked.layers != choice.layers else None
        over_depth = views.depth(entry.card, self.measures(entry)[0][1], picked.layers)
        return views.front(self._fronts.get(entry.digest), cost, choice, hand, files.wishes(*controls)), over_depth

    def front(self, entry: Entry, progress: Callable[[str, int, int], None] | None = None) -> Front:
        """The front of a card, made once; two who ask at once wait for one search."""
        with self._making:
            if entry.digest not in self._fronts and entry.card is not None:
                while len(self._fronts) >= MOST_FRONTS:
                    self._fronts.pop(next(iter(self._fronts)))
                self._fronts[entry.digest] = pareto(entry.card, progress=progress)
            return self._fronts[entry.digest]

    def measures(self, entry: Entry) -> list[tuple[str, str]]:
        """The measures that a card has: title and name."""
        return [(measure.title, measure.key) for measure in measured(entry.card)] if entry.card else []

    def start_from(self, uploaded: Sequence[Entry], key: str | None, choice: Choice, name: str | None) -> list[str]:
        """The layers to start picking from: those of the sliders, none, or a plain placement of as many."""
        entry = self.card(uploaded, key)
        layers: Sequence[int] = choice.layers if name == SLIDERS else ()
        if entry is not None and name in PLAIN:
            layers = strategy_layers(str(name), int(entry.value["model"]["layers"]), len(choice.layers) or 1)
        return [] if entry is None else [str(layer) for layer in layers]

    # ---- comparisons, savings

    def compare(self, uploaded: Sequence[Entry], first: str | None, second: str | None, k: float) -> str:
        """Whether the card of one data set serves another."""
        try:
            found = [self.card(uploaded, key) for key in (first, second)]
            pair = [(entry.name, entry.card) for entry in found if entry is not None and entry.card is not None]
            if len(pair) < 2:
                raise CardError("this card is not in the list any more; choose another")
            if first == second:
                return views.note("choose two different cards of one model, on different data")
            depth = min(card.model.layers for _, card in pair)
            return views.verdict(transfer(pair, k=min(max(1, int(k)), depth)))
        except LayercardError as error:
            return views.note(str(error), "bad")

    def saves(
        self, uploaded: Sequence[Entry], key: str | None, picked: Choice, currency: str, *figures: float | str | None
    ) -> tuple[str, str]:
        """What a placement saves with the reader's figures: the headline and all of it; nothing where a figure is wrong."""
        entry = self.card(uploaded, key)
        if entry is None or picked.placement is None:
            return views.note("choose layers on the tab Choose first"), ""
        try:
            return views.savings(files.saved(figures, currency or "USD", picked.placement, entry, self.entries(uploaded)))
        except LayercardError as error:
            return views.note(str(error), "bad"), ""

    # ---- jobs

    def start(self, kind: str, model: str | None, data: str | None, valid: str | None, records: float, picked: Choice) -> str:
        """Start a job on a model and data of the given folders; what is wrong is said in the same place."""
        try:
            models, sources = self.library.models(), {SYNTHETIC: SYNTHETIC, **self.library.data()}
            if model not in models:
                raise OutputError("choose a model of the list; models are folders with config.json and safetensors, or .gguf files")
            if data not in sources or valid not in {NONE: "", HELD_OUT: HELD_OUT, **sources}:
                raise OutputError("choose data of the list; data are .jsonl, .csv, .tsv or .parquet files")
            if kind == "train" and picked.placement is None:
                raise OutputError("choose layers on the tab Choose first")
            placement = json_text(picked.placement.to_json()) if kind == "train" and picked.placement else ""
            held_out = "" if valid == NONE else HELD_OUT if valid == HELD_OUT else str(sources[str(valid)])
            with self._starting:
                if self.job is not None and self.job.running:
                    raise OutputError("something is running already; wait for it or cancel it")
                given: dict[str, Any] = {"valid": held_out, "placement": placement}
                self.job = start(kind, models[model], str(sources[data]), int(records), self.library.folders[0], self.folder, **given)
            return self.progress()
        except LayercardError as error:
            return views.note(str(error), "bad")

    def progress(self) -> str:
        """How far the job is, or what it gave."""
        try:
            return views.job(self.job.progress, self.job.kind) if self.job else views.job(None)
        except LayercardError as error:
            return views.note(str(error), "bad")

    def cancel(self) -> str:
        """End the running job."""
        if self.job is not None:
            self.job.cancel()
        return self.progress()

    def close(self) -> None:
        """End the running job, and wait until it has."""
        if self.job is not None and self.job.running:
            self.job.cancel()
            self.job.wait(10)
