"""layercard: profile a language model once, read its Layer Card, and fine-tune only the layers that matter.

```python
import layercard

card = layercard.profile(model, tokenizer, records)
placement = layercard.select(card, k=5)
model = layercard.apply(model, placement, LoraConfig(r=16, lora_alpha=32))
```

Importing the package imports nothing heavy; a name brings its module along when it is first used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layercard.adapters.apply import apply as apply
    from layercard.adapters.lora_config import lora_config as lora_config
    from layercard.adapters.verify import verify_adapter as verify_adapter, verify_config as verify_config
    from layercard.card.card import LayerCard as LayerCard
    from layercard.data.load import Dataset as Dataset, load_data as load_data
    from layercard.errors import LayercardError as LayercardError
    from layercard.fast.cut import cut_backward as cut_backward
    from layercard.fast.fast_training import (
        CutBackward as CutBackward,
        FastTraining as FastTraining,
        FrozenPrefix as FrozenPrefix,
        fast_training as fast_training,
    )
    from layercard.fast.labels import labels_only as labels_only
    from layercard.fast.lora import fused_lora as fused_lora
    from layercard.fast.packing import unpadded as unpadded
    from layercard.fast.prefix import frozen_prefix as frozen_prefix
    from layercard.models.load import load_model as load_model
    from layercard.profiling.profile import profile as profile
    from layercard.report.hub import pull as pull, push as push
    from layercard.selection.budgets import Budgets as Budgets
    from layercard.selection.placement import Placement as Placement
    from layercard.selection.select import select as select
    from layercard.serving.shared_prefix import SharedPrefix as SharedPrefix
    from layercard.settings import (
        FastSettings as FastSettings,
        ProfileSettings as ProfileSettings,
        RunSettings as RunSettings,
        TrainSettings as TrainSettings,
    )
    from layercard.workflow.run import run as run

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the program that imports it listens
# PEFT imports bitsandbytes where it is installed, which warns then that it finds no faster kernel for some CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_NAMES = {
    "adapters.apply": "apply",
    "adapters.lora_config": "lora_config",
    "adapters.verify": "verify_adapter verify_config",
    "card.card": "LayerCard",
    "data.load": "Dataset load_data",
    "errors": "LayercardError",
    "fast.cut": "cut_backward",
    "fast.fast_training": "CutBackward FastTraining FrozenPrefix fast_training",
    "fast.labels": "labels_only",
    "fast.lora": "fused_lora",
    "fast.packing": "unpadded",
    "fast.prefix": "frozen_prefix",
    "models.load": "load_model",
    "profiling.profile": "profile",
    "report.hub": "pull push",
    "selection.budgets": "Budgets",
    "selection.placement": "Placement",
    "selection.select": "select",
    "serving.shared_prefix": "SharedPrefix",
    "settings": "FastSettings ProfileSettings RunSettings TrainSettings",
    "workflow.run": "run",
}
"""The public names of each module."""
_HOMES = {name: f"layercard.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "plots":
        return import_module("layercard.report.plots")
    raise AttributeError(f"module 'layercard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
