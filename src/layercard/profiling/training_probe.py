"""The training probe: each layer is adapted alone for a few steps, and the worse half stops at each rung.

With rungs at 6, 12, 24 and 48 steps all layers train for 6, the better half of them goes on to 12, the better half of those to
24, and so on (successive halving, Jamieson and Talwalkar 2016). A layer that goes on resumes where it stopped, so no step is
taken twice, and what the last layers reach is what training each of them alone for all steps would give. The blocks below a layer
are frozen and run once a rung: their output is handed from one layer to the next.

Where training stands lies in a folder, one file a layer, so that an interrupted probe goes on (`checkpoint`). Several processes share
the layers: number i of n has every n-th from layer i on, at every rung.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from layercard import processes
from layercard.checkpoint import Form, State, opened
from layercard.data.load import Example, shuffled
from layercard.errors import TrainingError
from layercard.models.adapted import lora_layers
from layercard.models.hooks import frozen
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import training_step
from layercard.profiling.step_probe import ReplayedSet

SCHEMA = "layercard-probe/2"
RUNGS = 4
"""Number of rungs: the last one trains an eighth of the layers for eight times the steps of the first."""


@dataclass(frozen=True)
class ProbeTraining:
    """How a layer is adapted: LoRA on all linear modules of the block, AdamW, warm-up then linear decay.

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
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._optimizer = torch.optim.AdamW(self._weights.values(), lr=settings.learning_rate, weight_decay=0.0)

    def advance(self, train: ReplayedSet, until: int, progress: Callable[[int], None] | None = None) -> None:
        """Train to step `until`, at most `settings.steps`; `progress` is told of the number of each step.

        `train` holds the batches from step `step` on, in the order of training (`by_length=False`), with entries for `lowest`.
        """
        first = self.step
        for step in range(first, until):
            for group in self._optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self.settings.schedule(step)
            with train.entered(step - first, self.lowest):
                training_step(train.base.model, train.batches[step - first], self._optimizer, max_grad_norm=self.settings.max_grad_norm)
            self.step = step + 1
            if progress:
                progress(self.step)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and AdamW's two moments by name, on the CPU; with `step` all that training needs to go on."""
        tensors = {}
        for name, weight in self._weights.items():
            moments = self._optimizer.state[weight]
            for kind, tensor in (("weight", weight), ("mean", moments["exp_avg"]), ("square", moments["exp_avg_sq"])):
                tensors[f"{kind}.{name}"] = tensor.detach().cpu().clone().contiguous()
        return tensors

    def restore(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Go on from a `state` that was taken after `step` steps (at least 1)."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state[f"weight.{name}"])
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": state[f"mean.{name}"].to(weight.device, copy=True),
                    "exp_avg_sq": state[f"square.{name}"].to(weight.device, copy=True),
                }
        self.step = step


@contextmanager
def adapting(base: BaseModel, layers: Sequence[int], settings: ProbeTraining) -> Iterator[Adaptation]:
    """The model with new adapters in some layers; the base model is as before when the `with` block ends.

    Only the blocks from the lowest of the layers on run. The gradients are those of plain PEFT on the whole model, to rounding.
    """
    with lora_layers(base, layers, rank=settings.rank, alpha=settings.alpha, seed=settings.seed) as model:
        yield Adaptation(model, layers, settings)


@dataclass(frozen=True)
class TrainingProbe:
    """What a few training steps in single layers do to the held-out loss.

    Attributes:
        before: Loss of each record without training, summed nats `[records]`.
        after: Loss of each record after the last step that the layer took, summed nats `[layers, records]`.
        tokens: Labelled tokens of each record `[records]`.
        steps: Steps that each layer took; those that were pruned took fewer than the others.
    """

    before: torch.Tensor
    after: torch.Tensor
    tokens: torch.Tensor
    steps: tuple[int, ...]

    def gain(self, weights_n: torch.Tensor) -> torch.Tensor:
        """Loss reduction of each layer, `[layers]`, nats per labelled token; negative where training did harm.

        `weights_n` says how often each record counts; those beyond the records of the probe are not used.
        """
        weights = weights_n[: len(self.tokens)]
        return ((self.before - self.after) * weights).sum(dim=1) / (weights * self.tokens).sum().clamp(min=1.0)


