"""Small mutations of the mathematics, each of which some test must notice: `make mutants`.

`mutants.toml` lists them: a file of `src/layercard`, a piece of its code that stands there once, what it is replaced by, and the tests that
should fail. Each mutation is made in a copy of the package, and its tests run on that copy, so nothing here is ever changed. First all
these tests run on an unchanged copy: what fails there says nothing about a mutation.

    python tests/mutants.py                      all of them
    python tests/mutants.py residual coupling    those whose file or note holds one of these words
    python tests/mutants.py --check              only look whether each piece of code is still there once, and each test

Prints a table and writes build/mutants.json; exit status 1 where fewer than 95 % are noticed, or tests fail without a mutation.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "layercard"
WANTED = 0.95
SECONDS = 300


def mutations(words: list[str]) -> list[dict[str, Any]]:
    """The listed mutations, those that hold one of the words."""
    entries: list[dict[str, Any]] = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))["mutation"]
    return [entry for entry in entries if not words or any(word in f"{entry['file']} {entry['note']}" for word in words)]


def problem(entry: dict[str, Any]) -> str:
    """Why a mutation cannot be made, or not judged; empty where it can."""
    path = PACKAGE / entry["file"]
    if not path.is_file():
        return "no such file"
    count = path.read_text(encoding="utf-8").count(entry["old"])
    if count != 1:
        return f"its code stands there {count} times"
    for test in entry["tests"]:
        file, _, name = test.partition("::")
        if not (ROOT / file).is_file() or f"def {name}" not in (ROOT / file).read_text(encoding="utf-8"):
            return f"there is no {test}"
    return ""


def outcome(tests: list[str], entry: dict[str, Any] | None = None) -> tuple[str, str]:
    """What the tests say of a copy of the package with a mutation or none: `noticed`, `SURVIVED` or `broken`, and their first such line.

    `broken` is a mutation that cannot be imported, or a test that is not there: that is not what a test should notice.
    """
    with tempfile.TemporaryDirectory(prefix="layercard-mutant-") as folder:
        copy = Path(folder) / "layercard"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if entry is not None:
            path = copy / entry["file"]
            path.write_text(path.read_text(encoding="utf-8").replace(entry["old"], entry["new"]), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not slow", *tests]
        seconds = None if entry is None else SECONDS
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "noticed", f"no end within {SECONDS} s"
    lines = f"{done.stdout}\n{done.stderr}".splitlines()
    said = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), " ".join(lines)[-200:])
    return {0: "SURVIVED", 1: "noticed"}.get(done.returncode, "broken"), said


def main() -> int:
    """Run the mutations; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    entries = mutations(arguments.words)
    stale = [(entry, reason) for entry in entries if (reason := problem(entry))]
    for entry, reason in stale:
        print(f"stale     {entry['file']}: {entry['note']} ({reason})")
    if arguments.check or stale:
        return int(bool(stale))
    tests = sorted({test for entry in entries for test in entry["tests"]})
    unchanged, said = outcome(tests)
    if unchanged != "SURVIVED":
        print(f"these tests fail without a mutation, so they cannot judge one: {said}")
        return 1
    rows = []
    with ThreadPoolExecutor(arguments.workers) as pool:
        for entry, (result, said) in zip(entries, pool.map(lambda entry: outcome(entry["tests"], entry), entries), strict=True):
            rows.append({**entry, "result": result, "says": said})
            print(f"{result:8}  {entry['file']}: {entry['note']}", flush=True)
    count = sum(row["result"] == "noticed" for row in rows)
    print(f"{count} of {len(rows)} mutations noticed ({100 * count / max(len(rows), 1):.0f} %)")
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "mutants.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(count < WANTED * len(rows))


if __name__ == "__main__":
    sys.exit(main())
