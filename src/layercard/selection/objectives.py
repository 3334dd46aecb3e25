"""The three objectives as problems for the solver, and what to say where nothing meets them."""

from dataclasses import dataclass, replace

from layercard.card import LayerCard, cost_of
from layercard.cost import CostModel, Linear
from layercard.errors import SelectionError
from layercard.indices import listed
from layercard.selection.budgets import Budgets, amount, kind, label, option
from layercard.selection.calibration import coverage_share, performance_kept
from layercard.selection.models import layer_weights, set_similarity
from layercard.selection.problem import Problem, Solution
from layercard.selection.solver import SECONDS, least_cost, most_coverage, resolution
from layercard.selection.strategies import check_k

LAYERS = 5
"""Number of layers where neither a number nor a budget says how many."""
KEPT = 0.95
"""Performance that `balanced` keeps unless told."""


@dataclass(frozen=True)
class Question:
    """What is asked of a card.

    Attributes:
        objective: `performance`, `cost` or `balanced`.
        problem: The number of layers, the budgets and the least coverage.
        cost: The card's cost model.
        time: Step time as a linear form.
        whole: Coverage of all layers.
        kept: The performance asked for, from 0 to 1; `None` without.
        insists: Whether the user asked for that performance, or it is the default of `balanced`.
    """

    objective: str
    problem: Problem
    cost: CostModel
    time: Linear
    whole: float
    kept: float | None
    insists: bool

    def performance(self, coverage: float) -> float:
        """Performance kept in per cent."""
        return 100 * performance_kept(coverage / self.whole)[0]


def question(card: LayerCard, objective: str, k: int | None, budgets: Budgets) -> Question:
    """The problem behind an objective.

    Raises:
        SelectionError: k is outside 1 to the number of layers, or a budget cannot be read.
    """
    depth, cost = card.model.layers, cost_of(card)
    insists = budgets.min_performance is not None
    kept = budgets.kept() if insists else KEPT if objective == "balanced" else None
    limits = budgets.resolve(cost)
    if k is None and (objective == "cost" or (objective == "performance" and not limits)) and not (objective == "cost" and insists):
        k = min(LAYERS, depth)
    if k is not None:
        check_k(k, depth)
    similar, weights = set_similarity(card), layer_weights(card)
    problem = Problem(similar, weights, 1 if k is None else k, k, limits)
    whole = problem.coverage(range(depth))
    needed = 0.0 if kept is None else coverage_share(kept) * whole
    return Question(objective, replace(problem, needed=needed), cost, cost.linear("time"), whole, kept, insists)


def answer(asked: Question, seconds: float = SECONDS) -> tuple[Solution, str | None]:
    """The best placement, and a remark where it is not quite what was asked for.

    Args:
        asked: What is asked.
        seconds: Time limit of each search; the solution says whether it was reached, and its gap.

    Raises:
        SelectionError: Nothing meets the budgets; the message names what comes nearest.
    """
    if asked.objective == "performance":
        return _best(asked, seconds), None
    found = least_cost(asked.problem, asked.time, seconds=seconds)
    if found is not None:
        return found, None
    best = most_coverage(asked.problem, seconds=seconds)
    if best is not None and not asked.insists and not asked.problem.budgets:
        share = 0.01 * round(100 * KEPT)
        nearest = least_cost(replace(asked.problem, needed=share * best.value), asked.time, seconds=seconds)
        if nearest is not None:
            count = asked.problem.least
            return nearest, (
                f"{count} {'layer keeps' if count == 1 else 'layers keep'} {asked.performance(best.value):.0f}% at most, less than "
                f"{100 * KEPT:g}%; chosen is the cheapest placement with {100 * share:g}% of the best coverage of {count}"
            )
    raise SelectionError(_why_not(asked, best, seconds))


def _best(asked: Question, seconds: float) -> Solution:
    """The largest coverage and, of all that reach it, the cheapest."""
    best = most_coverage(asked.problem, seconds=seconds)
    if best is None or best.value < asked.problem.needed * (1 - 1e-9):
        raise SelectionError(_why_not(asked, best, seconds))
    tolerance = min(resolution(asked.problem.depth), 1e-4)
    level = max(best.value * (1 - tolerance), asked.problem.needed)
    cheaper = least_cost(replace(asked.problem, needed=level), asked.time, seconds=min(0.5, seconds))
    if cheaper is None or cheaper.cost is None or cheaper.cost >= asked.time.of(best.layers) * (1 - 1e-9):
        return best
    highest = best.value * (1 + (best.gap or 0.0))
    return replace(cheaper, status=best.status, gap=max(0.0, highest / cheaper.value - 1), cost=None)


def _why_not(asked: Question, best: Solution | None, seconds: float) -> str:
    """Why nothing meets the budgets, with the nearest that does."""
    problem = asked.problem
    count = "" if problem.most is None else f" of {problem.most} layer{'s' if problem.most != 1 else ''}"
    limits = " and ".join(f"{option(b.name)} {amount(kind(b.name), b.limit, asked.cost)}" for b in problem.budgets)
    if best is None:
        return f"no placement{count} keeps {limits}; {_nearest(asked, replace(problem, needed=0.0), seconds) or 'allow more'}"
    wanted = f"{100 * (asked.kept or 0):g}% of the performance of all layers"
    within = f" within {limits}" if limits else ""
    ways = [f"the best keeps {asked.performance(best.value):.1f}% (layers {listed(best.layers)})"]
    if nearest := _nearest(asked, problem, seconds):
        ways.append(nearest)
    elif problem.most is not None and problem.most < problem.depth:
        free = least_cost(replace(problem, least=1, most=None), asked.time, seconds=seconds)
        if free is not None:
            ways.append(f"{len(free.layers)} layers would reach it")
    return f"no placement{count}{within} keeps {wanted}; {'; '.join(ways)}; lower --min-performance or allow more"


def _nearest(asked: Question, problem: Problem, seconds: float) -> str | None:
    """The least excess over one budget with which all the rest is met, in words."""
    found: list[tuple[float, str]] = []
    for budget in problem.budgets:
        others = tuple(other for other in problem.budgets if other is not budget)
        cheapest = least_cost(replace(problem, budgets=others), budget.form, seconds=seconds)
        if cheapest is not None and cheapest.cost is not None:
            words = f"the least {label(budget.name)} that would do is {amount(kind(budget.name), cheapest.cost, asked.cost)}"
            found.append((cheapest.cost / budget.limit, f"{words}, with layers {listed(cheapest.layers)}"))
    return min(found)[1] if found else None
