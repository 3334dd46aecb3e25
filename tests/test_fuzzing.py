"""Files that once were read badly, and a few hundred fresh mutations: everything ends well or in one line."""

from pathlib import Path

import pytest

from fuzzing.run import CORPUS, cases, check
from fuzzing.targets import TARGETS

KEPT = sorted(path for path in CORPUS.rglob("*") if path.is_file())
FRESH = {"gguf": 6, "config": 20, "report": 12, "safetensors": 25}
"""Mutations of the slower targets."""


def skip_without(name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_mended_stays_mended(kept: Path, tmp_path: Path) -> None:
    target = TARGETS[kept.parent.name]
    skip_without(kept.parent.name)
    case = tmp_path / f"case{target.suffix}"
    case.write_bytes(kept.read_bytes())
    assert check(target, case) in ("ok", "refused")


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_end_well_or_in_one_line(name: str, tmp_path: Path) -> None:
    skip_without(name)
    target, outcomes = TARGETS[name], set()
    case = tmp_path / f"case{target.suffix}"
    for at, data in enumerate(cases(target, seed=2026)):
        if at == FRESH.get(name, 60):
            break
        case.write_bytes(data)
        outcomes.add(check(target, case))
    assert outcomes


@pytest.mark.parametrize("name", TARGETS)
def test_the_files_to_start_from_are_valid(name: str, tmp_path: Path) -> None:
    skip_without(name)
    target = TARGETS[name]
    for at, data in enumerate(target.seeds()):
        case = tmp_path / f"seed-{at}{target.suffix}"
        case.write_bytes(data)
        if name in ("card", "placement", "jsonl", "csv", "parquet", "cost", "figures", "config", "safetensors", "shard", "gguf"):
            assert check(target, case) == "ok"
