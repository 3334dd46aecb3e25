"""Adapters lie exactly where the placement says, and the base model is unharmed once they are gone."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    OSFConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
)
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, MixtralConfig

from layercard.adapters import apply as adapters
from layercard.adapters.apply import adapted, apply, loaded, place, task_of
from layercard.errors import PlacementError
from layercard.models.adapted import adapted_paths, check_adapted
from layercard.models.layers import find_blocks
from layercard.models.load import BaseModel, describe, wrap_model
from tiny import TINY_FAMILIES, build_tiny, tiny_tokenizer

MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    assert placement.model == describe(tiny_base)
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
    placement = placement.changed(rank_pattern=ranks, alpha_pattern={path: 1.5 * rank for path, rank in ranks.items()})
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
            check_adapted(model, placement.targets)


def test_a_placement_of_another_model_is_refused(tiny_base: BaseModel) -> None:
    other = place(wrap_model(build_tiny("llama", seed=1), tiny_tokenizer(), name="other"), [1])
    with pytest.raises(PlacementError, match=f"is of other .*{tiny_base.fingerprint}.*other weights") as caught, adapted(tiny_base, other):
        pass
    assert "\n" not in str(caught.value)


def test_paths_must_exist_and_agree_with_the_layers(tiny_base: BaseModel) -> None:
    placement = place(tiny_base, [1])
    misspelt = placement.changed(paths=("model.layers.1.self_attn.q_porj",))
    with pytest.raises(PlacementError, match=r"did you mean 'model\.layers\.1\.self_attn\.q_proj'"):
        apply(tiny_base.model, misspelt)
    with pytest.raises(PlacementError, match=r"layers \[1, 2\] but its paths lie in layers \[1\]"):
        apply(tiny_base.model, placement.changed(layers=(1, 2)))
    deeper = placement.changed(model=placement.model | {"layers": 99}, layers=(98,))
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
    with pytest.raises(PlacementError, match="with other weights"), loaded(wider, tmp_path):
        pass
    (tmp_path / "placement.json").unlink()
    deep = wrap_model(tiny_model("llama", hidden_size=64), tiny_tokenizer(), name="deep")
    with pytest.raises(PlacementError, match="does not fit 'deep'") as caught, loaded(deep, tmp_path):
        pass
    assert "\n" not in str(caught.value)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "rslora": lambda: LoraConfig(r=2, use_rslora=True),
    "dora": lambda: LoraConfig(r=2, use_dora=True),
    "pissa": lambda: LoraConfig(r=2, init_lora_weights="pissa"),
    "olora": lambda: LoraConfig(r=2, init_lora_weights="olora"),
    "eva": lambda: LoraConfig(r=2, init_lora_weights="eva"),
    "loha": lambda: LoHaConfig(r=2),
    "lokr": lambda: LoKrConfig(r=2),
    "ia3": lambda: IA3Config(),
    "vera": lambda: VeraConfig(r=2),
    "adalora": lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=10),
    "oft": lambda: OFTConfig(r=0, oft_block_size=4),
    "boft": lambda: BOFTConfig(boft_block_size=4),
    "hra": lambda: HRAConfig(r=2),
    "osf": lambda: OSFConfig(),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_any_method_lands_where_it_was_planned_and_leaves_no_trace(tiny_base: BaseModel, method: str) -> None:
    placement = place(tiny_base, [0, 2])
    before = state_of(tiny_base.model)
    config = CONFIGS[method]()
    asked = config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapted(tiny_base, placement, config) as model:
            assert set(adapted_paths(model)) == set(placement.paths)
            assert model.peft_config["default"].target_modules == set(placement.paths)
            assert config.to_dict() == asked
            assert any(weight.requires_grad for weight in model.parameters())
    assert_same(before, state_of(tiny_base.model))


def test_ia3_scales_inputs_where_the_paper_does(tiny_base: BaseModel) -> None:
    placement = place(tiny_base, [1])
    with adapted(tiny_base, placement, IA3Config()) as model:
        inner = model.get_base_model()
        at_input = [path for path in placement.paths if inner.get_submodule(path).is_feedforward]
    assert at_input == ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: LoraConfig(layers_to_transform=[0, 1]), r"layers 0-1 and the placement for 1; leave layers_to_transform out"),
        (lambda: LoraConfig(layers_to_transform=[]), r"layers \[\] and the placement for 1"),
        (lambda: LoraConfig(target_modules=["q_proj"]), r"target_modules does not name model\.layers\.1\.self_attn\.k_proj"),
        (lambda: LoraConfig(target_modules=r".*\.1\..*_attn\..*"), r"target_modules does not name model\.layers\.1\.mlp"),
        (lambda: LoraConfig(target_modules=["self_attn.*", "lm_head"]), "target_modules does not name"),
        (lambda: LoraConfig(target_modules=[*MAPS, "lm_head"]), "target_modules names 'lm_head', which the placement does not adapt"),
        (lambda: LoraConfig(target_parameters=["experts.down_proj"]), "target_parameters names 'experts.down_proj'"),
        (lambda: LoraConfig(exclude_modules=["q_proj"]), r"exclude_modules excludes model\.layers\.1\.self_attn\.q_proj"),
        (lambda: LoraConfig(bias="all"), "trains the biases of every layer"),
        (lambda: LoraConfig(layer_replication=[(0, 2), (1, 3)]), "layer_replication makes layers"),
        (lambda: LoraConfig(rank_pattern={"q_proj": 4}), "rank_pattern names 'q_proj' and alpha_pattern does not"),
        (lambda: PromptTuningConfig(num_virtual_tokens=2), "PROMPT_TUNING has no choice of linear maps"),
        (lambda: LNTuningConfig(target_modules=["input_layernorm"]), "LN_TUNING has no choice of linear maps"),
    ],
)
def test_a_configuration_that_contradicts_the_placement_is_refused(
    tiny_base: BaseModel, config: Callable[[], PeftConfig], words: str
) -> None:
    before = state_of(tiny_base.model)
    with pytest.raises(PlacementError, match=words) as caught:
        apply(tiny_base.model, place(tiny_base, [1]), config())
    assert "\n" not in str(caught.value)
    assert_same(before, state_of(tiny_base.model))


def test_a_configuration_that_says_the_same_as_the_placement_is_taken(tiny_base: BaseModel) -> None:
    placement = place(tiny_base, [1])
    config = LoraConfig(r=3, target_modules=MAPS, layers_to_transform=[1], layers_pattern="layers", bias="lora_only")
    with adapted(tiny_base, placement, config) as model:
        assert set(adapted_paths(model)) == set(placement.paths)
        found = model.peft_config["default"]
        assert (found.layers_to_transform, found.layers_pattern, found.r) == (None, None, 3)


def test_ranks_of_single_modules_need_a_method_that_has_them(tiny_base: BaseModel) -> None:
    placement = place(tiny_base, [1])
    placement = placement.changed(rank_pattern=dict.fromkeys(placement.paths, 2), alpha_pattern=dict.fromkeys(placement.paths, 4.0))
    for config in (IA3Config(), AdaLoraConfig(total_step=10), VeraConfig()):
        with pytest.raises(PlacementError, match="has no rank and alpha for each module"):
            apply(tiny_base.model, placement, config)
    with pytest.raises(PlacementError, match="both the configuration and the placement give ranks"):
        apply(tiny_base.model, placement, LoraConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 4}))
    for config in (LoHaConfig(r=8), LoKrConfig(r=8), LoraConfig(r=8)):
        with adapted(tiny_base, placement, config) as model:
            inner = model.get_base_model()
            adapted_modules = [inner.get_submodule(path) for path in placement.paths]
            assert {(module.r["default"], module.scaling["default"]) for module in adapted_modules} == {(2, 2.0)}
    with pytest.raises(PlacementError, match="write them into the configuration"):
        apply(tiny_base.model, place(tiny_base, [1]), LoraConfig(), rank=4)


def test_the_task_is_the_models_own() -> None:
    config = LlamaConfig(**{**build_tiny("llama").config.to_dict(), "num_labels": 3})
    model = LlamaForSequenceClassification(config)
    assert task_of(model) == TaskType.SEQ_CLS
    assert task_of(build_tiny("llama")) == TaskType.CAUSAL_LM
    assert task_of(build_tiny("llama").model) is None
    base = wrap_model(model, tiny_tokenizer())
    with adapted(base, place(base, [2]), rank=2) as wrapped:
        trainable = {name for name, weight in wrapped.named_parameters() if weight.requires_grad and "lora_" not in name}
        assert trainable == {"base_model.model.score.modules_to_save.default.weight"}


def mixture() -> BaseModel:
    """A Mixtral of three layers with two experts, which lie stacked in two parameters of each layer."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return wrap_model(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), name="tiny-mixtral")


