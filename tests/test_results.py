"""The gain estimate against gains that were really trained: the runs and cards in `benchmarks/results/`."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cards import fake_card
from layercard.card.card import LayerCard
from layercard.statistics.coverage import gain_estimate, similarity
from layercard.statistics.ranks import spearman

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.mark.parametrize("task", ["e2e", "gsm8k"])
def test_gain_estimate_ranks_layers_as_training_does(task: str) -> None:
    runs = [json.loads(path.read_text()) for path in sorted((RESULTS / "single_layer").glob(f"{task}-layer*-seed0.json"))]
    layers, gains = [run["layer"] for run in runs], np.array([run["gain"] for run in runs])
    assert len(layers) >= 12
    card = LayerCard.load(RESULTS / "cards" / f"{task}-64.json")
    assert {run["model"]["fingerprint"] for run in runs} == {card.model.fingerprint}
    estimate = gain_estimate(similarity(card.coupling), card.values("step_probe"))
    assert estimate == pytest.approx(np.array(card.values("gain_estimate")), rel=1e-6)  # what the card says is what the code computes
    found = spearman(estimate[layers], gains)
    assert found >= 0.85
    for other in ("resnorm", "gradient_norm", "predicted_gain"):
        assert found > spearman(np.array(card.values(other))[layers], gains)


def test_set_models_grow_with_the_set_and_know_single_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    models = importlib.import_module("set_gain").SET_MODELS
    card = LayerCard.from_json(fake_card(9))
    for name, make in models.items():
        value = make(card)
        assert value([2, 6]) == pytest.approx(value([6, 2])), name
        assert value(range(9)) >= value([4]) > 0, name
    assert models["quadratic"](card)([3]) == pytest.approx(0.5 * card.descent[3] ** 2 / card.curvature[3])
    assert models["sum of step probes"](card)([1, 3]) == pytest.approx(card.values("step_probe")[1] + card.values("step_probe")[3])


@pytest.mark.parametrize(
    ("script", "arguments", "results"),
    [
        ("calibration", ["--check"], {"calibration", "set_models"}),
        (
            "placements",
            ["--tables"],
            {"placements_table", "equal_parameters_table", "budgets_table"}
            | {f"trade_off_{task}" for task in ("all", "e2e", "webnlg", "gsm8k")},
        ),
        ("transfer", [], {"transfer_matrix", "transfer_swaps"}),
        ("time_to_quality", ["--tables"], {"time_to_quality"}),
        ("race_constants", [], {"race_constants"}),
        pytest.param("set_gain", [], {"set_gain"}, marks=pytest.mark.slow),
        pytest.param("rank_agreement", [], {"rank_agreement"}, marks=pytest.mark.slow),
    ],
)
def test_committed_results_follow_from_the_runs(
    script: str, arguments: list[str], results: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", [script, *arguments])
    module = importlib.import_module(script)
    made: dict[str, tuple[str, list[str], list[list[Any]]]] = {}
    monkeypatch.setattr(module, "report", lambda name, title, columns, rows, **more: made.update({name: (title, columns, rows)}))
    for name, instead in {
        "data_folder": lambda: "../shared/data",  # as in the runs' settings; nothing is read there
        "load_model": lambda *_: None,
        "measure": lambda *_: None,
    }.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, instead)
    monkeypatch.setattr("layercard.trials.tasks.load_model", lambda *_, **__: pytest.fail("a run is missing"))
    module.main()
    assert set(made) == results
    for name, (title, columns, rows) in made.items():
        committed = json.loads((RESULTS / f"{name}.json").read_text())
        assert (committed["title"], committed["columns"]) == (title, columns)
        assert json.loads(json.dumps(rows)) == [
            [pytest.approx(cell, rel=1e-9) if isinstance(cell, float) else cell for cell in row] for row in committed["rows"]
        ], name


def test_the_curve_of_select_is_the_one_that_the_runs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    calibration = importlib.import_module("calibration")
    committed = json.loads(calibration.CURVE.read_text())
    tasks = [calibration.points_of(task) for task in calibration.TASKS]
    assert np.array(committed["knots"]) == pytest.approx(calibration.fitted(tasks), abs=1e-4)
    assert (committed["below"], committed["above"]) == pytest.approx(calibration.spreads(tasks), abs=1e-3)
    page = (BENCHMARKS.parent / "docs" / "choosing.md").read_text()
    assert f"{sum(len(points.share) for points in tasks)} runs" in page
    held = [f"{100 * share:.0f}" for share, _, _ in calibration.left_out_coverage().values()]
    assert f"held {held[0]}, {held[1]} and {held[2]} % of its runs" in page
    models = {row[0]: row[-2:] for row in json.loads((RESULTS / "set_models.json").read_text())["rows"]}
    for name, words in (
        ("depth kernel", "a mean Spearman of {rank:.2f}"),
        ("coverage from the card", "coverage from the card {rank:.2f}"),
        ("number of layers", "the number of layers {rank:.2f}"),
        ("coverage as `select` uses it", "a blend of both ({rank:.2f})"),
        ("coverage from the card", "is {level} points off"),
        ("depth kernel", "{level} with depth alone"),
    ):
        rank, level = models[name]
        assert words.format(rank=float(rank), level=level) in page, name
    of_cards = (BENCHMARKS.parent / "docs" / "card.md").read_text()
    level, of_depth = models["coverage from the card"][1], models["depth kernel"][1]
    assert f"error of {level} points of all layers' performance, depth alone with {of_depth}" in of_cards


def test_shares_of_the_step_time_err_as_the_page_says() -> None:
    """docs/cost.md: predicted shares of all layers against measured ones."""
    result = json.loads((RESULTS / "cost_model.json").read_text())
    column = {name: number for number, name in enumerate(result["columns"])}
    rows = [row for row in result["rows"] if row[0] != "all"]
    for row in rows:
        assert row[column["error %"]] == pytest.approx(100 * (row[column["predicted s"]] / row[column["s"]] - 1))
    ratios = [100 * (row[column["predicted % of all"]] / row[column["% of all"]] - 1) for row in rows]
    page = (BENCHMARKS.parent / "docs" / "cost.md").read_text()
    assert f"{min(ratios):.1f} to {max(ratios):.1f} % too high (median {np.median(ratios):.1f} %)" in page


def test_the_forecast_of_streamed_training_is_within_a_tenth_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    stream = importlib.import_module("stream_train")
    read = lambda name: json.loads((RESULTS / f"stream_train_{name}.json").read_text())["details"]  # noqa: E731
    runs = [(stream.SHALLOW | {"num_hidden_layers": run["blocks"]}, run) for run in read("memory")["runs"]]
    runs += [(shape, read(part)) for part, shape in stream.SHAPES.items() if (RESULTS / f"stream_train_{part}.json").exists()]
    assert len(runs) >= 4
    for shape, run in runs:
        forecast = stream.forecast(shape, run["trained"], run["batch"])
        assert forecast == pytest.approx(run["peak_process_bytes"], rel=0.1), (run["blocks"], run["trained"])
