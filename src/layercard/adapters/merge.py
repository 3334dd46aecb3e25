"""A plain LoRA adapter added to the weights of its base model, file by file: at most one weight is in memory at a time."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from layercard.adapters.files import CONFIG_FILE, PLACEMENT_FILE, check_loads, read_adapter, saved_placement
from layercard.errors import OutputError, PlacementError
from layercard.models.stored import weight_files
from layercard.models.streamed import StreamedModel

PREFIX = "base_model.model."
ROWS = 1024
"""Rows of a weight that are added in float32 at once."""


class Update(NamedTuple):
    """What an adapter adds to one stored weight: `scaling · B A`, turned where the model stores `[in, out]`."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scaling: float
    transposed: bool

    def delta(self) -> torch.Tensor:
        """In float32, as the weight is stored."""
        product = self.scaling * (self.b.float() @ self.a.float())
        return product.T if self.transposed else product


def read_updates(streamed: StreamedModel, adapter: Path) -> dict[str, Update]:
    """The updates of an adapter, by the names of the stored weights that they belong to.

    Raises:
        PlacementError: It is not a plain LoRA adapter of linear modules, or not of this model.
    """
    saved, placement = read_adapter(adapter, streamed.base.model), saved_placement(adapter)
    if placement is not None and placement.model.get("layers") != len(streamed.blocks):
        raise PlacementError(f"{adapter} is for a model of {placement.model.get('layers')} blocks, not {len(streamed.blocks)}")
    given, config = vars(saved.config), saved.config
    unlike = [name for name in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices") if given.get(name)]
    if not isinstance(config, LoraConfig) or unlike or config.bias != "none":
        kind = ", ".join(unlike) or (f"bias={given.get('bias')}" if isinstance(config, LoraConfig) else PeftType(config.peft_type).value)
        raise PlacementError(f"{adapter} is not plain LoRA ({kind}); merge it in memory with PEFT's merge_and_unload")
    check_loads(streamed.base.model, saved, str(adapter), streamed.base.name)
    tensors = saved.weights or {}
    modules = {module.path: module for block in streamed.blocks for module in block.linear_modules}
    updates: dict[str, Update] = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if path not in modules or b is None:
            raise PlacementError(f"{key} of {adapter} is not of a linear module; merge it in memory with PEFT's merge_and_unload")
        source = streamed.sources[f"{path}.weight"]
        if source.converter is not None:
            raise PlacementError(f"{path} is stored in several pieces, so it cannot be merged file by file; use PEFT's merge_and_unload")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
        scaling = alpha / (math.sqrt(a.shape[0]) if config.use_rslora else a.shape[0])
        updates[source.stored[0][0]] = Update(a, b, scaling, modules[path].transposed)
    others = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others or not updates or 2 * len(updates) != len(tensors):
        raise PlacementError(f"{adapter} holds {others[0] if others else 'no pairs of lora_A and lora_B'}; only plain LoRA is merged")
    return updates


def merge_streamed(
    streamed: StreamedModel, adapter: str | Path, output: str | Path, progress: Callable[[str, int, int], None] | None = None
) -> list[str]:
    """Write the model with the adapter added to its weights into a new folder, one file after another.

    Weights keep the type they are stored in; the sum is made in float32. Configuration, tokenizer and index are copied.

    Args:
        streamed: The base model on disk (`open_model`).
        adapter: Folder of a plain LoRA adapter.
        output: A folder that is not there yet, or is empty.
        progress: Told of the phase `merge`, in files.

    Returns:
        The stored weights that were changed.

    Raises:
        PlacementError: As `read_updates`.
        OutputError: The folder holds something, or cannot be written.
    """
    adapter, output = Path(adapter), Path(output)
    updates = read_updates(streamed, adapter)
    folder = next(iter(streamed.weights.tensors.values())).path.parent
    files = weight_files(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists already; name another output")
    part = output.with_name(f".{output.name[:200]}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for number, path in enumerate(files, 1):
            shutil.copyfile(path, part / path.name)
            with (part / path.name).open("r+b") as file:  # sizes and types stay, so each weight is written where it was
                for name in (name for name in updates if streamed.weights.tensors[name].path == path):
                    weight, delta = streamed.weights.read(name), updates[name].delta()
                    for rows, change in zip(weight.split(ROWS), delta.split(ROWS), strict=True):
                        rows.copy_(rows.float() + change)
                    file.seek(streamed.weights.tensors[name].start)
                    file.write(weight.view(torch.uint8).numpy().data)
            if progress:
                progress("merge", number, len(files))
        for path in folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (CONFIG_FILE, PLACEMENT_FILE):
                shutil.copyfile(path, part / path.name)
        if output.exists():
            output.rmdir()
        part.rename(output)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {' '.join(str(error).split())}; make room, or name another output") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(updates)
