"""One training run: a placement's adapters are trained, measured and saved, and a record says what came of it."""

import importlib.metadata
import platform
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from layercard import processes
from layercard.adapters.apply import adapted, check_model
from layercard.adapters.files import CONFIG_FILE, PLACEMENT_FILE, WEIGHTS_FILE
from layercard.adapters.methods import configuration
from layercard.adapters.start import begin, save_adapter
from layercard.data.checks import check_ids
from layercard.data.load import Dataset, collate
from layercard.errors import LayercardError, OutputError, TrainingError
from layercard.fast.fast_training import fast_training
from layercard.fast.prefix import PrefixCache
from layercard.files import LOCK_FILE, alone, read_json, shown, write_json
from layercard.measure import Phases
from layercard.models.adapted import quiet_peft
from layercard.models.load import BaseModel, Progress, describe, quiet_libraries
from layercard.models.losses import RecordLosses, extra_loss, without_router_logits
from layercard.selection.learning_rate import Length, Recommended, recommended
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.training.evaluate import describe_data, held_out_losses, reduction_interval
from layercard.training.records import Moment, Run
from layercard.training.trainer import MEASUREMENTS, check_reporters, fit, last_checkpoint

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
PLAN = f"{CHECKPOINTS}/plan.json"
"""In the folder of a run: what decides about its result."""
NEW = ".new"
"""Folder in that of a finished run where the one that replaces it works until it is finished, too."""
FILES = (CHECKPOINTS, PLACEMENT_FILE, CONFIG_FILE, WEIGHTS_FILE, RUN_FILE)
"""What a run writes into its folder."""
EARLIER: dict[str, Any] = {
    "day": None,
    "processes": 1,
    "method": "lora",
    "parameters": [],
    "ranks": {},
    "alphas": {},
    "patience": None,
    "bits": None,
}
"""What a plan means that was written before it had these keys."""
WATCH_SHARE, LEAST_WATCHED = 0.1, 24
"""What watching the held-out loss (`TrainSettings.patience`) may take of the training time, and the records below which chance decides."""
LIKE_LORA = ("lora", "rslora", "dora", "eva", "pissa", "olora", "adalora")
"""Methods that the rule for the learning rate is for."""
PACKAGES = ("layercard", "torch", "transformers", "peft", "accelerate")


