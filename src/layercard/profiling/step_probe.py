"""Measured performance of single layers: the step probe (no training) and the training probe."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from layercard import processes
from layercard.checkpoint import State
from layercard.data.load import Batch, Example, batches, positions, shuffled
from layercard.models.adapted import lora_layers
from layercard.models.hooks import frozen, hidden_states, replayed, stepped
from layercard.models.load import BaseModel, Progress, shared_keys
from layercard.models.losses import RecordLosses, labelled_losses, record_losses, training_step


class ReplayedSet:
    """Examples whose hidden states on entry to some blocks are kept, so that only the blocks from there on run.

    Where blocks share keys and values (`shared_keys`), all blocks run, whichever is entered.

    Args:
        base: The model.
        examples: What to keep entries of.
        layers: The blocks that will be entered.
        batch_size: Rows in a batch.
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
        self.base = base
        self.records = len(examples)
        self.whole = bool(shared_keys(base.model))
        self.batches: list[Batch] = []
        self.entries: list[dict[int, torch.Tensor]] = []
        found = list(batches(examples, batch_size, base.pad_id, by_length=by_length))
        layers, spent = [0] if self.whole else layers, positions(found)
        with torch.no_grad(), frozen(base.model):
            for at, batch in enumerate(found):
                batch = batch.to(base.device)
                self.batches.append(batch)
                self.entries.append(hidden_states(partial(labelled_losses, base.model, batch), base.blocks, layers))
                if progress:
                    progress("entries", spent[at], spent[-1])

    def move(self, layer: int) -> None:
        """Keep the entries of `layer` alone, from the nearest kept ones at or below it: only the blocks in between run."""
        if self.whole:
            return
        with torch.no_grad(), frozen(self.base.model):
            for at, (batch, kept) in enumerate(zip(self.batches, self.entries, strict=True)):
                nearest = max(known for known in kept if known <= layer)
                if nearest == layer:
                    self.entries[at] = {layer: kept[layer]}
                    continue
                with replayed(self.base.blocks, nearest, kept[nearest]):
                    self.entries[at] = hidden_states(partial(labelled_losses, self.base.model, batch), self.base.blocks, [layer])

    def losses(self, layer: int) -> RecordLosses:
        """Loss of each record, with the blocks from `layer` on as they are now; no gradient."""
        return record_losses(self.base.model, self.batches, self.records, lambda at: self.entered(at, layer))

    def forward(self, at: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of batch `at` and the row in the batch of each; see `labelled_losses`."""
        with self.entered(at, layer):
            return labelled_losses(self.base.model, self.batches[at])

    def entered(self, at: int, layer: int) -> AbstractContextManager[None]:
        """Let a forward pass over batch `at` run from block `layer` on."""
        layer = 0 if self.whole else layer
        return replayed(self.base.blocks, layer, self.entries[at][layer])


Step = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""For the path of each map (`Block.modules`) the factors `A: [r, in]` and `B: [out, r]` of a step `Δ = B A` of its weight."""


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

        A length at which the loss of some record is not finite reaches nothing; `diverged` says where that is so.

        Args:
            weights_n: How often each record counts; those beyond the records of the probe are not used.
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
    """Held-out loss with `α Δ_ℓ` added to the weights of layer ℓ alone, for every layer: forward passes only.

    The first length is 1. The second is where a parabola through the slope at 0 and the loss at 1 has its minimum. Several processes
    share the layers; all get the whole result.

    Args:
        base: The model; its weights are not touched (the step is added to the modules' outputs).
        steps: For each layer its low-rank step, such that α = 1 is a sensible length.
        slopes: For each layer the decrease of the held-out loss per unit of α at α = 0, nats per labelled token.
        held_out: Records that had no part in making the steps, with entries for every layer.
        progress: Told of each layer, counted in the blocks that run for it.
        state: Where the losses are kept from time to time.
    """
    state, name = state or State(), f"step-probe-{processes.rank()}"
    kept = state.load(name) or {
        "layers": 0,
        "alphas": torch.zeros(len(steps), 2, dtype=torch.float64),
        "after": torch.zeros(len(steps), 2, held_out.records, dtype=torch.float64),
    }
    alphas, after = kept["alphas"], kept["after"]
    runs = [len(steps) if held_out.whole else len(steps) - layer for layer in range(len(steps))]
    with frozen(base.model):
        before = held_out.losses(len(steps) - 1)
        for layer in range(kept["layers"], len(steps)):
            if layer % processes.count() == processes.rank():
                _probe_layer(base, layer, steps[layer], slopes[layer], held_out, before, alphas[layer], after[layer])
                kept["layers"] = layer + 1
                state.snapshot(name, lambda: kept)
            if progress:
                progress("step probe", sum(runs[: layer + 1]), sum(runs))
    for tensor in (alphas, after):
        processes.add_up(tensor)
    return StepProbe(alphas, before.nats, after, before.tokens)


def _probe_layer(
    base: BaseModel,
    layer: int,
    step: Step,
    slope: float,
    held_out: ReplayedSet,
    before: RecordLosses,
    alphas: torch.Tensor,
    after: torch.Tensor,
) -> None:
    """Fill in one layer's two lengths `[2]` and losses `[2, records]`."""
    alphas[0] = 1.0
    for at in range(2):
        with stepped(base.blocks[layer], step, float(alphas[at])):
            losses = held_out.losses(layer)
        after[at] = losses.nats
        if at == 0:
            alphas[1] = second_length(slope, before.loss - losses.loss)


def second_length(slope: float, reduction: float) -> float:
    """Minimum of the parabola with this slope (downwards) at 0 and this reduction at 1, kept within a third and three.

    Where that is within a fifth of 1, which is known already, half as far again is tried.
    """
    bend = slope - reduction
    length = slope / (2 * bend) if slope > 0 and bend > 0 else (3.0 if reduction > 0 else 1 / 3)
    length = min(max(length, 1 / 3), 3.0)
    return 1.5 if 0.8 < length < 1.2 else length


@dataclass(frozen=True)
class ProbeTraining:
    """How the training probe adapts a layer: LoRA on all linear maps of the block, AdamW, warm-up then linear decay.

    `learning_rate` is per step of the optimiser; `batch_size` is in records.
    """

    steps: int = 96
    batch_size: int = 4
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 3e-3
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 0

    def schedule(self, step: int) -> float:
        """Share of `learning_rate` used in `step` (from 0)."""
        warm = max(1, math.ceil(self.warmup * self.steps))
        return (step + 1) / warm if step < warm else (self.steps - step) / max(1, self.steps - warm)

    def batches(self, examples: Sequence[Example]) -> list[Example]:
        """The examples in the order in which they are trained on; a batch is `batch_size` consecutive ones."""
        return [examples[row] for row in shuffled(len(examples), self.steps * self.batch_size, self.seed)]


class Adaptation:
    """Adapters in a few layers on their way through `settings.steps` steps; training can stop after any step and go on later.

    Attributes:
        model: The PEFT model around the base model.
        lowest: The lowest adapted layer; only the blocks from there on run.
        step: Steps taken so far.
    """

    def __init__(self, model: Any, layers: Sequence[int], settings: ProbeTraining) -> None:
        self.model, self.lowest, self.settings, self.step = model, min(layers), settings, 0
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self._named.values(), lr=settings.learning_rate, weight_decay=0.0)

    def advance(self, train: ReplayedSet, until: int, progress: Callable[[int], None] | None = None) -> None:
        """Train to step `until`.

        Args:
            train: The batches of the steps from `step` on, in the order of training (`by_length=False`), with entries for `lowest`.
            until: Step to stop after, at most `settings.steps`.
            progress: Told of the number of each step.
        """
        first = self.step
        for step in range(first, until):
            for group in self._optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self.settings.schedule(step)
            batch = step - first
            with train.entered(batch, self.lowest):
                training_step(train.base.model, train.batches[batch], self._optimizer, max_grad_norm=self.settings.max_grad_norm)
            self.step = step + 1
            if progress:
                progress(self.step)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and AdamW's two moments by name, on the CPU; with `step` all that training needs to go on."""
        found = {}
        for name, parameter in self._named.items():
            kept = self._optimizer.state[parameter]
            for kind, tensor in (("weight", parameter), ("mean", kept["exp_avg"]), ("square", kept["exp_avg_sq"])):
                found[f"{kind}.{name}"] = tensor.detach().cpu().clone().contiguous()
        return found

    def restore(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Go on from a `state` that was taken after `step` steps (at least 1)."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(state[f"weight.{name}"])
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": state[f"mean.{name}"].to(parameter.device, copy=True),
                    "exp_avg_sq": state[f"square.{name}"].to(parameter.device, copy=True),
                }
        self.step = step


