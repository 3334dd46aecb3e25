"""From trials to tables: means over seeds with intervals, share of all layers, regret, time saved. Nothing is trained here."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from layercard.errors import BenchmarkError
from layercard.statistics.intervals import LEVEL
from layercard.trials.bench import EQUAL_PARAMETERS, UNIFORM_ABOVE, Bench, Cell
from layercard.trials.records import TrialRecord

LABELS = {
    "last": "last (bottom)",
    "first": "first (top)",
    "middle": "middle (closest to the middle)",
    "performance": "ours (performance)",
    "balanced": "ours (balanced)",
    "gradient_norm": "gradient norm (aletheia-lora)",
    "activation_norm": "activation norm (Act-LoRA)",
    "one_minus_cka": "1 - CKA",
    "snr": "signal to noise (Spectrum)",
    EQUAL_PARAMETERS: "ours (performance), parameters of all",
    UNIFORM_ABOVE: "uniform above the lowest allowed",
}
FREE = ("all", "balanced")
"""Strategies whose number of layers is not that of the row."""
Table = tuple[list[str], list[list[Any]]]
"""Columns and rows."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds (or tasks and seeds) with its 95 % t interval; the interval is `None` for a single value."""

    value: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Mean and interval of values.

        >>> Mean.of([1.0, 2.0, 3.0])
        Mean(value=2.0, half=2.48..., count=3)
        """
        count = len(values)
        if count < 2:
            return cls(float(values[0]), None, count)
        half = float(student.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / count**0.5)
        return cls(float(np.mean(values)), half, count)

    def text(self, digits: int = 3) -> str:
        """As it stands in a table.

        >>> Mean(1.25, 0.031, 3).text(2)
        '1.25 ± 0.03'
        """
        return f"{self.value:.{digits}f}" + (f" ± {self.half:.{digits}f}" if self.half is not None else "")


Result = dict[str, Any]
"""A finished cell with what was measured in it: the entries of `runs` in a summary, and `accuracy` (%) and `memory` (bytes)."""


def measured(bench: Bench, cells: Iterable[Cell]) -> list[Result]:
    """Read the records of finished cells.

    Raises:
        BenchmarkError: A trial of one of them diverged.
    """
    records = [(cell, bench.record(cell)) for cell in cells]
    of_all = {(cell.task, cell.seed): _reduction(cell, record) for cell, record in records if cell.strategy == "all"}
    results = []
    for cell, record in records:
        timed, reduction = bench.time_file(cell.task, cell.layers, cell.rank), _reduction(cell, record)
        share = 100 * bench.storage.read(timed, "step time")["share_of_all"] if bench.storage.exists(timed) else None
        results.append(
            {
                "task": cell.task,
                "strategy": cell.strategy,
                "k": cell.k,
                "budget": cell.budget,
                "seed": cell.seed,
                "layers": list(cell.layers),
                "rank": cell.rank,
                "learning_rate": record.settings["learning_rate"],
                "loss_reduction": reduction,
                "performance_kept": 100 * reduction / of_all[cell.task, cell.seed],
                "predicted_kept": cell.predicted,
                # A second timing of the reference differs by noise alone.
                "step_time_share": 100.0 if cell.strategy == "all" and share is not None else share,
                "forgetting": record.forgetting,
                "generated": record.generated,
                "accuracy": None if record.accuracy is None else 100 * record.accuracy,
                "memory": record.peak_memory_bytes,
            }
        )
    return results


def _reduction(cell: Cell, record: TrialRecord) -> float:
    if record.loss_reduction is None:
        raise BenchmarkError(f"training {cell.strategy} on {cell.task} with seed {cell.seed} diverged; lower the learning rate")
    return record.loss_reduction.value


Row = tuple[str, int, float | None]
"""Strategy, number of layers asked for (0 where it is free), time budget."""


def by_row(results: Iterable[Result]) -> dict[Row, list[Result]]:
    """Cells of each row, in the order in which rows first appear."""
    rows: dict[Row, list[Result]] = defaultdict(list)
    for result in results:
        rows[result["strategy"], result["k"], result["budget"]].append(result)
    return dict(rows)


def per_task(results: Iterable[Result], name: str) -> dict[str, Mean]:
    """Mean over seeds for each task."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for result in results:
        tasks[result["task"]].append(result[name])
    return {task: Mean.of(values) for task, values in tasks.items()}


