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

# From the bottom up, the root first: a module imports from its own folder and from those above it in this list, never from below.
FOLDERS = (
    "",
    "statistics",
    "data",
    "models",
    "cost",
    "card",
    "selection",
    "adapters",
    "fast",
    "profiling",
    "training",
    "trials",
    "serving",
    "export",
    "report",
    "workflow",
    "commands",
)
ROOT_MODULES = {path.stem for path in SOURCE.glob("*.py")}


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def folder_of(module: str) -> str:
    """The folder below the package that a module lies in; "" for the root."""
    name = [*module.split("."), ""][1]
    return "" if name in ROOT_MODULES else name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(SOURCE).parts
    if parts in {("__init__.py",), ("__main__.py",)}:
        return
    folder = parts[0] if len(parts) > 1 else ""
    for module in imported(path):
        if module.startswith("layercard."):
            assert FOLDERS.index(folder_of(module)) <= FOLDERS.index(folder), f"{path.name} imports {module}, which lies above it"


def test_the_root_is_small() -> None:
    assert len(ROOT_MODULES) <= 10


STAGES = {"profile": ("profiling",), "select": ("selection",), "train": ("training", "adapters")}


def reached(path: Path) -> set[Path]:
    """The modules that a module imports, directly or through others, itself included."""
    paths, left = set(), [path]
    while left:
        here = left.pop()
        if here in paths:
            continue
        paths.add(here)
        for node in ast.walk(ast.parse(here.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layercard"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = [SOURCE.parent / f"{name.replace('.', '/')}.py" for name in names if name]
                left += [file for file in files if file.is_file()]
    return paths


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_handful_of_files(stage: str) -> None:
    """CONTRIBUTING.md lists the files to open for a stage: its command, and what that reaches in the stage's folders."""
    files = {path.relative_to(SOURCE) for path in reached(SOURCE / "commands" / f"{stage}.py")}
    own = {str(path) for path in files if path.parts[0] in STAGES[stage] and path.stem != "__init__"} | {f"commands/{stage}.py"}
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.search(rf"- {stage}: ((?:`[\w/.]+`\s*)+)", text)
    assert listed is not None
    assert set(re.findall(r"`([\w/.]+)`", listed[1])) == own
    assert len(own) <= 10


def test_no_module_imports_itself_through_others() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layercard."):
                target = SOURCE.parent / f"{(node.module or '').replace('.', '/')}.py"
                assert not target.is_file() or path not in reached(target), f"{path} and {target} import each other"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("statistics", ("transformers", "peft", "layercard.models.load", "layercard.data.load")),
        ("selection", ("transformers", "peft", "layercard.models.load", "layercard.training.train")),
        (
            "report",
            (
                "torch",
                "transformers",
                "peft",
                "layercard.models.load",
                "layercard.training.train",
                "layercard.profiling.profile",
                "layercard.models.hooks",
            ),
        ),
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
    assert found <= {"models/hooks.py"}


@pytest.mark.parametrize("module", ["layercard", "layercard.commands.main", "layercard.settings", "layercard.processes"])
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
