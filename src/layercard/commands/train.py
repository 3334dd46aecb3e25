"""`layercard train`: adapters in the layers of a placement, and nowhere else."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.processes import is_first
from layercard.settings import TrainSettings


def train(
    model: opt.ModelName,
    data: opt.Data,
    placement: Annotated[Path, typer.Option("--placement", metavar="FILE", help="A placement that `layercard select` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the adapter, the placement and the run record.")
    ],
    valid: Annotated[
        str | None, typer.Option("--valid", metavar="FILE", help="Held-out records, given as --data is: the loss before and after.")
    ] = None,
    records: opt.Records = None,
    valid_records: opt.ValidRecords = None,
    method: opt.Method = "lora",
    experts: opt.Experts = True,
    rank: opt.Rank = 8,
    alpha: opt.Alpha = 16.0,
    dropout: opt.Dropout = 0.0,
    learning_rate: opt.LearningRate = 2e-3,
    steps: opt.Steps = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = 4,
    accumulation: opt.Accumulation = 1,
    max_length: opt.MaxLength = 1024,
    bf16: opt.Bf16 = False,
    cut: opt.Cut = True,
    prefix_cache: opt.PrefixCache = True,
    cache: opt.CacheFolder = None,
    cache_gb: opt.CacheSize = None,
    unpadded: opt.Unpadded = True,
    labels_only: opt.LabelsOnly = True,
    fused_lora: opt.FusedLora = True,
    stock: opt.Stock = False,
    report_to: opt.ReportTo = "none",
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    trust_remote_code: opt.TrustRemoteCode = False,
    seed: opt.Seed = 0,
    resume: opt.Resume = False,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Train adapters in the layers of a placement. The folder loads with plain PEFT.

    Under `torchrun` or `accelerate launch` all processes share every batch: losses and adapter are those of one process.
    """
    if is_first():
        opt.check_folder(output, resume=resume, force=force)
    opt.check_data(data, valid)
    spare = opt.spared(cut, prefix_cache, cache, cache_gb, unpadded, labels_only, fused_lora, stock)
    settings = TrainSettings(
        method=method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        learning_rate=learning_rate,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        bf16=bf16,
        report_to=report_to,
    )
    from layercard.selection.placement import Placement

    chosen = Placement.load(placement)
    from layercard.adapters.apply import without_experts
    from layercard.data.load import load_data
    from layercard.measure import Phases
    from layercard.models.load import load_model
    from layercard.profiling.workload import training_work
    from layercard.training.train import train as run

    phases = Phases()
    with Display() as display:
        with phases.phase("load"):
            base = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=display)
        with phases.phase("data"):
            dataset = load_data(data, base.tokenizer, records=records, max_length=max_length, classes=base.classes)
            held_out = (
                load_data(valid, base.tokenizer, records=valid_records, max_length=max_length, classes=base.classes) if valid else None
            )
        chosen = chosen if experts else without_experts(chosen)
        display.expect(training_work(dataset, held_out, settings))
        record = run(
            base,
            chosen,
            dataset,
            output,
            settings,
            valid=held_out,
            spare=spare,
            resume=resume,
            force=force,
            progress=display,
            phases=phases,
        )
    if not is_first():
        return
    if as_json:
        emit_json(record)
        return
    console = out()
    console.print(_view(record, output))
    held = f" --data {valid}" if valid else " --data …"
    console.print(f"next: layercard eval {model}{held} --adapter {output}", style="dim", soft_wrap=True)


def _view(record: dict[str, Any], output: Path) -> Any:
    from layercard.report.terminal import pairs

    layers = record["placement"]["layers"]
    method = record["settings"]["method"]
    rows = {"Adapter": f"{output} · {method} · layers {' '.join(map(str, layers))} · {record['trainable_parameters']:,} parameters"}
    if record.get("loss_reduction") is not None:
        low, high = record["loss_reduction_interval"]
        rows["Loss"] = f"{record['loss_before']:.4f} → {record['loss_after']:.4f} nats per labelled token"
        rows["Reduction"] = f"{record['loss_reduction']:.4f} ({low:.4f} to {high:.4f})"
    if record["fast"]["did"]:
        rows["Spared"] = "\n".join(record["fast"]["did"].values())
    rows["Training"] = f"{record['steps']} steps in {record['train_seconds']:.1f} s · layers in backward {record['layers_in_backward']}"
    rows["Size"] = (
        f"{record['adapter_bytes'] / 2**20:.2f} MiB · peak memory {record['peak_memory_bytes'] / 2**20:,.0f} MiB above the base model"
    )
    return pairs(rows)
