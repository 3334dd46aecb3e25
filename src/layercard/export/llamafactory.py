"""LLaMA-Factory's YAML or JSON.

Read from LLaMA-Factory 0.9.5: `hparams/finetuning_args.py` (`lora_target` is one string, split at commas), `model/adapter.py`
(`_setup_lora_tuning` hands the list to PEFT; `use_llama_pro` replaces it), `model/model_utils/visual.py` (`patch_target_modules`: in
vision-language models a target also chooses every module whose path contains it). There is no key for layers, none for parameters and
none for ranks of single modules.
"""

from layercard.export.plan import Plan, Settings, refuse_fractions, refuse_parameters, refuse_ranks
from layercard.selection.placement import Placement


def plan(placement: Placement, settings: Settings) -> Plan:
    """Full paths, in one string."""
    refuse_ranks(placement, "LLaMA-Factory")
    refuse_parameters(placement, "LLaMA-Factory", "adapts modules only")
    refuse_fractions("LLaMA-Factory", settings, placement)
    given, usual = settings.named("lora_rank", "lora_alpha", "lora_dropout")
    return Plan(
        wanted={"lora_target": ",".join(placement.paths), **given},
        usual={"finetuning_type": "lora", **usual},
        harmless={
            "finetuning_type": ("lora",),
            "use_llama_pro": (False,),
            "adapter_name_or_path": ("",),
        },
    )
