"""Placements side by side: fair, paired, resumable."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layercard.adapters.apply import place
from layercard.data.load import Dataset, load_data
from layercard.errors import DataError, OutputError, PlacementError, TrainingError
from layercard.models.load import BaseModel
from layercard.selection.placement import Placement
from layercard.settings import TrainSettings
from layercard.training.train import train
from layercard.trials import trial as trial_module
from layercard.trials.compare import compare
from test_adapters import assert_same, base_of, state_of
from tiny import tiny_records, write_records

SETTINGS = TrainSettings(rank=2, steps=5, batch_size=2, learning_rate=1e-2, warmup_ratio=0.0, save_steps=2)


@pytest.fixture
def data(tiny_base: BaseModel, tmp_path: Path) -> Dataset:
    return load_data(str(write_records(tmp_path / "train.jsonl", tiny_records(10))), tiny_base.tokenizer)


@pytest.fixture
def valid(tiny_base: BaseModel, tmp_path: Path) -> Dataset:
    return load_data(str(write_records(tmp_path / "valid.jsonl", tiny_records(6, 20))), tiny_base.tokenizer)


@pytest.fixture
def placements(tiny_base: BaseModel) -> list[tuple[str, Placement]]:
    return [("last:1", place(tiny_base, [2])), ("all", place(tiny_base, range(3)))]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that `compare` really trains in from now on, the warm-up left out."""
    trained: list[str] = []
    original: Callable[..., Any] = train

    def counting(base: Any, placement: Any, data: Any, output: Path, *args: Any, **kwargs: Any) -> Any:
        fresh = not (Path(output) / "run.json").exists()
        record = original(base, placement, data, output, *args, **kwargs)
        if fresh and Path(output).name != "run":
            trained.append(Path(output).name)
        return record

    monkeypatch.setattr(trial_module, "train", counting)
    return trained


def test_rows_agree_with_runs_and_all_is_the_measure(
    tiny_base: BaseModel, data: Dataset, valid: Dataset, placements: list[tuple[str, Placement]], tmp_path: Path
) -> None:
    before = state_of(tiny_base.model)
    calls: list[str] = []
    result = compare(
        tiny_base, placements, data, valid, SETTINGS, output=tmp_path / "out", progress=lambda phase, done, total: calls.append(phase)
    )
    assert_same(before, state_of(tiny_base.model))
    last, whole = result.rows
    assert (last.name, last.layers, last.layers_in_backward) == ("last:1", (2,), "1/3")
    assert whole.performance_kept is not None
    assert whole.performance_kept.model_dump() == {"value": pytest.approx(100.0), "low": pytest.approx(100.0), "high": pytest.approx(100.0)}
    assert whole.time_share == 100.0
    kept = last.performance_kept
    assert kept is not None
    reduction = last.loss_reduction
    assert kept.value == pytest.approx(100 * reduction.value / whole.loss_reduction.value)
    for estimate in (kept, reduction):
        assert estimate.low is not None and estimate.high is not None and estimate.low <= estimate.value <= estimate.high
    assert last.trainable_parameters * 3 == whole.trainable_parameters
    assert last.adapter_bytes < whole.adapter_bytes
    assert last.peak_memory_bytes < whole.peak_memory_bytes
    run = json.loads((tmp_path / "out" / "last-1" / "run.json").read_text())
    assert run["loss_reduction"] == pytest.approx(reduction.value)
    assert run["loss_reduction_interval"] == pytest.approx([reduction.low, reduction.high])
    assert run["train_seconds"] == last.train_seconds
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert saved == json.loads(json.dumps(result.to_json()))
    assert saved["schema"] == "layercard-compare/1"
    assert saved["rows"][0]["layers"] == [2]
    assert {"loss before", "compare", "last:1: train", "all: loss after"} <= set(calls)


def test_each_run_is_the_one_that_train_gives(
    tiny_base: BaseModel, data: Dataset, valid: Dataset, placements: list[tuple[str, Placement]], tmp_path: Path
) -> None:
    compare(tiny_base, placements, data, valid, SETTINGS, output=tmp_path / "out")
    alone = train(tiny_base, placements[1][1], data, tmp_path / "alone", SETTINGS, valid=valid)
    run = json.loads((tmp_path / "out" / "all" / "run.json").read_text())
    for key in ("losses", "loss_before", "loss_after", "peak_memory_bytes", "tokens_seen"):
        assert run[key] == getattr(alone, key), key