def train(
    base: BaseModel,
    placement: Placement,
    data: Dataset,
    output: str | Path,
    settings: TrainSettings | None = None,
    *,
    valid: Dataset | None = None,
    fast: FastSettings | None = None,
    before: RecordLosses | None = None,
    prepare: Callable[[], AbstractContextManager[PrefixCache]] | None = None,
    moments: Sequence[int] = (),
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    phases: Phases | None = None,
) -> Run:
    """Train adapters where a placement says, and save them with a record of the run.

    The folder `output` gets the adapter as PEFT reads it (`adapter_config.json`, `adapter_model.safetensors`), `placement.json` and,
    last of all, `run.json`; checkpoints lie in `output/checkpoints`. `base` is bit for bit as before when this returns or raises,
    and so are the global random states.

    Started by `torchrun` or `accelerate launch`, the processes share every batch: each takes its part of the rows, the loss is that of the
    whole batch, and losses and adapter are those of one process, to rounding (dropout draws differ). `output` must be a folder that all
    of them see; the first one writes it.

    Args:
        base: The frozen base model.
        placement: Which modules get adapters; it must be for these weights.
        data: Records to train on.
        output: The folder to write.
        settings: How to train; the defaults of `TrainSettings` when not given.
        valid: Held-out records: gives the losses before and after, and what `settings.patience` watches.
        fast: Which work to leave out (`layercard.fast`); all that is exact when not given. It decides about time and memory, not about
            the result, so a run may be resumed with other ones.
        before: Losses of `base` on `valid` where they are known already, so that several runs need not measure them again.
        prepare: What brings the weights of `base` into memory that are needed (`streamed.upper_part`); entered once the folder is taken
            and nothing else is to be refused.
        moments: Steps after which the held-out loss is measured too, for `Run.curve`; the result is the same without.
        resume: Go on with an unfinished run of the same settings in `output`, from its last whole checkpoint, to the same adapter that
            an undisturbed run gives. A finished one is returned as it is; where there is none, a new one starts.
        force: Replace a run in `output`; an adapter that is there stays until the new one is finished.
        progress: Told of the phases `loss before` (records), `train` (steps) and `loss after` (records).
        phases: What was measured of the run before it came here (`load`); its own phases are added.

    Raises:
        PlacementError: The placement is not for this model, or the method cannot adapt what it names.
        OutputError: `output` holds a run already, or cannot be written.
        TrainingError: There is nothing to train on, the processes cannot share a batch evenly, a resumed run has other settings, memory
            runs out, or the loss is not finite.
        DataError, ModelError: As `held_out_losses`.
    """
    settings, fast, phases, output = settings or TrainSettings(), fast or FastSettings(), phases or Phases(), Path(output)
    steps, count = settings.total_steps(len(data)), processes.count()
    rate_source = "given"
    if settings.learning_rate is None:
        passes = steps * settings.batch_size * settings.accumulation / len(data)
        rate, rate_source = learning_rate(base, placement, settings, Length(steps, passes))
        settings = replace(settings, learning_rate=rate)

    # Step 1: refuse what cannot be trained before anything is written.
    if not (resume and (output / RUN_FILE).exists()):  # a finished run logs nothing more
        check_reporters(settings)
    check_model(base, placement)
    if data.labelled_tokens == 0:
        raise TrainingError(f"{data.source} has no labelled token to learn from; give records with completions")
    check_ids(base.model, data)
    if settings.batch_size % count:
        raise TrainingError(f"{count} processes cannot share a batch of {settings.batch_size} evenly; give a multiple of {count}")
    if settings.patience is not None and valid is None:
        raise TrainingError("patience watches the loss on held-out records, and there are none; give some (--valid), or leave it out")

    with processes.joined(base.device), ExitStack() as lock:
        # Step 2: take the folder for this run alone, or return the finished run that it holds.
        plan = _plan(base, placement, data, valid, settings)
        folder, finished = processes.by_first(lambda: _open_folder(output, placement, plan, resume, force, lock))
        if finished is not None:
            return finished
        checkpoints = folder / CHECKPOINTS
        started = datetime.now(UTC).isoformat(timespec="seconds")
        progress = progress if processes.is_first() else None
        try:
            prefix = lock.enter_context(prepare()) if prepare is not None else None
        except BaseException:
            if not resume and processes.is_first():  # nothing is trained yet, so that the same command may be given again
                for path in [folder] if folder.name == NEW else [folder / CHECKPOINTS, folder / PLACEMENT_FILE]:
                    _remove(path)
            raise

        # Step 3: measure the base, train, measure again and save. Every random number comes from the seed.
        if valid is not None and before is None:
            with phases.phase("loss before"):
                before = held_out_losses(base.model, base.pad_id, valid, progress=progress, phase="loss before")
        after = None
        shortest = min((example for example in data.examples if example.labelled), key=lambda example: len(example.input_ids))
        with quiet_libraries():
            notes = [line for line in [extra_loss(base.model, collate([shortest], [0], base.pad_id).to(base.device))] if line]
        config = configuration(settings, steps, placement)
        with ExitStack() as stack:
            for manager in (_seeded(settings.seed), quiet_libraries(), quiet_peft(), without_router_logits(base.model)):
                stack.enter_context(manager)
            model = stack.enter_context(adapted(base, placement, config))
            resumed = resume and last_checkpoint(checkpoints) is not None
            with phases.phase("begin"):
                begin(model, placement, data, base.pad_id, settings, checkpoints, resumed=resumed)
            passes = steps * settings.batch_size * settings.accumulation / len(data)
            with phases.phase("train"), fast_training(model, fast, passes=passes, tokens=data.tokens, tokenizer=base.tokenizer) as speed:
                how: dict[str, Any] = {"labels_only": speed.labels_only, "resume": resume, "progress": progress}
                how |= {} if prefix is None else {"expect": prefix.expect}
                if valid is not None and before is not None:
                    rows = _watched(valid, settings, steps) if settings.patience is not None and not moments else range(len(valid))
                    watched = valid.part(rows, valid.source)
                    how |= {"moments": moments, "measure": lambda: held_out_losses(model, base.pad_id, watched).loss}
                log = fit(model, data, base.pad_id, settings, checkpoints, **how)
            if valid is not None:
                with phases.phase("loss after"):
                    after = held_out_losses(model, base.pad_id, valid, progress=progress, phase="loss after")
            trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            with phases.phase("save"):
                processes.by_first(lambda: save_adapter(model, folder, settings.method, checkpoints))

        # Step 4: the record, last of all, since a folder that has it is finished.
        held_out: dict[str, Any] = {}
        if valid is not None and before is not None and after is not None:
            records = {"labelled": before.tokens.int().tolist(), "nats_before": before.nats.tolist(), "nats_after": after.nats.tolist()}
            curve = [(0, 0.0, RecordLosses(before.nats[list(rows)], before.tokens[list(rows)]).loss), *log.curve]
            if settings.patience is None:  # else the end is in it, and the adapter that was kept may be an earlier one
                curve.append((len(log.losses), log.seconds, after.loss))
            held_out = {
                "valid": describe_data(valid) | {"per_record": records, "accuracy": after.accuracy},
                "curve": [Moment(step=step, seconds=seconds, loss=loss) for step, seconds, loss in curve],
                "loss_before": before.loss,
                "loss_after": after.loss,
                "loss_reduction": before.loss - after.loss,
                "loss_reduction_interval": reduction_interval(before, after),
                "perplexity_before": before.perplexity,
                "perplexity_after": after.perplexity,
            }
        run = Run(
            started=started,
            placement=placement.to_json(),
            settings=settings.to_json(),
            learning_rate_source=rate_source,
            model=describe(base) | {"dtype": str(base.model.dtype).removeprefix("torch."), "device": str(base.device)},
            data=describe_data(data),
            steps=len(log.losses),
            tokens_seen=log.tokens,
            positions_seen=log.positions,
            losses=log.losses,
            notes=notes + log.notes,
            train_seconds=log.seconds,
            forward_seconds=log.forward_seconds,
            backward_seconds=log.backward_seconds,
            peak_memory_bytes=log.peak_bytes,
            layers_in_backward=f"{len(base.blocks) - placement.layers[0]}/{len(base.blocks)}",
            fast=fast.to_json() | {"did": ({} if prefix is None else {"stream": str(prefix)}) | speed.to_json()},
            trainable_parameters=trainable,
            adapter_bytes=(folder / WEIGHTS_FILE).stat().st_size,
            processes=count,
            phases=phases.to_json(),
            versions=versions(),
            **held_out,
        )

        def finish() -> None:
            run.save(folder / RUN_FILE, force=True)
            _take_place(output)

        processes.by_first(finish)
        return processes.of_first(run)


