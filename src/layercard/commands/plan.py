"""`layercard plan`: will a training fit, how long will it take, what will it cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.settings import DataSettings, FastSettings, LoadSettings, TrainSettings, setting

if TYPE_CHECKING:
    from layercard.cost.devices import Rates
    from layercard.cost.training import TrainingPlan
    from layercard.selection.placement import Placement


def plan(
    model: str = opt.MODEL,
    data: list[str] = opt.DATA,
    placement: Path | None = setting(None, "A placement to price beside the plain ones.", metavar="FILE"),
    valid: list[str] | None = setting(None, f"{opt.VALID[:-1]}: the evaluations are in the time.", metavar="FILE"),
    device_rates: str | None = setting(
        None,
        "Forecast for a device that is not at hand, from its published rates: T4, L4, A10, A100, H100, RTX3090, RTX4090, M1-Max or "
        "M2-Ultra. MODEL may then be a config.json, gpt2-medium or qwen3-8b.",
        metavar="DEVICE",
    ),
    price: float | None = setting(None, "Price of an hour on the device, in any currency.", low=1e-9),
    output: Path | None = opt.RESULT_FILE,
    records: int | None = opt.RECORDS,
    valid_records: int | None = opt.VALID_RECORDS,
    reading: DataSettings = DataSettings(),
    settings: TrainSettings = opt.TRAINING,
    fast: FastSettings = FastSettings(),
    loading: LoadSettings = LoadSettings(),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Forecast time and memory of a training, in all layers and in other placements.

    Epochs and evaluations are in it. On this machine a few training steps are timed first; nothing of the model is changed.
    """
    opt.check_output(output, force)
    opt.check_data(data, valid)
    from layercard.cost.devices import device_named
    from layercard.report.terminal import plan_view
    from layercard.selection.placement import Placement
    from layercard.workflow.plan import plan_here

    rates = None if device_rates is None else device_named(device_rates)
    chosen = None if placement is None else Placement.load(placement)
    how: dict[str, Any] = {"placement": chosen, "price_per_hour": price}
    with Display() as display:
        if rates is not None:
            result = _elsewhere(model, rates, (data, valid, records, valid_records), reading, settings, loading, display, **how)
        else:
            from layercard.adapters.apply import check_model

            base = opt.load(model, loading, display)
            if chosen is not None:
                check_model(base, chosen)
            dataset = opt.read(data, base, records, reading)
            held_out = opt.read(valid, base, valid_records, reading) if valid else None
            result = plan_here(base, dataset, settings, valid=held_out, fast=fast, progress=display, **how)
    then = ("run", model, *opt.data_options(data), "-o", "run")
    show_result(result, as_json, plan_view(result), output=output, force=force, then=then)


def _elsewhere(
    model: str,
    rates: "Rates",
    sources: tuple[list[str], list[str] | None, int | None, int | None],
    reading: DataSettings,
    settings: TrainSettings,
    loading: LoadSettings,
    display: Display,
    *,
    placement: "Placement | None",
    price_per_hour: float | None,
) -> "TrainingPlan":
    """From shapes and rates; tokens are counted with the model's tokenizer, and where it has none with that of the embedded model."""
    from layercard.data.load import load_data
    from layercard.errors import CardError
    from layercard.models.embedded import EMBEDDED
    from layercard.models.load import locate, quiet_libraries, read_tokenizer
    from layercard.models.skeleton import BUILT_IN, skeleton
    from layercard.workflow.plan import plan_elsewhere

    data, valid, records, valid_records = sources
    empty = skeleton(model)
    depth = len(empty.config.get_text_config().to_dict().get("layer_types") or ()) or empty.config.get_text_config().num_hidden_layers
    if placement is not None and placement.model["layers"] != depth:
        raise CardError(f"the placement is for {placement.model['layers']} layers and {model} has {depth}; name the placement's model")
    bare = model.lower() in BUILT_IN or model.endswith(".json")
    with quiet_libraries():
        tokenizer = read_tokenizer(locate(EMBEDDED if bare else model, display), loading.trust_remote_code)
    how = reading.to_json()
    dataset = load_data(data, tokenizer, records=records, **how)
    held_out = load_data(valid, tokenizer, records=valid_records, **how) if valid else None
    dtype = "bfloat16" if loading.dtype in ("float32", "auto") else loading.dtype
    given: dict[str, Any] = {"name": model, "dtype": dtype, "valid": held_out, "placement": placement, "price_per_hour": price_per_hour}
    result = plan_elsewhere(empty, dataset, rates, settings, **given)
    note = f"tokens are counted with the tokenizer of {EMBEDDED}, as {model} has none"
    return result.model_copy(update={"notes": (*result.notes, note)}) if bare else result
