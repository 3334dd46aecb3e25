"""Reports of a card: the terminal table at several widths, and its frames; all from JSON values alone."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from rich.console import Console

from cards import fake_card, fake_placement
from layercard.card import numbers as readings
from layercard.card.card import LayerCard
from layercard.records import Estimate
from layercard.report.terminal import card_view, latency_view, placement_view, strip
from layercard.report.words import bar_fractions
from layercard.selection.placement import Placement


def printed(card: dict[str, Any], width: int, **options: Any) -> list[str]:
    """The card as a terminal of `width` columns shows it, line by line."""
    console = Console(width=width, markup=False, emoji=False, highlight=False, **options)
    with console.capture() as capture:
        console.print(card_view(LayerCard.from_json(card), console))
    return capture.get().splitlines()


def table_rows(lines: list[str]) -> list[str]:
    return [line for line in lines if re.match(r"^ *[▲^|]? *\d+ ", line)]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_table_has_one_row_a_layer_and_fits(width: int) -> None:
    card = fake_card()
    lines = printed(card, width)
    rows = table_rows(lines)
    assert [int(re.sub(r"[▲^|]", " ", row).split()[0]) for row in rows] == list(range(30))
    assert max(map(len, lines)) <= width
    assert all(readings.short(card["layers"][at]["gain_estimate"]["value"]) in row for at, row in enumerate(rows))
    assert all(readings.short(card["layers"][at]["resnorm"]["value"]) in row for at, row in enumerate(rows))
    marked = {at for at, row in enumerate(rows) if "▲" in row}
    assert marked == set(LayerCard.from_json(card).best_layers())


def test_wider_terminals_show_more() -> None:
    headers = [next(line for line in printed(fake_card(), width) if "Gain est." in line) for width in (80, 100, 160)]
    assert len(headers[0].split()) < len(headers[1].split()) < len(headers[2].split())
    assert "Condition" in headers[2]


def test_warnings_and_stability_in_words() -> None:
    text = " ".join(" ".join(printed(fake_card(warnings=["too few tokens [red]"], stability={"gain_estimate": 0.31}), 100)).split())
    assert "! too few tokens [red]" in text
    assert "unstable, do not rely on it" in text
    assert "very stable" in " ".join(printed(fake_card(), 100))


def test_terminal_without_unicode_gets_ascii(tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("w", encoding="ascii", errors="replace") as file:
        console = Console(file=file, width=80, markup=False)
        console.print(card_view(LayerCard.from_json(fake_card()), console))
    rows = table_rows((tmp_path / "out.txt").read_text(encoding="ascii").splitlines())
    assert len(rows) == 30


def test_a_card_without_step_probe_is_shown() -> None:
    card = fake_card(depth=4)
    for layer in card["layers"]:
        layer["step_probe"] = None
    lines = printed(card, 100)
    assert len(table_rows(lines)) == 4
    assert "Step probe" not in " ".join(lines)


def test_the_training_probe_is_shown_where_it_was_run() -> None:
    card = fake_card()
    assert "Trained" not in "\n".join(printed(card, 160))
    for layer in card["layers"]:
        layer["training_probe"] = {"value": 0.7 + layer["index"] / 1000, "low": 0.5, "high": 0.9}
    for width in (80, 160):
        lines = printed(card, width)
        assert "Trained" in "\n".join(lines)
        assert all(f"{0.7 + at / 1000:.3f}" in row for at, row in enumerate(table_rows(lines)))


def test_placement_view_says_why() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(placement_view(Placement.from_json(fake_placement(fake_card(), [2, 9]))))
    text = capture.get()
    assert "2 of 30 layers" in text
    assert "··■······■" in text
    assert "96% (93–99) of the performance of all layers" in text
    assert text.count("covers its neighbours") == 1


@given(st.one_of(st.just(0.0), st.floats(1e-99, 1e99), st.floats(-1e99, -1e-99)))
def test_short_numbers_are_short_and_true(value: float) -> None:
    text = readings.short(value)
    assert len(text) <= 8
    assert math.isclose(float(text.replace("−", "-").replace(",", "")), value, rel_tol=0.06)


@given(st.tuples(st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10)).map(sorted), st.integers(1, 40))
def test_strips_are_as_wide_as_asked_and_have_one_dot(ends: list[float], width: int) -> None:
    low, value, high = ends
    text = strip(Estimate(value=value, low=low, high=high), (-10, 10), width)
    assert len(text) == width
    assert text.count("●") == 1


@given(st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), max_size=8), st.booleans())
def test_bars_lie_between_nothing_and_full(values: list[float | None], wide: bool) -> None:
    fractions = bar_fractions([None if v is None else Estimate(value=v) for v in values], wide=wide)
    assert [f is None for f in fractions] == [v is None for v in values]
    assert all(-1e-9 <= f <= 1 + 1e-9 for f in fractions if f is not None)


def test_terminal_view_loads_neither_pandas_nor_plotly() -> None:
    script = "import sys, layercard.report.terminal; print([m for m in ('pandas', 'plotly', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("repeats", [1, 5])
def test_a_single_round_of_latency_has_no_range(repeats: int) -> None:
    ratio, seconds = {"value": 1.2, "low": 1.2, "high": 1.2}, {"value": 0.5}
    speeds = {"first_token_seconds": seconds, "tokens_per_second": seconds, "weights_bytes": 1, "peak_bytes": 1}
    ratios = {"first_token_ratio": ratio, "tokens_per_second_ratio": ratio}
    about = {"model": {"name": "m", "layers": 2}, "dtype": "float32", "device": "cpu", "threads": 1, "prompt_tokens": 4, "new_tokens": 4}
    variants = [{"name": "base", "kind": "base", **speeds}, {"name": "adapter", "kind": "adapter", **speeds, **ratios}]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(latency_view({**about, "batch_size": 1, "repeats": repeats, "variants": variants}))
    assert ("(1.20–1.20)" in capture.get(), "One round, so without a range" in capture.get()) == (repeats > 1, repeats == 1)
