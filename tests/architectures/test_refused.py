"""Architectures in which layers cannot be placed: one line that says so, and exit status 2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

import tiny
from layercard.commands.main import run
from layercard.data.load import load_data
from layercard.errors import ModelError
from layercard.models.load import wrap_model
from layercard.profiling.profile import profile_records as profile
from layercard.settings import ProfileSettings


def t5(kind: type[PreTrainedModel] = T5ForConditionalGeneration) -> PreTrainedModel:
    return kind(T5Config(vocab_size=tiny.VOCAB, d_model=tiny.WIDTH, d_kv=8, d_ff=tiny.INNER, num_layers=2, num_heads=4))


def masked() -> PreTrainedModel:
    sizes = {"hidden_size": tiny.WIDTH, "intermediate_size": tiny.INNER, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=tiny.VOCAB, **sizes))


class Blockless(PreTrainedModel):
    """A family without blocks: one map after the other, in no list."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.embed, self.one, self.two = nn.Embedding(tiny.VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, tiny.VOCAB)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(self.embed(input_ids)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (t5, "T5ForConditionalGeneration is an encoder-decoder: its two stacks see different tokens"),
        (lambda: t5(T5ForSequenceClassification), "T5ForSequenceClassification is an encoder-decoder"),
        (masked, "the tokens of BertForMaskedLM see those behind them, so it predicts none"),
        (lambda: tiny.build_tiny("llama").model, "LlamaModel has no head: it predicts no next token and no class"),
        (Blockless, "Blockless has no list of decoder blocks with linear maps"),
    ],
)
def test_in_memory(build: Callable[[], PreTrainedModel], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        wrap_model(build(), tiny.tiny_tokenizer())


def test_blocks_that_hand_on_more_than_hidden_states_are_found_out(tmp_path: Path) -> None:
    base = wrap_model(tiny.build_tiny("llama"), tiny.tiny_tokenizer())
    base.model.lm_head.weight.data.mul_(5)  # so that wrong states are far from right ones in loss
    beside: list[torch.Tensor] = []

    def first(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        beside.append(own[0](hidden, **kwargs))
        return beside[0]

    def last(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return own[2](hidden - 30 * beside[0] if beside else hidden, **kwargs)

    own = [block.module.forward for block in base.blocks]
    base.model.get_input_embeddings().register_forward_hook(lambda *_: beside.clear())
    base.blocks[0].module.forward, base.blocks[2].module.forward = first, last
    data = load_data(str(tiny.write_records(tmp_path / "data.jsonl", tiny.tiny_records(8))), base.tokenizer)
    with pytest.raises(ModelError, match="hand each other more than hidden states: from the last block on"):
        profile(base, data, ProfileSettings(rank=2, cost=False))
    assert profile(base, data, ProfileSettings(rank=2, probe="none", cost=False)).layers


@pytest.mark.parametrize(
    ("build", "message"),
    [(t5, "is an encoder-decoder"), (masked, "is a masked language model (BertForMaskedLM), which predicts no next token")],
)
def test_by_command_in_one_line(
    build: Callable[[], PreTrainedModel], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, card = tmp_path / "model", tmp_path / "card.json"
    build().save_pretrained(model)
    tiny.tiny_tokenizer().save_pretrained(model)
    data = tiny.write_records(tmp_path / "data.jsonl", tiny.tiny_records(4))
    capsys.readouterr()
    assert run(["profile", str(model), "--data", str(data), "--output", str(card)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("error: ") and message in said.err
    assert not card.exists()
