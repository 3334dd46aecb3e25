"""The app in a real browser: a card is opened, a budget moved, the placement downloaded; nasty cards stay text.

Needs gradio, the Python package `playwright` and a Chromium (`CHROMIUM`, else `/usr/bin/chromium`).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cards import fake_card
from layercard.selection.placement import Placement

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("gradio", reason="needs gradio")
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
NASTY = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>${window.ran = 3}{{7}}"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a Chromium at {CHROMIUM}")]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A served folder with one good card, one with a nasty name, and three that are refused."""
    folder = tmp_path_factory.mktemp("cards")
    good = fake_card(12)
    nasty = fake_card(6, model={"name": NASTY, "fingerprint": "f", "layers": 6})
    million = {**good, "model": {**good["model"], "layers": 10**6}}
    no_number = {**good, "descent": [float("nan")] * 12}
    path_name = fake_card(6, model={"name": "../../../etc/passwd", "fingerprint": "p", "layers": 6})
    for name, value in {"a": good, "nasty": nasty, "million": million, "nan": no_number, "path": path_name}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    command = [sys.executable, "-m", "layercard.commands.main", "app", "--cards", str(folder), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        yield found[0]
        process.terminate()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """A page on the served folder; it must end without an error in its console, and without asking any other server."""
    wrong: list[str] = []
    with playwright.sync_playwright() as machine:
        browser = machine.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        opened = browser.new_page()
        opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("request", lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else wrong.append(asked.url))
        opened.goto(address)
        opened.wait_for_selector("text=smollm2-135m stands", timeout=120_000)
        yield opened
        browser.close()
    assert wrong == []


def choose_card(page: Any, words: str) -> None:
    page.locator("#card input").first.click()
    page.get_by_role("option").filter(has_text=words).first.click()


def test_a_moved_budget_moves_the_placement_that_is_downloaded(page: Any, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Select", exact=True).click()
    lead = page.locator("#tiles .lc-lead")
    playwright.expect(lead).to_contain_text("Layers", timeout=60_000)
    before = lead.inner_text()
    box = page.locator("#kept input[type=number]")
    box.fill("60")
    box.press("Tab")
    playwright.expect(lead).not_to_have_text(before, timeout=60_000)
    playwright.expect(page.locator("#take-away")).to_contain_text("--min-performance 60%", timeout=60_000)
    with page.expect_download() as started:
        page.locator("#get-placement").click()
    path = tmp_path / started.value.suggested_filename
    started.value.save_as(path)
    placement = Placement.load(path)
    assert path.name == "placement.json" and placement.asked["min_performance"] == "60%"
    assert placement.predicted["performance_kept"]["value"] >= 0.6 - 1e-6


def test_nasty_cards_are_text_or_a_clear_error(page: Any) -> None:
    choose_card(page, "nasty.json")
    page.wait_for_selector("text=window.ran = 1", timeout=60_000)
    playwright.expect(page.locator(".lc-lead").first).to_contain_text(NASTY, timeout=60_000)
    choose_card(page, "path.json")
    playwright.expect(page.locator(".lc-lead").first).to_contain_text("../../../etc/passwd", timeout=60_000)
    page.get_by_role("tab", name="Files", exact=True).click()
    for name, reason in (("million.json", "model.layers"), ("nan.json", "finite number")):
        playwright.expect(page.locator("tr", has_text=name).first).to_contain_text(reason)
    assert page.evaluate("window.ran") is None
    assert "root:" not in page.content()
