"""What the benchmarks share: where the data is, what machine this is, how a result is kept."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from layercard.files import write_json
from tables import cell

RESULTS = Path(__file__).parent / "results"
SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


def task_file(task: str, split: str) -> str:
    """Path of a task's split; ends the program with a clear word where the data is absent."""
    path = SHARED_DATA / task / f"{split}.jsonl"
    if not path.exists():
        sys.exit(f"skipped: {path} is absent; this benchmark needs the {task} sample")
    return os.path.relpath(path)


def data_folder() -> str:
    """The folder of all tasks; ends the program with a clear word where it is absent."""
    if not SHARED_DATA.is_dir():
        sys.exit(f"skipped: {SHARED_DATA} is absent; this benchmark needs the task samples")
    return os.path.relpath(SHARED_DATA)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = ("layercard", "torch", "transformers", "peft", "numpy")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(name: str, title: str, columns: list[str], rows: list[list[Any]], **more: Any) -> None:
    """Print a table and keep it as `results/NAME.json`, the form that `tables.py` reads."""
    about = machine()
    summary = f"{about['cpu']}, {about['cores']} cores, torch {about['versions']['torch']}, {about['date'][:10]}"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    result = {
        "title": title,
        "command": command,
        "machine": summary,
        "columns": columns,
        "rows": rows,
        "details": {**more, "machine": about},
    }
    write_json(RESULTS / f"{name}.json", result, force=True)
    widths = [max(len(cell(row[at])) for row in [columns, *rows]) for at in range(len(columns))]
    print(f"\n{title}\n")
    for row in [columns, *rows]:
        print("  ".join(cell(value).ljust(width) for value, width in zip(row, widths, strict=True)))


def rounded(value: float, low: float, high: float, digits: int = 2) -> str:
    """A value with its interval, for a table cell."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
