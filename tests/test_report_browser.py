"""The report in a real browser, from the disk and without network: everything is drawn and can be read, and the calculator follows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import NEEDS_BROWSER, VIEWS, chromium, opened, problems
from layercard.files import write_text
from layercard.report.page import report_page
from layercard.report.roi import RoiInputs, ratios_of, roi
from layercard.report.sources import read_sources
from layercard.report.trials import grouped
from test_report_page import full, run_folder

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 30 layers and 12 runs."""
    return write_text(tmp_path_factory.mktemp("report") / "report.html", report_page(full(30)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def test_what_cannot_be_read_is_found(browser: Any, tmp_path: Path) -> None:
    styles = {
        "under": "left:0;top:50px",
        "over": "left:2px;top:52px",
        "outside": "left:360px;top:90px",
        "cut off": "width:9px;overflow:hidden",
    }
    boxes = "".join(f"<p style='position:absolute;white-space:nowrap;{style}'>{text}</p>" for text, style in styles.items())
    head = "<!doctype html><html lang=en><title>bad</title>"
    page_file = write_text(tmp_path / "bad.html", f"{head}<p style='color:#eee'>pale</p>{boxes}")
    with opened(browser, page_file.as_uri(), 390) as page:
        wrong = " ".join(problems(page))
    assert all(words in wrong for words in ("overlap: under / over", "outside: outside", "cut: cut off", "color-contrast"))


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_everything_is_drawn_and_can_be_read(browser: Any, report: Path, width: int, scheme: str) -> None:
    with opened(browser, report.as_uri(), width, scheme, offline=True) as page:
        page.wait_for_selector("html[data-drawn]", timeout=60_000)
        assert problems(page) == []
        page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
        page.wait_for_function("document.querySelectorAll('.plot').length == document.querySelectorAll('.plot[data-drawn]').length")
        plots = page.locator(".plot").count()
        assert page.locator(".plot[data-drawn] .main-svg").count() >= plots > 15
        assert problems(page) == []


def test_the_calculator_follows_what_is_typed(browser: Any, report: Path) -> None:
    sources, page = full(30), browser.new_page()
    page.goto(report.as_uri())
    page.fill("#roi-gpu_price_per_hour", "7")
    page.fill("#roi-gpu_watts", "400")
    ratios = ratios_of(sources.placement.layers, sources.card, grouped(sources.trials))
    expected = roi(RoiInputs(gpu_price_per_hour=7, gpu_watts=400), ratios).results
    for name in ("saved_month", "energy_saved", "payback_months"):
        cell = page.locator(f'td[data-result="{name}"][data-end="mid"]')
        assert float(cell.get_attribute("data-exact")) == expected[name].mid
    # A decimal comma is refused in English, without a result anywhere, and read where the page's language writes it.
    page.fill("#roi-gpu_price_per_hour", "4,5")
    assert "GPU price" in page.inner_text("#roi-hint")
    results = page.locator("[data-result]")
    assert {results.nth(number).inner_text() for number in range(results.count())} == {"–"}
    page.evaluate("document.documentElement.lang = 'de'")
    page.fill("#roi-gpu_price_per_hour", "4,50")
    expected = roi(RoiInputs(gpu_price_per_hour=4.5, gpu_watts=400), ratios).results
    assert float(page.locator('td[data-result="saved_month"][data-end="mid"]').get_attribute("data-exact")) == expected["saved_month"].mid
    page.fill("#roi-gpus", "0")
    assert "GPUs a run" in page.inner_text("#roi-hint")
    assert page.get_attribute("#roi-gpus", "aria-invalid") == "true"
    page.close()


def test_print_is_at_most_eight_pages(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    assert 1 < len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4"))) <= 8
    page.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_page_of_a_run_says_it_all_on_the_first_screen(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    """Sentence, four tiles and the picture on the first screen, the calculator within two; nothing cut."""
    page_file = write_text(tmp_path / "report.html", report_page(read_sources([run_folder(tmp_path / "run", depth=30)])))
    with opened(browser, page_file.as_uri(), width, scheme, offline=True) as page:
        page.wait_for_selector("html[data-drawn]", timeout=60_000)
        bottom = {part: page.locator(part).first.bounding_box() for part in (".verdict", "main > .tiles", "#plot-loss", "#roi-leading")}
        assert all(box["y"] + box["height"] <= 900 for part, box in bottom.items() if part != "#roi-leading")
        assert bottom["#roi-leading"]["y"] < 1800
        assert problems(page) == []
