"""How commands declare what they take, and the arguments and options that several of them take.

A parameter of a command is declared by its default: `setting(default, help, …)` makes one option (or argument), and a settings object
(`layercard.settings`) makes one for each field of its class. `expanded` turns such a command into one that typer understands.
"""

import dataclasses
import inspect
import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercard.errors import LayercardError, ModelError, OutputError, TrainingError
from layercard.files import refuse_existing, shown, writing
from layercard.settings import DataSettings, FastSettings, LoadSettings, Settings, TrainSettings, check, setting

if TYPE_CHECKING:
    import datetime

    from layercard.data.load import Dataset
    from layercard.models.load import BaseModel, Progress


AUTO = "auto"
"""The word for a number that is left to the program."""


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it; it is called with finished settings objects, all values checked."""
    declared = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    # Every field by the name that typer passes it on: the parameter that it belongs to, its type, and its field.
    fields: dict[str, tuple[str, Any, dataclasses.Field[Any]]] = {}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        default = parameter.default
        if isinstance(default, Settings):
            options = [field for field in default.fields() if field.metadata["option"] != ""]
            fields |= {field.name: (name, field.type if field.metadata["unit"] is None else float | None, field) for field in options}
        elif isinstance(default, dataclasses.Field):
            fields[name] = name, parameter.annotation, default
        else:
            parameters.append(parameter)  # typer's own context
    for name, (group, kind, field) in fields.items():
        settings = declared[group]
        is_setting = isinstance(settings, Settings)
        default = getattr(settings, name) if is_setting else field.default
        default = AUTO if field.metadata["auto"] and default is None else default
        shown_kind = str if field.metadata["auto"] else kind
        annotation: Any = Annotated[shown_kind, _option(name, kind, field, settings.group if is_setting else None)]
        default = inspect.Parameter.empty if default is dataclasses.MISSING else default
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))

    @wraps(command)
    def with_settings(*context: typer.Context, **given: Any) -> None:
        changes: dict[str, dict[str, Any]] = {name: {} for name, default in declared.items() if isinstance(default, Settings)}
        for name, (group, kind, field) in fields.items():
            described, flag = field.metadata, name.upper() if field.metadata["argument"] else _flag(name, field).split()[0]
            value = given.pop(name) if group in changes else given[name]
            unit = described["unit"]
            value = _number_or_auto(flag, value) if described["auto"] else value
            check(flag, value, kind, described if unit is None else {**described, "low": 1 / unit, "high": described["high"] / unit})
            value = value if unit is None or value is None else int(value * unit)
            if group in changes:
                changes[group][name] = value
            elif described["auto"]:
                given[name] = value
        command(*context, **given, **{name: dataclasses.replace(declared[name], **values) for name, values in changes.items()})

    with_settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_settings


def options_of(command: Callable[..., None], **changes: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a command that takes what another one takes, but for some parameters: `None` leaves one out, a setting replaces it."""
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in changes:
            parameters.append(parameter)
        elif changes[name] is not None:
            parameters.append(parameter.replace(default=changes[name]))

    def declared(function: Callable[..., None]) -> Callable[..., None]:
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return function

    return declared


def _number_or_auto(flag: str, text: str) -> float | None:
    """`None` for `auto`."""
    try:
        return None if text == AUTO else float(text)
    except ValueError:
        raise TrainingError(f"{flag} {shown(text)} is not a number; give one, or auto") from None


def _flag(name: str, field: "dataclasses.Field[Any]") -> str:
    return field.metadata["option"] or f"--{name.replace('_', '-')}"


def _option(name: str, kind: Any, field: "dataclasses.Field[Any]", group: str | None) -> Any:
    """What typer shall know of a parameter."""
    described, flag = field.metadata, _flag(name, field)
    kinds = kind.__args__ if isinstance(kind, UnionType) else (kind,)
    how = {"help": described["help"], "envvar": described["envvar"], "rich_help_panel": group}
    if bool in kinds:
        return typer.Option(f"{flag}/--no-{flag[2:]}" if field.default else flag, **how)
    words = {int: "N", float: "X", Path: "FILE", list[Path]: "FILE"}
    metavar = described["metavar"] or next((words[each] for each in kinds if each in words), "NAME")
    if described["argument"]:
        return typer.Argument(metavar=described["metavar"] or name.upper(), **how)
    return typer.Option(*flag.split(), *(["-o"] if flag == "--output" else []), metavar=metavar, **how)


def _field(settings: Any, name: str, default: Any = None) -> Any:
    """A parameter that is described as one field of a settings class."""
    field = settings.__dataclass_fields__[name]
    return dataclasses.field(default=field.default if default is None else default, metadata=field.metadata)


TRAINING = TrainSettings()
"""What `train` and `compare` start from."""

