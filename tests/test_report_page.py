"""The report page: its parts, its numbers, its size, text that stays text, and files that do not fit together."""

import hashlib
import html
import json
import re
import time
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cards import fake_card, fake_comparison, fake_placement, fake_race, fake_result
from layercard.card.card import LayerCard
from layercard.card.numbers import PREDICTED
from layercard.commands.main import run
from layercard.cost.model import CostModel
from layercard.errors import CardError, LayercardError, ReportError, TrainingError, visible
from layercard.records import Estimate
from layercard.report import page as report
from layercard.report.app.library import Choice
from layercard.report.page import front_page, report_page
from layercard.report.roi import FIGURES, SHARE_ERROR, RoiInputs, ratios_of, roi
from layercard.report.sources import Sources, read_sources
from layercard.report.trials import Trial, by_regime, compared, grouped, of_comparison, of_run, of_trial, plain_name
from layercard.report.words import amount, measured
from layercard.selection.pareto import pareto
from layercard.selection.placement import Placement
from layercard.selection.transfer import transfer
from layercard.training.records import Run
from layercard.trials.records import Comparison, TrialRecord

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
VOID = {"meta", "input", "br", "img", "link"}


class Reader(HTMLParser):
    """A page taken apart: tags, exact values of tables, the JSON of figures, headings, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.values: dict[str, list[float]] = {}
        self.figures: dict[str, Any] = {}
        self.open: list[str] = []
        self._figure: str | None = None
        self._caption = ""
        self._in_caption = False
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._caption = ""
        if "data-value" in found:
            self.values.setdefault(self._caption, []).append(float(found["data-value"] or "nan"))
        self._in_caption = tag == "caption"
        self._figure = found["data-plot"] if tag == "script" and found.get("class") == "figure" else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._in_caption = False

    def handle_data(self, data: str) -> None:
        if self._in_caption:
            self._caption += data
        if self._figure:
            self.figures[self._figure] = json.loads(data)
            self._figure = None

    def with_tag(self, *names: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag in names]


def costed(card: dict[str, Any], source: str = "measured") -> dict[str, Any]:
    """A card with a cost, as if it had been measured on a GPU."""
    shapes = [[(module["in_features"], module["out_features"]) for module in layer["modules"]] for layer in card["layers"]]
    cost = CostModel.from_shapes(shapes, model="m", batch_size=4, length=64, labelled=100, rank=8).to_json()
    return {**card, "cost": {**cost, "source": source, "device": "some GPU", "threads": 0}}


def full(depth: int = 12, cards: int = 2, **changes: Any) -> Sources:
    """Everything a report can be made from: cards with cost, two placements, a comparison, runs, a front and a transfer."""
    values = [{**costed(fake_card(depth, seed)), **changes} for seed in range(cards)]
    every = list(range(depth))
    loaded = {f"card{seed}": LayerCard.from_json(value) for seed, value in enumerate(values)}
    placements = {"mine": [1, depth // 2], **{f"p{first}": every[first : first + 3] for first in range(2, min(12, depth))}, "all": every}
    comparison = Comparison.from_json(fake_comparison(values[0], placements))
    return Sources(
        cards=loaded,
        placements={
            name: Placement.from_json(fake_placement(values[0], layers)) for name, layers in (("mine", placements["mine"]), ("other", [0]))
        },
        comparisons=[comparison],
        trials=compared(of_comparison(comparison)),
        curves=[trial_of(run_record(values[0], layers, 30.0, 6.0)) for layers in (placements["mine"], every)],
        front=pareto(loaded["card0"]),
        transfer=transfer(list(loaded.items()), k=3) if cards > 1 else None,
        tables=[{"title": "a table", "columns": ["strategy", "time"], "rows": [["all", 1.5], ["one", None]], "command": "make it"}],
    )


@pytest.fixture(scope="module")
def whole() -> tuple[Sources, str]:
    sources = full()
    return sources, report_page(sources, commands=["layercard profile a"])


def test_every_part_is_there_and_nothing_is_missing(whole: tuple[Sources, str]) -> None:
    page = Reader(whole[1])
    plots = {str(attrs["id"]) for attrs in page.with_tag("div") if attrs.get("class") == "plot"}
    assert plots == set(page.figures)
    assert {"plot-resnorm", "plot-gain_estimate", "plot-coupling", "plot-card", "plot-cost-time", "plot-cost-reach"} <= plots
    assert "plot-loss" in plots
    assert {"plot-front-time", "plot-front-memory", "plot-trade-off", "plot-transfer-plot"} <= plots
    assert "Not in this report" not in whole[1]
    topics = [text for text in ("Theoretical framework</h2>", "Layer Card</h2>", "trade-offs</h2>", "investment</h2>") if text in whole[1]]
    assert len(topics) == 4
    phases = re.findall(r"<h3>\d\. (\w+) <small>(\w+)</small>", whole[1])
    assert phases == [("Profile", "done"), ("Select", "done"), ("Deploy", "done")]


def test_numbers_are_those_of_the_files(whole: tuple[Sources, str]) -> None:
    sources, text = whole
    page, rows = Reader(text), sources.comparisons[0].to_json()["rows"]
    card, columns = sources.card.to_json(), [measure.key for measure in measured(sources.card)]
    table = next(values for caption, values in page.values.items() if caption.startswith("Every layer"))
    assert table == [layer[key]["value"] if isinstance(layer[key], dict) else layer[key] for layer in card["layers"] for key in columns]
    line = page.figures["plot-gain_estimate"]["data"]
    assert line[1]["y"] == [layer["gain_estimate"]["value"] for layer in card["layers"]]
    assert line[2]["x"] == list(sources.placements["mine"].layers)
    assert page.figures["plot-coupling"]["data"][0]["z"] == [[round(value, 4) for value in row] for row in card["coupling"]]
    assert page.figures["plot-transfer-plot"]["data"][0]["z"] == sources.transfer.to_json()["matrix"]
    shown = {name: at for trace in page.figures["plot-trade-off"]["data"] for name, at in zip(trace["text"], trace["y"], strict=True)}
    kept = {("mine (balanced)" if row["name"] == "mine" else row["name"]): row["performance_kept"]["value"] for row in rows}
    assert shown == pytest.approx(kept | {"all": 100.0})
    points = [100 * point["step_time"]["share"] for point in sources.front.fronts["time"]]
    assert page.figures["plot-front-time"]["data"][0]["x"] == points
    assert page.values["Loss reduction on data"][1] == rows[-1]["loss_reduction"]["value"]  # all layers come first


def test_the_calculator_of_the_page_starts_from_pythons_results(whole: tuple[Sources, str]) -> None:
    sources, text = whole
    chosen = sources.placement.layers
    found = roi(RoiInputs(), ratios_of(chosen, sources.card, grouped(sources.trials))).results
    shown = {(a["data-result"], a["data-end"]): a.get("data-exact") for a in Reader(text).with_tag("td") if a.get("data-result")}
    assert len(shown) == 3 * len(found)
    for (name, end), value in shown.items():
        assert (None if value is None else float(value)) == getattr(found[name], end)
    assert found["saved_month"].mid > 0
    assert "const layercardRoi" in text and "=&gt;" not in text.partition("const layercardRoi")[2].partition("</script>")[0]


def test_a_page_without_anything_but_a_card_says_how_to_get_the_rest() -> None:
    text = html.unescape(report_page(Sources(cards={"card": LayerCard.from_json(fake_card(4))})))
    for command in ("layercard select card.json", "layercard compare", "layercard profile … --cost", "layercard pareto", "-o other.json"):
        assert command in text
    assert text.count("Not in this report") == 7


def test_a_deep_model_makes_a_small_page_soon() -> None:
    sources = Sources(cards={"card": LayerCard.from_json(costed(fake_card(200)))})
    started = time.process_time()
    text = report_page(sources)
    assert time.process_time() - started < 8
    assert len(text.encode()) < 3_000_000
    assert len(Reader(text).figures["plot-coupling"]["data"][0]["z"]) == 200


def test_plotly_is_the_file_that_its_note_says() -> None:
    folder = Path(report.__file__).parent / "vendor"
    assert hashlib.sha256(report.plotly_js().encode()).hexdigest() in (folder / "README.md").read_text(encoding="utf-8")
    assert "</script" not in report.plotly_js()


def test_nothing_is_fetched(whole: tuple[Sources, str]) -> None:
    page = Reader(whole[1])
    assert not page.with_tag("link", "img", "iframe", "object", "base")
    assert not [attrs for _, attrs in page.tags if "src" in attrs or not str(attrs.get("href", "#")).startswith("#")]
    policy = next(attrs["content"] for attrs in page.with_tag("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'") and "http" not in str(policy)


def test_a_screen_reader_finds_its_way(whole: tuple[Sources, str]) -> None:
    page = Reader(whole[1])
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        assert attrs.get("aria-labelledby", ids[0]) in ids
        assert str(attrs.get("href", f"#{ids[0]}"))[1:] in ids
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in page.with_tag("div") if attrs.get("class") == "plot")
    labels = {attrs["for"] for attrs in page.with_tag("label")}
    assert {attrs["id"] for attrs in page.with_tag("input")} == labels != set()
    assert len(page.with_tag("caption")) == len(page.with_tag("table"))
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.with_tag("th"))
    assert next(attrs for attrs in page.with_tag("html"))["lang"] == "en"


@pytest.mark.parametrize("text", [EVIL, "\x1b[2J\u202egpj\ud800"])
def test_hostile_text_stays_text(text: str) -> None:
    value = fake_card(6)
    value["model"]["name"] = value["data"]["source"] = value["settings"]["device"] = value["units"]["resnorm"] = text
    sources = full(6, model=value["model"], data=value["data"], settings=value["settings"], units=value["units"], warnings=[text])
    sources.cards["card0"] = sources.card.model_copy(update={"cost": sources.card.cost.model_copy(update={"device": text})})
    named = Placement.from_json({**fake_placement(value, [1]), "objective": text, "reasons": {"1": text}})
    comparison = Comparison.from_json(fake_comparison(value, {text: [2], "all": list(range(6))}))
    sources.placements, sources.comparisons, sources.trials = {text: named}, [comparison], compared(of_comparison(comparison))
    sources.front.baselines[0]["name"] = f"last-{text}"
    sources.transfer.cards[0]["name"] = text
    sources.tables = [{"title": text, "columns": [text], "rows": [[text]]}]
    page_text = report_page(sources, inputs=RoiInputs(currency="€"), commands=[text])
    assert text not in page_text
    assert not [
        letter
        for letter in page_text.replace(report.plotly_js(), "")
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t"
    ]
    page = Reader(page_text)
    assert not page.with_tag("img")
    assert html.escape(visible(text), quote=False)[:20] in page_text
    for figure in page.figures.values():  # plotly reads markup in text, so it must be escaped there as well
        for trace in figure["data"]:
            shown = repr([trace.get("hovertext"), trace.get("name"), trace.get("x"), trace.get("y")])
            assert "<img" not in shown and "\\x1b" not in shown and "\\ud800[" not in shown


def test_a_front_alone_is_a_page() -> None:
    front = full(6).front
    text = front_page(front)
    assert set(Reader(text).figures) == {"plot-front-time", "plot-front-memory"}
    assert "Return on investment" not in text


def run_record(card: dict[str, Any], layers: list[int], seconds: float, after: float, seed: int = 0) -> dict[str, Any]:
    """What `layercard train` writes."""
    return {
        "schema": "layercard-run/1",
        "started": "2026-01-01T00:00:00+00:00",
        "placement": fake_placement(card, layers),
        "settings": {"seed": seed, "rank": 8},
        "model": {**card["model"], "device": "cpu"},
        "data": {"source": "e2e/train.jsonl"},
        "valid": {"per_record": {"labelled": [5, 6, 7], "nats_before": [9.0, 10.0, 12.0], "nats_after": [after, after, after + 1]}},
        "loss_reduction": (31 - 3 * after - 1) / 18,
        "loss_reduction_interval": [0.1, 2.0],
        "train_seconds": seconds,
        "peak_memory_bytes": 1000 * len(layers),
        "trainable_parameters": 10 * len(layers),
        "adapter_bytes": 40 * len(layers),
        "steps": 1,
        "tokens_seen": 9,
        "losses": [1.0],
        "layers_in_backward": "1/4",
    }


def trial_of(record: dict[str, Any]) -> Trial:
    return of_run(Run.from_json(record))


def bench_record(card: dict[str, Any], layers: list[int], split: str = "test") -> TrialRecord:
    reduction = Estimate(value=1.0, low=0.8, high=1.2)
    settings = {"seed": 1, "rank": 8}
    return TrialRecord(task="e2e", split=split, layers=tuple(layers), model=card["model"], settings=settings, loss_reduction=reduction)


def test_runs_compare_with_all_layers_of_their_seed() -> None:
    card = fake_card(4)
    trials = compared([trial_of(run_record(card, [1], 30.0, 6.0)), trial_of(run_record(card, [0, 1, 2, 3], 60.0, 4.0))])
    one, every = trials
    assert (one.time_share, every.time_share) == (50.0, 100.0)
    assert one.performance_kept.value == pytest.approx(100 * 12 / 18)
    assert one.performance_kept.low < one.performance_kept.value < one.performance_kept.high
    assert one.memory_of_all == 4000
    other_seed = compared([trial_of(run_record(card, [1], 30.0, 6.0, seed=5)), trial_of(run_record(card, [0, 1, 2, 3], 60.0, 4.0))])[0]
    assert (other_seed.performance_kept, other_seed.time_share) == (None, None)


def test_runs_of_other_modules_or_lengths_are_told_apart() -> None:
    """No mean, share or partner is taken over runs of several regimes."""
    card, every = fake_card(4), [0, 1, 2, 3]
    few = run_record(card, [2], 30.0, 6.0)
    records = {
        "all": run_record(card, every, 60.0, 4.0),
        "middle 1": few,
        "middle 1, mlp modules": {**few, "placement": {**few["placement"], "modules": "mlp"}},
        "all, mlp modules": {**run_record(card, every, 50.0, 4.0), "placement": {**fake_placement(card, every), "modules": "mlp"}},
        "middle 1, 9 steps": {**few, "settings": {**few["settings"], "steps": 9}},
    }
    found = grouped(compared([trial_of(record) for record in records.values()]))
    groups = {f"{group.name}{f', {group.regime.steps} steps' if group.regime.steps else ''}": group for group in found}
    assert set(groups) == set(records)
    regimes = by_regime(found, [2], "mlp")
    assert [regime.words for regime in regimes] == ["e2e, rank 8", "e2e, rank 8, 9 steps"]
    assert sum(map(len, regimes.values())) == len(records)
    assert groups["middle 1"].time_share == groups["middle 1, mlp modules"].time_share == Estimate(value=50.0)
    assert groups["middle 1, 9 steps"].time_share is None
    mlp = ratios_of([2], None, list(groups.values()), "mlp")
    assert mlp.time.mid == 0.5


def test_timings_that_runs_share_count_once() -> None:
    card = fake_card(4)
    runs = [*of_trial(bench_record(card, [2])), *of_trial(bench_record(card, [0, 1, 2, 3]))]
    assert of_trial(bench_record(card, [1], split="valid")) == []
    assert runs[0].train_seconds is None  # part of its forward pass was stored
    again = [trial for trial in compared([*runs, *runs], {("e2e", (2,), 8): 40.0}) if trial.layers == (2,)]
    row = grouped(again)[0]
    assert (row.timings, row.time_share, row.name) == (1, Estimate(value=40.0), "middle 1")
    assert plain_name([0, 1, 2, 3], 4) == "all"


def test_ratios_say_what_they_come_from() -> None:
    value = costed(fake_card(6))
    card = LayerCard.from_json(value)
    predicted = ratios_of([3, 4], card)
    assert [getattr(predicted, name).basis for name in ("time", "memory", "latency")] == ["predicted"] * 3
    assert predicted.time.low < predicted.time.mid < predicted.time.high < 1
    assert "predicted" in predicted.time.source and "9.3 %" in predicted.time.source
    assert predicted.adapter_size.mid == pytest.approx(1 / 3)
    guessed = ratios_of([3, 4], LayerCard.from_json(costed(fake_card(6), "rates")))
    assert not guessed.time.measured and not guessed.latency.measured and guessed.run_memory_gb is None
    assert roi(RoiInputs(), guessed).results["training_saved"].high == 0
    nothing = ratios_of([3, 4])
    assert not nothing.adapter_size.measured and nothing.time.mid == 1
    comparison = fake_comparison(value, {"mine": [3, 4], "all": list(range(6))})
    trained = ratios_of([3, 4], card, grouped(compared(of_comparison(Comparison.from_json(comparison)))))
    assert trained.time.mid == pytest.approx(comparison["rows"][0]["time_share"] / 100)
    assert trained.time.source == "timed against all layers, 1 timing, without an interval"
    assert (trained.time.basis, trained.time.low) == ("measured", trained.time.high)
    on_a_cpu = LayerCard.from_json({**value, "cost": {**value["cost"], "threads": 2}})
    assert ratios_of([3], on_a_cpu).adapter_latency_ms is None


def test_the_error_of_a_predicted_share_is_the_worst_that_was_measured() -> None:
    """The shares' own error, not that of seconds: `benchmarks/results/cost_model.json` has both."""
    result = json.loads((RESULTS / "cost_model.json").read_text(encoding="utf-8"))
    measured_share, predicted_share = (result["columns"].index(name) for name in ("% of all", "predicted % of all"))
    errors = [abs(row[predicted_share] / row[measured_share] - 1) for row in result["rows"]]
    assert max(errors) <= SHARE_ERROR < max(errors) + 0.001
    assert len(errors) - 1 == 16


