"""Write the way from a model to a deployed adapter into docs/index.md, or check with `--check` that it stands there."""

import sys
from pathlib import Path

PAGE = Path(__file__).with_name("index.md")
START, END = "<!-- roadmap -->", "<!-- /roadmap -->"


def page() -> str:
    """The page with the part between the marks made anew."""
    from layercard.report.roadmap import roadmap_markdown

    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{roadmap_markdown()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` give 1 if it differs."""
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write("docs/index.md differs from the roadmap; run make cli-docs\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
