"""The Python API: the ten lines, a user's model that comes back as it was, and names and signatures that stay."""

import dataclasses
import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import generate_api
import layercard
import pages
from cards import fake_card
from layercard.errors import DataError, ModelError, PlacementError
from layercard.models.adapted import adapted_paths
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ten_lines.py"
FROZEN = Path(__file__).with_name("api.txt")
QUICK: dict[str, Any] = {"batch_size": 4, "label_samples": 1, "probe": "none", "rank": 2, "cost": False}


@pytest.fixture(scope="module")
def card() -> layercard.LayerCard:
    return layercard.profile(build_tiny("llama"), tiny_tokenizer(), tiny_records(8), **QUICK)


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """All that a user could find changed."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "flags": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "gradients": {name: None if weight.grad is None else weight.grad.clone() for name, weight in model.named_parameters()},
        "weights": {name: weight.clone() for name, weight in model.state_dict().items()},
        "hooks": {name: (len(module._forward_hooks), len(module._backward_hooks)) for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
        "settings": dict(vars(model.config)),
    }


def assert_same(before: Any, after: Any) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, dict) and name != "settings":
            assert_same(value, after[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name


def half_trained(family: str = "llama") -> PreTrainedModel:
    """A model in the middle of a user's work: train mode but for one block, one weight frozen, gradients there."""
    model = build_tiny(family).train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    return model


@pytest.mark.parametrize("probe", ["none", "train"])
def test_a_users_model_is_as_before(tokenizer: PreTrainedTokenizerFast, probe: str) -> None:
    model = half_trained()
    before = state_of(model)
    layercard.profile(model, tokenizer, tiny_records(8), **{**QUICK, "probe": probe}, probe_steps=2)
    assert_same(before, state_of(model))


def test_a_users_model_is_as_before_where_it_fails(tokenizer: PreTrainedTokenizerFast) -> None:
    model = half_trained()
    before = state_of(model)
    with pytest.raises(DataError, match="3 records"):
        layercard.profile(model, tokenizer, tiny_records(3), **QUICK)
    assert_same(before, state_of(model))


