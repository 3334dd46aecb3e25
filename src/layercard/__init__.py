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
    from layercard.adapters.verify import verify_adapter as verify_adapter
    from layercard.adapters.verify import verify_config as verify_config
    from layercard.card.card import LayerCard as LayerCard
    from layercard.data.load import Dataset as Dataset
    from layercard.data.load import load_data as load_data
    from layercard.errors import LayercardError as LayercardError
    from layercard.fast.cut import cut_backward as cut_backward
    from layercard.fast.fast_training import CutBackward as CutBackward
    from layercard.fast.fast_training import FastTraining as FastTraining
    from layercard.fast.fast_training import FrozenPrefix as FrozenPrefix
    from layercard.fast.fast_training import fast_training as fast_training
    from layercard.fast.labels import labels_only as labels_only
    from layercard.fast.lora import fused_lora as fused_lora
    from layercard.fast.packing import unpadded as unpadded
    from layercard.fast.prefix import frozen_prefix as frozen_prefix
    from layercard.models.load import load_model as load_model
    from layercard.profiling.profile import profile as profile
    from layercard.report.hub import pull as pull
    from layercard.report.hub import push as push
    from layercard.selection.budgets import Budgets as Budgets
    from layercard.selection.placement import Placement as Placement
    from layercard.selection.select import select as select
    from layercard.serving.shared_prefix import SharedPrefix as SharedPrefix
    from layercard.settings import FastSettings as FastSettings
    from layercard.settings import ProfileSettings as ProfileSettings
    from layercard.settings import TrainSettings as TrainSettings

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the program that imports it listens
# PEFT imports bitsandbytes where it is installed, which warns then that it finds no faster kernel for some CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "Budgets": "layercard.selection.budgets",
    "CutBackward": "layercard.fast.fast_training",
    "Dataset": "layercard.data.load",
    "FastSettings": "layercard.settings",
    "FastTraining": "layercard.fast.fast_training",
    "FrozenPrefix": "layercard.fast.fast_training",
    "LayerCard": "layercard.card.card",
    "LayercardError": "layercard.errors",
    "Placement": "layercard.selection.placement",
    "ProfileSettings": "layercard.settings",
    "SharedPrefix": "layercard.serving.shared_prefix",
    "TrainSettings": "layercard.settings",
    "apply": "layercard.adapters.apply",
    "cut_backward": "layercard.fast.cut",
    "fast_training": "layercard.fast.fast_training",
    "frozen_prefix": "layercard.fast.prefix",
    "fused_lora": "layercard.fast.lora",
    "labels_only": "layercard.fast.labels",
    "lora_config": "layercard.adapters.lora_config",
    "load_data": "layercard.data.load",
    "load_model": "layercard.models.load",
    "profile": "layercard.profiling.profile",
    "pull": "layercard.report.hub",
    "push": "layercard.report.hub",
    "select": "layercard.selection.select",
    "unpadded": "layercard.fast.packing",
    "verify_adapter": "layercard.adapters.verify",
    "verify_config": "layercard.adapters.verify",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "plots":
        return import_module("layercard.report.plots")
    raise AttributeError(f"module 'layercard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
