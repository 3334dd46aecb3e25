"""Training, evaluating and merging with blocks on disk: the same numbers as in memory, in the memory of the upper blocks."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from layercard.adapters.apply import loaded, place
from layercard.adapters.merge import merge_streamed
from layercard.commands.main import run as command
from layercard.data.load import Dataset, collate, load_data
from layercard.errors import ModelError, OutputError, PlacementError, TrainingError
from layercard.fast import prefix_pass as passing
from layercard.fast.prefix_records import record_key
from layercard.fast.prefix_store import Store
from layercard.fast.read_ahead import ReadAhead
from layercard.models import quantised
from layercard.models.load import BaseModel, load_model
from layercard.models.losses import labelled_logits
from layercard.models.streamed import open_model
from layercard.settings import FastSettings, TrainSettings
from layercard.training.evaluate import evaluate
from layercard.training.streamed import STATES, evaluate_streamed, train_streamed
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
        patch.setattr("layercard.training.streamed.free_bytes", lambda device: 1_000_000)
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


MERGE = """
import sys
from pathlib import Path
from layercard.adapters.merge import merge_streamed
from layercard.models.streamed import open_model
import peft, transformers
model, adapter, output = sys.argv[1:]
streamed = open_model(model, dtype="auto", device="cpu")
Path("/proc/self/clear_refs").write_text("5")
resident = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024
before = resident("VmRSS")
merge_streamed(streamed, adapter, output)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read in /proc")
def test_a_merge_holds_at_most_two_shards(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_tiny("llama", hidden_size=768, intermediate_size=3072, num_hidden_layers=6).save_pretrained(folder, max_shard_size="40MB")
    tiny_tokenizer().save_pretrained(folder)
    base = load_model(folder)
    data, _ = records(tmp_path, base)
    train(base, place(base, range(6)), data, tmp_path / "adapter", TrainSettings(steps=1))
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 4 * largest
    line = [sys.executable, "-c", MERGE, str(folder), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"})
    assert int(done.stdout) < 2 * largest


def test_nothing_is_passed_for_a_folder_that_is_taken_or_finished(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    base, told = load_model(folder), []
    data, _ = records(tmp_path, base)
    placement, how = place(base, [1, 2]), {"progress": lambda phase, done, total: told.append(phase)}
    train_streamed(open_model(str(folder)), placement, data, tmp_path / "out", SETTINGS, **how)
    assert "pass" in told and json.loads((tmp_path / "out" / "run.json").read_text())["fast"]["did"]["stream"]
    told.clear()
    with pytest.raises(OutputError, match="holds a finished run"):
        train_streamed(open_model(str(folder)), placement, data, tmp_path / "out", SETTINGS, **how)
    train_streamed(open_model(str(folder)), placement, data, tmp_path / "out", SETTINGS, resume=True, **how)
    assert "pass" not in told


@pytest.mark.parametrize("phase", ["pass", "train"])
def test_a_full_disk_is_one_line_and_what_was_done_stays(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model", num_hidden_layers=5)
    base = load_model(folder)
    data, _ = records(tmp_path, base)
    placement, settings = place(base, [3, 4]), replace(SETTINGS, save_steps=2)
    expected = train(base, placement, data, tmp_path / "memory", settings)
    writes = 0

    def full(*arguments: Any, **more: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return saves(*arguments, **more)

    where = "layercard.models.streamed_pass.save_file" if phase == "pass" else "peft.peft_model.safe_save_file"
    saves = save_file
    with monkeypatch.context() as patch:
        writes = 0 if phase == "pass" else 6
        patch.setattr(where, full)
        with pytest.raises(OutputError, match=r"No space left on device"):
            train_streamed(open_model(str(folder)), placement, data, tmp_path / "disk", settings)
    done: list[str] = []

    def told(phase: str, count: int, total: int) -> None:
        done.append(f"{phase} {count}/{total}")

    again = {"resume": phase == "train", "progress": told}
    run = train_streamed(open_model(str(folder)), placement, data, tmp_path / "disk", settings, **again)
    assert "pass 1/3" not in done
    assert ("train 1/8" in done) == (phase == "pass")
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)


def test_changed_weights_and_another_tokenizer_are_passed_anew(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    base = load_model(folder)
    data, _ = records(tmp_path, base)
    fast, told = FastSettings(cache_folder=str(tmp_path / "states")), []
    how: dict[str, Any] = {"fast": fast, "progress": lambda phase, done, total: told.append(phase)}
    train_streamed(open_model(str(folder)), place(base, [2]), data, tmp_path / "first", SETTINGS, **how)

    # A shard that changes while the model is open: one line. Opened again, it is another model, whose hidden states are its own.
    opened, shard = open_model(str(folder)), sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, shard, {"format": "pt"})
    other = load_model(folder)
    with pytest.raises(ModelError, match="has changed since it was opened"):
        train_streamed(opened, place(base, [1]), data, tmp_path / "second", SETTINGS, **how)
    assert not (tmp_path / "second").exists()
    with pytest.raises(PlacementError, match="with other weights"):
        train_streamed(open_model(str(folder)), place(base, [2]), data, tmp_path / "second", SETTINGS, **how)
    expected = train(other, place(other, [2]), data, tmp_path / "memory", SETTINGS)
    told.clear()
    run = train_streamed(open_model(str(folder)), place(other, [2]), data, tmp_path / "second", SETTINGS, **how)
    assert "pass" in told
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)

    # Another tokenizer gives other tokens.
    shifted = Dataset(
        tuple(replace(each, input_ids=tuple((id_ + 1) % 64 for id_ in each.input_ids)) for each in data.examples), "shifted", "shifted"
    )
    expected = train(other, place(other, [2]), shifted, tmp_path / "memory-shifted", SETTINGS)
    told.clear()
    run = train_streamed(open_model(str(folder)), place(other, [2]), shifted, tmp_path / "third", SETTINGS, **how)
    assert "pass" in told
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)


def test_two_passes_of_the_same_records_do_not_meet(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    base = load_model(folder)
    data, _ = records(tmp_path, base)
    cache, said = tmp_path / "states", []

    def second(phase: str, done: int, total: int) -> None:
        if phase == "pass" and not said:
            said.append(f"{phase} {done}")
            with pytest.raises(OutputError, match="another run is at work"):
                passing.prefix_pass(open_model(str(folder)), [data], 2, cache)
            # Other records may pass meanwhile.
            passing.prefix_pass(open_model(str(folder)), [data.part(range(4), "few")], 2, cache)

    store = passing.prefix_pass(open_model(str(folder)), [data], 2, cache, progress=second)
    assert said
    fresh = passing.prefix_pass(open_model(str(folder)), [data], 2, tmp_path / "alone")
    for example in data.examples:
        key = record_key(example, True)
        torch.testing.assert_close(store.get(key), fresh.get(key))
    assert not [path for path in cache.rglob("*") if path.name.startswith("between")]


def test_hidden_states_are_read_ahead_in_order(tmp_path: Path) -> None:
    store = Store(2, torch.float32, tmp_path / "states")
    rows = {bytes([number] * 16): torch.full((number + 1, 2), float(number)) for number in range(12)}
    for key, hidden in rows.items():
        store.add(key, hidden)
    store.flush()
    ahead, keys = ReadAhead(store, torch.device("cpu")), list(rows)
    batches = [keys[start : start + 2] for start in range(0, 12, 2)]
    for batch in batches:  # more than may wait: the others are read when they are asked for
        ahead.expect(batch)
    for batch in [batches[1], *batches[1:]]:  # one twice, as an evaluation in between might
        taken = ahead.take(set(batch))
        assert set(taken) == set(batch)
        assert all(torch.equal(taken[key], rows[key]) for key in batch)
    assert ahead.take({b"unknown"}) == {}

    # What goes wrong in the thread is raised where its records are asked for.
    ahead.store = None  # type: ignore[assignment]
    ahead.expect(batches[0])
    with pytest.raises(AttributeError):
        ahead.take(batches[0])
    ahead.close()
    assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


def test_training_reads_every_batch_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model")
    base = load_model(folder)
    data, _ = records(tmp_path, base)
    names: list[str] = []
    original = Store.get

    def get(store: Store, key: bytes) -> Any:
        names.append(threading.current_thread().name)
        return original(store, key)

    told = lambda phase, done, total: names.clear() if phase == "pass" else None  # noqa: E731
    monkeypatch.setattr(Store, "get", get)
    train_streamed(open_model(str(folder)), place(base, [1, 2]), data, tmp_path / "out", SETTINGS, progress=told)
    ahead = sum("read-ahead" in name for name in names)
    assert ahead >= SETTINGS.steps * SETTINGS.batch_size  # the others are looked up once, to see whether they went through


def test_comparison_of_placements_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model", num_hidden_layers=4)
    data, valid = (str(write_records(tmp_path / name, tiny_records(12, start))) for name, start in (("data.jsonl", 0), ("valid.jsonl", 50)))
    line = ["compare", str(folder), "--data", data, "--valid", valid, "--placements", "last:1,last:2", "--steps", "4", "--json"]
    losses = []
    for name, more in (("memory", []), ("disk", ["--stream"])):
        assert command([*line, *more, "-o", str(tmp_path / name)]) == 0
        losses.append([row["loss_after"] for row in json.loads(capsys.readouterr().out)["rows"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert not (tmp_path / "disk" / STATES).exists()
    assert command([*line, "--stream", "--placements", "last:1,all", "-o", str(tmp_path / "no")]) == 2
    assert "block 0 is adapted" in capsys.readouterr().err


class Rounded(nn.Linear):
    """Stands in for the modules of bitsandbytes: whole numbers, with a scale for each row."""

    def __init__(self, original: nn.Linear, levels: int) -> None:
        super().__init__(original.in_features, original.out_features, bias=False, device="meta")
        self.levels = levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def fill_rounded(module: Rounded, weight: torch.Tensor, device: torch.device) -> None:
    module.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / module.levels)
    module.weight = nn.Parameter((weight / module.scale).round().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_upper_part_in_few_bits(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A placement made in float32 serves; only modules of the blocks in memory are rounded."""
    folder = saved(tmp_path / "model")
    base = load_model(folder)
    data, valid = records(tmp_path, base)
    placement = place(base, [1, 2])
    monkeypatch.setattr(quantised, "empty_linear", lambda module, bits, dtype: Rounded(module, 2 ** (bits - 1) - 1))
    monkeypatch.setattr(quantised, "fill", fill_rounded)
    expected = train(base, placement, data, tmp_path / "memory", SETTINGS, valid=valid)
    streamed = open_model(str(folder), dtype="bfloat16")
    run = train_streamed(streamed, placement, data, tmp_path / "disk", SETTINGS, valid=valid, bits=bits)
    assert f"linear modules in {bits} bits" in run.fast["did"]["stream"]
    assert run.loss_after < run.loss_before
    assert run.losses == pytest.approx(expected.losses, rel=0.05)
    kinds = [{type(module) for module in block.module.modules()} for block in streamed.blocks]
    assert [Rounded in kind for kind in kinds] == [False, True, True]
    assert streamed.resident_bytes < open_model(str(folder), dtype="bfloat16").bytes_from(1)

    # The adapter is a plain one, and serves the model in full.
    with loaded(base, tmp_path / "disk") as adapted:
        assert evaluate(base, valid, model=adapted, with_generation=False).loss < expected.loss_before
    with pytest.raises(TrainingError, match=r"is a run with (bits|dtype)"):
        train_streamed(open_model(str(folder), dtype="bfloat16"), placement, data, tmp_path / "disk", SETTINGS, valid=valid, resume=True)


def test_few_bits_need_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model")
    place(load_model(folder), [1, 2]).save(tmp_path / "placement.json")
    data = write_records(tmp_path / "records.jsonl", tiny_records(12))
    line = ["train", str(folder), "--data", str(data), "--placement", str(tmp_path / "placement.json"), "-o", str(tmp_path / "out")]
    assert command([*line, "--bits", "4"]) == 2
    assert "pass --stream too" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert command([*line, "--bits", "4", "--stream"]) == 2
    assert "--bits needs bitsandbytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_upper_part_with_bitsandbytes(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="rounded weights need bitsandbytes: pip install 'layercard[quantised]'")
    folder = saved(tmp_path / "model", hidden_size=64, intermediate_size=128)
    base = load_model(folder)
    data, valid = records(tmp_path, base)
    run = train_streamed(open_model(str(folder)), place(base, [1, 2]), data, tmp_path / "disk", SETTINGS, valid=valid, bits=bits)
    assert run.loss_after < run.loss_before


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
    assert command(["merge", str(tmp_path / "adapter"), "--model", str(folder), "--stream", "-o", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert command(["eval", str(tmp_path / "merged"), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected, rel=1e-4)
