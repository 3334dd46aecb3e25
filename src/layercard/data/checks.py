"""Numbers that mean nothing, refused before they are averaged with others."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from layercard.data.load import Dataset
from layercard.errors import DataError, ModelError
from layercard.statistics.moments import GradientMoments, InputMoments


def check_ids(model: nn.Module, dataset: Dataset) -> None:
    """Make sure that the model has an embedding for every token id.

    Raises:
        DataError: It has not: the records were made with another model's tokenizer.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    embedding = inner.get_input_embeddings() if inner is not None else None
    if not isinstance(embedding, nn.Embedding):
        return
    for number, example in enumerate(dataset.examples, 1):
        strange = next((token for token in example.input_ids if not 0 <= token < embedding.num_embeddings), None)
        if strange is not None:
            raise DataError(
                f"{dataset.source} record {number}: token id {strange} is not among the {embedding.num_embeddings} of the model; "
                "use the model's own tokenizer"
            )


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
        raise ModelError(
            f"{what} of {path} are not finite in {str(dtype).removeprefix('torch.')}, though the loss is; use --dtype float32 or bfloat16"
        )


def check_held_out(source: str, tensors: Sequence[torch.Tensor]) -> None:
    """Make sure that what was measured on the held-out records is finite, `[…, records]` each.

    Raises:
        DataError: It is not on some of them.
    """
    broken = torch.stack([(~tensor.isfinite()).reshape(-1, tensor.shape[-1]).any(dim=0) for tensor in tensors]).any(dim=0)
    if broken.any():
        raise DataError(
            f"on {int(broken.sum())} of the {len(broken)} held-out records of {source} the loss or its gradients are not finite; "
            "remove such records, or use --dtype float32"
        )
