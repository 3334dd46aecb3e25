"""Placements side by side: each trained from the same seed on the same records, measured on the same held-out ones."""

import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from layercard.adapters.apply import check_model
from layercard.data.load import Dataset
from layercard.errors import OutputError, PlacementError, TrainingError
from layercard.files import refuse_existing
from layercard.models.load import BaseModel, Progress, describe
from layercard.models.losses import RecordLosses
from layercard.records import Estimate, Part, Record
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.statistics.ratios import ratio_interval
from layercard.training.evaluate import describe_data, held_out_losses, reduction_interval
from layercard.training.records import Run
from layercard.training.train import RUN_FILE, train, versions

COMPARE_FILE = "compare.json"


class Compared(Part):
    """One placement's result.

    `loss_reduction` is in nats per labelled token, against the frozen base. `performance_kept` and `time_share` are in per cent of all
    layers, `None` where all layers were not trained. The rest is as in the run's record (`Run`).
    """

    name: str
    layers: tuple[int, ...]
    loss_reduction: Estimate
    performance_kept: Estimate | None
    train_seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    adapter_bytes: int
    layers_in_backward: str
    time_share: float | None


class Comparison(Record):
    """Results of several placements on one model and data set, a row each in the order given; `loss_before` is that of the frozen base."""

    error: ClassVar = TrainingError
    noun: ClassVar = "comparison"
    made_by: ClassVar = "layercard compare"
    schema_: Literal["layercard-compare/1"] = Field(default="layercard-compare/1", alias="schema")
    model: dict[str, Any]
    data: dict[str, Any]
    valid: dict[str, Any]
    settings: dict[str, Any]
    loss_before: float
    rows: tuple[Compared, ...]
    versions: dict[str, str]


def compare(
    base: BaseModel,
    placements: Sequence[tuple[str, Placement]],
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
    process does only once. With `output` each run is kept in a folder of its name there, and all results in `compare.json`.

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
    # Every placement fits the model and has a folder of its own.
    if not placements:
        raise PlacementError("there is no placement to compare; name at least one")
    names: dict[str, str] = {}
    for name, placement in placements:
        check_model(base, placement)
        if (folder_name := _folder_name(name)) in names:
            raise PlacementError(
                f"placements {names[folder_name]!r} and {name!r} would share the folder {folder_name!r}; rename one of them"
            )
        names[folder_name] = name
    with ExitStack() as stack:
        if output is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="layercard-compare-")))
        else:
            if resume and force:
                raise OutputError("resume goes on with a comparison and force replaces it; give one of them")
            folder = Path(output)
            refuse_existing(folder / COMPARE_FILE, force or resume)
            (folder / COMPARE_FILE).unlink(missing_ok=True)
        before = held_out_losses(base.model, base.pad_id, valid, progress=progress, phase="loss before")
        if not all((folder / name / RUN_FILE).exists() for name in names):
            _warm_up(base, placements[0][1], data, settings)
        runs = []
        for done, (folder_name, (name, placement)) in enumerate(zip(names, placements, strict=True)):
            runs.append(
                train(
                    base,
                    placement,
                    data,
                    folder / folder_name,
                    settings,
                    valid=valid,
                    fast=fast,
                    before=before,
                    resume=resume,
                    force=force,
                    progress=_prefixed(progress, name),
                )
            )
            if progress is not None:
                progress("compare", done + 1, len(placements))
        result = Comparison(
            model=describe(base),
            data=describe_data(data),
            valid=describe_data(valid),
            settings=settings.to_json(),
            loss_before=before.loss,
            rows=_rows([name for name, _ in placements], runs, before),
            versions=versions(),
        )
        if output is not None:
            result.save(folder / COMPARE_FILE, force=True)
    return result


def _warm_up(base: BaseModel, placement: Placement, data: Dataset, settings: TrainSettings) -> None:
    """One step that counts nowhere: libraries are loaded and kernels chosen before a clock runs."""
    few = Dataset(data.examples[: settings.batch_size], data.source, data.fingerprint)
    method = "lora" if settings.method in ("eva", "adalora") else settings.method  # these need more data, or more steps
    once = replace(settings, method=method, steps=1, epochs=None, accumulation=1, save_steps=0, report_to="none")
    with tempfile.TemporaryDirectory(prefix="layercard-warm-up-") as folder:
        train(base, placement, few, Path(folder) / "run", once)


def _rows(names: Sequence[str], runs: Sequence[Run], before: RecordLosses) -> tuple[Compared, ...]:
    """The runs with what each reached, and what it kept of the run of all layers if there is one."""
    nats = [torch.tensor((run.valid or {})["per_record"]["nats_after"], dtype=torch.float64) for run in runs]
    everything = next((row for row, run in enumerate(runs) if len(run.placement["layers"]) == run.model["layers"]), None)
    possible = None if everything is None else before.nats - nats[everything]
    rows = []
    for name, run, left in zip(names, runs, nats, strict=True):
        after = RecordLosses(left, before.tokens)
        low, high = reduction_interval(before, after)
        performance = None
        if possible is not None and float(possible.sum()) > 0:  # else all layers did not reduce the loss
            reached = 100 * (before.nats - left)
            kept_low, kept_high = ratio_interval(reached, possible)
            performance = Estimate(value=float(reached.sum() / possible.sum()), low=kept_low, high=kept_high)
        rows.append(
            Compared(
                name=name,
                layers=tuple(run.placement["layers"]),
                loss_reduction=Estimate(value=before.loss - after.loss, low=low, high=high),
                performance_kept=performance,
                time_share=None if everything is None else 100 * run.train_seconds / runs[everything].train_seconds,
                train_seconds=run.train_seconds,
                peak_memory_bytes=run.peak_memory_bytes,
                trainable_parameters=run.trainable_parameters,
                adapter_bytes=run.adapter_bytes,
                layers_in_backward=run.layers_in_backward,
            )
        )
    return tuple(rows)


def _folder_name(name: str) -> str:
    """A name as a folder: `middle:5` lies in `middle-5`, `runs/a.json` in `a`."""
    stem = re.sub(r"\.json$", "", name.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.+-]+", "-", stem).strip(".-") or "placement"


def _prefixed(progress: Progress | None, name: str) -> Progress | None:
    return None if progress is None else lambda phase, done, total: progress(f"{name}: {phase}", done, total)
