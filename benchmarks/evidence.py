"""The seed's own tables, the paper's figures beside those of the result files that are here; nothing is measured.

The paper is arXiv 2602.04019, as `../shared/seed/` tells it; its figures are written down below, since that folder is not part of the
repository. Ours come from `results/`: where no result file has a figure, the cell is empty. `docs/evidence.md` shows the tables.

    python benchmarks/evidence.py
"""

import argparse
import json
from typing import Any

from common import RESULTS, report

PLACEMENT = {
    "random": (2.181, 1.960, 2.574),
    "uniform": (2.335, 2.263, 2.752),
    "last (bottom)": (1.495, 1.655, 1.354),
    "middle (closest to the middle)": (2.408, 2.164, 2.856),
    "first (top)": (2.012, 1.735, 2.617),
}
"""The paper's placement table, k = 4: DART, E2E, WebNLG."""
TRADE_OFF = {"last (bottom)": ("55.0–74.7", "9.6–16.8", "3.28–7.82"), "first (top)": ("31.7–44.5", "−7.8–11.1", "2.85–8.43")}
"""The paper's trade-off of five layers on Qwen3-8B: speed-up %, drop %, ratio."""


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a result file as objects; none where it is not there."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    return [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]


def ranks(values: list[float]) -> list[int]:
    """1 for the largest."""
    return [1 + sum(other > value for other in values) for value in values]


def placement_table() -> list[list[Any]]:
    """The paper's order of placements beside ours, task by task where both have it."""
    ours = {row["strategy"]: row for row in rows_of("placements_table")}
    table = []
    of_paper = {task: ranks([PLACEMENT[name][at] for name in PLACEMENT]) for task, at in (("E2E", 1), ("WebNLG", 2))}
    means = {task: [_mean(ours.get(name, {}).get(f"{task.lower()}: nats")) for name in PLACEMENT] for task in ("E2E", "WebNLG")}
    of_ours = {task: ranks([value if value is not None else float("-inf") for value in values]) for task, values in means.items()}
    for row, (name, (dart, e2e, webnlg)) in enumerate(PLACEMENT.items()):
        mine = ours.get(name, {})
        table.append([name, dart])
        for task, value in (("E2E", e2e), ("WebNLG", webnlg)):
            measured = mine.get(f"{task.lower()}: nats")
            table[-1] += [f"{value:.3f} ({of_paper[task][row]})", f"{measured} ({of_ours[task][row]})" if measured else None]
    return table


def _mean(text: str | None) -> float | None:
    """The mean of a cell such as `1.061 ± 0.032`."""
    return None if text is None else float(text.split(" ")[0])


def trade_off_table() -> list[list[Any]]:
    """Five layers: the paper's speed-up, drop and ratio beside ours; and the speed-up of an 8B shape from its cost model."""
    ours = {row["strategy"]: row for row in rows_of("trade_off_all")}
    table = []
    for name, (speed, drop, ratio) in TRADE_OFF.items():
        mine = ours.get(name, {})
        table.append([name, speed, mine.get("speed-up %"), drop, mine.get("drop %"), ratio, mine.get("speed-up / drop")])
    return table


def other_figures() -> list[list[Any]]:
    """Single figures of the seed."""
    gpt2 = {(row["placement"], row["training"]): row for row in rows_of("train_speed_gpt2_medium")}
    stock = gpt2.get(("all", "stock"))

    def saved(placement: str, training: str) -> str | None:
        row = gpt2.get((placement, training))
        if row is None or stock is None:
            return None
        epochs = ("ms a step, first epoch", "later epochs", "later epochs")
        part, whole = (sum(each[name] for name in epochs) for each in (row, stock))
        return f"{100 * (1 - part / whole):.0f} %"

    stream = {row[""]: row["measured"] for row in rows_of("stream_8b")}
    minutes, peak = stream.get("profile, minutes"), stream.get("peak resident memory of the process, MiB")
    took = None if minutes is None else f"{minutes:g} min"
    held = None if peak is None else f"{peak * 2**20 / 1e9:.1f} GB"
    differs = "random weights in its shape, 16 records, CPU, all layers stock = 100 %"
    return [
        ["GPT-2 Medium, training time saved: middle 5, stock libraries", "34–56 %", saved("middle 5", "stock"), differs],
        ["GPT-2 Medium, training time saved: last 5, stock libraries", "34–56 %", saved("last 5", "stock"), differs],
        ["GPT-2 Medium, training time saved: last 5, fast parts", None, saved("last 5", "ours"), f"{differs}, three epochs"],
        ["Profile of an 8B model: time", "1.35 s", took, "two CPU cores, streamed from disk; no GPU"],
        ["Profile of an 8B model: memory", "4.1 GB", held, "whole process, weights streamed"],
    ]


def main() -> None:
    """Write the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    report(
        "seed_placement",
        "The paper's placement table (k = 4, models not named there) beside loss reduction in nats with five layers of SmolLM2-135M, mean "
        "over 3 seeds ± half of the 95 % t interval, 32 steps of about 280 tokens; in brackets the rank within a column",
        ["placement", "DART, paper", "E2E, paper", "E2E, here", "WebNLG, paper", "WebNLG, here"],
        placement_table(),
    )
    report(
        "seed_trade_off",
        "Five layers, the paper's on Qwen3-8B (36 layers) beside ours on SmolLM2-135M (30 layers), stock libraries, mean of E2E, "
        "WebNLG and GSM8K; drop in % of what all layers gain",
        ["placement", "speed-up %, paper", "speed-up %, here", "drop %, paper", "drop %, here", "ratio, paper", "ratio, here"],
        trade_off_table(),
    )
    report("seed_figures", "Single figures of the paper beside ours", ["figure", "paper", "here", "what differs here"], other_figures())


if __name__ == "__main__":
    main()
