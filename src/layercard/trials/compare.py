"""Placements side by side: each trained from the same seed on the same records, measured on the same held-out ones."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layercard.adapters.apply import check_model
from layercard.data.load import Dataset
from layercard.errors import OutputError, PlacementError
from layercard.files import refuse_existing, write_json
from layercard.models.load import BaseModel, Progress, describe
from layercard.models.losses import RecordLosses
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.statistics.ratios import ratio_interval
from layercard.training.evaluate import describe_data, held_out_losses, reduction_interval
from layercard.training.records import Run
from layercard.training.train import RUN_FILE, train, versions

SCHEMA = "layercard-compare/1"
COMPARE_FILE = "compare.json"


@dataclass(frozen=True)
class Row:
    """One placement's result.

    Attributes:
        name: What it was called.
        layers: Its layers.
        loss_reduction: `value`, `low`, `high` in nats per labelled token, against the frozen base.
        performance_kept: `value`, `low`, `high` in per cent of the reduction of all layers; `None` where all layers were not trained.
        train_seconds: Time within training steps.
        peak_memory_bytes: Memory of training above the frozen model.
        trainable_parameters: Number of adapter weights.
        adapter_bytes: Size of the saved weights.
        layers_in_backward: Blocks from the lowest adapted one up, of all ("5/30").
        time_share: `train_seconds` in per cent of the training time of all layers; `None` where all layers were not trained.
    """

    name: str
    layers: tuple[int, ...]
    loss_reduction: dict[str, float]
    performance_kept: dict[str, float] | None
    train_seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    adapter_bytes: int
    layers_in_backward: str
    time_share: float | None


@dataclass(frozen=True)
class Comparison:
    """Results of several placements on one model and data set.

    Attributes:
        model: Name, fingerprint and number of layers.
        data: What was trained on.
        valid: What was held out.
        settings: How all of them were trained.
        loss_before: Held-out loss of the frozen base, nats per labelled token.
        rows: One for each placement, in the order given.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    valid: dict[str, Any]
    settings: dict[str, Any]
    loss_before: float
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema `layercard-compare/1`."""
        return {"schema": SCHEMA, **asdict(self), "rows": [asdict(row) for row in self.rows], "versions": versions()}


def compare(
    base: BaseModel,
    placements: list[tuple[str, Placement]],
    data: Dataset,
    valid: Dataset,
    settings: TrainSettings | None = None,
    *,
    fast: FastSettings | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Train each placement from the same seed and set the results side by side.

    The base is measured once, before anything is trained, and one uncounted step goes first, so that no placement pays for what a
    process does only once. With `output` each run is kept in a folder of its name there, and the whole in `compare.json`.

    Args:
        base: The frozen base model; bit for bit the same afterwards.
        placements: Names and placements.
        data: Records to train on.
        valid: Held-out records.
        settings: How to train each of them.
        fast: Which work to leave out (`layercard.fast`); all that is exact when not given.
        output: Folder for the adapters and `compare.json`; when not given, nothing is kept.
        resume: Keep the runs in `output` that are finished, go on with the one that was interrupted, and train the others.
        force: Replace what is in `output`.
        progress: Hears of the phases of `train`, each with the placement's name in front ("middle: train"), and of `compare`, in runs.

    Raises:
        PlacementError: There is no placement, two have one name, or one is for another model.
        OutputError: `output` holds a comparison already, or cannot be written.
        TrainingError: As `train`.
        DataError: Nothing held out has a labelled token.
    """
    settings = settings or TrainSettings()
    _check(base, placements)
    with _folder(output, resume, force) as folder:
        before = held_out_losses(base.model, base.pad_id, valid, progress=progress, phase="loss before")
        if not all((folder / _folder_name(name) / RUN_FILE).exists() for name, _ in placements):
            _warm_up(base, placements[0][1], data, settings)
        runs = []
        for at, (name, placement) in enumerate(placements):
            run = train(
                base,
                placement,
                data,
                folder / _folder_name(name),
                settings,
                valid=valid,
                fast=fast,
                before=before,
                resume=resume,
                force=force,
                progress=_named(progress, name),
            )
            runs.append((name, run))
            if progress is not None:
                progress("compare", at + 1, len(placements))
        result = Comparison(
            describe(base), describe_data(data), describe_data(valid), settings.to_json(), before.loss, tuple(_rows(runs, before))
        )
        if output is not None:
            write_json(folder / COMPARE_FILE, result.to_json(), force=True)
    return result


