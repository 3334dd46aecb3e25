"""`layercard train`: adapters in the layers of a placement, and nowhere else."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.processes import is_first
from layercard.settings import DataSettings, FastSettings, LoadSettings, TrainSettings, setting

if TYPE_CHECKING:
    from layercard.training.records import Run


def train(
    model: str = opt.MODEL,
    data: str = opt.DATA,
    placement: Path = setting(..., "A placement that `layercard select` wrote."),
    output: Path = setting(..., "Folder for the adapter, the placement and the run record.", metavar="DIR"),
    valid: str | None = setting(None, "Held-out records, given as --data is: the loss before and after.", metavar="FILE"),
    records: int | None = opt.RECORDS,
    valid_records: int | None = opt.VALID_RECORDS,
    reading: DataSettings = DataSettings(),
    experts: bool = opt.EXPERTS,
    settings: TrainSettings = opt.TRAINING,
    fast: FastSettings = FastSettings(),
    stock: bool = opt.STOCK,
    loading: LoadSettings = LoadSettings(),
    resume: bool = opt.RESUME,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Train adapters in the layers of a placement. The folder loads with plain PEFT.

    Under `torchrun` or `accelerate launch` all processes share every batch: losses and adapter are those of one process.
    """
    # What cannot work is refused before anything heavy is imported.
    if is_first():
        opt.check_folder(output, resume=resume, force=force)
    opt.check_data(data, valid)
    fast = opt.fast_or_stock(fast, stock)
    from layercard.selection.placement import Placement

    chosen = Placement.load(placement)
    from layercard.adapters.apply import without_experts
    from layercard.measure import Phases
    from layercard.training.train import train as run

    phases = Phases()
    with Display() as display:
        with phases.phase("load"):
            base = opt.load(model, loading, display)
        with phases.phase("data"):
            dataset = opt.read(data, base, records, reading)
            held_out = opt.read(valid, base, valid_records, reading) if valid else None
        record = run(
            base,
            chosen if experts else without_experts(chosen),
            dataset,
            output,
            settings,
            valid=held_out,
            fast=fast,
            resume=resume,
            force=force,
            progress=display,
            phases=phases,
        )
    if is_first():
        then = f"layercard eval {model} --data {valid or '…'} --adapter {output}"
        show_result(record.to_json(), as_json, _view(record, output), then=then)


def _view(record: "Run", output: Path) -> Any:
    from layercard.report.terminal import pairs

    layers = record.placement["layers"]
    method = record.settings["method"]
    rows = {"Adapter": f"{output} · {method} · layers {' '.join(map(str, layers))} · {record.trainable_parameters:,} parameters"}
    if record.loss_reduction is not None and record.loss_reduction_interval is not None:
        low, high = record.loss_reduction_interval
        rows["Loss"] = f"{record.loss_before:.4f} → {record.loss_after:.4f} nats per labelled token"
        rows["Reduction"] = f"{record.loss_reduction:.4f} ({low:.4f} to {high:.4f})"
    if record.fast["did"]:
        rows["Left out"] = "\n".join(record.fast["did"].values())
    rows["Training"] = f"{record.steps} steps in {record.train_seconds:.1f} s · layers in backward {record.layers_in_backward}"
    rows["Size"] = f"{record.adapter_bytes / 2**20:.2f} MiB · peak memory {record.peak_memory_bytes / 2**20:,.0f} MiB above the base model"
    return pairs(rows)
