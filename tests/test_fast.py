"""All of faster training together: losses step by step, final adapters and held-out losses are those of stock training."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset as HubDataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

import tiny
from layercard.adapters.apply import place
from layercard.data.load import Dataset, load_data
from layercard.errors import TrainingError
from layercard.fast.fast_training import FastTraining, fast_training
from layercard.models.load import BaseModel, wrap_model
from layercard.settings import FastSettings, TrainSettings
from layercard.training.records import Run
from layercard.training.train import train
from padded import batch, no_dropout

PARTS = ("cut", "prefix_cache", "unpadded", "labels_only", "fused_lora")
STEPS = TrainSettings(rank=2, epochs=2, batch_size=4, accumulation=2, learning_rate=1e-2, warmup_ratio=0.0, save_steps=0)


def only(*names: str) -> FastSettings:
    return FastSettings(**{name: name in names for name in PARTS})


def base_of(family: str) -> BaseModel:
    return wrap_model(tiny.build_tiny(family, **no_dropout(family)), tiny.tiny_tokenizer(), name=family)


def records(base: BaseModel, folder: Path, count: int = 16, start: int = 0) -> Dataset:
    return load_data(str(tiny.write_records(folder / f"{start}.jsonl", tiny.tiny_records(count, start))), base.tokenizer)


def run(base: BaseModel, folder: Path, name: str, fast: FastSettings, layers: tuple[int, ...], **how: Any) -> Run:
    return train(base, place(base, layers), records(base, folder), folder / name, STEPS, fast=fast, **how)


def assert_same_run(one: Run, other: Run, folders: tuple[Path, Path]) -> None:
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-5, atol=0)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-4 * float(weight.abs().max()))


@pytest.mark.parametrize("layers", [(1,), (0, 2)], ids=["prefix", "from the first block on"])
@pytest.mark.parametrize("family", tiny.DISTINCT_FAMILIES)
def test_each_part_and_all_together_equal_stock_training(family: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    base = base_of(family)
    stock = run(base, tmp_path, "stock", FastSettings.baseline(), layers)
    assert stock.fast["did"] == {}
    for names in (*((name,) for name in PARTS), PARTS):
        name = "-".join(names)
        found = run(base, tmp_path, name, only(*names), layers)
        assert_same_run(stock, found, (tmp_path / "stock", tmp_path / name))
    assert set(found.fast["did"]) == set(PARTS)


@pytest.mark.parametrize("pair", list(itertools.combinations(PARTS, 2)), ids="-".join)
def test_pairs_of_parts_equal_stock_training(pair: tuple[str, str], tmp_path: Path) -> None:
    base = base_of("gemma3")
    stock = run(base, tmp_path, "stock", FastSettings.baseline(), (1, 2))
    found = run(base, tmp_path, "pair", only(*pair), (1, 2))
    assert_same_run(stock, found, (tmp_path / "stock", tmp_path / "pair"))


def test_a_run_says_what_was_spared(tmp_path: Path) -> None:
    base = base_of("llama")
    did = run(base, tmp_path, "run", FastSettings(), (2,)).fast["did"]
    assert did["cut"] == "layers in backward: 1/3"
    assert "16 of 32 records read" in did["prefix_cache"]
    assert did["unpadded"].startswith("padding left out: ")
    assert did["labels_only"].startswith("logits of labelled positions only: ")
    assert did["fused_lora"] == "adapters computed in one step: 7 of 7"


def interrupted_and_resumed(base: BaseModel, folder: Path, fast: FastSettings) -> Run:
    """A run that is stopped after two of its steps and goes on from its checkpoint, in `folder / "run"`."""

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "train" and done == 2:
            raise KeyboardInterrupt

    settings = TrainSettings(**{**STEPS.to_json(), "save_steps": 1})
    data = records(base, folder)
    with pytest.raises(KeyboardInterrupt):
        train(base, place(base, (2,)), data, folder / "run", settings, fast=fast, progress=stop)
    return train(base, place(base, (2,)), data, folder / "run", settings, fast=fast, resume=True)


def test_an_interrupted_run_goes_on_with_a_cache_on_disk(tmp_path: Path) -> None:
    base = base_of("qwen3")
    stock = run(base, tmp_path, "stock", FastSettings.baseline(), (2,))
    found = interrupted_and_resumed(base, tmp_path, FastSettings(cache_folder=str(tmp_path / "cache")))
    assert_same_run(stock, found, (tmp_path / "stock", tmp_path / "run"))
    assert "frozen blocks 2/3: 20 of 24 records read" in found.fast["did"]["prefix_cache"]


def test_without_the_cache_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    base, fast = base_of("qwen3"), FastSettings(prefix_cache=False)
    run(base, tmp_path, "whole", fast, (2,))
    interrupted_and_resumed(base, tmp_path, fast)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_dropout_leaves_padding_in_and_says_so(tmp_path: Path) -> None:
    base = base_of("llama")
    settings = TrainSettings(**{**STEPS.to_json(), "dropout": 0.1})
    runs = [
        train(base, place(base, (2,)), records(base, tmp_path), tmp_path / str(at), settings, fast=fast)
        for at, fast in enumerate((FastSettings.baseline(), FastSettings()))
    ]
    assert "dropout is on" in runs[1].fast["did"]["unpadded"]
    torch.testing.assert_close(torch.tensor(runs[0].losses), torch.tensor(runs[1].losses), rtol=1e-5, atol=0)


def test_what_cannot_be_spared_is_said_and_the_loop_goes_on() -> None:
    model = get_peft_model(
        tiny.build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2], modules_to_save=["embed_tokens"])
    )
    with fast_training(model.train(), passes=3) as speed:
        model(**batch("right")).loss.backward()
    assert "trains below" in speed.to_json()["prefix_cache"]
    assert speed.off["cut"]
    assert json.dumps(speed.to_json())


def test_the_model_is_put_back() -> None:
    model = get_peft_model(tiny.build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2]))
    with pytest.raises(RuntimeError), fast_training(model, passes=3):
        raise RuntimeError
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("wrong", [{"cache_bytes": 0}, {"prefix_cache": False, "cache_folder": "x"}])
def test_contradictory_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="cache"):
        FastSettings(**wrong)


def sft_losses(callbacks: list[Any], folder: Path, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """TRL's trainer on tiny records, two epochs: the loss of every step, and the adapter's weights."""
    rows = [{"prompt": row["prompt"], "completion": " " + row["completion"]} for row in tiny.tiny_records(12)]
    losses: list[float] = []

    class Recorded(SFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    config = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **changes,
    )
    trainer = Recorded(
        tiny.build_tiny("qwen3"),
        args=config,
        train_dataset=HubDataset.from_list(rows),
        processing_class=tiny.tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[2], task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )
    trainer.train()
    return losses, {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": False}, {"packing": True, "max_length": 64}], ids=str)
def test_trl_trains_to_the_same_adapter(changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, stock = sft_losses([], tmp_path / "stock", **changes)
    found, ours = sft_losses([FastTraining(passes=2)], tmp_path / "ours", **changes)
    assert "layers in backward: 1/3" in capsys.readouterr().err
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    for name, weight in stock.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4 * float(weight.abs().max()))
