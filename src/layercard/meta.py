"""Models without their weights: shapes from a configuration alone, a random model where it fits, and a device's rates where not.

No weights are ever fetched: of a model on the hub only its `config.json` is read. Code that comes with a model never runs.
"""

import difflib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from layercard.cost import CostModel, Shape
from layercard.errors import ModelError, one_line
from layercard.hub import hub_answers
from layercard.layers import find_blocks
from layercard.loading import quiet_libraries
from layercard.models import BaseModel
from layercard.stamps import synchronize

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

ROOM = 0.7
"""Share of the free memory that a random model with its training may take."""
UNKNOWN_BYTES = 4 * 2**30
"""Free memory that is assumed where the system does not say."""


def read_config(name: str) -> PreTrainedConfig:
    """The configuration that a name stands for.

    Args:
        name: A built-in shape (`gpt2-medium`, `qwen3-8b`), a `config.json`, a folder with one, or an id on the hub.

    Raises:
        ModelError: There is none, or transformers does not know the architecture.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelError(f"{name} has no config.json; name a model folder, a config.json or one of {', '.join(BUILT_IN)}")
    if path.is_file():
        return _from_values(_read(path), name)
    if name.lower() in BUILT_IN:
        return _from_values(BUILT_IN[name.lower()], name)
    close = difflib.get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.75)
    hint = f", did you mean {close[0]}?" if close else ""
    known = f"name a config.json, a model folder, an id on the hub or one of {', '.join(BUILT_IN)}"
    if close or name.count("/") != 1 or path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"{name!r}: no such configuration{hint}; {known}")
    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=not hub_answers())
    except Exception as error:  # transformers and the hub client each raise their own kinds
        raise ModelError(f"{name!r}: its config.json cannot be had ({one_line(error)}); {known}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as a configuration ({one_line(error)}); name a model's config.json") from error
    if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
        raise ModelError(f"{path} names no model_type; name the config.json of a transformers model")
    return value


def _from_values(values: dict[str, Any], name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(**{key: value for key, value in values.items() if key != "quantization_config"})
    except Exception as error:  # an unknown architecture, or values that its configuration refuses
        raise ModelError(f"{name}: transformers cannot use this configuration ({one_line(error)}); name another model") from error


def empty_model(config: PreTrainedConfig, name: str) -> Any:
    """The model of a configuration without memory for its weights.

    Raises:
        ModelError: It is no causal language model that transformers can build.
    """
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # as above
        raise ModelError(f"{name} cannot be built as a causal language model ({one_line(error)}); name another model") from error


def random_model(config: PreTrainedConfig, name: str, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """A model of a configuration with random weights, for measuring only: it has no tokenizer."""
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    return BaseModel(model, None, name, "", find_blocks(model))


def estimated_cost(model: Any, *, flops: float, bandwidth: float, name: str, dtype: str, device: str = "", **sizes: Any) -> CostModel:
    """`CostModel.from_rates` for a model that may be empty; `sizes` are `batch_size`, `length` and `rank`."""
    shapes = [
        [
            *(Shape(p.in_features, p.out_features) for p in block.projections),
            *(Shape(s.in_features, s.out_features, s.experts, float(s.active)) for s in block.stacks),
        ]
        for block in find_blocks(model)
    ]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    found = CostModel.from_rates(
        shapes, flops=flops, bandwidth=bandwidth, vocabulary=vocabulary, model=name, dtype=dtype, device=device, **sizes
    )
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    return found.model_copy(update={"weights_bytes": size * sum(weight.numel() for weight in model.parameters())})


def fits(cost: CostModel, device: torch.device) -> bool:
    """Whether the model and training in all its layers fit the memory that is free on a device."""
    needed = cost.weights_bytes + cost.peak_memory(range(len(cost.layers)))
    return needed <= ROOM * free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on the CPU, that of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return UNKNOWN_BYTES


def device_rates(device: torch.device, dtype: torch.dtype, rows: int = 256) -> tuple[float, float]:
    """What this device reaches: FLOP/s of a product `[rows, 2048] @ [2048, 2048]`, and bytes/s of adding two large tensors."""
    width = 2048
    a, b = torch.ones(rows, width, device=device, dtype=dtype), torch.ones(width, width, device=device, dtype=dtype)
    large = torch.ones(2**23, device=device, dtype=dtype)
    other, result = large.clone(), torch.empty_like(large)
    product = _best(lambda: torch.matmul(a, b), device)
    added = _best(lambda: torch.add(large, other, out=result), device)
    return 2 * rows * width * width / product, 3 * large.nbytes / added


def _best(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
