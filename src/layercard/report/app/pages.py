"""The page: widgets, and which function of `Explorer` each of them calls."""

import json
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData
from plotly.utils import PlotlyJSONEncoder

from layercard.errors import LayercardError
from layercard.report.app import views
from layercard.report.app.explorer import PLAIN, SYNTHETIC, Explorer
from layercard.report.app.library import COSTS, EXAMPLES, FIGURES, Choice, Entry, wishes
from layercard.report.figures import COSTS as AXES

OBJECTIVES = [
    ("Cheapest that keeps the performance", "balanced"),
    ("Best performance within the budgets", "performance"),
    ("Cheapest of all", "cost"),
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
            self._choice = gr.State(Choice(None, "no card is open"))
            gr.HTML("<h1 style='margin:0'>layercard</h1>")
            with gr.Row():
                self._card = gr.Dropdown([], label="Card", scale=4, min_width=240, elem_id="card")
                self._again = gr.Button("Read the folder again", size="sm", scale=1, min_width=160)
                self._file = gr.UploadButton(
                    "Upload .json files", size="sm", file_count="multiple", scale=1, min_width=160, elem_id="upload"
                )
            self._message = gr.HTML(visible=False)
            with gr.Tabs():
                with gr.Tab("Roadmap", id="roadmap"):
                    self._roadmap = gr.HTML(views.roadmap([], None))
                with gr.Tab("Select", id="select"):
                    self._select_tab()
                with gr.Tab("By hand", id="hand"):
                    self._hand_tab()
                with gr.Tab("Compare cards", id="compare"):
                    self._compare_tab()
                with gr.Tab("Savings", id="savings"):
                    self._savings_tab()
                with gr.Tab("Profile", id="profile"):
                    self._profile_tab()
                with gr.Tab("Files", id="files"):
                    self._files = gr.HTML()
            self._wire()

    # ---- widgets

    def _select_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                objective = gr.Radio(OBJECTIVES, value="balanced", label="What for")
                self._k = gr.Slider(0, FIRST_DEPTH, 0, step=1, label="Number of layers (0: as many as are best)", elem_id="k")
                kept = gr.Slider(0, 100, 95, step=1, label="Performance kept at least, % (0: no matter)", elem_id="kept")
                limits = [
                    gr.Slider(1, 100, 100, step=1, label=f"{title} at most, % of all layers", elem_id=budget.removeprefix("max_"))
                    for title, (_, _, budget) in COSTS.items()
                ]
            self._controls = [objective, self._k, kept, *limits]  # in the order in which `wishes` takes them
            with gr.Column(scale=3, min_width=300):
                self._tiles = gr.HTML(elem_id="tiles")
                self._take = gr.HTML(elem_id="take-away")
        fronts = [(AXES[name][1], name) for name in views.FRONTS]
        self._which = gr.Radio(fronts, value=views.FRONTS[0], label="Performance kept against")
        self._front = gr.Plot(show_label=False, elem_id="front")
        self._measure = gr.Dropdown([], label="Over depth", elem_id="measure")
        self._depth = gr.Plot(show_label=False, elem_id="depth")

    def _hand_tab(self) -> None:
        gr.HTML(views.note("Pick layers and see what changes against the placement on the tab Select. Layer 0 is at the input."))
        with gr.Row():
            self._starts = [gr.Button(f"Start from {name}", size="sm", min_width=110) for name in ("chosen", *PLAIN, "none")]
        self._layers = gr.CheckboxGroup([], label="Layers", elem_id="layers")
        self._hand = [gr.HTML(elem_id="changes"), gr.HTML(), gr.Plot(show_label=False), gr.Plot(show_label=False)]

    def _compare_tab(self) -> None:
        gr.HTML(views.note("Two cards of one model on different data: may the layers of one be used for the other?"))
        with gr.Row():
            self._first = gr.Dropdown([], label="Card", min_width=240)
            self._second = gr.Dropdown([], label="Other card", min_width=240)
            self._best = gr.Slider(1, 16, 5, step=1, label="Layers of a placement", min_width=200)
        self._ask = gr.Button("Compare", variant="primary")
        self._verdict = gr.HTML(elem_id="verdict")

    def _savings_tab(self) -> None:
        words = "Against adapters in all layers, for the placement on the tab Select. Fields start with examples; give your own."
        gr.HTML(views.note(words))
        headline = gr.HTML(elem_id="headline")
        self._figures: list[Any] = []
        with gr.Row():
            for title, fields in FIGURES.items():
                with gr.Column(min_width=260):
                    gr.HTML(f"<h3 style='margin:0'>{title}</h3>")
                    for name, label in fields.items():
                        # A number cannot be empty, so a figure that may be is typed as text.
                        typed: Any = {"label": label, "elem_id": f"roi-{name}"}
                        empty = EXAMPLES[name] is None
                        self._figures.append(gr.Textbox(max_length=20, **typed) if empty else gr.Number(EXAMPLES[name], **typed))
                    if title == list(FIGURES)[-1]:
                        self._currency = gr.Dropdown(CURRENCIES, value="USD", label="Currency")
        self._saved = [headline, gr.HTML(elem_id="saved")]

    def _profile_tab(self) -> None:
        library = self._explorer.library
        folders = ", ".join(str(folder) for folder in library.model_folders)
        gr.HTML(views.note(f"Models and data are those in {folders}; the card goes to {library.folders[0]}."))
        with gr.Row():
            self._model = gr.Dropdown([], label="Model", min_width=240, elem_id="model")
            self._data = gr.Dropdown([SYNTHETIC], value=SYNTHETIC, label="Data", min_width=240, elem_id="data")
            self._records = gr.Slider(8, 512, 64, step=8, label="Records", min_width=200)
        with gr.Row():
            self._start = gr.Button("Start", variant="primary", elem_id="start")
            self._stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="stop")
        self._job = gr.HTML(views.job(None), elem_id="job")
        self._clock = gr.Timer(0.7, active=False)

    # ---- events

    def _wire(self) -> None:
        opened_card = [self._uploaded, self._card]
        shown: list[Any] = [*self._controls, self._measure, self._which]
        lists = [self._card, self._first, self._second, self._model, self._data, self._files]
        opened = [self._roadmap, self._k, self._measure, self._layers, self._best, self._first, self._second]
        explored = [self._choice, self._tiles, self._take, self._front, self._depth]
        asked = [*opened_card, *shown]
        by_hand = [*opened_card, self._choice, self._layers, *shown]
        saving = [*opened_card, self._choice, self._currency, *self._figures]

        def refresh_all(event: Any) -> Any:
            """After the list of files is new: what depends on the card, then what takes a little longer."""
            return (
                event.then(self._opened, opened_card, opened, **_ONCE)
                .then(self._explored, asked, explored, **_ONCE)
                .then(self._saves, saving, self._saved, **_ONCE)
                .then(self._made_front, opened_card, [self._front], show_progress="minimal", api_visibility="private")
                .then(self._explored, asked, explored, **_ONCE)
                .then(self._settled, [*asked, self._choice], explored, **_ONCE)
                .then(self._handed, by_hand, self._hand, **_ONCE)
            )

        refresh_all(self.blocks.load(self._listed, opened_card, lists, **_ONCE))
        refresh_all(self._again.click(self._listed, opened_card, lists, **_ONCE))
        uploaded = self._file.upload(self._take_upload, [self._uploaded, self._file], [self._uploaded, self._message, self._card], **_ONCE)
        refresh_all(uploaded.then(self._listed, opened_card, lists, **_ONCE))
        refresh_all(self._card.input(lambda: None, api_visibility="private"))

        for widget in shown:
            (
                widget.input(self._explored, asked, explored, **_FAST)
                .then(self._settled, [*asked, self._choice], explored, **_ONCE)
                .then(self._handed, by_hand, self._hand, **_ONCE)
                .then(self._saves, saving, self._saved, **_ONCE)
            )
        self._layers.change(self._handed, by_hand, self._hand, **_FAST)
        for button in self._starts:
            button.click(self._started_from, [*opened_card, self._choice, button], [self._layers], **_ONCE)
        compared = [self._uploaded, self._first, self._second, self._best]
        self._ask.click(self._explorer.compare, compared, [self._verdict], api_visibility="private")
        for figure in [*self._figures, self._currency]:
            figure.change(self._saves, saving, self._saved, **_FAST)

        ticking = [self._job, self._clock, self._start, self._stop]
        started = self._start.click(self._explorer.start, [self._model, self._data, self._records], [self._job], **_ONCE)
        started.then(self._ticked, None, ticking, **_ONCE)
        self._stop.click(self._explorer.cancel, None, [self._job], **_ONCE).then(self._ticked, None, ticking, **_ONCE)
        self._clock.tick(self._ticked, None, ticking, **_ONCE).then(self._ended, opened_card, lists, **_ONCE)
        self.blocks.load(self._ticked, None, ticking, **_ONCE)

    def _entry(self, uploaded: list[Entry], key: str | None) -> Entry | None:
        """The open card; `None` where there is none any more."""
        try:
            return self._explorer.card(uploaded, key)
        except LayercardError:
            return None

    def _listed(self, uploaded: list[Entry], key: str | None) -> tuple[Any, ...]:
        """All lists, as the folders are now."""
        cards = self._explorer.cards(uploaded)
        keys = [each for _, each in cards]
        models, data = list(self._explorer.library.models()), list(self._explorer.library.data())
        label = "Model" if models else "Model (there is none in the folders)"
        return (
            gr.update(choices=cards, value=key if key in keys else next(iter(keys), None)),
            gr.update(choices=cards),
            gr.update(choices=cards),
            gr.update(choices=models, value=models[0] if models else None, label=label),
            gr.update(choices=[SYNTHETIC, *data]),
            views.files(self._explorer.entries(uploaded)),
        )

    def _opened(self, uploaded: list[Entry], key: str | None) -> tuple[Any, ...]:
        """What a new card changes: the road, the number of layers, the measures, the layers to pick."""
        road = self._explorer.roadmap(uploaded, key)
        entry = self._entry(uploaded, key)
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

    def _explored(self, uploaded: list[Entry], key: str | None, *controls: Any, patient: bool = False) -> tuple[Any, ...]:
        """The placement, its tiles and downloads, and both figures."""
        entry = self._entry(uploaded, key)
        if entry is None:
            problem = "open a card, or make one on the tab Profile"
            return Choice(None, problem), views.note(problem), "", None, None
        *sliders, measure, which = controls
        asked = wishes(*sliders)
        choice, tiles, take_away = self._explorer.explore(entry, asked, patient=patient)
        return choice, tiles, take_away, *map(_plot, self._explorer.figures(entry, asked, choice, measure, which))

    def _settled(self, uploaded: list[Entry], key: str | None, *controls: Any) -> tuple[Any, ...]:
        """A longer search where the quick one was not proven best; else nothing changes."""
        *asked, choice = controls
        if choice.placement is None or choice.placement.predicted["solver"]["status"] == "optimal":
            return (gr.skip(),) * 5
        return self._explored(uploaded, key, *asked, patient=True)

    def _made_front(self, uploaded: list[Entry], key: str | None, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        """Make the front of the card, once, with a bar over the figure; the next step draws it."""
        entry = self._entry(uploaded, key)
        if entry is not None:
            self._explorer.front(entry, lambda phase, done, total: progress((done, total), desc="front"))
        return gr.skip()

    def _handed(self, uploaded: list[Entry], key: str | None, choice: Choice, layers: list[str], *controls: Any) -> tuple[Any, ...]:
        """What changes with layers picked by hand."""
        entry = self._entry(uploaded, key)
        if entry is None:
            return views.note("open a card first"), "", None, None
        hand, table, take_away = self._explorer.by_hand(entry, choice, layers)
        *sliders, measure, which = controls
        return table, take_away, *map(_plot, self._explorer.figures(entry, wishes(*sliders), choice, measure, which, hand))

    def _started_from(self, uploaded: list[Entry], key: str | None, choice: Choice, name: str) -> list[str]:
        """The layers that a button starts from."""
        entry = self._entry(uploaded, key)
        return [] if entry is None else self._explorer.start_from(entry, choice, name.rpartition(" ")[2])

    def _saves(self, uploaded: list[Entry], key: str | None, choice: Choice, currency: str, *figures: Any) -> tuple[str, str]:
        """What the placement saves."""
        entry = self._entry(uploaded, key)
        if entry is None or not choice.layers:
            return views.note("choose a placement on the tab Select first"), ""
        return self._explorer.saves(uploaded, entry, choice.layers, currency, figures)

    def _take_upload(self, uploaded: list[Entry], paths: list[str] | None) -> tuple[Any, ...]:
        """Take files in, and say which were refused and why; the first new card is opened."""
        entries, refused = self._explorer.upload(uploaded, paths or [])
        new = [entry for entry in entries[len(uploaded) :] if entry.card is not None]
        words = "; ".join(refused) if refused else f"{len(entries) - len(uploaded)} file(s) taken in"
        message = gr.update(value=views.note(words, "bad" if refused else "good"), visible=True)
        return entries, message, gr.update(choices=self._explorer.cards(entries), value=new[0].key) if new else gr.skip()

    def _ticked(self) -> tuple[Any, ...]:
        """How far the profile is; the clock stops with it."""
        words, running = self._explorer.job()
        return words, gr.update(active=running), gr.update(interactive=not running), gr.update(interactive=running)

    def _ended(self, uploaded: list[Entry], key: str | None) -> tuple[Any, ...]:
        """The lists anew when a profile has ended."""
        return (gr.skip(),) * 6 if self._explorer.job()[1] else self._listed(uploaded, key)


def _plot(figure: views.Figure) -> PlotData:
    return PlotData(type="plotly", plot=json.dumps(figure, cls=PlotlyJSONEncoder))
