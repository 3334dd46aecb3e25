"""Figures for notebooks equal those of the report, and what notebooks show of cards and placements is escaped, short and whole."""

import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from plotly.graph_objects import Figure

from cards import fake_card, fake_placement
from layercard.card.card import LayerCard, cost_of
from layercard.card.numbers import LONGEST, MOST_ROWS
from layercard.errors import CardError, LayercardError, PlacementError, ReportError, SelectionError, TrainingError
from layercard.report import plots
from layercard.report.page import report_page
from layercard.report.sources import Sources
from layercard.report.words import measured
from layercard.selection.placement import Placement
from layercard.selection.select import select
from test_report_page import Reader, full

OTHER_MODEL = fake_placement({"model": {"name": "other", "fingerprint": "x", "layers": 8}}, [1])
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\x1b[2J\u202e"


@pytest.fixture(scope="module")
def sources() -> Sources:
    return full()


@pytest.fixture(scope="module")
def drawn(sources: Sources) -> dict[str, Any]:
    """The report's figures by name, as they stand in the page."""
    return {name.removeprefix("plot-"): figure for name, figure in Reader(report_page(sources)).figures.items()}


def as_json(figure: Figure) -> Any:
    value = figure.to_plotly_json()
    del value["layout"]["template"]
    return json.loads(json.dumps(value))


def test_files_and_objects_give_the_figures_of_the_report(sources: Sources, drawn: dict[str, Any]) -> None:
    card, mine, front, comparison = sources.card, sources.placement, sources.front, sources.comparisons[0]
    named = {name: each.to_json() for name, each in sources.placements.items()}
    assert mine is not None and front is not None and sources.transfer is not None
    for shown, chosen, fronts in ((card, mine, front), (card.to_json(), mine.to_json(), front.to_json())):
        figures = {
            "card": plots.heat_map(shown, chosen),
            "coupling": plots.coupling(shown, chosen),
            "cost-time": plots.cost_by_depth(shown, chosen=chosen),
            "cost-memory": plots.cost_by_depth(shown, "memory", chosen),
            "cost-reach": plots.cost_by_depth(shown, "reach"),
            "front-time": plots.front(fronts, placements=named),
            "front-memory": plots.front(fronts, "memory", sources.placements),
            "transfer-plot": plots.transfer_matrix(sources.cards),
            "trade-off": plots.trade_off(comparison, named),
        }
        figures |= {measure.key: plots.depth_profile(shown, measure.key, chosen) for measure in measured(card) if measure.key in drawn}
        assert {name: as_json(figure) for name, figure in figures.items()} == {key: drawn[key] for key in drawn if key != "loss"}
    assert as_json(plots.transfer_matrix(sources.transfer.to_json())) == drawn["transfer-plot"]


def test_the_chosen_layers_are_marked() -> None:
    figure = plots.depth_profile(fake_card(8), chosen=[5, 2])
    assert list(figure.data[-1].x) == [2, 5] and figure.data[-1].marker.symbol == "star"
    assert len(plots.depth_profile(fake_card(8)).data) == len(figure.data) - 1


def test_costs_estimated_from_shapes_can_be_drawn() -> None:
    card = LayerCard.from_json(fake_card(8))
    with pytest.raises(CardError, match="no cost; profile again"):
        plots.cost_by_depth(card)
    assert "% of a step" in plots.cost_by_depth(card.with_cost(cost_of(card))).layout.yaxis.title.text


def _costed() -> LayerCard:
    card = LayerCard.from_json(fake_card(8))
    return card.with_cost(cost_of(card))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: plots.depth_profile(fake_card(8), "resnrom"), CardError, "did you mean resnorm"),
        (lambda: plots.depth_profile(fake_card(8), "training_probe"), CardError, "it has gain_estimate"),
        (lambda: plots.depth_profile(fake_card(8), chosen=[8]), PlacementError, "outside the model"),
        (lambda: plots.heat_map({"schema": "other/1"}), CardError, "layercard profile"),
        (lambda: plots.heat_map(fake_card(8), OTHER_MODEL), CardError, "profile this model"),
        (lambda: plots.cost_by_depth(_costed(), "tme"), ReportError, "did you mean time"),  # type: ignore[arg-type]
        (lambda: plots.front({"schema": "layercard/1"}), SelectionError, "layercard pareto"),
        (lambda: plots.front({"schema": "layercard-front/1"}), SelectionError, "model: Field required"),
        (lambda: plots.transfer_matrix({"schema": "layercard-transfer/1"}), CardError, "model: Field required"),
        (lambda: plots.transfer_matrix({"one": fake_card(8)}), LayercardError, "card"),
        (lambda: plots.trade_off({"schema": "layercard-compare/1", "rows": []}), TrainingError, "model: Field required"),
        (lambda: plots.trade_off({}), TrainingError, "layercard compare"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], error: type[LayercardError], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_a_front_takes_placements_of_its_own_model_only(sources: Sources) -> None:
    other = {**sources.placement.to_json(), "model": {"name": "other", "fingerprint": "x", "layers": 12}}
    with pytest.raises(PlacementError, match="placement p is of other"):
        plots.front(sources.front, placements={"p": other})


