"""From a model and records to a card."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

from cards import fake_card
from layercard.card.card import LayerCard
from layercard.checkpoint import discard
from layercard.commands.main import run
from layercard.data.load import Dataset
from layercard.errors import CardError, DataError, ModelError, OutputError
from layercard.models.load import BaseModel, describe, wrap_model
from layercard.profiling import profile as profiling
from layercard.profiling.profile import profile_records as profile, split_records
from layercard.records import Estimate
from layercard.settings import ProfileSettings
from test_capture import assert_same, examples, state
from tiny import DISTINCT_FAMILIES, build_tiny, tiny_tokenizer

LENGTHS = (9, 6, 12, 7, 5, 11, 8, 10, 14, 13, 9, 8)
MEASURES = [
    "resnorm",
    "resnorm_rank",
    "residual_fraction",
    "gradient_norm",
    "activation_energy",
    "effective_rank",
    "condition",
    "noise_amplification",
    "predicted_gain",
    "centrality",
    "step_probe",
    "step_curvature",
    "longest_step",
    "gain_estimate",
]


def dataset(lengths: tuple[int, ...] = LENGTHS, truncated: int = 0) -> Dataset:
    return Dataset(tuple(examples(lengths, seed=4)), "random tokens", "0" * 16, truncated)


def base_of(family: str = "llama") -> BaseModel:
    return wrap_model(build_tiny(family), tiny_tokenizer())


@pytest.fixture(scope="module")
def card() -> LayerCard:
    return profile(base_of(), dataset(), ProfileSettings(rank=2, batch_size=3, cost=False))


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_every_family_gets_a_whole_card(family: str) -> None:
    base = base_of(family)
    before = state(base.model)
    card = profile(base, dataset(), ProfileSettings(rank=2, batch_size=3, cost=False))
    assert_same(before, state(base.model))
    assert [layer.index for layer in card.layers] == [0, 1, 2]
    for measure in MEASURES:
        for layer in card.layers:
            sampled = getattr(layer, measure)
            assert sampled.low <= sampled.value <= sampled.high, measure
    for layer, block in zip(card.layers, base.blocks, strict=True):
        assert [module.path for module in layer.modules] == [p.path for p in block.linear_modules]
        assert 0 <= layer.residual_fraction.value < 1
        assert layer.condition.value >= 1
    assert card.data.records == 12 and card.data.fit_records is None  # all of them make steps and measure


def test_the_same_seed_gives_the_same_card(card: LayerCard) -> None:
    again = profile(base_of(), dataset(), ProfileSettings(rank=2, batch_size=3, cost=False))
    assert again.to_json() == card.to_json()
    other = profile(base_of(), dataset(), ProfileSettings(rank=2, batch_size=3, seed=1, cost=False))
    assert other.to_json() != card.to_json()


@pytest.mark.parametrize("at", ["fit_pass", "cross_pass", "held_out_pass", "step_probe"])
def test_the_model_is_bit_for_bit_the_same_after_a_failure_in_the_middle(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    base.model.train()
    before = state(base.model)
    calls = {"n": 0}

    def failing(phase: str, done: int, total: int) -> None:
        calls["n"] += 1
        if phase.replace(" ", "_").replace("held-out", "held_out") == at:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        profile(base, dataset(), ProfileSettings(rank=2, batch_size=3, cost=False), failing)
    assert calls["n"] > 0
    assert_same(before, state(base.model))


def test_few_records_are_refused() -> None:
    with pytest.raises(DataError, match="at least 4"):
        profile(base_of(), dataset((5, 6, 7)))


def test_a_loss_that_is_not_finite_is_named() -> None:
    base = base_of()
    with torch.no_grad():
        base.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"loss .* is nan"):
        profile(base, dataset(), ProfileSettings(rank=2, cost=False))


def test_the_split_is_seeded_and_disjoint() -> None:
    fit, held = split_records(dataset(), ProfileSettings())
    assert len(fit) == len(held) == 6
    assert {e.input_ids for e in fit}.isdisjoint(e.input_ids for e in held)
    assert split_records(dataset(), ProfileSettings(seed=9))[0] != fit


def test_without_step_probe_the_card_says_so() -> None:
    card = profile(base_of(), dataset(), ProfileSettings(rank=2, probe="none", cost=False))
    assert all(layer.step_probe is None for layer in card.layers)
    with pytest.raises(CardError, match="no step_probe; it has activation_energy"):
        card.values("step_probe")


def test_warnings_in_words(card: LayerCard) -> None:
    few = profile(base_of(), dataset((5, 5, 5, 5), truncated=3), ProfileSettings(rank=2, cost=False))
    text = " | ".join(few.warnings)
    assert "few tokens" in text and "3 records were longer" in text


def test_a_massive_activation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    with torch.no_grad():
        base.model.get_parameter("model.layers.1.post_attention_layernorm.weight")[5] = 3000.0
    card = profile(base, dataset(), ProfileSettings(rank=2, cost=False))
    assert any("massive activations in layer 1" in warning for warning in card.warnings)


def test_a_card_survives_the_disk_and_refuses_what_is_broken(card: LayerCard, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = card.save(tmp_path / "card.json")
    assert LayerCard.load(path).to_json() == card.to_json()
    with pytest.raises(OutputError, match="exists already"):
        card.save(path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(CardError, match=r"is not a whole card \(line \d+"):
        LayerCard.load(path)
    value = json.loads(whole)
    for change, message in (
        ({"schema": "layercard/0"}, "schema 'layercard/0' is not 'layercard/1'"),
        ({"layers": value["layers"][:2]}, "layers must be 0 to 2 in order, found 2"),
        ({"coupling": [[1.0]]}, "coupling must be 3 by 3"),
        ({"model": {"name": "x", "fingerprint": "y", "layers": "many"}}, "model.layers"),
        ({"settings": {"probe": 5}}, "settings: probe 5 is unknown"),
        ({"settings": {"rank": "8"}}, "settings: rank is '8'; give a whole number from 1"),
        ({"settings": {"seed": 1e308}}, "settings: seed is"),
        ({"settings": {"dtype": []}}, r"settings: dtype is \[\], not a text"),
    ):
        with pytest.raises(CardError, match=message):
            LayerCard.from_json({**value, **change}, "card.json")


def test_a_card_of_another_model_is_refused(card: LayerCard) -> None:
    card.check_model(describe(base_of()))
    other = wrap_model(build_tiny("llama", seed=1), tiny_tokenizer(), name="other")
    with pytest.raises(CardError, match="profile this model first"):
        card.check_model(describe(other))


def test_every_phase_is_told_to_its_end() -> None:
    seen = {}
    settings = ProfileSettings(rank=2, batch_size=3, probe="train", probe_steps=4, cost=False)
    profile(base_of(), dataset(), settings, lambda phase, done, total: seen.__setitem__(phase, (done, total)))
    assert list(seen) == ["fit pass", "steps", "cross pass", "held-out pass", "entries", "step probe", "training probe"]
    assert all(done == total for done, total in seen.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gets_nearly_the_same_card(card: LayerCard, dtype: torch.dtype) -> None:
    base = wrap_model(build_tiny("llama").to(dtype), tiny_tokenizer())
    half = profile(base, dataset(), ProfileSettings(rank=2, batch_size=3, cost=False))
    assert half.settings["dtype"] == str(dtype).removeprefix("torch.")
    for measure in ("resnorm", "gradient_norm", "activation_energy", "effective_rank"):
        assert half.values(measure) == pytest.approx(card.values(measure), rel=0.05)


def split_by_accelerate(disk: str | None = None) -> PreTrainedModel:
    """A model whose parts accelerate has placed one by one, with its hooks; with `disk` two blocks are left there."""
    away = "cpu" if disk is None else "disk"
    inner = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.2": away}
    places |= {f"model.layers.1.{name}": away for name in inner} | {"model.norm": "cpu", "lm_head": "cpu"}
    model = build_tiny("llama", tie_word_embeddings=False)
    return dispatch_model(model, places, main_device="cpu", offload_dir=disk, force_hooks=True)


def test_a_model_that_accelerate_has_split_is_profiled_as_it_is() -> None:
    how = ProfileSettings(rank=2, batch_size=3, cost=False)
    whole = profile(wrap_model(build_tiny("llama", tie_word_embeddings=False), tiny_tokenizer()), dataset(), how)
    base = wrap_model(split_by_accelerate(), tiny_tokenizer())
    before = state(base.model)
    hooks = [module._hf_hook for module in base.model.modules() if "_hf_hook" in vars(module)]
    assert len(hooks) > 20
    assert profile(base, dataset(), how).to_json() == whole.to_json()
    assert_same(before, state(base.model))
    assert [module._hf_hook for module in base.model.modules() if "_hf_hook" in vars(module)] == hooks


def test_offloaded_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layers\.1\..* is offloaded.*--stream"):
        wrap_model(split_by_accelerate(str(tmp_path)), tiny_tokenizer())


def test_records_go_on_until_the_choice_is_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, how, sizes = dataset(tuple(6 + number % 7 for number in range(40))), ProfileSettings(rank=2, probe_records=4, cost=False), []

    def watched(earlier: LayerCard, card: LayerCard) -> bool:
        sizes.append((earlier.data.records, card.data.records))
        return card.data.records == 32

    monkeypatch.setattr(profiling, "same_choice", watched)
    card = profiling.profile_until_stable(base_of(), data, how, state=tmp_path / "state")
    assert sizes == [(16, 32)] and card.data.records == 32
    assert (card.settings["records"], card.settings["choice_stable"]) == ("auto", True)
    assert profiling.profile_until_stable(base_of(), data, how, state=tmp_path / "state").to_json() == card.to_json()  # from the state
    discard(tmp_path / "state")
    monkeypatch.setattr(profiling, "same_choice", lambda *_: False)
    last = profiling.profile_until_stable(base_of(), data, how)
    assert last.data.records == 40 and last.settings["choice_stable"] is False
    assert last.layers == profile(base_of(), data, how).layers


def test_a_choice_is_the_same_where_layers_and_order_are(card: LayerCard) -> None:
    made = LayerCard.from_json(fake_card(30))
    assert profiling.same_choice(made, made)
    turned = made.model_copy(
        update={
            "layers": tuple(
                layer.model_copy(update={"gain_estimate": other.gain_estimate})
                for layer, other in zip(made.layers, reversed(made.layers), strict=True)
            )
        }
    )
    assert not profiling.same_choice(made, turned)
    near_the_end = [1e-6] * 25 + [1.0] * 5
    probes = [
        layer.model_copy(update={"step_probe": Estimate(value=value)}) for layer, value in zip(made.layers, near_the_end, strict=True)
    ]
    assert not profiling.same_choice(made, made.model_copy(update={"layers": tuple(probes)}))


def test_a_card_of_an_earlier_version_is_read(card: LayerCard) -> None:
    earlier = LayerCard.load(Path(__file__).parents[1] / "benchmarks" / "results" / "cards" / "e2e-64.json")
    assert earlier.cross_fitted == () and earlier.data.fit_records == 38 and earlier.layers[0].step_curvature is None
    assert set(MEASURES) - set(card.cross_fitted) == {
        "gradient_norm", "activation_energy", "effective_rank", "condition", "noise_amplification"
    }  # fmt: skip


@pytest.mark.parametrize("records", ["many", "0", "-3", "1e3"])
def test_records_that_are_no_number_are_one_line(records: str, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "nowhere", "--data", str(tiny_file), "--records", records, "-o", str(tmp_path / "card.json")]) == 2
    err = capsys.readouterr().err
    assert "give a whole number from 1, or auto" in err and err.count("\n") == 1
