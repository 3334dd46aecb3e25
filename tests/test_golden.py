"""Commands give what the golden files say, to rounding; `golden_files.py` says how the files are written."""

from importlib.metadata import version
from pathlib import Path

import pytest

from golden_cases import CASES, SLOW
from golden_files import GOLDEN, ROOT, changes_of, differences, workplace

# Cases whose random weights other versions of torch and transformers draw differently; numbers cannot be compared there.
DRAWN_ANEW = {"cards/gpt2", "cards/qwen3_next", "cards/gemma3-vision", "adapters/gpt2", "adapters/gpt2-stock", "adapters/method-randlora"}
PINNED = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cases run, so that they share models and cards."""
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_golden(name: str, folder: Path) -> None:
    if name in DRAWN_ANEW and not {f"{each}=={version(each).partition('+')[0]}" for each in ("torch", "transformers")} <= set(PINNED):
        pytest.skip("the golden weights were drawn with the torch and transformers of constraints.txt")
    with workplace(folder):
        made = CASES[name]()
    changes = changes_of(name, made)
    assert not changes, "\n".join([f"{name} differs in {len(changes)} places (key: golden -> now):", *changes[:40]])


def test_every_golden_file_belongs_to_a_case() -> None:
    written = {str(path.relative_to(GOLDEN).with_suffix("")) for path in GOLDEN.rglob("*.json")}
    assert {name for name in written if not name.startswith("export/")} == set(CASES)


def test_differences_are_named() -> None:
    old, new = {"a": [1, 2.0], "b": {"c": "x"}, "d": 1}, {"a": [1, 2.00001], "b": {"c": "y"}, "e": None}
    assert differences(old, new, (1e-4, 0.0)) == ['b.c: "x" -> "y"', 'd: 1 -> "(absent)"', 'e: "(absent)" -> null']
