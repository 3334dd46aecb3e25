"""What single families do that would give wrong numbers without a word."""

from pathlib import Path

import torch
from capabilities import Case
from families import BY_NAME, base_of

from layercard.models.hooks import capturing
from layercard.models.layers import LinearModule
from layercard.models.load import shared_keys
from layercard.models.losses import keeps_logits, labelled_losses
from layercard.profiling.step_probe import ReplayedSet


def test_decoders_that_drop_positions_are_not_asked_for_some_logits() -> None:
    assert keeps_logits(base_of("gemma3").model)
    assert not keeps_logits(base_of("gemma4").model)


def test_blocks_that_read_keys_of_lower_ones_are_entered_from_the_first(tmp_path: Path) -> None:
    case = Case(BY_NAME["gemma4"], tmp_path)
    assert shared_keys(case.base.model) == "num_kv_shared_layers"
    held = ReplayedSet(case.base, case.data.examples, [1, 2], batch_size=4)
    assert all(list(kept) == [0] for kept in held.entries)
    held.move(2)
    assert all(list(kept) == [0] for kept in held.entries)


def test_a_map_that_runs_twice_gives_the_signals_of_both_calls(tmp_path: Path) -> None:
    case, rows = Case(BY_NAME["gemma3n"], tmp_path), dict[str, int]()

    def sink(one: LinearModule, a_ti: torch.Tensor, d_to: torch.Tensor, tokens: object) -> None:
        rows[one.name] = rows.get(one.name, 0) + len(a_ti)

    with capturing(case.base.model, case.base.blocks[:1]) as capture:
        capture.start(case.batch.attention_mask, sink)
        labelled_losses(case.base.model, case.batch)[0].sum().backward()
    tokens = int(case.batch.attention_mask.sum())
    assert (rows["altup.modality_router"], rows["mlp.down_proj"]) == (2 * tokens, tokens)


def test_maps_without_effect_are_in_no_placement() -> None:
    names = {
        name: {p.name for block in base_of(name).blocks for p in block.linear_modules} for name in ("falcon_h1", "gemma3n", "qwen3_next")
    }
    assert {"mamba.in_proj", "self_attn.q_proj"} <= names["falcon_h1"]
    assert "mamba.out_proj" not in names["falcon_h1"]
    assert "altup.correction_coefs" not in names["gemma3n"]
    assert not any(name.startswith("mlp.shared_expert.") for name in names["qwen3_next"])