EXPERTS = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")


@pytest.mark.parametrize("kind", ["both", "experts alone", "one parameter", "own ranks"])
def test_experts_are_adapted_in_the_planned_layer_alone(kind: str, tmp_path: Path) -> None:
    base = mixture()
    attention = place(base, [1]).paths if kind == "both" else ()
    placement = place(base, [1]).changed(paths=attention, parameters=EXPERTS[:1] if kind == "one parameter" else EXPERTS)
    if kind == "own ranks":
        ranks = {EXPERTS[0]: 3, EXPERTS[1]: 2}
        placement = placement.changed(rank_pattern=ranks, alpha_pattern={path: 2.0 * rank for path, rank in ranks.items()})
    before = state_of(base.model)
    ids = torch.arange(12).view(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapted(base, placement, rank=2) as model:
            assert set(adapted_paths(model)) == set(placement.targets)
            if kind == "own ranks":
                wrappers = {
                    m.parameter_name: (m.r["default"], m.scaling["default"]) for m in model.modules() if isinstance(m, ParamWrapper)
                }
                assert wrappers == {"gate_up_proj": (3, 2.0), "down_proj": (2, 2.0)}
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.requires_grad:
                        weight.normal_(0, 0.5)
            trained = model(ids).logits.detach()
            model.save_pretrained(tmp_path)
        assert_same(before, state_of(base.model))
        placement.save(tmp_path / "placement.json")
        with loaded(base, tmp_path) as model:
            assert torch.equal(model(ids).logits, trained)
    assert_same(before, state_of(base.model))
    assert not torch.allclose(base.model(ids).logits, trained)


def test_what_parameters_cannot_have_is_said_before_anything_is_wrapped() -> None:
    base = mixture()
    placement = place(base, [1]).changed(parameters=EXPERTS)
    before = state_of(base.model)
    for config, words in (
        (IA3Config(), "IA3 cannot adapt parameters"),
        (LoraConfig(lora_dropout=0.1), "no dropout for parameters"),
        (LoraConfig(use_dora=True), "no DoRA for parameters"),
        (LoraConfig(init_lora_weights="pissa"), "cannot begin parameters"),
    ):
        with pytest.raises(PlacementError, match=words):
            apply(base.model, placement, config)
        assert_same(before, state_of(base.model))
    with pytest.raises(PlacementError, match=r"is not a stack of experts.*did you mean"):
        apply(base.model, placement.changed(parameters=("model.layers.1.mlp.experts.gate_proj",)))
