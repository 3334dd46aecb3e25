"""A model is itself in any type: what was made in one serves in another."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from layercard.adapters.apply import check_model, loaded, place
from layercard.card.card import rounding_between
from layercard.commands.main import run
from layercard.data.load import load_data
from layercard.errors import BenchmarkError, PlacementError
from layercard.models.load import load_model, wrap_model
from layercard.profiling.profile import plan_of
from layercard.selection.placement import Placement
from layercard.settings import ProfileSettings, TrainSettings
from layercard.training.evaluate import evaluate
from layercard.training.train import train
from layercard.trials.trial import Task, Trial, run_trials
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records


class FourBits(nn.Linear):
    """Stands in for the 4-bit maps of bitsandbytes: whole numbers from 0 to 15 with a scale for each row."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__(original.in_features, original.out_features, bias=False, device="meta")
        scale = original.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(((original.weight.detach() / scale).round() + 8).to(torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, (self.weight.to(x.dtype) - 8) * self.scale.to(x.dtype))


def four_bits(folder: Path) -> Any:
    """The model in a folder with the maps of its blocks in four bits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            model.set_submodule(name, FourBits(module))
    return wrap_model(model, tiny_tokenizer())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose weights are stored in bfloat16, as most are."""
    build_tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_records(tmp_path / "data.jsonl", tiny_records(24))
    return tmp_path / "model"


def test_card_in_float32_training_in_bfloat16_and_evaluation_in_float32(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(tmp_path / "data.jsonl")]
    card, placement = str(tmp_path / "card.json"), str(tmp_path / "placement.json")
    assert run(["profile", str(folder), *data, "--dtype", "float32", "--no-cost", "--probe", "none", "-o", card]) == 0
    assert run(["select", card, "--k", "2", "-o", placement]) == 0
    losses = {}
    for trained in ("float32", "bfloat16", "float16"):
        adapter = str(tmp_path / trained)
        how = ["--placement", placement, "--dtype", trained, "--steps", "6", "--learning-rate", "0.01", "-o", adapter]
        assert run(["train", str(folder), *data, *how]) == 0
        for measured in ("float32", "bfloat16", "float16"):
            capsys.readouterr()
            assert run(["eval", str(folder), *data, "--adapter", adapter, "--dtype", measured, "--json"]) == 0
            captured = capsys.readouterr()
            losses[trained, measured] = json.loads(captured.out)["loss"]
            assert ("rounding" in captured.err) == (trained != measured)
    assert max(losses.values()) - min(losses.values()) < 0.05


def test_card_in_float32_training_in_four_bits_and_evaluation_in_float32(folder: Path, tmp_path: Path) -> None:
    base, quantised = load_model(folder, device="cpu"), four_bits(folder)
    assert quantised.fingerprint == base.fingerprint
    data = load_data(tmp_path / "data.jsonl", base.tokenizer)
    card, placement = str(tmp_path / "card.json"), str(tmp_path / "placement.json")
    line = ["profile", str(folder), "--data", str(tmp_path / "data.jsonl"), "--no-cost", "--probe", "none", "-o", card]
    assert run(line) == run(["select", card, "--k", "2", "-o", placement]) == 0
    for model, name in ((base, "float"), (quantised, "quantised")):
        train(model, Placement.load(placement), data, tmp_path / name, TrainSettings(steps=8, learning_rate=0.01))
        for other in (base, quantised):
            before = evaluate(other, data, with_generation=False).loss
            with loaded(other, tmp_path / name) as adapted:
                assert evaluate(other, data, model=adapted, with_generation=False).loss < before


@pytest.mark.parametrize("kind", ["four bits", "GGUF", "GGUF in float16"])
def test_files_made_for_a_model_serve_its_rounded_copies_with_a_note(
    kind: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the weights that were rounded are not at hand: a folder in 4 bits from somebody else, a GGUF file."""
    base = load_model(folder, device="cpu")
    placement = place(base, [0, 2])
    if kind == "four bits":
        quantised = four_bits(folder)
        quantised.model.name_or_path = ""
        copies = [wrap_model(quantised.model, tiny_tokenizer(), name="from somebody else")]
    else:  # the file's numbers are those of the model in 8 bits
        model = AutoModelForCausalLM.from_pretrained(folder)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 127
                module.weight.data = (module.weight.data / scale).round() * scale
        dtype = "float16" if "16" in kind else "float32"
        model.name_or_path = ""
        monkeypatch.setattr("layercard.models.load.read_gguf", lambda path, dtype: (model.to(dtype), tiny_tokenizer()))
        (tmp_path / "model.gguf").touch()
        copies = [load_model(tmp_path / "model.gguf", device="cpu", dtype=dtype)]
    other = wrap_model(build_tiny("llama", seed=1), tiny_tokenizer(), name="other")
    for copy in copies:
        assert copy.rounded and copy.fingerprint != base.fingerprint
        for here, made in ((copy, placement), (base, place(copy, [0, 2]))):
            caplog.clear()
            check_model(here, made)
            assert "taken for the same model" in caplog.text
        with pytest.raises(PlacementError, match="with other weights; select again"):
            check_model(other, place(copy, [0]))
    # Of two models in full, a small difference is a difference.
    with torch.no_grad():
        tuned = AutoModelForCausalLM.from_pretrained(folder)
        tuned.model.layers[0].mlp.up_proj.weight *= 1.01
    with pytest.raises(PlacementError, match="with other weights"):
        check_model(wrap_model(tuned, tiny_tokenizer(), name="tuned"), placement)


def test_what_is_resumed_or_compared_is_of_one_type(folder: Path, tmp_path: Path) -> None:
    data, settings = tmp_path / "data.jsonl", TrainSettings(steps=2, save_steps=1)
    float32, bfloat16 = (load_model(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    records = load_data(data, float32.tokenizer)
    assert plan_of(float32, records, ProfileSettings()) != plan_of(bfloat16, records, ProfileSettings())
    task = Task("tiny", float32, records, {"test": records})
    trials = [Trial("tiny", (1,), settings)]
    run_trials(trials, task, tmp_path / "trials")
    with pytest.raises(BenchmarkError, match="was made in float32, now the model is in bfloat16"):
        run_trials(trials, replace(task, base=bfloat16), tmp_path / "trials")


def test_folders_in_four_and_eight_bits_through_the_command_line(
    folder: Path, tmp_path: Path, layercard: Callable[..., tuple[int, str, str]]
) -> None:
    """As others upload them: nothing names the model that was rounded."""
    pytest.importorskip("bitsandbytes", reason="4-bit maps need bitsandbytes: pip install 'layercard[quantised]'")
    for bits in ("4bit", "8bit"):
        how = BitsAndBytesConfig(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit", bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
        model.save_pretrained(tmp_path / bits)
        tiny_tokenizer().save_pretrained(tmp_path / bits)
    data, card, placement = ("--data", tmp_path / "data.jsonl"), tmp_path / "card.json", tmp_path / "placement.json"
    assert layercard("profile", folder, *data, "--no-cost", "--probe", "none", "-o", card)[0] == 0
    assert layercard("select", card, "--k", "2", "-o", placement)[0] == 0
    for name in (folder, tmp_path / "4bit", tmp_path / "8bit"):
        adapter = tmp_path / f"adapter-{name.name}"
        status, _, err = layercard("train", name, *data, "--placement", placement, "--steps", "2", "-o", adapter)
        assert status == 0 and err.count("taken for the same model") == (name != folder)  # once, though it is checked twice
        for other in (folder, tmp_path / "4bit", tmp_path / "8bit"):
            assert layercard("eval", other, *data, "--adapter", adapter)[0] == 0


@pytest.mark.parametrize("sketch", ["zz", "3c0", "3c00", 5, None, ["3c00"], "7e00" * 16, "0" * 64])
def test_an_odd_sketch_is_none(sketch: object) -> None:
    model = {"name": "m", "fingerprint": "a", "layers": 3, "rounded": True, "sketch": "3c00" * 16}
    assert rounding_between(model, {**model, "fingerprint": "b"}) == 0.0
    for pair in ((model, {**model, "fingerprint": "b", "sketch": sketch}), ({**model, "sketch": sketch}, {**model, "fingerprint": "b"})):
        assert rounding_between(*pair) == math.inf
