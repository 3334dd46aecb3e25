"""Quantised bases: what is particular about maps that hold no float matrix."""

import pytest
import torch
from capabilities import YES, Case, probes, profiles, selects
from families import PACKED, base_of
from quantised import PackedLinear

from layercard.adapters.apply import apply
from layercard.errors import PlacementError
from layercard.models.adapted import unchanged
from layercard.models.layers import find_blocks
from layercard.models.load import wrap_model
from layercard.models.stored import fingerprint
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(PACKED, tmp_path_factory.mktemp("packed"))


def test_maps_that_are_no_linear_of_torch_are_found_by_their_widths(packed: Case) -> None:
    projections = packed.base.blocks[0].linear_modules
    assert all(type(p.module) is PackedLinear for p in projections)
    assert [(p.name, p.in_features, p.out_features) for p in projections][-1] == ("mlp.down_proj", 128, 64)


@pytest.mark.parametrize("check", [profiles, selects, probes])
def test_signals_and_probe_need_no_float_weight(check: object, packed: Case) -> None:
    assert callable(check) and check(packed) == YES


def test_maps_that_peft_does_not_know_are_refused_in_one_line(packed: Case) -> None:
    with pytest.raises(PlacementError, match=r"PackedLinear\(\) is not supported"), unchanged(packed.base.model):
        apply(packed.base.model, packed.placement)


def test_codes_in_buffers_count_for_the_fingerprint() -> None:
    model = PACKED.build()
    before = fingerprint(model, exact=True)
    find_blocks(model)[0].linear_modules[0].module.get_buffer("codes")[0, 0] ^= 1
    assert fingerprint(model, exact=True) != before


def test_gradients_flow_through_four_bit_maps_after_a_forward_without() -> None:
    pytest.importorskip("bitsandbytes", reason="4-bit maps need bitsandbytes: pip install 'layercard[quantised]'")
    base = base_of("llama 4-bit")
    ids = torch.arange(6, 20)[None]
    again = wrap_model(base.model, tiny_tokenizer())
    with torch.no_grad():
        base.model(input_ids=ids)
    embedded = base.model.get_input_embeddings()(ids).detach().requires_grad_(True)
    base.model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert again.fingerprint == base.fingerprint == fingerprint(base.model)
