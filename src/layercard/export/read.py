"""Configurations of trainers as PEFT's `LoraConfig`: the way back, for `layercard verify` and for checking what was exported.

What each trainer makes of its keys was read from the sources that `trainers` names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from layercard.adapters.apply import task_of
from layercard.adapters.files import check_fields
from layercard.errors import ExportError, one_line
from layercard.export.config_text import read, read_text
from layercard.models.layers import find_blocks

MARKS = {
    "axolotl": ("adapter", "peft_layers_to_transform", "peft_layers_pattern", "lora_target_linear", "lora_rank_pattern", "base_model"),
    "llamafactory": ("lora_target", "finetuning_type"),
    "ms-swift": ("target_regex", "target_modules", "tuner_type", "train_type"),
    "trl": ("use_peft", "lora_target_modules"),
}
"""Keys by which a configuration is known to be a trainer's; the first trainer with one of them is taken."""


def peft_config(path: str | Path, model: PreTrainedModel, trainer: str | None = None) -> LoraConfig:
    """The `LoraConfig` that a trainer makes of its configuration.

    Args:
        path: YAML or JSON of axolotl, LLaMA-Factory, ms-swift or TRL's command line.
        model: The model that it is for; only the names of its modules are used.
        trainer: Whose configuration it is; known by its keys when not given.

    Raises:
        ExportError: The file is not a configuration of these trainers, or trains without LoRA.
    """
    return config_of(read(read_text(Path(path)), str(path)), model, trainer, source=str(path))


def config_of(
    values: Mapping[str, Any], model: PreTrainedModel, trainer: str | None = None, source: str = "the configuration"
) -> LoraConfig:
    """`peft_config` of the keys themselves."""
    trainer = trainer or next((name for name, marks in MARKS.items() if any(mark in values for mark in marks)), None)
    if trainer not in MARKS:
        names = "axolotl, trl, llamafactory, ms-swift"
        raise ExportError(f"{source} has no key of {names}; name a configuration of one of them, or an adapter of PEFT's")
    try:
        arguments = _arguments(trainer, values, model)
    except (AttributeError, TypeError, ValueError) as error:
        raise ExportError(f"{source} has values that {trainer} cannot use ({one_line(error)}); mend it") from error
    if arguments is None:
        raise ExportError(f"{source} trains without LoRA, so it adapts nothing; name a configuration with an adapter")
    check_fields({name: value for name, value in arguments.items() if name not in ("r", "lora_alpha")}, source)
    try:
        return LoraConfig(task_type=task_of(model), **arguments)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{source}: PEFT refuses what {trainer} makes of it ({one_line(error)}); mend it") from error


def _arguments(trainer: str, values: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any] | None:
    """Arguments of `LoraConfig`; `None` where the trainer would train without LoRA."""
    get = values.get
    trains_lora = {
        "axolotl": get("adapter") in ("lora", "qlora"),
        "trl": bool(get("use_peft")),
        "llamafactory": get("finetuning_type", "lora") == "lora",
        "ms-swift": get("tuner_type", get("train_type", "lora")) == "lora",
    }
    if not trains_lora[trainer]:
        return None
    # Trainers of vision-language models freeze towers and projectors, so that "all" and parts of names stand for the text model's modules.
    has_towers = model.config.get_text_config() is not model.config
    if trainer == "axolotl":
        numbers = get("lora_r") or 8, get("lora_alpha") or 8, get("lora_dropout") or 0.0
        names, parameters = get("lora_target_modules") or [], get("lora_target_parameters") or []
        if get("lora_target_linear"):
            names = sorted({*([names] if isinstance(names, str) else names), *_linear_names(model)})
    elif trainer == "trl":
        numbers = get("lora_r", 16), get("lora_alpha", 32), get("lora_dropout", 0.05)
        names, parameters = get("lora_target_modules"), get("lora_target_parameters")
        names = names[0] if isinstance(names, list) and len(names) == 1 else names
    elif trainer == "llamafactory":
        rank, target, parameters = get("lora_rank", 8), get("lora_target", "all"), None
        numbers = rank, get("lora_alpha") or 2 * rank, get("lora_dropout", 0.0)
        names = [name.strip() for name in target.split(",")] if isinstance(target, str) else list(target)
        names = _linear_names(model) if names == ["all"] else names
        names = _text_modules(model, names) if has_towers else names
    else:
        numbers = get("lora_rank", 8), get("lora_alpha", 32), get("lora_dropout", 0.05)
        names, parameters = get("target_regex") or get("target_modules", ["all-linear"]), get("target_parameters")
        if isinstance(names, list) and "all-linear" in names:
            others = [name for name in names if name != "all-linear"]
            names = _text_modules(model, [""]) if has_towers else others + _linear_names(model)
    arguments = dict(zip(("r", "lora_alpha", "lora_dropout"), numbers, strict=True))
    arguments |= {"target_modules": names, "target_parameters": parameters}
    if trainer == "axolotl":
        arguments |= {
            "layers_to_transform": get("peft_layers_to_transform"),
            "layers_pattern": get("peft_layers_pattern"),
            "exclude_modules": get("lora_exclude_modules") or None,
            "rank_pattern": get("lora_rank_pattern") or {},
            "alpha_pattern": get("lora_alpha_pattern") or {},
        }
    return arguments


def _linear_names(model: PreTrainedModel) -> list[str]:
    """The last names of all linear modules but the head: what the trainers take "all" for."""
    head = model.get_output_embeddings()
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def _text_modules(model: PreTrainedModel, parts: list[str]) -> list[str]:
    """Linear modules of the text model whose path contains one of some parts."""
    text_model = find_blocks(model)[0].path.rpartition(".")[0]
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(f"{text_model}."))
    return [name for name in linear if any(part in name for part in parts)]
