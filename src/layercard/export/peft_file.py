"""PEFT's `LoraConfig` as JSON: `LoraConfig(**json.load(file))` reads it, and `layercard verify` does.

Read from peft 0.21.2: `tuners/lora/config.py` (the keys), `tuners/tuners_utils.py` (`check_target_module_exists`: a full path is found by
itself, whatever `layers_to_transform` says).
"""

from layercard.adapters.lora_config import CHOSEN, lora_arguments
from layercard.export.plan import Plan, Settings
from layercard.selection.placement import Placement


def plan(placement: Placement, settings: Settings) -> Plan:
    """Full paths, ranks and alphas."""
    arguments = lora_arguments(placement, r=settings.whole_rank, lora_alpha=settings.scaling, lora_dropout=settings.dropping)
    given, usual = settings.named("r", "lora_alpha", "lora_dropout")
    chosen = {name: value for name, value in arguments.items() if name in CHOSEN}
    return Plan(
        wanted={"peft_type": "LORA", **chosen, **given},
        usual={"task_type": arguments["task_type"], **usual, "bias": arguments["bias"]},
        harmless={
            "bias": ("none", "lora_only"),
            "layer_replication": ([],),
            **{
                name: (
                    [],
                    {},
                )
                for name in CHOSEN
                if name not in chosen
            },
        },
    )
