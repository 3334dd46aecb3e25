"""The trainers that a placement can be written for, and those that cannot say which layers to adapt."""

import difflib

from layercard.errors import ExportError
from layercard.export import axolotl, llamafactory, megatron, mlx, peft_file, swift, trl, unsloth
from layercard.export.plan import Python, Trainer

_JSON_TOO = (".yaml", ".yml", ".json")
TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer("peft", "0.21.2", peft_file.plan, (".json",)),
        Trainer("trl", "1.16.0", trl.plan, python=Python(trl.script, trl.arguments)),
        Trainer("axolotl", "0.19.0", axolotl.plan),
        Trainer("llamafactory", "0.9.5", llamafactory.plan, _JSON_TOO),
        Trainer("unsloth", "2026.10.9", unsloth.plan, (), Python(unsloth.script, unsloth.arguments)),
        Trainer("ms-swift", "4.6.0", swift.plan, _JSON_TOO),
        Trainer("mlx-lm", "0.32.2", mlx.plan),
        Trainer("megatron-bridge", "0.3.1", megatron.plan),
    )
}
REFUSED = {
    "torchtune": "torchtune's recipes put adapters on the same maps of every layer (lora_attn_modules, apply_lora_to_mlp) and have no key "
    "for layers; export to another trainer",
}


def trainer_named(name: str) -> Trainer:
    """The trainer of that name.

    Raises:
        ExportError: It cannot express a placement, or is unknown.
    """
    if name in REFUSED:
        raise ExportError(REFUSED[name])
    if name not in TRAINERS:
        close = difflib.get_close_matches(name.lower(), TRAINERS, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ExportError(f"{name!r} is no trainer that placements are written for; {hint}known are {', '.join(TRAINERS)}")
    return TRAINERS[name]
