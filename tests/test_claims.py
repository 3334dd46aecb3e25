"""Every sentence that claims something, with a number or a comparison, names the result file that it comes from.

Read are README.md, docs/index.md and the help texts. A claim is a sentence with a measured number (`2.5 times`, `97 %`) or a word that
compares (`faster`, `better`). It is fine where its paragraph links to a file of `benchmarks/results/` that holds its numbers, or to a
section of the docs with a table from such a file. What is neither stands in `NOT_MEASURED`, with the reason why it needs no file.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"(?<![\w.@/-])\d[\d,.]*\d|(?<![\w.@/-])\d")
CLAIM = re.compile(
    r"\d[\d.,]*\s*(?:times\b|%|points\b|s\b|seconds\b|minutes\b|hours\b|h\b|GB\b|MB\b|MiB\b|GiB\b)"
    r"|\b(?:two|three|four|five|six|seven|eight|nine|ten|twenty|half) (?:times|minutes|hours|points|per cent)\b"
    r"|\b(?:faster|slower|quicker|better|worse|cheaper|dearer|smaller than|less memory|less time|as good|best|largest)\b"
    r"|\b(?:beats?|wins?|outperforms?)\b",
    re.IGNORECASE,
)
NOT_MEASURED = {
    "README.md": {
        "layercard fine-tunes a language model": "what the program is",
        "Two CPU cores are enough, in at most ten minutes": "the limit that the command is given",
        "`run` lets them take part": "what the program does",
        "**Faster serving with vLLM.**": "a heading; how vLLM is made",
        "More models, tasks and baselines": "where to read on",
        "[Documentation]": "links",
    },
    "docs/index.md": {
        "layercard fine-tunes a language model": "what the program is",
    },
}
"""Sentences that compare or count without a measurement: how they begin, and why."""


def sentences(text: str) -> list[tuple[str, str]]:
    """Each sentence with the paragraph that it stands in; blocks of code, tables and marks are left out."""
    text = re.sub(
        r"```.*?```|<!-- table:.*?<!-- /table -->|<!--.*?-->|<picture>.*?</picture>|!\[[^]]*\]\([^)]*\)", "", text, flags=re.DOTALL
    )
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", text):
        lines = [line for line in paragraph.splitlines() if not line.lstrip().startswith(("|", "#"))]
        words = " ".join(" ".join(lines).removeprefix("- ").split())
        found += [(sentence, words) for sentence in re.split(r"(?<=[.:?!*])\s+(?=[A-Z`*\[])", words) if sentence]
    return found


def values(value: Any) -> list[str]:
    """All numbers of a result file, as tables show them."""
    from test_docs import script

    cell = script(ROOT / "benchmarks" / "tables.py").cell
    if isinstance(value, dict):
        return [text for each in value.values() for text in values(each)]
    if isinstance(value, list):
        return [text for each in value for text in values(each)]
    return [] if isinstance(value, bool) or value is None else NUMBER.findall(cell(value))


def comes_from_a_file(sentence: str, paragraph: str, page: Path) -> bool:
    """Whether the paragraph links to a result file with the sentence's numbers, or to a section with a table of results."""
    for target in re.findall(r"\]\(([^)]+)\)", paragraph):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve()
        if file.suffix == ".json" and file.is_relative_to(ROOT / "benchmarks" / "results"):
            known = values(json.loads(file.read_text(encoding="utf-8")))
            if all(close(number, known) for number in NUMBER.findall(re.sub(r"\[[^]]*\]\([^)]*\)", "", sentence))):
                return True
        if file.suffix == ".md" and anchor:
            for heading, body in re.findall(r"^##+ (.*?)\n(.*?)(?=^##+ |\Z)", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
                slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                if slug == anchor and "<!-- table:" in body:
                    return True
    return False


def close(number: str, known: list[str]) -> bool:
    """Whether a number stands in a file, exactly or rounded to fewer places."""
    wanted, places = float(number.replace(",", "")), len(number.partition(".")[2])
    numbers = [each.replace(",", "") for each in known]
    return any(round(float(each), places) == wanted for each in numbers if each.count(".") < 2)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_claims_come_from_result_files(name: str) -> None:
    page = ROOT / name
    known, used, open_claims = NOT_MEASURED[name], set(), []
    for sentence, paragraph in sentences(page.read_text(encoding="utf-8")):
        if CLAIM.search(sentence) is None:
            continue
        reason = next((start for start in known if sentence.startswith(start)), None)
        if comes_from_a_file(sentence, paragraph, page):
            continue
        if reason is None:
            open_claims.append(sentence)
        else:
            used.add(reason)
    assert open_claims == []
    assert used == set(known), "sentences that are no longer there, or no longer claims"


def test_help_texts_claim_no_measured_number() -> None:
    """Help says what a command does; what that gains stands in the docs, beside its table."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r".*\b\d[\d.]* (?:times|%) (?:faster|less|more|better|cheaper|of the gain).*", text) == []
