"""Where a long computation stands: a folder with a plan and parts, from which a later call of the same plan goes on.

A part is one file that is written whole or not at all and names the plan it is of, so that what a killed run or another plan has left is
never taken for this one's. One run at a time works in a folder. Parts that are finished are kept at once; what a pass has summed up so
far is kept from time to time (`State.snapshot`), such that keeping takes at most a twentieth of the time.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from layercard import processes, saved
from layercard.errors import OutputError, ProcessError
from layercard.files import alone, read_json, replacing, write_json

SCHEMA = "layercard-state/1"
PLAN_FILE = "plan.json"
EVERY = 30.0
"""Seconds between two snapshots of a pass, at least."""
SHARE = 20.0
"""Times as long as it took to write one lies between it and the next, at least."""


class State:
    """The parts of one plan in a folder; without a folder nothing is kept, and nothing is found.

    Args:
        folder: Where the parts lie.
        plan: Digest of the plan; parts of another one are not read.
        form: What parts are made of.
    """

    def __init__(self, folder: Path | None = None, plan: str = "", form: saved.Form | None = None) -> None:
        self.folder, self.plan, self.form = folder, plan, form or saved.Form()
        self._next = time.monotonic() + EVERY

    def load(self, name: str) -> Any:
        """The part of that name, `None` where it was not kept."""
        return None if self.folder is None else saved.read(self._path(name), self.form, plan=self.plan)

    def save(self, name: str, value: Any) -> None:
        """Keep a part.

        Raises:
            OutputError: It cannot be written.
        """
        if self.folder is None:
            return
        started = time.monotonic()
        try:
            with replacing(self._path(name)) as part:
                saved.write(part, self.form, value, plan=self.plan)
        except OutputError as error:
            if processes.is_first():
                raise
            raise ProcessError(f"process {processes.rank()}: {error}") from error
        ended = time.monotonic()
        self._next = ended + max(EVERY, SHARE * (ended - started))

    def snapshot(self, name: str, value: Callable[[], Any]) -> None:
        """Keep a part that is not finished, if it is time to and half of the free disk holds it."""
        if self.folder is None or time.monotonic() < self._next:
            return
        found = value()
        if 2 * saved.size(self.form, found) > shutil.disk_usage(self.folder).free:
            self._next = time.monotonic() + EVERY
            return
        self.save(name, found)

    def drop(self, name: str) -> None:
        """Remove a part that is not needed any more."""
        if self.folder is not None:
            self._path(name).unlink(missing_ok=True)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name, made and kept where it is missing.

        Of several processes the first reads and writes it, all get it, and all take part in making it.
        """
        found = self.load(name) if processes.is_first() else None
        if found is not None:
            logging.getLogger(__name__).info("%s is taken from %s", name, self.folder)
        if processes.count() > 1:
            found = saved.from_bytes(self.form, processes.broadcast(saved.to_bytes(self.form, found)))
        if found is None:
            found = make()
            processes.by_first(lambda: self.save(name, found), processes.carrier())
        return found

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


@contextmanager
def opened(folder: Path | None, plan: dict[str, Any], form: saved.Form) -> Iterator[State]:
    """The state of a plan in `folder`, which this run has for itself meanwhile; `folder` stays when the block ends.

    Of several processes the first opens it. What another plan has left there is removed, and the log says so.

    Raises:
        OutputError: The folder is something else, another run works in it, or it cannot be written.
    """
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    if folder is None:
        yield State()
        return
    with ExitStack() as stack:

        def take() -> None:
            check_folder(folder)
            stack.enter_context(alone(folder))
            _take_over(folder, plan, digest)

        processes.by_first(take, processes.carrier())
        folder.mkdir(parents=True, exist_ok=True)  # of a process on a machine that does not see the first one's
        yield State(folder, digest, form)


def _take_over(folder: Path, plan: dict[str, Any], digest: str) -> None:
    """Make a folder the state of a plan."""
    path = folder / PLAN_FILE
    there = read_json(path, OutputError, "plan") if path.exists() else {}
    if there.get("digest") == digest:
        return
    if there:
        names = sorted(name for name in {*plan, *there} - {"digest"} if plan.get(name) != there.get(name))
        logging.getLogger(__name__).warning("%s was of another %s: starting over", folder, ", ".join(names))
    write_json(path, {**plan, "digest": digest}, force=True)  # from here on the old parts are nobody's
    for part in folder.rglob("*.safetensors"):
        part.unlink()


def discard(folder: Path) -> None:
    """Remove a state.

    Raises:
        OutputError: The folder is something else, or another run works in it.
    """
    check_folder(folder)
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        with alone(folder):
            folder.rename(removed)  # at once, so that an interrupt here leaves no half of a state
        shutil.rmtree(removed)


def check_folder(folder: Path) -> None:
    """Raise `OutputError` if `folder` exists and is no state."""
    if not folder.exists() or (folder / PLAN_FILE).is_file():
        return
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise OutputError(f"{folder} exists, where the state of the run would be kept; move it away, or name another output")
