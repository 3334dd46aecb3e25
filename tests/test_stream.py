"""A profile of a model that stays on disk: the same card, one block in memory at a time."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layercard.card.card import LayerCard
from layercard.commands.main import run
from layercard.data.load import Dataset, load_data
from layercard.errors import LayercardError, ModelError, OutputError, TrainingError
from layercard.files import alone
from layercard.models.load import load_model
from layercard.models.losses import labelled_logits
from layercard.models.stored import INDEX, Weights, weight_files
from layercard.models.streamed import StreamedModel, open_model
from layercard.models.streamed_pass import BlockByBlock, Boundaries, forward, walking
from layercard.profiling.profile import profile_records as profile
from layercard.settings import ProfileSettings
from test_experts import build as with_experts
from tiny import DISTINCT_FAMILIES, build_tiny, tiny_records, tiny_tokenizer, write_records

SETTINGS = ProfileSettings(rank=4, batch_size=3, label_samples=2, probe_records=4, cost=False)


def saved(folder: Path, family: str, shard: str = "50GB", **changes: Any) -> Path:
    build_tiny(family, **changes).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def data_for(folder: Path, tokenizer: Any) -> Dataset:
    return load_data(write_records(folder / "records.jsonl", tiny_records(14)), tokenizer)


def comparable(card: LayerCard) -> dict[str, Any]:
    value = card.to_json()
    value["settings"].pop("stream", None)
    for layer in value["layers"]:  # a root of differences of losses, which enlarges their rounding
        if layer["longest_step"]:
            layer["longest_step"] = {end: round(number, 5) for end, number in layer["longest_step"].items()}
    return value


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_the_card_is_that_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / family, family, shard="40KB")
    base, streamed = load_model(folder), open_model(str(folder))
    assert streamed.base.fingerprint == base.fingerprint
    data = data_for(tmp_path, base.tokenizer)
    expected, found = comparable(profile(base, data, SETTINGS)), comparable(profile(streamed, data, SETTINGS))
    assert found == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_block_at_a_time_is_in_memory_and_none_at_the_end(family: str, tmp_path: Path) -> None:
    peaks = []
    for layers in (3, 9):
        changes = {"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers}
        streamed = open_model(str(saved(tmp_path / f"{family}-{layers}", family, **changes)))
        before = streamed.weights.bytes_read
        profile(streamed, data_for(tmp_path, streamed.base.tokenizer), ProfileSettings(rank=2, probe="none", cost=False))
        assert all(weight.device.type == "meta" for weight in streamed.base.model.parameters()) and streamed.resident_bytes == 0
        peaks.append(streamed.peak_bytes)
        blocks = sum(weight.nbytes for block in streamed.blocks for weight in block.module.parameters())
        assert 2 * blocks <= streamed.weights.bytes_read - before <= 2 * blocks + 4 * 4 * 32 * 700
    assert peaks[0] == peaks[1]


def test_boundaries_on_disk_and_another_dtype(tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama")
    base = load_model(folder, dtype="bfloat16")
    data = data_for(tmp_path, base.tokenizer)
    streamed = open_model(str(folder), dtype="bfloat16")
    found = profile(streamed, data, SETTINGS, boundaries=tmp_path / "between")
    assert comparable(found) == comparable(profile(base, data, SETTINGS))
    assert found.settings["dtype"] == "bfloat16"
    assert not list((tmp_path / "between").glob("*.safetensors")), "nothing is left there"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_head_runs_on_a_few_positions_at_a_time(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / family, family)
    data = data_for(tmp_path, tiny_tokenizer())
    whole = profile(open_model(str(folder)), data, SETTINGS)
    sizes: list[int] = []

    def watched(*args: Any) -> Any:
        found = labelled_logits(*args)
        sizes.append(len(found[1]))
        return found

    monkeypatch.setattr("layercard.models.streamed_pass.LOGITS", 2 * 3 * 128)
    monkeypatch.setattr("layercard.models.streamed_pass.labelled_logits", watched)
    parts = profile(open_model(str(folder)), data, SETTINGS)
    assert max(sizes) <= 2 * SETTINGS.batch_size
    assert parts.data.loss == pytest.approx(whole.data.loss, rel=1e-6)
    for measure in ("resnorm", "centrality", "step_probe", "predicted_gain"):
        assert parts.values(measure) == pytest.approx(whole.values(measure), rel=1e-3, abs=1e-6), measure


@pytest.mark.parametrize("stop", [("forward", 2), ("backward", 1), ("backward", 2), ("step probe", 16)])
def test_an_interrupted_profile_goes_on_to_the_same_card(stop: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layercard.checkpoint.EVERY", 0.0)
    monkeypatch.setattr("layercard.checkpoint.SHARE", 0.0)
    folder = saved(tmp_path / "llama", "llama")
    data = data_for(tmp_path, tiny_tokenizer())
    expected = profile(open_model(str(folder)), data, SETTINGS)

    def interrupt(phase: str, done: int, total: int) -> None:
        if (phase, done) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(open_model(str(folder)), data, SETTINGS, interrupt, state=tmp_path / "state")
    ran: list[tuple[str, int]] = []
    streamed = open_model(str(folder))
    card = profile(streamed, data, SETTINGS, lambda phase, done, _: ran.append((phase, done)), state=tmp_path / "state")
    assert card.to_json() == expected.to_json()  # with what was read, and the most that was in memory
    if stop[0] != "forward":
        assert ("backward", 1) not in ran, "the last block was done before the interrupt"
    if stop[0] == "step probe":
        assert min(done for phase, done in ran if phase == "step probe") == stop[1], "the block that was at work is the first to run"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = saved(tmp_path / "llama", "llama"), write_records(tmp_path / "r.jsonl", tiny_records(8))
    card = tmp_path / "card.json"
    arguments = ["profile", str(folder), "--data", str(records), "--rank", "2"]
    assert run([*arguments, "--stream", "--no-cost", "-o", str(card)]) == 0
    assert run([*arguments, "--no-cost", "-o", str(tmp_path / "plain.json")]) == 0
    assert comparable(LayerCard.load(card)) == comparable(LayerCard.load(tmp_path / "plain.json"))
    assert LayerCard.load(card).settings["stream"]["bytes_read"] > 0
    assert run([*arguments, "--stream", "-o", str(tmp_path / "timed.json")]) == 0
    phases = LayerCard.load(tmp_path / "timed.json").phases
    assert [phase.name for phase in phases] == ["forward", "head", "backward", "step-probe"]
    assert all(phase.seconds > 0 for phase in phases)
    capsys.readouterr()
    assert run([*arguments, "--stream", "--probe", "train", "-o", str(tmp_path / "other.json")]) == 2
    assert "--stream leaves it on disk" in capsys.readouterr().err


def broken_header(folder: Path, change: Any) -> None:
    """Rewrite the header of a folder's only safetensors file."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def renamed(header: dict[str, Any]) -> dict[str, Any]:
    return {("other." + name if "q_proj" in name else name): entry for name, entry in header.items()}


