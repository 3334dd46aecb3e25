"""Cards of one model compared: agreement that does not mistake smoothness for evidence, what a swap loses, and the verdict."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import spearmanr

from cards import fake_card
from layercard.card.card import LayerCard
from layercard.commands.main import run
from layercard.errors import CardError, SelectionError
from layercard.selection.transfer import (
    AGAIN,
    REUSE,
    UNKNOWN,
    Agreement,
    Interval,
    Swap,
    Transfer,
    agreement,
    overlap,
    shared_measures,
    transfer,
    verdict,
)
from layercard.statistics.ranks import drawn_stretches, noise, noise_scale, plain_p_value, shift_p_value, spearman, spearman_rows

DEPTH = 30
Json = dict[str, Any]


def card_of(peak: float = 0.43, seed: int = 0, spread: float = 0.03, depth: int = DEPTH, **changes: Any) -> Json:
    """A fake card whose gains have their hump at `peak` of the depth, with intervals of ± `spread`, on data of its own."""
    card = fake_card(depth, **changes)
    card["data"]["fingerprint"] = f"{peak} {seed} {spread}"
    for layer in card["layers"]:
        gain = 1.2 - 2 * (layer["index"] / (depth - 1) - peak) ** 2 + 0.01 * math.sin(7 * layer["index"] + seed)
        for name, scale in (("gain_estimate", 1.0), ("step_probe", 0.4)):
            layer[name] = {"value": gain * scale, "low": gain * scale - spread * scale, "high": gain * scale + spread * scale}
    return card


def read(value: Json) -> LayerCard:
    return LayerCard.from_json(value)


def two(first: Json, second: Json, **options: Any) -> Transfer:
    return transfer([("a", read(first)), ("b", read(second))], **options)


# --- the statistics ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_spearman_equals_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    if len(set(x)) > 1 and len(set(y)) > 1:
        wanted = spearmanr(x, y, alternative="greater")
        assert spearman(x, y) == pytest.approx(wanted.statistic, abs=1e-12)
        if abs(wanted.statistic) < 0.999:
            assert plain_p_value(spearman(x, y), len(x)) == pytest.approx(wanted.pvalue, rel=1e-6)
    else:
        assert spearman(x, y) == 0.0
    assert spearman_rows(np.stack([x, y]), np.stack([y, y]))[0] == pytest.approx(spearman(x, y))


def smooth(rng: np.random.Generator) -> np.ndarray:
    """A random profile over depth that changes slowly: nothing but noise, smoothed."""
    at = np.arange(3 * DEPTH)
    kernel = np.exp(-0.5 * ((at[:, None] - at) / 4) ** 2)
    return np.asarray((kernel @ rng.standard_normal(3 * DEPTH))[DEPTH : 2 * DEPTH])


def test_smooth_profiles_without_relation_are_rarely_called_alike() -> None:
    rng = np.random.default_rng(0)
    found = [(x, y) for x, y in ((smooth(rng), smooth(rng)) for _ in range(400))]
    shifted = np.mean([shift_p_value(x, y) <= 0.05 for x, y in found])
    plain = np.mean([plain_p_value(spearman(x, y), DEPTH) <= 0.05 for x, y in found])
    assert shifted < 0.12, "holds its level about, though a shift breaks the profile at the end"
    assert plain > 0.2, "the usual p value is wrong here, which is why it is not the one that counts"
    assert shift_p_value(found[0][0], found[0][0] ** 3) == pytest.approx(1 / (2 * DEPTH))


def test_stretches_are_neighbours() -> None:
    drawn = drawn_stretches(30, 50, np.random.default_rng(0))
    assert drawn.shape == (50, 30)
    assert set(np.unique(drawn)) == set(range(30))
    assert ((drawn[:, 1:5] - drawn[:, :4]) % 30 == 1).all(), "five in a row, round the end"
    assert drawn_stretches(1, 2, np.random.default_rng(0)).tolist() == [[0], [0]]


def test_noise_has_the_spread_it_should_and_is_scaled_to_what_halves_showed() -> None:
    rng = np.random.default_rng(0)
    kernel = np.exp(-0.5 * (np.arange(30)[:, None] - np.arange(30)) ** 2 / 4)
    for drawn in (noise(np.full(30, 0.3), 4000, rng), noise(np.full(30, 0.3), 4000, rng, kernel)):
        assert drawn.std(axis=0) == pytest.approx(np.full(30, 0.3), rel=0.1)
    assert np.corrcoef(drawn[:, 10], drawn[:, 11])[0, 1] > 0.8
    profile, wide = np.linspace(0, 1, 30), np.full(30, 1.0)
    assert noise_scale(profile, wide, 0.0, rng) == 1.0
    scales = [noise_scale(profile, wide, halves, rng) for halves in (0.5, 0.8, 0.99)]
    assert 1.0 > scales[0] > scales[1] > scales[2] > 0.0


def test_agreement_of_real_and_of_shifted_profiles() -> None:
    same = agreement(read(card_of()), read(card_of(seed=1)), "gain_estimate")
    assert same.value > 0.95 and same.low > 0.3 and same.p <= 0.05
    far = agreement(read(card_of(0.05)), read(card_of(0.95)), "gain_estimate")
    assert far.value < -0.8 and far.high < 0.5 and far.p > 0.5
    for found in (same, far):
        assert -1 <= found.low <= found.value <= found.high <= 1


def test_more_noise_in_the_card_widens_the_interval() -> None:
    other = read(card_of(seed=1, stability={}))
    sharp, blurred = (agreement(read(card_of(spread=spread, stability={})), other, "step_probe") for spread in (0.01, 1.0))
    assert sharp.value == blurred.value
    assert blurred.low < sharp.low - 0.1


@pytest.mark.parametrize("depth", [3, 4, 6, 9])
def test_below_ten_layers_the_verdict_rests_on_what_is_lost(depth: int) -> None:
    alike = two(card_of(depth=depth, spread=0.005), card_of(seed=1, depth=depth, spread=0.005), k=1).pairs[0]
    assert alike.measures["gain_estimate"].p >= 1 / (2 * depth) > 0.05
    assert alike.verdict.word == REUSE and f"{depth} layers alone cannot rule chance out" in alike.verdict.reason, alike.verdict.reason
    other = two(card_of(0.0, depth=depth), card_of(1.0, depth=depth), k=1).pairs[0]
    assert other.verdict.word != REUSE, other.verdict.reason


# --- pairs of cards ---------------------------------------------------------------------------------------------------------


def test_alike_cards_are_reused() -> None:
    pair = two(card_of(), card_of(seed=1)).pairs[0]
    assert pair.verdict.word == REUSE, pair.verdict.reason
    assert set(pair.measures) == set(shared_measures([read(card_of())])) >= {"resnorm", "centrality", "gain_estimate"}
    assert "training_probe" not in pair.measures
    for swap in pair.swaps:
        assert len(swap.layers) == len(swap.own) == 5
        assert swap.lost.low <= swap.lost.value <= swap.lost.high
        assert swap.kept_own - swap.kept == pytest.approx(swap.lost.value)
        assert swap.lost.value > -1e-9, "no choice beats the target's own, on the target's card"


def test_a_measure_that_one_card_lacks_is_left_out() -> None:
    first, second = card_of(), card_of(seed=1)
    for layer in first["layers"]:
        layer["training_probe"] = layer["step_probe"]
    assert "training_probe" not in two(first, second).pairs[0].measures
    for layer in second["layers"]:
        layer["training_probe"] = layer["step_probe"]
    assert two(first, second).pairs[0].measures["training_probe"].value > 0.9
    second["layers"][4]["training_probe"] = None
    assert "training_probe" not in two(first, second).pairs[0].measures


def test_cards_that_rank_differently_are_profiled_again() -> None:
    pair = two(card_of(0.05), card_of(0.95)).pairs[0]
    assert pair.verdict.word == AGAIN, pair.verdict.reason


def test_the_best_layers_of_both() -> None:
    first, second = card_of(), card_of(seed=1)
    for card, best in ((first, (3, 4, 5, 6)), (second, (5, 6, 7, 8))):
        for at in best:
            card["layers"][at]["resnorm"]["value"] = 100.0 + at
    found = overlap(read(first), read(second), "resnorm", 4)
    assert (found.shared, found.layers, found.expected) == (2, (5, 6), pytest.approx(16 / 30))


def test_many_cards_give_matrices() -> None:
    cards = [("a", read(card_of())), ("b", read(card_of(seed=1))), ("c", read(card_of(0.9)))]
    found = transfer(cards, k=4, measure="step_probe")
    assert [(pair.a, pair.b) for pair in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    matrix = np.array(found.matrix)
    assert np.allclose(matrix, matrix.T) and np.allclose(matrix.diagonal(), 1)
    assert matrix[0, 2] == found.pairs[1].measures["step_probe"].value
    assert matrix[0, 1] > matrix[0, 2]
    lost = np.array(found.lost)
    assert lost[0, 2] == found.pairs[1].swaps[0].lost.value
    assert lost[2, 0] == found.pairs[1].swaps[1].lost.value
    value = found.to_json()
    assert value["schema"] == "layercard-transfer/1"
    assert json.loads(json.dumps(value, allow_nan=False)) == json.loads(json.dumps(value))
    assert transfer(cards, k=4, measure="step_probe") == found


def swap_of(value: float, low: float, high: float, source: str = "a", target: str = "b") -> Swap:
    lost = Interval(value=value, low=low, high=high)
    return Swap(source=source, target=target, layers=(1,), own=(2,), kept=95.0 - value, kept_own=95.0, lost=lost)


def ranks_of(value: float, low: float, high: float, p: float) -> Agreement:
    return Agreement(value=value, low=low, high=high, p=p, p_plain=1e-4)


GOOD = ranks_of(0.9, 0.5, 0.95, 0.02)
SMALL = (swap_of(0.5, 0.1, 1.0), swap_of(0.2, 0.0, 0.5, "b", "a"))


@pytest.mark.parametrize(
    ("ranks", "swaps", "stability", "word", "says"),
    [
        (GOOD, SMALL, 0.9, REUSE, "a's layers lose 0.5 points (0.1 to 1.0)"),
        (GOOD, SMALL, None, REUSE, "0.90 (0.50 to 0.95)"),
        (
            GOOD,
            (SMALL[0], swap_of(5.0, 3.0, 7.0, "b", "a")),
            0.9,
            AGAIN,
            "b's layers lose 5.0 points (3.0 to 7.0) on a, more than 2 points",
        ),
        (ranks_of(0.1, -0.3, 0.4, 0.5), SMALL, 0.9, AGAIN, "rank layers differently"),
        (GOOD, SMALL, 0.5, UNKNOWN, "profile more records"),
        (ranks_of(0.6, -0.1, 0.8, 0.02), SMALL, 0.9, UNKNOWN, "may be zero"),
        (ranks_of(0.4, 0.1, 0.7, 0.02), SMALL, 0.9, UNKNOWN, "is low"),
        (ranks_of(0.9, 0.5, 0.95, 0.2), SMALL, 0.9, UNKNOWN, "by chance (p = 0.20)"),
        (GOOD, (SMALL[0], swap_of(1.5, 0.5, 4.0, "b", "a")), 0.9, UNKNOWN, "b's layers may lose over 2 points on a"),
    ],
)
def test_verdicts_and_their_reasons(ranks: Agreement, swaps: tuple[Swap, Swap], stability: float | None, word: str, says: str) -> None:
    found = verdict(ranks, swaps, {"a": stability, "b": 0.9}, DEPTH)
    assert (found.word, says in found.reason) == (word, True), found.reason


# --- cards that cannot be compared --------------------------------------------------------------------------------------------


def of_model(card: Json, **model: Any) -> Json:
    changed = copy.deepcopy(card)
    changed["model"].update(model)
    return changed


def in_dtype(card: Json, dtype: str, **model: Any) -> Json:
    changed = of_model(card, **model)
    changed["settings"]["dtype"] = dtype
    return changed


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda: of_model(card_of(seed=1), name="gpt2", fingerprint="0000"), r"a is of smollm2-135m .* and b of gpt2 .* different models"),
        (lambda: of_model(card_of(depth=12), fingerprint="0000"), r"30 layers\) and b of smollm2-135m \(12 layers"),
        (lambda: of_model(card_of(seed=1), fingerprint="0000"), r"its weights differ \(fingerprints 0123456789abcdef and 0000\)"),
        (lambda: in_dtype(card_of(seed=1), "bfloat16", fingerprint="0000"), r"in float32 and b in bfloat16 .* --across-dtypes"),
        (card_of, "are the same card"),
    ],
)
def test_cards_that_do_not_belong_together(second: Callable[[], Json], message: str) -> None:
    with pytest.raises(CardError, match=message):
        two(card_of(), second())


def test_one_model_in_two_dtypes_on_request() -> None:
    half = in_dtype(card_of(seed=1), "bfloat16", fingerprint="0000", name="HuggingFaceTB/SmolLM2-135M")
    assert two(card_of(), half, across_dtypes=True).pairs[0].verdict.word == REUSE
    with pytest.raises(CardError, match="its weights differ"):
        two(card_of(), of_model(card_of(seed=1), fingerprint="0000"), across_dtypes=True)
    with pytest.raises(CardError, match="different models"):
        two(card_of(), in_dtype(card_of(seed=1), "bfloat16", fingerprint="0000", name="other"), across_dtypes=True)


def test_wrong_numbers_and_names() -> None:
    with pytest.raises(CardError, match="did you mean gain_estimate"):
        two(card_of(), card_of(seed=1), measure="gain_estimates")
    with pytest.raises(SelectionError, match="30"):
        two(card_of(), card_of(seed=1), k=31)
    with pytest.raises(CardError, match="at least two"):
        transfer([("a", read(card_of()))])


# --- the command --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three cards: two alike, one whose gains lie elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name, card in (("news", card_of()), ("mail", card_of(seed=1)), ("code", card_of(0.95))):
        (tmp_path / f"{name}.json").write_text(json.dumps(card), encoding="utf-8")
    return ["news.json", "mail.json", "code.json"]


def test_two_cards_in_words(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transfer", *files[:2], "-k", "4"]) == 0
    printed = capsys.readouterr().out
    assert "Verdict: reuse the card" in printed
    assert "Best 4 layers" in printed and "by chance 0.5" in printed
    assert "news → mail" in printed and "mail → news" in printed
    assert "Residual fraction" in printed


def test_many_cards_as_matrices_and_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["transfer", *files, "-o", "transfer.json"]) == 0
    printed = capsys.readouterr().out
    assert "news, mail: reuse the card" in printed
    assert "Spearman: gain estimate" in printed and "Points lost" in printed
    assert run(["transfer", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("transfer.json").read_text(encoding="utf-8"))
    assert run(["transfer", *files, "-o", "transfer.json"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["news.json"], "at least two cards"),
        (["news.json", "./news.json"], "are the same file"),
        (["news.json", "missing.json"], "no such file"),
        (["news.json", "mail.json", "-k", "99"], "99"),
        (["news.json", "mail.json", "--measure", "resnrom"], "did you mean resnorm"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    files: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(["transfer", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert words in printed.err


def test_files_of_one_name_are_told_apart(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, source in (("one", "news.json"), ("two", "mail.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "card.json").write_text((tmp_path / source).read_text())
    assert run(["transfer", "one/card.json", "two/card.json", "--json"]) == 0
    assert [card["name"] for card in json.loads(capsys.readouterr().out)["cards"]] == ["one/card.json", "two/card.json"]
