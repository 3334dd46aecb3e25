"""Training: files and record, exact loss, exact resumption, and a base model that is bit for bit as before."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from layercard.adapters.apply import adapted, loaded, place
from layercard.cost.training import heaviest_step
from layercard.data.load import IGNORED, Dataset, collate, load_data, shuffled
from layercard.errors import DataError, OutputError, PlacementError, TrainingError
from layercard.models.load import BaseModel, wrap_model
from layercard.models.losses import RecordLosses, labelled_losses
from layercard.selection.placement import Placement
from layercard.settings import SCHEDULERS, FastSettings, TrainSettings
from layercard.training import trainer as trainer_module
from layercard.training.evaluate import held_out_losses
from layercard.training.records import Run
from layercard.training.train import train
from layercard.training.trainer import last_checkpoint
from test_adapters import assert_same, base_of, state_of
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

FAST = TrainSettings(rank=2, steps=4, batch_size=2, learning_rate=1e-2, warmup_ratio=0.0, save_steps=0)


@pytest.fixture
def data(tiny_base: BaseModel, tmp_path: Path) -> Dataset:
    return load_data(str(write_records(tmp_path / "train.jsonl", tiny_records(10))), tiny_base.tokenizer)


@pytest.fixture
def valid(tiny_base: BaseModel, tmp_path: Path) -> Dataset:
    return load_data(str(write_records(tmp_path / "valid.jsonl", tiny_records(6, 20))), tiny_base.tokenizer)


@pytest.fixture
def run(tiny_base: BaseModel, data: Dataset, tmp_path: Path) -> Callable[..., Run]:
    """Train adapters in layers of the tiny model on `data`, in the folder `name`."""

    def run(name: str, settings: TrainSettings = FAST, layers: Sequence[int] = (1,), **more: Any) -> Run:
        return train(tiny_base, place(tiny_base, layers), data, tmp_path / name, settings, **more)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_adapters(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def progress(phase: str, done: int, total: int) -> None:
        if phase == "train" and done == step:
            raise KeyboardInterrupt

    return progress


def test_files_and_record(tiny_base: BaseModel, data: Dataset, valid: Dataset, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    placement = place(tiny_base, [1, 2], objective="last")
    out = tmp_path / "runs" / "a"
    record = train(tiny_base, placement, data, out, replace(FAST, steps=12), valid=valid, progress=lambda *call: calls.append(call))
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "placement.json",
        "run.json",
    ]
    assert json.loads((out / "run.json").read_text()) == record.to_json()
    assert Placement.load(out / "placement.json") == placement
    assert record.schema_ == "layercard-run/1"
    assert record.layers_in_backward == "2/3"
    assert record.steps == 12 == len(record.losses)
    assert record.loss_reduction == record.loss_before - record.loss_after > 0
    low, high = record.loss_reduction_interval
    assert low <= record.loss_reduction <= high
    assert record.perplexity_before == pytest.approx(np.exp(record.loss_before))
    assert record.trainable_parameters == sum(weight.numel() for weight in weights(out).values())
    assert record.adapter_bytes == (out / "adapter_model.safetensors").stat().st_size
    assert record.train_seconds > 0
    assert record.peak_memory_bytes > 12 * record.trainable_parameters  # weights and both moments, in float32
    assert record.data["records"] == 10
    assert record.valid["labelled_tokens"] == sum(record.valid["per_record"]["labelled"])
    assert record.versions["torch"] == version("torch")
    assert record.started.endswith("+00:00")
    assert [call for call in calls if call[0] == "train"] == [("train", step, 12) for step in range(1, 13)]
    assert {"loss before", "train", "loss after"} == {call[0] for call in calls}


def test_saved_adapter_loads_with_plain_peft_to_the_same_logits(
    tiny_base: BaseModel, data: Dataset, valid: Dataset, tmp_path: Path
) -> None:
    record = train(tiny_base, place(tiny_base, [0, 2]), data, tmp_path / "a", FAST, valid=valid)
    plain = PeftModel.from_pretrained(build_tiny("llama"), str(tmp_path / "a")).eval()
    ids = torch.tensor([valid.examples[0].input_ids])
    with torch.no_grad(), loaded(tiny_base, tmp_path / "a") as ours:
        logits = ours(input_ids=ids).logits
        assert torch.equal(plain(input_ids=ids).logits, logits)
        assert not torch.allclose(logits, build_tiny("llama")(input_ids=ids).logits)
        losses = [labelled_losses(plain, collate(valid.examples, [row], 1))[0].sum().item() for row in range(len(valid))]
    assert sum(losses) / valid.labelled_tokens == pytest.approx(record.loss_after, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_and_random_states_are_as_before(family: str, data: Dataset, valid: Dataset, tmp_path: Path) -> None:
    base = base_of(family)
    before = state_of(base.model)
    placement = place(base, [1])
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    train(base, placement, data, tmp_path / "a", FAST, valid=valid)
    with pytest.raises(KeyboardInterrupt):
        train(base, placement, data, tmp_path / "b", FAST, progress=stop_at(2))
    assert not (tmp_path / "b" / "run.json").exists()
    assert_same(before, state_of(base.model))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    train(base, placement, data, tmp_path / "c", FAST, valid=valid)
    assert_equal_adapters(tmp_path / "a", tmp_path / "c")


def test_the_loss_is_per_labelled_token_of_the_whole_accumulated_batch(
    run: Callable[..., Run], tiny_base: BaseModel, data: Dataset, tmp_path: Path
) -> None:
    whole = run("whole", replace(FAST, batch_size=4))
    parts = run("parts", replace(FAST, batch_size=1, accumulation=4))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    first = [data.examples[row] for row in shuffled(len(data), 16, seed=0)[:4]]
    assert len({example.labelled for example in first}) > 1  # else a mean of means would do as well
    nats = sum(labelled_losses(tiny_base.model, collate([example], [0], 1))[0].sum().item() for example in first)
    assert whole.losses[0] == pytest.approx(nats / sum(example.labelled for example in first), rel=1e-5)
    for name, weight in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weight, weights(tmp_path / "parts")[name], rtol=1e-2, atol=1e-3)
    assert whole.tokens_seen == parts.tokens_seen


def test_one_step_is_adamw_on_the_gradient_of_that_loss(tiny_base: BaseModel, data: Dataset, tmp_path: Path) -> None:
    """The first AdamW update moves each weight by the learning rate against its gradient's sign."""
    placement = place(tiny_base, [1])
    train(tiny_base, placement, data, tmp_path / "a", replace(FAST, steps=1, scheduler="constant"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with adapted(tiny_base, placement, rank=2) as model:
            batch = collate(data.examples, shuffled(len(data), 2, seed=0), 1)
            losses, _ = labelled_losses(model, batch)
            (losses.sum() / int((batch.labels[:, 1:] != IGNORED).sum())).backward()
            trained = weights(tmp_path / "a")
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # B starts at zero, so the saved weight is the update itself
                    update = trained[name.replace(".default", "")]
                    sure = weight.grad.abs() > 1e-5
                    torch.testing.assert_close(update[sure], -1e-2 * weight.grad.sign()[sure], rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_gives_the_adapter_of_an_undisturbed_run(run: Callable[..., Run], valid: Dataset, tmp_path: Path, dropout: float) -> None:
    settings = replace(FAST, steps=9, save_steps=2, dropout=dropout, accumulation=2)
    undisturbed = run("undisturbed", settings, (0, 1), valid=valid)
    with pytest.raises(KeyboardInterrupt):
        run("a", settings, (0, 1), valid=valid, progress=stop_at(7))
    assert not (tmp_path / "a" / "run.json").exists()
    checkpoint = last_checkpoint(tmp_path / "a" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-6"
    calls: list[tuple[str, int]] = []
    resumed = run("a", settings, (0, 1), valid=valid, resume=True, progress=lambda phase, done, total: calls.append((phase, done)))
    assert [done for phase, done in calls if phase == "train"] == [7, 8, 9]
    assert_equal_adapters(tmp_path / "undisturbed", tmp_path / "a")
    for key in ("losses", "loss_after", "steps", "tokens_seen", "peak_memory_bytes"):
        assert getattr(resumed, key) == getattr(undisturbed, key), key
    assert resumed.train_seconds > 0


def test_resume_passes_over_a_checkpoint_that_was_cut_off(run: Callable[..., Run], tmp_path: Path) -> None:
    settings = replace(FAST, steps=6, save_steps=2)
    run("undisturbed", settings)
    with pytest.raises(KeyboardInterrupt):
        run("a", settings, progress=stop_at(5))
    newest = tmp_path / "a" / "checkpoints" / "checkpoint-4"
    (newest / "log.json").unlink()
    (newest / "optimizer.pt").write_bytes(b"half a fi")
    run("a", settings, resume=True)
    assert_equal_adapters(tmp_path / "undisturbed", tmp_path / "a")


def test_resume_after_the_last_step_only_measures_and_saves(run: Callable[..., Run], valid: Dataset, tmp_path: Path) -> None:
    settings = replace(FAST, save_steps=3)
    undisturbed = run("undisturbed", settings, valid=valid)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "loss after":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("a", settings, valid=valid, progress=stop)
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    phases: set[str] = set()
    resumed = run("a", settings, valid=valid, resume=True, progress=lambda phase, *_: phases.add(phase))
    assert phases == {"loss before", "loss after"}
    assert_equal_adapters(tmp_path / "undisturbed", tmp_path / "a")
    assert (resumed.losses, resumed.loss_after) == (undisturbed.losses, undisturbed.loss_after)


def test_resume_starts_where_nothing_was_saved_and_returns_what_is_finished(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("a", progress=stop_at(2))
    record = run("a", resume=True)
    run("new", resume=True)
    assert_equal_adapters(tmp_path / "new", tmp_path / "a")
    monkeypatch.setattr(trainer_module, "AdapterTrainer", None)
    assert run("a", replace(FAST, report_to="wandb"), resume=True) == record


def test_resume_with_other_settings_data_or_layers_is_refused(
    run: Callable[..., Run], tiny_base: BaseModel, valid: Dataset, tmp_path: Path
) -> None:
    run("a")
    with pytest.raises(TrainingError, match=r"rank 2, not 4.*--force"):
        run("a", replace(FAST, rank=4), resume=True)
    with pytest.raises(TrainingError, match="a run with method lora, not dora"):
        run("a", replace(FAST, method="dora"), resume=True)
    with pytest.raises(TrainingError, match=r"layers \[1\], not \[2\]"):
        run("a", FAST, (2,), resume=True)
    with pytest.raises(TrainingError, match="data"):
        train(tiny_base, place(tiny_base, [1]), valid, tmp_path / "a", FAST, resume=True)
    with pytest.raises(OutputError, match="give one of them"):
        run("a", resume=True, force=True)


def test_an_output_is_kept_unless_forced(run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("a", progress=stop_at(1))
    with pytest.raises(OutputError, match=r"unfinished run; pass --resume .* --force"):
        run("a")
    run("a", force=True)
    with pytest.raises(OutputError, match=r"finished run; .*--force"):
        run("a")


def test_an_adapter_stays_until_its_replacement_is_finished(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, longer = tmp_path / "a", replace(FAST, steps=6, save_steps=2)
    first = run("a")
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        run("a", longer, force=True, progress=stop_at(5))
    with pytest.raises(TrainingError, match="the loss is"):
        run("a", replace(FAST, learning_rate=1e30, max_grad_norm=0.0, scheduler="constant"), force=True)
    with pytest.raises(KeyboardInterrupt):
        run("a", longer, force=True, progress=stop_at(5))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert run("a", resume=True) == first

    # The new one goes on, and is put in place also where a first attempt at that was cut short.
    whole = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda path, to: 1 / 0 if path.parent.name == ".new" and path.name == "run.json" else whole(path, to)
    )
    steps: list[int] = []
    with pytest.raises(ZeroDivisionError):
        run("a", longer, resume=True, progress=lambda phase, done, total: steps.append(done))
    monkeypatch.undo()
    assert steps == [5, 6]
    assert run("a", longer, resume=True).steps == 6
    run("undisturbed", longer)
    assert_equal_adapters(out, tmp_path / "undisturbed")
    assert sorted(path.name for path in out.iterdir()) == sorted([*before, "checkpoints"])
    assert (out / "notes.txt").read_text() == "mine"


def test_folders_that_are_no_run(run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, more, words in (
        ("file", {}, "is a file"),
        ("file/below", {}, "cannot write the folder"),
        ("other", {}, "not empty"),
        ("other", {"resume": True}, "holds no run to resume"),
    ):
        with pytest.raises(OutputError, match=words):
            run(name, **more)
    assert run("empty").loss_before is None


def test_a_loss_that_is_not_finite_ends_the_run(tiny_base: BaseModel, data: Dataset, tmp_path: Path) -> None:
    before = state_of(tiny_base.model)
    wild = replace(FAST, learning_rate=1e30, max_grad_norm=0.0, scheduler="constant")
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+; lower the learning rate \(1e\+30\)"):
        train(tiny_base, place(tiny_base, [1]), data, tmp_path / "a", wild)

    def spoil(phase: str, done: int, total: int) -> None:
        if done == total:
            next(w for name, w in tiny_base.model.named_parameters() if "lora_B" in name).data.fill_(float("inf"))

    with pytest.raises(TrainingError, match=r"lora_B.* is not finite after training; lower the learning rate \(0.01\) or alpha \(16\)$"):
        train(tiny_base, place(tiny_base, [1]), data, tmp_path / "b", FAST, progress=spoil)
    assert not list(tmp_path.glob("?/run.json"))
    assert not list(tmp_path.glob("?/adapter_model.safetensors"))
    assert_same(before, state_of(tiny_base.model))


def test_adapters_that_do_not_learn(run: Callable[..., Run], tiny_base: BaseModel, tmp_path: Path) -> None:
    """A huge alpha makes gradients that overflow; a module whose output is multiplied by zero has none."""
    with pytest.raises(TrainingError, match=r"the gradient's norm is inf at step 1; lower the learning rate \(0.01\) or alpha \(1e\+38\)$"):
        huge = replace(FAST)
        object.__setattr__(huge, "alpha", 1e38)  # more than the settings let through
        run("a", huge)
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    state = {name: weight.clone() for name, weight in tiny_base.model.state_dict().items()}
    layer = tiny_base.model.model.layers[1]
    try:
        layer.mlp.gate_proj.weight.data.zero_()
        layer.mlp.up_proj.weight.data.zero_()  # neither can leave zero while the other's output is zero
        base = wrap_model(tiny_base.model, tiny_tokenizer(), name="idle")
        data = load_data(str(write_records(tmp_path / "idle.jsonl", tiny_records(10))), base.tokenizer)
        record = train(base, place(base, [1]), data, tmp_path / "b", replace(FAST, steps=21))
        few = [note for note in record.notes if "still zero after 20 steps" in note]
        assert len(few) == 1 and "model.layers.1.mlp.down_proj.lora_B" in few[0]
        for weight in layer.parameters():
            weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
        base = wrap_model(tiny_base.model, tiny_tokenizer(), name="zero")
        paths = [path for path in place(base, [1]).paths if path.endswith(("gate_proj", "up_proj"))]
        with pytest.raises(TrainingError, match=r"no adapter has learnt anything in 4 steps: .*lora_B are zero"):
            train(base, place(base, [1]).changed(paths=tuple(paths)), data, tmp_path / "c", FAST)
    finally:
        tiny_base.model.load_state_dict(state)


def test_watching_takes_a_tenth_of_the_training(
    run: Callable[..., Run], tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more held-out records than that, but 24; before and after, all are measured."""
    many = load_data(str(write_records(tmp_path / "many.jsonl", tiny_records(60))), tiny_base.tokenizer)
    measured: list[int] = []

    def measure(model: Any, pad_id: int, records: Dataset, **more: Any) -> RecordLosses:
        measured.append(len(records))
        return held_out_losses(model, pad_id, records, **more)

    monkeypatch.setattr("layercard.training.train.held_out_losses", measure)
    for batch_size, watched in ((2, 24), (100, 30)):  # 10 steps of 100 records: a tenth is 100 records trained, or 300 measured
        measured.clear()
        record = run(f"batches of {batch_size}", replace(FAST, steps=10, patience=10, batch_size=batch_size), valid=many)
        assert measured == [60, *[watched] * 10, 60]
        nats, labelled = (record.valid["per_record"][name][:watched] for name in ("nats_before", "labelled"))
        assert record.curve[0].loss == pytest.approx(sum(nats) / sum(labelled))


def test_the_adapter_of_the_lowest_held_out_loss_is_kept(run: Callable[..., Run], valid: Dataset, tmp_path: Path) -> None:
    """At a rate far too high the held-out loss turns: the run stops, and is the same when it was interrupted on the way."""
    settings = replace(FAST, steps=40, learning_rate=0.08, scheduler="constant", patience=2, save_steps=3)
    how = {"valid": valid, "fast": FastSettings(prefix_cache=False)}  # what the cache keeps depends on the batch, to rounding
    watched = run("a", settings, **how)
    losses = {moment.step: moment.loss for moment in watched.curve if moment.step}
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == list(range(4, watched.steps + 1, 4))
    assert best == watched.steps - 8 < 32
    assert watched.loss_after == pytest.approx(losses[best], rel=1e-6)
    line = f"training stopped after step {watched.steps} of 40; the held-out loss was lowest ({losses[best]:.4f}) after step {best}"
    assert watched.notes == [f"{line}, whose adapter is kept"]
    for step in (6, best + 5, watched.steps):
        with pytest.raises(KeyboardInterrupt):
            run(f"at {step}", settings, **how, progress=stop_at(step))
        again = run(f"at {step}", settings, **how, resume=True)
        assert_equal_adapters(tmp_path / "a", tmp_path / f"at {step}")
        assert (again.losses, again.notes, again.loss_after) == (watched.losses, watched.notes, watched.loss_after)
    gentle = run("b", replace(settings, learning_rate=1e-3, steps=7), **how)
    assert gentle.steps == 7 and gentle.notes[0].startswith("training took all 7 steps; ")
    with pytest.raises(TrainingError, match="patience watches the loss on held-out records, and there are none"):
        run("c", settings)


@pytest.mark.parametrize(
    "file", ["trainer_state.json", "optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "log.json", "scheduler.pt"]
)
def test_a_damaged_checkpoint_is_named_in_one_line(file: str, run: Callable[..., Run], tmp_path: Path) -> None:
    settings = replace(FAST, steps=6, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run("a", settings, progress=stop_at(5))
    newest = tmp_path / "a" / "checkpoints" / "checkpoint-4"
    for content in (b"", b"{", (newest / file).read_bytes()[: (newest / file).stat().st_size // 2]):
        (newest / file).write_bytes(content)
        with pytest.raises(TrainingError, match=r"checkpoint-4") as caught:
            run("a", settings, resume=True)
        assert "\n" not in str(caught.value) and "cannot write" not in str(caught.value)
    shutil.rmtree(newest)
    assert run("a", settings, resume=True).steps == 6


def test_a_full_disk_while_the_adapter_is_written(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", full)
        with pytest.raises(OutputError, match=r"cannot write the adapter to .*No space left on device.*; make room, then pass --resume"):
            run("a")
    assert run("a", resume=True).steps == 4


def test_records_longer_than_learned_positions_are_refused(tmp_path: Path) -> None:
    for family, limit in (("gpt2", 512), ("opt", 512)):
        base = base_of(family)
        long = load_data(str(write_records(tmp_path / "long.jsonl", [{"prompt": "a" * 600, "completion": "b"}])), base.tokenizer)
        with pytest.raises(DataError, match=f"record 1: 60[0-9] tokens, and the model has {limit} positions"):
            train(base, place(base, [1]), long, tmp_path / "a", FAST)


def test_running_out_of_memory_says_what_to_do(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(trainer_module.AdapterTrainer, "compute_loss", full)
    with pytest.raises(TrainingError, match=r"memory ran out with 2 records in a batch; .* batch size") as caught:
        run("a")
    assert "\n" not in str(caught.value)


def test_data_without_labels_and_a_foreign_placement_are_refused(tiny_base: BaseModel, data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no labelled token"):
        train(tiny_base, place(tiny_base, [1]), Dataset((), "empty.jsonl", ""), tmp_path / "a", FAST)
    with pytest.raises(PlacementError, match="with other weights"):
        train(tiny_base, place(base_of("gpt2"), [1]), data, tmp_path / "a", FAST)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_backward_stops_below_the_lowest_adapted_layer(family: str, data: Dataset) -> None:
    base = base_of(family, num_hidden_layers=5) if family != "gpt2" else base_of(family, n_layer=5)
    placement = place(base, [3, 4])
    needs, reached = {}, set()
    hooks = []

    def watch(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            needs[index] = hidden.requires_grad
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: reached.add(index))

        return hook

    with adapted(base, placement, rank=2) as model:
        model.train()
        hooks = [block.module.register_forward_hook(watch(block.index)) for block in base.blocks]
        losses, _ = labelled_losses(model, collate(data.examples, [0, 1], base.pad_id))
        losses.mean().backward()
        for hook in hooks:
            hook.remove()
    assert needs == {0: False, 1: False, 2: False, 3: True, 4: True}
    assert reached == {3, 4}


def test_fewer_layers_in_backward_take_less_memory_and_equal_work_equal_memory(data: Dataset, tmp_path: Path) -> None:
    base = base_of(num_hidden_layers=6)
    peaks = {}
    for name, layers in {"last": [5], "all": range(6), "first": [0], "last again": [5]}.items():
        record = train(base, place(base, layers), data, tmp_path / name, FAST)
        assert record.layers_in_backward == f"{6 - layers[0]}/6"
        peaks[name] = record.peak_memory_bytes
    assert peaks["last"] < 0.7 * peaks["first"] < 0.7 * peaks["all"]
    assert peaks["last"] == peaks["last again"]


def test_training_is_silent_under_pythons_default_warning_filters(tiny_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "t.jsonl", tiny_records(4))
    script = (
        "import sys; from layercard.models.load import load_model; from layercard.data.load import load_data\n"
        "from layercard.adapters.apply import place\n"
        "from layercard.settings import TrainSettings; from layercard.training.train import train\n"
        "base = load_model(sys.argv[1], device='cpu'); data = load_data(sys.argv[2], base.tokenizer)\n"
        "train(base, place(base, [1]), data, sys.argv[3], TrainSettings(steps=2, save_steps=1), valid=data)\n"
    )
    arguments = [str(tiny_folder), str(tmp_path / "t.jsonl"), str(tmp_path / "a")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bfloat16_for_one_run_only(run: Callable[..., Run], tmp_path: Path) -> None:
    plain, short, again = run("a"), run("b", replace(FAST, bf16=True)), run("c")
    assert short.losses != plain.losses == again.losses
    assert short.losses == pytest.approx(plain.losses, rel=0.02)
    assert {weight.dtype for weight in weights(tmp_path / "b").values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_half_precision(dtype: torch.dtype, data: Dataset, valid: Dataset, tmp_path: Path) -> None:
    base = wrap_model(build_tiny("llama").to(dtype), tiny_tokenizer())
    record = train(base, place(base, [1]), data, tmp_path / "a", replace(FAST, steps=8), valid=valid)
    assert record.model["dtype"] == str(dtype).removeprefix("torch.")
    assert record.loss_reduction > 0
    assert {weight.dtype for weight in weights(tmp_path / "a").values()} == {torch.float32}
    plain = PeftModel.from_pretrained(build_tiny("llama").to(dtype), str(tmp_path / "a")).eval()
    ids = torch.tensor([valid.examples[0].input_ids])
    with torch.no_grad(), loaded(base, tmp_path / "a") as ours:
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_the_order_depends_on_the_seed_alone() -> None:
    order = shuffled(5, 13, seed=3)
    assert len(order) == 13
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order[:7] == shuffled(5, 7, seed=3)
    assert order != shuffled(5, 13, seed=4)


def test_the_heaviest_step_is_the_one_with_the_longest_batch(data: Dataset) -> None:
    short, long = data.examples[0], replace(data.examples[1], input_ids=(1,) * 400, labels=(1,) * 400)
    assert heaviest_step([long, short, short, short, long, short], batch_size=1, accumulation=2) == 2
    assert heaviest_step([long, short], batch_size=1, accumulation=1) == 1
    assert heaviest_step([long], batch_size=1, accumulation=1) == 0


def test_epochs_are_rounded_up_to_steps() -> None:
    assert TrainSettings().total_steps(9) == 3
    assert TrainSettings(epochs=0.1, batch_size=8).total_steps(9) == 1
    assert TrainSettings(epochs=2, batch_size=3, accumulation=2).total_steps(9) == 3
    assert TrainSettings(steps=7).total_steps(9) == 7


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"steps": 1, "epochs": 1.0}, "give one"),
        ({"steps": 0}, "steps is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 1.5}, "whole number"),
        ({"batch_size": True}, "whole number"),
        ({"epochs": 0.0}, "above 0"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"dropout": 1.0}, "from 0 to 0.99"),
        ({"learning_rate": -1.0}, "above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"save_steps": -1}, "from 0"),
        ({"scheduler": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(TrainingError, match=word):
        TrainSettings(**wrong)


def test_every_scheduler_trains(run: Callable[..., Run]) -> None:
    for name in SCHEDULERS:
        run(name, replace(FAST, steps=1, scheduler=name), (2,))


def test_places_to_log_to(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="did you mean 'tensorboard'"):
        run("a", replace(FAST, report_to="tensorbord"))
    monkeypatch.setattr(trainer_module, "get_available_reporting_integrations", list)
    with pytest.raises(TrainingError, match="not installed"):
        run("b", replace(FAST, report_to="tensorboard, wandb"))


@pytest.mark.parametrize("place", ["tensorboard", "wandb", "trackio"])
def test_what_is_logged_arrives(run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Each place that docs/run.md names, where its package is installed; without network."""
    if importlib.util.find_spec(place) is None:  # not imported yet: trackio looks where to write when it is
        pytest.skip(f"needs {place}")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run("a", replace(FAST, report_to=place))
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert any(word in name for name in written for word in ("tfevents", "run-", ".db")), written