MODEL = setting(..., "A hub id, a local folder, a .gguf file, or smollm2-135m (embedded, fetched once).", argument=True)
CARD = setting(..., "A card that `layercard profile` wrote.", argument=True)
DATA = setting(
    ...,
    "Records: .jsonl, .csv or .parquet with prompt + completion, messages or text; hub:NAME[:split]; or synthetic. May be given several "
    "times: all are read, in this order.",
    metavar="FILE",
)
VALID = "Held-out records, given as --data is."
RECORDS = setting(None, "Use the first N records; all when not given.", low=1)
VALID_RECORDS = setting(None, "Use the first N held-out records.", low=1)
RANK = _field(TrainSettings, "rank")
SEED = _field(TrainSettings, "seed")
DEVICE = _field(LoadSettings, "device")
DTYPE = _field(LoadSettings, "dtype")
EXPERTS = setting(True, "Adapt stacked experts where a placement names them, as only plain LoRA can.")
STOCK = setting(False, "Leave nothing out: train as the libraries do by themselves.")
FEWER_BYTES = "free memory, or take a type of fewer bytes (--dtype bfloat16)"
"""What to do where a model is larger than the memory."""
RESUME = setting(False, "Go on with what is unfinished in the output folder.")
RESULT_FILE = setting(None, "Write the result as JSON.")
FORCE = setting(False, "Replace what exists at the output.")
AS_JSON = setting(False, "Print the result as JSON.", option="--json")
ROI_FILE = setting(None, "Figures of the calculator as a JSON object; docs/roi.md names them.", option="--inputs")
ROI_FIGURES = setting(None, "One figure of the calculator: --set gpu_price_per_hour=2.5.", option="--set", metavar="NAME=VALUE")


def batch_size(default: int) -> Any:
    """Records in a batch."""
    return _field(TrainSettings, "batch_size", default)


def check_folder(path: Path, *, resume: bool, force: bool) -> None:
    """Refuse an output folder that is something else or holds something already, before the long work starts."""
    with writing(path):
        is_free = resume or force or not path.exists() or (path.is_dir() and not any(path.iterdir()))
        if is_free and path.exists() and not path.is_dir():
            raise OutputError(f"{path} is not a folder, so it is not replaced; name a folder")
    if not is_free:
        raise OutputError(f"{path} exists already; pass --resume to go on with it, --force to replace it, or name another output")


def check_output(path: Path | None, force: bool, *suffixes: str) -> None:
    """Refuse an output file that exists, or is named as another kind of file than `suffixes`, where there are any."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise OutputError(f"{path}: {path.suffix or 'no ending'} is not written; name a {' or '.join(suffixes)} file")
    refuse_existing(path, force)


def check_data(*sources: list[str] | None, columns: str | None = None) -> None:
    """Refuse data files that are not there or have nothing to learn from, before a model is loaded or anything heavy is imported.

    Data sets on the hub are looked up when they are read.
    """
    from layercard.data.encoding import check_first
    from layercard.data.formats import HUB, find_records

    for name in (name for names in sources for name in names or []):
        if not name.startswith(HUB):
            check_first(*find_records(name), columns)


def data_options(names: list[str]) -> list[str]:
    """The options that name these data again."""
    return [word for name in names for word in ("--data", name)]


def fast_or_stock(fast: FastSettings, stock: bool) -> FastSettings:
    """The options of faster training; `--stock` turns all of them off."""
    if stock and fast.cache_folder is not None:
        raise TrainingError("--stock keeps no prefix cache, but --cache names a folder for one; leave one of them out")
    return FastSettings.baseline() if stock else fast


def load(
    model: str,
    loading: LoadSettings,
    progress: "Progress",
    *,
    streams: bool = False,
    trains: bool = False,
    mend: str = FEWER_BYTES,
) -> "BaseModel":
    """The model of a command; `streams` says that the command has `--stream` for one that does not fit, `trains` that it trains then.

    Without `--stream` `mend` is what to do.

    Raises:
        ModelError: Its weights are larger than the free memory, or as `load_model`.
    """
    from layercard.cost.estimate import free_bytes
    from layercard.models.load import find_device, load_model
    from layercard.models.streamed import stored_bytes

    needed, free = stored_bytes(model, loading.dtype), free_bytes(find_device(loading.device))
    if needed > free:
        if streams:
            mend = f"pass --stream, which leaves it on disk{_fitting(model, loading.dtype, free) if trains else ''}"
        raise ModelError(f"{model} takes {needed / 1e9:.1f} GB as {loading.dtype}, and {free / 1e9:.1f} GB of memory are free; {mend}")
    return load_model(model, progress=progress, **loading.to_json())


def _fitting(model: str, dtype: str, free: int) -> str:
    """Which layers could be trained with `--stream` in so much memory, in words; empty where the configuration does not tell."""
    from layercard.cost.estimate import estimated_cost, lowest_that_fits
    from layercard.models.skeleton import skeleton

    try:
        empty = skeleton(model)
        kind = str(empty.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        cost = estimated_cost(empty, flops=1.0, bandwidth=1.0, name=model, dtype=kind)
    except LayercardError:
        return ""
    lowest, last = lowest_that_fits(cost, free), len(cost.layers) - 1
    if lowest is None:
        return "; but not even the last layer would fit to be trained"
    return f": layers {lowest} to {last} would fit to be trained" if lowest < last else f": layer {last} would fit to be trained"


def read(
    sources: list[str], base: "BaseModel", records: int | None, reading: DataSettings, day: "datetime.date | None" = None
) -> "Dataset":
    """Records of a command, as the model reads them; the log says what a user should know about how they were read."""
    from layercard.data.checks import positions
    from layercard.data.load import load_data

    limit, is_hard = positions(base.model)
    if limit is not None and is_hard and limit < reading.max_length:
        reading = dataclasses.replace(reading, max_length=limit)
    dataset = load_data(sources, base.tokenizer, records=records, classes=base.classes, day=day, **reading.to_json())
    longest = max(len(example.input_ids) for example in dataset.examples)
    if limit is not None and not is_hard and longest > limit:
        message = "%s: the longest record has %s tokens, but %s was made for up to %s; what lies beyond may be learnt badly"
        logging.getLogger(__name__).warning(message, dataset.source, f"{longest:,}", base.name, f"{limit:,}")
    return dataset
