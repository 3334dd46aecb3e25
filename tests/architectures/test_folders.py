"""Saved models of every kind, read back by `load_model` with the class that they were saved as."""

from pathlib import Path

import pytest
from families import BY_NAME, base_of

from layercard.models.load import load_model
from tiny import tiny_tokenizer

BLOCKS = {
    "gemma3 vision": "model.language_model.layers.0",
    "qwen3 vision": "model.language_model.layers.0",
    "qwen3_next": "model.layers.0",
    "gemma4": "model.layers.0",
    "bert": "bert.encoder.layer.0",
    "modernbert": "model.layers.0",
    "llama classifier": "model.layers.0",
    "llama 8-bit": "model.layers.0",
    "llama 4-bit": "model.layers.0",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_model_read_back_is_the_one_saved(name: str, tmp_path: Path) -> None:
    if BY_NAME[name].quantised:
        pytest.importorskip("bitsandbytes", reason="8-bit and 4-bit maps need bitsandbytes: pip install 'layercard[quantised]'")
    base = base_of(name)
    base.model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = load_model(tmp_path)
    assert type(found.model) is type(base.model)
    assert (found.fingerprint, found.blocks[0].path) == (base.fingerprint, BLOCKS[name])
    assert [p.path for p in found.blocks[0].linear_modules] == [p.path for p in base.blocks[0].linear_modules]
