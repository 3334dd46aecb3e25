"""`verify` finds adapters that landed elsewhere than they were meant to, without the model's weights."""

import json
import os
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

from layercard.adapters.apply import adapted, loaded, place
from layercard.adapters.files import PLACEMENT_FILE
from layercard.adapters.verify import Verification, verify_adapter, verify_config
from layercard.errors import ModelError, PlacementError
from layercard.models.load import load_model, wrap_model
from layercard.models.skeleton import skeleton
from layercard.serving.adapter_switch import load_adapter
from test_adapters import assert_same, state_of
from tiny import build_tiny, tiny_tokenizer
from tricky import experts, hybrid, with_tower

Command = Callable[..., tuple[int, str, str]]


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
        "1 adapted modules lack saved weights, such as base_model.model.model.layers.2.self_attn.q_proj (lora_A and lora_B): "
        "they stay as they begin",
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
        (worded, (), "layers_to_transform.0: Input should be a valid integer"),
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


BROKEN = {
    "renamed": "match nothing",
    "half": "(lora_B): they stay as they begin",
    "nan": "1 saved weights hold NaN or infinity",
    "inf": "1 saved weights hold NaN or infinity",
    "shape": "size mismatch",
    "none": "lacks adapter_model.safetensors",
}


def broken(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Saved weights with a fault of a kind."""
    first = next(iter(weights))
    if kind in ("nan", "inf"):
        weights[first][0, 0] = float(kind)
    return {
        "renamed": {key.replace("self_attn", "attention"): weight for key, weight in weights.items()},
        "half": {key: weight for key, weight in weights.items() if key != first.replace("lora_A", "lora_B")},
        "shape": {key: weight[:, 1:].clone() for key, weight in weights.items()},
        "none": {},
    }.get(kind, weights)


@pytest.mark.parametrize("kind", BROKEN)
def test_what_verify_refuses_nobody_loads(kind: str, tmp_path: Path, tiny_folder: Path, tiny_file: Path, layercard: Command) -> None:
    """One check for `verify`, `eval`, `latency` and serving."""
    base = load_model(tiny_folder)
    adapter = saved_adapter(build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file(broken(load_file(file), kind), file)
    before = state_of(base.model)
    with pytest.raises(PlacementError) as caught:
        load_adapter(base, adapter)
    assert BROKEN[kind] in str(caught.value)
    assert_same(before, state_of(base.model))
    for command in (
        ("verify", adapter, "--model", tiny_folder),
        ("eval", tiny_folder, "--data", tiny_file, "--adapter", adapter, "--device", "cpu"),
        ("latency", tiny_folder, "--adapter", adapter, "--device", "cpu"),
    ):
        status, _, err = layercard(*command)
        assert (status, err.count("\n")) == (2, 1), err
        assert BROKEN[kind] in err or (kind, command[0]) == ("none", "verify")


def test_a_module_that_is_trained_whole_needs_its_weights(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = saved_adapter(build_tiny("llama", tie_word_embeddings=False), config, tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file({key: weight for key, weight in load_file(file).items() if "lora_" in key}, file)
    (words,) = verify_adapter(build_tiny("llama", tie_word_embeddings=False), adapter).differences
    assert words.endswith("lm_head.weight is to be trained whole and has no saved weights")


def test_an_adapter_without_effect_is_loaded_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_adapter(build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path, trained=False)
    with loaded(wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny"), tmp_path):
        assert "it loads but has no effect in 3 of 3 modules: lora_B is zero there" in caplog.text


def test_an_unconverted_pissa_adapter_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    saved_adapter(build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), tmp_path)
    base = wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny")
    before = state_of(base.model)
    with loaded(base, tmp_path) as model:
        assert not torch.equal(
            model.get_base_model().model.layers[1].self_attn.q_proj.base_layer.weight,
            before["weights"]["model.layers.1.self_attn.q_proj.weight"],
        )
    assert_same(before, state_of(base.model))


def mlx_adapter(folder: Path, *, blocks: str = "model.layers", **changes: Any) -> Path:
    """The form of mlx-lm of the adapter that PEFT has in `folder`."""
    names = {"lora_A": "lora_a", "lora_B": "lora_b"}
    weights = {}
    for key, weight in load_file(folder / "adapter_model.safetensors").items():
        name, part, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        weights[f"{name.replace('transformer.h', blocks)}.{names[part]}"] = weight.T.contiguous()
    path = folder.with_name(f"{folder.name}-mlx")
    path.mkdir()
    save_file(weights, path / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0} | changes.pop("lora_parameters", {})
    (path / "adapter_config.json").write_text(
        json.dumps({"model": "mlx-community/tiny-4bit", "fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters} | changes)
    )
    return path


@pytest.mark.parametrize(
    ("family", "name", "keys"), [("llama", "q_proj", ["self_attn.q_proj"]), ("llama", "q_proj", None), ("gpt2", "c_attn", None)]
)
def test_an_adapter_of_mlx_is_read(family: str, name: str, keys: list[str] | None, tmp_path: Path, layercard: Command) -> None:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=[name], layers_to_transform=[1, 2], fan_in_fan_out=family == "gpt2")
    adapter = saved_adapter(build_tiny(family), config, tmp_path / "adapter")
    mlx = mlx_adapter(adapter, blocks="model.h", lora_parameters={"keys": keys} if keys else {})
    result = verify_adapter(build_tiny(family), mlx, name="tiny")
    assert "the adapter was trained on 'mlx-community/tiny-4bit', this model is 'tiny'" in result.notes
    assert result.as_planned and result.adapted_layers == (1, 2) and set(result.saved or ()) == set(result.adapted)
    base = wrap_model(build_tiny(family), tiny_tokenizer(), name="tiny")
    ids = torch.arange(8)[None]
    with loaded(base, adapter) as model:
        expected = model(ids).logits
    with loaded(base, mlx) as model:
        torch.testing.assert_close(model(ids).logits, expected)
    folder = saved_model(build_tiny(family), tmp_path / "base")
    status, out, _ = layercard("verify", mlx, "--model", folder, "--serve", "vllm", "--json")
    assert status == 2 and json.loads(out)["differences"] == [
        "vLLM cannot read an adapter of mlx-lm; convert it to PEFT's form, or merge it"
    ]
    status, out, _ = layercard("verify", mlx / "adapter_config.json", "--model", folder, "--layers", "1")
    assert status == 2 or keys is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_parameters": {"keys": ["self_attn.q_porj"]}}, "'self_attn.q_porj', which matches nothing"),
        ({"lora_parameters": {"rank": "8"}}, "lora_parameters.rank: Input should be a valid integer"),
        ({"lora_parameters": {"rank": 0}}, "`r` should be a positive integer"),
        ({"lora_parameters": {"rank": 4}}, "size mismatch"),
        ({"fine_tune_type": "full"}, "is of fine_tune_type 'full', so no adapter"),
        ({"num_layers": "all"}, "num_layers: Input should be a valid integer"),
        ({"num_layers": 1, "lora_parameters": {"keys": ["self_attn.q_proj"]}}, "saved weights of 1 modules match nothing"),
    ],
)
def test_what_is_wrong_with_an_adapter_of_mlx(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], layers_to_transform=[1, 2])
    mlx = mlx_adapter(saved_adapter(build_tiny("llama"), config, tmp_path / "adapter"), **changes)
    with pytest.raises(PlacementError) as caught:
        verify_adapter(build_tiny("llama"), mlx).check()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words", "refused"),
    [
        ({"r": 24}, "start it with --enable-lora --max-lora-rank 32", False),
        ({"layers_to_transform": [1]}, "1 of 3 layers cost as much time and memory as all", False),
        ({"use_rslora": True, "r": 4}, "have linear modules q_proj", False),
        ({"target_modules": ["lm_head"]}, "only classes with embedding_modules take lm_head", False),
        ({"r": 600}, "vLLM serves ranks up to 512, and this one has 600", True),
        ({"use_dora": True}, "vLLM does not serve use_dora = True", True),
        ({"bias": "lora_only"}, "vLLM does not serve bias = 'lora_only'", True),
        ({"modules_to_save": ["lm_head"]}, "vLLM does not serve modules_to_save = ['lm_head']", True),
        ({"init_lora_weights": "pissa"}, "it began out of the weights (pissa)", True),
        ({"rank_pattern": {"q_proj": 4}}, "vLLM serves 3 modules at another scale than they were trained at", True),
        ({"rank_pattern": {"q_proj": 32}, "alpha_pattern": {"q_proj": 32}}, "--max-lora-rank 32", False),
    ],
)
def test_what_vllm_makes_of_it(settings: dict[str, Any], words: str, refused: bool) -> None:
    config = LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings)
    result = verify_config(build_tiny("llama", tie_word_embeddings=False), config, serve="vllm")
    assert any(words in each for each in (result.differences if refused else result.notes)), result
    assert result.as_planned != refused
    plain = verify_config(build_tiny("llama"), config)
    assert "vLLM" not in " ".join((*plain.notes, *plain.differences))


def test_vllm_serves_nothing_but_lora_and_is_told_of_experts_and_towers(layercard: Command, tmp_path: Path) -> None:
    assert "vLLM serves LoRA only, not IA3" in verify_config(build_tiny("llama"), CONFIG_IA3, serve="vllm").differences[0]
    names = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    notes = verify_config(experts(), LoraConfig(use_rslora=True, **names), serve="vllm").notes
    assert any("stacked experts need a class with LoRA for fused experts, and rsLoRA's scale is not used there" in each for each in notes)
    notes = verify_config(with_tower(), LoraConfig(target_modules=["q_proj"]), serve="vllm").notes
    assert any("adapters outside the text model are left out, such as model.vision_tower" in each for each in notes)
    status, _, err = layercard("verify", tmp_path, "--model", tmp_path, "--serve", "sglang")
    assert status == 2 and "sglang" in err and err.count("\n") == 1


CONFIG_IA3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
ODD = (None, True, -1, 10**30, 1.5, "", "\ud800", "(", [], [1, "a"], [10**9], {"a": []}, {"q_proj": 10**30}, [[[]]])
FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
          "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "init_lora_weights", "use_dora", "use_rslora",
          "task_type", "peft_type", "base_model_name_or_path", "layer_replication", "loftq_config", "eva_config", "megatron_config",
          "trainable_token_indices", "fan_in_fan_out", "inference_mode", "auto_mapping", "peft_version", "lora_bias")  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_odd_configurations_are_verified_or_refused_in_one_line(field: str, tmp_path: Path) -> None:
    model, base = build_tiny("llama"), wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny")
    adapter = saved_adapter(build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    usual = json.loads((adapter / "adapter_config.json").read_text())
    for value in ODD:
        (adapter / "adapter_config.json").write_text(json.dumps(usual | {field: value}))
        for use in (lambda: verify_adapter(model, adapter, serve="vllm").check(), lambda: load_adapter(base, adapter)):
            try:
                use()
            except PlacementError as error:
                assert "\n" not in str(error)


def test_layers_by_the_billion_take_no_time(tmp_path: Path, layercard: Command) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 10**9, 10**18])
    assert "are not in the model" in differences(build_tiny("llama"), config)[0]
    digits = tmp_path / "digits.json"
    digits.write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": ' + "9" * 5000 + "}")
    for arguments in ((digits,), (digits, "--layers", "0-99999999999"), (digits, "--layers", "9" * 5000), (digits, "--layers", "5-3")):
        status, out, err = layercard("verify", *arguments, "--model", "gpt2-medium")
        assert (status, out, err.count("\n")) == (2, "", 1) and len(err) < 1200


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "placement.json"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_read(name: str, tmp_path: Path) -> None:
    adapter = saved_adapter(build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    (adapter / name).unlink(missing_ok=True)
    os.mkfifo(adapter / name)
    base = wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny")
    for use in (lambda: verify_adapter(base.model, adapter), lambda: load_adapter(base, adapter)):
        with pytest.raises(PlacementError, match="is not a regular file"):
            use()