def with_first(**changes: Any) -> Any:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in header if name != "__metadata__")
        return header | {name: header[name] | changes}

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: b"not json at all", "not a whole safetensors"),
        (lambda _: b"[1, 2]", "not a whole safetensors"),
        (lambda _: b"[" * 50_000, "not a whole safetensors"),
        (with_first(data_offsets=[0, 10**15]), "places"),
        (with_first(data_offsets=[-4, 10]), "places"),
        (with_first(shape=[10**9, 10**9]), "places"),
        (with_first(shape="x"), "places"),
        (with_first(dtype="F8_E4M3"), "quantised weights cannot be streamed"),
        (with_first(dtype="I32"), "stored as whole numbers, and its model is not quantised"),
        (with_first(data_offsets=7), "nothing usable"),
        (renamed, "hold no model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_broken_files_end_in_one_line(change: Any, words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama")
    broken_header(folder, change)
    with pytest.raises(ModelError, match=words) as caught:
        open_model(str(folder))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama", shard="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    first = next(folder.glob("model-00001-*.safetensors"))
    shutil.move(first, tmp_path / first.name)
    with pytest.raises(ModelError, match="lacks model-00001"):
        open_model(str(folder))
    shutil.move(tmp_path / first.name, first)
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(ModelError, match="places"):
        open_model(str(folder))
    (folder / INDEX).write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ModelError, match="no weight_map"):
        open_model(str(folder))
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot be streamed"):
        open_model(str(gguf))
    with pytest.raises(LayercardError):
        open_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="dtype"):
        open_model(str(saved(tmp_path / "whole", "llama")), dtype="int3")


def test_the_training_probe_needs_the_model_in_memory(tmp_path: Path) -> None:
    streamed = open_model(str(saved(tmp_path / "llama", "llama")))
    with pytest.raises(TrainingError, match="needs the model in memory"):
        profile(streamed, data_for(tmp_path, streamed.base.tokenizer), ProfileSettings(probe="train", cost=False))