def regrets(results: Sequence[Result]) -> dict[Row, Mean]:
    """Mean over tasks of the regret: how far, in %, a row's mean reduction lies below the best known one of as many layers.

    The best is taken over the rows' means over seeds (a maximum over single runs would reward noise), leaving out `all`, choices with
    a free number of layers and choices of another rank. The interval is over tasks and seeds.
    """
    rows = {row: cells for row, cells in by_row(results).items() if row[0] not in FREE}
    rank = min(result["rank"] for result in results)
    best: dict[tuple[str, int, float | None], float] = {}
    for (_, k, budget), cells in rows.items():
        if cells[0]["rank"] == rank:
            for task, mean in per_task(cells, "loss_reduction").items():
                best[task, k, budget] = max(best.get((task, k, budget), 0.0), mean.value)
    return {
        row: Mean.of([100 * (1 - cell["loss_reduction"] / best[cell["task"], row[1], row[2]]) for cell in cells])
        for row, cells in rows.items()
        if all((cell["task"], row[1], row[2]) in best for cell in cells)
    }


def labelled_rows(results: Sequence[Result]) -> Iterable[tuple[str, Row, list[Result]]]:
    """Rows with their names for people: with the number of layers or the budget where the table has several."""
    rows = by_row(results)
    several = len({(k, budget) for strategy, k, budget in rows if strategy not in FREE}) > 1
    for (strategy, k, budget), cells in rows.items():
        name = LABELS.get(strategy, strategy)
        if budget is not None:
            name = f"{name}, {budget:g} % of the time"
        elif several and strategy not in FREE:
            name = f"{name}, k = {k}"
        yield name, (strategy, k, budget), cells


def reduction_table(results: Sequence[Result]) -> Table:
    """*Method × task*: loss reduction, share of all layers, regret, token accuracy, forgetting."""
    regret, tasks = regrets(results), list(dict.fromkeys(result["task"] for result in results))
    columns = ["strategy", *(f"{task}: nats" for task in tasks), *(f"{task}: % kept" for task in tasks)]
    body: list[list[Any]] = []
    for name, row, cells in labelled_rows(results):
        nats, kept = per_task(cells, "loss_reduction"), per_task(cells, "performance_kept")
        line: list[Any] = [name]
        line += [nats[task].text(3) if task in nats else None for task in tasks]
        line += [kept[task].text(1) if task in kept else None for task in tasks]
        line += [regret[row].text(1) if row in regret else None]
        body.append([*line, f"{_mean(cells, 'accuracy'):.1f}", f"{_mean(cells, 'forgetting'):.3f}"])
    return [*columns, "regret %", "token accuracy %", "forgetting, nats"], body


def trade_off_table(results: Sequence[Result]) -> Table:
    """*Strategy × step time, speed-up %, performance drop %, ratio* over all tasks."""
    columns = ["strategy", "layers", "step time % of all", "speed-up %", "performance kept %", "predicted %", "drop %", "speed-up / drop"]
    body: list[list[Any]] = []
    for name, _, cells in labelled_rows(results):
        kept = Mean.of([cell["performance_kept"] for cell in cells])
        share, predicted = _mean(cells, "step_time_share"), _mean(cells, "predicted_kept")
        drop, saved = 100 - kept.value, None if share is None else 100 - share
        ratio = None if saved is None or drop < 0.05 else saved / drop
        counts = sorted(len(cell["layers"]) for cell in cells)
        layers = "–".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
        numbers = [None if value is None else round(value, 1) for value in (share, saved, predicted, drop, ratio)]
        body.append([name, layers, *numbers[:2], kept.text(1), *numbers[2:], round((_mean(cells, "memory") or 0) / 2**20)])
    return [*columns, "peak MiB"], body


def _mean(cells: Sequence[Result], name: str) -> float | None:
    """The mean over cells; `None` where one of them does not have the value."""
    values = [cell[name] for cell in cells]
    return None if None in values else float(np.mean(values))


def summarise(bench: Bench, cells: Iterable[Cell]) -> dict[str, Any]:
    """All tables of a finished grid as one JSON value (`layercard-bench/1`)."""
    results = measured(bench, cells)
    tables = {}
    for name, make in (("reduction", reduction_table), ("trade_off", trade_off_table)):
        columns, rows = make(results)
        tables[name] = {"columns": columns, "rows": rows}
    runs = [{name: value for name, value in result.items() if name not in ("accuracy", "memory")} for result in results]
    return {"schema": "layercard-bench/1", "tables": tables, "runs": runs}


def side_by_side(models: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The summaries of several models as one: a column and a key `model` more."""
    tables: dict[str, dict[str, list[Any]]] = {}
    for model, summary in models.items():
        for name, table in summary["tables"].items():
            rows = tables.setdefault(name, {"columns": ["model", *table["columns"]], "rows": []})["rows"]
            rows += [[model, *row] for row in table["rows"]]
    runs = [{"model": model, **run} for model, summary in models.items() for run in summary["runs"]]
    return {"schema": "layercard-bench/1", "tables": tables, "runs": runs}
