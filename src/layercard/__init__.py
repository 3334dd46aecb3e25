"""layercard: profile a language model once, read its Layer Card, and fine-tune only the layers that matter.

```python
import layercard

card = layercard.profile(model, tokenizer, records)
placement = card.select(k=5)
model = layercard.apply(model, placement, LoraConfig(r=16, lora_alpha=32))
```

Importing the package imports nothing heavy; a name brings its module along when it is first used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layercard.adapters import apply as apply
    from layercard.api import profile as profile
    from layercard.card import LayerCard as LayerCard
    from layercard.data import Dataset as Dataset
    from layercard.data import load_data as load_data
    from layercard.errors import LayercardError as LayercardError
    from layercard.fast.callbacks import CutBackward as CutBackward
    from layercard.fast.callbacks import FastTraining as FastTraining
    from layercard.fast.callbacks import FrozenPrefix as FrozenPrefix
    from layercard.fast.cut import cut_backward as cut_backward
    from layercard.fast.labels import labels_only as labels_only
    from layercard.fast.lora import fused_lora as fused_lora
    from layercard.fast.packing import unpadded as unpadded
    from layercard.fast.prefix import frozen_prefix as frozen_prefix
    from layercard.fast.together import fast_training as fast_training
    from layercard.hub_cards import pull as pull
    from layercard.hub_cards import push as push
    from layercard.models import load_model as load_model
    from layercard.profiling import ProfileSettings as ProfileSettings
    from layercard.selection import Budgets as Budgets
    from layercard.selection import Placement as Placement
    from layercard.selection.select import select as select
    from layercard.serving import SharedPrefix as SharedPrefix
    from layercard.settings import FastSettings as FastSettings
    from layercard.settings import TrainSettings as TrainSettings
    from layercard.verification import verify_adapter as verify_adapter
    from layercard.verification import verify_config as verify_config

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the program that imports it listens
# PEFT imports bitsandbytes where it is installed, which warns then that it finds no faster kernel for some CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "Budgets": "layercard.selection",
    "CutBackward": "layercard.fast.callbacks",
    "Dataset": "layercard.data",
    "FastSettings": "layercard.settings",
    "FastTraining": "layercard.fast.callbacks",
    "FrozenPrefix": "layercard.fast.callbacks",
    "LayerCard": "layercard.card",
    "LayercardError": "layercard.errors",
    "Placement": "layercard.selection",
    "ProfileSettings": "layercard.profiling",
    "SharedPrefix": "layercard.serving",
    "TrainSettings": "layercard.settings",
    "apply": "layercard.adapters",
    "cut_backward": "layercard.fast.cut",
    "fast_training": "layercard.fast.together",
    "frozen_prefix": "layercard.fast.prefix",
    "fused_lora": "layercard.fast.lora",
    "labels_only": "layercard.fast.labels",
    "load_data": "layercard.data",
    "load_model": "layercard.models",
    "profile": "layercard.api",
    "pull": "layercard.hub_cards",
    "push": "layercard.hub_cards",
    "select": "layercard.selection",
    "unpadded": "layercard.fast.packing",
    "verify_adapter": "layercard.verification",
    "verify_config": "layercard.verification",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "plots":
        return import_module("layercard.plots")
    raise AttributeError(f"module 'layercard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
