"""From run records to tables: means over seeds with intervals, share of all layers, regret, time saved.

A result is read from the records alone; nothing is trained here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from layercard.statistics.intervals import LEVEL
from layercard.trials.choices import LABELS, Choice
from layercard.trials.placements import record_of
from layercard.trials.storage import Storage
from layercard.trials.times import time_name


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


@dataclass(frozen=True)
class Measured:
    """One cell with what was measured in it.

    Attributes:
        cell: What was chosen.
        reduction: Loss reduction on test records, nats per labelled token.
        kept: The same in % of all layers with the same seed.
        accuracy: Share of labelled tokens ranked first after training, %.
        forgetting: Loss on general text after less before, nats per token.
        memory: Peak bytes of a step.
        parameters: Trainable numbers.
        learning_rate: That was used.
        time_share: Step time of stock training in % of all layers, or `None` where it was not timed.
        generated: Scores of generated answers, or `None`.
    """

    cell: Choice
    reduction: float
    kept: float
    accuracy: float
    forgetting: float
    memory: int
    parameters: int
    learning_rate: float
    time_share: float | None
    generated: dict[str, Any] | None


def measured(storage: Storage, cells: Iterable[Choice]) -> list[Measured]:
    """Read the records of finished cells."""
    cells = list(cells)
    whole = {
        (cell.task, cell.seed): record_of(storage, cell)["train_info"]["metrics"]["loss_reduction"]
        for cell in cells
        if cell.strategy == "all"
    }
    return [_measured(storage, cell, whole[cell.task, cell.seed]) for cell in cells]


def _measured(storage: Storage, cell: Choice, whole: float) -> Measured:
    record = record_of(storage, cell)
    info = record["train_info"]
    timed = time_name(cell.task, cell.layers, cell.rank)
    share = 100 * storage.read(timed, "step time")["share_of_all"] if storage.exists(timed) else None
    if cell.strategy == "all" and share is not None:
        share = 100.0  # the reference itself; a second timing of it differs by noise
    reduction = info["metrics"]["loss_reduction"]
    return Measured(
        cell=cell,
        reduction=reduction,
        kept=100 * reduction / whole,
        accuracy=100 * info["metrics"]["accuracy_after"],
        forgetting=info["forgetting"],
        memory=info["peak_memory_bytes"],
        parameters=info["num_trainable_params"],
        learning_rate=record["run_info"]["train_config"]["learning_rate"],
        time_share=share,
        generated=info.get("generated"),
    )


Row = tuple[str, int, float | None]
"""Strategy, number of layers asked for (0 where it is free), time budget."""


def row_of(one: Measured) -> Row:
    """The table row that a cell belongs to."""
    return one.cell.strategy, one.cell.k, one.cell.budget


def by_row(results: Iterable[Measured]) -> dict[Row, list[Measured]]:
    """Cells of each row, in the order in which rows first appear."""
    rows: dict[Row, list[Measured]] = defaultdict(list)
    for one in results:
        rows[row_of(one)].append(one)
    return dict(rows)


def per_task(results: Sequence[Measured], value: Callable[[Measured], float]) -> dict[str, Mean]:
    """Mean over seeds for each task."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for one in results:
        tasks[one.cell.task].append(value(one))
    return {task: Mean.of(values) for task, values in tasks.items()}


def regrets(results: Sequence[Measured]) -> dict[Row, Mean]:
    """Mean over tasks of the regret: how far, in %, a row's mean reduction lies below the best known one of as many layers.

    The best is taken over the rows' means over seeds (a maximum over single runs would reward noise), leaving out `all`, choices with
    a free number of layers and choices of another rank. The interval is over tasks and seeds.
    """
    rows = by_row(results)
    rank = min(one.cell.rank for one in results)
    best: dict[tuple[str, int, float | None], float] = {}
    for (strategy, k, budget), cells in rows.items():
        if strategy in ("all", "balanced") or cells[0].cell.rank != rank:
            continue
        for task, mean in per_task(cells, lambda one: one.reduction).items():
            best[task, k, budget] = max(best.get((task, k, budget), 0.0), mean.value)
    return {
        row: Mean.of([100 * (1 - one.reduction / best[one.cell.task, row[1], row[2]]) for one in cells])
        for row, cells in rows.items()
        if row[0] not in ("all", "balanced") and all((one.cell.task, row[1], row[2]) in best for one in cells)
    }


