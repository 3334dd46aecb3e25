"""Objectives and budgets against enumeration, plain strategies, ranks and set models."""

import json
import re
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cards import fake_card, fake_placement
from layercard.card.card import LayerCard, training_cost
from layercard.commands.main import run
from layercard.errors import PlacementError, SelectionError
from layercard.selection.budgets import Budgets
from layercard.selection.placement import Placement, check_layers
from layercard.selection.select import (
    allocate_ranks,
    coverage_of,
    coverage_share,
    performance_kept,
    predict,
    select,
    shared_ranks,
    sure_share,
)
from layercard.selection.strategies import strategy_layers, top_layers
from layercard.statistics.coverage import coverage, demand, gain_estimate, similarity, smoothed
from test_cost import measured


def made_card(depth: int, seed: int = 0) -> LayerCard:
    return LayerCard.from_json(fake_card(depth, seed))


def kept(placement: Placement) -> float:
    return float(placement.predicted["performance_kept"]["value"])


def surely(placement: Placement) -> float:
    return float(placement.predicted["performance_kept"]["low"])


def time(placement: Placement) -> float:
    return float(placement.predicted["step_time"]["share"])


def between(card: LayerCard, part: float) -> str:
    """A step time so far between that of the last layer alone and that of all layers."""
    time, depth = training_cost(card).linear("time"), card.model.layers
    least = time.of([depth - 1]) / time.of(range(depth))
    return f"{100 * (least + part * (1 - least)):.2f}%"


