"""Fronts: what they promise, how they are kept and shown."""

import json
import re
import time
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cards import fake_card
from layercard.card.card import LayerCard, training_cost
from layercard.errors import SelectionError
from layercard.report import plots
from layercard.report.page import front_page
from layercard.report.terminal import front_view
from layercard.selection.pareto import LADDER, Front, pareto
from layercard.selection.select import predict


@pytest.fixture(scope="module")
def card() -> LayerCard:
    return LayerCard.from_json(fake_card(9))


@pytest.fixture(scope="module")
def front(card: LayerCard) -> dict[str, Any]:
    return pareto(card).to_json()


@pytest.mark.parametrize(("name", "measure"), [("time", "step_time"), ("memory", "peak_memory")])
def test_a_front_rises_with_its_cost_and_is_proven(front: dict[str, Any], name: str, measure: str) -> None:
    points = front["fronts"][name]
    assert len(points) >= 5
    for before, after in pairwise(points):
        assert before[measure]["share"] <= after[measure]["share"]
        assert before["performance_kept"]["value"] <= after["performance_kept"]["value"] and before["coverage"] < after["coverage"]
    assert points[-1]["performance_kept"]["value"] == pytest.approx(1.0)
    assert {point["solver"]["status"] for point in points} == {"optimal"}


def test_no_placement_lies_above_the_front(card: LayerCard, front: dict[str, Any]) -> None:
    """For every rung of the ladder, no placement that keeps so much is cheaper than the front's cheapest that does."""
    every = [predict(card, layers) for size in range(1, 10) for layers in combinations(range(9), size)]
    for kept in LADDER:
        cheapest = min(p["step_time"]["share"] for p in every if p["performance_kept"]["value"] >= kept - 1e-9)
        found = min(p["step_time"]["share"] for p in front["fronts"]["time"] if p["performance_kept"]["value"] >= kept - 1e-6)
        assert found == pytest.approx(cheapest, rel=2e-4)


def test_points_and_baselines_say_what_the_card_predicts(card: LayerCard, front: dict[str, Any]) -> None:
    names = [point["name"] for point in front["baselines"]]
    assert {"all", "last-1", "middle-3", "uniform-5", "first-8"} <= set(names) and len(set(names)) == len(names)
    assert front["baselines"][names.index("last-2")]["layers"] == [7, 8]
    for point in [*front["fronts"]["time"], *front["baselines"]]:
        assert point["step_time"]["share"] == pytest.approx(training_cost(card).step_time(point["layers"]))
        assert point["performance_kept"] == predict(card, point["layers"])["performance_kept"]
    assert front["cost_source"] == "shapes"


def test_progress_is_told(card: LayerCard) -> None:
    heard: list[tuple[str, int, int]] = []
    pareto(card, progress=lambda *what: heard.append(what))
    assert heard[0] == ("pareto", 1, 2 * len(LADDER)) and heard[-1] == ("pareto", 2 * len(LADDER), 2 * len(LADDER))


def test_a_front_survives_the_disk(card: LayerCard, front: dict[str, Any], tmp_path: Path) -> None:
    path = pareto(card).save(tmp_path / "front.json")
    assert Front.load(path).to_json() == front
    path.write_text('{"schema": "layercard/1"}', encoding="utf-8")
    with pytest.raises(SelectionError, match="layercard pareto"):
        Front.load(path)


def test_two_hundred_layers_take_seconds() -> None:
    deep = LayerCard.from_json(fake_card(200))
    started = time.process_time()
    front = pareto(deep)
    found = front.fronts
    assert time.process_time() - started < 20, "5 s on a busy core; with 2 s a point it was 93"
    for points in found.values():
        assert len(points) >= 10
        for point in points:
            assert point["solver"]["gap"] < 0.5
    for plain in front.baselines:
        rung = max((kept for kept in LADDER if kept <= plain["performance_kept"]["value"]), default=0.0)
        as_good = [point for point in found["time"] if point["performance_kept"]["value"] >= rung - 1e-6]
        cheapest = min(point["step_time"]["share"] for point in as_good)
        assert rung == 0 or cheapest <= plain["step_time"]["share"] * (1 + 1e-9), plain["name"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_names_every_placement(front: dict[str, Any], width: int) -> None:
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(front_view(Front.from_json(front)))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "Least step time" in text and "Least peak memory" in text and "costs are estimated from shapes alone" in " ".join(text.split())
    assert all(point["name"] in text for point in front["baselines"])


def test_the_figure_has_the_front_and_every_kind_of_plain_placement(front: dict[str, Any]) -> None:
    for name in ("time", "memory"):
        traces = plots.front(front, name).to_plotly_json()["data"]
        assert [trace["name"] for trace in traces] == ["least cost", "last", "middle", "uniform", "first", "all"]
        assert len(traces[0]["x"]) == len(front["fronts"][name])
        assert sum(len(trace["x"]) for trace in traces[1:]) == len(front["baselines"])


class _Scripts(HTMLParser):
    """Tags of a page, and what its JSON scripts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self._json = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._json = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self._json:
            self.figures.append(json.loads(data))
            self._json = False


def test_the_page_is_whole_and_text_stays_text(front: dict[str, Any]) -> None:
    name = "</script><img src=x onerror=alert(1)>"
    evil = {**front, "model": {**front["model"], "name": name}, "baselines": [{**front["baselines"][0], "name": f"last-{name}"}]}
    page = front_page(Front.from_json(evil))
    parser = _Scripts()
    parser.feed(page)
    assert "img" not in parser.tags and len(parser.figures) == 2
    assert any("&lt;img" in text for trace in parser.figures[0]["data"] for text in trace["hovertext"])  # plotly reads markup
    head = page.partition("<script>")[0]
    assert "default-src 'none'" in head and not re.search(r'(?:src|href)="(?!data:|#)', head)
