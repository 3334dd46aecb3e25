"""Adapters and configurations that others wrote: what they say, what their weights hold, and whether those have an effect."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file

from layercard.errors import PlacementError, one_line
from layercard.files import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PLACEMENT_FILE = "placement.json"
FACTORS = (PeftType.LORA, PeftType.ADALORA, PeftType.LOHA, PeftType.LOKR, PeftType.VERA)
"""Methods whose update is a product: one factor that is zero everywhere makes all of it zero."""


def read_adapter_config(path: str | Path) -> tuple[PeftConfig, list[str]]:
    """The configuration in an adapter's folder or in a JSON file of PEFT's kind, and its keys that this PEFT does not know and leaves out.

    Raises:
        PlacementError: There is none, or PEFT does not understand it.
    """
    path = Path(path)
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        raise PlacementError(f"{path} is no adapter: it lacks {CONFIG_FILE}; name an adapter's folder or its configuration")
    values = read_json(file, PlacementError, "adapter configuration")
    values.pop("runtime_config", None)
    if values.get("peft_type") not in [kind.value for kind in PeftType]:
        raise PlacementError(f"{file} has peft_type {values.get('peft_type')!r}; name a configuration that PEFT wrote (peft_type LORA, …)")
    layers = values.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise PlacementError(f"{file}: layers_to_transform has {layer!r}, which is not an index; write whole numbers")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown keys, which are returned
            config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**values))
    except (TypeError, ValueError, KeyError) as error:
        raise PlacementError(f"{file}: PEFT refuses this configuration ({one_line(error, 200)}); mend it") from error
    return config, sorted(set(values) - {field.name for field in dataclasses.fields(config)})


def read_weights(folder: str | Path) -> dict[str, torch.Tensor] | None:
    """The saved weights in an adapter's folder; `None` where there are none, as beside a configuration alone.

    Raises:
        PlacementError: They are pickled, or cannot be read.
    """
    folder = Path(folder)
    file = folder / WEIGHTS_FILE
    if not folder.is_dir() or not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise PlacementError(
                f"{folder} has only pickled weights (adapter_model.bin), which can run code when read; save it as safetensors"
            )
        return None
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise PlacementError(f"{file} cannot be read ({one_line(error, 200)}); copy it again") from error


def load_weights(model: PeftModel, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Load saved weights into an adapted model, on the meta device mostly, and say in words what does not fit."""
    config = model.peft_config["default"]
    if config.peft_type == PeftType.ADALORA:
        # PEFT cuts AdaLoRA's adapters to the saved ranks by their masks, which the meta device cannot do.
        for module in model.modules():
            for part in (module.lora_A, module.lora_B, module.lora_E) if isinstance(module, AdaLoraLayer) else ():
                part["default"] = torch.nn.Parameter(torch.empty_like(part["default"], device="cpu"))
    try:
        result = set_peft_model_state_dict(model, dict(weights), low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError) as error:
        mismatches = [line.strip().rstrip(".") for line in str(error).splitlines() if "size mismatch" in line]
        return [f"the saved weights do not fit this model: {one_line(ValueError(mismatches[0]) if mismatches else error, 200)}"]
    prefix, words = _prefix(config), []
    left_over = sorted({_module(key, prefix) for key in result.unexpected_keys})
    if left_over:
        words.append(f"saved weights of {len(left_over)} modules match nothing, such as {left_over[0]}: dropped on loading")
    missing = (key for key in result.missing_keys if f".{prefix}" in key and not key.startswith("base_model.vera_"))
    without = sorted({_module(key, prefix) for key in missing})
    if without:
        words.append(f"{len(without)} adapted modules have no saved weights, such as {without[0]}: they stay as they begin")
    return words


def saved_modules(config: PeftConfig, weights: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], bool, str]:
    """Paths of the modules with saved weights, as the base model calls them, whether all change nothing, and in words how many do.

    The latter is known for methods whose update is a product (one factor is zero) and for IA3 (all scales are one), but not for DoRA,
    which can change lengths with a zero product.
    """
    prefix, is_ia3 = _prefix(config), config.peft_type == PeftType.IA3
    known = (config.peft_type in FACTORS or is_ia3) and not any("magnitude" in name for name in weights)
    modules: dict[str, str] = {}  # the weight of each that shows that it changes nothing
    for name, weight in weights.items():
        if f".{prefix}" in name:
            module = _module(name, prefix)
            shows = known and bool((weight == float(is_ia3)).all())
            modules[module] = modules.get(module, "") or (name.removeprefix(module).strip(".").split(".")[0] if shows else "")
    paths = tuple(sorted({module.removeprefix("base_model.model.").replace(".base_layer", "") for module in modules}))
    shown = [name for name in modules.values() if name]
    if not shown:
        return paths, False, ""
    effect = f"{len(shown)} of {len(modules)} modules: {shown[0]} is {'one' if is_ia3 else 'zero'} there"
    return paths, len(shown) == len(modules), f"it loads but has no effect in {effect}"


def _prefix(config: PeftConfig) -> str:
    return str(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)])


def _module(key: str, prefix: str) -> str:
    """The module that a saved weight belongs to: its name up to the part that PEFT added."""
    return key.rsplit(f".{prefix}", 1)[0]
