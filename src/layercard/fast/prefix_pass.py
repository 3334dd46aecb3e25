"""Hidden states that enter a block, for all records of some data sets, from a model on disk: each block is read once for all of them.

What comes of it is a store as `frozen_prefix` keeps it (`prefix_store`), in a folder of its own for each set of weights, dtype and depth.
Records that are there already are not computed again. A pass that was killed goes on with the block it was at. Several processes share the
records: each lets its part through all blocks, and reads the others' from the folder.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from layercard import processes
from layercard.data.load import Dataset, Example
from layercard.errors import LayercardError, OutputError, TrainingError
from layercard.fast.anatomy import anatomy
from layercard.fast.prefix_blocks import module_groups, relative_positions
from layercard.fast.prefix_records import record_key
from layercard.fast.prefix_store import Store, gigabytes
from layercard.files import alone, read_json, write_json
from layercard.models.load import Progress
from layercard.models.streamed import StreamedModel
from layercard.models.streamed_pass import BlockByBlock, Boundaries, forward, walking

PASS = "pass"
"""Kind of the tensors between blocks, and the phase that progress is told of."""
COPIES = 3
"""Hidden states on disk at the worst moment: what entered the first block, what entered this one, and what leaves it."""


def prefix_folder(streamed: StreamedModel, lowest: int, cache: Path) -> Path:
    """Where below `cache` the hidden states lie that enter block `lowest` of this model, as it computes them here."""
    about = {
        "model": streamed.base.fingerprint,
        "dtype": str(streamed.dtype),
        "device": streamed.device.type,
        "attention": streamed.base.model.config._attn_implementation,
        "lowest": lowest,
        "versions": [version(name) for name in ("torch", "transformers", "layercard")],
        "machine": platform.machine(),
    }
    return cache / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def prefix_pass(
    streamed: StreamedModel,
    datasets: Sequence[Dataset],
    lowest: int,
    cache: Path,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Store:
    """The hidden states that enter block `lowest`, for every record of `datasets`, in a store below the folder `cache`.

    Args:
        streamed: The model; its weights are read and let go block by block.
        datasets: Whose records go through.
        lowest: Index of the block, at least 1.
        cache: Folder for the store, and for what goes from block to block meanwhile.
        batch_size: Records that go through a block at once.
        progress: Told of the phase `pass`, in blocks.

    Raises:
        OutputError: The disk has not enough room, another run is at work there, or it cannot be written.
        ModelError: The blocks hand each other more than hidden states.
        TrainingError: What was kept cannot be read back.
    """
    folder, width = prefix_folder(streamed, lowest, cache), streamed.base.model.get_input_embeddings().weight.shape[1]
    store = Store(width, streamed.dtype, folder, label=folder.name)
    parts = anatomy(streamed.base.model)
    relative = relative_positions(parts, module_groups(parts, lowest))
    examples = {record_key(example, relative): example for dataset in datasets for example in dataset.examples}
    own = set(sorted(examples)[processes.rank() :: processes.count()])
    missing = {key: example for key, example in examples.items() if store.get(key) is None}
    left = [key for key in missing if key in own]
    failure: LayercardError | None = None
    try:
        if left:
            _let_through(
                streamed, store, {key: missing[key] for key in left}, lowest, batch_size, progress, sum(_lengths(missing.values()))
            )
    except LayercardError as error:
        failure = error

    # All processes go on, or none does.
    failures = [each for each in processes.gathered(failure) if each is not None]
    if failures:
        raise failure or failures[0]
    store.refresh()
    lost = [key for key in examples if store.get(key) is None]
    if lost:
        raise TrainingError(
            f"the hidden states of {len(lost)} records cannot be read back from {folder}; remove the folder and give the same command again"
        )
    return store


def _lengths(examples: Iterable[Example]) -> list[int]:
    return [len(example.input_ids) for example in examples]


def _let_through(
    streamed: StreamedModel,
    store: Store,
    missing: dict[bytes, Example],
    lowest: int,
    batch_size: int,
    progress: Progress | None,
    tokens: int,
) -> None:
    """Let records through the blocks below `lowest`, and keep what comes out; `tokens` is what all processes let through together."""
    folder = store.folder
    assert folder is not None

    # What it will take is known before anything is computed.
    needed = COPIES * tokens * store.width * streamed.dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"the pass needs {gigabytes(needed)} in {folder.parent}, where {gigabytes(free)} are free; "
            "name a folder with room (--cache), or take fewer records"
        )
    keys, rows = list(missing), list(missing.values())
    between = folder / f"between-{hashlib.sha256(b''.join(sorted(keys))).hexdigest()[:16]}"
    with alone(between):
        walk = BlockByBlock(streamed, rows, batch_size, Boundaries(between), PASS)
        # The block that comes next is noted behind each one, for a call after this one was killed.
        state = between / "pass.json"
        begin = int(read_json(state, TrainingError, "state of a pass").get("next", 0)) if state.exists() else 0
        for number in range(len(walk.batches)) if begin else ():
            walk.boundaries.adopt(PASS, number, begin)
        how: dict[str, Any] = {"begin": begin, "until": lowest, "phase": PASS, "keep": False}
        with torch.no_grad(), walking(streamed):
            forward(streamed, [walk], progress, **how, after=lambda block: write_json(state, {"next": block}, force=True))
        for number, batch in enumerate(walk.batches):
            hidden = walk.hidden(number, lowest).cpu()
            for place, row in enumerate(batch.rows):
                store.add(keys[row], hidden[place, : len(rows[row].input_ids)])
        store.flush()
    if store.broken:
        raise OutputError(f"cannot keep hidden states in {folder}: {store.broken}; make room, then give the same command again")
    shutil.rmtree(between, ignore_errors=True)
