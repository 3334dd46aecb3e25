"""`layercard cost`: what training a placement costs on this machine, or on a device whose rates are known."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.errors import ModelError
from layercard.files import refuse_existing

if TYPE_CHECKING:
    from layercard.cost.model import CostModel
    from layercard.models.load import Progress

LENGTH = 128
"""Tokens of a row of random tokens."""
LONGEST = 1024
"""Tokens at which a record is cut."""
RECORDS = 64
"""Records of which the usual batch is taken."""


def cost(
    model: opt.ModelName,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write the cost model.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Take the batch from these records; random tokens when not given."),
    ] = None,
    batch_size: opt.BatchSize = 4,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", min=2, metavar="N", help=f"Tokens of a row; {LENGTH} when not given, and with --data the longest allowed."
        ),
    ] = None,
    rank: opt.Rank = 8,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="How often each kind of step is timed.")] = 3,
    meta: Annotated[
        bool,
        typer.Option(
            "--meta",
            help="Without weights: MODEL is a config.json, a folder with one, an id on the hub, gpt2-medium or qwen3-8b. Measured with "
            "random weights where they fit the memory, else estimated from FLOPs and bytes. Only a config.json is ever fetched.",
        ),
    ] = False,
    flops: Annotated[float | None, typer.Option("--flops", metavar="X", help="With --meta: FLOP/s of another device.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", metavar="X", help="With --meta: bytes/s of its memory.")] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure what a training step costs: time, memory, adapter size and added latency of any placement.

    A few training steps run with adapters in all layers, in the last one, and in none; what lies between follows. Backward
    stops at the lowest adapted layer, so layers near the output are cheap. Nothing of the model is changed.
    """
    if output is not None:
        refuse_existing(output, force)
    if (flops is None) != (bandwidth is None):
        raise typer.BadParameter("--flops and --bandwidth belong together; give both or neither")
    if not meta and flops is not None:
        raise typer.BadParameter("--flops and --bandwidth describe another device; give --meta too")
    if meta and data is not None:
        raise typer.BadParameter("--meta has no tokenizer for --data; give --batch-size and --length")
    opt.check_data(data)
    wanted = _Wanted(model, batch_size, length, rank, repeats, device, dtype)
    with Display() as display:
        if not meta:
            found = _measured(wanted, data, display)
        elif flops is None or bandwidth is None:
            found = _random(wanted, display)
        else:
            found = _estimated(wanted, flops, bandwidth)
    if output is not None:
        found.save(output, force=force)
    if as_json:
        emit_json(found.to_json())
        return
    from layercard.report.costs import cost_view

    console = out()
    console.print(cost_view(found))
    if output is not None:
        console.print(f"wrote {output}", style="dim", soft_wrap=True)


@dataclass(frozen=True)
class _Wanted:
    """What is to be measured, as the command line says it."""

    model: str
    batch_size: int
    length: int | None
    rank: int
    repeats: int
    device: str
    dtype: str


def _measured(wanted: _Wanted, data: str | None, progress: "Progress") -> "CostModel":
    from layercard.cost.measure import measure_cost, random_batch, usual_batch
    from layercard.data.load import load_data
    from layercard.errors import DataError
    from layercard.models.load import load_model

    base = load_model(wanted.model, device=wanted.device, dtype=wanted.dtype, progress=progress)
    if data is None and base.classes is not None:
        raise DataError(f"{wanted.model} is a classifier, so a step needs texts with their classes; name some with --data")
    if data is None:
        batch = random_batch(base.model.get_input_embeddings().weight.shape[0], wanted.batch_size, wanted.length or LENGTH)
    else:
        dataset = load_data(data, base.tokenizer, records=RECORDS, max_length=wanted.length or LONGEST, classes=base.classes)
        batch = usual_batch(dataset.examples, wanted.batch_size, base.pad_id)
    return measure_cost(base, batch, rank=wanted.rank, repeats=wanted.repeats, progress=progress)


def _estimated(wanted: _Wanted, flops: float, bandwidth: float, device: str = "") -> "CostModel":
    from layercard.cost.estimate import estimated_cost
    from layercard.models.skeleton import empty_model, read_config

    return estimated_cost(
        empty_model(read_config(wanted.model), wanted.model),
        flops=flops,
        bandwidth=bandwidth,
        name=wanted.model,
        dtype=wanted.dtype,
        device=device,
        batch_size=wanted.batch_size,
        length=wanted.length or LENGTH,
        rank=wanted.rank,
    )


def _random(wanted: _Wanted, progress: "Progress") -> "CostModel":
    """Measured with random weights; where they do not fit, estimated with this device's rates."""
    import torch

    from layercard.cost.estimate import device_rates, fits
    from layercard.cost.measure import device_name, measure_cost, random_batch
    from layercard.models.load import find_device
    from layercard.models.skeleton import random_model, read_config

    if wanted.dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {wanted.dtype!r} has no meaning without weights; choose float32, bfloat16 or float16")
    dtype, device, length = getattr(torch, wanted.dtype), find_device(wanted.device), wanted.length or LENGTH
    flops, bandwidth = device_rates(device, dtype, rows=wanted.batch_size * length)
    estimate = _estimated(wanted, flops, bandwidth, device_name(device))
    if not fits(estimate, device):
        return estimate
    base = random_model(read_config(wanted.model), wanted.model, device, dtype)
    batch = random_batch(base.model.get_input_embeddings().weight.shape[0], wanted.batch_size, length)
    return measure_cost(base, batch, rank=wanted.rank, repeats=wanted.repeats, progress=progress)
