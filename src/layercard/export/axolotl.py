"""axolotl's YAML.

Read from axolotl 0.19.0: `utils/schemas/peft.py` (the keys), `loaders/adapter.py` (`_build_peft_lora_config` hands them to PEFT's
`LoraConfig`), `utils/schemas/validation.py` (`check_peft_layers_pattern`, `check_frozen`). PEFT 0.20, which it pins, wants a dot before
`layers_pattern`, so that `model.layers` matches nothing and `layers` does.
"""

from typing import Any

from layercard.adapters.lora_config import patterns
from layercard.export.plan import Plan, Settings, by_layer_key, refuse_fractions
from layercard.selection.placement import Placement


def plan(placement: Placement, settings: Settings) -> Plan:
    """Layers and names where that is safe, else full paths; every other key that would choose modules must be off."""
    refuse_fractions("axolotl", settings, placement)
    given, usual = settings.named("lora_r", "lora_alpha", "lora_dropout")
    chosen = _chosen(placement)
    choosing = ("peft_layers_to_transform", "peft_layers_pattern", "lora_target_parameters", "lora_rank_pattern", "lora_alpha_pattern")
    return Plan(
        wanted={**chosen, **given},
        usual={"adapter": "lora", **usual},
        harmless={
            "adapter": ("lora", "qlora"),
            "lora_target_linear": (False,),
            "lora_exclude_modules": ([],),
            "lora_model_dir": ("",),
            "peft_layer_replication": ([],),
            "unfrozen_parameters": ([],),
            **{
                key: (
                    [],
                    {},
                )
                for key in choosing
                if key not in chosen
            },
        },
    )


def _chosen(placement: Placement) -> dict[str, Any]:
    parts = by_layer_key(placement)
    if parts is not None and parts.shared is not None:
        return {
            "peft_layers_to_transform": list(placement.layers),
            "peft_layers_pattern": [parts.prefix.rpartition(".")[2]],
            "lora_target_modules": list(parts.shared),
        }
    found: dict[str, Any] = {"lora_target_modules": list(placement.paths)}
    if placement.parameters:
        found["lora_target_parameters"] = list(placement.parameters)
    return found | {f"lora_{name}": value for name, value in patterns(placement).items()}
