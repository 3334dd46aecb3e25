"""The two passes of a profile over a model on disk: forward block by block, then backward block by block.

Each block is read twice. Forward, all batches go through it before the next one is read, and what enters each block is kept. Backward, a
block runs once more on what entered it, with its graph this time: the gradient of what left it gives the gradient of what entered it, and
on the way the signals of its maps. The batches that make the steps come first, so that the steps of the block are known when the
held-out batches reach it. The numbers are those of the passes over a model in memory (`layercard.signals`), to rounding.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercard.capture import capturing
from layercard.data import IGNORED, Batch, Example
from layercard.errors import DataError
from layercard.fit_sums import FitSums
from layercard.held_out import HeldOutSums, drawn_slopes, label_thresholds
from layercard.loading import Progress
from layercard.phases import Phases
from layercard.signals import Fit, HeldOut, fit_sink, solve_layer
from layercard.state import State
from layercard.stream.boundaries import Boundaries
from layercard.stream.streamed import StreamedModel
from layercard.stream.walk import BlockByBlock, enter, forward, head_of, walking

PART = "streamed-passes"
"""Name of the part that a `State` keeps."""


def stream_passes(
    streamed: StreamedModel,
    fit_examples: Sequence[Example],
    held_examples: Sequence[Example],
    *,
    rank: int,
    ridge: float,
    batch_size: int,
    samples: int,
    seed: int,
    boundaries: Boundaries | None = None,
    progress: Progress | None = None,
    state: State | None = None,
    phases: Phases | None = None,
) -> tuple[Fit, HeldOut]:
    """Both passes of a profile over a model on disk.

    Args:
        streamed: The model.
        fit_examples: Records to make the steps from.
        held_examples: Records that measure them.
        rank: Rank of the steps.
        ridge: λ as a share of `ridge_scale`.
        batch_size: Records in a batch.
        samples: How many times labels are drawn from the model.
        seed: Of the draws.
        boundaries: Where hidden states and gradients are kept; in memory when not given.
        progress: Told of blocks: `forward`, then `backward`.
        state: Where the blocks that are done are kept from time to time; a later call runs forward to the next one only.
        phases: Where time and memory of `forward`, `head` and `backward` are noted.

    Raises:
        DataError: The loss is not finite.
        ModelError: The blocks hand on more than hidden states.
    """
    kept, state, phases = boundaries or Boundaries(), state or State(), phases or Phases()
    fit = BlockByBlock(streamed, fit_examples, batch_size, kept, "fit")
    held = BlockByBlock(streamed, held_examples, batch_size, kept, "held")
    passes = _Passes(streamed, fit, held, samples, seed, kept)
    with walking(streamed):
        done = state.load(PART)
        if done is not None:
            passes.restore(done)
        with phases.phase("forward"):
            enter(streamed, (fit, held))
            forward(streamed, (fit, held), progress, until=passes.next)
        if done is None:
            with phases.phase("head"), streamed.loaded([head_of(streamed)]):
                passes.head(len(held_examples))
        with phases.phase("backward"):
            return passes.backward(rank, ridge, progress, state)


def _gradient_of(hidden: torch.Tensor, value: torch.Tensor, slope: torch.Tensor | None, *, keep: bool) -> torch.Tensor:
    """What `value.backward(slope)` gives to `hidden`; the graph stays where it is to be kept."""
    return torch.autograd.grad(value, hidden, slope, retain_graph=keep)[0]


class _Passes:
    """From the losses down to the first block."""

    def __init__(
        self, streamed: StreamedModel, fit: BlockByBlock, held: BlockByBlock, samples: int, seed: int, boundaries: Boundaries
    ) -> None:
        self.streamed, self.fit, self.held, self.samples, self.seed, self.boundaries = streamed, fit, held, samples, seed, boundaries
        self.labelled, self.nats, self.tokens = 0, 0.0, 0
        self.sums: HeldOut | None = None
        self.parts: dict[str, Fit] = {}
        self.next = len(streamed.blocks)

    def restore(self, done: dict[str, Any]) -> None:
        """Go on from what `_done` gave; the hidden states below its last block must be made anew."""
        self.labelled, self.nats, self.tokens, self.next = done["labelled"], done["nats"], done["tokens"], done["next"]
        self.sums, self.parts = done["sums"], done["parts"]
        for name, gradient in done["gradients"].items():
            kind, which, at = name.split("-")
            self.boundaries.put(f"{kind}-gradient-{which}", int(at), self.next, gradient)

    def _done(self) -> dict[str, Any]:
        kinds = [("fit", 0, self.fit), *(("held", which, self.held) for which in range(self.samples + 1))]
        return {
            "labelled": self.labelled,
            "nats": self.nats,
            "tokens": self.tokens,
            "next": self.next,
            "sums": self.sums,
            "parts": self.parts,
            "gradients": {
                f"{kind}-{which}-{at}": self._gradient(kind, at, which, self.next).cpu()
                for kind, which, walk in kinds
                for at in range(len(walk.batches))
            },
        }

    def head(self, records: int) -> None:
        """Losses, and the gradients of what leaves the last block: of the losses and, held out, of those under drawn labels."""
        top = len(self.streamed.blocks)
        for at, batch in enumerate(self.fit.batches):
            hidden = self.fit.hidden(at, top).requires_grad_(True)
            for logits, targets, _, _ in self.fit.logits(at, hidden):
                loss = cross_entropy(logits.float(), targets, reduction="sum")
                del logits
                loss.backward()
                self.labelled, self.nats = self.labelled + len(targets), self.nats + float(loss.detach())
            self.tokens += int(batch.attention_mask.sum())
            self._keep("fit", at, 0, top, hidden)
        if not math.isfinite(self.nats):
            name = self.streamed.base.name
            raise DataError(f"the loss of {name} on these records is {self.nats}; check the weights and records, or use --dtype float32")
        self.sums = HeldOut.empty(top, records, self.samples, ())
        for at, batch in enumerate(self.held.batches):
            self._held_out_head(at, batch, self.sums, top)

    def _held_out_head(self, at: int, batch: Batch, sums: HeldOut, top: int) -> None:
        hidden = self.held.hidden(at, top).requires_grad_(True)
        sums.tokens.index_add_(0, torch.tensor(batch.rows), batch.attention_mask.sum(dim=1).double().cpu())
        rows = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)[0]
        thresholds = label_thresholds(torch.tensor(batch.rows)[rows.cpu()], self.samples, self.seed)
        slopes = [torch.zeros_like(hidden) for _ in range(self.samples + 1)]
        for logits, targets, rows, chosen in self.held.logits(at, hidden):
            losses = cross_entropy(logits.float(), targets, reduction="none")
            record = torch.tensor(batch.rows)[rows.cpu()]
            sums.nats.index_add_(0, record, losses.detach().double().cpu())
            sums.labelled.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
            slopes[0] += _gradient_of(hidden, losses.sum(), None, keep=self.samples > 0)
            for sample, slope in enumerate(drawn_slopes(logits, thresholds[:, chosen.cpu()])):
                slopes[sample + 1] += _gradient_of(hidden, logits, slope, keep=sample + 1 < self.samples)
        for which, slope in enumerate(slopes):
            self.boundaries.put(f"held-gradient-{which}", at, top, slope)

    def _keep(self, kind: str, at: int, which: int, block: int, hidden: torch.Tensor) -> None:
        """Keep the gradient of what enters a block, and clear it; `which` is 0 for the true labels, else the sample counted from 1."""
        assert hidden.grad is not None
        self.boundaries.put(f"{kind}-gradient-{which}", at, block, hidden.grad)
        self.boundaries.drop(f"{kind}-gradient-{which}", at, block + 1)
        self.boundaries.drop(kind, at, block + 1)
        hidden.grad = None

    def backward(self, rank: int, ridge: float, progress: Progress | None, state: State) -> tuple[Fit, HeldOut]:
        """Down through the blocks."""
        assert self.sums is not None
        for block in reversed(self.streamed.blocks[: self.next]):
            with self.streamed.loaded([block.module]):
                part = self.parts[str(block.index)] = Fit(self.tokens, self.labelled, self.nats / self.labelled)
                moments = self._fit_block(block.index)
                solve_layer(part, block, moments.leaders, moments.inputs, moments.gradients, rank, ridge)
                self._held_out_block(block.index, part)
            self.next = block.index
            state.snapshot(PART, self._done)
            if progress:
                progress("backward", len(self.streamed.blocks) - block.index, len(self.streamed.blocks))
        whole = Fit(self.tokens, self.labelled, self.nats / self.labelled)
        for block in self.streamed.blocks:
            whole.extend(self.parts[str(block.index)])
        self.boundaries.clear()
        return whole, self.sums

    def _fit_block(self, index: int) -> FitSums:
        sums = FitSums()
        block = self.streamed.blocks[index]
        with capturing(self.streamed.base.model, [block], opening=False) as capture:
            sink = fit_sink(sums, capture, [block], self.tokens)
            for at, batch in enumerate(self.fit.batches):
                hidden = self.fit.hidden(at, index).requires_grad_(True)
                capture.start(batch.attention_mask, sink)
                self.fit.run(at, index, hidden).backward(self._gradient("fit", at, 0, index + 1))
                self._keep("fit", at, 0, index, hidden)
            sums.leaders = dict(capture.leaders)
        return sums

    def _held_out_block(self, index: int, part: Fit) -> None:
        assert self.sums is not None
        block = self.streamed.blocks[index]
        self.sums.inputs.update({path: torch.zeros(4, len(self.sums.nats), dtype=torch.float64) for path in part.input_directions})
        sums = HeldOutSums(self.streamed.base, part, self.sums)
        with capturing(self.streamed.base.model, [block], opening=False) as capture:
            for at, batch in enumerate(self.held.batches):
                hidden = self.held.hidden(at, index).requires_grad_(True)
                sums.enter(batch)
                capture.start(batch.attention_mask, sums.true_labels, keep=self.samples > 0)
                out = self.held.run(at, index, hidden)
                for which in range(self.samples + 1):
                    if which:
                        capture.sink, capture.keep = sums.drawn_labels(which - 1), which < self.samples
                    out.backward(self._gradient("held", at, which, index + 1), retain_graph=which < self.samples)
                    self._keep("held", at, which, index, hidden)

    def _gradient(self, kind: str, at: int, which: int, block: int) -> torch.Tensor:
        return self.boundaries.get(f"{kind}-gradient-{which}", at, block, self.streamed.device)
