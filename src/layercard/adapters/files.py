"""Adapters and configurations that others wrote: what they say, what their weights hold, and whether those load and have an effect."""

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.adalora.layer import AdaLoraLayer
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from layercard.errors import PlacementError, one_line
from layercard.files import check_file, read_json, shown
from layercard.models.adapted import quiet_peft, unchanged
from layercard.models.layers import find_blocks
from layercard.models.module_sets import MLX_BLOCKS
from layercard.records import first_problem
from layercard.selection.placement import Placement

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MLX_WEIGHTS_FILE = "adapters.safetensors"
PLACEMENT_FILE = "placement.json"
FACTORS = (PeftType.LORA, PeftType.ADALORA, PeftType.LOHA, PeftType.LOKR, PeftType.VERA)
"""Methods whose update is a product: one factor that is zero everywhere makes all of it zero."""
_MLX_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector.weight"}


class SavedAdapter(NamedTuple):
    """An adapter or a configuration, as PEFT has it."""

    config: PeftConfig
    weights: dict[str, torch.Tensor] | None  # by PEFT's names; `None` where there are none, as beside a configuration alone
    left_out: list[str]  # keys of the configuration that this PEFT does not know
    maker: str = "PEFT"


class _Fields(BaseModel):
    """The fields of a configuration that are read here, with their types; PEFT checks the others."""

    model_config = ConfigDict(strict=True)
    base_model_name_or_path: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True


class _MlxParameters(BaseModel):
    model_config = ConfigDict(strict=True)
    rank: int
    scale: float
    dropout: float = 0.0
    keys: list[str] | None = None


class _MlxFields(BaseModel):
    """The fields of mlx-lm's `adapter_config.json`."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    fine_tune_type: str = "lora"
    num_layers: int = -1  # blocks from the top, all for -1
    lora_parameters: _MlxParameters


def read_adapter(path: str | Path, model: PreTrainedModel | None = None) -> SavedAdapter:
    """An adapter's folder, or a configuration of PEFT's as JSON; also of mlx-lm, whose names are put as those of `model`.

    Raises:
        PlacementError: There is none, or it cannot be read, or it has fields of a wrong kind.
    """
    path = Path(path)
    file = path / CONFIG_FILE if path.is_dir() else path
    if not _is_file(file):
        raise PlacementError(f"{path} is not an adapter: it lacks {CONFIG_FILE}; name an adapter's folder or its configuration")
    values = read_json(file, PlacementError, "adapter configuration")
    if "peft_type" not in values and "lora_parameters" in values:
        return _of_mlx(_checked(_MlxFields, values, file), path, model)
    values.pop("runtime_config", None)
    if values.get("peft_type") not in [kind.value for kind in PeftType]:
        kind = shown(values.get("peft_type"))
        raise PlacementError(f"{file} has peft_type {kind}; name a configuration that PEFT wrote (peft_type LORA, …)")
    check_fields(values, file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown keys, which are returned
            config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**values))
    except Exception as error:  # PEFT's classes refuse values each in their own way
        raise PlacementError(f"{file}: PEFT refuses this configuration ({one_line(error, 200)}); mend it") from error
    left_out = sorted(set(values) - {field.name for field in dataclasses.fields(config)})
    return SavedAdapter(config, _read_weights(path, WEIGHTS_FILE), left_out)


def saved_placement(folder: str | Path) -> Placement | None:
    """The placement that `layercard train` wrote beside an adapter; `None` where there is none."""
    path = Path(folder) / PLACEMENT_FILE
    return Placement.load(path) if _is_file(path) else None


def _is_file(path: Path) -> bool:
    """Whether there is a file; a pipe, a device or a folder in its place is refused."""
    if path.exists():
        check_file(path, PlacementError, "adapter's own")
    return path.exists()


def check_fields(values: Mapping[str, Any], source: str | Path) -> None:
    """Raise `PlacementError` unless the fields of a configuration that are read here are of the right kind."""
    _checked(_Fields, values, source)


def _checked(kind: type[BaseModel], values: Mapping[str, Any], source: str | Path) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as problem:
        where = re.sub(r"\.list\[\w+\]", "", first_problem(problem, "configuration"))
        raise PlacementError(f"{source}: {where}; mend the configuration, or save the adapter again") from None


def _read_weights(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """The saved weights in an adapter's folder; `None` beside a configuration alone."""
    if not folder.is_dir() or not _is_file(folder / name):
        if (folder / "adapter_model.bin").is_file():
            raise PlacementError(
                f"{folder} has only pickled weights (adapter_model.bin), which can run code when read; save it as safetensors"
            )
        return None
    try:
        return load_file(folder / name)
    except Exception as error:  # of safetensors, the system, or of a header with sizes that no file has
        raise PlacementError(f"{folder / name} cannot be read ({one_line(error, 200)}); copy it again") from error


