"""Tiny random models of every family that the table of docs/architectures.md lists: three blocks of width 32, built without a network."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from quantised import quantised
from transformers import PreTrainedModel

from layercard.models.load import BaseModel, wrap_model
from padded import no_dropout
from tiny import HEADS, INNER, LAYERS, TINY_FAMILIES, VOCAB, WIDTH, build_tiny, randomised, tiny_tokenizer

PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
"""What most configurations call the sizes; `num_key_value_heads` makes the attention grouped (GQA)."""
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
CLASSES: dict[str, Any] = {"id2label": {0: "fruit", 1: "drink", 2: "none"}, "label2id": {"fruit": 0, "drink": 1, "none": 2}}
ENCODER: dict[str, Any] = (
    {name: value for name, value in PLAIN.items() if name not in ("num_key_value_heads", "bos_token_id")}
    | {"cls_token_id": 2, "sep_token_id": 2, "bos_token_id": 2}
    | dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    | CLASSES
)
WIDE = PLAIN | {"hidden_size": 64, "intermediate_size": 128}
"""Sizes in whole blocks of bitsandbytes' kernels."""
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 7,
}
"""A tower larger than the text model, with maps of the same names."""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: As the table has it.
        config: Class of its configuration in transformers.
        settings: What the configuration is given.
        model: Class of the model; the causal language model of the configuration where it is empty.
        about: What is particular about it.
        quantised: How its maps are quantised (`quantised.KINDS`), where they are.
    """

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    about: str = ""
    quantised: str = ""

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A float32 model with seeded random weights, in eval mode."""
        if self.name in TINY_FAMILIES:
            return build_tiny(self.name, seed, **no_dropout(self.name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = getattr(transformers, self.config)(**self.settings)
            if self.model:
                model = getattr(transformers, self.model)(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model = _scaled(randomised(model))
            return (quantised(model, self.quantised) if self.quantised else model).eval()


def _scaled(model: PreTrainedModel) -> PreTrainedModel:
    """Gemma 3n begins with scales of 0, behind which nothing has a gradient."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("correct_output_scale"):
                weight.fill_(0.5)
    return model


FAMILIES = [
    Family("llama", "LlamaConfig", about="tied embedding"),
    Family("mistral", "MistralConfig"),
    Family("qwen2", "Qwen2Config", PLAIN, about="biases in q, k and v"),
    Family("qwen3", "Qwen3Config"),
    Family("gemma2", "Gemma2Config", PLAIN | {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}, about="capped logits"),
    Family("gemma3", "Gemma3TextConfig", about="sliding windows"),
    Family("phi3", "Phi3Config", about="fused qkv and gate_up"),
    Family("gpt2", "GPT2Config", about="Conv1D weights, learned positions"),
    Family("gpt_neox", "GPTNeoXConfig", about="attention and MLP in parallel"),
    Family("opt", "OPTConfig", about="learned positions"),
    Family(
        "falcon",
        "FalconConfig",
        {k: v for k, v in PLAIN.items() if k != "num_key_value_heads"} | {"multi_query": True, "parallel_attn": True, "bias": False},
        about="one key-value head, attention and MLP in parallel",
    ),
    Family(
        "bloom",
        "BloomConfig",
        {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
            "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
        },
        about="ALiBi positions",
    ),
    Family("olmo2", "Olmo2Config", PLAIN, about="norms after attention and MLP"),
    Family("smollm3", "SmolLM3Config", PLAIN, about="some layers without positions"),
    Family(
        "deepseek_v3",
        "DeepseekV3Config",
        PLAIN
        | {
            "num_key_value_heads": HEADS, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
        },
        about="latent attention, a dense first block, then experts",
    ),
    Family("mixtral", "MixtralConfig", PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2}, about="experts as parameters"),
    Family("qwen3_moe", "Qwen3MoeConfig", PLAIN | EXPERTS | {"head_dim": 8}, about="experts as parameters"),
    Family(
        "gpt_oss",
        "GptOssConfig",
        PLAIN | {"head_dim": 8, "sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        about="experts stored transposed, attention sinks",
    ),
    Family(
        "qwen3_next",
        "Qwen3NextConfig",
        PLAIN
        | EXPERTS
        | {
            "head_dim": 8, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        about="hybrid: blocks without q_proj",
    ),
    Family(
        "falcon_h1",
        "FalconH1Config",
        PLAIN | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16},
        about="hybrid: attention beside Mamba in each block",
    ),
    Family(
        "gemma3n",
        "Gemma3nTextConfig",
        PLAIN
        | {
            "head_dim": 8, "sliding_window": 64, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
            "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * LAYERS, "intermediate_size": [INNER, INNER // 2, INNER],
            "activation_sparsity_pattern": [0.0] * LAYERS,
        },
        about="last block reads keys of another; four streams; a width for each block",
    ),
    Family(
        "gemma4",
        "Gemma4TextConfig",
        PLAIN
        | {
            "head_dim": 8, "global_head_dim": 8, "sliding_window": 64, "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * LAYERS,
        },
        about="last block reads keys of another",
    ),
    Family(
        "gemma3 vision",
        "Gemma3Config",
        {
            "text_config": PLAIN | {"head_dim": 8, "sliding_window": 64}, "vision_config": VISION, "mm_tokens_per_image": 4,
            "image_token_id": 120, "boi_token_id": 121, "eoi_token_id": 122,
        },
        model="Gemma3ForConditionalGeneration",
        about="vision-language model, text only",
    ),
    Family(
        "qwen3 vision",
        "Qwen3VLConfig",
        {
            "text_config": PLAIN
            | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
            "vision_config": {
                "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123,
        },
        model="Qwen3VLForConditionalGeneration",
        about="vision-language model, text only",
    ),
    Family("bert", "BertConfig", ENCODER, model="BertForSequenceClassification", about="encoder, classifier"),
    Family("modernbert", "ModernBertConfig", ENCODER, model="ModernBertForSequenceClassification", about="encoder, classifier"),
    Family("llama classifier", "LlamaConfig", PLAIN | CLASSES, model="LlamaForSequenceClassification", about="decoder, classifier"),
    Family("llama 8-bit", "LlamaConfig", WIDE, about="bitsandbytes on the CPU", quantised="8bit"),
    Family("llama 4-bit", "LlamaConfig", WIDE, about="bitsandbytes on the CPU", quantised="4bit"),
]  # fmt: skip
PACKED = Family("llama packed", "LlamaConfig", WIDE, quantised="packed")
BY_NAME = {family.name: family for family in (*FAMILIES, PACKED)}


@cache
def base_of(name: str) -> BaseModel:
    """The family's model with the tiny tokenizer; tests leave it as it was, so they share it."""
    return wrap_model(BY_NAME[name].build(), tiny_tokenizer(), name=f"tiny {name}")
