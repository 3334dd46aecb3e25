"""The training probe for every layer: each is adapted alone for a few steps, and the worse half stops at each rung.

With rungs at 6, 12, 24 and 48 steps all layers train for 6, the better half of them goes on to 12, the better half of those to
24, and so on (successive halving, Jamieson and Talwalkar 2016). A layer that goes on resumes where it stopped, so no step is
taken twice, and what the last layers reach is what training each of them alone for all steps would give. The blocks below a layer
are frozen and run once a rung: their output is handed from one layer to the next.

Where training stands lies in a folder, one file a layer, so that an interrupted probe goes on (`state`). Several processes share the
layers: number i of n has every n-th from layer i on, at every rung.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layercard import checkpoint as saved, processes
from layercard.checkpoint import State, opened
from layercard.data.load import Example
from layercard.errors import TrainingError
from layercard.models.hooks import frozen
from layercard.models.load import BaseModel, Progress
from layercard.profiling.step_probe import ProbeTraining, ReplayedSet, adapting

SCHEMA = "layercard-probe/2"
RUNGS = 4
"""Number of rungs: the last one trains an eighth of the layers for eight times the steps of the first."""


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

        Args:
            weights_n: How often each record counts; those beyond the records of the probe are not used.
        """
        weights = weights_n[: len(self.tokens)]
        return ((self.before - self.after) * weights).sum(dim=1) / (weights * self.tokens).sum().clamp(min=1.0)


def rungs(steps: int) -> tuple[int, ...]:
    """Steps after which the worse half stops: each rung doubles the one before it, and the last is `steps`.

    >>> rungs(48), rungs(3)
    ((6, 12, 24, 48), (1, 3))
    """
    return tuple(sorted({max(1, steps // 2**at) for at in range(RUNGS)}))


def better_half(gains: dict[int, float]) -> list[int]:
    """The half of the layers (rounded up) with the largest gains, ascending; of equals the lower layer.

    >>> better_half({0: 0.1, 1: 0.3, 2: 0.2})
    [1, 2]
    """
    return sorted(sorted(gains, key=lambda layer: (-gains[layer], layer))[: (len(gains) + 1) // 2])


def training_probes(
    base: BaseModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
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
        held_out: Records to measure on, which have no part in training.
        settings: Rank, learning rate and number of steps of a layer that is never pruned.
        key: Names the data; the state of another key, model or settings is not used.
        batch_size: Rows of a held-out batch.
        folder: Where training stands; what an interrupted call left there is used. A temporary one unless given.
        progress: Told of "training probe", in steps over all layers.

    Raises:
        OutputError: `folder` holds something else, or cannot be written.
        TrainingError: A loss is not finite.
    """
    plan = {"schema": SCHEMA, "model": base.fingerprint, "data": key, "settings": asdict(settings), "batch_size": batch_size}
    with _opened(folder, plan) as state:
        return _Halving(base, examples, held_out, settings, batch_size, state, progress).run()


@contextmanager
def _opened(folder: Path | None, plan: dict[str, Any]) -> Iterator[State]:
    """The state in a folder, or in a temporary one of this process."""
    if folder is not None:
        with opened(folder, plan, saved.Form()) as state:
            yield state
        return
    with tempfile.TemporaryDirectory(prefix="layercard-probe-") as temporary:
        yield State(Path(temporary))


class _Halving:
    """One probe of all layers."""

    def __init__(
        self,
        base: BaseModel,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        settings: ProbeTraining,
        batch_size: int,
        state: State,
        progress: Progress | None,
    ) -> None:
        self.base, self.held_out, self.settings, self.batch_size = base, held_out, settings, batch_size
        self.ordered, self.state, self.progress = settings.batches(examples), state, progress
        self.rungs = rungs(settings.steps)
        self.done, self.total = 0, planned_steps(len(base.blocks), settings.steps)

    def run(self) -> TrainingProbe:
        """Climb the rungs."""
        depth = len(self.base.blocks)
        with frozen(self.base.model):
            top = ReplayedSet(self.base, self.held_out, [depth - 1], self.batch_size).losses(depth - 1)
        after: dict[int, torch.Tensor] = {}
        steps: dict[int, int] = {}
        layers, start = list(range(depth)), 0
        for at, stop in enumerate(self.rungs):
            found = self._rung(at, layers, start, stop)
            after.update(found)
            steps.update(dict.fromkeys(layers, stop))
            layers, start = better_half({layer: float((top.nats - nats).sum()) for layer, nats in found.items()}), stop
        return TrainingProbe(
            top.nats, torch.stack([after[layer] for layer in range(depth)]), top.tokens, tuple(steps[layer] for layer in range(depth))
        )

    def _rung(self, at: int, layers: list[int], start: int, stop: int) -> dict[int, torch.Tensor]:
        """Held-out losses `[records]` of each layer after `stop` steps, of which `start` were taken before."""
        own = [layer for layer in layers if layer % processes.count() == processes.rank()]
        reached = {layer: kept["nats"][at] for layer in own if len((kept := self._kept(layer))["nats"]) > at}
        self._tell(len(reached) * (stop - start))
        missing = [layer for layer in own if layer not in reached]
        if missing:
            size = self.settings.batch_size
            train = ReplayedSet(self.base, self.ordered[start * size : stop * size], missing[:1], size, by_length=False)
            held_out = ReplayedSet(self.base, self.held_out, missing[:1], self.batch_size)
            for layer in missing:
                train.move(layer)
                held_out.move(layer)
                reached[layer] = self._train(layer, stop, train, held_out)
        return self._exchanged(layers, reached)

    def _train(self, layer: int, stop: int, train: ReplayedSet, held_out: ReplayedSet) -> torch.Tensor:
        """Held-out losses of a layer after `stop` steps, taken from where it stopped."""
        kept = self._kept(layer)
        with adapting(self.base, [layer], self.settings) as adaptation:
            if kept["steps"]:
                adaptation.restore(kept["training"], kept["steps"])
            adaptation.advance(train, stop, lambda step: self._tell(1))
            losses = held_out.losses(layer)
            if not losses.nats.isfinite().all():
                raise TrainingError(
                    f"training probe: the held-out loss of layer {layer} is {losses.loss} after {stop} steps; "
                    "profile with --dtype float32, or without training (--probe step)"
                )
            kept = {"steps": stop, "nats": [*kept["nats"], losses.nats], "training": adaptation.state()}
            self.state.save(f"layer-{layer:03}", kept)
        return losses.nats

    def _kept(self, layer: int) -> dict[str, Any]:
        """How far a layer is: steps, losses after each rung, weights and moments after the last."""
        return self.state.load(f"layer-{layer:03}") or {"steps": 0, "nats": [], "training": {}}

    def _exchanged(self, layers: list[int], own: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The losses of all layers, from the processes that have them."""
        losses = torch.stack([own.get(layer, torch.zeros(len(self.held_out), dtype=torch.float64)) for layer in layers])
        processes.add_up(losses)
        return dict(zip(layers, losses, strict=True))

    def _tell(self, steps: int) -> None:
        self.done += steps
        if self.progress and steps:
            self.progress("training probe", self.done, self.total)


def planned_steps(depth: int, steps: int) -> int:
    """Training steps of all layers together, where the best ones take `steps`.

    >>> planned_steps(4, 4)
    8
    """
    total, layers, start = 0, depth, 0
    for stop in rungs(steps):
        total, layers, start = total + layers * (stop - start), (layers + 1) // 2, stop
    return total
