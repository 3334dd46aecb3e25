"""`verify` finds adapters that landed elsewhere than they were meant to, without the model's weights."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from layercard.adapters.apply import adapted, place
from layercard.adapters.files import PLACEMENT_FILE
from layercard.adapters.verify import Verification, verify_adapter, verify_config
from layercard.commands.main import run
from layercard.errors import ModelError, PlacementError
from layercard.models.load import load_model, wrap_model
from layercard.models.skeleton import skeleton
from test_adapters import assert_same, state_of
from tiny import build_tiny, tiny_tokenizer
from tricky import experts, hybrid, with_tower

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def layercard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("COLUMNS", "160")

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


def saved_model(model: PreTrainedModel, folder: Path, *, weights: bool = False) -> Path:
    """A model's folder, by default with its configuration only."""
    if weights:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")  # a folder of a model has weights; they are not read
    return folder


def saved_adapter(model: PreTrainedModel, config: PeftConfig, folder: Path, *, trained: bool = True, base: str | None = None) -> Path:
    """An adapter as PEFT makes and writes it, with random weights where `trained`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the patterns that PEFT itself writes for experts
        wrapped = get_peft_model(model, config)
    if trained:
        with torch.no_grad():
            for weight in wrapped.parameters():
                if weight.requires_grad:
                    weight.normal_(0.5, 0.1)
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(folder)
    return folder


def differences(model: PreTrainedModel, config: PeftConfig, **options: Any) -> tuple[str, ...]:
    return verify_config(model, config, **options).differences


def test_an_adapter_of_this_tool_is_as_planned(tmp_path: Path, layercard: Command) -> None:
    folder = saved_model(build_tiny("llama"), tmp_path / "base", weights=True)
    base = load_model(str(folder))
    placement = place(base, [1, 2])
    with adapted(base, placement, rank=2) as model:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(weight)
        model.save_pretrained(tmp_path / "adapter")
    placement.save(tmp_path / "adapter" / PLACEMENT_FILE)
    status, out, err = layercard("verify", tmp_path / "adapter", "--model", folder, "--weights")
    assert (status, err) == (0, "")
    assert "as planned" in out and "layers 1-2" in out
    status, out, err = layercard("verify", tmp_path / "adapter", "--model", folder, "--json")
    found = json.loads(out)
    assert status == 0 and found["as_planned"] and found["adapted_layers"] == [1, 2]
    assert sorted(found["adapted"]) == sorted(found["saved"]) == sorted(placement.paths)


def test_planted_1_experts_of_all_layers(tmp_path: Path, layercard: Command) -> None:
    """transformers 5 turns the experts' names into parameters, and for those PEFT ignores `layers_to_transform`."""
    names = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = saved_adapter(experts(), LoraConfig(r=2, target_modules=names, layers_to_transform=[1]), tmp_path / "adapter")
    folder = saved_model(experts(), tmp_path / "base")
    status, out, err = layercard("verify", adapter, "--model", folder, "--layers", "1")
    assert status == 2
    assert err == f"error: {adapter} is not as planned: you asked for layer 1, experts of all 3 layers are adapted\n"
    assert "experts of all 3 layers" in out


def test_planted_2_the_vision_tower(tmp_path: Path, layercard: Command) -> None:
    adapter = saved_adapter(with_tower(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]), tmp_path / "adapter")
    folder = saved_model(with_tower(), tmp_path / "base")
    status, out, err = layercard("verify", adapter, "--model", folder, "--json")
    found = json.loads(out)
    assert status == 2 and err.count("\n") == 1 and not found["as_planned"]
    (difference,) = found["differences"]
    assert "layer 1 of the vision tower (model.vision_tower" in difference and "is adapted too" in difference
    assert found["adapted_layers"] == [1]


@pytest.mark.parametrize("kind", ["keys", "shapes", "other base", "same shape"])
def test_planted_3_an_adapter_of_another_base(kind: str, tmp_path: Path, layercard: Command) -> None:
    folder = saved_model(build_tiny("llama"), tmp_path / "base", weights=kind == "same shape")
    other = {"shapes": {"hidden_size": 64}, "same shape": {"seed": 1}}.get(kind, {})
    made = build_tiny("gpt2" if kind == "keys" else "llama", **other)
    adapter = tmp_path / "adapter"
    if kind == "same shape":
        base = wrap_model(made, tiny_tokenizer(), name="base")
        with adapted(base, place(base, [1])) as model:
            model.save_pretrained(adapter)
        place(base, [1]).save(adapter / PLACEMENT_FILE)
    else:
        targets = ["c_attn"] if kind == "keys" else ["q_proj"]
        saved_adapter(made, LoraConfig(r=2, target_modules=targets), adapter, base="some/other" if kind == "other base" else None)
    options = ("--weights",) if kind == "same shape" else ()
    status, _, err = layercard("verify", adapter, "--model", folder, *options)
    assert status == 2 and err.count("\n") == 1
    words = {
        "keys": "target_modules names 'c_attn', which matches nothing in this model",
        "shapes": "the saved weights do not fit this model: size mismatch",
        "other base": "the adapter was trained on 'some/other', this model is",
        "same shape": "the adapter is for 'base' (fingerprint",
    }
    assert words[kind] in err


