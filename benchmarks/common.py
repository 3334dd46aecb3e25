"""What the benchmarks share: where the data is, what machine this is, how a result is kept."""

import json
import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


def task_file(task: str, split: str) -> str:
    """Path of a task's split; ends the program with a clear word where the data is absent."""
    path = SHARED_DATA / task / f"{split}.jsonl"
    if not path.exists():
        sys.exit(f"skipped: {path} is absent; this benchmark needs the {task} sample")
    return str(path)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = ("layercard", "torch", "transformers", "peft", "numpy")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load_result(path: Path) -> dict[str, Any] | None:
    """A finished run's JSON, or nothing."""
    return json.loads(path.read_text()) if path.exists() else None
