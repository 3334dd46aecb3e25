"""Write the table of docs/architectures.md from what the tests establish, or check with `--check` that it is what they say."""

import json
import sys
from pathlib import Path

from pages import between, write_or_check

PAGE = Path(__file__).with_name("architectures.md")
ESTABLISHED = Path(__file__).parents[1] / "tests" / "architectures" / "capabilities.json"
SIGNS = {"yes": "✓", "none": "–"}
START, END = "<!-- architectures -->", "<!-- /architectures -->"


def table() -> str:
    """Families × capabilities; what steps aside has a number, and its reason stands below."""
    families = json.loads(ESTABLISHED.read_text(encoding="utf-8"))
    capabilities = [name for name in next(iter(families.values())) if name != "about"]
    reasons: list[str] = []
    lines = [f"| family | {' | '.join(capabilities)} |", f"| --- |{' :-: |' * len(capabilities)}"]
    for family, row in families.items():
        cells = [_cell(row[name], reasons) for name in capabilities]
        about = f": {row['about']}" if row["about"] else ""
        lines.append(f"| {family}{about} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes])


def _cell(found: str, reasons: list[str]) -> str:
    if found in SIGNS:
        return SIGNS[found]
    if found not in reasons:
        reasons.append(found)
    return f"({reasons.index(found) + 1})"


def page() -> str:
    """The page with its table made anew."""
    return between(PAGE, START, END, table())


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` give 1 if it differs."""
    return write_or_check(PAGE, page(), arguments, "run docs/generate_architectures.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
