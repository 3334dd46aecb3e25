"""The report page: its parts, its numbers, its size, text that stays text, and files that do not fit together."""

import hashlib
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cards import fake_card, fake_comparison, fake_placement
from layercard.commands.main import run
from layercard.cost.model import CostModel
from layercard.errors import CardError, LayercardError, ReportError, TrainingError
from layercard.records import Estimate
from layercard.report import page as report
from layercard.report.page import front_page, report_page
from layercard.report.roi import RoiInputs, ratios_of, roi
from layercard.report.sources import Sources, read_sources
from layercard.report.trials import compared, grouped, of_bench, of_comparison, of_run, plain_name
from layercard.report.words import amount, measured
from layercard.selection.pareto import pareto

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
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


def full(depth: int = 12, cards: int = 2) -> Sources:
    """Everything a report can be made from: cards with cost, two placements, a comparison, a front and a transfer."""
    from layercard.card.card import LayerCard
    from layercard.selection.transfer import transfer

    found = Sources(cards={f"card{at}": LayerCard.from_json(costed(fake_card(depth, at))).to_json() for at in range(cards)})
    card, every = found.card, list(range(depth))
    found.placements = {"mine": fake_placement(card, [1, depth // 2]), "other": fake_placement(card, [0])}
    placements = {"mine": [1, depth // 2], **{f"p{at}": every[at : at + 3] for at in range(2, min(12, depth))}, "all": every}
    found.comparisons = [fake_comparison(card, placements)]
    found.trials = compared(of_comparison(found.comparisons[0]))
    loaded = [(name, LayerCard.from_json(value)) for name, value in found.cards.items()]
    found.front = pareto(loaded[0][1]).to_json()
    found.transfer = transfer(loaded, k=3).to_json() if cards > 1 else None
    found.tables = [{"title": "a table", "columns": ["strategy", "time"], "rows": [["all", 1.5], ["one", None]], "command": "make it"}]
    return found


@pytest.fixture(scope="module")
def whole() -> tuple[Sources, str]:
    sources = full()
    return sources, report_page(sources, commands=["layercard profile a"])


def test_every_part_is_there_and_nothing_is_missing(whole: tuple[Sources, str]) -> None:
    page = Reader(whole[1])
    plots = {str(attrs["id"]) for attrs in page.with_tag("div") if attrs.get("class") == "plot"}
    assert plots == set(page.figures)
    assert {"plot-resnorm", "plot-gain_estimate", "plot-coupling", "plot-card", "plot-cost-time", "plot-cost-reach"} <= plots
    assert {"plot-front-time", "plot-front-memory", "plot-trade-off", "plot-transfer-plot"} <= plots
    assert "Not in this report" not in whole[1]
    topics = [text for text in ("Theoretical framework</h2>", "Layer Card</h2>", "trade-offs</h2>", "investment</h2>") if text in whole[1]]
    assert len(topics) == 4
    steps = re.findall(r'<p class="title">.*?</span>([\w ]+) <span class="state">(\w+)', whole[1])
    assert [name for name, _ in steps] == ["Frozen base", "Local quadratic model", "Layer Card", "Placement", "Adapter"]
    assert {state for _, state in steps} == {"done"}


def test_numbers_are_those_of_the_files(whole: tuple[Sources, str]) -> None:
    sources, text = whole
    page, card, rows = Reader(text), sources.card, sources.comparisons[0]["rows"]
    columns = [measure.key for measure in measured(card)]
    table = next(values for caption, values in page.values.items() if caption.startswith("Every layer"))
    assert table == [layer[key]["value"] if isinstance(layer[key], dict) else layer[key] for layer in card["layers"] for key in columns]
    line = page.figures["plot-gain_estimate"]["data"]
    assert line[1]["y"] == [layer["gain_estimate"]["value"] for layer in card["layers"]]
    assert line[2]["x"] == sources.placements["mine"]["layers"]
    assert page.figures["plot-coupling"]["data"][0]["z"] == card["coupling"]
    assert page.figures["plot-transfer-plot"]["data"][0]["z"] == sources.transfer["matrix"]
    shown = {name: at for trace in page.figures["plot-trade-off"]["data"] for name, at in zip(trace["text"], trace["y"], strict=True)}
    kept = {("mine (balanced)" if row["name"] == "mine" else row["name"]): row["performance_kept"]["value"] for row in rows}
    assert shown == pytest.approx(kept | {"all": 100.0})
    points = [100 * point["step_time"]["share"] for point in sources.front["fronts"]["time"]]
    assert page.figures["plot-front-time"]["data"][0]["x"] == points
    assert page.values["Loss reduction by placement and task"][1] == rows[-1]["loss_reduction"]["value"]  # all layers come first


def test_the_calculator_of_the_page_starts_from_pythons_results(whole: tuple[Sources, str]) -> None:
    sources, text = whole
    chosen = sources.placement["layers"]
    found = roi(RoiInputs(), ratios_of(chosen, sources.card, grouped(sources.trials))).results
    shown = {(a["data-result"], a["data-end"]): a.get("data-exact") for a in Reader(text).with_tag("td") if a.get("data-result")}
    assert len(shown) == 3 * len(found)
    for (name, end), value in shown.items():
        assert (None if value is None else float(value)) == getattr(found[name], end)
    assert found["saved_month"].mid > 0
    assert "const layercardRoi" in text and "=&gt;" not in text.partition("const layercardRoi")[2].partition("</script>")[0]


def test_a_page_without_anything_but_a_card_says_how_to_get_the_rest() -> None:
    text = html.unescape(report_page(Sources(cards={"card": fake_card(4)})))
    for command in ("layercard select card.json", "layercard compare", "layercard profile … --cost", "layercard pareto", "-o other.json"):
        assert command in text
    assert text.count("Not in this report") == 7
    no_coupling = {**fake_card(4), "coupling": []}
    assert "This card has no coupling" in report_page(Sources(cards={"card": no_coupling}))


def test_large_input_stays_small() -> None:
    text = report_page(full(64))
    assert len(text.encode()) < 3_000_000
    assert len(Reader(text).figures["plot-coupling"]["data"][0]["z"]) == 64


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


def test_hostile_text_stays_text() -> None:
    sources = full(depth=6)
    card = sources.card
    card["model"]["name"] = card["data"]["source"] = card["settings"]["ridge"] = card["units"]["resnorm"] = EVIL
    card["warnings"] = [EVIL]
    card["cost"]["device"] = EVIL
    placement = {**fake_placement(card, [1]), "objective": EVIL, "reasons": {"1": EVIL}}
    sources.placements = {EVIL: placement}
    comparison = fake_comparison(card, {EVIL: [2], "all": list(range(6))})
    sources.comparisons, sources.trials = [comparison], compared(of_comparison(comparison))
    sources.front["baselines"][0]["name"] = f"last-{EVIL}"
    sources.transfer["cards"][0]["name"] = sources.transfer["pairs"][0]["verdict"]["reason"] = EVIL
    sources.tables = [{"title": EVIL, "columns": [EVIL], "rows": [[EVIL]]}]
    text = report_page(sources, inputs=RoiInputs(currency="€"), commands=[EVIL])
    assert EVIL not in text
    page = Reader(text)
    assert not page.with_tag("img")
    assert html.escape(EVIL, quote=False)[:20] in text
    for figure in page.figures.values():  # plotly reads markup in text, so it must be escaped there as well
        for trace in figure["data"]:
            assert "<img" not in json.dumps([trace.get("hovertext"), trace.get("name"), trace.get("x"), trace.get("y")])


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


def bench_record(card: dict[str, Any], layers: list[int], split: str = "test") -> dict[str, Any]:
    return {
        "schema": "layercard-bench-run/1",
        "run_info": {"task": "e2e", "layers": layers, "train_config": {"seed": 1, "rank": 8}},
        "train_info": {
            "train_time": 9.0,
            "frozen_prefix_kept": True,
            "num_trainable_params": 5,
            "file_size": 7,
            "metrics": {"split": split, "loss_reduction": 1.0, "reduction_standard_error": 0.1},
            "peak_memory_bytes": 100,
        },
        "meta_info": {"model_info": card["model"], "system_info": {"machine": "x86", "threads": 1}},
    }


def test_runs_compare_with_all_layers_of_their_seed() -> None:
    card = fake_card(4)
    trials = compared([of_run(run_record(card, [1], 30.0, 6.0)), of_run(run_record(card, [0, 1, 2, 3], 60.0, 4.0))])
    one, every = trials
    assert (one.time_share, every.time_share) == (50.0, 100.0)
    assert one.performance_kept.value == pytest.approx(100 * 12 / 18)
    assert one.performance_kept.low < one.performance_kept.value < one.performance_kept.high
    assert one.memory_of_all == 4000
    other_seed = compared([of_run(run_record(card, [1], 30.0, 6.0, seed=5)), of_run(run_record(card, [0, 1, 2, 3], 60.0, 4.0))])[0]
    assert (other_seed.performance_kept, other_seed.time_share) == (None, None)


def test_timings_that_runs_share_count_once() -> None:
    card = fake_card(4)
    runs = [of_bench(bench_record(card, [2])), of_bench(bench_record(card, [0, 1, 2, 3]))]
    assert of_bench(bench_record(card, [1], split="valid")) is None
    assert runs[0].seconds is None  # part of its forward pass was stored
    again = [trial for trial in compared([*runs, *runs], {("e2e", (2,), 8): 40.0}) if trial.layers == (2,)]
    row = grouped(again)[0]
    assert (row.timings, row.time_share, row.name) == (1, Estimate(value=40.0), "middle 1")
    assert plain_name([0, 1, 2, 3], 4) == "all"


def test_ratios_say_what_they_come_from() -> None:
    card = costed(fake_card(6))
    measured = ratios_of([3, 4], card)
    assert measured.time.measured and measured.memory.measured and measured.latency.measured
    assert measured.time.low < measured.time.mid < measured.time.high < 1
    assert measured.adapter_size.mid == pytest.approx(1 / 3)
    guessed = ratios_of([3, 4], costed(fake_card(6), "rates"))
    assert not guessed.time.measured and not guessed.latency.measured and guessed.run_memory_gb is None
    assert roi(RoiInputs(), guessed).results["training_saved"].high == 0
    nothing = ratios_of([3, 4])
    assert not nothing.adapter_size.measured and nothing.time.mid == 1
    comparison = fake_comparison(card, {"mine": [3, 4], "all": list(range(6))})
    trained = ratios_of([3, 4], card, grouped(compared(of_comparison(comparison))))
    assert trained.time.mid == pytest.approx(comparison["rows"][0]["time_share"] / 100)
    assert "timed" in trained.time.source
    on_a_cpu = {**card, "cost": {**card["cost"], "threads": 2}}
    assert ratios_of([3], on_a_cpu).adapter_latency_ms is None


def test_amounts_are_short() -> None:
    assert [amount(value) for value in (0.0, -3.456, 99999.0)] == ["0", "-3.46", "99,999"]


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
        ({"r/run.json": {"schema": "layercard-run/0"}}, ["card.json", "r"], "layercard-run/0", ReportError),
        ({"r/run.json": {"schema": "layercard-run/1"}}, ["card.json", "r"], "started: Field required", TrainingError),
        ({"x.json": {"schema": "else/1"}}, ["card.json", "x.json"], "not one of a report's", ReportError),
        ({"r/run.json": '{"schema": "layerc'}, ["card.json", "r"], "truncated", ReportError),
        ({}, ["card.json", "missing.json"], "no such file", ReportError),
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
