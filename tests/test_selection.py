"""Selection against enumeration, and its plain strategies."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cards import fake_card
from layercard.card import LayerCard
from layercard.errors import PlacementError, SelectionError
from layercard.selection import Placement, check_layers, select, strategy_layers
from layercard.selection.solver import greedy_exchange, solve
from layercard.statistics.coverage import coverage, demand, gain_estimate, similarity, smoothed


def made_card(depth: int, seed: int = 0) -> LayerCard:
    return LayerCard.from_json(fake_card(depth, seed))


@given(seed=st.integers(0, 10_000), depth=st.integers(2, 9), data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_solver_finds_what_enumeration_finds(seed: int, depth: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, depth))
    lowest = data.draw(st.integers(0, depth - k))
    rng = np.random.default_rng(seed)
    similar, weights = similarity(np.corrcoef(rng.normal(size=(depth, 6)))), rng.uniform(size=depth)
    best = max(coverage(similar, weights, layers) for layers in combinations(range(lowest, depth), k))
    found = solve(similar, weights, k, lowest)
    assert found.value == pytest.approx(best, rel=1e-9) and found.status in ("optimal", "greedy")
    assert found.value == pytest.approx(coverage(similar, weights, found.layers))
    assert len(found.layers) == k and min(found.layers) >= lowest
    greedy = greedy_exchange(similar, weights, k, lowest)
    assert best * (1 - 1 / np.e) <= greedy.value <= best * (1 + 1e-9)
    if k < depth - lowest:
        assert solve(similar, weights, k + 1, lowest).value >= best * (1 - 1e-9)  # more is never worse


@given(seed=st.integers(0, 10_000), k=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_permuting_layers_permutes_the_answer(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    similar, weights = similarity(np.corrcoef(rng.normal(size=(7, 5)))), rng.uniform(0.5, 1.5, size=7)
    order = rng.permutation(7)
    moved = solve(similar[np.ix_(order, order)], weights[order], k)
    assert sorted(order[list(moved.layers)].tolist()) == list(solve(similar, weights, k).layers)


def test_objectives_order_by_depth_and_by_coverage() -> None:
    card = made_card(12)
    performance, balanced, cost = (select(card, k=3, objective=o) for o in ("performance", "balanced", "cost"))
    assert cost.layers == (9, 10, 11)
    assert min(performance.layers) <= min(balanced.layers) <= min(cost.layers)
    assert performance.predicted["coverage"] >= balanced.predicted["coverage"] >= 0.95 * performance.predicted["coverage"]
    assert cost.predicted["layers_in_backward"] == "3/12"
    assert performance.paths[0] == f"model.layers.{performance.layers[0]}.self_attn.q_proj" and len(performance.paths) == 3 * 7
    for placement in (performance, balanced, cost):
        assert set(placement.reasons) == {str(layer) for layer in placement.layers}
        assert "gain estimate" in placement.reasons[str(placement.layers[0])]


def test_no_placement_nearer_to_the_output_would_do_for_balanced() -> None:
    card = made_card(10, seed=3)
    best = select(card, k=3, objective="performance").predicted["coverage"]
    lowest = min(select(card, k=3, objective="balanced").layers)
    similar, weights = similarity(card.coupling), demand(card.values("step_probe"))
    for layers in combinations(range(lowest + 1, 10), 3):
        assert coverage(similar, weights, layers) / weights.sum() < 0.95 * best


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("first", [0, 1, 2, 3, 4]),
        ("top", [0, 1, 2, 3, 4]),
        ("middle", [13, 14, 15, 16, 17]),
        ("last", [25, 26, 27, 28, 29]),
        ("bottom", [25, 26, 27, 28, 29]),
        ("uniform", [3, 9, 15, 21, 27]),
        ("all", list(range(30))),
    ],
)
def test_strategies(name: str, layers: list[int]) -> None:
    assert strategy_layers(name, 30, 5) == layers
    assert select(made_card(30), k=5, strategy=name).layers == tuple(layers)


@given(depth=st.integers(1, 80), data=st.data())
def test_every_strategy_gives_k_distinct_layers(depth: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, depth))
    for name in ("first", "middle", "last", "uniform", "random"):
        layers = strategy_layers(name, depth, k, seed=7)
        assert len(set(layers)) == k and layers == sorted(layers) and layers[0] >= 0 and layers[-1] < depth


def test_bottom_is_the_cheapest_to_train() -> None:
    """The paper's Bottom is the output side: backward runs through the fewest blocks."""
    blocks = {name: 30 - min(strategy_layers(name, 30, 5)) for name in ("bottom", "middle", "uniform", "random", "top")}
    assert min(blocks, key=lambda name: blocks[name]) == "bottom" and blocks["bottom"] == 5 and blocks["top"] == 30