def test_costs_are_estimated_from_shapes(tmp_path: Path) -> None:
    streamed = open_model(str(saved(tmp_path / "llama", "llama")))
    card = profile(streamed, data_for(tmp_path, streamed.base.tokenizer), ProfileSettings(probe="none", rank=2, cost=True))
    assert card.cost is not None and len(card.cost.layers) == 3
    assert all(layer.forward_seconds > 0 and layer.adapter_parameters > 0 for layer in card.cost.layers)
    weights = sum(weight.numel() for weight in streamed.base.model.parameters())
    assert card.cost.weights_bytes == 4 * weights and streamed.resident_bytes == 0


def test_what_is_too_large_for_the_memory_goes_beside_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = open_model(str(saved(tmp_path / "llama", "llama")))
    data = data_for(tmp_path, streamed.base.tokenizer)
    seen: list[list[str]] = []

    def watch(phase: str, done: int, total: int) -> None:
        folder = tmp_path / "state" / "boundaries"
        seen.append([path.name for path in folder.glob("half-*")] if folder.exists() else [])

    monkeypatch.setattr("layercard.profiling.streamed.free_bytes", lambda _: 4 * 4 * data.tokens * 32 * 4 - 1)
    settings = ProfileSettings(probe="none", rank=2, cost=False)
    expected = comparable(profile(streamed, data, settings))
    found = profile(streamed, data, settings, watch, state=tmp_path / "state")
    assert comparable(found) == expected and "half-0-0-0.safetensors" in seen[0]


def test_a_model_on_the_hub_is_fetched_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "llama", "llama")
    monkeypatch.setattr("layercard.models.streamed.hub_answers", lambda: True)
    monkeypatch.setattr("layercard.models.load.snapshot_download", lambda name, **how: str(folder))
    assert open_model("someone/llama").base.fingerprint == open_model(str(folder)).base.fingerprint

    def refused(name: str, **how: Any) -> str:
        raise OSError("401 of\nthe server")

    monkeypatch.setattr("layercard.models.load.snapshot_download", refused)
    with pytest.raises(ModelError, match="did not give it") as caught:
        open_model("someone/llama")
    assert "(401 of the server)" in str(caught.value)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    streamed = open_model(str(saved(tmp_path / "llama", "llama")))
    data = data_for(tmp_path, streamed.base.tokenizer)
    with alone(tmp_path / "between"), pytest.raises(OutputError, match="another run"):
        profile(streamed, data, SETTINGS, boundaries=tmp_path / "between")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one(family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    with_experts(family).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert any(".experts.1." in name for name in file.keys())  # noqa: SIM118
    base, streamed = load_model(folder), open_model(str(folder))
    assert streamed.base.fingerprint == base.fingerprint
    data = data_for(tmp_path, base.tokenizer)
    assert comparable(profile(streamed, data, SETTINGS)) == comparable(profile(base, data, SETTINGS))


def test_weights_are_read_as_they_are_stored(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(4).bfloat16(), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights(weight_files(tmp_path))
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(weights.read(name), expected, rtol=0, atol=0)
    assert weights.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert weights.read("a", torch.bfloat16).dtype == torch.bfloat16 and weights.read("b", torch.bfloat16).dtype == torch.int64
    with pytest.raises(ModelError, match="hold no d"):
        weights.read("d")


def test_streamed_weights_are_shared_where_they_are_tied(tmp_path: Path) -> None:
    streamed: StreamedModel = open_model(str(saved(tmp_path / "gpt2", "gpt2")))
    model = streamed.base.model
    with streamed.loaded([model.get_input_embeddings(), model.get_output_embeddings()]):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert streamed.resident_bytes == model.get_input_embeddings().weight.nbytes
    assert model.get_input_embeddings().weight.device.type == "meta"


def test_a_model_in_memory_runs_block_by_block_too(tmp_path: Path) -> None:
    base = load_model(saved(tmp_path / "gpt2", "gpt2"))
    examples = data_for(tmp_path, base.tokenizer).examples
    model = StreamedModel.in_memory(base)
    walk = BlockByBlock(model, examples, 3, Boundaries(), "some")
    with torch.no_grad(), walking(model):
        forward(model, [walk])
        for number, batch in enumerate(walk.batches):
            found = torch.cat([logits for logits, *_ in walk.logits(number, walk.hidden(number, len(model.blocks)))])
            torch.testing.assert_close(found, labelled_logits(base.model, batch)[0])
    assert model.peak_bytes == 0
