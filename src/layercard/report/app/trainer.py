"""A placement as settings of other trainers: the arguments of PEFT's `LoraConfig`, and a script for TRL."""

import json
from typing import Any

from layercard.adapters import lora_config as peft
from layercard.card.numbers import Json
from layercard.selection.placement import Placement
from layercard.settings import TrainSettings

LORA_FILE = "lora_config.json"
_SCRIPT = '''"""Fine-tunes {model_words} in layers {layers_words} only. Put {file} beside this script; needs trl, peft and datasets."""

import json
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

MODEL = {model}
DATA = "train.jsonl"  # records with prompt and completion, messages or text

trainer = SFTTrainer(
    model=MODEL,
    train_dataset=load_dataset("json", data_files=DATA, split="train"),
    args=SFTConfig(output_dir="adapter", learning_rate={learning_rate}, per_device_train_batch_size={batch_size}, num_train_epochs=1),
    peft_config=LoraConfig(**json.loads(Path({file!r}).read_text(encoding="utf-8"))),
)
trainer.train()
trainer.save_model()
'''


def lora_arguments(placement: Json, settings: TrainSettings | None = None) -> dict[str, Any]:
    """Keyword arguments of `peft.LoraConfig` that put adapters exactly where a placement says.

    Args:
        placement: The JSON object of a placement; where it has ranks and alphas of its own, they are taken over.
        settings: Rank, alpha and dropout; those of `layercard train` unless given.
    """
    settings = settings or TrainSettings()
    chosen = Placement.from_json(dict(placement))
    return peft.lora_arguments(chosen, r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout)


def lora_json(placement: Json) -> str:
    """`lora_arguments` as the text of a file."""
    return json.dumps(lora_arguments(placement), indent=1, ensure_ascii=False) + "\n"


def trl_script(placement: Json, settings: TrainSettings | None = None) -> str:
    """A script that trains with TRL; whatever the placement says of the model is a quoted string in it."""
    settings = settings or TrainSettings()
    name = str(placement["model"].get("name", "model"))
    return _SCRIPT.format(
        model=ascii(name),
        model_words=_comment(name),
        layers_words=", ".join(str(int(layer)) for layer in placement["layers"]),
        file=LORA_FILE,
        learning_rate=f"{settings.learning_rate:g}",
        batch_size=settings.batch_size,
    )


def _comment(name: str) -> str:
    """A name that can stand in a docstring: letters, digits and the usual marks of model names."""
    return "".join(letter if letter.isalnum() or letter in "-_./ " else "?" for letter in name)[:80]
