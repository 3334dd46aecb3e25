"""Cost by the clock: what is read where, how readings become parts, and that the model is as before."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from layercard.adapters.apply import adapted, place
from layercard.card.card import cost_of
from layercard.cost import estimate as meta, measure as timing
from layercard.cost.measure import (
    StepBytes,
    StepClock,
    adapted_layers,
    measure_cost,
    random_batch,
    settled,
    through_all,
    usual_batch,
)
from layercard.cost.model import CostModel, Shape
from layercard.data.load import IGNORED, Batch, Dataset
from layercard.errors import DataError, ModelError
from layercard.measure import LiveTensors, PeakMemory
from layercard.models import skeleton
from layercard.models.adapted import quiet_peft
from layercard.models.hooks import block_borders
from layercard.models.load import BaseModel, wrap_model
from layercard.models.losses import training_step
from layercard.profiling.profile import profile_records as profile
from layercard.settings import ProfileSettings
from test_capture import assert_same, examples, state
from test_experts import build as with_experts
from tiny import LAYERS, TINY_FAMILIES, VOCAB, WIDTH, build_tiny, tiny_tokenizer

DEPTH = 5
EXPERTS = ("mixtral", "gpt_oss", "qwen3_moe")


def base_of(family: str = "llama", **changes: Any) -> BaseModel:
    model = with_experts(family).float() if family in EXPERTS else build_tiny(family, **changes)
    return wrap_model(model, tiny_tokenizer(), name=f"tiny {family}")


def everything(base: BaseModel) -> dict[str, Any]:
    return state(base.model) | {"own": sorted(vars(base.model)), "config": base.model.config.to_dict()}


@pytest.mark.parametrize("family", [*TINY_FAMILIES, "mixtral", "gpt_oss"])
def test_every_family_is_measured_and_left_as_it_was(family: str) -> None:
    base = base_of(family)
    base.model.train()
    before = everything(base)
    cost = measure_cost(base, random_batch(VOCAB, 4, 24), rank=2, repeats=1)
    after = everything(base)
    assert_same(before, after)
    assert before["own"] == after["own"] and before["config"] == after["config"]
    assert (cost.source, cost.batch_size, cost.tokens, cost.rank, cost.model) == ("measured", 4, 24, 2, f"tiny {family}")
    assert cost.weights_bytes == sum(weight.nbytes for weight in base.model.parameters())
    for layer, block in zip(cost.layers, base.blocks, strict=True):
        assert layer.forward_seconds > 0 and layer.saved_bytes > 0 and layer.adapter_saved_bytes > 0
        single = sum(p.in_features + p.out_features for p in block.linear_modules)
        stacked = sum(4 * sum(stack.module.get_parameter(stack.parameter).shape[1:]) for stack in block.stacks)
        assert bool(block.stacks) == (family in EXPERTS) and layer.adapter_parameters == 2 * (single + stacked)
        assert [module.name for module in layer.modules] == [each.name for each in (*block.linear_modules, *block.stacks)]
        assert [module.experts for module in layer.modules] == [1] * len(block.linear_modules) + [4] * len(block.stacks)
        assert sum(module.adapter_seconds for module in layer.modules) == pytest.approx(layer.adapter_seconds)
    assert 0 < cost.step_time([LAYERS - 1]) <= cost.step_time(range(LAYERS))
    assert CostModel.from_json(cost.to_json()) == cost


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_predicted_memory_is_that_of_a_real_training_step(family: str) -> None:
    base, batch = base_of(family), random_batch(VOCAB, 4, 40)
    cost = measure_cost(base, batch, rank=4, repeats=1)
    for layers in ([0], [1], [2], [0, 2], [1, 2], [0, 1, 2]):
        assert cost.peak_memory(layers) == pytest.approx(measured_memory(base, batch, layers), rel=0.1), layers


def measured_memory(base: BaseModel, batch: Batch, layers: list[int]) -> int:
    """What a run record would call `peak_memory_bytes`."""
    with quiet_peft(), adapted(base, place(base, layers), rank=4) as model:
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights)
        training_step(model, batch, optimizer)
        peak = PeakMemory(base.device)
        peak.start()
        training_step(model, batch, optimizer)
        peak.stop()
    return peak.bytes + 3 * sum(weight.nbytes for weight in weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_bytes_are_what_the_graph_keeps(family: str) -> None:
    """Against the storages that autograd itself packs away, weights not counted."""
    base, batch = base_of(family), random_batch(VOCAB, 4, 40)
    cost = measure_cost(base, batch, rank=4, repeats=1)
    weights = {weight.untyped_storage().data_ptr() for weight in base.model.parameters()}
    for context, extra in ((through_all(base), 0), (adapted_layers(base, range(LAYERS), 4), 1)):
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and storage.nbytes() >= 4 * 40 * 4:
                kept[storage.data_ptr()] = storage
            return tensor

        count = {"in": 0}

        def stamp(name: str, index: int, kept: dict[int, torch.UntypedStorage] = kept, count: dict[str, int] = count) -> None:
            total = sum(storage.nbytes() for storage in kept.values())
            if (name, index) == ("leave", 0):
                count["in"] = total
            elif (name, index) == ("leave", LAYERS - 1):
                count["out"] = total

        with context, block_borders(base.blocks, stamp), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        found = sum(layer.saved_bytes + extra * layer.adapter_saved_bytes for layer in cost.layers[1:])
        assert found == pytest.approx(count["out"] - count["in"], rel=0.05)


def test_borders_come_in_the_order_of_the_pass() -> None:
    base, seen = base_of(), []
    with adapted_layers(base, [1], 2) as (model, optimizer), block_borders(base.blocks, lambda name, index: seen.append((name, index))):
        training_step(model, random_batch(VOCAB, 2, 12), optimizer)
    forward = [(name, at) for at in range(LAYERS) for name in ("enter", "leave")]
    assert seen == [*forward, ("back", 3), ("back", 2)]  # the graph ends within block 1
    seen.clear()
    with through_all(base) as (model, _), block_borders(base.blocks, lambda name, index: seen.append((name, index))):
        training_step(model, random_batch(VOCAB, 2, 12), None)
    assert seen == [*forward, ("back", 3), ("back", 2), ("back", 1), ("back", 0)]


def made_clock(kind: str) -> StepClock:
    """A step of a model of which every part is known: block i takes 10 + i forward, 20 + i more, 3 + i for its adapter."""
    graph = {"last": [DEPTH - 1], "through": range(DEPTH), "all": range(DEPTH)}[kind]
    adapters = {"last": [DEPTH - 1], "through": [], "all": range(DEPTH)}[kind]
    clock, now = StepClock(torch.device("cpu")), 0.0
    clock.marks["start", 0] = now
    now += 1.0
    for at in range(DEPTH):
        clock.marks["enter", at] = now
        now += 10 + at + (0.25 * (20 + at) if at in graph else 0) + (1.0 if at in adapters else 0.0)
        clock.marks["leave", at] = now
    now += 7.0
    clock.marks["loss", 0] = now
    now += 9.0
    clock.marks["back", DEPTH] = now
    for at in reversed(graph):
        now += 0.75 * (20 + at) + (2.0 + at if at in adapters else 0.0)
        if at or kind == "through":
            clock.marks["back", at] = now
    clock.marks["backward", 0] = now
    clock.marks["end", 0] = now + (0.5 + 0.1 * len(adapters) if adapters else 0.0)
    if kind == "last":
        del clock.marks["back", DEPTH - 1]
    return clock


def test_parts_that_are_known_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(num_hidden_layers=DEPTH)
    kinds: dict[int, str] = {1: "last", 0: "through", DEPTH: "all"}

    def timed(base: BaseModel, model: Any, batch: Batch, optimizer: Any, steps: int, around: Any = None) -> list[StepClock]:
        adapters = sum("lora_A" in name for name, _ in model.named_parameters()) // len(base.blocks[0].linear_modules)
        return [made_clock(kinds[adapters])] * steps

    monkeypatch.setattr(timing, "timed_steps", timed)
    cost = measure_cost(base, random_batch(VOCAB, 2, 12), rank=2, repeats=2)
    assert cost.embedding_seconds == pytest.approx(1.0)
    assert (cost.head_forward_seconds, cost.head_backward_seconds) == (pytest.approx(7.0), pytest.approx(9.0))
    assert cost.overhead_seconds == pytest.approx(0.5)
    for at, layer in enumerate(cost.layers):
        assert layer.adapter_seconds == pytest.approx(3 + at + 0.1)
        assert layer.forward_seconds + layer.backward_seconds == pytest.approx(10 + at + 20 + at)
    assert [layer.forward_seconds for layer in cost.layers[:-1]] == pytest.approx([10, 11, 12, 13])
    assert cost.step_time(range(DEPTH)) == pytest.approx(made_clock("all").between(("start", 0), ("end", 0)))
    assert cost.step_time([DEPTH - 1]) == pytest.approx(made_clock("last").between(("start", 0), ("end", 0)), rel=0.01)


def test_noise_is_taken_from_equal_blocks_and_real_differences_are_kept() -> None:
    rng = np.random.default_rng(0)
    noisy = settled(1.0 + 0.2 * rng.standard_normal((4, 30)), [0] * 30)
    assert noisy.std() < 0.04  # the medians themselves have a spread of 0.12
    true = np.linspace(1.0, 2.0, 30)
    kept = settled(true + 0.01 * rng.standard_normal((4, 30)), [0] * 30)
    assert kept == pytest.approx(true, abs=0.05)
    once = settled(true[None, :], [0] * 30)
    assert once == pytest.approx(np.full(30, 1.5))  # one reading says nothing about noise, so equal blocks are taken to be equal
    assert settled(np.array([[1.0, 1.0, 5.0]] * 2), [0, 0, 2]) == pytest.approx([1.0, 1.0, 5.0])  # a block of a kind of its own


@given(st.lists(st.floats(0.1, 10), min_size=12, max_size=12), st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_the_sum_stays_the_typical_sum(readings: list[float], kinds: list[int]) -> None:
    samples = np.array(readings).reshape(3, 4)
    assert settled(samples, kinds).sum() == pytest.approx(np.median(samples.sum(axis=1)))


def test_bytes_at_borders_and_between() -> None:
    with LiveTensors() as live:
        count = StepBytes(live)
        count("enter", 0)
        kept = torch.ones(100)
        dropped = torch.ones(1000)
        del dropped
        count("leave", 0)
        more = torch.ones(50)
        del more
        count("loss")
    assert (count.saved(0), count.above(("enter", 0), ("leave", 0)), count.above(("leave", 0), ("loss", 0))) == (400, 4400, 200)
    assert kept.sum() == 100


def test_the_model_is_as_before_after_a_failure_in_the_middle() -> None:
    base = base_of()
    before = everything(base)
    for stop in range(2):

        def failing(phase: str, done: int, total: int, stop: int = stop) -> None:
            if done == stop + 1:
                raise RuntimeError("stop here")

        with pytest.raises(RuntimeError, match="stop here"):
            measure_cost(base, random_batch(VOCAB, 2, 12), rank=2, repeats=1, progress=failing)
        assert_same(before, everything(base))
    with pytest.raises(RuntimeError), adapted_layers(base, [0], 2):
        raise RuntimeError
    assert_same(before, everything(base))


def test_a_batch_that_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base, batch = base_of("gpt2"), random_batch(VOCAB, 2, 12)
    before = everything(base)
    with pytest.raises(DataError, match="no labelled token"):
        measure_cost(base, dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORED)))
    with pytest.raises(DataError, match="rows of 600 tokens are longer than the 512 positions of tiny gpt2"):
        measure_cost(base, random_batch(VOCAB, 2, 600))

    def full(*arguments: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(timing, "timed_steps", full)
    with pytest.raises(ModelError, match="memory ran out training all layers of tiny gpt2 on 2 records of 12 tokens"):
        measure_cost(base, batch)
    assert_same(before, everything(base))


def test_batches_to_measure_on() -> None:
    batch = random_batch(VOCAB, 3, 16)
    assert batch.input_ids.shape == (3, 16) and batch.attention_mask.sum(dim=1).tolist() == [16, 16, 12]
    assert (batch.labels != IGNORED).sum(dim=1).tolist() == [8, 8, 4]
    assert torch.equal(batch.input_ids, random_batch(VOCAB, 3, 16).input_ids)
    made = examples((5, 9, 7, 6, 12, 8))
    widths = {usual_batch(made, 1, 1).input_ids.shape[1], usual_batch(made, 1, 1, seed=3).input_ids.shape[1]}
    assert widths == {7}
    assert usual_batch(made, 4, 1).input_ids.shape[0] == 4
    assert usual_batch(made[:1], 4, 1).input_ids.shape[0] == 4


def test_profile_fills_the_card() -> None:
    dataset = Dataset(tuple(examples((9, 6, 12, 7, 5, 11, 8, 10), seed=4)), "random tokens", "0" * 16)
    base = base_of()
    before = everything(base)
    seen = set()
    settings = ProfileSettings(rank=2, batch_size=3, probe="none", cost=True)
    card = profile(base, dataset, settings, lambda phase, done, total: seen.add(phase))
    assert_same(before, everything(base))
    assert card.cost is not None and "cost" in seen
    for layer, cost in zip(card.layers, card.cost.layers, strict=True):
        assert (layer.forward_seconds, layer.backward_seconds) == (cost.forward_seconds, cost.backward_seconds)
        assert (layer.adapter_seconds, layer.saved_bytes) == (cost.adapter_seconds, cost.saved_bytes)
    assert profile(base, dataset, dataclasses.replace(settings, cost=False)).cost is None


def test_configurations_by_name_and_file(tmp_path: Any) -> None:
    for name, layers, weights in (("gpt2-medium", 24, 354_823_168), ("Qwen3-8B", 36, 8_190_735_360)):
        config = skeleton.read_config(name)
        model = skeleton.empty_model(config, name)
        assert sum(weight.numel() for weight in model.parameters()) == weights
        assert all(weight.device.type == "meta" for weight in model.parameters())
        cost = meta.estimated_cost(model, flops=1e12, bandwidth=1e11, name=name, dtype="bfloat16", batch_size=1, length=32, rank=8)
        assert (len(cost.layers), cost.weights_bytes, cost.source) == (layers, 2 * weights, "rates")
    build_tiny("gpt2").config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert skeleton.read_config(str(path)).n_embd == WIDTH
    base = skeleton.random_model(skeleton.read_config(str(tmp_path)), "tiny", torch.device("cpu"), torch.float32)
    assert measure_cost(base, random_batch(VOCAB, 2, 12), rank=2, repeats=1).step_time([0]) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3-8", "did you mean qwen3-8b"),
        ("nothing", "no such configuration; name a config.json"),
        ("folder", "has no config.json"),
        ("broken.json", "cannot be read as a configuration"),
        ("list.json", "names no model_type"),
        ("other.json", "transformers cannot use this configuration"),
        ("someone/model", "its config.json cannot be had"),
    ],
)
def test_configurations_that_cannot_be_read(name: str, message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(skeleton, "hub_answers", lambda: False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.json").write_text('{"model_type": ')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ModelError, match=message) as caught:
        skeleton.read_config(name)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    cost = measure_cost(base_of(), random_batch(VOCAB, 2, 12), rank=2, repeats=1)
    needed = cost.weights_bytes + cost.peak_memory(range(LAYERS))
    for free, expected in ((needed * 2, True), (needed, False)):
        monkeypatch.setattr(meta, "free_bytes", lambda device, free=free: free)
        assert meta.fits(cost, cpu) is expected
    monkeypatch.undo()
    assert meta.free_bytes(cpu) > 10**6
    assert all(rate > 1e6 for rate in meta.device_rates(cpu, torch.float32, rows=8))


def test_an_empty_model_of_experts_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("qwen3_moe")
    empty = skeleton.empty_model(base.model.config, "tiny")
    found = meta.estimated_cost(empty, flops=1e11, bandwidth=1e10, name="tiny", dtype="float32", batch_size=2, length=16, rank=2)
    real = measure_cost(base, random_batch(VOCAB, 2, 16), rank=2, repeats=1)
    assert [layer.adapter_parameters for layer in found.layers] == [layer.adapter_parameters for layer in real.layers]
    assert found.weights_bytes == real.weights_bytes
    shapes: list[Any] = []
    monkeypatch.setattr(CostModel, "from_rates", lambda given, **_: shapes.extend(given) or found)
    meta.estimated_cost(empty, flops=1e11, bandwidth=1e10, name="tiny", dtype="float32")
    assert shapes[0][-2:] == [Shape(32, 48, 4, 2.0), Shape(24, 32, 4, 2.0)]


def test_a_card_without_a_measured_cost_counts_every_expert() -> None:
    base = base_of("qwen3_moe")
    data = Dataset(tuple(examples((9, 6, 12, 7, 5, 11), seed=4)), "random tokens", "0" * 16)
    cost = cost_of(profile(base, data, ProfileSettings(rank=2, probe="none", cost=False)))
    with adapted(base, place(base, [1]), rank=2) as model:
        assert cost.linear("params").of([1]) == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert cost.step_time(range(LAYERS)) == pytest.approx(1.0)