def _watched(valid: Dataset, settings: TrainSettings, steps: int) -> list[int]:
    """The held-out records that a run is watched by: the first, so many that ten measurements take `WATCH_SHARE` of the training.

    Without a backward pass a record takes a third of what it takes in training.
    """
    trained = steps * settings.batch_size * settings.accumulation
    count = max(LEAST_WATCHED, int(3 * WATCH_SHARE * trained / MEASUREMENTS))
    return [row for row, example in enumerate(valid.examples) if example.labelled][:count]


def learning_rate(base: BaseModel, placement: Placement, settings: TrainSettings, length: Length) -> Recommended:
    """The learning rate of a run that is given none: the placement's, or the rule's, which is for LoRA; for other methods a fixed one."""
    has_own = placement.learning_rate is not None and placement.learning_rate_source != "rule"
    if settings.method not in LIKE_LORA and not has_own:
        return Recommended(settings.rate, f"fixed for {settings.method}, for which there is no rule")
    width = base.model.get_input_embeddings().weight.shape[1]
    return recommended(placement, width, length, settings.rank)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about a run."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _plan(base: BaseModel, placement: Placement, data: Dataset, valid: Dataset | None, settings: TrainSettings) -> dict[str, Any]:
    """All that decides about the result of a run, as flat keys: two runs with equal plans are the same run."""
    return {
        "schema": "layercard-plan/1",
        "model": base.fingerprint,
        "dtype": str(base.model.dtype),
        "bits": base.bits,
        "layers": list(placement.layers),
        "paths": sorted(placement.paths),
        "parameters": sorted(placement.parameters),
        "ranks": dict(placement.rank_pattern),
        "alphas": dict(placement.alpha_pattern),
        "day": data.day or (valid.day if valid is not None else None),
        "data": data.fingerprint,
        "valid": None if valid is None else valid.fingerprint,
        **settings.deciding(),
        "processes": processes.count() if settings.dropout else 1,  # without dropout their number decides nothing
    }


