"""The house: imports go one way, hooks are installed in one file, and the command line starts without anything heavy."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "layercard"
MODULES = sorted(path for path in SOURCE.rglob("*.py"))

# From the bottom up: a module may import from its own row and from rows above it in this list, never from below.
ROWS = (
    ("errors", "files", "indices", "processes", "readings", "notebook", "phases"),
    (
        "layers",
        "data",
        "encoding",
        "records",
        "hub",
        "synthetic_domains",
        "synthetic_words",
        "synthetic",
        "embedded",
        "gguf_header",
        "conversion",
        "loading",
        "models",
        "settings",
        "memory",
        "saved",
        "state",
    ),
    ("experts", "capture"),
    ("statistics",),
    ("soundness", "probe", "fit_sums", "signals", "held_out", "cost", "halving", "rates", "stamps", "adapter_timing", "timing", "meta"),
    ("card",),
    ("cautions", "assembly", "profiling", "stream", "workload", "api"),
    ("selection",),
    ("transfer",),
    ("fast",),
    ("pinning", "inspection", "adapter_files", "differences", "skeleton", "adapters", "verification", "methods", "adalora", "beginnings"),
    ("metrics", "evaluation", "trainer", "training", "compare", "switching", "shared_cache", "serving"),
    ("latency", "benchmark", "export"),
    ("report",),
    ("plots", "hub_cards", "reuse"),
    ("commands",),
    ("cli",),
)
# Methods that only hand their object on: `card.select(k=5)` and `placement.to_peft(r=16)` import what they call when they are called.
HANDED_ON = {"card.py": {"layercard.selection"}, "selection/placement.py": {"layercard.export.peft"}}
ROW_OF = {name: at for at, row in enumerate(ROWS) for name in row}


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def room(module: str) -> str:
    """The file or folder directly below the package that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    here = room_of(path)
    if here == "__init__":
        return
    assert here in ROW_OF, f"{path.name} has no place in ROWS: say where it belongs"
    handed_on = HANDED_ON.get(path.relative_to(SOURCE).as_posix(), set())
    for module in imported(path):
        if module.startswith("layercard.") and module not in handed_on:
            assert ROW_OF[room(module)] <= ROW_OF[here], f"{here} imports {module}, which lies above it"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("statistics", ("transformers", "peft", "layercard.models", "layercard.data")),
        ("selection", ("transformers", "peft", "layercard.models", "layercard.training")),
        ("report", ("torch", "transformers", "peft", "layercard.models", "layercard.training", "layercard.profiling", "layercard.capture")),
    ],
)
def test_rooms_that_know_little(folder: str, forbidden: tuple[str, ...]) -> None:
    for path in (SOURCE / folder).rglob("*.py"):
        for module in imported(path):
            wrong = [name for name in forbidden if module == name or module.startswith(f"{name}.")]
            assert not wrong, f"{path.relative_to(SOURCE)} imports {module}"


def test_hooks_are_installed_in_one_file() -> None:
    hooks = re.compile(r"\.register_\w*hook\w*\(")
    found = {path.relative_to(SOURCE).as_posix() for path in MODULES if hooks.search(path.read_text(encoding="utf-8"))}
    assert found <= {"capture.py"}


@pytest.mark.parametrize("module", ["layercard", "layercard.cli", "layercard.settings", "layercard.processes"])
def test_imports_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "peft", "numpy", "pandas", "plotly", "scipy", "pydantic")
    script = f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_library_is_silent() -> None:
    talks = re.compile(r"(?<![\w.])print\(")
    found = [path.name for path in MODULES if talks.search(re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL))]
    assert found == []


def test_public_names_come_when_they_are_used() -> None:
    import layercard

    assert {name: getattr(layercard, name).__name__ for name in layercard.__all__} == {name: name for name in layercard.__all__}
    assert set(layercard.__all__) <= set(dir(layercard))
    with pytest.raises(AttributeError, match="no attribute 'Card'"):
        _ = layercard.Card