def _check(base: BaseModel, placements: list[tuple[str, Placement]]) -> None:
    if not placements:
        raise PlacementError("there is no placement to compare; name at least one")
    folders: dict[str, str] = {}
    for name, placement in placements:
        check_model(base, placement)
        folder = _folder_name(name)
        if folder in folders:
            raise PlacementError(f"placements {folders[folder]!r} and {name!r} would share the folder {folder!r}; rename one of them")
        folders[folder] = name


@contextmanager
def _folder(output: str | Path | None, resume: bool, force: bool) -> Iterator[Path]:
    """The folder for the runs: `output`, or one that is gone afterwards."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="layercard-compare-") as temporary:
            yield Path(temporary)
        return
    if resume and force:
        raise OutputError("resume goes on with a comparison and force replaces it; give one of them")
    folder = Path(output)
    refuse_existing(folder / COMPARE_FILE, force or resume)
    (folder / COMPARE_FILE).unlink(missing_ok=True)
    yield folder


def _warm_up(base: BaseModel, placement: Placement, data: Dataset, settings: TrainSettings) -> None:
    """One step that counts nowhere: libraries are loaded and kernels chosen before a clock runs."""
    few = Dataset(data.examples[: settings.batch_size], data.source, data.fingerprint)
    method = "lora" if settings.method in ("eva", "adalora") else settings.method  # these need more data, or more steps
    once = replace(settings, method=method, steps=1, epochs=None, accumulation=1, save_steps=0, report_to="none")
    with tempfile.TemporaryDirectory(prefix="layercard-warm-up-") as folder:
        train(base, placement, few, Path(folder) / "run", once)


def _rows(runs: list[tuple[str, Run]], before: RecordLosses) -> Iterator[Row]:
    whole = next((run for _, run in runs if len(run.placement["layers"]) == run.model["layers"]), None)
    for name, run in runs:
        after = _after(run, before)
        yield Row(
            name=name,
            layers=tuple(run.placement["layers"]),
            loss_reduction=_sampled(before.loss - after.loss, reduction_interval(before, after)),
            performance_kept=None if whole is None else _kept(before, after, _after(whole, before)),
            train_seconds=run.train_seconds,
            peak_memory_bytes=run.peak_memory_bytes,
            trainable_parameters=run.trainable_parameters,
            adapter_bytes=run.adapter_bytes,
            layers_in_backward=run.layers_in_backward,
            time_share=None if whole is None else 100 * run.train_seconds / whole.train_seconds,
        )


def _after(run: Run, before: RecordLosses) -> RecordLosses:
    assert run.valid is not None
    return RecordLosses(torch.tensor(run.valid["per_record"]["nats_after"], dtype=torch.float64), before.tokens)


def _kept(before: RecordLosses, after: RecordLosses, whole: RecordLosses) -> dict[str, float] | None:
    """Per cent of the reduction of all layers, with a paired interval; `None` where all layers did not reduce the loss."""
    reached, possible = before.nats - after.nats, before.nats - whole.nats
    if float(possible.sum()) <= 0:
        return None
    return _sampled(100 * float(reached.sum() / possible.sum()), ratio_interval(100 * reached, possible))


def _sampled(value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {"value": value, "low": interval[0], "high": interval[1]}


def _folder_name(name: str) -> str:
    """A name as a folder: `middle:5` lies in `middle-5`, `runs/a.json` in `a`."""
    stem = re.sub(r"\.json$", "", name.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.+-]+", "-", stem).strip(".-") or "placement"


def _named(progress: Progress | None, name: str) -> Progress | None:
    return None if progress is None else lambda phase, done, total: progress(f"{name}: {phase}", done, total)
