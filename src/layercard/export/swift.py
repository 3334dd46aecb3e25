"""ms-swift's YAML or JSON, or its command line.

Read from ms-swift 4.6.0: `arguments/tuner_args.py` (`target_regex` takes the place of `target_modules`; `target_parameters`;
`lora_dropout` is 0.05 where nothing says), `pipelines/train/tuner.py` (`prepare_adapter` hands both to PEFT, which wants the whole path
to match the expression), `cli/main.py` (a YAML or JSON file as first argument). There is no key for ranks of single modules.
"""

import re

from layercard.export.plan import Plan, Settings, refuse_ranks, split
from layercard.selection import Placement

NOTHING = "(?!)"
"""An expression that no path matches."""


def plan(placement: Placement, settings: Settings) -> Plan:
    """One regular expression that matches the full paths, and the parameters as a list."""
    refuse_ranks(placement, "ms-swift")
    given, usual = settings.named("lora_rank", "lora_alpha", "lora_dropout")
    parameters = {"target_parameters": list(placement.parameters)} if placement.parameters else {}
    return Plan(
        wanted={"target_regex": expression(placement), **parameters, **given},
        usual={"tuner_type": "lora", **usual},
        harmless={
            "tuner_type": ("lora",),
            "train_type": ("lora",),
            "target_modules": ([],),
            "use_swift_lora": (False,),
            "tuner_backend": ("peft",)
            if placement.parameters
            else (
                "peft",
                "unsloth",
            ),
            "resume_from_checkpoint": ("",),
            "adapters": ([],),
            **({} if placement.parameters else {"target_parameters": ([],)}),
        },
    )


def expression(placement: Placement) -> str:
    r"""A regular expression that matches the placement's module paths and nothing else.

    >>> expression(Placement({"layers": 9}, (2, 8), ("h.2.up", "h.8.up"), "given"))
    '^h\\.(2|8)\\.(up)$'
    """
    if not placement.paths:
        return NOTHING
    parts = split(placement)
    if parts is None or parts.shared is None:
        return "^(" + "|".join(re.escape(path) for path in placement.paths) + ")$"
    layers, names = "|".join(map(str, parts.names)), "|".join(map(re.escape, parts.shared))
    return rf"^{re.escape(parts.prefix)}\.({layers})\.({names})$"
