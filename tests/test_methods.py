"""Every method by name: planned, trained, interrupted, resumed, saved and loaded, and the base model as before."""

import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from layercard.adapters import start as beginnings
from layercard.adapters.apply import adapted, loaded, place, without_experts
from layercard.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from layercard.adapters.methods import METHODS, configuration
from layercard.adapters.verify import verify_adapter
from layercard.data.load import load_data
from layercard.errors import OutputError, PlacementError, TrainingError
from layercard.fast.lora import fused_lora
from layercard.files import read_json
from layercard.models.adapted import adapted_paths
from layercard.models.embedded import EMBEDDED, HUB_ID, cache_root
from layercard.models.load import BaseModel, wrap_model
from layercard.settings import METHODS as HAS, FastSettings, TrainSettings
from layercard.training.evaluate import held_out_losses
from layercard.training.train import train
from test_adapters import assert_same, base_of, mixture, state_of
from test_processes import TESTS, TORCHRUN, environment
from test_training import assert_equal_adapters, stop_at
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

SETTINGS = TrainSettings(rank=2, steps=4, batch_size=4, accumulation=2, learning_rate=1e-2, warmup_ratio=0.0, save_steps=2)


QUICK = ("dora", "pissa", "eva", "adalora", "ia3")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
"""Every method; those that go a way of their own in the quick tests too."""


def settings_of(method: str, **changes: Any) -> TrainSettings:
    """`SETTINGS` with a method, less what the method does not have."""
    usual = {name: TrainSettings.__dataclass_fields__[name].default for name in ("rank", "alpha", "dropout") if name not in HAS[method]}
    return replace(SETTINGS, **{"method": method, **usual, **changes})


def test_names_and_what_each_method_has_are_said_in_one_place() -> None:
    assert {name: set(has) for name, has in HAS.items()} == {name: set(method.names) for name, method in METHODS.items()}


@pytest.mark.parametrize("method", ALL)
def test_every_method_trains_saves_and_loads(method: str, tiny_base: BaseModel, tiny_file: Path, tmp_path: Path) -> None:
    data = load_data(str(tiny_file), tiny_base.tokenizer)
    placement = place(tiny_base, [1, 2])
    before = state_of(tiny_base.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = train(tiny_base, placement, data, tmp_path / "run", settings_of(method), valid=data)
    assert_same(before, state_of(tiny_base.model))
    assert record.settings["method"] == method
    assert record.layers_in_backward == "2/3"
    assert record.loss_reduction > 0.001
    with loaded(tiny_base, tmp_path / "run") as model:
        assert set(adapted_paths(model)) == set(placement.paths)
        again = held_out_losses(model, tiny_base.pad_id, data)
    assert again.loss == pytest.approx(record.loss_after, abs=1e-5)
    assert_same(before, state_of(tiny_base.model))
    assert verify_adapter(tiny_base.model, tmp_path / "run").as_planned


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name not in ("pissa", "adalora") else name for name in METHODS]
)
def test_an_interrupted_run_of_every_method_goes_on_to_the_same_adapter(
    method: str, tiny_base: BaseModel, tiny_file: Path, tmp_path: Path
) -> None:
    data = load_data(str(tiny_file), tiny_base.tokenizer)
    placement, settings = place(tiny_base, [1, 2]), settings_of(method)
    fast = FastSettings(prefix_cache=False)  # with it a resumed run is the same to rounding
    whole = train(tiny_base, placement, data, tmp_path / "whole", settings, fast=fast)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, placement, data, tmp_path / "cut", settings, fast=fast, progress=stop_at(3))
    resumed = train(tiny_base, placement, data, tmp_path / "cut", settings, fast=fast, resume=True)
    assert resumed.losses == whole.losses
    assert_equal_adapters(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "method", ["vera", "adalora", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in ("vera", "adalora"))]
)
def test_what_is_spared_changes_no_loss(method: str, tiny_base: BaseModel, tiny_file: Path, tmp_path: Path) -> None:
    """VeRA and RandLoRA share matrices between layers; below the lowest adapted one all is frozen even so."""
    data = load_data(str(tiny_file), tiny_base.tokenizer)
    placement, settings = place(tiny_base, [1, 2]), settings_of(method, save_steps=0)
    stock = train(tiny_base, placement, data, tmp_path / "stock", settings, fast=FastSettings.baseline())
    fast = train(tiny_base, placement, data, tmp_path / "fast", settings)
    assert fast.losses == pytest.approx(stock.losses, rel=1e-5, abs=2e-5)
    assert fast.fast["did"]["prefix_cache"].startswith("frozen blocks 1/3")


