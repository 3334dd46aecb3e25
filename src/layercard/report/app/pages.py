"""The page: widgets, and which function of `Explorer` each of them calls."""

from typing import Any

import gradio as gr

from layercard.report.app import views
from layercard.report.app.explorer import HELD_OUT, NONE, PLAIN, SLIDERS, SYNTHETIC, Explorer
from layercard.report.app.library import COSTS, Choice, Entry, shown
from layercard.report.plots import COSTS as AXES
from layercard.report.roi import FIGURES, GROUPS, MEASURED_FIGURES

OBJECTIVES = [
    ("Cheapest that keeps the performance", "balanced"),
    ("Best performance within the limits", "performance"),
    ("Cheapest of all", "cost"),
]
JOBS = [
    ("Train the layers of the tab Choose", "train"),
    ("Choose by short trainings, then train", "run"),
    ("Make a card", "profile"),
]
FIRST_DEPTH = 64
CURRENCIES = ["USD", "EUR", "GBP", "JPY", "CHF", "INR", "CNY"]
_ONCE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_FAST: dict[str, Any] = {**_ONCE, "trigger_mode": "always_last"}


class Page:
    """The page of an explorer; `blocks` is what the server serves."""

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        with gr.Blocks(title="layercard", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            self._uploaded = gr.State([])
            self._choice, self._picked = (gr.State(Choice(None, "no card is open")) for _ in range(2))
            gr.HTML("<h1 style='margin:0'>layercard</h1>")
            small: dict[str, Any] = {"size": "sm", "scale": 1, "min_width": 150}
            with gr.Row():
                self._card = gr.Dropdown([], label="Open card", scale=4, min_width=240, elem_id="card")
                again = gr.Button("Read the folder again", **small)
                file = gr.UploadButton("Upload .json files", file_count="multiple", file_types=[".json"], elem_id="upload", **small)
            message = gr.HTML(visible=False)
            with gr.Tabs():
                for title, fill in (
                    ("Card", self._card_tab),
                    ("Choose", self._choose_tab),
                    ("Compare", self._compare_tab),
                    ("Run", self._run_tab),
                    ("Savings", self._savings_tab),
                ):
                    with gr.Tab(title, id=title.lower()):
                        fill()
            self._wire(again, file, message)

    # ---- widgets

    def _card_tab(self) -> None:
        lead = gr.HTML(elem_id="about")
        gr.HTML("<h2>Every measure of every layer</h2><p>Each row from its lowest value (dark) to its highest (bright); ★ chosen.</p>")
        heat = gr.Plot(show_label=False, elem_id="heat")
        self._measure = gr.Dropdown([], label="One measure over depth", elem_id="measure")
        depth = gr.Plot(show_label=False)
        gr.HTML("<h2>Which layers do the same work</h2>")
        coupling = gr.Plot(show_label=False, elem_id="coupling")
        with gr.Accordion("The numbers, as a table", open=False):
            table = gr.HTML(elem_id="table")
        with gr.Accordion("Where this model stands", open=False):
            self._roadmap = gr.HTML(elem_id="roadmap")
        with gr.Accordion("All files that were found", open=False):
            self._files = gr.HTML(elem_id="files")
        self._about = [lead, heat, depth, coupling, table]

    def _choose_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                objective = gr.Radio(OBJECTIVES, value="balanced", label="What for")
                self._k = gr.Slider(0, FIRST_DEPTH, 0, step=1, label="Number of layers (0: as many as are best)", elem_id="k")
                kept = gr.Slider(0, 100, 95, step=1, label="Performance kept at least, % (0: no matter)", elem_id="kept")
                limits = [
                    gr.Slider(1, 100, 100, step=1, label=f"{title} at most, % of all layers", elem_id=budget.removeprefix("max_"))
                    for title, (_, _, budget) in COSTS.items()
                ]
            with gr.Column(scale=3, min_width=300):
                tiles = gr.HTML(elem_id="tiles")
                self._layers = gr.CheckboxGroup([], label="Layers, 0 at the input: tick to change them by hand", elem_id="layers")
                self._from = gr.Dropdown([SLIDERS, *PLAIN, "none"], value=SLIDERS, label="Start again from", elem_id="from")
                downloads = gr.HTML(elem_id="take-away")
        self._cost = gr.Radio([(title, name) for name, (_, title) in AXES.items()], value="time", label="Performance kept against")
        front = gr.Plot(show_label=False, elem_id="front")
        gr.HTML("<h2>Gain estimate over depth</h2>")
        depth = gr.Plot(show_label=False, elem_id="depth")
        self._sliders: list[Any] = [objective, self._k, kept, *limits]  # as `wishes` takes them
        self._found, self._drawn = [tiles, downloads], [front, depth]

    def _compare_tab(self) -> None:
        gr.HTML(views.note("Two cards of one model on different data: may the layers of one be used for the other?"))
        with gr.Row():
            self._first = gr.Dropdown([], label="Card", min_width=240, elem_id="first")
            self._second = gr.Dropdown([], label="Other card", min_width=240, elem_id="second")
            self._best = gr.Slider(1, 16, 5, step=1, label="How many layers are chosen", min_width=200)
        ask, verdict = gr.Button("Compare", variant="primary", elem_id="compare"), gr.HTML(elem_id="verdict")
        pair = [self._uploaded, self._first, self._second, self._best]
        ask.click(self._explorer.compare, pair, [verdict], api_visibility="private")

    def _run_tab(self) -> None:
        library = self._explorer.library
        folders = ", ".join(str(folder) for folder in library.model_folders)
        gr.HTML(views.note(f"Models and data are those in {folders}; what comes out goes to {library.folders[0]}."))
        self._kind = gr.Radio(JOBS, value="train", label="What to do", elem_id="kind")
        with gr.Row():
            self._model = gr.Dropdown([], label="Model", min_width=240, elem_id="model")
            self._data = gr.Dropdown([SYNTHETIC], value=SYNTHETIC, label="Data", min_width=240, elem_id="data")
            self._valid = gr.Dropdown(
                [NONE, HELD_OUT], value=HELD_OUT, label="Held-out data, to measure on", min_width=240, elem_id="valid"
            )
            self._records = gr.Slider(8, 2048, 64, step=8, label="Records", min_width=200, elem_id="records")
        with gr.Row():
            self._start = gr.Button("Start", variant="primary", elem_id="start")
            self._stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="stop")
        self._job, self._clock = gr.HTML(views.job(None), elem_id="job"), gr.Timer(0.7, active=False)

    def _savings_tab(self) -> None:
        words = "Against adapters in all layers, for the layers of the tab Choose. Fields start with examples; give your own."
        gr.HTML(views.note(words))
        headline = gr.HTML(elem_id="headline")
        self._figures: list[Any] = []
        with gr.Row():
            for title, names in GROUPS.items():
                with gr.Column(min_width=260):
                    gr.HTML(f"<h2>{title}</h2>")
                    for name in names:
                        extra: Any = FIGURES[name].json_schema_extra
                        default, unit = FIGURES[name].default, str(extra["unit"])
                        empty = "" if default is not None else "empty: as measured" if name in MEASURED_FIGURES else "empty: none"
                        label = ", ".join(filter(None, (FIGURES[name].title, unit, empty)))
                        # As text, since a number field reads 4,5 as 45 without a word.
                        self._figures.append(gr.Textbox(shown(default), label=label, max_lines=1, elem_id=f"roi-{name}"))
        self._currency = gr.Dropdown(CURRENCIES, value="USD", label="Currency")
        self._saved = [headline, gr.HTML(elem_id="saved")]

    # ---- events

    def _wire(self, again: gr.Button, file: gr.UploadButton, message: gr.HTML) -> None:
        explorer, opened_card = self._explorer, [self._uploaded, self._card]
        lists = [self._card, self._first, self._second, self._model, self._data, self._valid, self._files]
        opened = [self._roadmap, self._k, self._measure, self._layers, self._best, self._first, self._second]
        found = [self._choice, *self._found, self._layers]
        explore = (explorer.explore, [*opened_card, *self._sliders], found)
        settle = (self._settled, [*opened_card, *self._sliders, self._choice], found)
        take = (lambda choice: choice, self._choice, self._picked)
        draw = (explorer.figures, [*opened_card, self._choice, self._picked, self._cost, *self._sliders], self._drawn)
        show = (explorer.card_tab, [*opened_card, self._picked, self._measure], self._about)
        by_hand = (explorer.by_hand, [*opened_card, self._choice, self._layers], [self._picked, *self._found])
        save = (explorer.saves, [*opened_card, self._picked, self._currency, *self._figures], self._saved)

        # After the list of files is new: what depends on the card, then what takes a little longer.
        uploaded = file.upload(self._take_upload, [self._uploaded, file], [self._uploaded, message, self._card], **_ONCE)
        for event in (
            self.blocks.load(self._listed, opened_card, lists, **_ONCE),
            again.click(self._listed, opened_card, lists, **_ONCE),
            uploaded.then(self._listed, opened_card, lists, **_ONCE),
            self._card.input(lambda: None, api_visibility="private"),
        ):
            ready = event.then(self._opened, opened_card, opened, **_ONCE).then(*explore, **_ONCE).then(*take, **_ONCE)
            front = ready.then(*show, **_ONCE).then(*save, **_ONCE).then(self._made_front, opened_card, None, **_ONCE)
            front.then(*draw, **_ONCE).then(*settle, **_ONCE)
        for slider in self._sliders:
            moved = slider.input(*explore, **_FAST).then(*take, **_ONCE).then(*draw, **_ONCE)
            moved.then(*settle, **_ONCE).then(*take, **_ONCE).then(*save, **_ONCE)
        restarted = self._from.input(explorer.start_from, [*opened_card, self._choice, self._from], [self._layers], **_ONCE)
        for changed in (self._layers.input(*by_hand, **_FAST), restarted.then(*by_hand, **_ONCE)):
            changed.then(*draw, **_ONCE).then(*save, **_ONCE)
        self._cost.input(*draw, **_ONCE)
        self._measure.input(*show, **_ONCE)
        for figure in [*self._figures, self._currency]:
            figure.change(*save, **_FAST)

        tick = (self._ticked, None, [self._job, self._clock, self._start, self._stop])
        asked = [self._kind, self._model, self._data, self._valid, self._records, self._picked]
        self._start.click(explorer.start, asked, [self._job], **_ONCE).then(*tick, **_ONCE)
        self._stop.click(explorer.cancel, None, [self._job], **_ONCE).then(*tick, **_ONCE)
        self._clock.tick(*tick, **_ONCE).then(self._ended, opened_card, lists, **_ONCE)
        self.blocks.load(*tick, **_ONCE)

    def _listed(self, uploaded: list[Entry], key: str | None) -> tuple[Any, ...]:
        """All lists, as the folders are now."""
        cards, library = self._explorer.cards(uploaded), self._explorer.library
        keys, models, data = [each for _, each in cards], list(library.models()), list(library.data())
        label = "Model" if models else "Model (there is none in the folders)"
        return (
            gr.update(choices=cards, value=key if key in keys else next(iter(keys), None)),
            gr.update(choices=cards),
            gr.update(choices=cards),
            gr.update(choices=models, value=models[0] if models else None, label=label),
            gr.update(choices=[SYNTHETIC, *data]),
            gr.update(choices=[NONE, HELD_OUT, *data]),
            views.files(self._explorer.entries(uploaded)),
        )

    def _opened(self, uploaded: list[Entry], key: str | None) -> tuple[Any, ...]:
        """What a new card changes: the road, the number of layers, the measures, the layers to pick."""
        road, entry = self._explorer.roadmap(uploaded, key), self._explorer.card(uploaded, key)
        if entry is None or entry.card is None:
            return road, gr.skip(), gr.update(choices=[], value=None), gr.update(choices=[], value=[]), gr.skip(), gr.skip(), gr.skip()
        depth, measures = entry.card.model.layers, self._explorer.measures(entry)
        return (
            road,
            gr.update(maximum=depth, value=0),
            gr.update(choices=measures, value=measures[0][1]),
            gr.update(choices=[str(layer) for layer in range(depth)], value=[]),
            gr.update(maximum=depth, value=min(5, depth)),
            key,
            self._explorer.sibling(uploaded, entry),
        )

    def _settled(self, uploaded: list[Entry], key: str | None, *controls: Any) -> tuple[Any, ...]:
        """A longer search where the quick one was not proven best; else nothing changes."""
        *sliders, choice = controls
        if choice.placement is None or choice.placement.predicted["solver"]["status"] == "optimal":
            return (gr.skip(),) * 4
        return self._explorer.explore(uploaded, key, *sliders, patient=True)

    def _made_front(self, uploaded: list[Entry], key: str | None) -> None:
        """Make the front of the card, once; the next step draws it."""
        entry = self._explorer.card(uploaded, key)
        if entry is not None:
            self._explorer.front(entry)

    def _take_upload(self, uploaded: list[Entry], paths: list[str] | None) -> tuple[Any, ...]:
        """Take files in, and say which were refused and why; the first new card is opened."""
        entries, refused = self._explorer.upload(uploaded, paths or [])
        new = [entry for entry in entries[len(uploaded) :] if entry.card is not None]
        words = "; ".join(refused) if refused else f"{len(entries) - len(uploaded)} file(s) taken in"
        message = gr.update(value=views.note(words, "bad" if refused else "good"), visible=True)
        return entries, message, gr.update(choices=self._explorer.cards(entries), value=new[0].key) if new else gr.skip()

    @property
    def _running(self) -> bool:
        return self._explorer.job is not None and self._explorer.job.running

    def _ticked(self) -> tuple[Any, ...]:
        """How far the job is; the clock stops with it."""
        running = self._running
        return self._explorer.progress(), gr.update(active=running), gr.update(interactive=not running), gr.update(interactive=running)

    def _ended(self, uploaded: list[Entry], key: str | None) -> tuple[Any, ...]:
        """The lists anew when a job has ended."""
        return (gr.skip(),) * 7 if self._running else self._listed(uploaded, key)
