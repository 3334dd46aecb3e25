"""Run one target, or all, for a while, and keep every input that is not read well.

    python -m fuzzing.run jsonl card --seconds 600 --seed 1

`fuzzing.coverage` runs a target led by coverage.

A finding is an exception other than `LayercardError`, a message of several lines, over ten seconds of processor time, or more memory than
the limit. It is written to `corpus/TARGET/`, where the tests read it again.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fuzzing.targets import TARGETS, Target
from layercard.errors import LayercardError
from layercard.files import write_json

CORPUS = Path(__file__).with_name("corpus")
SLOWEST = 10
"""Seconds of processor time that one file may take."""
KEPT = 200
"""Files that are changed further, at most."""
MEMORY = 4 * 2**30
"""Bytes of address space beyond what the process has when it starts."""


class Finding(Exception):
    """A file was not read well."""


class _TooSlow(BaseException):
    """No `except Exception` on the way may hold it up."""


def check(target: Target, path: Path) -> str:
    """Read a file; `ok` or `refused`.

    Raises:
        Finding: It raises something else than a `LayercardError` of one line, or takes too long.
    """
    try:
        with _limited(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            target.read(path)
    except LayercardError as error:
        message = str(error)
        if "\n" in message or "\r" in message or len(message) > 1500:
            raise Finding(f"a message of {len(message)} characters, with line breaks: {message[:200]!r}") from error
        return "refused"
    except _TooSlow:
        raise Finding(f"over {SLOWEST} seconds") from None
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise Finding(f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:200]}") from error
    return "ok"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SLOWEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def cases(target: Target, seed: int) -> Generator[bytes, str | None]:
    """Mutated files without end: of valid ones, and of mutated ones for which `ok` is sent back, so that changes that pass pile up."""
    random, pool = Random(seed), list(target.seeds())
    first = len(pool)
    while True:
        data = target.mutate(random.choice(pool), random)
        if (yield data) == "ok" and data not in pool:
            if len(pool) >= KEPT:
                pool.pop(random.randrange(first, len(pool)))
            pool.append(data)


def fuzz(name: str, seconds: float, seed: int, corpus: Path = CORPUS) -> dict[str, Any]:
    """Run a target for so long; counts, and the findings by what they say."""
    target, ended = TARGETS[name], time.monotonic() + seconds
    counts = {"ok": 0, "refused": 0, "findings": 0}
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"case{target.suffix}"
        made = cases(target, seed)
        data = next(made)
        while time.monotonic() < ended:
            path.write_bytes(data)
            outcome = None
            try:
                outcome = check(target, path)
                counts[outcome] += 1
            except Finding as finding:
                counts["findings"] += 1
                word = str(finding).partition(": ")[0]
                if word not in found:
                    found[word] = str(finding)
                    keep(corpus / name, data, target.suffix)
                    print(f"{name}: {finding}", flush=True)
            data = made.send(outcome)
    return {"target": name, "seconds": seconds, "seed": seed, **counts, "found": found}


def keep(folder: Path, data: bytes, suffix: str) -> None:
    """Put an input among the corpus, named by its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{hashlib.sha256(data).hexdigest()[:12]}{suffix}").write_bytes(data)


def main() -> int:
    """Run what is named; 1 where there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all when none is named")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the counts, a JSON file a target")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    failed = False
    for name in names:
        result = fuzz(name, options.seconds, options.seed)
        failed = failed or bool(result["findings"])
        print(json.dumps(result), flush=True)
        if options.output:
            write_json(options.output / f"{name}.json", result, force=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