@pytest.mark.parametrize(("method", "fused"), [("lora", 14), ("rslora", 14), ("pissa", 14), ("dora", 0), ("adalora", 0), ("ia3", 0)])
def test_one_step_computing_is_for_plain_lora_alone(method: str, fused: int, tiny_base: BaseModel) -> None:
    placement = place(tiny_base, [1, 2])
    with adapted(tiny_base, placement, configuration(settings_of(method), 4, placement)) as model, fused_lora(model) as done:
        assert done.fused == fused


@pytest.mark.parametrize(("method", "family"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_what_begins_out_of_the_weights_is_saved_as_plain_lora(method: str, family: str, tiny_file: Path, tmp_path: Path) -> None:
    base = base_of(family)
    data = load_data(str(tiny_file), base.tokenizer)
    placement = place(base, [1])
    with adapted(base, placement, configuration(settings_of(method), 4, placement)) as model:
        module = model.get_base_model().get_submodule(placement.paths[0])
        assert not torch.equal(module.get_base_layer().weight, base_of(family).model.get_submodule(placement.paths[0]).weight)
        at_first = held_out_losses(model, base.pad_id, data).loss
    assert at_first == pytest.approx(held_out_losses(base.model, base.pad_id, data).loss, abs=1e-5)
    record = train(base, placement, data, tmp_path / "run", settings_of(method, save_steps=0), valid=data)
    saved = read_json(tmp_path / "run" / "adapter_config.json", PlacementError, "adapter")
    assert (saved["init_lora_weights"], saved["r"], saved["lora_alpha"]) == (True, 4, 32)
    base.model.save_pretrained(tmp_path / "base")
    fresh = type(base.model).from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(fresh, str(tmp_path / "run")).eval()
    assert held_out_losses(plain, base.pad_id, data).loss == pytest.approx(record.loss_after, abs=1e-5)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_rank_above_the_width_is_refused_where_adapters_begin_out_of_the_weights(method: str, tiny_base: BaseModel) -> None:
    placement, before = place(tiny_base, [1]), state_of(tiny_base.model)
    with (
        pytest.raises(PlacementError, match=rf"rank 33 is above the width of model\.layers\.1\.self_attn\.[qk]_proj, and {method}"),
        adapted(tiny_base, placement, configuration(settings_of(method, rank=33), 4, placement)),
    ):
        pass
    assert_same(before, state_of(tiny_base.model))


def test_adapters_are_written_as_the_umask_says_and_name_the_embedded_model_by_its_hub_id(tiny_base: BaseModel, tmp_path: Path) -> None:
    placement = place(tiny_base, [1])
    with adapted(tiny_base, placement) as model:
        model.peft_config["default"].base_model_name_or_path = str(cache_root() / EMBEDDED)
        mask = os.umask(0o027)
        try:
            beginnings.save_adapter(model, tmp_path, "lora", tmp_path)
        finally:
            os.umask(mask)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys((CONFIG_FILE, WEIGHTS_FILE), 0o640)
    saved = read_json(tmp_path / CONFIG_FILE, PlacementError, "adapter")
    assert saved["base_model_name_or_path"] == HUB_ID
    found = verify_adapter(tiny_base.model, tmp_path, name="smollm2-135m")
    assert not any("was trained on" in words for words in found.differences)


def test_a_full_disk_is_one_line(tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    with adapted(tiny_base, place(tiny_base, [1])) as model:
        monkeypatch.setattr(model, "save_pretrained", full)
        with pytest.raises(OutputError, match=r"No space left on device.*make room"):
            beginnings.save_adapter(model, tmp_path, "lora", tmp_path)


def test_olora_is_refused_where_peft_would_take_the_weights_the_wrong_way_round() -> None:
    base = base_of("gpt2")
    placement = place(base, [1])
    with (
        pytest.raises(PlacementError, match="OLoRA takes the stored weights of Conv1D"),
        adapted(base, placement, configuration(settings_of("olora"), 4, placement)),
    ):
        pass


def test_eva_begins_with_the_directions_of_the_inputs(tiny_base: BaseModel, tiny_file: Path, tmp_path: Path) -> None:
    """The rows of A are orthonormal, they span more of the inputs' variance than any others, and the update is still zero."""
    data = load_data(str(tiny_file), tiny_base.tokenizer)
    placement, settings = place(tiny_base, [1]), settings_of("eva")
    with adapted(tiny_base, placement, configuration(settings, 4, placement)) as model:
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        beginnings.begin(model, placement, data, tiny_base.pad_id, settings, tmp_path, resumed=False)
        assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
        assert model.peft_config["default"].target_modules == set(placement.paths)
        module = model.get_base_model().get_submodule("model.layers.1.self_attn.q_proj")
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert module.r["default"] == 2 and not up.any()
        assert torch.allclose(down @ down.T, torch.eye(2), atol=1e-4)
        seen: list[torch.Tensor] = []
        for example in data.examples:
            handle = module.base_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
            ids = torch.tensor([example.input_ids])
            labelled = torch.tensor(example.labels) != -100
            with torch.no_grad():
                model(ids)
            handle.remove()
            seen[-1] = seen[-1][labelled]
        inputs = torch.cat(seen)
        inputs = inputs - inputs.mean(0)
        best = torch.linalg.svd(inputs, full_matrices=False)[2][:2]
        explained = (inputs @ down.T).square().sum() / (inputs @ best.T).square().sum()
    assert explained > 0.95


def test_eva_says_when_the_data_is_too_small_and_leaves_no_hooks(
    tiny_base: BaseModel, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(str(tiny_file), tiny_base.tokenizer, records=1)
    before = state_of(tiny_base.model)
    with pytest.raises(TrainingError, match="eva needs more labelled tokens than the rank 500"):
        train(tiny_base, place(tiny_base, [1]), data, tmp_path / "a", settings_of("eva", rank=500))
    monkeypatch.setattr(beginnings, "PASSES", 0)
    with pytest.raises(TrainingError, match="eva has not converged in 0 passes"):
        train(tiny_base, place(tiny_base, [1]), data, tmp_path / "b", settings_of("eva"))
    assert_same(before, state_of(tiny_base.model))


def test_adalora_shares_out_its_ranks(tiny_base: BaseModel, tiny_file: Path, tmp_path: Path) -> None:
    data = load_data(str(tiny_file), tiny_base.tokenizer)
    placement = place(tiny_base, [1, 2])
    train(tiny_base, placement, data, tmp_path / "run", settings_of("adalora", steps=10, save_steps=0))
    saved = read_json(tmp_path / "run" / "adapter_config.json", PlacementError, "adapter")
    kept = [sum(mask) for mask in saved["rank_pattern"].values()]
    assert len(kept) == len(placement.paths) and {len(mask) for mask in saved["rank_pattern"].values()} == {3}
    assert sum(kept) == 2 * len(placement.paths)
    assert len(set(kept)) > 1


def test_a_resumed_run_that_would_begin_elsewhere_is_refused(tiny_base: BaseModel, tiny_file: Path, tmp_path: Path) -> None:
    data = load_data(str(tiny_file), tiny_base.tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, place(tiny_base, [1]), data, tmp_path / "run", settings_of("pissa"), progress=stop_at(3))
    file = tmp_path / "run" / "checkpoints" / "initial" / "adapter_model.safetensors"
    save_file({name: weight + 1e-3 for name, weight in load_file(file).items()}, file)
    with pytest.raises(TrainingError, match="decomposed otherwise"):
        train(tiny_base, place(tiny_base, [1]), data, tmp_path / "run", settings_of("pissa"), resume=True)


@pytest.mark.parametrize("method", ["pissa", "eva", "adalora"])
def test_a_classifiers_head_is_trained_interrupted_and_saved_along(method: str, tmp_path: Path) -> None:
    config = LlamaConfig(**{**build_tiny("llama").config.to_dict(), "num_labels": 2})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = wrap_model(LlamaForSequenceClassification(config), tiny_tokenizer(), name="classifier")
    records = [{"text": record["prompt"], "label": at % 2} for at, record in enumerate(tiny_records(12))]
    data = load_data(str(write_records(tmp_path / "data.jsonl", records)), base.tokenizer, classes=base.classes)
    placement, settings, before = place(base, [1, 2]), settings_of(method), state_of(base.model)
    fast = FastSettings(prefix_cache=False)
    whole = train(base, placement, data, tmp_path / "whole", settings, fast=fast, valid=data)
    with pytest.raises(KeyboardInterrupt):
        train(base, placement, data, tmp_path / "cut", settings, fast=fast, valid=data, progress=stop_at(3))
    train(base, placement, data, tmp_path / "cut", settings, fast=fast, valid=data, resume=True)
    assert_equal_adapters(tmp_path / "whole", tmp_path / "cut")
    assert any("score" in name for name in load_file(tmp_path / "whole" / "adapter_model.safetensors"))
    with loaded(base, tmp_path / "whole") as model:
        assert held_out_losses(model, base.pad_id, data).loss == pytest.approx(whole.loss_after, abs=1e-5)
    assert_same(before, state_of(base.model))


@pytest.mark.slow
def test_two_processes_begin_and_step_as_one(tiny_base: BaseModel, tmp_path: Path) -> None:
    write_records(tmp_path / "train.jsonl", tiny_records(16))
    command = [sys.executable, *TORCHRUN, str(TESTS / "several_methods.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    data = load_data(str(tmp_path / "train.jsonl"), tiny_base.tokenizer)
    for method, losses in json.loads((tmp_path / "losses.json").read_text()).items():
        alone = train(tiny_base, place(tiny_base, [1, 2]), data, tmp_path / f"{method} alone", settings_of(method, save_steps=0))
        assert losses == pytest.approx(alone.losses, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lara"}, "method 'lara' is unknown; did you mean 'lora'"),
        ({"method": "ia3", "rank": 4}, "method 'ia3' has no rank, but rank is 4"),
        ({"method": "pissa", "dropout": 0.1}, "method 'pissa' has no dropout"),
        ({"method": "vera", "alpha": 4.0}, "method 'vera' has no alpha"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        TrainSettings(**changes)


def test_methods_with_one_rank_refuse_ranks_of_single_modules(tiny_base: BaseModel) -> None:
    placement = place(tiny_base, [1])
    placement = placement.changed(rank_pattern=dict.fromkeys(placement.paths, 2), alpha_pattern=dict.fromkeys(placement.paths, 4.0))
    for method in (name for name, each in METHODS.items() if each.one_rank):
        with pytest.raises(PlacementError, match=f"{method} has one rank for all modules"):
            configuration(settings_of(method), 4, placement)
    with pytest.raises(TrainingError, match="at least 2 steps"):
        configuration(settings_of("adalora"), 1, place(tiny_base, [1]))


def test_experts_are_trained_by_plain_lora_alone(tiny_file: Path, tmp_path: Path) -> None:
    base = mixture()
    data = load_data(str(tiny_file), base.tokenizer)
    placement = place(base, [1]).changed(parameters=tuple(stack.path for stack in base.blocks[1].stacks))
    before = state_of(base.model)
    record = train(base, placement, data, tmp_path / "run", replace(SETTINGS, save_steps=0), valid=data)
    assert record.loss_reduction > 0.001
    with loaded(base, tmp_path / "run") as model:
        assert set(adapted_paths(model)) == set(placement.targets)
        assert math.isclose(held_out_losses(model, base.pad_id, data).loss, record.loss_after, abs_tol=1e-5)
    for method in ("pissa", "eva", "dora", "ia3", "vera"):
        with pytest.raises(PlacementError):
            train(base, placement, data, tmp_path / method, settings_of(method))
    assert_same(before, state_of(base.model))
    assert train(base, without_experts(placement), data, tmp_path / "maps", replace(settings_of("dora"), save_steps=0)).steps == 4
    assert_same(before, state_of(base.model))
    with pytest.raises(PlacementError, match="adapts nothing"):
        without_experts(placement.changed(paths=()))
