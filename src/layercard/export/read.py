"""Configurations of trainers as PEFT's `LoraConfig`: the way back, for `layercard verify` and for checking what was exported.

What each trainer makes of its keys was read from the sources that the modules beside this one name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from layercard.adapters.apply import task_of
from layercard.errors import ExportError, one_line
from layercard.export import json_text, yaml_text
from layercard.export.merge import read_text
from layercard.models.layers import find_blocks

AXOLOTL, TRL, LLAMAFACTORY, SWIFT = "axolotl", "trl", "llamafactory", "ms-swift"
MARKS = {
    AXOLOTL: ("adapter", "peft_layers_to_transform", "peft_layers_pattern", "lora_target_linear", "lora_rank_pattern", "base_model"),
    LLAMAFACTORY: ("lora_target", "finetuning_type"),
    SWIFT: ("target_regex", "target_modules", "tuner_type", "train_type"),
    TRL: ("use_peft", "lora_target_modules"),
}
"""Keys by which a configuration is known to be a trainer's; the first trainer with one of them is taken."""


def peft_config(path: str | Path, model: PreTrainedModel, trainer: str | None = None) -> LoraConfig:
    """The `LoraConfig` that a trainer makes of its configuration.

    Args:
        path: YAML or JSON of axolotl, LLaMA-Factory, ms-swift or TRL's command line.
        model: The model that it is for; only the names of its modules are used.
        trainer: Whose configuration it is; known by its keys when not given.

    Raises:
        ExportError: The file is no configuration of these trainers, or trains without LoRA.
    """
    path = Path(path)
    form = json_text if path.suffix.lower() == ".json" else yaml_text
    return config_of(form.read(read_text(path), str(path)), model, trainer, source=str(path))


def config_of(
    values: Mapping[str, Any], model: PreTrainedModel, trainer: str | None = None, source: str = "the configuration"
) -> LoraConfig:
    """`peft_config` of the keys themselves."""
    known = trainer or next((name for name, marks in MARKS.items() if any(mark in values for mark in marks)), None)
    makers = {AXOLOTL: _axolotl, TRL: _trl, LLAMAFACTORY: _llamafactory, SWIFT: _swift}
    if known not in makers:
        raise ExportError(f"{source} has no key of {', '.join(makers)}; name a configuration of one of them, or an adapter of PEFT's")
    try:
        arguments = makers[known](values, model)
    except (AttributeError, TypeError, ValueError) as error:
        raise ExportError(f"{source} has values that {known} cannot use ({one_line(error)}); mend it") from error
    if arguments is None:
        raise ExportError(f"{source} trains without LoRA, so it adapts nothing; name a configuration with an adapter")
    try:
        return LoraConfig(task_type=task_of(model), **arguments)
    except (TypeError, ValueError) as error:
        reason = one_line(error)
        raise ExportError(f"{source}: PEFT refuses what {known} makes of it ({reason}); mend it") from error


def _axolotl(values: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any] | None:
    if values.get("adapter") not in ("lora", "qlora"):
        return None
    names = values.get("lora_target_modules") or []
    if values.get("lora_target_linear"):
        names = sorted({*([names] if isinstance(names, str) else names), *_linear_names(model)})
    return {
        "r": values.get("lora_r") or 8,
        "lora_alpha": values.get("lora_alpha") or 8,
        "lora_dropout": values.get("lora_dropout") or 0.0,
        "target_modules": names,
        "target_parameters": values.get("lora_target_parameters") or [],
        "layers_to_transform": values.get("peft_layers_to_transform"),
        "layers_pattern": values.get("peft_layers_pattern"),
        "exclude_modules": values.get("lora_exclude_modules") or None,
        "rank_pattern": values.get("lora_rank_pattern") or {},
        "alpha_pattern": values.get("lora_alpha_pattern") or {},
    }


def _trl(values: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any] | None:
    if not values.get("use_peft"):
        return None
    names = values.get("lora_target_modules")
    return {
        "r": values.get("lora_r", 16),
        "lora_alpha": values.get("lora_alpha", 32),
        "lora_dropout": values.get("lora_dropout", 0.05),
        "target_modules": names[0] if isinstance(names, list) and len(names) == 1 else names,
        "target_parameters": values.get("lora_target_parameters"),
    }


def _llamafactory(values: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any] | None:
    if values.get("finetuning_type", "lora") != "lora":
        return None
    asked = values.get("lora_target", "all")
    names = [each.strip() for each in asked.split(",")] if isinstance(asked, str) else list(asked)
    names = _linear_names(model) if names == ["all"] else names
    rank = values.get("lora_rank", 8)
    return {
        "r": rank,
        "lora_alpha": values.get("lora_alpha") or 2 * rank,
        "lora_dropout": values.get("lora_dropout", 0.0),
        "target_modules": _containing(model, names) if _has_towers(model) else names,
    }


def _swift(values: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any] | None:
    if values.get("tuner_type", values.get("train_type", "lora")) != "lora":
        return None
    names = values.get("target_regex") or values.get("target_modules", ["all-linear"])
    if isinstance(names, list) and "all-linear" in names:
        names = (
            _containing(model, [""]) if _has_towers(model) else [*(name for name in names if name != "all-linear"), *_linear_names(model)]
        )
    return {
        "r": values.get("lora_rank", 8),
        "lora_alpha": values.get("lora_alpha", 32),
        "lora_dropout": values.get("lora_dropout", 0.05),
        "target_modules": names,
        "target_parameters": values.get("target_parameters"),
    }


def _linear_names(model: PreTrainedModel) -> list[str]:
    """The last names of all linear maps but the head's: what the trainers take "all" for."""
    head = model.get_output_embeddings()
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def _has_towers(model: PreTrainedModel) -> bool:
    """Whether the model has parts beside the text model, such as a vision tower."""
    return model.config.get_text_config() is not model.config


def _containing(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Linear maps of the text model whose path contains one of some names; towers and projectors are frozen unless asked for."""
    blocks = find_blocks(model)[0].path.rpartition(".")[0]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{blocks}.") and any(each in name for each in names)
    ]
