"""What adapters of stacked experts cost: their number, their time, and what a training step keeps for them."""

from typing import Any

import pytest
from torch import nn

from layercard.adapters.apply import adapted, place
from layercard.card.card import cost_of
from layercard.cost import estimate as meta
from layercard.cost.measure import measure_cost, random_batch
from layercard.cost.model import CostModel, Shape
from layercard.data.load import Dataset
from layercard.models import skeleton
from layercard.models.load import BaseModel
from layercard.profiling.profile import profile_records as profile
from layercard.settings import ProfileSettings
from test_capture import assert_same, examples
from test_experts import base_of, build
from test_timing import everything, measured_memory
from tiny import LAYERS, VOCAB


def float_base(family: str) -> BaseModel:
    return base_of(build(family).float())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_timed_and_counted(family: str) -> None:
    base = float_base(family)
    before = everything(base)
    cost = measure_cost(base, random_batch(VOCAB, 4, 24), rank=2, repeats=1)
    after = everything(base)
    assert_same(before, after)
    assert before["own"] == after["own"] and before["config"] == after["config"]
    for layer, block in zip(cost.layers, base.blocks, strict=True):
        shapes = [tuple(p.module.weight.shape) for p in block.linear_modules]
        stacked = [tuple(stack.module.get_parameter(stack.parameter).shape) for stack in block.stacks]
        assert stacked and all(experts == 4 for experts, _, _ in stacked)
        assert layer.adapter_parameters == 2 * (sum(map(sum, shapes)) + sum(4 * (one + other) for _, one, other in stacked))
        assert [module.name for module in layer.modules] == [p.name for p in block.linear_modules] + [s.name for s in block.stacks]
        assert [module.experts for module in layer.modules] == [1] * len(block.linear_modules) + [4] * len(block.stacks)
        assert all(module.adapter_seconds > 0 for module in layer.modules) or layer.adapter_seconds == 0
        assert sum(module.adapter_seconds for module in layer.modules) == pytest.approx(layer.adapter_seconds)
    assert CostModel.from_json(cost.to_json()) == cost


def test_predicted_memory_is_that_of_a_real_training_step() -> None:
    base, batch = float_base("mixtral"), random_batch(VOCAB, 4, 40)
    cost = measure_cost(base, batch, rank=4, repeats=1)
    for layers in ([0], [2], [0, 2], list(range(LAYERS))):
        assert cost.peak_memory(layers) == pytest.approx(measured_memory(base, batch, layers), rel=0.1), layers


def test_trained_weights_are_those_that_the_cost_counts() -> None:
    base = float_base("qwen3_moe")
    cost = measure_cost(base, random_batch(VOCAB, 2, 12), rank=2, repeats=1)
    with adapted(base, place(base, [1]), rank=2) as model:
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert cost.linear("params").of([1]) == trained


def rated(maps: list[Any]) -> CostModel:
    return CostModel.from_rates([maps] * 3, flops=1e11, bandwidth=1e10, batch_size=4, length=64, rank=2)


ATTENTION = [(64, 64), (64, 32)]


def test_one_expert_costs_forward_what_a_linear_map_costs() -> None:
    dense, single = rated([*ATTENTION, (64, 96)]), rated([*ATTENTION, Shape(64, 96, 1, 1.0)])
    assert dense == single
    sparse, wider = rated([*ATTENTION, Shape(64, 96, 8, 1.0)]), rated([*ATTENTION, Shape(64, 96, 8, 2.0)])
    assert sparse.weights_bytes - dense.weights_bytes == 3 * 7 * 64 * 96 * 4
    assert sparse.linear("params").of([0]) - dense.linear("params").of([0]) == 7 * 2 * (64 + 96)
    assert sparse.layers[0].saved_bytes == dense.layers[0].saved_bytes < wider.layers[0].saved_bytes
    assert sparse.layers[0].forward_seconds < wider.layers[0].forward_seconds
    assert sparse.layers[0].adapter_saved_bytes > dense.layers[0].adapter_saved_bytes + 8 * 64 * 96 * 4 - 4 * 4 * 64 * 64


def test_an_empty_model_of_experts_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    base = float_base("qwen3_moe")
    empty: nn.Module = skeleton.empty_model(base.model.config, "tiny")
    found = meta.estimated_cost(empty, flops=1e11, bandwidth=1e10, name="tiny", dtype="float32", batch_size=2, length=16, rank=2)
    real = measure_cost(base, random_batch(VOCAB, 2, 16), rank=2, repeats=1)
    assert [layer.adapter_parameters for layer in found.layers] == [layer.adapter_parameters for layer in real.layers]
    assert found.weights_bytes == real.weights_bytes
    shapes: list[Any] = []
    monkeypatch.setattr(CostModel, "from_rates", lambda given, **_: shapes.extend(given) or found)
    meta.estimated_cost(empty, flops=1e11, bandwidth=1e10, name="tiny", dtype="float32")
    assert shapes[0][-2:] == [Shape(32, 48, 4, 2.0), Shape(24, 32, 4, 2.0)]


def test_a_card_without_a_measured_cost_counts_every_expert() -> None:
    base = float_base("qwen3_moe")
    data = Dataset(tuple(examples((9, 6, 12, 7, 5, 11), seed=4)), "random tokens", "0" * 16)
    cost = cost_of(profile(base, data, ProfileSettings(rank=2, probe="none", cost=False)))
    with adapted(base, place(base, [1]), rank=2) as model:
        assert cost.linear("params").of([1]) == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert cost.step_time(range(LAYERS)) == pytest.approx(1.0)
