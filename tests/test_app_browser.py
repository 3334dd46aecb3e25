"""The app in a real browser: from a card to a placement, by hand, trained, cancelled and trained again; nasty cards stay text."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import NEEDS_BROWSER, VIEWS, chromium, opened, problems
from cards import fake_card
from layercard.card.card import LayerCard
from layercard.selection.placement import Placement
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

pytest.importorskip("gradio", reason="needs gradio")
NASTY = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>${window.ran = 3}{{7}}"
PATIENT = 120_000
pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with data and its card, a card with a nasty name, and three that are refused."""
    from layercard.data.load import load_data
    from layercard.models.load import load_model
    from layercard.profiling.profile import profile_records
    from layercard.settings import ProfileSettings

    folder = tmp_path_factory.mktemp("cards")
    build_tiny("llama", num_hidden_layers=6).save_pretrained(folder / "tiny-llama")
    tiny_tokenizer().save_pretrained(folder / "tiny-llama")
    data = write_records(folder / "mine.jsonl", tiny_records(40))
    base = load_model(str(folder / "tiny-llama"))
    profile_records(base, load_data(str(data), base.tokenizer), ProfileSettings()).save(folder / "a.json")
    good = LayerCard.load(folder / "a.json").to_json()
    made = {"nasty": fake_card(6, model={"name": NASTY, "fingerprint": "f", "layers": 6})}
    made["million"] = {**good, "model": {**good["model"], "layers": 10**6}}
    made["nan"] = {**fake_card(12), "descent": [float("nan")] * 12}
    made["path"] = fake_card(6, model={"name": "../../../etc/passwd", "fingerprint": "p", "layers": 6})
    for name, value in made.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "layercard", "app", "--cards", str(folder), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        yield found[0]
        process.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def shows(page: Any, where: str, words: str) -> None:
    """Wait until a part of the page says something."""
    page.locator(where).filter(has_text=words).first.wait_for(timeout=PATIENT)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click(timeout=PATIENT)


def choose_card(page: Any, words: str) -> None:
    page.locator("#card input").first.click()
    page.get_by_role("option").filter(has_text=words).first.click()


def test_from_a_card_to_a_trained_adapter(browser: Any, address: str, folder: Path, tmp_path: Path) -> None:
    with opened(browser, address) as page:
        # The card, and a placement for another budget than the first one.
        shows(page, "#about", "6 layers, measured on 40 records")
        page.locator("#heat .js-plotly-plot").wait_for(timeout=PATIENT)
        tab(page, "Choose")
        shows(page, "#tiles", "Layers")
        page.locator("#kept input[type=number]").fill("60")
        page.locator("#kept input[type=number]").press("Tab")
        shows(page, "#take-away", "--min-performance 60%")

        # By hand: the boxes start from the choice, and what changes is told against it.
        boxes = page.locator("#layers input")
        before = [boxes.nth(layer).is_checked() for layer in range(6)]
        with page.expect_download() as started:
            page.locator("#get-placement").click()
        started.value.save_as(tmp_path / "placement.json")
        placement = Placement.load(tmp_path / "placement.json")
        assert [layer for layer, is_checked in enumerate(before) if is_checked] == list(placement.layers)
        assert placement.asked["min_performance"] == "60%"
        boxes.nth(0).click()
        shows(page, "#tiles", "By hand")

        # Trained on 8 records; cancelled at once, then again to the end.
        tab(page, "Run")
        page.locator("#records input[type=number]").fill("8")
        page.locator("#records input[type=number]").press("Tab")
        page.locator("#start").click()
        page.locator("#job [role=progressbar]").wait_for(timeout=PATIENT)
        page.locator("#stop").click()
        shows(page, "#job", "cancelled; nothing of it was kept")
        assert not list(folder.glob("*-adapter"))
        page.locator("#start:not([disabled])").click(timeout=PATIENT)
        shows(page, "#job", "held-out loss went from")
        (run,) = folder.glob("*-adapter/run.json")
        record = json.loads(run.read_text(encoding="utf-8"))
        layers = {layer for layer, is_checked in enumerate(before) if is_checked != (layer == 0)}
        assert set(record["placement"]["layers"]) == layers and record["data"]["records"] == 8

        # A price with a comma takes the result away, and comes back with a point.
        tab(page, "Savings")
        shows(page, "#saved", "Saved a year")
        page.locator("#roi-gpu_price_per_hour textarea, #roi-gpu_price_per_hour input").fill("4,5")
        shows(page, "#headline", "GPU price")
        assert page.locator("#saved").inner_text().strip() == ""
        page.locator("#roi-gpu_price_per_hour textarea, #roi-gpu_price_per_hour input").fill("4.5")
        shows(page, "#saved", "Saved a year")


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_tab_can_be_read(browser: Any, address: str, width: int, scheme: str) -> None:
    with opened(browser, address, width, scheme) as page:
        shows(page, "#about", "layers, measured on")
        page.locator("#heat .js-plotly-plot").wait_for(timeout=PATIENT)
        found = []
        for name in ("Card", "Choose", "Compare", "Run", "Savings"):
            tab(page, name)
            page.wait_for_timeout(1500)
            found += [f"{name}: {words}" for words in problems(page)]
        assert found == []


def test_nasty_cards_are_text_or_a_clear_error(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        shows(page, "#about", "layers, measured on")
        choose_card(page, "nasty.json")
        shows(page, "#about", NASTY)
        choose_card(page, "path.json")
        shows(page, "#about", "../../../etc/passwd")
        page.get_by_text("All files that were found").click()
        for name, reason in (("million.json", "layers"), ("nan.json", "finite number")):
            shows(page, f"tr:has-text('{name}')", reason)
        assert page.evaluate("window.ran") is None
        assert "root:" not in page.content()
