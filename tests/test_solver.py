"""The solver against enumeration, greedy choice and itself."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings, strategies as st

from layercard.cost.model import Linear
from layercard.selection import solver
from layercard.selection.solver import Budget, Problem, coverage_bounds, greedy, least_cost, most_coverage, tightened_bound

EXACT = 1e-9
PATIENCE = 120.0
"""Seconds: what is proven here must not depend on how busy the machine is."""


def form(draw: np.random.Generator, depth: int, coupled: bool = True) -> Linear:
    """A cost of which backward, the adapters, or both have a price."""
    through, own = [(1, 1), (1, 0), (0, 1)][draw.integers(3)]
    return Linear(
        float(draw.uniform(0, 1)), tuple(through * draw.uniform(0.5, 1, depth)), tuple(own * draw.uniform(0, 1, depth).round(int(coupled)))
    )


def problem_of(seed: int, depth: int, coupled: bool, budgets: int) -> Problem:
    """A problem with random coverage, number of layers and budgets."""
    draw = np.random.default_rng(seed)
    similar = draw.uniform(size=(depth, depth)) if coupled else np.eye(depth)
    forms = [form(draw, depth, coupled) for _ in range(budgets)]
    limits = tuple(Budget(f"b{at}", f, f.fixed + draw.uniform(0.3, 1) * (f.of(range(depth)) - f.fixed)) for at, f in enumerate(forms))
    least = int(draw.integers(1, depth + 1)) if draw.uniform() < 0.5 else 1
    most = [None, least, depth][draw.integers(3)]
    return Problem(similar, draw.uniform(size=depth), least, most, limits)


def enumerated(problem: Problem) -> list[tuple[int, ...]]:
    sets = (layers for size in range(1, problem.num_layers + 1) for layers in combinations(range(problem.num_layers), size))
    return [layers for layers in sets if problem.allows(layers)]


@given(seed=st.integers(0, 100_000), depth=st.integers(1, 9), coupled=st.booleans(), budgets=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_largest_coverage_is_what_enumeration_finds(seed: int, depth: int, coupled: bool, budgets: int) -> None:
    problem = problem_of(seed, depth, coupled, budgets)
    allowed = enumerated(problem)
    found = most_coverage(problem, tolerance=EXACT, seconds=PATIENCE)
    if not allowed:
        assert found is None
        return
    best = max(map(problem.coverage, allowed))
    assert found is not None and problem.allows(found.layers)
    assert found.value == pytest.approx(best, rel=1e-7) == pytest.approx(problem.coverage(found.layers))
    assert found.status == "optimal" and found.gap is not None and found.gap <= 1e-7
    quick = greedy(problem)
    assert quick is None or (problem.coverage(quick) <= best * (1 + 1e-9) and problem.allows(quick))


@given(seed=st.integers(0, 100_000), depth=st.integers(1, 9), coupled=st.booleans(), budgets=st.integers(0, 2), share=st.floats(0.2, 1.05))
@example(seed=7, depth=7, coupled=False, budgets=0, share=0.25)  # a lowest layer that does not reach the coverage alone
@settings(max_examples=60, deadline=None)
def test_the_least_cost_is_what_enumeration_finds(seed: int, depth: int, coupled: bool, budgets: int, share: float) -> None:
    problem = problem_of(seed, depth, coupled, budgets)
    best = most_coverage(problem, tolerance=EXACT, seconds=PATIENCE)
    assume(best is not None)
    assert best is not None
    problem = replace(problem, needed=share * best.value)
    cost = form(np.random.default_rng(seed + 1), depth)
    allowed = enumerated(problem)
    found = least_cost(problem, cost, tolerance=EXACT, seconds=PATIENCE)
    if not allowed:
        assert found is None
        return
    assert found is not None and problem.allows(found.layers)
    assert found.cost == pytest.approx(min(map(cost.of, allowed)), rel=1e-7)
    assert found.status == "optimal" and found.cost == pytest.approx(cost.of(found.layers))
    quick = greedy(problem, cost)
    assert quick is None or (cost.of(quick) >= found.cost * (1 - 1e-9) and problem.allows(quick))


@pytest.mark.parametrize("seed", range(3))
def test_twelve_layers_with_every_kind_of_budget(seed: int) -> None:
    draw = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    problem = Problem(np.exp(-distance / 4) * draw.uniform(0.8, 1, (12, 12)), draw.uniform(0.5, 1, 12))
    time, memory, params = (Linear(3.0, tuple(draw.uniform(0.9, 1.1, 12) * a), tuple(draw.uniform(0.2, 0.4, 12))) for a in (1, 0.5, 0))
    limits = tuple(Budget(name, f, 0.7 * f.of(range(12))) for name, f in (("time", time), ("memory", memory), ("params", params)))
    problem = replace(problem, budgets=limits)
    best = max(map(problem.coverage, enumerated(problem)))
    found = most_coverage(problem, tolerance=EXACT, seconds=PATIENCE)
    assert found is not None and found.value == pytest.approx(best, rel=1e-7)
    problem = replace(problem, needed=0.93 * best)
    cheapest = least_cost(problem, time, tolerance=EXACT, seconds=PATIENCE)
    assert cheapest is not None and cheapest.cost == pytest.approx(min(map(time.of, enumerated(problem))), rel=1e-7)


@given(seed=st.integers(0, 100_000), depth=st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_more_budget_is_never_worse(seed: int, depth: int) -> None:
    problem = problem_of(seed, depth, True, 1)
    wider = replace(problem, budgets=(replace(problem.budgets[0], limit=1.2 * problem.budgets[0].limit),))
    tight, wide = (most_coverage(each, tolerance=EXACT, seconds=PATIENCE) for each in (problem, wider))
    if tight is not None:
        assert wide is not None and wide.value >= tight.value * (1 - 1e-7)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_permuting_layers_permutes_the_answer(seed: int, k: int) -> None:
    """Without depth costs the order of layers means nothing."""
    draw = np.random.default_rng(seed)
    similar, weights, own = draw.uniform(size=(7, 7)), draw.uniform(0.5, 1.5, size=7), draw.uniform(size=7)
    np.fill_diagonal(similar, 1.5)  # each layer covers itself best, so none is idle and the best set is the only one
    order = draw.permutation(7)

    def solved(similar: np.ndarray, weights: np.ndarray, own: np.ndarray) -> list[int]:
        flat = Linear(0.0, (0.0,) * 7, tuple(own))
        found = most_coverage(Problem(similar, weights, 1, k, (Budget("b", flat, 0.6 * own.sum()),)), tolerance=EXACT, seconds=PATIENCE)
        assert found is not None
        return list(found.layers)

    moved = solved(similar[np.ix_(order, order)], weights[order], own[order])
    assert sorted(order[moved].tolist()) == solved(similar, weights, own)


@given(seed=st.integers(0, 10_000), depth=st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_bounds_hold_for_any_prices(seed: int, depth: int) -> None:
    problem = problem_of(seed, depth, True, 2)
    prices = np.random.default_rng(seed + 1).uniform(-0.2, 1, depth)
    bounds = coverage_bounds(problem, prices)
    for layers in enumerated(problem):
        m, value = layers[0], problem.coverage(layers)
        assert value <= bounds[m] * (1 + 1e-9)
        sharp = tightened_bound(problem, m, prices, value)
        assert value <= sharp.value * (1 + 1e-9)
        assert all(value <= sharp.value - sharp.margin[i] + 1e-9 for i in layers)
        assert len(layers) >= sharp.fewest(m, value)


def deep(depth: int, seed: int, scale: float) -> tuple[Problem, Linear]:
    """Coupling that decays with distance and is noisy, smooth weights, and layers that cost about the same."""
    draw = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(depth), np.arange(depth)))
    similar = np.exp(-distance / scale) * draw.uniform(0.75, 1, (depth, depth))
    similar = (similar + similar.T) / 2
    np.fill_diagonal(similar, 1.0)
    weights = np.interp(np.linspace(0, 1, depth), np.linspace(0, 1, 6), draw.uniform(0.3, 1, 6))
    through, own = draw.uniform(0.95, 1.05, depth), 0.3 * draw.uniform(0.95, 1.05, depth)
    return Problem(similar, weights), Linear(0.6 * float(through.sum()), tuple(through), tuple(own))


@pytest.mark.parametrize(("seed", "scale"), [(0, 32.0), (2, 42.0)])
def test_128_layers_are_solved_to_optimality(seed: int, scale: float) -> None:
    problem, time = deep(128, seed, scale)
    budget = Budget("time", time, 0.6 * time.of(range(128)))
    whole = problem.coverage(range(128))
    limited = most_coverage(replace(problem, budgets=(budget,)), seconds=60)
    five = most_coverage(replace(problem, least=5, most=5), seconds=60)
    cheap = least_cost(replace(problem, needed=0.74 * whole), time, seconds=60)
    assert limited is not None and five is not None and cheap is not None
    assert {limited.status, five.status, cheap.status} == {"optimal"}
    assert max(found.gap or 0.0 for found in (limited, five, cheap)) <= 1.001e-3
    assert len(five.layers) == 5 and budget.allows(limited.layers) and cheap.value >= 0.74 * whole * (1 - 1e-9)
    quick = greedy(replace(problem, needed=0.74 * whole), time)
    assert quick is not None and cheap.cost is not None and cheap.cost <= time.of(quick)


def test_out_of_time_the_best_so_far_is_given_with_an_honest_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, time = deep(40, 0, 10.0)
    needed = 0.74 * problem.coverage(range(40))
    exact = least_cost(replace(problem, needed=needed), time)
    rushed = least_cost(replace(problem, needed=needed), time, tolerance=1e-9, seconds=0.0)
    assert exact is not None and rushed is not None and exact.cost is not None and rushed.cost is not None
    assert rushed.status == "time limit" and rushed.gap is not None
    assert rushed.cost * (1 - rushed.gap) <= exact.cost * (1 + 1e-9) <= rushed.cost * (1 + 2e-4)
    best = most_coverage(replace(problem, least=6, most=6), tolerance=EXACT, seconds=PATIENCE)
    monkeypatch.setattr(solver, "greedy", lambda problem, cost: (0, 1, 2, 3, 4, 5))
    poor = most_coverage(replace(problem, least=6, most=6), seconds=0.0)
    assert best is not None and poor is not None and poor.gap is not None
    assert poor.status == "time limit" and best.value <= poor.value * (1 + poor.gap) * (1 + 1e-9)


def test_where_greedy_finds_no_allowed_set_the_solver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(5, 7, True, 2)
    best = most_coverage(problem, tolerance=EXACT, seconds=PATIENCE)
    monkeypatch.setattr(solver, "greedy", lambda problem, cost: None)
    found = most_coverage(problem, tolerance=EXACT, seconds=PATIENCE)
    assert best is not None and found is not None and found.value == pytest.approx(best.value)
    cost = form(np.random.default_rng(0), 7)
    assert least_cost(replace(problem, needed=best.value), cost) is not None
