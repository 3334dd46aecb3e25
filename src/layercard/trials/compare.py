"""Placements side by side: each trained from the same seed on the same records, measured on the same held-out ones."""

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layercard.adapters.apply import check_model
from layercard.data.load import Dataset
from layercard.errors import OutputError, PlacementError
from layercard.files import refuse_existing
from layercard.models.load import BaseModel, Progress, describe
from layercard.records import Estimate
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.statistics.ratios import ratio_interval
from layercard.training.evaluate import describe_data
from layercard.training.train import RUN_FILE, train, versions
from layercard.trials.records import Comparison, TrialRecord
from layercard.trials.trial import Task, Trial, measure

COMPARE_FILE = "compare.json"


def compare(
    base: BaseModel,
    placements: Sequence[tuple[str, Placement]],
    data: Dataset,
    valid: Dataset,
    settings: TrainSettings | None = None,
    *,
    fast: FastSettings | None = None,
    prepare: Callable[[], AbstractContextManager[object]] | None = None,
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
        prepare: As in `train`: entered once, for all placements.
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
    # Step 1: every placement fits the model and has a folder of its own, and nothing that is there would be lost without need.
    if not placements:
        raise PlacementError("there is no placement to compare; name at least one")
    names: dict[str, str] = {}
    for name, placement in placements:
        check_model(base, placement)
        if (own_folder := folder_name(name)) in names:
            raise PlacementError(f"placements {names[own_folder]!r} and {name!r} would share the folder {own_folder!r}; rename one of them")
        names[own_folder] = name
    if output is not None and resume and force:
        raise OutputError("resume goes on with a comparison and force replaces it; give one of them")
    if output is not None:
        refuse_existing(Path(output) / COMPARE_FILE, force or resume)

    task = Task("", base, data, {"valid": valid}, fast or FastSettings(), moments=0)
    with ExitStack() as stack:
        folder = Path(output or stack.enter_context(tempfile.TemporaryDirectory(prefix="layercard-compare-")))

        if prepare is not None:
            stack.enter_context(prepare())

        # Step 2: measure the base, and run one step that counts nowhere: libraries are loaded and kernels chosen before a clock runs.
        before = task.before("valid", progress)
        if not all((folder / name / RUN_FILE).exists() for name in names):
            few = Dataset(data.examples[: settings.batch_size], data.source, data.fingerprint)
            method = "lora" if settings.method in ("eva", "adalora") else settings.method  # these need more data, or more steps
            once = replace(settings, method=method, steps=1, epochs=None, accumulation=1, save_steps=0, report_to="none")
            with tempfile.TemporaryDirectory(prefix="layercard-warm-up-") as aside:
                train(base, placements[0][1], few, Path(aside) / "run", once, fast=task.fast)

        # Step 3: one trial a placement.
        rows: list[TrialRecord] = []
        for own_folder, (name, placement) in zip(names, placements, strict=True):
            trial = Trial("", placement.layers, settings, split="valid", placement=placement)
            how: dict[str, Any] = {"name": name, "resume": resume, "force": force, "progress": _prefixed(progress, name)}
            rows.append(measure(task, trial, folder / own_folder, **how))
            if progress is not None:
                progress("compare", len(rows), len(placements))

        # Step 4: what each keeps of all layers. Only now is an earlier comparison replaced.
        result = Comparison(
            model=describe(base),
            data=describe_data(data),
            valid=describe_data(valid),
            settings=settings.to_json(),
            loss_before=before.loss,
            rows=_compared(rows, len(base.blocks)),
            versions=versions(),
        )
        if output is not None:
            result.save(folder / COMPARE_FILE, force=True)
    return result


def _compared(rows: Sequence[TrialRecord], num_layers: int) -> tuple[TrialRecord, ...]:
    """The rows with what each kept of the run of all layers and took of its time, if there is one."""
    every = next((row for row in rows if len(row.layers) == num_layers), None)
    if every is None:
        return tuple(rows)

    def reached(row: TrialRecord) -> torch.Tensor:
        nats = row.valid["per_record"]
        return torch.tensor(nats["nats_before"], dtype=torch.float64) - torch.tensor(nats["nats_after"], dtype=torch.float64)

    possible, compared = reached(every), []
    for row in rows:
        parts: dict[str, Any] = {"time_share": 100 * (row.train_seconds or 0.0) / (every.train_seconds or 1.0)}
        if float(possible.sum()) > 0:  # else all layers did not reduce the loss
            low, high = ratio_interval(100 * reached(row), possible)
            parts["performance_kept"] = Estimate(value=100 * float(reached(row).sum() / possible.sum()), low=low, high=high)
        compared.append(row.model_copy(update=parts))
    return tuple(compared)


def folder_name(name: str) -> str:
    """A name as a folder: `middle:5` lies in `middle-5`, `runs/a.json` in `a`."""
    stem = re.sub(r"\.json$", "", name.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.+-]+", "-", stem).strip(".-") or "placement"


def _prefixed(progress: Progress | None, name: str) -> Progress | None:
    return None if progress is None else lambda phase, done, total: progress(f"{name}: {phase}", done, total)
