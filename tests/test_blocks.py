"""Every block of the README and the tutorial runs as it stands; quickly with a tiny model in place of the embedded one."""

import re
import shlex
from pathlib import Path

import pytest

from generate_tutorial import BLOCK, run_page
from layercard.commands.main import run
from tiny import tiny_records, write_records

ROOT = Path(__file__).resolve().parents[1]
README, TUTORIAL, INDEX = (ROOT / name for name in ("README.md", "docs/tutorial.md", "docs/index.md"))
INSTALL = "pip install"
SMALLER = {"--records 800": "--records 48", "records=800": "records=48", "--steps 60": "--steps 6"}
"""What makes a block quick with a tiny model."""
LEARNT = "Sorry about the clock: the postage comes back to you. (Ulm, clock)"


def blocks(page: Path) -> list[tuple[str, str]]:
    """Kind and code of each block that is to be run."""
    found = [(block["kind"], block["code"]) for block in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [(kind, code) for kind, code in found if INSTALL not in code]


def test_pages_have_no_blocks_of_other_kinds() -> None:
    """Else one could be there that no test runs."""
    for page in (README, TUTORIAL):
        assert set(re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)) <= {"sh", "python", "text"}, page.name


def test_the_first_command_is_the_same_everywhere() -> None:
    first = blocks(README)[0][1]
    assert f"```sh\n{first}```" in INDEX.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [README, TUTORIAL], ids=lambda page: page.stem)
def test_blocks_run_with_a_tiny_model(page: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "mine.jsonl", tiny_records(48))
    ran = 0
    for kind, code in blocks(page):
        for old, new in {"smollm2-135m": str(tiny_folder), **SMALLER}.items():
            code = code.replace(old, new)
        if kind == "python":
            exec(compile(code, page.name, "exec"), {})
            ran += 1
        for line in code.splitlines() if kind == "sh" else ():
            if not (words := shlex.split(line, comments=True)):
                continue
            name, *words = words
            assert name == "layercard", line
            assert run(words) == 0, line
            ran += 1
    assert ran >= 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    """And what it shows is what comes out, but for numbers: the same lines begin with the same words."""
    text = TUTORIAL.read_text(encoding="utf-8")
    outputs = run_page(text, tmp_path)
    assert outputs[-1][1].endswith(LEARNT)
    for code, output in outputs:
        shown = re.search(re.escape(code) + r"```\n\n<!-- output -->\n\n```text\n(.*?)```", text, re.DOTALL)
        if shown is not None and code.startswith("layercard"):
            labels = [set(re.findall(r"^[A-Z]\w+(?=  )", part, re.MULTILINE)) for part in (shown[1], output)]
            assert labels[0] == labels[1], code


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    """The two blocks with data of their own, each of which says that it ends within ten minutes."""
    text = README.read_text(encoding="utf-8")
    write_records(tmp_path / "mine.jsonl", tiny_records(48))
    for _, output in run_page(re.sub(rf"```sh\n{INSTALL}.*?```\n", "", text), tmp_path, {"--max-time 1h": "--max-time 5m"}):
        assert output