@contextmanager
def adapting(base: BaseModel, layers: Sequence[int], settings: ProbeTraining) -> Iterator[Adaptation]:
    """The model with new adapters in some layers; the base model is as before when the `with` block ends.

    Args:
        base: The model.
        layers: Indices of the blocks to adapt.
        settings: Rank, learning rate and so on.
    """
    with lora_layers(base, layers, rank=settings.rank, alpha=settings.alpha, seed=settings.seed) as model:
        yield Adaptation(model, layers, settings)


@contextmanager
def trained(
    base: BaseModel, layers: Sequence[int], train: ReplayedSet, settings: ProbeTraining, progress: Progress | None = None
) -> Iterator[Any]:
    """The model with adapters in some layers, trained; the base model is as before when the `with` block ends.

    Only the blocks from the lowest of the layers on run: their input was kept by `train`. The gradients are those of stock
    PEFT on the whole model, to rounding.

    Args:
        base: The model.
        layers: Indices of the blocks to adapt.
        train: Batches in the order of training (`by_length=False`), with entries for the lowest of the layers.
        settings: Rank, learning rate and so on.
        progress: Told of each step.

    Yields:
        The PEFT model around `base.model`.
    """
    name = f"train layer {layers[0]}" if len(layers) == 1 else f"train {len(layers)} layers"
    with adapting(base, layers, settings) as adaptation:
        adaptation.advance(train, settings.steps, (lambda step: progress(name, step, settings.steps)) if progress else None)
        yield adaptation.model


def training_probe(
    base: BaseModel, layer: int, train: ReplayedSet, held_out: ReplayedSet, settings: ProbeTraining, progress: Progress | None = None
) -> RecordLosses:
    """Adapt one layer for a few steps (`trained`) and give the held-out loss of each record.

    Args:
        base: The model.
        layer: Index of the block to adapt.
        train: Batches in the order of training (`by_length=False`), with entries for `layer`.
        held_out: Records to measure on, with entries for `layer`.
        settings: Rank, learning rate and so on.
        progress: Told of each step.
    """
    with trained(base, [layer], train, settings, progress):
        return held_out.losses(layer)
