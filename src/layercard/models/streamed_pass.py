"""Hidden states and gradients between blocks, in memory or on disk.

Batches on their way through a model on disk: what lies below the blocks, the blocks one at a time, and the head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from layercard.data.load import IGNORED, Batch, Example, batches
from layercard.errors import ModelError, OutputError
from layercard.models.hooks import entering, frozen, replaced, skip
from layercard.models.load import Progress, keeps_logits, labelled_logits
from layercard.models.streamed import StreamedModel

# ---- stream.boundaries


class Boundaries:
    """Tensors by kind, batch and block.

    Args:
        folder: Where they are kept; in memory where it is not given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[tuple[str, int, int], torch.Tensor | None] = {}

    def put(self, kind: str, batch: int, block: int, tensor: torch.Tensor) -> None:
        """Keep a tensor.

        Raises:
            OutputError: It cannot be written.
        """
        tensor = tensor.detach().cpu()
        self._kept[kind, batch, block] = tensor if self.folder is None else None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"tensor": tensor.contiguous()}, self._path(kind, batch, block))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep what goes from block to block in {self.folder} ({error}); make room there") from error

    def get(self, kind: str, batch: int, block: int, device: torch.device) -> torch.Tensor:
        """A tensor that was kept."""
        found = self._kept[kind, batch, block]
        if found is None:
            found = load_file(self._path(kind, batch, block))["tensor"]
        return found.to(device)

    def drop(self, kind: str, batch: int, block: int) -> None:
        """Forget a tensor; one that was never kept is none."""
        self._kept.pop((kind, batch, block), None)
        if self.folder is not None:
            self._path(kind, batch, block).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all of them."""
        for key in list(self._kept):
            self.drop(*key)

    def _path(self, kind: str, batch: int, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{kind}-{batch}-{block}.safetensors"


# ---- stream.walk

LOGITS = 2**25
"""Logits that are computed at once, unless one position of a batch has more; the head needs a few float32 copies of them."""
Put = Callable[[torch.Tensor], tuple[Any, ...]]
"""A block's arguments `(args, kwargs)` with given hidden states."""


class _Reached(Exception):
    """The last block was reached; the head need not run."""


class _Indexed(Exception):
    """The model takes the first of what a block gives, so blocks give tuples."""


