"""Tiny random models of eight families, a tokenizer and records for them: built in code, without a network."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

LAYERS, WIDTH, INNER, HEADS, VOCAB = 3, 32, 48, 4, 128
SPECIAL = ("<unk>", "<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>")
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), (" ", "a"), ("o", "n"))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_LLAMA: dict[str, Any] = {
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
_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=512, bos_token_id=2, eos_token_id=2
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        **{k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "intermediate_size")},
        ffn_dim=INNER,
        word_embed_proj_dim=WIDTH,
        dropout=0.0,
    ),
    "phi3": lambda: Phi3Config(**_LLAMA),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=None),
}
TINY_FAMILIES = list(_CONFIGS)
DISTINCT_FAMILIES = ["llama", "gemma3", "gpt2", "gpt_neox", "opt"]
"""One family of each kind of block: the others run as Llama does. What holds for every family is in `architectures/`."""


def build_tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model of `family` with 3 layers of width 32 and seeded random weights, in eval mode.

    `changes` are set on the config (`num_hidden_layers=5`). The global random state is left as it was.
    """
    config = _CONFIGS[family]()
    if changes:
        config = type(config)(**{**config.to_dict(), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomised(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    return model.eval()


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with weights as large as those of a trained one: as made, they are so small that blocks hardly matter."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0.0, WIDTH**-0.5)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.05)
    return model


def tiny_tokenizer(*, pad: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character, and a few merges; `<eos>` is 2 and `<pad>` is 1."""
    tokens = [*SPECIAL, *sorted(set(string.printable) - set("\r\x0b\x0c"))]
    tokens += ["".join(pair) for pair in MERGES]
    assert len(tokens) <= VOCAB
    backend = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=list(MERGES), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    names = {"unk_token": "<unk>", "eos_token": "<eos>"} | ({"pad_token": "<pad>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_records(count: int, start: int = 0) -> list[dict[str, str]]:
    """`count` distinct `prompt` + `completion` records of unequal lengths."""
    names = ("Ann", "Bo", "Cornelius", "Dee", "Esmeralda")
    fruits = ("figs", "plums", "red apples", "pears")
    return [
        {
            "prompt": f"name[{names[i % 5]}], buys[{i} {fruits[i % 4]}]",
            "completion": f"{names[i % 5]} buys {i} {fruits[i % 4]}" + " on the market" * (i % 3) + ".",
        }
        for i in range(start, start + count)
    ]


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as JSON Lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
