"""Placements with stacked experts: trained, interrupted, saved and loaded, with every faster part, and profiled on the way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layercard import checkpoint as state_module
from layercard.adapters.apply import adapted, loaded, place
from layercard.data.load import Dataset
from layercard.models.adapted import adapted_paths
from layercard.models.load import BaseModel
from layercard.models.stored import fingerprint
from layercard.profiling.profile import profile_records as profile
from layercard.serving.adapter_switch import merged, random_adapter, switched_on
from layercard.settings import FastSettings, ProfileSettings
from layercard.training.evaluate import held_out_losses
from test_experts import base_of, build
from test_fast import PARTS, interrupted_and_resumed, records, run
from test_state import Stopped, stopping

FAMILIES = ("mixtral", "qwen3_moe")


def assert_near(one: dict[str, Any], other: dict[str, Any], folders: tuple[Path, Path]) -> None:
    """As `assert_same_run`, by whole tensors: AdamW makes rounding errors large where few tokens make a gradient."""
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-5, atol=0)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert float((second[name] - weight).norm()) <= 1e-3 * float(weight.norm()), name


def float_base(family: str) -> BaseModel:
    return base_of(build(family).float())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_faster_parts_together_equal_stock_training(family: str, tmp_path: Path) -> None:
    base = float_base(family)
    stock = run(base, tmp_path, "stock", FastSettings.baseline(), (1, 2))
    found = run(base, tmp_path, "fast", FastSettings(), (1, 2))
    assert_near(stock, found, (tmp_path / "stock", tmp_path / "fast"))
    assert set(found.fast["did"]) == set(PARTS)
    assert found.fast["did"]["fused_lora"] == "adapters computed in one step: 8 of 8; 4 of stacked experts as they are"


def test_every_expert_that_sees_a_token_is_trained_and_no_other_layer(tmp_path: Path) -> None:
    base = float_base("mixtral")
    before = fingerprint(base.model, exact=True)
    record = run(base, tmp_path, "a", FastSettings(), (1,), valid=records(base, tmp_path, 8, 40))
    assert record.loss_reduction > 0 and fingerprint(base.model, exact=True) == before
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name.split(".layers.")[1].partition(".")[0] for name in weights} == {"1"}
    stacked = {name: weight for name, weight in weights.items() if "experts" in name and "lora_B" in name}
    assert len(stacked) == 2
    for weight in stacked.values():
        assert weight.reshape(len(weight), 2, 4).abs().sum(dim=(0, 1)).count_nonzero() == 4
    with loaded(base, tmp_path / "a") as model:
        assert set(adapted_paths(model)) == set(place(base, [1]).targets)
        found = held_out_losses(model, base.pad_id, records(base, tmp_path, 8, 40))
    assert found.loss == pytest.approx(record.loss_after, rel=1e-6)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    base = float_base("qwen3_moe")
    stock = run(base, tmp_path, "stock", FastSettings.baseline(), (2,))
    assert_near(stock, interrupted_and_resumed(base, tmp_path, FastSettings()), (tmp_path / "stock", tmp_path / "run"))


def dataset(base: BaseModel, folder: Path) -> Dataset:
    return records(base, folder, 12)


def test_an_interrupted_profile_is_the_same_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, how = float_base("mixtral"), ProfileSettings(rank=2, batch_size=4, probe="train", probe_steps=2, cost=False)
    whole = profile(base, dataset(base, tmp_path), how)
    assert whole.layers[1].training_probe is not None
    monkeypatch.setattr(state_module, "EVERY", 0.0)
    monkeypatch.setattr(state_module, "SHARE", 0.0)
    interrupts = 0
    while True:
        try:
            card = profile(base, dataset(base, tmp_path), how, stopping(4), state=tmp_path / "state")
            break
        except Stopped:
            interrupts += 1
    assert interrupts >= 2
    assert card.to_json() == whole.to_json()


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_experts_are_switched_and_merged_whole(family: str) -> None:
    base = float_base(family)
    placement = place(base, [0, 2])
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        plain = base.model(input_ids=ids).logits
        adapter = random_adapter(base, placement, rank=2)
        with switched_on(base, adapter):
            found = base.model(input_ids=ids).logits
        with switched_on(base, merged(adapter)):
            written = base.model(input_ids=ids).logits
    assert float((found - plain).abs().max()) > 1e-3
    torch.testing.assert_close(written, found, rtol=1e-4, atol=1e-5)
    with adapted(base, placement, rank=2) as model:
        assert adapter.bytes == sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, plain)
