"""Python for unsloth, which reads no file.

Read from unsloth 2026.10.9: `models/llama.py` and `models/vision.py` (`get_peft_model`: module names, or full paths as a list;
`layers_to_transform` with `layers_pattern`; further arguments go to PEFT's `LoraConfig`, among them `rank_pattern` and `alpha_pattern`).
Where `target_parameters` is `None` and the names are those of an MLP, it adds the stacked experts of a mixture of experts by itself; an
empty list keeps it from that.
"""

import json
from typing import Any

from layercard.adapters.lora_config import patterns
from layercard.export.plan import Plan, Settings, as_arguments, by_layer_key, heading, split
from layercard.selection.placement import Placement

FAST = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
}  # fmt: skip
"""The maps that unsloth has names for; each name occurs once in a block."""
_SCRIPT = """# {heading}
from unsloth import {kind}

model, tokenizer = {kind}.from_pretrained({model})
model = {kind}.get_peft_model(
    model,
{arguments}
)
"""


def plan(placement: Placement, settings: Settings) -> Plan:
    """Arguments of `get_peft_model`: layers and names where that is safe, else full paths."""
    given, usual = settings.named("r", "lora_alpha", "lora_dropout")
    return Plan(wanted={**_chosen(placement), **given}, usual=usual)


def arguments(placement: Placement, settings: Settings) -> dict[str, Any]:
    """`plan` as one dictionary."""
    return plan(placement, settings).keys


def script(placement: Placement, settings: Settings) -> str:
    """Python that loads the model and puts the adapters on; what the placement says of the model is a quoted string in it."""
    parts = split(placement)
    kind = "FastLanguageModel" if parts is not None and parts.text_only else "FastModel"
    lines = as_arguments(arguments(placement, settings))
    name = json.dumps(str(placement.model.get("name", "model")))
    return _SCRIPT.format(heading=heading(placement), kind=kind, model=name, arguments=lines)


def _chosen(placement: Placement) -> dict[str, Any]:
    parts = by_layer_key(placement)
    if parts is not None and parts.shared is not None and FAST.issuperset(parts.shared):
        return {
            "target_modules": [name.rpartition(".")[2] for name in parts.shared],
            "layers_to_transform": list(placement.layers),
            "layers_pattern": parts.prefix.rpartition(".")[2],
            "target_parameters": [],
        }
    return {"target_modules": list(placement.paths), "target_parameters": list(placement.parameters), **patterns(placement)}
