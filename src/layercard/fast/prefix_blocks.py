"""Embeddings and frozen blocks: which modules they are, whether the hidden states that leave them can be kept, and who they are."""

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from layercard.fast.anatomy import Anatomy
from layercard.models.load import KEY_SHARING

GROWING_ROTARY = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies depend on the longest record of a batch once it passes the original context."""
_HANDS_ON = (*KEY_SHARING, "hidden_size_per_layer_input", "altup_num_inputs", "laurel_rank")
_NOT_DECIDING = {"_name_or_path", "architectures", "transformers_version", "use_cache", "output_attentions", "output_hidden_states"}
_OUTSIDE_BLOCKS = ("classifier", "summary", "head", "seq_classif", "qa_", "layerdrop", "vision", "projector")

Groups = Sequence[tuple[nn.Module, ...]]


def module_groups(parts: Anatomy, depth: int) -> Groups:
    """The modules that work before block 0 (what the decoder has beside blocks and final norm), then those of each block below `depth`."""
    blocks = {id(block.module) for block in parts.blocks}
    beside = [
        child
        for child in parts.decoder.children()
        if child is not parts.final_norm and not any(id(module) in blocks for module in child.children())
    ]
    return (tuple(module for child in beside for module in child.modules()), *(tuple(b.module.modules()) for b in parts.blocks[:depth]))


def relative_positions(parts: Anatomy, groups: Groups) -> bool:
    """Whether only distances between positions count: rotary embeddings, no learned ones, no attention in fixed chunks."""
    config = parts.config.to_dict()
    embeddings = [module for module in groups[0] if isinstance(module, nn.Embedding)]
    scaled = any(config.get(name) for name in ("attn_temperature_tuning", "attention_chunk_size", "llama_4_scaling_beta"))
    return bool(config.get("rope_parameters")) and len(embeddings) <= 1 and not parts.other_layer_kinds and not scaled


def longest_batch(parts: Anatomy) -> int | None:
    """From this width on, a batch changes the rotary frequencies of all its records; `None` where none does."""
    config = parts.config.to_dict()
    rotary = config.get("rope_parameters") or {}
    rules = [value for value in rotary.values() if isinstance(value, dict)] or [rotary]
    limits = [
        rule.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0
        for rule in rules
        if rule.get("rope_type") in GROWING_ROTARY
    ]
    return min(limits, default=None)


def obstacle(model: nn.Module, parts: Anatomy, *, streamed: bool = False) -> str:
    """Why hidden states that enter the lowest trained block cannot be kept, and what to do about it; empty where they can.

    `streamed` says that the blocks below come from disk in full, whatever those in memory are rounded to.
    """
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return "FSDP spreads the weights over processes, which must run the same blocks in step; train with DDP, or without the cache"
    if "DataParallel" in kinds:
        return "DataParallel copies the model for each batch; start one process per device (torchrun, accelerate launch)"
    if parts.lowest == len(parts.blocks):
        return "no block trains; add adapters first (get_peft_model)"
    if parts.lowest == 0:
        return "block 0 trains, so there is nothing frozen below it; adapt fewer layers, nearer to the output"
    if parts.below:
        return f"{parts.below_words()} trains below block {parts.lowest}; freeze it (no prompts, no trainable or tied embedding)"
    # Blocks that pass more than hidden states to each other, or work along the sequence in other ways than attention.
    config = parts.config.to_dict()
    handed_on = [key for key in _HANDS_ON if config.get(key)]
    if handed_on:
        return f"the blocks of {parts.name} hand on more than hidden states ({handed_on[0]}); train without the cache"
    if not isinstance(parts.decoder, PreTrainedModel) or parts.causal._is_stateful:
        return f"{parts.name} is not made of attention blocks under one decoder of transformers; train without the cache"
    if parts.mixes_records and not streamed:
        return f"the 8-bit modules of {parts.name} look for outliers in the whole batch; train without the cache, or with 4-bit modules"
    strange = [kind for kind in parts.other_layer_kinds if kind != "chunked_attention"]
    if strange:
        return f"{parts.name} has blocks that work along the sequence in other ways ({', '.join(strange)}); train without the cache"
    layerdrop = vars(parts.decoder).get("layerdrop") or 0.0
    return f"layerdrop {layerdrop:g} leaves out whole blocks by chance; set it to 0" if layerdrop else ""


def randomness(parts: Anatomy, depth: int) -> list[str]:
    """What draws random numbers in training mode in embeddings and blocks below `depth`, such as `h.0.attn.attn_dropout 0.1`."""
    names = {id(module): name for name, module in parts.decoder.named_modules()}
    drawing = []
    for module in (module for group in module_groups(parts, depth) for module in group):
        rates = {"": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else _rates(vars(module))
        drawing += [f"{'.'.join(filter(None, (names[id(module)], name)))} {rate:g}" for name, rate in rates.items() if rate > 0]
    config = {name: rate for name, rate in _rates(parts.config.to_dict()).items() if not name.startswith(_OUTSIDE_BLOCKS)}
    return drawing + [f"{name} {rate:g}" for name, rate in config.items() if rate > 0]


def _rates(values: dict[str, Any]) -> dict[str, float]:
    """Those of some values that by their names are probabilities of dropping, or noise."""
    return {
        name: float(value)
        for name, value in values.items()
        if any(word in name for word in ("drop", "jitter", "noise")) and isinstance(value, int | float) and not isinstance(value, bool)
    }


def adapter_states(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """How the adapters among some modules stand: which are on, and which are merged."""
    tuners = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return tuple((tuner.disable_adapters, *tuner.active_adapters, *tuner.merged_adapters) for tuner in tuners)


def fingerprints(parts: Anatomy, groups: Groups, tokenizer: Any, regime: tuple[Any, ...]) -> list[str]:
    """For each depth d from 0 to s, 32 hex digits that change with all that decides about the hidden states block_input block d.

    They cover weights, buffers and quantisation states of embeddings and blocks below, configuration, adapters in them, tokenizer,
    `regime` (device, dtypes and attention in use) and the versions of torch, transformers and layercard.
    """
    about = {
        "config": {key: value for key, value in parts.config.to_dict().items() if key not in _NOT_DECIDING},
        "adapters": adapter_states([module for group in groups for module in group]),
        "tokenizer": _tokenizer_digest(tokenizer),
        "regime": regime,
        "versions": [version(name) for name in ("torch", "transformers", "layercard")],
        "machine": platform.machine(),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    names = {id(module): name for name, module in parts.decoder.named_modules()}
    labels = []
    for group in groups:
        for module in group:
            # What the module itself, not its children, holds.
            states: dict[str, Any] = {}
            module._save_to_state_dict(states, "", False)
            states |= dict(module.named_buffers(recurse=False))
            for key, tensor in sorted(states.items()):
                if isinstance(tensor, torch.Tensor):
                    digest.update(f"{names[id(module)]}.{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        labels.append(digest.hexdigest()[:32])
    return labels


def _tokenizer_digest(tokenizer: Any) -> str | None:
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
