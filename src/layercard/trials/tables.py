"""From trials to tables: means over seeds with intervals, share of all layers, regret, time saved. Nothing is trained here."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from layercard.statistics.intervals import LEVEL
from layercard.trials.bench import EQUAL_PARAMETERS, UNIFORM_ABOVE, Bench, Cell

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
        learning_rate: That was used.
        time_share: Step time of stock training in % of all layers, or `None` where it was not timed.
        generated: Scores of generated answers, or `None`.
    """

    cell: Cell
    reduction: float
    kept: float
    accuracy: float
    forgetting: float
    memory: int
    learning_rate: float
    time_share: float | None
    generated: dict[str, Any] | None


def measured(bench: Bench, cells: Iterable[Cell]) -> list[Measured]:
    """Read the records of finished cells."""
    records = [(cell, bench.record(cell)) for cell in cells]
    reductions = [record["train_info"]["metrics"]["loss_reduction"] for _, record in records]
    of_all = {(cell.task, cell.seed): value for (cell, _), value in zip(records, reductions, strict=True) if cell.strategy == "all"}
    results = []
    for (cell, record), reduction in zip(records, reductions, strict=True):
        info, timed = record["train_info"], bench.time_file(cell.task, cell.layers, cell.rank)
        share = 100 * bench.storage.read(timed, "step time")["share_of_all"] if bench.storage.exists(timed) else None
        results.append(
            Measured(
                cell=cell,
                reduction=reduction,
                kept=100 * reduction / of_all[cell.task, cell.seed],
                accuracy=100 * info["metrics"]["accuracy_after"],
                forgetting=info["forgetting"],
                memory=info["peak_memory_bytes"],
                learning_rate=record["run_info"]["train_config"]["learning_rate"],
                time_share=100.0 if cell.strategy == "all" and share is not None else share,  # a second timing of the reference is noise
                generated=info.get("generated"),
            )
        )
    return results


Row = tuple[str, int, float | None]
"""Strategy, number of layers asked for (0 where it is free), time budget."""


def by_row(results: Iterable[Measured]) -> dict[Row, list[Measured]]:
    """Cells of each row, in the order in which rows first appear."""
    rows: dict[Row, list[Measured]] = defaultdict(list)
    for one in results:
        rows[one.cell.strategy, one.cell.k, one.cell.budget].append(one)
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
    rows = {row: cells for row, cells in by_row(results).items() if row[0] not in FREE}
    rank = min(one.cell.rank for one in results)
    best: dict[tuple[str, int, float | None], float] = {}
    for (_, k, budget), cells in rows.items():
        if cells[0].cell.rank == rank:
            for task, mean in per_task(cells, lambda one: one.reduction).items():
                best[task, k, budget] = max(best.get((task, k, budget), 0.0), mean.value)
    return {
        row: Mean.of([100 * (1 - one.reduction / best[one.cell.task, row[1], row[2]]) for one in cells])
        for row, cells in rows.items()
        if all((one.cell.task, row[1], row[2]) in best for one in cells)
    }


def labelled_rows(results: Sequence[Measured]) -> Iterable[tuple[str, Row, list[Measured]]]:
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


def reduction_table(results: Sequence[Measured]) -> Table:
    """*Method × task*: loss reduction, share of all layers, regret, token accuracy, forgetting."""
    regret, tasks = regrets(results), list(dict.fromkeys(one.cell.task for one in results))
    columns = ["strategy", *(f"{task}: nats" for task in tasks), *(f"{task}: % kept" for task in tasks)]
    columns += ["regret %", "token accuracy %", "forgetting, nats"]
    body: list[list[Any]] = []
    for name, row, cells in labelled_rows(results):
        nats, kept = per_task(cells, lambda one: one.reduction), per_task(cells, lambda one: one.kept)
        line: list[Any] = [name]
        line += [nats[task].text(3) if task in nats else None for task in tasks]
        line += [kept[task].text(1) if task in kept else None for task in tasks]
        line += [regret[row].text(1) if row in regret else None]
        line += [f"{np.mean([one.accuracy for one in cells]):.1f}", f"{np.mean([one.forgetting for one in cells]):.3f}"]
        body.append(line)
    return columns, body


def trade_off_table(results: Sequence[Measured]) -> Table:
    """*Strategy × step time, speed-up %, performance drop %, ratio* over all tasks."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    columns = ["strategy", "layers", "step time % of all", "speed-up %", "performance kept %", "predicted %", "drop %", "speed-up / drop"]
    body: list[list[Any]] = []
    for name, _, cells in labelled_rows(results):
        kept, share, predicted = (
            Mean.of([one.kept for one in cells]),
            mean([one.time_share for one in cells]),
            mean([one.cell.predicted for one in cells]),
        )
        drop, saved = 100 - kept.value, None if share is None else 100 - share
        counts = sorted(len(one.cell.layers) for one in cells)
        line: list[Any] = [name, "–".join(map(str, dict.fromkeys([counts[0], counts[-1]])))]
        line += [None if share is None else round(share, 1), None if saved is None else round(saved, 1), kept.text(1)]
        line += [None if predicted is None else round(predicted, 1), round(drop, 1)]
        line += [None if saved is None or drop < 0.05 else round(saved / drop, 1)]
        body.append([*line, round(float(np.mean([one.memory for one in cells])) / 2**20)])
    return [*columns, "peak MiB"], body


def summarise(bench: Bench, cells: Iterable[Cell]) -> dict[str, Any]:
    """All tables of a finished grid as one JSON value (`layercard-bench/1`)."""
    results = measured(bench, cells)
    tables = {}
    for name, make in (("reduction", reduction_table), ("trade_off", trade_off_table)):
        columns, rows = make(results)
        tables[name] = {"columns": columns, "rows": rows}
    runs = [
        {
            **{name: getattr(one.cell, name) for name in ("task", "strategy", "k", "budget", "seed")},
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
