"""The cost model: placements as sums of parts, costs from shapes and rates, and the file."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cards import fake_card
from layercard.card.card import LayerCard, cost_of
from layercard.cost.model import BESIDES_BYTES, LIBRARY_BYTES, CostModel, LayerCost, Linear, Shape
from layercard.errors import CardError, OutputError, PlacementError

LLAMA = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
GPT2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]


def measured(depth: int = 6, **changes: object) -> CostModel:
    """A cost model in which no two parts are equal."""
    layers = tuple(
        LayerCost(
            forward_seconds=0.010 + 0.001 * at,
            backward_seconds=0.020 + 0.002 * at,
            adapter_seconds=0.007 + 0.0005 * at,
            saved_bytes=1000 + at,
            adapter_saved_bytes=100 + 3 * at,
            adapter_parameters=10 + at,
            adapter_latency_seconds=0.001 * (at + 1),
        )
        for at in range(depth)
    )
    parts = {
        "source": "measured",
        "model": "made up",
        "batch_size": 4,
        "tokens": 64,
        "labelled_tokens": 100,
        "rank": 8,
        "dtype": "float32",
        "embedding_seconds": 0.001,
        "head_forward_seconds": 0.03,
        "head_backward_seconds": 0.04,
        "overhead_seconds": 0.005,
        "weights_bytes": 5000,
        "shared_bytes": 70,
        "head_bytes": 900,
        "block_bytes": 300,
        "forward_bytes": 200,
        "layers": layers,
    }
    return CostModel(**{**parts, **changes})  # type: ignore[arg-type]


def slow_time(cost: CostModel, chosen: set[int]) -> float:
    """Step time, walked through the step from the input to the loss and back."""
    total = cost.embedding_seconds
    for layer in cost.layers:
        total += layer.forward_seconds
    total += cost.head_forward_seconds + cost.head_backward_seconds
    for at in reversed(range(len(cost.layers))):
        if all(at < other for other in chosen):
            break
        total += cost.layers[at].backward_seconds
        total += cost.layers[at].adapter_seconds if at in chosen else 0.0
    return total + cost.overhead_seconds


chosen_layers = st.sets(st.integers(0, 5), min_size=1)


@given(chosen_layers)
def test_step_time_is_the_sum_along_the_step(chosen: set[int]) -> None:
    cost = measured()
    assert cost.step_time(chosen) == pytest.approx(slow_time(cost, chosen))
    assert cost.linear("time").of(sorted(chosen)) == pytest.approx(slow_time(cost, chosen))
    assert cost.linear("params").of(chosen) == sum(10 + at for at in chosen)
    assert cost.adapter_bytes(chosen) == 4 * sum(10 + at for at in chosen)
    assert cost.inference_latency(chosen) == pytest.approx(sum(0.001 * (at + 1) for at in chosen))


@given(chosen_layers, st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 20_000), st.integers(0, 50))
def test_memory_form_bounds_the_peak(chosen: set[int], head: int, block: int, forward: int, saved: int) -> None:
    layers = tuple(layer.model_copy(update={"adapter_saved_bytes": saved * at}) for at, layer in enumerate(measured().layers))
    cost = measured(head_bytes=head, block_bytes=block, forward_bytes=forward, layers=layers)
    assert cost.linear("memory").of(chosen) >= cost.peak_memory(chosen)


def test_memory_is_what_is_held_and_the_worst_moment() -> None:
    cost = measured()
    held = (4 + 8) * (12 + 14)
    saved = sum(1000 + at for at in range(2, 6)) + (100 + 6) + (100 + 12)
    assert cost.peak_memory([2, 4]) == held + 70 + saved + 900
    assert measured(forward_bytes=10**6).peak_memory([2, 4]) == held + 70 + 10**6
    assert measured(block_bytes=2000).peak_memory([2, 4]) == held + 70 + saved + 2000
    heavy = tuple(layer.model_copy(update={"adapter_parameters": 10**5}) for layer in cost.layers)
    assert measured(layers=heavy).peak_memory([5]) == (4 + 8 + 12) * 10**5


def weighty(**changes: object) -> CostModel:
    """A cost model whose weights are known: an embedding of 1000, blocks of 300, 301, … and a head of 500 bytes."""
    layers = tuple(layer.model_copy(update={"weights_bytes": 300 + at}) for at, layer in enumerate(measured().layers))
    return measured(
        **{"layers": layers, "weights_bytes": 1000 + sum(300 + at for at in range(6)) + 500, "head_weights_bytes": 500, **changes}
    )


def test_a_process_holds_the_weights_that_train_and_the_step_above_them() -> None:
    cost, besides = weighty(), LIBRARY_BYTES + BESIDES_BYTES
    assert cost.weights_in_memory([2, 4]) == cost.weights_bytes
    assert cost.weights_in_memory([2, 4], stream=True) == 302 + 303 + 304 + 305 + 500
    assert cost.process_memory([2, 4]) == besides + cost.weights_bytes + cost.peak_memory([2, 4])
    assert cost.process_memory([2, 4], stream=True) == besides + 1714 + cost.peak_memory([2, 4])
    # While the lower blocks pass through, the embedding is in memory, and what a forward takes.
    wide = weighty(weights_bytes=10**6)
    assert wide.process_memory([5], stream=True) == besides + 10**6 - 500 - sum(300 + at for at in range(6)) + 200
    # A file of before the weights of layers were known: they are counted as head.
    assert measured().weights_in_memory([5], stream=True) == 5000


@given(chosen_layers, st.integers(2400, 10**6), st.booleans())
def test_process_form_bounds_the_memory_of_a_process(chosen: set[int], weights: int, stream: bool) -> None:
    cost = weighty(weights_bytes=weights + 1000)
    assert cost.linear_process(stream=stream).of(chosen) >= cost.process_memory(chosen, stream=stream)


@given(chosen_layers, st.integers(0, 5))
def test_one_more_layer_never_costs_less(chosen: set[int], more: int) -> None:
    cost = CostModel.from_shapes([LLAMA] * 6)
    for what in (cost.step_time, cost.peak_memory, cost.adapter_bytes, cost.inference_latency):
        assert what(chosen | {more}) >= what(chosen)  # type: ignore[operator]


def test_output_side_is_cheaper_and_all_is_one() -> None:
    cost = CostModel.from_shapes([LLAMA] * 30, vocabulary=49_152)
    assert cost.source == "shapes" and not cost.absolute
    assert cost.step_time(range(30)) == pytest.approx(1.0)
    assert cost.inference_latency(range(30)) == pytest.approx(1.0)
    times = [cost.step_time([at]) for at in range(30)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]
    assert cost.peak_memory([29]) < cost.peak_memory([0])


@pytest.mark.parametrize("shapes", [LLAMA, GPT2])
def test_costs_from_rates_grow_with_the_work(shapes: list[tuple[int, int]]) -> None:
    def of(**changes: object) -> CostModel:
        sizes: dict[str, object] = {"flops": 1e11, "bandwidth": 1e10, "batch_size": 4, "length": 64, "rank": 8}
        return CostModel.from_rates([shapes] * 4, **{**sizes, **changes})  # type: ignore[arg-type]

    usual, every = of(), range(4)
    for more in ({"batch_size": 8}, {"length": 128}, {"rank": 32}, {"vocabulary": 200_000}):
        assert of(**more).step_time(every) > usual.step_time(every), more
        assert of(**more).peak_memory(every) > usual.peak_memory(every), more
    assert of(flops=1e12).step_time(every) < usual.step_time(every)
    assert of(bandwidth=1e11).step_time(every) < usual.step_time(every)
    assert of(dtype="bfloat16").peak_memory(every) < usual.peak_memory(every)
    assert usual.layers[0].adapter_parameters == 8 * sum(n_in + n_out for n_in, n_out in shapes)
    assert sum(module.adapter_seconds for module in usual.layers[0].modules) == pytest.approx(usual.layers[0].adapter_seconds)
    assert CostModel.from_rates([shapes] * 8, flops=1e11, bandwidth=1e10).step_time(range(8)) > usual.step_time(every)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops": -1.0}, r"flops is -1.0; give a number above 0"),
        ({"bandwidth": float("inf")}, "bandwidth is inf"),
        ({"length": 0}, "length is 0"),
        ({"labelled": 0}, "labelled is 0"),
        ({"dtype": "int3"}, "dtype 'int3' has no known size"),
        ({"shapes": []}, "a layer has no linear maps"),
        ({"shapes": [[(8, 8)], []]}, "a layer has no linear maps"),
    ],
)
def test_rates_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    given_values = {"shapes": [[(8, 8)]], "flops": 1e9, "bandwidth": 1e9, **changes}
    with pytest.raises(CardError, match=message):
        CostModel.from_rates(**given_values)  # type: ignore[arg-type]


def rated(maps: list[tuple[int, int] | Shape]) -> CostModel:
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


def test_layers_that_are_not_there() -> None:
    cost = measured()
    with pytest.raises(PlacementError, match="at least one layer"):
        cost.step_time([])
    for wrong in (-1, 6):
        with pytest.raises(PlacementError, match=f"layer {wrong} is not in the cost model; it has layers 0 to 5"):
            cost.peak_memory([2, wrong])
    assert cost.step_time([3, 3, 1]) == cost.step_time([1, 3])
    assert Linear(1.0, (2.0, 3.0), (0.5, 0.25)).of([0]) == 6.5


def test_a_cost_model_survives_the_disk_and_refuses_what_is_broken(tmp_path: Path) -> None:
    cost = measured()
    path = cost.save(tmp_path / "cost.json")
    assert CostModel.load(path) == cost
    with pytest.raises(OutputError, match="exists already"):
        cost.save(path)
    value = json.loads(path.read_text())
    assert value["schema"] == "layercard-cost/1"
    for change, message in (
        ({"schema": "layercard/1"}, "is a card .*; a cost model is needed: make one with `layercard cost`"),
        ({"layers": []}, "layers: "),
        ({"embedding_seconds": -1.0}, "embedding_seconds: "),
        ({"source": "guessed"}, "source: "),
    ):
        with pytest.raises(CardError, match=message) as caught:
            CostModel.from_json({**value, **change}, "cost.json")
        assert "\n" not in str(caught.value)
    path.write_text(path.read_text()[:100])
    with pytest.raises(CardError, match="is not a whole cost model"):
        CostModel.load(path)


def test_a_card_without_cost_still_loads_and_is_estimated() -> None:
    card = LayerCard.from_json(fake_card(8))
    assert card.cost is None
    estimate = cost_of(card)
    assert (estimate.source, len(estimate.layers), estimate.rank) == ("shapes", 8, 8)
    assert estimate.step_time([7]) < estimate.step_time([0]) < 1.0


def test_a_card_carries_its_cost() -> None:
    card = LayerCard.from_json(fake_card(6)).with_cost(measured())
    again = LayerCard.from_json(json.loads(json.dumps(card.to_json())))
    assert again == card and cost_of(again) == measured()
    assert [layer.forward_seconds for layer in again.layers] == [layer.forward_seconds for layer in measured().layers]
    assert again.layers[2].saved_bytes == 1002
    with pytest.raises(CardError, match="cost must have 6 layers, found 5"):
        LayerCard.from_json({**card.to_json(), "cost": measured(5).to_json()})
