"""The training probe for every layer: each is adapted alone for a few steps, and the worse half stops at each rung.

With rungs at 6, 12, 24 and 48 steps all layers train for 6, the better half of them goes on to 12, the better half of those to
24, and so on (successive halving, Jamieson and Talwalkar 2016). A layer that goes on resumes where it stopped, so no step is
taken twice, and what the last layers reach is what training each of them alone for all steps would give. The blocks below a layer
are frozen and run once a rung: their output is handed from one layer to the next.

Where training stands lies in a folder, one JSON and one safetensors file a layer and rung, so that an interrupted probe goes on.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from layercard.capture import frozen
from layercard.data import Example
from layercard.errors import OutputError, TrainingError
from layercard.files import read_json, replacing, write_json
from layercard.models import BaseModel, Progress
from layercard.probe import Adaptation, ProbeTraining, ReplayedSet, adapting

SCHEMA = "layercard-probe/1"
PLAN_FILE = "plan.json"
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
    with _state(folder, plan) as state:
        return _Halving(base, examples, held_out, settings, batch_size, state, progress).run()


class _Halving:
    """One probe of all layers."""

    def __init__(
        self,
        base: BaseModel,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        settings: ProbeTraining,
        batch_size: int,
        state: "_State",
        progress: Progress | None,
    ) -> None:
        self.base, self.held_out, self.settings, self.batch_size = base, held_out, settings, batch_size
        self.ordered, self.state, self.progress = settings.batches(examples), state, progress
        self.rungs = rungs(settings.steps)
        self.done, self.total = 0, _total_steps(len(base.blocks), self.rungs)

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
        found = {layer: nats for layer in layers if (nats := self.state.losses(layer, at)) is not None}
        self._tell(len(found) * (stop - start))
        missing = [layer for layer in layers if layer not in found]
        if not missing:
            return found
        size = self.settings.batch_size
        steps = self.ordered[start * size : stop * size]
        train = ReplayedSet(self.base, steps, missing[:1], size, by_length=False)
        held_out = ReplayedSet(self.base, self.held_out, missing[:1], self.batch_size)
        for layer in missing:
            train.move(layer)
            held_out.move(layer)
            found[layer] = self._train(at, layer, start, stop, train, held_out)
        return found

    def _train(self, at: int, layer: int, start: int, stop: int, train: ReplayedSet, held_out: ReplayedSet) -> torch.Tensor:
        with adapting(self.base, [layer], self.settings) as adaptation:
            if start:
                adaptation.restore(self.state.training(layer, at - 1), start)
            adaptation.advance(train, stop, lambda step: self._tell(1))
            losses = held_out.losses(layer)
            if not losses.nats.isfinite().all():
                raise TrainingError(
                    f"training probe: the held-out loss of layer {layer} is {losses.mean} after {stop} steps; "
                    "profile with --dtype float32, or without training (--probe step)"
                )
            self.state.keep(layer, at, adaptation, losses.nats)
        return losses.nats

    def _tell(self, steps: int) -> None:
        self.done += steps
        if self.progress and steps:
            self.progress("training probe", self.done, self.total)


def _total_steps(depth: int, marks: Sequence[int]) -> int:
    total, layers, start = 0, depth, 0
    for stop in marks:
        total, layers, start = total + layers * (stop - start), (layers + 1) // 2, stop
    return total


class _State:
    """Where training stands, in a folder. A JSON file is written after the weights it belongs to, so what it names is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def losses(self, layer: int, rung: int) -> torch.Tensor | None:
        """Held-out losses `[records]` of a layer after a rung; `None` where it did not get there."""
        path = self._path(layer, rung, "json")
        if not path.exists():
            return None
        return torch.tensor(read_json(path, TrainingError, "state of a training probe")["nats"], dtype=torch.float64)

    def training(self, layer: int, rung: int) -> dict[str, torch.Tensor]:
        """Weights and moments of a layer after a rung."""
        return load_file(self._path(layer, rung, "safetensors"))

    def keep(self, layer: int, rung: int, adaptation: Adaptation, nats: torch.Tensor) -> None:
        """Write what a layer has reached; the weights of the rung before are not needed any more."""
        with replacing(self._path(layer, rung, "safetensors")) as part:
            save_file(adaptation.state(), part)
        write_json(self._path(layer, rung, "json"), {"layer": layer, "steps": adaptation.step, "nats": nats.tolist()}, force=True)
        self._path(layer, rung - 1, "safetensors").unlink(missing_ok=True)

    def _path(self, layer: int, rung: int, ending: str) -> Path:
        return self.folder / f"layer-{layer:03}-rung-{rung}.{ending}"


@contextmanager
def _state(folder: Path | None, plan: dict[str, Any]) -> Iterator[_State]:
    """The state in `folder` if it is of this plan, else an empty one there."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="layercard-probe-") as temporary:
            yield _State(Path(temporary))
        return
    if not _is_of(folder, plan):
        discard(folder)
        write_json(folder / PLAN_FILE, plan)
    yield _State(folder)


def _is_of(folder: Path, plan: dict[str, Any]) -> bool:
    path = folder / PLAN_FILE
    return path.exists() and read_json(path, TrainingError, "plan of a training probe") == plan


def discard(folder: Path) -> None:
    """Remove the state of a training probe.

    Raises:
        OutputError: The folder is something else.
    """
    check_folder(folder)
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)  # at once, so that an interrupt here leaves no half of a state
        shutil.rmtree(removed)


def check_folder(folder: Path) -> None:
    """Raise `OutputError` if `folder` exists and is not the state of a training probe."""
    if not folder.exists() or (folder / PLAN_FILE).is_file():
        return
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise OutputError(f"{folder} exists, where the training probe would keep its state; move it away, or name another output")
