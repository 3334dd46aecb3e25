"""`layercard plan`: what a training has to compute, what that is forecast to take, and the command; and recommended learning rates."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from layercard.adapters.apply import place
from layercard.commands.main import run
from layercard.cost.devices import DEVICES, device_named
from layercard.cost.measure import measure_cost, random_batch
from layercard.cost.model import ModuleCost
from layercard.cost.training import TrainingPlan, Workload, forecast_training, heaviest_batch, order_of, workload
from layercard.data.load import Dataset, batches, collate, load_data
from layercard.errors import CardError, PlacementError
from layercard.fast.fast_training import fast_training
from layercard.models.load import BaseModel
from layercard.models.module_sets import MODULE_SETS, module_set
from layercard.selection.learning_rate import Length, moved, recommended, usual_rate
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.training.train import train
from layercard.workflow.plan import plan_here
from test_cost import measured
from test_cost_command import printed
from tiny import VOCAB, build_tiny, tiny_records, write_records

SETTINGS = TrainSettings(rank=2, epochs=2, batch_size=3, save_steps=0)


@pytest.fixture
def data(tiny_base: BaseModel, tmp_path: Path) -> Dataset:
    return load_data(str(write_records(tmp_path / "train.jsonl", tiny_records(10))), tiny_base.tokenizer)


@pytest.fixture
def valid(tiny_base: BaseModel, tmp_path: Path) -> Dataset:
    return load_data(str(write_records(tmp_path / "valid.jsonl", tiny_records(6, 20))), tiny_base.tokenizer)


def test_a_workload_is_what_the_batches_of_a_training_hold(tiny_base: BaseModel, data: Dataset, valid: Dataset) -> None:
    work = workload(data, SETTINGS, valid)
    drawn = [data.examples[row] for row in order_of(data, SETTINGS)]
    parts = list(batches(drawn, 3, tiny_base.pad_id))
    assert (work.steps, work.records, work.epochs, work.evaluations) == (len(parts), 10, 2.1, 2)
    assert work.padded_tokens == pytest.approx(sum(part.input_ids.numel() for part in parts) / len(parts))
    assert work.tokens == pytest.approx(sum(int(part.attention_mask.sum()) for part in parts) / len(parts))
    assert work.seen_first == pytest.approx(data.tokens / (work.steps * work.tokens))
    assert work.labelled_tokens == pytest.approx(sum(example.labelled for example in drawn) / len(parts))
    assert work.held_out_tokens == next(batches(valid.examples, 16, 0)).input_ids.numel()
    assert work.cached_tokens == data.tokens + valid.tokens
    longest = max(len(data.examples[row].input_ids) for row in heaviest_batch(data, SETTINGS))
    assert longest == max(part.input_ids.shape[1] for part in parts[1:])


WORK = Workload(
    steps=10, records=20, batch_size=4, tokens=128, padded_tokens=256, labelled_tokens=50, seen_first=0.5, epochs=2, cached_tokens=640
)


def test_later_epochs_are_spared_the_frozen_blocks() -> None:
    cost = measured().model_copy(update={"fast": True, "real_tokens": 128})
    layers, head = [3, 5], (cost.head_forward_seconds + cost.head_backward_seconds) / 2
    trained = sum(layer.forward_seconds + layer.backward_seconds for layer in cost.layers[3:]) + sum(
        cost.layers[layer].adapter_seconds for layer in layers
    )
    frozen = cost.embedding_seconds + sum(layer.forward_seconds for layer in cost.layers[:3])
    row = forecast_training(cost, WORK, layers, width=8)
    assert row.later_step_seconds == pytest.approx(trained + head + cost.overhead_seconds)
    assert row.first_step_seconds == pytest.approx(row.later_step_seconds + frozen)
    assert row.train_seconds == pytest.approx(5 * row.first_step_seconds + 5 * row.later_step_seconds)
    assert row.cache_bytes == 640 * 8 * 4
    streamed = forecast_training(cost, WORK, layers, stream=True, width=8)
    assert streamed.train_seconds == pytest.approx(10 * row.later_step_seconds)
    assert streamed.pass_seconds == pytest.approx(frozen * 5)
    once = forecast_training(cost, WORK.model_copy(update={"epochs": 1.0, "seen_first": 1.0}), layers, width=8)
    assert once.train_seconds == pytest.approx(10 * row.first_step_seconds) and once.cache_bytes == 0


def test_stock_training_computes_padding_and_all_blocks_in_every_epoch() -> None:
    cost = measured()
    row = forecast_training(cost, WORK, [5], width=8)
    every = cost.step_time([5]) - (cost.head_forward_seconds + cost.head_backward_seconds) / 2
    assert row.train_seconds == pytest.approx(10 * every) and not row.fast and row.cache_bytes == 0


def test_sets_of_modules_share_a_layer_out(tiny_base: BaseModel) -> None:
    cost = measure_cost(tiny_base, random_batch(VOCAB, 2, 16), rank=2, repeats=1)
    parts = {name: cost.with_modules(name) for name in MODULE_SETS}
    for layer, block in enumerate(tiny_base.blocks):
        times = {name: part.layers[layer].adapter_seconds for name, part in parts.items()}
        assert times["mlp"] + times["attention"] == pytest.approx(times["all"])
        assert 0 < times["down"] < times["out"] < times["all"]
        for name, part in parts.items():
            chosen = module_set(block.linear_modules, name)
            assert part.layers[layer].adapter_parameters == 2 * sum(each.in_features + each.out_features for each in chosen)
    with pytest.raises(PlacementError, match="'mpl' is unknown"):
        cost.with_modules("mpl")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("layers", "modules"), [((0, 1, 2), "all"), ((2,), "all"), ((1, 2), "mlp"), ((0, 1, 2), "attention")])
def test_forecast_memory_is_that_of_the_run(
    tiny_base: BaseModel, data: Dataset, tmp_path: Path, layers: tuple[int, ...], modules: str, fast: bool
) -> None:
    heaviest = collate(data.examples, heaviest_batch(data, SETTINGS), tiny_base.pad_id)
    around = partial(fast_training, settings=FastSettings(prefix_cache=False)) if fast else None
    cost = measure_cost(tiny_base, heaviest, rank=2, repeats=1, around=around)
    row = forecast_training(cost, workload(data, SETTINGS), layers, modules=modules)
    how = FastSettings(prefix_cache=False) if fast else FastSettings.baseline()
    placement = place(tiny_base, layers, modules=modules)
    trained = train(tiny_base, placement, data, tmp_path / "run", replace(SETTINGS, learning_rate=1e-3), fast=how)
    # A set of modules shares out what all of them keep, which is nearer for larger models (benchmarks/plan_forecast.py).
    assert row.memory_bytes == pytest.approx(trained.peak_memory_bytes, rel=0.1 if modules == "all" else 0.2 if fast else 0.3)


def test_a_plan_has_stock_training_first_and_streamed_rows(tiny_base: BaseModel, data: Dataset, valid: Dataset) -> None:
    plan = plan_here(tiny_base, data, SETTINGS, valid=valid, placement=place(tiny_base, (1, 2)), price_per_hour=3600.0)
    names = [(row.name, row.stream) for row in plan.rows]
    assert names[:3] == [("all layers, stock", False), ("all layers", False), ("all layers, MLP", False)]
    assert ("the placement", False) in names and ("the placement", True) in names
    assert all(row.seconds > 0 and row.memory_bytes > 0 for row in plan.rows) and plan.source == "measured"
    assert plan.price(plan.rows[1]) == pytest.approx(plan.rows[1].seconds)
    assert TrainingPlan.from_json(plan.to_json()) == plan


def test_the_command(tiny_folder: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, how = tmp_path / "plan.json", ("--rank", 2, "--epochs", 2, "--device", "cpu")
    status, out, err = printed(capsys, "plan", tiny_folder, "--data", tiny_file, "--valid", tiny_file, *how, "-o", path)
    assert (status, err) == (0, "")
    for word in ("8 steps", "2 epochs over 16 records", "2 evaluations", "measured on", "all layers, stock", "MLP", "yes"):
        assert word in " ".join(out.split()), out
    assert TrainingPlan.load(path).workload.steps == 8
    status, out, err = printed(capsys, "plan", tiny_folder, "--data", tiny_file, *how, "--device-rates", "rtx 4090", "--json")
    value = json.loads(out)
    assert (value["source"], value["margin"], value["memory_bytes"]) == ("rates", 2.5, 24_000_000_000)
    assert all(row["fits"] for row in value["rows"])


def test_a_shape_without_weights(tiny_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    build_tiny("llama").config.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    status, out, _ = printed(capsys, "plan", config, "--data", tiny_file, "--device-rates", "T4", "--price", 0.5)
    assert status == 0 and "tokens are counted with the tokenizer of smollm2-135m" in " ".join(out.split())
    assert "may be off by a factor of 2.5" in " ".join(out.split()) and "Price" in out


def test_what_cannot_be_planned(tiny_folder: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = printed(capsys, "plan", tiny_folder, "--data", tiny_file, "--device-rates", "H1000")
    assert status == 2 and "device 'H1000' is not in the table" in err and "H100" in err
    other = place_of_depth(5).save(tmp_path / "other.json")
    status, _, err = printed(capsys, "plan", tiny_folder, "--data", tiny_file, "--device-rates", "H100", "--placement", other)
    assert status == 2 and "the placement is for 5 layers and" in err


def place_of_depth(depth: int) -> Placement:
    """A placement of the last layer of a model of so many."""
    return Placement(model={"layers": depth}, layers=(depth - 1,), paths=(f"model.layers.{depth - 1}.mlp.up_proj",), objective="given")


def test_devices_are_known_however_they_are_spelt() -> None:
    assert device_named("NVIDIA GeForce RTX 3090") is DEVICES["RTX3090"] and device_named("m1 max") is DEVICES["M1-Max"]
    assert all(device.tflops > 1 and device.bandwidth > 100 and device.memory >= 16 and device.source for device in DEVICES.values())
    with pytest.raises(CardError):
        device_named("")


def test_a_module_has_as_many_weights_as_its_shape() -> None:
    module = ModuleCost(in_features=3, out_features=5, experts=2)
    assert (module.weights, module.adapter_weights) == (30, 16)


# ---- learning rates


def test_the_rule_falls_with_steps_width_and_rank_and_rises_with_fewer_layers() -> None:
    usual = Length(500)
    rate = usual_rate(576, usual)
    assert usual_rate(576, usual, 0.2) > rate
    assert rate > max(
        usual_rate(576, Length(2000)), usual_rate(576, Length(500, 3)), usual_rate(1024, usual), usual_rate(576, usual, rank=32)
    )


def test_a_placement_has_its_own_rate_moved_to_the_steps_of_the_run() -> None:
    placement = place_of_depth(4)
    rate, source = recommended(placement, 576, Length(100))
    assert rate == pytest.approx(usual_rate(576, Length(100), 0.25), rel=0.01) and source == "from the rule for 100 steps"
    raced = placement.changed(learning_rate=0.002, learning_rate_steps=400, learning_rate_source="race")
    assert recommended(raced, 576, Length(400)) == (0.002, "from the race")
    rate, source = recommended(raced, 576, Length(100))
    assert rate == pytest.approx(moved(0.002, Length(400), Length(100)), rel=0.01) and source == "from the race, moved to 100 steps"


def test_training_takes_the_recommended_rate(
    tiny_folder: Path, tiny_file: Path, tiny_base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place(tiny_base, (2,)).changed(learning_rate=0.01, learning_rate_steps=2, learning_rate_source="race").save(tmp_path / "p.json")
    how = ("--data", tiny_file, "--placement", path, "--steps", 2, "--rank", 2, "--device", "cpu")
    status, out, _ = printed(capsys, "train", tiny_folder, *how, "-o", tmp_path / "a", "--learning-rate", "auto")
    assert status == 0 and "0.01, from the race" in out
    assert json.loads((tmp_path / "a" / "run.json").read_text())["settings"]["learning_rate"] == 0.01
    status, out, _ = printed(capsys, "train", tiny_folder, *how, "-o", tmp_path / "b", "--learning-rate", "0.02")
    assert status == 0 and "0.02, given" in out
    status, _, err = printed(capsys, "train", tiny_folder, *how, "-o", tmp_path / "c", "--learning-rate", "fast")
    assert status == 2 and "--learning-rate 'fast' is not a number; give one, or auto" in err
    assert run(["train", "--help"]) == 0


def test_the_rehearsal_of_the_gpu_benchmark_runs_every_part(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(root / "benchmarks" / "gpu.py"), "--rehearse", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads(output.read_text())["parts"]
    failed = {name: part["failed"] for name, part in parts.items() if "failed" in part}
    assert failed.keys() == {"forecast"}, failed  # this CPU has no published rates
    assert parts["profile"]["records"] == 8 and set(parts["attention"]) >= {"sdpa", "eager"}
    for name in ("all layers", "last 5", "chosen"):
        assert all(parts[f"{trainer}, {name}"]["seconds"] > 0 for trainer in ("PEFT", "TRL", "ours"))
    # Checkpointing, which TRL's trainer switches on, is off again: five layers keep less than all of them, and about five sixths.
    assert 0.7 < parts["PEFT, last 5"]["bytes"] / parts["PEFT, all layers"]["bytes"] < 1