def label(row: Row, several: bool = False) -> str:
    """Name of a row for people; with the number of layers or the budget where the table has several."""
    strategy, k, budget = row
    name = LABELS.get(strategy, strategy)
    if budget is not None:
        return f"{name}, {budget:g} % of the time"
    return f"{name}, k = {k}" if several and strategy not in ("all", "balanced") else name


def reduction_table(results: Sequence[Measured]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of *method × task*: loss reduction, share of all layers, regret, token accuracy, forgetting."""
    rows, regret = by_row(results), regrets(results)
    tasks = list(dict.fromkeys(one.cell.task for one in results))
    several = len({(k, budget) for strategy, k, budget in rows if strategy not in ("all", "balanced")}) > 1
    columns = ["strategy", *(f"{task}: nats" for task in tasks), *(f"{task}: % kept" for task in tasks)]
    columns += ["regret %", "token accuracy %", "forgetting, nats"]
    body: list[list[Any]] = []
    for row, cells in rows.items():
        nats, kept = per_task(cells, lambda one: one.reduction), per_task(cells, lambda one: one.kept)
        body.append(
            [
                label(row, several),
                *(nats[task].text(3) if task in nats else None for task in tasks),
                *(kept[task].text(1) if task in kept else None for task in tasks),
                regret[row].text(1) if row in regret else None,
                f"{np.mean([one.accuracy for one in cells]):.1f}",
                f"{np.mean([one.forgetting for one in cells]):.3f}",
            ]
        )
    return columns, body


def trade_off_table(results: Sequence[Measured]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of *strategy × step time, speed-up %, performance drop %, ratio* over all tasks."""
    columns = ["strategy", "layers", "step time % of all", "speed-up %", "performance kept %", "predicted %", "drop %", "speed-up / drop"]
    columns += ["peak MiB"]
    body: list[list[Any]] = []
    rows = by_row(results)
    several = len({(k, budget) for strategy, k, budget in rows if strategy not in ("all", "balanced")}) > 1
    for row, cells in rows.items():
        kept = Mean.of([one.kept for one in cells])
        shares = [one.time_share for one in cells if one.time_share is not None]
        share = float(np.mean(shares)) if len(shares) == len(cells) else None
        drop = 100 - kept.value
        known = [one.cell.predicted for one in cells if one.cell.predicted is not None]
        predicted = float(np.mean(known)) if len(known) == len(cells) else None
        saved = None if share is None else 100 - share
        counts = sorted({len(one.cell.layers) for one in cells})
        body.append(
            [
                label(row, several),
                "–".join(map(str, dict.fromkeys([counts[0], counts[-1]]))),
                None if share is None else round(share, 1),
                None if saved is None else round(saved, 1),
                kept.text(1),
                None if predicted is None else round(predicted, 1),
                round(drop, 1),
                None if saved is None or drop < 0.05 else round(saved / drop, 1),
                round(float(np.mean([one.memory for one in cells])) / 2**20),
            ]
        )
    return columns, body


def summarise(storage: Storage, cells: Iterable[Choice]) -> dict[str, Any]:
    """All tables of a finished grid as one JSON value (`layercard-bench/1`)."""
    results = measured(storage, cells)
    tables = {}
    for name, make in (("reduction", reduction_table), ("trade_off", trade_off_table)):
        columns, rows = make(results)
        tables[name] = {"columns": columns, "rows": rows}
    runs = [
        {
            "task": one.cell.task,
            "strategy": one.cell.strategy,
            "k": one.cell.k,
            "budget": one.cell.budget,
            "seed": one.cell.seed,
            "layers": list(one.cell.layers),
            "rank": one.cell.rank,
            "learning_rate": one.learning_rate,
            "loss_reduction": one.reduction,
            "performance_kept": one.kept,
            "predicted_kept": one.cell.predicted,
            "step_time_share": one.time_share,
            "forgetting": one.forgetting,
            "generated": one.generated,
        }
        for one in results
    ]
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