def test_kinds_of_models_and_records_give_one_card(card: layercard.LayerCard, tiny_folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records, tokenizer = tiny_records(8), tiny_tokenizer()
    base = layercard.load_model(tiny_folder, device="cpu")
    dataset = layercard.load_data(records, tokenizer)
    assert dataset.source == "records in memory"
    for model, data in (
        (base, datasets.Dataset.from_list(records)),
        (base, dataset),
        (base.model, write_records(tmp_path / "records.jsonl", records)),
        (str(tiny_folder), iter(records)),
    ):
        other = layercard.profile(model, tokenizer if model is base.model else None, data, **QUICK)
        assert other.model.fingerprint == card.model.fingerprint
        assert other.data.fingerprint == card.data.fingerprint
        assert other.layers == card.layers
    assert other.model.name == str(tiny_folder)
    assert card.model.name == "in-memory"


def test_settings_reach_the_card(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    phases = set()
    card = layercard.profile(
        build_tiny("llama"),
        tokenizer,
        tiny_records(12),
        records=9,
        rank=3,
        probe_records=2,
        seed=4,
        progress=lambda phase, done, total: phases.add(phase),
        state=tmp_path / "state",
    )
    assert (card.data.records, card.settings["rank"], card.settings["seed"], card.settings["probe_records"]) == (9, 3, 4, 2)
    assert {"fit pass", "held-out pass", "step probe"} <= phases
    assert (tmp_path / "state").is_dir()


def test_keywords_are_the_settings_with_their_defaults() -> None:
    known = inspect.signature(layercard.profile).parameters
    assert {field.name: field.default for field in dataclasses.fields(layercard.ProfileSettings)} == {
        field.name: known[field.name].default for field in dataclasses.fields(layercard.ProfileSettings)
    }


def test_models_with_adapters_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    wrapped = get_peft_model(build_tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"carries adapters.*model\.unload\(\)"):
        layercard.profile(wrapped, tokenizer, tiny_records(8))
    with pytest.raises(ModelError, match=r"adapter on model\.layers\.0\.self_attn\.q_proj"):
        layercard.profile(wrapped.base_model.model, tokenizer, tiny_records(8))
    assert layercard.profile(wrapped.unload(), tokenizer, tiny_records(8), **QUICK).model.layers == 3


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda model, tokenizer: (torch.nn.Linear(2, 2), tokenizer, tiny_records(8)), ModelError, "found Linear; pass the model inside"),
        (lambda model, tokenizer: (model, None, tiny_records(8)), ModelError, "needs its tokenizer"),
        (lambda model, tokenizer: (model, tokenizer, {"train": tiny_records(8)}), DataError, "found str; give a list of records, or one"),
        (lambda model, tokenizer: (model, tokenizer, []), DataError, "holds no records"),
        (lambda model, tokenizer: (model, tokenizer, "absent.jsonl"), DataError, "no such file"),
        (lambda model, tokenizer: (model, tokenizer, [{"prompt": "a"}]), DataError, "records in memory record 1: "),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    arguments: Callable[..., tuple[Any, Any, Any]], error: type[Exception], words: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(error, match=words) as raised:
        layercard.profile(*arguments(build_tiny("llama"), tokenizer))
    assert "\n" not in str(raised.value)


def test_the_ten_lines(tiny_folder: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert len(inspect.getsource(main).splitlines()) == 1 + 10
    main(str(tiny_folder), str(tiny_file), str(tmp_path / "adapter"))
    layers = [int(layer) for layer in re.search(r"^layers ([\d ]+)$", capsys.readouterr().out, re.MULTILINE)[1].split()]
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {int(re.search(r"layers\.(\d+)\.", key)[1]) for key in weights} == set(layers)
    assert any(weight.abs().sum() > 0 for key, weight in weights.items() if "lora_B" in key)


def test_a_card_selects(card: layercard.LayerCard) -> None:
    assert len(layercard.select(card, k=2).layers) == 2
    deep = layercard.LayerCard.from_json(fake_card())
    asked = {"objective": "performance", "budgets": layercard.Budgets(max_time="60%")}
    assert layercard.select(deep, **asked).predicted["step_time"]["share"] <= 0.6


def test_a_placement_is_a_configuration_of_peft(card: layercard.LayerCard) -> None:
    placement = layercard.select(card, strategy="last", k=1)
    config = layercard.lora_config(placement, r=16, use_rslora=True)
    assert (config.r, config.lora_alpha, config.use_rslora, config.task_type) == (16, 32, True, "CAUSAL_LM")
    assert set(adapted_paths(get_peft_model(build_tiny("llama"), config))) == set(placement.paths)
    with pytest.raises(PlacementError, match="target_modules is given beside a placement"):
        layercard.lora_config(placement, target_modules=["q_proj"])


def test_a_notebook_shows_stacked_experts_too(card: layercard.LayerCard) -> None:
    experts = "model.layers.2.mlp.experts.gate_up_proj"
    placement = layercard.select(card, strategy="last", k=1).changed(parameters=(experts,))
    shown = placement._repr_html_()
    assert f"{len(placement.paths) + 1}: " in shown
    assert "gate_up_proj" in shown
    assert "gate_up_proj" not in placement.changed(parameters=())._repr_html_()


# --- what stays ------------------------------------------------------------------------------------------------------------


def public(owner: type) -> dict[str, Any]:
    """A class's public methods and properties, those of layercard's base classes too; fields have their place in its signature."""
    methods = (property, classmethod, staticmethod)
    return {
        name: member
        for kind in reversed(owner.__mro__)
        if kind.__module__.startswith("layercard")
        for name, member in vars(kind).items()
        if not name.startswith(("_", "model_")) and (inspect.isfunction(member) or isinstance(member, methods))
    }


def signature(value: Any) -> str:
    """Names, kinds and defaults of what a call takes; annotations print differently from Python to Python."""
    if isinstance(value, property):
        return ""
    try:
        found = inspect.signature(value.__func__ if isinstance(value, classmethod | staticmethod) else value)
    except ValueError:
        return "(*args)"  # an exception without a constructor of its own
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def listing() -> list[str]:
    """Every public name with its signature, the methods and properties of classes too."""
    found = []
    for name in layercard.__all__:
        value = getattr(layercard, name)
        found.append(f"{name}{signature(value)}")
        if inspect.isclass(value):
            found += sorted(f"{name}.{method}{signature(member)}" for method, member in public(value).items())
    return found


def test_names_and_signatures_stay() -> None:
    assert listing() == FROZEN.read_text(encoding="utf-8").splitlines(), "a public name changed: if it must, write api.txt anew"


def test_every_public_object_is_documented() -> None:
    for name in layercard.__all__:
        value = getattr(layercard, name)
        assert (value.__doc__ or "").strip(), name
        if inspect.isclass(value):
            for method in public(value):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


def test_the_page_says_what_the_docstrings_say() -> None:
    named = [name for names in generate_api.GROUPS.values() for name in names]
    assert sorted(named) == layercard.__all__
    assert generate_api.main(["--check"]) == 0, "run make cli-docs"


def test_pages_are_checked_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    assert pages.write_or_check(page, "new", ["--check"], "run this") == 1
    assert "page.md differs from what it is made from; run this" in capsys.readouterr().err
    assert not page.exists()
    assert pages.write_or_check(page, "a <x>old</x> b", [], "run this") == 0
    assert pages.between(page, "<x>", "</x>", "new") == "a <x>\nnew\n</x> b"
    assert pages.write_or_check(page, "a <x>old</x> b", ["--check"], "run this") == 0