def first_day(*plans: Path) -> date | None:
    """The day that the chat template printed when the run of one of these plans began, so that it is resumed with the same tokens."""
    for path in plans:
        day = read_json(path, TrainingError, "plan").get("day") if path.exists() else None
        try:
            if day:
                return date.fromisoformat(day)
        except (TypeError, ValueError):
            raise TrainingError(f"{path} says that its day is {shown(day)}; start over with --force") from None
    return None


def _open_folder(
    output: Path, placement: Placement, plan: dict[str, Any], resume: bool, force: bool, lock: ExitStack
) -> tuple[Path, Run | None]:
    """Take `output` for this run until `lock` is closed: the folder to work in, and the finished run to resume where there is one."""
    if resume and force:
        raise OutputError("resume goes on with a run and force replaces it; give one of them")
    if output.is_file():
        raise OutputError(f"{output} is a file; name a folder for the adapter")
    folder = output
    try:
        lock.enter_context(alone(output))
        _take_place(output)
        occupied = any(path.name != LOCK_FILE for path in output.iterdir())
        if occupied and resume:
            folder = output / NEW if not _other_plan(output / NEW, plan) else output
            other = _other_plan(folder, plan)
            if other:
                raise (TrainingError if (folder / PLAN).exists() else OutputError)(f"{output} {other}")
            if (folder / RUN_FILE).exists():
                return folder, Run.load(folder / RUN_FILE)
        elif occupied:
            names = [name for name in FILES if (output / name).exists()]
            if not force:
                raise OutputError(f"{output} {_occupied(names)}")
            shutil.rmtree(output / NEW, ignore_errors=True)
            if RUN_FILE in names or WEIGHTS_FILE in names:  # an adapter stays until the next one is finished
                folder = output / NEW
            else:
                for name in names:
                    _remove(output / name)
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write the folder {output}: {error.strerror or error}; choose another output") from error
    write_json(folder / PLAN, plan, force=True)
    placement.save(folder / PLACEMENT_FILE, force=True)
    return folder, None


def _other_plan(folder: Path, plan: dict[str, Any]) -> str:
    """Why the run in `folder` is not one of this plan, and what to do; empty where it is."""
    path = folder / PLAN
    if not path.exists():
        return "holds no run to resume; name the folder of an unfinished run, or pass --force to start one there"
    other = other_run(path, plan, TrainingError)
    return f"{other}; resume it as it was, or pass --force" if other else ""


def other_run(path: Path, plan: dict[str, Any], error: type[LayercardError]) -> str:
    """In what the run whose plan is the file `path` differs from `plan`; empty where it is the same. `error` is for a broken file."""
    earlier = EARLIER | read_json(path, error, "plan")
    for name, value in plan.items():
        if earlier.get(name) != value:
            was, now = (text if len(text) <= 40 else text[:37] + "…" for text in (str(earlier.get(name)), str(value)))
            return f"is a run with {name} {was}, not {now}"
    return ""


def _occupied(names: list[str]) -> str:
    """Why a folder with these files of a run is not written to."""
    if RUN_FILE in names:
        return "holds a finished run; name another output or pass --force to replace it"
    if CHECKPOINTS in names:
        return "holds an unfinished run; pass --resume to go on with it or --force to start again"
    return "is not empty; name another output or pass --force to write there"


def _take_place(output: Path) -> None:
    """Put a finished run in `NEW` in the place of the earlier one; where a kill has cut this short, it is done again."""
    if (output / NEW / RUN_FILE).exists():
        for name in FILES:  # the record last of all: while it is in `NEW`, there is something to do
            if (output / NEW / name).exists():
                if name == CHECKPOINTS:
                    _remove(output / name)
                (output / NEW / name).replace(output / name)
        shutil.rmtree(output / NEW)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators, and put their states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
