"""Broken files for every reader: how many were read, how many refused, and what was found (`tests/fuzzing/`).

Each target is run for `--seconds` where it has no file in `results/fuzz/` yet; those led by coverage need the extra `fuzz`, and are only
shown where they were run:

    cd tests && python -m fuzzing.coverage merge --seconds 600 --output ../benchmarks/results/fuzz
    python benchmarks/fuzz.py
"""

import argparse
import subprocess
import sys
from pathlib import Path

from common import RESULTS, report
from layercard.errors import BenchmarkError
from layercard.files import read_json

FOLDER = RESULTS / "fuzz"
TESTS = Path(__file__).resolve().parents[1] / "tests"
TARGETS = (
    "card", "placement", "cost", "figures", "jsonl", "csv", "parquet", "config", "trainer", "merge", "gguf", "safetensors", "shard",
    "report",
)  # fmt: skip


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    options = parser.parse_args()
    missing = [name for name in TARGETS if not (FOLDER / f"{name}.json").exists()]
    if missing:
        command = [sys.executable, "-m", "fuzzing.run", *missing, "--seconds", str(options.seconds), "--output", str(FOLDER)]
        subprocess.run(command, cwd=TESTS, check=False)
    rows: list[list[object]] = []
    for name in TARGETS:
        for engine, stem in (("mutations", name), ("coverage", f"{name}-coverage")):
            if (FOLDER / f"{stem}.json").exists():
                run = read_json(FOLDER / f"{stem}.json", BenchmarkError, "result")
                rows.append([name, engine, round(run["seconds"]), run["ok"], run["refused"], run["findings"]])
    report("fuzz", "Broken files, by target", ["target", "changes", "seconds", "read", "refused in one line", "findings"], rows)


if __name__ == "__main__":
    main()
