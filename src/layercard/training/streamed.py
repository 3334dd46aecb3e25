"""Training a model that is larger than the memory: only the blocks that train are loaded.

Nothing below the lowest adapted block changes, and what enters that block is a function of the record alone. So the blocks below are
read once, one after the other, and all records go through them (`prefix_pass`); then the blocks from there on, the last norm and the
head are loaded, and trained as ever. Losses and adapter are those of ordinary training, to rounding.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from layercard import processes
from layercard.adapters.apply import check_model, loaded
from layercard.cost.estimate import estimated_cost, free_bytes, lowest_that_fits
from layercard.cost.measure import usual_batch
from layercard.data.checks import precision_advice
from layercard.data.load import IGNORED, Dataset, Example
from layercard.errors import TrainingError
from layercard.fast.prefix import PrefixCache, check_known_prefix, known_prefix
from layercard.fast.prefix_pass import prefix_pass
from layercard.fast.prefix_store import gigabytes
from layercard.measure import Phases
from layercard.models.load import Progress
from layercard.models.losses import RecordLosses
from layercard.models.quantised import SHARE
from layercard.models.streamed import StreamedModel
from layercard.models.streamed_pass import BlockByBlock, Boundaries, forward, walking
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.training.evaluate import end_ids, evaluate, prompt_of
from layercard.training.records import Evaluation, Run
from layercard.training.train import train

STATES = ".hidden-states"
"""How the folder beside the output begins that holds hidden states where no other is named."""
EVALUATE = "evaluate"
"""Kind of the tensors between blocks, and the phase that progress is told of."""


def train_streamed(
    streamed: StreamedModel,
    placement: Placement,
    data: Dataset,
    output: str | Path,
    settings: TrainSettings | None = None,
    *,
    valid: Dataset | None = None,
    fast: FastSettings | None = None,
    bits: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    phases: Phases | None = None,
) -> Run:
    """`train` with the blocks below the lowest adapted one on disk; afterwards the upper ones are in memory.

    `fast.cache_folder` is where the hidden states are kept, for later runs too; where none is named they lie beside `output` until the run
    has finished. `bits` (4 or 8, with bitsandbytes) rounds the linear modules of the upper blocks as they are loaded; the lower ones
    compute in full. The rest is as in `train`.

    Raises:
        ModelError: bitsandbytes is not there.
        TrainingError: Block 0 is adapted, the upper blocks do not fit, or as `train`.
        OutputError: The disk has not enough room for the hidden states.
    """
    settings, fast, phases, output = settings or TrainSettings(), fast or FastSettings(), phases or Phases(), Path(output)
    check_model(streamed.base, placement)
    check_fits(streamed, placement, data, settings, bits)
    check_known_prefix(streamed.base.model, min(placement.layers))
    if bits is not None:
        streamed.quantise(min(placement.layers), bits)
    streamed.hold_places()
    cache = Path(fast.cache_folder) if fast.cache_folder else states_beside(output)
    datasets, lowest = [data] if valid is None else [data, valid], min(placement.layers)
    size = max(8, settings.batch_size)
    told = progress if processes.is_first() else None
    prepare = partial(upper_part, streamed, lowest, datasets, cache, batch_size=size, progress=told, phases=phases)
    how: dict[str, Any] = {"resume": resume, "force": force, "progress": progress, "phases": phases}
    run = train(streamed.base, placement, data, output, settings, valid=valid, fast=_without_cache(fast), prepare=prepare, **how)
    if fast.cache_folder is None and processes.is_first():
        shutil.rmtree(cache, ignore_errors=True)  # no later run was promised them
    return run


def states_beside(output: Path) -> Path:
    """Where hidden states lie until a run in `output` has finished, if no folder is named for them."""
    return output.absolute().parent / f"{STATES}-{output.name}"


@contextmanager
def upper_part(
    streamed: StreamedModel,
    lowest: int,
    datasets: Sequence[Dataset],
    cache: Path,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    phases: Phases | None = None,
) -> Iterator[PrefixCache]:
    """`streamed.base` able to run on the records of `datasets` with only what lies from block `lowest` on in memory.

    All records go through the blocks below first, and what enters block `lowest` is kept in `cache`. Adapters may be put on these blocks
    and trained inside; below there stand weights that are all zero and take no memory.

    Raises:
        TrainingError: What enters the block is not a function of the record alone, or cannot be read back.
        OutputError: The disk has not enough room for the hidden states.
    """
    phases = phases or Phases()
    check_known_prefix(streamed.base.model, lowest)
    with phases.phase("pass"):
        store = prefix_pass(streamed, datasets, lowest, cache, batch_size=batch_size, progress=progress)
    with phases.phase("load"):
        streamed.load_from(lowest)
    with known_prefix(streamed.base.model, store, lowest) as prefix:
        in_bits = f", linear modules in {streamed.base.bits} bits" if streamed.base.bits else ""
        prefix.notes.append(f"{gigabytes(streamed.resident_bytes)} of weights in memory{in_bits}")
        yield prefix


def comparable(
    streamed: StreamedModel,
    placements: Sequence[tuple[str, Placement]],
    datasets: Sequence[Dataset],
    output: Path,
    settings: TrainSettings,
    fast: FastSettings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Arguments `fast` and `prepare` of `compare` for a model on disk: one pass serves all placements, from the lowest of their layers on.

    Raises:
        TrainingError: As `check_fits`.
    """
    for _, placement in placements:
        check_model(streamed.base, placement)
        check_fits(streamed, placement, datasets[0], settings)
    lowest = min(min(placement.layers) for _, placement in placements)
    check_known_prefix(streamed.base.model, lowest)
    streamed.hold_places()
    cache = Path(fast.cache_folder) if fast.cache_folder else output / STATES
    prepare = partial(upper_part, streamed, lowest, datasets, cache, batch_size=max(8, settings.batch_size), progress=progress)
    return {"fast": _without_cache(fast), "prepare": prepare}


