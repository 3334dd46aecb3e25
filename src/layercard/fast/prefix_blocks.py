"""What is needed to leave out frozen blocks: which they are, and calls of the decoder."""

import hashlib
import json
import platform
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from layercard.fast.anatomy import Anatomy, forward_names
from layercard.fast.prefix_store import (
    checksum,
)
from layercard.models.load import KEY_SHARING

# ---- fast.frozen

RELATIVE_KINDS = {"full_attention", "sliding_attention"}
"""Kinds of attention in which only distances between tokens count, where positions are rotary."""
GROWING_ROTARY = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies depend on the longest record of a batch once it passes the original context."""
_HANDS_ON = (*KEY_SHARING, "hidden_size_per_layer_input", "altup_num_inputs", "laurel_rank")
_NOT_DECIDING = {"_name_or_path", "architectures", "transformers_version", "use_cache", "output_attentions", "output_hidden_states"}
_OUTSIDE_BLOCKS = ("classifier", "summary", "head", "seq_classif", "qa_", "layerdrop", "vision", "projector")


@dataclass(frozen=True)
class Frozen:
    """Embeddings and blocks below block `depth`.

    Attributes:
        parts: The model's anatomy.
        depth: s, the block that the hidden states enter.
    """

    parts: Anatomy
    depth: int

    @cached_property
    def embedding(self) -> tuple[nn.Module, ...]:
        """Modules that work before block 0: what the decoder has beside its blocks and final norm, with all they hold."""
        decoder, norm = self.parts.decoder, self.parts.final_norm
        blocks = {id(block.module) for block in self.parts.blocks}
        beside = [
            child for child in decoder.children() if child is not norm and not any(id(module) in blocks for module in child.children())
        ]
        return tuple(module for child in beside for module in child.modules())

    @cached_property
    def in_block(self) -> tuple[tuple[nn.Module, ...], ...]:
        """Modules in each frozen block."""
        return tuple(tuple(block.module.modules()) for block in self.parts.blocks[: self.depth])

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Modules in all frozen blocks."""
        return tuple(module for block in self.in_block for module in block)

    @cached_property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """Weights of embeddings and frozen blocks."""
        return tuple(weight for module in (*self.embedding, *self.modules) for weight in module._parameters.values() if weight is not None)

    @cached_property
    def tuners(self) -> tuple[BaseTunerLayer, ...]:
        """Adapters that lie, frozen, in these blocks."""
        return tuple(module for module in (*self.embedding, *self.modules) if isinstance(module, BaseTunerLayer))

    def versions(self) -> tuple[int, ...]:
        """A number for each weight that grows when it is written to in place."""
        return tuple(weight._version for weight in self.weights)

    def sums(self) -> tuple[int, ...]:
        """A checksum of each weight."""
        return tuple(checksum(weight.detach().reshape(1, -1)) for weight in self.weights)

    def adapters(self) -> tuple[Any, ...]:
        """How the adapters in these blocks stand: which are on, and which are merged."""
        return tuple((tuner.disable_adapters, *tuner.active_adapters, *tuner.merged_adapters) for tuner in self.tuners)

    @cached_property
    def block_parameters(self) -> tuple[str, ...]:
        """Names of what a block's forward takes, in order."""
        return forward_names(type(self.parts.blocks[0].module))

    @cached_property
    def relative(self) -> bool:
        """Whether only distances between positions count: rotary embeddings, no learned ones, no attention in fixed chunks."""
        config = self.parts.config.to_dict()
        learned = [module for module in self.embedding if isinstance(module, nn.Embedding)]
        kinds = set(config.get("layer_types") or ()) - RELATIVE_KINDS
        scaled = any(config.get(name) for name in ("attn_temperature_tuning", "attention_chunk_size", "llama_4_scaling_beta"))
        return bool(config.get("rope_parameters")) and len(learned) <= 1 and not kinds and not scaled

    @cached_property
    def longest(self) -> int | None:
        """From this width on, a batch changes the rotary frequencies of all its records; `None` where none does."""
        config = self.parts.config.to_dict()
        rotary = config.get("rope_parameters") or {}
        each = [value for value in rotary.values() if isinstance(value, dict)] or [rotary]
        limits = [
            rule.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0
            for rule in each
            if rule.get("rope_type") in GROWING_ROTARY
        ]
        return min(limits, default=None)


def obstacle(frozen: Frozen) -> str:
    """Why hidden states that enter block s cannot be kept, and what to do about it; empty where they can."""
    parts = frozen.parts
    if frozen.depth == len(parts.blocks):
        return "no block trains; add adapters first (get_peft_model)"
    if frozen.depth == 0:
        return "block 0 trains, so there is nothing frozen below it; adapt fewer layers, nearer to the output"
    if parts.below:
        more = f" and {len(parts.below) - 1} more" if len(parts.below) > 1 else ""
        return f"{parts.below[0]}{more} trains below block {frozen.depth}; freeze it (no prompts, no trainable or tied embedding)"
    return _handed_on(parts)


