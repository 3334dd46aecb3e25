"""`layercard run` and `layercard tune`: where and how to adapt, chosen by short trainings on the user's own data."""

import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, out, say, show_result
from layercard.errors import OutputError
from layercard.settings import DataSettings, FastSettings, LoadSettings, RunSettings, TrainSettings, setting

STEP_BY_STEP = f"{opt.FEWER_BYTES}; profile, select and train do a run's work in steps, with --stream for a model on disk"

if TYPE_CHECKING:
    from datetime import date

    from layercard.data.load import Dataset
    from layercard.models.load import BaseModel


def run(
    model: str = opt.MODEL,
    data: list[str] = opt.DATA,
    output: Path = setting(..., "Folder for everything: card, race, placement, adapter, report and result.", metavar="DIR"),
    valid: list[str] | None = setting(None, f"{opt.VALID[:-1]}; a tenth of the data when not given.", metavar="FILE"),
    records: int | None = opt.RECORDS,
    valid_records: int | None = opt.VALID_RECORDS,
    choice: RunSettings = RunSettings(),
    reading: DataSettings = DataSettings(),
    settings: TrainSettings = opt.TRAINING,
    fast: FastSettings = FastSettings(),
    loading: LoadSettings = LoadSettings(),
    workers: int = setting(1, "Short trainings at a time.", low=1),
    ray: str | None = setting(None, "Run the short trainings on this Ray cluster; local starts one on this machine.", metavar="ADDRESS"),
    recipe: Path | None = setting(
        None, "A YAML file with options, each under its name; those on the command line go first.", metavar="FILE"
    ),
    save_recipe: Path | None = setting(None, "Write all options of this call as a recipe.", metavar="FILE"),
    only_plan: bool = setting(False, "Say what would be done and how long it would take, and stop.", option="--plan"),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Choose layers and learning rate by short trainings, then train.

    All layers always take part, and may win. Interrupted, the same command goes on where it was.
    """
    inputs = Inputs(model, data, valid, records, valid_records, reading, loading)
    how: dict[str, Any] = {"settings": choice, "training": settings, "fast": fast}
    with Display() as display:
        base, dataset, held_out, where = _opened(inputs, output, workers, ray, force and not only_plan, display)
        from layercard.report.terminal import pairs
        from layercard.workflow.run import ADAPTER, REPORT_FILE, plan_only, run as go, write_report

        how |= {"valid": held_out, "progress": display}
        if only_plan:
            out().print("\n".join(plan_only(base, dataset, output, **how).lines()), soft_wrap=True)
            return
        result = go(base, dataset, output, **how, **where, tell=say)
        write_report(output, [shlex.join(["layercard", *sys.argv[1:]])])
    rows = {
        "Chosen": f"{result.chosen.name} · {len(result.chosen.layers)} layers · {result.chosen.modules} modules · "
        f"learning rate {result.chosen.learning_rate:.3g}",
        "Why": result.why,
        "Loss": f"{result.measured.loss_before:.4f} → {result.measured.loss_after:.4f} nats per labelled token",
        "Time": " · ".join(f"{name} {value:.0f} s" for name, value in result.seconds.model_dump().items() if value >= 0.5),
        "Memory": f"{result.peak_memory_bytes / 2**20:,.0f} MiB above the base model",
        "Files": " · ".join(str(path) for path in (output / ADAPTER, output / REPORT_FILE, output / "result.json")),
        "Result": result.line(),
    }
    adapter = str(output / ADAPTER)
    then = ["eval", model, *opt.data_options(valid), "--adapter", adapter] if valid else ["verify", adapter, "--model", model]
    show_result(result, as_json, pairs(rows), then=then)


@opt.options_of(run, output=setting(..., "Folder for card, race and placement.", metavar="DIR"), only_plan=None)
def tune(**given: Any) -> None:
    """Choose layers and learning rate by short trainings.

    Does what `run` does before it trains. The placement has the learning rate that `train` and the exports then use; steps or epochs are
    those of that training.
    """
    output: Path = given["output"]
    inputs = Inputs(**{name: given[name] for name in Inputs.__dataclass_fields__})
    with Display() as display:
        base, dataset, held_out, where = _opened(inputs, output, given["workers"], given["ray"], given["force"], display)
        from layercard.report.terminal import pairs
        from layercard.workflow.run import PLACEMENT_FILE, tune as go

        how: dict[str, Any] = {"settings": given["choice"], "training": given["settings"], "fast": given["fast"]}
        tuned = go(base, dataset, output, valid=held_out, progress=display, tell=say, **how, **where)
    chosen = tuned.chosen
    rows = {
        "Chosen": f"{chosen.name} · {len(chosen.layers)} layers · {chosen.modules} modules · learning rate {chosen.learning_rate:.3g}",
        "Why": tuned.why,
    }
    value = tuned.race.to_json() if tuned.race is not None else {"schema": "layercard-race/1", "chosen": chosen.model_dump(mode="json")}
    placement = str(output / PLACEMENT_FILE)
    train = ["train", inputs.model, *opt.data_options(inputs.data), "--placement", placement, "--steps", str(tuned.plan.steps)]
    show_result(value, as_json=given["as_json"], view=pairs(rows), wrote=placement, then=[*train, "-o", "adapter"])


@dataclass(frozen=True)
class Inputs:
    """Which model and records a command reads, in this process or in a worker."""

    model: str
    data: list[str]
    valid: list[str] | None
    records: int | None
    valid_records: int | None
    reading: DataSettings
    loading: LoadSettings

    def read(self, day: "date | None", display: "Display | None" = None) -> "tuple[BaseModel, Dataset, Dataset | None]":
        """Model, records and held-out records, with the day that a chat template printed when the run began."""
        with nullcontext(display) if display is not None else Display() as progress:
            base = opt.load(self.model, self.loading, progress, mend=STEP_BY_STEP)
        held_out = opt.read(self.valid, base, self.valid_records, self.reading, day) if self.valid else None
        return base, opt.read(self.data, base, self.records, self.reading, day), held_out


def _opened(
    inputs: Inputs, output: Path, workers: int, ray: str | None, force: bool, display: Display
) -> "tuple[BaseModel, Dataset, Dataset | None, dict[str, Any]]":
    """Model, records, held-out records, and where the short trainings run; what cannot work is refused before the model is loaded."""
    opt.check_data(inputs.data, inputs.valid, columns=inputs.reading.columns)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is not a folder; name a folder for the run")
    from layercard.training.train import first_day
    from layercard.trials.workers import Workers
    from layercard.workflow.run import PLAN_FILE, clear

    day = None if force else first_day(output / PLAN_FILE)
    base, dataset, held_out = inputs.read(day, display)
    if force:  # now that all that may be refused was read
        clear(output)
    apart = workers > 1 or ray is not None
    return base, dataset, held_out, {"workers": Workers(workers, ray), "open_records": partial(inputs.read, day) if apart else None}