@pytest.mark.parametrize("trained", [True, False])
def test_the_first_screen_says_what_was_measured_and_what_is_predicted(trained: bool) -> None:
    sources = full(6)
    if not trained:
        sources.trials = []
    text = html.unescape(report_page(sources))
    tiles = [" ".join(re.sub("<[^>]*>", " ", tile).split()) for tile in re.findall(r'(?s)<div class="tile">(.*?)</div>', text)]
    assert [tile.partition(" ○")[0].partition(" ●")[0] for tile in tiles][:3] == ["Performance kept", "Training time", "Peak memory"]
    assert tiles[3].startswith("Saved a year")
    sentence = re.search('<p class="verdict">(.*?)</p>', text)[1]
    assert sentence.startswith("2 of 6 layers: ") and "a year at the prices below" in sentence
    if trained:
        assert "● measured" in tiles[0] and "● measured" in tiles[1] and "predicted" not in sentence
        assert "–" not in tiles[1] and "1 timing, without an interval" in tiles[1]
    else:
        assert all("○ predicted" in tile for tile in tiles[:3])
        assert PREDICTED in tiles[0] and "of what all layers learn (predicted)" in sentence
    order = [text.index(part) for part in ('class="verdict"', 'class="tile"', 'id="plot-loss"', 'id="roi-form"', 'id="theory"')]
    assert order == sorted(order)