def _without_cache(fast: FastSettings) -> FastSettings:
    """The same, but for the prefix cache: what enters the lowest adapted block is known already."""
    return replace(fast, prefix_cache=False, cache_folder=None, cache_bytes=None)


def evaluate_streamed(
    streamed: StreamedModel,
    dataset: Dataset,
    *,
    adapter: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    with_generation: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """`evaluate`, block by block from disk, for all records at once; the arguments are those of `evaluate`.

    The loss takes one pass over the weights. Each new token of the continuations takes one more, for all records together.
    """
    with _adapted(streamed, adapter) if adapter else nullcontext(), TemporaryDirectory(prefix="layercard-") as folder:
        losses = streamed_losses(streamed, dataset.examples, batch_size, Boundaries(Path(folder)), progress)
        answerable = [example for example in dataset.examples if "references" in example.record or "answer" in example.record]
        texts = None
        if answerable and with_generation:
            texts = continuations(streamed, answerable, max_new_tokens, batch_size, Boundaries(Path(folder)), progress)
    how: dict[str, Any] = {"adapter": adapter, "max_new_tokens": max_new_tokens, "losses": losses, "texts": texts}
    return evaluate(streamed.base, dataset, batch_size=batch_size, with_generation=texts is not None, **how)


@contextmanager
def _adapted(streamed: StreamedModel, adapter: str | Path) -> Iterator[None]:
    """The saved adapter in a folder on top of a model whose blocks come and go."""
    streamed.hold_places()
    with loaded(streamed.base, adapter):
        yield


def streamed_losses(
    streamed: StreamedModel, examples: Sequence[Example], batch_size: int, between: Boundaries, progress: Progress | None = None
) -> RecordLosses:
    """Losses of every record, each block read once for all of them."""
    walk = BlockByBlock(streamed, examples, batch_size, between, EVALUATE)
    with torch.no_grad(), walking(streamed):
        forward(streamed, [walk], progress, phase=EVALUATE, keep=False)
        with streamed.loaded([streamed.head()]):
            losses = walk.losses(EVALUATE)
    between.clear()
    if not bool(losses.nats.isfinite().all()):
        raise TrainingError(f"the loss of a record is not finite; check the weights and the records{precision_advice(streamed.base.model)}")
    return losses


def continuations(
    streamed: StreamedModel,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    between: Boundaries,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy continuations of the examples' prompts, a pass over the weights for each token of all of them."""
    tokenizer = streamed.base.tokenizer
    prompts, ends = [prompt_of(example) for example in examples], end_ids(streamed.base)
    written: list[list[int]] = [[] for _ in examples]
    going = list(range(len(examples)))
    for step in range(max_new_tokens):
        # A token whose label stands behind the text so far: the logits that predict it are those of the next token.
        rows = [
            Example((*ids, streamed.base.pad_id), (*[IGNORED] * len(ids), streamed.base.pad_id), {})
            for ids in ((*prompts[row], *written[row]) for row in going)
        ]
        walk, following = BlockByBlock(streamed, rows, batch_size, between, EVALUATE), [0] * len(rows)
        with torch.no_grad(), walking(streamed):
            forward(streamed, [walk], keep=False)
            with streamed.loaded([streamed.head()]):
                for number, batch in enumerate(walk.batches):
                    for logits, _, places, _ in walk.logits(number, walk.hidden(number, len(streamed.blocks))):
                        for place, token in zip(places.tolist(), logits.argmax(dim=1).tolist(), strict=True):
                            following[batch.rows[place]] = token
        between.clear()
        for row, token in zip(list(going), following, strict=True):
            if token in ends:
                going.remove(row)
            else:
                written[row].append(token)
        if progress:
            progress("generate", step + 1, max_new_tokens)
        if not going:
            break
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]


def check_fits(streamed: StreamedModel, placement: Placement, data: Dataset, settings: TrainSettings, bits: int | None = None) -> None:
    """Refuse a placement that does not fit the free memory with its weights and a step, naming the lowest layer from which on it would.

    Raises:
        TrainingError: It does not fit, or block 0 is adapted.
    """
    lowest, free = min(placement.layers), free_bytes(streamed.device)
    if lowest == 0:
        raise TrainingError("block 0 is adapted, so no block can stay on disk; choose layers nearer to the output, or leave --stream out")
    batch = usual_batch(data.examples, max(1, settings.batch_size // processes.count()), streamed.base.pad_id, settings.seed)
    sizes: dict[str, Any] = {"batch_size": len(batch.rows), "length": batch.input_ids.shape[1], "rank": settings.rank}
    sizes["labelled"] = max(1, int((batch.labels[:, 1:] != IGNORED).sum()))
    dtype = str(streamed.dtype).removeprefix("torch.")
    cost = estimated_cost(streamed.base.model, flops=1.0, bandwidth=1.0, name=streamed.base.name, dtype=dtype, **sizes)
    if bits is not None:
        share = SHARE[bits] / streamed.dtype.itemsize
        layers = (layer.model_copy(update={"weights_bytes": round(share * layer.weights_bytes)}) for layer in cost.layers)
        cost = cost.model_copy(update={"layers": tuple(layers)})
    needed = cost.weights_in_memory(placement.layers, stream=True) + cost.peak_memory(placement.layers)
    if needed <= free:
        return
    fitting = lowest_that_fits(cost, free, placement.layers)
    deepest = "not even the last block fits" if fitting is None else f"layers from {fitting} on would fit"
    raise TrainingError(
        f"the blocks from {lowest} on, the head and a step take {gigabytes(needed)}, and {gigabytes(free)} are free; {deepest}"
    )
