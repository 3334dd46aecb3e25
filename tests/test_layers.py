"""Blocks and projections from the module tree: eight families, mixtures of experts, vision towers, and what must not be taken."""

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from layercard.errors import ModelError
from layercard.models.layers import find_blocks
from tiny import LAYERS, TINY_FAMILIES, build_tiny

SEPARATE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPECTED = {
    "llama": ("model.layers", SEPARATE),
    "qwen3": ("model.layers", SEPARATE),
    "gemma3": ("model.layers", SEPARATE),
    "mistral": ("model.layers", SEPARATE),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "gpt_neox": ("gpt_neox.layers", ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
    "opt": ("model.decoder.layers", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"]),
    "phi3": ("model.layers", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_blocks_and_projections_of_each_family(family: str) -> None:
    model = build_tiny(family)
    path, names = EXPECTED[family]
    blocks = find_blocks(model)
    assert [(block.index, block.path) for block in blocks] == [(index, f"{path}.{index}") for index in range(LAYERS)]
    seen: dict[str, tuple[int, int]] = {}
    projections = [p for block in blocks for p in block.linear_modules]
    hooks = [
        p.module.register_forward_hook(lambda _m, args, out, path=p.path: seen.update({path: (args[0].shape[-1], out.shape[-1])}))
        for p in projections
    ]
    model(input_ids=torch.arange(6, 12)[None])
    for hook in hooks:
        hook.remove()
    for block in blocks:
        assert model.get_submodule(block.path) is block.module
        assert sorted(p.name for p in block.linear_modules) == sorted(names)
        assert all(p.path == f"{block.path}.{p.name}" for p in block.linear_modules)
    for p in projections:
        assert model.get_submodule(p.path) is p.module
        assert seen[p.path] == (p.in_features, p.out_features)
        assert tuple(p.module.weight.shape) == (seen[p.path] if p.transposed else seen[p.path][::-1])
        assert p.transposed == (family == "gpt2")


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class ExpertBlock(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))


class Decoder(nn.Module):
    def __init__(self, blocks: nn.ModuleList, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = blocks
        self.heads = nn.ModuleList(nn.Linear(width, 1000) for _ in range(4))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_list_of_experts_is_not_taken_for_the_blocks(depth: int) -> None:
    blocks = find_blocks(Decoder(nn.ModuleList(ExpertBlock(8, experts=16) for _ in range(depth))))
    assert [block.path for block in blocks] == [f"blocks.{index}" for index in range(depth)]
    assert len(blocks[0].linear_modules) == 1 + 2 * 16
    assert blocks[0].linear_modules[-1].path == "blocks.0.experts.15.down"


def test_a_block_that_only_wraps_an_inner_list_ties_to_the_outer_one() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Expert(8), Expert(8)])

    assert [block.path for block in find_blocks(Decoder(nn.ModuleList([Stage()])))] == ["blocks.0"]


def vision_language_model(vision_width: int, vision_layers: int) -> PreTrainedModel:
    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": vision_width, "intermediate_size": 4 * vision_width, "num_hidden_layers": vision_layers,
        "num_attention_heads": 2, "image_size": 112, "patch_size": 7,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60, boi_token_index=61)
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize(("width", "layers"), [(16, 1), (64, 6)])
def test_the_text_model_wins_over_a_vision_tower_of_any_size(width: int, layers: int) -> None:
    blocks = find_blocks(vision_language_model(width, layers))
    assert [block.path for block in blocks] == ["model.language_model.layers.0", "model.language_model.layers.1"]


def test_the_largest_embedding_guides_where_the_model_names_none() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.ModuleDict({"patches": nn.Embedding(4, 8), "layers": nn.ModuleList(Expert(64) for _ in range(5))})
            self.text = Decoder(nn.ModuleList(Expert(8) for _ in range(2)))

    assert [block.path for block in find_blocks(Pair())] == ["text.blocks.0", "text.blocks.1"]


def test_without_an_embedding_the_largest_list_is_taken() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.ModuleList([Expert(4)])
            self.large = nn.ModuleList([Expert(16)])

    assert [block.path for block in find_blocks(Towers())] == ["large.0"]


def test_a_head_of_bare_linear_maps_is_not_a_list_of_blocks() -> None:
    with pytest.raises(ModelError, match="Decoder has no list of decoder blocks"):
        find_blocks(Decoder(nn.ModuleList()))


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), nn.ModuleList([nn.LayerNorm(3)])])
def test_no_blocks_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="needs a transformer decoder"):
        find_blocks(model)


def test_subclasses_of_linear_maps_count_and_a_block_may_have_none() -> None:
    class MyLinear(nn.Linear):
        pass

    class MyConv1D(Conv1D):
        pass

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = MyLinear(8, 4), MyConv1D(3, 8)

    first, second = find_blocks(Decoder(nn.ModuleList([nn.LayerNorm(8), Mixed()])))
    assert first.linear_modules == ()
    shapes = [(p.name, p.in_features, p.out_features, p.transposed) for p in second.linear_modules]
    assert shapes == [("a", 8, 4, False), ("b", 8, 3, True)]


class Packed(nn.Module):
    """A quantised map: codes in a buffer, two widths, no weight."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.register_buffer("codes", torch.zeros(n_out, n_in, dtype=torch.uint8))


class Wrapper(nn.Module):
    """What adapters look like: two widths of its own, and the map inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features, self.inner = 8, 4, inner


@pytest.mark.parametrize("inner", [Packed(8, 4), nn.Linear(8, 4)])
def test_quantised_maps_are_known_by_their_widths_and_wrappers_by_what_they_hold(inner: nn.Module) -> None:
    (block,) = find_blocks(Decoder(nn.ModuleList([nn.ModuleDict({"a": Wrapper(inner), "b": Packed(8, 16)})])))
    assert [(p.name, p.in_features, p.out_features, p.transposed) for p in block.linear_modules] == [
        ("a.inner", 8, 4, False),
        ("b", 8, 16, False),
    ]


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.D = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.in_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (Mixer(), ["a.in_proj"]),
        (nn.MultiheadAttention(8, 2), []),
        (nn.ModuleDict({"correction_coefs": nn.Linear(4, 4), "router": nn.Linear(8, 4)}), ["a.router"]),
    ],
    ids=["mamba", "multihead", "gemma3n"],
)
def test_maps_whose_weight_is_read_without_running_them_are_left_out(module: nn.Module, kept: list[str]) -> None:
    (block,) = find_blocks(Decoder(nn.ModuleList([nn.ModuleDict({"a": module, "b": nn.Linear(8, 8)})])))
    assert [p.name for p in block.linear_modules] == [*kept, "b"]


def test_names_that_peft_takes_for_experts_are_left_out() -> None:
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    assert isinstance(model.get_submodule("model.layers.0.mlp.gate_proj"), nn.Linear)
    assert isinstance(model.get_submodule("model.layers.1.mlp.shared_experts.gate_proj"), nn.Linear)
    for block in find_blocks(model):
        assert block.linear_modules and all(p.name.startswith("self_attn.") for p in block.linear_modules)
