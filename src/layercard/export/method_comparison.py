"""A placement as an entry of PEFT's method comparison (`method_comparison/MetaMathQA` in its repository).

An entry is a folder `experiments/lora/NAME` with `adapter_config.json`, as PEFT saves it, and `training_params.json`, which replaces
values of that benchmark's `default_training_params.json`. `python run.py experiments/lora/NAME` there trains and scores it.
"""

import json
from pathlib import Path
from typing import Any

from layercard.adapters.lora_config import lora_arguments
from layercard.errors import ExportError
from layercard.export.export import hub_name
from layercard.export.trainers import ALPHA, DROPOUT, RANK, LoraSettings
from layercard.files import json_text, write_text
from layercard.selection.placement import Placement

NAME = "peft-method-comparison"
WEIGHT_DECAY = 0.1
"""That of the benchmark, whose optimiser's arguments are replaced together."""


def comparison_entry(placement: Placement, settings: LoraSettings) -> dict[str, str]:
    """The files of the entry by their names.

    Raises:
        ExportError: The model has a name that cannot be loaded by it, or the settings contradict the placement.
    """
    from peft import LoraConfig

    settings.check(placement)
    values = settings.values(8)
    arguments = lora_arguments(placement, r=values[RANK], lora_alpha=values[ALPHA], lora_dropout=values[DROPOUT])
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in LoraConfig(**arguments).to_dict().items()}
    config = {name: getattr(value, "value", value) for name, value in config.items()}
    training: dict[str, Any] = {"model_id": hub_name(placement)}
    if placement.learning_rate is not None:
        training["optimizer_kwargs"] = {"lr": placement.learning_rate, "weight_decay": WEIGHT_DECAY}
    return {"adapter_config.json": json_text(json.loads(json.dumps(config, default=str))), "training_params.json": json_text(training)}


def write_entry(placement: Placement, settings: LoraSettings, folder: Path, *, force: bool = False) -> list[str]:
    """Write the entry, and say what should be known of it.

    Raises:
        ExportError: As `comparison_entry`, or `folder` is a file.
        OutputError: It holds such files already, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file, and an entry is a folder; name one such as experiments/lora/{folder.stem}")
    for name, text in comparison_entry(placement, settings).items():
        write_text(folder / name, text, force=force)
    notes = [f"wrote {folder / 'adapter_config.json'} and training_params.json"]
    if [part.name for part in folder.resolve().parents][1:2] != ["experiments"]:
        notes.append("PEFT takes entries from method_comparison/MetaMathQA/experiments/lora/NAME: put the folder there")
    return notes