def rungs(steps: int) -> tuple[int, ...]:
    """Steps after which the worse half stops: each rung doubles the one before it, and the last is `steps`.

    >>> rungs(48), rungs(3)
    ((6, 12, 24, 48), (1, 3))
    """
    return tuple(sorted({max(1, steps // 2**halvings) for halvings in range(RUNGS)}))


def better_half(gains: dict[int, float]) -> list[int]:
    """The half of the layers (rounded up) with the largest gains, ascending; of equals the lower layer.

    >>> better_half({0: 0.1, 1: 0.3, 2: 0.2})
    [1, 2]
    """
    return sorted(sorted(gains, key=lambda layer: (-gains[layer], layer))[: (len(gains) + 1) // 2])


def training_probes(
    base: BaseModel,
    examples: Sequence[Example],
    held_out_examples: Sequence[Example],
    settings: ProbeTraining,
    *,
    key: str = "",
    batch_size: int = 8,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> TrainingProbe:
    """Adapt every layer alone, and stop the worse half at each rung.

    Time grows with about a third of `layers · settings.steps`. Memory: hidden states of one layer for the batches of one rung,
    and one layer's adapters. The base model is bit for bit the same afterwards.

    Args:
        base: The model.
        examples: What to train on, in the order that `settings.batches` gives.
        held_out_examples: Records to measure on, which have no part in training.
        settings: Rank, learning rate and number of steps of a layer that is never pruned.
        key: Names the data; the state of another key, model or settings is not used.
        batch_size: Rows of a held-out batch.
        folder: Where training stands; what an interrupted call left there is used. A temporary one unless given.
        progress: Told of "training probe", in steps over all layers.

    Raises:
        OutputError: `folder` holds something else, or cannot be written.
        TrainingError: A loss is not finite.
    """
    depth, size, ordered = len(base.blocks), settings.batch_size, settings.batches(examples)
    steps_done = 0
    starts_and_stops = pairwise((0, *rungs(settings.steps)))
    steps_planned = sum((stop - start) * math.ceil(depth / 2**rung) for rung, (start, stop) in enumerate(starts_and_stops))

    def tell(steps: int) -> None:
        nonlocal steps_done
        steps_done += steps
        if progress and steps:
            progress("training probe", steps_done, steps_planned)

    with ExitStack() as stack:
        if folder is None:
            state = State(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="layercard-probe-"))))
        else:
            plan = {"schema": SCHEMA, "model": base.fingerprint, "data": key, "settings": asdict(settings), "batch_size": batch_size}
            state = stack.enter_context(opened(folder, plan, Form()))

        def load(layer: int) -> dict[str, Any]:
            """How far a layer is: steps, losses after each rung, weights and moments after the last."""
            return state.load(f"layer-{layer:03}") or {"steps": 0, "nats": [], "training": {}}

        def train_layer(layer: int, until: int, train: ReplayedSet, held_out: ReplayedSet) -> torch.Tensor:
            """Held-out losses of a layer after step `until`, reached from where it stopped."""
            done = load(layer)
            with adapting(base, [layer], settings) as adaptation:
                if done["steps"]:
                    adaptation.restore(done["training"], done["steps"])
                adaptation.advance(train, until, lambda _: tell(1))
                losses = held_out.losses(layer)
                if not losses.nats.isfinite().all():
                    raise TrainingError(
                        f"training probe: the held-out loss of layer {layer} is {losses.loss} after {until} steps; "
                        "profile with --dtype float32, or without training (--probe step)"
                    )
                done = {"steps": until, "nats": [*done["nats"], losses.nats], "training": adaptation.state()}
                state.save(f"layer-{layer:03}", done)
            return losses.nats

        with frozen(base.model):
            before = ReplayedSet(base, held_out_examples, [depth - 1], batch_size).losses(depth - 1)
        after = torch.zeros(depth, len(held_out_examples), dtype=torch.float64)
        steps = [0] * depth
        layers, start = list(range(depth)), 0
        for rung, stop in enumerate(rungs(settings.steps)):
            # Step 1: this process's layers, those that have been at this rung before first.
            mine = [layer for layer in layers if layer % processes.count() == processes.rank()]
            reached = {layer: done["nats"][rung] for layer in mine if len((done := load(layer))["nats"]) > rung}
            tell(len(reached) * (stop - start))
            missing = [layer for layer in mine if layer not in reached]
            if missing:
                train = ReplayedSet(base, ordered[start * size : stop * size], missing[:1], size, by_length=False)
                held_out = ReplayedSet(base, held_out_examples, missing[:1], batch_size)
                for layer in missing:
                    train.move(layer)
                    held_out.move(layer)
                    reached[layer] = train_layer(layer, stop, train, held_out)
            # Step 2: the losses of the other processes' layers.
            nothing = torch.zeros(len(held_out_examples), dtype=torch.float64)
            losses = torch.stack([reached.get(layer, nothing) for layer in layers])
            processes.add_up(losses)
            # Step 3: the better half goes on.
            for layer, nats in zip(layers, losses, strict=True):
                after[layer], steps[layer] = nats, stop
            layers, start = better_half({layer: float((before.nats - after[layer]).sum()) for layer in layers}), stop
    return TrainingProbe(before.nats, after, before.tokens, tuple(steps))
