"""The step probe: what each layer's own step does to the held-out loss, measured by forward passes alone, without training."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from layercard import processes
from layercard.checkpoint import State
from layercard.data.load import Example, batches
from layercard.models.hooks import frozen, hidden_states, replayed, stepped
from layercard.models.load import BaseModel, Progress, shared_keys
from layercard.models.losses import RecordLosses, labelled_losses, record_losses
from layercard.profiling.fit import Step

LONGEST = 10.0
"""The longest length of a step that is told; a loss that is still falling there is not followed further."""


class ReplayedSet:
    """Examples whose hidden states on entry to some blocks are kept, so that only the blocks from there on run.

    Where blocks share keys and values (`shared_keys`), all blocks run, whichever is entered (`all_blocks`).

    Args:
        base: The model.
        examples: What to keep hidden states of; `records` is their number.
        layers: The blocks that will be entered; `entries` holds for each batch what enters them, `[B, T, width]`, by the block's index.
        batch_size: Rows in a batch; `batches` are on the model's device.
        by_length: Put rows of similar length together; else keep the order.
    """

    def __init__(
        self, base: BaseModel, examples: Sequence[Example], layers: Sequence[int], batch_size: int, *, by_length: bool = True
    ) -> None:
        self.base, self.records, self.all_blocks = base, len(examples), bool(shared_keys(base.model))
        self.batches = [batch.to(base.device) for batch in batches(examples, batch_size, base.pad_id, by_length=by_length)]
        self.entries: list[dict[int, torch.Tensor]] = []
        layers = [0] if self.all_blocks else layers
        with torch.no_grad(), frozen(base.model):
            for batch in self.batches:
                self.entries.append(hidden_states(partial(labelled_losses, base.model, batch), base.blocks, layers))

    def move(self, layer: int) -> None:
        """Keep what enters `layer` alone, made from the nearest block at or below it: only the blocks in between run."""
        if self.all_blocks:
            return
        with torch.no_grad(), frozen(self.base.model):
            for number, (batch, entries) in enumerate(zip(self.batches, self.entries, strict=True)):
                nearest = max(index for index in entries if index <= layer)
                if nearest == layer:
                    self.entries[number] = {layer: entries[layer]}
                    continue
                with replayed(self.base.blocks, nearest, entries[nearest]):
                    self.entries[number] = hidden_states(partial(labelled_losses, self.base.model, batch), self.base.blocks, [layer])

    def losses(self, layer: int) -> RecordLosses:
        """Loss of each record, with the blocks from `layer` on as they are now; no gradient."""
        return record_losses(self.base.model, self.batches, self.records, lambda number: self.entered(number, layer), count_right=False)

    def entered(self, number: int, layer: int) -> AbstractContextManager[None]:
        """Let a forward pass over a batch run from block `layer` on."""
        layer = 0 if self.all_blocks else layer
        return replayed(self.base.blocks, layer, self.entries[number][layer])


@dataclass(frozen=True)
class StepProbe:
    """What steps along `α Δ` in single layers do to the loss of records that had no part in making them.

    Attributes:
        depth: Number of layers of the model.
        layers: Those that were measured, ascending; what lies between them is interpolated.
        rows: Places of the probe's records among the profile's, `[records]`.
        half: Which half each of them belongs to, 0 or 1, `[records]`; it was measured with the steps of the other.
        alphas: The step lengths tried, `[layers, 2]`, in units of the steps given.
        before: Loss of each record without a step, summed nats `[records]`.
        after: Loss of each record with the step, summed nats `[layers, 2, records]`.
        tokens: Labelled tokens of each record `[records]`.
    """

    depth: int
    layers: tuple[int, ...]
    rows: torch.Tensor
    half: torch.Tensor
    alphas: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    tokens: torch.Tensor

    def reductions(self, weights_n: torch.Tensor) -> torch.Tensor:
        """Loss reduction of each half at both lengths, `[2, layers, 2]`, nats per labelled token.

        A length at which the loss of some record is not finite reaches nothing; `diverged` says where that is so. `weights_n` says how
        often each of the profile's records counts; for a half of which none does the other half stands in.
        """
        usable = self.after.isfinite().all(dim=2)
        halves = []
        for half in (0, 1):
            weights = weights_n[self.rows] * (self.half == half)
            if not (weights > 0).any():
                weights = weights_n[self.rows]
            reduction = ((self.before - self.after) * weights).sum(dim=2) / (weights * self.tokens).sum().clamp(min=1.0)
            halves.append(reduction.where(usable, torch.zeros_like(reduction)))
        return torch.stack(halves)

    def gain(self, weights_n: torch.Tensor) -> torch.Tensor:
        """Loss reduction of each layer of the model, at least 0: `[depth]`, nats per labelled token, mean of both halves."""
        return self.gains_of_halves(weights_n).mean(dim=0).clamp(min=0)

    def gains_of_halves(self, weights_n: torch.Tensor) -> torch.Tensor:
        """Loss reduction on each half, `[2, depth]`.

        Which of the two lengths counts on one half is decided by the other, so that no record praises the length that it chose.
        """
        reductions = self.reductions(weights_n)
        better = reductions.flip(0).argmax(dim=2, keepdim=True)
        return torch.stack([self.everywhere(gains) for gains in reductions.gather(2, better)[..., 0]])

    def longest(self, slopes_ln: torch.Tensor, weights_n: torch.Tensor) -> torch.Tensor:
        """The length at which the step stops helping: `[depth]`, in units of the steps given, at most `LONGEST`.

        The reduction along the step is taken to be `s α − p α² − q α³`, with the slope s of the records at 0 and p and q from the two
        lengths tried; the smallest α above 0 at which it is 0 counts.

        Args:
            slopes_ln: Decrease of each of the profile's records' summed loss per unit of α at α = 0, `[depth, n]`.
            weights_n: How often each of them counts.
        """
        weights = weights_n[self.rows]
        tokens = (weights * self.tokens).sum().clamp(min=1.0)
        slope = (slopes_ln[list(self.layers)][:, self.rows] * weights).sum(dim=1) / tokens
        after = self.after.where(self.after.isfinite(), 2 * self.before + 1)
        reduction = ((self.before - after) * weights).sum(dim=2) / tokens
        loss = (slope[:, None] - reduction / self.alphas) / self.alphas  # p + q α at both lengths
        q = (loss[:, 1] - loss[:, 0]) / (self.alphas[:, 1] - self.alphas[:, 0])
        p = loss[:, 0] - q * self.alphas[:, 0]
        # The smallest root above 0 of s − p α − q α²; in this form also where q is 0.
        root = (p.square() + 4 * q * slope).clamp(min=0).sqrt()
        length = 2 * slope / (p + root)
        usable = (p.square() + 4 * q * slope >= 0) & (p + root > 0)
        length = torch.where(usable, length, torch.full_like(length, LONGEST))
        return self.everywhere(torch.where(slope > 0, length.clamp(0, LONGEST), torch.zeros_like(length)))

    def everywhere(self, measured: torch.Tensor) -> torch.Tensor:
        """A measure of `layers` for each layer of the model, straight lines between those that were measured."""
        return torch.from_numpy(np.interp(np.arange(self.depth), self.layers, measured.numpy()))

    @property
    def diverged(self) -> list[int]:
        """Layers in which a step led to a loss that is not finite."""
        broken = (~self.after.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        return [self.layers[number] for number in broken]


def probed_layers(depth: int, most: int) -> tuple[int, ...]:
    """At most so many layers, evenly spread, the first and the last among them.

    >>> probed_layers(30, 6), probed_layers(3, 6)
    ((0, 6, 12, 17, 23, 29), (0, 1, 2))
    """
    count = min(depth, max(most, 2))
    return tuple(round(number * (depth - 1) / max(count - 1, 1)) for number in range(count))


def step_probe(
    base: BaseModel,
    halves: Sequence[tuple[Sequence[Step], ReplayedSet]],
    slopes: Sequence[float],
    layers: Sequence[int],
    rows: torch.Tensor,
    progress: Progress | None = None,
    state: State | None = None,
) -> StepProbe:
    """Loss of held-out records with `α Δ_ℓ` added to the weights of layer ℓ alone, for some layers.

    The first length is 1, the second is `second_length`. The weights are not touched: a step is added to the modules' outputs. Several
    processes share the layers; all get the whole result.

    Args:
        base: The model.
        halves: For each half of the records the low-rank steps of all layers that the other half made, such that α = 1 is a sensible
            length, and some of its records with hidden states for the layers.
        slopes: For each layer the decrease of the loss per unit of α at α = 0, nats per labelled token.
        layers: The layers to measure.
        rows: Places of the records of both halves among the profile's.
        progress: Told of each layer, counted in the blocks that run for it.
        state: Where the losses are kept from time to time.
    """
    state, name, depth = state or State(), f"step-probe-{processes.rank()}", len(base.blocks)
    counts = [replayed_set.records for _, replayed_set in halves]
    half = torch.repeat_interleave(torch.arange(len(halves)), torch.tensor(counts))
    done = state.load(name) or {
        "layers": 0,
        "alphas": torch.zeros(len(layers), 2, dtype=torch.float64),
        "after": torch.zeros(len(layers), 2, sum(counts), dtype=torch.float64),
    }
    alphas, after = done["alphas"], done["after"]
    blocks_run = [depth if any(replayed_set.all_blocks for _, replayed_set in halves) else depth - layer for layer in layers]
    with frozen(base.model):
        before = joined([replayed_set.losses(depth - 1) for _, replayed_set in halves])
        for number in range(done["layers"], len(layers)):
            layer = layers[number]
            if number % processes.count() == processes.rank():
                alpha = 1.0
                for trial in range(2):
                    losses = []
                    for steps, replayed_set in halves:
                        with stepped(base.blocks[layer], steps[layer], alpha):
                            losses.append(replayed_set.losses(layer))
                    together = joined(losses)
                    alphas[number, trial], after[number, trial] = alpha, together.nats
                    alpha = second_length(slopes[layer], before.loss - together.loss)
                done["layers"] = number + 1
                state.snapshot(name, lambda: done)
            if progress:
                progress("step probe", sum(blocks_run[: number + 1]), sum(blocks_run))
    for tensor in (alphas, after):
        processes.add_up(tensor)
    return StepProbe(depth, tuple(layers), rows, half, alphas, before.nats, after, before.tokens)


def joined(losses: Sequence[RecordLosses]) -> RecordLosses:
    """The losses of several sets of records, one set behind the other."""
    return RecordLosses(torch.cat([each.nats for each in losses]), torch.cat([each.tokens for each in losses]))


def second_length(slope: float, reduction: float) -> float:
    """Minimum of the parabola with this slope (downwards) at 0 and this reduction at 1, kept within a third and three.

    Where that is within a fifth of 1, which was tried already, half as far again is tried.
    """
    bend = slope - reduction
    length = slope / (2 * bend) if slope > 0 and bend > 0 else (3.0 if reduction > 0 else 1 / 3)
    length = min(max(length, 1 / 3), 3.0)
    return 1.5 if 0.8 < length < 1.2 else length
