"""A model's modules without its weights: what PEFT would adapt in it, and what training costs, depend on nothing else.

Only `config.json` is read, and the class that it names is built on the meta device; code that comes with a model never runs.
Whatever is wrong is said in one line, as a `ModelError`.
"""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from layercard.errors import ModelError, one_line
from layercard.hub import hub_answers
from layercard.models.layers import find_blocks
from layercard.models.load import BaseModel, check_depth, locate, quiet_libraries

BUILT_IN: dict[str, dict[str, Any]] = {
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50_257},
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
    },
}
"""Configurations that need no file and no network."""


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
    for architecture in config.architectures or ():
        kind = getattr(transformers, architecture, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return empty_model(config, name, kind)
    return empty_model(config, name)


def empty_model(config: PreTrainedConfig, name: str, kind: type[PreTrainedModel] | None = None) -> Any:
    """The model of a configuration without memory for its weights: of the class `kind`, or a causal language model."""
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            return kind(config).eval() if kind is not None else AutoModelForCausalLM.from_config(config)
    except Exception as error:  # values that the model's class refuses, each in its own way
        what = "a causal language model" if kind is None else kind.__name__
        raise ModelError(f"{name} cannot be built as {what} ({one_line(error)}); name another model") from error


def random_model(config: PreTrainedConfig, name: str, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """A model of a configuration with random weights, for measuring only: it has no tokenizer."""
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    return BaseModel(model, None, name, "", find_blocks(model))


def read_config(name: str) -> PreTrainedConfig:
    """The configuration that a name stands for.

    Args:
        name: A built-in shape (`gpt2-medium`, `qwen3-8b`), a `config.json`, a folder with one, or an id on the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelError(f"{name} has no config.json; name a model folder, a config.json or one of {', '.join(BUILT_IN)}")
    values = BUILT_IN.get(name.lower())
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} cannot be read as a configuration ({one_line(error)}); name a model's config.json") from error
        if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
            raise ModelError(f"{path} names no model_type; name the config.json of a transformers model")
    if values is not None:
        check_depth(values, name)
        try:
            return AutoConfig.for_model(**{key: value for key, value in values.items() if key != "quantization_config"})
        except Exception as error:  # an unknown architecture, or values that its configuration refuses
            raise ModelError(f"{name}: transformers cannot use this configuration ({one_line(error)}); name another model") from error

    # What is left is an id on the hub.
    close = difflib.get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.75)
    hint = f", did you mean {close[0]}?" if close else ""
    choices = f"name a config.json, a model folder, an id on the hub or one of {', '.join(BUILT_IN)}"
    if close or name.count("/") != 1 or path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"{name!r}: no such configuration{hint}; {choices}")
    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=not hub_answers())
    except Exception as error:  # transformers and the hub client each raise their own kinds
        raise ModelError(f"{name!r}: its config.json cannot be had ({one_line(error)}); {choices}") from error
