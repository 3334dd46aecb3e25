"""TRL: Python with `peft_config=`, or the YAML of its command line.

Read from TRL 1.16.0: `trainer/model_config.py` (the keys; a single entry of `lora_target_modules` becomes a regular expression) and
`trainer/utils.py` (`get_peft_config`). The command line has no key for layers and none for ranks of single modules; in Python all that
`LoraConfig` has can be said.
"""

import json
from typing import Any

from layercard.adapters.lora_config import lora_arguments
from layercard.errors import ExportError
from layercard.export.plan import Plan, Settings, as_arguments, heading, refuse_fractions
from layercard.selection.placement import Placement

_SCRIPT = """# {heading}
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

peft_config = LoraConfig(
{arguments}
)
trainer = SFTTrainer(
    model={model},
    args=SFTConfig(output_dir="adapter"),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    peft_config=peft_config,
)
trainer.train()
trainer.save_model()
"""


def plan(placement: Placement, settings: Settings) -> Plan:
    """Keys of `trl sft --config`: full paths."""
    if placement.rank_pattern:
        raise ExportError("TRL's command line has one rank for all adapters; export without --merge for Python, which has one for each")
    refuse_fractions("TRL's command line", settings, placement)
    given, usual = settings.named("lora_r", "lora_alpha", "lora_dropout")
    paths = list(placement.paths) * (2 if len(placement.paths) == 1 else 1)  # one alone becomes an expression, which PEFT may widen
    parameters = {"lora_target_parameters": list(placement.parameters)} if placement.parameters else {}
    return Plan(
        wanted={"use_peft": True, "lora_target_modules": paths, **parameters, **given},
        usual=usual,
        harmless={} if placement.parameters else {"lora_target_parameters": ([],)},
    )


def arguments(placement: Placement, settings: Settings) -> dict[str, Any]:
    """Arguments of PEFT's `LoraConfig`."""
    return lora_arguments(placement, r=settings.whole_rank, lora_alpha=settings.scaling, lora_dropout=settings.dropping)


def script(placement: Placement, settings: Settings) -> str:
    """A script for `SFTTrainer`; what the placement says of the model is a quoted string in it."""
    lines = as_arguments(arguments(placement, settings))
    return _SCRIPT.format(heading=heading(placement), arguments=lines, model=json.dumps(str(placement.model.get("name", "model"))))
