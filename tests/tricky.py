"""Tiny random models in which PEFT's own choice of layers goes wrong: experts as parameters, a vision tower, blocks of two kinds."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tiny import HEADS, INNER, LAYERS, VOCAB, WIDTH

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def experts(seed: int = 0) -> PreTrainedModel:
    """A Qwen3 mixture of experts: `model.layers.N.mlp.experts.gate_up_proj` and `down_proj` hold all experts of a layer."""
    return _build("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _TEXT | _EXPERTS, seed)


def with_tower(seed: int = 0) -> PreTrainedModel:
    """A Gemma 3 with a vision tower of four layers whose maps are called as those of the text model are."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    config = {"text_config": _TEXT, "vision_config": vision, "mm_tokens_per_image": 4}
    return _build("Gemma3ForConditionalGeneration", "Gemma3Config", config, seed)


def hybrid(seed: int = 0) -> PreTrainedModel:
    """A Qwen3-Next whose blocks 0 and 2 have no `q_proj`."""
    kinds = {
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    return _build("Qwen3NextForCausalLM", "Qwen3NextConfig", _TEXT | _EXPERTS | kinds, seed)


def _build(model: str, config: str, settings: dict[str, Any], seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
