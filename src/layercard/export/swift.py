"""ms-swift's YAML or JSON.

Read from ms-swift 4.6.0: `arguments/tuner_args.py` (`target_regex` takes the place of `target_modules`; `target_parameters`;
`lora_dropout` is 0.05 where nothing says), `pipelines/train/tuner.py` (`prepare_adapter` hands both to PEFT), `cli/main.py` (a YAML or
JSON file as first argument). There is no key for ranks of single modules.

`target_regex` would be shorter, but PEFT from 0.19 on replaces an expression by the last names of what it matches wherever a model has
stacked experts (`utils/transformers_weight_conversion.py`, `_resolve_string_target_modules`), and so adapts all layers.
"""

from typing import Any

from layercard.export.plan import Plan, Settings, refuse_ranks
from layercard.selection.placement import Placement

NOTHING = "(?!)"
"""An expression that no path matches: without any names ms-swift adapts all linear maps."""


def plan(placement: Placement, settings: Settings) -> Plan:
    """Full paths of modules and parameters, as lists."""
    refuse_ranks(placement, "ms-swift")
    given, usual = settings.named("lora_rank", "lora_alpha", "lora_dropout")
    chosen = _chosen(placement)
    backends = ("peft",) if placement.parameters else ("peft", "unsloth")
    choosing = ("target_modules", "target_regex", "target_parameters")
    return Plan(
        wanted={**chosen, **given},
        usual={"tuner_type": "lora", **usual},
        harmless={
            "tuner_type": ("lora",),
            "use_swift_lora": (False,),
            "tuner_backend": backends,
            "resume_from_checkpoint": ("",),
            "adapters": ([],),
            **{key: ([], "") for key in choosing if key not in chosen},
        },
    )


def _chosen(placement: Placement) -> dict[str, Any]:
    modules: dict[str, Any] = {"target_modules": list(placement.paths)} if placement.paths else {"target_regex": NOTHING}
    return modules | ({"target_parameters": list(placement.parameters)} if placement.parameters else {})