def test_planted_4_indices_that_are_dropped(tmp_path: Path, layercard: Command) -> None:
    folder = saved_model(build_tiny("llama"), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 7, 8])
    config.save_pretrained(tmp_path / "config")
    status, _, err = layercard("verify", tmp_path / "config" / "adapter_config.json", "--model", folder)
    assert status == 2
    assert "layers 7-8 are not in the model, which has layers 0-2: PEFT drops them silently" in err


@pytest.mark.parametrize("kind", ["axolotl", "llama-factory", "other"])
def test_configurations_of_trainers_are_read(kind: str, tmp_path: Path, layercard: Command) -> None:
    folder = saved_model(experts(), tmp_path / "base")
    file = tmp_path / "train.yaml"
    file.write_text(
        {
            "axolotl": "adapter: lora\nlora_target_modules: [q_proj, gate_proj, up_proj, down_proj]\npeft_layers_to_transform: [1]\n",
            "llama-factory": "finetuning_type: lora\nlora_target: model.layers.1.self_attn.q_proj\n",
            "other": "epochs: 3\n",
        }[kind]
    )
    status, out, err = layercard("verify", file, "--model", folder, "--layers", "1", "--json")
    if kind == "axolotl":
        assert (status, json.loads(out)["differences"]) == (2, ["you asked for layer 1, experts of all 3 layers are adapted"])
    elif kind == "llama-factory":
        assert (status, err, json.loads(out)["adapted"]) == (0, "", ["model.layers.1.self_attn.q_proj"])
    else:
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "name a configuration of one of them" in err


def test_a_block_without_the_module_gets_nothing() -> None:
    (difference,) = differences(hybrid(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 2]))
    assert difference == "block 2 has no q_proj and gets nothing"
    found = verify_config(hybrid(), LoraConfig(target_modules=["q_proj", "out_proj"], layers_to_transform=[1, 2]))
    assert found.as_planned and set(found.notes) == {"block 2 has no q_proj", "block 1 has no out_proj"}


@pytest.mark.parametrize(
    ("settings", "layers", "words"),
    [
        ({"layers_to_transform": []}, None, "layers_to_transform is empty, which PEFT reads as all layers (0-2)"),
        ({"layers_to_transform": [1]}, [0, 1], "the configuration asks for layer 1, not 0-1"),
        ({}, [1], "you asked for layer 1, layers 0, 2 are adapted too"),
        (
            {"target_modules": ["q_porj", "v_proj"]},
            None,
            "target_modules names 'q_porj', which matches nothing in this model; did you mean 'q_proj'?",
        ),
        ({"layers_to_transform": [-1]}, None, "layer -1 is not in the model"),
        ({"layers_to_transform": [-1]}, None, "PEFT refuses it"),
        ({"target_modules": ["q_proj", "lm_head"]}, [0, 1, 2], "lm_head is adapted too"),
        ({"bias": "all"}, [0, 1, 2], "bias='all' trains the biases of every layer"),
    ],
)
def test_what_differs_is_said(settings: dict[str, Any], layers: list[int] | None, words: str) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"]} | settings)
    assert any(words in each for each in differences(build_tiny("llama"), config, layers=layers))


def test_a_placement_is_compared_path_by_path_and_rank_by_rank() -> None:
    base = wrap_model(build_tiny("llama"), tiny_tokenizer())
    placement = place(base, [1])
    assert differences(base.model, LoraConfig(target_modules=list(placement.paths)), placement=placement) == ()
    (words,) = differences(base.model, LoraConfig(target_modules=list(placement.paths[:-1])), placement=placement)
    assert words == f"{placement.paths[-1]} planned and not adapted"
    smaller = placement.changed(paths=placement.paths[:2])
    (words,) = differences(base.model, LoraConfig(target_modules=list(placement.paths[:3])), placement=smaller)
    assert words == f"{placement.paths[2]} adapted and not planned"
    ranked = placement.changed(rank_pattern=dict.fromkeys(placement.paths, 4), alpha_pattern=dict.fromkeys(placement.paths, 8.0))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(placement.paths), rank_pattern={"q_proj": 4})
    (words,) = differences(base.model, config, placement=ranked)
    assert "7 modules have another rank or scale than planned" in words
    assert "alpha_pattern does not" in verify_config(base.model, config).notes[0]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"]),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoHaConfig(r=2, target_modules=["q_proj"]),
        LoKrConfig(r=2, target_modules=["q_proj"]),
        VeraConfig(r=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["q_proj"]),
        OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    ],
    ids=lambda config: f"{config.peft_type.value}-{vars(config).get('init_lora_weights', '')}-{vars(config).get('use_dora', '')}",
)
def test_saved_weights_of_every_method_fit_and_have_an_effect(config: PeftConfig, tmp_path: Path) -> None:
    saved_adapter(build_tiny("llama"), config, tmp_path)
    with torch.device("meta"):
        empty = type(build_tiny("llama"))(build_tiny("llama").config)
    found = verify_adapter(empty, tmp_path)
    assert found.as_planned, found.differences
    assert len(found.adapted) == 3 and set(found.saved or ()) == set(found.adapted)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=2, target_modules=["q_proj"]), IA3Config(target_modules=["q_proj"], feedforward_modules=[])]
)
def test_an_adapter_without_effect_is_found(config: PeftConfig, tmp_path: Path) -> None:
    saved_adapter(build_tiny("llama"), config, tmp_path, trained=False)
    (words,) = verify_adapter(build_tiny("llama"), tmp_path).differences
    assert words.startswith("it loads but has no effect in 3 of 3 modules: ")
    assert words.endswith("lora_B is zero there" if "lora_B" in words else "ia3_l is one there")


