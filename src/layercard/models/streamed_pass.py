"""Batches on their way through a model one block at a time, whether its weights are on disk or in memory (`StreamedModel.in_memory`).

What is below the blocks, each block and the head run separately, each inside `model.loaded([...])`; `Boundaries` keeps what goes from
block to block for all batches:

```python
walk = BlockByBlock(model, examples, 4, Boundaries(), "fit")
with walking(model):
    forward(model, [walk])
    with model.loaded([model.head()]):
        for logits, targets, rows, chosen in walk.logits(0, walk.hidden(0, len(model.blocks))):
            ...
```
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from layercard.data.load import IGNORED, Batch, Example, batches
from layercard.errors import ModelError, OutputError
from layercard.models.hooks import BlockArguments, block_input, frozen, pass_through, replaced
from layercard.models.load import Progress
from layercard.models.losses import RecordLosses, keeps_logits, labelled_logits
from layercard.models.streamed import StreamedModel

LOGITS = 2**25
"""Logits that are computed at once, unless one position of a batch has more; the head needs a few float32 copies of them."""


class Boundaries:
    """Tensors between blocks, by kind, batch and block: in a folder, or in memory where none is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._tensors: dict[tuple[str, int, int], torch.Tensor | None] = {}

    def put(self, kind: str, batch: int, block: int, tensor: torch.Tensor) -> None:
        """Keep a tensor.

        Raises:
            OutputError: It cannot be written.
        """
        tensor = tensor.detach().cpu()
        self._tensors[kind, batch, block] = tensor if self.folder is None else None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"tensor": tensor.contiguous()}, self.folder / f"{kind}-{batch}-{block}.safetensors")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep what goes from block to block in {self.folder} ({error}); make room there") from error

    def get(self, kind: str, batch: int, block: int, device: torch.device) -> torch.Tensor:
        """A tensor that was kept."""
        tensor = self._tensors[kind, batch, block]
        if tensor is None:
            assert self.folder is not None
            tensor = load_file(self.folder / f"{kind}-{batch}-{block}.safetensors")["tensor"]
        return tensor.to(device)

    def adopt(self, kind: str, batch: int, block: int) -> None:
        """Take over a tensor that an earlier process left in the folder."""
        assert self.folder is not None
        self._tensors[kind, batch, block] = None

    def drop(self, kind: str, batch: int, block: int) -> None:
        """Forget a tensor, if it was kept."""
        self._tensors.pop((kind, batch, block), None)
        if self.folder is not None:
            (self.folder / f"{kind}-{batch}-{block}.safetensors").unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all of them."""
        for key in list(self._tensors):
            self.drop(*key)


class _LastReached(Exception):
    """The last block was reached; the head need not run."""


class _TuplesExpected(Exception):
    """The model takes the first of what a block returns, so blocks must return tuples."""


class BlockByBlock:
    """The batches of some records on their way through a model; what enters each block is kept in `boundaries` as `kind`."""

    def __init__(self, model: StreamedModel, examples: Sequence[Example], batch_size: int, boundaries: Boundaries, kind: str) -> None:
        self.model, self.boundaries, self.kind = model, boundaries, kind
        self.batches = [batch.to(model.device) for batch in batches(examples, batch_size, model.base.pad_id, by_length=True)]
        self._arguments: list[list[Callable[[torch.Tensor], BlockArguments]]] = []
        self._tuples = False

    def enter(self) -> None:
        """Run what is below the blocks, and keep what each block is called with. The embedding must be in memory."""
        self._arguments = []
        for batch in range(len(self.batches)):
            try:
                self._arguments.append(self._enter(batch))
            except _TuplesExpected:
                self._tuples = True
                self._arguments.append(self._enter(batch))

    def _enter(self, batch: int) -> list[Callable[[torch.Tensor], BlockArguments]]:
        """For each block the function that puts hidden states among its arguments."""
        arguments: list[Callable[[torch.Tensor], BlockArguments]] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, put = block_input(args, kwargs)
            if not arguments:
                self.boundaries.put(self.kind, batch, 0, hidden)
            elif hidden.dim() < 3:  # the model took the first record of the hidden states, since it expected a tuple
                raise _TuplesExpected
            arguments.append(put)
            if len(arguments) == len(self.model.blocks):
                raise _LastReached
            return self._returned(hidden)

        with ExitStack() as stack:
            for block in self.model.blocks:
                stack.enter_context(replaced(block.module, record))
            try:
                labelled_logits(self.model.base.model, self.batches[batch])
            except _LastReached:
                return arguments
        raise ModelError("the model does not run its blocks in their order, so it cannot be streamed; profile without --stream")

    def _returned(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which a block returns them."""
        return (hidden,) if self._tuples else hidden

    def hidden(self, batch: int, block: int) -> torch.Tensor:
        """What enters a block; for the number of blocks, what leaves the last one."""
        return self.boundaries.get(self.kind, batch, block, self.model.device)

    def run(self, batch: int, block: int, hidden: torch.Tensor) -> torch.Tensor:
        """What leaves a block, which must be in memory, where `hidden` enters it."""
        args, kwargs = self._arguments[batch][block](hidden)
        output = self.model.blocks[block].module(*args, **kwargs)
        if isinstance(output, tuple):
            self._tuples = True
            output, *others = output
            rows, length = output.shape[:2]
            for other in others:  # attention [B, heads, T, T] is for the caller; no block takes it
                if isinstance(other, torch.Tensor) and (other.dim() != 4 or (other.shape[0], *other.shape[2:]) != (rows, length, length)):
                    raise ModelError("the blocks hand on more than hidden states, so they cannot be streamed; profile without --stream")
        return output

    def advance(self, block: int) -> None:
        """Let all batches through a block, which must be in memory, without a graph."""
        with torch.no_grad():
            for batch in range(len(self.batches)):
                self.boundaries.put(self.kind, batch, block + 1, self.run(batch, block, self.hidden(batch, block)))

    def logits(self, batch: int, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """`labelled_logits` of a batch where `hidden` leaves the last block, a few positions at a time; the head must be in memory.

        Yields:
            Logits, label ids and rows of some of the batch's labelled tokens, and which of them these are (`[M]`, true or false).
        """
        model, blocks = self.model.base.model, self.model.blocks
        entered = self.hidden(batch, 0)
        for part, chosen in _portions(model, self.batches[batch]):
            with ExitStack() as stack:
                stack.enter_context(replaced(model.get_input_embeddings(), lambda *_, **__: entered))
                for block in blocks[:-1]:
                    stack.enter_context(replaced(block.module, lambda *args, **kwargs: self._returned(pass_through(*args, **kwargs))))
                stack.enter_context(replaced(blocks[-1].module, lambda *_, **__: self._returned(hidden)))
                logits, targets, rows = labelled_logits(model, part)
            yield logits, targets, rows, chosen

    def losses(self, kind: str) -> RecordLosses:
        """Losses of the records where the last block gives what is kept as `kind`, without gradients; the head must be in memory."""
        records = sum(len(batch.rows) for batch in self.batches)
        nats, tokens, right = (torch.zeros(records, dtype=torch.float64) for _ in range(3))
        with torch.no_grad():
            for number, batch in enumerate(self.batches):
                hidden = self.boundaries.get(kind, number, len(self.model.blocks), self.model.device)
                for logits, targets, rows, _ in self.logits(number, hidden):
                    record = torch.tensor(batch.rows)[rows.cpu()]
                    nats.index_add_(0, record, cross_entropy(logits.float(), targets, reduction="none").double().cpu())
                    tokens.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
                    right.index_add_(0, record, (logits.argmax(dim=1) == targets).double().cpu())
        return RecordLosses(nats, tokens, right)


def _portions(model: nn.Module, batch: Batch) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The batch with the labels of a few positions at a time, and which of its labelled tokens these are, `[M]`."""
    positions = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)[1] + 1
    columns = positions.unique()
    rows, vocabulary = len(batch.labels), model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    size = max(1, LOGITS // (rows * vocabulary)) if keeps_logits(model) else len(columns)
    for some in columns.split(size):
        labels = torch.full_like(batch.labels, IGNORED)
        labels[:, some] = batch.labels[:, some]
        yield Batch(batch.input_ids, batch.attention_mask, labels, batch.rows), torch.isin(positions, some)


@contextmanager
def walking(model: StreamedModel) -> Iterator[None]:
    """The model frozen, and in memory what is outside of blocks, embedding and head."""
    with frozen(model.base.model), model.loaded(model.outside()):
        yield


def forward(
    model: StreamedModel,
    walks: Sequence[BlockByBlock],
    progress: Progress | None = None,
    *,
    begin: int = 0,
    until: int | None = None,
    phase: str = "forward",
    keep: bool = True,
    after: Callable[[int], object] = lambda block: None,
) -> None:
    """Let all batches through what is below the blocks, and through the blocks from `begin` on, or through those below `until`.

    What enters block `begin` must be kept already where it is not 0. `after` is called behind each block with the number of the next one.
    Without `keep` what entered a block is let go then, but for the first block: the head's pass starts with that (`BlockByBlock.logits`).
    """
    with model.loaded([model.base.model.get_input_embeddings()]):
        for walk in walks:
            walk.enter()
    for block in model.blocks[begin:until]:
        with model.loaded([block.module]):
            for walk in walks:
                walk.advance(block.index)
        after(block.index + 1)
        for walk in walks if block.index and not keep else ():
            for number in range(len(walk.batches)):
                walk.boundaries.drop(walk.kind, number, block.index)
        if progress:
            progress(phase, block.index + 1, len(model.blocks) if until is None else until)
