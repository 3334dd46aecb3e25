"""Which stored tensors make each parameter of a model: one under the same or an older name, or several put together (experts)."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from layercard.errors import ModelError
from layercard.stream.weights import Weights


@dataclass(frozen=True)
class Source:
    """Where one tensor of a model comes from.

    Attributes:
        path: Its name in the model.
        shape: Its shape there.
        stored: Names of the stored tensors, each with the pattern of the converter that it matches (empty without one).
        converter: What puts several together, as transformers does when it loads them; `None` where one is taken as it is.
    """

    path: str
    shape: tuple[int, ...]
    stored: tuple[tuple[str, str], ...]
    converter: WeightConverter | None = None

    def read(self, weights: Weights, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor; what it is made of is in memory meanwhile too.

        Raises:
            ModelError: It cannot be read, or is not of the model's shape.
        """
        if self.converter is None:
            found = weights.read(self.stored[0][0], dtype, device)
        else:
            converter = deepcopy(self.converter)
            for name, pattern in self.stored:
                converter.add_tensor(self.path, name, pattern, weights.read(name, dtype))
            found = self._converted(converter).to(device)
        if tuple(found.shape) != self.shape:
            raise ModelError(f"{self.stored[0][0]} is stored as {tuple(found.shape)}, not {self.shape}; use a whole model")
        return found

    def _converted(self, converter: WeightConverter) -> torch.Tensor:
        try:
            made: Mapping[str, Any] = converter.convert(self.path)
            value = made[self.path]
        except Exception as error:  # operations of transformers on tensors that do not fit each other
            raise ModelError(f"{self.path} cannot be put together from {self.stored[0][0]} and others; use a whole model") from error
        return value[0] if isinstance(value, list) else value


def find_sources(model: PreTrainedModel, weights: Weights, name: str) -> dict[str, Source]:
    """The source of each parameter and of each stored buffer; tied parameters share one.

    Raises:
        ModelError: There is none, or it is of another shape.
    """
    own = _own_sources(model, weights)
    persistent = model.state_dict().keys()
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = [(path, value) for path, value in model.named_buffers(remove_duplicate=False) if path in persistent]
    found = {path: own[path] for path, _ in (*parameters, *buffers) if path in own}
    source_of = {id(value): found[path] for path, value in parameters if path in found}
    for path, value in parameters:
        if path not in found and id(value) in source_of:
            found[path] = source_of[id(value)]
    missing = [path for path, _ in parameters if path not in found]
    if missing:
        raise ModelError(
            f"{name}: its files hold no {missing[0]} ({len(missing)} such tensors are missing); a model that is stored under other names "
            "cannot be streamed: profile without --stream"
        )
    for path, value in parameters:
        (first, *_), shape = found[path].stored, tuple(value.shape)
        if found[path].converter is None and weights.tensors[first[0]].shape != shape:
            raise ModelError(f"{name}: {first[0]} is stored as {weights.tensors[first[0]].shape}, not {shape}; use a whole model")
    return found


def _own_sources(model: PreTrainedModel, weights: Weights) -> dict[str, Source]:
    """By the model's own names: files may spell them as older versions did, and leave out the prefix of the base model."""
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    parts: dict[str, list[tuple[str, str]]] = {}
    for stored in sorted(weights.tensors, key=dot_natural_key):
        path, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if path not in known and stored in known:  # a name that needed no change
            path, pattern = stored, None
        if path in known:
            parts.setdefault(path, []).append((stored, pattern or ""))
    return {
        path: Source(path, tuple(known[path].shape), tuple(stored), by_pattern.get(stored[0][1]))
        for path, stored in parts.items()
        if len(stored) == 1 or stored[0][1]
    }