class BlockByBlock:
    """Batches on their way through a streamed model.

    Attributes:
        batches: The batches.
        boundaries: What enters each block, kind `hidden`.
        tuples: Whether blocks give tuples, the hidden states first.

    Args:
        streamed: The model.
        examples: The records.
        batch_size: Records in a batch.
        boundaries: Where hidden states are kept.
        kind: What they are called there.
    """

    def __init__(self, streamed: StreamedModel, examples: Sequence[Example], batch_size: int, boundaries: Boundaries, kind: str) -> None:
        self.streamed, self.boundaries, self.kind = streamed, boundaries, kind
        pad_id = streamed.base.pad_id
        self.batches = [batch.to(streamed.device) for batch in batches(examples, batch_size, pad_id, by_length=True)]
        self.calls: list[list[Put]] = []
        self.tuples = False

    def enter(self) -> None:
        """Run what lies below the blocks, and keep what each block is called with. The embedding must be in memory."""
        self.calls = [self._tried(at) for at in range(len(self.batches))]

    def _tried(self, at: int) -> list[Put]:
        try:
            return self._enter(at)
        except _Indexed:
            self.tuples = True
            return self._enter(at)

    def _enter(self, at: int) -> list[Put]:
        calls: list[Put] = []
        with ExitStack() as stack:
            for block in self.streamed.blocks:
                stack.enter_context(replaced(block.module, partial(self._record, at, calls)))
            try:
                labelled_logits(self.streamed.base.model, self.batches[at])
            except _Reached:
                return calls
        raise ModelError("the model runs its blocks in no order of their own, so it cannot be streamed; profile without --stream")

    def _record(self, at: int, calls: list[Put], *args: Any, **kwargs: Any) -> Any:
        hidden, put = entering(args, kwargs)
        if not calls:
            self.boundaries.put(self.kind, at, 0, hidden)
        elif hidden.dim() < 3:
            raise _Indexed
        calls.append(put)
        if len(calls) == len(self.streamed.blocks):
            raise _Reached
        return self._given(hidden)

    def _given(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which a block gives them."""
        return (hidden,) if self.tuples else hidden

    def hidden(self, at: int, block: int) -> torch.Tensor:
        """What enters a block in batch `at`; for one beyond the last, what leaves that."""
        return self.boundaries.get(self.kind, at, block, self.streamed.device)

    def run(self, at: int, block: int, hidden: torch.Tensor) -> torch.Tensor:
        """What leaves a block, which must be in memory."""
        args, kwargs = self.calls[at][block](hidden)
        found = self.streamed.blocks[block].module(*args, **kwargs)
        if isinstance(found, tuple):
            self.tuples = True
            found, *others = found
            if any(isinstance(part, torch.Tensor) and not _is_attention(part, found) for part in others):
                raise ModelError("the blocks hand on more than hidden states, so they cannot be streamed; profile without --stream")
        return found

    def advance(self, block: int) -> None:
        """Let all batches through a block without a graph."""
        with torch.no_grad():
            for at in range(len(self.batches)):
                self.boundaries.put(self.kind, at, block + 1, self.run(at, block, self.hidden(at, block)))

    def logits(self, at: int, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """`labelled_logits` of batch `at` where the last block gives `hidden`, a few positions at a time; the head must be in memory.

        Yields:
            Logits, label ids and rows of some of the batch's labelled tokens, and which of them these are (`[M]`, true or false).
        """
        model, blocks, whole = self.streamed.base.model, self.streamed.blocks, self.batches[at]
        first = self.hidden(at, 0)
        for part, chosen in _portions(model, whole):
            with ExitStack() as stack:
                stack.enter_context(replaced(model.get_input_embeddings(), lambda *_, **__: first))
                for block in blocks[:-1]:
                    stack.enter_context(replaced(block.module, lambda *args, **kwargs: self._given(skip(*args, **kwargs))))
                stack.enter_context(replaced(blocks[-1].module, lambda *_, **__: self._given(hidden)))
                found = labelled_logits(model, part)
            yield *found, chosen


def _is_attention(part: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether what a block gives beside hidden states `[B, T, width]` is its attention `[B, heads, T, T]`, which no block takes."""
    batch, length = hidden.shape[:2]
    return part.dim() == 4 and (part.shape[0], *part.shape[2:]) == (batch, length, length)


def _portions(model: nn.Module, batch: Batch) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The batch with the labels of a few positions at a time, and which of its labelled tokens these are, `[M]`."""
    places = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)[1] + 1
    columns = places.unique()
    rows, vocabulary = len(batch.labels), model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    size = max(1, LOGITS // (rows * vocabulary)) if keeps_logits(model) else len(columns)
    for some in columns.split(size):
        labels = torch.full_like(batch.labels, IGNORED)
        labels[:, some] = batch.labels[:, some]
        yield Batch(batch.input_ids, batch.attention_mask, labels, batch.rows), torch.isin(places, some)


@contextmanager
def walking(streamed: StreamedModel) -> Iterator[None]:
    """The model frozen, with what lies outside its blocks, embedding and head in memory."""
    with frozen(streamed.base.model), streamed.loaded(streamed.outside()):
        yield


def head_of(streamed: StreamedModel) -> nn.Module:
    """The output head.

    Raises:
        ModelError: The model names none.
    """
    head = streamed.base.model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{streamed.base.name} names no output head, so it cannot be streamed; profile without --stream")
    return head


def enter(streamed: StreamedModel, walks: Sequence[BlockByBlock]) -> None:
    """Run what lies below the blocks for all batches."""
    with streamed.loaded([streamed.base.model.get_input_embeddings()]):
        for walk in walks:
            walk.enter()


def forward(streamed: StreamedModel, walks: Sequence[BlockByBlock], progress: Progress | None, until: int | None = None) -> None:
    """Let all batches through the blocks, or through those below `until`."""
    for block in streamed.blocks[:until]:
        with streamed.loaded([block.module]):
            for walk in walks:
                walk.advance(block.index)
        if progress:
            progress("forward", block.index + 1, len(streamed.blocks))