def test_resume_keeps_what_is_finished_and_goes_on_with_the_rest(
    tiny_base: BaseModel,
    data: Dataset,
    valid: Dataset,
    placements: list[tuple[str, Placement]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = compare(tiny_base, placements, data, valid, SETTINGS)
    trained = counted(monkeypatch)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "all: train" and done == 4:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare(tiny_base, placements, data, valid, SETTINGS, output=out, progress=stop)
    assert trained == ["last-1"]
    assert not (out / "compare.json").exists()
    with pytest.raises(OutputError, match="finished run"):
        compare(tiny_base, placements, data, valid, SETTINGS, output=out)
    resumed = compare(tiny_base, placements, data, valid, SETTINGS, output=out, resume=True)
    assert trained == ["last-1", "all"]
    for row, expected in zip(resumed.rows, undisturbed.rows, strict=True):
        timed = {"train_seconds", "time_share", "curve", "phases", "started", "fast"}
        assert row.model_dump(exclude=timed) == expected.model_dump(exclude=timed)
    again = compare(tiny_base, placements, data, valid, SETTINGS, output=out, resume=True)
    assert trained == ["last-1", "all"]
    assert again == resumed
    more = [*placements, ("first", place(tiny_base, [0]))]
    assert len(compare(tiny_base, more, data, valid, SETTINGS, output=out, resume=True).rows) == 3
    assert trained == ["last-1", "all", "first"]
    compare(tiny_base, placements, data, valid, replace(SETTINGS, seed=1), output=out, force=True)
    assert trained == ["last-1", "all", "first"]  # replaced, not new


def test_a_finished_comparison_is_never_lost(
    tiny_base: BaseModel, data: Dataset, valid: Dataset, placements: list[tuple[str, Placement]], tmp_path: Path
) -> None:
    out, few = tmp_path / "out", replace(SETTINGS, steps=2)
    compare(tiny_base, placements[:1], data, valid, few, output=out)
    finished = (out / "compare.json").read_bytes()

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "last:1: train":
            raise KeyboardInterrupt

    harmful = replace(few, learning_rate=1e30, max_grad_norm=0.0)
    for refused, settings, how in (
        (OutputError, few, {}),  # exists already
        (OutputError, few, {"resume": True, "force": True}),
        (TrainingError, replace(few, seed=1), {"resume": True}),  # another run
        (TrainingError, harmful, {"force": True}),
        (KeyboardInterrupt, few, {"force": True, "progress": stop}),
    ):
        with pytest.raises(refused):
            compare(tiny_base, placements[:1], data, valid, settings, output=out, **how)
        assert (out / "compare.json").read_bytes() == finished, how


def test_without_all_layers_nothing_is_kept_of_them_and_without_output_nothing_is_left(
    tiny_base: BaseModel, data: Dataset, valid: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = sorted(tmp_path.iterdir())
    result = compare(tiny_base, [("a", place(tiny_base, [1]))], data, valid, replace(SETTINGS, steps=2))
    assert result.rows[0].performance_kept is None
    assert result.rows[0].time_share is None
    assert sorted(tmp_path.iterdir()) == before


def test_training_that_does_harm_keeps_no_performance(tiny_base: BaseModel, data: Dataset, valid: Dataset) -> None:
    wrong = [replace(example, labels=tuple(-100 if label == -100 else 100 for label in example.labels)) for example in data.examples]
    harmful = replace(data, examples=tuple(wrong))
    row = compare(tiny_base, [("all", place(tiny_base, range(3)))], harmful, valid, replace(SETTINGS, steps=20)).rows[0]
    assert row.loss_reduction.value < 0
    assert row.performance_kept is None


def test_bad_placements_are_refused_before_anything_is_trained(
    tiny_base: BaseModel, data: Dataset, valid: Dataset, placements: list[tuple[str, Placement]], tmp_path: Path
) -> None:
    with pytest.raises(PlacementError, match="no placement"):
        compare(tiny_base, [], data, valid, SETTINGS)
    with pytest.raises(PlacementError, match="share the folder 'last-1'"):
        compare(tiny_base, [*placements, ("last-1.json", placements[0][1])], data, valid, SETTINGS)
    with pytest.raises(PlacementError, match="with other weights"):
        compare(tiny_base, [*placements, ("other", place(base_of("gpt2"), [1]))], data, valid, SETTINGS, output=tmp_path / "out")
    with pytest.raises(DataError, match="to measure on"):
        compare(tiny_base, placements, data, replace(valid, examples=()), SETTINGS)
    assert not (tmp_path / "out").exists()


def test_global_randomness_does_not_matter(tiny_base: BaseModel, data: Dataset, valid: Dataset) -> None:
    placement = [("a", place(tiny_base, [1]))]
    first = compare(tiny_base, placement, data, valid, replace(SETTINGS, dropout=0.2, steps=3))
    torch.manual_seed(99)
    second = compare(tiny_base, placement, data, valid, replace(SETTINGS, dropout=0.2, steps=3))
    assert first.rows[0].loss_reduction == second.rows[0].loss_reduction
