"""A model's modules without its weights: what PEFT would adapt in it depends on nothing else.

Only `config.json` is read, and the class that it names is built on the meta device; code that comes with a model never runs.
"""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from layercard.errors import ModelError, one_line
from layercard.loading import locate, quiet_libraries
from layercard.meta import empty_model, read_config


def skeleton(name: str) -> PreTrainedModel:
    """The model that a name stands for, on the meta device.

    It is the class that the model was saved from, such as a vision-language model with its tower, or a causal language model where the
    configuration names none. A `.gguf` file names no modules, so it has no skeleton.

    Raises:
        ModelError: There is no configuration, or transformers cannot build it.
    """
    place = locate(name) if not name.endswith(".json") else name
    if place.lower().endswith(".gguf"):
        raise ModelError(f"{name} is a GGUF file, which does not name the modules; name the model's folder or its hub id")
    config = read_config(place)
    classes = [_class(each) for each in config.architectures or ()]
    kind = next((each for each in classes if each is not None), None)
    if kind is None:
        return empty_model(config, name)
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # values that the model's class refuses, each in its own way
        reason = one_line(error)
        raise ModelError(f"{name} cannot be built as {kind.__name__} ({reason}); name another model") from error


def _class(name: str) -> Any:
    """The model class of that name in transformers; `None` where it has none."""
    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None
