"""Training, evaluating and merging with blocks on disk: the same numbers as in memory, in the memory of the upper blocks."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from layercard.adapters.apply import loaded, place
from layercard.adapters.merge import merge_streamed
from layercard.commands.main import run as command
from layercard.data.load import Dataset, collate, load_data
from layercard.errors import OutputError, PlacementError, TrainingError
from layercard.fast import prefix_pass as passing
from layercard.models.load import BaseModel, load_model
from layercard.models.losses import labelled_logits
from layercard.models.streamed import open_model
from layercard.settings import FastSettings, TrainSettings
from layercard.training.evaluate import evaluate
from layercard.training.streamed import evaluate_streamed, train_streamed
from layercard.training.train import train
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

SETTINGS = TrainSettings(steps=8, learning_rate=0.01, batch_size=3)
WEIGHTS = "adapter_model.safetensors"
CHANGES: dict[str, dict[str, Any]] = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}
FAMILIES = ["llama", "gpt2", "qwen3", "gemma3", "gpt_neox", "opt", "phi3", "mistral"]


def saved(folder: Path, family: str = "llama", **changes: Any) -> Path:
    build_tiny(family, **CHANGES.get(family, {}), **changes).save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def records(tmp_path: Path, base: BaseModel) -> tuple[Dataset, Dataset]:
    data = load_data(write_records(tmp_path / "records.jsonl", tiny_records(24)), base.tokenizer)
    return data.part(range(18), "train"), data.part(range(18, 24), "valid")


def assert_close(first: Path, second: Path) -> None:
    tensors, others = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_adapter_are_those_of_ordinary_training(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family)
    base, streamed = load_model(folder), open_model(str(folder))
    data, valid = records(tmp_path, base)
    placement = place(base, [1, 2])
    expected = train(base, placement, data, tmp_path / "memory", SETTINGS, valid=valid)
    run = train_streamed(streamed, placement, data, tmp_path / "disk", SETTINGS, valid=valid)
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    assert run.loss_after == pytest.approx(expected.loss_after, rel=1e-5)
    assert_close(tmp_path / "memory", tmp_path / "disk")
    assert "on disk" in run.fast["did"]["stream"]
    # The adapter is a plain one with the paths of the whole model, and the hidden states are gone.
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    # Below, nothing was read: weights there are zero and take no memory.
    lowest = dict(streamed.base.blocks[0].module.named_parameters())
    assert all(weight.untyped_storage().nbytes() <= 8 for weight in lowest.values())


def test_evaluation_block_by_block_gives_the_same_losses_and_texts(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    base, streamed = load_model(folder), open_model(str(folder))
    rows = [{**record, "references": [record["completion"]]} for record in tiny_records(6)]
    data = load_data(write_records(tmp_path / "valid.jsonl", rows), base.tokenizer)
    placement = place(base, [1, 2])
    train(base, placement, data, tmp_path / "adapter", SETTINGS)
    for adapter in (None, tmp_path / "adapter"):
        with loaded(base, adapter) if adapter else nullcontext(base.model) as model:
            expected = evaluate(base, data, model=model, adapter=adapter, max_new_tokens=5)
        result = evaluate_streamed(streamed, data, adapter=adapter, max_new_tokens=5, batch_size=4)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.generation == expected.generation
        assert streamed.resident_bytes == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_merged_shards_give_the_adapters_logits(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family)
    base = load_model(folder)
    data, _ = records(tmp_path, base)
    train(base, place(base, [1]), data, tmp_path / "adapter", SETTINGS)
    changed = merge_streamed(open_model(str(folder), dtype="auto"), tmp_path / "adapter", tmp_path / "merged")
    assert len(changed) == len(place(base, [1]).paths)
    batch = collate(data.examples, range(4), base.pad_id)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load_model(folder).model, tmp_path / "adapter").eval()
        expected = labelled_logits(adapted, batch)[0]
        merged = labelled_logits(load_model(tmp_path / "merged").model, batch)[0]
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(OutputError, match="exists already"):
        merge_streamed(open_model(str(folder)), tmp_path / "adapter", tmp_path / "merged")


def test_a_pass_that_was_killed_goes_on_and_is_shared(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", num_hidden_layers=5)
    base = load_model(folder)
    data, valid = records(tmp_path, base)
    fast = FastSettings(cache_folder=str(tmp_path / "states"))
    placement = place(base, [3, 4])
    expected = train(base, placement, data, tmp_path / "memory", SETTINGS)

    # Killed after the second block: the two blocks are not computed again.
    done: list[str] = []

    def killed(phase: str, count: int, total: int) -> None:
        done.append(f"{phase} {count}/{total}")
        if done[-1] == "pass 2/3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_streamed(open_model(str(folder)), placement, data, tmp_path / "disk", SETTINGS, fast=fast, progress=killed)
    assert not (tmp_path / "disk").exists()
    done.clear()

    def told(phase: str, count: int, total: int) -> None:
        done.append(f"{phase} {count}/{total}")

    run = train_streamed(open_model(str(folder)), placement, data, tmp_path / "disk", SETTINGS, fast=fast, progress=told)
    assert [line for line in done if line.startswith("pass")] == ["pass 3/3"]
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)

    # A second run with the same folder has no pass, one with new records passes these only; nothing stays but the store.
    done.clear()
    train_streamed(open_model(str(folder)), placement, data, tmp_path / "again", SETTINGS, fast=fast, progress=told)
    assert not [line for line in done if line.startswith("pass")]
    train_streamed(open_model(str(folder)), placement, data, tmp_path / "third", SETTINGS, valid=valid, fast=fast, progress=told)
    assert [line for line in done if line.startswith("pass")]
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "states").rglob("*") if path.is_file())


def test_what_cannot_be_streamed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model")
    base = load_model(folder)
    data, _ = records(tmp_path, base)
    with pytest.raises(TrainingError, match="block 0 is adapted"):
        train_streamed(open_model(str(folder)), place(base, [0, 2]), data, tmp_path / "out", SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr("layercard.training.streamed.free_bytes", lambda device: 60_000)
        with pytest.raises(TrainingError, match=r"layers from 2 on would fit"):
            train_streamed(open_model(str(folder)), place(base, [1, 2]), data, tmp_path / "out", SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(passing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(OutputError, match=r"the pass needs .* are free"):
            train_streamed(open_model(str(folder)), place(base, [1, 2]), data, tmp_path / "out", SETTINGS)
    gpt2 = tmp_path / "gpt2"
    build_tiny("gpt2").save_pretrained(gpt2)
    tiny_tokenizer().save_pretrained(gpt2)
    with pytest.raises(TrainingError, match="random numbers are drawn"):
        train_streamed(open_model(str(gpt2)), place(load_model(gpt2), [1, 2]), data, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_merge_refuses_what_is_not_plain_lora(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    base = load_model(folder)
    data, _ = records(tmp_path, base)
    train(base, place(base, [1]), data, tmp_path / "dora", TrainSettings(steps=1, method="dora"))
    with pytest.raises(PlacementError, match="not plain LoRA"):
        merge_streamed(open_model(str(folder)), tmp_path / "dora", tmp_path / "merged")
    other = saved(tmp_path / "other", hidden_size=16)
    train(base, place(base, [1]), data, tmp_path / "lora", TrainSettings(steps=1))
    with pytest.raises(PlacementError, match="does not fit"):
        merge_streamed(open_model(str(other)), tmp_path / "lora", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model")
    base = load_model(folder)
    place(base, [1, 2]).save(tmp_path / "placement.json")
    data = write_records(tmp_path / "records.jsonl", tiny_records(12))
    line = ["train", str(folder), "--data", str(data), "--placement", str(tmp_path / "placement.json"), "--stream", "--steps", "3"]
    assert command([*line, "-o", str(tmp_path / "adapter"), "--json"]) == 0
    assert "stream" in json.loads(capsys.readouterr().out)["fast"]["did"]
    evaluated = ["eval", str(folder), "--data", str(data), "--adapter", str(tmp_path / "adapter"), "--json"]
    assert command(evaluated) == 0
    expected = json.loads(capsys.readouterr().out)["loss"]
    assert command([*evaluated, "--stream"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected, rel=1e-5)
    assert command(["merge", str(tmp_path / "adapter"), "--model", str(folder), "-o", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert command(["eval", str(tmp_path / "merged"), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected, rel=1e-4)
