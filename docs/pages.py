"""What the generators of pages share: a page is written, or checked to be what it would be written as."""

import sys
from pathlib import Path


def between(page: Path, start: str, end: str, text: str) -> str:
    """The text of a page with what stands between two marks made anew."""
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    return f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"


def write_or_check(page: Path, text: str, arguments: list[str], mend: str) -> int:
    """Write a page, or with `--check` among the arguments give 1 if it differs and say how that is mended."""
    if "--check" not in arguments:
        page.write_text(text, encoding="utf-8")
        return 0
    if page.exists() and page.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"docs/{page.name} differs from what it is made from; {mend}\n")
    return 1