def _of_mlx(fields: _MlxFields, path: Path, model: PreTrainedModel | None) -> SavedAdapter:
    """An adapter of mlx-lm: A `[in, r]` and B `[r, out]` are turned, and `scale`, which multiplies B A itself, becomes alpha."""
    parameters = fields.lora_parameters
    if fields.fine_tune_type not in ("lora", "dora"):
        raise PlacementError(f"{path} is of fine_tune_type {fields.fine_tune_type!r}, so no adapter; name one trained with lora or dora")
    blocks = [] if model is None else [block.path for block in find_blocks(model)]

    def renamed(name: str) -> str:
        match = re.fullmatch(rf"(?:{'|'.join(MLX_BLOCKS.values())})\.(\d{{1,6}})\.(.+)", name)
        return f"{blocks[int(match[1])]}.{match[2]}" if match and int(match[1]) < len(blocks) else name

    weights: dict[str, torch.Tensor] | None = None
    saved = _read_weights(path, MLX_WEIGHTS_FILE)
    if saved is not None:
        weights = {}
        for key, weight in saved.items():
            name, _, part = key.rpartition(".")
            name = f"base_model.model.{renamed(name)}.{_MLX_PARTS.get(part, part)}"
            weights[name] = weight.T.contiguous() if weight.ndim == 2 else weight
    # `keys` are names below the last blocks, or paths; without any, mlx-lm has a list for each family, so the weights tell.
    below = blocks[-fields.num_layers :] if fields.num_layers > 0 else blocks
    names = {name for name, _ in model.named_modules()} if model is not None else set()
    targets: set[str] = set()
    for key in parameters.keys or ():
        targets |= {f"{block}.{key}" for block in below} & names or {renamed(key)}
    if parameters.keys is None:
        targets = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in weights or () if ".lora_" in name}
    try:
        config = LoraConfig(
            r=parameters.rank,
            lora_alpha=parameters.scale * parameters.rank,
            lora_dropout=parameters.dropout,
            target_modules=targets,
            use_dora=fields.fine_tune_type == "dora",
            base_model_name_or_path=fields.model,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise PlacementError(f"{path}: lora_parameters make no adapter ({one_line(error)}); mend the configuration") from error
    return SavedAdapter(config, weights, [], "mlx-lm")


@contextmanager
def empty_adapters(model: PreTrainedModel, config: PeftConfig) -> Iterator[PeftModel]:
    """The model as PEFT adapts it by a copy of a configuration, with adapters that take no memory; as before afterwards.

    Raises:
        PlacementError: PEFT refuses the configuration.
    """
    config = copy.deepcopy(config)
    if config.peft_type == PeftType.LORA:
        vars(config)["init_lora_weights"] = True  # PiSSA and its like would decompose weights that may be missing
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield wrapped_by_peft(model, config, empty=True)


def wrapped_by_peft(model: PreTrainedModel, config: PeftConfig, *, empty: bool = False) -> PeftModel:
    """The model as PEFT adapts it by a configuration that others wrote; a refusal of PEFT's is a `PlacementError`."""
    try:
        with quiet_peft():
            return get_peft_model(model, config, low_cpu_mem_usage=empty)
    except Exception as error:  # PEFT refuses values each in their own way
        raise PlacementError(f"PEFT refuses it: {one_line(error, 200)}") from error


def check_loads(model: PreTrainedModel, adapter: SavedAdapter, source: str, name: str) -> None:
    """Raise `PlacementError` unless the saved weights of an adapter fit the model, are all there, and are finite."""
    if not adapter.weights:
        raise PlacementError(f"{source} is not an adapter: it lacks {WEIGHTS_FILE}; name the folder that `layercard train` wrote")
    try:
        with empty_adapters(model, adapter.config) as wrapped:
            problems = load_weights(wrapped, adapter.weights)
    except PlacementError as error:
        problems = [str(error)]
    if problems:
        raise PlacementError(f"{source} does not fit {name!r}: {problems[0]}; `layercard verify` says more")


def load_weights(model: PeftModel, weights: Mapping[str, torch.Tensor], *, empty: bool = True) -> list[str]:
    """Load saved weights into an adapted model, whose adapters lie on the meta device if `empty`; in words, what is wrong with them."""
    config = model.peft_config["default"]
    words = []
    broken = [name for name, weight in weights.items() if weight.is_floating_point() and not weight.float().isfinite().all()]
    if broken:
        words.append(f"{len(broken)} saved weights hold NaN or infinity, such as {broken[0]}")
    if empty and config.peft_type == PeftType.ADALORA:
        # PEFT cuts AdaLoRA's adapters to the saved ranks by their masks, which the meta device cannot do.
        for module in model.modules():
            for part in (module.lora_A, module.lora_B, module.lora_E) if isinstance(module, AdaLoraLayer) else ():
                part["default"] = torch.nn.Parameter(torch.empty_like(part["default"], device="cpu"))
    try:
        with quiet_peft():
            result = set_peft_model_state_dict(model, dict(weights), low_cpu_mem_usage=empty)
    except KeyError as error:
        return [*words, f"{error.args[0]} is to be trained whole and has no saved weights"]
    except Exception as error:  # weights of other sizes, or of kinds that PEFT does not expect
        mismatches = [line.strip().rstrip(".") for line in str(error).splitlines() if "size mismatch" in line]
        reason = one_line(ValueError(mismatches[0]) if mismatches else error, 200)
        return [*words, f"the saved weights do not fit this model: {reason}"]
    prefix = _prefix(config)
    left_over = sorted({_module(key, prefix) for key in result.unexpected_keys})
    if left_over:
        words.append(f"saved weights of {len(left_over)} modules match nothing, such as {left_over[0]}: dropped on loading")
    missing = [key for key in result.missing_keys if f".{prefix}" in key and not key.startswith("base_model.vera_")]
    without = sorted({_module(key, prefix) for key in missing})
    if without:
        parts = sorted({key.removeprefix(f"{without[0]}.").split(".")[0] for key in missing if key.startswith(f"{without[0]}.")})
        lacking = f"{without[0]} ({' and '.join(parts)})"
        words.append(f"{len(without)} adapted modules lack saved weights, such as {lacking}: they stay as they begin")
    return words


def saved_modules(config: PeftConfig, weights: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], bool, str]:
    """Paths of the modules with saved weights, as the base model calls them, whether all change nothing, and in words how many do.

    The latter is known for methods whose update is a product (one factor is zero) and for IA3 (all scales are one), but not for DoRA,
    which can change lengths with a zero product.
    """
    prefix, is_ia3 = _prefix(config), config.peft_type == PeftType.IA3
    tells = (config.peft_type in FACTORS or is_ia3) and not any("magnitude" in name for name in weights)
    modules: dict[str, str] = {}  # the weight of each that shows that it changes nothing
    for name, weight in weights.items():
        if f".{prefix}" in name:
            module = _module(name, prefix)
            shows = tells and bool((weight == float(is_ia3)).all())
            modules[module] = modules.get(module, "") or (name.removeprefix(module).strip(".").split(".")[0] if shows else "")
    paths = tuple(sorted({module.removeprefix("base_model.model.").replace(".base_layer", "") for module in modules}))
    idle = [name for name in modules.values() if name]
    if not idle:
        return paths, False, ""
    effect = f"{len(idle)} of {len(modules)} modules: {idle[0]} is {'one' if is_ia3 else 'zero'} there"
    return paths, len(idle) == len(modules), f"it loads but has no effect in {effect}"


def _prefix(config: PeftConfig) -> str:
    return str(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)])


def _module(key: str, prefix: str) -> str:
    """The module that a saved weight belongs to: its name up to the part that PEFT added."""
    return key.rsplit(f".{prefix}", 1)[0]