def test_random_depends_on_the_seed() -> None:
    assert strategy_layers("random", 30, 5, 1) == strategy_layers("random", 30, 5, 1)
    assert len({tuple(strategy_layers("random", 30, 5, seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k = 0 layers cannot be chosen; the model has 12"),
        ({"k": 99}, "k = 99 layers cannot be chosen; the model has 12"),
        ({"objective": "perfomance"}, "did you mean performance"),
        ({"strategy": "botom"}, "did you mean bottom"),
        ({"strategy": "uniform", "k": 13}, "k = 13"),
    ],
)
def test_what_cannot_be_chosen_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(made_card(12), **arguments)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layers"),
        ([3, 12], "layer 12 is outside the model"),
        ([-1], "layer -1 is outside"),
        ([1.0], "not an integer"),
        ([True], "not an integer"),
        (["3"], "not an integer"),
        ([3, 3], "name a layer twice"),
    ],
)
def test_layers_that_peft_would_take_wrongly_are_refused(layers: list[Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        check_layers(layers, 12)


def test_numpy_integers_and_ranges_become_plain_integers() -> None:
    for given_layers in (range(2, 5), np.array([4, 2, 3]), [np.int64(2), 3, 4]):
        found = check_layers(given_layers, 12)
        assert found == (2, 3, 4) and all(type(layer) is int for layer in found)


def test_a_placement_survives_the_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    placement = select(made_card(12), k=3)
    path = placement.save(tmp_path / "placement.json")
    assert Placement.load(path) == placement
    assert Placement.load(path).to_json()["schema"] == "layercard-placement/1"
    path.write_text('{"schema": "layercard-placement/1", "layers": []}')
    with pytest.raises(PlacementError, match="not a whole placement"):
        Placement.load(path)


def test_the_gain_estimate_is_gain_times_the_coverage_of_one_layer() -> None:
    rng = np.random.default_rng(0)
    similar, gains = similarity(np.corrcoef(rng.normal(size=(6, 5)))), rng.uniform(size=6)
    weights = demand(gains)
    for layer, estimate in enumerate(gain_estimate(similar, gains)):
        share = coverage(similar, weights, [layer]) / coverage(similar, weights, range(6))
        assert estimate == pytest.approx(smoothed(gains)[layer] * share)
    assert demand([0.0, -1.0]).tolist() == [1.0, 1.0]
    assert coverage(similar, weights, []) == 0.0


@given(seed=st.integers(0, 10_000), cut=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_coverage_is_monotone_and_submodular(seed: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    similar, weights = similarity(np.corrcoef(rng.normal(size=(6, 5)))), rng.uniform(size=6)
    order = rng.permutation(6).tolist()
    small, large, extra = order[:cut], order[:5], order[5]
    gain_small = coverage(similar, weights, [*small, extra]) - coverage(similar, weights, small)
    gain_large = coverage(similar, weights, [*large, extra]) - coverage(similar, weights, large)
    assert gain_small >= gain_large - 1e-12 >= -2e-12


def test_smoothing_keeps_a_level_and_damps_a_spike() -> None:
    assert smoothed(np.full(30, 0.7)) == pytest.approx(np.full(30, 0.7))
    spike = smoothed(np.eye(30)[15])
    assert spike.argmax() == 15 and 0.15 < spike[15] < 0.25 and spike.sum() == pytest.approx(1.0, abs=0.01)
    assert smoothed([1.0, 2.0, 3.0]) == pytest.approx([1.0, 2.0, 3.0], abs=1e-4)  # three layers are not neighbours
