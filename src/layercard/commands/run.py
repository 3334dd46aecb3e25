"""`layercard run`: from model and data to a trained adapter, chosen by measuring on these data."""

from pathlib import Path
from typing import Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, out, say, show_result
from layercard.settings import DataSettings, FastSettings, LoadSettings, RunSettings, TrainSettings, setting


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
    only_plan: bool = setting(False, "Say what would be done and how long it would take, and stop.", option="--plan"),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Choose layers and learning rate by short trainings, then train.

    All layers always take part, and may win. Interrupted, the same command goes on where it was.
    """
    opt.check_data(data, valid)
    if output.is_file():
        from layercard.errors import OutputError

        raise OutputError(f"{output} is a file; name a folder for the run")
    from layercard.report.terminal import pairs
    from layercard.training.train import first_day
    from layercard.workflow.run import ADAPTER, PLAN_FILE, REPORT_FILE, clear, plan_only, run as go, write_report

    if force:
        clear(output)
    with Display() as display:
        base = opt.load(model, loading, display)
        day = first_day(output / PLAN_FILE)
        dataset = opt.read(data, base, records, reading, day)
        held_out = opt.read(valid, base, valid_records, reading, day) if valid else None

        how: dict[str, Any] = {"valid": held_out, "settings": choice, "training": settings, "fast": fast, "progress": display}
        if only_plan:
            out().print("\n".join(plan_only(base, dataset, output, **how).lines()), soft_wrap=True)
            return
        result = go(base, dataset, output, **how, tell=say)
        write_report(output)
    rows = {
        "Chosen": f"{result.chosen.name} · {len(result.chosen.layers)} layers · {result.chosen.modules} modules · "
        f"learning rate {result.chosen.learning_rate:.3g}",
        "Why": result.why,
        "Loss": f"{result.measured.loss_before:.4f} → {result.measured.loss_after:.4f} nats per labelled token",
        "Time": " · ".join(f"{name} {value:.0f} s" for name, value in result.seconds.model_dump().items() if value),
        "Memory": f"{result.peak_memory_bytes / 2**20:,.0f} MiB above the base model",
        "Files": f"{output / ADAPTER} · {output / REPORT_FILE} · {output / 'result.json'}",
        "Result": result.line(),
    }
    show_result(
        result.to_json(),
        as_json,
        pairs(rows),
        then=("eval", model, *opt.data_options(valid or ["…"]), "--adapter", output / ADAPTER),
    )