def feasible(card: LayerCard, kept_at_least: float, k: int | None = None) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Step time and layers of every placement that surely keeps so much, by enumeration."""
    cost, gain = training_cost(card), coverage_of(card)
    depth = card.model.layers
    for size in range(1, depth + 1) if k is None else [k]:
        for layers in combinations(range(depth), size):
            if performance_kept(gain(layers) / gain(range(depth)))[1] >= kept_at_least - 1e-9:
                yield cost.step_time(layers), layers


def test_objectives_order_by_depth_and_by_performance() -> None:
    card = made_card(12)
    performance, balanced, cost = (select(card, k=3, objective=o) for o in ("performance", "balanced", "cost"))
    assert cost.layers == (9, 10, 11)
    assert time(performance) >= time(balanced) >= time(cost)
    assert kept(performance) >= kept(balanced)
    assert cost.predicted["layers_in_backward"] == "3/12"
    assert performance.paths[0] == f"model.layers.{performance.layers[0]}.self_attn.q_proj" and len(performance.paths) == 3 * 7
    for placement in (performance, balanced, cost):
        assert set(placement.reasons) == {str(layer) for layer in placement.layers}
        assert "gain estimate" in placement.reasons[str(placement.layers[0])]
        assert placement.predicted["solver"]["status"] == "optimal"


@pytest.mark.parametrize("k", [None, 2, 4])
@pytest.mark.parametrize("wanted", [None, "90%", 97])
def test_balanced_is_the_cheapest_that_keeps_the_wanted_performance(k: int | None, wanted: str | int | None) -> None:
    card = made_card(10, seed=3)
    at_least = 0.95 if wanted is None else float(str(wanted).rstrip("%")) / 100
    cheapest = min(feasible(card, at_least, k), default=None)
    if cheapest is None and wanted is None:  # the default gives way to the number of layers
        assert "less than 95%" in select(card, k=k).predicted["remark"]
        return
    if cheapest is None:
        with pytest.raises(SelectionError, match="the best keeps"):
            select(card, k=k, budgets=Budgets(min_performance=wanted))
        return
    found = select(card, k=k, budgets=Budgets(min_performance=wanted))
    assert surely(found) >= at_least - 1e-9
    assert training_cost(card).step_time(found.layers) == pytest.approx(cheapest[0], rel=2e-4)


def test_performance_takes_five_layers_unless_a_number_or_budget_says_otherwise() -> None:
    card = made_card(20)
    assert len(select(card, objective="performance").layers) == len(select(card, objective="cost").layers) == 5
    assert len(select(made_card(3), objective="performance").layers) == 3
    loose = select(card, objective="performance", budgets=Budgets(max_time="100%"))
    assert len(loose.layers) > 15  # within 0.01 % of the best, the cheapest


@pytest.mark.parametrize("name", ["max_time", "max_training_memory", "max_params", "max_latency"])
def test_more_budget_is_never_worse_and_budgets_hold(name: str) -> None:
    card = made_card(14)
    what, of = {
        "max_time": ("time", "step_time"),
        "max_training_memory": ("memory", "peak_memory"),
        "max_params": ("params", "parameters"),
        "max_latency": ("latency", "latency"),
    }[name]
    form = training_cost(card).linear(what)  # type: ignore[arg-type]
    before = 0.0
    for share in (75, 82, 90, 100):
        found = select(card, objective="performance", budgets=Budgets(**{name: f"{share}%"}))
        assert form.of(found.layers) <= share / 100 * form.of(range(14)) * (1 + 1e-9)
        assert kept(found) >= before - 1e-4
        assert 0 < found.predicted[of]["share"] <= 1
        before = kept(found)


def test_a_looser_demand_is_never_dearer() -> None:
    card = made_card(16)
    times = [time(select(card, budgets=Budgets(min_performance=share))) for share in (60, 80, 90, 95, 99)]
    assert all(a <= b * (1 + 2e-4) for a, b in pairwise(times))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budgets": Budgets(max_time="5%")}, ["--max-time", "the least step time that would do is", "layers 11"]),
        (
            {"budgets": Budgets(max_time=between(made_card(12), 0.1), min_performance=99)},
            ["the best keeps", "the least step time that would do is", "99%"],
        ),
        ({"objective": "performance", "k": 6, "budgets": Budgets(max_params="20%")}, ["of 6 layers", "adapter weights", "50.0%"]),
        ({"objective": "cost", "k": 1, "budgets": Budgets(min_performance=99)}, ["of 1 layer ", "the best keeps", "layers would reach it"]),
        (
            {"budgets": Budgets(max_time=between(made_card(12), 0.1), max_training_memory="1%")},
            ["--max-time", "--max-training-memory", "the least peak memory"],
        ),
        ({"budgets": Budgets(max_time="12s")}, ["--max-time 12s", "no measured cost", "60%", "--cost"]),
        ({"budgets": Budgets(max_latency="5ms")}, ["--max-latency 5ms", "no measured cost"]),
        ({"budgets": Budgets(max_time="0%")}, ["--max-time 0%", "leaves nothing"]),
        ({"budgets": Budgets(max_time="-3s")}, ["--max-time -3s"]),
        ({"budgets": Budgets(max_training_memory="2 apples")}, ["--max-training-memory '2 apples'", "2GB"]),
        ({"budgets": Budgets(max_params="many")}, ["--max-params 'many'", "300000"]),
        ({"budgets": Budgets(max_time="nan%")}, ["--max-time 'nan%'"]),
        ({"budgets": Budgets(min_performance=0.95)}, ["did you mean 95%"]),
        ({"budgets": Budgets(min_performance="101%")}, ["at most 100%"]),
        ({"budgets": Budgets(min_performance="most")}, ["'most'", "95%"]),
    ],
)
def test_budgets_that_cannot_be_met_name_what_comes_nearest(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SelectionError) as caught:
        select(made_card(12), **arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_the_named_least_time_would_do() -> None:
    card = made_card(12)
    with pytest.raises(SelectionError) as caught:
        select(card, budgets=Budgets(max_time=between(card, 0.1), min_performance=97))
    least = float(re.findall(r"would do is ([\d.]+)%", str(caught.value))[0])
    assert surely(select(card, budgets=Budgets(max_time=f"{least + 0.1}%", min_performance=97))) >= 0.97
    with pytest.raises(SelectionError):
        select(card, budgets=Budgets(max_time=f"{least - 0.1}%", min_performance=97))


def test_absolute_budgets_need_a_measured_cost_and_then_mean_what_they_say() -> None:
    card = made_card(8)
    measured = training_cost(card).model_copy(update={"source": "measured"})
    card = card.model_copy(update={"cost": measured})
    whole = measured.step_time(range(8))
    share = between(card, 0.4)
    by_share = select(card, objective="performance", budgets=Budgets(max_time=share))
    by_seconds = select(card, objective="performance", budgets=Budgets(max_time=f"{10 * float(share[:-1]) * whole}ms"))
    assert by_seconds.layers == by_share.layers
    assert by_seconds.predicted["step_time"]["seconds"] == pytest.approx(measured.step_time(by_seconds.layers))
    assert select(made_card(8)).predicted["step_time"]["seconds"] is None
    memory = measured.linear("memory").of(range(8))
    for text in (0.7 * memory, f"{0.7 * memory}B", f"{0.7 * memory / 2**20}MiB", f"{0.7 * memory / 1e6} MB", "70%"):
        assert Budgets(max_training_memory=text).resolve(measured)[0].limit == pytest.approx(0.7 * memory)
    assert Budgets(max_params="2M").resolve(measured)[0].limit == 2e6
    assert Budgets(max_latency="5ms").resolve(measured)[0].limit == pytest.approx(0.005)


def test_what_k_layers_cannot_reach_by_default_is_remarked_and_not_refused() -> None:
    found = select(made_card(12), k=1)
    assert len(found.layers) == 1 and "1 layer keeps" in found.predicted["remark"]
    assert kept(found) < 0.95
    assert "remark" not in select(made_card(12)).predicted


def test_a_plain_placement_that_is_as_good_is_named() -> None:
    card = made_card(12)
    notes = 0
    for objective in ("performance", "balanced"):
        for k in range(1, 8):
            found = select(card, k=k, objective=objective)
            plain = found.predicted["baseline"]
            if plain is None:
                for name in ("last", "middle", "uniform"):
                    other = select(card, k=k, strategy=name)
                    dearer, worse = time(other) > time(found), kept(other) < found.predicted["performance_kept"]["low"]
                    assert dearer or worse or found.layers in [select(card, k=k, strategy=n).layers for n in ("last", "middle", "uniform")]
                continue
            notes += 1
            assert plain["performance_kept"]["value"] >= found.predicted["performance_kept"]["low"]
            assert plain["step_time"]["share"] <= time(found) * (1 + 1e-9)
            assert f"{plain['strategy']}-{k}" in plain["note"] and len(plain["layers"]) == k
    assert notes


def test_ranks_are_shared_out_exactly() -> None:
    card = made_card(12)
    placement = select(card, k=4, objective="performance")
    for rank in (1, 2, 64):
        found = allocate_ranks(card, placement, rank, alpha=3.0 * rank)
        per_layer = {path.split(".")[2]: r for path, r in found.rank_pattern.items()}
        assert sum(per_layer.values()) == 4 * rank and min(per_layer.values()) >= 1
        assert set(found.rank_pattern) == set(found.alpha_pattern) == set(placement.paths)
        assert all(found.alpha_pattern[path] / r == pytest.approx(3.0) for path, r in found.rank_pattern.items())
        assert Placement.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert shared_ranks(np.eye(3), np.array([100.0, 1.0, 1.0]), [0, 1, 2], 4) == {0: 8, 1: 2, 2: 2}  # 9 to share 10:1:1, 7.5 + 0.75 + 0.75
    assert len(set(per_layer.values())) > 1
    with pytest.raises(SelectionError, match="rank = 0"):
        allocate_ranks(card, placement, 0)


@pytest.mark.parametrize(
    ("ranks", "alphas", "word"),
    [({"a": 1}, {}, "every path"), ({"a": 0}, {"a": 1.0}, "rank_pattern has 0"), ({"a": 2}, {"a": -1.0}, "alpha_pattern has -1.0")],
)
def test_patterns_that_say_nothing_whole_are_refused(ranks: dict[str, int], alphas: dict[str, float], word: str) -> None:
    with pytest.raises(PlacementError, match=word):
        Placement(
            model={"name": "m", "fingerprint": "f", "layers": 2},
            layers=(1,),
            paths=("a",),
            objective="given",
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )


@given(st.floats(0, 1), st.floats(0, 1))
def test_performance_kept_is_monotone_and_has_an_inverse(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert performance_kept(low)[0] <= performance_kept(high)[0]
    value, below, above = performance_kept(one)
    assert 0 <= below <= value <= above
    assert performance_kept(coverage_share(other))[0] == pytest.approx(other, abs=1e-9)
    assert coverage_share(1.01) == float("inf")
    assert performance_kept(sure_share(other))[1] >= other - 1e-9
    assert sure_share(other) == 0 or performance_kept(sure_share(other) - 1e-6)[1] <= other
    assert sure_share(1.0) == 1.0  # all layers, and nothing less, surely keep everything


def test_top_layers_takes_the_largest_scores_and_the_lower_of_equals() -> None:
    assert top_layers([0.1, 0.9, 0.5, 0.9, 0.5], 3) == [1, 2, 3]
    with pytest.raises(SelectionError, match="k = 6"):
        top_layers([0.1] * 5, 6)


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
        ({"k": 10**5000}, "k = a number of thousands of digits"),
        *[({"budgets": Budgets(max_time=value)}, "cannot be read") for value in ("nan%", "nan", float("nan"), "1e999s", 10**5000)],
        *[({"budgets": Budgets(min_performance=value)}, "is not a share") for value in (float("nan"), "inf%", 10**5000)],
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
        ([3] * 50, "name a layer twice"),
        (range(10**12), "layer 12 is outside"),
        ([10**5000], "layer a number of thousands of digits is outside"),
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
    with pytest.raises(PlacementError, match=r"placement\.json: model: Field required; make the placement again"):
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["select", "card.json", "-o", "out.json", "-k", "9" * 5000], "as an integer"),
        (["select", "card.json", "-o", "out.json", "--max-time", "9" * 5000], "--max-time"),
        (["select", "card.json", "-o", "out.json", "--allocate-ranks", "--alpha", "nan"], "alpha"),
        (["profile", "model", "--data", "data", "-o", "out.json", "--ridge", "nan"], "ridge is nan"),
        (["verify", "half.json", "--model", "m", "--layers", "0-99999999999"], "--layers has '0-99999999999'"),
        (["verify", "half.json", "--model", "m", "--layers", "0-999999999"], "--layers has '0-999999999'"),
        (["verify", "half.json", "--model", "m", "--layers", "9" * 5000], "--layers has '999"),
        (
            ["compare", "m", "--data", "r.jsonl", "--valid", "r.jsonl", "--placements", "half.json", "-o", "out"],
            "surrogate pair",
        ),
        (["bench", "placements", "-o", "out", "--k", "9" * 5000], "--k '999"),
        (["bench", "placements", "-o", "out", "--run-cpus", "nan"], "--run-cpus is nan"),
        (["bench", "placements", "-o", "out", "--budgets", "nan"], "--budgets 'nan'"),
        (["bench", "placements", "-o", "out", "--seeds", "4294967296"], "--seeds '4294967296'"),
        (["cost", "m", "--meta", "--flops", "nan", "--bandwidth", "1"], "--flops is nan"),
    ],
)
def test_numbers_and_texts_that_are_none_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "9999")
    Path("card.json").write_text(json.dumps(fake_card(6)))
    Path("r.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("half.json").write_text(json.dumps({**fake_placement(fake_card(6), [2]), "objective": "\ud800"}))
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and len(error.strip().splitlines()) <= 5, error
    assert not Path("out").exists() and not Path("out.json").exists()


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


def measured_card(depth: int = 12) -> LayerCard:
    """A card whose cost is measured, with a known size of every block."""
    cost = measured(depth)
    layers = tuple(layer.model_copy(update={"weights_bytes": 10_000}) for layer in cost.layers)
    return made_card(depth).with_cost(cost.model_copy(update={"layers": layers, "weights_bytes": 200_000, "head_weights_bytes": 50_000}))


def test_a_limit_on_memory_counts_weights_and_what_stays_on_disk() -> None:
    card = measured_card()
    whole, streamed = (training_cost(card).linear_process(stream=stream) for stream in (False, True))
    least = whole.of([11])
    with pytest.raises(SelectionError, match=r"no placement.* keeps --max-memory .*the least memory that would do is .*with layers 11"):
        select(card, objective="performance", budgets=Budgets(max_memory=least - 1))
    # Streamed, the same limit leaves room for all blocks from some depth on.
    found = select(card, objective="performance", budgets=Budgets(max_memory=least - 1, stream=True))
    assert min(found.layers) > 0 and streamed.of(found.layers) <= least - 1
    assert found.predicted["streamed_memory"]["bytes"] < found.predicted["process_memory"]["bytes"]
    assert found.asked["stream"] is True


def test_a_refusal_names_the_deepest_placement_that_would_fit() -> None:
    card = measured_card()
    limit = training_cost(card).linear_process(stream=True).of([9]) + 1
    with pytest.raises(SelectionError, match="layers from 9 on would fit"):
        select(card, budgets=Budgets(max_memory=limit, stream=True, min_performance=99.9))


def test_a_streamed_training_does_not_adapt_block_0() -> None:
    card = measured_card()
    found = select(card, objective="performance", budgets=Budgets(max_memory="1TB", stream=True))
    assert 0 not in found.layers and len(found.layers) > 5


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        (Budgets(stream=True), "--stream says how --max-memory is meant"),
        (Budgets(max_memory="6"), "could be 6MB or 6%"),
        (Budgets(max_memory="6 stones"), "cannot be read"),
    ],
)
def test_limits_on_memory_that_cannot_be_read(budgets: Budgets, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        select(measured_card(), objective="performance", budgets=budgets)


def test_weights_are_not_known_without_measured_cost() -> None:
    with pytest.raises(SelectionError, match=r"counts the model's weights.*--max-training-memory"):
        select(made_card(6), objective="performance", budgets=Budgets(max_memory="6GB"))


def test_modules_are_a_part_of_the_choice() -> None:
    card = made_card(12)
    every = select(card, k=3)
    for name in ("mlp", "down"):
        placement = select(card, k=3, modules=name, budgets=Budgets(min_performance=70))
        assert placement.modules == name and all(("mlp" in path) for path in placement.paths)
        assert placement.predicted["step_time"]["share"] < every.predicted["step_time"]["share"]
    best = select(card, modules="auto", budgets=Budgets(min_performance=80))
    fixed = [select(card, modules=name, budgets=Budgets(min_performance=80)) for name in ("all", "mlp", "out", "down")]
    assert time(best) <= min(time(placement) for placement in fixed) * (1 + 1e-6)
    assert kept(best) >= 0.8 - 1e-6
    with pytest.raises(SelectionError, match="set of modules 'mpl' is unknown"):
        select(card, modules="mpl")
    with pytest.raises(SelectionError, match="--modules auto needs an objective"):
        select(card, strategy="last", modules="auto")


def test_later_epochs_make_few_layers_cheaper() -> None:
    card = made_card(12)
    shares = [predict(card, [10, 11], training_cost(card, epochs=epochs))["step_time"]["share"] for epochs in (1, 3)]
    assert shares[1] < shares[0]
    assert predict(card, [11], training_cost(card, fast=False))["training"] == "stock"


def test_a_placement_has_the_rate_of_the_rule() -> None:
    placement = select(made_card(12), k=3)
    assert placement.learning_rate is not None and placement.learning_rate_source == "rule" and placement.learning_rate_steps == 500