def sharded(model: nn.Module) -> str:
    """Why a model that is spread over devices by its wrapper cannot be used; empty for any other."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return "FSDP spreads the weights over processes, which must run the same blocks in step; train with DDP, or without the cache"
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        return "DataParallel copies the model for each batch; start one process per device (torchrun, accelerate launch)"
    return ""


def _handed_on(parts: Anatomy) -> str:
    """Whether blocks pass more than hidden states to each other, or work along the sequence in other ways than attention."""
    config = parts.config.to_dict()
    name = type(parts.causal).__name__
    handed = [key for key in _HANDS_ON if config.get(key)]
    if handed:
        return f"the blocks of {name} hand on more than hidden states ({handed[0]}); train without the cache"
    if not isinstance(parts.decoder, PreTrainedModel) or parts.causal._is_stateful:
        return f"{name} is not made of attention blocks under one decoder of transformers; train without the cache"
    if parts.mixes_records:
        return f"the 8-bit maps of {name} look for outliers in the whole batch; train without the cache, or with 4-bit maps"
    kinds = set(config.get("layer_types") or ()) - RELATIVE_KINDS - {"chunked_attention"}
    if kinds:
        return f"{name} has blocks that work along the sequence in other ways ({', '.join(sorted(kinds))}); train without the cache"
    return ""


def randomness(frozen: Frozen) -> list[str]:
    """What draws random numbers in training mode in embeddings and frozen blocks, such as `h.0.attn.attn_dropout 0.1`."""
    named = {id(module): name for name, module in frozen.parts.decoder.named_modules()}
    found = []
    for module in (*frozen.embedding, *frozen.modules):
        rates = {"": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else _rates(vars(module))
        found += [f"{'.'.join(filter(None, (named[id(module)], name)))} {rate:g}" for name, rate in rates.items() if rate > 0]
    config = {name: rate for name, rate in _rates(frozen.parts.config.to_dict()).items() if not name.startswith(_OUTSIDE_BLOCKS)}
    return found + [f"{name} {rate:g}" for name, rate in config.items() if rate > 0]


def layerdrop(frozen: Frozen) -> float:
    """Probability with which the decoder leaves whole blocks out in training."""
    return max((float(rate) for name, rate in vars(frozen.parts.decoder).items() if name == "layerdrop"), default=0.0)


def _rates(values: dict[str, Any]) -> dict[str, float]:
    """Those of some values that by their names are probabilities of dropping, or noise."""
    words = ("drop", "jitter", "noise")
    return {
        name: float(value)
        for name, value in values.items()
        if any(word in name for word in words) and isinstance(value, int | float) and not isinstance(value, bool)
    }


def fingerprints(frozen: Frozen, tokenizer: Any, regime: tuple[Any, ...]) -> list[str]:
    """For each depth d from 0 to s, 32 hex digits that change with all that decides about the hidden states entering block d.

    They cover weights, buffers and quantisation states of embeddings and blocks below, configuration, adapters in them, tokenizer,
    `regime` (device, dtypes and attention in use) and the versions of torch, transformers and layercard.
    """
    about = {
        "config": {key: value for key, value in frozen.parts.config.to_dict().items() if key not in _NOT_DECIDING},
        "adapters": frozen.adapters(),
        "tokenizer": _tokenizer(tokenizer),
        "regime": regime,
        "versions": [version(name) for name in ("torch", "transformers", "layercard")],
        "machine": platform.machine(),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    names = {id(module): name for name, module in frozen.parts.decoder.named_modules()}
    found = []
    for modules in (frozen.embedding, *frozen.in_block):
        for module in modules:
            _update(digest, names[id(module)], module)
        found.append(digest.hexdigest()[:32])
    return found


def _update(digest: Any, name: str, module: nn.Module) -> None:
    """Add what a module itself, not its children, holds."""
    states: dict[str, Any] = {}
    module._save_to_state_dict(states, "", False)
    states |= dict(module.named_buffers(recurse=False))
    for key, tensor in sorted(states.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _tokenizer(tokenizer: Any) -> str | None:
    """Digest of a tokenizer: its whole rules where it can tell them, else its vocabulary and special tokens."""
    if tokenizer is None:
        return None
    backend = vars(tokenizer).get("_tokenizer")
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules |= {"truncation": None, "padding": None}  # these two change with every call
    else:
        rules = [tokenizer.get_vocab(), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode()).hexdigest()
