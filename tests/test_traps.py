"""Each trap of PEFT's own choice of layers, as the installed version has it, and what happens here instead.

One trap is elsewhere: stock gradient checkpointing puts every layer back into backward (tests/test_cut.py).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import PreTrainedModel

from layercard.adapters.apply import adapted, apply, place
from layercard.adapters.files import CONFIG_FILE
from layercard.adapters.verify import verify_config
from layercard.errors import PlacementError
from layercard.models.adapted import adapted_paths
from layercard.models.load import BaseModel, wrap_model
from layercard.selection.placement import Placement
from tiny import build_tiny, tiny_tokenizer
from tricky import experts, hybrid, with_tower

Q_PROJ = {f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)}


def stock(model: PreTrainedModel, **settings: Any) -> set[str]:
    """What PEFT adapts when it is asked in its own way."""
    return set(adapted_paths(get_peft_model(model, LoraConfig(r=2, **settings))))


def ours(base: BaseModel, placement: Placement, config: PeftConfig | None = None) -> set[str]:
    """What is adapted when a placement is applied."""
    with adapted(base, placement, config or LoraConfig(r=2)) as model:
        return set(adapted_paths(model))


def narrowed(base: BaseModel, layers: Iterable[Any], *names: str) -> Placement:
    """The maps of some names in the layers, and the experts where `experts` is one of the names."""
    whole = place(base, layers)
    stacks = tuple(stack.path for layer in whole.layers for stack in base.blocks[layer].stacks if "experts" in names)
    return whole.changed(paths=tuple(path for path in whole.paths if path.endswith(names)), parameters=stacks)


def based(model: PreTrainedModel) -> BaseModel:
    return wrap_model(model, tiny_tokenizer())


def test_an_empty_list_adapts_every_layer(tiny_base: BaseModel) -> None:
    assert stock(build_tiny("llama"), target_modules=["q_proj"], layers_to_transform=[]) == Q_PROJ
    with pytest.raises(PlacementError, match="an empty placement adapts nothing"):
        place(tiny_base, [])
    with pytest.raises(PlacementError, match=r"asks for layers \[\]"):
        apply(tiny_base.model, place(tiny_base, [1]), LoraConfig(layers_to_transform=[]))
    found = verify_config(tiny_base.model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[]))
    assert "layers_to_transform is empty, which PEFT reads as all layers (0-2)" in found.differences


def test_indices_out_of_range_are_dropped_silently(tiny_base: BaseModel) -> None:
    assert stock(build_tiny("llama"), target_modules=["q_proj"], layers_to_transform=[1, 30]) == {"model.layers.1.self_attn.q_proj"}
    with pytest.raises(PlacementError, match="layer 30 is outside the model"):
        place(tiny_base, [1, 30])
    found = verify_config(tiny_base.model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 30]))
    assert found.differences == ("layer 30 is not in the model, which has layers 0-2: PEFT drops it silently",)


def test_an_index_from_the_end_matches_nothing(tiny_base: BaseModel) -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        stock(build_tiny("llama"), target_modules=["q_proj"], layers_to_transform=[-1])
    with pytest.raises(PlacementError, match="layer -1 is outside the model, which has layers 0 to 2"):
        place(tiny_base, [-1])


@pytest.mark.parametrize("layers", [list(np.array([1])), range(1, 2)], ids=["numpy", "range"])
def test_numpy_integers_and_ranges_cannot_be_saved(layers: Any, tiny_base: BaseModel, tmp_path: Path) -> None:
    model = get_peft_model(build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=layers))
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path / "stock")
    with adapted(tiny_base, place(tiny_base, layers), rank=2) as model:
        model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert set(saved["target_modules"]) == set(place(tiny_base, [1]).paths)


@pytest.mark.parametrize("modules", ["all-linear", ".*q_proj"])
def test_all_linear_and_patterns_cannot_be_limited_to_layers(modules: str, tiny_base: BaseModel) -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(target_modules=modules, layers_to_transform=[1])
    placement = place(tiny_base, [1]) if modules == "all-linear" else narrowed(tiny_base, [1], "q_proj")
    assert ours(tiny_base, placement, LoraConfig(r=2, target_modules=modules)) == set(placement.paths)


def test_exact_names_go_past_the_layers(tiny_base: BaseModel) -> None:
    wrong = "model.layers.0.self_attn.q_proj"
    settings = {"target_modules": [wrong, "v_proj"], "layers_to_transform": [1]}
    assert stock(build_tiny("llama"), **settings) == {wrong, "model.layers.1.self_attn.v_proj"}
    with pytest.raises(PlacementError, match="target_modules names"):
        apply(tiny_base.model, narrowed(tiny_base, [1], "v_proj"), LoraConfig(**settings))
    found = verify_config(tiny_base.model, LoraConfig(**settings))
    assert found.differences == ("you asked for layer 1, layer 0 is adapted too",)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ],
    ids=["names of maps", "names of parameters"],
)
def test_experts_are_adapted_in_every_layer_whatever_the_layers(settings: dict[str, Any]) -> None:
    found = stock(experts(), layers_to_transform=[1], **settings)
    assert {path for path in found if path.endswith("q_proj")} == {"model.layers.1.self_attn.q_proj"}
    assert {int(path.split(".")[2]) for path in found if "experts" in path} == {0, 1, 2}
    base = based(experts())
    placement = narrowed(base, [1], "q_proj", "experts")
    assert ours(base, placement) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    verified = verify_config(base.model, LoraConfig(layers_to_transform=[1], **settings))
    assert verified.differences == ("you asked for layer 1, experts of all 3 layers are adapted",)


def test_the_vision_tower_is_adapted_with_the_text_model() -> None:
    found = stock(with_tower(), target_modules=["q_proj"], layers_to_transform=[1])
    tower = {path for path in found if "vision" in path}
    assert len(tower) == 1 and found - tower == {"model.language_model.layers.1.self_attn.q_proj"}
    base = based(with_tower())
    assert ours(base, narrowed(base, [1], "q_proj")) == found - tower
    (difference,) = verify_config(base.model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])).differences
    assert difference.startswith("layer 1 of the vision tower (model.vision_tower") and difference.endswith("is adapted too")


def test_a_block_without_the_named_map_gets_nothing_silently() -> None:
    assert stock(hybrid(), target_modules=["q_proj"], layers_to_transform=[0, 1]) == {"model.layers.1.self_attn.q_proj"}
    base = based(hybrid())
    assert {int(path.split(".")[2]) for path in ours(base, place(base, [0, 1]))} == {0, 1}
    with pytest.raises(PlacementError, match=r"names layers \[0, 1\] but its paths lie in layers \[1\]"):
        apply(base.model, narrowed(base, [0, 1], "q_proj"))
    found = verify_config(base.model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1]))
    assert found.differences == ("block 0 has no q_proj and gets nothing",)


def test_a_rank_without_an_alpha_changes_the_scale(tiny_base: BaseModel) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16, "rank_pattern": {"q_proj": 16}}
    model = get_peft_model(build_tiny("llama"), LoraConfig(r=4, **settings)).get_base_model()
    scales = {name: model.get_submodule(f"model.layers.1.self_attn.{name}").scaling["default"] for name in ("q_proj", "v_proj")}
    assert scales == {"q_proj": 1.0, "v_proj": 4.0}
    with pytest.raises(PlacementError, match="rank_pattern names 'q_proj' and alpha_pattern does not"):
        apply(tiny_base.model, narrowed(tiny_base, [1], "q_proj", "v_proj"), LoraConfig(r=4, **settings))
    plain = narrowed(tiny_base, [1], "q_proj", "v_proj")
    with pytest.raises(PlacementError, match="must name every path"):
        plain.changed(rank_pattern={plain.paths[0]: 16})
    ranks = dict(zip(plain.paths, (16, 4), strict=True))
    both = plain.changed(rank_pattern=ranks, alpha_pattern={path: 4.0 * rank for path, rank in ranks.items()})
    with adapted(tiny_base, both) as wrapped:
        inner = wrapped.get_base_model()
        assert {inner.get_submodule(path).scaling["default"] for path in both.paths} == {4.0}


def test_rank_0_is_an_error_everywhere(tiny_base: BaseModel) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        stock(build_tiny("llama"), target_modules=["q_proj"], rank_pattern={"q_proj": 0})
    plain = narrowed(tiny_base, [1], "q_proj")
    with pytest.raises(PlacementError, match="ranks are whole numbers of at least 1"):
        plain.changed(rank_pattern={plain.paths[0]: 0}, alpha_pattern={plain.paths[0]: 1.0})


def test_a_path_is_taken_for_the_end_of_others() -> None:
    """A second model inside the first one, as draft models and teachers are, has the same paths behind a prefix."""

    def doubled() -> PreTrainedModel:
        model = build_tiny("llama")
        model.add_module("draft", build_tiny("llama", seed=1))
        return model

    path = "model.layers.1.self_attn.q_proj"
    assert stock(doubled(), target_modules=[path]) == {path, f"draft.{path}"}
    base = based(doubled())
    assert ours(base, narrowed(base, [1], "q_proj")) == {path}
    # PEFT cannot leave out parameters by name, so there the placement is refused
    mixed = experts()
    mixed.add_module("draft", experts(seed=1))
    base = based(mixed)
    with pytest.raises(PlacementError, match=r"planned: extra draft\.model\.layers\.1\.mlp\.experts\.down_proj"):
        apply(base.model, narrowed(base, [1], "q_proj", "experts"))


def test_pissa_leaves_its_mark_in_the_base_model(tiny_base: BaseModel) -> None:
    model = build_tiny("llama")
    path = "model.layers.1.self_attn.q_proj"
    before = model.get_submodule(path).weight.detach().clone()
    unloaded = get_peft_model(model, LoraConfig(r=2, target_modules=[path], init_lora_weights="pissa")).unload()
    assert not before.equal(unloaded.get_submodule(path).weight)
    placement = narrowed(tiny_base, [1], "q_proj")
    with adapted(tiny_base, placement, LoraConfig(r=2, init_lora_weights="pissa")):
        assert not before.equal(tiny_base.model.get_submodule(path).get_base_layer().weight)
    assert before.equal(tiny_base.model.get_submodule(path).weight)
