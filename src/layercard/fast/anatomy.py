"""Where a model trains: its blocks, the lowest one with a trainable weight, and whether anything below it trains too."""

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from layercard.errors import TrainingError
from layercard.models.layers import Block, find_blocks
from layercard.models.load import is_classifier

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
"""What decoders call the norm after their last block."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that is about to train.

    Attributes:
        causal: The transformers model with the head, inside whatever wraps it (PEFT, DistributedDataParallel).
        decoder: The part of it that runs the blocks: its forward turns token ids into the hidden states of the last block, normed.
        blocks: The decoder blocks, index 0 at the input.
        lowest: Index of the lowest block with a trainable weight; the number of blocks where none has.
        below: Names of trainable weights that the input reaches before block `lowest`, such as embeddings and prompts.
    """

    causal: PreTrainedModel
    decoder: nn.Module
    blocks: tuple[Block, ...]
    lowest: int
    below: tuple[str, ...]

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the decoder."""
        return self.decoder.config if isinstance(self.decoder, PreTrainedModel) else self.causal.config

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block."""
        children = dict(self.decoder.named_children())
        return next((children[name] for name in FINAL_NORMS if name in children), None)

    @property
    def multimodal(self) -> bool:
        """Whether pictures or sound are put among the tokens: the decoder is given embeddings then, never token ids."""
        return bool({"vision_config", "audio_config"} & self.causal.config.to_dict().keys())

    @property
    def mixes_records(self) -> bool:
        """Whether a record's numbers depend on the others of its batch: 8-bit maps of bitsandbytes look for outliers in all of it."""
        return bool(vars(self.causal).get("is_loaded_in_8bit"))

    @property
    def layers_in_backward(self) -> str:
        """Blocks from the lowest trained one on, of all: `5/30`."""
        return f"{len(self.blocks) - self.lowest}/{len(self.blocks)}"


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
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    holders = [block.index for block in blocks if any(id(weight) in trained for weight in block.module.parameters())]
    parts = Anatomy(causal, decoder, blocks, min(holders, default=len(blocks)), ())
    return Anatomy(causal, decoder, blocks, parts.lowest, _below(model, parts))


def forward_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of what a module's forward takes, in order, as its class says, whatever stands in for the forward of an instance."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _below(model: nn.Module, parts: Anatomy) -> tuple[str, ...]:
    """Names of the trainable weights outside the blocks that are not certain to come after the last block."""
    after = {id(weight) for block in parts.blocks for weight in block.module.parameters()}
    first = parts.causal.get_input_embeddings()
    head = parts.causal.get_output_embeddings()
    for module in (parts.final_norm, head, *_classifying(parts)):
        after |= {id(weight) for weight in module.parameters()} if module is not None else set()
    after -= {id(weight) for weight in first.parameters()}  # a tied head trains the embedding
    return tuple(name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in after)


def _classifying(parts: Anatomy) -> list[nn.Module]:
    """What a classifier has beside the model that holds its blocks: the head that its adapters are trained with."""
    holder = parts.blocks[0].path.partition(".")[0]
    return [child for name, child in parts.causal.named_children() if name != holder] if is_classifier(parts.causal) else []
