"""Golden files: what the commands give for fixed inputs, to compare with after a change of the code.

`python tests/golden_files.py --write [PART...]` writes them anew, all or those whose name contains a part; `test_golden.py` compares.
Only the command line and the test helpers are used, so that modules can move. Left out: clock times, versions, measured memory.
"""

import contextlib
import html
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
IGNORED = {"versions", "phases", "started", "train_seconds", "peak_memory_bytes", "time_share", "adapter_bytes", "gap", "machine", "curve"}
IGNORED |= {"sketch", "rounded"}
"""Keys whose values depend on the clock, the machine or the versions of libraries; losses in a curve stand elsewhere, too."""
TOLERANCE = {"cards": (1e-4, 1e-7), "adapters": (1e-3, 1e-5), "cards/smollm2": (5e-3, 1e-4)}
"""Relative and absolute tolerance by name or folder. Training multiplies the rounding of a CPU's kernels (Adam divides by small gradients),
and so do 30 layers of a real model; tiny float32 cards differ by less than 1e-4 between kernels with and without AVX."""
USUAL_TOLERANCE = (1e-4, 1e-9)

ABSENT = "(absent)"
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")


def layercard(command: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command, run in this process through the function that pyproject.toml names."""
    module, function = re.findall(r'(?m)^layercard = "(.+):(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[0]
    before, status = signal.getsignal(signal.SIGTERM), 0
    arguments = mock.patch.object(sys, "argv", ["layercard", *shlex.split(command)])
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err, arguments:
        try:
            getattr(import_module(module), function)()
        except SystemExit as stop:
            status = int(stop.code or 0)
    signal.signal(signal.SIGTERM, before)
    return status, out.getvalue(), err.getvalue()


def succeed(command: str) -> str:
    """Stdout of a command that must end well."""
    status, out, err = layercard(command)
    assert status == 0, f"layercard {command}: {err}"
    return out


def as_json(command: str) -> Any:
    return json.loads(succeed(f"{command} --json"))


def lines(text: str) -> list[str]:
    """The lines of a text, with the folder of this clone left out of paths."""
    return [line.rstrip() for line in text.replace(f"{ROOT}/", "").splitlines()]


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[None]:
    """The folder in which commands run, with a fixed width and without a network; paths in results are relative to it."""
    environment = {"COLUMNS": "150", "HF_HUB_OFFLINE": "1", "LAYERCARD_CARDS": str(folder / "kept-cards")}
    torch.set_num_threads(1)
    with contextlib.chdir(folder), mock.patch.dict(os.environ, environment), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rounded(value: Any) -> Any:
    """The value with floats of 7 significant digits and without what depends on clock and machine."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items() if key not in IGNORED}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def differences(old: Any, new: Any, tolerance: tuple[float, float], where: str = "") -> list[str]:
    """Each value that differs, as `key: old -> new`; numbers within texts are compared to rounding too."""
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(old.get(key, ABSENT), new.get(key, ABSENT), f"{where}.{key}".lstrip(".")) for key in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list):
        pairs = [(*pair, f"{where}[{index}]") for index, pair in enumerate(zip_longest(old, new, fillvalue=ABSENT))]
    elif not same(old, new, *tolerance):
        return [f"{where}: {' -> '.join(json.dumps(value, ensure_ascii=False)[:300] for value in (old, new))}"]
    return [line for before, after, name in pairs for line in differences(before, after, tolerance, name)]


def same(old: Any, new: Any, relative: float, absolute: float) -> bool:
    if isinstance(old, str) and isinstance(new, str) and DECIMAL.sub("#", old) == DECIMAL.sub("#", new):
        numbers = [map(float, DECIMAL.findall(text)) for text in (old, new)]
        return all(math.isclose(*pair, rel_tol=relative, abs_tol=absolute) for pair in zip(*numbers, strict=True))
    if float in (type(old), type(new)) and {type(old), type(new)} <= {int, float}:
        return math.isclose(old, new, rel_tol=relative, abs_tol=absolute)
    return type(old) is type(new) and bool(old == new)


def compact(value: Any) -> str:
    """The value as JSON, indented by 1, with innermost lists and objects on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"[\[{][^\[\]{}]{1,180}[\]}]", lambda match: re.sub(r"\n *", " ", match[0]), text)


def changes_of(name: str, made: Any) -> list[str]:
    """How what was made differs from the golden file of this name."""
    path = GOLDEN / f"{name}.json"
    tolerance = TOLERANCE.get(name) or TOLERANCE.get(name.split("/")[0], USUAL_TOLERANCE)
    return differences(json.loads(path.read_text(encoding="utf-8")), rounded(made), tolerance)


def read_page(path: Path) -> dict[str, Any]:
    """The numbers and words of a report page: headlines, the rows of each table, notes. The layout may change, these may not."""
    page = re.sub(r"(?s)<(script|style|svg)\b.*?</\1>", "", path.read_text(encoding="utf-8"))

    def texts(pattern: str, part: str) -> list[str]:
        pieces = (re.split(r"<[^>]*>", match[1]) for match in re.finditer(pattern, part, re.DOTALL))
        return [" | ".join(" ".join(html.unescape(piece).split()) for piece in row if piece.strip()) for row in pieces]

    tables: dict[str, list[str]] = {}
    for table in re.findall(r"(?s)<table.*?</table>", page):
        tables.setdefault(" ".join(texts("<caption>(.*?)</caption>", table)), []).extend(texts(r"<tr\b[^>]*>(.*?)</tr>", table))
    return {"headlines": texts('<div class="tile">(.*?)</div>', page), "tables": tables, "notes": texts(r"<(?:dt|dd)>(.*?)</d[td]>", page)}


def write(parts: list[str]) -> None:
    """Write the golden files whose name contains one of `parts`, or all."""
    from golden_cases import CASES

    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in CASES if not parts or any(part in name for part in parts)]:
            with workplace(Path(folder)):
                made = CASES[name]()
            path = GOLDEN / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(compact(rounded(made)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit("usage: python tests/golden_files.py --write [PART...]; to compare: pytest tests/test_golden.py")
    write(sys.argv[2:])
