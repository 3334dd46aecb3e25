"""Run the blocks of docs/tutorial.md, in their order, and write what they print under them.

    python docs/generate_tutorial.py            with the embedded model; some minutes

What a block prints goes between `<!-- output -->` and `<!-- /output -->` where these follow it.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).with_name("tutorial.md")
BLOCK = re.compile(r"```(?P<kind>sh|python)\n(?P<code>.*?)```\n(?:\n<!-- output -->\n.*?<!-- /output -->)?", re.DOTALL)


def run_block(kind: str, code: str, folder: Path) -> str:
    """What a block prints, stderr first; an error where it fails."""
    # `layercard` is the one of this Python.
    command = (
        [sys.executable, "-c", code]
        if kind == "python"
        else ["bash", "-ec", f'layercard() {{ "{sys.executable}" -m layercard "$@"; }}\n{code}']
    )
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{code}\n{done.stdout}{done.stderr}")
    said = done.stderr if kind == "sh" else ""  # what libraries say about themselves is left out
    return "\n".join(line.rstrip() for line in f"{said}{done.stdout}".strip().splitlines())


def run_page(text: str, folder: Path, replaced: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """Code and output of each block, run in `folder`; `replaced` puts other words into the code first."""
    found = []
    for block in BLOCK.finditer(text):
        code = block["code"]
        for old, new in (replaced or {}).items():
            code = code.replace(old, new)
        found.append((block["code"], run_block(block["kind"], code, folder)))
    return found


def filled(text: str, outputs: list[tuple[str, str]]) -> str:
    """The page with these outputs."""
    remaining = iter(outputs)

    def replace(block: re.Match[str]) -> str:
        _, output = next(remaining)
        shown = f"\n<!-- output -->\n\n```text\n{output}\n```\n\n<!-- /output -->" if "<!-- output -->" in block[0] else ""
        return f"```{block['kind']}\n{block['code']}```\n{shown}"

    return BLOCK.sub(replace, text)


def main() -> None:
    """Run and write."""
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(filled(text, run_page(text, Path(folder))), encoding="utf-8")


if __name__ == "__main__":
    main()