def run_folder(folder: Path, depth: int = 6, *, with_card: bool = True) -> Path:
    """What `layercard run` leaves, as far as its report reads it; the upper half was chosen."""
    card, layers = costed(fake_card(depth)), list(range(depth // 2, depth))
    reasons = dict.fromkeys(map(str, layers), "won the race")
    placement = {**fake_placement(card, layers), "modules": "mlp", "predicted": {}, "reasons": reasons}
    curve = [{"step": 48 * at, "seconds": 19.7 * at, "loss": 2.9 - 0.092 * at} for at in range(11)]
    values = {"placement.json": placement, "result.json": fake_result(card, layers), "race.json": fake_race(card, layers)}
    values["adapter/run.json"] = {**run_record(card, layers, 197.0, 6.0), "placement": placement, "curve": curve}
    values["timing/run.json"] = run_record(card, list(range(depth)), 3.0, 8.0)
    for name, value in (values | ({"card.json": card} if with_card else {})).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.mark.parametrize("with_card", [True, False])
def test_the_page_of_a_run(with_card: bool, tmp_path: Path) -> None:
    """`layercard report FOLDER` of a run: sentence, picture, tiles and calculator, then how it was chosen, a table for each length."""
    layers = [3, 4, 5]
    run_folder(tmp_path, with_card=with_card)
    sources = read_sources([tmp_path])
    text = html.unescape(report_page(sources, commands=["layercard run model --data d.jsonl"]))
    sentence = re.sub("<[^>]*>", "", re.search('<p class="verdict">(.*?)</p>', text)[1])
    assert sentence.startswith(
        "3 of 6 layers, MLP modules only: 99 % (97–101) of what all layers learn (estimated), 2.9 times faster, 25 % of"
    )
    order = [
        text.index(part) for part in ('class="verdict"', 'class="tile"', 'id="plot-loss"', 'id="roi-form"', 'id="findings"', 'id="race"')
    ]
    assert order == sorted(order)
    tiles = [" ".join(re.sub("<[^>]*>", " ", tile).split()) for tile in re.findall(r'(?s)<div class="tile">(.*?)</div>', text)]
    assert "66 % less 1 timing of a step; 197 s after 85 s of search" in tiles[1] and "loss 2.900 to 1.980" in tiles[0]
    page = Reader(text)
    captions = [caption for caption in page.values if caption.startswith("Candidates after")]
    assert [caption.partition(":")[0] for caption in captions] == ["Candidates after 24 steps", "Candidates after 72 steps"]
    estimated = page.figures["plot-loss"]["data"][-1]
    assert estimated["name"] == "all layers, estimated" and estimated["x"] == [1.2 * 480] and estimated["y"] == [pytest.approx(1.97)]
    assert ("plot-coupling" in page.figures) == with_card and "won the race" not in text
    saved = roi(RoiInputs(), ratios_of(layers, sources.card, (), "mlp", sources.own_result)).results["saved_year"].mid
    assert f"about {amount(saved)} USD" in sentence


def test_one_quantity_has_one_number_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a placement keeps, takes and saves, in `select`, `roi`, the report and the app."""
    from layercard.report.app.explorer import Explorer
    from layercard.report.app.library import Library, rows

    monkeypatch.chdir(tmp_path)
    Path("card.json").write_text(json.dumps(costed(fake_card(12))), encoding="utf-8")
    assert run(["select", "card.json", "--k", "3", "-o", "placement.json"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert run(["roi", "card.json", "placement.json", "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)
    assert run(["report", "card.json", "placement.json", "-o", "r.html"]) == 0
    page = html.unescape(Path("r.html").read_text(encoding="utf-8"))
    explorer, placement = Explorer(Library([tmp_path])), Placement.load("placement.json")
    entry = next(entry for entry in explorer.entries([]) if entry.card is not None)
    headline, _ = explorer.saves([], entry.key, Choice(placement), "USD", *(field.default for field in FIGURES.values()))

    app = rows(placement)
    kept, time = app["Performance kept"][0].partition(" ")[0].rstrip("%"), round(app["Step time"][1])
    assert f"Keeps {kept}%" in said and f"<span>{kept} %</span>" in page
    assert f", {time}%," in said and f"<span>{100 - time} % less</span>" in page
    assert round(100 * saved["ratios"]["time"]["mid"]) == time
    memory = round(app["Peak memory"][1])
    assert re.search(rf"peak memory [\d,]+ MiB, {memory}%", said) and f"{memory} % of all layers'" in page
    year = amount(saved["results"]["saved_year"]["mid"])
    assert f'data-end="mid">{year}<' in page and year in headline


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write


def test_folders_are_read_and_parts_of_a_comparison_count_once(files: Callable[..., Path], tmp_path: Path) -> None:
    card = costed(fake_card(6))
    files("demo/card.json", card)
    files("demo/placement.json", fake_placement(card, [3]))
    files("demo/compare/compare.json", fake_comparison(card, {"mine": [3], "all": list(range(6))}))
    files("demo/compare/mine/run.json", run_record(card, [3], 3.0, 6.0))
    files("demo/compare/mine/placement.json", fake_placement(card, [3]))
    files("demo/compare/mine/adapter_config.json", {"peft_type": "LORA"})
    files("demo/list.json", [1, 2])
    files("alone/run.json", run_record(card, [2], 3.0, 6.0))
    files("alone/placement.json", fake_placement(card, [2]))
    sources = read_sources([tmp_path / "demo", tmp_path / "alone"])
    assert list(sources.cards) == ["card"] and list(sources.placements) == ["placement"]
    assert [trial.layers for trial in sources.trials] == [(3,), tuple(range(6)), (2,)]
    assert sources.used == {"card": 1, "placement": 1, "comparison": 1, "run": 1}


CARD, OTHER = fake_card(4), {**fake_card(4), "model": {"name": "other", "fingerprint": "ffff", "layers": 4}}


@pytest.mark.parametrize(
    ("contents", "arguments", "words", "error"),
    [
        ({"runs/notes.txt": "x"}, ["card.json", "runs"], "runs holds no card, placement or run", ReportError),
        ({"runs/a.json": {"peft_type": "LORA"}}, ["card.json", "runs"], "holds no card, placement or run", ReportError),
        ({"p.json": fake_placement(CARD, [1])}, ["p.json"], "there is no card", ReportError),
        ({"b.json": OTHER}, ["card.json", "b.json"], "a report is of one model", ReportError),
        ({"r/run.json": run_record(OTHER, [1], 1, 1)}, ["card.json", "r"], "a report is of one model", ReportError),
        ({"old.json": {**CARD, "schema": "layercard/0"}}, ["old.json"], "layercard/0", CardError),
        ({"r/run.json": {"schema": "layercard-run/0"}}, ["card.json", "r"], "layercard-run/0", TrainingError),
        ({"r/run.json": {"schema": "layercard-run/1"}}, ["card.json", "r"], "started: Field required", TrainingError),
        ({"x.json": {"schema": "else/1"}}, ["card.json", "x.json"], "not one of a report's", ReportError),
        ({"r/run.json": '{"schema": "layerc'}, ["card.json", "r"], "truncated", ReportError),
        ({}, ["card.json", "missing.json"], "no such file", ReportError),
        ({"t.json": '{"title": "t", "columns": ["a"], "rows": [[NaN]]}'}, ["card.json", "t.json"], "t.json holds NaN", ReportError),
        ({"t.json": '{"title": "t", "columns": ["a"], "rows": [[1e999]]}'}, ["card.json", "t.json"], "infinite number", ReportError),
    ],
)
def test_files_that_make_no_report_are_one_line(
    files: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    contents: dict[str, Any],
    arguments: list[str],
    words: str,
    error: type[LayercardError],
) -> None:
    for name, value in {"card.json": CARD, **contents}.items():
        files(name, value)
    (tmp_path / "runs").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(words)):
        read_sources([Path(name) for name in arguments])
    assert run(["report", *arguments, "-o", "r.html"]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    assert not Path("r.html").exists()


def test_the_commands_write_and_print(
    files: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    card = costed(fake_card(6))
    files("card.json", card)
    files("placement.json", fake_placement(card, [3]))
    files("figures.json", {"gpu_price_per_hour": 4, "runs_per_month": 10, "hours_per_run": 2})
    figures = ["--inputs", "figures.json", "--set", "gpu_price_per_hour=5"]
    assert run(["report", "card.json", "placement.json", *figures, "-o", "r.html"]) == 0
    text = Path("r.html").read_text(encoding="utf-8")
    assert 'value="5"' in text and "layercard report card.json placement.json -o r.html" in text
    assert "Performance kept against step time" in text
    capsys.readouterr()
    assert run(["roi", "card.json", "placement.json", *figures, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["schema"] == "layercard-roi/1"
    assert value["results"]["training_saved"]["mid"] == pytest.approx(100 * (1 - value["ratios"]["time"]["mid"]))
    assert run(["roi", "card.json", "placement.json", "-o", "roi.json"]) == 0
    assert "Saved a month" in capsys.readouterr().out
    for wrong, words in (
        (["roi", "card.json"], "no placement"),
        (["roi", "card.json", "placement.json", "--set", "gpus"], "NAME=VALUE"),
        (["roi", "card.json", "placement.json", "--set", "gpu=2"], "did you mean gpus"),
        (["roi", "card.json", "placement.json", "-o", "roi.json"], "exists already"),
        (["report", "card.json", "-o", "r.pdf"], ".html"),
        (["report", "card.json", "-o", "r.html"], "exists already"),
    ):
        assert run(wrong) == 2
        assert words in capsys.readouterr().err
