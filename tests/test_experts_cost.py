"""What adapters of stacked experts cost: their number, their time, and what a training step keeps for them."""

import pytest

from layercard.adapters import adapted, place
from layercard.cost import CostModel
from layercard.models import BaseModel
from layercard.timing import measure_cost, random_batch
from test_capture import assert_same
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
        shapes = [tuple(p.module.weight.shape) for p in block.projections]
        stacked = [tuple(stack.module.get_parameter(stack.parameter).shape) for stack in block.stacks]
        assert stacked and all(experts == 4 for experts, _, _ in stacked)
        assert layer.adapter_parameters == 2 * (sum(map(sum, shapes)) + sum(4 * (one + other) for _, one, other in stacked))
        assert [module.name for module in layer.modules] == [p.name for p in block.projections] + [s.name for s in block.stacks]
        assert [module.experts for module in layer.modules] == [1] * len(block.projections) + [4] * len(block.stacks)
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