def test_weights_that_match_nothing_and_modules_without_weights_are_found(tmp_path: Path) -> None:
    saved_adapter(build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("layers.2.", "layers.5."): weight for name, weight in load_file(file).items()}, file)
    found = verify_adapter(build_tiny("llama"), tmp_path)
    assert found.differences == (
        "saved weights of 1 modules match nothing, such as base_model.model.model.layers.5.self_attn.q_proj: dropped on loading",
        "1 adapted modules have no saved weights, such as base_model.model.model.layers.2.self_attn.q_proj: they stay as they begin",
    )


def test_the_model_is_as_before_and_the_configuration_too() -> None:
    model = build_tiny("llama")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", layers_to_transform=[1])
    before, asked = state_of(model), config.to_dict()
    assert isinstance(verify_config(model, config), Verification)
    assert_same(before, state_of(model))
    assert config.to_dict() == asked


def test_the_skeleton_is_the_class_that_was_saved(tmp_path: Path) -> None:
    model = skeleton(str(saved_model(with_tower(), tmp_path / "vision")))
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert type(skeleton("gpt2-medium")).__name__ == "GPT2LMHeadModel"
    with pytest.raises(ModelError, match="no such"):
        skeleton(str(tmp_path / "absent"))


def test_what_is_no_adapter_ends_in_one_line(tmp_path: Path, layercard: Command) -> None:
    folder = saved_model(build_tiny("llama"), tmp_path / "base")
    (tmp_path / "empty").mkdir()
    strange = tmp_path / "strange.json"
    strange.write_text('{"peft_type": "MAGIC"}')
    worded = tmp_path / "worded.json"
    worded.write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": ["a"]}')
    raised = tmp_path / "raised.json"
    raised.write_text('{"peft_type": "LORA", "target_modules": "all-linear", "layers_to_transform": [1]}')
    pickled = tmp_path / "pickled"
    LoraConfig(target_modules=["q_proj"]).save_pretrained(pickled)
    (pickled / "adapter_model.bin").write_bytes(b"")
    for adapter, options, words in (
        (tmp_path / "empty", (), "lacks adapter_config.json"),
        (tmp_path / "absent", (), "lacks adapter_config.json"),
        (strange, (), "peft_type 'MAGIC'"),
        (worded, (), "layers_to_transform has 'a', which is not an index"),
        (raised, (), "PEFT refuses this configuration"),
        (pickled, (), "only pickled weights"),
        (pickled, ("--layers", "5-"), "--layers has '5-'"),
        (pickled, ("--layers", " "), "names no layer"),
        (pickled, ("--layers", "1", "--placement", "p.json"), "give one of them"),
        (pickled, ("--weights",), "there is no placement"),
    ):
        status, out, err = layercard("verify", adapter, "--model", folder, *options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert words in err


def test_verify_of_a_placement_for_another_depth_says_so() -> None:
    base = wrap_model(build_tiny("llama", num_hidden_layers=5), tiny_tokenizer())
    words = differences(build_tiny("llama"), LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]), placement=place(base, [1, 4]))
    assert any("which this model does not have" in each for each in words)


def test_what_trains_beside_the_adapters_and_keys_of_a_later_peft_are_noted(tmp_path: Path) -> None:
    file = tmp_path / "later.json"
    file.write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "of_2030": 1}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verify_adapter(build_tiny("llama"), file)
    assert found.as_planned
    assert found.notes == ("lm_head trained whole and saved along", "this PEFT leaves out of_2030, which it does not know")


def test_a_method_without_modules_adapts_nothing() -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert differences(build_tiny("llama"), config) == ("no module of this model is adapted",)


def test_check_raises_the_first_difference() -> None:
    found = verify_config(build_tiny("llama"), LoraConfig(target_modules=["q_proj"], layers_to_transform=[-1]), source="x.json")
    with pytest.raises(PlacementError, match=r"x\.json is not as planned: .*\(and 1 more\)"):
        found.check()
