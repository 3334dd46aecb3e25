"""Numbers that mean nothing, refused before they are averaged with others."""

import math
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from layercard.data.load import Dataset
from layercard.errors import DataError, ModelError
from layercard.statistics.moments import GradientMoments, InputMoments


def positions(model: nn.Module) -> tuple[int | None, bool]:
    """How many tokens a model was made for, and whether it can take no more: it has learned a vector for each position (GPT-2, OPT).

    `None` where nothing says so. Beyond that length rotary embeddings go on, to distances that the model has never seen.
    """
    config = model.config.get_text_config(decoder=True) if isinstance(model, PreTrainedModel) else getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 2:
        return None, False
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and re.search(r"wpe|pos\w*_emb|embed_pos", name)
        if is_table and limit <= module.num_embeddings <= limit + 2:  # OPT has two more rows than positions
            return limit - (0 if module.padding_idx is None else module.padding_idx + 1), True  # RoBERTa counts from behind its padding
    return (limit, False) if getattr(config, "rope_parameters", None) else (None, False)


def check_ids(model: nn.Module, dataset: Dataset) -> None:
    """Make sure that the model has an embedding for every token id, and a position for every token.

    Raises:
        DataError: It has not: the records were made with another model's tokenizer, or are too long.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    embedding = inner.get_input_embeddings() if inner is not None else None
    if inner is None or not isinstance(embedding, nn.Embedding):
        return
    limit, is_hard = positions(inner)
    for number, example in enumerate(dataset.examples, 1):
        strange = next((token for token in example.input_ids if not 0 <= token < embedding.num_embeddings), None)
        if strange is not None:
            raise DataError(
                f"{dataset.source} record {number}: token id {strange} is not among the {embedding.num_embeddings} of the model; "
                "use the model's own tokenizer"
            )
        if limit is not None and is_hard and len(example.input_ids) > limit:
            length = len(example.input_ids)
            raise DataError(f"{dataset.source} record {number}: {length} tokens, and the model has {limit} positions; lower max_length")


def check_labels(dataset: Dataset) -> None:
    """Make sure that something can be measured on every record.

    Raises:
        DataError: A record has no labelled token.
    """
    silent = next((number for number, example in enumerate(dataset.examples, 1) if not example.labelled), None)
    if silent is not None:
        raise DataError(f"{dataset.source} record {silent} has no labelled token, so nothing is measured on it; label some, or remove it")


def check_signals(path: str, inputs: InputMoments, gradients: GradientMoments, dtype: torch.dtype) -> None:
    """Make sure that what went into and came back to a map was finite.

    Raises:
        ModelError: It was not, though the loss was: half precision overflows in the backward pass.
    """
    if not (math.isfinite(inputs.energy()) and math.isfinite(gradients.residual)):
        what = "gradients" if math.isfinite(inputs.energy()) else "activations"
        advice = {torch.float16: "use --dtype float32 or bfloat16", torch.bfloat16: "use --dtype float32"}.get(
            dtype, "check the weights and records"
        )
        raise ModelError(f"{what} of {path} are not finite in {str(dtype).removeprefix('torch.')}, though the loss is; {advice}")


def check_held_out(source: str, tensors: Sequence[torch.Tensor], model: torch.nn.Module) -> None:
    """Make sure that what was measured on the held-out records with a model is finite, `[…, records]` each.

    Raises:
        DataError: It is not on some of them.
    """
    broken = torch.stack([(~tensor.isfinite()).reshape(-1, tensor.shape[-1]).any(dim=0) for tensor in tensors]).any(dim=0)
    if broken.any():
        raise DataError(
            f"on {int(broken.sum())} of the {len(broken)} held-out records of {source} the loss or its gradients are not finite; "
            f"remove such records{precision_advice(model)}"
        )


def precision_advice(model: nn.Module) -> str:
    """What to add to the advice on numbers that are not finite: `, or use --dtype float32`, unless all weights are in float32 or wider."""
    narrow = any(weight.is_floating_point() and weight.element_size() < 4 for weight in model.parameters())
    return ", or use --dtype float32" if narrow else ""