def test_names_from_files_are_no_markup_in_figures(sources: Sources) -> None:
    cards = {HOSTILE: sources.card, "b": list(sources.cards.values())[1]}
    assert "<" not in json.dumps(as_json(plots.transfer_matrix(cards))["data"][0]["x"])
    assert "<script" not in json.dumps(as_json(plots.front(sources.front, placements={HOSTILE: sources.placement})))


def test_nothing_is_drawn_before_it_is_asked_for() -> None:
    script = (
        "import sys, layercard; layercard.plots; from layercard import LayerCard, Placement; "
        "print(*[m for m in sys.modules if m in ('plotly', 'torch', 'pandas')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


class Shown(HTMLParser):
    """Rows of the tables, as texts, and tags and attributes; that every tag is closed is checked on the way."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


SAFE = {"div", "strong", "table", "caption", "thead", "tbody", "tr", "th", "td"}


def test_a_card_shows_its_best_layers_with_intervals() -> None:
    card = LayerCard.from_json(fake_card(30))
    shown = Shown(card._repr_html_())
    facts = {row[0]: row[1] for row in shown.rows if len(row) == 2}
    assert facts["Model"].startswith("smollm2-135m, 30 layers")
    assert "64 records" in facts["Data"] and facts["Ranking"].startswith("very stable")
    assert facts["Warning"] == card.warnings[0]
    best = card.best_layers()
    assert facts["Best layers"] == ", ".join(map(str, best))
    table = [row for row in shown.rows if len(row) > 2]
    assert table[0] == ["Layer", "Gain estimate", "Step probe", "Resnorm"]
    assert [row[0] for row in table[1:]] == [str(layer) for layer in best]
    gain = card.layers[best[0]].gain_estimate
    assert table[1][1] == f"{gain.value:.2f} ({gain.low:.2f}–{gain.high:.2f})"


def test_a_placement_shows_layers_objective_predictions_and_reasons() -> None:
    card = LayerCard.from_json(fake_card(30))
    placement = select(card, k=5)
    rows = Shown(placement._repr_html_()).rows
    facts = {row[0]: row[1] for row in rows if len(row) == 2}
    assert facts["Objective"] == placement.objective and facts["Layers"].endswith("(5 of 30)")
    kept = placement.predicted["performance_kept"]
    assert facts["Keeps"].startswith(f"{100 * kept['value']:.0f}% ({100 * kept['low']:.0f}–{100 * kept['high']:.0f})")
    assert "step time" in facts["Costs"] and facts["Modules"].startswith("35: down_proj")
    reasons = rows[[row[0] for row in rows].index("Layer") + 1 :]
    assert reasons == [[str(layer), placement.reasons[str(layer)]] for layer in placement.layers]


def test_whatever_files_say_is_text() -> None:
    value = fake_card(8, warnings=[HOSTILE], stability={})
    value["model"] = {"name": HOSTILE, "fingerprint": HOSTILE, "layers": 8}
    value["data"]["source"] = HOSTILE
    placement = {
        **fake_placement(value, [1]),
        "objective": HOSTILE,
        "reasons": {"1": HOSTILE},
        "paths": [f"a.{HOSTILE}"],
        "asked": {HOSTILE: HOSTILE},
    }
    placement["predicted"] = {"remark": HOSTILE, "layers_in_backward": HOSTILE, "solver": {"status": HOSTILE}}
    placement["rank_pattern"], placement["alpha_pattern"] = {f"a.{HOSTILE}": 4}, {f"a.{HOSTILE}": 8}
    for text, times in ((LayerCard.from_json(value)._repr_html_(), 3), (Placement.from_json(placement)._repr_html_(), 7)):
        shown = Shown(text)
        assert shown.tags <= SAFE and shown.attributes <= {"style", "scope"}
        assert shown.text.count("<script>alert(1)</script>") >= times and not {"\x1b", "\u202e"} & set(text)


def test_predictions_of_the_wrong_kind_are_left_out() -> None:
    predicted: dict[str, Any] = {
        "parameters": {"count": "many", "share": None},
        "step_time": {"share": "x"},
        "peak_memory": {"share": 1, "bytes": "y"},
    }
    value = {**fake_placement(fake_card(8), [1]), "predicted": {**predicted, "baseline": "z"}}
    with pytest.raises(PlacementError, match=r"predicted: performance_kept is 'w', not an object"):
        Placement.from_json({**value, "predicted": {**predicted, "performance_kept": "w"}})
    placement = Placement.from_json(value)
    facts = {row[0]: row[1] for row in Shown(placement._repr_html_()).rows if len(row) == 2}
    assert facts["Costs"] == "peak memory 100% (of all layers)" and "Adapters" not in facts and "Keeps" not in facts


def test_large_input_stays_short() -> None:
    card = LayerCard.from_json(fake_card(64, warnings=["w" * 10**6] * 100))
    assert len(card._repr_html_()) < 40_000
    assert "w" * (LONGEST - 1) + "…" in card._repr_html_() and "w" * LONGEST not in card._repr_html_()
    placement = Placement.from_json(fake_placement(fake_card(64), list(range(64))))
    assert f"and {64 - MOST_ROWS} more" in placement._repr_html_()


def test_a_placement_without_reasons_has_no_empty_table() -> None:
    shown = Shown(Placement.from_json({**fake_placement(fake_card(8), [1, 2]), "reasons": {}})._repr_html_())
    assert "Layer" not in [row[0] for row in shown.rows] and "Why each layer" not in shown.text
