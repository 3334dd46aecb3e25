"""`layercard cost`: what training a placement costs on this machine, or on a device whose rates are given."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.errors import DataError, ModelError
from layercard.settings import DataSettings, LoadSettings, setting

if TYPE_CHECKING:
    from layercard.cost.model import CostModel

LENGTH = 128
"""Tokens of a row of random tokens."""
LONGEST = 1024
"""Tokens at which a record is cut."""
RECORDS = 64
"""Records of which the usual batch is taken."""


def cost(
    model: str = opt.MODEL,
    output: Path | None = setting(None, "Where to write the cost model."),
    data: list[str] | None = setting(None, "Take the batch from these records; random tokens when not given.", metavar="FILE"),
    batch_size: int = opt.batch_size(4),
    length: int | None = setting(None, f"Tokens of a row; {LENGTH} when not given, and with --data the longest allowed.", low=2),
    rank: int = opt.RANK,
    repeats: int = setting(3, "How often each kind of step is timed.", low=1),
    meta: bool = setting(
        False,
        "Without weights: MODEL is a config.json, a folder with one, an id on the hub, gpt2-medium or qwen3-8b. Measured with "
        "random weights where they fit the memory, else estimated from FLOPs and bytes. Only a config.json is ever fetched.",
    ),
    flops: float | None = setting(None, "With --meta: FLOP/s of another device.", low=0.1),
    bandwidth: float | None = setting(None, "With --meta: bytes/s of its memory.", low=0.1),
    explain: bool = setting(False, "Say where the time of a step goes, and what makes each part smaller."),
    placement: Path | None = setting(None, "With --explain: the placement to train; all layers when not given."),
    device: str = opt.DEVICE,
    dtype: str = opt.DTYPE,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Measure what a training step costs in any placement.

    Time, memory, adapter size and added latency. A few training steps run with adapters in all layers, in the last one, and in none;
    what lies between follows. Backward stops at the lowest adapted layer, so layers near the output are cheap. Nothing of the model is
    changed.
    """
    opt.check_output(output, force)
    if (flops is None) != (bandwidth is None):
        raise typer.BadParameter("--flops and --bandwidth belong together; give both or neither")
    if not meta and flops is not None:
        raise typer.BadParameter("--flops and --bandwidth describe another device; give --meta too")
    if meta and data is not None:
        raise typer.BadParameter("--meta has no tokenizer for --data; give --batch-size and --length")
    if placement is not None and not explain:
        raise typer.BadParameter("--placement says what --explain explains; give --explain too")
    chosen = None
    if placement is not None:
        from layercard.selection.placement import Placement

        chosen = Placement.load(placement)
    opt.check_data(data)
    from layercard.adapters.apply import check_model
    from layercard.cost.measure import measure_cost, random_batch, usual_batch
    from layercard.report.terminal import cost_view, explain_view

    padding: float | None = None
    with Display() as display:
        if meta:
            rates = None if flops is None or bandwidth is None else (flops, bandwidth)
            loading = LoadSettings(device, dtype)
            result = _without_weights(model, (batch_size, length or LENGTH, rank), rates, loading, repeats, display)
        else:
            base = opt.load(model, LoadSettings(device, dtype), display)
            if chosen is not None:
                check_model(base, chosen)
            if data is not None:
                examples = opt.read(data, base, RECORDS, DataSettings(max_length=length or LONGEST)).examples
                batch = usual_batch(examples, batch_size, base.pad_id)
            elif base.classes is not None:
                raise DataError(f"{model} is a classifier, so a step needs texts with their classes; name some with --data")
            else:
                batch = random_batch(base.model.get_input_embeddings().weight.shape[0], batch_size, length or LENGTH)
            padding = 1 - float(batch.attention_mask.float().mean()) if data is not None else None
            result = measure_cost(base, batch, rank=rank, repeats=repeats, progress=display)
    layers = range(len(result.layers)) if chosen is None else chosen.layers
    value = result.to_json()
    if explain:
        value["explained"] = {"layers": list(layers), "seconds": result.step_parts(layers), "padding": padding}
    view = explain_view(result, layers, padding) if explain else cost_view(result)
    named = opt.data_options(data) if data else []
    if meta:
        then = ["cost", model, "--meta", *(["--explain"] if not explain else ["--dtype", "bfloat16"])]
    else:
        then = ["run", model, *(named or opt.data_options(["synthetic"])), "-o", "run"] if explain else ["cost", model, *named, "--explain"]
    show_result(value if explain else result, as_json, view, output=output, force=force, then=then)


def _without_weights(
    model: str, sizes: tuple[int, int, int], rates: tuple[float, float] | None, loading: LoadSettings, repeats: int, progress: Display
) -> "CostModel":
    """Measured with random weights; where they do not fit, or for another device, estimated from rates.

    `sizes` are the records of a batch, their tokens, and the rank; `rates` FLOP/s and bytes/s of another device.
    """
    import torch

    from layercard.cost.estimate import device_rates, estimated_cost, fits
    from layercard.cost.measure import device_name, measure_cost, random_batch
    from layercard.models.load import find_device
    from layercard.models.skeleton import empty_model, random_model, read_config

    (batch_size, length, rank), dtype = sizes, loading.dtype

    def estimate(flops: float, bandwidth: float, device: str = "") -> "CostModel":
        how: dict[str, Any] = {"batch_size": batch_size, "length": length, "rank": rank, "dtype": dtype, "device": device}
        return estimated_cost(empty_model(read_config(model), model), flops=flops, bandwidth=bandwidth, name=model, **how)

    if rates is not None:
        return estimate(*rates)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {dtype!r} has no meaning without weights; choose float32, bfloat16 or float16")
    device, torch_dtype = find_device(loading.device), getattr(torch, dtype)
    estimated = estimate(*device_rates(device, torch_dtype, rows=batch_size * length), device_name(device))
    if not fits(estimated, device):
        return estimated
    base = random_model(read_config(model), model, device, torch_dtype)
    batch = random_batch(base.model.get_input_embeddings().weight.shape[0], batch_size, length)
    return measure_cost(base, batch, rank=rank, repeats=repeats, progress=progress)
