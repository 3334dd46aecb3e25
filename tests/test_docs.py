"""The pages say what the program does: help texts, tables, links and error classes."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def script(path: Path) -> ModuleType:
    """A script of the repository, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line_page_is_the_help() -> None:
    generator = script(ROOT / "docs" / "generate_cli.py")
    assert generator.PAGE.read_text(encoding="utf-8") == generator.command_line_page(), "run make cli-docs"


def test_tables_are_up_to_date() -> None:
    assert script(ROOT / "benchmarks" / "tables.py").main(["--check"]) == 0, "run make bench-tables"


def test_tables_are_filled_in_and_checked(tmp_path: Path) -> None:
    tables = script(ROOT / "benchmarks" / "tables.py")
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table:kept -->\n<!-- /table -->\nafter\n", encoding="utf-8")
    result = {
        "title": "Kept",
        "command": "run",
        "machine": "2 cores",
        "columns": ["placement", "kept"],
        "rows": [["all", 1.0], ["a|b", None]],
    }
    (tmp_path / "benchmarks" / "results" / "kept.json").write_text(json.dumps(result), encoding="utf-8")
    assert tables.main(["--check"], tmp_path) == 1
    assert tables.main([], tmp_path) == 0
    text = page.read_text(encoding="utf-8")
    assert "| placement | kept |\n| --- | ---: |\n| all | 1 |\n| a\\|b | – |" in text
    assert "Kept. Made with `run` on 2 cores." in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert tables.main(["--check"], tmp_path) == 0
    page.write_text("<!-- table:missing -->\n<!-- /table -->\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        tables.main([], tmp_path)


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_that_pages_and_docstrings_name_is_there() -> None:
    """Names with a capital word or a brace in them are examples; what `make` or a benchmark writes elsewhere is not named like this."""
    named = re.compile(r"(?<![\w/.{-])(?:\.\./)?((?:benchmarks|docs|examples|src|tests|shared)/[\w./-]*\w)(?![\w*{])")
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    sources = [path for folder in ("src", "benchmarks", "docs", "examples") for path in (ROOT / folder).rglob("*.py")]
    missing = []
    for page in (*pages, *sources):
        for name in named.findall(page.read_text(encoding="utf-8")):
            example = re.search(r"[A-Z]{2,}", name) is not None or name.startswith("shared/")
            if not example and not (ROOT / name).exists():
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert missing == []


def test_every_kind_of_fault_has_its_tests() -> None:
    rows = [line for line in (ROOT / "tests" / "faults" / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) >= 20
    for row in rows[2:]:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"there is no {name} in {file}"


def test_every_measure_is_explained() -> None:
    from layercard.report.words import MEASURES

    text = (ROOT / "docs" / "card.md").read_text(encoding="utf-8")
    assert [key for key in MEASURES if f"`{key}`" not in text] == []


def test_constraints_pin_every_dependency_and_name_no_address() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    pinned = {line.partition("==")[0] for line in lines}
    wanted = re.findall(r'"([a-zA-Z0-9-]+)[>=]=', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {name.lower() for name in wanted} - {"setuptools"} <= pinned


def test_the_lowest_versions_promised_are_those_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = project["dependencies"] + [each for extra in ("app", "dev", "ray") for each in project["optional-dependencies"][extra]]
    lowest = dict(each.split(">=") for each in promised if not each.startswith(("mypy", "ruff")))
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in tested.items()} == {name: Version(version) for name, version in lowest.items()}
