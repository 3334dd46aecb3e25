"""Adapters lie exactly where the placement says, and the base model is unharmed once they are gone."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from layercard import adapters
from layercard.adapters import adapted, adapted_paths, apply, check_adapted, loaded, place
from layercard.errors import PlacementError
from layercard.layers import find_blocks
from layercard.models import BaseModel, wrap_model
from tiny import TINY_FAMILIES, build_tiny, tiny_tokenizer


def base_of(family: str = "llama", **changes: Any) -> BaseModel:
    return wrap_model(build_tiny(family, **changes), tiny_tokenizer(), name=f"tiny-{family}")


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that must be as before: weights, flags, modes, module identities, hooks, settings, attributes."""
    return {
        "weights": {name: weight.clone() for name, weight in model.state_dict().items()},
        "requires_grad": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "grad": {name: id(weight.grad) for name, weight in model.named_parameters()},
        "modules": {name: (id(module), module.training) for name, module in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()),
        "config": model.config.to_dict(),
        "attributes": set(vars(model)),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["weights"].keys() == after["weights"].keys()
    for name, weight in before["weights"].items():
        assert torch.equal(weight, after["weights"][name]), name
    for key in before.keys() - {"weights"}:
        assert before[key] == after[key], key


def test_place_takes_every_linear_map_of_the_layers(tiny_base: BaseModel) -> None:
    placement = place(tiny_base, range(1, 3), objective="last")
    assert placement.layers == (1, 2)
    assert placement.objective == "last"
    assert placement.model == {"name": "tiny-llama", "fingerprint": tiny_base.fingerprint, "layers": 3}
    assert len(placement.paths) == 14
    assert all(path.startswith(("model.layers.1.", "model.layers.2.")) for path in placement.paths)
    assert place(tiny_base, np.array([2, 0])).layers == (0, 2)


@pytest.mark.parametrize("layers", [[], [3], [-1], [1, 1], [0.5], ["1"]])
def test_place_refuses_layers_the_model_does_not_have(tiny_base: BaseModel, layers: list[Any]) -> None:
    with pytest.raises(PlacementError) as caught:
        place(tiny_base, layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_adapted_equals_planned_in_every_family(family: str) -> None:
    base = base_of(family)
    placement = place(base, [0, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapted(base, placement, rank=2, alpha=4.0) as model:
            assert set(adapted_paths(model)) == set(placement.paths)
            trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
            assert len(trainable) == 2 * len(placement.paths)
            assert all("lora_" in name for name in trainable)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_module_gets_its_own_rank_at_the_same_scale(family: str, tmp_path: Path) -> None:
    base = base_of(family, num_hidden_layers=12)
    placement = place(base, [1, 2, 11])
    ranks = {path: {"1": 1, "2": 5, "11": 3}[next(part for part in path.split(".") if part.isdecimal())] for path in placement.paths}
    placement = replace(placement, rank_pattern=ranks, alpha_pattern={path: 1.5 * rank for path, rank in ranks.items()})
    with adapted(base, placement, rank=8, alpha=4.0) as model:
        inner = model.get_base_model()
        for path, rank in ranks.items():
            module = inner.get_submodule(path)
            assert module.r["default"] == rank and module.scaling["default"] == pytest.approx(1.5)
            assert module.lora_A["default"].weight.shape[0] == module.lora_B["default"].weight.shape[1] == rank
        model.save_pretrained(tmp_path)
    placement.save(tmp_path / "placement.json")
    with loaded(base, tmp_path) as model:
        inner = model.get_base_model()
        assert {path: inner.get_submodule(path).r["default"] for path in ranks} == ranks
        assert {inner.get_submodule(path).scaling["default"] for path in ranks} == {1.5}


def test_layer_1_is_not_layer_11() -> None:
    base = base_of(num_hidden_layers=12)
    for layers in ([1], [11], [1, 2, 3], list(range(12))):  # from 20 modules on, PEFT shortens the list to suffixes
        placement = place(base, layers)
        with adapted(base, placement, rank=1) as model:
            assert set(adapted_paths(model)) == set(placement.paths)
            assert model.peft_config["default"].target_modules == set(placement.paths)


def test_experts_of_other_layers_and_of_this_one_stay_as_they_are() -> None:
    """transformers keeps experts as parameters, which PEFT would adapt in *all* layers if it were asked by layer index."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)
    base = wrap_model(AutoModelForCausalLM.from_config(config), tiny_tokenizer())
    placement = place(base, [1])
    with adapted(base, placement, rank=1) as model:
        assert set(adapted_paths(model)) == set(placement.paths)
        assert not any("experts" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_a_twin_path_elsewhere_in_the_model_is_left_alone() -> None:
    class Twin(nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            here, _, rest = path.partition(".")
            self.add_module(here, Twin(rest) if rest else nn.Linear(4, 4))

    model = build_tiny("llama")
    model.add_module("vision", Twin("model.layers.1.self_attn.q_proj"))
    base = wrap_model(model, tiny_tokenizer())
    assert isinstance(model.get_submodule("vision.model.layers.1.self_attn.q_proj"), nn.Linear)
    placement = place(base, [1])
    with adapted(base, placement, rank=1) as wrapped:
        assert set(adapted_paths(wrapped)) == set(placement.paths)


@pytest.mark.parametrize(("change", "word"), [("drop", "missing"), ("add", "extra")])
def test_what_peft_adapts_otherwise_is_an_error(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, change: str, word: str) -> None:
    placement = place(tiny_base, [1])
    original = adapters.get_peft_model

    def elsewhere(model: Any, config: LoraConfig) -> PeftModel:
        targets = sorted(config.target_modules)
        config.target_modules = set(targets[1:] if change == "drop" else [*targets, "model.layers.0.mlp.up_proj"])
        return original(model, config)

    before = state_of(tiny_base.model)
    monkeypatch.setattr(adapters, "get_peft_model", elsewhere)
    with pytest.raises(PlacementError, match=word) as caught, adapted(tiny_base, placement):
        pass
    assert f"{word} model.layers.{0 if change == 'add' else 1}.mlp." in str(caught.value)
    assert_same(before, state_of(tiny_base.model))


def test_a_trainable_weight_outside_the_adapters_is_an_error(tiny_base: BaseModel) -> None:
    placement = place(tiny_base, [1])
    with adapted(tiny_base, placement) as model:
        tiny_base.model.get_input_embeddings().weight.requires_grad_(True)
        with pytest.raises(PlacementError, match="outside the adapters"):
            check_adapted(model, placement)


def test_a_placement_of_another_model_is_refused(tiny_base: BaseModel) -> None:
    other = place(wrap_model(build_tiny("llama", seed=1), tiny_tokenizer(), name="other"), [1])
    with pytest.raises(PlacementError, match=f"'other'.*{tiny_base.fingerprint}") as caught, adapted(tiny_base, other):
        pass
    assert "\n" not in str(caught.value)


def test_paths_must_exist_and_agree_with_the_layers(tiny_base: BaseModel) -> None:
    placement = place(tiny_base, [1])
    misspelt = replace(placement, paths=("model.layers.1.self_attn.q_porj",))
    with pytest.raises(PlacementError, match=r"did you mean 'model\.layers\.1\.self_attn\.q_proj'"):
        apply(tiny_base.model, misspelt)
    with pytest.raises(PlacementError, match=r"layers \[1, 2\] but its paths lie in layers \[1\]"):
        apply(tiny_base.model, replace(placement, layers=(1, 2)))
    deeper = replace(placement, model=placement.model | {"layers": 99}, layers=(98,))
    with pytest.raises(PlacementError, match="98 is outside"):
        apply(tiny_base.model, deeper)
    assert not any("lora" in name for name, _ in tiny_base.model.named_modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_is_as_before_also_after_an_exception(family: str) -> None:
    base = base_of(family)
    base.model.train()
    base.model.get_input_embeddings().weight.requires_grad_(False)
    next(base.model.parameters()).grad = torch.ones_like(next(base.model.parameters()))
    before = state_of(base.model)
    with pytest.raises(KeyboardInterrupt), adapted(base, place(base, [0, 1])) as model:
        model.eval()
        model.config.use_cache = not model.config.use_cache
        model.zero_grad()
        raise KeyboardInterrupt
    assert_same(before, state_of(base.model))
    assert all(block.module is again.module for block, again in zip(base.blocks, find_blocks(base.model), strict=True))


def test_loaded_names_what_is_wrong_with_a_folder(tiny_base: BaseModel, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(PlacementError, match=r"lacks adapter_config\.json"), loaded(tiny_base, tmp_path):
        pass
    with adapted(tiny_base, place(tiny_base, [1])) as model:
        model.save_pretrained(tmp_path)
    place(tiny_base, [1]).save(tmp_path / "placement.json")
    before = state_of(tiny_base.model)
    with loaded(tiny_base, tmp_path) as model:
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
    assert_same(before, state_of(tiny_base.model))
    wider = wrap_model(tiny_model("llama", seed=3), tiny_tokenizer(), name="wider")
    with pytest.raises(PlacementError, match="fingerprint"), loaded(wider, tmp_path):
        pass
    (tmp_path / "placement.json").unlink()
    deep = wrap_model(tiny_model("llama", hidden_size=64), tiny_tokenizer(), name="deep")
    with pytest.raises(PlacementError, match="does not fit 'deep'") as caught, loaded(deep, tmp_path):
        pass
    assert "\n" not in str(caught.value)
