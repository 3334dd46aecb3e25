"""The step probe: what each layer's own step does to the held-out loss, measured by forward passes alone, without training."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from layercard import processes
from layercard.checkpoint import State
from layercard.data.load import Example, batches, positions
from layercard.models.hooks import frozen, hidden_states, replayed, stepped
from layercard.models.load import BaseModel, Progress, shared_keys
from layercard.models.losses import RecordLosses, labelled_losses, record_losses
from layercard.profiling.fit import Step


class ReplayedSet:
    """Examples whose hidden states on entry to some blocks are kept, so that only the blocks from there on run.

    Where blocks share keys and values (`shared_keys`), all blocks run, whichever is entered (`all_blocks`).

    Args:
        base: The model.
        examples: What to keep hidden states of; `records` is their number.
        layers: The blocks that will be entered; `entries` holds for each batch what enters them, `[B, T, width]`, by the block's index.
        batch_size: Rows in a batch; `batches` are on the model's device.
        by_length: Put rows of similar length together; else keep the order.
        progress: Told of each batch, counted in positions.
    """

    def __init__(
        self,
        base: BaseModel,
        examples: Sequence[Example],
        layers: Sequence[int],
        batch_size: int,
        *,
        by_length: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.base, self.records, self.all_blocks = base, len(examples), bool(shared_keys(base.model))
        self.batches = [batch.to(base.device) for batch in batches(examples, batch_size, base.pad_id, by_length=by_length)]
        self.entries: list[dict[int, torch.Tensor]] = []
        layers, positions_done = [0] if self.all_blocks else layers, positions(self.batches)
        with torch.no_grad(), frozen(base.model):
            for number, batch in enumerate(self.batches):
                self.entries.append(hidden_states(partial(labelled_losses, base.model, batch), base.blocks, layers))
                if progress:
                    progress("entries", positions_done[number], positions_done[-1])

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
        return record_losses(self.base.model, self.batches, self.records, lambda number: self.entered(number, layer))

    def entered(self, number: int, layer: int) -> AbstractContextManager[None]:
        """Let a forward pass over a batch run from block `layer` on."""
        layer = 0 if self.all_blocks else layer
        return replayed(self.base.blocks, layer, self.entries[number][layer])


@dataclass(frozen=True)
class StepProbe:
    """What steps along `α Δ` in single layers do to the held-out loss.

    Attributes:
        alphas: The step lengths tried, `[layers, 2]`, in units of the steps given.
        before: Loss of each record without a step, summed nats `[records]`.
        after: Loss of each record with the step, summed nats `[layers, 2, records]`.
        tokens: Labelled tokens of each record `[records]`.
    """

    alphas: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    tokens: torch.Tensor

    def gain(self, weights_n: torch.Tensor) -> torch.Tensor:
        """Largest loss reduction that either length reaches, at least 0: `[layers]`, nats per labelled token.

        A length at which the loss of some record is not finite reaches nothing; `diverged` says where that is so. `weights_n` says how
        often each record counts; those beyond the records of the probe are not used.
        """
        weights = weights_n[: len(self.tokens)]
        reduction = ((self.before - self.after) * weights).sum(dim=2) / (weights * self.tokens).sum().clamp(min=1.0)
        return reduction.where(self.after.isfinite().all(dim=2), 0.0).max(dim=1).values.clamp(min=0)

    @property
    def diverged(self) -> list[int]:
        """Layers in which a step led to a loss that is not finite."""
        return (~self.after.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()


def step_probe(
    base: BaseModel,
    steps: Sequence[Step],
    slopes: Sequence[float],
    held_out: ReplayedSet,
    progress: Progress | None = None,
    state: State | None = None,
) -> StepProbe:
    """Held-out loss with `α Δ_ℓ` added to the weights of layer ℓ alone, for every layer.

    The first length is 1, the second is `second_length`. The weights are not touched: a step is added to the modules' outputs. Several
    processes share the layers; all get the whole result.

    Args:
        base: The model.
        steps: For each layer its low-rank step, such that α = 1 is a sensible length.
        slopes: For each layer the decrease of the held-out loss per unit of α at α = 0, nats per labelled token.
        held_out: Records that had no part in making the steps, with hidden states for every layer.
        progress: Told of each layer, counted in the blocks that run for it.
        state: Where the losses are kept from time to time.
    """
    state, name, depth = state or State(), f"step-probe-{processes.rank()}", len(steps)
    done = state.load(name) or {
        "layers": 0,
        "alphas": torch.zeros(depth, 2, dtype=torch.float64),
        "after": torch.zeros(depth, 2, held_out.records, dtype=torch.float64),
    }
    alphas, after = done["alphas"], done["after"]
    blocks_run = [depth if held_out.all_blocks else depth - layer for layer in range(depth)]
    with frozen(base.model):
        before = held_out.losses(depth - 1)
        for layer in range(done["layers"], depth):
            if layer % processes.count() == processes.rank():
                alpha = 1.0
                for trial in range(2):
                    with stepped(base.blocks[layer], steps[layer], alpha):
                        losses = held_out.losses(layer)
                    alphas[layer, trial], after[layer, trial] = alpha, losses.nats
                    alpha = second_length(slopes[layer], before.loss - losses.loss)
                done["layers"] = layer + 1
                state.snapshot(name, lambda: done)
            if progress:
                progress("step probe", sum(blocks_run[: layer + 1]), sum(blocks_run))
    for tensor in (alphas, after):
        processes.add_up(tensor)
    return StepProbe(alphas, before.nats, after, before.tokens)


def second_length(slope: float, reduction: float) -> float:
    """Minimum of the parabola with this slope (downwards) at 0 and this reduction at 1, kept within a third and three.

    Where that is within a fifth of 1, which was tried already, half as far again is tried.
    """
    bend = slope - reduction
    length = slope / (2 * bend) if slope > 0 and bend > 0 else (3.0 if reduction > 0 else 1 / 3)
    length = min(max(length, 1 / 3), 3.0)
    return 1.5 if 0.8 < length < 1.2 else length
