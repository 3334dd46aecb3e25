"""Training a model that is larger than the memory: only the blocks that train are loaded.

Nothing below the lowest adapted block changes, and what enters that block is a function of the record alone. So the blocks below are
read once, one after the other, and all records go through them (`prefix_pass`); then the blocks from there on, the last norm and the
head are loaded, and trained as ever. Losses and adapter are those of ordinary training, to rounding.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from layercard.adapters.apply import check_model, loaded
from layercard.cost.estimate import free_bytes
from layercard.data.checks import precision_advice
from layercard.data.load import IGNORED, Dataset, Example
from layercard.errors import TrainingError
from layercard.fast.prefix import check_known_prefix, known_prefix
from layercard.fast.prefix_pass import prefix_pass
from layercard.fast.prefix_store import gigabytes
from layercard.measure import Phases
from layercard.models.load import Progress
from layercard.models.losses import RecordLosses
from layercard.models.streamed import StreamedModel
from layercard.models.streamed_pass import BlockByBlock, Boundaries, forward, walking
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.training.evaluate import end_ids, evaluate, prompt_of
from layercard.training.records import Evaluation, Run
from layercard.training.train import RUN_FILE, train

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
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    phases: Phases | None = None,
) -> Run:
    """`train` with the blocks below the lowest adapted one on disk; afterwards the upper ones are in memory.

    `fast.cache_folder` is where the hidden states are kept, for later runs too; where none is named they lie beside `output` until the run
    has finished. The rest is as in `train`.

    Raises:
        TrainingError: Block 0 is adapted, the upper blocks do not fit, or as `train`.
        OutputError: The disk has not enough room for the hidden states.
    """
    settings, fast, phases, output = settings or TrainSettings(), fast or FastSettings(), phases or Phases(), Path(output)
    check_model(streamed.base, placement)
    check_fits(streamed, placement)
    lowest = min(placement.layers)
    check_known_prefix(streamed.base.model, lowest)
    cache = Path(fast.cache_folder) if fast.cache_folder else output.absolute().parent / f"{STATES}-{output.name}"
    with phases.phase("pass"):
        datasets = [data] if valid is None else [data, valid]
        store = prefix_pass(streamed, datasets, lowest, cache, batch_size=max(8, settings.batch_size), progress=progress)
    with phases.phase("load"):
        streamed.load_from(lowest)
    others = replace(fast, prefix_cache=False, cache_folder=None, cache_bytes=None)
    how: dict[str, Any] = {"valid": valid, "fast": others, "resume": resume, "force": force, "progress": progress, "phases": phases}
    with known_prefix(streamed.base.model, store, lowest) as prefix:
        run = train(streamed.base, placement, data, output, settings, **how)
    blocks = len(streamed.blocks)
    did = {"stream": f"blocks 0 to {lowest - 1} of {blocks} on disk, {gigabytes(streamed.resident_bytes)} of weights in memory"}
    if prefix.records_read:
        did["stream"] += f"; {gigabytes(store.taken)} of hidden states read {prefix.records_read} times"
    run = run.model_copy(update={"fast": run.fast | {"did": did | run.fast["did"]}})
    run.save(output / RUN_FILE, force=True)
    if fast.cache_folder is None:
        shutil.rmtree(cache, ignore_errors=True)  # no later run was promised them
    return run


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


def check_fits(streamed: StreamedModel, placement: Placement) -> None:
    """Refuse a placement from which on the model does not fit, naming the deepest that does.

    Raises:
        TrainingError: It does not fit, or block 0 is adapted.
    """
    lowest, free = min(placement.layers), free_bytes(streamed.device)
    if lowest == 0:
        raise TrainingError("block 0 is adapted, so no block can stay on disk; choose layers nearer to the output, or leave --stream out")
    if streamed.bytes_from(lowest) <= free:
        return
    fitting = [block.index for block in streamed.blocks if streamed.bytes_from(block.index) <= free]
    deepest = f"layers from {fitting[0]} on would fit" if fitting else "not even the last block fits"
    raise TrainingError(
        f"the blocks from {lowest} on and the head take {gigabytes(streamed.bytes_from(lowest))}, and {gigabytes(free)} are free; {deepest}"
    )
