"""Where a model trains: its blocks, the lowest one with a trainable weight, and whether anything below it trains too."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from layercard.errors import TrainingError
from layercard.models.layers import Block, find_blocks
from layercard.models.load import is_classifier

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
"""What decoders call the norm after their last block."""
ATTENTION_KINDS = {"full_attention", "sliding_attention"}
"""Kinds of layers in which a record's tokens see nothing of other records, and only distances count where positions are rotary."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that is about to train.

    Attributes:
        causal: The transformers model with the head, inside whatever wraps it (PEFT, DistributedDataParallel).
        decoder: The part of it that runs the blocks: its forward turns token ids into the hidden states of the last block, normed.
        blocks: The decoder blocks, index 0 at the input.
        final_norm: The norm after the last block.
        lowest: Index of the lowest block with a trainable weight; the number of blocks where none has.
        below: Names of trainable weights that the input reaches before block `lowest`, such as embeddings and prompts.
    """

    causal: PreTrainedModel
    decoder: nn.Module
    blocks: tuple[Block, ...]
    final_norm: nn.Module | None
    lowest: int
    below: tuple[str, ...]

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.causal).__name__

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the decoder."""
        return self.decoder.config if isinstance(self.decoder, PreTrainedModel) else self.causal.config

    @property
    def multimodal(self) -> bool:
        """Whether pictures or sound are put among the tokens: the decoder is given embeddings then, never token ids."""
        return bool({"vision_config", "audio_config"} & self.causal.config.to_dict().keys())

    @property
    def mixes_records(self) -> bool:
        """Whether a record's numbers depend on the others of its batch: 8-bit modules of bitsandbytes look for outliers in all of it."""
        return bool(vars(self.causal).get("is_loaded_in_8bit"))

    @property
    def other_layer_kinds(self) -> list[str]:
        """Kinds of layers that work along the sequence in other ways than full or sliding attention."""
        return sorted(set(self.config.to_dict().get("layer_types") or ()) - ATTENTION_KINDS)

    def below_words(self) -> str:
        """The first of `below`, and how many more there are."""
        return self.below[0] + (f" and {len(self.below) - 1} more" if len(self.below) > 1 else "")


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a model, PEFT's and accelerate's wrappers included.

    Raises:
        ModelError: There are no decoder blocks.
        TrainingError: There is no transformers model inside.
    """
    causal = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if causal is None:
        raise TrainingError(f"{type(model).__name__} holds no transformers model; give a PreTrainedModel or a PEFT model around one")
    blocks = find_blocks(causal)
    decoder = causal.get_submodule(blocks[0].path.rpartition(".")[0].rpartition(".")[0])
    children = dict(decoder.named_children())
    final_norm = next((children[name] for name in FINAL_NORMS if name in children), None)
    training = [block.index for block in blocks if any(weight.requires_grad for weight in block.module.parameters())]

    # Only blocks, final norm and heads are certain to come after the last frozen block; a tied head trains the embedding.
    holder = blocks[0].path.partition(".")[0]
    heads = [child for name, child in causal.named_children() if name != holder] if is_classifier(causal) else []
    later = [*(block.module for block in blocks), final_norm, causal.get_output_embeddings(), *heads]
    after = {id(weight) for module in later if module is not None for weight in module.parameters()}
    after -= {id(weight) for weight in causal.get_input_embeddings().parameters()}
    below = tuple(name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in after)
    return Anatomy(causal, decoder, blocks, final_norm, min(training, default=len(blocks)), below)


@functools.cache
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a class's forward takes, in order, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a module by name, as its class names them, whatever stands in for the forward of this one."""
    return {**dict(zip(argument_names(type(module).forward), args, strict=False)), **kwargs}
