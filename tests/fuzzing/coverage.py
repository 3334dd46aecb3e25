"""Run one target led by coverage: what reaches new lines of layercard is kept and changed further (atheris, libFuzzer).

    python -m fuzzing.coverage merge --seconds 600           needs the extra `fuzz`

The changes are those of `mutations.py`, libFuzzer's own now and then. A finding ends the run; the input is kept in `corpus/TARGET/`, where
the tests read it again.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["layercard"]):
    from fuzzing.run import CORPUS, Finding, check, keep
    from fuzzing.targets import TARGETS
    from layercard.files import write_json

OWN = 0.8
"""Share of the changes that are ours."""
EVERY = 5.0
"""Seconds after which the counts are written again."""


def main() -> None:
    """Run until a finding or the end of the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for the counts, a JSON file a target")
    options = parser.parse_args()
    target, folder = TARGETS[options.target], Path(tempfile.mkdtemp())
    path = folder / f"case{target.suffix}"
    for data in target.seeds():
        keep(folder / "seeds", data, target.suffix)

    counts, written = {"ok": 0, "refused": 0, "findings": 0}, time.monotonic()

    def one(data: bytes) -> None:
        nonlocal written
        path.write_bytes(data)
        try:
            counts[check(target, path)] += 1
        except Finding:
            counts["findings"] += 1
            keep(CORPUS / options.target, data, target.suffix)
            raise
        finally:
            if options.output and (counts["findings"] or time.monotonic() > written + EVERY):  # libFuzzer ends without a word
                written = time.monotonic()
                result = {"target": options.target, "seconds": options.seconds, "seed": options.seed, **counts}
                write_json(options.output / f"{options.target}-coverage.json", result, force=True)

    def changed(data: bytes, longest: int, seed: int) -> bytes:
        random = Random(seed)
        if not data or random.random() > OWN:
            return atheris.Mutate(data, longest)  # type: ignore[no-any-return]
        return target.mutate(data, random)[:longest]

    most = max(4096, 2 * max(map(len, target.seeds())))
    limits = [f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-rss_limit_mb=6000", f"-max_len={most}", "-timeout=120"]
    atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", str(folder / "seeds")], one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
